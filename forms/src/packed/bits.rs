//! Streams of integers: frame of reference and bit-packing, differences, runs.
//!
//! A stream holds up to 8192 unsigned integers of 64 bits, in vectors of 1024:
//!
//! ```text
//! offset  size  field
//!      0     1  mode: 0 packed, 1 differences, 2 runs
//!      1     3  reserved, zero
//!      4     4  values
//!      8     8  base
//! ```
//!
//! In the modes 0 and 1, for each vector:
//!
//! ```text
//!      0     4  reference: what is added to the base
//!      4     2  exceptions
//!      6     1  width in bits, 0 to 64
//!      7     1  reserved, zero
//! ```
//!
//! then, in mode 1, for each vector its start, u64. Then for each vector 128 bytes a bit of its
//! width, in the order of FastLanes for the narrowest of u8, u16, u32 and u64 that holds the
//! width; its exceptions' values, u64, and positions in the vector, u16, ascending, padded to a
//! multiple of 8.
//!
//! In mode 0 a value is base + reference + the packed number. In mode 1 that sum is the difference
//! to the value before, the first one's to the vector's start. Sums wrap. An exception stands in
//! place of the packed number at its position. The last vector is filled up with zeros.
//!
//! In mode 2 two streams of mode 0 or 1 follow, of equal length: the runs' values, and their
//! lengths less one.

use fastlanes::BitPacking;

use crate::bytes::{pad, part, read_u32, read_u64, typed};
use crate::error::corrupt;
use crate::{BLOCK_ROWS, Result};

/// Values of one vector, as FastLanes packs them.
pub(crate) const VECTOR: usize = 1024;
/// Vectors of a block.
pub(crate) const VECTORS_MAX: usize = BLOCK_ROWS / VECTOR;

const HEADER_BYTES: usize = 16;
const VECTOR_HEADER_BYTES: usize = 8;
const MODE_PACKED: u8 = 0;
const MODE_DIFFERENCES: u8 = 1;
const MODE_RUNS: u8 = 2;
/// Bytes of an exception.
const EXCEPTION_BYTES: usize = 10;
/// Runs shorter than this on average are not worth the loop that expands them.
const RUN_LENGTH_MIN: usize = 8;

/// What a stream of values may become, to be read fast enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Allow {
    /// Only bit-packing, where any value can be had without the ones before.
    Packed,
    /// Everything.
    All,
}

/// Appends `values` as a stream, in the mode that takes the fewest bytes.
pub(crate) fn encode(values: &[u64], allow: Allow, out: &mut Vec<u8>) {
    debug_assert!(values.len() <= BLOCK_ROWS);
    let packed = Plan::packed(values);
    if allow == Allow::All && values.len() > VECTOR / 8 {
        let runs = 1 + values.windows(2).filter(|pair| pair[0] != pair[1]).count();
        if runs * RUN_LENGTH_MIN <= values.len() {
            let mut alternative = vec![];
            encode_runs(values, runs, &mut alternative);
            // Expanding runs costs more than unpacking: it has to save a good deal.
            if alternative.len() * 2 < packed.bytes {
                out.extend_from_slice(&alternative);
                return;
            }
        }
        // Sums cost a serial addition a value: worth it for a quarter of the bytes.
        if differences_may_pay(values, &packed) {
            let differences = Plan::differences(values);
            if differences.bytes * 4 < packed.bytes * 3 {
                differences.write(values, out);
                return;
            }
        }
    }
    packed.write(values, out);
}

/// Whether the differences within one vector are narrow enough to look at all of them.
fn differences_may_pay(values: &[u64], packed: &Plan) -> bool {
    let middle = packed.vectors.len() / 2;
    let vector = &values[middle * VECTOR..values.len().min((middle + 1) * VECTOR)];
    let (mut low, mut high) = (i64::MAX, i64::MIN);
    for pair in vector.windows(2) {
        let step = pair[1].wrapping_sub(pair[0]) as i64;
        (low, high) = (low.min(step), high.max(step));
    }
    let width = 64 - (high.wrapping_sub(low) as u64).leading_zeros();
    let found = u32::from(packed.vectors[middle].width);
    // What differences would save by exceptions is not seen, so they need not save all of it here.
    found > 3 && width * 4 <= found * 3 + 8
}

fn encode_runs(values: &[u64], runs: usize, out: &mut Vec<u8>) {
    let mut heads = Vec::with_capacity(runs);
    let mut lengths = Vec::with_capacity(runs);
    for run in values.chunk_by(|a, b| a == b) {
        heads.push(run[0]);
        lengths.push(run.len() as u64 - 1);
    }
    header(MODE_RUNS, values.len(), 0, out);
    for inner in [heads, lengths] {
        let packed = Plan::packed(&inner);
        let differences = Plan::differences(&inner);
        match differences.bytes * 4 < packed.bytes * 3 {
            true => differences.write(&inner, out),
            false => packed.write(&inner, out),
        }
    }
}

