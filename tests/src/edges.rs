//! Tables that hold what readers get wrong: every type, nesting, nulls, partitions, schemas that
//! change from file to file.
//!
//! All values follow from the row's number, so that the answers in `tests/slt` hold everywhere.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::*;
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::*;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;

use crate::{Error, Result, Tried};

/// More rows than a block of the cache and than a batch of the engine (8,192 each), so that both
/// boundaries fall inside a row group.
const ROW_GROUP_ROWS: usize = 10_000;

/// A table of this module.
#[derive(Clone, Debug)]
pub struct EdgeTable {
    /// Its name.
    pub name: &'static str,
    /// The directory with its files.
    pub directory: PathBuf,
    /// The schema that a reader of all its files should see, without partition columns.
    pub schema: SchemaRef,
    /// The columns whose values are in the directories' names.
    pub partition_columns: Vec<(String, DataType)>,
}

/// Writes all of them below `directory`, each into one of its own.
///
/// # Errors
/// When a file cannot be written.
pub fn write(directory: &Path) -> Result<Vec<EdgeTable>> {
    Ok(vec![
        types(&directory.join("types"))?,
        nested(&directory.join("nested"))?,
        nulls(&directory.join("nulls"))?,
        partitioned(&directory.join("partitioned"))?,
        repeating(&directory.join("repeating"))?,
        evolved(&directory.join("evolved"))?,
    ])
}

/// A column of `rows` values, each from its row's number; `None` is null.
macro_rules! column {
    ($array:ty, $rows:expr, $value:expr) => {
        Arc::new($rows.map($value).collect::<$array>()) as ArrayRef
    };
}

