//! Chunks in the memory of neighbours: who holds them, whether to ask, and what became of it.
//!
//! What decides is pure ([`decide`], [`Health`], [`CostEstimate`]); what is here fetches: a
//! `Fetch` is the chunks of one row group, read in one batch from each neighbour, each chunk at
//! most once in the process at a time. Every failure is a [`RemoteMiss`], known within the
//! neighbour's deadline: the chunk is then read from the origin, and an answer that comes later is
//! dropped.

mod cost;
mod decide;
mod directory;
mod flights;
mod health;
mod held;
mod peers;
mod read;
mod settings;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoa_transfer::{PeerAddress, SegmentKey, TransportKind};
use tokio::sync::Semaphore;

pub use cost::CostEstimate;
pub use decide::{Candidate, Decision, Source, decide};
pub(crate) use directory::ChunkName;
pub use directory::{Directory, Holder, Holdings};
pub use health::{Health, Standing};
pub use held::{LocalDirectory, ToldDirectory};
pub use peers::{Arrivals, Arrived, PeerReads};
pub use settings::NeighbourSettings;

use flights::{AbortOnDrop, Flight, Flights};
use read::Wish;

/// A permit stands for this many bytes, so that its count fits the semaphore.
const PERMIT_BYTES: u64 = 4096;
/// What decoding a column chunk of Parquet takes beside fetching it, by its bytes in the file.
const DECODED_BYTES_PER_SECOND: f64 = 400e6;
/// How many places are remembered that turned out not to hold what the directory says.
const DISPROVED_MAX: usize = 4096;
/// The guess for a neighbour that was not measured yet: what was asked of it keeps it busy so long.
const UNMEASURED_BYTES_PER_SECOND: f64 = 1e9;

/// Why a chunk does not come from a neighbour. Never a query's error: read the origin instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RemoteMiss {
    /// No neighbour is known to hold it in a form that this build reads.
    #[error("no neighbour holds it")]
    NotHeld,
    /// The origin is expected to be quicker, or the neighbours that hold it are left for a while.
    #[error("no neighbour is worth asking")]
    NotWorth,
    /// The neighbour does not hold what the directory says.
    #[error("the directory is out of date")]
    Stale,
    /// The neighbour did not answer in time.
    #[error("the neighbour did not answer in time")]
    Deadline,
    /// The bytes that came are not the chunk's.
    #[error("the neighbour sent other bytes")]
    Corrupt,
    /// The neighbour cannot be reached, or the connection ended.
    #[error("the neighbour cannot be reached")]
    Unreachable,
    /// The neighbour refused.
    #[error("the neighbour refused")]
    Refused,
    /// The chunk came whole, and is nothing that this build can open.
    #[error("the chunk cannot be opened")]
    Unreadable,
    /// The read was given up before it ended.
    #[error("the read was given up")]
    Abandoned,
}

impl RemoteMiss {
    /// Those that a neighbour was asked for: the others are decisions.
    pub const FAILURES: [RemoteMiss; 6] = [
        RemoteMiss::Stale,
        RemoteMiss::Deadline,
        RemoteMiss::Corrupt,
        RemoteMiss::Unreachable,
        RemoteMiss::Refused,
        RemoteMiss::Unreadable,
    ];

    /// A word for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            RemoteMiss::NotHeld => "not_held",
            RemoteMiss::NotWorth => "not_worth",
            RemoteMiss::Stale => "stale",
            RemoteMiss::Deadline => "deadline",
            RemoteMiss::Corrupt => "corrupt",
            RemoteMiss::Unreachable => "unreachable",
            RemoteMiss::Refused => "refused",
            RemoteMiss::Unreadable => "unreadable",
            RemoteMiss::Abandoned => "abandoned",
        }
    }
}

/// A chunk that came from a neighbour, in the form that the neighbour holds it in.
#[derive(Clone, Debug)]
pub(crate) struct Fetched {
    pub(crate) bytes: Bytes,
    pub(crate) form: u8,
    pub(crate) via: TransportKind,
}

/// The memory of neighbours as this process reads it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Neighbours {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    settings: NeighbourSettings,
    directory: Arc<dyn Directory>,
    peers: Arc<dyn PeerReads>,
    known: Mutex<HashMap<String, Arc<Neighbour>>>,
    /// What reads of each store took.
    origins: Mutex<HashMap<String, CostEstimate>>,
    disproved: Mutex<Disproved>,
    flights: Arc<Flights>,
    /// Bytes in flight, in units of [`PERMIT_BYTES`].
    bytes: Arc<Semaphore>,
}

