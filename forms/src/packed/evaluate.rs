//! Predicates on packed values.
//!
//! Integers are compared as they are packed: the predicate becomes ranges of what is added to the
//! base. On a dictionary a predicate is evaluated once on the distinct values, by Arrow's own
//! kernels, and becomes a set of codes. Pieces of text are looked for in text as it lies there.

use std::ops::RangeInclusive;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Datum, Scalar, new_null_array};
use arrow::buffer::{BooleanBuffer, Buffer};
use arrow::compute::{cast, concat};
use arrow::datatypes::DataType;

use super::bits::{Scratch, Stream, VECTOR, push_bits};
use super::dictionary::Dictionary;
use super::search::Search;
use super::{Encoding, Inner, PackedChunk, Parts, Shared, integers, text, with_scratch};
use crate::Result;
use crate::comparison::{Comparison, Operator};

/// Ranges of integers that a predicate may become; more of them are left to Arrow's kernels.
const RANGES_MAX: usize = 4;

/// A predicate made ready for the blocks of one chunk.
#[derive(Clone, Debug)]
pub struct Prepared {
    chunk: PackedChunk,
    test: Test,
}

#[derive(Clone, Debug)]
enum Test {
    /// Whether the value is null.
    Null(bool),
    /// The same for every value that is not null, and for every null.
    Always { valid: bool, null: bool },
    /// Whether the packed value is in one of these ranges, or in none if that is negated.
    Ranges {
        ranges: Vec<RangeInclusive<u64>>,
        negated: bool,
    },
    /// For each code whether it is a hit, 0 or 1; and what nulls are.
    Codes { hits: Arc<[u8]>, null: bool },
    /// As [`Test::Codes`], of which one run is hits.
    CodeRange {
        range: RangeInclusive<u64>,
        null: bool,
    },
    /// Whether pieces of text are in the value, or are not if that is negated.
    Contains { search: Search, negated: bool },
}

impl Prepared {
    pub(super) fn new(chunk: &PackedChunk, comparison: &Comparison) -> Option<Self> {
        let inner = &chunk.inner;
        let comparison = &typed(comparison, &inner.data_type)?;
        let test = match (comparison, &inner.shared) {
            (Comparison::IsNull, _) => Test::Null(true),
            (Comparison::IsNotNull, _) => Test::Null(false),
            (comparison, Shared::Constant(value)) => {
                let hits = comparison.of_values(value)?;
                let hit = hits.is_valid(0) && hits.value(0);
                Test::Always {
                    valid: hit,
                    null: hit,
                }
            }
            (comparison, Shared::Dictionary(dictionary)) => {
                match found_in(comparison, dictionary, inner) {
                    Some(test) => test,
                    None => {
                        let values = with_scratch(|scratch| dictionary.values(scratch).cloned());
                        codes(comparison, values.ok()?, inner)?
                    }
                }
            }
            (comparison, _) if inner.encoding == Encoding::Integers => {
                ranges(comparison, inner.base)?
            }
            (Comparison::Contains { texts, negated }, _)
                if inner.data_type == DataType::Utf8View && inner.has_text() =>
            {
                Test::Contains {
                    search: Search::new(texts, inner.symbols())?,
                    negated: *negated,
                }
            }
            _ => return None,
        };
        Some(Self {
            chunk: chunk.clone(),
            test,
        })
    }

    /// Whether the predicate is true of no row of the chunk.
    pub fn is_never(&self) -> bool {
        match &self.test {
            Test::Always { valid, null } => !valid && !null,
            Test::Ranges { ranges, negated } => ranges.is_empty() && !negated,
            _ => false,
        }
    }

