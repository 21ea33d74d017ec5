//! The arrow form: decoded values that are read in place.
//!
//! ```text
//! offset  size  field
//!      0     8  magic "STOAARW1"
//!      8     2  version, 2
//!     10     2  reserved, zero
//!     12     4  rows of a block, 8192
//!     16     8  rows
//!     24     4  blocks = ceil(rows / rows of a block)
//!     28     4  nodes of a block
//!     32     4  buffers of a block
//!     36     4  reserved, zero
//!     40     8  length of the chunk in bytes
//!     48     8  offset of the statistics, 0: none
//!     56     8  length of the statistics
//!     64        directory: for each block its nodes {length u64, nulls u64},
//!               then its buffers {offset u64, length u64}
//!      …        buffers, each at a multiple of 64 from the start of the chunk
//!      …        statistics: zones, bounds and a sketch, see docs/format.md
//! ```
//!
//! Everything is little-endian. Nodes and buffers are in the depth-first order of Arrow's IPC
//! format: a node's validity bitmap first (length 0: no nulls), then the buffers of its type, then
//! its children. The type itself is not in the chunk: it follows from the file's schema.
//!
//! Blocks are independent of each other: offsets and views of a block refer to buffers of the same
//! block. So a block is a batch without any copy, its memory is accounted exactly, and a scan can
//! split a chunk between partitions at any block.
//!
//! View arrays have exactly one data buffer a block.

use std::sync::{Arc, OnceLock};

use arrow::array::{
    Array, ArrayData, ArrayRef, AsArray, BooleanBufferBuilder, GenericByteViewArray,
    MutableArrayData, UInt32Array, layout, make_array,
};
use arrow::buffer::{BooleanBuffer, Buffer, MutableBuffer, NullBuffer};
use arrow::datatypes::{ByteViewType, DataType};
use bytes::Bytes;

use crate::bytes::{ALIGN, check_aligned, read_u32, read_u64, shared};
use crate::error::corrupt;
use crate::statistics::{self, ChunkStatistics, Collector, Known, Zones};
use crate::{BLOCK_ROWS, Error, Result};

/// The first eight bytes of a chunk.
pub const MAGIC: [u8; 8] = *b"STOAARW1";
/// The version this build writes and reads.
pub const VERSION: u16 = 2;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;
const PAIR_BYTES: usize = 16;

/// Whether values of this type have an arrow form.
///
/// Dictionaries, run-end encoded and list-view arrays have none: they stay in the parquet form.
pub fn supports(data_type: &DataType) -> bool {
    use DataType::*;
    match data_type {
        Null
        | Boolean
        | Int8
        | Int16
        | Int32
        | Int64
        | UInt8
        | UInt16
        | UInt32
        | UInt64
        | Float16
        | Float32
        | Float64
        | Timestamp(_, _)
        | Date32
        | Date64
        | Time32(_)
        | Time64(_)
        | Duration(_)
        | Interval(_)
        | Binary
        | FixedSizeBinary(_)
        | LargeBinary
        | BinaryView
        | Utf8
        | LargeUtf8
        | Utf8View
        | Decimal32(_, _)
        | Decimal64(_, _)
        | Decimal128(_, _)
        | Decimal256(_, _) => true,
        List(field) | LargeList(field) | FixedSizeList(field, _) => supports_child(field),
        Map(field, _) => supports_child(field),
        Struct(fields) => fields.iter().all(|f| supports_child(f)),
        Dictionary(_, _) | RunEndEncoded(_, _) | ListView(_) | LargeListView(_) | Union(_, _) => {
            false
        }
    }
}

/// Views inside nested values would keep the data buffers of the whole page alive.
fn supports_child(field: &arrow::datatypes::Field) -> bool {
    !matches!(field.data_type(), DataType::Utf8View | DataType::BinaryView)
        && supports(field.data_type())
}

/// How many nodes and buffers a value of this type takes in the directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Shape {
    nodes: u32,
    buffers: u32,
}

fn shape(data_type: &DataType) -> Shape {
    let mut shape = Shape {
        nodes: 1,
        buffers: own_buffers(data_type),
    };
    for child in children(data_type) {
        let child = self::shape(child);
        shape.nodes += child.nodes;
        shape.buffers += child.buffers;
    }
    shape
}