/// One column of every type that Parquet keeps, 25,000 rows in two files.
fn types(directory: &Path) -> Result<EdgeTable> {
    let batch = |rows: std::ops::Range<i64>| {
        let rows = || rows.clone();
        // Every seventh value is null, at another place in every column.
        let some = |row: i64, column: i64| (row + column) % 7 != 0;
        let text = |row: i64| match row % 5 {
            0 => String::new(),
            1 => format!("k{}", row % 10),
            2 => format!("fourteen-bytes-{}", row % 100),
            3 => "žluťoučký kůň 🐎".to_owned(),
            _ => "x".repeat((row % 40) as usize),
        };
        let cast = |array: ArrayRef, to: &DataType| {
            arrow::compute::cast(&array, to).map_err(|error| Error::Answer {
                what: "a column of types".to_owned(),
                answer: error.to_string(),
            })
        };
        let strings = column!(StringArray, rows(), |r| some(r, 1).then(|| text(r)));
        let decimals = |precision: u8, scale: i8| {
            rows()
                .map(|r| some(r, 3).then(|| i128::from(r) * 1_000_003 - 5_000_000_000))
                .map(|value| value.map(|v| v % 10_i128.pow(u32::from(precision))))
                .collect::<Decimal128Array>()
                .with_precision_and_scale(precision, scale)
                .map(|array| Arc::new(array) as ArrayRef)
                .map_err(|error| Error::Answer {
                    what: "a column of decimals".to_owned(),
                    answer: error.to_string(),
                })
        };
        let micros = |r: i64| 1_700_000_000_000_000 + r * 86_399_999_983;
        let fixed = {
            let mut builder = FixedSizeBinaryBuilder::new(4);
            for r in rows() {
                if some(r, 2) {
                    let _ = builder.append_value((r as u32).to_be_bytes());
                } else {
                    builder.append_null();
                }
            }
            Arc::new(builder.finish()) as ArrayRef
        };
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("id", column!(Int64Array, rows(), Some)),
            (
                "bool",
                column!(BooleanArray, rows(), |r| some(r, 0).then_some(r % 3 == 0)),
            ),
            (
                "i8",
                column!(Int8Array, rows(), |r| some(r, 1)
                    .then_some((r % 256 - 128) as i8)),
            ),
            (
                "i16",
                column!(Int16Array, rows(), |r| some(r, 2)
                    .then_some((r % 60_000 - 30_000) as i16)),
            ),
            (
                "i32",
                column!(Int32Array, rows(), |r| some(r, 3)
                    .then_some((r * 7919) as i32)),
            ),
            (
                "i64",
                column!(Int64Array, rows(), |r| some(r, 4).then_some(i64::MIN + r)),
            ),
            (
                "u8",
                column!(UInt8Array, rows(), |r| some(r, 5)
                    .then_some((r % 256) as u8)),
            ),
            (
                "u16",
                column!(UInt16Array, rows(), |r| some(r, 6)
                    .then_some((r % 65_536) as u16)),
            ),
            (
                "u32",
                column!(UInt32Array, rows(), |r| some(r, 0)
                    .then_some(u32::MAX - r as u32)),
            ),
            (
                "u64",
                column!(UInt64Array, rows(), |r| some(r, 1)
                    .then_some(u64::MAX - r as u64)),
            ),
            (
                "f32",
                column!(Float32Array, rows(), |r| some(r, 2)
                    .then_some(r as f32 * 0.5)),
            ),
            (
                "f64",
                column!(Float64Array, rows(), |r| some(r, 3).then_some(
                    match r % 1000 {
                        0 => f64::NAN,
                        1 => f64::INFINITY,
                        2 => -0.0,
                        _ => r as f64 * 0.125,
                    }
                )),
            ),
            ("utf8", Arc::clone(&strings)),
            (
                "large_utf8",
                cast(Arc::clone(&strings), &DataType::LargeUtf8)?,
            ),
            (
                "utf8_view",
                cast(Arc::clone(&strings), &DataType::Utf8View)?,
            ),
            ("binary", cast(Arc::clone(&strings), &DataType::Binary)?),
            (
                "large_binary",
                cast(Arc::clone(&strings), &DataType::LargeBinary)?,
            ),
            (
                "binary_view",
                cast(Arc::clone(&strings), &DataType::BinaryView)?,
            ),
            ("fixed_binary", fixed),
            (
                "dict",
                cast(
                    column!(StringArray, rows(), |r| some(r, 4)
                        .then(|| format!("d{}", r % 13))),
                    &DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8)),
                )?,
            ),
            (
                "date32",
                column!(Date32Array, rows(), |r| some(r, 5)
                    .then_some((r - 5_000) as i32)),
            ),
            (
                "time32_ms",
                column!(Time32MillisecondArray, rows(), |r| some(r, 6)
                    .then_some((r * 3_457 % 86_400_000) as i32)),
            ),
            (
                "time64_us",
                column!(Time64MicrosecondArray, rows(), |r| some(r, 0)
                    .then_some(r * 3_456_789 % 86_400_000_000)),
            ),
            (
                "time64_ns",
                column!(Time64NanosecondArray, rows(), |r| some(r, 1)
                    .then_some(r * 3_456_789_123 % 86_400_000_000_000)),
            ),
            (
                "ts_ms",
                column!(TimestampMillisecondArray, rows(), |r| some(r, 2)
                    .then_some(micros(r) / 1000)),
            ),
            (
                "ts_us",
                column!(TimestampMicrosecondArray, rows(), |r| some(r, 3)
                    .then_some(micros(r))),
            ),
            (
                "ts_ns",
                column!(TimestampNanosecondArray, rows(), |r| some(r, 4)
                    .then_some(micros(r) * 1000 + 7)),
            ),
            (
                "ts_utc",
                Arc::new(
                    rows()
                        .map(|r| some(r, 5).then_some(micros(r)))
                        .collect::<TimestampMicrosecondArray>()
                        .with_timezone("UTC"),
                ),
            ),
            ("dec9", decimals(9, 2)?),
            ("dec18", decimals(18, 4)?),
            ("dec38", decimals(38, 10)?),
            (
                "dec256",
                cast(decimals(38, 5)?, &DataType::Decimal256(50, 5))?,
            ),
        ];
        batch(columns)
    };
    let (one, two) = (batch(0..15_000)?, batch(15_000..25_000)?);
    let schema = one.schema();
    store(&directory.join("part-0.parquet"), &[one])?;
    store(&directory.join("part-1.parquet"), &[two])?;
    Ok(EdgeTable {
        name: "types",
        directory: directory.to_owned(),
        schema,
        partition_columns: Vec::new(),
    })
}

