//! Where the chunks of a scan came from, in EXPLAIN ANALYZE.

use datafusion::physical_plan::metrics::{Count, ExecutionPlanMetricsSet, MetricBuilder};
use stoa_reader::ChunkSource;

/// Counts by source. Names end in their unit, as metrics' names do.
#[derive(Clone, Debug)]
pub(crate) struct SourceMetrics {
    /// Chunks read from shared memory.
    pub(crate) memory_chunks: Count,
    /// Bytes of those chunks.
    pub(crate) memory_bytes: Count,
    /// Chunks read from neighbours' memory over TCP.
    pub(crate) remote_tcp_chunks: Count,
    /// Bytes of those chunks.
    pub(crate) remote_tcp_bytes: Count,
    /// Chunks read from neighbours' memory over RDMA.
    pub(crate) remote_rdma_chunks: Count,
    /// Bytes of those chunks.
    pub(crate) remote_rdma_bytes: Count,
    /// Chunks that were to come from neighbours and did not; they are read from the origin.
    pub(crate) remote_failed_chunks: Count,
    /// Chunks that had to be read from the origin.
    pub(crate) origin_chunks: Count,
    /// Row groups of which every needed column was in shared memory.
    pub(crate) row_groups_hit: Count,
    /// Row groups of which some needed columns were.
    pub(crate) row_groups_mixed: Count,
    /// Row groups read by stock Parquet.
    pub(crate) row_groups_missed: Count,
    /// Blocks that zone maps or dictionaries rule out.
    pub(crate) blocks_pruned: Count,
    /// Rows that filters removed in the scan, before operators above saw them.
    pub(crate) rows_filtered: Count,
    /// Columns of blocks of which only the surviving rows were unpacked.
    pub(crate) columns_late: Count,
    /// Filters that were left out on a block because they cost more than they save.
    pub(crate) filters_left_out: Count,
}

impl SourceMetrics {
    pub(crate) fn new(metrics: &ExecutionPlanMetricsSet, partition: usize) -> Self {
        let count = |name: &'static str| MetricBuilder::new(metrics).counter(name, partition);
        Self {
            memory_chunks: count("stoa_shared_memory_chunks"),
            memory_bytes: count("stoa_shared_memory_bytes"),
            remote_tcp_chunks: count("stoa_remote_tcp_chunks"),
            remote_tcp_bytes: count("stoa_remote_tcp_bytes"),
            remote_rdma_chunks: count("stoa_remote_rdma_chunks"),
            remote_rdma_bytes: count("stoa_remote_rdma_bytes"),
            remote_failed_chunks: count("stoa_remote_failed_chunks"),
            origin_chunks: count("stoa_origin_chunks"),
            row_groups_hit: count("stoa_row_groups_hit"),
            row_groups_mixed: count("stoa_row_groups_mixed"),
            row_groups_missed: count("stoa_row_groups_missed"),
            blocks_pruned: count("stoa_blocks_pruned"),
            rows_filtered: count("stoa_rows_filtered"),
            columns_late: count("stoa_columns_late"),
            filters_left_out: count("stoa_filters_left_out"),
        }
    }

    /// Counts one chunk by where it came from; bytes of the origin are counted by its reader.
    pub(crate) fn came(&self, source: ChunkSource, bytes: u64) {
        let (chunks, of_them) = match source {
            ChunkSource::Memory => (&self.memory_chunks, Some(&self.memory_bytes)),
            ChunkSource::RemoteTcp => (&self.remote_tcp_chunks, Some(&self.remote_tcp_bytes)),
            ChunkSource::RemoteRdma => (&self.remote_rdma_chunks, Some(&self.remote_rdma_bytes)),
            ChunkSource::Origin => (&self.origin_chunks, None),
        };
        chunks.add(1);
        if let Some(count) = of_them {
            count.add(bytes as usize);
        }
    }
}

/// Bytes that a reader asked the origin for.
pub(crate) fn origin_bytes(metrics: &ExecutionPlanMetricsSet, partition: usize) -> Count {
    MetricBuilder::new(metrics).counter("stoa_origin_bytes", partition)
}

/// Bytes that a reader took from chunks in the parquet form and from the catalog.
pub(crate) fn cached_bytes(metrics: &ExecutionPlanMetricsSet, partition: usize) -> Count {
    MetricBuilder::new(metrics).counter("stoa_shared_memory_parquet_bytes", partition)
}
