//! The promises of the trait itself.

use std::time::Duration;

use futures::StreamExt;
use tokio::time::{Instant, sleep};

use super::{Harness, commit, events_only, eventually, put, soon};
use crate::error::Error;
use crate::store::{Condition, LeaseId, Op, TXN_BYTES_MAX, TXN_OPS_MAX, Txn, WatchEvent};

pub(super) async fn conditions_decide_all_or_nothing(harness: &dyn Harness) {
    let store = harness.fresh().await;
    let revision = put(&store, "here", "1").await;
    let entry = store.get("here").await.unwrap().unwrap();
    assert_eq!(
        (entry.create_revision, entry.mod_revision),
        (revision, revision)
    );
    let changed = put(&store, "here", "2").await;
    let key = || "here".to_owned();
    let cases = [
        (Condition::Absent("gone".to_owned()), true),
        (Condition::Absent(key()), false),
        (Condition::Exists(key()), true),
        (Condition::Exists("gone".to_owned()), false),
        (Condition::CreateRevision(key(), revision), true),
        (Condition::CreateRevision(key(), changed), false),
        (
            Condition::CreateRevision("gone".to_owned(), revision),
            false,
        ),
        (Condition::ModRevision(key(), changed), true),
        (Condition::ModRevision(key(), revision), false),
    ];
    for (condition, holds) in cases {
        let when = vec![Condition::Exists(key()), condition.clone()];
        let then = vec![Op::put("a", "x"), Op::put("b", "x")];
        let outcome = store.txn(Txn { when, then }).await.unwrap();
        assert_eq!(outcome.committed, holds, "{condition:?}");
        for key in ["a", "b"] {
            assert_eq!(
                store.get(key).await.unwrap().is_some(),
                holds,
                "{condition:?}"
            );
        }
        commit(&store, vec![Op::delete("a"), Op::delete("b")]).await;
    }
}

pub(super) async fn revisions_count_changes_only(harness: &dyn Harness) {
    let store = harness.fresh().await;
    let first = put(&store, "k", "1").await;
    // Nothing to delete, nothing to do, nothing that holds: no revision.
    assert_eq!(
        commit(&store, vec![Op::delete("absent")]).await.revision,
        first
    );
    assert_eq!(commit(&store, vec![]).await.revision, first);
    let refused = Txn {
        when: vec![Condition::Absent("k".into())],
        then: vec![Op::put("k", "2")],
    };
    assert_eq!(store.txn(refused).await.unwrap().revision, first);
    // A transaction is one revision, whatever it changes.
    let outcome = commit(
        &store,
        vec![Op::put("x", "1"), Op::put("y", "1"), Op::delete("k")],
    )
    .await;
    assert_eq!(outcome.revision, first + 1);
    for key in ["x", "y"] {
        assert_eq!(
            store.get(key).await.unwrap().unwrap().mod_revision,
            first + 1
        );
    }
    // Deleted and put again: created anew.
    let again = put(&store, "k", "3").await;
    assert_eq!(
        store.get("k").await.unwrap().unwrap().create_revision,
        again
    );
}

pub(super) async fn listings_are_sorted_prefixed_and_whole(harness: &dyn Harness) {
    let store = harness.fresh().await;
    // More than a page of any backend.
    for batch in 0..3 {
        let then = (0..50)
            .map(|i| Op::put(format!("p/{:03}", batch * 50 + i), "v"))
            .collect();
        commit(&store, then).await;
    }
    put(&store, "p", "not under p/").await;
    let last = put(&store, "q", "v").await;
    let listing = store.list("p/").await.unwrap();
    assert_eq!(listing.revision, last);
    let keys: Vec<&str> = listing.entries.iter().map(|e| e.key.as_str()).collect();
    let expected: Vec<String> = (0..150).map(|i| format!("p/{i:03}")).collect();
    assert_eq!(keys, expected);
    assert!(listing.entries.iter().all(|e| e.value == b"v"));
    let names = |l: crate::store::Listing| l.entries.into_iter().map(|e| e.key).collect::<Vec<_>>();
    assert_eq!(names(store.list_keys("p/").await.unwrap()), expected);
    assert_eq!(store.list("").await.unwrap().entries.len(), 152);
    assert!(store.list("nothing").await.unwrap().entries.is_empty());
}

