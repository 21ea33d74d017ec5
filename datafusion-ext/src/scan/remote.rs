//! The columns of a row group that neighbours hold: fetched ahead of the scan, then as good as
//! local ones.
//!
//! What does not come in time is a miss of that column, which is decoded from the file beside the
//! others, as in any mixture.

use std::collections::VecDeque;

use arrow::datatypes::DataType;
use bytes::Bytes;
use stoa_forms::Chunk;
use stoa_reader::{CachedChunk, ChunkSource, RemoteColumns, TableFile, View};

use super::context::ScanContext;
use super::metrics::SourceMetrics;
use super::row_group::CachedRowGroup;

/// Bytes that are fetched ahead of the row group that is being read, at most; the next row group is
/// fetched whatever its size.
const AHEAD_BYTES_MAX: u64 = 32 << 20;

/// Columns of one row group that are to come from neighbours.
#[derive(Debug, Default)]
pub(crate) struct RemotePart {
    columns: Vec<RemoteColumn>,
    bytes: u64,
    fetch: Option<RemoteColumns>,
}

#[derive(Debug)]
struct RemoteColumn {
    /// Position among the needed columns.
    position: usize,
    /// Ordinal of the first leaf.
    leaf: u32,
    data_type: DataType,
}

/// What came from neighbours.
#[derive(Debug, Default)]
pub(crate) struct RemoteArrivals {
    /// Chunks that are read block by block, by position among the needed columns.
    pub(crate) decoded: Vec<(usize, Chunk)>,
    /// Chunks that are still to be decoded, as they are in the file, by ordinal of the first leaf.
    pub(crate) encoded: Vec<(u32, Bytes)>,
    sources: Vec<(ChunkSource, u64)>,
    failed: usize,
}

impl RemotePart {
    /// Takes up the column at `position` if a neighbour is to be asked for it.
    pub(crate) fn offer(
        &mut self,
        view: &View,
        file: &TableFile,
        row_group: u32,
        position: usize,
        leaf: u32,
        data_type: &DataType,
    ) {
        if let Ok(bytes) = view.offered(file, row_group, leaf) {
            self.bytes += bytes;
            self.columns.push(RemoteColumn {
                position,
                leaf,
                data_type: data_type.clone(),
            });
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// Starts to fetch, once.
    pub(crate) fn start(&mut self, view: &View, file: &TableFile, row_group: u32) {
        if !self.columns.is_empty() && self.fetch.is_none() {
            let leaves: Vec<u32> = self.columns.iter().map(|column| column.leaf).collect();
            self.fetch = Some(view.fetch(file, row_group, &leaves));
        }
    }

    /// What came, of `rows` rows each. It takes at most as long as the neighbours' deadlines.
    pub(crate) async fn landed(self, rows: usize) -> RemoteArrivals {
        let mut arrivals = RemoteArrivals::default();
        let Some(fetch) = self.fetch else {
            return arrivals;
        };
        let types: Vec<DataType> = self.columns.iter().map(|c| c.data_type.clone()).collect();
        for (column, landed) in self.columns.iter().zip(fetch.landed(&types).await) {
            match landed.map(|remote| (remote.chunk, remote.source, remote.bytes)) {
                Ok((CachedChunk::Decoded(chunk), source, bytes)) if chunk.rows() == rows => {
                    arrivals.decoded.push((column.position, chunk));
                    arrivals.sources.push((source, bytes));
                }
                Ok((CachedChunk::Parquet(chunk), source, bytes)) => {
                    arrivals.encoded.push((column.leaf, chunk));
                    arrivals.sources.push((source, bytes));
                }
                Ok(_) | Err(_) => arrivals.failed += 1,
            }
        }
        arrivals
    }
}

impl RemoteArrivals {
    /// Chunks that came.
    pub(crate) fn chunks(&self) -> usize {
        self.sources.len()
    }

    /// Counts what came and what did not.
    pub(crate) fn count(&self, view: &View, metrics: &SourceMetrics) {
        for (source, bytes) in &self.sources {
            metrics.came(*source, *bytes);
            view.reader().statistics().read(*source, 1, *bytes);
        }
        metrics.remote_failed_chunks.add(self.failed);
    }
}

/// Starts to fetch what `first`, which is read next, needs of neighbours, and what the row groups
/// behind it need, as far ahead as memory allows.
pub(crate) fn fetch_ahead(
    context: &ScanContext,
    file: &TableFile,
    first: &mut CachedRowGroup,
    behind: &mut VecDeque<CachedRowGroup>,
) {
    let view = &context.view;
    first.remote.start(view, file, first.index as u32);
    // A scan that may stop early has no use for what it does not reach.
    if context.limit.is_some() {
        return;
    }
    let mut ahead = 0;
    for group in behind {
        if ahead > 0 && ahead + group.remote.bytes > AHEAD_BYTES_MAX {
            return;
        }
        ahead += group.remote.bytes;
        group.remote.start(view, file, group.index as u32);
    }
}