/// Lists, structs, maps and their combinations, with nulls and empties at every level.
fn nested(directory: &Path) -> Result<EdgeTable> {
    let batch = |rows: std::ops::Range<i64>| {
        let rows = || rows.clone();
        let count = (rows().end - rows().start) as usize;
        // 0, 1, 2 or 3 elements; a null list where the row divides by 5.
        let length = |r: i64| if r % 5 == 0 { 0 } else { (r % 4) as usize };
        let offsets = || OffsetBuffer::from_lengths(rows().map(length));
        let present = || NullBuffer::from_iter(rows().map(|r| r % 5 != 0));
        let elements = || rows().flat_map(move |r| (0..length(r) as i64).map(move |e| (r, e)));

        let numbers = column!(Int64Array, elements(), |(r, e)| (e != 1)
            .then_some(r * 10 + e));
        let words = column!(StringArray, elements(), |(r, e)| (e != 2)
            .then(|| format!("word {r} of {e}")));
        let item = |data: DataType| Arc::new(Field::new("item", data, true));
        let list = |values: ArrayRef| {
            Arc::new(ListArray::new(
                item(values.data_type().clone()),
                offsets(),
                values,
                Some(present()),
            )) as ArrayRef
        };
        let pair = |a: ArrayRef, b: ArrayRef, nulls: Option<NullBuffer>| {
            let fields = vec![
                Field::new("a", a.data_type().clone(), true),
                Field::new("b", b.data_type().clone(), true),
            ];
            Arc::new(StructArray::new(fields.into(), vec![a, b], nulls)) as ArrayRef
        };
        let record = pair(
            column!(Int32Array, rows(), |r| (r % 6 != 0).then_some(r as i32)),
            column!(StringArray, rows(), |r| (r % 4 != 0)
                .then(|| format!("name {}", r % 50))),
            Some(NullBuffer::from_iter(rows().map(|r| r % 11 != 0))),
        );
        let map = {
            let keys = column!(StringArray, elements(), |(_, e)| Some(format!("key {e}")));
            let entry: Fields = vec![
                Field::new("key", DataType::Utf8, false),
                Field::new("value", DataType::Int64, true),
            ]
            .into();
            let entries = StructArray::new(entry.clone(), vec![keys, Arc::clone(&numbers)], None);
            let field = Arc::new(Field::new("entries", DataType::Struct(entry), false));
            Arc::new(MapArray::new(
                field,
                offsets(),
                entries,
                Some(present()),
                false,
            )) as ArrayRef
        };
        let pairs = {
            let flat = column!(Int32Array, 0..2 * count as i64, |v| (v % 9 != 0)
                .then_some(v as i32));
            Arc::new(FixedSizeListArray::new(
                item(DataType::Int32),
                2,
                flat,
                Some(NullBuffer::from_iter(rows().map(|r| r % 8 != 0))),
            )) as ArrayRef
        };
        batch(vec![
            ("id", column!(Int64Array, rows(), Some)),
            ("numbers", list(Arc::clone(&numbers))),
            ("words", list(Arc::clone(&words))),
            ("record", record),
            ("records", list(pair(numbers, words, None))),
            ("map", map),
            ("pairs", pairs),
        ])
    };
    let (one, two) = (batch(0..11_000)?, batch(11_000..12_000)?);
    let schema = one.schema();
    store(&directory.join("part-0.parquet"), &[one])?;
    store(&directory.join("part-1.parquet"), &[two])?;
    Ok(EdgeTable {
        name: "nested",
        directory: directory.to_owned(),
        schema,
        partition_columns: Vec::new(),
    })
}

