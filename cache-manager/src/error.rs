//! What can go wrong with a worker as a whole. What goes wrong with a table or a chunk is part of
//! its state instead: the worker goes on serving.

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a worker cannot start, or was stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting makes no sense.
    #[error("{key} is {value}: {reason}")]
    Setting {
        /// The setting's name in the configuration.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is expected.
        reason: String,
    },
    /// The cache directory cannot be used.
    #[error(transparent)]
    Cache(#[from] stoa_shm::Error),
    /// The control service cannot be served.
    #[error(transparent)]
    Control(#[from] stoa_control::Error),
    /// The memory cannot be served to other workers.
    #[error(transparent)]
    Transfer(#[from] stoa_transfer::TransferError),
    /// The system gives no threads to load with.
    #[error("no threads to load with: {0}")]
    Threads(#[source] std::io::Error),
    /// The metastore refused this worker.
    #[error("the metastore refuses worker {id}: {source}")]
    Refused {
        /// The worker.
        id: String,
        /// What it said.
        source: stoa_metastore::Error,
    },
    /// The worker stopped while somebody waited for it.
    #[error("worker {id} has stopped; start it again")]
    Stopped {
        /// The worker.
        id: String,
    },
    /// A table cannot be loaded as it is.
    #[error("{table} cannot be loaded: {reason}")]
    Table {
        /// Table and version.
        table: String,
        /// Why.
        reason: String,
    },
}

impl Error {
    /// Whether another process runs the worker of this cache directory.
    pub fn is_locked(&self) -> bool {
        matches!(self, Error::Cache(stoa_shm::Error::Locked { .. }))
    }
}
