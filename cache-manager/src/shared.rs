//! What the parts of one worker share.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use stoa_metastore::WorkerState;
use stoa_shm::Handover;
use tokio::sync::{Notify, watch};
use tokio::task::JoinError;

use crate::background::Background;
use crate::error::Result;
use crate::metrics::Counters;
use crate::opening::Opening;
use crate::peers::LoadBoard;
use crate::settings::WorkerSettings;
use crate::store::Store;

/// Details of the status that the metastore need not know.
#[derive(Clone, Debug, Default)]
pub(crate) struct Details {
    pub(crate) generation: u64,
    pub(crate) chunks: u64,
    pub(crate) looked_at_unix_ms: BTreeMap<String, u64>,
}

/// Shared by the engine, the registration, the services and the handle.
pub(crate) struct Shared {
    pub(crate) settings: WorkerSettings,
    /// Bytes that may be held at the most: what is set, as far as the file system has it at all.
    pub(crate) capacity_bytes: u64,
    /// Names the cache directory, which is another one once it was made anew.
    pub(crate) cache_incarnation: watch::Sender<u64>,
    pub(crate) started_unix_ms: u64,
    pub(crate) incarnation: String,
    /// How the last worker left the directory.
    pub(crate) left: Option<Handover>,
    pub(crate) counters: Counters,
    pub(crate) state: watch::Sender<WorkerState>,
    /// What is going to be loaded, for other workers.
    pub(crate) board: LoadBoard,
    /// Where other workers can read this one's memory.
    transfer_addresses: OnceLock<Vec<String>>,
    /// For what keeps a processor busy.
    pub(crate) background: Arc<Background>,
    /// `None` until somebody needs what is in the directory.
    store: Arc<Mutex<Option<Store>>>,
    /// The directory's lock, as long as nobody has looked into the directory.
    opening: Mutex<Option<Opening>>,
    /// Whether the store is there.
    opened: watch::Sender<bool>,
    /// Told when somebody waits for the store.
    wanted: Notify,
    details: Mutex<Details>,
    /// Whether what is published is locked into memory.
    pinned: AtomicBool,
    problems: Mutex<BTreeMap<String, String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks leaves a whole value behind, also where the code around it
    // panics.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(
        settings: WorkerSettings,
        opening: Opening,
        background: Background,
    ) -> Shared {
        let capacity_bytes = opening.capacity_at_most(&settings);
        let state = WorkerState {
            id: settings.id.clone(),
            capacity_bytes,
            ..WorkerState::default()
        };
        Shared {
            capacity_bytes,
            cache_incarnation: watch::Sender::new(0),
            started_unix_ms: unix_ms(),
            incarnation: format!("{:016x}", random()),
            counters: Counters::default(),
            state: watch::Sender::new(state),
            board: LoadBoard::default(),
            transfer_addresses: OnceLock::new(),
            background: Arc::new(background),
            store: Arc::default(),
            left: opening.left(),
            opening: Mutex::new(Some(opening)),
            opened: watch::Sender::new(false),
            wanted: Notify::new(),
            details: Mutex::default(),
            pinned: AtomicBool::new(false),
            problems: Mutex::default(),
            settings,
        }
    }

    /// Takes stock of the directory, if that was not done before: its cost grows with what is in it.
    ///
    /// # Errors
    /// [`Error::Cache`](crate::Error::Cache). Trying again begins anew.
    pub(crate) async fn open_store(&self) -> Result<()> {
        if self.is_open() {
            return Ok(());
        }
        let opening = lock(&self.opening).take();
        let (settings, store) = (self.settings.clone(), Arc::clone(&self.store));
        let opened = self.on_background(move || {
            let opening = match opening {
                Some(opening) => opening,
                None => Opening::take(&settings)?,
            };
            let (opened, notes) = opening.open(&settings)?;
            *lock(&store) = Some(opened);
            Ok::<_, crate::Error>(notes)
        });
        for (name, text) in opened.await? {
            self.problem(name, Some(text));
        }
        self.opened.send_replace(true);
        Ok(())
    }

    /// Whether the store is there.
    pub(crate) fn is_open(&self) -> bool {
        *self.opened.borrow()
    }

    /// Has the engine take the directory over, if it is at rest.
    pub(crate) fn wake(&self) {
        self.wanted.notify_one();
    }

    /// Returns when somebody waits for the store.
    pub(crate) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Runs `work` with the store, on a thread that may block and yields to queries. Waits for the
    /// engine to open it first.
    pub(crate) async fn with_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Store) -> T + Send + 'static,
    ) -> T {
        if !self.is_open() {
            self.wake();
            // Its sender lives as long as `self`.
            let _ = self.opened.subscribe().wait_for(|opened| *opened).await;
        }
        let store = Arc::clone(&self.store);
        let work = move || work(lock(&store).as_mut().expect("it is opened"));
        self.on_background(work).await
    }

    /// Runs `work` on a thread that may block and yields to queries.
    pub(crate) async fn on_background<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let done = self.background.spawn(work).await;
        match done.map_err(JoinError::try_into_panic) {
            Ok(done) => done,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // Blocking tasks are only cancelled before they begin, when the runtime ends, and with
            // it whoever waits here.
            Err(Err(_)) => std::future::pending().await,
        }
    }

    /// Locks what is published, now and from now on, or lets go. Returns the locked bytes, and what
    /// stood in the way of locking.
    pub(crate) async fn set_pinned(&self, pinned: bool) -> (u64, Option<String>) {
        let (bytes, problem) = self
            .with_store(move |store| {
                let bytes = store.set_pinned(pinned);
                (bytes, store.pin_problem().map(str::to_owned))
            })
            .await;
        // Relaxed: it is shown, and orders nothing.
        self.pinned
            .store(pinned && problem.is_none(), Ordering::Relaxed);
        self.problem("pin", problem.clone());
        (bytes, problem)
    }

    pub(crate) fn is_pinned(&self) -> bool {
        self.pinned.load(Ordering::Relaxed)
    }

    /// Sets or, with `None`, clears a problem. Problems have names, so that each stands once.
    pub(crate) fn problem(&self, name: &str, text: Option<String>) {
        let mut problems = lock(&self.problems);
        match text {
            Some(text) => {
                if problems.get(name) != Some(&text) {
                    tracing::warn!(worker = self.settings.id, "{text}");
                    problems.insert(name.to_owned(), text);
                }
            }
            None => {
                problems.remove(name);
            }
        }
    }

    pub(crate) fn problems(&self) -> Vec<String> {
        lock(&self.problems).values().cloned().collect()
    }

    pub(crate) fn has_problem(&self, name: &str) -> bool {
        lock(&self.problems).contains_key(name)
    }

    /// Where other workers can read this one's memory; none until that is served.
    pub(crate) fn transfer_addresses(&self) -> Vec<String> {
        self.transfer_addresses.get().cloned().unwrap_or_default()
    }

    /// Says, once, where other workers can read this one's memory.
    pub(crate) fn set_transfer_addresses(&self, addresses: Vec<String>) {
        // It is served once a process.
        let _ = self.transfer_addresses.set(addresses);
    }

    pub(crate) fn details(&self) -> Details {
        lock(&self.details).clone()
    }

    pub(crate) fn set_details(&self, details: Details) {
        *lock(&self.details) = details;
    }
}

/// The time, in milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    since.as_millis() as u64
}

/// A number that nobody can foresee: names an incarnation, spreads retries.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(0u8)
}

/// A number in 0..1.
pub(crate) fn jitter() -> f64 {
    (random() >> 11) as f64 / (1u64 << 53) as f64
}
