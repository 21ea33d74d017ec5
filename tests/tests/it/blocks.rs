//! Row groups of many blocks: divided between partitions, pruned by zone maps, filtered by dynamic
//! filters as they tighten. Whatever is skipped, the answers are those of stock DataFusion.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::compute::{SortOptions, lexsort_to_indices, take_record_batch};
use arrow::util::pretty::pretty_format_batches;
use datafusion::execution::context::{SessionConfig, SessionContext};
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::{ExecutionPlan, ExecutionPlanProperties, collect};
use datafusion::prelude::ParquetReadOptions;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use stoa_datafusion::{Embedded, EmbeddedSettings};
use stoa_layout::{FormChoice, LayoutDocument, LayoutVersion, TableName};
use stoa_tests::scratch::CacheDirectory;
use stoa_tests::tpch;

/// The whole of TPC-H's lineitem as one row group: eight blocks, the last one short.
struct Cache {
    embedded: Embedded,
    directory: CacheDirectory,
    files: tempfile::TempDir,
}

impl Cache {
    /// `lineitem` is as generated; `shipped` is sorted by date, without statistics in its footer
    /// and in two row groups.
    async fn start() -> Cache {
        let directory = CacheDirectory::new().unwrap();
        let settings = EmbeddedSettings {
            cache_directory: directory.path(),
            capacity_bytes: 512 << 20,
            freshness: None,
            ..EmbeddedSettings::default()
        };
        let embedded = Embedded::start(settings).await.unwrap();
        let files = tempfile::tempdir().unwrap();
        let all = lineitem().await;
        let sorted = by_date(&all);
        write(&files.path().join("lineitem"), &all, 1_000_000, true);
        write(&files.path().join("shipped"), &sorted, 40_000, false);
        Cache {
            embedded,
            directory,
            files,
        }
    }

    fn place(&self, table: &str) -> PathBuf {
        self.files.path().join(table)
    }

    async fn load(&self, table: &str, columns: Option<&[&str]>, form: FormChoice) {
        let name = TableName::new("blocks", table).unwrap();
        let location = format!("{}/", self.place(table).display());
        let mut document = LayoutDocument::new(name, LayoutVersion::FIRST, location);
        document.columns = columns.map(|names| names.iter().map(|n| (*n).to_owned()).collect());
        document.form = form;
        self.embedded.publish(&document).await.unwrap();
        self.embedded
            .wait_loaded(&document, Duration::from_secs(60))
            .await
            .unwrap();
    }

    async fn session(&self, config: SessionConfig) -> SessionContext {
        let session = SessionContext::new_with_config(config);
        self.embedded.stoa().register(&session).await.unwrap();
        session
            .sql("set datafusion.catalog.default_schema = 'blocks'")
            .await
            .unwrap();
        session
    }

    async fn stock(&self, config: SessionConfig) -> SessionContext {
        let session = SessionContext::new_with_config(config);
        for table in ["lineitem", "shipped"] {
            let path = format!("{}/", self.place(table).display());
            session
                .register_parquet(table, path, ParquetReadOptions::default())
                .await
                .unwrap();
        }
        session
    }
}

async fn lineitem() -> RecordBatch {
    let session = SessionContext::new();
    let path = format!("{}/", tpch::data().unwrap().join("lineitem").display());
    let table = session
        .read_parquet(path, ParquetReadOptions::default())
        .await
        .unwrap();
    let schema = Arc::clone(table.schema().inner());
    let batches = table.collect().await.unwrap();
    arrow::compute::concat_batches(&schema, &batches).unwrap()
}

fn by_date(batch: &RecordBatch) -> RecordBatch {
    let column = |name: &str| arrow::compute::SortColumn {
        values: Arc::clone(batch.column_by_name(name).unwrap()),
        options: Some(SortOptions::default()),
    };
    let order = ["l_shipdate", "l_orderkey", "l_linenumber"].map(column);
    let order = lexsort_to_indices(&order, None).unwrap();
    take_record_batch(batch, &order).unwrap()
}

fn write(directory: &Path, batch: &RecordBatch, row_group: usize, statistics: bool) {
    std::fs::create_dir(directory).unwrap();
    let statistics = match statistics {
        true => EnabledStatistics::Page,
        false => EnabledStatistics::None,
    };
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(row_group))
        .set_statistics_enabled(statistics)
        .build();
    let file = File::create(directory.join("all.parquet")).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}

/// The forms that are read block by block.
const BLOCKS: [FormChoice; 2] = [FormChoice::Arrow, FormChoice::Packed];

/// Files of any size are divided between four partitions.
fn config() -> SessionConfig {
    let mut config = SessionConfig::new()
        .with_target_partitions(4)
        .with_repartition_file_min_size(0);
    config
        .options_mut()
        .execution
        .enable_file_stream_work_stealing = true;
    config
}