    /// The rows of one block of which the predicate is true, which it is not where it is null.
    ///
    /// # Errors
    /// As [`PackedChunk::block`].
    ///
    /// # Panics
    /// If there is no such block.
    pub fn evaluate(&self, block: usize) -> Result<BooleanBuffer> {
        let chunk = &self.chunk.inner;
        let rows = chunk.block_rows(block);
        if let Shared::Constant(_) | Shared::Plain(_) = chunk.shared {
            return match &self.test {
                Test::Always { valid, .. } => Ok(all(*valid, rows)),
                Test::Null(null) => {
                    let nulls = chunk.block(block)?.logical_nulls();
                    let valid = nulls.map_or_else(|| all(true, rows), |nulls| nulls.into_inner());
                    Ok(if *null { !&valid } else { valid })
                }
                _ => unreachable!("such chunks have neither codes nor integers"),
            };
        }
        let parts = chunk.parts(block)?;
        let on_null = match &self.test {
            Test::Null(null) => *null,
            Test::Ranges { .. } | Test::Contains { .. } => false,
            Test::Always { null, .. } | Test::Codes { null, .. } | Test::CodeRange { null, .. } => {
                *null
            }
        };
        if parts.all_null {
            return Ok(all(on_null, rows));
        }
        let hits = match &self.test {
            Test::Null(null) => all(!*null, rows),
            Test::Always { valid, .. } => all(*valid, rows),
            Test::Ranges { ranges, negated } => {
                let hits = with_scratch(|scratch| between(&parts, ranges, scratch))?;
                if *negated { !&hits } else { hits }
            }
            Test::CodeRange { range, .. } => {
                let ranges = std::slice::from_ref(range);
                with_scratch(|scratch| between(&parts, ranges, scratch))?
            }
            Test::Codes { hits, .. } => {
                with_scratch(|scratch| of_codes(chunk, &parts, hits, scratch))?
            }
            Test::Contains { search, negated } => {
                let block = text::Block::open(&parts.payload, parts.rows)?;
                let symbols = chunk.symbols();
                let hits = with_scratch(|scratch| search.rows(&block, symbols, scratch))?;
                if *negated { !&hits } else { hits }
            }
        };
        Ok(match &parts.nulls {
            None => hits,
            Some(nulls) if on_null => &hits | &!nulls.inner(),
            Some(nulls) => &hits & nulls.inner(),
        })
    }
}

fn all(hit: bool, rows: usize) -> BooleanBuffer {
    match hit {
        true => BooleanBuffer::new_set(rows),
        false => BooleanBuffer::new_unset(rows),
    }
}

fn bits(words: Vec<u64>, rows: usize) -> BooleanBuffer {
    BooleanBuffer::new(Buffer::from_vec(words), 0, rows)
}

/// The rows whose packed value is in one of the ranges.
fn between(
    parts: &Parts,
    ranges: &[RangeInclusive<u64>],
    scratch: &mut Scratch,
) -> Result<BooleanBuffer> {
    let stream = Stream::parse(&parts.payload, parts.rows)?;
    let mut found: Option<Vec<u64>> = None;
    for range in ranges {
        let mut words = Vec::with_capacity(parts.rows.div_ceil(VECTOR) * VECTOR / 64);
        match stream.between(*range.start(), *range.end(), scratch, &mut words) {
            Some(done) => done?,
            None => return decoded_between(&stream, ranges, scratch),
        }
        found = Some(match found {
            None => words,
            Some(before) => before.iter().zip(&words).map(|(a, b)| a | b).collect(),
        });
    }
    Ok(match found {
        Some(words) => bits(words, parts.rows),
        None => all(false, parts.rows),
    })
}

/// As [`between`], of a stream that has to be decoded.
fn decoded_between(
    stream: &Stream<'_>,
    ranges: &[RangeInclusive<u64>],
    scratch: &mut Scratch,
) -> Result<BooleanBuffer> {
    let mut values: Vec<u64> = vec![];
    stream.decode(0, scratch, &mut values)?;
    let hit = |at: usize| ranges.iter().any(|range| range.contains(&values[at]));
    Ok(BooleanBuffer::collect_bool(values.len(), hit))
}

/// The rows whose code is a hit.
fn of_codes(
    chunk: &Inner,
    parts: &Parts,
    hits: &[u8],
    scratch: &mut Scratch,
) -> Result<BooleanBuffer> {
    let Shared::Dictionary(dictionary) = &chunk.shared else {
        unreachable!("only chunks with a dictionary have codes");
    };
    let codes = dictionary.codes(parts, None, scratch)?;
    let mut words = Vec::with_capacity(codes.len().div_ceil(VECTOR) * VECTOR / 64);
    let mut of_vector = [0u8; VECTOR];
    for codes in codes.chunks(VECTOR) {
        for (hit, code) in of_vector.iter_mut().zip(codes) {
            *hit = hits[*code as usize];
        }
        push_bits(&of_vector, &mut words);
    }
    Ok(bits(words, parts.rows))
}

