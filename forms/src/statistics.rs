//! What is known of a chunk beside its values: the section that both decoded forms carry.
//!
//! ```text
//! offset  size  field
//!      0     4  sketch: 0 none, 1 sparse, 2 dense
//!      4     4  entries of a sparse sketch
//!      8     8  nulls of the chunk
//!     16     4  bounds: 0 none, 1 the chunk's, and exact, 2 as 1 but not exact
//!     20     4  bytes of the bounds
//!     24        nulls of each block, u32
//!      …        the sketch: register u16, rank u16 for each entry; or 1024 ranks u8
//!      …        the bounds, at a multiple of 64: a chunk in the arrow form, without statistics, of
//!               the chunk's minimum and maximum, each block's minimum, each block's maximum
//! ```
//!
//! A bound is null where it is not known: the values are all null, have no order, or hold a NaN.
//! Bounds of strings and binaries are cut to at most 64 bytes: a minimum downwards, a maximum
//! upwards. A zero is a bound as -0.0 below and +0.0 above, since some compare them as equal.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryViewArray, BooleanArray, PrimitiveArray, Scalar,
    StringViewArray, UInt64Array, downcast_primitive_array, new_null_array,
};
use arrow::compute::{self, concat};
use arrow::datatypes::{ArrowPrimitiveType, DataType};
use bytes::Bytes;

use crate::arrow_form::{ArrowChunk, ArrowChunkWriter};
use crate::bytes::{pad, part, read_u32, read_u64, shared};
use crate::error::corrupt;
use crate::sketch::{REGISTERS, Sketch};
use crate::{ALIGN, Result};

const HEADER_BYTES: usize = 24;
/// Longest bound of a string or binary.
const BOUND_BYTES_MAX: usize = 64;
/// A sparse sketch of this many registers is as large as a dense one.
const SPARSE_MAX: usize = REGISTERS / 4;

/// What is known of a chunk's values as a whole.
#[derive(Clone, Debug)]
pub struct ChunkStatistics {
    /// Rows, nulls included.
    pub rows: usize,
    /// Nulls.
    pub null_count: usize,
    /// The least value, or one below it; `None` where it is not known.
    pub min: Option<Scalar<ArrayRef>>,
    /// The largest value, or one above it; `None` where it is not known.
    pub max: Option<Scalar<ArrayRef>>,
    /// Whether `min` and `max`, where they are known, are values of the chunk.
    pub exact: bool,
    /// The distinct values, nulls aside; `None` for nested types.
    pub distinct: Option<Sketch>,
}

/// What is known of each block: its zone map.
#[derive(Clone, Debug)]
pub struct Zones {
    /// A value not above any of the block's, of the chunk's type; null where it is not known.
    pub mins: ArrayRef,
    /// A value not below any of the block's, of the chunk's type; null where it is not known.
    pub maxs: ArrayRef,
    /// Nulls of the block.
    pub null_counts: UInt64Array,
    /// Rows of the block.
    pub row_counts: UInt64Array,
}

/// Both, of an opened chunk.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) statistics: ChunkStatistics,
    pub(crate) zones: Zones,
}

/// Collects what is known of a chunk while its blocks are written.
#[derive(Debug)]
pub(crate) struct Collector {
    data_type: DataType,
    nulls: Vec<u32>,
    /// Minimum and maximum of each block, null where they are not known.
    bounds: Vec<ArrayRef>,
    /// The bounds of all blocks so far, at their full length.
    whole: Option<ArrayRef>,
    /// Whether some block has values, but no bounds.
    unbounded: bool,
    sketch: Option<Sketch>,
}

impl Collector {
    pub(crate) fn new(data_type: &DataType) -> Self {
        Self {
            data_type: data_type.clone(),
            nulls: vec![],
            bounds: vec![],
            whole: None,
            unbounded: false,
            sketch: Sketch::supports(data_type).then(Sketch::default),
        }
    }

    /// Looks at one block.
    pub(crate) fn block(&mut self, array: &ArrayRef) {
        if let Some(sketch) = &mut self.sketch {
            sketch.add(array);
        }
        self.block_without_sketch(array);
    }

    /// Looks at one block whose values are counted elsewhere.
    pub(crate) fn block_without_sketch(&mut self, array: &ArrayRef) {
        self.block_with_bounds(array, bounds(array));
    }

