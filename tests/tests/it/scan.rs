//! The scan against stock DataFusion: hits, misses and mixtures within one row group, with every
//! setting that changes what the scan itself has to do.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{Array, ArrayRef, Int32Array, Int64Array, RecordBatch};
use arrow::util::pretty::pretty_format_batches;
use datafusion::execution::context::{SessionConfig, SessionContext};
use datafusion::prelude::ParquetReadOptions;
use stoa_datafusion::{Embedded, EmbeddedSettings};
use stoa_layout::{FormChoice, LayoutDocument, LayoutVersion, TableName};
use stoa_metastore::WorkerState;
use stoa_reader::CachedChunk;
use stoa_tests::edges::store;
use stoa_tests::scratch::CacheDirectory;
use stoa_tests::tpch;

/// A cache of its own, with some tables of TPC-H in it.
struct Cache {
    embedded: Embedded,
    directory: CacheDirectory,
}

impl Cache {
    async fn start() -> Cache {
        Cache::with_capacity(512 << 20).await
    }

    async fn with_capacity(capacity_bytes: u64) -> Cache {
        let directory = CacheDirectory::new().unwrap();
        let settings = EmbeddedSettings {
            cache_directory: directory.path(),
            capacity_bytes,
            freshness: None,
            ..EmbeddedSettings::default()
        };
        let embedded = Embedded::start(settings).await.unwrap();
        assert!(embedded.is_owner());
        Cache {
            embedded,
            directory,
        }
    }

    /// Loads `columns` of a table of TPC-H, all of them where none is given.
    async fn load(&self, table: &str, columns: Option<&[&str]>, form: FormChoice) -> WorkerState {
        let name = TableName::new("tpch", table).unwrap();
        let location = format!("{}/", tpch::data().unwrap().join(table).display());
        let mut document = LayoutDocument::new(name, LayoutVersion::FIRST, location);
        document.columns = columns.map(|names| names.iter().map(|n| (*n).to_owned()).collect());
        document.form = form;
        self.embedded.publish(&document).await.unwrap();
        self.embedded
            .wait_loaded(&document, Duration::from_secs(60))
            .await
            .unwrap()
    }

    async fn session(&self, config: SessionConfig) -> SessionContext {
        let session = SessionContext::new_with_config(config);
        self.embedded.stoa().register(&session).await.unwrap();
        session
            .sql("set datafusion.catalog.default_schema = 'tpch'")
            .await
            .unwrap();
        session
    }
}

async fn stock(config: SessionConfig, tables: &[&str]) -> SessionContext {
    let session = SessionContext::new_with_config(config);
    for table in tables {
        let path = format!("{}/", tpch::data().unwrap().join(table).display());
        session
            .register_parquet(*table, path, ParquetReadOptions::default())
            .await
            .unwrap();
    }
    session
}

async fn rows(session: &SessionContext, sql: &str) -> Vec<RecordBatch> {
    session.sql(sql).await.unwrap().collect().await.unwrap()
}

async fn answer(session: &SessionContext, sql: &str) -> String {
    pretty_format_batches(&rows(session, sql).await)
        .unwrap()
        .to_string()
}

/// The value of a metric in EXPLAIN ANALYZE, summed over the scans of the plan.
async fn metric(session: &SessionContext, sql: &str, name: &str) -> u64 {
    let plan = answer(session, &format!("explain analyze {sql}")).await;
    let marker = format!("{name}=");
    let values = plan.split(marker.as_str()).skip(1).map(|rest| {
        let digits: String = rest
            .chars()
            .take_while(|c| c.is_ascii_digit() || matches!(c, '.' | ' ' | 'K' | 'M' | 'G' | 'B'))
            .collect();
        let number: String = digits.chars().take_while(|c| c.is_ascii_digit()).collect();
        number.parse::<u64>().unwrap_or(0)
    });
    values.sum()
}

