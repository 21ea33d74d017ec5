//! Following the directory as the worker replaces it.

use std::io::ErrorKind as IoErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use crate::dir::{FileIdentity, check_for_reader, open_file};
use crate::directory::view::{Directory, path_in};
use crate::error::{Error, Result};
use crate::map::FileMap;

/// How often opening starts over because the directory was replaced meanwhile.
const ATTEMPTS: usize = 8;

/// Reads the directory of a cache that some worker may be replacing. Cheap to clone; clones share
/// what they have open.
#[derive(Clone, Debug)]
pub struct DirectoryReader {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    cache: PathBuf,
    path: PathBuf,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    /// What lay there when it was last looked at; `None` before the first look.
    seen: Option<Seen>,
    directory: Arc<Directory>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Nothing,
    Unreadable(IoErrorKind),
    File(FileIdentity, u64),
}

impl DirectoryReader {
    /// A reader of the directory in this cache directory, which may not exist yet. Never fails.
    pub fn open(cache: impl AsRef<Path>) -> DirectoryReader {
        let cache = std::path::absolute(&cache).unwrap_or_else(|_| cache.as_ref().to_path_buf());
        DirectoryReader {
            inner: Arc::new(Inner {
                path: path_in(&cache),
                cache,
                state: RwLock::new(State {
                    seen: None,
                    directory: Arc::new(Directory::empty()),
                }),
            }),
        }
    }

    /// The directory as it is now: one statx, and a mapping if it was replaced. One that is missing
    /// or cannot be used is empty; the latter is said once.
    pub fn current(&self) -> Arc<Directory> {
        let seen = look(&self.inner.path);
        {
            let state = self
                .inner
                .state
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            if state.seen == Some(seen) {
                return Arc::clone(&state.directory);
            }
        }
        let mut state = self
            .inner
            .state
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if state.seen != Some(seen) {
            *state = self.inner.attach();
        }
        Arc::clone(&state.directory)
    }
}

fn look(path: &Path) -> Seen {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => Seen::File(FileIdentity::from(&metadata), metadata.len()),
        Err(error) if error.kind() == IoErrorKind::NotFound => Seen::Nothing,
        Err(error) => Seen::Unreadable(error.kind()),
    }
}

impl Inner {
    fn attach(&self) -> State {
        let mut seen = look(&self.path);
        let mut opened = Ok(Directory::empty());
        for _ in 0..ATTEMPTS {
            if seen == Seen::Nothing {
                break;
            }
            opened = self.try_open();
            let now = look(&self.path);
            if now == seen {
                break;
            }
            seen = now;
        }
        let directory = opened.unwrap_or_else(|error| {
            tracing::warn!(path = %self.path.display(), %error, "what other workers hold is not known");
            Directory::empty()
        });
        State {
            seen: Some(seen),
            directory: Arc::new(directory),
        }
    }

    fn try_open(&self) -> Result<Directory> {
        let failed = |error| Error::io("open directory", &self.path, error);
        check_for_reader(&self.cache)?;
        let file = open_file(&self.path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(Error::corrupt(&self.path, "is not a file"));
        }
        let map = FileMap::new(&file, metadata.len()).map_err(failed)?;
        Directory::map(&self.path, map)
    }
}
