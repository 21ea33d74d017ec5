//! Scans that Stoa did not plan, under operators that hold them to what they are, and filters of
//! DataFusion's that lose rows.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch};
use arrow::datatypes::{Int64Type, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Result, plan_err};
use datafusion::datasource::physical_plan::FileScanConfig;
use datafusion::datasource::source::DataSourceExec;
use datafusion::execution::context::{SessionConfig, SessionContext};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::{Expr, TableType};
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, PhysicalExpr, PlanProperties, displayable,
};
use stoa_datafusion::{Embedded, EmbeddedSettings};
use stoa_layout::{ChunkSpec, ColumnRef, FormChoice, LayoutDocument, LayoutVersion, TableName};
use stoa_tests::edges::store;
use stoa_tests::scratch::CacheDirectory;

/// Two row groups and a bit of 10,000 rows each.
const ROWS: i64 = 25_000;

/// A minimum that comes last, a column whose first row groups are all null.
fn write(path: &Path) {
    let ids = || 0..ROWS;
    let last = |id: i64| if id == ROWS - 1 { 0 } else { 1 + id % 1000 };
    let late = |id: i64| (id >= 21_000).then_some(3 + id % 104);
    let columns: [(&str, ArrayRef); 3] = [
        ("id", Arc::new(Int64Array::from_iter_values(ids()))),
        ("a", Arc::new(Int64Array::from_iter_values(ids().map(last)))),
        ("late", Arc::new(Int64Array::from_iter(ids().map(late)))),
    ];
    store(path, &[RecordBatch::try_from_iter(columns).unwrap()]).unwrap();
}

struct World {
    embedded: Embedded,
    _cache: CacheDirectory,
    files: tempfile::TempDir,
}

impl World {
    async fn start() -> World {
        let cache = CacheDirectory::new().unwrap();
        let settings = EmbeddedSettings {
            cache_directory: cache.path(),
            capacity_bytes: 64 << 20,
            freshness: None,
            ..EmbeddedSettings::default()
        };
        let files = tempfile::tempdir().unwrap();
        write(&files.path().join("cached/0.parquet"));
        write(&files.path().join("not/0.parquet"));
        World {
            embedded: Embedded::start(settings).await.unwrap(),
            _cache: cache,
            files,
        }
    }

    fn place(&self, name: &str) -> String {
        format!("{}/", self.files.path().join(name).display())
    }

    async fn load(&self, version: u64, form: FormChoice, row_groups: &[u32]) {
        let name = TableName::new("s", "cached").unwrap();
        let version = LayoutVersion::new(version).unwrap();
        let mut document = LayoutDocument::new(name, version, self.place("cached"));
        document.form = form;
        let columns = ["id", "a", "late"];
        let chunks = row_groups.iter().flat_map(|row_group| {
            columns.map(|column| ChunkSpec {
                path: "0.parquet".to_owned(),
                row_group: *row_group,
                column: ColumnRef::Name(column.to_owned()),
            })
        });
        document.chunks = Some(chunks.collect());
        self.embedded.publish(&document).await.unwrap();
        let loaded = self
            .embedded
            .wait_loaded(&document, Duration::from_secs(60));
        loaded.await.unwrap();
    }

    async fn session(&self, config: SessionConfig) -> SessionContext {
        let session = SessionContext::new_with_config(config);
        self.embedded.stoa().register(&session).await.unwrap();
        for name in ["cached", "not"] {
            let create = format!(
                "create external table {name} stored as parquet location '{}'",
                self.place(name)
            );
            session.sql(&create).await.unwrap();
        }
        session
    }
}

async fn numbers(session: &SessionContext, sql: &str) -> Vec<i64> {
    let batches = session.sql(sql).await.unwrap().collect().await.unwrap();
    let row = batches.iter().find(|batch| batch.num_rows() == 1).unwrap();
    let columns = row.columns().iter();
    columns
        .map(|c| c.as_primitive::<Int64Type>().value(0))
        .collect()
}

async fn plan_of(session: &SessionContext, sql: &str) -> String {
    let frame = session.sql(sql).await.unwrap();
    let plan = frame.create_physical_plan().await.unwrap();
    displayable(plan.as_ref()).indent(false).to_string()
}

/// What an operator does with the rows of the scan under it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Holds {
    /// As Delta's scan with deletion vectors: the child's file source must stay the one it was.
    Source,
    /// Rows are counted by the order in which they come: they must be those of the file.
    Order,
}

/// A table whose scans are another's, under an operator that holds them to something.
#[derive(Debug)]
struct Held {
    table: Arc<dyn TableProvider>,
    holds: Holds,
}

#[async_trait]
impl TableProvider for Held {
    fn schema(&self) -> SchemaRef {
        self.table.schema()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        _filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let input = self.table.scan(state, projection, &[], limit).await?;
        let holds = self.holds;
        Ok(Arc::new(HeldExec { input, holds }))
    }
}

#[derive(Debug)]
struct HeldExec {
    input: Arc<dyn ExecutionPlan>,
    holds: Holds,
}

/// Where the file source of a scan lies in memory.
fn source_of(plan: &Arc<dyn ExecutionPlan>) -> Option<usize> {
    let exec = plan.downcast_ref::<DataSourceExec>()?;
    let config = exec.data_source().downcast_ref::<FileScanConfig>()?;
    Some(Arc::as_ptr(config.file_source()).cast::<()>() as usize)
}

impl DisplayAs for HeldExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "HeldExec: {:?}", self.holds)
    }
}

impl ExecutionPlan for HeldExec {
    fn name(&self) -> &str {
        "HeldExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        self.input.properties()
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        vec![false]
    }

