//! A cached table as a DataFusion table.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use arrow::datatypes::{DataType, Field, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::config::TableParquetOptions;
use datafusion::common::stats::Precision;
use datafusion::common::{
    ColumnStatistics, DataFusionError, Result, ScalarValue, Statistics, exec_datafusion_err,
    plan_datafusion_err,
};
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::empty::EmptyExec;
use datafusion_datasource::compute_all_files_statistics;
use datafusion_datasource::file::FileSource;
use datafusion_datasource::file_groups::FileGroup;
use datafusion_datasource::file_scan_config::FileScanConfigBuilder;
use datafusion_datasource::source::DataSourceExec;
use datafusion_datasource::{PartitionedFile, TableSchema};
use datafusion_datasource_parquet::metadata::DFParquetMetadata;
use datafusion_datasource_parquet::source::ParquetSource;
use datafusion_datasource_parquet::transform_schema_to_view;
use object_store::ObjectMeta;
use object_store::path::Path;
use stoa_forms::{FORM_ARROW, FORM_PACKED};
use stoa_layout::TableName;
use stoa_origin::ObjectTag;
use stoa_reader::{Reader, Table, TableFile, View, ViewState};
use tokio::sync::OnceCell;

use crate::StoaOptions;
use crate::clock::now_unix_ms;
use crate::footers::Said;
use crate::scan::StoaSource;
use crate::statistics::{ColumnKnown, Knowledge};

/// A table of the cache: queries neither list nor look, unless the cache does not cover them.
///
/// It is the snapshot that the newest published generation names when a query is planned.
#[derive(Clone)]
pub struct StoaTable {
    reader: Reader,
    plans: Arc<TablePlans>,
    current: Arc<PlannedTable>,
    statement: Option<Arc<StatementTable>>,
}

/// What a statement reads of a table, and the state that all of its scans see of it.
#[derive(Debug)]
pub(crate) struct StatementTable {
    columns: Vec<String>,
    state: OnceCell<State>,
}

impl StatementTable {
    /// A statement whose scans read these columns, together.
    pub(crate) fn new(mut columns: Vec<String>) -> Self {
        columns.sort_unstable();
        columns.dedup();
        let state = OnceCell::new();
        Self { columns, state }
    }
}

/// A state of a table, and the view of the cache in which it was found.
type State = (View, Arc<PlannedTable>);

impl fmt::Debug for StoaTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoaTable")
            .field("table", &self.current.table.catalog().table)
            .finish()
    }
}

impl StoaTable {
    /// Opens the newest state of the table called `name`, if the cache knows it.
    ///
    /// # Errors
    /// If the catalog's schema cannot be a DataFusion schema.
    pub fn open(reader: &Reader, name: &TableName) -> Result<Option<Self>> {
        Self::open_with(reader, name, Arc::default())
    }

    pub(crate) fn open_with(
        reader: &Reader,
        name: &TableName,
        plans: Arc<TablePlans>,
    ) -> Result<Option<Self>> {
        match reader.view_of(name).1 {
            Some(table) => Self::of(reader, &table, plans).map(Some),
            None => Ok(None),
        }
    }

    pub(crate) fn of(reader: &Reader, table: &Arc<Table>, plans: Arc<TablePlans>) -> Result<Self> {
        let current = plans.get(table)?;
        Ok(Self {
            reader: reader.clone(),
            plans,
            current,
            statement: None,
        })
    }

    /// The same table as a part of a statement: its scans see the state that the first of the
    /// statement's scans finds.
    pub(crate) fn tied(&self, statement: Arc<StatementTable>) -> Self {
        Self {
            statement: Some(statement),
            ..self.clone()
        }
    }

    /// Whether it is a part of a statement.
    pub(crate) fn is_tied(&self) -> bool {
        self.statement.is_some()
    }

