//! How many distinct values there are, roughly and mergeable: HyperLogLog.
//!
//! 1024 registers, so a standard error of 3.3 %. Hashes are made of one step,
//! `fold(a, b)`: the exclusive or of both halves of the 128-bit product of `a` and `b`.
//!
//! - An integer, widened to 128 bits with its sign: `fold(fold(low ^ K0, high ^ K1), K2)`. Floats
//!   count by their bits, booleans as 0 and 1.
//! - A string or binary: `fold(state, K2)`, where `state` begins as `length ^ K0`, and a step is
//!   `state = fold(state ^ a, K1 ^ b)`. From 16 bytes on there is a step for the two words,
//!   little-endian, of each 16 bytes but the last ones, and one for those of the last 16 bytes,
//!   which may overlap the ones before. Of 8 to 15 bytes there is one for the first and the last
//!   word. Of fewer there is one for the bytes as a number, the first one uppermost, and zero.
//!
//! K0 is 0x9e3779b97f4a7c15, K1 0xbf58476d1ce4e5b9, K2 0x94d049bb133111eb.
//!
//! The upper ten bits of the hash name the register; it keeps the largest count of leading zeros,
//! plus one, of the other 54. Hashes do not depend on the width of a type, so that sketches of
//! files with different integer widths merge. Nulls do not count.
//!
//! The estimate is that of Ertl, "New cardinality estimation algorithms for HyperLogLog sketches"
//! (2017), which needs no correction for small or large numbers.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{ArrowNativeType, DataType, i256};

/// Registers of a sketch.
pub const REGISTERS: usize = 1 << REGISTER_BITS;
const REGISTER_BITS: u32 = 10;
/// Largest value of a register: leading zeros of 54 bits, plus one.
const RANK_MAX: u8 = 64 - REGISTER_BITS as u8 + 1;

/// The registers of a HyperLogLog.
#[derive(Clone, PartialEq, Eq)]
pub struct Sketch {
    registers: Box<[u8; REGISTERS]>,
}

impl std::fmt::Debug for Sketch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sketch(about {})", self.estimate())
    }
}

impl Default for Sketch {
    fn default() -> Self {
        Self {
            registers: Box::new([0; REGISTERS]),
        }
    }
}

impl Sketch {
    /// Whether values of this type can be counted.
    pub fn supports(data_type: &DataType) -> bool {
        use DataType::*;
        data_type.is_numeric()
            || data_type.is_temporal()
            || matches!(
                data_type,
                Boolean
                    | Utf8
                    | LargeUtf8
                    | Utf8View
                    | Binary
                    | LargeBinary
                    | BinaryView
                    | FixedSizeBinary(_)
            )
    }

    /// Counts the values of an array; of types that cannot be counted, nothing.
    pub fn add(&mut self, array: &ArrayRef) {
        use DataType::*;
        match array.data_type() {
            Boolean => {
                for value in array.as_boolean().iter().flatten() {
                    self.add_hash(hash(u64::from(value).into()));
                }
            }
            Utf8View => self.add_all(array.as_string_view().iter().map(|v| v.map(str::as_bytes))),
            BinaryView => self.add_all(array.as_binary_view().iter()),
            Utf8 => self.add_all(
                array
                    .as_string::<i32>()
                    .iter()
                    .map(|v| v.map(str::as_bytes)),
            ),
            LargeUtf8 => self.add_all(
                array
                    .as_string::<i64>()
                    .iter()
                    .map(|v| v.map(str::as_bytes)),
            ),
            Binary => self.add_all(array.as_binary::<i32>().iter()),
            LargeBinary => self.add_all(array.as_binary::<i64>().iter()),
            FixedSizeBinary(_) => self.add_all(array.as_fixed_size_binary().iter()),
            UInt8 => self.add_words(array, |v: u8| hash(v.into())),
            UInt16 | Float16 => self.add_words(array, |v: u16| hash(v.into())),
            UInt32 | Float32 => self.add_words(array, |v: u32| hash(v.into())),
            UInt64 | Float64 => self.add_words(array, |v: u64| hash(v.into())),
            other if !Self::supports(other) => {}
            other => match other.primitive_width() {
                Some(1) => self.add_words(array, |v: i8| hash(v.into())),
                Some(2) => self.add_words(array, |v: i16| hash(v.into())),
                Some(4) => self.add_words(array, |v: i32| hash(v.into())),
                Some(8) => self.add_words(array, |v: i64| hash(v.into())),
                Some(16) => self.add_words(array, hash),
                Some(32) => self.add_words(array, hash_wide),
                _ => {}
            },
        }
    }

