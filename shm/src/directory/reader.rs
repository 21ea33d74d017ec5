//! Following the directory as the worker replaces it.

use std::io::ErrorKind as IoErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use crate::dir::{FileIdentity, check_for_reader, open_file};
use crate::directory::view::{Directory, path_in};
use crate::error::{Error, Result};
use crate::map::FileMap;
use crate::reader::{RETRY, may_pass};

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
    /// When to try again although nothing has changed there.
    again: Option<Instant>,
}

impl State {
    fn is(&self, seen: Seen) -> bool {
        self.seen == Some(seen) && self.again.is_none_or(|again| again > Instant::now())
    }
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
                    again: None,
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
            if state.is(seen) {
                return Arc::clone(&state.directory);
            }
        }
        let mut state = self
            .inner
            .state
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if !state.is(seen) {
            let repeated = state.seen == Some(seen);
            *state = self.inner.attach(repeated);
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
    /// Looks again. What fails `repeated`ly was warned of before.
    fn attach(&self, repeated: bool) -> State {
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
        let mut again = None;
        let directory = opened.unwrap_or_else(|error| {
            if !repeated {
                tracing::warn!(path = %self.path.display(), %error, "what other workers hold is not known");
            }
            again = may_pass(&error).then(|| Instant::now() + RETRY);
            Directory::empty()
        });
        State {
            seen: Some(seen),
            directory: Arc::new(directory),
            again,
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