pub(super) async fn oversized_transactions_are_refused_and_write_nothing(harness: &dyn Harness) {
    let store = harness.fresh().await;
    let many = (0..=TXN_OPS_MAX)
        .map(|i| Op::put(format!("k{i}"), "v"))
        .collect();
    let large = vec![Op::put("large", vec![b'x'; TXN_BYTES_MAX])];
    let conditions = (0..=TXN_OPS_MAX)
        .map(|i| Condition::Absent(format!("k{i}")))
        .collect();
    for txn in [
        Txn {
            when: vec![],
            then: many,
        },
        Txn {
            when: vec![],
            then: large,
        },
        Txn {
            when: conditions,
            then: vec![Op::put("k", "v")],
        },
    ] {
        assert!(matches!(store.txn(txn).await, Err(Error::TooLarge { .. })));
    }
    let twice = Txn {
        when: vec![],
        then: vec![Op::put("k", "1"), Op::put("k", "2")],
    };
    assert!(matches!(
        store.txn(twice).await,
        Err(Error::InvalidTxn { .. })
    ));
    assert!(store.list("").await.unwrap().entries.is_empty());
    // The largest that is allowed goes through.
    let full = (0..TXN_OPS_MAX)
        .map(|i| Op::put(format!("full/{i}"), vec![b'x'; 8000]))
        .collect();
    commit(&store, full).await;
    let wide = vec![Op::put("wide", vec![b'x'; TXN_BYTES_MAX - 4096])];
    commit(&store, wide).await;
    assert_eq!(store.list("").await.unwrap().entries.len(), TXN_OPS_MAX + 1);
}

pub(super) async fn a_watch_sees_past_and_future_in_order(harness: &dyn Harness) {
    let store = harness.fresh().await;
    let first = put(&store, "t:1/a", "past").await;
    put(&store, "t:10/a", "another prefix").await;
    let mut events = events_only(store.watch("t:1/", first).await.unwrap());
    let both = commit(&store, vec![Op::put("t:1/b", "1"), Op::put("t:1/c", "2")])
        .await
        .revision;
    let deleted = commit(&store, vec![Op::delete("t:1/a")]).await.revision;
    let mut seen = Vec::new();
    for _ in 0..4 {
        seen.push(match soon(&mut events).await.unwrap() {
            WatchEvent::Put(entry) => (
                entry.key,
                Some(String::from_utf8(entry.value).unwrap()),
                entry.mod_revision,
            ),
            WatchEvent::Delete { key, revision } => (key, None, revision),
            WatchEvent::Progress { .. } => unreachable!("filtered"),
        });
    }
    let put = |key: &str, value: &str, revision| (key.to_owned(), Some(value.to_owned()), revision);
    assert_eq!(
        seen,
        [
            put("t:1/a", "past", first),
            put("t:1/b", "1", both),
            put("t:1/c", "2", both),
            ("t:1/a".to_owned(), None, deleted),
        ]
    );
}

