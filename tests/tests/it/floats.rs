//! Zeros of both signs: equal to each other wherever values are compared, whatever a filter that
//! arrives as a list of values says.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{Array, ArrayRef, AsArray, Float32Array, Float64Array, Int64Array, RecordBatch};
use arrow::datatypes::Int64Type;
use arrow::util::pretty::pretty_format_batches;
use datafusion::execution::context::{SessionConfig, SessionContext};
use datafusion::prelude::ParquetReadOptions;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stoa_datafusion::{Embedded, EmbeddedSettings};
use stoa_layout::{FormChoice, LayoutDocument, LayoutVersion, TableName};
use stoa_tests::edges::store;
use stoa_tests::scratch::CacheDirectory;

/// A multiple of the eight values below, more than one row group, and no multiple of a block.
const ROWS: i64 = 24_000;

/// Half of all values are zeros, and half of those negative.
fn value(id: i64) -> Option<f64> {
    Some(match id % 8 {
        0 | 4 => 0.0,
        1 | 3 => -0.0,
        2 => 2.5,
        5 => 7.0,
        6 => f64::NAN,
        _ => return None,
    })
}

/// `d` and `f` have few values and nulls, `u` one, `m` nearly as many as rows.
fn write(path: &Path) {
    let ids = || 0..ROWS;
    let wide = Float64Array::from_iter(ids().map(value));
    let narrow = Float32Array::from_iter(ids().map(|id| value(id).map(|v| v as f32)));
    let constant = Float64Array::from_iter_values(ids().map(|_| -0.0));
    let many = Float64Array::from_iter_values(ids().map(|id| match id % 1000 {
        0 => -0.0,
        _ => id as f64 / 4.0,
    }));
    let columns: [(&str, ArrayRef); 5] = [
        ("id", Arc::new(Int64Array::from_iter_values(ids()))),
        ("d", Arc::new(wide)),
        ("f", Arc::new(narrow)),
        ("u", Arc::new(constant)),
        ("m", Arc::new(many)),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    store(path, &[batch]).unwrap();
}

/// Statements, and what they say, reckoned by hand: each of the eight values has 3,000 rows.
const JOINS: [(&str, i64); 15] = [
    (
        "select count(*) from t where d in (select d from t where id = 0)",
        12_000,
    ),
    (
        "select count(*) from t where d in (select d from t where id = 1)",
        12_000,
    ),
    (
        "select count(*) from t where d not in (select d from t where id = 1)",
        9_000,
    ),
    (
        "select count(*) from t where u in (select d from t where id = 0)",
        24_000,
    ),
    (
        "select count(*) from t where m in (select d from t where id = 0)",
        24,
    ),
    (
        "select count(*) from t where exists (select 1 from t o where o.id = 3 and o.d = t.d)",
        12_000,
    ),
    (
        "select count(*) from t join (values (cast(0.0 as double)), (cast(2.5 as double))) v(x) \
         on t.d = v.x",
        15_000,
    ),
    (
        "select count(*) from t join (values (cast(0.0 as float)), (cast(2.5 as float))) v(x) \
         on t.f = v.x",
        15_000,
    ),
    (
        "select count(*) from t join (select f as x from t where id in (1, 2)) v on t.f = v.x",
        15_000,
    ),
    // Of two keys the list is one of structs.
    (
        "select count(*) from t join (select d as x, f as y from t where id = 1) v \
         on t.d = v.x and t.f = v.y",
        12_000,
    ),
    (
        "select count(*) from t join (select d as x, cast(0 as bigint) as k from t where id = 1) v \
         on t.d = v.x and t.id % 8 = v.k",
        3_000,
    ),
    // More keys than make a list.
    (
        "select count(*) from t join (select distinct d as x from t) v on t.d = v.x",
        21_000,
    ),
    (
        "select count(*) from t join (select m as x from t where id % 1000 = 0 and id > 9000) v \
         on t.d = v.x",
        168_000,
    ),
    // Nulls that are equal, too.
    (
        "select count(*) from t join (select d as x from t where id in (1, 7)) v \
         on t.d is not distinct from v.x",
        15_000,
    ),
    (
        "select count(*) from (select d from t intersect select d from t where id in (1, 5))",
        2,
    ),
];

/// Lists that stay lists: stock DataFusion tells the zeros apart in them, SQL does not.
const LISTS: [(&str, i64); 6] = [
    (
        "select count(*) from t where d in (0.0, 7.0, 8.0, 9.0, 10.0, 11.0)",
        15_000,
    ),
    (
        "select count(*) from t where d in (-0.0, 7.0, 8.0, 9.0, 10.0, 11.0)",
        15_000,
    ),
    (
        "select count(*) from t where d not in (0.0, 7.0, 8.0, 9.0, 10.0, 11.0)",
        6_000,
    ),
    (
        "select count(*) from t where f in (cast(0 as float), cast(7 as float), 8, 9, 10, 11)",
        15_000,
    ),
    (
        "select count(*) filter (where d in (0.0, 7.0, 8.0, 9.0, 10.0, 11.0)) from t",
        15_000,
    ),
    (
        "select sum(cast(d in (0.0, 7.0, 8.0, 9.0, 10.0, 11.0) as bigint)) from t where d is not null",
        15_000,
    ),
];

async fn number(session: &SessionContext, sql: &str) -> i64 {
    let batches = session.sql(sql).await.unwrap().collect().await.unwrap();
    let column = batches.iter().find(|batch| batch.num_rows() == 1).unwrap();
    let column = column.column(0).as_primitive::<Int64Type>();
    assert!(!column.is_null(0), "{sql}");
    column.value(0)
}

/// Joins in both of their modes, with the scan's filters required and not.
fn configurations() -> Vec<SessionConfig> {
    let mut all = vec![];
    for (partitions, pushdown) in [(1, false), (2, true), (3, false)] {
        let mut config = SessionConfig::new().with_target_partitions(partitions);
        let options = config.options_mut();
        options.execution.parquet.pushdown_filters = pushdown;
        if partitions == 3 {
            options.optimizer.hash_join_single_partition_threshold = 0;
            options.optimizer.hash_join_single_partition_threshold_rows = 0;
        }
        all.push(config);
    }
    all
}

/// What the expectations are worth: stock, which applies no filter of a join to rows, agrees.
#[tokio::test(flavor = "multi_thread")]
async fn stock_agrees_on_joins() {
    let directory = tempfile::tempdir().unwrap();
    write(&directory.path().join("t/0.parquet"));
    let session = SessionContext::new();
    let path = format!("{}/", directory.path().join("t").display());
    let options = ParquetReadOptions::default();
    session.register_parquet("t", path, options).await.unwrap();
    for (sql, expected) in JOINS {
        assert_eq!(number(&session, sql).await, expected, "{sql}");
    }
}

/// Joins hand lists of their keys to scans, which tell zeros apart bit by bit. All of the table
/// cached, half of its columns, and one.
#[tokio::test(flavor = "multi_thread")]
async fn both_zeros_are_one_in_every_form() {
    let directory = tempfile::tempdir().unwrap();
    write(&directory.path().join("t/0.parquet"));
    let location = format!("{}/", directory.path().join("t").display());
    let cache = CacheDirectory::new().unwrap();
    let settings = EmbeddedSettings {
        cache_directory: cache.path(),
        capacity_bytes: 64 << 20,
        freshness: None,
        ..EmbeddedSettings::default()
    };
    let embedded = Embedded::start(settings).await.unwrap();
    let (some, one): (&[&str], &[&str]) = (&["id", "d"], &["u"]);
    let states = [
        (FormChoice::Packed, None),
        (FormChoice::Arrow, None),
        (FormChoice::Parquet, None),
        (FormChoice::Packed, Some(some)),
        (FormChoice::Packed, Some(one)),
    ];
    for (version, (form, columns)) in (1..).zip(states) {
        let name = TableName::new("public", "t").unwrap();
        let version = LayoutVersion::new(version).unwrap();
        let mut document = LayoutDocument::new(name, version, location.clone());
        document.form = form;
        document.columns = columns.map(|c| c.iter().map(|c| (*c).to_owned()).collect());
        embedded.publish(&document).await.unwrap();
        let loaded = embedded.wait_loaded(&document, Duration::from_secs(60));
        loaded.await.unwrap();
        for config in configurations() {
            let session = SessionContext::new_with_config(config);
            embedded.stoa().register(&session).await.unwrap();
            for (sql, expected) in JOINS.into_iter().chain(LISTS) {
                let found = number(&session, sql).await;
                assert_eq!(found, expected, "{form:?} {columns:?}: {sql}");
            }
            let create = format!("create external table p stored as parquet location '{location}'");
            session.sql(&create).await.unwrap();
            for (sql, expected) in JOINS {
                let sql = sql.replace("from t ", "from p ").replace(" t.", " p.");
                let found = number(&session, &sql).await;
                assert_eq!(found, expected, "{form:?} {columns:?}: {sql}");
            }
        }
    }
    embedded.shutdown().await;
}

/// A table of random values, most of them ones that compare in odd ways, in two row groups.
fn write_odd(path: &Path, random: &mut StdRng) {
    let odd = [
        0.0,
        -0.0,
        1.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::from_bits(1),
        -1e300,
    ];
    let mut value = || match random.random_range(0..12) {
        at if at < odd.len() => Some(odd[at]),
        8 => None,
        _ => Some(f64::from(random.random_range(-50_i32..50)) / 4.0),
    };
    let rows = 11_000;
    let mut column = || (0..rows).map(|_| value()).collect::<Vec<_>>();
    let (x, y, f) = (column(), column(), column());
    let f = f.into_iter().map(|value| value.map(|value| value as f32));
    let columns: [(&str, ArrayRef); 4] = [
        ("k", Arc::new(Int64Array::from_iter_values(0..rows))),
        ("x", Arc::new(Float64Array::from(x))),
        ("y", Arc::new(Float64Array::from(y))),
        ("f", Arc::new(Float32Array::from_iter(f))),
    ];
    store(path, &[RecordBatch::try_from_iter(columns).unwrap()]).unwrap();
}

/// Joins and sets over columns of floats, with sides small enough for lists and too large for them.
fn odd_statements(random: &mut StdRng) -> Vec<String> {
    let mut statements = vec![];
    for column in ["x", "y", "f"] {
        let few = random.random_range(1..9);
        let from = random.random_range(0..10_000);
        let side =
            format!("select k, {column} as z from t where k >= {from} and k < {from} + {few}");
        statements.extend([
            format!("select count(*), sum(k) from t where {column} in (select z from ({side}))"),
            format!(
                "select count(*), sum(k) from t where {column} not in \
                 (select z from ({side}) where z is not null)"
            ),
            format!(
                "select count(*), sum(t.k), sum(v.k) from t join ({side}) v on t.{column} = v.z"
            ),
            format!("select count(*), count(v.k) from t left join ({side}) v on t.{column} = v.z"),
            format!("select count(*), count(t.k) from t right join ({side}) v on t.{column} = v.z"),
            format!(
                "select count(*), sum(t.k) from t join ({side}) v \
                 on t.{column} is not distinct from v.z"
            ),
        ]);
        let many = random.random_range(100..2_000);
        statements.extend([
            format!(
                "select count(*), sum(t.k) from t join \
                 (select distinct x, y from t where k < {many}) v on t.x = v.x and t.y = v.y"
            ),
            format!(
                "select count(*), sum(k) from t where {column} in \
                 (select {column} from t where k < {many})"
            ),
        ]);
    }
    statements
}

/// Random values and statements, in every form, against stock, which applies no filter of a join to
/// rows.
#[tokio::test(flavor = "multi_thread")]
async fn joins_on_odd_floats_say_what_stock_says() {
    let directory = tempfile::tempdir().unwrap();
    let cache = CacheDirectory::new().unwrap();
    let settings = EmbeddedSettings {
        cache_directory: cache.path(),
        capacity_bytes: 64 << 20,
        freshness: None,
        ..EmbeddedSettings::default()
    };
    let embedded = Embedded::start(settings).await.unwrap();
    let forms = [FormChoice::Packed, FormChoice::Arrow, FormChoice::Parquet];
    for (seed, config) in (0..).zip(configurations()) {
        let mut random = StdRng::seed_from_u64(seed);
        let place = directory.path().join(format!("{seed}"));
        write_odd(&place.join("0.parquet"), &mut random);
        let location = format!("{}/", place.display());
        let stock = SessionContext::new();
        let options = ParquetReadOptions::default();
        stock
            .register_parquet("t", &location, options)
            .await
            .unwrap();
        let name = TableName::new(&format!("s{seed}"), "t").unwrap();
        let mut document = LayoutDocument::new(name, LayoutVersion::FIRST, location);
        document.form = forms[seed as usize % forms.len()];
        embedded.publish(&document).await.unwrap();
        let loaded = embedded.wait_loaded(&document, Duration::from_secs(60));
        loaded.await.unwrap();
        let session = SessionContext::new_with_config(config);
        embedded.stoa().register(&session).await.unwrap();
        let schema = format!("set datafusion.catalog.default_schema = 's{seed}'");
        session.sql(&schema).await.unwrap();
        for sql in odd_statements(&mut random) {
            let mut answers = vec![];
            for session in [&stock, &session] {
                let batches = session.sql(&sql).await.unwrap().collect().await.unwrap();
                answers.push(pretty_format_batches(&batches).unwrap().to_string());
            }
            assert_eq!(
                answers[1], answers[0],
                "seed {seed}, {:?}: {sql}",
                document.form
            );
        }
    }
    embedded.shutdown().await;
}
