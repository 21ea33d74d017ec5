//! Row groups without a bound, because it would be too long: the bounds of the others are not those
//! of the file.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use stoa_tests::footers::Footer;

use super::{Case, States, ask, write_file};

const ROWS: usize = 10_000;

fn write(directory: &Path) {
    let text = |row: usize| match row < ROWS {
        true => format!("k{:03}", row % 500),
        false => format!("n{:03}", (row - ROWS) % 500),
    };
    let last = |long: &str| long.repeat(6000);
    let column = |long: &str| -> ArrayRef {
        let texts = (0..2 * ROWS - 1).map(text).chain([last(long)]);
        Arc::new(StringArray::from_iter_values(texts))
    };
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..2 * ROWS as i64));
    let batch = RecordBatch::try_from_iter([("id", ids), ("hi", column("z")), ("lo", column("A"))]);
    let path = directory.join("a.parquet");
    write_file(&path, &batch.unwrap(), ROWS, |properties| {
        properties.set_statistics_truncate_length(None)
    });
    let mut footer = Footer::read(&path).unwrap();
    footer.statistics(1, "hi").remove(&[1, 5, 7]);
    footer.statistics(1, "lo").remove(&[2, 6, 8]);
    footer.save().unwrap();
}

const CASE: Case = Case {
    write,
    states: States::All,
    some: &["id", "lo"],
    asked: &[
        (
            "select length(max(hi)), substr(max(hi), 1, 4) from t ",
            "6000,zzzz",
        ),
        (
            "select length(min(lo)), substr(min(lo), 1, 4) from t ",
            "6000,AAAA",
        ),
        (
            "select substr(min(hi), 1, 4), substr(max(lo), 1, 4) from t ",
            "k000,n499",
        ),
        ("select count(*) from t where hi > 'y'", "1"),
        ("select count(*) from t where lo < 'B'", "1"),
        ("select count(*) from t where hi >= 'n000'", "10000"),
        (
            "select id, length(hi) from t order by hi desc, id limit 1",
            "19999,6000",
        ),
        (
            "select id, length(lo) from t order by lo, id limit 1",
            "19999,6000",
        ),
        (
            "select count(*) from t a join (select hi as h from t where id = 19999) b on a.hi = b.h",
            "1",
        ),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn the_bounds_of_some_row_groups_are_not_those_of_all() {
    ask(&CASE).await;
}
