//! What the parts of one worker share.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use stoa_metastore::WorkerState;
use tokio::sync::watch;
use tokio::task::JoinError;

use crate::background::Background;
use crate::metrics::Counters;
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
    pub(crate) started_unix_ms: u64,
    pub(crate) incarnation: String,
    pub(crate) counters: Counters,
    pub(crate) state: watch::Sender<WorkerState>,
    /// What is going to be loaded, for other workers.
    pub(crate) board: LoadBoard,
    /// Where other workers can read this one's memory.
    transfer_addresses: OnceLock<Vec<String>>,
    /// For what keeps a processor busy.
    pub(crate) background: Arc<Background>,
    store: Arc<Mutex<Store>>,
    details: Mutex<Details>,
    problems: Mutex<BTreeMap<String, String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks leaves a whole value behind, also where the code around it
    // panics.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(settings: WorkerSettings, store: Store, background: Background) -> Shared {
        let state = WorkerState {
            id: settings.id.clone(),
            capacity_bytes: settings.capacity_bytes,
            ..WorkerState::default()
        };
        Shared {
            started_unix_ms: unix_ms(),
            incarnation: format!("{:016x}", random()),
            counters: Counters::default(),
            state: watch::Sender::new(state),
            board: LoadBoard::default(),
            transfer_addresses: OnceLock::new(),
            background: Arc::new(background),
            store: Arc::new(Mutex::new(store)),
            details: Mutex::default(),
            problems: Mutex::default(),
            settings,
        }
    }

    /// Runs `work` with the store, on a thread that may block and yields to queries.
    pub(crate) async fn with_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Store) -> T + Send + 'static,
    ) -> T {
        let store = Arc::clone(&self.store);
        let done = self.background.spawn(move || work(&mut lock(&store))).await;
        match done.map_err(JoinError::try_into_panic) {
            Ok(done) => done,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // Blocking tasks are only cancelled before they begin, when the runtime ends, and with
            // it whoever waits here.
            Err(Err(_)) => std::future::pending().await,
        }
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
