//! Coordinator and worker in the process itself: what runs where there is no cluster.
//!
//! Processes of one machine share one state (see `docs/owner.md`). One of them runs coordinator and
//! worker; the others ask for what they want through the state, and stand by: when that one ends,
//! another runs them on.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use stoa_cache_manager::{Worker, WorkerHandle, WorkerSettings};
use stoa_control::Listen;
use stoa_coordinator::{Coordinator, CoordinatorHandle, CoordinatorListeners, CoordinatorSettings};
use stoa_layout::{LayoutDocument, LayoutVersion, TableCatalog, TableName};
use stoa_metastore::{
    EmbeddedMetastore, ErrorKind, LayoutsDropped, Leaving, MADE_BY_SQL, Metastore, Records,
    SharedMetastore, WorkerState, keys,
};
use stoa_origin::{Origin, OriginLimits, StoreSettings, Stores};
use stoa_reader::{Neighbours, Reader, ReaderOptions, Verify};
use stoa_shm::CacheDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::Stoa;
use crate::clock::now_unix_ms;

/// The only worker of an embedded cache, by whichever process it is run: one name, so that a plan
/// made for one process holds for the next.
pub const EMBEDDED_WORKER: &str = "embedded";
/// The first and the longest pause before a process that stands by looks whether the cache's
/// directory is free. It is told of a worker's end; this is for what it is not told of.
const LOOK: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// How long a directory may be held by a process that is not registered in this state, before that
/// counts as another state's: starting and ending processes are between the two for a moment.
const STRANGER: Duration = Duration::from_secs(3);
/// How often the state of a load is looked at.
const LOOK_AT_LOAD: Duration = Duration::from_millis(10);

/// How to run the cache inside a process.
#[derive(Clone, Debug)]
pub struct EmbeddedSettings {
    /// The cache directory, on tmpfs.
    pub cache_directory: PathBuf,
    /// How much shared memory it may take, in bytes.
    pub capacity_bytes: u64,
    /// Where the metastore persists; in memory where there is none.
    pub state_directory: Option<PathBuf>,
    /// This host, as records name it.
    pub host: String,
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
    /// How long worker and coordinator count as alive after the last sign of life.
    pub lease_ttl: Duration,
    /// How often the worker gives one; less than `lease_ttl`.
    pub heartbeat: Duration,
    /// Batches that a load fetches at the same time.
    pub fill_concurrency: usize,
    /// Memory that a load may take for what it has fetched and not yet written, in bytes.
    pub fill_memory_bytes: u64,
    /// Whether chunks are spread by number rather than by bytes.
    pub absolute_balancer: bool,
    /// Where the worker serves control over gRPC; `None`: nowhere.
    pub control: Option<Listen>,
    /// Where it serves metrics and health over HTTP; `None`: nowhere.
    pub http: Option<Listen>,
    /// Whether this process hashes a local chunk when it first reads it.
    pub verify: Verify,
    /// Whether this process touches the whole cache when it attaches, off its queries' path.
    pub prefault: bool,
    /// The memory of other machines' workers, for queries of this process.
    pub neighbours: Option<Neighbours>,
    /// The stores that tables may lie in.
    pub stores: StoreSettings,
    /// Bounds on what is asked of them.
    pub origin: OriginLimits,
}

impl Default for EmbeddedSettings {
    /// `/dev/shm/stoa-<uid>`, 4 GiB, nothing persisted, a look every minute.
    fn default() -> Self {
        let directory = CacheDir::default_path();
        let capacity_bytes = 4 << 30;
        let usual = WorkerSettings::new(EMBEDDED_WORKER, directory.clone(), capacity_bytes);
        Self {
            cache_directory: directory,
            capacity_bytes,
            state_directory: None,
            host: usual.host,
            group_access: usual.group_access,
            pin: usual.pin,
            freshness: usual.freshness,
            scrub_interval: usual.scrub_interval,
            takeover_delay: Duration::ZERO,
            lease_ttl: usual.lease_ttl,
            heartbeat: usual.heartbeat,
            fill_concurrency: usual.fill_concurrency,
            fill_memory_bytes: usual.fill_memory_bytes,
            absolute_balancer: false,
            control: None,
            http: None,
            verify: Verify::Never,
            prefault: false,
            neighbours: None,
            stores: StoreSettings::default(),
            origin: OriginLimits::default(),
        }
    }
}

