//! Keeps up with the other workers: who lives, what they hold; and writes it down for the query
//! processes of this host.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use stoa_metastore::{Entry, Records, WorkerRecord, keys};
use stoa_shm::directory::{DirectoryBuilder, HoldingWorker};
use stoa_shm::holdings::{Fetched, HOLDINGS_METHOD, HoldingsFetch, Scope};
use stoa_shm::{CacheDir, Directory};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::peers::{AskError, Peer, Peers};
use crate::shared::{Shared, jitter};

/// How long a peer may wait for news before it answers.
const WAIT: Duration = Duration::from_secs(20);
/// The shortest time between two looks at what one peer holds, while that changes.
const LOOK_PAUSE: Duration = Duration::from_secs(1);
/// The longest wait before a peer that failed is asked again.
const BACK_OFF_MAX: Duration = Duration::from_secs(10);
/// The shortest time between two directories.
const WRITE_PAUSE: Duration = Duration::from_secs(1);
/// Looks and directories may take at most one part in so many of the time.
const SHARE: u32 = 10;
/// The name of its problem.
const PROBLEM: &str = "directory";

/// Follows the workers until `stop`.
pub(crate) async fn keep(
    shared: Arc<Shared>,
    records: Records,
    peers: Arc<Peers>,
    dir: CacheDir,
    mut stop: watch::Receiver<bool>,
) {
    tokio::select! {
        // Ends when it is told to: the directory that it is writing is finished first, so that it
        // does not take the name of what the next process writes.
        () = write(&shared, &peers, &dir, &mut stop) => {}
        () = follow(&records, &peers) => {}
    }
}

/// Asks every live peer, each in a task of its own, as long as it lives.
async fn follow(records: &Records, peers: &Arc<Peers>) {
    let mut workers = records.follow(keys::WORKER_PREFIX);
    let mut asking: BTreeMap<String, (Peer, Asking)> = BTreeMap::new();
    while let Some(entries) = workers.next().await {
        peers.observe(&read(&entries));
        let live = peers.live();
        asking.retain(|id, (peer, _)| live.get(id) == Some(peer));
        for (id, peer) in live {
            asking.entry(id).or_insert_with(|| {
                let task = tokio::spawn(ask_on(Arc::clone(peers), peer.clone()));
                (peer, Asking(task.abort_handle()))
            });
        }
    }
    // Follows end with the runtime only.
    std::future::pending().await
}

/// A task that asks one peer; it ends when this is dropped.
struct Asking(AbortHandle);

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The records that can be read; one broken value must not hide the others.
fn read(entries: &[Entry]) -> Vec<WorkerRecord> {
    let read = |entry: &Entry| {
        serde_json::from_slice(&entry.value)
            .inspect_err(
                |error| tracing::warn!(key = entry.key, %error, "a worker's record cannot be read"),
            )
            .ok()
    };
    entries.iter().filter_map(read).collect()
}

/// Asks one peer what it holds, again and again.
async fn ask_on(peers: Arc<Peers>, peer: Peer) {
    let mut known = 0;
    let mut back_off = LOOK_PAUSE;
    loop {
        let started = Instant::now();
        match ask(&peers, &peer, known).await {
            Ok(Some((revision, directory))) => {
                tracing::debug!(
                    peer = peer.address.id,
                    chunks = directory.chunk_count(),
                    "what a peer holds"
                );
                peers.learn(&peer.address.id, directory);
                known = revision;
                back_off = LOOK_PAUSE;
                // The first answer may have waited; the reading of it counts.
                let took = started.elapsed().min(WAIT / SHARE);
                tokio::time::sleep(LOOK_PAUSE.max(took)).await;
            }
            Ok(None) => back_off = LOOK_PAUSE,
            Err(error) => {
                tracing::debug!(peer = peer.address.id, %error, "a peer does not say what it holds");
                tokio::time::sleep(back_off.mul_f64(0.75 + 0.5 * jitter())).await;
                back_off = (back_off * 2).min(BACK_OFF_MAX);
            }
        }
    }
}

/// What a peer holds, with its revision, if that is another one than `known`.
async fn ask(peers: &Peers, peer: &Peer, known: u64) -> Result<Option<(u64, Directory)>, AskError> {
    let mut fetch = HoldingsFetch::new(Scope::Own, known, WAIT.as_millis() as u32);
    let mut wait = WAIT;
    loop {
        let deadline = Instant::now() + wait + peers.deadline;
        let body = Bytes::from(fetch.request());
        let answer = peers
            .client
            .call(&peer.address, HOLDINGS_METHOD, body, deadline)
            .await?;
        match fetch.take(&answer)? {
            Fetched::Whole(directory) => return Ok(Some((fetch.revision(), directory))),
            Fetched::Unchanged => return Ok(None),
            // Only the first page is waited for.
            Fetched::More => wait = Duration::ZERO,
        }
    }
}

/// Writes the directory whenever something has changed, but not all the time, until `stop`.
async fn write(
    shared: &Arc<Shared>,
    peers: &Arc<Peers>,
    dir: &CacheDir,
    stop: &mut watch::Receiver<bool>,
) {
    let mut changes = peers.changes.subscribe();
    // What an earlier process left is out of date.
    changes.mark_changed();
    loop {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            changed = changes.changed() => if changed.is_err() {
                return;
            },
        }
        let started = Instant::now();
        let (known, dir, revision) = (peers.known(), dir.clone(), *changes.borrow());
        let written = tokio::task::spawn_blocking(move || {
            let mut builder = DirectoryBuilder::new();
            add_known(&mut builder, &known);
            dir.write_directory(&builder.build(revision)?)
        })
        .await;
        let problem = match written {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(panic.to_string()),
        };
        let said = problem.map(|error| {
            format!("queries here do not know what other workers hold, and ask the origin: {error}")
        });
        if said.is_some() {
            // Tried again, also where nothing changes.
            changes.mark_changed();
        }
        shared.problem(PROBLEM, said);
        let pause = tokio::time::sleep(WRITE_PAUSE.max(started.elapsed() * SHARE));
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            () = pause => {}
        }
    }
}

/// Adds what peers hold, each as the holder of no more than its own memory, whatever it claims.
pub(super) fn add_known(builder: &mut DirectoryBuilder, known: &[(Peer, Arc<Directory>)]) {
    for (peer, directory) in known {
        let Some(incarnation) = directory.workers().next().map(|worker| worker.incarnation) else {
            continue;
        };
        let worker = builder.worker(HoldingWorker {
            id: peer.address.id.clone(),
            incarnation,
            addresses: peer.address.addresses.clone(),
        });
        for (file, row_group, column, holders) in directory.chunks() {
            if let Some(holder) = holders.first() {
                builder.chunk(worker, file, row_group, column, holder.location);
            }
        }
    }
}
