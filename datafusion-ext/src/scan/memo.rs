//! What a predicate said of the integers that it was asked about before.
//!
//! A key of a join repeats: six million rows of lineitem have two hundred thousand part keys. A
//! filter that looks a key up in a hash table costs ten to twenty nanoseconds a row, and says the
//! same of the same key each time. So each key is asked about once, and its answer kept in a byte
//! at the key's distance from the smallest one: a row costs one load then.
//!
//! Nothing is known beforehand of the keys. The bytes cover those seen so far, and grow; where the
//! keys of a column lie far apart but those of a block close together, as in a column that is
//! sorted, they cover a window that moves. Where neither is so, or answers are hardly ever used
//! again, the memo is given up.
//!
//! Where equal keys stand together, as in a table sorted by them, nothing has to be kept: the first
//! row of each run is asked about.
//!
//! While the keys are new, asking costs most, and later next to nothing. What a filter costs is
//! therefore held to be what it will cost on average of the rows to come ([`Prospect`]); judged by
//! its first blocks, it would be left out before it begins to pay.

use std::ops::RangeInclusive;

use arrow::array::{Array, ArrayRef, BooleanBufferBuilder, UInt32Array, new_null_array};
use arrow::buffer::{BooleanBuffer, Buffer, NullBuffer};
use arrow::compute::take;
use arrow::datatypes::{ArrowNativeType, DataType};
use datafusion::common::Result;

/// Keys that are covered at most where a window does not do.
const KEYS_MAX: u64 = 1 << 23;
/// Keys that are covered without a thought: their answers fit into a processor's own cache.
const KEYS_FEW: u64 = 1 << 20;
/// Keys of a window at least.
const WINDOW_KEYS: u64 = 1 << 17;
/// A block of keys is close together if they are spread over at most so many for each row.
const CLOSE_SPREAD: u64 = 16;
/// Rows after which the memo has shown what it is worth.
const TRIAL_ROWS: u64 = 8 * stoa_forms::BLOCK_ROWS as u64;

const UNKNOWN: u8 = 0;
const MISS: u8 = 1;
const HIT: u8 = 2;
/// Being asked about.
const PENDING: u8 = 3;

/// Keys that tell whether equal ones stand together, or all are sorted.
const SAMPLE_KEYS: usize = 64;

/// What is to be expected of a column's keys.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Prospect {
    /// How many there can be: the span from the least to the largest.
    pub(super) keys: u64,
    /// The rows to come, at least.
    pub(super) rows: u64,
}

impl Prospect {
    /// The largest share of the rows to come whose keys have to be asked about.
    pub(super) fn asked(&self) -> f64 {
        match self.rows {
            0 => 1.0,
            rows => (self.keys as f64 / rows as f64).min(1.0),
        }
    }
}

/// What [`Memo::rows`] says of a block.
#[derive(Debug)]
pub(super) struct Answer {
    /// The rows of which the predicate is true.
    pub(super) hits: BooleanBuffer,
    /// Whether what was asked is known from now on.
    pub(super) kept: bool,
}

/// The answers of one deterministic predicate on one column of integers.
#[derive(Debug, Default)]
pub(super) struct Memo {
    /// The key of the first of `answers`.
    base: i64,
    answers: Vec<u8>,
    null: Option<bool>,
    rows: u64,
    asked: u64,
    given_up: bool,
}

/// Whether a column's values are integers that fit a memo's keys.
pub(super) fn has_keys(data_type: &DataType) -> bool {
    match data_type {
        DataType::Decimal32(_, _) | DataType::Decimal64(_, _) => true,
        DataType::Interval(_) => false,
        other => other.is_integer() || other.is_temporal(),
    }
}