fn header(mode: u8, values: usize, base: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(&[mode, 0, 0, 0]);
    out.extend_from_slice(&(values as u32).to_le_bytes());
    out.extend_from_slice(&base.to_le_bytes());
}

/// How a vector will be written.
#[derive(Clone, Copy, Debug, Default)]
struct VectorPlan {
    /// Added to the base, at most `u32::MAX`.
    reference: u64,
    width: u8,
    exceptions: u16,
    start: u64,
}

/// How a stream will be written.
struct Plan {
    differences: bool,
    base: u64,
    vectors: Vec<VectorPlan>,
    bytes: usize,
}

impl Plan {
    fn packed(values: &[u64]) -> Plan {
        let mut lows = [0u64; VECTORS_MAX];
        for (low, vector) in lows.iter_mut().zip(values.chunks(VECTOR)) {
            *low = vector.iter().copied().min().unwrap_or(0);
        }
        let count = values.len().div_ceil(VECTOR);
        let base = lows[..count].iter().copied().min().unwrap_or(0);
        let mut bytes = HEADER_BYTES;
        let vectors = values.chunks(VECTOR).zip(lows);
        let vectors = vectors
            .map(|(vector, low)| {
                let reference = (low - base).min(u64::from(u32::MAX));
                let plan = plan_vector(vector.iter().map(|v| v - base - reference), reference);
                bytes += vector_bytes(plan) + VECTOR_HEADER_BYTES;
                plan
            })
            .collect();
        Plan {
            differences: false,
            base,
            vectors,
            bytes,
        }
    }

    fn differences(values: &[u64]) -> Plan {
        let mut lows = [0i64; VECTORS_MAX];
        for (low, vector) in lows.iter_mut().zip(values.chunks(VECTOR)) {
            let steps = vector.windows(2).map(|p| p[1].wrapping_sub(p[0]) as i64);
            *low = steps.min().unwrap_or(0);
        }
        let count = values.len().div_ceil(VECTOR);
        let base = lows[..count].iter().copied().min().unwrap_or(0);
        let mut bytes = HEADER_BYTES;
        let vectors = values.chunks(VECTOR).zip(lows);
        let vectors = vectors
            .map(|(vector, low)| {
                let reference = (low.wrapping_sub(base) as u64).min(u64::from(u32::MAX));
                let low = (base as u64).wrapping_add(reference);
                let mut plan = plan_vector(steps(vector, low), reference);
                plan.start = vector[0].wrapping_sub(low);
                bytes += vector_bytes(plan) + VECTOR_HEADER_BYTES + 8;
                plan
            })
            .collect();
        Plan {
            differences: true,
            base: base as u64,
            vectors,
            bytes,
        }
    }

    fn write(&self, values: &[u64], out: &mut Vec<u8>) {
        let mode = match self.differences {
            true => MODE_DIFFERENCES,
            false => MODE_PACKED,
        };
        header(mode, values.len(), self.base, out);
        for plan in &self.vectors {
            out.extend_from_slice(&(plan.reference as u32).to_le_bytes());
            out.extend_from_slice(&plan.exceptions.to_le_bytes());
            out.extend_from_slice(&[plan.width, 0]);
        }
        if self.differences {
            for plan in &self.vectors {
                out.extend_from_slice(&plan.start.to_le_bytes());
            }
        }
        for (vector, plan) in values.chunks(VECTOR).zip(&self.vectors) {
            let low = self.base.wrapping_add(plan.reference);
            let mut numbers = [0u64; VECTOR];
            if self.differences {
                fill(&mut numbers, steps(vector, low));
            } else {
                fill(&mut numbers, vector.iter().map(|v| v.wrapping_sub(low)));
            }
            write_vector(&mut numbers, *plan, out);
        }
    }
}

/// The differences of a vector's values, less the least one; of the first one: zero.
fn steps(vector: &[u64], low: u64) -> impl Iterator<Item = u64> + Clone {
    let pairs = vector.windows(2);
    std::iter::once(0).chain(pairs.map(move |p| p[1].wrapping_sub(p[0]).wrapping_sub(low)))
}

fn fill(numbers: &mut [u64; VECTOR], from: impl Iterator<Item = u64>) {
    for (number, value) in numbers.iter_mut().zip(from) {
        *number = value;
    }
}