/// The comparison with values of the column's own type; `None` where they are of another one.
fn typed(comparison: &Comparison, data_type: &DataType) -> Option<Comparison> {
    let scalar = |value: &Scalar<ArrayRef>| {
        let (array, _) = value.get();
        as_type(array, data_type).map(Scalar::new)
    };
    Some(match comparison {
        Comparison::Compare { op, value } => Comparison::Compare {
            op: *op,
            value: scalar(value)?,
        },
        Comparison::All(all) => {
            let all = all.iter().map(|comparison| typed(comparison, data_type));
            Comparison::All(all.collect::<Option<_>>()?)
        }
        Comparison::In { values } => Comparison::In {
            values: as_type(values.as_ref(), data_type)?,
        },
        other => other.clone(),
    })
}

/// Text of any layout is the same text; other types are not converted.
fn as_type(array: &dyn Array, data_type: &DataType) -> Option<ArrayRef> {
    use DataType::*;
    match (array.data_type(), data_type) {
        (found, expected) if found == expected => Some(array.slice(0, array.len())),
        (Utf8 | LargeUtf8, Utf8View) | (Binary | LargeBinary, BinaryView) => {
            cast(array, data_type).ok()
        }
        _ => None,
    }
}

/// Only what can be asked of anything can be true of a null.
fn may_be_true_of_null(comparison: &Comparison) -> bool {
    match comparison {
        Comparison::OnDictionary(_) | Comparison::IsNull => true,
        Comparison::All(all) => all.iter().all(may_be_true_of_null),
        _ => false,
    }
}

/// The codes of which a predicate is true.
fn codes(comparison: &Comparison, values: ArrayRef, chunk: &Inner) -> Option<Test> {
    let ask_null = may_be_true_of_null(comparison) && chunk.known().statistics.null_count > 0;
    let len = values.len();
    let asked = match ask_null {
        false => values,
        true => {
            let null = new_null_array(&chunk.data_type, 1);
            concat(&[values.as_ref(), null.as_ref()]).ok()?
        }
    };
    let found = comparison.of_values(&asked)?;
    let hit = |at: usize| found.is_valid(at) && found.value(at);
    Some(of_hits(len, hit, ask_null && hit(len)))
}

/// The codes of text that has a piece of text in it, looked for in the dictionary as it lies;
/// `None` where comparing its values is better, and for other comparisons.
fn found_in(comparison: &Comparison, dictionary: &Dictionary, chunk: &Inner) -> Option<Test> {
    let Comparison::Contains { texts, negated } = comparison else {
        return None;
    };
    if chunk.data_type != DataType::Utf8View {
        return None;
    }
    let hits = with_scratch(|scratch| dictionary.containing(texts, scratch)).ok()??;
    Some(of_hits(
        dictionary.len,
        |code| hits.value(code) != *negated,
        false,
    ))
}

/// The test for the codes, of `len`, that are a hit, and for nulls.
fn of_hits(len: usize, hit: impl Fn(usize) -> bool, null: bool) -> Test {
    let hits: Arc<[u8]> = (0..len).map(|at| u8::from(hit(at))).collect();
    let count: usize = hits.iter().map(|hit| usize::from(*hit)).sum();
    if count == 0 || count == len {
        return Test::Always {
            valid: count > 0,
            null,
        };
    }
    let first = hits.iter().position(|hit| *hit == 1).unwrap_or(0);
    if hits[first..first + count].iter().all(|hit| *hit == 1) {
        let range = first as u64..=(first + count - 1) as u64;
        return Test::CodeRange { range, null };
    }
    Test::Codes { hits, null }
}

/// The ranges of packed integers of which a predicate is true; `None` of too many.
fn ranges(comparison: &Comparison, base: i128) -> Option<Test> {
    // One range left out is read as easily as one taken.
    if let Comparison::Compare {
        op: Operator::NotEq,
        value,
    } = comparison
        && let Some(value) = integer(value.get().0, 0)?
    {
        return Some(Test::Ranges {
            ranges: packed_range(value, value, base).into_iter().collect(),
            negated: true,
        });
    }
    let ranges = packed_ranges(comparison, base)?;
    (ranges.len() <= RANGES_MAX).then_some(Test::Ranges {
        ranges,
        negated: false,
    })
}