    fn apply_expressions(
        &self,
        _: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let input = children.remove(0);
        if self.holds == Holds::Source && source_of(&input) != source_of(&self.input) {
            return plan_err!("the child changed its Parquet source");
        }
        let holds = self.holds;
        Ok(Arc::new(HeldExec { input, holds }))
    }

    fn execute(
        &self,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> Result<SendableRecordBatchStream> {
        self.input.execute(partition, context)
    }
}

async fn held(session: &SessionContext, table: &str, holds: Holds) {
    let provider = session.table_provider(table).await.unwrap();
    let held = Held {
        table: provider,
        holds,
    };
    let name = format!("held_{table}");
    session.register_table(name, Arc::new(held)).unwrap();
}

/// An operator that wants its child to stay as it is keeps it so, whatever is cached of it; and the
/// other scans of the statement are read from the cache all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_scan_that_must_stay_as_it_is_fails_no_query() {
    let world = World::start().await;
    world.load(1, FormChoice::Auto, &[0, 1, 2]).await;
    let session = world.session(SessionConfig::new()).await;
    for table in ["cached", "not"] {
        held(&session, table, Holds::Source).await;
        let sql = format!("select count(id), sum(id) from held_{table} where id >= 0");
        let sum = ROWS * (ROWS - 1) / 2;
        assert_eq!(numbers(&session, &sql).await, [ROWS, sum]);
        let both =
            format!("select (select sum(id) from held_{table}), (select sum(id) from cached)");
        assert_eq!(numbers(&session, &both).await, [sum, sum]);
        let plan = plan_of(&session, &both).await;
        assert_eq!(plan.matches("cache=stoa").count(), 1, "{plan}");
    }
    world.embedded.shutdown().await;
}

/// Of a table that no layout names nothing is cached, and its scans stay stock's.
#[tokio::test(flavor = "multi_thread")]
async fn only_scans_of_cached_files_are_wrapped() {
    let world = World::start().await;
    world.load(1, FormChoice::Auto, &[0]).await;
    let session = world.session(SessionConfig::new()).await;
    for (table, wrapped) in [("cached", true), ("not", false)] {
        let plan = plan_of(&session, &format!("select sum(id) from {table}")).await;
        assert_eq!(plan.contains("cache=stoa"), wrapped, "{plan}");
    }
    // Another content of the file is another file.
    write(&world.files.path().join("cached/0.parquet"));
    let session = world.session(SessionConfig::new()).await;
    let plan = plan_of(&session, "select sum(id) from cached").await;
    assert!(!plan.contains("cache=stoa"), "{plan}");
    world.embedded.shutdown().await;
}

/// An operator may count rows, as they come from whole files: what is cached does not come first.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_file_come_in_the_order_of_the_file() {
    let world = World::start().await;
    world.load(1, FormChoice::Auto, &[1]).await;
    let config = SessionConfig::new()
        .with_target_partitions(1)
        .with_repartition_file_scans(false);
    let session = world.session(config).await;
    held(&session, "cached", Holds::Order).await;
    let frame = session.sql("select id from held_cached").await.unwrap();
    let plan = frame.clone().create_physical_plan().await.unwrap();
    let plan = displayable(plan.as_ref()).indent(false).to_string();
    assert!(plan.contains("cache=stoa"), "{plan}");
    let batches = frame.collect().await.unwrap();
    let ids = batches.iter().flat_map(|batch| {
        let ids = batch.column(0).as_primitive::<Int64Type>();
        ids.values().iter().copied()
    });
    assert!(ids.eq(0..ROWS));
    world.embedded.shutdown().await;
}

/// The filters that `min` and `max` push into a scan lose rows in DataFusion 55.2, and stay off
/// however a session sets the options that turn them on.
#[tokio::test(flavor = "multi_thread")]
async fn filters_of_min_and_max_stay_off() {
    let world = World::start().await;
    let statements: [(&str, &[i64]); 5] = [
        (
            "select min(a), max(a), max(id), min(id - 100) from {t} where id >= 0",
            &[0, 1000, ROWS - 1, -100],
        ),
        (
            "select min(late), max(late) from {t} where id >= 0",
            &[3, 106],
        ),
        (
            "select min(id - 100), max(id) from {t} where id >= 10",
            &[-90, ROWS - 1],
        ),
        (
            "select max(a) filter (where id < 10), max(id) from {t} where id >= 0",
            &[10, ROWS - 1],
        ),
        (
            "select min(a), max(id + 1) from {t} where id >= 0",
            &[0, ROWS],
        ),
    ];
    let settings = [
        "set datafusion.optimizer.enable_dynamic_filter_pushdown = true",
        "set datafusion.optimizer.enable_aggregate_dynamic_filter_pushdown = true",
        "set datafusion.execution.parquet.pushdown_filters = true",
    ];
    for (version, form) in (1..).zip([FormChoice::Packed, FormChoice::Arrow, FormChoice::Parquet]) {
        world.load(version, form, &[0, 1, 2]).await;
        for partitions in [1, 3] {
            let config = SessionConfig::new().with_target_partitions(partitions);
            let session = world.session(config).await;
            for set in [""].into_iter().chain(settings) {
                if !set.is_empty() {
                    session.sql(set).await.unwrap();
                }
                for (sql, expected) in statements {
                    for table in ["s.cached", "cached", "not"] {
                        let sql = sql.replace("{t}", table);
                        let found = numbers(&session, &sql).await;
                        assert_eq!(found, expected, "{form:?} {set}: {sql}");
                    }
                }
            }
        }
    }
    world.embedded.shutdown().await;
}
