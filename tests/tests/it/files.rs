//! Files that are not as a table's other files are, or not as a session expects them: none of their
//! rows and columns vanishes without a word.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::*;
use arrow::datatypes::{DataType, Field, Schema};
use arrow::util::pretty::pretty_format_batches;
use datafusion::error::DataFusionError;
use datafusion::execution::context::{SessionConfig, SessionContext};
use parquet::arrow::ArrowWriter;
use stoa_datafusion::{Embedded, EmbeddedSettings, Stoa};
use stoa_layout::{FormChoice, LayoutDocument, LayoutVersion, TableCatalog, TableName};
use stoa_tests::scratch::CacheDirectory;

/// A cache of its own.
struct Cache {
    embedded: Embedded,
    directory: CacheDirectory,
}

impl Cache {
    /// One whose worker never looks at files again.
    async fn start() -> Cache {
        Cache::looking(None).await
    }

    async fn looking(freshness: Option<Duration>) -> Cache {
        let directory = CacheDirectory::new().unwrap();
        let settings = EmbeddedSettings {
            cache_directory: directory.path(),
            capacity_bytes: 256 << 20,
            freshness,
            ..EmbeddedSettings::default()
        };
        let embedded = Embedded::start(settings).await.unwrap();
        Cache {
            embedded,
            directory,
        }
    }

    async fn session(&self) -> SessionContext {
        self.session_with(SessionConfig::new()).await
    }

    async fn session_with(&self, config: SessionConfig) -> SessionContext {
        let session = SessionContext::new_with_config(config);
        self.embedded.stoa().register(&session).await.unwrap();
        session
    }

    /// Publishes the files as `layout create` does, and loads what can be.
    async fn load(&self, version: u64, location: &Path, form: FormChoice) {
        let name = TableName::new("public", "t").unwrap();
        let version = LayoutVersion::new(version).unwrap();
        let mut document = LayoutDocument::new(name, version, url(location));
        document.form = form;
        let catalog = TableCatalog::load(self.embedded.origin(), &document, 1)
            .await
            .unwrap();
        document.files = catalog.snapshot();
        self.embedded.publish(&document).await.unwrap();
        let patience = Duration::from_secs(60);
        let loaded = self.embedded.wait_loaded(&document, patience).await;
        loaded.unwrap();
    }
}

fn url(directory: &Path) -> String {
    format!("{}/", directory.display())
}

async fn ask(session: &SessionContext, sql: &str) -> Result<String, DataFusionError> {
    let batches = session.sql(sql).await?.collect().await?;
    Ok(pretty_format_batches(&batches)?.to_string())
}

/// The only value of an answer.
async fn one(session: &SessionContext, sql: &str) -> Result<String, DataFusionError> {
    let batches = session.sql(sql).await?.collect().await?;
    let batch = batches.iter().find(|batch| batch.num_rows() > 0);
    let column = batch.expect("a row").column(0);
    arrow::util::display::array_value_to_string(column, 0).map_err(DataFusionError::from)
}

fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let fields = columns.iter();
    let fields = fields.map(|(name, array)| Field::new(*name, array.data_type().clone(), true));
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    let arrays = columns.into_iter().map(|(_, array)| array).collect();
    let batch = RecordBatch::try_new(schema, arrays).unwrap();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn longs(rows: std::ops::Range<i64>) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values(rows))
}

const FORMS: [FormChoice; 4] = [
    FormChoice::Arrow,
    FormChoice::Packed,
    FormChoice::Parquet,
    FormChoice::Auto,
];

/// The worker never looks again, so nothing but the layout tells it of the file that cannot be read.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_with_a_file_that_cannot_be_read_fails_until_it_is_mended_or_removed() {
    let (cache, files) = (Cache::start().await, tempfile::tempdir().unwrap());
    let files = files.path();
    write(&files.join("a.parquet"), vec![("id", longs(0..100))]);
    write(&files.join("b.parquet"), vec![("id", longs(100..200))]);
    let broken = files.join("c.parquet");
    std::fs::write(&broken, b"PAR1 is not all of it").unwrap();
    cache.load(1, files, FormChoice::Auto).await;

    let session = cache.session().await;
    let elsewhere = SessionContext::new();
    let stoa = Stoa::open(&cache.directory.path(), cache.embedded.origin().clone());
    stoa.register(&elsewhere).await.unwrap();
    let count = "select count(*) from t";
    for session in [&session, &elsewhere] {
        for sql in [count, "select sum(id) from t where id < 150"] {
            let error = one(session, sql).await.unwrap_err().to_string();
            assert!(
                error.contains("table public.t has 1 files that cannot be read, of them file://")
                    && error.contains("/c.parquet: "),
                "{error}"
            );
        }
    }

    write(&broken, vec![("id", longs(200..250))]);
    for session in [&session, &elsewhere] {
        assert_eq!(one(session, count).await.unwrap(), "250");
    }
    std::fs::write(&broken, b"broken anew, otherwise").unwrap();
    cache.load(2, files, FormChoice::Auto).await;
    for session in [&session, &elsewhere] {
        one(session, count).await.unwrap_err();
    }
    std::fs::remove_file(&broken).unwrap();
    // Also without the look before a miss, which would find it by itself.
    ask(&elsewhere, "set stoa.check_before_miss = false")
        .await
        .unwrap();
    for session in [&session, &elsewhere] {
        assert_eq!(one(session, count).await.unwrap(), "200");
    }
    cache.embedded.shutdown().await;
}

