//! The packed form: about the bytes of compressed Parquet, read nearly as fast as Arrow.
//!
//! ```text
//! offset  size  field
//!      0     8  magic "STOAPAK1"
//!      8     2  version, 1
//!     10     1  encoding
//!     11     1  reserved, zero
//!     12     4  rows of a block, 8192
//!     16     8  rows
//!     24     4  blocks = ceil(rows / rows of a block)
//!     28     4  values of the dictionary
//!     32     8  length of the chunk in bytes
//!     40     8  offset of the statistics
//!     48     8  length of the statistics
//!     56     8  offset of what the blocks share
//!     64     8  length of what the blocks share
//!     72    16  base of the integers, signed
//!     88    40  reserved, zero
//!    128        directory: for each block {offset u64, length u32, nulls u32}
//!      …        statistics, shared part and blocks, each at a multiple of 64
//! ```
//!
//! A block with some nulls, but not only nulls, begins with its validity bitmap, padded to a
//! multiple of 64; one with only nulls is empty. What follows depends on the encoding:
//!
//! | encoding | shared part | block |
//! |---|---|---|
//! | 0 plain | a chunk in the arrow form, without statistics: all values, nulls included | empty |
//! | 1 constant | as 0, of one value | empty |
//! | 2 bits | none | a bit a row, of booleans |
//! | 3 integers | none | a stream: the values less the base |
//! | 4 dictionary | the distinct values | a stream of codes |
//! | 5 floats | none | decimals inside: exponents, a stream of integers, exceptions |
//! | 6 text | none | a stream of lengths, and the bytes |
//! | 7 compressed text | the symbols of FSST | as 6, of codes |
//!
//! A stream is bit-packed, as differences or runs where that is smaller. The bytes of each part are
//! described where they are made: `packed/bits.rs`, `dictionary.rs`, `floats.rs`, `text.rs`, and in
//! docs/format.md. Values of null rows are unspecified.
//!
//! Nothing in a chunk is trusted by its reader beyond this: that text which [`validate_packed`]
//! found to be UTF-8 before the chunk was published still is. Everything else is checked where it
//! is used, once a block rather than once a value wherever that is enough.

mod bits;
mod dictionary;
mod evaluate;
mod floats;
mod integers;
mod search;
mod text;
mod write;

use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Scalar, new_null_array};
use arrow::buffer::{BooleanBuffer, NullBuffer};
use arrow::datatypes::DataType;
use bytes::Bytes;

use crate::arrow_form::{ArrowChunk, supports};
use crate::bytes::{ALIGN, buffer, check_aligned, part, read_u32, read_u64, shared};
use crate::comparison::{Comparison, Operator};
use crate::error::corrupt;
use crate::statistics::{self, ChunkStatistics, Known, Zones};
use crate::{BLOCK_ROWS, Error, Result};
use bits::Scratch;
use dictionary::Dictionary;
use text::Symbols;

pub use evaluate::Prepared;
pub use write::{PackedChunkWriter, encode_packed};

/// The first eight bytes of a chunk.
pub const MAGIC: [u8; 8] = *b"STOAPAK1";
/// The version this build writes and reads.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 128;
const ENTRY_BYTES: usize = 16;

/// How all blocks of a chunk are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Encoding {
    Plain = 0,
    Constant = 1,
    Bits = 2,
    Integers = 3,
    Dictionary = 4,
    Floats = 5,
    Text = 6,
    CompressedText = 7,
}

impl Encoding {
    pub(crate) fn from_tag(tag: u8) -> Result<Self> {
        Ok(match tag {
            0 => Self::Plain,
            1 => Self::Constant,
            2 => Self::Bits,
            3 => Self::Integers,
            4 => Self::Dictionary,
            5 => Self::Floats,
            6 => Self::Text,
            7 => Self::CompressedText,
            other => return Err(corrupt("encoding", other, "0 to 7")),
        })
    }

