//! What this worker is going to load, for others who want the same.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use stoa_shm::ChunkKey;

/// Written by the engine, read by whoever answers peers.
#[derive(Debug, Default)]
pub(crate) struct LoadBoard {
    loading: Mutex<HashSet<ChunkKey>>,
    settled: AtomicBool,
    progress: AtomicU64,
}

impl LoadBoard {
    fn loading(&self) -> MutexGuard<'_, HashSet<ChunkKey>> {
        // A set that is changed by single inserts and removals: never half done.
        self.loading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These chunks are going to be loaded, and no others.
    pub(crate) fn begin(&self, chunks: impl Iterator<Item = ChunkKey>) {
        *self.loading() = chunks.collect();
        self.advance();
    }

    /// A chunk was stored, or will not come.
    pub(crate) fn done(&self, chunk: &ChunkKey) {
        self.loading().remove(chunk);
        self.advance();
    }

    /// The load has come to its end.
    pub(crate) fn end(&self) {
        self.loading().clear();
        self.advance();
    }

    /// Which of these are going to be loaded.
    pub(crate) fn is_loading(&self, chunks: &[ChunkKey]) -> Vec<bool> {
        let loading = self.loading();
        chunks.iter().map(|chunk| loading.contains(chunk)).collect()
    }

    /// Whether the worker knows all that it is to hold.
    pub(crate) fn set_settled(&self, settled: bool) {
        self.settled.store(settled, Ordering::Relaxed);
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }

    /// Says that the worker got further.
    pub(crate) fn advance(&self) {
        // Only compared with what it was: nothing else is read by it.
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }
}
