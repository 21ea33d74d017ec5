//! The metastore in the process: for one machine, without etcd.
//!
//! The state is in memory; what outlives the process is written to a redb file before it is
//! applied. One process owns the file. Keys under a lease are never written: a store that is
//! opened has none of the leases of the process before.

mod disk;
mod holder;
mod state;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::warn;

use self::disk::Disk;
use self::state::{Change, Decision, REVISION_EMPTY, State};
use crate::error::{Error, Result};
use crate::store::{
    ClusterIdentity, Entry, LeaseId, Listing, Metastore, Txn, TxnOutcome, WatchEvent, WatchStream,
};

/// How many events a watch may lie behind before it has to list again.
const HISTORY_EVENTS_MAX: usize = 4096;
/// How many bytes of events are kept for watches.
const HISTORY_BYTES_MAX: usize = 32 << 20;
/// Events handed to a watch at once.
const WATCH_BATCH: usize = 256;

/// Bounds of an [`EmbeddedMetastore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmbeddedOptions {
    /// How many events a watch may lie behind before [`Error::Compacted`].
    pub history_events_max: usize,
    /// How many bytes of events are kept.
    pub history_bytes_max: usize,
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        EmbeddedOptions {
            history_events_max: HISTORY_EVENTS_MAX,
            history_bytes_max: HISTORY_BYTES_MAX,
        }
    }
}

/// A [`Metastore`] in this process, in memory or with a file. Cheap to clone; the file is let go
/// when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct EmbeddedMetastore {
    inner: Arc<Inner>,
}

/// A handle of a store that others may let go.
#[derive(Clone, Debug)]
pub(crate) struct WeakEmbedded {
    inner: Weak<Inner>,
}

impl WeakEmbedded {
    /// The store, if it is still open.
    pub(crate) fn upgrade(&self) -> Option<EmbeddedMetastore> {
        let inner = self.inner.upgrade()?;
        Some(EmbeddedMetastore { inner })
    }
}

#[derive(Debug)]
struct Inner {
    /// Held for a whole change: decide, write, apply. Taken before `state`.
    disk: Mutex<Option<Disk>>,
    state: Mutex<State>,
    /// The newest revision: wakes the watches.
    revision: watch::Sender<i64>,
    cluster_id: u64,
    /// The file that was read and cannot be written.
    read_only: Option<PathBuf>,
}

impl EmbeddedMetastore {
    /// A store that lives as long as the process.
    pub fn in_memory() -> Self {
        Self::in_memory_with(EmbeddedOptions::default())
    }

    /// [`EmbeddedMetastore::in_memory`] with other bounds.
    pub fn in_memory_with(options: EmbeddedOptions) -> Self {
        Self::new(
            None,
            disk::draw_cluster_id(),
            REVISION_EMPTY,
            Vec::new(),
            options,
        )
    }

    /// Opens or creates the store in `dir`. [`Error::Busy`] when another process has it open.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_with(dir, EmbeddedOptions::default())
    }

    /// [`EmbeddedMetastore::open`] with other bounds.
    pub fn open_with(dir: &Path, options: EmbeddedOptions) -> Result<Self> {
        let (disk, loaded) = Disk::open(dir)?;
        Ok(Self::new(
            Some(disk),
            loaded.cluster_id,
            loaded.revision,
            loaded.entries,
            options,
        ))
    }

    /// What lies in the store of `dir`, where it cannot be opened to write: every change is refused.
    pub fn read_only(dir: &Path) -> Result<Self> {
        let (path, loaded) = Disk::read(dir)?;
        let mut store = Self::new(
            None,
            loaded.cluster_id,
            loaded.revision,
            loaded.entries,
            EmbeddedOptions::default(),
        );
        if let Some(inner) = Arc::get_mut(&mut store.inner) {
            inner.read_only = Some(path);
        }
        Ok(store)
    }

    fn new(
        disk: Option<Disk>,
        cluster_id: u64,
        revision: i64,
        entries: Vec<Entry>,
        options: EmbeddedOptions,
    ) -> Self {
        let state = State::new(
            revision,
            entries,
            options.history_events_max,
            options.history_bytes_max,
        );
        let inner = Inner {
            disk: Mutex::new(disk),
            state: Mutex::new(state),
            revision: watch::Sender::new(revision),
            cluster_id,
            read_only: None,
        };
        EmbeddedMetastore {
            inner: Arc::new(inner),
        }
    }

    /// A handle that does not hold the store open.
    pub(crate) fn downgrade(&self) -> WeakEmbedded {
        WeakEmbedded {
            inner: Arc::downgrade(&self.inner),
        }
    }

    /// Forgets the events up to `revision`, as if they had fallen out of the bounded history.
    pub fn compact(&self, revision: i64) {
        self.inner.state().compact(revision);
    }

    /// Runs a change off the async threads: it may wait for a disk.
    async fn change<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Inner) -> Result<T> + Send + 'static,
    {
        let inner = Arc::clone(&self.inner);
        let done = tokio::task::spawn_blocking(move || work(&inner)).await;
        done.unwrap_or_else(|error| {
            // Only at the end of the runtime, or after a panic of our own.
            Err(Error::Server {
                call: "embedded change",
                reason: error.to_string(),
            })
        })
    }
}

