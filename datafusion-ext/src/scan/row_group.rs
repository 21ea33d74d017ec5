//! One row group of a file: where each needed column comes from, and its rows block by block.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BooleanArray, BooleanBufferBuilder, RecordBatch};
use arrow::buffer::BooleanBuffer;
use arrow::compute::filter;
use arrow::datatypes::{DataType, SchemaRef};
use bytes::Bytes;
use datafusion::common::{DataFusionError, Result, exec_datafusion_err};
use datafusion_datasource_parquet::RowGroupAccess;
use futures::StreamExt;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, RowSelection};
use parquet::arrow::async_reader::{ParquetRecordBatchStream, ParquetRecordBatchStreamBuilder};
use stoa_forms::{BLOCK_ROWS, Chunk};
use stoa_reader::{CachedChunk, Miss, TableFile, View};

use super::file_reader::CachedFileReader;
use super::remote::{RemoteArrivals, RemotePart};

/// A row group of which at least one needed column is in memory as a chunk of blocks, here or at a
/// neighbour.
#[derive(Debug)]
pub(crate) struct CachedRowGroup {
    pub(crate) index: usize,
    pub(crate) rows: usize,
    /// By position among the needed columns; `None` is to be decoded from the file.
    columns: Vec<Option<Chunk>>,
    /// The rows to read, ascending; `None` for all.
    selection: Option<Vec<Range<usize>>>,
    pub(crate) bytes: u64,
    /// What is to come from neighbours.
    pub(crate) remote: RemotePart,
    /// What came from them as it is in the file, by ordinal of the first leaf: it is decoded like
    /// what no chunk has, but from memory.
    pub(super) encoded: Vec<(u32, Bytes)>,
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
                    Ok(CachedChunk::Decoded(chunk)) if chunk.rows() == rows => {
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
            encoded: vec![],
        })
    }

    /// Waits for what neighbours send; what came in blocks is among the columns from now on.
    pub(crate) async fn settle(&mut self) -> RemoteArrivals {
        let mut arrivals = std::mem::take(&mut self.remote).landed(self.rows).await;
        for (position, chunk) in arrivals.decoded.drain(..) {
            self.columns[position] = Some(chunk);
        }
        self.encoded = std::mem::take(&mut arrivals.encoded);
        arrivals
    }

    /// Columns read from memory, of this host or, once settled, a neighbour.
    pub(crate) fn hits(&self) -> usize {
        self.columns.iter().flatten().count()
    }

    /// Columns that the scan needs.
    pub(crate) fn columns(&self) -> usize {
        self.columns.len()
    }

    /// Blocks of the row group.
    pub(crate) fn blocks(&self) -> usize {
        self.rows.div_ceil(BLOCK_ROWS)
    }

    /// The chunk of a needed column, by position.
    pub(super) fn chunk(&self, column: usize) -> Option<&Chunk> {
        self.columns.get(column)?.as_ref()
    }

    /// Rows of a block.
    fn block_rows(&self, block: usize) -> usize {
        BLOCK_ROWS.min(self.rows - block * BLOCK_ROWS)
    }

    /// Which rows of a block are to be read.
    pub(super) fn selected(&self, block: usize) -> Keep {
        let rows = self.block_rows(block);
        match &self.selection {
            None => Keep::All,
            Some(ranges) => select(ranges, block * BLOCK_ROWS, rows),
        }
    }

    /// The first block, at or after `block`, of which any row is to be read.
    pub(super) fn next_block(&self, block: usize) -> Option<usize> {
        (block..self.blocks()).find(|block| !matches!(self.selected(*block), Keep::None))
    }
}

/// Decodes the columns of a row group that no chunk has, in step with the blocks of the others.
pub(super) struct Decoder {
    stream: Box<ParquetRecordBatchStream<CachedFileReader>>,
    /// The block that comes next.
    next: usize,
    /// By position among the needed columns, those that are decoded.
    columns: Vec<usize>,
}

impl Decoder {
    /// Starts at block `first`; `None` if every column has a chunk.
    pub(super) fn start(
        group: &CachedRowGroup,
        first: usize,
        file: &TableFile,
        needed: &[usize],
        schema: &SchemaRef,
        reader: impl FnOnce() -> CachedFileReader,
    ) -> Result<Option<Self>> {
        let columns: Vec<usize> = (0..needed.len())
            .filter(|position| group.columns[*position].is_none())
            .collect();
        if columns.is_empty() {
            return Ok(None);
        }
        let options = ArrowReaderOptions::new().with_schema(Arc::clone(schema));
        let metadata = ArrowReaderMetadata::try_new(Arc::clone(file.metadata()), options)?;
        let roots = columns.iter().map(|position| needed[*position]);
        let mask = ProjectionMask::roots(metadata.parquet_schema(), roots);
        let rows = first * BLOCK_ROWS..group.rows;
        let selection = RowSelection::from_consecutive_ranges(std::iter::once(rows), group.rows);
        let stream = ParquetRecordBatchStreamBuilder::new_with_metadata(reader(), metadata)
            .with_row_groups(vec![group.index])
            .with_row_selection(selection)
            .with_projection(mask)
            .with_batch_size(BLOCK_ROWS)
            .build()?;
        Ok(Some(Self {
            stream: Box::new(stream),
            next: first,
            columns,
        }))
    }