    /// Refuses an encoding in a chunk of a type that does not have it.
    fn check(self, data_type: &DataType) -> Result<()> {
        let fits = match self {
            Self::Plain | Self::Constant => true,
            Self::Bits => data_type == &DataType::Boolean,
            Self::Integers => integers::width(data_type).is_some(),
            Self::Dictionary => text::is_text(data_type) || data_type.primitive_width().is_some(),
            Self::Floats => matches!(data_type, DataType::Float32 | DataType::Float64),
            Self::Text | Self::CompressedText => text::is_text(data_type),
        };
        match fits {
            true => Ok(()),
            false => Err(corrupt(
                "encoding",
                self.name(),
                format!("one of {data_type}"),
            )),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Constant => "constant",
            Self::Bits => "bits",
            Self::Integers => "integers",
            Self::Dictionary => "dictionary",
            Self::Floats => "floats",
            Self::Text => "text",
            Self::CompressedText => "compressed text",
        }
    }
}

/// A chunk in the packed form, opened for reading.
///
/// Cheap to clone; arrays made from it may keep the chunk's memory alive.
#[derive(Clone, Debug)]
pub struct PackedChunk {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    bytes: Bytes,
    data_type: DataType,
    encoding: Encoding,
    rows: usize,
    blocks: usize,
    base: i128,
    known: OnceLock<Known>,
    known_bytes: Bytes,
    shared: Shared,
}

/// What the blocks of a chunk share.
#[derive(Debug)]
enum Shared {
    Nothing,
    Plain(ArrowChunk),
    Constant(ArrayRef),
    Dictionary(Dictionary),
    Symbols(Box<Symbols>),
}

/// One block's place.
struct Entry {
    offset: usize,
    length: usize,
    nulls: usize,
}

thread_local! {
    static SCRATCH: RefCell<Box<Scratch>> = RefCell::new(Scratch::new());
}

/// Runs `work` with this thread's scratch memory, which it must not ask for again.
fn with_scratch<T>(work: impl FnOnce(&mut Scratch) -> T) -> T {
    SCRATCH.with(|scratch| work(&mut scratch.borrow_mut()))
}

impl PackedChunk {
    /// Opens `bytes` as a chunk of values of `data_type`, after checking its geometry.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Version`], [`Error::Misaligned`],
    /// [`Error::UnsupportedType`]. For a reader, each is a miss.
    pub fn open(bytes: Bytes, data_type: &DataType) -> Result<Self> {
        if !supports(data_type) {
            return Err(Error::UnsupportedType(data_type.clone()));
        }
        part(&bytes, "header", 0, HEADER_BYTES)?;
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
        let encoding = Encoding::from_tag(bytes[10])?;
        let block_rows = read_u32(&bytes, 12) as usize;
        if block_rows != BLOCK_ROWS {
            return Err(corrupt("rows of a block", block_rows, BLOCK_ROWS));
        }
        let total = read_u64(&bytes, 32);
        if total != bytes.len() as u64 {
            return Err(corrupt("length of the chunk", total, bytes.len()));
        }
        let rows = read_u64(&bytes, 16);
        let blocks = read_u32(&bytes, 24) as usize;
        if rows.div_ceil(BLOCK_ROWS as u64) != blocks as u64 {
            return Err(corrupt("blocks", blocks, rows.div_ceil(BLOCK_ROWS as u64)));
        }
        part(
            &bytes,
            "directory",
            HEADER_BYTES,
            blocks.saturating_mul(ENTRY_BYTES),
        )?;
        let section = |what, at| {
            let offset = read_u64(&bytes, at);
            if !offset.is_multiple_of(ALIGN as u64) {
                return Err(corrupt(what, offset, format!("a multiple of {ALIGN}")));
            }
            shared(
                &bytes,
                what,
                offset as usize,
                read_u64(&bytes, at + 8) as usize,
            )
        };
        let known_bytes = section("statistics", 40)?;
        let shared_bytes = section("shared part", 56)?;
        let mut base = [0; 16];
        base.copy_from_slice(&bytes[72..88]);
        let rows = rows as usize;
        encoding.check(data_type)?;
        let values = read_u32(&bytes, 28) as usize;
        let shared = Shared::open(encoding, shared_bytes, data_type, rows, values)?;
        let inner = Inner {
            data_type: data_type.clone(),
            encoding,
            rows,
            blocks,
            base: i128::from_le_bytes(base),
            known: OnceLock::new(),
            known_bytes,
            shared,
            bytes,
        };
        for block in 0..blocks {
            inner.check_entry(block)?;
        }
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Rows of the chunk.
    pub fn rows(&self) -> usize {
        self.inner.rows
    }

    /// Bytes of the chunk.
    pub fn bytes(&self) -> usize {
        self.inner.bytes.len()
    }

    /// Blocks of the chunk.
    pub fn blocks(&self) -> usize {
        self.inner.blocks
    }

    /// Rows of block `block`.
    pub fn block_rows(&self, block: usize) -> usize {
        self.inner.block_rows(block)
    }

    /// The values of one block.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where the bytes are not what the worker wrote: a miss.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn block(&self, block: usize) -> Result<ArrayRef> {
        self.inner.block(block)
    }

