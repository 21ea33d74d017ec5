//! One row group of a file: where each needed column comes from, and its rows block by block.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, BooleanBufferBuilder, RecordBatch, RecordBatchOptions};
use arrow::compute::filter_record_batch;
use arrow::datatypes::SchemaRef;
use datafusion::common::{DataFusionError, Result, exec_datafusion_err};
use datafusion_datasource_parquet::RowGroupAccess;
use futures::StreamExt;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::arrow::async_reader::{ParquetRecordBatchStream, ParquetRecordBatchStreamBuilder};
use stoa_forms::{ArrowChunk, BLOCK_ROWS};
use stoa_reader::{CachedChunk, Miss, TableFile, View};

use super::file_reader::CachedFileReader;
use super::remote::{RemoteArrivals, RemotePart};

/// A row group of which at least one needed column is in shared memory as Arrow, or in that of a
/// neighbour.
#[derive(Debug)]
pub(crate) struct CachedRowGroup {
    pub(crate) index: usize,
    pub(crate) rows: usize,
    /// By position among the needed columns; `None` is to be decoded from the file.
    columns: Vec<Option<ArrowChunk>>,
    /// The rows to read, ascending; `None` for all.
    selection: Option<Vec<Range<usize>>>,
    pub(crate) bytes: u64,
    /// What is to come from neighbours.
    pub(crate) remote: RemotePart,
}

impl CachedRowGroup {
    /// Opens what is cached of a row group's needed columns; `None` where that is nothing.
    ///
    /// Without any needed column the row group counts as cached: only its rows are counted.
    pub(crate) fn open(
        view: &View,
        file: &TableFile,
        index: usize,
        needed: &[usize],
        schema: &SchemaRef,
        access: &RowGroupAccess,
    ) -> Option<Self> {
        let rows = usize::try_from(file.metadata().row_group(index).num_rows()).ok()?;
        let mut bytes = 0;
        let mut columns = Vec::with_capacity(needed.len());
        let mut remote = RemotePart::default();
        if !needed.is_empty() {
            let (id, row_group) = (view.file_id(file), index as u32);
            for (position, column) in needed.iter().enumerate() {
                let leaf = file.roots()[*column].first_leaf;
                let data_type = schema.field(*column).data_type();
                let local = id.ok_or(Miss::Absent);
                let chunk = match local.and_then(|id| view.chunk(id, row_group, leaf, data_type)) {
                    Ok(CachedChunk::Arrow(chunk)) if chunk.rows() == rows => {
                        bytes += chunk.bytes() as u64;
                        Some(chunk)
                    }
                    Ok(CachedChunk::Parquet(_)) => None,
                    Ok(_) | Err(_) => {
                        remote.offer(view, file, row_group, position, leaf, data_type);
                        None
                    }
                };
                columns.push(chunk);
            }
            if columns.iter().all(Option::is_none) && remote.is_empty() {
                return None;
            }
        }
        let selection = match access {
            RowGroupAccess::Skip => Some(vec![]),
            RowGroupAccess::Scan => None,
            RowGroupAccess::Selection(selection) => {
                let mut at = 0;
                let mut ranges = vec![];
                for part in selection.iter() {
                    if !part.skip {
                        ranges.push(at..at + part.row_count);
                    }
                    at += part.row_count;
                }
                Some(ranges)
            }
        };
        Some(Self {
            index,
            rows,
            columns,
            selection,
            bytes,
            remote,
        })
    }

    /// Waits for what neighbours send; what came decoded is among the columns from now on.
    pub(crate) async fn settle(&mut self) -> RemoteArrivals {
        let mut arrivals = std::mem::take(&mut self.remote).landed(self.rows).await;
        for (position, chunk) in arrivals.decoded.drain(..) {
            self.columns[position] = Some(chunk);
        }
        arrivals
    }

    /// Columns read from shared memory, of this host or, once settled, a neighbour.
    pub(crate) fn hits(&self) -> usize {
        self.columns.iter().flatten().count()
    }

    /// Columns that the scan needs.
    pub(crate) fn columns(&self) -> usize {
        self.columns.len()
    }

    /// Starts decoding the missing columns, if any.
    pub(crate) fn start(
        self,
        file: &TableFile,
        needed: &[usize],
        schema: &SchemaRef,
        reader: impl FnOnce() -> CachedFileReader,
    ) -> Result<ActiveRowGroup> {
        let missing: Vec<usize> = needed
            .iter()
            .zip(&self.columns)
            .filter(|(_, chunk)| chunk.is_none())
            .map(|(column, _)| *column)
            .collect();
        let decoder = if missing.is_empty() {
            None
        } else {
            let options = ArrowReaderOptions::new().with_schema(Arc::clone(schema));
            let metadata = ArrowReaderMetadata::try_new(Arc::clone(file.metadata()), options)?;
            let mask = ProjectionMask::roots(metadata.parquet_schema(), missing);
            let stream = ParquetRecordBatchStreamBuilder::new_with_metadata(reader(), metadata)
                .with_row_groups(vec![self.index])
                .with_projection(mask)
                .with_batch_size(BLOCK_ROWS)
                .build()?;
            Some(Box::new(stream))
        };
        let batch_schema = Arc::new(schema.project(needed)?);
        Ok(ActiveRowGroup {
            group: self,
            block: 0,
            decoder,
            schema: batch_schema,
        })
    }
}

