//! Table functions that show the cache: `stoa_tables()`, `stoa_chunks()`, `stoa_workers()`.

use std::fmt;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, RecordBatch, StringArray, UInt32Array, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use bytes::Bytes;
use datafusion::catalog::{MemTable, Session, TableFunctionArgs, TableFunctionImpl, TableProvider};
use datafusion::common::{DataFusionError, Result, exec_err, plan_err};
use datafusion::logical_expr::{Expr, TableType};
use datafusion::physical_plan::ExecutionPlan;
use stoa_forms::Chunk;
use stoa_reader::TableFile;
use stoa_shm::Entry;

use crate::catalog::Tables;
use crate::clock::now_unix_ms;

/// What a system table shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SystemTable {
    /// A row a table.
    Tables,
    /// A row a chunk.
    Chunks,
    /// A row a worker.
    Workers,
}

impl SystemTable {
    pub(crate) const ALL: [Self; 3] = [Self::Tables, Self::Chunks, Self::Workers];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tables => "stoa_tables",
            Self::Chunks => "stoa_chunks",
            Self::Workers => "stoa_workers",
        }
    }

    fn schema(self) -> SchemaRef {
        use DataType::{Float64, UInt32, UInt64, Utf8};
        let columns: &[(&str, DataType)] = match self {
            Self::Tables => &[
                ("schema", Utf8),
                ("table", Utf8),
                ("version", UInt64),
                ("files", UInt64),
                ("rows", UInt64),
                ("file_bytes", UInt64),
                ("chunks", UInt64),
                ("cached_chunks", UInt64),
                ("cached_bytes", UInt64),
                ("age_seconds", Float64),
                ("location", Utf8),
            ],
            Self::Chunks => &[
                ("schema", Utf8),
                ("table", Utf8),
                ("path", Utf8),
                ("row_group", UInt32),
                ("column", Utf8),
                ("form", Utf8),
                ("encoding", Utf8),
                ("rows", UInt64),
                ("bytes", UInt64),
                ("file_bytes", UInt64),
                ("segment", UInt64),
                ("offset", UInt64),
                ("hits", UInt64),
            ],
            Self::Workers => &[
                ("worker", Utf8),
                ("host", Utf8),
                ("state", Utf8),
                ("capacity_bytes", UInt64),
                ("held_bytes", UInt64),
                ("retained_bytes", UInt64),
                ("problems", Utf8),
            ],
        };
        let fields = columns
            .iter()
            .map(|(name, data_type)| Field::new(*name, data_type.clone(), false));
        Arc::new(Schema::new(fields.collect::<Vec<_>>()))
    }
}

/// The function behind one of [`SystemTable`]'s names.
pub(crate) struct SystemFunction {
    pub(crate) shows: SystemTable,
    pub(crate) tables: Arc<Tables>,
}

impl fmt::Debug for SystemFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SystemFunction").field(&self.shows).finish()
    }
}

impl TableFunctionImpl for SystemFunction {
    fn call_with_args(&self, args: TableFunctionArgs) -> Result<Arc<dyn TableProvider>> {
        if !args.exprs().is_empty() {
            return plan_err!("{}() takes no arguments", self.shows.name());
        }
        let tables = Arc::clone(&self.tables);
        Ok(Arc::new(SystemProvider {
            shows: self.shows,
            schema: self.shows.schema(),
            tables,
        }))
    }
}

/// The rows as they are when the query is planned.
struct SystemProvider {
    shows: SystemTable,
    schema: SchemaRef,
    tables: Arc<Tables>,
}

impl fmt::Debug for SystemProvider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SystemProvider").field(&self.shows).finish()
    }
}

#[async_trait]
impl TableProvider for SystemProvider {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::View
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let columns = match self.shows {
            SystemTable::Tables => table_rows(&self.tables),
            SystemTable::Chunks => chunk_rows(&self.tables),
            SystemTable::Workers => worker_rows(&self.tables).await?,
        };
        let batch = RecordBatch::try_new(self.schema(), columns)?;
        MemTable::try_new(self.schema(), vec![vec![batch]])?
            .scan(state, projection, filters, limit)
            .await
    }
}

