//! TPC-H as Parquet files: generated once, reused after.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow::record_batch::RecordBatchReader;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde::{Deserialize, Serialize};
use tpchgen::generators::{
    CustomerGenerator, LineItemGenerator, NationGenerator, OrderGenerator, PartGenerator,
    PartSuppGenerator, RegionGenerator, SupplierGenerator,
};
use tpchgen_arrow::{
    CustomerArrow, LineItemArrow, NationArrow, OrderArrow, PartArrow, PartSuppArrow, RegionArrow,
    SupplierArrow,
};

use crate::error::{Error, Result};

/// Rows of a row group: enough for good compression, few enough to spread a table over cores.
pub const ROW_GROUP_ROWS: usize = 128 * 1024;

/// Rows of a file, about: several files a table at scale 1.
const FILE_ROWS: u64 = 8 * ROW_GROUP_ROWS as u64;

/// Bytes of Parquet at scale 1, rounded up, to check for space before writing.
const BYTES_AT_SCALE_ONE: f64 = 450e6;

/// Bumped when the generated files change, so that older ones are not reused.
const GENERATION: u32 = 1;

/// The marker written last.
const MARKER: &str = "generated.json";

/// A table of TPC-H.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: &'static str,
    /// Its rows at scale 1.
    base_rows: u64,
    /// Whether the rows grow with the scale.
    scales: bool,
    /// The fewest files it is split into.
    files_min: u64,
}

const fn table(name: &'static str, base_rows: u64, files_min: u64) -> Table {
    Table {
        name,
        base_rows,
        scales: base_rows > 25,
        files_min,
    }
}

/// The eight tables, the largest first, so that threads end at the same time.
pub const TABLES: [Table; 8] = [
    table("lineitem", 6_001_215, 4),
    table("orders", 1_500_000, 3),
    table("partsupp", 800_000, 2),
    table("part", 200_000, 2),
    table("customer", 150_000, 2),
    table("supplier", 10_000, 1),
    table("nation", 25, 1),
    table("region", 5, 1),
];

impl Table {
    /// Its rows at `scale`, nearly (lineitem's number is random).
    fn rows(&self, scale: f64) -> u64 {
        match self.scales {
            true => ((self.base_rows as f64 * scale) as u64).max(1),
            false => self.base_rows,
        }
    }

    fn files(&self, scale: f64) -> u64 {
        self.rows(scale).div_ceil(FILE_ROWS).max(self.files_min)
    }

    /// The table of this name.
    pub fn named(name: &str) -> Option<Table> {
        TABLES.into_iter().find(|table| table.name == name)
    }

    /// The rows of part `part` (from 1) of `parts`, the same on every machine.
    pub fn reader(&self, scale: f64, part: i32, parts: i32) -> Box<dyn RecordBatchReader> {
        const BATCH: usize = 8192;
        macro_rules! reader {
            ($arrow:ident, $generator:ident) => {
                Box::new($arrow::new($generator::new(scale, part, parts)).with_batch_size(BATCH))
            };
        }
        match self.name {
            "lineitem" => reader!(LineItemArrow, LineItemGenerator),
            "orders" => reader!(OrderArrow, OrderGenerator),
            "partsupp" => reader!(PartSuppArrow, PartSuppGenerator),
            "part" => reader!(PartArrow, PartGenerator),
            "customer" => reader!(CustomerArrow, CustomerGenerator),
            "supplier" => reader!(SupplierArrow, SupplierGenerator),
            "nation" => reader!(NationArrow, NationGenerator),
            _ => reader!(RegionArrow, RegionGenerator),
        }
    }
}

/// What was generated: the content of the marker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Generated {
    generation: u32,
    scale: f64,
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

/// The directory of one scale below the directory of all data.
pub fn directory(data: &Path, scale: f64) -> PathBuf {
    data.join(format!("tpch-sf{scale}"))
}

/// The number of rows that [`generate`] will report, about.
pub fn rows(scale: f64) -> u64 {
    TABLES.iter().map(|table| table.rows(scale)).sum()
}