const QUERIES: [&str; 9] = [
    "select count(*) from lineitem",
    "select * from lineitem order by l_orderkey, l_linenumber limit 50",
    "select l_returnflag, count(*), sum(l_quantity), min(l_comment) from lineitem group by 1 order by 1",
    "select l_orderkey, l_comment from lineitem where l_orderkey between 30000 and 30010 order by 1, 2",
    "select sum(l_extendedprice * l_discount) from lineitem where l_shipdate >= date '1994-01-01' and l_shipdate < date '1995-01-01' and l_quantity < 24",
    "select l_comment from lineitem where l_shipmode = 'AIR' and l_quantity = 7 order by l_comment limit 20",
    "select l_orderkey from lineitem where l_comment like '%zebra%'",
    "select max(l_orderkey), min(l_shipdate) from lineitem",
    "select l_orderkey, l_linenumber from lineitem order by l_orderkey desc, l_linenumber limit 7",
];

/// Every setting under which hits have to do more than hand out blocks.
fn configurations() -> Vec<SessionConfig> {
    let plain = || SessionConfig::new().with_target_partitions(2);
    let mut pushdown = plain();
    pushdown.options_mut().execution.parquet.pushdown_filters = true;
    let mut strings = plain().with_batch_size(1000);
    strings
        .options_mut()
        .execution
        .parquet
        .schema_force_view_types = false;
    vec![plain(), pushdown, strings, plain().with_batch_size(20_000)]
}

/// Whole columns cached, some, and none: the answers are those of stock DataFusion.
#[tokio::test(flavor = "multi_thread")]
async fn answers_are_equal_whatever_is_cached() {
    let some: &[&str] = &["l_orderkey", "l_quantity", "l_shipdate", "l_shipmode"];
    for columns in [None, Some(some)] {
        for form in [FormChoice::Auto, FormChoice::Packed, FormChoice::Parquet] {
            let cache = Cache::start().await;
            cache.load("lineitem", columns, form).await;
            for config in configurations() {
                let cached = cache.session(config.clone()).await;
                let plain = stock(config, &["lineitem"]).await;
                for sql in QUERIES {
                    let (ours, theirs) = (answer(&cached, sql).await, answer(&plain, sql).await);
                    assert_eq!(ours, theirs, "{sql} with {columns:?} cached as {form:?}");
                }
            }
            cache.embedded.shutdown().await;
        }
    }
}

/// A hot query asks the origin for nothing, neither a listing nor a footer.
#[tokio::test(flavor = "multi_thread")]
async fn a_hot_query_sends_the_origin_no_request() {
    let cache = Cache::start().await;
    cache.load("lineitem", None, FormChoice::Auto).await;
    let session = cache
        .session(SessionConfig::new().with_target_partitions(2))
        .await;
    let before = cache.embedded.origin().counters();
    for sql in QUERIES {
        rows(&session, sql).await;
    }
    assert_eq!(cache.embedded.origin().counters(), before);
    assert_eq!(metric(&session, QUERIES[2], "stoa_origin_chunks").await, 0);
    assert_eq!(
        metric(&session, QUERIES[2], "stoa_row_groups_missed").await,
        0
    );
    assert!(metric(&session, QUERIES[2], "stoa_shared_memory_chunks").await > 0);
    cache.embedded.shutdown().await;
}

/// A row group of which only some columns are cached takes those from memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_mixture_reads_only_what_is_missing() {
    let cache = Cache::start().await;
    cache
        .load(
            "lineitem",
            Some(&["l_orderkey", "l_quantity"]),
            FormChoice::Auto,
        )
        .await;
    let session = cache
        .session(SessionConfig::new().with_target_partitions(2))
        .await;
    let sql = "select sum(l_quantity), min(l_comment) from lineitem";
    assert!(metric(&session, sql, "stoa_row_groups_mixed").await > 0);
    assert_eq!(metric(&session, sql, "stoa_row_groups_missed").await, 0);
    let hot = "select sum(l_quantity) from lineitem where l_orderkey > 0";
    assert_eq!(metric(&session, hot, "stoa_origin_chunks").await, 0);
    cache.embedded.shutdown().await;
}

/// Who may read is configured for the cache, so it holds for the worker that runs embedded too.
#[tokio::test(flavor = "multi_thread")]
async fn an_embedded_cache_can_be_opened_to_a_group() {
    use std::os::unix::fs::PermissionsExt;
    for (group_access, mode) in [(false, 0o700), (true, 0o750)] {
        let directory = CacheDirectory::new().unwrap();
        let settings = EmbeddedSettings {
            cache_directory: directory.path(),
            capacity_bytes: 64 << 20,
            freshness: None,
            group_access,
            ..EmbeddedSettings::default()
        };
        let embedded = Embedded::start(settings).await.unwrap();
        let found = std::fs::metadata(directory.path()).unwrap().permissions();
        assert_eq!(found.mode() & 0o777, mode);
        embedded.shutdown().await;
    }
}

