//! A logical type that nobody knows yet: its column is read as what it is kept as.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryArray, Int64Array, RecordBatch};
use stoa_tests::footers::{Fields, Footer, Value};

use super::{Case, States, ask, write_file};

const ROWS: i64 = 12_000;

fn write(directory: &Path) {
    let payloads = (0..ROWS).map(|row| (row % 11 > 0).then(|| format!("v{}", row % 50)));
    let columns: [(&str, ArrayRef); 2] = [
        ("id", Arc::new(Int64Array::from_iter_values(0..ROWS))),
        ("payload", Arc::new(payloads.collect::<BinaryArray>())),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let path = directory.join("a.parquet");
    write_file(&path, &batch, 20_000, |properties| properties);
    let mut footer = Footer::read(&path).unwrap();
    let mut logical = Fields::default();
    logical.set(2555, Value::Struct(Fields::default()));
    footer.element("payload").set(10, Value::Struct(logical));
    // Not the schema that Arrow left: other writers leave none.
    footer.metadata().remove(&[5]);
    footer.save().unwrap();
}

const CASE: Case = Case {
    write,
    states: States::All,
    some: &["id"],
    asked: &[
        ("select count(*), sum(id) from t ", "12000,71994000"),
        ("select count(payload) from t ", "10909"),
        (
            "select id from t where id < 3 or id = 11999 order by id",
            "0\n1\n2\n11999",
        ),
        ("select count(*) from t where payload is null", "1091"),
        (
            "select count(*) from t where payload = decode('7637', 'hex')",
            "218",
        ),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn a_type_that_nobody_knows_refuses_no_file() {
    ask(&CASE).await;
}