    /// Looks at one block of which others know the bounds, and count the values.
    pub(crate) fn block_with_bounds(&mut self, array: &ArrayRef, bounds: Option<ArrayRef>) {
        let nulls = array.logical_null_count();
        self.nulls.push(nulls as u32);
        match bounds {
            Some(pair) => {
                self.whole = match self.whole.take() {
                    None => Some(own(&pair)),
                    Some(whole) => {
                        let both = concat(&[whole.as_ref(), pair.as_ref()]);
                        both.ok().and_then(|both| Some(own(&self::bounds(&both)?)))
                    }
                };
                // A value may be as long as a file.
                self.bounds.push(own(&cut_pair(&pair)));
            }
            None => {
                self.unbounded |= nulls < array.len();
                self.bounds.push(new_null_array(&self.data_type, 2));
            }
        }
    }

    /// The minimum and maximum of each block so far, null where they are not known.
    pub(crate) fn bounds(&self) -> &[ArrayRef] {
        &self.bounds
    }

    /// What counts distinct values; `None` of types that are not counted.
    pub(crate) fn sketch(&mut self) -> Option<&mut Sketch> {
        self.sketch.as_mut()
    }

    /// The section's bytes.
    pub(crate) fn finish(self) -> Result<Vec<u8>> {
        let bounds = self.encoded_bounds()?;
        let used = self.sketch.as_ref().map(|s| s.used().count());
        let (kind, entries) = match used {
            None => (0u32, 0),
            Some(used) if used < SPARSE_MAX => (1, used),
            Some(_) => (2, 0),
        };
        let mut out = Vec::with_capacity(HEADER_BYTES + self.nulls.len() * 4 + REGISTERS + ALIGN);
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&(entries as u32).to_le_bytes());
        let nulls: u64 = self.nulls.iter().map(|nulls| u64::from(*nulls)).sum();
        out.extend_from_slice(&nulls.to_le_bytes());
        let (tag, bytes) = match &bounds {
            None => (0u32, &[][..]),
            Some((bytes, true)) => (1, &bytes[..]),
            Some((bytes, false)) => (2, &bytes[..]),
        };
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        for nulls in &self.nulls {
            out.extend_from_slice(&nulls.to_le_bytes());
        }
        match (&self.sketch, kind) {
            (Some(sketch), 1) => {
                for (register, rank) in sketch.used() {
                    out.extend_from_slice(&register.to_le_bytes());
                    out.extend_from_slice(&u16::from(rank).to_le_bytes());
                }
            }
            (Some(sketch), 2) => out.extend_from_slice(sketch.to_bytes()),
            _ => {}
        }
        pad(&mut out, ALIGN);
        out.extend_from_slice(bytes);
        pad(&mut out, ALIGN);
        Ok(out)
    }

    /// The bounds as a chunk, and whether they are exact; `None` where no block has any.
    fn encoded_bounds(&self) -> Result<Option<(Vec<u8>, bool)>> {
        if self.bounds.iter().all(|b| b.null_count() == b.len()) {
            return Ok(None);
        }
        let parts: Vec<&dyn Array> = self.bounds.iter().map(|b| b.as_ref()).collect();
        let pairs = concat(&parts)?;
        let every_second = |from: usize| {
            let at =
                UInt64Array::from_iter_values((from..pairs.len()).step_by(2).map(|i| i as u64));
            compute::take(&pairs, &at, None)
        };
        let (mins, maxs) = (every_second(0)?, every_second(1)?);
        let unknown = || new_null_array(&self.data_type, 1);
        let (least, largest) = match self.whole.as_ref().filter(|_| !self.unbounded) {
            Some(whole) => (whole.slice(0, 1), whole.slice(1, 1)),
            None => (unknown(), unknown()),
        };
        let (chunk_least, chunk_largest) = (truncated(&least, false), truncated(&largest, true));
        let is_float = self.data_type.is_floating();
        let exact = !is_float && chunk_least == least && chunk_largest == largest;
        let mut writer = ArrowChunkWriter::bare(self.data_type.clone())?;
        for part in [&chunk_least, &chunk_largest, &mins, &maxs] {
            writer.push(part)?;
        }
        Ok(Some((writer.finish()?.to_vec(), exact)))
    }
}

