//! A cache directory of a test's own.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{Result, Tried};

/// A directory for one cache under /dev/shm. Dropping it removes the directory, and the counters
/// that lie beside it under its name.
#[derive(Debug)]
pub struct CacheDirectory {
    parent: TempDir,
}

impl CacheDirectory {
    /// Makes the place; the worker makes the cache directory itself.
    ///
    /// # Errors
    /// When /dev/shm cannot be written.
    pub fn new() -> Result<CacheDirectory> {
        let parent = tempfile::Builder::new()
            .prefix("stoa-test-")
            .tempdir_in("/dev/shm")
            .tried(|| "a directory under /dev/shm".to_owned())?;
        Ok(CacheDirectory { parent })
    }

    /// The cache directory.
    pub fn path(&self) -> PathBuf {
        self.parent.path().join("cache")
    }

    /// The directory that holds it.
    pub fn parent(&self) -> &Path {
        self.parent.path()
    }
}

impl Drop for CacheDirectory {
    fn drop(&mut self) {
        // Where there are none, or no cache was ever made, nothing is left behind either.
        let _ = stoa_shm::AccessCounters::remove(self.path());
    }
}