    /// The values of the rows of one block that `keep` has set.
    ///
    /// # Errors
    /// As [`PackedChunk::block`].
    ///
    /// # Panics
    /// If there is no such block, or `keep` has not its length.
    pub fn filtered(&self, block: usize, keep: &BooleanBuffer) -> Result<ArrayRef> {
        assert_eq!(keep.len(), self.block_rows(block), "a bit for each row");
        self.inner.filtered(block, keep)
    }

    /// Makes a predicate ready for all blocks; `None` where decoding them and using Arrow's
    /// kernels is better.
    pub fn prepare(&self, comparison: &Comparison) -> Option<Prepared> {
        Prepared::new(self, comparison)
    }

    /// What is known of each block; `None` if nothing is.
    pub fn zones(&self) -> Option<&Zones> {
        (!self.inner.known_bytes.is_empty()).then(|| &self.inner.known().zones)
    }

    /// What is known of the whole chunk.
    pub fn statistics(&self) -> &ChunkStatistics {
        &self.inner.known().statistics
    }

    /// Whether some row may equal `value`: false only where a dictionary shows that none does.
    pub fn may_contain(&self, value: &Scalar<ArrayRef>) -> bool {
        match &self.inner.shared {
            Shared::Dictionary(_) | Shared::Constant(_) => {
                let equal = Comparison::Compare {
                    op: Operator::Eq,
                    value: value.clone(),
                };
                self.prepare(&equal).is_none_or(|test| !test.is_never())
            }
            _ => true,
        }
    }

    /// How the values are encoded, for people: the name, and the bits that a row takes.
    pub fn encoding(&self) -> String {
        let name = self.inner.encoding.name();
        let values = self.inner.bytes.len() - self.inner.known_bytes.len();
        let bits = (values * 8) as f64 / self.inner.rows.max(1) as f64;
        match self.inner.encoding {
            Encoding::Constant => name.to_owned(),
            Encoding::Dictionary => match &self.inner.shared {
                Shared::Dictionary(dictionary) => {
                    format!("{name} of {}, {bits:.1} bits", dictionary.len)
                }
                _ => name.to_owned(),
            },
            _ => format!("{name}, {bits:.1} bits"),
        }
    }
}

/// Checks that `bytes` are a chunk of values of `data_type`, every value included.
///
/// What a writer calls before it publishes, since readers check what they use.
pub fn validate_packed(bytes: Bytes, data_type: &DataType) -> Result<()> {
    let chunk = PackedChunk::open(bytes, data_type)?;
    chunk.inner.open_known()?;
    chunk.inner.validate()
}

impl Shared {
    fn open(
        encoding: Encoding,
        bytes: Bytes,
        data_type: &DataType,
        rows: usize,
        values: usize,
    ) -> Result<Self> {
        match encoding {
            Encoding::Plain => {
                let chunk = ArrowChunk::open(bytes, data_type)?;
                if chunk.rows() != rows {
                    return Err(corrupt("rows of the shared part", chunk.rows(), rows));
                }
                Ok(Self::Plain(chunk))
            }
            Encoding::Constant => {
                let chunk = ArrowChunk::open(bytes, data_type)?;
                if chunk.rows() != 1 {
                    return Err(corrupt("rows of the shared part", chunk.rows(), 1));
                }
                Ok(Self::Constant(chunk.checked_block(0)?))
            }
            Encoding::Dictionary => {
                Dictionary::open(bytes, data_type, values).map(Self::Dictionary)
            }
            Encoding::CompressedText => Ok(Self::Symbols(Box::new(Symbols::open(&bytes)?))),
            Encoding::Bits | Encoding::Integers | Encoding::Floats | Encoding::Text => {
                Ok(Self::Nothing)
            }
        }
    }
}