impl EmbeddedSettings {
    /// What the worker is told.
    pub fn worker(&self) -> WorkerSettings {
        WorkerSettings {
            host: self.host.clone(),
            group_access: self.group_access,
            pin: self.pin,
            freshness: self.freshness,
            scrub_interval: self.scrub_interval,
            takeover_delay: self.takeover_delay,
            lease_ttl: self.lease_ttl,
            heartbeat: self.heartbeat,
            fill_concurrency: self.fill_concurrency,
            fill_memory_bytes: self.fill_memory_bytes,
            control: self.control,
            http: self.http,
            // There is nobody to read from.
            transfer: None,
            ..WorkerSettings::new(
                EMBEDDED_WORKER,
                self.cache_directory.clone(),
                self.capacity_bytes,
            )
        }
    }

    /// What the coordinator is told. There is one worker, and it is here: nobody to wait for.
    pub fn coordinator(&self) -> CoordinatorSettings {
        CoordinatorSettings {
            candidate: format!("{EMBEDDED_WORKER}:{}", std::process::id()),
            election_ttl_ms: self.lease_ttl.as_millis() as u64,
            absolute_balancer: self.absolute_balancer,
            grace_ms: 0,
            settle_ms: 0,
            ..CoordinatorSettings::default()
        }
    }
}

/// Why the embedded cache cannot start, or cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// This process has no part in the state; it can only read the cache.
    #[error("the state is not at hand; here the cache can only be read")]
    NoState,
    /// The state belongs to a cache in another directory.
    #[error(
        "{} holds the state of the cache in {}, and this process's is {}: give both processes one \
         cache.location, or each a state.location of its own",
        state.display(), theirs.display(), ours.display()
    )]
    OtherCache {
        /// The state directory.
        state: PathBuf,
        /// The directory that the running worker fills.
        theirs: PathBuf,
        /// The directory that this process was told to use.
        ours: PathBuf,
    },
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

impl EmbeddedError {
    /// Whether it is that another process runs this directory's worker.
    fn is_locked(&self) -> bool {
        matches!(self, EmbeddedError::Worker(error) if error.is_locked())
    }
}

/// Metastore, coordinator and worker over a directory that other processes of the same user read:
/// run in this process, or in another one with which this one shares the state.
#[derive(Debug)]
pub struct Embedded {
    settings: EmbeddedSettings,
    reader: Reader,
    records: Option<Records>,
    role: Arc<Role>,
    /// Runs coordinator and worker once whoever runs them now has ended.
    standing_by: Option<JoinHandle<()>>,
    trouble: Option<EmbeddedError>,
}

/// What this process runs, if it does.
#[derive(Debug, Default)]
struct Role {
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    worker: WorkerHandle,
    coordinator: CoordinatorHandle,
}

