use std::time::Duration;

use futures::StreamExt;
use tempfile::TempDir;

use super::*;
use crate::conformance::{self, Harness};
use crate::store::{Condition, Op, WatchEvent};
use crate::{ErrorKind, Records};

const SOON: Duration = Duration::from_secs(10);

async fn open(dir: &TempDir) -> SharedMetastore {
    SharedMetastore::open(dir.path()).await.unwrap()
}

fn put(key: &str) -> Txn {
    Txn {
        when: vec![],
        then: vec![Op::put(key, "v")],
    }
}

async fn gone(store: &SharedMetastore, key: &str) {
    let wait = async {
        while store.get(key).await.unwrap().is_some() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, wait).await.expect("in time");
}

/// The contract holds for a process that asks the owner, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_over_the_socket() {
    #[derive(Default)]
    struct OverTheSocket {
        given: Mutex<Vec<(TempDir, SharedMetastore)>>,
    }

    #[async_trait]
    impl Harness for OverTheSocket {
        async fn fresh(&self) -> Arc<dyn Metastore> {
            let dir = tempfile::tempdir().unwrap();
            let owner = SharedMetastore::open(dir.path()).await.unwrap();
            let caller = SharedMetastore::open(dir.path()).await.unwrap();
            assert!(owner.is_owner() && !caller.is_owner());
            assert_eq!(caller.owner(), Some(std::process::id()));
            self.given.lock().unwrap().push((dir, owner));
            Arc::new(caller)
        }

        async fn compact(&self) {
            let given = self.given.lock().unwrap();
            let Link::Own { store, .. } = &*given.last().unwrap().1.inner.link() else {
                panic!("the owner asks somebody");
            };
            store.compact(i64::MAX);
        }

        fn ttl_min(&self) -> Duration {
            Duration::from_millis(500)
        }
    }

    conformance::run_all(&OverTheSocket::default()).await;
}

/// Whoever is first owns the file, all others ask that one, and all see the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_those_that_start_at_once_exactly_one_owns() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..8 {
        let all = futures::future::join_all((0..8).map(|_| {
            let dir = dir.path().to_owned();
            tokio::spawn(async move { SharedMetastore::open(&dir).await.unwrap() })
        }));
        let all: Vec<SharedMetastore> = all.await.into_iter().map(|s| s.unwrap()).collect();
        assert_eq!(all.iter().filter(|store| store.is_owner()).count(), 1);
        for (number, store) in all.iter().enumerate() {
            let key = format!("{round}/{number}");
            assert!(store.txn(put(&key)).await.unwrap().committed);
            let other = &all[(number + 1) % all.len()];
            assert!(other.get(&key).await.unwrap().is_some());
        }
    }
}

/// What the owner's end means to the others: one of them owns the file, nothing that was written
/// is lost, leases are, and who holds one is told at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_owner_ends_another_process_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let owner = open(&dir).await;
    let (one, two) = (open(&dir).await, open(&dir).await);
    one.txn(put("kept")).await.unwrap();
    let lease = one.grant_lease(Duration::from_secs(3600)).await.unwrap();
    let then = vec![Op::put_leased("leased", "v", lease)];
    one.txn(Txn { when: vec![], then }).await.unwrap();
    let before = one.identity().await.unwrap();
    let mut told = one.changes().unwrap();
    let mut events = two.watch("", before.revision + 1).await.unwrap();
    drop(owner);
    let ended = events.next().await.unwrap().unwrap_err();
    assert_eq!(ended.kind(), ErrorKind::Relist, "{ended}");

    for store in [&one, &two] {
        assert!(store.get("kept").await.unwrap().is_some());
        assert!(store.get("leased").await.unwrap().is_none());
    }
    assert!(told.has_changed().unwrap());
    told.mark_unchanged();
    assert!(one.is_owner() != two.is_owner());
    let lost = one.keep_alive(lease).await.unwrap_err();
    assert!(matches!(lost, Error::LeaseLost { .. }), "{lost}");
    let now = two.identity().await.unwrap();
    assert_eq!(now.cluster_id, before.cluster_id);
    assert!(now.revision > before.revision);
    // Another lease is not taken for the one that was lost.
    let other = two.grant_lease(Duration::from_secs(3600)).await.unwrap();
    assert!(other != lease);
}

