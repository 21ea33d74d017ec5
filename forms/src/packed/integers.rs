//! Integers, and everything that is one inside: dates, times, durations, decimals.
//!
//! Wrapping arithmetic in the width of the type yields the same bits for signed and unsigned
//! types, so that reading knows widths only.

use arrow::array::{Array, ArrayData, ArrayRef, make_array};
use arrow::buffer::{Buffer, NullBuffer};
use arrow::datatypes::{ArrowNativeType, DataType, i256};

use super::bits::{Scratch, Stream, Target};
use super::{Inner, Parts};
use crate::Result;
use crate::error::corrupt;

/// How an integer type is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    W8,
    W16,
    W32,
    W64,
    W128,
    W256,
}

/// The width of a type whose values are integers; `None` of any other type.
pub(crate) fn width(data_type: &DataType) -> Option<Width> {
    use DataType::*;
    Some(match data_type {
        Int8 | UInt8 => Width::W8,
        Int16 | UInt16 => Width::W16,
        Int32 | UInt32 | Date32 | Time32(_) | Decimal32(_, _) => Width::W32,
        Int64 | UInt64 | Date64 | Time64(_) | Timestamp(_, _) | Duration(_) | Decimal64(_, _) => {
            Width::W64
        }
        Decimal128(_, _) => Width::W128,
        Decimal256(_, _) => Width::W256,
        _ => return None,
    })
}

/// Whether a type's values are integers without a sign.
pub(super) fn is_unsigned(data_type: &DataType) -> bool {
    use DataType::*;
    matches!(data_type, UInt8 | UInt16 | UInt32 | UInt64)
}

/// The values of a block, all or those of some rows, ascending.
pub(super) fn decode(
    chunk: &Inner,
    parts: &Parts,
    rows: Option<&[u32]>,
    scratch: &mut Scratch,
) -> Result<ArrayRef> {
    let stream = Stream::parse(&parts.payload, parts.rows)?;
    let base = chunk.base;
    let values = match width(&chunk.data_type) {
        Some(Width::W8) => Buffer::from_vec(read(&stream, rows, base as i8, scratch)?),
        Some(Width::W16) => Buffer::from_vec(read(&stream, rows, base as i16, scratch)?),
        Some(Width::W32) => Buffer::from_vec(read(&stream, rows, base as i32, scratch)?),
        Some(Width::W64) => Buffer::from_vec(read(&stream, rows, base as i64, scratch)?),
        Some(Width::W128) => Buffer::from_vec(read(&stream, rows, base, scratch)?),
        Some(Width::W256) => {
            let narrow = read(&stream, rows, base, scratch)?;
            Buffer::from_vec(narrow.into_iter().map(i256::from_i128).collect::<Vec<_>>())
        }
        None => return Err(corrupt("encoding", "integers", "one for the type")),
    };
    let length = rows.map_or(parts.rows, <[u32]>::len);
    array(&chunk.data_type, length, values, parts.nulls(rows))
}

fn read<O: Target>(
    stream: &Stream<'_>,
    rows: Option<&[u32]>,
    add: O,
    scratch: &mut Scratch,
) -> Result<Vec<O>> {
    let mut out = vec![];
    match rows {
        None => stream.decode(add, scratch, &mut out)?,
        Some(rows) => stream.gather(rows, add, scratch, &mut out)?,
    }
    Ok(out)
}

/// An array of a type whose values are of one fixed width.
pub(super) fn array(
    data_type: &DataType,
    rows: usize,
    values: Buffer,
    nulls: Option<NullBuffer>,
) -> Result<ArrayRef> {
    let width = data_type.primitive_width().unwrap_or(0);
    if values.len() != rows * width || nulls.as_ref().is_some_and(|nulls| nulls.len() != rows) {
        return Err(corrupt("values", values.len(), rows * width));
    }
    let builder = ArrayData::builder(data_type.clone())
        .len(rows)
        .add_buffer(values)
        .nulls(nulls);
    // SAFETY: just checked that there are as many values and validity bits as rows; the values are
    // numbers, valid for any bits, in a buffer that was allocated for numbers of their width.
    Ok(make_array(unsafe { builder.build_unchecked() }))
}

/// The least and the largest value of some arrays, nulls aside; `None` where there is none, or a
/// value has more than 128 bits.
pub(crate) fn range(blocks: &[ArrayRef]) -> Option<(i128, i128)> {
    let mut range: Option<(i128, i128)> = None;
    for block in blocks {
        if block.null_count() == block.len() {
            continue;
        }
        let (low, high) = block_range(block)?;
        range = Some(match range {
            None => (low, high),
            Some((least, largest)) => (least.min(low), largest.max(high)),
        });
    }
    range
}

fn block_range(block: &ArrayRef) -> Option<(i128, i128)> {
    let data_type = block.data_type();
    let unsigned = is_unsigned(data_type);
    match (width(data_type)?, unsigned) {
        (Width::W8, false) => extremes(block, |v: i8| v.into()),
        (Width::W8, true) => extremes(block, |v: u8| v.into()),
        (Width::W16, false) => extremes(block, |v: i16| v.into()),
        (Width::W16, true) => extremes(block, |v: u16| v.into()),
        (Width::W32, false) => extremes(block, |v: i32| v.into()),
        (Width::W32, true) => extremes(block, |v: u32| v.into()),
        (Width::W64, false) => extremes(block, |v: i64| v.into()),
        (Width::W64, true) => extremes(block, |v: u64| v.into()),
        (Width::W128, _) => extremes(block, |v: i128| v),
        (Width::W256, _) => {
            let (low, high) = native_extremes::<i256>(block)?;
            Some((low.to_i128()?, high.to_i128()?))
        }
    }
}

