//! How the rows of a scan's files are divided between its partitions: at blocks, not at row groups.
//!
//! Stock Parquet gives a row group to the partition whose byte range holds its start, so a table
//! of few large row groups keeps few cores busy. What is cached can be read from any block on, so
//! its row groups are divided; those that have to be decoded stay whole, because two partitions
//! would each fetch and decode all of it.
//!
//! A [`Share`] travels with its file as an extension, beside a byte range that says about the
//! same. Where a serializer drops extensions, it drops those of all shares: then the ranges tile
//! the file in stock Parquet's terms, and every row group still has one owner.

use std::ops::Range;
use std::sync::Arc;

use datafusion_datasource::PartitionedFile;
use datafusion_datasource::file_groups::FileGroup;
use datafusion_datasource::file_scan_config::FileScanConfig;
use datafusion_datasource_parquet::{ParquetAccessPlan, ParquetRowSelection, RowGroupAccess};
use parquet::arrow::arrow_reader::RowSelection;
use parquet::file::metadata::ParquetMetaData;
use stoa_forms::BLOCK_ROWS;
use stoa_reader::{TableFile, View};
use stoa_shm::Entry;

use super::context::resolve;

/// The fewest rows that are worth a share of their own: opening one prunes and looks up anew.
const SHARE_ROWS_MIN: usize = 8 * BLOCK_ROWS;

/// A boundary between two blocks of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Boundary {
    row_group: usize,
    block: usize,
}

/// The blocks of a file that one step of a scan reads: those from `start` up to `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    start: Boundary,
    end: Boundary,
}

impl Share {
    /// The share's rows of a row group that has `rows`; empty where it has none of them.
    fn rows(&self, row_group: usize, rows: usize) -> Range<usize> {
        let at = |boundary: Boundary| match row_group.cmp(&boundary.row_group) {
            std::cmp::Ordering::Less => rows,
            std::cmp::Ordering::Equal => (boundary.block * BLOCK_ROWS).min(rows),
            std::cmp::Ordering::Greater => 0,
        };
        let end = at(self.end);
        // Before the start all rows are left out, at and after it those from the boundary on.
        at(self.start).min(end)..end
    }

    /// The share as an access plan of a file whose row groups have `rows`.
    pub(crate) fn access_plan(&self, rows: impl Iterator<Item = usize>) -> ParquetAccessPlan {
        let groups = rows.enumerate().map(|(index, rows)| {
            let own = self.rows(index, rows);
            if own.is_empty() {
                RowGroupAccess::Skip
            } else if own.len() == rows {
                RowGroupAccess::Scan
            } else {
                let selection = RowSelection::from_consecutive_ranges(std::iter::once(own), rows);
                RowGroupAccess::Selection(selection)
            }
        });
        ParquetAccessPlan::new(groups.collect())
    }
}

/// A row group to be divided.
#[derive(Clone, Copy, Debug)]
struct Divisible {
    rows: usize,
    /// Whether it may be divided at any block.
    at_blocks: bool,
}

/// What one step of a scan reads, of one file or of several that follow each other.
#[derive(Debug)]
struct Run {
    /// Which end it reaches up to.
    end: usize,
    /// Shares beside the positions of their files.
    shares: Vec<(usize, Share)>,
}

/// Divides the row groups of files, in order, into runs that end about where `ends` say: so many
/// rows lie before each. Runs, and the shares in them, are ascending; each block is in exactly one.
fn divide(files: &[Vec<Divisible>], ends: &[usize]) -> Vec<Run> {
    let mut runs: Vec<Run> = vec![];
    let mut before = 0;
    for (file, groups) in files.iter().enumerate() {
        for (row_group, group) in groups.iter().enumerate() {
            let unit = if group.at_blocks {
                BLOCK_ROWS
            } else {
                group.rows.max(1)
            };
            for (block, first) in (0..group.rows).step_by(unit).enumerate() {
                let rows = unit.min(group.rows - first);
                // The owner of the unit's middle row owns the unit.
                let middle = before + rows / 2;
                let end = ends.partition_point(|end| *end <= middle);
                before += rows;
                if runs.last().is_none_or(|run| run.end != end) {
                    let shares = vec![];
                    runs.push(Run { end, shares });
                }
                let start = Boundary { row_group, block };
                let end = if first + rows == group.rows {
                    Boundary {
                        row_group: row_group + 1,
                        block: 0,
                    }
                } else {
                    Boundary {
                        row_group,
                        block: block + 1,
                    }
                };
                let Some(run) = runs.last_mut() else { continue };
                match run.shares.last_mut() {
                    Some((of, share)) if *of == file => share.end = end,
                    _ => run.shares.push((file, Share { start, end })),
                }
            }
        }
    }
    runs
}