    /// Whether both are the same table of the same cache, whatever states they were opened in.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let [one, two] = [self, other].map(|table| &table.current.table.catalog().table);
        self.reader.is_same(&other.reader) && one == two
    }

    /// Names of the columns that a scan reads.
    pub(crate) fn read_columns(
        &self,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
    ) -> Vec<String> {
        let columns = self.current.read_columns(projection, filters);
        self.current.names(&columns)
    }

    /// The table's state at the time this provider was made.
    pub fn table(&self) -> &Arc<Table> {
        &self.current.table
    }

    /// The state to plan with: as published, or as found by a look at the origin where the scan
    /// would miss.
    async fn state(&self, columns: &[String], look: Look) -> Result<State> {
        let name = &self.current.table.catalog().table;
        let (view, table) = self.reader.view_of(name);
        let current = match table {
            Some(table) => self.plans.get(&table)?,
            None => Arc::clone(&self.current),
        };
        let looks = match look {
            Look::Never => false,
            Look::UnlessCovered => self.reader.is_doubted(name) || !current.covered(&view, columns),
            Look::Always => true,
        };
        // What cannot be read fails the query: it may have been mended or removed since.
        if !looks && current.table.catalog().rejected.is_empty() {
            return Ok((view, current));
        }
        let now = now_unix_ms();
        let state = match current
            .table
            .catalog()
            .refresh(self.reader.origin(), now)
            .await
        {
            Ok(None) => {
                self.reader.settle(name);
                current
            }
            Ok(Some(fresh)) => {
                tracing::info!(table = %name, "the objects have changed since the last look");
                let fresh = Arc::new(fresh);
                let fresh = self.reader.remember_fresh(fresh, Some(&current.table));
                self.plans.get(&fresh)?
            }
            Err(error) => {
                tracing::debug!(table = %name, %error, "look at the origin failed");
                current
            }
        };
        Ok((view, state))
    }
}

#[async_trait]
impl TableProvider for StoaTable {
    fn schema(&self) -> SchemaRef {
        Arc::clone(self.current.schema.table_schema())
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(
        &self,
        filters: &[&Expr],
    ) -> Result<Vec<TableProviderFilterPushDown>> {
        // The physical filter is pushed into the file source by DataFusion's optimizer, which
        // drops it from the plan where the source applies it.
        Ok(vec![TableProviderFilterPushDown::Inexact; filters.len()])
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let options = StoaOptions::of(state.config_options());
        let columns = self.current.read_columns(projection, filters);
        let names = self.current.names(&columns);
        let look = match (options.check_before_miss, options.enabled) {
            (false, _) => Look::Never,
            (true, true) => Look::UnlessCovered,
            // Stock Parquet reads the objects as they are now, whatever the cache holds of them.
            (true, false) => Look::Always,
        };
        let (view, mut planned) = match &self.statement {
            Some(statement) => {
                let state = || self.state(&statement.columns, look);
                statement.state.get_or_try_init(state).await?.clone()
            }
            None => self.state(&names, look).await?,
        };
        if planned.schema.table_schema() != self.current.schema.table_schema() {
            planned = Arc::new(PlannedTable::over(
                &planned.table,
                self.current.schema.clone(),
            )?);
        }
        let readable = planned.table.catalog().check_readable();
        readable.map_err(|error| exec_datafusion_err!("{error}"))?;
        if planned.files.is_empty() {
            let schema = datafusion::common::project_schema(&self.schema(), projection)?;
            return Ok(Arc::new(EmptyExec::new(schema)));
        }
        let url = planned.store_url()?;
        let registered = state.runtime_env().object_store(&url).is_ok();
        if !registered {
            let store = self
                .reader
                .origin()
                .stores()
                .get(&planned.store)
                .map_err(|error| DataFusionError::External(Box::new(error)))?;
            state
                .runtime_env()
                .register_object_store(url.as_ref(), store);
        }
        let parquet = TableParquetOptions {
            global: state.config_options().execution.parquet.clone(),
            ..Default::default()
        };
        let parquet =
            ParquetSource::new(self.current.schema.clone()).with_table_parquet_options(parquet);
        let source: Arc<dyn FileSource> = if options.enabled {
            let applies = planned.decoded(&view, &names);
            Arc::new(StoaSource::new(parquet, self.reader.clone()).with_predicates(applies))
        } else {
            Arc::new(parquet)
        };
        // First of all: what is found to be untrue of a footer is not planned with.
        let known = planned.known(&view, &columns);
        // Statistics prune nothing here: an offset or limit over filters needs all files.
        let partitions = state.config().target_partitions();
        let groups = FileGroup::new(planned.believed_files()).split_files(partitions);
        let (groups, mut statistics) =
            compute_all_files_statistics(groups, self.schema(), true, false)?;
        for (column, known) in known {
            if let Some(column) = statistics.column_statistics.get_mut(column) {
                known.complete(column);
            }
        }
        let config = FileScanConfigBuilder::new(url, source)
            .with_file_groups(groups)
            .with_statistics(statistics)
            .with_projection_indices(projection.cloned())?
            .with_limit(limit)
            .build();
        Ok(DataSourceExec::from_data_source(config))
    }

    fn statistics(&self) -> Option<Statistics> {
        Some(self.current.statistics.clone())
    }
}

/// Whether the origin is looked at before a table is planned.
#[derive(Clone, Copy, Debug)]
enum Look {
    Never,
    /// Unless the cache has all chunks of the columns.
    UnlessCovered,
    Always,
}

/// Planned states of tables, kept while their catalogs live.
#[derive(Debug, Default)]
pub(crate) struct TablePlans {
    plans: Mutex<HashMap<TableName, PlanOf>>,
}

/// The state planned for, and the plan.
type PlanOf = (Weak<Table>, Arc<PlannedTable>);

impl TablePlans {
    fn get(&self, table: &Arc<Table>) -> Result<Arc<PlannedTable>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let name = &table.catalog().table;
        if let Some((of, planned)) = plans.get(name)
            && of.upgrade().is_some_and(|of| Arc::ptr_eq(&of, table))
        {
            return Ok(Arc::clone(planned));
        }
        let planned = Arc::new(PlannedTable::try_new(table)?);
        plans.insert(name.clone(), (Arc::downgrade(table), Arc::clone(&planned)));
        Ok(planned)
    }
}

