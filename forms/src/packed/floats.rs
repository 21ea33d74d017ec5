//! Floats that are decimal numbers inside, after ALP (Afroozeh, Kuffo, Boncz: "ALP: Adaptive
//! Lossless floating-Point Compression", 2023).
//!
//! A value is stored as the integer `round(value * 10^e / 10^f)` where `integer * 10^f / 10^e` is
//! the very same value; where it is not, the value is an exception. A block:
//!
//! ```text
//! offset  size  field
//!      0     1  e
//!      1     1  f
//!      2     2  reserved, zero
//!      4     4  exceptions
//!      8     8  base of the integers, signed
//!     16        a stream: the integers less the base
//!      …        the exceptions: their values, 8 or 4 bytes, padded to 8; their rows, u16, padded to 8
//! ```

use arrow::array::ArrayRef;
use arrow::buffer::Buffer;
use arrow::datatypes::{ArrowNativeType, DataType, ToByteSlice};

use super::bits::{self, Allow, Scratch, Stream};
use super::{Parts, integers};
use crate::Result;
use crate::bytes::{pad, part, read_u32, read_u64, typed};
use crate::error::corrupt;

const HEADER_BYTES: usize = 16;
/// Values looked at to choose the exponents.
const SAMPLE: usize = 512;
/// The share of exceptions, one in so many, from which on values are not decimal numbers.
const EXCEPTIONS_SHARE: usize = 10;

/// Powers of ten that doubles hold exactly, up to the largest exponent.
const POWERS: [f64; 19] = [
    1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16,
    1e17, 1e18,
];
const NEGATIVE_POWERS: [f64; 19] = [
    1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11, 1e-12, 1e-13, 1e-14,
    1e-15, 1e-16, 1e-17, 1e-18,
];

/// The two powers of ten of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exponents {
    e: u8,
    f: u8,
}

/// Floats of either width.
trait Float: ArrowNativeType + ToByteSlice {
    /// Largest exponent.
    const E_MAX: u8;
    /// The integer of a value, if it is one below 2^53 and yields the very same value again.
    fn encode(self, exponents: Exponents) -> Option<i64>;
    fn decode(integer: i64, exponents: Exponents) -> Self;
}

/// Beyond this not every integer has a double.
const INTEGER_MAX: f64 = (1u64 << 53) as f64;

impl Float for f64 {
    const E_MAX: u8 = 18;

    #[inline(always)]
    fn encode(self, exponents: Exponents) -> Option<i64> {
        let scaled = self * POWERS[exponents.e as usize] * NEGATIVE_POWERS[exponents.f as usize];
        let rounded = scaled.round();
        if rounded.is_nan() || rounded.abs() >= INTEGER_MAX {
            return None;
        }
        let integer = rounded as i64;
        (f64::decode(integer, exponents).to_bits() == self.to_bits()).then_some(integer)
    }

    #[inline(always)]
    fn decode(integer: i64, exponents: Exponents) -> f64 {
        integer as f64 * POWERS[exponents.f as usize] * NEGATIVE_POWERS[exponents.e as usize]
    }
}

impl Float for f32 {
    const E_MAX: u8 = 10;

    #[inline(always)]
    fn encode(self, exponents: Exponents) -> Option<i64> {
        let scaled =
            f64::from(self) * POWERS[exponents.e as usize] * NEGATIVE_POWERS[exponents.f as usize];
        let rounded = scaled.round();
        if rounded.is_nan() || rounded.abs() >= INTEGER_MAX {
            return None;
        }
        let integer = rounded as i64;
        (f32::decode(integer, exponents).to_bits() == self.to_bits()).then_some(integer)
    }

    #[inline(always)]
    fn decode(integer: i64, exponents: Exponents) -> f32 {
        f64::decode(integer, exponents) as f32
    }
}

/// The exponents that suit most values of these arrays; `None` where too many are exceptions.
pub(super) fn exponents(blocks: &[ArrayRef], data_type: &DataType) -> Option<Exponents> {
    match data_type {
        DataType::Float64 => exponents_of::<f64>(blocks),
        DataType::Float32 => exponents_of::<f32>(blocks),
        _ => None,
    }
}

fn exponents_of<F: Float>(blocks: &[ArrayRef]) -> Option<Exponents> {
    let rows: usize = blocks.iter().map(|block| block.len()).sum();
    let step = (rows / SAMPLE).max(1);
    let mut sample: Vec<F> = Vec::with_capacity(SAMPLE + blocks.len());
    for block in blocks {
        let data = block.to_data();
        let values = &data.buffer::<F>(0)[..data.len()];
        let valid = (0..data.len())
            .step_by(step)
            .filter(|at| data.is_valid(*at));
        sample.extend(valid.map(|at| values[at]));
    }
    if sample.is_empty() {
        return None;
    }
    let mut best: Option<(usize, Exponents)> = None;
    for e in 0..=F::E_MAX {
        for f in 0..=e {
            let exponents = Exponents { e, f };
            let (mut low, mut high, mut exceptions) = (i64::MAX, i64::MIN, 0);
            for value in &sample {
                match value.encode(exponents) {
                    Some(integer) => (low, high) = (low.min(integer), high.max(integer)),
                    None => exceptions += 1,
                }
                if exceptions * EXCEPTIONS_SHARE > sample.len() {
                    break;
                }
            }
            if exceptions * EXCEPTIONS_SHARE > sample.len() {
                continue;
            }
            let width = 64 - high.wrapping_sub(low).leading_zeros() as usize;
            let bits = width * sample.len() + exceptions * 8 * (size_of::<F>() + 2);
            if best.is_none_or(|(fewest, _)| bits < fewest) {
                best = Some((bits, exponents));
            }
        }
    }
    // A sixth saved is worth the multiplications.
    best.filter(|(bits, _)| bits * 6 <= sample.len() * size_of::<F>() * 8 * 5)
        .map(|(_, exponents)| exponents)
}

