//! A file as old writers in Java made it: only the deprecated bounds, compared as signed bytes.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryArray, Int64Array, RecordBatch, StringArray};
use parquet::file::properties::EnabledStatistics;
use stoa_tests::footers::{Footer, Value};

use super::{Case, States, ask, write_file};

const ROWS: usize = 3000;
const GROUPS: [[&str; 3]; 3] = [["aé", "az", "b"], ["ma", "mb", "mž"], ["Ω", "z", "zz"]];

fn write(directory: &Path) {
    let words = GROUPS
        .iter()
        .flat_map(|words| words.iter().cycle().take(ROWS));
    let words: Vec<&str> = words.copied().collect();
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..3 * ROWS as i64));
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(&words));
    let bytes = words.iter().map(|word| word.as_bytes());
    let bytes: ArrayRef = Arc::new(BinaryArray::from_iter_values(bytes));
    let batch = RecordBatch::try_from_iter([("id", ids), ("s", texts), ("b", bytes)]).unwrap();
    let path = directory.join("a.parquet");
    write_file(&path, &batch, ROWS, |properties| {
        properties.set_statistics_enabled(EnabledStatistics::Chunk)
    });
    let mut footer = Footer::read(&path).unwrap();
    // No orders of columns.
    footer.metadata().remove(&[7]);
    footer
        .metadata()
        .set(6, Value::text("parquet-mr version 1.8.1 (build 4aba4da)"));
    for (number, mut words) in GROUPS.into_iter().enumerate() {
        words.sort_by_key(|word| word.bytes().map(|byte| byte as i8).collect::<Vec<_>>());
        for column in ["s", "b"] {
            let statistics = footer.statistics(number, column);
            statistics.remove(&[5, 6, 7, 8]);
            statistics.set(2, Value::text(words[0]));
            statistics.set(1, Value::text(words[2]));
        }
    }
    footer.save().unwrap();
}

const CASE: Case = Case {
    write,
    states: States::All,
    some: &["id", "b"],
    asked: &[
        ("select count(*) from t where s = 'az'", "1000"),
        ("select count(*) from t where s = 'aé'", "1000"),
        ("select count(*) from t where s > 'b' and s < 'mc'", "2000"),
        ("select count(*) from t where s >= 'z'", "3000"),
        ("select count(*) from t where s like 'm%'", "3000"),
        ("select min(s), max(s) from t ", "az,Ω"),
        (
            "select count(*) from t where s in ('az', 'mž', 'Ω', 'nothing', 'neither')",
            "3000",
        ),
        (
            "select count(*) from t a join (select s as x from t where id = 1) b on a.s = b.x",
            "1000",
        ),
        (
            "select s, count(*) from t group by s order by s desc limit 3",
            "Ω,1000\nzz,1000\nz,1000",
        ),
        (
            "select count(*) from t where b = decode('617a', 'hex')",
            "1000",
        ),
        ("select encode(max(b), 'hex') from t ", "cea9"),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn deprecated_bounds_are_none_of_texts() {
    ask(&CASE).await;
}
