//! Unsigned integers above the signed range: with good bounds, with deprecated ones that were
//! compared as signed integers, and with such bounds in the fields that promise better.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, UInt8Array, UInt32Array, UInt64Array};
use parquet::file::properties::EnabledStatistics;
use stoa_tests::footers::{Footer, Value};

use super::{Case, States, ask, write_file};

const ROWS: u64 = 9000;
const GROUP: u64 = 5000;

fn long(row: u64) -> u64 {
    if row % 2 == 1 { (1 << 63) + row } else { row }
}

fn int(row: u64) -> u32 {
    (if row % 2 == 1 { (1 << 31) + row } else { row }) as u32
}

fn write(directory: &Path) {
    for number in 0..3 {
        let rows = || number * ROWS..(number + 1) * ROWS;
        let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(rows().map(|row| row as i64)));
        let longs: ArrayRef = Arc::new(UInt64Array::from_iter_values(rows().map(long)));
        let ints: ArrayRef = Arc::new(UInt32Array::from_iter_values(rows().map(int)));
        let bytes: ArrayRef = Arc::new(UInt8Array::from_iter_values(rows().map(|r| r as u8)));
        let columns = [("id", ids), ("u64", longs), ("u32", ints), ("u8", bytes)];
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let path = directory.join(format!("{number}.parquet"));
        write_file(&path, &batch, GROUP as usize, |properties| {
            properties.set_statistics_enabled(EnabledStatistics::Chunk)
        });
        match number {
            0 => {}
            // Of unsigned integers readers have to ignore these.
            1 => bound(&path, number, [2, 1]),
            // The least is above the largest, as they should have been compared.
            _ => bound(&path, number, [6, 5]),
        }
    }
}

/// Writes bounds that were compared as signed integers into the fields `place`.
fn bound(path: &Path, number: u64, place: [i64; 2]) {
    let mut footer = Footer::read(path).unwrap();
    for group in 0..footer.row_groups() {
        let start = number * ROWS + group as u64 * GROUP;
        let rows = || start..(start + GROUP).min((number + 1) * ROWS);
        let bounds = |values: Vec<i64>, width: usize| {
            let bytes = |value: i64| value.to_le_bytes()[..width].to_vec();
            let (min, max) = (values.iter().min().unwrap(), values.iter().max().unwrap());
            [bytes(*min), bytes(*max)]
        };
        let columns = [
            (
                "u64",
                bounds(rows().map(|row| long(row) as i64).collect(), 8),
            ),
            (
                "u32",
                bounds(rows().map(|row| i64::from(int(row) as i32)).collect(), 4),
            ),
            (
                "u8",
                bounds(rows().map(|row| i64::from(row as u8)).collect(), 4),
            ),
        ];
        for (column, bounds) in columns {
            let statistics = footer.statistics(group, column);
            statistics.remove(&[1, 2, 5, 6, 7, 8]);
            for (field, bound) in place.into_iter().zip(bounds) {
                statistics.set(field, Value::Binary(bound));
            }
        }
    }
    footer.save().unwrap();
}

const CASE: Case = Case {
    write,
    states: States::All,
    some: &["id", "u64"],
    asked: &[
        (
            "select count(*) from t where u64 = 9223372036854775809",
            "1",
        ),
        (
            "select count(*) from t where u64 = 9223372036854784811",
            "1",
        ),
        (
            "select count(*) from t where u64 = 9223372036854793811",
            "1",
        ),
        (
            "select count(*) from t where u64 > 9223372036854775807",
            "13500",
        ),
        ("select count(*) from t where u64 < 100", "50"),
        ("select count(*) from t where u32 = 2147492651", "1"),
        ("select count(*) from t where u32 = 2147501651", "1"),
        (
            "select count(*) from t where u32 > 4000000000 or u32 = 20000",
            "1",
        ),
        ("select count(*) from t where u8 = 255", "105"),
        (
            "select min(u64), max(u64), min(u32), max(u32) from t ",
            "0,9223372036854802807,0,2147510647",
        ),
        ("select id from t order by u64 desc limit 2", "26999\n26997"),
        (
            "select count(*) from t where u64 in (1, 2, 9223372036854775809, \
             9223372036854784811, 9223372036854793811)",
            "4",
        ),
        (
            "select count(*) from t x join (select u64 as k from t where id in (1, 9001, 18001)) y \
             on x.u64 = y.k",
            "3",
        ),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn signed_bounds_are_none_of_unsigned_integers() {
    ask(&CASE).await;
}