pub(super) async fn a_watch_resumes_without_loss_or_repetition(harness: &dyn Harness) {
    let store = harness.fresh().await;
    let listing = store.list("r/").await.unwrap();
    for i in 0..20 {
        put(&store, &format!("r/{i}"), "v").await;
    }
    let mut seen = Vec::new();
    let mut from = listing.revision + 1;
    // Seven connections, each of which breaks after three events.
    for _ in 0..7 {
        let mut events = events_only(store.watch("r/", from).await.unwrap());
        for _ in 0..3.min(20 - seen.len()) {
            let event = soon(&mut events).await.unwrap();
            from = event.revision() + 1;
            seen.push(event);
        }
    }
    let keys: Vec<String> = seen
        .into_iter()
        .map(|event| match event {
            WatchEvent::Put(entry) => entry.key,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(keys, (0..20).map(|i| format!("r/{i}")).collect::<Vec<_>>());
}

pub(super) async fn compacted_history_is_an_error_not_a_gap(harness: &dyn Harness) {
    let store = harness.fresh().await;
    let first = put(&store, "c", "1").await;
    put(&store, "c", "2").await;
    let last = put(&store, "c", "3").await;
    harness.compact().await;
    let mut events = events_only(store.watch("c", first).await.unwrap());
    match soon(&mut events).await {
        Err(Error::Compacted {
            requested,
            compacted,
        }) => {
            assert_eq!(requested, first);
            assert!(compacted > first && compacted <= last);
        }
        other => panic!("expected Compacted, found {other:?}"),
    }
    assert!(events.next().await.is_none(), "an error is the last item");
    // Listing and watching from there is the way on.
    let listing = store.list("c").await.unwrap();
    assert_eq!(listing.entries[0].value, b"3");
    let mut events = events_only(store.watch("c", listing.revision + 1).await.unwrap());
    let next = put(&store, "c", "4").await;
    assert_eq!(soon(&mut events).await.unwrap().revision(), next);
}

pub(super) async fn keys_vanish_when_their_lease_expires(harness: &dyn Harness) {
    let store = harness.fresh().await;
    let lease = store.grant_lease(harness.ttl_min()).await.unwrap();
    let granted = Instant::now();
    let revision = commit(&store, vec![Op::put_leased("leased", "v", lease)])
        .await
        .revision;
    assert_eq!(
        store.get("leased").await.unwrap().unwrap().lease,
        Some(lease)
    );
    // Nobody calls the store: it notices by itself, and watches see it.
    let mut events = events_only(store.watch("leased", revision + 1).await.unwrap());
    assert!(
        matches!(soon(&mut events).await.unwrap(), WatchEvent::Delete { key, .. } if key == "leased")
    );
    assert!(
        granted.elapsed() >= harness.ttl_min() * 9 / 10,
        "not before its time"
    );
    assert!(store.get("leased").await.unwrap().is_none());
    assert!(matches!(
        store.keep_alive(lease).await,
        Err(Error::LeaseLost { .. })
    ));
}

pub(super) async fn a_lease_kept_alive_lives(harness: &dyn Harness) {
    let store = harness.fresh().await;
    let ttl = harness.ttl_min();
    let lease = store.grant_lease(ttl).await.unwrap();
    commit(&store, vec![Op::put_leased("alive", "v", lease)]).await;
    for _ in 0..8 {
        sleep(ttl / 4).await;
        store.keep_alive(lease).await.unwrap();
        assert!(store.get("alive").await.unwrap().is_some());
    }
    eventually("it ends when it is no longer kept alive", || async {
        store.get("alive").await.unwrap().is_none()
    })
    .await;
}

pub(super) async fn revoking_removes_keys_at_one_revision(harness: &dyn Harness) {
    let store = harness.fresh().await;
    let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    let then = vec![
        Op::put_leased("v/a", "1", lease),
        Op::put_leased("v/b", "2", lease),
    ];
    let revision = commit(&store, then).await.revision;
    let mut events = events_only(store.watch("v/", revision + 1).await.unwrap());
    store.revoke_lease(lease).await.unwrap();
    let (one, two) = (
        soon(&mut events).await.unwrap(),
        soon(&mut events).await.unwrap(),
    );
    assert!(matches!(
        (&one, &two),
        (WatchEvent::Delete { .. }, WatchEvent::Delete { .. })
    ));
    assert_eq!(one.revision(), two.revision());
    assert!(store.list("v/").await.unwrap().entries.is_empty());
    // Ending it again is fine.
    store.revoke_lease(lease).await.unwrap();
}

pub(super) async fn a_put_without_a_lease_lets_go(harness: &dyn Harness) {
    let store = harness.fresh().await;
    let first = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    let second = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    let then = vec![
        Op::put_leased("free", "1", first),
        Op::put_leased("moved", "1", first),
    ];
    commit(&store, then).await;
    commit(
        &store,
        vec![Op::put("free", "2"), Op::put_leased("moved", "2", second)],
    )
    .await;
    store.revoke_lease(first).await.unwrap();
    assert_eq!(store.get("free").await.unwrap().unwrap().lease, None);
    assert_eq!(
        store.get("moved").await.unwrap().unwrap().lease,
        Some(second)
    );
    store.revoke_lease(second).await.unwrap();
    assert!(store.get("moved").await.unwrap().is_none());
    assert!(store.get("free").await.unwrap().is_some());
}

pub(super) async fn a_lost_lease_is_said(harness: &dyn Harness) {
    let store = harness.fresh().await;
    let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    store.revoke_lease(lease).await.unwrap();
    match store.keep_alive(lease).await {
        Err(Error::LeaseLost { lease: lost }) => assert_eq!(lost, lease),
        other => panic!("expected LeaseLost, found {other:?}"),
    }
    for gone in [lease, LeaseId(0x7777_7777)] {
        let then = vec![Op::put("plain", "v"), Op::put_leased("leased", "v", gone)];
        match store.txn(Txn { when: vec![], then }).await {
            Err(Error::LeaseLost { lease: lost }) => assert_eq!(lost, gone),
            other => panic!("expected LeaseLost, found {other:?}"),
        }
    }
    assert!(
        store.list("").await.unwrap().entries.is_empty(),
        "nothing of it happened"
    );
}

pub(super) async fn the_store_knows_itself(harness: &dyn Harness) {
    let store = harness.fresh().await;
    let before = store.identity().await.unwrap();
    assert_ne!(before.cluster_id, 0);
    let revision = put(&store, "k", "v").await;
    let after = store.identity().await.unwrap();
    assert_eq!(after.cluster_id, before.cluster_id);
    assert_eq!(after.revision, revision);
    assert_eq!(
        crate::store::continuity(&before, &after),
        crate::store::Continuity::Continuous
    );
}