/// The arrays of a hit point into the mapping of a segment, and stay after the cache is gone.
#[tokio::test(flavor = "multi_thread")]
async fn buffers_of_a_hit_lie_inside_the_mapping() {
    let cache = Cache::start().await;
    cache.load("orders", None, FormChoice::Arrow).await;
    let view = cache.embedded.reader().view();
    let table = view
        .table(&TableName::new("tpch", "orders").unwrap())
        .unwrap();
    let file = &table.files()[0];
    let id = view.file_id(file).unwrap();
    let mappings = segment_mappings;
    let mut checked = 0;
    for (position, root) in file.roots().iter().enumerate() {
        let data_type = file.decoded_schema().field(position).data_type();
        let chunk = view.chunk(id, 0, root.first_leaf, data_type).unwrap();
        let CachedChunk::Decoded(chunk) = chunk else {
            panic!("{} is not decoded", root.name())
        };
        for buffer in chunk
            .block(0)
            .unwrap()
            .to_data()
            .buffers()
            .iter()
            .filter(|b| !b.is_empty())
        {
            let address = buffer.as_ptr() as usize;
            assert!(
                mappings()
                    .iter()
                    .any(|(start, end)| (*start..*end).contains(&address)),
                "{}: {address:x} is in no mapped segment",
                root.name()
            );
            checked += 1;
        }
    }
    assert!(checked >= file.roots().len());
    cache.embedded.shutdown().await;
}

/// Address ranges of mapped segments, as the kernel lists them.
fn segment_mappings() -> Vec<(usize, usize)> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|line| line.contains("/dev/shm/stoa-test-"))
        .filter_map(|line| {
            let (start, rest) = line.split_once('-')?;
            let end = rest.split(' ').next()?;
            Some((
                usize::from_str_radix(start, 16).ok()?,
                usize::from_str_radix(end, 16).ok()?,
            ))
        })
        .collect()
}

/// Unmodified SQL over the same files is cached too, and can be told not to be.
#[tokio::test(flavor = "multi_thread")]
async fn stock_parquet_tables_use_what_is_cached() {
    let cache = Cache::start().await;
    cache.load("orders", None, FormChoice::Auto).await;
    let session = cache
        .session(SessionConfig::new().with_target_partitions(2))
        .await;
    let path = tpch::data().unwrap().join("orders");
    let create = format!(
        "create external table plain stored as parquet location '{}/'",
        path.display()
    );
    session.sql(&create).await.unwrap();
    let sql = "select o_orderstatus, count(*), sum(o_totalprice) from plain group by 1 order by 1";
    assert!(metric(&session, sql, "stoa_row_groups_hit").await > 0);
    assert_eq!(metric(&session, sql, "stoa_row_groups_missed").await, 0);
    let cached = answer(&session, sql).await;
    session
        .sql("set stoa.cache_parquet_scans = false")
        .await
        .unwrap();
    assert_eq!(metric(&session, sql, "stoa_row_groups_hit").await, 0);
    assert_eq!(answer(&session, sql).await, cached);
    cache.embedded.shutdown().await;
}

/// `STORED AS STOA` makes a table of any Parquet, reads it at once and loads it meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn stored_as_stoa_publishes_and_loads() {
    let cache = Cache::start().await;
    let session = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(2));
    cache.embedded.stoa().register(&session).await.unwrap();
    let path = tpch::data().unwrap().join("part");
    let create = format!(
        "create external table part stored as stoa location '{}/'",
        path.display()
    );
    session.sql(&create).await.unwrap();
    let sql = "select count(*), min(p_name), max(p_retailprice) from part where p_size > 10";
    let plain = stock(SessionConfig::new(), &["part"]).await;
    assert_eq!(answer(&session, sql).await, answer(&plain, sql).await);
    let name = TableName::new("public", "part").unwrap();
    let document = LayoutDocument::new(name, LayoutVersion::FIRST, path.display().to_string());
    cache
        .embedded
        .wait_loaded(&document, Duration::from_secs(60))
        .await
        .unwrap();
    assert_eq!(answer(&session, sql).await, answer(&plain, sql).await);
    assert_eq!(metric(&session, sql, "stoa_origin_chunks").await, 0);
    let elsewhere = "create external table part stored as stoa location '/nowhere/'";
    let error = session.sql(elsewhere).await.unwrap_err().to_string();
    assert!(error.contains("already"), "{error}");
    cache.embedded.shutdown().await;
}

