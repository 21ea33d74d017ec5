//! Bounds and counts that look like all others, and are not those of the values.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int32Array, Int64Array, RecordBatch, StringArray};
use stoa_tests::footers::{Footer, Value};

use super::{Case, States, ask, write_file};

const ROWS: i32 = 9000;

fn write(directory: &Path) {
    let rows = || 0..3 * ROWS;
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(rows().map(i64::from)));
    let numbers = rows().map(|row| (row % 100 > 0).then_some(row));
    let numbers: ArrayRef = Arc::new(numbers.collect::<Int32Array>());
    let texts = rows().map(|row| format!("t{row:05}"));
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(texts));
    let batch = RecordBatch::try_from_iter([("id", ids), ("k", numbers), ("s", texts)]).unwrap();
    let path = directory.join("a.parquet");
    write_file(&path, &batch, ROWS as usize, |properties| properties);
    let mut footer = Footer::read(&path).unwrap();
    let number = |number: i32| Value::Binary(number.to_le_bytes().to_vec());
    // Too narrow, too wide, and another number of nulls.
    let narrow = footer.statistics(0, "k");
    narrow.set(6, number(4000));
    narrow.set(5, number(5000));
    footer.statistics(1, "k").set(5, number(1_000_000));
    footer.statistics(2, "k").set(3, Value::I64(0));
    let texts = footer.statistics(1, "s");
    texts.set(6, Value::text("t12000"));
    texts.set(5, Value::text("t13000"));
    footer.save().unwrap();
}

const CASE: Case = Case {
    write,
    states: States::Decoded,
    some: &[],
    asked: &[
        ("select min(k), max(k) from t ", "1,26999"),
        ("select count(*) - count(k) from t ", "270"),
        ("select count(*) from t where k < 1000", "990"),
        ("select count(*) from t where k = 8999", "1"),
        (
            "select count(*) from t where k is null and id >= 18000",
            "90",
        ),
        ("select count(*) from t where s = 't09000'", "1"),
        (
            "select count(*) from t where s >= 't09000' and s < 't09100'",
            "100",
        ),
        ("select id from t order by k nulls last limit 1", "1"),
        (
            "select id from t order by s limit 2 offset 9000",
            "9000\n9001",
        ),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn values_are_believed_before_footers() {
    ask(&CASE).await;
}