/// Validity, the fixed buffers of the type, and one data buffer for views.
fn own_buffers(data_type: &DataType) -> u32 {
    let spec = layout(data_type);
    u32::from(spec.can_contain_null_mask) + spec.buffers.len() as u32 + u32::from(spec.variadic)
}

fn children(data_type: &DataType) -> Vec<&DataType> {
    match data_type {
        DataType::List(f)
        | DataType::LargeList(f)
        | DataType::FixedSizeList(f, _)
        | DataType::Map(f, _) => vec![f.data_type()],
        DataType::Struct(fields) => fields.iter().map(|f| f.data_type()).collect(),
        _ => vec![],
    }
}

/// The bytes a buffer of this type must have at least, by its position among the type's buffers.
///
/// Offsets buffers hold one more than the length; variadic data has no minimum.
fn least_bytes(data_type: &DataType, index: usize, len: usize) -> Option<usize> {
    use DataType::*;
    match (data_type, index) {
        (Boolean, 0) => Some(len.div_ceil(8)),
        (Utf8 | Binary | List(_) | Map(_, _), 0) => len.checked_add(1)?.checked_mul(4),
        (LargeUtf8 | LargeBinary | LargeList(_), 0) => len.checked_add(1)?.checked_mul(8),
        (Utf8View | BinaryView, 0) => len.checked_mul(16),
        (FixedSizeBinary(width), 0) => len.checked_mul(usize::try_from(*width).ok()?),
        (fixed, 0) => len.checked_mul(fixed.primitive_width().unwrap_or(0)),
        _ => Some(0),
    }
}

/// Lays out one chunk in the arrow form, from arrays of any lengths.
#[derive(Debug)]
pub struct ArrowChunkWriter {
    data_type: DataType,
    blocks: Vec<Block>,
    pending: Vec<ArrayRef>,
    pending_rows: usize,
    rows: u64,
    collector: Option<Collector>,
}

/// One block before it is written: lengths and null counts, and where the bytes are.
#[derive(Debug, Default)]
struct Block {
    nodes: Vec<(u64, u64)>,
    buffers: Vec<Buffer>,
}

impl ArrowChunkWriter {
    /// Starts a chunk of values of `data_type`.
    ///
    /// # Errors
    /// [`Error::UnsupportedType`] where [`supports`] is false.
    pub fn new(data_type: DataType) -> Result<Self> {
        let collector = Collector::new(&data_type);
        Ok(Self {
            collector: Some(collector),
            ..Self::bare(data_type)?
        })
    }

    /// As [`ArrowChunkWriter::new`], for a chunk without statistics.
    pub(crate) fn bare(data_type: DataType) -> Result<Self> {
        if !supports(&data_type) {
            return Err(Error::UnsupportedType(data_type));
        }
        Ok(Self {
            collector: None,
            data_type,
            blocks: vec![],
            pending: vec![],
            pending_rows: 0,
            rows: 0,
        })
    }

    /// Appends values.
    ///
    /// # Errors
    /// [`Error::TypeMismatch`] for an array of another type, [`Error::BlockTooLarge`] where a
    /// block's strings do not fit one buffer.
    pub fn push(&mut self, array: &ArrayRef) -> Result<()> {
        if array.data_type() != &self.data_type {
            return Err(Error::TypeMismatch {
                found: array.data_type().clone(),
                expected: self.data_type.clone(),
            });
        }
        self.rows += array.len() as u64;
        let mut at = 0;
        while at < array.len() {
            let take = (BLOCK_ROWS - self.pending_rows).min(array.len() - at);
            self.pending.push(array.slice(at, take));
            self.pending_rows += take;
            at += take;
            if self.pending_rows == BLOCK_ROWS {
                self.cut()?;
            }
        }
        Ok(())
    }

    fn cut(&mut self) -> Result<()> {
        let parts = std::mem::take(&mut self.pending);
        let rows = std::mem::take(&mut self.pending_rows);
        let whole = compact(&parts, rows)?;
        let mut block = Block::default();
        flatten(&whole, &mut block)?;
        if let Some(collector) = &mut self.collector {
            collector.block(&make_array(whole));
        }
        self.blocks.push(block);
        Ok(())
    }