/// The cache is far too small for the table: waiting for the load ends with what fits, and queries
/// take that from memory and the rest from the files.
#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_a_load_ends_when_chunks_are_left_out() {
    // Every column: which of them are left out is the choice's.
    let sql = "select count(*), sum(l_orderkey), sum(l_partkey), sum(l_suppkey), sum(l_linenumber), \
               sum(l_quantity), sum(l_extendedprice), sum(l_discount), sum(l_tax), \
               max(l_returnflag), max(l_linestatus), max(l_shipdate), max(l_commitdate), \
               max(l_receiptdate), max(l_shipinstruct), max(l_shipmode), max(l_comment) \
               from lineitem";
    let plain = stock(SessionConfig::new(), &["lineitem"]).await;
    let expected = answer(&plain, sql).await;
    for form in [FormChoice::Auto, FormChoice::Arrow, FormChoice::Packed] {
        let cache = Cache::with_capacity(1 << 20).await;
        let state = cache.load("lineitem", None, form).await;
        let table = &state.tables["tpch.lineitem"];
        assert_eq!(table.current.unwrap().version, 1, "{table:?}");
        assert!(table.chunks_done > 0, "{form:?}: {table:?}");
        let session = cache.session(SessionConfig::new()).await;
        assert_eq!(answer(&session, sql).await, expected, "{form:?}");
        assert!(
            metric(&session, sql, "stoa_shared_memory_chunks").await > 0,
            "{form:?}"
        );
        assert!(
            metric(&session, sql, "stoa_origin_chunks").await > 0,
            "{form:?}"
        );
        cache.embedded.shutdown().await;
    }
}

/// A cache that is missing, empty or full of rubbish is a miss: the query reads the origin.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_cache_directory_never_fails_a_query() {
    let directory = tempfile::Builder::new()
        .prefix("stoa-test-")
        .tempdir_in("/dev/shm")
        .unwrap();
    let plain = stock(SessionConfig::new(), &["region"]).await;
    let expected = answer(&plain, "select * from region order by 1").await;
    std::fs::write(directory.path().join("index"), b"not an index at all").unwrap();
    for place in [
        directory.path(),
        Path::new("/dev/shm/stoa-test-that-is-not-there"),
    ] {
        let stoa = stoa_datafusion::Stoa::open(place, stoa_datafusion::Origin::default());
        let session = SessionContext::new();
        stoa.register(&session).await.unwrap();
        let path = tpch::data().unwrap().join("region");
        for (name, stored) in [("region", "parquet"), ("stored", "stoa")] {
            let create = format!(
                "create external table {name} stored as {stored} location '{}/'",
                path.display()
            );
            session.sql(&create).await.unwrap();
            let sql = format!("select * from {name} order by 1");
            assert_eq!(answer(&session, &sql).await, expected);
        }
    }
}

/// The table functions show what is there.
#[tokio::test(flavor = "multi_thread")]
async fn table_functions_show_the_cache() {
    let cache = Cache::start().await;
    cache.load("nation", None, FormChoice::Auto).await;
    let session = cache.session(SessionConfig::new()).await;
    let tables = answer(&session, "select schema, \"table\", version, rows, chunks = cached_chunks as whole from stoa_tables()").await;
    assert!(
        tables.contains("| tpch   | nation | 1       | 25   | true  |"),
        "{tables}"
    );
    rows(&session, "select * from nation").await;
    let chunks = rows(
        &session,
        "select * from stoa_chunks() where hits > 0 and encoding <> ''",
    )
    .await;
    let chunks: usize = chunks.iter().map(RecordBatch::num_rows).sum();
    assert_eq!(chunks, 4, "one chunk a column, all of them read");
    // A worker tells its state to the metastore now and then, not at every change.
    let sql = "select worker, state, held_bytes > 0 as held from stoa_workers()";
    let mut workers = String::new();
    for _ in 0..100 {
        workers = answer(&session, sql).await;
        if workers.contains("| embedded | ready | true") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(workers.contains("| embedded | ready | true"), "{workers}");
    let error = session
        .sql("select * from stoa_tables(1)")
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("stoa_tables() takes no arguments"),
        "{error}"
    );
    cache.embedded.shutdown().await;
}

