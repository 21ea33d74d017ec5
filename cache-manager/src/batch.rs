//! How the chunks to be fetched are gathered into batches: one row group of one file each, so that
//! neighbouring columns become one request, and never more bytes than a fill may hold at once.

use std::collections::HashMap;

use crate::diff::Want;

/// Largest number of bytes that one batch fetches, unless a single chunk is larger.
pub const BATCH_BYTES_MAX: u64 = 32 << 20;

/// Chunks of one row group, fetched and decoded together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The table whose catalog describes the file.
    pub table: usize,
    /// The file's position in that catalog.
    pub file: u32,
    /// Row group in the file.
    pub row_group: u32,
    /// Positions in the list of wants, in column order.
    pub wants: Vec<usize>,
    /// Bytes to fetch.
    pub compressed_bytes: u64,
    /// Expected bytes in shared memory.
    pub bytes: u64,
    /// Bytes that it is decoded to.
    pub decoded_bytes: u64,
}

impl Batch {
    /// Memory that the batch needs on its way: what is fetched, what it decodes to, and that laid
    /// out as a chunk of the cache.
    pub fn memory_bytes(&self) -> u64 {
        self.compressed_bytes
            .saturating_add(self.decoded_bytes)
            .saturating_add(self.bytes)
    }
}

/// Gathers `fetch` (positions in `wants`, most wanted first) into batches.
///
/// Tables come one after the other, the one with least to load first: it is complete soonest, and
/// segments hold chunks of one table, so that dropping a table frees whole segments. Within a table
/// the order is that of each row group's most wanted chunk.
pub fn batches(wants: &[Want], fetch: &[usize], bytes_max: u64) -> Vec<Batch> {
    let mut table_bytes: HashMap<usize, u64> = HashMap::new();
    let mut groups: Vec<((usize, u32, u32), Vec<usize>)> = Vec::new();
    let mut group_at: HashMap<(usize, u32, u32), usize> = HashMap::new();
    for &at in fetch {
        let want = &wants[at];
        *table_bytes.entry(want.table).or_default() += want.bytes;
        let place = (want.table, want.file, want.key.row_group);
        let group = *group_at.entry(place).or_insert_with(|| {
            groups.push((place, Vec::new()));
            groups.len() - 1
        });
        groups[group].1.push(at);
    }
    // Stable, so that row groups of a table stay in the order of their most wanted chunk.
    groups.sort_by_key(|((table, ..), _)| (table_bytes[table], *table));

    let mut batches = Vec::with_capacity(groups.len());
    for ((table, file, row_group), mut members) in groups {
        members.sort_by_key(|at| wants[*at].key.column);
        let empty = || Batch {
            table,
            file,
            row_group,
            wants: vec![],
            compressed_bytes: 0,
            bytes: 0,
            decoded_bytes: 0,
        };
        let mut batch = empty();
        for at in members {
            let want = &wants[at];
            let full = batch.compressed_bytes.saturating_add(want.compressed_bytes) > bytes_max;
            if full && !batch.wants.is_empty() {
                batches.push(std::mem::replace(&mut batch, empty()));
            }
            batch.wants.push(at);
            batch.compressed_bytes += want.compressed_bytes;
            batch.bytes += want.bytes;
            batch.decoded_bytes += want.decoded_bytes;
        }
        batches.push(batch);
    }
    batches
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use stoa_layout::Form;
    use stoa_shm::ChunkKey;

    use super::*;

    fn want(table: usize, file: u32, row_group: u32, column: u32, bytes: u64) -> Want {
        let name = [b'f', table as u8, file as u8];
        Want {
            key: ChunkKey {
                file: Arc::from(&name[..]),
                row_group,
                column,
            },
            table,
            also: vec![],
            file,
            form: Form::Arrow,
            bytes: bytes * 3,
            compressed_bytes: bytes,
            decoded_bytes: bytes * 3,
        }
    }

    #[test]
    fn columns_of_a_row_group_go_together_in_column_order() {
        let wants = [
            want(0, 0, 1, 5, 10),
            want(0, 0, 0, 5, 10),
            want(0, 0, 1, 2, 10),
        ];
        let batches = batches(&wants, &[0, 1, 2], 1 << 20);
        let shape: Vec<_> = batches
            .iter()
            .map(|b| (b.row_group, b.wants.clone()))
            .collect();
        assert_eq!(shape, [(1, vec![2, 0]), (0, vec![1])]);
        assert_eq!((batches[0].compressed_bytes, batches[0].bytes), (20, 60));
    }

    #[test]
    fn a_batch_is_bounded_but_a_large_chunk_is_not_lost() {
        let wants = [
            want(0, 0, 0, 0, 60),
            want(0, 0, 0, 1, 500),
            want(0, 0, 0, 2, 40),
        ];
        let batches = batches(&wants, &[0, 1, 2], 100);
        let shape: Vec<_> = batches.iter().map(|b| b.wants.clone()).collect();
        assert_eq!(shape, [vec![0], vec![1], vec![2]]);
    }

    #[test]
    fn the_table_with_least_to_load_comes_first() {
        let wants = [
            want(0, 0, 0, 0, 100),
            want(1, 0, 0, 0, 10),
            want(0, 0, 1, 0, 100),
        ];
        let order: Vec<_> = batches(&wants, &[0, 1, 2], 1 << 20)
            .iter()
            .map(|b| (b.table, b.row_group))
            .collect();
        assert_eq!(order, [(1, 0), (0, 0), (0, 1)]);
    }

    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_chunk_is_in_one_batch_of_its_own_row_group(
            places in prop::collection::hash_set((0usize..3, 0u32..3, 0u32..3, 0u32..5), 0..60),
            bytes in prop::collection::vec(1u64..100, 60),
        ) {
            let wants: Vec<Want> = places
                .iter()
                .zip(&bytes)
                .map(|((table, file, group, column), bytes)| want(*table, *file, *group, *column, *bytes))
                .collect();
            let fetch: Vec<usize> = (0..wants.len()).collect();
            let batches = batches(&wants, &fetch, 150);
            let mut seen: Vec<usize> = batches.iter().flat_map(|batch| batch.wants.clone()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, fetch);
            for batch in &batches {
                prop_assert!(batch.compressed_bytes <= 150 || batch.wants.len() == 1);
                for at in &batch.wants {
                    let want = &wants[*at];
                    prop_assert_eq!((want.table, want.file, want.key.row_group), (batch.table, batch.file, batch.row_group));
                }
            }
        }
    }
}
