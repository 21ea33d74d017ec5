//! Registered memory to receive into. Registering costs far more than a read, so places are used
//! again; they count as locked memory, so there is a limit.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::verbs::{Place, ProtectionDomain, Received, Region};
use crate::memory::{Block, capacity_for};

/// Memory registered at a time, for places that are smaller.
const REGION_BYTES: usize = 4 << 20;

/// Memory of one device. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct ReceivePool {
    state: Arc<PoolState>,
}

#[derive(Debug)]
struct PoolState {
    domain: Arc<ProtectionDomain>,
    registered_bytes_max: usize,
    registered_bytes: Arc<AtomicUsize>,
    /// Places by capacity; only those that `capacity_for` yields.
    free: Mutex<BTreeMap<usize, Vec<Place>>>,
}

/// Counts a region's bytes for as long as it lives.
#[derive(Debug)]
struct Counted {
    registered_bytes: Arc<AtomicUsize>,
    bytes: usize,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.registered_bytes
            .fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl ReceivePool {
    /// A pool that registers at most `registered_bytes_max` bytes.
    pub(super) fn new(domain: Arc<ProtectionDomain>, registered_bytes_max: usize) -> Self {
        Self {
            state: Arc::new(PoolState {
                domain,
                registered_bytes_max,
                registered_bytes: Arc::default(),
                free: Mutex::default(),
            }),
        }
    }

    /// A place for `length` bytes, or `None` where the limit, or the system's, is reached.
    pub(super) fn take(&self, length: usize) -> Option<Place> {
        let state = &*self.state;
        let capacity = capacity_for(length);
        let mut free = state.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = free.get_mut(&capacity).and_then(Vec::pop) {
            return Some(place);
        }
        let bytes = capacity.max(REGION_BYTES / capacity * capacity);
        if !state.has_room(bytes) {
            // What is free in other sizes makes room, where nothing else is in its regions.
            free.clear();
            if !state.has_room(bytes) {
                return None;
            }
        }
        let counted = Counted {
            registered_bytes: Arc::clone(&state.registered_bytes),
            bytes,
        };
        state.registered_bytes.fetch_add(bytes, Ordering::Relaxed);
        match Region::new(&state.domain, bytes, Box::new(counted)) {
            Ok(region) => {
                let mut places = region.cut(capacity);
                let place = places.pop();
                free.entry(capacity).or_default().append(&mut places);
                place
            }
            Err(error) => {
                tracing::debug!(%error, bytes, "no memory to receive into over RDMA");
                None
            }
        }
    }

    /// What arrived, as a block that gives its place back.
    pub(super) fn block(&self, received: Received) -> Block {
        Block::from_owner(Pooled {
            received: Some(received),
            pool: Arc::downgrade(&self.state),
        })
    }
}

impl PoolState {
    fn has_room(&self, bytes: usize) -> bool {
        self.registered_bytes.load(Ordering::Relaxed) + bytes <= self.registered_bytes_max
    }
}

/// Received bytes that belong to a pool.
#[derive(Debug)]
struct Pooled {
    /// `None` only while dropping.
    received: Option<Received>,
    pool: Weak<PoolState>,
}

impl AsRef<[u8]> for Pooled {
    fn as_ref(&self) -> &[u8] {
        self.received.as_ref().map_or(&[], AsRef::as_ref)
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if let (Some(received), Some(pool)) = (self.received.take(), self.pool.upgrade()) {
            let place = received.into_place();
            pool.free
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(place.capacity())
                .or_default()
                .push(place);
        }
    }
}