/// What this process knows of one neighbour.
#[derive(Debug)]
struct Neighbour {
    health: Mutex<Health>,
    /// Bytes asked of it and not yet answered.
    outstanding: AtomicU64,
    /// Its share of the bytes in flight, so that a slow one does not hold up the others.
    bytes: Arc<Semaphore>,
}

/// Places that do not hold what the directory says, until the directory says something else.
#[derive(Debug, Default)]
struct Disproved {
    generation: u64,
    places: HashSet<(String, SegmentKey, Option<u64>)>,
}

/// A chunk to be fetched, and what it would cost to read it from the origin instead.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) name: ChunkName,
    /// Bytes of the column chunk in the file.
    pub(crate) origin_bytes: u64,
}

impl Neighbours {
    /// Reads the neighbours that `directory` names through `peers`.
    pub fn new(
        settings: NeighbourSettings,
        directory: Arc<dyn Directory>,
        peers: Arc<dyn PeerReads>,
    ) -> Self {
        let bytes = semaphore(settings.in_flight_bytes_max);
        Self {
            inner: Arc::new(Inner {
                settings,
                directory,
                peers,
                known: Mutex::default(),
                origins: Mutex::default(),
                disproved: Mutex::default(),
                flights: Arc::default(),
                bytes,
            }),
        }
    }

    /// Who holds what, now.
    pub(crate) fn holdings(&self) -> Arc<dyn Holdings> {
        self.inner.directory.current()
    }

    /// Takes in that the origin answered a request for `bytes` bytes of `store` in that time.
    pub fn origin_answered(&self, store: &str, bytes: u64, elapsed: Duration) {
        let mut origins = lock(&self.inner.origins);
        match origins.get_mut(store) {
            Some(cost) => cost.observe(bytes, elapsed),
            None => origins
                .entry(store.to_owned())
                .or_default()
                .observe(bytes, elapsed),
        }
    }

    /// The forms, of those that this build reads, in which neighbours are said to hold a chunk.
    pub(crate) fn forms(
        &self,
        holdings: &Arc<dyn Holdings>,
        file: &[u8],
        row_group: u32,
        column: u32,
    ) -> Vec<u8> {
        let holders = self.inner.holders(holdings, file, row_group, column);
        holders.into_iter().map(|holder| holder.form).collect()
    }

    /// Whether a neighbour is to be asked for the chunk, as things stand; how many bytes it has.
    pub(crate) fn offers(
        &self,
        holdings: &Arc<dyn Holdings>,
        store: &str,
        wanted: &Wanted,
    ) -> Result<u64, RemoteMiss> {
        let holders = self.inner.holders_of(holdings, &wanted.name);
        if holders.is_empty() {
            return Err(RemoteMiss::NotHeld);
        }
        let origin = self.inner.origin_expected(store, wanted.origin_bytes);
        match self.inner.choose(&holders, origin, Instant::now()) {
            Source::Neighbour(chosen) => Ok(holders[chosen].length),
            Source::Origin => Err(RemoteMiss::NotWorth),
        }
    }

    /// Starts fetching chunks: those that nobody in this process fetches or uses already go to the
    /// neighbours, in one batch each. Must be called within a tokio runtime.
    pub(crate) fn fetch(
        &self,
        holdings: &Arc<dyn Holdings>,
        store: &str,
        wanted: &[Wanted],
    ) -> Fetch {
        let task = Arc::new(AbortOnDrop::default());
        let mut wishes = vec![];
        let flights = wanted
            .iter()
            .map(|wanted| {
                let (flight, pilot) = self.inner.flights.join(&wanted.name, &task);
                if let Some(pilot) = pilot {
                    wishes.push(Wish::new(
                        pilot,
                        self.inner.holders_of(holdings, &wanted.name),
                        self.inner.origin_expected(store, wanted.origin_bytes),
                        holdings.generation(),
                    ));
                }
                flight
            })
            .collect();
        if !wishes.is_empty() {
            let inner = Arc::clone(&self.inner);
            let driver = tokio::spawn(async move { inner.fulfil(wishes).await });
            task.set(driver.abort_handle());
        }
        Fetch { flights }
    }

    #[cfg(test)]
    fn in_flight(&self) -> usize {
        self.inner.flights.len()
    }
}

/// Chunks on their way. Dropping it gives up those that nobody else waits for.
#[derive(Debug)]
pub(crate) struct Fetch {
    flights: Vec<Arc<Flight>>,
}