impl Inner {
    fn block_rows(&self, block: usize) -> usize {
        BLOCK_ROWS.min(self.rows - block * BLOCK_ROWS)
    }

    fn entry(&self, block: usize) -> Entry {
        assert!(block < self.blocks, "block {block} of {}", self.blocks);
        let at = HEADER_BYTES + block * ENTRY_BYTES;
        Entry {
            offset: read_u64(&self.bytes, at) as usize,
            length: read_u32(&self.bytes, at + 8) as usize,
            nulls: read_u32(&self.bytes, at + 12) as usize,
        }
    }

    fn check_entry(&self, block: usize) -> Result<()> {
        let entry = self.entry(block);
        part(&self.bytes, "block", entry.offset, entry.length)?;
        if !entry.offset.is_multiple_of(ALIGN) {
            return Err(corrupt(
                "block offset",
                entry.offset,
                format!("a multiple of {ALIGN}"),
            ));
        }
        let rows = self.block_rows(block);
        if entry.nulls > rows {
            return Err(corrupt(
                "nulls of a block",
                entry.nulls,
                format!("at most {rows}"),
            ));
        }
        Ok(())
    }

    /// Nulls and encoded values of a block.
    fn parts(&self, block: usize) -> Result<Parts> {
        let entry = self.entry(block);
        let rows = self.block_rows(block);
        let bytes = shared(&self.bytes, "block", entry.offset, entry.length)?;
        let has_bitmap = entry.nulls > 0 && entry.nulls < rows;
        let (nulls, payload) = if has_bitmap {
            let bitmap = rows.div_ceil(8);
            let skipped = bitmap.next_multiple_of(ALIGN);
            part(&bytes, "validity", 0, skipped)?;
            let bits = BooleanBuffer::new(buffer(bytes.slice(..bitmap)), 0, rows);
            let nulls = NullBuffer::new(bits);
            if nulls.null_count() != entry.nulls {
                return Err(corrupt("nulls of a block", nulls.null_count(), entry.nulls));
            }
            (Some(nulls), bytes.slice(skipped..))
        } else {
            (None, bytes)
        };
        Ok(Parts {
            rows,
            nulls,
            all_null: rows > 0 && entry.nulls == rows,
            payload,
        })
    }

    fn block(&self, block: usize) -> Result<ArrayRef> {
        match &self.shared {
            Shared::Plain(chunk) => return chunk.checked_block(block),
            Shared::Constant(value) => return repeated(value, self.block_rows(block)),
            Shared::Nothing | Shared::Dictionary(_) | Shared::Symbols(_) => {}
        }
        let parts = self.parts(block)?;
        if parts.all_null {
            return Ok(new_null_array(&self.data_type, parts.rows));
        }
        self.decode(&parts, None)
    }

    /// Whether its blocks are text.
    fn has_text(&self) -> bool {
        self.encoding == Encoding::Text || self.symbols().is_some()
    }

    /// What the codes of compressed text stand for.
    fn symbols(&self) -> Option<&Symbols> {
        match &self.shared {
            Shared::Symbols(symbols) => Some(symbols),
            _ => None,
        }
    }

    /// The values of a block that is not all null, all or those of some rows, ascending.
    fn decode(&self, parts: &Parts, rows: Option<&[u32]>) -> Result<ArrayRef> {
        with_scratch(|scratch| match (self.encoding, &self.shared) {
            (_, Shared::Dictionary(dictionary)) => dictionary.decode(parts, rows, scratch),
            (_, Shared::Symbols(symbols)) => self.decode_text(parts, rows, Some(symbols), scratch),
            (Encoding::Text, _) => self.decode_text(parts, rows, None, scratch),
            (Encoding::Floats, _) => floats::decode(&self.data_type, parts, rows, scratch),
            (Encoding::Bits, _) => parts.booleans(rows),
            (_, _) => integers::decode(self, parts, rows, scratch),
        })
    }

    fn decode_text(
        &self,
        parts: &Parts,
        rows: Option<&[u32]>,
        symbols: Option<&Symbols>,
        scratch: &mut Scratch,
    ) -> Result<ArrayRef> {
        let block = text::Block::open(&parts.payload, parts.rows)?;
        let views = match rows {
            None => block.decode(symbols, 0, scratch)?,
            Some(rows) => block.gather(symbols, rows, scratch)?,
        };
        text::array(
            &self.data_type,
            views.views,
            [views.data],
            parts.nulls(rows),
        )
    }