    /// The decoded columns of `block`, which is not before the last one asked for.
    pub(super) async fn block(
        &mut self,
        group: &CachedRowGroup,
        block: usize,
    ) -> Result<RecordBatch> {
        loop {
            let rows = group.block_rows(self.next);
            let batch = self.stream.next().await.transpose();
            let batch = batch.map_err(DataFusionError::from)?;
            let found = batch.as_ref().map_or(0, RecordBatch::num_rows);
            let batch = batch.filter(|_| found == rows).ok_or_else(|| {
                exec_datafusion_err!("decoded {found} rows beside a cached block of {rows}")
            })?;
            self.next += 1;
            if self.next > block {
                return Ok(batch);
            }
        }
    }
}

/// A block being read: its columns as far as they were asked for.
pub(super) struct Block<'a> {
    pub(super) group: &'a CachedRowGroup,
    index: usize,
    pub(super) rows: usize,
    /// By position among the needed columns: the whole column.
    arrays: Vec<Option<ArrayRef>>,
}

/// Why a block could not be read.
pub(super) enum Failure {
    /// A chunk's bytes are not what was published: the column at this position is to be decoded
    /// from the file instead.
    Damaged(usize),
    /// Anything else.
    Other(DataFusionError),
}

impl From<DataFusionError> for Failure {
    fn from(error: DataFusionError) -> Self {
        Failure::Other(error)
    }
}

impl From<arrow::error::ArrowError> for Failure {
    fn from(error: arrow::error::ArrowError) -> Self {
        Failure::Other(error.into())
    }
}

impl<'a> Block<'a> {
    /// `decoded` are the columns that `decoder` yielded for this block.
    pub(super) fn new(
        group: &'a CachedRowGroup,
        index: usize,
        decoded: Option<(&Decoder, &RecordBatch)>,
    ) -> Self {
        let mut arrays = vec![None; group.columns.len()];
        if let Some((decoder, batch)) = decoded {
            for (position, array) in decoder.columns.iter().zip(batch.columns()) {
                arrays[*position] = Some(Arc::clone(array));
            }
        }
        Self {
            group,
            index,
            rows: group.block_rows(index),
            arrays,
        }
    }

    /// All rows of a column.
    pub(super) fn whole(&mut self, column: usize) -> Result<ArrayRef, Failure> {
        if let Some(array) = &self.arrays[column] {
            return Ok(Arc::clone(array));
        }
        let chunk = self.group.chunk(column).ok_or_else(|| {
            let group = self.group.index;
            exec_datafusion_err!("row group {group}: column {column} was not decoded")
        })?;
        let array = chunk
            .block(self.index)
            .map_err(|error| self.damaged(column, &error))?;
        self.arrays[column] = Some(Arc::clone(&array));
        Ok(array)
    }

    /// The kept rows of a column, and whether only those had to be unpacked.
    pub(super) fn kept(&mut self, column: usize, keep: &Keep) -> Result<(ArrayRef, bool), Failure> {
        let bits = match keep {
            Keep::All => return Ok((self.whole(column)?, false)),
            Keep::None => return Ok((self.whole(column)?.slice(0, 0), false)),
            Keep::Run(run) => {
                return Ok((self.whole(column)?.slice(run.start, run.len()), false));
            }
            Keep::Mask(bits) => bits,
        };
        if let (None, Some(chunk @ Chunk::Packed(_))) =
            (&self.arrays[column], self.group.chunk(column))
        {
            let array = chunk
                .filtered(self.index, bits)
                .map_err(|error| self.damaged(column, &error))?;
            return Ok((array, true));
        }
        let array = self.whole(column)?;
        let bits = BooleanArray::new(bits.clone(), None);
        Ok((filter(&array, &bits)?, false))
    }

    pub(super) fn damaged(&self, column: usize, error: &stoa_forms::Error) -> Failure {
        tracing::warn!(
            row_group = self.group.index, column, block = self.index, %error,
            "chunk unreadable, decoding the column from the file"
        );
        Failure::Damaged(column)
    }
}

impl CachedRowGroup {
    /// Takes a column's chunk for unreadable: from now on it is decoded from the file.
    pub(super) fn forget(&mut self, column: usize) {
        self.columns[column] = None;
    }
}

/// Nanoseconds to decode a value of a chunk, roughly: measured on TPC-H, as docs/performance.md
/// tells. What lies decoded costs nothing.
pub(super) fn decode_ns(chunk: Option<&Chunk>, data_type: &DataType) -> f64 {
    match chunk {
        Some(Chunk::Packed(_)) => match data_type {
            DataType::Utf8View | DataType::BinaryView => 4.0,
            DataType::Decimal128(_, _) | DataType::Decimal256(_, _) => 1.0,
            _ => 0.5,
        },
        _ => 0.0,
    }
}

