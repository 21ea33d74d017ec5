//! A table in an object store, a metastore in memory, a cache directory in shared memory, and a
//! coordinator's pen.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use arrow::array::{Array, ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::Field;
use bytes::Bytes;
use futures::stream::BoxStream;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use stoa_cache_manager::{Worker, WorkerHandle, WorkerSettings};
use stoa_layout::{LayoutDocument, LayoutVersion, TableCatalog, TableName, WantedChunk};
use stoa_metastore::{EmbeddedMetastore, Leadership, PlanNotes, Records, TableState, WorkerPlan};
use stoa_origin::object_store::memory::InMemory;
use stoa_origin::object_store::{self, ObjectStore, ObjectStoreExt, PutPayload};
use stoa_origin::{Backoff, Origin, OriginLimits, StoreSettings, Stores};
use stoa_reader::{CachedChunk, Reader};

pub(crate) const WORKER: &str = "worker-1";
pub(crate) const TABLE: &str = "test.numbers";
pub(crate) const LOCATION: &str = "memory:///numbers/";
pub(crate) const ROWS: usize = 20_000;
pub(crate) const ROW_GROUP: usize = 10_000;
/// Long enough for a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// An object store that can be slow or out of order.
#[derive(Debug)]
pub(crate) struct Moody {
    inner: InMemory,
    pub(crate) delay_ms: AtomicU64,
    pub(crate) fails: AtomicBool,
}

impl fmt::Display for Moody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Moody")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Moody {
    async fn put_opts(
        &self,
        location: &object_store::path::Path,
        payload: PutPayload,
        options: object_store::PutOptions,
    ) -> object_store::Result<object_store::PutResult> {
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &object_store::path::Path,
        options: object_store::PutMultipartOptions,
    ) -> object_store::Result<Box<dyn object_store::MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(
        &self,
        location: &object_store::path::Path,
        options: object_store::GetOptions,
    ) -> object_store::Result<object_store::GetResult> {
        tokio::time::sleep(Duration::from_millis(self.delay_ms.load(Ordering::Relaxed))).await;
        if self.fails.load(Ordering::Relaxed) {
            return Err(object_store::Error::Generic {
                store: "Moody",
                source: "503 Service Unavailable".into(),
            });
        }
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<object_store::path::Path>>,
    ) -> BoxStream<'static, object_store::Result<object_store::path::Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(
        &self,
        prefix: Option<&object_store::path::Path>,
    ) -> BoxStream<'static, object_store::Result<object_store::ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(
        &self,
        prefix: Option<&object_store::path::Path>,
    ) -> object_store::Result<object_store::ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &object_store::path::Path,
        to: &object_store::path::Path,
        options: object_store::CopyOptions,
    ) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// Rows of a file whose values say which file and which content it is.
pub(crate) fn batch(seed: i64, rows: usize) -> RecordBatch {
    let number = Int64Array::from_iter(
        (0..rows as i64).map(|i| (i % 11 != 0).then_some(seed * 1_000_000 + i)),
    );
    let price = Float64Array::from_iter_values(
        (0..rows).map(|i| seed as f64 + (i * 7919 % 1000) as f64 / 8.0),
    );
    // Hard to compress, so that sizes of the forms are near each other.
    let word = StringArray::from_iter_values((0..rows as u64).map(|i| {
        format!(
            "{:016x}",
            (i + seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        )
    }));
    RecordBatch::try_from_iter([
        ("number", Arc::new(number) as ArrayRef),
        ("price", Arc::new(price) as ArrayRef),
        ("word", Arc::new(word) as ArrayRef),
    ])
    .unwrap()
}

pub(crate) fn parquet(batch: &RecordBatch, row_group: usize) -> Bytes {
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(row_group))
        .set_dictionary_enabled(false)
        .build();
    let mut bytes = vec![];
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
    Bytes::from(bytes)
}

pub(crate) struct World {
    pub(crate) store: Arc<Moody>,
    pub(crate) records: Records,
    pub(crate) leadership: Leadership,
    pub(crate) cache: tempfile::TempDir,
    /// What the worker reads through.
    pub(crate) origin: Origin,
    /// What the test itself reads through, so that the worker's requests can be counted.
    pub(crate) own_origin: Origin,
    /// The number of the plan written last.
    pub(crate) plan: u64,
}

impl Drop for World {
    fn drop(&mut self) {
        // The counters live beside the directory, and are named after it.
        let _ = stoa_shm::counters::AccessCounters::remove(self.cache.path());
    }
}

