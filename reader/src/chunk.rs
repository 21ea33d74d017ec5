//! What a lookup yields, and how often.

use std::sync::atomic::{AtomicU64, Ordering};

use arrow::datatypes::DataType;
use bytes::Bytes;
use stoa_forms::{Chunk, FORM_ARROW, FORM_PACKED, FORM_PARQUET};
use stoa_transfer::TransportKind;

use crate::neighbours::RemoteMiss;

/// A cached chunk, opened: its memory stays until the last value made from it is dropped.
#[derive(Clone, Debug)]
pub enum CachedChunk {
    /// Values that are read block by block, decoded or packed.
    Decoded(Chunk),
    /// The bytes of the column chunk as they are in the file.
    Parquet(Bytes),
}

/// Whether this build reads chunks of that form.
pub(crate) fn reads_form(form: u8) -> bool {
    matches!(form, FORM_ARROW | FORM_PACKED | FORM_PARQUET)
}

impl CachedChunk {
    /// Opens the bytes of a chunk, wherever they come from; `data_type` is what they decode to.
    pub(crate) fn open(form: u8, bytes: Bytes, data_type: &DataType) -> Result<Self, Miss> {
        match form {
            FORM_ARROW | FORM_PACKED => Chunk::open(form, bytes, data_type)
                .map(CachedChunk::Decoded)
                .map_err(|error| {
                    tracing::debug!(%error, "chunk unreadable");
                    Miss::Corrupt
                }),
            FORM_PARQUET => Ok(CachedChunk::Parquet(bytes)),
            _ => Err(Miss::UnknownForm),
        }
    }
}

/// Where the bytes of a chunk came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChunkSource {
    /// Shared memory of this host.
    Memory,
    /// A neighbour's memory, over TCP.
    RemoteTcp,
    /// A neighbour's memory, over RDMA.
    RemoteRdma,
    /// The object store.
    Origin,
}

impl From<TransportKind> for ChunkSource {
    fn from(via: TransportKind) -> Self {
        match via {
            TransportKind::Rdma => ChunkSource::RemoteRdma,
            // Whatever is no one-sided read is bytes that somebody sent.
            _ => ChunkSource::RemoteTcp,
        }
    }
}

/// A chunk that came from a neighbour.
#[derive(Clone, Debug)]
pub struct RemoteChunk {
    /// The chunk; its memory stays until the last value made from it is dropped.
    pub chunk: CachedChunk,
    /// Which way it came.
    pub source: ChunkSource,
    /// Bytes that came.
    pub bytes: u64,
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
    hits: Tally,
    remote_tcp: Tally,
    remote_rdma: Tally,
    misses: AtomicU64,
    remote_misses: [AtomicU64; RemoteMiss::FAILURES.len()],
}

#[derive(Debug, Default)]
struct Tally {
    chunks: AtomicU64,
    bytes: AtomicU64,
}

impl Tally {
    fn add(&self, chunks: u64, bytes: u64) {
        self.chunks.fetch_add(chunks, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn now(&self) -> (u64, u64) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (load(&self.chunks), load(&self.bytes))
    }
}

impl ReadStatistics {
    /// Counts chunks of together `bytes` bytes read from shared memory.
    pub fn hit(&self, chunks: u64, bytes: u64) {
        self.hits.add(chunks, bytes);
    }

    /// Counts chunks of together `bytes` bytes read from `source`; of the origin only the chunks.
    pub fn read(&self, source: ChunkSource, chunks: u64, bytes: u64) {
        match source {
            ChunkSource::Memory => self.hits.add(chunks, bytes),
            ChunkSource::RemoteTcp => self.remote_tcp.add(chunks, bytes),
            ChunkSource::RemoteRdma => self.remote_rdma.add(chunks, bytes),
            ChunkSource::Origin => self.missed(chunks),
        }
    }