/// A row group being read.
pub(crate) struct ActiveRowGroup {
    group: CachedRowGroup,
    block: usize,
    decoder: Option<Box<ParquetRecordBatchStream<CachedFileReader>>>,
    schema: SchemaRef,
}

impl ActiveRowGroup {
    /// The next block's selected rows; `None` after the last.
    pub(crate) async fn next(&mut self) -> Result<Option<RecordBatch>> {
        loop {
            let start = self.block * BLOCK_ROWS;
            if start >= self.group.rows {
                return Ok(None);
            }
            let block = self.block;
            self.block += 1;
            let rows = BLOCK_ROWS.min(self.group.rows - start);
            let mask = match &self.group.selection {
                None => Selected::All,
                Some(ranges) => select(ranges, start, rows),
            };
            let decoded = match &mut self.decoder {
                // Decoded even where no row is selected: the decoder has to keep in step.
                Some(decoder) => Some(next_block(decoder, rows).await?),
                None => None,
            };
            if matches!(mask, Selected::None) {
                continue;
            }
            let batch = self.assemble(block, rows, decoded)?;
            return Ok(Some(match mask {
                Selected::Run(run) => batch.slice(run.start, run.len()),
                Selected::Mask(mask) => keep(&batch, &mask)?,
                Selected::All | Selected::None => batch,
            }));
        }
    }

    fn assemble(
        &self,
        block: usize,
        rows: usize,
        decoded: Option<RecordBatch>,
    ) -> Result<RecordBatch> {
        let mut decoded = decoded.iter().flat_map(|batch| batch.columns());
        let mut arrays: Vec<ArrayRef> = Vec::with_capacity(self.group.columns.len());
        for chunk in &self.group.columns {
            arrays.push(match chunk {
                Some(chunk) => chunk.block(block),
                None => Arc::clone(decoded.next().ok_or_else(|| {
                    exec_datafusion_err!("row group {}: a column is missing", self.group.index)
                })?),
            });
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        Ok(RecordBatch::try_new_with_options(
            Arc::clone(&self.schema),
            arrays,
            &options,
        )?)
    }
}

/// The rows of a batch that a mask without nulls selects; a batch may have no column at all.
pub(super) fn keep(batch: &RecordBatch, mask: &BooleanArray) -> Result<RecordBatch> {
    if batch.num_columns() > 0 {
        return Ok(filter_record_batch(batch, mask)?);
    }
    let options = RecordBatchOptions::new().with_row_count(Some(mask.true_count()));
    Ok(RecordBatch::try_new_with_options(
        batch.schema(),
        vec![],
        &options,
    )?)
}

async fn next_block(
    decoder: &mut ParquetRecordBatchStream<CachedFileReader>,
    rows: usize,
) -> Result<RecordBatch> {
    let batch = decoder
        .next()
        .await
        .transpose()
        .map_err(DataFusionError::from)?;
    let found = batch.as_ref().map_or(0, RecordBatch::num_rows);
    batch
        .filter(|_| found == rows)
        .ok_or_else(|| exec_datafusion_err!("decoded {found} rows beside a cached block of {rows}"))
}

/// Which rows of a block are selected.
#[derive(Debug, PartialEq)]
enum Selected {
    None,
    All,
    Run(Range<usize>),
    Mask(BooleanArray),
}

fn select(ranges: &[Range<usize>], start: usize, rows: usize) -> Selected {
    let first = ranges.partition_point(|range| range.end <= start);
    let mut runs = ranges[first..]
        .iter()
        .take_while(|range| range.start < start + rows)
        .map(|range| range.start.max(start) - start..range.end.min(start + rows) - start)
        .filter(|run| !run.is_empty())
        .peekable();
    let Some(run) = runs.next() else {
        return Selected::None;
    };
    if runs.peek().is_none() {
        return if run.len() == rows {
            Selected::All
        } else {
            Selected::Run(run)
        };
    }
    let mut mask = BooleanBufferBuilder::new(rows);
    for run in std::iter::once(run).chain(runs) {
        mask.append_n(run.start - mask.len(), false);
        mask.append_n(run.len(), true);
    }
    mask.append_n(rows - mask.len(), false);
    Selected::Mask(BooleanArray::new(mask.finish(), None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selections_cut_to_the_block() {
        let ranges = [10..20, 8190..8200, 8300..8301, 30_000..30_001];
        assert_eq!(select(&ranges, 16_384, 8192), Selected::None);
        let whole = std::slice::from_ref(&(0..16_384));
        assert_eq!(select(whole, 8192, 8192), Selected::All);
        let start = std::slice::from_ref(&(0..8193));
        assert_eq!(select(start, 8192, 100), Selected::Run(0..1));
        let Selected::Mask(mask) = select(&ranges, 8192, 8192) else {
            panic!("two runs")
        };
        assert_eq!(mask.true_count(), 9);
        assert!(mask.value(0) && mask.value(7) && !mask.value(8) && mask.value(108));
    }
}