/// A panic elsewhere leaves these locks poisoned but their content whole: changes are applied in
/// one piece after everything that can fail.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn txn(&self, txn: &Txn, now: Instant) -> Result<TxnOutcome> {
        let mut disk = lock(&self.disk);
        self.expire(&mut disk, now)?;
        let decision = self.state().decide(txn)?;
        let committed = !matches!(decision, Decision::Refused);
        if let Decision::Change(change) = decision {
            self.commit(&mut disk, change)?;
        }
        Ok(TxnOutcome {
            committed,
            revision: self.state().revision,
        })
    }

    fn end(&self, lease: LeaseId) -> Result<()> {
        let mut disk = lock(&self.disk);
        let change = self.state().decide_end(lease);
        change.map_or(Ok(()), |change| self.commit(&mut disk, change))
    }

    fn keep_alive(&self, lease: LeaseId, now: Instant) -> Result<()> {
        let mut disk = lock(&self.disk);
        self.expire(&mut disk, now)?;
        self.state().keep_alive(lease, now)
    }

    /// Ends the leases whose time is over.
    fn expire(&self, disk: &mut Option<Disk>, now: Instant) -> Result<()> {
        let expired = self.state().expired(now);
        for lease in expired {
            let change = self.state().decide_end(lease);
            if let Some(change) = change {
                self.commit(disk, change)?;
            }
        }
        Ok(())
    }

    /// To the disk, then to memory, then to the watches. The caller holds the disk's lock since
    /// before the change was decided, so no other change came between.
    fn commit(&self, disk: &mut Option<Disk>, change: Change) -> Result<()> {
        if let Some(path) = &self.read_only {
            return Err(Error::Storage {
                path: path.clone(),
                reason: "it can only be read here".to_owned(),
            });
        }
        if let Some(disk) = disk {
            // Not under the state's lock: readers need not wait for the disk.
            let rows = self.state().durable(&change);
            disk.write(change.revision, &rows)?;
        }
        let revision = {
            let mut state = self.state();
            state.apply(change);
            state.revision
        };
        self.revision.send_replace(revision);
        Ok(())
    }
}

