//! What is compared: one session a mode, all over the same files.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::ArrayData;
use arrow::record_batch::RecordBatch;
use datafusion::datasource::MemTable;
use datafusion::execution::context::{SessionConfig, SessionContext};
use datafusion::prelude::ParquetReadOptions;
use stoa_datafusion::{Embedded, EmbeddedSettings, Origin, Reader, Stoa};
use stoa_layout::{FormChoice, LayoutDocument, LayoutVersion, TableName};
use stoa_metastore::TableState;

use crate::Error;
use crate::suite::Data;

/// Shared memory of a cache without a budget, in bytes: as much as any data set here takes.
const UNLIMITED_BYTES: u64 = 20 << 30;

/// How long a table may take to load.
pub(crate) const LOAD_TIMEOUT: Duration = Duration::from_secs(3600);

/// A way of reading the tables, by its name: `parquet`, `parquet-pushdown`, `memtable`, or
/// `stoa-FORM`, with `-pushdown` for the session's `pushdown_filters`, and with `@BUDGET` for as
/// much shared memory as so many times the Parquet's bytes: `stoa-auto@0.5`.
#[derive(Clone, Debug, PartialEq)]
pub enum Mode {
    /// Stock DataFusion over Parquet in the page cache.
    Parquet {
        /// With `pushdown_filters`.
        pushdown: bool,
    },
    /// Decoded in the memory of the process: nothing left to read or decode.
    Memtable,
    /// Stoa.
    Stoa {
        /// What layouts ask for: `auto`, or one form for all chunks.
        form: String,
        /// With `pushdown_filters`.
        pushdown: bool,
        /// Shared memory over the Parquet's bytes; enough for everything where not given.
        budget: Option<f64>,
    },
}

impl Mode {
    fn pushdown(&self) -> bool {
        match self {
            Mode::Memtable => false,
            Mode::Parquet { pushdown } | Mode::Stoa { pushdown, .. } => *pushdown,
        }
    }

    /// Whether it holds the tables in memory of its own, beside the page cache.
    pub fn in_memory(&self) -> bool {
        !matches!(self, Mode::Parquet { .. })
    }

    /// Whether it is Stoa in some form.
    pub fn is_stoa(&self) -> bool {
        matches!(self, Mode::Stoa { .. })
    }

    /// What layouts ask for; none without the cache.
    pub fn form(&self) -> Option<&str> {
        match self {
            Mode::Stoa { form, .. } => Some(form),
            Mode::Parquet { .. } | Mode::Memtable => None,
        }
    }

    /// Shared memory over the Parquet's bytes; none where everything may be held.
    pub fn budget(&self) -> Option<f64> {
        match self {
            Mode::Stoa { budget, .. } => *budget,
            Mode::Parquet { .. } | Mode::Memtable => None,
        }
    }