/// Where shares of `rows` rows end, and for each the partition that begins with it.
///
/// Partitions begin with equally many rows. Where work may move between them, they take one share
/// after the other, each half of an even part of what is left: so few are opened, and the last ones
/// are small, so that all partitions are done at about the same time, whatever the rows cost
/// (Polychronopoulos and Kuck, "Guided self-scheduling", 1987). Where the order of rows counts,
/// partitions never exchange work.
fn share_ends(rows: usize, partitions: usize, in_order: bool) -> Vec<(usize, usize)> {
    let of = |partition: usize| (rows as u128 * partition as u128 / partitions as u128) as usize;
    let mut ends: Vec<(usize, usize)> = vec![];
    let mut start = 0;
    for partition in 0..partitions {
        let last = of(partition + 1);
        loop {
            let share = ((rows - start) / (2 * partitions)).max(SHARE_ROWS_MIN);
            // What is less than half a share is not left alone.
            if in_order || last - start < share + SHARE_ROWS_MIN / 2 {
                break;
            }
            start += share;
            ends.push((start, partition));
        }
        start = last;
        ends.push((start, partition));
    }
    ends
}

/// The scan's file groups with the files divided between `partitions`; `None` where that is
/// better left to stock Parquet's byte ranges.
///
/// `columns` are the names of the columns that the scan reads. With `in_order`, a partition's
/// files and their rows stay in the order they had.
pub(crate) fn repartition(
    view: &View,
    store: &str,
    config: &FileScanConfig,
    columns: &[&str],
    partitions: usize,
    in_order: bool,
) -> Option<Vec<FileGroup>> {
    let files: Vec<&PartitionedFile> = config.file_groups.iter().flat_map(|g| g.iter()).collect();
    if in_order && files.len() != 1 {
        return None;
    }
    let known = files
        .iter()
        .map(|file| divisible_file(view, store, file))
        .collect::<Option<Vec<_>>>()?;
    let groups: Vec<Vec<Divisible>> = known
        .iter()
        .map(|file| row_groups(view, file, columns))
        .collect();
    if !groups.iter().flatten().any(|group| group.at_blocks) {
        return None;
    }
    let rows = groups.iter().flatten().map(|group| group.rows).sum();
    let partitions = partitions.max(1);
    let ends = share_ends(rows, partitions, in_order);
    let before: Vec<usize> = ends.iter().map(|(end, _)| *end).collect();
    let mut divided: Vec<Vec<PartitionedFile>> = vec![vec![]; partitions];
    for run in divide(&groups, &before) {
        let group = &mut divided[ends[run.end].1];
        group.extend(run.shares.iter().map(|(index, share)| {
            let (start, end) = byte_range(&known[*index], &groups[*index], share);
            PartitionedFile::clone(files[*index])
                .with_range(start, end)
                .with_extension(Arc::clone(&known[*index]))
                .with_extension(*share)
        }));
    }
    divided.retain(|files| !files.is_empty());
    let divided: Vec<FileGroup> = divided.into_iter().map(FileGroup::new).collect();
    (!divided.is_empty()).then_some(divided)
}

/// Whether the file carries its share of the scan already.
pub(crate) fn is_divided(file: &PartitionedFile) -> bool {
    file.extension::<Share>().is_some()
}

/// The cached table's file that `file` is, if nobody has chosen rows of it yet.
fn divisible_file(view: &View, store: &str, file: &PartitionedFile) -> Option<Arc<TableFile>> {
    let chosen = file.range.is_some()
        || is_divided(file)
        || file.extension::<ParquetAccessPlan>().is_some()
        || file.extension::<ParquetRowSelection>().is_some();
    if chosen {
        return None;
    }
    resolve(view, store, file)
}

