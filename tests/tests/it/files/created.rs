//! `slt/created/`: what a statement and a session say of a table's files, over stock Parquet and
//! over the cache.

use std::time::Instant;

use arrow::buffer::NullBuffer;
use arrow::datatypes::Fields;
use parquet::data_type::{Int96, Int96Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use sqllogictest::{Runner, strict_column_validator};

use super::*;
use crate::slt::Session;

fn texts(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

fn write_files(directory: &Path) {
    let fields = Fields::from(vec![
        Field::new("x", DataType::Int32, true),
        Field::new("pad", DataType::Utf8, true),
    ]);
    let parts: Vec<ArrayRef> = vec![
        Arc::new(Int32Array::from(vec![10, 20, 30])),
        texts(&["p", "q", "r"]),
    ];
    let nulls = NullBuffer::from(vec![true, true, false]);
    let structs: ArrayRef = Arc::new(StructArray::new(fields, parts, Some(nulls)));
    let ids: ArrayRef = Arc::new(Int32Array::from(vec![1, 2, 3]));
    let columns = vec![
        ("id", ids),
        ("s", structs),
        ("pad", texts(&["a", "b", "c"])),
    ];
    write(&directory.join("wide/a.parquet"), columns);
    std::fs::create_dir(directory.join("empty")).unwrap();
    let values = |path: &str, values: &[&str]| {
        write(&directory.join(path), vec![("v", texts(values))]);
    };
    values("single/a=1/a.parquet", &["foo", "bar"]);
    values("single/a=2/a.parquet", &["baz"]);
    values("parts/a=1/b=100/a.parquet", &["foo", "bar"]);
    values("parts/a=1/b=200/a.parquet", &["baz"]);
    values("nested/0.parquet", &["a", "b", "c"]);
    values("nested/below/1.parquet", &["d", "e"]);
    let bytes: ArrayRef = Arc::new(BinaryArray::from_iter_values([b"aaa", b"bbb"]));
    write(&directory.join("binary/a.parquet"), vec![("b", bytes)]);

    std::fs::create_dir(directory.join("int96")).unwrap();
    let schema = "message m { required int96 ts; }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let file = std::fs::File::create(directory.join("int96/a.parquet")).unwrap();
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    // Julian days of 2024-01-01 and of 9999-12-31, which nanoseconds in 64 bits do not reach.
    let days = [2_460_311, 5_373_484].map(|day| {
        let mut value = Int96::new();
        value.set_data(0, 0, day);
        value
    });
    let typed = column.typed::<Int96Type>();
    typed.write_batch(&days, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
}

async fn check(session: &SessionContext, format: &str, directory: &Path, mode: &str) {
    let mut runner = Runner::new(|| {
        let session = session.clone();
        async move { Ok(Session(session)) }
    });
    runner.with_column_validator(strict_column_validator);
    runner.set_var("FORMAT".to_owned(), format.to_owned());
    runner.set_var("DIR".to_owned(), directory.display().to_string());
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("slt/created/tables.slt");
    if let Err(error) = runner.run_file_async(&file).await {
        panic!("{mode}: {}", error.display(false));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_created_table_is_as_stock_makes_it() {
    let files = tempfile::tempdir().unwrap();
    let files = files.path();
    write_files(files);
    check(&SessionContext::new(), "parquet", files, "stock").await;

    let cache = Cache::start().await;
    check(&cache.session().await, "stoa", files, "while it is loaded").await;
    let records = cache.embedded.records().unwrap();
    let tables = records.layout_tables().await.unwrap();
    assert!(tables.contains(&"public.declared".to_owned()), "{tables:?}");
    let states = cache.embedded.worker_state().unwrap();
    let started = Instant::now();
    let is_loaded = |table: &String| {
        let state = states.borrow();
        state
            .tables
            .get(table)
            .is_some_and(|table| table.current.is_some())
    };
    while !tables.iter().all(is_loaded) {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "{:?}",
            states.borrow()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // By other names, for these are taken; the files are the same, and so are their chunks.
    let session = cache.session().await;
    ask(&session, "create schema again").await.unwrap();
    let schema = "set datafusion.catalog.default_schema = 'again'";
    ask(&session, schema).await.unwrap();
    check(&session, "stoa", files, "loaded").await;
    let explain = "explain select sum(id) from declared where id > 1";
    let plan = ask(&session, explain).await.unwrap();
    assert!(plan.contains("cache=stoa"), "{plan}");
    cache.embedded.shutdown().await;
}