impl Memo {
    /// The rows of which the predicate is true; `ask` says so of any values. `None` where the memo
    /// does not pay and `ask` is to be called with the array itself.
    pub(super) fn rows(
        &mut self,
        array: &ArrayRef,
        prospect: Prospect,
        ask: impl Fn(ArrayRef) -> Result<BooleanBuffer>,
    ) -> Option<Result<Answer>> {
        if array.is_empty() {
            return None;
        }
        let data = array.to_data();
        let found = match data.data_type().primitive_width() {
            Some(1) => self.rows_of(&data.buffer::<i8>(0)[..data.len()], array, prospect, &ask),
            Some(2) => self.rows_of(&data.buffer::<i16>(0)[..data.len()], array, prospect, &ask),
            Some(4) => self.rows_of(&data.buffer::<i32>(0)[..data.len()], array, prospect, &ask),
            Some(8) => self.rows_of(&data.buffer::<i64>(0)[..data.len()], array, prospect, &ask),
            _ => None,
        };
        if self.given_up {
            // Its memory is of use to others.
            *self = Memo {
                given_up: true,
                ..Memo::default()
            };
        }
        found
    }

    fn rows_of<N: ArrowNativeType + Into<i64>>(
        &mut self,
        keys: &[N],
        array: &ArrayRef,
        prospect: Prospect,
        ask: &impl Fn(ArrayRef) -> Result<BooleanBuffer>,
    ) -> Option<Result<Answer>> {
        let nulls = array.nulls().filter(|nulls| nulls.null_count() > 0);
        if nulls.is_none()
            && let Some(heads) = heads(keys)
        {
            let hits = of_runs(array, heads, ask);
            return Some(hits.map(|hits| Answer { hits, kept: false }));
        }
        // Ascending keys do not come again.
        if self.given_up || nulls.is_none() && sample(keys).is_sorted() {
            return None;
        }
        let mut found = self.look_up(keys, nulls);
        if found.is_none() {
            let covered = extremes(keys, nulls).and_then(|all| self.cover(all, keys.len() as u64));
            self.given_up = covered.is_none();
            covered?;
            found = self.look_up(keys, nulls);
        }
        let (mut hits, pending) = found?;
        self.rows += keys.len() as u64;
        self.asked += pending.len() as u64;
        if !pending.is_empty() {
            if let Err(error) = self.ask(keys, array, pending, ask) {
                return Some(Err(error));
            }
            (hits, _) = self.look_up(keys, nulls)?;
        }
        if let Some(nulls) = nulls {
            match self.of_null(array.data_type(), ask) {
                Ok(true) => hits = &(&hits & nulls.inner()) | &!nulls.inner(),
                Ok(false) => hits = &hits & nulls.inner(),
                Err(error) => return Some(Err(error)),
            }
        }
        if self.rows >= TRIAL_ROWS {
            // Looking up costs about a quarter of asking.
            if self.asked * 4 > self.rows * 3 && prospect.asked() * 4.0 > 3.0 {
                self.given_up = true;
            }
            (self.rows, self.asked) = (self.rows / 2, self.asked / 2);
        }
        Some(Ok(Answer { hits, kept: true }))
    }

    /// The hits among known keys, and one row of each unknown key, which is pending from now on;
    /// `None` if a key is not covered.
    fn look_up<N: ArrowNativeType + Into<i64>>(
        &mut self,
        all: &[N],
        nulls: Option<&NullBuffer>,
    ) -> Option<(BooleanBuffer, Vec<u32>)> {
        let mut pending = vec![];
        let mut words = Vec::with_capacity(all.len().div_ceil(64));
        for (word, keys) in all.chunks(64).enumerate() {
            let base = self.base;
            let at = |key: &N| (*key).into().wrapping_sub(base) as u64 as usize;
            let mut bits = 0u64;
            let mut all_known = true;
            for (bit, key) in keys.iter().enumerate() {
                let answer = self.answers.get(at(key)).copied().unwrap_or(UNKNOWN);
                all_known &= answer != UNKNOWN;
                bits |= u64::from(answer >> 1) << bit;
            }
            words.push(bits);
            if all_known {
                continue;
            }
            for (bit, key) in keys.iter().enumerate() {
                let row = word * 64 + bit;
                // What stands in a row that is null says nothing.
                if nulls.is_some_and(|nulls| nulls.is_null(row)) {
                    continue;
                }
                let Some(answer) = self.answers.get_mut(at(key)) else {
                    self.forget(all, &pending);
                    return None;
                };
                if *answer == UNKNOWN {
                    *answer = PENDING;
                    pending.push(row as u32);
                }
            }
        }
        let hits = BooleanBuffer::new(Buffer::from_vec(words), 0, all.len());
        Some((hits, pending))
    }