/// Every setting under which a scan divides, filters or hands on differently.
fn configurations() -> Vec<SessionConfig> {
    let mut pushdown = config();
    pushdown.options_mut().execution.parquet.pushdown_filters = true;
    let mut fixed = config().with_batch_size(1000);
    fixed
        .options_mut()
        .execution
        .enable_file_stream_work_stealing = false;
    vec![
        config(),
        pushdown,
        fixed,
        config().with_target_partitions(1),
    ]
}

async fn rows(session: &SessionContext, sql: &str) -> Vec<RecordBatch> {
    session.sql(sql).await.unwrap().collect().await.unwrap()
}

async fn answer(session: &SessionContext, sql: &str) -> String {
    pretty_format_batches(&rows(session, sql).await)
        .unwrap()
        .to_string()
}

/// A metric summed over the scans of an executed plan.
fn metric(plan: &Arc<dyn ExecutionPlan>, name: &str) -> usize {
    let own = plan.metrics().map_or(0, |metrics| {
        metrics
            .sum_by_name(name)
            .map_or(0, |value| value.as_usize())
    });
    own + plan
        .children()
        .iter()
        .map(|child| metric(child, name))
        .sum::<usize>()
}

/// Runs a query and returns its plan with what was counted.
async fn executed(session: &SessionContext, sql: &str) -> (Arc<dyn ExecutionPlan>, String) {
    let frame = session.sql(sql).await.unwrap();
    let plan = frame.create_physical_plan().await.unwrap();
    let batches = collect(Arc::clone(&plan), session.task_ctx())
        .await
        .unwrap();
    let text = pretty_format_batches(&batches).unwrap().to_string();
    (plan, text)
}

fn scans(plan: &Arc<dyn ExecutionPlan>) -> Vec<Arc<dyn ExecutionPlan>> {
    if plan.children().is_empty() {
        return vec![Arc::clone(plan)];
    }
    plan.children().into_iter().flat_map(scans).collect()
}

const QUERIES: [&str; 15] = [
    "select count(*), sum(l_orderkey), count(distinct l_comment) from lineitem",
    "select l_orderkey, l_linenumber, l_comment from lineitem order by 1, 2 limit 20 offset 30000",
    "select sum(l_extendedprice * l_discount) from lineitem where l_shipdate >= date '1994-01-01' and l_shipdate < date '1995-01-01' and l_discount between 0.05 and 0.07 and l_quantity < 24",
    "select l_returnflag, l_linestatus, sum(l_quantity), count(*) from lineitem where l_shipdate <= date '1998-09-02' group by 1, 2 order by 1, 2",
    "select l_orderkey, l_comment from lineitem where l_shipmode in ('AIR', 'RAIL') and l_quantity = 7 and l_comment like '%furious%' order by 1, 2",
    "select count(*) from lineitem where l_linenumber % 2 = 1 and l_orderkey % 3 = l_linenumber % 3",
    "select count(*) from lineitem where l_comment like '%zebra%' or l_orderkey < 0",
    "select count(*), min(l_shipdate), max(l_comment) from shipped where l_shipdate = date '1995-06-17'",
    "select count(*), sum(l_quantity) from shipped where l_shipdate between date '1996-01-01' and date '1996-01-31' and l_returnflag = 'N'",
    "select count(*) from shipped where l_shipmode = 'SUBMARINE'",
    "select l_shipdate, l_orderkey, l_linenumber from shipped order by l_shipdate desc, l_orderkey, l_linenumber limit 5",
    "select a.l_orderkey, count(*) from shipped a join lineitem b on a.l_orderkey = b.l_orderkey where b.l_partkey = 17 and b.l_linenumber = 2 group by 1 order by 1",
    "select count(*), sum(a.l_quantity) from lineitem a join shipped b on a.l_orderkey = b.l_orderkey and a.l_linenumber = b.l_linenumber",
    "select l_orderkey from shipped where l_tax is not null and l_comment is null",
    "select count(*), min(l_comment) from lineitem where l_comment like '%the%' and l_comment not like '%e%a%' and l_comment not like '%ly%'",
];