impl Role {
    fn running(&self) -> std::sync::MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Embedded {
    /// Runs the cache, or takes part in the one that another process runs on the same directory.
    ///
    /// Where the state is another process's that does not share it, this one reads what that one
    /// publishes; [`Embedded::trouble`] says so.
    ///
    /// # Errors
    /// If the state cannot be read or written, or the directory cannot be used as a cache.
    pub async fn start(settings: EmbeddedSettings) -> Result<Self, EmbeddedError> {
        let mut embedded = Self::attach(settings).await?;
        match embedded.trouble.take_if(|trouble| !is_others(trouble)) {
            None => Ok(embedded),
            Some(error) => {
                embedded.shutdown().await;
                Err(error)
            }
        }
    }

    /// As [`Embedded::start`], for a process that reads in any case: where state or directory cannot
    /// be used, what is there is read, misses are read from the origin, and [`Embedded::trouble`]
    /// says why nothing is cached.
    ///
    /// # Errors
    /// If the settings cannot work.
    pub async fn attach(settings: EmbeddedSettings) -> Result<Self, EmbeddedError> {
        settings.worker().validate()?;
        let origin = Origin::new(
            Stores::new(settings.stores.clone()),
            settings.origin.clone(),
        );
        let options = ReaderOptions {
            verify: settings.verify,
            prefault: settings.prefault,
            ..ReaderOptions::default()
        };
        let neighbours = settings.neighbours.clone();
        let reader = Reader::open_among(&settings.cache_directory, options, origin, neighbours);
        let mut embedded = Self {
            settings,
            reader,
            records: None,
            role: Arc::default(),
            standing_by: None,
            trouble: None,
        };
        let store: Arc<dyn Metastore> = match &embedded.settings.state_directory {
            None => Arc::new(EmbeddedMetastore::in_memory()),
            Some(directory) => match SharedMetastore::open(directory).await {
                Ok(store) => Arc::new(store),
                Err(error) => {
                    embedded.records = layouts_at_rest(directory, &error).await;
                    embedded.trouble = Some(error.into());
                    return Ok(embedded);
                }
            },
        };
        let records = Records::new(store);
        embedded.records = Some(records.clone());
        match run(&embedded.settings, &records, &embedded.reader).await {
            Ok(running) => *embedded.role.running() = Some(running),
            Err(error) => {
                if !error.is_locked() {
                    embedded.trouble = Some(error);
                }
                let settings = EmbeddedSettings {
                    // Somebody else may wait for what the process before was about.
                    takeover_delay: Duration::ZERO,
                    ..embedded.settings.clone()
                };
                embedded.standing_by = Some(tokio::spawn(stand_by(
                    settings,
                    records,
                    embedded.reader.clone(),
                    Arc::clone(&embedded.role),
                )));
            }
        }
        Ok(embedded)
    }

    /// Whether this process runs the cache at present.
    pub fn is_owner(&self) -> bool {
        self.role.running().is_some()
    }

    /// Why this process cannot have tables cached, or did not run the cache when it could have:
    /// `None` where all is well, be it run here or by another process.
    pub fn trouble(&self) -> Option<&EmbeddedError> {
        self.trouble.as_ref()
    }

    /// Waits until a worker serves this state: this process's, or another's.
    ///
    /// # Errors
    /// [`Embedded::trouble`], or that another process holds the directory with another state.
    pub async fn wait_for_worker(&mut self) -> Result<(), EmbeddedError> {
        if let Some(trouble) = self.trouble.take() {
            return Err(trouble);
        }
        let records = self.records.as_ref().ok_or(EmbeddedError::NoState)?;
        let until = Instant::now() + STRANGER;
        loop {
            if self.is_owner() || !records.workers().await?.is_empty() {
                return Ok(());
            }
            if Instant::now() >= until {
                // Says who holds it.
                match run(&self.settings, records, &self.reader).await {
                    Ok(running) => {
                        if let Some(task) = self.standing_by.take() {
                            task.abort();
                        }
                        *self.role.running() = Some(running);
                    }
                    // By this very process, meanwhile.
                    Err(_) if self.is_owner() => {}
                    Err(error) => return Err(error),
                }
            }
            sleep(LOOK_AT_LOAD).await;
        }
    }

    /// The records, where this process has a part in the state.
    pub fn records(&self) -> Option<&Records> {
        self.records.as_ref()
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
        let running = self.role.running();
        let waker = running.as_ref().map(|running| running.worker.waker());
        Stoa::beside(self.reader.clone(), self.records().cloned(), waker)
    }

    /// What the worker is doing, where this process runs it.
    pub fn worker_state(&self) -> Option<watch::Receiver<WorkerState>> {
        let running = self.role.running();
        running.as_ref().map(|running| running.worker.subscribe())
    }

    /// Publishes a layout and asks for it to be loaded; returns before it is.
    ///
    /// # Errors
    /// [`EmbeddedError::NoState`], or what the metastore says of the version.
    pub async fn publish(&self, document: &LayoutDocument) -> Result<(), EmbeddedError> {
        let records = self.records.as_ref().ok_or(EmbeddedError::NoState)?;
        let table = document.table.to_string();
        let version = document.version.get();
        records
            .publish_layout(&table, version, &document.to_json())
            .await?;
        records
            .request_load(&document.table_version().to_string())
            .await?;
        Ok(())
    }

    /// Waits until all that fits of a version is in shared memory, whichever process runs the
    /// worker.
    ///
    /// # Errors
    /// [`EmbeddedError::NoState`]; [`EmbeddedError::NotReady`] after `timeout`.
    pub async fn wait_loaded(
        &self,
        document: &LayoutDocument,
        timeout: Duration,
    ) -> Result<WorkerState, EmbeddedError> {
        let records = self.records.as_ref().ok_or(EmbeddedError::NoState)?;
        let table = document.table.to_string();
        let version = document.version.get();
        let until = Instant::now() + timeout;
        loop {
            let here = self.worker_state().map(|state| state.borrow().clone());
            let states = match here {
                Some(state) => vec![state],
                None => records.states().await?,
            };
            let loaded = states.iter().find(|state| {
                let current = state.tables.get(&table).and_then(|table| table.current);
                current.is_some_and(|current| current.version >= version)
            });
            if let Some(state) = loaded {
                return Ok(state.clone());
            }
            if Instant::now() >= until {
                let seen = states.iter().find_map(|state| state.tables.get(&table));
                return Err(EmbeddedError::NotReady {
                    table_version: document.table_version().to_string(),
                    seconds: timeout.as_secs(),
                    state: format!("{seen:?}"),
                });
            }
            sleep(LOOK_AT_LOAD).await;
        }
    }

    /// Stops what this process runs; what is loaded stays for the next, and a process that stands
    /// by runs it on.
    pub async fn shutdown(mut self) {
        if let Some(task) = self.standing_by.take() {
            task.abort();
            // Ended before what it may have started is looked for.
            let _ = task.await;
        }
        let running = self.role.running().take();
        if let Some(running) = running {
            if let Err(error) = running.coordinator.shutdown().await {
                tracing::warn!(%error, "the coordinator had ended");
            }
            running.worker.shutdown().await;
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        if let Some(task) = &self.standing_by {
            task.abort();
        }
    }
}

/// Whether an error means that what is asked for is another process's, and not that something is
/// wrong here.
fn is_others(error: &EmbeddedError) -> bool {
    match error {
        EmbeddedError::OtherCache { .. } => true,
        EmbeddedError::Metastore(error) => {
            matches!(
                error,
                stoa_metastore::Error::Busy { .. } | stoa_metastore::Error::OwnerVersion { .. }
            ) || error.kind() == ErrorKind::Retry
        }
        _ => false,
    }
}

/// The layouts of a state that cannot be written, so that their tables are found all the same.
async fn layouts_at_rest(directory: &Path, error: &stoa_metastore::Error) -> Option<Records> {
    if !matches!(error, stoa_metastore::Error::Storage { .. }) {
        return None;
    }
    let directory = directory.to_owned();
    let read = tokio::task::spawn_blocking(move || EmbeddedMetastore::read_only(&directory));
    match read.await {
        Ok(Ok(store)) => Some(Records::new(Arc::new(store))),
        other => {
            tracing::debug!(?other, "the state cannot be read either");
            None
        }
    }
}

/// Starts worker and coordinator in this process.
async fn run(
    settings: &EmbeddedSettings,
    records: &Records,
    reader: &Reader,
) -> Result<Running, EmbeddedError> {
    if let Some(state) = &settings.state_directory {
        let live = records.workers().await?;
        let theirs = live.into_iter().find(|worker| {
            !worker.cache_dir.is_empty()
                && !same_directory(Path::new(&worker.cache_dir), &settings.cache_directory)
        });
        if let Some(theirs) = theirs {
            return Err(EmbeddedError::OtherCache {
                state: state.clone(),
                theirs: theirs.cache_dir.into(),
                ours: settings.cache_directory.clone(),
            });
        }
    }
    let origin = reader.origin().clone();
    let worker = Worker::start(settings.worker(), records.clone(), origin.clone()).await?;
    let observed = reader.clone();
    worker
        .metrics()
        .observe(move || crate::reader_metrics(&observed));
    let nowhere = CoordinatorListeners::default();
    let coordinator =
        Coordinator::start(settings.coordinator(), nowhere, records.clone(), origin).await?;
    Ok(Running {
        worker,
        coordinator,
    })
}

fn same_directory(one: &Path, other: &Path) -> bool {
    match (one.canonicalize(), other.canonicalize()) {
        (Ok(one), Ok(other)) => one == other,
        _ => one == other,
    }
}

/// Runs worker and coordinator once nobody else does.
async fn stand_by(settings: EmbeddedSettings, records: Records, reader: Reader, role: Arc<Role>) {
    let mut workers = records.follow(keys::WORKER_PREFIX);
    let mut alive = true;
    let mut pause = LOOK.0;
    let mut free_since = Instant::now();
    let mut said = false;
    loop {
        tokio::select! {
            registered = workers.next() => match registered {
                Some(registered) => {
                    let was = std::mem::replace(&mut alive, !registered.is_empty());
                    if alive {
                        continue;
                    }
                    if was {
                        (pause, free_since) = (LOOK.0, Instant::now());
                    }
                }
                None => return,
            },
            () = sleep(pause), if !alive => pause = (pause * 2).min(LOOK.1),
        }
        match run(&settings, &records, &reader).await {
            Ok(running) => {
                tracing::info!(
                    location = %settings.cache_directory.display(),
                    "the process that ran the cache has ended; this one runs it now"
                );
                *role.running() = Some(running);
                return;
            }
            Err(error) if error.is_locked() => {
                if !said && free_since.elapsed() > STRANGER {
                    said = true;
                    tracing::warn!(
                        %error,
                        "the cache is run with another state; what is wanted here is cached when that ends"
                    );
                }
            }
            Err(error) => tracing::debug!(%error, "the cache cannot be run yet"),
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

    /// Makes a table: a first layout of all columns of the files at `location`, numbered after those
    /// of tables of that name that were dropped; asks for its load.
    ///
    /// # Errors
    /// If one of the files cannot be listed or read, or the metastore refuses the layout.
    pub async fn create(
        &self,
        name: &TableName,
        location: &str,
        partition_columns: &[String],
    ) -> Result<TableCatalog, EmbeddedError> {
        let version = match &self.records {
            // Where the records do not answer, the table is not published either.
            Some(records) => records.next_layout(&name.to_string()).await.unwrap_or(1),
            None => 1,
        };
        let version = LayoutVersion::new(version)?;
        let mut document = LayoutDocument::new(name.clone(), version, location);
        document.partition_columns = partition_columns.to_vec();
        let now = now_unix_ms();
        let catalog = TableCatalog::load(&self.origin, &document, now).await?;
        catalog.check_readable()?;
        match &self.records {
            Some(records) => {
                let table = name.to_string();
                document.files = catalog.snapshot();
                let version = document.version.get();
                let published = async {
                    records
                        .publish_layout_by(Some(MADE_BY_SQL), &table, version, &document.to_json())
                        .await?;
                    records
                        .request_load(&document.table_version().to_string())
                        .await
                };
                match published.await {
                    Err(error) if error.kind() == ErrorKind::Refused => return Err(error.into()),
                    Err(error) => tracing::warn!(
                        table = %name,
                        %error,
                        "the table is read from the origin and not cached"
                    ),
                    Ok(_) => {}
                }
            }
            None => tracing::warn!(
                table = %name,
                "the state is not at hand: the table is read from the origin and not cached"
            ),
        }
        Ok(catalog)
    }

    /// Forgets the layouts of a table that [`Publisher::create`] made, and asks for it to leave
    /// memory; `None` where this process has no part in the state.
    ///
    /// # Errors
    /// If the metastore does not answer.
    pub async fn drop_table(
        &self,
        name: &TableName,
    ) -> Result<Option<LayoutsDropped>, EmbeddedError> {
        let Some(records) = &self.records else {
            return Ok(None);
        };
        let table = name.to_string();
        let dropped = records.drop_layouts(&table, Some(MADE_BY_SQL)).await?;
        Ok(Some(dropped))
    }

    /// Whether a table that was dropped has left the plans, and every worker's memory.
    pub(crate) async fn has_left(&self, name: &TableName) -> Result<bool, EmbeddedError> {
        let Some(records) = &self.records else {
            return Ok(true);
        };
        let leaving = records.leaving(&name.to_string(), true).await?;
        Ok(leaving == Leaving::Gone)
    }
}