/// The width that takes the fewest bytes, wider numbers being exceptions.
fn plan_vector(numbers: impl Iterator<Item = u64> + Clone, reference: u64) -> VectorPlan {
    let all = numbers.clone().fold(0, |all, number| all | number);
    let widest = 64 - all.leading_zeros() as usize;
    let mut plan = VectorPlan {
        reference,
        width: widest as u8,
        ..VectorPlan::default()
    };
    // Fewer bits than this cannot pay for exceptions.
    if widest < 4 {
        return plan;
    }
    // As many as have the uppermost bit would be exceptions at least, and 128 bytes a bit is all
    // that they can save: evenly spread numbers are not looked at further.
    let upper = 1u64 << (widest - 1);
    let uppermost = numbers.clone().filter(|number| *number >= upper).count();
    if uppermost * EXCEPTION_BYTES > 128 * widest {
        return plan;
    }
    let mut of_width = [0u32; 65];
    for number in numbers {
        of_width[64 - number.leading_zeros() as usize] += 1;
    }
    let mut wider = 0usize;
    let mut best = 128 * widest;
    for width in (0..widest).rev() {
        wider += of_width[width + 1] as usize;
        let bytes = 128 * width + (wider * EXCEPTION_BYTES).next_multiple_of(8);
        if bytes < best {
            best = bytes;
            plan.width = width as u8;
            plan.exceptions = wider as u16;
        }
        if wider > VECTOR / 8 {
            break;
        }
    }
    plan
}

fn exception_bytes(exceptions: usize) -> usize {
    exceptions * 8 + (exceptions * 2).next_multiple_of(8)
}

fn vector_bytes(plan: VectorPlan) -> usize {
    128 * usize::from(plan.width) + exception_bytes(plan.exceptions.into())
}

fn write_vector(numbers: &mut [u64; VECTOR], plan: VectorPlan, out: &mut Vec<u8>) {
    let width = usize::from(plan.width);
    let mut exceptions: Vec<(u16, u64)> = Vec::with_capacity(plan.exceptions.into());
    if plan.exceptions > 0 {
        for (at, number) in numbers.iter_mut().enumerate() {
            if 64 - number.leading_zeros() as usize > width {
                exceptions.push((at as u16, *number));
                *number = 0;
            }
        }
    }
    debug_assert_eq!(exceptions.len(), usize::from(plan.exceptions));
    match width {
        0 => {}
        1..=8 => pack_as::<u8>(numbers, width, out, |n| n as u8),
        9..=16 => pack_as::<u16>(numbers, width, out, |n| n as u16),
        17..=32 => pack_as::<u32>(numbers, width, out, |n| n as u32),
        _ => pack_as::<u64>(numbers, width, out, |n| n),
    }
    for (_, value) in &exceptions {
        out.extend_from_slice(&value.to_le_bytes());
    }
    for (at, _) in &exceptions {
        out.extend_from_slice(&at.to_le_bytes());
    }
    pad(out, 8);
}

fn pack_as<T: BitPacking + Default + arrow::datatypes::ToByteSlice>(
    numbers: &[u64; VECTOR],
    width: usize,
    out: &mut Vec<u8>,
    narrow: impl Fn(u64) -> T,
) where
    [T]: arrow::datatypes::ToByteSlice,
{
    let mut narrowed = [T::default(); VECTOR];
    for (to, number) in narrowed.iter_mut().zip(numbers) {
        *to = narrow(*number);
    }
    let mut packed = [T::default(); VECTOR];
    let words = 128 * width / size_of::<T>();
    // SAFETY: the input has 1024 values, the output 1024 * width bits; `width` is at most the
    // width of `T`, for which `write_vector` chose it.
    unsafe { T::unchecked_pack(width, &narrowed, &mut packed[..words]) };
    out.extend_from_slice(arrow::datatypes::ToByteSlice::to_byte_slice(
        &packed[..words],
    ));
}

/// A stream found in bytes, its geometry checked.
#[derive(Clone, Debug)]
pub(crate) struct Stream<'a> {
    values: usize,
    kind: Kind<'a>,
    /// Bytes that the stream takes.
    pub(crate) length: usize,
}

#[derive(Clone, Debug)]
// A stream lives on the stack for one block: a box for the common kind would cost each of them.
#[expect(clippy::large_enum_variant)]
enum Kind<'a> {
    Vectors {
        differences: bool,
        vectors: [Vector<'a>; VECTORS_MAX],
    },
    Runs {
        heads: Box<Stream<'a>>,
        lengths: Box<Stream<'a>>,
    },
}

/// One vector of a stream.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Vector<'a> {
    /// Base and reference.
    pub(crate) low: u64,
    start: u64,
    width: u8,
    packed: &'a [u8],
    exception_values: &'a [u64],
    exception_positions: &'a [u16],
}

