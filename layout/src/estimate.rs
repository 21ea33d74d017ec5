//! How many bytes a chunk takes in each form, from its file's footer alone.

use arrow::datatypes::DataType;
use parquet::basic::Compression;
use parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};
use parquet::file::statistics::Statistics;

use crate::catalog::{RootColumn, TableCatalog};
use crate::form::{ChunkRef, Form};
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
    /// Estimated bytes of its chunks in the packed form; of chunks that have none, their bytes in
    /// the files.
    pub packed_bytes: u64,
}

/// What some chunks take in each form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FormBytes {
    /// In the arrow form.
    pub arrow: u64,
    /// In the packed form.
    pub packed: u64,
    /// In the file.
    pub parquet: u64,
}

impl FormBytes {
    /// The bytes in one form.
    pub fn of(&self, form: Form) -> u64 {
        match form {
            Form::Arrow => self.arrow,
            Form::Packed => self.packed,
            Form::Parquet => self.parquet,
        }
    }

    /// The bytes of both.
    pub fn plus(&self, other: FormBytes) -> FormBytes {
        FormBytes {
            arrow: self.arrow.saturating_add(other.arrow),
            packed: self.packed.saturating_add(other.packed),
            parquet: self.parquet.saturating_add(other.parquet),
        }
    }
}

/// What kind of values a column has, as far as reading them costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// Booleans.
    Bits,
    /// Integers and what is one inside, of that many bytes in the arrow form.
    Integers {
        /// Bytes of a value.
        bytes: u8,
    },
    /// Floats.
    Floats,
    /// Strings and binaries that repeat.
    RepeatedText,
    /// Other strings and binaries.
    Text,
    /// Everything else.
    Other,
}

impl Values {
    /// The kind of a type's values; text is taken to repeat.
    pub fn of(data_type: &DataType) -> Values {
        use DataType::*;
        match data_type {
            Boolean => Values::Bits,
            Float32 | Float64 => Values::Floats,
            Utf8 | LargeUtf8 | Utf8View | Binary | LargeBinary | BinaryView => Values::RepeatedText,
            Float16 | Interval(_) => Values::Other,
            other => match other.primitive_width() {
                Some(bytes) => Values::Integers { bytes: bytes as u8 },
                None => Values::Other,
            },
        }
    }
}

/// What the columns of a table take in each form, in schema order.
pub fn sizes(catalog: &TableCatalog) -> Vec<ColumnSize> {
    let fields = catalog.schema.fields().iter();
    let mut sizes: Vec<ColumnSize> = fields
        .map(|field| ColumnSize {
            column: field.name().clone(),
            parquet_bytes: 0,
            arrow_bytes: 0,
            packed_bytes: 0,
        })
        .collect();
    let places = catalog.places_by_name();
    for file in &catalog.files {
        for root in file.roots.iter().filter(|root| !root.shadowed) {
            let Some(&index) = places.get(root.name()) else {
                continue;
            };
            for group in file.metadata.row_groups() {
                let (bytes, _) = column_bytes(root, group);
                sizes[index].parquet_bytes += bytes.parquet;
                sizes[index].arrow_bytes += bytes.arrow;
                sizes[index].packed_bytes += bytes.packed;
            }
        }
    }
    sizes
}

/// What one chunk takes in each form: what [`crate::wanted_within`] says of it in the form that is
/// chosen there. `None` for what the catalog's files do not have.
pub fn chunk_bytes(catalog: &TableCatalog, chunk: ChunkRef) -> Option<FormBytes> {
    let file = catalog.files.get(chunk.file as usize)?;
    let group = file.metadata.row_groups().get(chunk.row_group as usize)?;
    Some(column_bytes(file.root(chunk.column)?, group).0)
}

/// Bytes of a root column's chunks in the file.
pub(crate) fn parquet_bytes(root: &RootColumn, group: &RowGroupMetaData) -> u64 {
    let chunks = group.columns()[root.leaf_range()].iter();
    chunks.map(|chunk| chunk.compressed_size() as u64).sum()
}