    /// The shared memory that the mode may take for these data, in bytes.
    pub fn capacity_bytes(&self, data: &Data) -> u64 {
        match self.budget() {
            Some(budget) => (data.bytes as f64 * budget) as u64,
            None => UNLIMITED_BYTES,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pushdown = if self.pushdown() { "-pushdown" } else { "" };
        match self {
            Mode::Parquet { .. } => write!(f, "parquet{pushdown}"),
            Mode::Memtable => write!(f, "memtable"),
            Mode::Stoa { form, budget, .. } => {
                write!(f, "stoa-{form}{pushdown}")?;
                budget.map_or(Ok(()), |budget| write!(f, "@{budget}"))
            }
        }
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Mode, String> {
        let unknown = || {
            format!(
                "unknown mode `{text}`; expected parquet, memtable, or stoa-FORM with FORM one of \
                 auto, arrow, packed, parquet; -pushdown and @BUDGET may follow"
            )
        };
        let (name, budget) = match text.split_once('@') {
            None => (text, None),
            Some((name, budget)) => {
                let budget = budget.parse::<f64>().ok();
                let budget = budget.filter(|budget| budget.is_finite() && *budget > 0.0);
                (name, Some(budget.ok_or_else(unknown)?))
            }
        };
        let (name, pushdown) = match name.strip_suffix("-pushdown") {
            Some(name) => (name, true),
            None => (name, false),
        };
        match (name, budget, name.strip_prefix("stoa-")) {
            ("parquet", None, _) => Ok(Mode::Parquet { pushdown }),
            ("memtable", None, _) if !pushdown => Ok(Mode::Memtable),
            (_, budget, Some(form)) if ["auto", "arrow", "packed", "parquet"].contains(&form) => {
                Ok(Mode::Stoa {
                    form: form.to_owned(),
                    pushdown,
                    budget,
                })
            }
            _ => Err(unknown()),
        }
    }
}

/// A session as all modes have it.
pub fn session(mode: &Mode, partitions: usize) -> SessionContext {
    let mut config = SessionConfig::new().with_target_partitions(partitions);
    config.options_mut().execution.parquet.pushdown_filters = mode.pushdown();
    SessionContext::new_with_config(config)
}

/// Registers the tables as plain Parquet: a directory each below `root`, which is a path or a URL.
///
/// # Errors
/// If the files cannot be read.
pub async fn register_parquet(
    session: &SessionContext,
    data: &Data,
    root: &str,
) -> Result<(), Error> {
    for table in &data.tables {
        let path = format!("{root}/{table}/");
        session
            .register_parquet(table, path, ParquetReadOptions::default())
            .await?;
    }
    Ok(())
}

/// Registers the tables that the cache holds, so that queries find them by their bare names.
///
/// # Errors
/// If the session cannot be made to.
pub async fn register_stoa(
    session: &SessionContext,
    stoa: &Stoa,
    data: &Data,
) -> Result<(), Error> {
    stoa.register(session).await?;
    let schema = data.suite.name();
    session
        .sql(&format!(
            "set datafusion.catalog.default_schema = '{schema}'"
        ))
        .await?
        .collect()
        .await?;
    Ok(())
}

/// Runs one query to its end; its answer and the time it took, planning included.
///
/// # Errors
/// What the query fails with.
pub async fn run(
    session: &SessionContext,
    sql: &str,
) -> Result<(Vec<RecordBatch>, Duration), Error> {
    let start = Instant::now();
    let answer = session.sql(sql).await?.collect().await?;
    Ok((answer, start.elapsed()))
}

/// The layouts of all tables in a mode's form; their files lie below `root`, a directory for each
/// table.
///
/// # Errors
/// If the mode has no form, or the form is not known.
pub fn documents(mode: &Mode, data: &Data, root: &str) -> Result<Vec<LayoutDocument>, Error> {
    let form = mode.form().ok_or_else(|| format!("{mode} loads nothing"))?;
    let form: FormChoice = form.parse()?;
    let mut documents = vec![];
    for table in &data.tables {
        let name = TableName::new(data.suite.name(), table)?;
        let location = format!("{root}/{table}/");
        let mut document = LayoutDocument::new(name, LayoutVersion::FIRST, location);
        document.form = form;
        if let Some(times) = mode.budget() {
            // A share for each table: which of them is planned first must not matter.
            document.budget_bytes = Some((data.table_bytes(table)? as f64 * times) as u64);
        }
        documents.push(document);
    }
    Ok(documents)
}

/// A cache that this process runs in a directory of its own, and removes.
pub struct Cache {
    embedded: Embedded,
    scratch: tempfile::TempDir,
}

impl Cache {
    /// An empty one below `root`, which should be a tmpfs.
    ///
    /// # Errors
    /// If it cannot be made there.
    pub async fn start(mode: &Mode, data: &Data, root: &Path) -> Result<Cache, Error> {
        let scratch = tempfile::Builder::new()
            .prefix("stoa-bench-")
            .tempdir_in(root)?;
        let settings = EmbeddedSettings {
            cache_directory: scratch.path().join("cache"),
            capacity_bytes: mode.capacity_bytes(data),
            freshness: None,
            ..EmbeddedSettings::default()
        };
        Ok(Cache {
            embedded: Embedded::start(settings).await?,
            scratch,
        })
    }

    /// Loads all tables; returns when all that fits is there.
    ///
    /// # Errors
    /// If a table cannot be loaded, or the form is not known.
    pub async fn load(&self, mode: &Mode, data: &Data) -> Result<(), Error> {
        let documents = documents(mode, data, &data.root())?;
        for document in &documents {
            self.embedded.publish(document).await?;
        }
        let mut states = self
            .embedded
            .worker_state()
            .ok_or("another process runs this cache")?;
        let loaded = states.wait_for(|state| {
            let of = |document: &LayoutDocument| state.tables.get(&document.table.to_string());
            documents
                .iter()
                .all(|document| of(document).is_some_and(settled))
        });
        match tokio::time::timeout(LOAD_TIMEOUT, loaded).await {
            Ok(loaded) => drop(loaded?),
            Err(_) => return Err(format!("{mode} is not loaded after {LOAD_TIMEOUT:?}").into()),
        }
        Ok(())
    }

    /// The cache directory.
    pub fn directory(&self) -> PathBuf {
        self.scratch.path().join("cache")
    }

    /// The cache for this process's sessions.
    pub fn stoa(&self) -> Stoa {
        self.embedded.stoa()
    }

    /// Shared memory that it holds, in bytes.
    pub fn bytes(&self) -> u64 {
        let state = self.embedded.worker_state();
        state.map_or(0, |state| state.borrow().held_bytes)
    }

    /// Stops what runs, and removes what was loaded.
    pub async fn stop(self) {
        let directory = self.directory();
        self.embedded.shutdown().await;
        // Before the directory goes, whose name they bear.
        let _ = stoa_shm::AccessCounters::remove(directory);
    }
}

/// Whether all that fits of a table is there: what is left out for lack of room stays out.
fn settled(table: &TableState) -> bool {
    let (done, left_out) = (table.chunks_done, table.left_out.chunks);
    table.current.is_some() || (left_out > 0 && done + left_out >= table.chunks_total)
}

/// A mode, ready to be asked.
pub struct Running {
    /// Which.
    pub mode: Mode,
    /// Milliseconds that a new reader takes from nothing to the tables; 0 without the cache.
    pub attach_ms: f64,
    /// Seconds that loading took; 0 for Parquet.
    pub load_seconds: f64,
    /// Bytes of memory that hold the tables: those of the files for Parquet in the page cache.
    pub bytes: u64,
    session: SessionContext,
    cache: Option<Cache>,
}

impl Running {
    /// Makes the session of a mode over the data; caches lie below `root`.
    ///
    /// # Errors
    /// If the tables cannot be read or loaded.
    pub async fn start(
        mode: &Mode,
        data: &Data,
        partitions: usize,
        root: &Path,
    ) -> Result<Self, Error> {
        let mut running = Running {
            mode: mode.clone(),
            attach_ms: 0.0,
            load_seconds: 0.0,
            bytes: data.bytes,
            session: session(mode, partitions),
            cache: None,
        };
        let start = Instant::now();
        match mode {
            Mode::Parquet { .. } => register_parquet(&running.session, data, &data.root()).await?,
            Mode::Memtable => {
                running.decode(data).await?;
                running.load_seconds = start.elapsed().as_secs_f64();
            }
            Mode::Stoa { .. } => {
                let cache = Cache::start(mode, data, root).await?;
                let start = Instant::now();
                cache.load(mode, data).await?;
                running.load_seconds = start.elapsed().as_secs_f64();
                running.bytes = cache.bytes();
                let start = Instant::now();
                let reader = Reader::open(&cache.directory(), Origin::default());
                let tables = reader.view().tables().count();
                running.attach_ms = start.elapsed().as_secs_f64() * 1000.0;
                if tables != data.tables.len() {
                    return Err(format!(
                        "{tables} tables are published, expected {}",
                        data.tables.len()
                    )
                    .into());
                }
                register_stoa(&running.session, &cache.stoa(), data).await?;
                running.cache = Some(cache);
            }
        }
        Ok(running)
    }

    async fn decode(&mut self, data: &Data) -> Result<(), Error> {
        let source = SessionContext::new_with_config(self.session.copied_config());
        register_parquet(&source, data, &data.root()).await?;
        let partitions = self.session.copied_config().target_partitions();
        let mut seen = HashSet::new();
        self.bytes = 0;
        for table in &data.tables {
            let provider = source.table_provider(table.as_str()).await?;
            let loaded = MemTable::load(provider, Some(partitions), &source.state()).await?;
            for partition in &loaded.batches {
                for batch in partition.read().await.iter() {
                    let columns = batch.columns().iter();
                    let new = columns.map(|column| new_bytes(&column.to_data(), &mut seen));
                    self.bytes += new.sum::<u64>();
                }
            }
            self.session
                .register_table(table.as_str(), Arc::new(loaded))?;
        }
        Ok(())
    }

    /// The session, to be asked.
    pub fn session(&self) -> &SessionContext {
        &self.session
    }

    /// The cache, in modes that have one.
    pub fn cache(&self) -> Option<&Cache> {
        self.cache.as_ref()
    }

    /// Requests to the origin so far; 0 in modes without the cache.
    pub fn origin_requests(&self) -> u64 {
        self.cache.as_ref().map_or(0, |cache| {
            let origin = cache.embedded.origin();
            origin.counters().requests()
        })
    }

    /// The share of chunks that queries found in shared memory so far; `None` without the cache.
    pub fn hit_rate(&self) -> Option<f64> {
        let cache = self.cache.as_ref()?;
        Some(cache.embedded.reader().statistics().counts().hit_rate())
    }

    /// Stops what the mode runs, and removes what it loaded.
    pub async fn stop(self) {
        // Its mappings go first.
        drop(self.session);
        if let Some(cache) = self.cache {
            cache.stop().await;
        }
    }
}

/// Bytes of the buffers that were not seen before: batches of one row group share some.
fn new_bytes(data: &ArrayData, seen: &mut HashSet<usize>) -> u64 {
    let nulls = data.nulls().map(|nulls| nulls.buffer());
    let own = data.buffers().iter().chain(nulls);
    let own: u64 = own
        .filter(|buffer| seen.insert(buffer.data_ptr().as_ptr() as usize))
        .map(|buffer| buffer.capacity() as u64)
        .sum();
    let children = data.child_data().iter();
    own + children.map(|child| new_bytes(child, seen)).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use arrow::array::{Array, Int64Array};
    use stoa_metastore::PlanTarget;

    use super::*;

    #[test]
    fn modes_are_read_as_they_are_written() {
        for name in [
            "parquet",
            "parquet-pushdown",
            "memtable",
            "stoa-arrow",
            "stoa-packed-pushdown",
            "stoa-auto@0.5",
            "stoa-parquet-pushdown@2",
        ] {
            assert_eq!(name.parse::<Mode>().unwrap().to_string(), name);
        }
        for wrong in [
            "stoa",
            "stoa-orc",
            "parquet@1",
            "stoa-auto@0",
            "memtable-pushdown",
            "",
        ] {
            let error = wrong.parse::<Mode>().unwrap_err();
            assert!(
                error.starts_with(&format!("unknown mode `{wrong}`")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_table_is_settled_with_all_of_it_or_with_what_fits() {
        let target = Some(PlanTarget {
            plan: 1,
            version: 1,
        });
        let mut table = TableState {
            target,
            chunks_done: 26,
            chunks_total: 27,
            ..TableState::default()
        };
        assert!(!settled(&table));
        table.left_out.chunks = 1;
        assert!(settled(&table));
        let whole = TableState {
            current: target,
            ..TableState::default()
        };
        let planned = TableState {
            target,
            ..TableState::default()
        };
        assert!(settled(&whole) && !settled(&planned));
    }

    #[test]
    fn shared_buffers_count_once() {
        let values = Int64Array::from_iter_values(0..1024);
        let mut seen = HashSet::new();
        let whole = new_bytes(&values.to_data(), &mut seen);
        assert!(whole >= 8 * 1024, "{whole}");
        assert_eq!(new_bytes(&values.slice(10, 5).to_data(), &mut seen), 0);
    }
}