    /// The chunk's bytes, aligned as readers want them.
    ///
    /// # Errors
    /// As [`ArrowChunkWriter::push`], for the last block.
    pub fn finish(mut self) -> Result<Buffer> {
        if self.pending_rows > 0 {
            self.cut()?;
        }
        let shape = shape(&self.data_type);
        let block_bytes = (shape.nodes + shape.buffers) as usize * PAIR_BYTES;
        let directory_end = HEADER_BYTES + self.blocks.len() * block_bytes;
        let mut end = directory_end;
        for buffer in self.blocks.iter().flat_map(|b| &b.buffers) {
            if !buffer.is_empty() {
                end = end.next_multiple_of(ALIGN) + buffer.len();
            }
        }
        let values_end = end.next_multiple_of(ALIGN);
        let known = match self.collector.take() {
            Some(collector) => collector.finish()?,
            None => vec![],
        };
        let known_offset = if known.is_empty() { 0 } else { values_end };
        let total = values_end + known.len().next_multiple_of(ALIGN);
        let mut out = MutableBuffer::with_capacity(total);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0u8; 2]);
        out.extend_from_slice(&(BLOCK_ROWS as u32).to_le_bytes());
        out.extend_from_slice(&self.rows.to_le_bytes());
        out.extend_from_slice(&(self.blocks.len() as u32).to_le_bytes());
        out.extend_from_slice(&shape.nodes.to_le_bytes());
        out.extend_from_slice(&shape.buffers.to_le_bytes());
        out.extend_from_slice(&[0u8; 4]);
        out.extend_from_slice(&(total as u64).to_le_bytes());
        out.extend_from_slice(&(known_offset as u64).to_le_bytes());
        out.extend_from_slice(&(known.len() as u64).to_le_bytes());
        let mut at = directory_end;
        for block in &self.blocks {
            for (length, nulls) in &block.nodes {
                out.extend_from_slice(&length.to_le_bytes());
                out.extend_from_slice(&nulls.to_le_bytes());
            }
            for buffer in &block.buffers {
                let offset = if buffer.is_empty() {
                    0
                } else {
                    at.next_multiple_of(ALIGN)
                };
                out.extend_from_slice(&(offset as u64).to_le_bytes());
                out.extend_from_slice(&(buffer.len() as u64).to_le_bytes());
                if !buffer.is_empty() {
                    at = offset + buffer.len();
                }
            }
        }
        for buffer in self
            .blocks
            .iter()
            .flat_map(|b| &b.buffers)
            .filter(|b| !b.is_empty())
        {
            out.resize(out.len().next_multiple_of(ALIGN), 0);
            out.extend_from_slice(buffer);
        }
        out.resize(values_end, 0);
        out.extend_from_slice(&known);
        out.resize(total, 0);
        Ok(out.into())
    }
}

/// Encodes arrays of one type as one chunk: see [`ArrowChunkWriter`].
pub fn encode_arrow(arrays: &[ArrayRef], data_type: &DataType) -> Result<Vec<u8>> {
    let mut writer = ArrowChunkWriter::new(data_type.clone())?;
    for array in arrays {
        writer.push(array)?;
    }
    Ok(writer.finish()?.to_vec())
}

/// One array without offset, whose buffers hold its own values only.
fn compact(parts: &[ArrayRef], rows: usize) -> Result<ArrayData> {
    let gathered: ArrayRef = match parts {
        [one] => Arc::clone(one),
        many => arrow::compute::concat(&many.iter().map(|a| a.as_ref()).collect::<Vec<_>>())?,
    };
    let data = match gathered.data_type() {
        DataType::Utf8View => compact_views(gathered.as_string_view())?,
        DataType::BinaryView => compact_views(gathered.as_binary_view())?,
        // Such an array's buffer begins with its first value.
        data_type if data_type.is_primitive() => gathered.to_data(),
        _ => {
            let data = gathered.to_data();
            let mut own = MutableArrayData::new(vec![&data], false, rows);
            own.try_extend(0, 0, rows)?;
            own.freeze()
        }
    };
    Ok(data)
}

