//! A table in the shape of ClickBench's: 105 columns of web analytics, generated, and its 43 queries.
//!
//! The original is 100 million rows of a real site's hits. Ours has the same columns under names of
//! our own, with values that are skewed like the original's: a few counters and users have most
//! hits, many columns are nearly constant, most search phrases are empty, long texts repeat. It
//! says the same about a cache, and anybody can make it: rows follow from their number alone.

mod columns;
mod queries;
mod rows;
mod text;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde::{Deserialize, Serialize};
use stoa_cli::demo::generate::ROW_GROUP_ROWS;

pub use queries::queries;

/// Rows at scale 1.
pub const ROWS_AT_SCALE_ONE: u64 = 10_000_000;

/// Rows of a file, as in the original's hundred files.
const FILE_ROWS: u64 = 1_000_000;

/// The fewest files, so that small tables have something to split.
const FILES_MIN: u64 = 2;

/// Rows that are generated at a time.
const BATCH_ROWS: usize = 8192;

/// Bumped when the generated rows change, so that older files are not reused.
const GENERATION: u32 = 1;

/// The marker written last.
const MARKER: &str = "generated.json";

/// The table's name.
pub const TABLE: &str = "hits";

/// What was generated: the content of the marker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Generated {
    generation: u32,
    rows: u64,
    row_group_rows: usize,
    /// Bytes by file, relative to the directory.
    files: BTreeMap<String, u64>,
}

impl Generated {
    /// All Parquet bytes.
    pub fn bytes(&self) -> u64 {
        self.files.values().sum()
    }
}

/// The directory of a table of so many rows below the directory of all data.
pub fn directory(data: &Path, rows: u64) -> PathBuf {
    data.join(format!("clickbench-{rows}"))
}

/// What an earlier run generated into `directory`, when it is all there.
pub fn find(directory: &Path, rows: u64) -> Option<Generated> {
    let marker = std::fs::read(directory.join(MARKER)).ok()?;
    let generated: Generated = serde_json::from_slice(&marker).ok()?;
    let same = generated.generation == GENERATION
        && generated.rows == rows
        && generated.row_group_rows == ROW_GROUP_ROWS;
    let complete = generated.files.iter().all(|(file, bytes)| {
        std::fs::metadata(directory.join(file)).is_ok_and(|found| found.len() == *bytes)
    });
    (same && complete).then_some(generated)
}

/// Generates `rows` rows into `directory`, which appears whole or not at all.
///
/// # Errors
/// If the files cannot be written, or `directory` holds something else.
pub fn generate(directory: &Path, rows: u64, threads: usize) -> Result<Generated> {
    if directory.exists() {
        if !directory.join(MARKER).exists() {
            return Err(Error::other(format!(
                "{} exists and was not made by stoa-bench; choose another --path, or remove it",
                directory.display()
            )));
        }
        std::fs::remove_dir_all(directory)?;
    }
    let parent = directory.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)?;
    let work = tempfile::Builder::new()
        .prefix(".clickbench-")
        .tempdir_in(parent)?;
    std::fs::create_dir(work.path().join(TABLE))?;
    let files = write_all(work.path(), rows, threads)?;
    let generated = Generated {
        generation: GENERATION,
        rows,
        row_group_rows: ROW_GROUP_ROWS,
        files,
    };
    std::fs::write(
        work.path().join(MARKER),
        serde_json::to_vec_pretty(&generated)?,
    )?;
    std::fs::rename(work.keep(), directory)?;
    Ok(generated)
}

fn write_all(work: &Path, rows: u64, threads: usize) -> Result<BTreeMap<String, u64>> {
    let files = rows.div_ceil(FILE_ROWS).max(FILES_MIN);
    let next = AtomicU64::new(0);
    let written = Mutex::new(BTreeMap::new());
    let one = |file: u64| -> Result<()> {
        let (from, to) = (rows * file / files, rows * (file + 1) / files);
        let name = format!("{TABLE}/{TABLE}-{file:03}.parquet");
        let path = work.join(&name);
        write_file(&path, file, (to - from) as usize, rows)?;
        let bytes = std::fs::metadata(&path)?.len();
        written
            .lock()
            .expect("no thread panics holding it")
            .insert(name, bytes);
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1))
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let file = next.fetch_add(1, Ordering::Relaxed);
                        if file >= files {
                            return Ok::<(), Error>(());
                        }
                        one(file)?;
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().expect("generation does not panic"))
    })?;
    Ok(written.into_inner().expect("no thread panicked"))
}

fn write_file(path: &Path, file: u64, rows: usize, table_rows: u64) -> Result<()> {
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .build();
    let mut writer = ArrowWriter::try_new(File::create(path)?, schema(), Some(properties))
        .map_err(Error::other)?;
    let rows = rows::of_file(file, rows, table_rows);
    for rows in rows.chunks(BATCH_ROWS) {
        writer.write(&batch(rows)).map_err(Error::other)?;
    }
    writer.close().map_err(Error::other)?;
    Ok(())
}

