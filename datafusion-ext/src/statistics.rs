//! What the cache knows of a column better than footers: nulls and bounds, counted from the values
//! themselves, and how many distinct values there are, for the optimizer.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use arrow::array::{ArrayRef, Scalar};
use arrow::datatypes::DataType;
use bytes::Bytes;
use datafusion::common::stats::Precision;
use datafusion::common::{ColumnStatistics, ScalarValue};
use stoa_forms::{Chunk, ChunkStatistics, Sketch};
use stoa_reader::{Table, TableFile, View};
use stoa_shm::Snapshot;

use crate::claims::Claims;

/// What is known of one column of a table, all of whose chunks are cached as blocks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ColumnKnown {
    rows: usize,
    null_count: usize,
    min: Option<ScalarValue>,
    max: Option<ScalarValue>,
    /// Whether `min` and `max` are values of the column, and not only around them.
    exact: bool,
    distinct: Option<usize>,
}

impl ColumnKnown {
    /// Puts what is known in the place of what footers say.
    ///
    /// Where the bounds are only around the values, a footer's own stay if they lie within; so they
    /// do where no bounds are known, of types that are not compared here.
    pub(crate) fn complete(&self, statistics: &mut ColumnStatistics) {
        statistics.null_count = Precision::Exact(self.null_count);
        self.bound(&mut statistics.min_value, &self.min, Ordering::Less);
        self.bound(&mut statistics.max_value, &self.max, Ordering::Greater);
        if let (Precision::Absent, Some(distinct)) = (&statistics.distinct_count, self.distinct) {
            // An estimate may be more than there can be.
            let most = self.rows - self.null_count;
            statistics.distinct_count = Precision::Inexact(distinct.min(most));
        }
    }

    /// Puts a bound in the place of what a footer says; what compares as `outside` to it is not
    /// within.
    fn bound(
        &self,
        said: &mut Precision<ScalarValue>,
        known: &Option<ScalarValue>,
        outside: Ordering,
    ) {
        let says_a_value = said.get_value().is_some_and(|said| !said.is_null());
        match known {
            Some(known) if self.exact => *said = Precision::Exact(known.clone()),
            Some(known) => {
                let compared = said.get_value().and_then(|said| said.partial_cmp(known));
                if !says_a_value || compared.is_none_or(|compared| compared == outside) {
                    *said = Precision::Inexact(known.clone());
                }
            }
            None if self.null_count == self.rows && says_a_value => *said = Precision::Absent,
            None => {}
        }
    }
}

/// Columns' knowledge by position, for one generation of the cache.
#[derive(Debug)]
pub(crate) struct Knowledge {
    /// The generation itself and not its number: a directory that was made anew counts from one.
    known: Mutex<(Weak<Snapshot>, ByColumn)>,
}

type ByColumn = HashMap<usize, Option<Arc<ColumnKnown>>>;

impl Default for Knowledge {
    fn default() -> Self {
        Self {
            known: Mutex::new((Weak::new(), HashMap::new())),
        }
    }
}

impl Knowledge {
    /// What is known of a column, worked out once a generation.
    pub(crate) fn of(
        &self,
        view: &View,
        table: &Table,
        position: usize,
        name: &str,
        data_type: &DataType,
    ) -> Option<Arc<ColumnKnown>> {
        // Entries are whole: a panic while one is made leaves none.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = Arc::downgrade(view.snapshot());
        if !known.0.ptr_eq(&generation) {
            *known = (generation, HashMap::new());
        }
        let entry = known.1.entry(position);
        entry
            .or_insert_with(|| column_known(view, table, name, data_type).map(Arc::new))
            .clone()
    }
}

