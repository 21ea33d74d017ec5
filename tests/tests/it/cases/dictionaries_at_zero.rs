//! Chunks without a dictionary whose footer says that it starts the file, as an old writer left them.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use parquet::schema::types::ColumnPath;
use stoa_tests::footers::{Footer, Value};

use super::{Case, States, ask, write_file};

const ROWS: i64 = 12_000;

fn write(directory: &Path) {
    let texts = (0..ROWS).map(|row| format!("s{}", row % 12));
    let columns: [(&str, ArrayRef); 3] = [
        ("id", Arc::new(Int64Array::from_iter_values(0..ROWS))),
        (
            "v",
            Arc::new(Int64Array::from_iter_values(
                (0..ROWS).map(|row| row * 7 % 1009),
            )),
        ),
        ("s", Arc::new(StringArray::from_iter_values(texts))),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let path = directory.join("a.parquet");
    write_file(&path, &batch, 7000, |properties| {
        properties
            .set_dictionary_enabled(false)
            .set_column_dictionary_enabled(ColumnPath::from("s"), true)
    });
    let mut footer = Footer::read(&path).unwrap();
    let by = "parquet-mr version 1.8.1-fast-201712141648170019-ab0622b (build unknown)";
    footer.metadata().set(6, Value::text(by));
    for group in 0..footer.row_groups() {
        for chunk in footer.chunks(group) {
            if chunk.get(11).is_none() {
                chunk.set(11, Value::I64(0));
            }
        }
    }
    footer.save().unwrap();
}

const CASE: Case = Case {
    write,
    states: States::All,
    some: &["id", "s"],
    asked: &[
        ("select count(*), sum(v) from t ", "12000,6034662"),
        (
            "select id from t where v = 1008 and id < 2000 order by id",
            "144\n1153",
        ),
        (
            "select s, count(*) from t group by s order by s limit 3",
            "s0,1000\ns1,1000\ns10,1000",
        ),
        ("select count(*) from t where s = 's7' and v > 500", "502"),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn no_dictionary_starts_at_the_start_of_the_file() {
    ask(&CASE).await;
}
