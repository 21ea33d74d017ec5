//! Which blocks of a row group can have matching rows: zone maps and dictionaries of its chunks
//! against the predicate as it is now.

use std::collections::HashSet;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BooleanArray, Scalar};
use datafusion::common::pruning::PruningStatistics;
use datafusion::common::{Column, ScalarValue};
use datafusion_pruning::PruningPredicate;
use stoa_forms::Chunk;

/// More values than this are not looked up in a dictionary: a zone map says nearly as much.
const MEMBERS_MAX: usize = 64;

/// The chunks of one row group as containers of blocks.
pub(super) struct BlockStatistics<'a> {
    /// By name of the column.
    pub(super) chunks: &'a [(&'a str, &'a Chunk)],
    pub(super) blocks: usize,
}

impl BlockStatistics<'_> {
    fn chunk(&self, column: &Column) -> Option<&Chunk> {
        let found = self.chunks.iter().find(|(name, _)| *name == column.name);
        found.map(|(_, chunk)| *chunk)
    }

    /// Whether each block may have a row that matches `predicate`; `None` if all may.
    pub(super) fn matching(&self, predicate: &PruningPredicate) -> Option<Vec<bool>> {
        if self.chunks.is_empty() || predicate.always_true() {
            return None;
        }
        // A predicate that statistics cannot answer keeps all blocks.
        let matching = predicate.prune(self).ok()?;
        matching.contains(&false).then_some(matching)
    }
}

impl PruningStatistics for BlockStatistics<'_> {
    fn min_values(&self, column: &Column) -> Option<ArrayRef> {
        Some(Arc::clone(&self.chunk(column)?.zones()?.mins))
    }

    fn max_values(&self, column: &Column) -> Option<ArrayRef> {
        Some(Arc::clone(&self.chunk(column)?.zones()?.maxs))
    }

    fn num_containers(&self) -> usize {
        self.blocks
    }

    fn null_counts(&self, column: &Column) -> Option<ArrayRef> {
        Some(Arc::new(self.chunk(column)?.zones()?.null_counts.clone()))
    }

    fn row_counts(&self) -> Option<ArrayRef> {
        let zones = self.chunks.iter().find_map(|(_, chunk)| chunk.zones())?;
        Some(Arc::new(zones.row_counts.clone()))
    }

    /// False for all blocks of a chunk whose dictionary has none of the values.
    fn contained(&self, column: &Column, values: &HashSet<ScalarValue>) -> Option<BooleanArray> {
        let chunk = self.chunk(column)?;
        if values.len() > MEMBERS_MAX {
            return None;
        }
        let data_type = chunk.zones()?.mins.data_type();
        let absent = values.iter().all(|value| {
            let known = !value.is_null() && &value.data_type() == data_type;
            known
                && value
                    .to_array_of_size(1)
                    .is_ok_and(|value| !chunk.may_contain(&Scalar::new(value)))
        });
        absent.then(|| BooleanArray::from(vec![false; self.blocks]))
    }
}
