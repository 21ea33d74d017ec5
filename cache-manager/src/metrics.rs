//! What a worker counts beside its state.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use stoa_control::Metric;
use stoa_origin::OriginCounters;

/// Counts since the worker started.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Bytes of chunks read from the origin.
    pub(crate) fetched_bytes: AtomicU64,
    /// Bytes of chunks written to shared memory.
    pub(crate) stored_bytes: AtomicU64,
    /// Bytes of chunks read from other workers over RDMA.
    pub(crate) peer_rdma_bytes: AtomicU64,
    /// Bytes of chunks read from other workers over TCP.
    pub(crate) peer_tcp_bytes: AtomicU64,
    /// Chunks fetched from other workers and stored.
    pub(crate) peer_chunks: AtomicU64,
    /// Reads from other workers that failed.
    pub(crate) peer_errors: AtomicU64,
    /// Chunks fetched and stored.
    pub(crate) chunks_fetched: AtomicU64,
    /// Chunks that a load found there.
    pub(crate) chunks_kept: AtomicU64,
    /// Chunks that could not be had.
    pub(crate) chunks_failed: AtomicU64,
    /// Chunks stored in the parquet form though arrow was wanted.
    pub(crate) chunks_fallen_back: AtomicU64,
    /// Loads that came to their end.
    pub(crate) loads: AtomicU64,
    /// Time spent loading.
    pub(crate) load_micros: AtomicU64,
    /// Segments copied together.
    pub(crate) segments_compacted: AtomicU64,
    /// Looks at the origin for changed files.
    pub(crate) looks: AtomicU64,
    /// Bytes of what is published that were hashed again.
    pub(crate) verified_bytes: AtomicU64,
    /// What the walk that is under way has still to hash.
    pub(crate) unverified_bytes: AtomicU64,
    /// What such walks found to be damaged.
    pub(crate) damaged: AtomicU64,
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, value: u64) {
    // Only counted: nothing else is read by it.
    counter.fetch_add(value, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn loaded(&self, took: Duration) {
        add(&self.loads, 1);
        add(
            &self.load_micros,
            u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        );
    }

    /// The counts as metrics.
    pub(crate) fn metrics(&self, origin: &OriginCounters) -> Vec<Metric> {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            Metric::counter("worker_fetched", "Bytes of chunks read from the origin")
                .bytes()
                .value(value(&self.fetched_bytes)),
            Metric::counter("worker_stored", "Bytes of chunks written to shared memory")
                .bytes()
                .value(value(&self.stored_bytes)),
            Metric::counter(
                "worker_peer_fetched",
                "Bytes of chunks read from other workers by loads, by how",
            )
            .bytes()
            .sample(&[("transport", "rdma")], value(&self.peer_rdma_bytes))
            .sample(&[("transport", "tcp")], value(&self.peer_tcp_bytes)),
            Metric::counter(
                "worker_peer_chunks_fetched",
                "Chunks fetched from other workers and stored",
            )
            .value(value(&self.peer_chunks)),
            Metric::counter(
                "worker_peer_errors",
                "Chunks that another worker had and did not give",
            )
            .value(value(&self.peer_errors)),
            Metric::counter(
                "worker_chunks_fetched",
                "Chunks fetched and stored, from wherever",
            )
            .value(value(&self.chunks_fetched)),
            Metric::counter(
                "worker_chunks_kept",
                "Chunks that a load found there already",
            )
            .value(value(&self.chunks_kept)),
            Metric::counter("worker_chunk_errors", "Chunks that could not be had")
                .value(value(&self.chunks_failed)),
            Metric::counter(
                "worker_chunk_fallbacks",
                "Chunks kept as parquet though arrow was wanted",
            )
            .value(value(&self.chunks_fallen_back)),
            Metric::counter("worker_loads", "Loads that came to their end")
                .value(value(&self.loads)),
            Metric::counter("worker_load", "Time spent loading")
                .seconds()
                .value(value(&self.load_micros) as f64 / 1e6),
            Metric::counter("worker_segments_compacted", "Segments copied together")
                .value(value(&self.segments_compacted)),
            Metric::counter("worker_looks", "Looks at the origin for changed files")
                .value(value(&self.looks)),
            Metric::counter(
                "worker_verified",
                "Bytes of what is published that were hashed again behind",
            )
            .bytes()
            .value(value(&self.verified_bytes)),
            Metric::gauge(
                "worker_unverified",
                "Bytes that the hashing under way has still to go through",
            )
            .bytes()
            .value(value(&self.unverified_bytes)),
            Metric::counter(
                "worker_damaged_chunks",
                "Chunks and catalogs that were found damaged in memory",
            )
            .value(value(&self.damaged)),
            Metric::counter("origin_requests", "Requests to object stores")
                .sample(&[("operation", "get")], origin.get_requests)
                .sample(&[("operation", "list")], origin.list_requests)
                .sample(&[("operation", "head")], origin.head_requests),
            Metric::counter("origin_read", "Bytes read from object stores")
                .bytes()
                .value(origin.bytes),
            Metric::counter("origin_retries", "Requests to object stores made again")
                .value(origin.retries),
        ]
    }
}
