//! What could not be had, and when it is tried again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use stoa_shm::ChunkKey;

/// What a failed chunk waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Time: the store or the network may answer again.
    Retry,
    /// A fresh look at the table: the object is not what the catalog says.
    Refresh,
    /// Nothing that this process can do: the bytes are what they are.
    Never,
}

#[derive(Clone, Debug)]
struct Failure {
    attempts: u32,
    not_before: Option<Instant>,
    reason: String,
}

/// The chunks that failed lately. Bounded by what the plans name: see [`Failures::retain`].
#[derive(Debug)]
pub struct Failures {
    first: Duration,
    longest: Duration,
    chunks: HashMap<ChunkKey, Failure>,
}

impl Failures {
    /// Waits `first` after the first failure of a chunk, then twice as long each time, at most
    /// `longest`.
    pub fn new(first: Duration, longest: Duration) -> Failures {
        Failures {
            first,
            longest,
            chunks: HashMap::new(),
        }
    }

    /// Takes notice of a failure at `now`. `jitter` in 0..1 spreads retries of many workers; what
    /// fails together should get the same.
    pub fn record(
        &mut self,
        key: ChunkKey,
        remedy: Remedy,
        reason: String,
        now: Instant,
        jitter: f64,
    ) {
        let attempts = self.chunks.get(&key).map_or(0, |failure| failure.attempts) + 1;
        let wait = self
            .first
            .saturating_mul(1 << (attempts - 1).min(20))
            .min(self.longest);
        let wait = wait.mul_f64(0.75 + 0.5 * jitter.clamp(0.0, 1.0));
        let not_before = (remedy == Remedy::Retry).then(|| now + wait);
        self.chunks.insert(
            key,
            Failure {
                attempts,
                not_before,
                reason,
            },
        );
    }

    /// Forgets a chunk that was had after all.
    pub fn forget(&mut self, key: &ChunkKey) {
        self.chunks.remove(key);
    }

    /// Forgets everything, so that all is tried again.
    pub fn clear(&mut self) {
        self.chunks.clear();
    }

    /// Forgets the chunks that `wanted` does not name any more.
    pub fn retain(&mut self, wanted: impl Fn(&ChunkKey) -> bool) {
        self.chunks.retain(|key, _| wanted(key));
    }

    /// The chunks that must not be tried at `now`. What is due within the first wait is not among
    /// them, so that chunks that failed together are tried together.
    pub fn blocked(&self, now: Instant) -> impl Iterator<Item = &ChunkKey> {
        let soon = now + self.first;
        self.chunks
            .iter()
            .filter(move |(_, failure)| failure.not_before.is_none_or(|at| soon < at))
            .map(|(key, _)| key)
    }

    /// When the next chunk may be tried again, if any.
    pub fn next_retry(&self) -> Option<Instant> {
        self.chunks
            .values()
            .filter_map(|failure| failure.not_before)
            .min()
    }

    /// Whether a chunk failed and is tried again when some time has passed.
    pub fn is_retried(&self, key: &ChunkKey) -> bool {
        let failure = self.chunks.get(key);
        failure.is_some_and(|failure| failure.not_before.is_some())
    }

    /// Why a chunk failed.
    pub fn reason(&self, key: &ChunkKey) -> Option<&str> {
        self.chunks.get(key).map(|failure| failure.reason.as_str())
    }

    /// How many chunks failed and were not had since.
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Whether nothing failed.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn key() -> ChunkKey {
        ChunkKey {
            file: Arc::from(&b"f"[..]),
            row_group: 0,
            column: 0,
        }
    }

    #[test]
    fn waits_grow_to_the_longest() {
        let mut failures = Failures::new(Duration::from_secs(1), Duration::from_secs(5));
        let now = Instant::now();
        let mut waits = vec![];
        for _ in 0..4 {
            failures.record(key(), Remedy::Retry, "503".into(), now, 0.5);
            waits.push(failures.next_retry().unwrap() - now);
        }
        assert_eq!(waits, [1, 2, 4, 5].map(Duration::from_secs));
        assert_eq!(failures.blocked(now).count(), 1);
        assert_eq!(failures.blocked(now + Duration::from_secs(3)).count(), 1);
        assert_eq!(failures.blocked(now + Duration::from_secs(4)).count(), 0);
        assert!(failures.is_retried(&key()));
        failures.forget(&key());
        assert!(failures.is_empty() && !failures.is_retried(&key()));
    }

    #[test]
    fn what_time_does_not_heal_stays_blocked() {
        let mut failures = Failures::new(Duration::from_secs(1), Duration::from_secs(5));
        let now = Instant::now();
        failures.record(key(), Remedy::Refresh, "changed".into(), now, 0.0);
        assert_eq!(failures.next_retry(), None);
        assert_eq!(failures.blocked(now + Duration::from_secs(3600)).count(), 1);
        assert_eq!(failures.reason(&key()), Some("changed"));
        assert!(!failures.is_retried(&key()), "not by itself");
        failures.retain(|_| false);
        assert_eq!(failures.len(), 0);
    }
}
