//! Zeros of both signs are one, also where a join hands its keys to the scan as a list.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Float64Array, Int64Array, RecordBatch};

use super::{Case, States, ask, write_file};

const ROWS: i64 = 30_000;

fn write(directory: &Path) {
    let few = |row: i64| [-0.0, 0.0, 1.5, 2.5][row as usize % 4];
    let many = |row: i64| match row % 7 {
        0 => -0.0,
        _ => row as f64 * 0.37 + 1.0,
    };
    let columns: [(&str, ArrayRef); 4] = [
        ("id", Arc::new(Int64Array::from_iter_values(0..ROWS))),
        (
            "d",
            Arc::new(Float64Array::from_iter_values((0..ROWS).map(few))),
        ),
        (
            "u",
            Arc::new(Float64Array::from_iter_values((0..ROWS).map(many))),
        ),
        (
            "f",
            Arc::new(Float32Array::from_iter_values(
                (0..ROWS).map(|row| few(row) as f32),
            )),
        ),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    write_file(&directory.join("a.parquet"), &batch, 20_000, |properties| {
        properties
    });
}

const CASE: Case = Case {
    write,
    states: States::All,
    some: &["id", "d"],
    asked: &[
        (
            "select count(*) from t join (values (cast(0.0 as double)), (cast(2.5 as double))) \
             v(x) on d = v.x",
            "22500",
        ),
        (
            "select count(*) from t join (values (cast(0.0 as double)), (cast(-5.0 as double))) \
             v(x) on u = v.x",
            "4286",
        ),
        (
            "select count(*) from t join (values (cast(0.0 as float)), (cast(2.5 as float))) \
             v(x) on f = v.x",
            "22500",
        ),
        (
            "select count(*) from t a join (select distinct d as x from t where id = 0) v on a.d = v.x",
            "15000",
        ),
        (
            "select count(*) from t a join (select d as x from t where id in (0, 3)) v on a.d = v.x",
            "22500",
        ),
        (
            "select count(*) from t a join (select d as x, f as y from t where id = 1) v \
             on a.d = v.x and a.f = v.y",
            "15000",
        ),
        (
            "select count(*) from t where d in (select d from t where id = 1)",
            "15000",
        ),
        (
            "select count(*) from t where d not in (select d from t where id = 1)",
            "15000",
        ),
        ("select count(*) from t where d = 0.0", "15000"),
        ("select count(distinct d) from t ", "3"),
        (
            "select count(*) from t where u = -0.0 and id < 9000",
            "1286",
        ),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn zeros_of_both_signs_are_joined() {
    ask(&CASE).await;
}