/// The numbers of a vector before anything is added, in the narrowest type that holds them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Numbers<'a> {
    /// All are zero.
    Zero,
    /// Of up to 8 bits.
    U8(&'a [u8; VECTOR]),
    /// Of up to 16 bits.
    U16(&'a [u16; VECTOR]),
    /// Of up to 32 bits.
    U32(&'a [u32; VECTOR]),
    /// Of up to 64 bits.
    U64(&'a [u64; VECTOR]),
}

/// Memory to unpack one vector to: reused, so that it stays in the processor's cache.
pub(crate) struct Scratch {
    u8s: [u8; VECTOR],
    u16s: [u16; VECTOR],
    u32s: [u32; VECTOR],
    u64s: [u64; VECTOR],
    /// Where the text of each code of a block begins, while it is unpacked.
    pub(super) places: Vec<u32>,
}

impl Scratch {
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self {
            u8s: [0; VECTOR],
            u16s: [0; VECTOR],
            u32s: [0; VECTOR],
            u64s: [0; VECTOR],
            places: vec![],
        })
    }
}

/// An integer that values of a stream are read as, dropping upper bits.
pub(crate) trait Target: Copy + Default {
    /// Whether it has more than the 64 bits that sums of a stream wrap at.
    const WIDER: bool = false;
    fn from_u64(value: u64) -> Self;
    fn wrapping_add(self, other: Self) -> Self;
}

macro_rules! targets {
    ($($t:ty),*) => {$(
        impl Target for $t {
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn wrapping_add(self, other: Self) -> Self {
                <$t>::wrapping_add(self, other)
            }
        }
    )*};
}
targets!(u8, u16, u32, u64, i8, i16, i32, i64);

impl Target for i128 {
    const WIDER: bool = true;
    #[inline(always)]
    fn from_u64(value: u64) -> Self {
        i128::from(value)
    }
    #[inline(always)]
    fn wrapping_add(self, other: Self) -> Self {
        i128::wrapping_add(self, other)
    }
}

impl<'a> Vector<'a> {
    /// Position and number of each exception.
    pub(crate) fn exceptions(&self) -> impl Iterator<Item = (usize, u64)> {
        let positions = self.exception_positions.iter().map(|at| usize::from(*at));
        positions.zip(self.exception_values.iter().copied())
    }

    /// Unpacks the numbers, exceptions aside.
    pub(crate) fn unpack<'s>(&self, scratch: &'s mut Scratch) -> Result<Numbers<'s>> {
        Ok(match self.width {
            0 => Numbers::Zero,
            1..=8 => Numbers::U8(self.unpack_as(&mut scratch.u8s)?),
            9..=16 => Numbers::U16(self.unpack_as(&mut scratch.u16s)?),
            17..=32 => Numbers::U32(self.unpack_as(&mut scratch.u32s)?),
            _ => Numbers::U64(self.unpack_as(&mut scratch.u64s)?),
        })
    }

    fn unpack_as<'s, T: BitPacking + arrow::datatypes::ArrowNativeType>(
        &self,
        to: &'s mut [T; VECTOR],
    ) -> Result<&'s [T; VECTOR]> {
        let words = typed::<T>(self.packed, "packed numbers")?;
        let width = usize::from(self.width);
        assert!(width <= T::T && words.len() == 128 * width / size_of::<T>());
        // SAFETY: just asserted what the function asks for; the output has 1024 values by its type.
        unsafe { T::unchecked_unpack(width, words, to) };
        Ok(to)
    }

    /// The number at `at` alone, exceptions aside.
    fn one(&self, at: usize) -> Result<u64> {
        Ok(match self.width {
            0 => 0,
            1..=8 => u64::from(self.one_as::<u8>(at)?),
            9..=16 => u64::from(self.one_as::<u16>(at)?),
            17..=32 => u64::from(self.one_as::<u32>(at)?),
            _ => self.one_as::<u64>(at)?,
        })
    }

    fn one_as<T: BitPacking + arrow::datatypes::ArrowNativeType>(&self, at: usize) -> Result<T> {
        let words = typed::<T>(self.packed, "packed numbers")?;
        let width = usize::from(self.width);
        assert!(at < VECTOR && width <= T::T && words.len() == 128 * width / size_of::<T>());
        // SAFETY: just asserted what the function asks for.
        Ok(unsafe { T::unchecked_unpack_single(width, words, at) })
    }

    /// The values, base added, to `out`, which has at most the vector's length.
    fn decode<O: Target>(&self, add: O, scratch: &mut Scratch, out: &mut [O]) -> Result<()> {
        let add = add.wrapping_add(O::from_u64(self.low));
        match self.unpack(scratch)? {
            Numbers::Zero => out.fill(add),
            Numbers::U8(numbers) => widen(numbers, add, out),
            Numbers::U16(numbers) => widen(numbers, add, out),
            Numbers::U32(numbers) => widen(numbers, add, out),
            Numbers::U64(numbers) => widen(numbers, add, out),
        }
        for (at, value) in self.exceptions() {
            if let Some(place) = out.get_mut(at) {
                *place = add.wrapping_add(O::from_u64(value));
            }
        }
        Ok(())
    }

    /// The values of a vector of differences.
    fn decode_sums<O: Target>(&self, add: O, scratch: &mut Scratch, out: &mut [O]) -> Result<()> {
        if O::WIDER {
            let mut narrow = [0u64; VECTOR];
            let narrow = &mut narrow[..out.len().min(VECTOR)];
            self.decode_sums(0, scratch, narrow)?;
            for (out, value) in out.iter_mut().zip(narrow) {
                *out = add.wrapping_add(O::from_u64(*value));
            }
            return Ok(());
        }
        // Sums wrap alike in any width of up to 64 bits.
        self.decode(O::default(), scratch, out)?;
        let mut sum = add.wrapping_add(O::from_u64(self.start));
        for value in out {
            sum = sum.wrapping_add(*value);
            *value = sum;
        }
        Ok(())
    }
}

