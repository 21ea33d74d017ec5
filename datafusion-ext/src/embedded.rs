//! Coordinator and worker in the process itself: what runs where there is no cluster.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use stoa_cache_manager::{Worker, WorkerHandle, WorkerSettings};
use stoa_coordinator::{Coordinator, CoordinatorHandle, CoordinatorListeners, CoordinatorSettings};
use stoa_layout::{LayoutDocument, LayoutVersion, TableCatalog, TableName};
use stoa_metastore::{EmbeddedMetastore, Records, WorkerState};
use stoa_origin::{Origin, OriginLimits, StoreSettings, Stores};
use stoa_reader::{Reader, ReaderOptions, Verify};
use stoa_shm::CacheDir;
use tokio::sync::watch;

use crate::Stoa;
use crate::clock::now_unix_ms;

/// How to run the cache inside a process.
#[derive(Clone, Debug)]
pub struct EmbeddedSettings {
    /// The cache directory, on tmpfs.
    pub cache_directory: PathBuf,
    /// How much shared memory it may take, in bytes.
    pub capacity_bytes: u64,
    /// Where the metastore persists; in memory where there is none.
    pub state_directory: Option<PathBuf>,
    /// Whether the directory's group may read it (0750), rather than its user alone.
    pub group_access: bool,
    /// Whether what is published is locked in memory.
    pub pin: bool,
    /// How often the files of loaded tables are looked at again; `None` for never.
    pub freshness: Option<Duration>,
    /// How often everything published is hashed again behind; `None` for never.
    pub scrub_interval: Option<Duration>,
    /// How long a process that owns the cache, and finds nothing to do for it, leaves what is in the
    /// directory alone: one that ends before has paid nothing for it.
    pub takeover_delay: Duration,
    /// Whether this process hashes a local chunk when it first reads it.
    pub verify: Verify,
    /// Whether this process touches the whole cache when it attaches, off its queries' path.
    pub prefault: bool,
    /// The stores that tables may lie in.
    pub stores: StoreSettings,
    /// Bounds on what is asked of them.
    pub origin: OriginLimits,
}

impl Default for EmbeddedSettings {
    /// `/dev/shm/stoa-<uid>`, 4 GiB, nothing persisted, a look every minute.
    fn default() -> Self {
        Self {
            cache_directory: CacheDir::default_path(),
            capacity_bytes: 4 << 30,
            state_directory: None,
            group_access: false,
            pin: false,
            freshness: Some(Duration::from_secs(60)),
            scrub_interval: Some(Duration::from_secs(6 * 3600)),
            takeover_delay: Duration::ZERO,
            verify: Verify::Never,
            prefault: false,
            stores: StoreSettings::default(),
            origin: OriginLimits::default(),
        }
    }
}