/// A private directory in shared memory.
pub(crate) fn cache_directory() -> tempfile::TempDir {
    let cache = tempfile::Builder::new()
        .prefix("stoa-test-")
        .tempdir_in("/dev/shm")
        .unwrap();
    std::fs::set_permissions(cache.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    cache
}

fn origin(store: &Arc<Moody>) -> Origin {
    let stores = Stores::new(StoreSettings::default());
    stores.register("memory://", Arc::clone(store) as Arc<dyn ObjectStore>);
    let backoff = Backoff {
        base: Duration::from_millis(5),
        max: Duration::from_millis(20),
    };
    Origin::new(
        stores,
        OriginLimits {
            attempts: 2,
            backoff,
            ..OriginLimits::default()
        },
    )
}

impl World {
    pub(crate) async fn new() -> World {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(std::env::var("RUST_LOG").unwrap_or_else(|_| "off".into()))
            .with_test_writer()
            .try_init();
        let store = Arc::new(Moody {
            inner: InMemory::new(),
            delay_ms: AtomicU64::new(0),
            fails: AtomicBool::new(false),
        });
        let records = Records::new(Arc::new(EmbeddedMetastore::in_memory()));
        let leadership = records
            .try_campaign("test", Duration::from_secs(600))
            .await
            .unwrap()
            .unwrap();
        let cache = cache_directory();
        World {
            origin: origin(&store),
            own_origin: origin(&store),
            store,
            records,
            leadership,
            cache,
            plan: 0,
        }
    }

    /// Another metastore, which knows nothing of what was loaded before.
    pub(crate) async fn forget_metastore(&mut self) {
        self.records = Records::new(Arc::new(EmbeddedMetastore::in_memory()));
        let ttl = Duration::from_secs(600);
        self.leadership = self
            .records
            .try_campaign("test", ttl)
            .await
            .unwrap()
            .unwrap();
        self.plan = 0;
    }

    /// A world with a table of `files` files of two row groups each.
    pub(crate) async fn with_table(files: i64) -> World {
        let world = World::new().await;
        for file in 0..files {
            world
                .put(
                    &format!("numbers/{file}.parquet"),
                    parquet(&batch(file, ROWS), ROW_GROUP),
                )
                .await;
        }
        world
    }

    pub(crate) async fn put(&self, path: &str, bytes: Bytes) {
        self.store
            .put(&path.into(), PutPayload::from_bytes(bytes))
            .await
            .unwrap();
    }

    pub(crate) fn settings(&self, capacity_bytes: u64) -> WorkerSettings {
        WorkerSettings {
            freshness: None,
            fill_concurrency: 4,
            decode_concurrency: 2,
            publish_interval: Duration::from_millis(20),
            retry: (Duration::from_millis(100), Duration::from_millis(800)),
            reclaim_interval: Duration::from_millis(50),
            heartbeat: Duration::from_millis(500),
            lease_ttl: Duration::from_secs(5),
            ..WorkerSettings::new(WORKER, self.cache.path(), capacity_bytes)
        }
    }

    pub(crate) async fn start(&self, settings: WorkerSettings) -> WorkerHandle {
        Worker::start(settings, self.records.clone(), self.origin.clone())
            .await
            .unwrap()
    }

    /// Publishes a layout version of these columns, and a plan that gives all of it to the worker.
    pub(crate) async fn load(&mut self, version: u64, columns: &[&str]) -> String {
        self.load_where(version, columns, |_| true).await
    }

    pub(crate) async fn load_where(
        &mut self,
        version: u64,
        columns: &[&str],
        planned: impl Fn(&WantedChunk) -> bool,
    ) -> String {
        let catalog = self.publish_layout(TABLE, LOCATION, version, columns).await;
        self.plan(&catalog, planned).await
    }

    pub(crate) async fn publish_layout(
        &self,
        table: &str,
        location: &str,
        version: u64,
        columns: &[&str],
    ) -> TableCatalog {
        let mut document = LayoutDocument::new(
            TableName::parse(table).unwrap(),
            LayoutVersion::new(version).unwrap(),
            location,
        );
        document.columns = Some(columns.iter().map(|column| (*column).to_owned()).collect());
        let looked = TableCatalog::load(&self.own_origin, &document, 1)
            .await
            .unwrap();
        document.files = looked
            .files
            .iter()
            .map(|file| file.identity.clone())
            .collect();
        self.records
            .publish_layout(table, version, &document.to_json())
            .await
            .unwrap();
        TableCatalog {
            layout: document,
            ..looked
        }
    }

    /// Puts a plan in force that gives the worker what the layout wants and `planned` accepts.
    pub(crate) async fn plan(
        &mut self,
        catalog: &TableCatalog,
        planned: impl Fn(&WantedChunk) -> bool,
    ) -> String {
        let wanted = stoa_layout::wanted(catalog).unwrap();
        let plan = WorkerPlan {
            files: catalog
                .files
                .iter()
                .map(|file| serde_json::to_value(&file.identity).unwrap())
                .collect(),
            chunks: wanted
                .iter()
                .filter(|chunk| planned(chunk))
                .map(|wanted| {
                    let chunk = wanted.chunk;
                    (
                        chunk.file,
                        chunk.row_group,
                        chunk.column,
                        wanted.form.to_string(),
                    )
                })
                .collect(),
        };
        let plans = BTreeMap::from([(WORKER.to_owned(), plan)]);
        self.write_plan(catalog, &plans, PlanNotes::default()).await
    }

    /// Puts a plan in force.
    pub(crate) async fn write_plan(
        &mut self,
        catalog: &TableCatalog,
        parts: &BTreeMap<String, WorkerPlan>,
        notes: PlanNotes,
    ) -> String {
        self.plan += 1;
        let table_version = catalog.table_version().to_string();
        self.records
            .write_plan_with(&self.leadership, &table_version, self.plan, parts, notes)
            .await
            .unwrap();
        table_version
    }

    /// Another reader of the store, whose requests are counted apart.
    pub(crate) fn another_origin(&self) -> Origin {
        origin(&self.store)
    }

    pub(crate) async fn unload(&mut self, table_version: &str) {
        self.plan += 1;
        self.records
            .write_unloaded(&self.leadership, table_version, self.plan)
            .await
            .unwrap();
    }

    pub(crate) fn reader(&self) -> Reader {
        Reader::open(self.cache.path(), self.own_origin.clone())
    }

    /// Memory that the directory really takes.
    pub(crate) fn used_bytes(&self) -> u64 {
        let entries = std::fs::read_dir(self.cache.path()).unwrap();
        entries
            .map(|entry| entry.unwrap().metadata().map_or(0, |m| m.blocks() * 512))
            .sum()
    }
}

pub(crate) async fn ready(worker: &WorkerHandle, table_version: &str) -> TableState {
    match tokio::time::timeout(PATIENCE, worker.wait_ready(table_version)).await {
        Ok(state) => state.unwrap(),
        Err(_) => panic!("{table_version} is not ready: {:#?}", worker.state()),
    }
}

/// Waits for something that is to happen.
pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition().await {
        assert!(
            tokio::time::Instant::now() < deadline,
            "waited in vain until {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The values of a column of one file as they lie in shared memory; `None` for row groups that are
/// not there.
pub(crate) fn cached(
    reader: &Reader,
    table: &str,
    file: usize,
    column: &str,
) -> Vec<Option<ArrayRef>> {
    let view = reader.view();
    let table = view
        .table(&TableName::parse(table).unwrap())
        .expect("the table is published");
    let file = &table.files()[file];
    let root = table.catalog().files[file.index()]
        .root_named(column)
        .unwrap();
    let field: &Field = &root.field;
    let decoded = stoa_layout::decoded_schema(&arrow::datatypes::Schema::new(vec![field.clone()]));
    let groups: Range<u32> = 0..file.metadata().num_row_groups() as u32;
    let Some(id) = view.file_id(file) else {
        return groups.map(|_| None).collect();
    };
    groups
        .map(|group| {
            match view
                .chunk(id, group, root.first_leaf, decoded.field(0).data_type())
                .ok()?
            {
                CachedChunk::Decoded(chunk) => {
                    let blocks: Vec<ArrayRef> = (0..chunk.blocks())
                        .map(|at| chunk.block(at).unwrap())
                        .collect();
                    let blocks: Vec<&dyn Array> = blocks.iter().map(AsRef::as_ref).collect();
                    Some(arrow::compute::concat(&blocks).unwrap())
                }
                CachedChunk::Parquet(bytes) => panic!("{} bytes of parquet", bytes.len()),
            }
        })
        .collect()
}

/// Asserts that a column of a file is cached whole, with the values of `batch(seed, …)`.
pub(crate) fn assert_cached(reader: &Reader, file: usize, column: &str, seed: i64) {
    let expected = batch(seed, ROWS);
    let expected = expected.column_by_name(column).unwrap();
    let found = cached(reader, TABLE, file, column);
    assert_eq!(found.len(), ROWS / ROW_GROUP);
    for (group, found) in found.into_iter().enumerate() {
        let found = found.unwrap_or_else(|| panic!("row group {group} of {column} is not cached"));
        let expected = expected.slice(group * ROW_GROUP, ROW_GROUP);
        let found = arrow::compute::cast(&found, expected.data_type()).unwrap();
        assert_eq!(&found, &expected, "row group {group} of {column}");
    }
}

pub(crate) fn count_cached(reader: &Reader, file: usize, column: &str) -> usize {
    cached(reader, TABLE, file, column).iter().flatten().count()
}

/// The segment files of a cache: all but the largest, and the largest.
pub(crate) fn segments(cache: &std::path::Path) -> (Vec<std::path::PathBuf>, std::path::PathBuf) {
    let entries = std::fs::read_dir(cache)
        .unwrap()
        .map(|entry| entry.unwrap());
    let mut found: Vec<_> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("seg-"))
        .map(|entry| (entry.metadata().unwrap().len(), entry.path()))
        .collect();
    found.sort();
    let mut paths: Vec<_> = found.into_iter().map(|(_, path)| path).collect();
    let largest = paths.pop().expect("a segment file");
    (paths, largest)
}

/// Damages a segment, far from its ends.
pub(crate) fn flip_a_bit(segment: &std::path::Path) {
    use std::os::unix::fs::{FileExt, PermissionsExt};
    std::fs::set_permissions(segment, std::fs::Permissions::from_mode(0o640)).unwrap();
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(segment)
        .unwrap();
    let middle = file.metadata().unwrap().len() / 3;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 4], middle).unwrap();
}