/// What planning needs of one state of a table, worked out once.
#[derive(Debug)]
pub(crate) struct PlannedTable {
    table: Arc<Table>,
    store: String,
    schema: TableSchema,
    files: Vec<PartitionedFile>,
    statistics: Statistics,
    /// State of the view, and by name of a column whether all of its chunks are in memory somewhere.
    covered: Mutex<(Option<ViewState>, HashMap<String, Covered>)>,
    knowledge: Knowledge,
}

impl PlannedTable {
    fn try_new(table: &Arc<Table>) -> Result<Self> {
        let catalog = table.catalog();
        let file_schema = Arc::new(transform_schema_to_view(&catalog.schema));
        let partition_columns: Vec<_> = catalog
            .partition_columns
            .iter()
            .map(|(name, data_type)| Arc::new(Field::new(name, data_type.clone(), true)))
            .collect();
        let schema = TableSchema::builder(file_schema)
            .with_table_partition_cols(partition_columns)
            .build();
        Self::over(table, schema)
    }

    /// The state under a schema that the planner was told before; columns may have come since.
    fn over(table: &Arc<Table>, schema: TableSchema) -> Result<Self> {
        let catalog = table.catalog();
        // By name: a newer layout may have partition columns in another order.
        let positions = schema.table_partition_cols().iter().map(|field| {
            let named = |(name, _): &(String, DataType)| name == field.name();
            let position = catalog.partition_columns.iter().position(named);
            position.ok_or_else(|| {
                let (table, name) = (&catalog.table, field.name());
                plan_datafusion_err!("table {table} has no partition column {name} any more")
            })
        });
        let positions = positions.collect::<Result<Vec<_>>>()?;
        let files = table
            .files()
            .iter()
            .map(|file| partitioned_file(file, &schema, &positions))
            .collect::<Result<Vec<_>>>()?;
        let (_, statistics) = compute_all_files_statistics(
            vec![FileGroup::new(files.clone())],
            Arc::clone(schema.table_schema()),
            true,
            false,
        )?;
        let store = match table.files().first() {
            Some(file) => file.identity().store.clone(),
            None => String::new(),
        };
        Ok(Self {
            table: Arc::clone(table),
            store,
            schema,
            files,
            statistics,
            covered: Mutex::default(),
            knowledge: Knowledge::default(),
        })
    }

