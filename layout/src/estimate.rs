//! How many bytes a chunk takes in each form, from its file's footer alone.

use arrow::datatypes::DataType;
use parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};

use crate::catalog::{RootColumn, TableCatalog};
use crate::schema::allows_arrow;

/// Rows of an independent block of the arrow form.
const BLOCK_ROWS: u64 = 8192;
/// Values up to this length lie within their view.
const INLINE_BYTES: u64 = 12;
const VIEW_BYTES: u64 = 16;
/// What a block adds for each of its buffers: padding, on average, and directory entries.
const BUFFER_OVERHEAD_BYTES: u64 = 48;
/// Header of a chunk.
const CHUNK_OVERHEAD_BYTES: u64 = 64;

/// The largest estimate, so that adding many up does not overflow, whatever a footer says.
const CHUNK_BYTES_MAX: u64 = 1 << 44;

/// What a column of a table takes in each form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnSize {
    /// Name of the root column.
    pub column: String,
    /// Bytes of its chunks in the files.
    pub parquet_bytes: u64,
    /// Estimated bytes of its chunks in the arrow form; of chunks that have none, their bytes in
    /// the files.
    pub arrow_bytes: u64,
}

/// What the columns of a table take in each form, in schema order.
pub fn sizes(catalog: &TableCatalog) -> Vec<ColumnSize> {
    let fields = catalog.schema.fields().iter();
    let mut sizes: Vec<ColumnSize> = fields
        .map(|field| ColumnSize {
            column: field.name().clone(),
            parquet_bytes: 0,
            arrow_bytes: 0,
        })
        .collect();
    for file in &catalog.files {
        for root in file.roots.iter() {
            let Ok(index) = catalog.schema.index_of(root.name()) else {
                continue;
            };
            for group in file.metadata.row_groups() {
                let parquet = parquet_bytes(root, group);
                sizes[index].parquet_bytes += parquet;
                sizes[index].arrow_bytes += match allows_arrow(root) {
                    true => arrow_bytes(root, group),
                    false => parquet,
                };
            }
        }
    }
    sizes
}

/// Bytes of a root column's chunks in the file.
pub(crate) fn parquet_bytes(root: &RootColumn, group: &RowGroupMetaData) -> u64 {
    let chunks = group.columns()[root.leaf_range()].iter();
    chunks.map(|chunk| chunk.compressed_size() as u64).sum()
}

/// Estimated bytes of a root column in the arrow form.
pub(crate) fn arrow_bytes(root: &RootColumn, group: &RowGroupMetaData) -> u64 {
    let rows = group.num_rows() as u64;
    let mut sum = Sum {
        chunks: &group.columns()[root.leaf_range()],
        bytes: 0,
        buffers: 0,
    };
    sum.add(root.field.data_type(), rows, true);
    let blocks = rows.div_ceil(BLOCK_ROWS);
    let overhead = CHUNK_OVERHEAD_BYTES + blocks * sum.buffers * BUFFER_OVERHEAD_BYTES;
    sum.bytes.saturating_add(overhead).min(CHUNK_BYTES_MAX)
}

/// Adds up the buffers of a type, taking the leaves' chunks as it comes to them.
struct Sum<'a> {
    chunks: &'a [ColumnChunkMetaData],
    bytes: u64,
    buffers: u64,
}

impl<'a> Sum<'a> {
    fn leaf(&mut self) -> Option<&'a ColumnChunkMetaData> {
        let (first, rest) = self.chunks.split_first()?;
        self.chunks = rest;
        Some(first)
    }

    fn buffer(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.buffers += 1;
    }

    fn add(&mut self, data_type: &DataType, values: u64, top: bool) {
        use DataType::*;
        let next = self.chunks.first();
        if has_nulls(next) {
            self.buffer(values.div_ceil(8));
        }
        match data_type {
            Null => drop(self.leaf()),
            Boolean => {
                self.leaf();
                self.buffer(values.div_ceil(8));
            }
            Utf8 | LargeUtf8 | Utf8View | Binary | LargeBinary | BinaryView => {
                let (data, real) = self
                    .leaf()
                    .map_or((0, 0), |leaf| (data_bytes(leaf), present(leaf)));
                let view = top || matches!(data_type, Utf8View | BinaryView);
                let offset = if matches!(data_type, LargeUtf8 | LargeBinary) {
                    8
                } else {
                    4
                };
                if view {
                    self.buffer(values.saturating_mul(VIEW_BYTES));
                    self.buffer(if data > real.saturating_mul(INLINE_BYTES) {
                        data
                    } else {
                        0
                    });
                } else {
                    self.buffer((values + 1).saturating_mul(offset));
                    self.buffer(data);
                }
            }
            FixedSizeBinary(width) => {
                self.leaf();
                self.buffer(values.saturating_mul(u64::try_from(*width).unwrap_or(0)));
            }
            List(field)
            | LargeList(field)
            | Map(field, _)
            | ListView(field)
            | LargeListView(field) => {
                self.buffer((values + 1).saturating_mul(4));
                self.add(field.data_type(), elements(next), false);
            }
            FixedSizeList(field, _) => self.add(field.data_type(), elements(next), false),
            Struct(fields) => {
                for field in fields {
                    self.add(field.data_type(), values, false);
                }
            }
            other => {
                let data = self.leaf().map_or(0, data_bytes);
                let width = other.primitive_width().map(|width| width as u64);
                self.buffer(width.map_or(data, |width| values.saturating_mul(width)));
            }
        }
    }
}

/// Whether some value of the leaf is null, as far as the footer knows.
fn has_nulls(leaf: Option<&ColumnChunkMetaData>) -> bool {
    leaf.is_some_and(|leaf| {
        let nulls = leaf
            .statistics()
            .and_then(|statistics| statistics.null_count_opt());
        leaf.column_descr().max_def_level() > 0 && nulls != Some(0)
    })
}

/// Values of the leaf that are not null.
fn present(leaf: &ColumnChunkMetaData) -> u64 {
    let nulls = leaf
        .statistics()
        .and_then(|statistics| statistics.null_count_opt());
    (leaf.num_values() as u64).saturating_sub(nulls.unwrap_or(0))
}

/// Values of the first leaf of a list, at most the list's elements.
fn elements(leaf: Option<&ColumnChunkMetaData>) -> u64 {
    leaf.map_or(0, |leaf| leaf.num_values() as u64)
}

/// Bytes of the leaf's strings: what the writer counted, else what its pages hold, which is less
/// where they hold a dictionary.
fn data_bytes(leaf: &ColumnChunkMetaData) -> u64 {
    let counted = leaf.unencoded_byte_array_data_bytes();
    counted
        .and_then(|bytes| u64::try_from(bytes).ok())
        .unwrap_or(leaf.uncompressed_size() as u64)
}