/// Estimated bytes of a root column in each form, and what kind of values it has.
pub(crate) fn column_bytes(root: &RootColumn, group: &RowGroupMetaData) -> (FormBytes, Values) {
    let parquet = parquet_bytes(root, group);
    if !allows_arrow(root) {
        let bytes = FormBytes {
            arrow: parquet,
            packed: parquet,
            parquet,
        };
        return (bytes, Values::Other);
    }
    let arrow = arrow_bytes(root, group);
    let (packed, values) = packed_bytes(root, group, arrow);
    let bytes = FormBytes {
        arrow,
        packed,
        parquet,
    };
    (bytes, values)
}

/// Text whose pages take fewer bytes a value is a dictionary's codes, and repeats.
const REPEATED_BYTES_MAX: u64 = 3;
/// What FSST leaves of text, in percent, and the bits of a packed length.
const COMPRESSED_PERCENT: u64 = 45;
/// What it leaves at most of text that repeats in places, over what the file's codec leaves of it:
/// of a quick codec, and of a thorough one.
const QUICK_CODEC_PERCENT: u64 = 130;
const THOROUGH_CODEC_PERCENT: u64 = 180;
const LENGTH_BITS: u64 = 6;
/// Header, statistics and bounds of a chunk; what a block adds.
const PACKED_OVERHEAD_BYTES: u64 = 1800;
const PACKED_BLOCK_BYTES: u64 = 160;

/// Estimated bytes of a root column in the packed form.
fn packed_bytes(root: &RootColumn, group: &RowGroupMetaData, arrow: u64) -> (u64, Values) {
    let rows = group.num_rows() as u64;
    let values = Values::of(root.field.data_type());
    let [leaf] = &group.columns()[root.leaf_range()] else {
        return (arrow, Values::Other);
    };
    // Its pages hold codes or plain values: both are packed about as tightly as here.
    let pages = leaf.uncompressed_size() as u64;
    let (bytes, values) = match values {
        Values::Bits => (rows.div_ceil(8), values),
        Values::Integers { bytes } => {
            let bits = range_bits(leaf).unwrap_or(u64::from(bytes) * 8);
            (pages.min(rows.saturating_mul(bits) / 8), values)
        }
        Values::Floats => (pages, values),
        Values::RepeatedText | Values::Text => {
            if pages <= rows.saturating_mul(REPEATED_BYTES_MAX) {
                (pages, Values::RepeatedText)
            } else {
                let lengths = rows.saturating_mul(LENGTH_BITS) / 8;
                (text_bytes(leaf).saturating_add(lengths), Values::Text)
            }
        }
        Values::Other => return (arrow, values),
    };
    let nulls = match has_nulls(Some(leaf)) {
        true => rows.div_ceil(8),
        false => 0,
    };
    let blocks = rows.div_ceil(BLOCK_ROWS);
    let overhead = PACKED_OVERHEAD_BYTES + blocks * PACKED_BLOCK_BYTES;
    let bytes = bytes.saturating_add(nulls).saturating_add(overhead);
    (bytes.min(CHUNK_BYTES_MAX), values)
}

/// Estimated bytes of text that does not repeat as a whole, packed.
fn text_bytes(leaf: &ColumnChunkMetaData) -> u64 {
    let compressed = data_bytes(leaf).saturating_mul(COMPRESSED_PERCENT) / 100;
    let percent = match leaf.compression() {
        Compression::UNCOMPRESSED => return compressed,
        Compression::GZIP(_) | Compression::BROTLI(_) | Compression::ZSTD(_) => {
            THOROUGH_CODEC_PERCENT
        }
        _ => QUICK_CODEC_PERCENT,
    };
    let in_file = leaf.compressed_size() as u64;
    compressed.min(in_file.saturating_mul(percent) / 100)
}

/// Bits that tell the values between the footer's bounds apart.
fn range_bits(leaf: &ColumnChunkMetaData) -> Option<u64> {
    let span = match leaf.statistics()? {
        Statistics::Int32(bounds) => {
            i128::from(*bounds.max_opt()?) - i128::from(*bounds.min_opt()?)
        }
        Statistics::Int64(bounds) => {
            i128::from(*bounds.max_opt()?) - i128::from(*bounds.min_opt()?)
        }
        _ => return None,
    };
    let span = u64::try_from(span).ok()?;
    Some(u64::from(u64::BITS - span.leading_zeros()))
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