/// Columns without nulls, with some, and with nothing else; a file without rows.
fn nulls(directory: &Path) -> Result<EdgeTable> {
    let batch = |rows: std::ops::Range<i64>| {
        let rows = || rows.clone();
        batch(vec![
            ("id", column!(Int64Array, rows(), Some)),
            (
                "none",
                column!(Int32Array, rows(), |r| Some((r % 100) as i32)),
            ),
            (
                "some",
                column!(Int32Array, rows(), |r| (r % 3 != 0)
                    .then_some((r % 100) as i32)),
            ),
            ("all", column!(Int32Array, rows(), |_| None::<i32>)),
            // Nulls fill the first row group, and only that.
            (
                "first",
                column!(Float64Array, rows(), |r| (r >= 10_000).then_some(r as f64)),
            ),
            (
                "empty",
                column!(StringArray, rows(), |r| (r % 2 == 0).then_some("")),
            ),
            ("blank", column!(StringArray, rows(), |_| None::<&str>)),
        ])
    };
    let full = batch(0..21_000)?;
    let schema = full.schema();
    store(&directory.join("part-0.parquet"), &[full])?;
    store(
        &directory.join("part-1.parquet"),
        &[RecordBatch::new_empty(Arc::clone(&schema))],
    )?;
    store(&directory.join("part-2.parquet"), &[batch(21_000..21_001)?])?;
    Ok(EdgeTable {
        name: "nulls",
        directory: directory.to_owned(),
        schema,
        partition_columns: Vec::new(),
    })
}

/// Two levels of Hive-style partitions.
fn partitioned(directory: &Path) -> Result<EdgeTable> {
    let mut schema = None;
    for (number, (year, kind)) in [(2023, "a"), (2023, "b"), (2024, "a"), (2025, "c d")]
        .into_iter()
        .enumerate()
    {
        let start = number as i64 * 1_000;
        let rows = || start..start + 1_000 - number as i64;
        let batch = batch(vec![
            ("id", column!(Int64Array, rows(), Some)),
            (
                "amount",
                column!(Float64Array, rows(), |r| (r % 10 != 0)
                    .then_some(r as f64 / 4.0)),
            ),
        ])?;
        let place = directory
            .join(format!("year={year}"))
            .join(format!("kind={kind}"));
        store(&place.join("part-0.parquet"), std::slice::from_ref(&batch))?;
        schema = Some(batch.schema());
    }
    Ok(EdgeTable {
        name: "partitioned",
        directory: directory.to_owned(),
        schema: schema.unwrap_or_else(|| Arc::new(Schema::empty())),
        partition_columns: vec![
            ("year".to_owned(), DataType::Int32),
            ("kind".to_owned(), DataType::Utf8),
        ],
    })
}

/// Files of one shape in four partitions, of values that come again and again: what was learnt of one
/// of them is tempting in the next. Zeros of both signs; a divisor that is zero where `k` is 9 in the
/// later rows only.
fn repeating(directory: &Path) -> Result<EdgeTable> {
    let rows = || 0..45_000_i64;
    let k = |r: i64| match r {
        ..32_768 => r % 10,
        _ if r % 1_000 == 0 => 9,
        _ => r % 5,
    };
    let batch = batch(vec![
        ("x", column!(Int64Array, rows(), |r| Some(r * 7 % 10))),
        ("k", column!(Int64Array, rows(), |r| Some(k(r)))),
        (
            "divisor",
            column!(Int64Array, rows(), |r| Some(i64::from(
                r < 32_768 || k(r) != 9
            ))),
        ),
        (
            "zeros",
            column!(Float64Array, rows(), |r| Some(
                [-0.0, 1.5, 0.0, -2.5][(r % 4) as usize]
            )),
        ),
        ("minus", column!(Float64Array, rows(), |_| Some(-0.0))),
    ])?;
    for p in 1..=4 {
        let place = directory.join(format!("p={p}"));
        store(&place.join("part-0.parquet"), std::slice::from_ref(&batch))?;
    }
    Ok(EdgeTable {
        name: "repeating",
        directory: directory.to_owned(),
        schema: batch.schema(),
        partition_columns: vec![("p".to_owned(), DataType::Int32)],
    })
}