/// Opens the section of a chunk of `rows` rows in `blocks` blocks of `block_rows`.
pub(crate) fn open(
    bytes: &Bytes,
    data_type: &DataType,
    rows: usize,
    blocks: usize,
    block_rows: impl Fn(usize) -> usize,
) -> Result<Known> {
    part(bytes, "statistics", 0, HEADER_BYTES)?;
    let kind = read_u32(bytes, 0);
    let entries = read_u32(bytes, 4) as usize;
    let null_count = read_u64(bytes, 8);
    let bounds_kind = read_u32(bytes, 16);
    let bounds_bytes = read_u32(bytes, 20) as usize;
    if null_count > rows as u64 {
        return Err(corrupt("nulls", null_count, format!("at most {rows}")));
    }
    let counts = part(
        bytes,
        "nulls of blocks",
        HEADER_BYTES,
        blocks.saturating_mul(4),
    )?;
    let null_counts = UInt64Array::from_iter_values(
        counts
            .as_chunks::<4>()
            .0
            .iter()
            .map(|n| u64::from(u32::from_le_bytes(*n))),
    );
    let mut at = HEADER_BYTES + counts.len();
    let distinct = match kind {
        0 => None,
        1 => {
            let used = part(bytes, "sketch", at, entries.saturating_mul(4))?;
            at += used.len();
            let mut sketch = Sketch::default();
            for entry in used.as_chunks::<4>().0 {
                let register = u16::from_le_bytes([entry[0], entry[1]]);
                sketch.set(register, entry[2]);
            }
            Some(sketch)
        }
        2 => {
            let registers = part(bytes, "sketch", at, REGISTERS)?;
            at += REGISTERS;
            registers.first_chunk().map(Sketch::from_bytes)
        }
        other => return Err(corrupt("sketch", other, "0, 1 or 2")),
    };
    let unknown = || new_null_array(data_type, blocks);
    let (mut min, mut max) = (None, None);
    let (mins, maxs) = match bounds_kind {
        0 => (unknown(), unknown()),
        1 | 2 => {
            let bytes = shared(bytes, "bounds", at.next_multiple_of(ALIGN), bounds_bytes)?;
            let all = open_bounds(bytes, data_type, 2 + 2 * blocks)?;
            let known = |at: usize| (!all.is_null(at)).then(|| Scalar::new(all.slice(at, 1)));
            (min, max) = (known(0), known(1));
            (all.slice(2, blocks), all.slice(2 + blocks, blocks))
        }
        other => return Err(corrupt("bounds", other, "0, 1 or 2")),
    };
    let row_counts = UInt64Array::from_iter_values((0..blocks).map(|b| block_rows(b) as u64));
    Ok(Known {
        statistics: ChunkStatistics {
            rows,
            null_count: null_count as usize,
            min,
            max,
            exact: bounds_kind == 1,
            distinct,
        },
        zones: Zones {
            mins,
            maxs,
            null_counts,
            row_counts,
        },
    })
}

fn open_bounds(bytes: Bytes, data_type: &DataType, expected: usize) -> Result<ArrayRef> {
    let chunk = ArrowChunk::open(bytes, data_type)?;
    if chunk.rows() != expected {
        return Err(corrupt("bounds", chunk.rows(), expected));
    }
    let blocks = (0..chunk.blocks()).map(|b| chunk.checked_block(b));
    let blocks = blocks.collect::<Result<Vec<_>>>()?;
    let parts: Vec<&dyn Array> = blocks.iter().map(|b| b.as_ref()).collect();
    Ok(concat(&parts)?)
}

/// What a chunk without a section knows: its rows and nulls.
pub(crate) fn unknown(
    data_type: &DataType,
    rows: usize,
    null_count: usize,
    block_rows: &[usize],
) -> Known {
    let blocks = block_rows.len();
    Known {
        statistics: ChunkStatistics {
            rows,
            null_count: null_count.min(rows),
            min: None,
            max: None,
            exact: false,
            distinct: None,
        },
        zones: Zones {
            mins: new_null_array(data_type, blocks),
            maxs: new_null_array(data_type, blocks),
            null_counts: UInt64Array::new_null(blocks),
            row_counts: UInt64Array::from_iter_values(block_rows.iter().map(|r| *r as u64)),
        },
    }
}

/// The least and the largest value as an array of two; `None` where they are not known.
fn bounds(array: &ArrayRef) -> Option<ArrayRef> {
    use DataType::*;
    let data_type = array.data_type();
    match data_type {
        Interval(_) => None,
        Float16 | Float32 | Float64 => float_bounds(array),
        Boolean => {
            let values = array.as_boolean();
            let pair = vec![compute::min_boolean(values)?, compute::max_boolean(values)?];
            Some(Arc::new(BooleanArray::from(pair)))
        }
        Utf8View => {
            let values = array.as_string_view();
            let pair = [
                compute::min_string_view(values)?,
                compute::max_string_view(values)?,
            ];
            Some(Arc::new(StringViewArray::from_iter_values(pair)))
        }
        BinaryView => {
            let values = array.as_binary_view();
            let pair = [
                compute::min_binary_view(values)?,
                compute::max_binary_view(values)?,
            ];
            Some(Arc::new(BinaryViewArray::from_iter_values(pair)))
        }
        _ => {
            let array = array.as_ref();
            downcast_primitive_array!(
                array => primitive_bounds(array, data_type),
                _ => None
            )
        }
    }
}