/// Two sessions, one memory: what one process loads is there for all.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_reader_finds_what_the_first_loaded() {
    let cache = Cache::start().await;
    cache.load("customer", None, FormChoice::Auto).await;
    let directory = cache.embedded.reader().view().snapshot().generation();
    assert!(directory > 0);
    let path = cache.directory.path();
    let other = stoa_datafusion::Stoa::open(&path, stoa_datafusion::Origin::default());
    let session = SessionContext::new();
    other.register(&session).await.unwrap();
    let sql = "select c_mktsegment, count(*) from tpch.customer group by 1 order by 1";
    assert!(metric(&session, sql, "stoa_row_groups_hit").await > 0);
    assert_eq!(other.reader().origin().counters().requests(), 0);
    let table: Arc<_> = session.table_provider("tpch.customer").await.unwrap();
    assert_eq!(table.schema().fields().len(), 8);
    cache.embedded.shutdown().await;
}

fn write_parquet(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    store(path, &[RecordBatch::try_from_iter(columns).unwrap()]).unwrap();
}

/// Where stock DataFusion answers wrongly too, or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn bounds_that_do_not_hold_are_not_believed() {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name);
    // The bounds of the narrower file are no bounds of the wider type.
    let narrow: ArrayRef = Arc::new(Int32Array::from_iter_values(1..=1000));
    write_parquet(&place("widened/0.parquet"), vec![("id", narrow)]);
    let wide: ArrayRef = Arc::new(Int64Array::from_iter_values(1..=100));
    write_parquet(&place("widened/1.parquet"), vec![("id", wide)]);
    // A partition whose value is null.
    for (day, rows) in [("1", 3), ("__HIVE_DEFAULT_PARTITION__", 5)] {
        let v: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows));
        write_parquet(
            &place(&format!("null_day/day={day}/0.parquet")),
            vec![("v", v)],
        );
    }
    // The minimum comes last, and says nothing of the other column.
    let last = 59_999;
    let a = (0..=last).map(|r| if r == last { 0 } else { 1 + r % 1000 });
    let a: ArrayRef = Arc::new(Int64Array::from_iter_values(a));
    let b: ArrayRef = Arc::new(Int64Array::from_iter_values(0..=last));
    write_parquet(&place("late/0.parquet"), vec![("a", a), ("b", b)]);

    let cache = Cache::start().await;
    let session = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(2));
    cache.embedded.stoa().register(&session).await.unwrap();
    for table in ["widened", "null_day", "late"] {
        let location = place(table).display().to_string();
        let create = format!("create external table {table} stored as stoa location '{location}/'");
        rows(&session, &create).await;
    }
    for _ in 0..2 {
        // From the origin while the cache fills, and then from the cache.
        for (sql, expected) in [
            ("select min(id), max(id) from widened", "| 1 | 1000 |"),
            ("select count(day), count(*) from null_day", "| 3 | 8 |"),
            (
                "select count(distinct day) from null_day where day is null",
                "| 0 |",
            ),
            (
                "select min(a), max(b + 1) from late where b >= 0",
                "| 0 | 60000 |",
            ),
        ] {
            let found = answer(&session, sql).await;
            let last = found.lines().nth(3).unwrap();
            let cells: Vec<&str> = last.split_whitespace().collect();
            assert_eq!(cells.join(" "), expected, "{sql}");
        }
        for table in ["widened", "null_day", "late"] {
            let name = TableName::new("public", table).unwrap();
            let location = format!("{}/", place(table).display());
            let document = LayoutDocument::new(name, LayoutVersion::FIRST, location);
            let loaded = cache
                .embedded
                .wait_loaded(&document, Duration::from_secs(60));
            loaded.await.unwrap();
        }
    }
    let sql = "select sum(a), sum(b) from late";
    assert_eq!(metric(&session, sql, "stoa_origin_chunks").await, 0);
    cache.embedded.shutdown().await;
}