    fn add_words<N: ArrowNativeType>(&mut self, array: &ArrayRef, hash: impl Fn(N) -> u64) {
        let data = array.to_data();
        let values = &data.buffer::<N>(0)[..data.len()];
        match data.nulls().filter(|nulls| nulls.null_count() > 0) {
            None => {
                for value in values {
                    self.add_hash(hash(*value));
                }
            }
            Some(nulls) => {
                for at in nulls.valid_indices() {
                    self.add_hash(hash(values[at]));
                }
            }
        }
    }

    fn add_all<'a>(&mut self, values: impl Iterator<Item = Option<&'a [u8]>>) {
        for value in values.flatten() {
            self.add_bytes(value);
        }
    }

    /// Counts one string or binary.
    pub(crate) fn add_bytes(&mut self, value: &[u8]) {
        self.add_hash(hash_bytes(value));
    }

    /// Counts a value by its hash.
    #[inline]
    pub(crate) fn add_hash(&mut self, hash: u64) {
        let register = (hash >> (64 - REGISTER_BITS)) as usize;
        // The bit set behind the hash bounds the count of zeros.
        let rest = (hash << REGISTER_BITS) | (1 << (REGISTER_BITS - 1));
        let rank = rest.leading_zeros() as u8 + 1;
        if rank > self.registers[register] {
            self.registers[register] = rank;
        }
    }

    /// Adds what `other` has counted.
    pub fn merge(&mut self, other: &Sketch) {
        for (mine, other) in self.registers.iter_mut().zip(other.registers.iter()) {
            *mine = (*mine).max(*other);
        }
    }

    /// How many distinct values were counted, within about 3 %.
    pub fn estimate(&self) -> u64 {
        let most = RANK_MAX as usize;
        let mut with_rank = [0u32; RANK_MAX as usize + 1];
        for register in self.registers.iter() {
            with_rank[(*register).min(RANK_MAX) as usize] += 1;
        }
        let all = REGISTERS as f64;
        if with_rank[0] == REGISTERS as u32 {
            return 0;
        }
        let mut sum = all * tau(1.0 - f64::from(with_rank[most]) / all);
        for count in with_rank[1..most].iter().rev() {
            sum = 0.5 * (sum + f64::from(*count));
        }
        sum += all * sigma(f64::from(with_rank[0]) / all);
        let alpha = 0.5 / std::f64::consts::LN_2;
        (alpha * all * all / sum).round() as u64
    }

    /// The registers, a byte each.
    pub fn to_bytes(&self) -> &[u8; REGISTERS] {
        &self.registers
    }

    /// A sketch from its registers; ranks that no hash has are taken for the largest one.
    pub fn from_bytes(registers: &[u8; REGISTERS]) -> Self {
        Self {
            registers: Box::new(registers.map(|rank| rank.min(RANK_MAX))),
        }
    }

    /// Registers that are not zero, by their number.
    pub(crate) fn used(&self) -> impl Iterator<Item = (u16, u8)> {
        let registers = self.registers.iter().enumerate();
        registers
            .filter(|(_, rank)| **rank > 0)
            .map(|(at, rank)| (at as u16, *rank))
    }

    /// Sets one register; a number that is none changes nothing.
    pub(crate) fn set(&mut self, register: u16, rank: u8) {
        if let Some(place) = self.registers.get_mut(usize::from(register)) {
            *place = rank.min(RANK_MAX);
        }
    }
}