/// What an earlier run generated into `directory`, when it is all there.
pub fn find(directory: &Path, scale: f64) -> Option<Generated> {
    let marker = std::fs::read(directory.join(MARKER)).ok()?;
    let generated: Generated = serde_json::from_slice(&marker).ok()?;
    let same = generated.generation == GENERATION
        && generated.scale == scale
        && generated.row_group_rows == ROW_GROUP_ROWS;
    let complete = generated.files.iter().all(|(file, bytes)| {
        std::fs::metadata(directory.join(file)).is_ok_and(|found| found.len() == *bytes)
    });
    (same && complete).then_some(generated)
}

/// Generates all tables into `directory`, which appears whole or not at all.
///
/// `progress` is called with rows as they are written, from several threads.
pub fn generate(
    directory: &Path,
    scale: f64,
    threads: usize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Generated> {
    if directory.exists() {
        if !directory.join(MARKER).exists() {
            return Err(Error::Refused(format!(
                "{} exists and was not made by `stoa demo`; choose another with --data, or remove it",
                directory.display()
            )));
        }
        // An outdated or damaged data set of ours.
        std::fs::remove_dir_all(directory)
            .map_err(|error| Error::while_doing(remove(directory), error))?;
    }
    let parent = directory.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(parent).map_err(|error| {
        Error::while_doing(format!("cannot create {}", parent.display()), error)
    })?;
    check_space(parent, scale)?;
    let work = tempdir_beside(directory)?;
    let files = write_all(&work, scale, threads, progress);
    let done = files.and_then(|files| {
        let generated = Generated {
            generation: GENERATION,
            scale,
            row_group_rows: ROW_GROUP_ROWS,
            files,
        };
        let marker = work.join(MARKER);
        let text = serde_json::to_vec_pretty(&generated)
            .map_err(|error| Error::while_doing("cannot describe the data", error))?;
        std::fs::write(&marker, text).map_err(|error| write_error(&marker, error))?;
        std::fs::rename(&work, directory).map_err(|error| write_error(directory, error))?;
        Ok(generated)
    });
    if done.is_err() {
        // Half a data set helps nobody; the first error is the one to report.
        let _ = std::fs::remove_dir_all(&work);
    }
    done
}

fn write_all(
    work: &Path,
    scale: f64,
    threads: usize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<BTreeMap<String, u64>> {
    let mut jobs = Vec::new();
    for table in TABLES {
        let folder = work.join(table.name);
        std::fs::create_dir_all(&folder).map_err(|error| write_error(&folder, error))?;
        let parts = table.files(scale);
        for part in 1..=parts {
            let file = format!("{}/{}-{part:03}.parquet", table.name, table.name);
            jobs.push((table, part as i32, parts as i32, file));
        }
    }
    let next = AtomicUsize::new(0);
    let files = Mutex::new(BTreeMap::new());
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, jobs.len()) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some((table, part, parts, file)) = jobs.get(index) else {
                        return;
                    };
                    let path = work.join(file);
                    match write_one(table.reader(scale, *part, *parts), &path, progress) {
                        Ok(bytes) => {
                            lock(&files).insert(file.clone(), bytes);
                        }
                        Err(error) => {
                            lock(&failure).get_or_insert(error);
                            // The others stop at their next file.
                            next.store(jobs.len(), Ordering::Relaxed);
                            return;
                        }
                    }
                }
            });
        }
    });
    match lock(&failure).take() {
        Some(error) => Err(error),
        None => Ok(std::mem::take(&mut *lock(&files))),
    }
}

