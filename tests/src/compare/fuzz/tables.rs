//! Tables that are made up: files of several schemas, in directories of partitions, written with
//! whatever a writer may choose.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, Encoding};
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};

use super::values::{Floats, array, types, wider};

/// The name of the partition column.
pub(super) const PARTITION: &str = "p";

/// A made-up table and where its files lie.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// Its name.
    pub(super) name: String,
    /// The directory of its files.
    pub(super) directory: PathBuf,
    /// Whether they lie in directories of a partition column.
    pub(super) partitioned: bool,
    /// Its columns, without the partition's. The first is `id`, a number of each row's own.
    pub(super) columns: Vec<Column>,
    /// The schema that its files are to be read with; none where their own, merged, will do.
    pub(super) declared: Option<SchemaRef>,
    /// How many rows it has.
    pub(super) rows: u64,
    /// Which floating-point numbers it holds.
    pub(super) floats: Floats,
}

/// A column of a made-up table.
#[derive(Clone, Debug)]
pub(super) struct Column {
    /// Its name.
    pub(super) name: String,
    /// The type that holds it in every file.
    pub(super) of: DataType,
    /// Its values are those of the numbers below this.
    pub(super) numbers: u64,
    /// Of so many values one is null; none where it is 0, all where it is 1.
    nulls: u32,
    order: Order,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Random,
    Rising,
    Falling,
    Clustered,
}

/// What went wrong when files were written.
pub(super) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Makes a table up and writes its files below `directory`.
///
/// # Errors
/// If a file cannot be written.
pub(super) fn write(
    rng: &mut StdRng,
    directory: &Path,
    name: &str,
    floats: Floats,
) -> Result<Table, Failure> {
    // Larger than a block of the cache now and then, and then narrow: rows cost time.
    let large = rng.random_bool(0.15);
    let files = rng.random_range(1..=if large { 2 } else { 4 });
    let columns = columns(rng, if large { 4 } else { 8 });
    let partitioned = rng.random_bool(0.25);
    let evolves = files > 1 && rng.random_bool(0.5);
    let mut declared: Vec<DataType> = columns.iter().map(|column| column.of.clone()).collect();
    let mut written = vec![false; columns.len()];
    let (mut rows, mut widened) = (0, false);
    let directory = directory.join(name);
    for file in 0..files {
        let count = match rng.random_range(0..10) {
            _ if large => rng.random_range(7_000..12_000),
            // A table without any row has nothing to be cached.
            0 if file > 0 => 0,
            1 => 1,
            2..=7 => rng.random_range(2..200),
            _ => rng.random_range(200..1_500),
        };
        let place = if partitioned {
            let value = ["1", "2", "33"].choose(rng).unwrap_or(&"1");
            directory.join(format!("{PARTITION}={value}"))
        } else {
            directory.clone()
        };
        let mut parts: Vec<(Field, ArrayRef)> = vec![];
        for (at, column) in columns.iter().enumerate() {
            let missing = evolves && at > 0 && rng.random_bool(0.2);
            if missing && (file > 0 || files > 1) && rng.random_bool(0.9) {
                continue;
            }
            let mut of = column.of.clone();
            if evolves
                && at > 0
                && rng.random_bool(0.3)
                && let Some(wide) = wider(&of)
            {
                declared[at] = wide.clone();
                widened = true;
                of = wide;
            }
            let values = if at == 0 {
                let first = rows as i64;
                Arc::new(Int64Array::from_iter_values(first..first + count as i64)) as ArrayRef
            } else {
                let numbers = numbers(rng, column, count);
                // What a narrow file has a wide one has too: the same number is one value.
                let narrow = array(&column.of, &numbers, floats)?;
                arrow::compute::cast(&narrow, &of)?
            };
            written[at] = true;
            parts.push((Field::new(&column.name, of, at > 0), values));
        }
        if evolves && rng.random_bool(0.3) {
            parts.shuffle(rng);
        }
        rows += count as u64;
        store(
            rng,
            &place.join(format!("part-{file}.parquet")),
            parts,
            count,
        )?;
    }
    let kept: Vec<_> = (columns.into_iter().zip(written).zip(declared))
        .filter(|((_, written), _)| *written)
        .map(|((column, _), of)| Column { of, ..column })
        .collect();
    let fields = kept.iter().enumerate();
    let fields = fields.map(|(at, c)| Field::new(&c.name, c.of.clone(), at > 0));
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    Ok(Table {
        name: name.to_owned(),
        directory,
        partitioned,
        columns: kept,
        declared: widened.then_some(schema),
        rows,
        floats,
    })
}

