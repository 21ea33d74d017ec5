//! Small TPC-H tables as Parquet: several files a table, small row groups, written once.
//!
//! The generator is deterministic, so that the same scale gives the same bytes on every machine
//! and the answers in `tests/slt` hold.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use parquet::schema::types::ColumnPath;
use stoa_cli::demo::generate;

use crate::{Error, Result, Tried};

/// The scale of tests: 60,175 rows of lineitem, about 3 MB of Parquet in all.
pub const SCALE: f64 = 0.01;

/// Changes when what is written changes, so that an old cache is not taken for the new one.
const FORMAT: &str = "v1";

/// How many rows a row group has. Small, and no multiple of anything: boundaries are where
/// mistakes are.
const ROW_GROUP_ROWS: usize = 7_000;

/// How many rows a data page has, so that page indexes have something to say.
const PAGE_ROWS: usize = 1_000;

/// A table of TPC-H.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its name, also the name of its directory.
    pub name: &'static str,
    /// How many files it has.
    pub files: i32,
    /// The column with a Bloom filter.
    bloom: &'static str,
}

/// The eight tables.
pub const TABLES: [Table; 8] = [
    table("customer", 2, "c_custkey"),
    table("lineitem", 3, "l_orderkey"),
    table("nation", 1, "n_name"),
    table("orders", 3, "o_orderkey"),
    table("part", 2, "p_brand"),
    table("partsupp", 2, "ps_partkey"),
    table("region", 1, "r_name"),
    table("supplier", 1, "s_name"),
];

const fn table(name: &'static str, files: i32, bloom: &'static str) -> Table {
    Table { name, files, bloom }
}

/// The directory with the tables at [`SCALE`]: `{name}/part-{n}.parquet`. Written on first use
/// into the system's temporary directory and kept there; treat it as read-only.
///
/// # Errors
/// When it cannot be written.
pub fn data() -> Result<PathBuf> {
    data_at(SCALE)
}

/// Like [`data`], at another scale.
///
/// # Errors
/// When it cannot be written.
pub fn data_at(scale: f64) -> Result<PathBuf> {
    static WRITING: Mutex<()> = Mutex::new(());

    let uid = nix::unistd::Uid::effective();
    let place = std::env::temp_dir().join(format!("stoa-tests-tpch-{FORMAT}-{uid}-{scale}"));
    let _one_at_a_time = WRITING.lock().unwrap_or_else(|broken| broken.into_inner());
    if place.is_dir() {
        return Ok(place);
    }
    // Another process may be writing too: each writes aside, the first rename wins.
    let aside = tempfile::Builder::new()
        .prefix("stoa-tests-tpch-")
        .tempdir()
        .tried(|| "a temporary directory for TPC-H".to_owned())?;
    write(scale, aside.path())?;
    let aside = aside.keep();
    match std::fs::rename(&aside, &place) {
        Ok(()) => Ok(place),
        Err(_) if place.is_dir() => {
            // The loser's copy; leaving it would only cost space.
            let _ = std::fs::remove_dir_all(&aside);
            Ok(place)
        }
        Err(source) => Err(Error::Io {
            what: format!("renaming {} to {}", aside.display(), place.display()),
            source,
        }),
    }
}

/// Writes all tables below `directory`.
///
/// # Errors
/// When a file cannot be written.
pub fn write(scale: f64, directory: &Path) -> Result<()> {
    for table in TABLES {
        let place = directory.join(table.name);
        std::fs::create_dir_all(&place).tried(|| place.display().to_string())?;
        for file in 1..=table.files {
            let path = place.join(format!("part-{}.parquet", file - 1));
            write_part(scale, table, file, &path)?;
        }
    }
    Ok(())
}

/// Copies the tables at [`SCALE`] into a directory (a bucket's, say): `{name}/part-{n}.parquet`.
///
/// # Errors
/// When they cannot be written.
pub fn copy_to(directory: &Path) -> Result<()> {
    for table in TABLES {
        copy_table_to(table.name, &directory.join(table.name))?;
    }
    Ok(())
}

/// Copies the files of one table at [`SCALE`] into a directory of their own.
///
/// # Errors
/// When there is no such table or it cannot be written.
pub fn copy_table_to(name: &str, directory: &Path) -> Result<()> {
    let source = data()?.join(name);
    let what = || format!("copying {} to {}", source.display(), directory.display());
    std::fs::create_dir_all(directory).tried(what)?;
    for entry in std::fs::read_dir(&source).tried(what)? {
        let entry = entry.tried(what)?;
        std::fs::copy(entry.path(), directory.join(entry.file_name())).tried(what)?;
    }
    Ok(())
}

/// Writes file `part` (from 1) of a table: the rows of `stoa demo`, in another shape of files.
fn write_part(scale: f64, table: Table, part: i32, path: &Path) -> Result<()> {
    let failed = |answer: String| Error::Answer {
        what: format!("writing {}", path.display()),
        answer,
    };
    let rows = generate::Table::named(table.name)
        .ok_or_else(|| failed("TPC-H has no such table".to_owned()))?
        .reader(scale, part, table.files);
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .set_data_page_row_count_limit(PAGE_ROWS)
        .set_write_batch_size(PAGE_ROWS)
        .set_column_bloom_filter_enabled(ColumnPath::from(table.bloom), true)
        .build();
    // Without Arrow's own schema in the footer the types are Parquet's, as other writers leave
    // them.
    let options = ArrowWriterOptions::new()
        .with_properties(properties)
        .with_skip_arrow_metadata(true);
    let file = File::create(path).tried(|| path.display().to_string())?;
    let mut writer = ArrowWriter::try_new_with_options(file, rows.schema(), options)
        .map_err(|error| failed(error.to_string()))?;
    for batch in rows {
        let batch = batch.map_err(|error| failed(error.to_string()))?;
        writer
            .write(&batch)
            .map_err(|error| failed(error.to_string()))?;
    }
    let closed = writer.close().map_err(|error| failed(error.to_string()))?;
    match closed.file_metadata().num_rows() {
        0 => Err(failed("the generator made no rows".to_owned())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use parquet::file::reader::{FileReader, SerializedFileReader};

    use super::*;

    #[test]
    fn tables_have_their_rows_in_several_files_and_row_groups() {
        let data = data().unwrap();
        let rows = |name: &str| {
            let mut rows = 0;
            let mut groups = 0;
            let mut files = 0;
            for entry in std::fs::read_dir(data.join(name)).unwrap() {
                let file = File::open(entry.unwrap().path()).unwrap();
                let reader = SerializedFileReader::new(file).unwrap();
                rows += reader.metadata().file_metadata().num_rows();
                groups += reader.metadata().num_row_groups();
                files += 1;
            }
            (rows, groups, files)
        };
        assert_eq!(rows("lineitem"), (60_175, 9, 3));
        assert_eq!(rows("orders"), (15_000, 3, 3));
        assert_eq!(rows("nation"), (25, 1, 1));
        assert_eq!(rows("region"), (5, 1, 1));
        assert_eq!(rows("customer").0, 1_500);
        assert_eq!(rows("partsupp").0, 8_000);
    }
}
