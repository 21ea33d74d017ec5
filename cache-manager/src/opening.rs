//! Taking a cache directory over: its lock at once, what is in it when somebody needs it.

use stoa_shm::counters::AccessCounters;
use stoa_shm::{CacheDir, CacheDirOptions, Handover, Ownership};

use crate::error::Result;
use crate::settings::WorkerSettings;
use crate::store::{Limits, Store};

/// What an operator should know, by the name of the problem.
pub(crate) type Notes = Vec<(&'static str, String)>;

/// A directory of which this process is the worker, and which it has not looked into.
pub(crate) struct Opening {
    ownership: Ownership,
}

impl Opening {
    /// Makes the directory if it is missing, and becomes its worker. Costs the same whatever is in
    /// it.
    ///
    /// # Errors
    /// [`Error::Cache`](crate::Error::Cache): it is not safe, or has another worker.
    pub(crate) fn take(settings: &WorkerSettings) -> Result<Opening> {
        let options = CacheDirOptions {
            allow_non_tmpfs: settings.allow_non_tmpfs,
            group_access: settings.group_access,
        };
        let dir = CacheDir::create(&settings.cache_dir, options)?;
        let ownership = Ownership::take(dir)?;
        Ok(Opening { ownership })
    }

    pub(crate) fn dir(&self) -> &CacheDir {
        self.ownership.dir()
    }

    /// How the last worker left it.
    pub(crate) fn left(&self) -> Option<Handover> {
        self.ownership.left()
    }

    /// Bytes that may be held at the most, whatever others take: for plans, which should not change
    /// with every file that somebody else writes.
    pub(crate) fn capacity_at_most(&self, settings: &WorkerSettings) -> u64 {
        let space = self.dir().space();
        space.map_or(settings.capacity_bytes, |space| {
            settings.capacity_bytes.min(space.total_bytes)
        })
    }

    /// Takes stock of what is in it; returns also what an operator should know about it.
    ///
    /// # Errors
    /// [`Error::Cache`](crate::Error::Cache).
    pub(crate) fn open(self, settings: &WorkerSettings) -> Result<(Store, Notes)> {
        let mut notes = Vec::new();
        let (writer, recovery) = self.ownership.open()?;
        if let Err(error) = AccessCounters::create(writer.dir()) {
            notes.push(("counters", format!("accesses are not counted: {error}")));
        }
        let space = writer.dir().space()?;
        let memory = writer.memory()?;
        let there = space.available_bytes.saturating_add(memory.total_bytes());
        if there < settings.capacity_bytes {
            notes.push((
                "capacity",
                format!(
                    "cache.size is {} bytes, but {} leaves only {there}; what fits is loaded",
                    settings.capacity_bytes, space.limit
                ),
            ));
        }
        if !recovery.dropped.is_empty() {
            let first = &recovery.dropped[0];
            tracing::warn!(
                count = recovery.dropped.len(),
                first = first.what,
                reason = first.reason,
                "damaged parts of the cache are loaded again"
            );
        }
        tracing::info!(
            dir = %settings.cache_dir.display(),
            chunks = recovery.chunks.len(),
            adopted = recovery.adopted.len(),
            hashed_bytes = recovery.hashed_bytes,
            generation = writer.generation(),
            "cache directory taken over"
        );
        let limits = Limits {
            capacity_bytes: settings.capacity_bytes,
        };
        Ok((Store::new(writer, recovery, limits), notes))
    }
}