/// As [`compact`], of views: the values that they name are copied into one buffer.
fn compact_views<T: ByteViewType>(array: &GenericByteViewArray<T>) -> Result<ArrayData> {
    let rows = array.len();
    // The Parquet reader leaves views of other rows under nulls, and the value of every view is
    // copied. `take` gives an empty view for a null whose row does not exist.
    let emptied = match array.nulls().filter(|nulls| nulls.null_count() > 0) {
        Some(nulls) => {
            let places = nulls.iter().zip(0..);
            let places = places.map(|(valid, row)| if valid { row } else { u32::MAX });
            let places = UInt32Array::new(places.collect(), Some(nulls.clone()));
            Some(arrow::compute::take(array, &places, None)?)
        }
        None => None,
    };
    let array = emptied.as_ref().map_or(array, |it| it.as_byte_view());
    // Before they are copied: values that lie in memory once may be named by every row.
    if array.total_buffer_bytes_used() > i32::MAX as usize {
        return Err(Error::BlockTooLarge { rows });
    }
    Ok(array.gc().into_data())
}

/// Appends nodes and buffers of `data`, depth first, to `block`.
fn flatten(data: &ArrayData, block: &mut Block) -> Result<()> {
    debug_assert_eq!(data.offset(), 0, "compact() leaves no offset at the top");
    let spec = layout(data.data_type());
    block
        .nodes
        .push((data.len() as u64, data.null_count() as u64));
    if spec.can_contain_null_mask {
        block
            .buffers
            .push(match data.nulls().filter(|n| n.null_count() > 0) {
                Some(nulls) => packed_bits(nulls.inner()),
                None => Buffer::from_vec(Vec::<u8>::new()),
            });
    }
    let fixed = spec.buffers.len();
    for (index, buffer) in data.buffers().iter().take(fixed).enumerate() {
        let exact = exact_bytes(data, index).unwrap_or(buffer.len());
        if exact > buffer.len() {
            return Err(corrupt(
                "buffer length",
                buffer.len(),
                format!("at least {exact}"),
            ));
        }
        block.buffers.push(buffer.slice_with_length(0, exact));
    }
    if spec.variadic {
        let empty = || Buffer::from_vec(Vec::<u8>::new());
        block
            .buffers
            .push(data.buffers().get(fixed).cloned().unwrap_or_else(empty));
    }
    for child in data.child_data() {
        if child.offset() == 0 {
            flatten(child, block)?;
        } else {
            let mut own = MutableArrayData::new(vec![child], false, child.len());
            own.try_extend(0, 0, child.len())?;
            flatten(&own.freeze(), block)?;
        }
    }
    Ok(())
}

/// The bytes of a fixed buffer that belong to the array's values.
fn exact_bytes(data: &ArrayData, index: usize) -> Option<usize> {
    match (data.data_type(), index) {
        // The values of strings: as far as the last offset reaches.
        (DataType::Utf8 | DataType::Binary, 1) => data.buffers()[0]
            .typed_data::<i32>()
            .get(data.len())
            .map(|o| *o as usize),
        (DataType::LargeUtf8 | DataType::LargeBinary, 1) => data.buffers()[0]
            .typed_data::<i64>()
            .get(data.len())
            .map(|o| *o as usize),
        (data_type, 0) => least_bytes(data_type, 0, data.len()),
        _ => None,
    }
}

fn packed_bits(bits: &BooleanBuffer) -> Buffer {
    let mut own = BooleanBufferBuilder::new(bits.len());
    own.append_buffer(bits);
    let bytes = bits.len().div_ceil(8);
    own.finish().into_inner().slice_with_length(0, bytes)
}

/// A chunk in the arrow form, opened for reading in place.
///
/// Cheap to clone; arrays made from it keep the chunk's memory alive.
#[derive(Clone, Debug)]
pub struct ArrowChunk {
    bytes: Bytes,
    data_type: DataType,
    rows: usize,
    blocks: usize,
    shape: Shape,
    /// The section of statistics; empty if there is none.
    known_bytes: Bytes,
    known: Arc<OnceLock<Known>>,
}

