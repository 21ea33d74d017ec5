//! Nulls of which nobody says how many there are: that is not to say that there are none.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int32Array, Int64Array, RecordBatch, StringArray};
use parquet::file::properties::EnabledStatistics;
use stoa_tests::footers::Footer;

use super::{Case, States, ask, write_file};

const ROWS: i32 = 9000;

fn number(row: i32) -> Option<i32> {
    let (group, place) = (row / ROWS, row % ROWS);
    let is_null = group == 1 && [5, 8500, 8999].contains(&place);
    (!is_null).then_some(group * 100_000 + place)
}

fn write(directory: &Path) {
    let rows = || 0..3 * ROWS;
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(rows().map(i64::from)));
    let numbers: ArrayRef = Arc::new(rows().map(number).collect::<Int32Array>());
    let texts = rows().map(|row| number(row).map(|number| format!("s{number:06}")));
    let texts: ArrayRef = Arc::new(texts.collect::<StringArray>());
    let batch = RecordBatch::try_from_iter([("id", ids), ("k", numbers), ("s", texts)]).unwrap();
    let path = directory.join("a.parquet");
    write_file(&path, &batch, ROWS as usize, |properties| {
        // A page index counts nulls too.
        properties.set_statistics_enabled(EnabledStatistics::Chunk)
    });
    let mut footer = Footer::read(&path).unwrap();
    for column in ["k", "s"] {
        footer.statistics(1, column).remove(&[3]);
    }
    footer.save().unwrap();
}

const CASE: Case = Case {
    write,
    states: States::All,
    some: &["id", "s"],
    asked: &[
        (
            "select id, k from t order by k asc nulls first, id limit 5",
            "9005,\n17500,\n17999,\n0,0\n1,1",
        ),
        (
            "select id, k from t order by k desc nulls first, id limit 5",
            "9005,\n17500,\n17999,\n26999,208999\n26998,208998",
        ),
        (
            "select id, s from t order by s asc nulls first, id desc limit 4 offset 1",
            "17500,\n9005,\n0,s000000\n1,s000001",
        ),
        ("select count(*) from t where k is null", "3"),
        ("select count(*) from t where s is null", "3"),
        ("select count(*) from t where k is not null", "26997"),
        ("select count(*) - count(k) from t ", "3"),
        (
            "select count(*) from t where k is null or k > 200000",
            "9002",
        ),
        (
            "select count(*) from t where k is distinct from 100001",
            "26999",
        ),
        (
            "select count(*) from (select k from t where k is null limit 10) x",
            "3",
        ),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn unknown_nulls_are_found() {
    ask(&CASE).await;
}