/// A process that is killed says nothing; its connection does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leases_of_a_process_end_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let owner = open(&dir).await;
    let caller = open(&dir).await;
    let lease = caller.grant_lease(Duration::from_secs(3600)).await.unwrap();
    let then = vec![Op::put_leased("leased", "v", lease)];
    caller.txn(Txn { when: vec![], then }).await.unwrap();
    assert!(owner.get("leased").await.unwrap().is_some());
    drop(caller);
    gone(&owner, "leased").await;
}

/// Writers that never stop, while owners end one after the other: every write that was answered
/// is there, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_lost_while_owners_come_and_go() {
    const WRITES: i64 = 60;
    let dir = tempfile::tempdir().unwrap();
    let first = open(&dir).await;
    let writers: Vec<_> = (0..3)
        .map(|writer| {
            let dir = dir.path().to_owned();
            tokio::spawn(async move {
                let mut store = SharedMetastore::open(&dir).await.unwrap();
                for number in 0..WRITES {
                    // Every so often this process ends, and another one goes on.
                    if number % 20 == 19 {
                        drop(store);
                        store = SharedMetastore::open(&dir).await.unwrap();
                    }
                    let key = format!("{writer}/{number}");
                    let when = vec![Condition::Absent(key.clone())];
                    let then = vec![Op::put(&key, "v")];
                    let outcome = store.txn(Txn { when, then }).await.unwrap();
                    // Where the answer was lost with an owner, it is there already.
                    assert!(outcome.committed || store.get(&key).await.unwrap().is_some());
                }
            })
        })
        .collect();
    sleep(Duration::from_millis(20)).await;
    drop(first);
    for writer in writers {
        writer.await.unwrap();
    }
    let store = open(&dir).await;
    assert_eq!(
        store.list("").await.unwrap().entries.len() as i64,
        3 * WRITES
    );
}

/// A listing larger than any message.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_listing_comes_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let owner = open(&dir).await;
    for number in 0..20 {
        let then = vec![Op::put(format!("k{number:02}"), vec![number; 500 << 10])];
        owner.txn(Txn { when: vec![], then }).await.unwrap();
    }
    let caller = open(&dir).await;
    let all = owner.list("k").await.unwrap();
    assert!(all.entries.iter().map(|e| e.value.len()).sum::<usize>() > 2 * ANSWER_BYTES_MAX);
    assert_eq!(caller.list("k").await.unwrap(), all);
    assert_eq!(caller.list_keys("k").await.unwrap().entries.len(), 20);
}

/// An owner that is stopped must not stop its callers, and is named.
#[tokio::test]
async fn an_owner_that_does_not_answer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let _held = EmbeddedMetastore::open(dir.path()).unwrap();
    let _mute = socket::listen(dir.path()).unwrap();
    let error = SharedMetastore::open(dir.path()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry);
    let text = error.to_string();
    let start = format!(
        "process {} owns the state and did not answer",
        std::process::id()
    );
    assert!(text.starts_with(&start), "{text}");
}

#[tokio::test]
async fn an_owner_of_another_version_is_named_with_both() {
    let dir = tempfile::tempdir().unwrap();
    let held = EmbeddedMetastore::open(dir.path()).unwrap();
    let _serving = Serving::start_as(dir.path(), &held, PROTOCOL + 1).unwrap();
    let error = SharedMetastore::open(dir.path()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    let text = error.to_string();
    for part in [
        format!("process {} owns the state", std::process::id()),
        format!("speaks protocol {}", PROTOCOL + 1),
        format!("with protocol {PROTOCOL}"),
    ] {
        assert!(text.contains(&part), "{text}");
    }
}

/// An owner that shares nothing, as one of an earlier version.
#[tokio::test]
async fn an_owner_that_does_not_listen_keeps_the_state_busy() {
    let dir = tempfile::tempdir().unwrap();
    let _held = EmbeddedMetastore::open(dir.path()).unwrap();
    let error = SharedMetastore::open(dir.path()).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Busy { .. }), "{text}");
    assert!(
        text.contains(&format!("process {}", std::process::id())),
        "{text}"
    );
}