/// The worker finds them at its next look. Not to say so would leave their rows out of every answer.
#[tokio::test(flavor = "multi_thread")]
async fn files_that_come_later_and_fit_no_table_or_cannot_be_read_are_said() {
    let files = tempfile::tempdir().unwrap();
    let files = files.path();
    let good = |path: &Path| write(path, vec![("id", longs(0..100))]);
    good(&files.join("a.parquet"));
    let cache = Cache::looking(Some(Duration::from_millis(200))).await;
    cache.load(1, files, FormChoice::Auto).await;
    let session = cache.session().await;
    let count = "select count(*) from t";
    let until = async |what: &str, is: &dyn Fn(&Result<String, String>) -> bool| {
        let started = std::time::Instant::now();
        loop {
            let answer = one(&session, count).await;
            let answer = answer.map_err(|error| error.to_string());
            if is(&answer) {
                return;
            }
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "{what}: {answer:?}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let says = |part: &'static str| {
        move |answer: &Result<String, String>| {
            answer.as_ref().is_err_and(|error| error.contains(part))
        }
    };
    let is = |rows: &'static str| {
        move |answer: &Result<String, String>| answer.as_ref().is_ok_and(|found| found == rows)
    };
    until("loaded", &is("100")).await;
    let later = files.join("b.parquet");
    let texts: ArrayRef = Arc::new(StringArray::from(vec!["x"]));
    write(&later, vec![("id", texts)]);
    until(
        "another type",
        &says("/b.parquet has type Utf8, and Int64 in"),
    )
    .await;
    good(&later);
    until("mended", &is("200")).await;
    std::fs::remove_file(&later).unwrap();
    until("removed", &is("100")).await;
    let only = files.join("a.parquet");
    std::fs::write(&only, b"overwritten with something else").unwrap();
    until("nothing left", &says("/a.parquet: not a Parquet file")).await;
    good(&only);
    until("mended again", &is("100")).await;
    cache.embedded.shutdown().await;
}

/// As `STORED AS PARQUET`, whose files' schemas are read when the table is made.
#[tokio::test(flavor = "multi_thread")]
async fn no_table_is_made_of_files_that_cannot_be_read() {
    let (cache, files) = (Cache::start().await, tempfile::tempdir().unwrap());
    let files = files.path();
    write(&files.join("a.parquet"), vec![("id", longs(0..100))]);
    std::fs::write(files.join("b.parquet"), b"not at all").unwrap();
    let session = cache.session().await;
    let create = format!(
        "create external table t stored as stoa location '{}'",
        url(files)
    );
    let error = ask(&session, &create).await.unwrap_err().to_string();
    assert!(
        error.contains("1 files that cannot be read, of them file://"),
        "{error}"
    );
    assert!(error.contains("/b.parquet: "), "{error}");
    let records = cache.embedded.records().unwrap();
    assert!(records.layout_tables().await.unwrap().is_empty());
    one(&session, "select count(*) from t").await.unwrap_err();

    std::fs::remove_file(files.join("b.parquet")).unwrap();
    ask(&session, &create).await.unwrap();
    assert_eq!(
        one(&session, "select count(*) from t").await.unwrap(),
        "100"
    );
    cache.embedded.shutdown().await;
}

