//! What a lookup yields, and how often.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use stoa_forms::Chunk;

/// A cached chunk, opened: its memory stays until the last value made from it is dropped.
#[derive(Clone, Debug)]
pub enum CachedChunk {
    /// Values that are read block by block, decoded or packed.
    Decoded(Chunk),
    /// The bytes of the column chunk as they are in the file.
    Parquet(Bytes),
}

/// Why a chunk was not read from shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miss {
    /// The index has no such chunk.
    Absent,
    /// The chunk's segment is gone from the directory, or cannot be opened.
    SegmentGone,
    /// The chunk's bytes are not what the index says.
    Corrupt,
    /// The chunk is in a form that this build does not read.
    UnknownForm,
}

/// How many chunks a process has read from where, since it started.
#[derive(Debug, Default)]
pub struct ReadStatistics {
    hits: AtomicU64,
    hit_bytes: AtomicU64,
    misses: AtomicU64,
}

impl ReadStatistics {
    /// Counts chunks of together `bytes` bytes read from shared memory.
    pub fn hit(&self, chunks: u64, bytes: u64) {
        self.hits.fetch_add(chunks, Ordering::Relaxed);
        self.hit_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts chunks that a scan had to read from the origin.
    pub fn missed(&self, chunks: u64) {
        self.misses.fetch_add(chunks, Ordering::Relaxed);
    }

    /// The counts at this moment.
    pub fn counts(&self) -> MissCounts {
        MissCounts {
            hits: self.hits.load(Ordering::Relaxed),
            hit_bytes: self.hit_bytes.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
        }
    }
}

/// A snapshot of [`ReadStatistics`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MissCounts {
    /// Chunks read from shared memory.
    pub hits: u64,
    /// Bytes of those chunks.
    pub hit_bytes: u64,
    /// Chunks read from the origin.
    pub misses: u64,
}

impl MissCounts {
    /// The share of chunks that came from shared memory, 1 where none was read.
    pub fn hit_rate(&self) -> f64 {
        let all = self.hits + self.misses;
        if all == 0 {
            1.0
        } else {
            self.hits as f64 / all as f64
        }
    }

    /// What was counted since `earlier`.
    pub fn since(&self, earlier: &MissCounts) -> MissCounts {
        MissCounts {
            hits: self.hits - earlier.hits,
            hit_bytes: self.hit_bytes - earlier.hit_bytes,
            misses: self.misses - earlier.misses,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hit_rate_counts_chunks() {
        let statistics = ReadStatistics::default();
        assert_eq!(statistics.counts().hit_rate(), 1.0);
        statistics.hit(1, 100);
        let earlier = statistics.counts();
        statistics.hit(1, 50);
        statistics.missed(3);
        assert_eq!(statistics.counts().since(&earlier).hit_rate(), 0.25);
        assert_eq!(statistics.counts().hit_bytes, 150);
    }
}