/// Merges what the chunks of a column know; `None` if one of them is not cached as blocks.
///
/// Files whose footers say otherwise are not believed any more.
fn column_known(
    view: &View,
    table: &Table,
    name: &str,
    data_type: &DataType,
) -> Option<ColumnKnown> {
    let mut merge = Merge::new(data_type);
    for file in table.files() {
        let position = file.roots().iter().position(|root| root.name() == name);
        let claims = position.and_then(|position| Claims::of(file, position));
        for (index, group) in file.metadata().row_groups().iter().enumerate() {
            let Some(position) = position else {
                // A column that the file does not have is read as nulls.
                merge.add_nulls(usize::try_from(group.num_rows()).ok()?);
                continue;
            };
            let found = chunk_statistics(view, file, index, position)?;
            let untrue = claims
                .as_ref()
                .and_then(|claims| claims.refuted(index, &found));
            if let Some(untrue) = untrue {
                file.disbelieve(&format!("{untrue} of column {name:?}, row group {index}"));
            }
            merge.add(&found);
        }
    }
    Some(merge.finish())
}

/// Opened without being counted as a use of the chunk.
fn chunk_statistics(
    view: &View,
    file: &TableFile,
    row_group: usize,
    position: usize,
) -> Option<ChunkStatistics> {
    let root = &file.roots()[position];
    let snapshot = view.snapshot();
    let entry = snapshot.lookup(view.file_id(file)?, row_group as u32, root.first_leaf)?;
    if entry.form() == stoa_forms::FORM_PARQUET {
        return None;
    }
    let bytes = Bytes::from_owner(snapshot.open_chunk(&entry).ok()?);
    let data_type = file.decoded_schema().field(position).data_type();
    let chunk = Chunk::open(entry.form(), bytes, data_type).ok()?;
    Some(chunk.statistics().clone())
}

/// Statistics of chunks put together.
struct Merge<'a> {
    data_type: &'a DataType,
    rows: usize,
    null_count: usize,
    /// `None` once a chunk with values has no bounds.
    bounds: Option<Option<(ScalarValue, ScalarValue)>>,
    exact: bool,
    distinct: Option<Sketch>,
}

impl<'a> Merge<'a> {
    fn new(data_type: &'a DataType) -> Self {
        Self {
            data_type,
            rows: 0,
            null_count: 0,
            bounds: Some(None),
            // Not-a-number is in no bound, and zeros have two signs.
            exact: !data_type.is_floating(),
            distinct: Some(Sketch::default()),
        }
    }

    fn add_nulls(&mut self, rows: usize) {
        self.rows += rows;
        self.null_count += rows;
    }

    fn add(&mut self, chunk: &ChunkStatistics) {
        self.rows += chunk.rows;
        self.null_count += chunk.null_count;
        if chunk.null_count == chunk.rows {
            return;
        }
        self.exact &= chunk.exact;
        let value = |bound: &Option<Scalar<ArrayRef>>| {
            let array = bound.clone()?.into_inner();
            let value = ScalarValue::try_from_array(&array, 0).ok()?;
            (&value.data_type() == self.data_type).then_some(value)
        };
        self.bounds = match (self.bounds.take(), value(&chunk.min), value(&chunk.max)) {
            (Some(before), Some(min), Some(max)) => Some(Some(match before {
                Some((least, largest)) => (
                    lesser(least, min, Ordering::Less),
                    lesser(largest, max, Ordering::Greater),
                ),
                None => (min, max),
            })),
            _ => None,
        };
        match (&mut self.distinct, &chunk.distinct) {
            (Some(all), Some(distinct)) => all.merge(distinct),
            (all, _) => *all = None,
        }
    }

    fn finish(self) -> ColumnKnown {
        let (min, max) = self.bounds.flatten().unzip();
        ColumnKnown {
            rows: self.rows,
            null_count: self.null_count,
            min,
            max,
            exact: self.exact,
            distinct: self
                .distinct
                .map(|sketch| usize::try_from(sketch.estimate()).unwrap_or(usize::MAX)),
        }
    }
}