fn write_one(
    reader: Box<dyn RecordBatchReader>,
    path: &Path,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<u64> {
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .build();
    let file = File::create(path).map_err(|error| write_error(path, error))?;
    let mut writer = ArrowWriter::try_new(file, reader.schema(), Some(properties))
        .map_err(|error| write_error(path, error))?;
    for batch in reader {
        let batch = batch.map_err(|error| write_error(path, error))?;
        writer
            .write(&batch)
            .map_err(|error| write_error(path, error))?;
        progress(batch.num_rows() as u64);
    }
    writer.close().map_err(|error| write_error(path, error))?;
    let metadata = std::fs::metadata(path).map_err(|error| write_error(path, error))?;
    Ok(metadata.len())
}

fn check_space(parent: &Path, scale: f64) -> Result<()> {
    let needed = (BYTES_AT_SCALE_ONE * scale) as u64;
    let Ok(stat) = nix::sys::statvfs::statvfs(parent) else {
        return Ok(());
    };
    #[allow(
        clippy::unnecessary_cast,
        reason = "the fields' widths differ by architecture"
    )]
    let free = (stat.blocks_available() as u64).saturating_mul(stat.fragment_size() as u64);
    if free < needed {
        return Err(Error::Failed(format!(
            "TPC-H at scale {scale} takes about {}, {} has {} left; choose a smaller --scale or \
             another --data",
            crate::config::format_bytes(needed),
            parent.display(),
            crate::config::format_bytes(free)
        )));
    }
    Ok(())
}

/// An empty directory beside `directory`, on the same file system; those of dead runs go first.
fn tempdir_beside(directory: &Path) -> Result<PathBuf> {
    let parent = directory.parent().unwrap_or(Path::new("/"));
    let name = directory
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let prefix = format!(".{name}.part-");
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let found = entry.file_name().to_string_lossy().into_owned();
        if let Some(pid) = found.strip_prefix(&prefix)
            && !Path::new("/proc").join(pid).exists()
        {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    let work = parent.join(format!("{prefix}{}", std::process::id()));
    std::fs::create_dir(&work).map_err(|error| write_error(&work, error))?;
    Ok(work)
}

fn remove(path: &Path) -> String {
    format!("cannot remove {}", path.display())
}

fn write_error(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::while_doing(format!("cannot write {}", path.display()), error)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A thread that panicked takes the scope with it; the data is plain.
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn a_data_set_is_generated_once_and_found_again() {
        let data = tempfile::tempdir().unwrap();
        let place = directory(data.path(), 0.001);
        assert!(find(&place, 0.001).is_none());
        let written = AtomicU64::new(0);
        let count = |rows| {
            written.fetch_add(rows, Ordering::Relaxed);
        };
        let generated = generate(&place, 0.001, 2, &count).unwrap();
        assert_eq!(find(&place, 0.001), Some(generated.clone()));
        let rows = written.load(Ordering::Relaxed);
        assert!((8_000..9_000).contains(&rows), "{rows}");
        assert_eq!(generated.files.len(), 16);

        // A file cut short is noticed, and the set made again.
        let lost = place.join("orders/orders-001.parquet");
        std::fs::write(&lost, b"PAR1").unwrap();
        assert!(find(&place, 0.001).is_none());
        generate(&place, 0.001, 1, &|_| ()).unwrap();
        assert_eq!(find(&place, 0.001), Some(generated));
        let names: Vec<_> = std::fs::read_dir(data.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "nothing is left beside it: {names:?}");
    }

    #[test]
    fn a_directory_of_somebody_else_is_left_alone() {
        let data = tempfile::tempdir().unwrap();
        let place = directory(data.path(), 1.0);
        std::fs::create_dir(&place).unwrap();
        let error = generate(&place, 1.0, 1, &|_| ()).unwrap_err().to_string();
        assert!(
            error.contains("exists and was not made by `stoa demo`"),
            "{error}"
        );
    }

    #[test]
    fn large_tables_have_several_files_and_small_ones_one() {
        let files = |name: &str, scale: f64| {
            let table = TABLES.iter().find(|table| table.name == name).unwrap();
            table.files(scale)
        };
        assert_eq!(files("lineitem", 1.0), 6);
        assert_eq!(files("lineitem", 0.1), 4);
        assert_eq!(files("orders", 1.0), 3);
        assert_eq!(files("nation", 10.0), 1);
        assert_eq!(files("lineitem", 10.0), 58);
    }
}