/// A change of writer changes the unit of a timestamp in the middle of a table.
#[tokio::test(flavor = "multi_thread")]
async fn units_of_time_widen() {
    let files = tempfile::tempdir().unwrap();
    let files = files.path();
    const ROWS: i64 = 9_000;
    let seconds = |row: i64| 1_704_067_200 + row * 60;
    let stamp = |number: i64, unit: i64| {
        (number * ROWS..(number + 1) * ROWS).map(move |row| seconds(row) * unit)
    };
    let millis = TimestampMillisecondArray::from_iter_values(stamp(0, 1_000));
    let micros = TimestampMicrosecondArray::from_iter_values(stamp(1, 1_000_000));
    let nanos = TimestampNanosecondArray::from_iter_values(stamp(2, 1_000_000_000));
    let times = Time32MillisecondArray::from_iter_values((0..ROWS as i32).map(|row| row * 1_000));
    let finer = |number: i64| -> ArrayRef {
        let rows = number * ROWS..(number + 1) * ROWS;
        let micros = rows.map(|row| row * 1_000_000);
        Arc::new(Time64MicrosecondArray::from_iter_values(micros))
    };
    let columns: [(ArrayRef, ArrayRef); 3] = [
        (Arc::new(millis.with_timezone("UTC")), Arc::new(times)),
        (Arc::new(micros.with_timezone("UTC")), finer(1)),
        (Arc::new(nanos.with_timezone("UTC")), finer(2)),
    ];
    for (number, (ts, time)) in columns.into_iter().enumerate() {
        let first = number as i64 * ROWS;
        let columns = vec![("id", longs(first..first + ROWS)), ("ts", ts), ("at", time)];
        write(&files.join(format!("{number}.parquet")), columns);
    }
    // By hand: row 5 is five minutes in; a week has 10,080 minutes; 02:30:00 is row 9,000.
    let asked = [
        (
            "select arrow_typeof(ts) from t limit 1",
            "Timestamp(ns, \"UTC\")",
        ),
        (
            "select count(*) from t where ts = timestamptz '2024-01-01T00:05:00Z'",
            "1",
        ),
        (
            "select count(*) from t where ts >= timestamptz '2024-01-07T00:00:00Z' \
             and ts < timestamptz '2024-01-14T00:00:00Z'",
            "10080",
        ),
        ("select count(*) from t", "27000"),
        ("select max(ts) from t", "2024-01-19T17:59:00Z"),
        (
            "select id from t where ts = timestamptz '2024-01-07T06:00:00Z'",
            "9000",
        ),
        (
            "select id from t where cast(\"at\" as time) = time '02:30:00'",
            "9000",
        ),
        (
            "select count(*) from t where cast(\"at\" as time) < time '02:30:00'",
            "9000",
        ),
        (
            "select count(*) from t a join t b on a.ts = b.ts where a.id % 9000 = 17",
            "3",
        ),
    ];
    for form in FORMS {
        let cache = Cache::start().await;
        cache.load(1, files, form).await;
        for pushdown in [false, true] {
            let mut config = SessionConfig::new().with_batch_size(97);
            config.options_mut().execution.parquet.pushdown_filters = pushdown;
            let session = cache.session_with(config).await;
            for (sql, expected) in asked {
                let found = one(&session, sql).await.unwrap();
                assert_eq!(found, expected, "{form} {pushdown} {sql}");
            }
        }
        cache.embedded.shutdown().await;
    }
}

/// As a join leaves behind. Stock takes the first column that has the name, and so does a table of
/// the cache; the others stay readable.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_columns_of_one_name_the_first_is_read() {
    let files = tempfile::tempdir().unwrap();
    let files = files.path();
    let tens: ArrayRef = Arc::new(Int64Array::from(vec![10, 20, 30]));
    let hundreds: ArrayRef = Arc::new(Int64Array::from(vec![100, 200, 300]));
    let texts: ArrayRef = Arc::new(StringArray::from(vec!["a", "b", "c"]));
    let columns = vec![
        ("id", longs(1..4)),
        ("value", tens),
        ("value", hundreds),
        ("last", texts),
    ];
    write(&files.join("joined.parquet"), columns);
    write(
        &files.join("later.parquet"),
        vec![("id", longs(4..6)), ("value", longs(4..6))],
    );
    let asked = [
        ("select count(*) from t", "5"),
        ("select sum(value) from t", "69"),
        ("select sum(id) from t where value > 10 and last = 'b'", "2"),
        ("select string_agg(last, '' order by id) from t", "abc"),
        (
            "select count(*) from (select * from t where value = 20)",
            "1",
        ),
    ];
    for form in FORMS {
        let cache = Cache::start().await;
        cache.load(1, files, form).await;
        for pushdown in [false, true] {
            let mut config = SessionConfig::new();
            config.options_mut().execution.parquet.pushdown_filters = pushdown;
            let session = cache.session_with(config).await;
            for enabled in [true, false] {
                let set = format!("set stoa.enabled = {enabled}");
                ask(&session, &set).await.unwrap();
                for (sql, expected) in asked {
                    let found = one(&session, sql).await.unwrap();
                    assert_eq!(found, expected, "{form} {pushdown} {enabled} {sql}");
                }
            }
        }
        cache.embedded.shutdown().await;
    }
}

mod created;