#[inline]
fn widen<N: Copy + Into<u64>, O: Target>(numbers: &[N; VECTOR], add: O, out: &mut [O]) {
    if let Ok(out) = <&mut [O; VECTOR]>::try_from(&mut *out) {
        for (out, number) in out.iter_mut().zip(numbers) {
            *out = add.wrapping_add(O::from_u64((*number).into()));
        }
    } else {
        for (out, number) in out.iter_mut().zip(numbers) {
            *out = add.wrapping_add(O::from_u64((*number).into()));
        }
    }
}

/// Appends the numbers at some positions, which lie within the vector.
#[inline]
fn take<N: Copy + Into<u64>, O: Target>(
    numbers: &[N; VECTOR],
    positions: impl Iterator<Item = usize>,
    add: O,
    out: &mut Vec<O>,
) {
    out.extend(positions.map(|at| add.wrapping_add(O::from_u64(numbers[at].into()))));
}

impl<'a> Stream<'a> {
    /// Finds the stream of `values` values at the start of `bytes`, which are aligned to 8.
    ///
    /// # Errors
    /// [`crate::Error::Corrupt`] where it reaches past `bytes` or is not of that many values.
    pub(crate) fn parse(bytes: &'a [u8], values: usize) -> Result<Self> {
        Self::parse_nested(bytes, values, true)
    }

    fn parse_nested(bytes: &'a [u8], values: usize, may_be_runs: bool) -> Result<Self> {
        part(bytes, "stream", 0, HEADER_BYTES)?;
        let found = read_u32(bytes, 4) as usize;
        if found != values || values > BLOCK_ROWS {
            return Err(corrupt("values of a stream", found, values));
        }
        let base = read_u64(bytes, 8);
        match bytes[0] {
            mode @ (MODE_PACKED | MODE_DIFFERENCES) => {
                Self::parse_vectors(bytes, values, base, mode == MODE_DIFFERENCES)
            }
            MODE_RUNS if may_be_runs => {
                let rest = &bytes[HEADER_BYTES..];
                part(rest, "stream of runs", 0, HEADER_BYTES)?;
                let runs = read_u32(rest, 4) as usize;
                let heads = Self::parse_nested(rest, runs, false)?;
                // What is padded may end beyond the bytes that there are.
                let behind = rest.len().saturating_sub(heads.length);
                let lengths = part(rest, "lengths of runs", heads.length, behind)?;
                let lengths = Self::parse_nested(lengths, runs, false)?;
                Ok(Self {
                    values,
                    length: HEADER_BYTES + heads.length + lengths.length,
                    kind: Kind::Runs {
                        heads: heads.into(),
                        lengths: lengths.into(),
                    },
                })
            }
            mode => Err(corrupt("mode of a stream", mode, "0, 1 or 2")),
        }
    }

    fn parse_vectors(bytes: &'a [u8], values: usize, base: u64, differences: bool) -> Result<Self> {
        let count = values.div_ceil(VECTOR);
        let mut vectors = [Vector::default(); VECTORS_MAX];
        let starts = HEADER_BYTES + count * VECTOR_HEADER_BYTES;
        let mut at = starts + if differences { count * 8 } else { 0 };
        part(bytes, "vectors", 0, at)?;
        for (index, vector) in vectors[..count].iter_mut().enumerate() {
            let header = HEADER_BYTES + index * VECTOR_HEADER_BYTES;
            let words = read_u64(bytes, header);
            let exceptions = usize::from((words >> 32) as u16);
            vector.low = base.wrapping_add(words & u64::from(u32::MAX));
            vector.width = (words >> 48) as u8;
            if vector.width > 64 || exceptions > VECTOR {
                return Err(corrupt(
                    "vector",
                    format!("{} bits, {exceptions} exceptions", vector.width),
                    "at most 64 bits, 1024 exceptions",
                ));
            }
            if differences {
                vector.start = read_u64(bytes, starts + index * 8);
            }
            vector.packed = part(bytes, "packed numbers", at, 128 * usize::from(vector.width))?;
            at += vector.packed.len();
            if exceptions > 0 {
                let values = part(bytes, "exceptions", at, exceptions * 8)?;
                let positions = part(bytes, "exceptions", at + values.len(), exceptions * 2)?;
                vector.exception_values = typed(values, "exceptions")?;
                vector.exception_positions = typed(positions, "exceptions")?;
                at += exception_bytes(exceptions);
            }
        }
        Ok(Self {
            values,
            length: at,
            kind: Kind::Vectors {
                differences,
                vectors,
            },
        })
    }

