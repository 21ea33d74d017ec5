//! One way to one peer: its connections, its health, what was seen of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};

use crate::error::{Result, TransferError};
use crate::health::{Backoff, Health};
use crate::statistics::{PathStatistics, Recorder};
use crate::transport::{Link, Transport};
use crate::wrap::{DeadlineLink, MeteredLink, VerifiedLink};

/// A lane with more outstanding bytes than this is busy: another one is opened, if one may be.
const LANE_BUSY_BYTES: u64 = 16 << 20;

/// Deadlines that may pass in a row without a byte before a link counts as hanging.
const STALLS_MAX: u32 = 2;

/// What kind of connection a read or call takes: large transfers must not block small ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Calls and small reads.
    Small,
    /// The rest.
    Bulk,
}

type Connecting = Shared<BoxFuture<'static, Result<Arc<dyn Link>>>>;

#[derive(Debug, Default)]
enum Slot {
    #[default]
    Empty,
    Connecting(Connecting),
    Open(Arc<dyn Link>),
}

/// A transport and an address that lead to a peer.
#[derive(Debug)]
pub(crate) struct Path {
    pub(crate) peer: String,
    pub(crate) address: String,
    transport: Arc<dyn Transport>,
    connect_timeout: Duration,
    backoff: Backoff,
    pub(crate) recorder: Recorder,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    health: Health,
    /// Deadlines in a row that passed without a byte.
    stalls: u32,
    /// The first is for small ones, the others are for bulk.
    lanes: Vec<Slot>,
}

/// The limits of a path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PathLimits {
    pub(crate) bulk_connections: usize,
    pub(crate) connect_timeout: Duration,
    pub(crate) backoff: Backoff,
}

impl Path {
    pub(crate) fn new(
        peer: &str,
        address: &str,
        transport: Arc<dyn Transport>,
        limits: PathLimits,
    ) -> Self {
        Self {
            peer: peer.to_string(),
            address: address.to_string(),
            transport,
            connect_timeout: limits.connect_timeout,
            backoff: limits.backoff,
            recorder: Recorder::default(),
            state: Mutex::new(State {
                health: Health::default(),
                stalls: 0,
                lanes: (0..=limits.bulk_connections.max(1))
                    .map(|_| Slot::Empty)
                    .collect(),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// The peer and this way to it, for messages.
    pub(crate) fn label(&self) -> String {
        format!(
            "peer {} at {} ({})",
            self.peer,
            self.address,
            self.transport.kind()
        )
    }

    pub(crate) fn left_for(&self, now: Instant) -> Option<Duration> {
        self.lock().health.left_for(now)
    }

    pub(crate) fn failed(&self) {
        self.lock().health.failed(Instant::now(), self.backoff);
    }

    pub(crate) fn succeeded(&self) {
        let mut state = self.lock();
        state.health.succeeded();
        state.stalls = 0;
    }

    /// A deadline passed on `link`, which had received `received_before` bytes when it was asked.
    /// If nothing at all has come since, for the second time, the link hangs: it is closed and
    /// the path left alone.
    pub(crate) fn stalled(&self, link: &Arc<dyn Link>, received_before: u64) {
        let mut state = self.lock();
        if link.received_bytes() != received_before {
            state.stalls = 0;
            return;
        }
        state.stalls += 1;
        if state.stalls >= STALLS_MAX {
            state.stalls = 0;
            state.health.failed(Instant::now(), self.backoff);
            link.close("nothing came over it for two deadlines");
        }
    }

    /// An open link, or a new one. Whoever comes while one is being made waits for that one; it is
    /// made to its end even if nobody waits any more, so that a path that does not answer is
    /// known as such.
    pub(crate) async fn link(self: &Arc<Self>, lane: Lane) -> Result<Arc<dyn Link>> {
        let connecting = {
            let mut state = self.lock();
            for slot in &mut state.lanes {
                let over = match slot {
                    Slot::Empty => false,
                    Slot::Open(link) => link.is_closed(),
                    // Its task says itself how it ended, unless the task's runtime went first.
                    Slot::Connecting(connecting) => connecting.peek().is_some(),
                };
                if over {
                    *slot = Slot::Empty;
                }
            }
            let number = choose_lane(&state.lanes, lane);
            match &state.lanes[number] {
                Slot::Open(link) => return Ok(link.clone()),
                Slot::Connecting(connecting) => connecting.clone(),
                Slot::Empty => {
                    let connecting = self.connect(number);
                    state.lanes[number] = Slot::Connecting(connecting.clone());
                    connecting
                }
            }
        };
        connecting.await
    }

    fn connect(self: &Arc<Self>, number: usize) -> Connecting {
        let path = self.clone();
        let task = tokio::spawn(async move {
            let connect = path.transport.connect(&path.address);
            let connected = match tokio::time::timeout(path.connect_timeout, connect).await {
                Ok(connected) => connected,
                Err(_elapsed) => Err(TransferError::Unreachable {
                    peer: path.label(),
                    reason: format!(
                        "no connection within {} ms",
                        path.connect_timeout.as_millis()
                    ),
                }),
            };
            let connected = connected.map(|link| path.wrapped(link));
            let mut state = path.lock();
            state.lanes[number] = match &connected {
                Ok(link) => Slot::Open(link.clone()),
                Err(error) => {
                    path.recorder.failed(error);
                    state.health.failed(Instant::now(), path.backoff);
                    Slot::Empty
                }
            };
            connected
        });
        let label = self.label();
        async move {
            task.await.unwrap_or_else(|error| {
                Err(TransferError::Unreachable {
                    peer: label,
                    reason: format!("connecting was abandoned: {error}"),
                })
            })
        }
        .boxed()
        .shared()
    }

    /// What every link gets: checksums, deadlines, metrics.
    fn wrapped(&self, inner: Arc<dyn Link>) -> Arc<dyn Link> {
        let peer = self.label();
        let inner = Arc::new(VerifiedLink {
            inner,
            peer: peer.clone(),
        });
        let inner = Arc::new(DeadlineLink { inner, peer });
        Arc::new(MeteredLink {
            inner,
            recorder: self.recorder.clone(),
        })
    }

    pub(crate) fn statistics(&self) -> PathStatistics {
        let mut statistics =
            self.recorder
                .snapshot(&self.peer, &self.address, self.transport.kind());
        let state = self.lock();
        statistics.connections = state
            .lanes
            .iter()
            .filter(|slot| matches!(slot, Slot::Open(link) if !link.is_closed()))
            .count();
        statistics.left_for = state.health.left_for(Instant::now());
        statistics
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        for slot in &self.lock().lanes {
            if let Slot::Open(link) = slot {
                link.close("the path is no longer used");
            }
        }
    }
}

/// The lane for what is next: the small one, or of the bulk ones an open one that is not busy, a
/// new one, the least loaded, in this order.
fn choose_lane(lanes: &[Slot], lane: Lane) -> usize {
    if lane == Lane::Small {
        return 0;
    }
    let load = |slot: &Slot| match slot {
        Slot::Open(link) => link.outstanding_bytes(),
        Slot::Connecting(_) => 0,
        Slot::Empty => LANE_BUSY_BYTES,
    };
    (1..lanes.len())
        .min_by_key(|&number| {
            let load = load(&lanes[number]);
            let rank = if load < LANE_BUSY_BYTES { 0 } else { 1 };
            (rank, load)
        })
        .unwrap_or(0)
}
