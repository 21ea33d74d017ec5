//! The same map in two files whose writers name its parts differently: the names mean nothing.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, Int64Builder, MapBuilder, RecordBatch, StringBuilder};
use stoa_tests::footers::{Footer, Value};

use super::{Case, States, ask, write_file};

const ROWS: i64 = 9000;

fn write(directory: &Path) {
    for (file, start) in [("a", 0), ("b", ROWS)] {
        let mut maps = MapBuilder::new(None, StringBuilder::new(), Int64Builder::new());
        for row in start..start + ROWS {
            let is_null = row % 10 == 9;
            let entries = [("a", row), ("b", row * 2)]
                .into_iter()
                .take(row as usize % 3);
            for (key, value) in entries.filter(|_| !is_null) {
                maps.keys().append_value(key);
                maps.values().append_value(value);
            }
            maps.append(!is_null).unwrap();
        }
        let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(start..start + ROWS));
        let maps: ArrayRef = Arc::new(maps.finish());
        let batch = RecordBatch::try_from_iter([("id", ids), ("tags", maps)]).unwrap();
        let path = directory.join(format!("{file}.parquet"));
        write_file(&path, &batch, 20_000, |properties| properties);
        rename(&path, file == "a");
    }
}

/// Names the parts as Java and C++ do, or as Rust does.
fn rename(path: &Path, as_java: bool) {
    let mut footer = Footer::read(path).unwrap();
    let renamed = |name: &str| match (name, as_java) {
        ("entries", true) => "key_value".to_owned(),
        ("keys", true) => "key".to_owned(),
        ("values", true) => "value".to_owned(),
        (other, _) => other.to_owned(),
    };
    let text = |value: &Value| match value {
        Value::Binary(bytes) => String::from_utf8(bytes.clone()).unwrap(),
        other => panic!("{other:?} is no text"),
    };
    for element in footer.schema() {
        let name = text(element.get(4).unwrap());
        element.set(4, Value::text(&renamed(&name)));
    }
    for group in 0..footer.row_groups() {
        for chunk in footer.chunks(group) {
            let Some(Value::List(kind, parts)) = chunk.get(3).cloned() else {
                panic!("a chunk without a path")
            };
            let parts = parts.iter().map(|part| Value::text(&renamed(&text(part))));
            chunk.set(3, Value::List(kind, parts.collect()));
        }
    }
    // The schema that Arrow left has the names too.
    footer.metadata().remove(&[5]);
    footer.save().unwrap();
}

const CASE: Case = Case {
    write,
    states: States::Ours,
    some: &["id"],
    asked: &[
        ("select count(*), count(tags) from t ", "18000,16200"),
        (
            "select id, tags['a'], tags['b'] from t where id in \
             (0, 1, 2, 9, 8999, 9000, 9001, 9002, 17999) order by id",
            "0,,\n1,1,\n2,2,4\n9,,\n8999,,\n9000,,\n9001,9001,\n9002,9002,18004\n17999,,",
        ),
        ("select sum(tags['b']) from t ", "97189200"),
        (
            "select count(*) from t where tags is null and id >= 9000",
            "900",
        ),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn names_of_the_parts_of_a_map_mean_nothing() {
    ask(&CASE).await;
}
