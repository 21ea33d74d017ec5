//! Single flight: a chunk is on its way to this process, or held by its scans, at most once.
//!
//! Nothing is kept here: an entry is a weak reference to what scans hold. A chunk that arrived can
//! be shared for as long as some array made from it lives.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::directory::ChunkName;
use super::peers::Arrived;
use super::{Fetched, RemoteMiss};

/// Chunks under way or in use, by name.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    named: Mutex<HashMap<ChunkName, Weak<Flight>>>,
}

/// What became of a flight.
pub(crate) type Landing = Result<Landed, RemoteMiss>;

/// A chunk that arrived, in the form it is encoded in.
#[derive(Clone, Debug)]
pub(crate) struct Landed {
    pub(crate) arrived: Arrived,
    pub(crate) form: u8,
}

/// One chunk on its way, or here.
#[derive(Debug)]
pub(crate) struct Flight {
    name: ChunkName,
    flights: Weak<Flights>,
    landing: Shared<BoxFuture<'static, Landing>>,
    /// The task that reads it and others; ends with the last flight that needs it.
    _task: Arc<AbortOnDrop>,
}

/// Ends a task when nobody needs its result any more.
#[derive(Debug, Default)]
pub(crate) struct AbortOnDrop {
    task: Mutex<Option<AbortHandle>>,
}

impl AbortOnDrop {
    pub(crate) fn set(&self, task: AbortHandle) {
        *lock(&self.task) = Some(task);
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(task) = lock(&self.task).take() {
            task.abort();
        }
    }
}

/// The end of a flight that whoever reads the chunk holds.
#[derive(Debug)]
pub(crate) struct Pilot {
    landing: oneshot::Sender<Landing>,
}

impl Pilot {
    /// Ends the flight.
    pub(crate) fn land(self, landing: Landing) {
        // Nobody waits any more: the chunk is dropped.
        let _ = self.landing.send(landing);
    }

    /// Whether nobody waits for it any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.landing.is_closed()
    }
}

impl Flights {
    /// The flight of that name, if there is one that did not fail; else a new one, with its pilot,
    /// whose task is `task`.
    pub(crate) fn join(
        self: &Arc<Self>,
        name: &ChunkName,
        task: &Arc<AbortOnDrop>,
    ) -> (Arc<Flight>, Option<Pilot>) {
        // Declared before the lock: a flight that is dropped takes the lock itself.
        let found;
        let mut named = lock(&self.named);
        found = named.get(name).and_then(Weak::upgrade);
        if let Some(flight) = &found
            && !flight.landing.peek().is_some_and(Result::is_err)
        {
            return (Arc::clone(flight), None);
        }
        let (landing, landed) = oneshot::channel();
        let flight = Arc::new(Flight {
            name: name.clone(),
            flights: Arc::downgrade(self),
            landing: landed
                .map(|landing| landing.unwrap_or(Err(RemoteMiss::Abandoned)))
                .boxed()
                .shared(),
            _task: Arc::clone(task),
        });
        named.insert(name.clone(), Arc::downgrade(&flight));
        (flight, Some(Pilot { landing }))
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        lock(&self.named).len()
    }
}

impl Flight {
    /// Waits for the chunk. Bounded by the deadlines of its reads.
    pub(crate) async fn landed(self: Arc<Self>) -> Result<Fetched, RemoteMiss> {
        let Landed { arrived, form } = self.landing.clone().await?;
        Ok(Fetched {
            via: arrived.via,
            form,
            bytes: Bytes::from_owner(Held {
                bytes: arrived.bytes,
                _flight: self,
            }),
        })
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let Some(flights) = self.flights.upgrade() else {
            return;
        };
        let mut named = lock(&flights.named);
        // A later flight of the same name has taken the entry if this one failed.
        if named
            .get(&self.name)
            .is_some_and(|entry| std::ptr::eq(entry.as_ptr(), self))
        {
            named.remove(&self.name);
        }
    }
}

/// A chunk's bytes, which keep its entry alive: other scans share them as long as they are in use.
struct Held {
    bytes: Bytes,
    _flight: Arc<Flight>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// What the mutexes guard is consistent between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