/// Columns in one form, and all and some of them in different forms, under every setting.
#[tokio::test(flavor = "multi_thread")]
async fn answers_are_equal_however_the_rows_are_divided() {
    let some: &[&str] = &["l_orderkey", "l_shipdate", "l_quantity", "l_comment"];
    // The same rows each time: stock DataFusion is asked once.
    let mut expected = HashMap::new();
    for columns in [None, Some(some)] {
        for form in BLOCKS.into_iter().chain([FormChoice::Parquet]) {
            let cache = Cache::start().await;
            cache.load("lineitem", columns, form).await;
            cache.load("shipped", None, form).await;
            for (number, config) in configurations().into_iter().enumerate() {
                let cached = cache.session(config.clone()).await;
                let plain = cache.stock(config).await;
                for sql in QUERIES {
                    if let Entry::Vacant(unknown) = expected.entry((number, sql)) {
                        unknown.insert(answer(&plain, sql).await);
                    }
                    let ours = answer(&cached, sql).await;
                    let theirs = &expected[&(number, sql)];
                    assert_eq!(&ours, theirs, "{sql} with {columns:?} cached as {form:?}");
                }
            }
            cache.embedded.shutdown().await;
        }
    }
}

/// One row group keeps all partitions busy, if it is cached; if not, it stays whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_cached_row_group_is_divided_between_partitions() {
    let cache = Cache::start().await;
    cache
        .load("lineitem", Some(&["l_orderkey"]), FormChoice::Auto)
        .await;
    let mut config = config();
    config
        .options_mut()
        .execution
        .enable_file_stream_work_stealing = false;
    let session = cache.session(config).await;
    let divided = "select sum(l_orderkey) from lineitem where l_orderkey > 0";
    let (plan, _) = executed(&session, divided).await;
    let scan = &scans(&plan)[0];
    assert_eq!(scan.output_partitioning().partition_count(), 4);
    let metrics = scan.metrics().unwrap();
    let rows: Vec<usize> = (0..4)
        .map(|partition| {
            let of_partition = metrics.iter().filter(|m| m.partition() == Some(partition));
            of_partition
                .filter(|m| m.value().name() == "output_rows")
                .map(|m| m.value().as_usize())
                .sum()
        })
        .collect();
    assert_eq!(rows.iter().sum::<usize>(), 60_175);
    assert!(
        rows.iter().all(|rows| (10_000..20_000).contains(rows)),
        "{rows:?}"
    );
    assert_eq!(metric(&plan, "stoa_row_groups_missed"), 0);
    let whole = "select sum(l_orderkey) from lineitem where l_partkey > 0";
    let (plan, _) = executed(&session, whole).await;
    assert_eq!(metric(&plan, "stoa_row_groups_mixed"), 1);
    cache.embedded.shutdown().await;
}

/// What was cached when a query was planned is gone when it runs: each partition reads its own
/// rows from the file.
#[tokio::test(flavor = "multi_thread")]
async fn shares_of_what_is_gone_are_read_from_the_file() {
    for pushdown in [false, true] {
        let cache = Cache::start().await;
        cache.load("lineitem", None, FormChoice::Auto).await;
        let mut config = config();
        config.options_mut().execution.parquet.pushdown_filters = pushdown;
        let session = cache.session(config.clone()).await;
        let sql =
            "select count(*), sum(l_partkey), min(l_comment) from lineitem where l_quantity < 30";
        let frame = session.sql(sql).await.unwrap();
        let plan = frame.create_physical_plan().await.unwrap();
        let theirs = answer(&cache.stock(config).await, sql).await;
        cache.embedded.shutdown().await;
        std::fs::remove_file(cache.directory.path().join("index")).unwrap();
        let batches = collect(Arc::clone(&plan), session.task_ctx())
            .await
            .unwrap();
        let ours = pretty_format_batches(&batches).unwrap().to_string();
        assert_eq!(ours, theirs);
        assert!(metric(&plan, "stoa_row_groups_missed") > 1);
        assert_eq!(metric(&plan, "stoa_row_groups_hit"), 0);
    }
}

/// Files without statistics: the zone maps of the cache rule out blocks.
#[tokio::test(flavor = "multi_thread")]
async fn zone_maps_rule_out_blocks() {
    for form in BLOCKS {
        let cache = Cache::start().await;
        cache.load("shipped", None, form).await;
        let session = cache.session(config()).await;
        let sql = "select count(*) from shipped where l_shipdate = date '1995-06-17'";
        let (plan, ours) = executed(&session, sql).await;
        assert_eq!(ours, answer(&cache.stock(config()).await, sql).await);
        let pruned = metric(&plan, "stoa_blocks_pruned");
        assert!((6..8).contains(&pruned), "{pruned} blocks as {form}");
        cache.embedded.shutdown().await;
    }
}