/// Ends a lease when its time is over, whether or not anybody calls the store meanwhile.
async fn expire_in_time(inner: Weak<Inner>, lease: LeaseId) {
    loop {
        let Some(at) = inner
            .upgrade()
            .and_then(|inner| inner.state().expires_at(lease))
        else {
            return;
        };
        sleep_until(at).await;
        let Some(inner) = inner.upgrade() else { return };
        let done = tokio::task::spawn_blocking(move || {
            inner.expire(&mut lock(&inner.disk), Instant::now())
        });
        if let Ok(Err(error)) = done.await {
            warn!(%error, "expired lease not removed yet");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

#[async_trait]
impl Metastore for EmbeddedMetastore {
    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        Ok(self.inner.state().get(key).cloned())
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        Ok(self.inner.state().list(prefix))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        txn.check()?;
        self.change(move |inner| inner.txn(&txn, Instant::now()))
            .await
    }

    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<WatchStream> {
        let watcher = Watcher {
            inner: Arc::downgrade(&self.inner),
            wake: self.inner.revision.subscribe(),
            prefix: prefix.to_owned(),
            next: from_revision.max(1),
            ready: VecDeque::new(),
            over: false,
        };
        Ok(futures::stream::unfold(watcher, Watcher::next).boxed())
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId> {
        let lease = self.inner.state().grant(ttl, Instant::now());
        tokio::spawn(expire_in_time(Arc::downgrade(&self.inner), lease));
        Ok(lease)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.change(move |inner| inner.keep_alive(lease, Instant::now()))
            .await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<()> {
        self.change(move |inner| inner.end(lease)).await
    }

    async fn identity(&self) -> Result<ClusterIdentity> {
        let revision = self.inner.state().revision;
        Ok(ClusterIdentity {
            cluster_id: self.inner.cluster_id,
            revision,
        })
    }
}

/// One watch: a position in the history. It holds no store open.
struct Watcher {
    inner: Weak<Inner>,
    wake: watch::Receiver<i64>,
    prefix: String,
    next: i64,
    ready: VecDeque<WatchEvent>,
    over: bool,
}

impl Watcher {
    async fn next(mut self) -> Option<(Result<WatchEvent>, Self)> {
        loop {
            if self.over {
                return None;
            }
            if let Some(event) = self.ready.pop_front() {
                return Some((Ok(event), self));
            }
            // Before looking, so that what comes in between is not slept over.
            let newest = *self.wake.borrow_and_update();
            match self.look() {
                Err(error) => {
                    self.over = true;
                    return Some((Err(error), self));
                }
                Ok((events, next)) => {
                    let moved = next > self.next;
                    self.next = next;
                    self.ready = events.into();
                    if moved && self.ready.is_empty() && newest + 1 == next {
                        return Some((Ok(WatchEvent::Progress { revision: newest }), self));
                    }
                    if moved {
                        continue;
                    }
                }
            }
            // An error means that the store is gone, which the next look says.
            let _ = self.wake.changed().await;
        }
    }

    fn look(&self) -> Result<(Vec<WatchEvent>, i64)> {
        let inner = self.inner.upgrade().ok_or_else(|| Error::WatchEnded {
            prefix: self.prefix.clone(),
            reason: "the embedded metastore was closed".to_owned(),
        })?;
        inner.state().since(&self.prefix, self.next, WATCH_BATCH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Op;

    fn put(key: &str) -> Txn {
        Txn {
            when: vec![],
            then: vec![Op::put(key, "v")],
        }
    }

    #[tokio::test]
    async fn a_second_owner_is_refused_with_a_clear_error() {
        let dir = tempfile::tempdir().unwrap();
        let first = EmbeddedMetastore::open(dir.path()).unwrap();
        let error = EmbeddedMetastore::open(dir.path()).unwrap_err();
        assert!(matches!(error, Error::Busy { .. }));
        let text = error.to_string();
        let owner = std::process::id();
        assert!(
            text.contains(&format!("is in use by process {owner},")),
            "{text}"
        );
        drop(first);
        EmbeddedMetastore::open(dir.path()).unwrap();
    }

    #[tokio::test]
    async fn what_was_written_is_there_the_next_day_and_leases_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let before;
        {
            let store = EmbeddedMetastore::open(dir.path()).unwrap();
            store.txn(put("kept")).await.unwrap();
            store.txn(put("removed")).await.unwrap();
            store
                .txn(Txn {
                    when: vec![],
                    then: vec![Op::delete("removed")],
                })
                .await
                .unwrap();
            let lease = store.grant_lease(Duration::from_secs(600)).await.unwrap();
            store.txn(put("moved")).await.unwrap();
            let then = vec![
                Op::put_leased("leased", "v", lease),
                Op::put_leased("moved", "v", lease),
            ];
            store.txn(Txn { when: vec![], then }).await.unwrap();
            before = (
                store.identity().await.unwrap(),
                store.get("kept").await.unwrap(),
            );
        }
        let store = EmbeddedMetastore::open(dir.path()).unwrap();
        let now = store.identity().await.unwrap();
        assert_eq!(now.cluster_id, before.0.cluster_id);
        assert!(
            now.revision > before.0.revision,
            "revisions grow across restarts"
        );
        let keys: Vec<String> = store
            .list("")
            .await
            .unwrap()
            .entries
            .into_iter()
            .map(|e| e.key)
            .collect();
        assert_eq!(keys, ["kept"]);
        assert_eq!(store.get("kept").await.unwrap(), before.1);
        // The past of another process cannot be watched.
        let mut events = store.watch("", before.0.revision).await.unwrap();
        assert!(matches!(
            events.next().await,
            Some(Err(Error::Compacted { .. }))
        ));
        assert!(events.next().await.is_none());
    }

    #[tokio::test]
    async fn a_new_store_has_its_whole_past() {
        let dir = tempfile::tempdir().unwrap();
        let opened = EmbeddedMetastore::open(dir.path()).unwrap();
        for store in [EmbeddedMetastore::in_memory(), opened] {
            let mut events = store.watch("", 1).await.unwrap();
            store.txn(put("first")).await.unwrap();
            store.txn(put("second")).await.unwrap();
            for key in ["first", "second"] {
                match events.next().await {
                    Some(Ok(WatchEvent::Put(entry))) => assert_eq!(entry.key, key),
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    #[tokio::test]
    async fn a_broken_file_is_named_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("metastore.redb"), vec![7u8; 8192]).unwrap();
        let text = EmbeddedMetastore::open(dir.path()).unwrap_err().to_string();
        assert!(text.contains("metastore.redb"), "{text}");
        assert!(
            text.ends_with("move it away to start with an empty metastore"),
            "{text}"
        );
    }

    /// A full disk or a directory of somebody else's is no reason to throw every layout away.
    #[tokio::test]
    async fn what_cannot_be_written_says_so_and_is_still_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("not a directory");
        std::fs::write(&file, "").unwrap();
        let text = EmbeddedMetastore::open(&file).unwrap_err().to_string();
        assert!(
            text.ends_with(
                "set state.location (or XDG_STATE_HOME) to a directory that you can write to"
            ),
            "{text}"
        );
        {
            let store = EmbeddedMetastore::open(dir.path()).unwrap();
            store.txn(put("kept")).await.unwrap();
        }
        let store = EmbeddedMetastore::read_only(dir.path()).unwrap();
        assert!(store.get("kept").await.unwrap().is_some());
        let refused = store.txn(put("other")).await.unwrap_err().to_string();
        assert!(refused.ends_with("it can only be read here"), "{refused}");
        // It holds nothing that keeps another process out.
        EmbeddedMetastore::open(dir.path()).unwrap();
    }

    #[tokio::test]
    async fn a_watch_ends_when_the_store_is_closed() {
        let store = EmbeddedMetastore::in_memory();
        let mut events = store.watch("", 2).await.unwrap();
        store.txn(put("k")).await.unwrap();
        assert!(matches!(events.next().await, Some(Ok(WatchEvent::Put(_)))));
        drop(store);
        let ended = events.next().await.unwrap().unwrap_err().to_string();
        assert_eq!(
            ended,
            "watch of `` ended: the embedded metastore was closed; list again"
        );
    }

    #[tokio::test]
    async fn a_slow_watch_is_told_that_it_missed_something() {
        let options = EmbeddedOptions {
            history_events_max: 8,
            ..Default::default()
        };
        let store = EmbeddedMetastore::in_memory_with(options);
        let mut events = store.watch("", 2).await.unwrap();
        for i in 0..100 {
            store.txn(put(&format!("k{i}"))).await.unwrap();
        }
        assert!(matches!(
            events.next().await,
            Some(Err(Error::Compacted { .. }))
        ));
    }
}
