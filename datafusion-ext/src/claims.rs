//! What a footer says of the chunks of a column, held against the values.

use std::cmp::Ordering;

use arrow::array::{ArrayRef, Scalar};
use datafusion::common::ScalarValue;
use parquet::arrow::arrow_reader::statistics::StatisticsConverter;
use parquet::file::statistics::Statistics;
use stoa_forms::ChunkStatistics;
use stoa_reader::TableFile;

/// What the footer says of one column of a file, by row group.
pub(crate) struct Claims {
    mins: ArrayRef,
    maxs: ArrayRef,
    said: Vec<Option<Statistics>>,
}

impl Claims {
    /// `None` of nested columns, and where the footer's bounds do not convert.
    pub(crate) fn of(file: &TableFile, position: usize) -> Option<Claims> {
        let root = file.roots().get(position)?;
        let leaf = root.first_leaf as usize;
        let metadata = file.metadata();
        let schema = metadata.file_metadata().schema_descr();
        let field = file.decoded_schema().field(position);
        let is_flat = root.leaves == 1 && schema.column(leaf).max_rep_level() == 0;
        if !is_flat || field.data_type().is_nested() {
            return None;
        }
        let groups = metadata.row_groups();
        let converter = StatisticsConverter::from_column_index(leaf, field, schema).ok()?;
        let said = groups
            .iter()
            .map(|group| group.column(leaf).statistics().cloned());
        Some(Claims {
            mins: converter.row_group_mins(groups).ok()?,
            maxs: converter.row_group_maxes(groups).ok()?,
            said: said.collect(),
        })
    }

    /// What the values of a row group's chunk show not to be so; `None` if nothing does.
    pub(crate) fn refuted(
        &self,
        row_group: usize,
        found: &ChunkStatistics,
    ) -> Option<&'static str> {
        let said = self.said.get(row_group)?.as_ref()?;
        let nulls = said.null_count_opt();
        if nulls.is_some_and(|nulls| nulls != found.null_count as u64) {
            return Some("the number of nulls");
        }
        // Bounds around the values show nothing: a footer's may be better.
        if !found.exact {
            return None;
        }
        let refutes = |bounds: &ArrayRef, found: &Option<Scalar<ArrayRef>>, exact, outside| {
            let of_values = value(&found.clone()?.into_inner(), 0)?;
            let compared = value(bounds, row_group)?.partial_cmp(&of_values)?;
            Some(compared == outside || (exact && compared != Ordering::Equal))
        };
        let min = refutes(
            &self.mins,
            &found.min,
            said.min_is_exact(),
            Ordering::Greater,
        );
        let max = refutes(&self.maxs, &found.max, said.max_is_exact(), Ordering::Less);
        match (min, max) {
            (Some(true), _) => Some("the least value"),
            (_, Some(true)) => Some("the largest value"),
            _ => None,
        }
    }
}

/// `None` for a null.
fn value(array: &ArrayRef, at: usize) -> Option<ScalarValue> {
    let value = ScalarValue::try_from_array(array, at).ok()?;
    (!value.is_null()).then_some(value)
}