    /// How many values the stream has.
    pub(crate) fn len(&self) -> usize {
        self.values
    }

    /// The stream's vectors if any value can be read without the ones before.
    pub(crate) fn vectors(&self) -> Option<&[Vector<'a>]> {
        match &self.kind {
            Kind::Vectors {
                differences: false,
                vectors,
            } => Some(&vectors[..self.values.div_ceil(VECTOR)]),
            _ => None,
        }
    }

    /// Appends every value, `add` added.
    pub(crate) fn decode<O: Target>(
        &self,
        add: O,
        scratch: &mut Scratch,
        out: &mut Vec<O>,
    ) -> Result<()> {
        let from = out.len();
        match &self.kind {
            Kind::Vectors {
                differences,
                vectors,
            } => {
                out.resize(from + self.values, O::default());
                for (vector, out) in vectors.iter().zip(out[from..].chunks_mut(VECTOR)) {
                    match differences {
                        true => vector.decode_sums(add, scratch, out)?,
                        false => vector.decode(add, scratch, out)?,
                    }
                }
            }
            Kind::Runs { heads, lengths } => {
                let (values, ends) = self.runs(heads, lengths, add, scratch)?;
                out.reserve(self.values);
                for (value, end) in values.iter().zip(&ends) {
                    out.resize(from + end, *value);
                }
            }
        }
        Ok(())
    }

    /// The value of each run, and the row behind its last one.
    fn runs<O: Target>(
        &self,
        heads: &Stream<'_>,
        lengths: &Stream<'_>,
        add: O,
        scratch: &mut Scratch,
    ) -> Result<(Vec<O>, Vec<usize>)> {
        let mut values: Vec<O> = Vec::with_capacity(heads.len());
        heads.decode(add, scratch, &mut values)?;
        let mut runs: Vec<u32> = Vec::with_capacity(lengths.len());
        lengths.decode(1, scratch, &mut runs)?;
        let mut end = 0;
        // Far from overflow: a stream has at most as many runs as a block has rows.
        let ends: Vec<usize> = runs
            .into_iter()
            .map(|run| {
                end += run as usize;
                end
            })
            .collect();
        if end != self.values {
            return Err(corrupt("rows of runs", end, self.values));
        }
        Ok((values, ends))
    }

    /// Appends the values at `rows`, ascending, `add` added.
    pub(crate) fn gather<O: Target>(
        &self,
        rows: &[u32],
        add: O,
        scratch: &mut Scratch,
        out: &mut Vec<O>,
    ) -> Result<()> {
        out.reserve(rows.len());
        if let Kind::Runs { heads, lengths } = &self.kind {
            let (values, ends) = self.runs(heads, lengths, add, scratch)?;
            let mut run = 0;
            for row in rows {
                while *ends.get(run).ok_or_else(|| self.outside(*row))? <= *row as usize {
                    run += 1;
                }
                out.push(values[run]);
            }
            return Ok(());
        }
        let Some(vectors) = self.vectors() else {
            let mut all = Vec::with_capacity(self.values);
            self.decode(add, scratch, &mut all)?;
            out.extend(rows.iter().filter_map(|row| all.get(*row as usize)));
            return Ok(());
        };
        let mut rest = rows;
        while let Some(first) = rest.first() {
            let index = *first as usize / VECTOR;
            let Some(vector) = vectors.get(index) else {
                return Err(self.outside(*first));
            };
            let count = rest.partition_point(|row| (*row as usize) / VECTOR == index);
            let (these, others) = rest.split_at(count);
            rest = others;
            let from = out.len();
            let positions = these.iter().map(|row| *row as usize % VECTOR);
            let add = add.wrapping_add(O::from_u64(vector.low));
            if count < GATHER_MAX {
                for at in positions {
                    out.push(add.wrapping_add(O::from_u64(vector.one(at)?)));
                }
            } else {
                match vector.unpack(scratch)? {
                    Numbers::Zero => out.resize(from + count, add),
                    Numbers::U8(numbers) => take(numbers, positions, add, out),
                    Numbers::U16(numbers) => take(numbers, positions, add, out),
                    Numbers::U32(numbers) => take(numbers, positions, add, out),
                    Numbers::U64(numbers) => take(numbers, positions, add, out),
                }
            }
            for (at, value) in vector.exceptions() {
                if let Ok(place) = these.binary_search(&((index * VECTOR + at) as u32)) {
                    out[from + place] = add.wrapping_add(O::from_u64(value));
                }
            }
        }
        Ok(())
    }