fn sigma(mut x: f64) -> f64 {
    let mut y = 1.0;
    let mut z = x;
    loop {
        x *= x;
        let before = z;
        z += x * y;
        y += y;
        if z == before || !z.is_finite() {
            return z;
        }
    }
}

fn tau(mut x: f64) -> f64 {
    if x == 0.0 || x == 1.0 {
        return 0.0;
    }
    let mut y = 1.0;
    let mut z = 1.0 - x;
    loop {
        x = x.sqrt();
        let before = z;
        y *= 0.5;
        z -= (1.0 - x).powi(2) * y;
        if z == before {
            return z / 3.0;
        }
    }
}

const K0: u64 = 0x9e37_79b9_7f4a_7c15;
const K1: u64 = 0xbf58_476d_1ce4_e5b9;
const K2: u64 = 0x94d0_49bb_1331_11eb;

#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// The hash of an integer.
#[inline(always)]
pub(crate) fn hash(value: i128) -> u64 {
    fold(fold(value as u64 ^ K0, (value >> 64) as u64 ^ K1), K2)
}

/// The hash of a string or binary.
#[inline]
pub(crate) fn hash_bytes(bytes: &[u8]) -> u64 {
    let step = |state: u64, bytes: &[u8; 16]| {
        let word = u128::from_le_bytes(*bytes);
        fold(state ^ word as u64, K1 ^ (word >> 64) as u64)
    };
    let state = bytes.len() as u64 ^ K0;
    let state = match (bytes.first_chunk::<8>(), bytes.last_chunk::<16>()) {
        (_, Some(last)) => {
            let whole = bytes[..bytes.len() - 1].as_chunks::<16>().0;
            step(whole.iter().fold(state, step), last)
        }
        (Some(first), None) => {
            let last = bytes.last_chunk().copied().unwrap_or_default();
            fold(
                state ^ u64::from_le_bytes(*first),
                K1 ^ u64::from_le_bytes(last),
            )
        }
        (None, None) => {
            let word = bytes
                .iter()
                .fold(0, |word, byte| word << 8 | u64::from(*byte));
            fold(state ^ word, K1)
        }
    };
    fold(state, K2)
}

fn hash_wide(value: i256) -> u64 {
    match value.to_i128() {
        Some(narrow) => hash(narrow),
        None => {
            let (low, high) = value.to_parts();
            hash(low as i128) ^ hash(high).rotate_left(32)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::*;

    use super::*;

    fn sketch(array: ArrayRef) -> Sketch {
        let mut sketch = Sketch::default();
        sketch.add(&array);
        sketch
    }

    #[test]
    fn estimates_are_within_four_standard_errors() {
        for distinct in [0i64, 1, 2, 7, 100, 1000, 3000, 10_000, 500_000] {
            let values = Int64Array::from_iter_values((0..distinct).chain(0..distinct));
            let found = sketch(Arc::new(values)).estimate() as f64;
            let off = (found - distinct as f64).abs();
            assert!(off <= 0.133 * distinct as f64, "{found} for {distinct}");
        }
    }

    #[test]
    fn merging_is_counting_together() {
        let low: ArrayRef = Arc::new(Int64Array::from_iter_values(0..6000));
        let high: ArrayRef = Arc::new(Int64Array::from_iter_values(4000..10_000));
        let mut merged = sketch(Arc::clone(&low));
        merged.merge(&sketch(Arc::clone(&high)));
        let mut both = Sketch::default();
        both.add(&low);
        both.add(&high);
        assert_eq!(merged, both);
        assert_eq!(Sketch::from_bytes(merged.to_bytes()), merged);
    }

    #[test]
    fn the_width_of_a_type_does_not_matter() {
        let narrow: ArrayRef = Arc::new(Int8Array::from(vec![Some(-3), None, Some(9)]));
        let wide: ArrayRef = Arc::new(Decimal256Array::from(vec![
            Some(i256::from_i128(-3)),
            Some(i256::from_i128(9)),
        ]));
        assert_eq!(sketch(narrow), sketch(wide));
    }
}
