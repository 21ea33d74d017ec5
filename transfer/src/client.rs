//! The asking end: batches of reads of many peers over whatever path works.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::Stream;
use tokio::sync::{Semaphore, mpsc};

use crate::driver::Driver;
use crate::error::{ErrorKind, Result, TransferError};
use crate::health::Backoff;
use crate::memory::Block;
use crate::path::{Lane, Path, PathLimits};
use crate::statistics::PathStatistics;
use crate::transport::{Read, Transport, TransportKind};
use crate::wrap::passed;

/// A peer and every way that may lead to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerAddress {
    /// Its name, for messages and statistics.
    pub id: String,
    /// `host:port` of each way to it, the preferred one first.
    pub addresses: Vec<String>,
}

/// The limits of a client.
#[derive(Clone, Debug)]
pub struct ClientSettings {
    /// Bytes asked for and not arrived, over all peers. A single larger read still passes, alone.
    pub in_flight_bytes_max: u64,
    /// Bytes of one read at most.
    pub read_bytes_max: u64,
    /// Bytes of a call's body at most.
    pub call_bytes_max: u64,
    /// Reads of at least this many bytes take a connection of their own kind.
    pub bulk_bytes_min: u64,
    /// Connections for large reads at most, for each path; there is one more for the others.
    pub bulk_connections: usize,
    /// How long connecting may take, TLS included.
    pub connect_timeout: Duration,
    /// How long a path is left alone after its first failure; doubled with each one.
    pub backoff_min: Duration,
    /// How long a path is left alone at most.
    pub backoff_max: Duration,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            in_flight_bytes_max: 256 << 20,
            read_bytes_max: crate::wire::READ_BYTES_MAX,
            call_bytes_max: crate::wire::CALL_BYTES_MAX,
            bulk_bytes_min: 256 << 10,
            bulk_connections: 2,
            connect_timeout: Duration::from_secs(2),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
        }
    }
}

/// Reads segments of peers. Clones share connections, budget and statistics.
#[derive(Clone, Debug)]
pub struct Client {
    pub(crate) state: Arc<ClientState>,
}

#[derive(Debug)]
pub(crate) struct ClientState {
    pub(crate) settings: ClientSettings,
    transports: Vec<Arc<dyn Transport>>,
    /// In units of [`BUDGET_UNIT`].
    pub(crate) budget: Arc<Semaphore>,
    paths: Mutex<HashMap<String, Vec<Arc<Path>>>>,
}

/// Bytes of one permit of the budget.
const BUDGET_UNIT: u64 = 1024;