    fn outside(&self, row: u32) -> crate::Error {
        corrupt("row", row, format!("less than {}", self.values))
    }

    /// Sets the bits, one a value, of those between `low` and `high`, both inside.
    ///
    /// `None` of streams that have to be decoded first.
    pub(crate) fn between(
        &self,
        low: u64,
        high: u64,
        scratch: &mut Scratch,
        bits: &mut Vec<u64>,
    ) -> Option<Result<()>> {
        let vectors = self.vectors()?;
        for vector in vectors {
            if let Err(error) = vector.between(low, high, scratch, bits) {
                return Some(Err(error));
            }
        }
        Some(Ok(()))
    }
}

/// From this many rows of a vector on, unpacking it whole is faster.
const GATHER_MAX: usize = 8;

impl Vector<'_> {
    /// Appends 16 words of bits: those of the values between `low` and `high`.
    fn between(
        &self,
        low: u64,
        high: u64,
        scratch: &mut Scratch,
        bits: &mut Vec<u64>,
    ) -> Result<()> {
        let from = bits.len();
        let largest = match self.width {
            64 => u64::MAX,
            width => (1 << width) - 1,
        };
        // Packed numbers do not wrap when the base is added: they are differences to a minimum.
        let inside = high >= self.low && low <= high;
        let (first, last) = (low.saturating_sub(self.low), high.wrapping_sub(self.low));
        if !inside || first > largest {
            bits.resize(from + 16, 0);
        } else if first == 0 && last >= largest {
            bits.resize(from + 16, u64::MAX);
        } else {
            let last = last.min(largest);
            match self.unpack(scratch)? {
                Numbers::Zero => bits.resize(from + 16, u64::MAX),
                Numbers::U8(n) => compare(n, first as u8, (last - first) as u8, bits),
                Numbers::U16(n) => compare(n, first as u16, (last - first) as u16, bits),
                Numbers::U32(n) => compare(n, first as u32, (last - first) as u32, bits),
                Numbers::U64(n) => compare(n, first, last - first, bits),
            }
        }
        for (at, number) in self.exceptions() {
            let value = self.low.wrapping_add(number);
            let bit = 1u64 << (at % 64);
            if let Some(word) = bits.get_mut(from + at / 64) {
                match low <= value && value <= high {
                    true => *word |= bit,
                    false => *word &= !bit,
                }
            }
        }
        Ok(())
    }
}

trait Less: Copy {
    fn at_most(self, first: Self, span: Self) -> u8;
}

macro_rules! less {
    ($($t:ty),*) => {$(
        impl Less for $t {
            #[inline(always)]
            fn at_most(self, first: Self, span: Self) -> u8 {
                u8::from(self.wrapping_sub(first) <= span)
            }
        }
    )*};
}
less!(u8, u16, u32, u64);

fn compare<N: Less>(numbers: &[N; VECTOR], first: N, span: N, bits: &mut Vec<u64>) {
    let mut hits = [0u8; VECTOR];
    for (hit, number) in hits.iter_mut().zip(numbers) {
        *hit = number.at_most(first, span);
    }
    push_bits(&hits, bits);
}