    fn forget<N: ArrowNativeType + Into<i64>>(&mut self, keys: &[N], pending: &[u32]) {
        for row in pending {
            self.set(keys[*row as usize].into(), UNKNOWN);
        }
    }

    fn set(&mut self, key: i64, answer: u8) {
        let at = key.wrapping_sub(self.base) as u64 as usize;
        if let Some(place) = self.answers.get_mut(at) {
            *place = answer;
        }
    }

    /// Asks about the pending rows.
    fn ask<N: ArrowNativeType + Into<i64>>(
        &mut self,
        keys: &[N],
        array: &ArrayRef,
        pending: Vec<u32>,
        ask: &impl Fn(ArrayRef) -> Result<BooleanBuffer>,
    ) -> Result<()> {
        let rows = UInt32Array::from(pending);
        let said = take(array, &rows, None).map_err(Into::into).and_then(ask);
        match said {
            Ok(said) => {
                for (row, hit) in rows.values().iter().zip(&said) {
                    self.set(keys[*row as usize].into(), if hit { HIT } else { MISS });
                }
                Ok(())
            }
            Err(error) => {
                self.forget(keys, rows.values());
                Err(error)
            }
        }
    }

    fn of_null(
        &mut self,
        data_type: &DataType,
        ask: &impl Fn(ArrayRef) -> Result<BooleanBuffer>,
    ) -> Result<bool> {
        if let Some(known) = self.null {
            return Ok(known);
        }
        let said = ask(new_null_array(data_type, 1))?;
        Ok(*self.null.insert(said.value(0)))
    }

    /// Makes place for keys of a block of `rows`; `None` if they would take too much.
    fn cover(&mut self, keys: RangeInclusive<i64>, rows: u64) -> Option<()> {
        let (low, high) = (*keys.start(), *keys.end());
        let (mut first, mut last) = (low, high);
        if !self.answers.is_empty() {
            let end = self.base.saturating_add(self.answers.len() as i64 - 1);
            (first, last) = (low.min(self.base), high.max(end));
        }
        let spread = low.abs_diff(high).saturating_add(1);
        let all = first.abs_diff(last).saturating_add(1);
        if all > KEYS_FEW && spread <= rows.saturating_mul(CLOSE_SPREAD) {
            self.base = low;
            self.answers = vec![UNKNOWN; spread.max(WINDOW_KEYS) as usize];
            return Some(());
        }
        if all > KEYS_MAX {
            return None;
        }
        // Half again as many as are needed, towards the side on which more were needed.
        let room = (all / 2).min(KEYS_MAX - all);
        if first < self.base && !self.answers.is_empty() {
            first = first.saturating_sub(room as i64);
        }
        let mut answers = vec![UNKNOWN; (all + room) as usize];
        let moved = self.base.abs_diff(first) as usize;
        // What lies beyond the largest key is dropped.
        for (to, answer) in answers.iter_mut().skip(moved).zip(&self.answers) {
            *to = *answer;
        }
        (self.base, self.answers) = (first, answers);
        Some(())
    }
}

/// Keys that tell how the others follow each other.
fn sample<N>(keys: &[N]) -> &[N] {
    &keys[..keys.len().min(SAMPLE_KEYS)]
}

/// The first row of each run of equal keys; `None` where runs are shorter than two rows on average.
fn heads<N: PartialEq>(keys: &[N]) -> Option<Vec<u32>> {
    let sample = sample(keys);
    let pairs = sample.windows(2);
    let runs = pairs.filter(|pair| pair[0] != pair[1]).count() + 1;
    if runs * 2 > sample.len() {
        return None;
    }
    let mut heads = vec![0u32; keys.len()];
    let mut count = 1;
    for (row, pair) in keys.windows(2).enumerate() {
        // Always written, and kept if it is one: whether it is cannot be predicted.
        heads[count] = row as u32 + 1;
        count += usize::from(pair[0] != pair[1]);
    }
    heads.truncate(count);
    (count * 2 <= keys.len()).then_some(heads)
}