fn extremes<N: ArrowNativeType + Ord>(
    block: &ArrayRef,
    widen: impl Fn(N) -> i128,
) -> Option<(i128, i128)> {
    let (low, high) = native_extremes::<N>(block)?;
    Some((widen(low), widen(high)))
}

fn native_extremes<N: ArrowNativeType + Ord>(block: &ArrayRef) -> Option<(N, N)> {
    let data = block.to_data();
    let values = &data.buffer::<N>(0)[..data.len()];
    match data.nulls().filter(|nulls| nulls.null_count() > 0) {
        None => {
            let low = values.iter().copied().min()?;
            Some((low, values.iter().copied().max()?))
        }
        Some(nulls) => {
            let mut valid = nulls.valid_indices().map(|at| values[at]);
            let first = valid.next()?;
            Some(valid.fold((first, first), |(low, high), v| (low.min(v), high.max(v))))
        }
    }
}

/// The values of a block less `base`; of null rows, that of the valid row before.
///
/// Every value is known to be at least `base`, and less than 2^64 above it.
pub(crate) fn offsets(block: &ArrayRef, base: i128) -> Vec<u64> {
    let data = block.to_data();
    let small = base as u64;
    let mut out = match width(block.data_type()) {
        Some(Width::W8) => narrow(
            &data,
            |v: i8| v as u64,
            small,
            is_unsigned(block.data_type()),
        ),
        Some(Width::W16) => narrow(
            &data,
            |v: i16| v as u64,
            small,
            is_unsigned(block.data_type()),
        ),
        Some(Width::W32) => narrow(
            &data,
            |v: i32| v as u64,
            small,
            is_unsigned(block.data_type()),
        ),
        Some(Width::W64) => narrow(&data, |v: i64| v as u64, small, false),
        Some(Width::W128) => narrow(&data, |v: i128| v as u64, small, false),
        Some(Width::W256) => narrow(&data, |v: i256| v.to_parts().0 as u64, small, false),
        None => vec![0; block.len()],
    };
    if let Some(nulls) = data.nulls().filter(|nulls| nulls.null_count() > 0) {
        let mut before = nulls.valid_indices().next().map_or(0, |first| out[first]);
        for (at, value) in out.iter_mut().enumerate() {
            if nulls.is_null(at) {
                *value = before;
            }
            before = *value;
        }
    }
    out
}

/// The differences to the base, of which only the lower 64 bits count.
fn narrow<N: ArrowNativeType>(
    data: &ArrayData,
    low_bits: impl Fn(N) -> u64,
    base: u64,
    unsigned: bool,
) -> Vec<u64> {
    let values = &data.buffer::<N>(0)[..data.len()];
    let mask = match unsigned {
        true => u64::MAX >> (64 - 8 * size_of::<N>()),
        false => u64::MAX,
    };
    let values = values
        .iter()
        .map(|v| (low_bits(*v) & mask).wrapping_sub(base));
    values.collect()
}

/// How two of the [`words`] of a type order.
pub(super) fn order(data_type: &DataType) -> impl Fn(&i128, &i128) -> std::cmp::Ordering {
    use DataType::*;
    // Negative floats are a sign and a magnitude: the larger the bits, the smaller the value.
    let sign = match data_type {
        Float32 => 1i128 << 31,
        Float64 => 1i128 << 63,
        _ => 0,
    };
    let place = move |word: i128| match word & sign {
        0 => word,
        _ => -1 - (word ^ sign),
    };
    move |a, b| place(*a).cmp(&place(*b))
}

/// The values of an array of at most 128 bits each, as integers: of floats their bits.
pub(super) fn words(array: &ArrayRef) -> Vec<i128> {
    use DataType::*;
    fn all<N: ArrowNativeType>(array: &ArrayRef, widen: impl Fn(N) -> i128) -> Vec<i128> {
        let data = array.to_data();
        data.buffer::<N>(0)[..data.len()]
            .iter()
            .map(|v| widen(*v))
            .collect()
    }
    match (array.data_type(), array.data_type().primitive_width()) {
        (UInt8, _) => all(array, |v: u8| v.into()),
        (UInt16 | Float16, _) => all(array, |v: u16| v.into()),
        (UInt32 | Float32, _) => all(array, |v: u32| v.into()),
        (UInt64 | Float64, _) => all(array, |v: u64| v.into()),
        (_, Some(1)) => all(array, |v: i8| v.into()),
        (_, Some(2)) => all(array, |v: i16| v.into()),
        (_, Some(4)) => all(array, |v: i32| v.into()),
        (_, Some(8)) => all(array, |v: i64| v.into()),
        (_, Some(16)) => all(array, |v: i128| v),
        _ => vec![],
    }
}