fn strings(values: impl IntoIterator<Item = impl AsRef<str>>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

fn numbers(values: impl IntoIterator<Item = u64>) -> ArrayRef {
    Arc::new(UInt64Array::from_iter_values(values))
}

fn table_rows(tables: &Tables) -> Vec<ArrayRef> {
    struct Row {
        names: [String; 3],
        numbers: [u64; 7],
        age: f64,
    }
    let now = now_unix_ms();
    let view = tables.reader.view();
    let looks = stoa_cache_manager::looks(tables.reader.directory());
    let mut sorted: Vec<_> = view.tables().collect();
    sorted.sort_by(|a, b| a.catalog().table.cmp(&b.catalog().table));
    let rows: Vec<Row> = sorted
        .into_iter()
        .map(|table| {
            let catalog = table.catalog();
            let (mut chunks, mut cached, mut bytes, mut rows) = (0, 0, 0, 0);
            for file in table.files() {
                let groups = file.metadata().row_groups();
                rows += groups
                    .iter()
                    .map(|g| g.num_rows().max(0) as u64)
                    .sum::<u64>();
                chunks += (groups.len() * file.roots().len()) as u64;
                for (_, _, entry) in cached_chunks(&view, file) {
                    cached += 1;
                    bytes += entry.length();
                }
            }
            let file_bytes = table.files().iter().map(|f| f.identity().size).sum();
            let version = catalog.version.get();
            let files = table.files().len() as u64;
            // A look that found everything as it was is not in the catalog.
            let looked_at = looks.get(&catalog.table.to_string()).copied().unwrap_or(0);
            let looked_at = looked_at.max(catalog.looked_at_unix_ms);
            Row {
                names: [
                    catalog.table.schema().to_owned(),
                    catalog.table.table().to_owned(),
                    catalog.location.clone(),
                ],
                numbers: [version, files, rows, file_bytes, chunks, cached, bytes],
                age: now.saturating_sub(looked_at) as f64 / 1000.0,
            }
        })
        .collect();
    let name = |i: usize| strings(rows.iter().map(|row| &row.names[i]));
    let number = |i: usize| numbers(rows.iter().map(|row| row.numbers[i]));
    let mut columns = vec![name(0), name(1)];
    columns.extend((0..7).map(number));
    columns.push(Arc::new(Float64Array::from_iter_values(
        rows.iter().map(|row| row.age),
    )));
    columns.push(name(2));
    columns
}

/// Row group, position of the root column and index entry of each cached chunk of a file.
fn cached_chunks(view: &stoa_reader::View, file: &TableFile) -> Vec<(u32, usize, Entry)> {
    let columns: Vec<u32> = file.roots().iter().map(|root| root.first_leaf).collect();
    let entries = view.entries(file, &columns).into_iter().enumerate();
    entries
        .filter_map(|(at, entry)| {
            let (row_group, position) = (at / columns.len(), at % columns.len());
            Some((row_group as u32, position, entry?))
        })
        .collect()
}

fn chunk_rows(tables: &Tables) -> Vec<ArrayRef> {
    let view = tables.reader.view();
    let mut names: [Vec<String>; 6] = Default::default();
    let mut groups = vec![];
    let mut counts: [Vec<u64>; 6] = Default::default();
    for table in view.tables() {
        let catalog = table.catalog();
        for file in table.files() {
            for (row_group, column, entry) in cached_chunks(&view, file) {
                let form = match entry.form() {
                    stoa_forms::FORM_ARROW => "arrow",
                    stoa_forms::FORM_PACKED => "packed",
                    stoa_forms::FORM_PARQUET => "parquet",
                    _ => "unknown",
                };
                let root = &file.roots()[column];
                let file_bytes: i64 = (root.first_leaf..root.first_leaf + root.leaves)
                    .map(|leaf| {
                        file.metadata()
                            .row_group(row_group as usize)
                            .column(leaf as usize)
                            .compressed_size()
                    })
                    .sum();
                let values = [
                    catalog.table.schema().to_owned(),
                    catalog.table.table().to_owned(),
                    file.identity().path.clone(),
                    root.name().to_owned(),
                    form.to_owned(),
                    encoding(&view, file, row_group, column, &entry),
                ];
                names
                    .iter_mut()
                    .zip(values)
                    .for_each(|(column, value)| column.push(value));
                groups.push(row_group);
                let location = entry.location();
                let values = [
                    u64::from(location.rows),
                    location.length,
                    file_bytes.max(0) as u64,
                    location.segment.0,
                    location.offset,
                    view.counts(&entry).hits,
                ];
                counts
                    .iter_mut()
                    .zip(values)
                    .for_each(|(column, value)| column.push(value));
            }
        }
    }
    let [schema, table, path, column, form, encoding] = names.map(strings);
    let [rows, bytes, file_bytes, segment, offset, hits] = counts.map(numbers);
    let groups: ArrayRef = Arc::new(UInt32Array::from(groups));
    vec![
        schema, table, path, groups, column, form, encoding, rows, bytes, file_bytes, segment,
        offset, hits,
    ]
}

/// How the values of a chunk are encoded, for people; empty of one that cannot be read.
fn encoding(
    view: &stoa_reader::View,
    file: &TableFile,
    row_group: u32,
    column: usize,
    entry: &Entry,
) -> String {
    if entry.form() == stoa_forms::FORM_PARQUET {
        let leaf = file.roots()[column].first_leaf as usize;
        let group = file.metadata().row_group(row_group as usize);
        return group.column(leaf).compression().to_string().to_lowercase();
    }
    let data_type = file.decoded_schema().field(column).data_type();
    let bytes = view.snapshot().open_chunk(entry).ok();
    bytes
        .and_then(|bytes| Chunk::open(entry.form(), Bytes::from_owner(bytes), data_type).ok())
        .map_or_else(String::new, |chunk| chunk.encoding())
}

async fn worker_rows(tables: &Tables) -> Result<Vec<ArrayRef>> {
    let Some(records) = &tables.records else {
        return exec_err!(
            "stoa_workers() needs the metastore, which this process has not opened: another \
             process owns it, or no etcd is configured; try `stoa status`"
        );
    };
    let external = |error| DataFusionError::External(Box::new(error));
    let workers = records.workers().await.map_err(external)?;
    let states = records.states().await.map_err(external)?;
    let state = |id: &str| states.iter().find(|state| state.id == id);
    let of = |f: fn(&stoa_metastore::WorkerState) -> u64| {
        numbers(workers.iter().map(|w| state(&w.id).map_or(0, f)))
    };
    Ok(vec![
        strings(workers.iter().map(|w| &w.id)),
        strings(workers.iter().map(|w| &w.host)),
        strings(
            workers
                .iter()
                .map(|w| state(&w.id).map_or("joining".to_owned(), |s| s.state.to_string())),
        ),
        numbers(workers.iter().map(|w| w.capacity_bytes)),
        of(|s| s.held_bytes),
        of(|s| s.retained_bytes),
        strings(
            workers
                .iter()
                .map(|w| state(&w.id).map_or(String::new(), |s| s.problems.join("; "))),
        ),
    ])
}