fn row_groups(view: &View, file: &TableFile, columns: &[&str]) -> Vec<Divisible> {
    let leaves: Vec<u32> = file
        .roots()
        .iter()
        .filter(|root| columns.contains(&root.name()))
        .map(|root| root.first_leaf)
        .collect();
    let entries = view.entries(file, &leaves);
    let in_blocks = |entry: &Option<Entry>| {
        let entry = entry.as_ref();
        entry.is_some_and(|entry| entry.form() != stoa_forms::FORM_PARQUET)
    };
    let groups = file.metadata().row_groups().iter().enumerate();
    groups
        .map(|(index, group)| Divisible {
            rows: usize::try_from(group.num_rows()).unwrap_or(0),
            at_blocks: entries[index * leaves.len()..][..leaves.len()]
                .iter()
                .all(in_blocks),
        })
        .collect()
}

/// Bytes that stand for a share: ranges of adjoining shares touch, and the first and the last
/// reach to the ends of the file.
fn byte_range(file: &TableFile, groups: &[Divisible], share: &Share) -> (i64, i64) {
    let metadata = file.metadata();
    let size = i64::try_from(file.identity().size).unwrap_or(i64::MAX);
    let start_of = |row_group: usize| -> i64 {
        if row_group == 0 {
            return 0;
        }
        match metadata.row_groups().get(row_group) {
            // Where stock Parquet takes a row group to begin.
            Some(group) if group.num_columns() > 0 => {
                let column = group.column(0);
                let start = column.dictionary_page_offset();
                start.unwrap_or_else(|| column.data_page_offset())
            }
            _ => size,
        }
    };
    let at = |boundary: Boundary| {
        let start = start_of(boundary.row_group);
        if boundary.block == 0 {
            return start;
        }
        let length = (start_of(boundary.row_group + 1) - start).max(0) as u128;
        let rows = groups[boundary.row_group].rows.max(1) as u128;
        // Past the start, so that the row group belongs to the share with its first block.
        start + (length * (boundary.block * BLOCK_ROWS) as u128 / rows).max(1) as i64
    };
    (at(share.start), at(share.end))
}

/// `file` for stock Parquet: its share, if it has one, as the rows to read.
pub(crate) fn for_stock(file: PartitionedFile, table_file: &TableFile) -> PartitionedFile {
    match file.extension::<Share>().copied() {
        Some(share) => with_plan(file, share.access_plan(row_counts(table_file.metadata()))),
        None => file,
    }
}

/// `file` with the rows to read, which stand for its byte range as well.
pub(crate) fn with_plan(mut file: PartitionedFile, plan: ParquetAccessPlan) -> PartitionedFile {
    if is_divided(&file) {
        file.range = None;
    }
    file.with_extension(plan)
}