/// Which rows of a block to read, or to hand on.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Keep {
    /// No row.
    None,
    /// All rows.
    All,
    /// The rows of one range.
    Run(Range<usize>),
    /// The rows whose bit is set.
    Mask(BooleanBuffer),
}

impl Keep {
    /// How many rows, of a block of `rows`.
    pub(super) fn count(&self, rows: usize) -> usize {
        match self {
            Keep::None => 0,
            Keep::All => rows,
            Keep::Run(run) => run.len(),
            Keep::Mask(bits) => bits.count_set_bits(),
        }
    }

    /// Those of these rows that `matching` has set, of all rows of a block.
    pub(super) fn and(&self, matching: &BooleanBuffer) -> Self {
        let both = match self {
            Keep::None => return Keep::None,
            Keep::All => matching.clone(),
            Keep::Run(run) => &run_mask(run, matching.len()) & matching,
            Keep::Mask(bits) => bits & matching,
        };
        Self::of(both)
    }

    /// Those of these rows that `matching` has set, which has one bit for each of them.
    pub(super) fn and_survivors(&self, matching: &BooleanBuffer, rows: usize) -> Self {
        let bits = match self {
            Keep::None => return Keep::None,
            Keep::All => return Self::of(matching.clone()),
            Keep::Run(run) => &run_mask(run, rows),
            Keep::Mask(bits) => bits,
        };
        let mut both = BooleanBufferBuilder::new(rows);
        both.append_n(rows, false);
        for (survivor, row) in bits.set_indices().enumerate() {
            if matching.value(survivor) {
                both.set_bit(row, true);
            }
        }
        Self::of(both.finish())
    }

    fn of(bits: BooleanBuffer) -> Self {
        match bits.count_set_bits() {
            0 => Keep::None,
            all if all == bits.len() => Keep::All,
            _ => Keep::Mask(bits),
        }
    }
}

fn run_mask(run: &Range<usize>, rows: usize) -> BooleanBuffer {
    let mut bits = BooleanBufferBuilder::new(rows);
    bits.append_n(run.start, false);
    bits.append_n(run.len(), true);
    bits.append_n(rows - run.end, false);
    bits.finish()
}

fn select(ranges: &[Range<usize>], start: usize, rows: usize) -> Keep {
    let first = ranges.partition_point(|range| range.end <= start);
    let mut runs = ranges[first..]
        .iter()
        .take_while(|range| range.start < start + rows)
        .map(|range| range.start.max(start) - start..range.end.min(start + rows) - start)
        .filter(|run| !run.is_empty())
        .peekable();
    let Some(run) = runs.next() else {
        return Keep::None;
    };
    if runs.peek().is_none() {
        return if run.len() == rows {
            Keep::All
        } else {
            Keep::Run(run)
        };
    }
    let mut mask = BooleanBufferBuilder::new(rows);
    for run in std::iter::once(run).chain(runs) {
        mask.append_n(run.start - mask.len(), false);
        mask.append_n(run.len(), true);
    }
    mask.append_n(rows - mask.len(), false);
    Keep::Mask(mask.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selections_cut_to_the_block() {
        let ranges = [10..20, 8190..8200, 8300..8301, 30_000..30_001];
        assert_eq!(select(&ranges, 16_384, 8192), Keep::None);
        let whole = std::slice::from_ref(&(0..16_384));
        assert_eq!(select(whole, 8192, 8192), Keep::All);
        let start = std::slice::from_ref(&(0..8193));
        assert_eq!(select(start, 8192, 100), Keep::Run(0..1));
        let Keep::Mask(mask) = select(&ranges, 8192, 8192) else {
            panic!("two runs")
        };
        assert_eq!(mask.count_set_bits(), 9);
        assert!(mask.value(0) && mask.value(7) && !mask.value(8) && mask.value(108));
    }

    #[test]
    fn filters_narrow_what_is_kept() {
        let bits = |text: &str| -> BooleanBuffer { text.chars().map(|c| c == '1').collect() };
        let matching = bits("0110110");
        assert_eq!(Keep::All.and(&matching), Keep::Mask(matching.clone()));
        assert_eq!(Keep::Run(2..5).and(&matching), Keep::Mask(bits("0010100")));
        assert_eq!(Keep::All.and(&bits("1111111")), Keep::All);
        assert_eq!(Keep::Mask(bits("1000001")).and(&matching), Keep::None);
        let survivors = Keep::Mask(matching).and_survivors(&bits("1001"), 7);
        assert_eq!(survivors, Keep::Mask(bits("0100010")));
        assert_eq!(
            Keep::Run(2..4).and_survivors(&bits("01"), 7),
            Keep::Mask(bits("0001000"))
        );
        assert_eq!(survivors.count(7), 2);
    }
}