/// The rows of which the predicate is true, asked about the first row of each run.
fn of_runs(
    array: &ArrayRef,
    heads: Vec<u32>,
    ask: impl Fn(ArrayRef) -> Result<BooleanBuffer>,
) -> Result<BooleanBuffer> {
    let heads = UInt32Array::from(heads);
    let said = ask(take(array, &heads, None)?)?;
    let mut hits = BooleanBufferBuilder::new(array.len());
    let ends = heads.values().iter().skip(1).map(|head| *head as usize);
    for (hit, end) in said.iter().zip(ends.chain([array.len()])) {
        hits.append_n(end - hits.len(), hit);
    }
    Ok(hits.finish())
}

/// The least and the largest of the valid keys.
fn extremes<N: ArrowNativeType + Into<i64>>(
    keys: &[N],
    nulls: Option<&NullBuffer>,
) -> Option<RangeInclusive<i64>> {
    let valid = keys
        .iter()
        .enumerate()
        .filter(|(row, _)| nulls.is_none_or(|nulls| nulls.is_valid(*row)))
        .map(|(_, key)| (*key).into());
    let (low, high) = valid.fold((i64::MAX, i64::MIN), |(low, high), key: i64| {
        (low.min(key), high.max(key))
    });
    (low <= high).then_some(low..=high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{AsArray, Int32Array, Int64Array};
    use arrow::datatypes::Int64Type;
    use proptest::prelude::*;
    use std::cell::Cell;
    use std::sync::Arc;

    const ROWS: usize = stoa_forms::BLOCK_ROWS;

    fn is_third(key: Option<i64>) -> bool {
        key.is_none_or(|key| key.rem_euclid(3) == 0)
    }

    /// Checks every row of a block, and says how many values were asked about.
    fn check(memo: &mut Memo, keys: Vec<Option<i64>>) -> Option<usize> {
        let asked = Cell::new(0);
        let array: ArrayRef = Arc::new(Int64Array::from(keys.clone()));
        let hits = memo.rows(&array, Prospect::default(), |values| {
            asked.set(asked.get() + values.len());
            let values = values.as_primitive::<Int64Type>();
            Ok(values.iter().map(is_third).collect())
        })?;
        let hits: Vec<bool> = hits.unwrap().hits.iter().collect();
        assert_eq!(hits, keys.into_iter().map(is_third).collect::<Vec<_>>());
        Some(asked.get())
    }

    #[test]
    fn a_key_is_asked_about_once() {
        let mut memo = Memo::default();
        let block = |step: i64| {
            (0..ROWS as i64)
                .map(|row| Some(500 - row * step % 1000))
                .collect()
        };
        assert_eq!(check(&mut memo, block(1)), Some(1000));
        assert_eq!(check(&mut memo, block(7)), Some(0));
        // A null is a key of its own.
        assert_eq!(
            check(&mut memo, vec![None, Some(1), Some(501), None]),
            Some(2)
        );
        assert_eq!(check(&mut memo, vec![None, Some(501), Some(-700)]), Some(1));
    }

    #[test]
    fn close_keys_of_any_range_have_a_window() {
        let mut memo = Memo::default();
        for block in 0..64 {
            let first = block * 50_000_000;
            let keys = (0..ROWS as i64).map(|row| Some(first - row % (ROWS as i64 / 4) * 8));
            assert_eq!(check(&mut memo, keys.collect()), Some(ROWS / 4));
            assert!(memo.answers.len() <= KEYS_FEW as usize);
        }
    }

    #[test]
    fn of_equal_keys_that_stand_together_the_first_is_asked_about() {
        let mut memo = Memo::default();
        for length in [2, 3, 4, 1000] {
            let keys = (0..ROWS as i64).map(|row| Some(row / length * 1_000_003));
            let runs = ROWS.div_ceil(length as usize);
            assert_eq!(check(&mut memo, keys.collect()), Some(runs));
        }
        // Of runs that end after the sample, nothing is gained; nor of keys that only ascend.
        let keys = (0..ROWS as i64).map(|row| Some(if row < 100 { 0 } else { row }));
        assert_eq!(check(&mut memo, keys.collect()), None);
        assert_eq!(check(&mut memo, (0..1000).map(Some).collect()), None);
        assert!(memo.answers.is_empty() && !memo.given_up);
    }

    #[test]
    fn scattered_keys_and_those_that_do_not_repeat_are_given_up() {
        let mut memo = Memo::default();
        let scattered = (0..ROWS as i64).map(|row| Some(-row * 1_000_003)).collect();
        assert_eq!(check(&mut memo, scattered), None);
        assert!(memo.given_up && memo.answers.is_empty());
        let mut memo = Memo::default();
        let unique = |block: i64| (0..ROWS as i64).map(move |row| Some(block * ROWS as i64 - row));
        let blocks =
            (0..100).take_while(|block| check(&mut memo, unique(*block).collect()).is_some());
        assert_eq!(blocks.count() as u64 * ROWS as u64, TRIAL_ROWS);
    }

    #[test]
    fn keys_that_will_repeat_are_kept_though_they_are_new() {
        let prospect = Prospect {
            keys: 200_000,
            rows: 1_000_000,
        };
        assert_eq!(prospect.asked(), 0.2);
        let mut memo = Memo::default();
        for block in 0..16 {
            let keys = (0..ROWS as i64).map(|row| (block * ROWS as i64 + row) * 77_777 % 200_000);
            let array: ArrayRef = Arc::new(Int64Array::from_iter_values(keys));
            let none = |values: ArrayRef| Ok(BooleanBuffer::new_unset(values.len()));
            let answer = memo.rows(&array, prospect, none).unwrap().unwrap();
            assert!(answer.kept);
        }
        assert!(memo.rows >= TRIAL_ROWS / 2 && memo.asked * 4 > memo.rows * 3);
    }

    #[test]
    fn the_largest_and_the_smallest_keys_do_not_overflow() {
        let mut memo = Memo::default();
        let edges = |key: i64| (0..100).map(move |row| Some(key.wrapping_sub(row).max(key - 50)));
        assert!(check(&mut memo, edges(i64::MAX).collect()).is_some());
        assert!(check(&mut memo, edges(i64::MAX - 10_000).collect()).is_some());
        let low = (0..100).map(|row| Some(i64::MIN + row % 50)).collect();
        assert!(check(&mut memo, low).is_some());
        assert_eq!(check(&mut memo, vec![Some(i64::MAX), Some(i64::MIN)]), None);
    }

    #[test]
    fn an_error_leaves_nothing_half_known() {
        let mut memo = Memo::default();
        let array: ArrayRef = Arc::new(Int32Array::from(vec![3, 1, 2]));
        let failed = memo.rows(&array, Prospect::default(), |_| {
            datafusion::common::exec_err!("a predicate that fails")
        });
        assert!(failed.unwrap().is_err());
        let all = |values: ArrayRef| Ok(BooleanBuffer::new_set(values.len()));
        let answer = memo.rows(&array, Prospect::default(), all);
        assert_eq!(answer.unwrap().unwrap().hits.count_set_bits(), 3);
    }

    proptest! {
        #[test]
        fn any_blocks_are_answered_as_they_would_be(
            blocks in proptest::collection::vec(
                (any::<i64>(), 1i64..1 << 22, 1usize..300, any::<bool>()), 1..12),
        ) {
            let mut memo = Memo::default();
            for (start, spread, rows, nulls) in blocks {
                let keys = (0..rows as i64).map(|row| {
                    let key = start.wrapping_add((row.wrapping_mul(7919)).rem_euclid(spread));
                    (!nulls || row % 5 != 0).then_some(key)
                });
                // Given up or right.
                let _ = check(&mut memo, keys.collect());
            }
        }
    }
}