/// The table's schema: no column has nulls, as in the original.
fn schema() -> SchemaRef {
    let fields: Vec<_> = columns::COLUMNS
        .iter()
        .map(columns::Column::field)
        .collect();
    Arc::new(Schema::new(fields))
}

fn batch(rows: &[rows::Row]) -> RecordBatch {
    let arrays = columns::COLUMNS.iter().map(|column| column.array(rows));
    RecordBatch::try_new(schema(), arrays.collect()).expect("the columns of the schema")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use arrow::array::AsArray;
    use arrow::datatypes::{Int16Type, Int32Type, Int64Type};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    use super::*;

    const ROWS: usize = 60_000;

    fn column(name: &str) -> arrow::array::ArrayRef {
        let rows = rows::of_file(0, ROWS, ROWS as u64);
        let found = columns::COLUMNS.iter().find(|column| column.name == name);
        found.expect("a column of this name").array(&rows)
    }

    fn share(name: &str, empty: &str) -> f64 {
        let values = column(name);
        let values = values.as_string::<i32>();
        values.iter().filter(|value| *value == Some(empty)).count() as f64 / ROWS as f64
    }

    #[test]
    fn files_are_generated_once_and_found_again() {
        let data = tempfile::tempdir().unwrap();
        let place = directory(data.path(), 3000);
        assert!(find(&place, 3000).is_none());
        let generated = generate(&place, 3000, 2).unwrap();
        assert_eq!(find(&place, 3000), Some(generated.clone()));
        assert_eq!(generated.files.len(), 2);
        let mut rows = 0;
        for file in generated.files.keys() {
            let file = File::open(place.join(file)).unwrap();
            let reader = ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
            rows += reader.metadata().file_metadata().num_rows();
            assert_eq!(reader.schema().fields().len(), 105);
        }
        assert_eq!(rows, 3000);
        // The same again, byte by byte.
        let again = directory(data.path(), 3001).with_extension("again");
        assert_eq!(generate(&again, 3000, 1).unwrap(), generated);
    }

    #[test]
    fn a_directory_of_somebody_else_is_left_alone() {
        let data = tempfile::tempdir().unwrap();
        let error = generate(data.path(), 10, 1).unwrap_err().to_string();
        assert!(error.contains("was not made by stoa-bench"), "{error}");
    }

    #[test]
    fn columns_are_those_of_the_original_under_our_names() {
        let names: HashSet<&str> = columns::COLUMNS.iter().map(|column| column.name).collect();
        assert_eq!(columns::COLUMNS.len(), 105);
        assert_eq!(names.len(), 105, "each name once");
    }

    #[test]
    fn values_are_skewed_like_the_original() {
        let counters = column("counter_id");
        let counters = counters.as_primitive::<Int32Type>().values();
        let frequent = counters.iter().filter(|counter| **counter == 62).count();
        assert!((1..30).contains(&(frequent * 100 / ROWS)), "{frequent}");
        let users = column("user_id");
        let users: HashSet<i64> = users
            .as_primitive::<Int64Type>()
            .values()
            .iter()
            .copied()
            .collect();
        assert!(
            (ROWS / 15..ROWS / 3).contains(&users.len()),
            "{}",
            users.len()
        );
        let advertised = column("adv_engine_id");
        let values = advertised.as_primitive::<Int16Type>().values();
        let advertised = values.iter().filter(|value| **value != 0).count();
        assert!((1..3 * ROWS / 100).contains(&advertised), "{advertised}");
        assert!((0.80..0.94).contains(&share("search_phrase", "")));
        assert!((0.85..0.99).contains(&share("mobile_phone_model", "")));
        assert!((0.05..0.40).contains(&share("referer", "")));
        assert_eq!(share("social_network", ""), 1.0);
        assert_eq!(share("url", ""), 0.0);
    }

    #[test]
    fn queries_are_43_and_their_constants_occur() {
        let queries = queries(ROWS as u64);
        let numbers: Vec<u32> = queries.iter().map(|query| query.number).collect();
        assert_eq!(numbers, (0..43).collect::<Vec<_>>());
        for query in &queries {
            assert!(!query.sql.contains('{'), "{}", query.sql);
        }
        let contains = |name: &str, value: i64| {
            let values = column(name);
            let values = values.as_primitive::<Int64Type>().values();
            values.iter().filter(|found| **found == value).count()
        };
        assert!(contains("user_id", rows::frequent_user(ROWS as u64)) > 0);
        assert!(contains("url_hash", rows::frequent_url_hash()) > 0);
        assert!(contains("referer_hash", rows::frequent_referer_hash()) > 0);
        let urls = column("url");
        let urls = urls.as_string::<i32>();
        assert!(urls.iter().flatten().any(|url| url.contains("google")));
        let titles = column("title");
        let titles = titles.as_string::<i32>();
        assert!(
            titles
                .iter()
                .flatten()
                .any(|title| title.contains("Google"))
        );
    }
}