/// Why the embedded cache cannot start, or cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// Another process runs the cache of this directory; this one can only read it.
    #[error("the cache of this directory is run by another process; here it can only be read")]
    NotOwner,
    /// The metastore failed.
    #[error(transparent)]
    Metastore(#[from] stoa_metastore::Error),
    /// The layout is not valid, or its files cannot be read.
    #[error(transparent)]
    Layout(#[from] stoa_layout::Error),
    /// The worker failed.
    #[error(transparent)]
    Worker(#[from] stoa_cache_manager::Error),
    /// The coordinator failed.
    #[error(transparent)]
    Coordinator(#[from] stoa_coordinator::Error),
    /// The table did not get ready in time.
    #[error("{table_version} is not loaded after {seconds} s: {state}")]
    NotReady {
        /// The table and version waited for.
        table_version: String,
        /// How long it was waited for.
        seconds: u64,
        /// What the worker says.
        state: String,
    },
}

/// Metastore, coordinator and worker in this process, over a directory that other processes of the
/// same user read.
///
/// Where another process owns the directory already, this one reads what that one publishes.
#[derive(Debug)]
pub struct Embedded {
    reader: Reader,
    owner: Option<Owner>,
}

#[derive(Debug)]
struct Owner {
    records: Records,
    worker: WorkerHandle,
    coordinator: CoordinatorHandle,
}

impl Embedded {
    /// Starts the cache, or attaches to the one that another process runs on the same directory.
    ///
    /// # Errors
    /// If the state cannot be read, or the directory is not safe to use as a cache.
    pub async fn start(settings: EmbeddedSettings) -> Result<Self, EmbeddedError> {
        let origin = Origin::new(Stores::new(settings.stores.clone()), settings.origin);
        let options = ReaderOptions {
            verify: settings.verify,
            prefault: settings.prefault,
            ..ReaderOptions::default()
        };
        let reader = Reader::open_with(&settings.cache_directory, options, origin.clone());
        let store = match &settings.state_directory {
            None => Ok(EmbeddedMetastore::in_memory()),
            Some(directory) => EmbeddedMetastore::open(directory),
        };
        let records = match store {
            Ok(store) => Records::new(Arc::new(store)),
            Err(stoa_metastore::Error::Busy { .. }) => {
                return Ok(Self {
                    reader,
                    owner: None,
                });
            }
            Err(error) => return Err(error.into()),
        };
        let worker = WorkerSettings {
            freshness: settings.freshness,
            scrub_interval: settings.scrub_interval,
            takeover_delay: settings.takeover_delay,
            group_access: settings.group_access,
            pin: settings.pin,
            ..WorkerSettings::new(
                "embedded",
                settings.cache_directory,
                settings.capacity_bytes,
            )
        };
        let worker = match Worker::start(worker, records.clone(), origin.clone()).await {
            Ok(worker) => worker,
            Err(error) if error.is_locked() => {
                return Ok(Self {
                    reader,
                    owner: None,
                });
            }
            Err(error) => return Err(error.into()),
        };
        let observed = reader.clone();
        worker
            .metrics()
            .observe(move || crate::reader_metrics(&observed));
        // One worker, and it is here: nobody to wait for.
        let coordinator = CoordinatorSettings {
            candidate: format!("embedded:{}", std::process::id()),
            grace_ms: 0,
            settle_ms: 0,
            ..CoordinatorSettings::default()
        };
        let nowhere = CoordinatorListeners::default();
        let coordinator = Coordinator::start(coordinator, nowhere, records.clone(), origin).await?;
        Ok(Self {
            reader,
            owner: Some(Owner {
                records,
                worker,
                coordinator,
            }),
        })
    }

    /// Whether this process runs the cache; else it reads another's.
    pub fn is_owner(&self) -> bool {
        self.owner.is_some()
    }

    /// The metastore, where this process owns it.
    pub fn records(&self) -> Option<&Records> {
        self.owner.as_ref().map(|owner| &owner.records)
    }

    /// This process's reader of the cache directory.
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// What misses are read from.
    pub fn origin(&self) -> &Origin {
        self.reader.origin()
    }

    /// The cache for DataFusion sessions.
    pub fn stoa(&self) -> Stoa {
        Stoa::with_reader(self.reader.clone(), self.records().cloned())
    }

    /// What the worker is doing, where this process owns it.
    pub fn worker_state(&self) -> Option<watch::Receiver<WorkerState>> {
        self.owner.as_ref().map(|owner| owner.worker.subscribe())
    }

    /// Publishes a layout and asks for it to be loaded; returns before it is.
    ///
    /// # Errors
    /// [`EmbeddedError::NotOwner`], or what the metastore says of the version.
    pub async fn publish(&self, document: &LayoutDocument) -> Result<(), EmbeddedError> {
        let owner = self.owner.as_ref().ok_or(EmbeddedError::NotOwner)?;
        let table = document.table.to_string();
        let version = document.version.get();
        owner
            .records
            .publish_layout(&table, version, &document.to_json())
            .await?;
        owner
            .records
            .request_load(&document.table_version().to_string())
            .await?;
        Ok(())
    }

    /// Waits until all that fits of a version is in shared memory.
    ///
    /// # Errors
    /// [`EmbeddedError::NotReady`] after `timeout`.
    pub async fn wait_loaded(
        &self,
        document: &LayoutDocument,
        timeout: Duration,
    ) -> Result<WorkerState, EmbeddedError> {
        let owner = self.owner.as_ref().ok_or(EmbeddedError::NotOwner)?;
        let mut states = owner.worker.subscribe();
        let table = document.table.to_string();
        let version = document.version.get();
        let loaded = states.wait_for(|state| {
            let current = state.tables.get(&table).and_then(|table| table.current);
            current.is_some_and(|current| current.version >= version)
        });
        match tokio::time::timeout(timeout, loaded).await {
            Ok(Ok(state)) => Ok(state.clone()),
            _ => Err(EmbeddedError::NotReady {
                table_version: document.table_version().to_string(),
                seconds: timeout.as_secs(),
                state: format!("{:?}", owner.worker.subscribe().borrow().tables.get(&table)),
            }),
        }
    }

    /// Stops coordinator and worker; what is loaded stays for the next process.
    pub async fn shutdown(self) {
        if let Some(owner) = self.owner {
            if let Err(error) = owner.coordinator.shutdown().await {
                tracing::warn!(%error, "the coordinator had ended");
            }
            owner.worker.shutdown().await;
        }
    }
}

/// Publishes layouts for tables that SQL creates.
#[derive(Clone, Debug)]
pub struct Publisher {
    records: Option<Records>,
    origin: Origin,
}

impl Publisher {
    /// Publishes to the metastore.
    pub fn new(records: Records, origin: Origin) -> Self {
        Self {
            records: Some(records),
            origin,
        }
    }

    /// Publishes nothing: the table is read from the origin.
    pub(crate) fn offline(origin: Origin) -> Self {
        Self {
            records: None,
            origin,
        }
    }

    /// Makes version 1 of a table: all columns of the files at `location`; asks for its load.
    ///
    /// # Errors
    /// If the files cannot be listed or read, or the metastore refuses the layout.
    pub async fn create(
        &self,
        name: &TableName,
        location: &str,
        partition_columns: &[String],
    ) -> Result<TableCatalog, EmbeddedError> {
        let mut document = LayoutDocument::new(name.clone(), LayoutVersion::FIRST, location);
        document.partition_columns = partition_columns.to_vec();
        let now = now_unix_ms();
        let catalog = TableCatalog::load(&self.origin, &document, now).await?;
        match &self.records {
            Some(records) => {
                let table = name.to_string();
                document.files = catalog
                    .files
                    .iter()
                    .map(|file| file.identity.clone())
                    .collect();
                records
                    .publish_layout(&table, document.version.get(), &document.to_json())
                    .await?;
                records
                    .request_load(&document.table_version().to_string())
                    .await?;
            }
            None => tracing::warn!(
                table = %name,
                "another process runs this cache: the table is read from the origin and not cached"
            ),
        }
        Ok(catalog)
    }
}