    fn store_url(&self) -> Result<ObjectStoreUrl> {
        let root = if self.store.ends_with("://") {
            self.store.clone() + "/"
        } else {
            self.store.clone()
        };
        ObjectStoreUrl::parse(root)
    }

    /// The columns a scan reads, by position in the table's schema.
    fn read_columns(&self, projection: Option<&Vec<usize>>, filters: &[Expr]) -> Vec<usize> {
        let schema = self.schema.table_schema();
        let mut columns = match projection {
            Some(projection) => projection.clone(),
            None => (0..schema.fields().len()).collect(),
        };
        for column in filters.iter().flat_map(|filter| filter.column_refs()) {
            columns.extend(schema.index_of(column.name()).ok());
        }
        columns.sort_unstable();
        columns.dedup();
        columns
    }

    /// Names of columns by position in the table's schema.
    fn names(&self, columns: &[usize]) -> Vec<String> {
        let schema = self.schema.table_schema();
        let names = columns.iter().map(|column| schema.field(*column).name());
        names.cloned().collect()
    }

    /// What the cache knows of these columns, by position.
    fn known(&self, view: &View, columns: &[usize]) -> Vec<(usize, Arc<ColumnKnown>)> {
        let fields = self.schema.file_schema().fields();
        let known = columns.iter().filter_map(|column| {
            let field = fields.get(*column)?;
            let (name, data_type) = (field.name(), field.data_type());
            let known = self
                .knowledge
                .of(view, &self.table, *column, name, data_type)?;
            Some((*column, known))
        });
        known.collect()
    }

    /// The files, with statistics that are none of those footers' that were found to be untrue.
    fn believed_files(&self) -> Vec<PartitionedFile> {
        let mut files = self.files.clone();
        let columns = self.schema.file_schema().fields().len();
        let doubted = files.iter_mut().zip(self.table.files());
        for (file, _) in doubted.filter(|(_, known)| !known.is_believed()) {
            let statistics = file.statistics.as_mut().map(Arc::make_mut);
            for column in statistics
                .into_iter()
                .flat_map(|all| &mut all.column_statistics[..columns])
            {
                *column = std::mem::take(column).to_inexact();
            }
        }
        files
    }

    /// Whether the index or a neighbour has every chunk of these columns: then a scan asks the origin
    /// nothing.
    fn covered(&self, view: &View, columns: &[String]) -> bool {
        self.all(view, columns, |column| column != Covered::Partly)
    }

    /// Whether the index or a neighbour has every chunk of these columns, in a form that is read
    /// without Parquet.
    fn decoded(&self, view: &View, columns: &[String]) -> bool {
        self.all(view, columns, |column| column == Covered::Decoded)
    }

    /// By name: a statement may have been written against another schema of the table, in which the
    /// columns stand elsewhere.
    fn all(&self, view: &View, columns: &[String], is: impl Fn(Covered) -> bool) -> bool {
        let mut known = self.covered.lock().unwrap_or_else(PoisonError::into_inner);
        let state = view.state();
        if known.0.as_ref() != Some(&state) {
            *known = (Some(state), HashMap::new());
        }
        // The values of partition columns stand in paths.
        let partitions = self.schema.table_partition_cols();
        let in_files = |name: &&String| partitions.iter().all(|field| field.name() != *name);
        columns.iter().filter(in_files).all(|name| {
            if let Some(covered) = known.1.get(name) {
                return is(*covered);
            }
            let files = self.table.files().iter();
            let of_file = files.map(|file| column_covered(view, file, name));
            let covered = of_file.min().unwrap_or(Covered::Decoded);
            known.1.insert(name.clone(), covered);
            is(covered)
        })
    }
}

/// How much of a column is cached: all of it is at least so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Covered {
    /// Some chunks are not.
    Partly,
    /// Here or at a neighbour.
    Somewhere,
    /// Here or at a neighbour, in a form that is read without Parquet.
    Decoded,
}

impl Covered {
    fn by(form: u8) -> Self {
        match form {
            FORM_ARROW | FORM_PACKED => Self::Decoded,
            _ => Self::Somewhere,
        }
    }
}