/// Appends a block.
pub(super) fn encode(block: &ArrayRef, exponents: Exponents, out: &mut Vec<u8>) {
    match block.data_type() {
        DataType::Float32 => encode_as::<f32>(block, exponents, out),
        _ => encode_as::<f64>(block, exponents, out),
    }
}

fn encode_as<F: Float>(block: &ArrayRef, exponents: Exponents, out: &mut Vec<u8>) {
    let data = block.to_data();
    let values = &data.buffer::<F>(0)[..data.len()];
    let mut integers = Vec::with_capacity(values.len());
    let mut exceptions: Vec<(u16, F)> = vec![];
    let mut before = None;
    for (row, value) in values.iter().enumerate() {
        let integer = match data.is_valid(row) {
            true => value.encode(exponents),
            false => before,
        };
        if integer.is_none() && data.is_valid(row) {
            exceptions.push((row as u16, *value));
        }
        before = integer.or(before);
        integers.push(before.unwrap_or(0));
    }
    let base = integers.iter().copied().min().unwrap_or(0);
    out.extend_from_slice(&[exponents.e, exponents.f, 0, 0]);
    out.extend_from_slice(&(exceptions.len() as u32).to_le_bytes());
    out.extend_from_slice(&base.to_le_bytes());
    let offsets: Vec<u64> = integers
        .iter()
        .map(|i| i.wrapping_sub(base) as u64)
        .collect();
    bits::encode(&offsets, Allow::All, out);
    let (rows, values): (Vec<u16>, Vec<F>) = exceptions.into_iter().unzip();
    out.extend_from_slice(values.to_byte_slice());
    pad(out, 8);
    out.extend_from_slice(rows.to_byte_slice());
    pad(out, 8);
}

/// The values of a block, all or those of some rows.
pub(super) fn decode(
    data_type: &DataType,
    parts: &Parts,
    rows: Option<&[u32]>,
    scratch: &mut Scratch,
) -> Result<ArrayRef> {
    let length = rows.map_or(parts.rows, <[u32]>::len);
    let values = match data_type {
        DataType::Float32 => decode_as::<f32>(parts, rows, scratch)?,
        _ => decode_as::<f64>(parts, rows, scratch)?,
    };
    integers::array(data_type, length, values, parts.nulls(rows))
}

fn decode_as<F: Float>(
    parts: &Parts,
    rows: Option<&[u32]>,
    scratch: &mut Scratch,
) -> Result<Buffer> {
    let bytes = &parts.payload;
    part(bytes, "floats", 0, HEADER_BYTES)?;
    let exponents = Exponents {
        e: bytes[0],
        f: bytes[1],
    };
    if exponents.e > F::E_MAX || exponents.f > exponents.e {
        return Err(corrupt(
            "exponents",
            format!("{exponents:?}"),
            format!("at most {}", F::E_MAX),
        ));
    }
    let count = read_u32(bytes, 4) as usize;
    let base = read_u64(bytes, 8) as i64;
    let stream = Stream::parse(&bytes[HEADER_BYTES..], parts.rows)?;
    let mut integers: Vec<i64> = vec![];
    match rows {
        None => stream.decode(base, scratch, &mut integers)?,
        Some(rows) => stream.gather(rows, base, scratch, &mut integers)?,
    }
    let mut values: Vec<F> = integers.iter().map(|i| F::decode(*i, exponents)).collect();
    let at = HEADER_BYTES + stream.length;
    let floats = part(
        bytes,
        "exceptions",
        at,
        count.saturating_mul(size_of::<F>()),
    )?;
    let at = at + floats.len().next_multiple_of(8);
    let places = part(bytes, "exceptions", at, count.saturating_mul(2))?;
    let floats = typed::<F>(floats, "exceptions")?;
    let places = typed::<u16>(places, "exceptions")?;
    for (place, value) in places.iter().zip(floats) {
        let row = usize::from(*place);
        let at = match rows {
            None => Some(row),
            Some(rows) => rows.binary_search(&(row as u32)).ok(),
        };
        if let Some(slot) = at.and_then(|at| values.get_mut(at)) {
            *slot = *value;
        }
    }
    Ok(Buffer::from_vec(values))
}
