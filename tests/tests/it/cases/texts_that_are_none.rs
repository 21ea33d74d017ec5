//! A column that says that it is text, and is not everywhere; a column of bytes that never says so.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryArray, Int64Array, RecordBatch, StringArray};
use stoa_tests::footers::{Fields, Footer, Value};

use super::{Case, States, ask, write_file};

const ROWS: i64 = 20_000;

fn write(directory: &Path) {
    let names = (0..ROWS).map(|row| match row {
        9500 => b"R\xc9UNION".to_vec(),
        row => format!("n{}", row % 100).into_bytes(),
    });
    let raw = (0..ROWS).map(|row| [b"\xff\xfe", (row % 10).to_string().as_bytes()].concat());
    let good = (0..ROWS).map(|row| format!("g{}", row % 10));
    let columns: [(&str, ArrayRef); 4] = [
        ("id", Arc::new(Int64Array::from_iter_values(0..ROWS))),
        ("name", Arc::new(BinaryArray::from_iter_values(names))),
        ("raw", Arc::new(BinaryArray::from_iter_values(raw))),
        ("good", Arc::new(StringArray::from_iter_values(good))),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let path = directory.join("a.parquet");
    write_file(&path, &batch, 7000, |properties| {
        properties.set_dictionary_enabled(false)
    });
    let mut footer = Footer::read(&path).unwrap();
    let mut text = Fields::default();
    text.set(1, Value::Struct(Fields::default()));
    let name = footer.element("name");
    name.set(6, Value::I32(0));
    name.set(10, Value::Struct(text));
    footer.metadata().remove(&[5]);
    footer.save().unwrap();
}

const CASE: Case = Case {
    write,
    states: States::All,
    some: &["id", "good"],
    asked: &[
        ("select count(*), sum(id) from t ", "20000,199990000"),
        ("select count(*) from t where good = 'g3'", "2000"),
        (
            "select count(*) from t where name = 'n7' and id < 7000",
            "70",
        ),
        (
            "select count(*) from t where raw = decode('fffe33', 'hex')",
            "2000",
        ),
        ("select count(distinct raw) from t ", "10"),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_text_harms_no_other_column() {
    ask(&CASE).await;
}
