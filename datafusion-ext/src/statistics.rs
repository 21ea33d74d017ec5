//! What the cache knows of a column beyond the footers: nulls and bounds where a writer left them
//! out, and how many distinct values there are, for the optimizer.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{ArrayRef, Scalar};
use arrow::datatypes::DataType;
use bytes::Bytes;
use datafusion::common::stats::Precision;
use datafusion::common::{ColumnStatistics, ScalarValue};
use stoa_forms::{Chunk, ChunkStatistics, Sketch};
use stoa_reader::{Table, TableFile, View};

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
    /// Puts what is known in the place of what is absent.
    pub(crate) fn complete(&self, statistics: &mut ColumnStatistics) {
        if statistics.null_count == Precision::Absent {
            statistics.null_count = Precision::Exact(self.null_count);
        }
        let bound = |value: &Option<ScalarValue>| match value {
            Some(value) if self.exact => Precision::Exact(value.clone()),
            Some(value) => Precision::Inexact(value.clone()),
            None => Precision::Absent,
        };
        if statistics.min_value == Precision::Absent {
            statistics.min_value = bound(&self.min);
        }
        if statistics.max_value == Precision::Absent {
            statistics.max_value = bound(&self.max);
        }
        if let (Precision::Absent, Some(distinct)) = (&statistics.distinct_count, self.distinct) {
            // An estimate may be more than there can be.
            let most = self.rows - self.null_count;
            statistics.distinct_count = Precision::Inexact(distinct.min(most));
        }
    }
}

/// Columns' knowledge by position, for one generation of the cache.
#[derive(Debug)]
pub(crate) struct Knowledge {
    known: Mutex<(u64, ByColumn)>,
}

type ByColumn = HashMap<usize, Option<Arc<ColumnKnown>>>;

impl Default for Knowledge {
    fn default() -> Self {
        Self {
            known: Mutex::new((u64::MAX, HashMap::new())),
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
        let generation = view.snapshot().generation();
        if known.0 != generation {
            *known = (generation, HashMap::new());
        }
        let entry = known.1.entry(position);
        entry
            .or_insert_with(|| column_known(view, table, name, data_type).map(Arc::new))
            .clone()
    }
}

/// Merges what the chunks of a column know; `None` if one of them is not cached as blocks.
fn column_known(
    view: &View,
    table: &Table,
    name: &str,
    data_type: &DataType,
) -> Option<ColumnKnown> {
    let mut merge = Merge::new(data_type);
    for file in table.files() {
        let position = file.roots().iter().position(|root| root.name() == name);
        for (index, group) in file.metadata().row_groups().iter().enumerate() {
            match position {
                Some(position) => merge.add(&chunk_statistics(view, file, index, position)?),
                // A column that the file does not have is read as nulls.
                None => merge.add_nulls(usize::try_from(group.num_rows()).ok()?),
            }
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
    fn chunks_are_merged_and_fill_what_is_absent() {
        let mut merge = Merge::new(&DataType::Int64);
        merge.add(&numbers((0..1000).map(Some)));
        merge.add(&numbers((500..2000).map(|v| (v % 3 > 0).then_some(v))));
        merge.add(&numbers([None, None]));
        merge.add_nulls(10);
        let known = merge.finish();
        assert_eq!((known.rows, known.null_count), (2512, 512));
        let mut filled = ColumnStatistics::new_unknown();
        filled.max_value = Precision::Exact(ScalarValue::Int64(Some(7)));
        known.complete(&mut filled);
        assert_eq!(filled.null_count, Precision::Exact(512));
        assert_eq!(
            filled.min_value,
            Precision::Exact(ScalarValue::Int64(Some(0)))
        );
        assert_eq!(
            filled.max_value,
            Precision::Exact(ScalarValue::Int64(Some(7)))
        );
        let Precision::Inexact(distinct) = filled.distinct_count else {
            panic!("an estimate is not exact")
        };
        assert!((1500..1850).contains(&distinct), "{distinct} of 1667");
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
