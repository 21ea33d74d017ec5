//! What is compared: one session a mode, all over the same files.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::record_batch::RecordBatch;
use datafusion::datasource::MemTable;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::context::{SessionConfig, SessionContext};
use datafusion::prelude::ParquetReadOptions;
use stoa_cli::demo::generate::TABLES;
use stoa_datafusion::{Embedded, EmbeddedSettings, Reader};
use stoa_layout::{FormChoice, LayoutDocument, LayoutVersion, TableName};

/// A way of reading the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
pub enum Mode {
    /// Stock DataFusion over Parquet in the page cache.
    Parquet,
    /// The same with `pushdown_filters`.
    ParquetPushdown,
    /// Decoded in the memory of the process: nothing left to read or decode.
    Memtable,
    /// Stoa, chunks in the arrow form.
    Stoa,
    /// Stoa with `pushdown_filters`.
    StoaPushdown,
    /// Stoa, chunks in the parquet form.
    StoaParquet,
}

impl Mode {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Parquet => "parquet",
            Mode::ParquetPushdown => "parquet-pushdown",
            Mode::Memtable => "memtable",
            Mode::Stoa => "stoa",
            Mode::StoaPushdown => "stoa-pushdown",
            Mode::StoaParquet => "stoa-parquet",
        }
    }

    fn pushdown(self) -> bool {
        matches!(self, Mode::ParquetPushdown | Mode::StoaPushdown)
    }

    fn form(self) -> Option<FormChoice> {
        match self {
            Mode::Stoa | Mode::StoaPushdown => Some(FormChoice::Arrow),
            Mode::StoaParquet => Some(FormChoice::Parquet),
            _ => None,
        }
    }
}

/// A mode, ready to be asked.
pub struct Running {
    /// Which.
    pub mode: Mode,
    /// Milliseconds that a new reader takes from nothing to the tables; 0 without the cache.
    pub attach_ms: f64,
    /// Bytes of memory that hold the tables; 0 for Parquet, which the page cache holds.
    pub bytes: u64,
    session: SessionContext,
    embedded: Option<Embedded>,
    _scratch: Option<tempfile::TempDir>,
}

impl Running {
    /// Makes the session of a mode over the TPC-H files in `data`.
    ///
    /// # Errors
    /// If the tables cannot be read or loaded.
    pub async fn start(mode: Mode, data: &Path, partitions: usize) -> Result<Self> {
        let mut config = SessionConfig::new().with_target_partitions(partitions);
        config.options_mut().execution.parquet.pushdown_filters = mode.pushdown();
        let session = SessionContext::new_with_config(config);
        let mut running = Running {
            mode,
            attach_ms: 0.0,
            bytes: 0,
            session,
            embedded: None,
            _scratch: None,
        };
        match (mode, mode.form()) {
            (_, Some(form)) => running.load(data, form).await?,
            (Mode::Memtable, None) => running.decode(data).await?,
            _ => register_parquet(&running.session, data).await?,
        }
        Ok(running)
    }

    async fn load(&mut self, data: &Path, form: FormChoice) -> Result<()> {
        let external = |error| DataFusionError::External(Box::new(error));
        let scratch = tempfile::Builder::new()
            .prefix("stoa-bench-")
            .tempdir_in("/dev/shm")?;
        let settings = EmbeddedSettings {
            cache_directory: scratch.path().join("cache"),
            capacity_bytes: 16 << 30,
            freshness: None,
            ..EmbeddedSettings::default()
        };
        let embedded = Embedded::start(settings).await.map_err(external)?;
        for table in &TABLES {
            let name = TableName::new("tpch", table.name)
                .map_err(|error| DataFusionError::External(Box::new(error)))?;
            let location = format!("{}/", data.join(table.name).display());
            let mut document = LayoutDocument::new(name, LayoutVersion::FIRST, location);
            document.form = form;
            embedded.publish(&document).await.map_err(external)?;
            let wait = Duration::from_secs(1200);
            embedded
                .wait_loaded(&document, wait)
                .await
                .map_err(external)?;
        }
        let directory = scratch.path().join("cache");
        let start = Instant::now();
        let tables = Reader::open(&directory, embedded.origin().clone())
            .view()
            .tables()
            .count();
        self.attach_ms = start.elapsed().as_secs_f64() * 1000.0;
        assert_eq!(tables, TABLES.len(), "every table is published");
        self.bytes = embedded
            .worker_state()
            .map_or(0, |state| state.borrow().held_bytes);
        embedded.stoa().register(&self.session).await?;
        self.session
            .sql("set datafusion.catalog.default_schema = 'tpch'")
            .await?
            .collect()
            .await?;
        self.embedded = Some(embedded);
        self._scratch = Some(scratch);
        Ok(())
    }

    async fn decode(&mut self, data: &Path) -> Result<()> {
        let source = SessionContext::new_with_config(self.session.copied_config());
        register_parquet(&source, data).await?;
        for table in &TABLES {
            let provider = source.table_provider(table.name).await?;
            let partitions = self.session.copied_config().target_partitions();
            let loaded = MemTable::load(provider, Some(partitions), &source.state()).await?;
            for partition in &loaded.batches {
                let batches = partition.read().await;
                let bytes = batches
                    .iter()
                    .map(|batch| batch.get_array_memory_size() as u64);
                self.bytes += bytes.sum::<u64>();
            }
            self.session.register_table(table.name, Arc::new(loaded))?;
        }
        Ok(())
    }

    /// Runs one query to its end; its answer and the time it took, planning included.
    ///
    /// # Errors
    /// What the query fails with.
    pub async fn run(&self, sql: &str) -> Result<(Vec<RecordBatch>, Duration)> {
        let start = Instant::now();
        let answer = self.session.sql(sql).await?.collect().await?;
        Ok((answer, start.elapsed()))
    }

    /// Requests to the origin so far; 0 in modes without the cache.
    pub fn origin_requests(&self) -> u64 {
        self.embedded
            .as_ref()
            .map_or(0, |embedded| embedded.origin().counters().requests())
    }

    /// Stops what the mode runs, and removes what it loaded.
    pub async fn stop(self) {
        if let Some(embedded) = self.embedded {
            let directory = embedded.reader().directory().to_path_buf();
            embedded.shutdown().await;
            // Before the directory goes, whose name they bear.
            let _ = stoa_shm::AccessCounters::remove(directory);
        }
    }
}

async fn register_parquet(session: &SessionContext, data: &Path) -> Result<()> {
    for table in &TABLES {
        let path = format!("{}/", data.join(table.name).display());
        session
            .register_parquet(table.name, path, ParquetReadOptions::default())
            .await?;
    }
    Ok(())
}