/// Files written before and after a column was added, one was widened, and the order changed.
fn evolved(directory: &Path) -> Result<EdgeTable> {
    let old = || 0..9_000_i64;
    store(
        &directory.join("part-0.parquet"),
        &[batch(vec![
            ("id", column!(Int32Array, old(), |r| Some(r as i32))),
            (
                "name",
                column!(StringArray, old(), |r| Some(format!("old {}", r % 20))),
            ),
        ])?],
    )?;
    let new = || 9_000..12_000_i64;
    store(
        &directory.join("part-1.parquet"),
        &[batch(vec![
            (
                "id",
                column!(Int64Array, new(), |r| Some(r + 5_000_000_000)),
            ),
            (
                "name",
                column!(StringArray, new(), |r| (r % 2 == 0)
                    .then(|| format!("new {}", r % 20))),
            ),
            (
                "score",
                column!(Float64Array, new(), |r| (r % 3 == 0).then_some(r as f64)),
            ),
        ])?],
    )?;
    let turned = || 12_000..13_000_i64;
    store(
        &directory.join("part-2.parquet"),
        &[batch(vec![
            (
                "score",
                column!(Float64Array, turned(), |r| Some(r as f64 * 2.0)),
            ),
            ("id", column!(Int64Array, turned(), Some)),
            (
                "name",
                column!(StringArray, turned(), |r| Some(format!(
                    "turned {}",
                    r % 20
                ))),
            ),
        ])?],
    )?;
    Ok(EdgeTable {
        name: "evolved",
        directory: directory.to_owned(),
        schema: Arc::new(Schema::new(vec![
            Field::new("id", DataType::Int64, true),
            Field::new("name", DataType::Utf8, true),
            Field::new("score", DataType::Float64, true),
        ])),
        partition_columns: Vec::new(),
    })
}

/// A batch of nullable columns.
fn batch(columns: Vec<(&str, ArrayRef)>) -> Result<RecordBatch> {
    RecordBatch::try_from_iter_with_nullable(
        columns.into_iter().map(|(name, array)| (name, array, true)),
    )
    .map_err(|error| Error::Answer {
        what: "a batch of an edge table".to_owned(),
        answer: error.to_string(),
    })
}

/// Writes batches of one schema as Parquet, in row groups that are larger than a block of the cache.
///
/// # Errors
/// When the file cannot be written.
pub fn store(path: &Path, batches: &[RecordBatch]) -> Result<()> {
    let failed = |error: parquet::errors::ParquetError| Error::Answer {
        what: format!("writing {}", path.display()),
        answer: error.to_string(),
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).tried(|| parent.display().to_string())?;
    }
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .set_data_page_row_count_limit(1_500)
        .set_write_batch_size(500)
        .build();
    let file = File::create(path).tried(|| path.display().to_string())?;
    let schema = batches[0].schema();
    let mut writer = ArrowWriter::try_new(file, schema, Some(properties)).map_err(failed)?;
    for batch in batches {
        writer.write(batch).map_err(failed)?;
    }
    writer.close().map(|_| ()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    use super::*;

    #[test]
    fn every_table_can_be_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let tables = write(directory.path()).unwrap();
        assert_eq!(tables.len(), 6);
        let rows = |path: &str| -> usize {
            let file = File::open(directory.path().join(path)).unwrap();
            let reader = ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
            reader
                .build()
                .unwrap()
                .map(|batch| batch.unwrap().num_rows())
                .sum()
        };
        assert_eq!(rows("types/part-0.parquet"), 15_000);
        assert_eq!(rows("nested/part-1.parquet"), 1_000);
        assert_eq!(rows("nulls/part-1.parquet"), 0);
        assert_eq!(rows("partitioned/year=2025/kind=c d/part-0.parquet"), 997);
        assert_eq!(rows("repeating/p=4/part-0.parquet"), 45_000);
        assert_eq!(rows("evolved/part-2.parquet"), 1_000);
    }
}