fn primitive_bounds<T: arrow::array::ArrowNumericType>(
    array: &PrimitiveArray<T>,
    data_type: &DataType,
) -> Option<ArrayRef>
where
    T::Native: PartialOrd,
{
    let pair = [compute::min(array)?, compute::max(array)?];
    Some(Arc::new(
        PrimitiveArray::<T>::from_iter_values(pair).with_data_type(data_type.clone()),
    ))
}

/// Bounds of floats: none beside a NaN, and zeros of both signs inside.
fn float_bounds(array: &ArrayRef) -> Option<ArrayRef> {
    let array = array.as_ref();
    match array.data_type() {
        DataType::Float16 => of_floats::<arrow::datatypes::Float16Type>(array, |v| v.is_nan()),
        DataType::Float32 => of_floats::<arrow::datatypes::Float32Type>(array, |v| v.is_nan()),
        _ => of_floats::<arrow::datatypes::Float64Type>(array, |v| v.is_nan()),
    }
}

fn of_floats<T: arrow::array::ArrowNumericType>(
    array: &dyn Array,
    is_nan: impl Fn(T::Native) -> bool,
) -> Option<ArrayRef>
where
    T::Native: std::ops::Neg<Output = T::Native>,
{
    let values = array.as_primitive::<T>();
    let zero = <T as ArrowPrimitiveType>::Native::default();
    // Arrow orders NaNs outside of everything else, so that one of the bounds is NaN if any is.
    let (mut min, mut max) = (compute::min(values)?, compute::max(values)?);
    if is_nan(min) || is_nan(max) {
        return None;
    }
    if min == zero {
        min = -zero;
    }
    if max == zero {
        max = zero;
    }
    Some(Arc::new(PrimitiveArray::<T>::from_iter_values([min, max])))
}

/// A minimum and a maximum, each of at most [`BOUND_BYTES_MAX`] bytes.
fn cut_pair(pair: &ArrayRef) -> ArrayRef {
    if !matches!(pair.data_type(), DataType::Utf8View | DataType::BinaryView) {
        return Arc::clone(pair);
    }
    let (min, max) = (
        truncated(&pair.slice(0, 1), false),
        truncated(&pair.slice(1, 1), true),
    );
    // Two arrays of one type.
    concat(&[min.as_ref(), max.as_ref()]).unwrap_or_else(|_| new_null_array(pair.data_type(), 2))
}

/// The values without the memory of others.
fn own(values: &ArrayRef) -> ArrayRef {
    match values.data_type() {
        DataType::Utf8View => Arc::new(values.as_string_view().gc()),
        DataType::BinaryView => Arc::new(values.as_binary_view().gc()),
        _ => Arc::clone(values),
    }
}

/// Bounds of at most [`BOUND_BYTES_MAX`] bytes; one that cannot be made so is not known.
fn truncated(bounds: &ArrayRef, up: bool) -> ArrayRef {
    match bounds.data_type() {
        DataType::Utf8View => Arc::new(StringViewArray::from_iter(
            bounds
                .as_string_view()
                .iter()
                .map(|bound| cut_text(bound?, up)),
        )),
        DataType::BinaryView => Arc::new(BinaryViewArray::from_iter(
            bounds
                .as_binary_view()
                .iter()
                .map(|bound| cut_bytes(bound?, up)),
        )),
        _ => Arc::clone(bounds),
    }
}

fn cut_text(text: &str, up: bool) -> Option<String> {
    if text.len() <= BOUND_BYTES_MAX {
        return Some(text.to_owned());
    }
    let mut end = BOUND_BYTES_MAX;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut cut = text[..end].to_owned();
    if !up {
        return Some(cut);
    }
    // The least text above all that begin like this one: its last character that can be raised is.
    while let Some(last) = cut.pop() {
        // The surrogates are no characters: what comes after the last before them is behind them.
        let next = if last == '\u{d7ff}' {
            Some('\u{e000}')
        } else {
            char::from_u32(last as u32 + 1)
        };
        if let Some(next) = next {
            cut.push(next);
            return Some(cut);
        }
    }
    None
}

fn cut_bytes(bytes: &[u8], up: bool) -> Option<Vec<u8>> {
    if bytes.len() <= BOUND_BYTES_MAX {
        return Some(bytes.to_vec());
    }
    let mut cut = bytes[..BOUND_BYTES_MAX].to_vec();
    if !up {
        return Some(cut);
    }
    while let Some(last) = cut.pop() {
        if last < u8::MAX {
            cut.push(last + 1);
            return Some(cut);
        }
    }
    None
}