    /// Counts chunks that a scan had to read from the origin.
    pub fn missed(&self, chunks: u64) {
        self.misses.fetch_add(chunks, Ordering::Relaxed);
    }

    /// Counts a chunk that was asked of a neighbour and did not come.
    pub fn remote_missed(&self, miss: RemoteMiss) {
        if let Some(failure) = RemoteMiss::FAILURES.iter().position(|f| *f == miss) {
            self.remote_misses[failure].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The chunks that were asked of neighbours and did not come, by why.
    pub fn remote_misses(&self) -> impl Iterator<Item = (RemoteMiss, u64)> + '_ {
        RemoteMiss::FAILURES
            .into_iter()
            .zip(&self.remote_misses)
            .map(|(miss, count)| (miss, count.load(Ordering::Relaxed)))
    }

    /// The counts at this moment.
    pub fn counts(&self) -> MissCounts {
        let (hits, hit_bytes) = self.hits.now();
        let (remote_tcp, remote_tcp_bytes) = self.remote_tcp.now();
        let (remote_rdma, remote_rdma_bytes) = self.remote_rdma.now();
        MissCounts {
            hits,
            hit_bytes,
            remote_tcp,
            remote_tcp_bytes,
            remote_rdma,
            remote_rdma_bytes,
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
    /// Chunks read from neighbours over TCP.
    pub remote_tcp: u64,
    /// Bytes of those chunks.
    pub remote_tcp_bytes: u64,
    /// Chunks read from neighbours over RDMA.
    pub remote_rdma: u64,
    /// Bytes of those chunks.
    pub remote_rdma_bytes: u64,
    /// Chunks read from the origin.
    pub misses: u64,
}

impl MissCounts {
    /// Chunks read from anywhere.
    pub fn chunks(&self) -> u64 {
        self.hits + self.remote_tcp + self.remote_rdma + self.misses
    }

    /// The share of chunks that came from shared memory, this host's or a neighbour's; 1 where none
    /// was read.
    pub fn hit_rate(&self) -> f64 {
        let all = self.chunks();
        if all == 0 {
            1.0
        } else {
            (all - self.misses) as f64 / all as f64
        }
    }

    /// What was counted since `earlier`.
    pub fn since(&self, earlier: &MissCounts) -> MissCounts {
        MissCounts {
            hits: self.hits - earlier.hits,
            hit_bytes: self.hit_bytes - earlier.hit_bytes,
            remote_tcp: self.remote_tcp - earlier.remote_tcp,
            remote_tcp_bytes: self.remote_tcp_bytes - earlier.remote_tcp_bytes,
            remote_rdma: self.remote_rdma - earlier.remote_rdma,
            remote_rdma_bytes: self.remote_rdma_bytes - earlier.remote_rdma_bytes,
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

    #[test]
    fn chunks_by_source_add_up() {
        let statistics = ReadStatistics::default();
        statistics.read(ChunkSource::Memory, 1, 10);
        statistics.read(TransportKind::Tcp.into(), 2, 20);
        statistics.read(TransportKind::Rdma.into(), 3, 30);
        statistics.read(ChunkSource::Origin, 4, 0);
        let counts = statistics.counts();
        assert_eq!((counts.remote_tcp, counts.remote_tcp_bytes), (2, 20));
        assert_eq!((counts.remote_rdma, counts.remote_rdma_bytes), (3, 30));
        assert_eq!(counts.chunks(), 10);
        assert_eq!(counts.hit_rate(), 0.6);
    }

    #[test]
    fn only_what_was_asked_for_counts_as_a_neighbours_failure() {
        let statistics = ReadStatistics::default();
        statistics.remote_missed(RemoteMiss::Corrupt);
        statistics.remote_missed(RemoteMiss::NotHeld);
        let failed: Vec<_> = statistics.remote_misses().filter(|(_, n)| *n > 0).collect();
        assert_eq!(failed, [(RemoteMiss::Corrupt, 1)]);
    }
}