impl ClientState {
    /// The permits that a read of `bytes` takes; never more than there are.
    pub(crate) fn permits(&self, bytes: u64) -> u32 {
        let all = self.settings.in_flight_bytes_max / BUDGET_UNIT;
        let permits = bytes.div_ceil(BUDGET_UNIT).min(all).max(1);
        u32::try_from(permits).unwrap_or(u32::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<Arc<Path>>>> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The paths to a peer, the preferred one first; those of addresses that it no longer has are
    /// forgotten.
    pub(crate) fn paths_to(&self, peer: &PeerAddress) -> Vec<Arc<Path>> {
        let wanted = || {
            self.transports.iter().flat_map(|transport| {
                peer.addresses
                    .iter()
                    .map(move |address| (transport, address))
            })
        };
        let mut all = self.lock();
        let known = all.entry(peer.id.clone()).or_default();
        let current = known.len() == wanted().count()
            && known
                .iter()
                .zip(wanted())
                .all(|(path, (transport, address))| {
                    path.address == *address && Arc::ptr_eq(path.transport(), transport)
                });
        if !current {
            let before = std::mem::take(known);
            *known = wanted()
                .map(|(transport, address)| {
                    let kept = before.iter().find(|path| {
                        path.address == *address && Arc::ptr_eq(path.transport(), transport)
                    });
                    kept.cloned().unwrap_or_else(|| {
                        Arc::new(Path::new(
                            &peer.id,
                            address,
                            transport.clone(),
                            self.path_limits(),
                        ))
                    })
                })
                .collect();
        }
        known.clone()
    }

    fn path_limits(&self) -> PathLimits {
        PathLimits {
            bulk_connections: self.settings.bulk_connections,
            connect_timeout: self.settings.connect_timeout,
            backoff: Backoff {
                least: self.settings.backoff_min,
                most: self.settings.backoff_max,
            },
        }
    }
}

/// What was seen of the paths to one peer. A read that a link handed to the transport below it
/// counts with the path of that transport.
fn statistics_of(paths: &[Arc<Path>]) -> Vec<PathStatistics> {
    let mut all: Vec<PathStatistics> = paths.iter().map(|path| path.statistics()).collect();
    for (number, path) in paths.iter().enumerate() {
        for (transport, handed_down) in path.recorder.reads_handed_down() {
            let came_over = all
                .iter()
                .position(|seen| seen.transport == transport && seen.address == path.address)
                .unwrap_or(number);
            all[came_over].reads += handed_down.reads;
            all[came_over].bytes += handed_down.bytes;
        }
    }
    all
}

impl Client {
    /// A client over `transports`, the preferred one first.
    pub fn new(settings: ClientSettings, transports: Vec<Arc<dyn Transport>>) -> Self {
        let permits = usize::try_from(settings.in_flight_bytes_max / BUDGET_UNIT)
            .unwrap_or(usize::MAX)
            .clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
        Self {
            state: Arc::new(ClientState {
                budget: Arc::new(Semaphore::new(permits)),
                settings,
                transports,
                paths: Mutex::default(),
            }),
        }
    }

    /// Submits reads of one peer together. Each ends with exactly one outcome, in any order, by
    /// the deadline at the latest. What fails because of a path is asked for again over the next
    /// one while there is time.
    ///
    /// Several peers are several batches. Dropping the batch takes back what has not come.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn submit(&self, peer: &PeerAddress, reads: Vec<Read>, deadline: Instant) -> Batch {
        let (sender, outcomes) = mpsc::unbounded_channel();
        let remaining = reads.len();
        let driver = Driver::new(self.state.clone(), peer.clone(), reads, deadline, sender);
        Batch {
            outcomes,
            remaining,
            driver: tokio::spawn(driver.run()).abort_handle(),
        }
    }

    /// Asks an upper layer of the peer. When a path fails it is asked again over the next one: a
    /// call may reach its handler more than once.
    ///
    /// # Errors
    /// [`TransferError::Refused`] with the peer's words, or what failed on the way.
    pub async fn call(
        &self,
        peer: &PeerAddress,
        method: u16,
        body: Bytes,
        deadline: Instant,
    ) -> Result<Bytes> {
        let limit = self.state.settings.call_bytes_max;
        if body.len() as u64 > limit {
            return Err(TransferError::TooLarge {
                what: "body of a call",
                found: body.len() as u64,
                limit,
            });
        }
        let started = Instant::now();
        let mut choice = crate::driver::Choice::new(self.state.paths_to(peer));
        let asking = async {
            loop {
                // Calls with one deadline end together: the first that does may close a link that
                // fell silent, and what the others see of it is not why they end.
                if Instant::now() >= deadline {
                    return Err(passed(&format!("peer {}", peer.id), started));
                }
                let chosen = choice.pick(&peer.id, deadline)?;
                let link = match chosen.link(Lane::Small).await {
                    Ok(link) => link,
                    Err(error) => {
                        choice.failed(chosen.number, None, &error);
                        continue;
                    }
                };
                let received_before = link.received_bytes();
                match link.call(method, body.clone(), deadline).await {
                    Err(error) if error.is_of_the_path() => {
                        choice.failed(chosen.number, Some(&link), &error);
                    }
                    Err(error) if error.kind() == ErrorKind::Deadline => {
                        chosen.path.stalled(&link, received_before);
                        return Err(error);
                    }
                    answer => {
                        chosen.path.succeeded();
                        return answer;
                    }
                }
            }
        };
        match tokio::time::timeout_at(deadline.into(), asking).await {
            Ok(answer) => answer,
            Err(_elapsed) => Err(passed(&format!("peer {}", peer.id), started)),
        }
    }

    /// Every path in use, with what was seen of it.
    pub fn paths(&self) -> Vec<PathStatistics> {
        let mut paths: Vec<PathStatistics> = self
            .state
            .lock()
            .values()
            .flat_map(|paths| statistics_of(paths))
            .collect();
        // Stable: those of one peer stay in the order in which they are tried.
        paths.sort_by(|a, b| a.peer.cmp(&b.peer));
        paths
    }

    /// How long a read of `bytes` from a peer should take; `None` while nothing was seen of it.
    pub fn expected(&self, peer: &str, bytes: u64) -> Option<Duration> {
        let paths = self.state.lock().get(peer)?.clone();
        let now = Instant::now();
        paths
            .iter()
            .filter(|path| path.left_for(now).is_none())
            .find_map(|path| path.recorder.expected(bytes))
    }

    /// Whether every path to a peer is left alone now; a peer that was never asked is not.
    pub fn is_left(&self, peer: &str) -> bool {
        let now = Instant::now();
        self.state.lock().get(peer).is_some_and(|paths| {
            !paths.is_empty() && paths.iter().all(|path| path.left_for(now).is_some())
        })
    }

    /// The transport that the next read of a peer would be tried with.
    pub fn transport_to(&self, peer: &str) -> Option<TransportKind> {
        let now = Instant::now();
        self.state
            .lock()
            .get(peer)?
            .iter()
            .find(|path| path.left_for(now).is_none())
            .map(|path| path.transport().kind())
    }

    /// Forgets a peer: its connections end once nothing uses them.
    pub fn forget(&self, peer: &str) {
        self.state.lock().remove(peer);
    }
}

/// Reads that were submitted together; a stream of what comes of each, by its place.
#[derive(Debug)]
pub struct Batch {
    outcomes: mpsc::UnboundedReceiver<(usize, Result<Block>)>,
    remaining: usize,
    driver: tokio::task::AbortHandle,
}

impl Batch {
    /// Reads without an outcome so far.
    pub fn remaining(&self) -> usize {
        self.remaining
    }

    /// Waits for all outcomes, in the order of the reads.
    pub async fn into_vec(mut self) -> Vec<Result<Block>> {
        use futures::StreamExt;
        let mut outcomes: Vec<Option<Result<Block>>> = (0..self.remaining).map(|_| None).collect();
        while let Some((index, outcome)) = self.next().await {
            outcomes[index] = Some(outcome);
        }
        outcomes.into_iter().flatten().collect()
    }
}

impl Stream for Batch {
    type Item = (usize, Result<Block>);

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = self.outcomes.poll_recv(context);
        if let Poll::Ready(Some(_)) = polled {
            self.remaining -= 1;
        }
        polled
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.remaining, Some(self.remaining))
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.driver.abort();
    }
}