/// Rows of a file's row groups.
pub(crate) fn row_counts(metadata: &ParquetMetaData) -> impl Iterator<Item = usize> {
    let groups = metadata.row_groups().iter();
    groups.map(|group| usize::try_from(group.num_rows()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(rows: &[usize], at_blocks: bool) -> Vec<Divisible> {
        let group = |rows: &usize| Divisible {
            rows: *rows,
            at_blocks,
        };
        rows.iter().map(group).collect()
    }

    /// How many rows each run reads, after a check that every row is read exactly once, in order.
    fn rows_by_run(files: &[Vec<Divisible>], runs: &[Run]) -> Vec<usize> {
        let mut next = vec![vec![]; files.len()];
        for (file, groups) in files.iter().enumerate() {
            next[file] = vec![0; groups.len()];
        }
        let mut read = vec![];
        for run in runs {
            let mut rows = 0;
            for (file, share) in &run.shares {
                for (index, group) in files[*file].iter().enumerate() {
                    let own = share.rows(index, group.rows);
                    if !own.is_empty() {
                        assert_eq!(own.start, next[*file][index], "a row twice or left out");
                        next[*file][index] = own.end;
                        rows += own.len();
                    }
                }
            }
            read.push(rows);
        }
        for (file, groups) in files.iter().enumerate() {
            let all: Vec<usize> = groups.iter().map(|group| group.rows).collect();
            assert_eq!(next[file], all, "rows of file {file} that nobody reads");
        }
        read
    }

    /// Equally large runs.
    fn even(files: &[Vec<Divisible>], runs: usize) -> Vec<usize> {
        let rows: usize = files.iter().flatten().map(|group| group.rows).sum();
        let ends = share_ends(rows, runs, true).into_iter();
        ends.map(|(end, _)| end).collect()
    }

    #[test]
    fn one_large_row_group_is_divided_at_blocks() {
        let files = [groups(&[100 * BLOCK_ROWS + 17], true)];
        let runs = divide(&files, &even(&files, 4));
        let rows = rows_by_run(&files, &runs);
        assert_eq!(rows.len(), 4);
        let (least, most) = (rows.iter().min().unwrap(), rows.iter().max().unwrap());
        assert!(most - least <= BLOCK_ROWS, "{rows:?}");
    }

    #[test]
    fn what_is_not_cached_stays_whole() {
        let files = [groups(&[30_000, 30_000, 30_000], false)];
        let runs = divide(&files, &even(&files, 2));
        let mut rows = rows_by_run(&files, &runs);
        rows.sort_unstable();
        assert_eq!(rows, [30_000, 60_000]);
        let single = [groups(&[90_000], false)];
        assert_eq!(
            rows_by_run(&single, &divide(&single, &even(&single, 8))),
            [90_000]
        );
    }

    #[test]
    fn shares_of_several_files_cover_them_all() {
        for shares in 1..12 {
            let files = [
                groups(&[7_000, 0, 50_000, 1], true),
                groups(&[8_192, 8_193], false),
                groups(&[], true),
                groups(&[16_384, 100_000], true),
            ];
            let runs = divide(&files, &even(&files, shares));
            assert!(runs.len() <= shares, "{} runs of {shares}", runs.len());
            rows_by_run(&files, &runs);
        }
        assert!(divide(&[groups(&[0, 0], true)], &[0, 0, 0]).is_empty());
    }

    #[test]
    fn shares_become_smaller_towards_the_end() {
        let blocks = |ends: Vec<(usize, usize)>| -> Vec<(usize, usize)> {
            let mut start = 0;
            let share = |(end, partition)| (std::mem::replace(&mut start, end), end, partition);
            let shares = ends.into_iter().map(share);
            shares
                .map(|(start, end, partition)| ((end - start) / BLOCK_ROWS, partition))
                .collect()
        };
        let of = |rows, in_order| blocks(share_ends(rows * BLOCK_ROWS, 2, in_order));
        let sizes = [
            (183, 0),
            (137, 0),
            (45, 0),
            (91, 1),
            (68, 1),
            (51, 1),
            (38, 1),
            (28, 1),
        ];
        let large = of(732, false);
        assert_eq!(large[..8], sizes);
        // The last one takes with it what would be less than half a share.
        let (last, rest) = large[8..].split_last().unwrap();
        assert!(
            rest.is_sorted_by(|a, b| a.0 >= b.0) && last.0 < 13,
            "{large:?}"
        );
        assert!(large.iter().map(|share| share.0).sum::<usize>() > 720);
        assert_eq!(of(732, true), [(366, 0), (366, 1)]);
        // Tables of few rows are not cut into more shares than partitions.
        assert_eq!(of(8, false), [(4, 0), (4, 1)]);
        assert_eq!(of(22, false), [(11, 0), (11, 1)]);
        assert_eq!(of(24, false), [(8, 0), (4, 0), (8, 1), (4, 1)]);
        assert_eq!(share_ends(0, 2, false), [(0, 0), (0, 1)]);
    }

    #[test]
    fn every_partition_begins_with_equally_many_rows() {
        for partitions in [1, 2, 3, 7, 64] {
            let rows = 10_000_000;
            let ends = share_ends(rows, partitions, false);
            assert!(ends.is_sorted() && ends.last() == Some(&(rows, partitions - 1)));
            for partition in 0..partitions {
                let end = ends
                    .iter()
                    .filter(|end| end.1 == partition)
                    .map(|end| end.0);
                assert_eq!(end.max(), Some(rows * (partition + 1) / partitions));
            }
        }
    }

    #[test]
    fn access_plans_name_the_rows_of_the_share() {
        let share = Share {
            start: Boundary {
                row_group: 1,
                block: 1,
            },
            end: Boundary {
                row_group: 3,
                block: 0,
            },
        };
        let plan = share.access_plan([5, 20_000, 9, 9].into_iter());
        assert_eq!(plan.row_group_indexes(), [1, 2]);
        let RowGroupAccess::Selection(selection) = &plan.inner()[1] else {
            panic!("part of the row group")
        };
        assert_eq!(selection.row_count(), 20_000 - BLOCK_ROWS);
        assert_eq!(plan.inner()[2], RowGroupAccess::Scan);
    }
}