/// Appends a bit for each byte, which is 0 or 1.
pub(crate) fn push_bits(hits: &[u8; VECTOR], bits: &mut Vec<u64>) {
    for hits in hits.as_chunks::<64>().0 {
        let mut word = 0u64;
        for (at, eight) in hits.as_chunks::<8>().0.iter().enumerate() {
            // The product gathers the lowest bit of each byte in the uppermost byte.
            let gathered = u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56;
            word |= gathered << (at * 8);
        }
        bits.push(word);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Values of a test; an interpreter is slow.
    const VALUES: u64 = if cfg!(miri) { 2100 } else { 8192 };

    fn encoded(values: &[u64], allow: Allow) -> Vec<u64> {
        let mut bytes = vec![];
        encode(values, allow, &mut bytes);
        assert_eq!(bytes.len() % 8, 0);
        // As words, so that they are aligned.
        bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|w| u64::from_le_bytes(*w))
            .collect()
    }

    fn as_bytes(words: &[u64]) -> &[u8] {
        arrow::datatypes::ToByteSlice::to_byte_slice(words)
    }

    fn check(values: &[u64]) {
        for allow in [Allow::Packed, Allow::All] {
            let words = encoded(values, allow);
            let bytes = as_bytes(&words);
            let stream = Stream::parse(bytes, values.len()).unwrap();
            assert_eq!(stream.length, bytes.len());
            let mut scratch = Scratch::new();
            let mut found = vec![];
            stream.decode(0u64, &mut scratch, &mut found).unwrap();
            assert_eq!(found, values);
            let mut wide = vec![];
            stream.decode(-5i128, &mut scratch, &mut wide).unwrap();
            assert!(
                wide.iter()
                    .zip(values)
                    .all(|(w, v)| *w == i128::from(*v) - 5)
            );
            for step in [1, 7, 100, 1000] {
                let rows: Vec<u32> = (0..values.len() as u32).step_by(step).collect();
                let mut some = vec![];
                stream.gather(&rows, 0u64, &mut scratch, &mut some).unwrap();
                let expected: Vec<u64> = values.iter().copied().step_by(step).collect();
                assert_eq!(some, expected);
            }
            for (low, high) in [(0, u64::MAX), (3, 100), (9, 9), (1 << 40, 1 << 41), (5, 2)] {
                let mut bits = vec![];
                match stream.between(low, high, &mut scratch, &mut bits) {
                    None => assert!(stream.vectors().is_none()),
                    Some(done) => {
                        done.unwrap();
                        for (at, value) in values.iter().enumerate() {
                            let found = bits[at / 64] >> (at % 64) & 1 == 1;
                            assert_eq!(found, (low..=high).contains(value), "{value} at {at}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_width_reads_back() {
        for width in (0..=64u32).step_by(if cfg!(miri) { 13 } else { 1 }) {
            let mask = u64::MAX.checked_shr(64 - width).unwrap_or(0);
            let values: Vec<u64> = (0..VALUES.min(2500))
                .map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) & mask)
                .collect();
            check(&values);
        }
    }

    /// Also where it ends in the padding of the heads' exceptions.
    #[test]
    fn a_stream_that_is_cut_short_is_an_error() {
        let head = |i: u64| if i == 50 { 1 << 60 } else { i * 7919 % 13 };
        let values: Vec<u64> = (0..VALUES).map(|i| head(i / 60)).collect();
        let words = encoded(&values, Allow::All);
        let bytes = as_bytes(&words);
        assert_eq!(bytes[0], MODE_RUNS);
        let whole = Stream::parse(bytes, values.len()).unwrap();
        let Kind::Runs { heads, .. } = &whole.kind else {
            panic!("a stream of runs")
        };
        let exceptions = heads.vectors().unwrap()[0].exception_values.len();
        assert!(exceptions > 0, "{exceptions} exceptions");
        for end in 0..bytes.len() {
            assert!(Stream::parse(&bytes[..end], values.len()).is_err(), "{end}");
        }
    }

    #[test]
    fn the_mode_follows_the_values() {
        let mode = |values: &[u64]| {
            let words = encoded(values, Allow::All);
            as_bytes(&words)[0]
        };
        let noise: Vec<u64> = (0..VALUES).map(|i| i * 7919 % 5003).collect();
        let sorted: Vec<u64> = (0..VALUES).map(|i| i * 1000 + i % 3).collect();
        let runs: Vec<u64> = (0..VALUES).map(|i| (i / 90) * 7919 % 5003).collect();
        assert_eq!(
            (mode(&noise), mode(&sorted), mode(&runs)),
            (MODE_PACKED, MODE_DIFFERENCES, MODE_RUNS)
        );
        for values in [noise, sorted, runs] {
            check(&values);
        }
    }

    #[test]
    fn rare_wide_numbers_are_exceptions() {
        let values: Vec<u64> = (0..VALUES)
            .map(|i| if i % 500 == 0 { u64::MAX - i } else { i % 13 })
            .collect();
        check(&values);
        assert!(encoded(&values, Allow::All).len() * 8 < VALUES as usize * 5 / 8 + 500);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_stream_reads_back(
            values in prop::collection::vec(prop_oneof![
                4 => 0u64..50,
                2 => any::<u32>().prop_map(u64::from),
                1 => any::<u64>(),
            ], 0..3000),
        ) {
            check(&values);
        }

        #[test]
        fn damage_is_an_error_and_never_a_panic(
            values in prop::collection::vec(0u64..5000, 1..3000),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let mut words = encoded(&values, Allow::All);
            for (at, with) in damage {
                let at = at.index(words.len() * 8);
                words[at / 8] ^= u64::from(with) << (at % 8 * 8);
            }
            if let Ok(stream) = Stream::parse(as_bytes(&words), values.len()) {
                let mut scratch = Scratch::new();
                let _ = stream.decode(0u64, &mut scratch, &mut vec![]);
                let _ = stream.gather(&[0], 0i128, &mut scratch, &mut vec![]);
                let _ = stream.between(3, 8, &mut scratch, &mut vec![]);
            }
        }
    }
}