fn columns(rng: &mut StdRng, most: usize) -> Vec<Column> {
    let mut columns = vec![Column {
        name: "id".to_owned(),
        of: DataType::Int64,
        numbers: 0,
        nulls: 0,
        order: Order::Rising,
    }];
    let types = types();
    for at in 1..rng.random_range(3..=most) {
        // Columns of one name have one type in every table half of the time, so that they join.
        let of = match at {
            1 => DataType::Int32,
            2 => DataType::Float64,
            3 => DataType::Utf8,
            _ => types.choose(rng).cloned().unwrap_or(DataType::Int64),
        };
        columns.push(Column {
            name: format!("c{at}"),
            of,
            numbers: *[3, 10, 40, 400].choose(rng).unwrap_or(&10),
            nulls: *[0, 0, 10, 3, 1].choose(rng).unwrap_or(&0),
            order: *[
                Order::Random,
                Order::Random,
                Order::Rising,
                Order::Falling,
                Order::Clustered,
            ]
            .choose(rng)
            .unwrap_or(&Order::Random),
        });
    }
    columns
}

/// The numbers of a column's values in one file.
fn numbers(rng: &mut StdRng, column: &Column, rows: usize) -> Vec<Option<u64>> {
    // A file has a part of the values now and then, so that files can be skipped.
    let (from, to) = match rng.random_range(0..3) {
        0 => (0, column.numbers),
        1 => (0, column.numbers.div_ceil(2)),
        _ => (column.numbers / 2, column.numbers),
    };
    let last = rows.max(1) as u64;
    let mut current = from;
    let number = |row: usize| {
        let row = row as u64;
        if column.nulls > 0 && rng.random_ratio(1, column.nulls) {
            return None;
        }
        Some(match column.order {
            Order::Random => rng.random_range(from..to),
            Order::Rising => from + row * (to - from) / last,
            Order::Falling => to - 1 - row * (to - from) / last,
            Order::Clustered => {
                if rng.random_ratio(1, 20) {
                    current = rng.random_range(from..to);
                }
                current
            }
        })
    };
    (0..rows).map(number).collect()
}

fn store(
    rng: &mut StdRng,
    path: &Path,
    parts: Vec<(Field, ArrayRef)>,
    rows: usize,
) -> Result<(), Failure> {
    let (fields, arrays): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    let schema = Arc::new(Schema::new(fields));
    let batch = RecordBatch::try_new(Arc::clone(&schema), arrays)?;
    let statistics = [
        EnabledStatistics::None,
        EnabledStatistics::Chunk,
        EnabledStatistics::Page,
        EnabledStatistics::Page,
    ];
    let compressions = [Compression::UNCOMPRESSED, Compression::SNAPPY];
    let versions = [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0];
    let group = rng.random_range(rows / 4 + 1..=rows + 1);
    let mut properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(group))
        .set_data_page_row_count_limit(rng.random_range(10..2_000))
        .set_write_batch_size(64)
        .set_dictionary_enabled(rng.random_bool(0.7))
        .set_bloom_filter_enabled(rng.random_bool(0.3))
        .set_statistics_enabled(*statistics.choose(rng).unwrap_or(&EnabledStatistics::Page))
        .set_compression(*compressions.choose(rng).unwrap_or(&Compression::SNAPPY))
        .set_writer_version(*versions.choose(rng).unwrap_or(&WriterVersion::PARQUET_1_0));
    if rng.random_bool(0.2) {
        properties = properties.set_encoding(Encoding::PLAIN);
    }
    let options = ArrowWriterOptions::new()
        .with_properties(properties.build())
        .with_skip_arrow_metadata(false);
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    let mut writer = ArrowWriter::try_new_with_options(File::create(path)?, schema, options)?;
    writer.write(&batch)?;
    writer.close()?;
    Ok(())
}