impl ArrowChunk {
    /// Opens `bytes` as a chunk of values of `data_type`, after checking every length and range.
    ///
    /// The values themselves are not checked: whoever published them did, see [`validate`].
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Version`], [`Error::Misaligned`],
    /// [`Error::UnsupportedType`]. For a reader, each is a miss.
    pub fn open(bytes: Bytes, data_type: &DataType) -> Result<Self> {
        if !supports(data_type) {
            return Err(Error::UnsupportedType(data_type.clone()));
        }
        if bytes.len() < HEADER_BYTES {
            return Err(corrupt(
                "length",
                bytes.len(),
                format!("at least {HEADER_BYTES}"),
            ));
        }
        check_aligned(&bytes)?;
        if bytes[..8] != MAGIC {
            return Err(corrupt(
                "magic",
                bytes[..8].escape_ascii(),
                MAGIC.escape_ascii(),
            ));
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != VERSION {
            return Err(Error::Version {
                found: version,
                supported: VERSION,
            });
        }
        let shape = shape(data_type);
        let block_rows = read_u32(&bytes, 12) as usize;
        if block_rows != BLOCK_ROWS {
            return Err(corrupt("rows of a block", block_rows, BLOCK_ROWS));
        }
        let total = read_u64(&bytes, 40);
        if total != bytes.len() as u64 {
            return Err(corrupt("length of the chunk", total, bytes.len()));
        }
        // A row takes no byte in a column of nulls, so rows are bounded by the blocks, and blocks
        // by the directory, which has to fit.
        let blocks = read_u32(&bytes, 24) as usize;
        let rows = read_u64(&bytes, 16);
        if rows.div_ceil(BLOCK_ROWS as u64) != blocks as u64 {
            return Err(corrupt("blocks", blocks, rows.div_ceil(BLOCK_ROWS as u64)));
        }
        let found = Shape {
            nodes: read_u32(&bytes, 28),
            buffers: read_u32(&bytes, 32),
        };
        if found != shape {
            return Err(corrupt("shape", format!("{found:?}"), format!("{shape:?}")));
        }
        let known_offset = read_u64(&bytes, 48) as usize;
        let known_bytes = read_u64(&bytes, 56) as usize;
        if !known_offset.is_multiple_of(ALIGN) {
            return Err(corrupt(
                "statistics offset",
                known_offset,
                format!("a multiple of {ALIGN}"),
            ));
        }
        let chunk = Self {
            data_type: data_type.clone(),
            rows: rows as usize,
            blocks,
            shape,
            known_bytes: shared(&bytes, "statistics", known_offset, known_bytes)?,
            known: Arc::default(),
            bytes,
        };
        let directory_end = HEADER_BYTES as u64 + blocks as u64 * chunk.block_bytes() as u64;
        if directory_end > total {
            return Err(corrupt(
                "directory end",
                directory_end,
                format!("at most {total}"),
            ));
        }
        for block in 0..blocks {
            let mut cursor = chunk.cursor(block);
            let rows = chunk.block_rows(block) as u64;
            cursor.check(data_type, Some(rows))?;
        }
        Ok(chunk)
    }

    /// Rows of the chunk.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of the chunk.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Blocks of the chunk.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Rows of block `block`.
    pub fn block_rows(&self, block: usize) -> usize {
        BLOCK_ROWS.min(self.rows - block * BLOCK_ROWS)
    }

    /// The values of one block, in place: its buffers lie inside the chunk's bytes.
    ///
    /// # Panics
    /// If `block` is not less than [`ArrowChunk::blocks`].
    pub fn block(&self, block: usize) -> ArrayRef {
        assert!(block < self.blocks, "block {block} of {}", self.blocks);
        make_array(self.cursor(block).build(&self.data_type))
    }

    /// As [`ArrowChunk::block`], after a check of offsets, views and text.
    pub(crate) fn checked_block(&self, block: usize) -> Result<ArrayRef> {
        let data = self.cursor(block).build(&self.data_type);
        data.validate_full()?;
        Ok(make_array(data))
    }

    /// The type of the values.
    pub fn data_type(&self) -> &DataType {
        &self.data_type
    }

    /// What is known of the whole chunk.
    pub fn statistics(&self) -> &ChunkStatistics {
        &self.known().statistics
    }

    /// What is known of each block; `None` if nothing is.
    pub fn zones(&self) -> Option<&Zones> {
        (!self.known_bytes.is_empty()).then(|| &self.known().zones)
    }

    /// Statistics are hints: what cannot be read is not known.
    fn known(&self) -> &Known {
        self.known.get_or_init(|| {
            self.open_known().unwrap_or_else(|_| {
                let rows: Vec<usize> = (0..self.blocks).map(|b| self.block_rows(b)).collect();
                // Those of a block's first node.
                let nulls = |b| read_u64(&self.bytes, HEADER_BYTES + b * self.block_bytes() + 8);
                let nulls: u64 = (0..self.blocks).map(nulls).sum();
                statistics::unknown(&self.data_type, self.rows, nulls as usize, &rows)
            })
        })
    }

    fn open_known(&self) -> Result<Known> {
        statistics::open(
            &self.known_bytes,
            &self.data_type,
            self.rows,
            self.blocks,
            |block| self.block_rows(block),
        )
    }

    fn block_bytes(&self) -> usize {
        (self.shape.nodes + self.shape.buffers) as usize * PAIR_BYTES
    }

    fn cursor(&self, block: usize) -> Cursor<'_> {
        let nodes = HEADER_BYTES + block * self.block_bytes();
        Cursor {
            bytes: &self.bytes,
            node: nodes,
            buffer: nodes + self.shape.nodes as usize * PAIR_BYTES,
        }
    }
}

/// Checks that `bytes` are a chunk of values of `data_type`, values included.
///
/// What a writer calls before it publishes, since readers check the geometry only.
pub fn validate(bytes: Bytes, data_type: &DataType) -> Result<()> {
    let chunk = ArrowChunk::open(bytes, data_type)?;
    for block in 0..chunk.blocks() {
        chunk.cursor(block).build(data_type).validate_full()?;
    }
    if !chunk.known_bytes.is_empty() {
        chunk.open_known()?;
    }
    Ok(())
}

/// Walks nodes and buffers of one block, depth first.
struct Cursor<'a> {
    bytes: &'a Bytes,
    node: usize,
    buffer: usize,
}

impl Cursor<'_> {
    fn next_node(&mut self) -> (u64, u64) {
        let at = self.node;
        self.node += PAIR_BYTES;
        (read_u64(self.bytes, at), read_u64(self.bytes, at + 8))
    }

    fn next_buffer(&mut self) -> (u64, u64) {
        let at = self.buffer;
        self.buffer += PAIR_BYTES;
        (read_u64(self.bytes, at), read_u64(self.bytes, at + 8))
    }

    /// Checks one value's node, buffers and children; `rows` is the length it must have.
    fn check(&mut self, data_type: &DataType, rows: Option<u64>) -> Result<u64> {
        let (length, nulls) = self.next_node();
        if let Some(rows) = rows.filter(|rows| *rows != length) {
            return Err(corrupt("node length", length, rows));
        }
        if nulls > length {
            return Err(corrupt("null count", nulls, format!("at most {length}")));
        }
        let len = usize::try_from(length).map_err(|_| corrupt("node length", length, "a usize"))?;
        let spec = layout(data_type);
        if spec.can_contain_null_mask {
            let size = self.check_range()?;
            if size != 0 || nulls != 0 {
                exactly("validity", size, Some(len.div_ceil(8)))?;
            }
        }
        for index in 0..spec.buffers.len() {
            let start = self.buffer;
            let size = self.check_range()?;
            let expected = least_bytes(data_type, index, len);
            if index == 0 {
                // Arrow slices these by their type, and panics at a length between two values.
                exactly("buffer", size, expected)?;
            }
            self.check_last_offset(data_type, index, len, start)?;
        }
        if spec.variadic {
            self.check_range()?;
        }
        for (index, child) in children(data_type).into_iter().enumerate() {
            let expected = match data_type {
                DataType::Struct(_) => Some(length),
                DataType::FixedSizeList(_, width) => {
                    Some(length.saturating_mul(u64::try_from(*width).unwrap_or(0)))
                }
                _ => None,
            };
            debug_assert!(index == 0 || matches!(data_type, DataType::Struct(_)));
            let last = match data_type {
                DataType::List(_) | DataType::Map(_, _) => Some(4),
                DataType::LargeList(_) => Some(8),
                _ => None,
            }
            .map(|width| self.last_offset(len, width));
            let found = self.check(child, expected)?;
            if let Some(last) = last.filter(|last| *last > found) {
                return Err(corrupt(
                    "last list offset",
                    last,
                    format!("at most {found}"),
                ));
            }
        }
        Ok(length)
    }

    /// The last offset of the list whose offsets buffer was read last.
    fn last_offset(&self, len: usize, width: usize) -> u64 {
        let offset = read_u64(self.bytes, self.buffer - PAIR_BYTES) as usize;
        self.offset_at(offset + len * width, width)
    }

    fn offset_at(&self, at: usize, width: usize) -> u64 {
        if width == 4 {
            u64::from(read_u32(self.bytes, at))
        } else {
            read_u64(self.bytes, at)
        }
    }

    /// The values of a string column must reach as far as its last offset says.
    fn check_last_offset(
        &self,
        data_type: &DataType,
        index: usize,
        len: usize,
        values_entry: usize,
    ) -> Result<()> {
        let width = match data_type {
            DataType::Utf8 | DataType::Binary => 4,
            DataType::LargeUtf8 | DataType::LargeBinary => 8,
            _ => return Ok(()),
        };
        if index != 1 {
            return Ok(());
        }
        let offsets = read_u64(self.bytes, values_entry - PAIR_BYTES) as usize;
        let last = self.offset_at(offsets + len * width, width);
        let size = read_u64(self.bytes, values_entry + 8);
        if last > size {
            return Err(corrupt(
                "last string offset",
                last,
                format!("at most {size}"),
            ));
        }
        Ok(())
    }

    fn check_range(&mut self) -> Result<usize> {
        let (offset, size) = self.next_buffer();
        let total = self.bytes.len() as u64;
        let inside = offset.checked_add(size).is_some_and(|end| end <= total);
        if !inside {
            return Err(corrupt(
                "buffer range",
                format!("{offset}+{size}"),
                format!("inside {total}"),
            ));
        }
        if !offset.is_multiple_of(ALIGN as u64) {
            return Err(corrupt(
                "buffer offset",
                offset,
                format!("a multiple of {ALIGN}"),
            ));
        }
        Ok(size as usize)
    }

    /// The value at the cursor. Only for chunks that [`ArrowChunk::open`] has checked.
    fn build(&mut self, data_type: &DataType) -> ArrayData {
        let (length, nulls) = self.next_node();
        let len = length as usize;
        let spec = layout(data_type);
        let mut builder = ArrayData::builder(data_type.clone()).len(len);
        if spec.can_contain_null_mask {
            let validity = self.take_buffer();
            if nulls > 0 {
                let bits = BooleanBuffer::new(validity, 0, len);
                // SAFETY: the null count was counted from these very bits by the writer, checked by
                // `validate` before the chunk was published, and the bits are immutable since.
                let nulls = unsafe { NullBuffer::new_unchecked(bits, nulls as usize) };
                builder = builder.nulls(Some(nulls));
            }
        }
        for _ in 0..spec.buffers.len() {
            builder = builder.add_buffer(self.take_buffer());
        }
        if spec.variadic {
            let values = self.take_buffer();
            // Kernels have shorter ways for arrays whose values lie in their views.
            if !values.is_empty() {
                builder = builder.add_buffer(values);
            }
        }
        for child in children(data_type) {
            builder = builder.add_child_data(self.build(child));
        }
        // SAFETY: `ArrowChunk::open` has checked that every buffer lies inside the chunk, is
        // aligned and long enough for `len`, that children have the lengths their parent needs and
        // that last offsets stay inside the values. The worker ran `validate` (offsets, views,
        // UTF-8) on these bytes before it published them, and published bytes never change.
        unsafe { builder.build_unchecked() }
    }

    fn take_buffer(&mut self) -> Buffer {
        let (offset, size) = self.next_buffer();
        if size == 0 {
            // Arrow wants even an empty buffer aligned to its type; an empty `Bytes` is not.
            return MutableBuffer::new(0).into();
        }
        // A buffer over exactly its own bytes: memory accounting counts capacities, and a slice of
        // a chunk-sized buffer would be counted whole with every batch.
        Buffer::from(self.bytes.slice(offset as usize..(offset + size) as usize))
    }
}

fn exactly(what: &'static str, found: usize, expected: Option<usize>) -> Result<()> {
    match expected {
        Some(expected) if found == expected => Ok(()),
        Some(expected) => Err(corrupt(what, found, format!("{expected} bytes"))),
        None => Err(corrupt(what, found, "a length that does not overflow")),
    }
}

#[cfg(test)]
mod tests;