impl Fetch {
    /// What came of each chunk, in the order they were asked for. Takes at most as long as the
    /// neighbours' deadlines.
    pub(crate) async fn landed(self) -> Vec<Result<Fetched, RemoteMiss>> {
        let mut landed = Vec::with_capacity(self.flights.len());
        for flight in self.flights {
            landed.push(flight.landed().await);
        }
        landed
    }
}

impl Inner {
    /// Who holds a chunk in a form that this build reads, without what was disproved.
    fn holders(
        &self,
        holdings: &Arc<dyn Holdings>,
        file: &[u8],
        row_group: u32,
        column: u32,
    ) -> Vec<Holder> {
        let mut holders = holdings.holders(file, row_group, column);
        holders.retain(|holder| crate::chunk::reads_form(holder.form));
        let mut disproved = lock(&self.disproved);
        if disproved.generation != holdings.generation() {
            disproved.generation = holdings.generation();
            disproved.places.clear();
        }
        if !disproved.places.is_empty() {
            holders.retain(|holder| {
                let place = |at| (holder.peer.id.clone(), holder.segment, at);
                !disproved.places.contains(&place(None))
                    && !disproved.places.contains(&place(Some(holder.offset)))
            });
        }
        holders
    }

    fn holders_of(&self, holdings: &Arc<dyn Holdings>, name: &ChunkName) -> Vec<Holder> {
        self.holders(holdings, &name.file, name.row_group, name.column)
    }

    /// Remembers that a place does not hold what the directory of `generation` says: all of its
    /// segment, or only the chunk at an offset.
    fn disprove(&self, generation: u64, holder: &Holder, at: Option<u64>) {
        let mut disproved = lock(&self.disproved);
        if disproved.generation != generation {
            return;
        }
        if disproved.places.len() >= DISPROVED_MAX {
            disproved.places.clear();
        }
        disproved
            .places
            .insert((holder.peer.id.clone(), holder.segment, at));
    }

    /// How long the origin is expected to take for a chunk, decoding included.
    fn origin_expected(&self, store: &str, bytes: u64) -> Option<Duration> {
        let fetched = lock(&self.origins).get(store)?.expected(bytes)?;
        Some(fetched + Duration::from_secs_f64(bytes as f64 / DECODED_BYTES_PER_SECOND))
    }

    fn neighbour(&self, peer: &PeerAddress) -> Arc<Neighbour> {
        let mut known = lock(&self.known);
        if let Some(neighbour) = known.get(&peer.id) {
            return Arc::clone(neighbour);
        }
        let neighbour = Arc::new(Neighbour {
            health: Mutex::new(Health::new(Instant::now())),
            outstanding: AtomicU64::new(0),
            bytes: semaphore(self.settings.in_flight_bytes_max / 2),
        });
        known.insert(peer.id.clone(), Arc::clone(&neighbour));
        neighbour
    }

    /// Decides for a chunk, and sends the probe that the decision asks for.
    fn choose(
        self: &Arc<Self>,
        holders: &[Holder],
        origin: Option<Duration>,
        now: Instant,
    ) -> Source {
        let candidates: Vec<Candidate> = holders
            .iter()
            .map(|holder| self.candidate(holder, now))
            .collect();
        let decision = decide(&candidates, origin, rand::random());
        if let Some(probe) = decision.probe {
            self.probe(&holders[probe], now);
        }
        decision.source
    }

    fn candidate(&self, holder: &Holder, now: Instant) -> Candidate {
        let neighbour = self.neighbour(&holder.peer);
        let health = *lock(&neighbour.health);
        let outstanding = neighbour.outstanding.load(Ordering::Relaxed);
        let expected = self.peers.expected(&holder.peer, holder.length);
        let busy = match expected {
            Some(expected) => self
                .peers
                .expected(&holder.peer, holder.length.saturating_add(outstanding))
                .unwrap_or_default()
                .saturating_sub(expected),
            None => Duration::from_secs_f64(outstanding as f64 / UNMEASURED_BYTES_PER_SECOND),
        };
        Candidate {
            expected,
            busy,
            standing: health.standing(now),
            stale: health.is_stale(now),
        }
    }
}

fn permits(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(PERMIT_BYTES).max(1))
        .unwrap_or(u32::MAX)
        .min(Semaphore::MAX_PERMITS as u32)
}

fn semaphore(bytes: u64) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(permits(bytes) as usize))
}

/// What the mutexes guard is consistent between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