/// An owner that lets the store go is over for its callers, though its process lives on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_process_can_own_again() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..3 {
        let owner = open(&dir).await;
        let records = Records::new(Arc::new(open(&dir).await));
        let mut follow = records.follow("k");
        assert_eq!(follow.next().await.unwrap().len(), 0);
        owner.txn(put("k")).await.unwrap();
        let mut events = owner.watch("k", 1).await.unwrap();
        assert!(matches!(
            events.next().await,
            Some(Ok(WatchEvent::Put(_)) | Err(_))
        ));
        drop((owner, events));
        assert_eq!(follow.next().await.unwrap().len(), 1);
        let store = records.store();
        let then = vec![Op::delete("k")];
        store.txn(Txn { when: vec![], then }).await.unwrap();
        drop((records, follow));
    }
}

/// A call without an answer is made again at the next owner, though it may have happened: whoever
/// publishes, asks for a load or takes it back gets the answer that it would have got.
#[tokio::test]
async fn what_is_asked_twice_is_answered_as_once() {
    /// Every transaction happens, loses its answer, and is made again.
    #[derive(Debug)]
    struct Forgetful(EmbeddedMetastore);

    #[async_trait]
    impl Metastore for Forgetful {
        async fn get(&self, key: &str) -> Result<Option<Entry>> {
            self.0.get(key).await
        }
        async fn list(&self, prefix: &str) -> Result<Listing> {
            self.0.list(prefix).await
        }
        async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
            self.0.txn(txn.clone()).await?;
            self.0.txn(txn).await
        }
        async fn watch(&self, prefix: &str, from_revision: i64) -> Result<WatchStream> {
            self.0.watch(prefix, from_revision).await
        }
        async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId> {
            self.0.grant_lease(ttl).await
        }
        async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
            self.0.keep_alive(lease).await
        }
        async fn revoke_lease(&self, lease: LeaseId) -> Result<()> {
            self.0.revoke_lease(lease).await
        }
        async fn identity(&self) -> Result<ClusterIdentity> {
            self.0.identity().await
        }
    }

    let records = Records::new(Arc::new(Forgetful(EmbeddedMetastore::in_memory())));
    let large = format!("{{\"text\": \"{}\"}}", "x".repeat(1 << 20));
    for (version, document) in [(1, "{}"), (2, large.as_str())] {
        records
            .publish_layout("a.b", version, document)
            .await
            .unwrap();
        let name = format!("a.b:{version}");
        assert_eq!(records.request_load(&name).await.unwrap().version, version);
    }
    assert_eq!(records.layout("a.b", 2).await.unwrap(), Some(large));
    // What is wrong is still said.
    let stale = records.request_load("a.b:1").await.unwrap_err();
    assert!(
        matches!(
            stale,
            Error::StaleVersion {
                current: 2,
                given: 1,
                ..
            }
        ),
        "{stale}"
    );
    assert!(
        records
            .request_unload("a.b")
            .await
            .unwrap()
            .unwrap()
            .unloaded
    );
    assert_eq!(records.request_load("a.b:2").await.unwrap().version, 2);
    records.set_pin("w", true, 7).await.unwrap();
    assert_eq!(records.pins().await.unwrap().len(), 1);
    records.set_pin("w", false, 8).await.unwrap();
    assert!(records.reset(crate::keys::ALL_PREFIXES).await.unwrap() > 0);
    assert_eq!(records.layout_tables().await.unwrap().len(), 0);
}