/// The ranges of packed integers, ascending and apart, of which a predicate is true; `None` where
/// it is not about integers.
fn packed_ranges(comparison: &Comparison, base: i128) -> Option<Vec<RangeInclusive<u64>>> {
    let of = |low: i128, high: i128| packed_range(low, high, base);
    Some(match comparison {
        Comparison::Compare { op, value } => {
            // Nothing compares with a null.
            let Some(value) = integer(value.get().0, 0)? else {
                return Some(vec![]);
            };
            let below = || of(i128::MIN, value.checked_sub(1)?);
            let above = || of(value.checked_add(1)?, i128::MAX);
            let ranges = match op {
                Operator::Eq => [of(value, value), None],
                Operator::NotEq => [below(), above()],
                Operator::LtEq => [of(i128::MIN, value), None],
                Operator::Lt => [below(), None],
                Operator::GtEq => [of(value, i128::MAX), None],
                Operator::Gt => [above(), None],
            };
            ranges.into_iter().flatten().collect()
        }
        Comparison::All(all) => {
            let mut common = vec![0..=u64::MAX];
            for comparison in all {
                common = intersection(&common, &packed_ranges(comparison, base)?);
            }
            common
        }
        Comparison::In { values } => {
            let mut inside = Vec::with_capacity(values.len());
            for at in 0..values.len() {
                inside.extend(integer(values.as_ref(), at)?);
            }
            inside.sort_unstable();
            inside.dedup();
            let mut ranges: Vec<RangeInclusive<i128>> = vec![];
            for value in inside {
                match ranges.last_mut() {
                    Some(last) if last.end().checked_add(1) == Some(value) => {
                        *last = *last.start()..=value;
                    }
                    _ => ranges.push(value..=value),
                }
            }
            let ranges = ranges.iter();
            ranges
                .filter_map(|range| of(*range.start(), *range.end()))
                .collect()
        }
        Comparison::Contains { .. }
        | Comparison::IsNull
        | Comparison::IsNotNull
        | Comparison::OnDictionary(_) => return None,
    })
}

/// What is in both of two lists of ranges, each ascending and apart.
fn intersection(a: &[RangeInclusive<u64>], b: &[RangeInclusive<u64>]) -> Vec<RangeInclusive<u64>> {
    let pairs = a.iter().flat_map(|a| b.iter().map(move |b| (a, b)));
    pairs
        .map(|(a, b)| *a.start().max(b.start())..=*a.end().min(b.end()))
        .filter(|both| !both.is_empty())
        .collect()
}

/// What is packed of the integers from `low` to `high`; `None` where nothing can be.
fn packed_range(low: i128, high: i128, base: i128) -> Option<RangeInclusive<u64>> {
    if high < base || high < low {
        return None;
    }
    // Values are at most 2^64 above the base; so far, differences do not overflow either.
    let low = if low <= base {
        0
    } else {
        low.wrapping_sub(base) as u128
    };
    let high = high.wrapping_sub(base) as u128;
    let low = u64::try_from(low).ok()?;
    Some(low..=u64::try_from(high).unwrap_or(u64::MAX))
}

/// A value of an array of integers, as one of 128 bits; outer `None` where it has more.
fn integer(array: &dyn Array, at: usize) -> Option<Option<i128>> {
    use arrow::datatypes::*;
    if array.is_null(at) {
        return Some(None);
    }
    let width = integers::width(array.data_type())?;
    let data = array.to_data();
    let unsigned = integers::is_unsigned(array.data_type());
    Some(Some(match (width, unsigned) {
        (integers::Width::W8, false) => data.buffer::<i8>(0)[at].into(),
        (integers::Width::W8, true) => data.buffer::<u8>(0)[at].into(),
        (integers::Width::W16, false) => data.buffer::<i16>(0)[at].into(),
        (integers::Width::W16, true) => data.buffer::<u16>(0)[at].into(),
        (integers::Width::W32, false) => data.buffer::<i32>(0)[at].into(),
        (integers::Width::W32, true) => data.buffer::<u32>(0)[at].into(),
        (integers::Width::W64, false) => data.buffer::<i64>(0)[at].into(),
        (integers::Width::W64, true) => data.buffer::<u64>(0)[at].into(),
        (integers::Width::W128, _) => data.buffer::<i128>(0)[at],
        (integers::Width::W256, _) => {
            let value: i256 = array.as_primitive::<Decimal256Type>().value(at);
            value.to_i128()?
        }
    }))
}