    fn filtered(&self, block: usize, keep: &BooleanBuffer) -> Result<ArrayRef> {
        let rows = keep.len();
        let kept = keep.count_set_bits();
        if kept == rows {
            return self.block(block);
        }
        match &self.shared {
            Shared::Constant(value) => return repeated(value, kept),
            Shared::Plain(_) => {}
            Shared::Nothing | Shared::Dictionary(_) | Shared::Symbols(_) => {
                let parts = self.parts(block)?;
                if parts.all_null {
                    return Ok(new_null_array(&self.data_type, kept));
                }
                // Above this share, unpacking all and filtering is as fast. Integers are narrow
                // until they are taken, so they are not widened in vain.
                let quarters = match self.encoding {
                    Encoding::Integers => 3,
                    _ => 1,
                };
                if kept * 4 <= rows * quarters {
                    let rows: Vec<u32> = keep.set_indices_u32().collect();
                    return self.decode(&parts, Some(&rows));
                }
            }
        }
        let keep = BooleanArray::new(keep.clone(), None);
        Ok(arrow::compute::filter(&self.block(block)?, &keep)?)
    }

    /// Reads every value, and checks of text that it is UTF-8.
    fn validate(&self) -> Result<()> {
        if let Shared::Dictionary(dictionary) = &self.shared {
            let values = with_scratch(|scratch| dictionary.values(scratch).cloned())?;
            values.to_data().validate_full()?;
            for block in 0..self.blocks {
                let parts = self.parts(block)?;
                if !parts.all_null {
                    with_scratch(|scratch| dictionary.codes(&parts, None, scratch))?;
                }
            }
            return Ok(());
        }
        for block in 0..self.blocks {
            let values = self.block(block)?;
            if let Some(values) = values.as_string_view_opt() {
                // The buffer of a block has every value, short ones too, and mostly it is ASCII,
                // of which every part is UTF-8.
                let buffers = values.data_buffers();
                if buffers.is_empty() || !buffers.iter().all(|buffer| buffer.is_ascii()) {
                    values.to_data().validate_full()?;
                }
            }
        }
        Ok(())
    }

    /// Statistics are hints: what cannot be read is not known.
    fn known(&self) -> &Known {
        self.known.get_or_init(|| {
            self.open_known().unwrap_or_else(|_| {
                let rows: Vec<usize> = (0..self.blocks).map(|b| self.block_rows(b)).collect();
                let nulls = (0..self.blocks).map(|b| self.entry(b).nulls).sum();
                statistics::unknown(&self.data_type, self.rows, nulls, &rows)
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
}

/// A block's nulls and its encoded values.
struct Parts {
    rows: usize,
    /// Where the nulls are, if there are some and not only nulls.
    nulls: Option<NullBuffer>,
    all_null: bool,
    payload: Bytes,
}

impl Parts {
    /// The nulls of all rows, or of some.
    fn nulls(&self, rows: Option<&[u32]>) -> Option<NullBuffer> {
        let nulls = self.nulls.as_ref()?;
        Some(match rows {
            None => nulls.clone(),
            Some(rows) => {
                NullBuffer::from_iter(rows.iter().map(|row| nulls.is_valid(*row as usize)))
            }
        })
    }

    /// The values of a block of booleans.
    fn booleans(&self, rows: Option<&[u32]>) -> Result<ArrayRef> {
        part(&self.payload, "booleans", 0, self.rows.div_ceil(8))?;
        let bits = BooleanBuffer::new(buffer(self.payload.clone()), 0, self.rows);
        let values = match rows {
            None => bits,
            Some(rows) => rows.iter().map(|row| bits.value(*row as usize)).collect(),
        };
        Ok(Arc::new(BooleanArray::new(values, self.nulls(rows))))
    }
}

/// One value, `rows` times.
fn repeated(value: &ArrayRef, rows: usize) -> Result<ArrayRef> {
    let zeros = arrow::array::UInt32Array::from(vec![0; rows]);
    Ok(arrow::compute::take(value, &zeros, None)?)
}

#[cfg(test)]
mod tests;