/// `b` if it compares to `a` as said, else `a`.
fn lesser(a: ScalarValue, b: ScalarValue, said: Ordering) -> ScalarValue {
    if b.partial_cmp(&a) == Some(said) {
        b
    } else {
        a
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Array, Float64Array, Int64Array};
    use stoa_forms::{FORM_ARROW, encode_arrow};

    fn statistics(array: ArrayRef) -> ChunkStatistics {
        let data_type = array.data_type().clone();
        let bytes = encode_arrow(&[array], &data_type).unwrap();
        // Chunks lie at a boundary in their segments, which a vector need not.
        let mut room = vec![0; bytes.len() + 64];
        let at = room.as_ptr().align_offset(64);
        room[at..at + bytes.len()].copy_from_slice(&bytes);
        let bytes = Bytes::from_owner(room).slice(at..at + bytes.len());
        let chunk = Chunk::open(FORM_ARROW, bytes, &data_type).unwrap();
        chunk.statistics().clone()
    }

    fn numbers(values: impl IntoIterator<Item = Option<i64>>) -> ChunkStatistics {
        statistics(Arc::new(Int64Array::from_iter(values)))
    }

    #[test]
    fn chunks_are_merged_and_known_better_than_footers_say() {
        let mut merge = Merge::new(&DataType::Int64);
        merge.add(&numbers((0..1000).map(Some)));
        merge.add(&numbers((500..2000).map(|v| (v % 3 > 0).then_some(v))));
        merge.add(&numbers([None, None]));
        merge.add_nulls(10);
        let known = merge.finish();
        assert_eq!((known.rows, known.null_count), (2512, 512));
        let mut filled = ColumnStatistics::new_unknown();
        filled.max_value = Precision::Exact(ScalarValue::Int64(Some(7)));
        filled.null_count = Precision::Exact(0);
        known.complete(&mut filled);
        assert_eq!(filled.null_count, Precision::Exact(512));
        assert_eq!(
            filled.min_value,
            Precision::Exact(ScalarValue::Int64(Some(0)))
        );
        assert_eq!(
            filled.max_value,
            Precision::Exact(ScalarValue::Int64(Some(1999)))
        );
        let Precision::Inexact(distinct) = filled.distinct_count else {
            panic!("an estimate is not exact")
        };
        assert!((1500..1850).contains(&distinct), "{distinct} of 1667");
    }

    #[test]
    fn bounds_around_the_values_leave_those_within_to_the_footer() {
        let long = |first: char| format!("{first}{}", "m".repeat(100));
        let texts = arrow::array::StringViewArray::from_iter_values([long('b'), long('x')]);
        let mut merge = Merge::new(&DataType::Utf8View);
        merge.add(&statistics(Arc::new(texts)));
        let known = merge.finish();
        let text = |text: String| Precision::Exact(ScalarValue::Utf8View(Some(text)));
        let mut said = ColumnStatistics::new_unknown()
            .with_min_value(text(long('b')))
            .with_max_value(text(long('y')));
        known.complete(&mut said);
        assert_eq!(said.min_value, text(long('b')));
        let Precision::Inexact(max) = &said.max_value else {
            panic!("{:?} is not the largest value", said.max_value)
        };
        assert!(*max < ScalarValue::Utf8View(Some("xn".into())), "{max}");
    }

    #[test]
    fn nulls_alone_have_no_bounds() {
        let mut merge = Merge::new(&DataType::Int64);
        merge.add(&numbers([None, None]));
        let number = Precision::Exact(ScalarValue::Int64(Some(7)));
        let nothing = Precision::Exact(ScalarValue::Int64(None));
        let mut said = ColumnStatistics::new_unknown()
            .with_min_value(number)
            .with_max_value(nothing.clone());
        merge.finish().complete(&mut said);
        assert_eq!(
            (said.min_value, said.max_value),
            (Precision::Absent, nothing)
        );
    }

    #[test]
    fn a_chunk_without_bounds_leaves_the_column_without() {
        let nan: ArrayRef = Arc::new(Float64Array::from(vec![1.0, f64::NAN]));
        let one: ArrayRef = Arc::new(Float64Array::from(vec![1.0]));
        let mut merge = Merge::new(&DataType::Float64);
        merge.add(&statistics(one.clone()));
        merge.add(&statistics(nan));
        merge.add(&statistics(one));
        let known = merge.finish();
        assert_eq!((known.min, known.max, known.exact), (None, None, false));
        assert!(known.distinct.is_some());
    }

    #[test]
    fn bounds_of_another_type_than_the_tables_are_no_bounds() {
        let mut merge = Merge::new(&DataType::Int32);
        merge.add(&numbers([Some(1), Some(2)]));
        assert_eq!(merge.finish().min, None);
    }
}
