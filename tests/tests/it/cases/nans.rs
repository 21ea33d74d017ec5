//! Floating-point numbers with NaNs, which no bound includes.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float16Array, Float32Array, Float64Array, Int64Array, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::DataType;

use super::{Case, States, ask, write_file};

const ROWS: usize = 9000;

/// Row groups of ones and a NaN, of numbers, of NaNs, and of nulls and a NaN.
fn number(row: usize) -> Option<f64> {
    let (group, place) = (row / ROWS, row % ROWS);
    match group {
        0 if place == 8500 => Some(f64::NAN),
        0 => Some(1.0),
        1 => Some(5.0 + (place % 3) as f64),
        2 => Some(f64::NAN),
        _ => (place == 3).then_some(f64::NAN),
    }
}

fn write(directory: &Path) {
    let rows = || 0..4 * ROWS;
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(rows().map(|row| row as i64)));
    let doubles: Float64Array = rows().map(number).collect();
    let floats: Float32Array = rows().map(|row| number(row).map(|n| n as f32)).collect();
    let halves: Float16Array = cast(&floats, &DataType::Float16).unwrap().to_data().into();
    let columns: [(&str, ArrayRef); 4] = [
        ("id", ids),
        ("x", Arc::new(doubles)),
        ("y", Arc::new(floats)),
        ("h", Arc::new(halves)),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    write_file(&directory.join("a.parquet"), &batch, ROWS, |properties| {
        properties
    });
}

const CASE: Case = Case {
    write,
    states: States::All,
    some: &["id", "x"],
    asked: &[
        ("select count(*) from t where x > 2.0", "18002"),
        ("select count(*) from t where x = 1.0", "8999"),
        ("select count(*) from t where x <> 1.0", "18002"),
        ("select count(*) from t where isnan(x)", "9002"),
        ("select count(*) from t where isnan(y) and id < 9000", "1"),
        ("select count(*) from t where x > 100.0 and id < 9000", "1"),
        ("select count(*) from t where y >= 5.0", "18002"),
        ("select isnan(max(x)), min(x) from t ", "true,1.0"),
        (
            "select id from t where id < 9000 order by x desc, id limit 1",
            "8500",
        ),
        (
            "select count(*) from (select x from t where x = 1.0 limit 9000) z",
            "8999",
        ),
        (
            "select count(*) from t where h > arrow_cast(2.0, 'Float16')",
            "18002",
        ),
        (
            "select count(*) from t where h = arrow_cast(1.0, 'Float16')",
            "8999",
        ),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn nans_are_outside_of_bounds() {
    ask(&CASE).await;
}