fn column_covered(view: &View, file: &TableFile, name: &str) -> Covered {
    // A column that the file does not have is read as nulls, from nowhere.
    let Some(root) = file.roots().iter().find(|root| root.name() == name) else {
        return Covered::Decoded;
    };
    let (id, column) = (view.file_id(file), root.first_leaf);
    let groups = file.metadata().row_groups().iter().enumerate();
    // Without rows there is nothing to cache, nor to read; the index may not know such a file.
    let groups = groups.filter(|(_, group)| group.num_rows() > 0);
    let of_group = groups.map(|(group, _)| {
        let group = group as u32;
        match id.and_then(|id| view.form(id, group, column)) {
            Some(form) => Covered::by(form),
            // Any of them may be asked.
            None => {
                let forms = view.forms_around(file, group, column).into_iter();
                forms.map(Covered::by).min().unwrap_or(Covered::Partly)
            }
        }
    });
    of_group.min().unwrap_or(Covered::Decoded)
}

fn partitioned_file(
    file: &Arc<TableFile>,
    schema: &TableSchema,
    partition_positions: &[usize],
) -> Result<PartitionedFile> {
    let identity = file.identity();
    let catalog_file = &file.catalog().files[file.index()];
    let (e_tag, version) = match &identity.tag {
        ObjectTag::Etag(etag) => (Some(etag.clone()), None),
        ObjectTag::Version(version) => (None, Some(version.clone())),
    };
    let modified = std::time::UNIX_EPOCH
        + std::time::Duration::from_millis(catalog_file.last_modified_unix_ms);
    let meta = ObjectMeta {
        location: Path::parse(&identity.path)
            .map_err(|error| DataFusionError::External(Box::new(error)))?,
        last_modified: modified.into(),
        size: identity.size,
        e_tag,
        version,
    };
    let fields = schema.table_partition_cols().iter();
    let values = fields
        .zip(partition_positions)
        .map(|(field, position)| {
            let value = catalog_file.partition_values.get(*position);
            match value.map_or(HIVE_NULL, String::as_str) {
                HIVE_NULL => ScalarValue::try_from(field.data_type()),
                value => ScalarValue::try_from_string(value.to_owned(), field.data_type()),
            }
        })
        .collect::<Result<Vec<_>>>()?;
    let partitioned = PartitionedFile::new_from_meta(meta)
        .with_partition_values(values)
        .with_statistics(Arc::new(statistics_of(file, schema.file_schema())?))
        .with_extension(Arc::clone(file));
    Ok(with_null_partitions(partitioned))
}

/// What the footer says of a file's columns, of those that have the table's type in it: the bounds of
/// others are compared as what they are not.
fn statistics_of(file: &TableFile, schema: &SchemaRef) -> Result<Statistics> {
    let mut statistics =
        DFParquetMetadata::statistics_from_parquet_metadata(file.metadata(), schema)?;
    let columns = schema
        .fields()
        .iter()
        .zip(&mut statistics.column_statistics);
    for (field, column) in columns {
        Said::of(file, field.name()).restrict(column);
        let of_file = file.decoded_schema().field_with_name(field.name());
        if of_file.is_ok_and(|of_file| of_file.data_type() != field.data_type()) {
            (column.min_value, column.max_value) = (Precision::Absent, Precision::Absent);
        }
    }
    Ok(statistics)
}

/// The file, whose statistics say of null partition values that they are null:
/// `with_statistics` takes them for values.
fn with_null_partitions(mut file: PartitionedFile) -> PartitionedFile {
    let Some(statistics) = file.statistics.as_mut().map(Arc::make_mut) else {
        return file;
    };
    let rows = statistics.num_rows;
    let partitions = statistics.column_statistics.iter_mut().rev();
    for (column, value) in partitions.zip(file.partition_values.iter().rev()) {
        if value.is_null() {
            *column = ColumnStatistics::new_unknown();
            column.null_count = rows;
        }
    }
    file
}

/// How Hive writes a null in a path.
const HIVE_NULL: &str = "__HIVE_DEFAULT_PARTITION__";
