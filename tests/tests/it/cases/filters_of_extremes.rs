//! The filters that `min` and `max` push into a scan, however they were turned on.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch};

use super::{Case, States, ask, write_file};

const ROWS: i64 = 30_000;

fn write(directory: &Path) {
    for number in 0..3 {
        let rows = || number * ROWS..(number + 1) * ROWS;
        let column = |value: &dyn Fn(i64) -> i64| -> ArrayRef {
            Arc::new(Int64Array::from_iter_values(rows().map(value)))
        };
        let except =
            |at: i64, other: i64, value: i64, row: i64| if row == at { other } else { value };
        let mut columns = vec![
            ("id", column(&|row| row)),
            ("a", column(&|row| except(89_999, 0, 1 + row % 1000, row))),
            ("b", column(&|row| except(15_000, 9999, row % 500, row))),
            ("c", column(&|row| except(60_001, -7, 100 + row % 50, row))),
        ];
        // A file without the column.
        if number != 1 {
            columns.push(("lat", column(&|row| except(80_000, 3, 100 + row % 7, row))));
        }
        let columns = columns
            .into_iter()
            .map(|(name, column)| (name, column, true));
        let batch = RecordBatch::try_from_iter_with_nullable(columns).unwrap();
        let path = directory.join(format!("{number}.parquet"));
        write_file(&path, &batch, 10_000, |properties| properties);
    }
}

const EXTREMES: &str = "select min(a), max(a), max(b), min(c + 1) from t where id >= 0";
const LAT: &str = "select min(lat), max(lat) from t where id >= 0";

const CASE: Case = Case {
    write,
    states: States::All,
    some: &["id", "a", "lat"],
    asked: &[
        (EXTREMES, "0,1000,9999,-6"),
        (
            "select max(b), sum(c), count(*) from t where id >= 0",
            "9999,11204892,90000",
        ),
        (LAT, "3,106"),
        (
            "set datafusion.optimizer.enable_dynamic_filter_pushdown = true",
            "",
        ),
        (EXTREMES, "0,1000,9999,-6"),
        (LAT, "3,106"),
        ("select min(c + 1), max(b) from t where id >= 10", "-6,9999"),
        (
            "set datafusion.optimizer.enable_aggregate_dynamic_filter_pushdown = true",
            "",
        ),
        (EXTREMES, "0,1000,9999,-6"),
        (
            "select max(a) filter (where b < 10), max(b) from t where id >= 0",
            "510,9999",
        ),
        (LAT, "3,106"),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn extremes_are_found_whatever_filters_are_on() {
    ask(&CASE).await;
}