/// A join's dynamic filter removes rows in the scan where that pays, and is left out where not.
#[tokio::test(flavor = "multi_thread")]
async fn dynamic_filters_are_applied_while_they_pay() {
    let cache = Cache::start().await;
    cache.load("lineitem", None, FormChoice::Auto).await;
    cache.load("shipped", None, FormChoice::Auto).await;
    let session = cache.session(config().with_target_partitions(1)).await;
    let selective = "select count(*) from (select l_orderkey k from shipped where l_partkey = 17 and l_linenumber = 2) join lineitem on k = l_orderkey";
    let (plan, ours) = executed(&session, selective).await;
    assert_eq!(ours, answer(&cache.stock(config()).await, selective).await);
    let filtered = metric(&plan, "stoa_rows_filtered");
    assert!(filtered > 50_000, "{filtered} rows");
    let unselective = "select count(*) from (select distinct l_orderkey k from shipped) join lineitem on k = l_orderkey";
    let (plan, ours) = executed(&session, unselective).await;
    assert_eq!(
        ours,
        answer(&cache.stock(config()).await, unselective).await
    );
    assert!(metric(&plan, "stoa_filters_left_out") > 0);
    cache.embedded.shutdown().await;
}

/// What distinct values say of a filter on strings reaches the filter, for whoever joins next. A
/// filter that chunks answer is the scan's, where all that it reads is decoded or packed.
#[tokio::test(flavor = "multi_thread")]
async fn filters_on_strings_are_estimated_by_distinct_values() {
    let cache = Cache::start().await;
    cache.load("lineitem", None, FormChoice::Auto).await;
    cache.load("shipped", None, FormChoice::Parquet).await;
    let estimate = async |session: SessionContext, table: &str, filter: &str| {
        let sql = format!("select 1 from {table} where {filter}");
        let plan = session.sql(&sql).await.unwrap();
        let mut plan = plan.create_physical_plan().await.unwrap();
        loop {
            if let Some(filter) = plan.downcast_ref::<FilterExec>() {
                return Some(filter.default_selectivity());
            }
            let below = plan.children().first().copied().map(Arc::clone)?;
            plan = below;
        }
    };
    let (ours, stock) = (cache.session(config()).await, cache.stock(config()).await);
    // One of six modes or one of three flags; DataFusion's own guess is a fifth of the rows.
    let either = "l_shipmode = 'AIR' or l_returnflag = 'R'";
    assert_eq!(estimate(ours.clone(), "lineitem", either).await, Some(50));
    assert_eq!(estimate(stock.clone(), "lineitem", either).await, Some(20));
    let one = "l_shipmode = 'AIR' and l_comment not like '%special%requests%'";
    assert_eq!(estimate(ours.clone(), "lineitem", one).await, None);
    assert_eq!(estimate(stock.clone(), "lineitem", one).await, Some(20));
    assert!(estimate(ours, "shipped", one).await.is_some());
    cache.embedded.shutdown().await;
}

/// A scan whose order a plan relies on stays in order, with and without filters.
#[tokio::test(flavor = "multi_thread")]
async fn ordered_scans_stay_in_order() {
    for form in BLOCKS {
        let cache = Cache::start().await;
        cache.load("shipped", None, form).await;
        for mut config in configurations() {
            config.options_mut().optimizer.prefer_existing_sort = true;
            let session = cache.session(config.clone()).await;
            let create = format!(
                "create external table sorted stored as parquet with order (l_shipdate, l_orderkey, l_linenumber) location '{}/'",
                cache.place("shipped").display()
            );
            session.sql(&create).await.unwrap();
            let plain = cache.stock(config).await;
            for filter in [
                "true",
                "l_quantity < 3",
                "l_quantity < 45",
                "l_comment like '%pinto%'",
            ] {
                let select = "select l_shipdate, l_orderkey, l_linenumber, l_comment from";
                let order = format!("where {filter} order by l_shipdate, l_orderkey, l_linenumber");
                let sql = format!("{select} sorted {order}");
                let (plan, ours) = executed(&session, &sql).await;
                let theirs = answer(&plain, &format!("{select} shipped {order}")).await;
                assert_eq!(ours, theirs, "{sql}");
                assert!(metric(&plan, "stoa_row_groups_hit") > 0);
            }
        }
        cache.embedded.shutdown().await;
    }
}

/// A limit above a scan is met by whoever comes first, and not before it is met.
#[tokio::test(flavor = "multi_thread")]
async fn limits_are_met_whatever_is_divided() {
    let cache = Cache::start().await;
    cache.load("lineitem", None, FormChoice::Auto).await;
    for config in configurations() {
        let session = cache.session(config).await;
        for limit in [1, 9_000, 60_175, 70_000] {
            for filter in ["", "where l_quantity > 0", "where l_orderkey % 7 >= 0"] {
                let sql = format!("select l_comment from lineitem {filter} limit {limit}");
                let rows: usize = rows(&session, &sql)
                    .await
                    .iter()
                    .map(RecordBatch::num_rows)
                    .sum();
                assert_eq!(rows, limit.min(60_175), "{sql}");
            }
        }
    }
    cache.embedded.shutdown().await;
}
