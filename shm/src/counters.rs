//! Access counters: a shared-memory object beside the cache that readers may write.
//!
//! They are hints. Nothing is decided on them that could make an answer wrong, counts may be lost,
//! and any process that may read the cache may write nonsense into them. The object outlives every
//! process until [`AccessCounters::remove`] or a reboot.
//!
//! Its bytes are described in `docs/format.md`. One of the two modules with `unsafe`.
#![allow(unsafe_code)]

use std::fmt;
use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::unistd::geteuid;
use shared_memory::{Shmem, ShmemConf, ShmemError};

use crate::dir::{CacheDir, FileIdentity};
use crate::error::{Error, Result};
#[cfg(test)]
use crate::format::FieldPlace;
use crate::format::hash;
use crate::index::Entry;
use crate::segment_writer::reserve;

/// Slots of a new object, which takes 8 MiB.
pub const COUNTER_SLOTS: u64 = 1 << 18;

/// First word of the object.
const MAGIC: u64 = u64::from_le_bytes(*b"STOACNTR");
/// Value of the published word; another layout gets another one.
const PUBLISHED: u64 = 1;

const MAGIC_AT: usize = 0;
const SLOTS_AT: usize = 8;
const RESERVED_AT: usize = 16;
const PUBLISHED_AT: usize = 56;
const HEADER_BYTES: usize = 64;
const TAG_AT: usize = 0;
const HITS_AT: usize = 8;
const ROWS_AT: usize = 16;
const SLOT_RESERVED_AT: usize = 24;
const SLOT_BYTES: usize = 32;

/// The fields of the object's header, for `docs/format.md`.
#[cfg(test)]
pub(crate) const HEADER_FIELDS: [FieldPlace; 4] = [
    ("magic", MAGIC_AT, 8),
    ("slots", SLOTS_AT, 8),
    ("reserved", RESERVED_AT, PUBLISHED_AT - RESERVED_AT),
    ("published", PUBLISHED_AT, HEADER_BYTES - PUBLISHED_AT),
];
/// The fields of a slot, for `docs/format.md`.
#[cfg(test)]
pub(crate) const SLOT_FIELDS: [FieldPlace; 4] = [
    ("tag", TAG_AT, 8),
    ("hits", HITS_AT, 8),
    ("rows", ROWS_AT, 8),
    ("reserved", SLOT_RESERVED_AT, SLOT_BYTES - SLOT_RESERVED_AT),
];
const _: () = {
    assert!(RESERVED_AT == SLOTS_AT + 8 && SLOT_RESERVED_AT == ROWS_AT + 8);
    assert!(HEADER_BYTES.is_multiple_of(SLOT_BYTES) && PUBLISHED_AT + 8 == HEADER_BYTES);
};

/// What was counted of one chunk since it was published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// How often it was used.
    pub hits: u64,
    /// Rows that were read of it.
    pub rows: u64,
}

/// The counters of a cache directory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AccessCounters {
    object: Arc<Object>,
}

struct Object {
    memory: Shmem,
    slots: u64,
}

// SAFETY: the mapping belongs to this value and is unmapped when it is dropped, on whichever thread.
// `Shmem` is not `Send` only because it holds the mapping's address.
unsafe impl Send for Object {}
// SAFETY: through `&Object` the mapping is accessed by `Object::word` only, which is atomic.
unsafe impl Sync for Object {}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object")
            .field("name", &self.memory.get_os_id())
            .field("slots", &self.slots)
            .finish()
    }
}

impl Object {
    /// The word at byte `at`, which must be a multiple of eight and inside of the object.
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(
            at.is_multiple_of(8) && at + 8 <= self.memory.len(),
            "word {at} of {}",
            self.memory.len()
        );
        // SAFETY: the mapping begins at a page and `at` is a multiple of eight, so the word is aligned;
        // the assertion keeps it inside of the mapping, which lives as long as `self`. Every process
        // accesses it as an atomic word of this size. Its memory was there when it was made or opened
        // (`allocate`, `inspect`), and still is unless somebody with the right to write the object gave
        // it back, which no version of Stoa does.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().add(at).cast::<u64>()) }
    }

    fn slot(&self, ordinal: u32) -> Option<usize> {
        let ordinal = u64::from(ordinal);
        (ordinal < self.slots).then(|| HEADER_BYTES + ordinal as usize * SLOT_BYTES)
    }

    /// Checks an object that some process made.
    fn checked(name: &str, memory: Shmem) -> Result<Object> {
        let refused = |problem: String| Error::Counters {
            name: name.to_string(),
            problem,
        };
        let bytes = memory.len();
        if bytes < HEADER_BYTES {
            return Err(refused(format!(
                "has {bytes} bytes, expected at least {HEADER_BYTES}"
            )));
        }
        let mut object = Object { memory, slots: 0 };
        // Pairs with the release in `create`: whoever sees the word sees what was written before it.
        let published = object.word(PUBLISHED_AT).load(Ordering::Acquire);
        if published != PUBLISHED {
            return Err(refused(format!(
                "layout {published}, expected {PUBLISHED}; 0 is an unfinished one"
            )));
        }
        let magic = object.word(MAGIC_AT).load(Ordering::Relaxed);
        if magic != MAGIC {
            return Err(refused(format!(
                "magic {magic:#018x}, expected {MAGIC:#018x}"
            )));
        }
        let slots = object.word(SLOTS_AT).load(Ordering::Relaxed);
        if slots > ((bytes - HEADER_BYTES) / SLOT_BYTES) as u64 {
            return Err(refused(format!("{slots} slots in {bytes} bytes")));
        }
        object.slots = slots;
        Ok(object)
    }
}

impl AccessCounters {
    /// The counters of a worker's directory: those that are there, else new ones of
    /// [`COUNTER_SLOTS`] slots. A directory that its group may read gets counters that its group may
    /// write.
    pub fn create(dir: &CacheDir) -> Result<AccessCounters> {
        AccessCounters::create_with(dir, COUNTER_SLOTS)
    }

    /// As [`AccessCounters::create`], with a number of slots. Chunks beyond it are not counted.
    pub fn create_with(dir: &CacheDir, slots: u64) -> Result<AccessCounters> {
        let name = object_name(dir.path());
        let refused = |problem: String| Error::Counters {
            name: name.clone(),
            problem,
        };
        if object_file(&name).exists() {
            let owner = geteuid().as_raw();
            inspect(&name, owner)?;
            match open_object(&name, owner) {
                Ok(object) => {
                    return Ok(AccessCounters {
                        object: Arc::new(object),
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "access counters are made anew");
                    std::fs::remove_file(object_file(&name))
                        .map_err(|error| refused(error.to_string()))?;
                }
            }
        }
        let bytes = usize::try_from(slots)
            .ok()
            .and_then(|slots| slots.checked_mul(SLOT_BYTES)?.checked_add(HEADER_BYTES))
            .ok_or_else(|| refused(format!("{slots} slots are too many")))?;
        let mut memory = ShmemConf::new()
            .os_id(&name)
            .size(bytes)
            .create()
            .map_err(|error| refused(format!("cannot create: {error}")))?;
        // Before the first access, and before it is kept: without memory it goes with `memory`.
        allocate(&object_file(&name), bytes)
            .map_err(|error| refused(format!("no memory for {bytes} bytes: {error}")))?;
        // It outlives this process: counts survive a restart of the worker.
        memory.set_owner(false);
        let object = Object { memory, slots };
        object.word(MAGIC_AT).store(MAGIC, Ordering::Relaxed);
        object.word(SLOTS_AT).store(slots, Ordering::Relaxed);
        share_with_group(dir.path(), &name)
            .map_err(|error| refused(format!("cannot share with the group: {error}")))?;
        // Last: pairs with the acquire in `checked`.
        object
            .word(PUBLISHED_AT)
            .store(PUBLISHED, Ordering::Release);
        Ok(AccessCounters {
            object: Arc::new(object),
        })
    }

    /// The counters of the cache in `path`, made by its worker.
    pub fn open(path: impl AsRef<Path>) -> Result<AccessCounters> {
        let path = path.as_ref();
        let name = name_of(path)?;
        let owner = std::fs::metadata(path)
            .map_err(|error| Error::io("inspect", path, error))?
            .uid();
        let object = open_object(&name, owner)?;
        Ok(AccessCounters {
            object: Arc::new(object),
        })
    }

    /// Removes the counters of the cache in `path`, if there are any.
    pub fn remove(path: impl AsRef<Path>) -> Result<()> {
        let name = name_of(path.as_ref())?;
        match std::fs::remove_file(object_file(&name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", &object_file(&name), error))
            }
            _ => Ok(()),
        }
    }

    /// Counts one use of a chunk, of which `rows` rows were read. A few nanoseconds.
    pub fn record(&self, entry: &Entry, rows: u64) {
        let Some(slot) = self.object.slot(entry.ordinal()) else {
            return;
        };
        let tag = self.object.word(slot + TAG_AT);
        // Relaxed throughout: each word is a hint of its own.
        let found = tag.load(Ordering::Relaxed);
        if found != entry.tag()
            && tag
                .compare_exchange(found, entry.tag(), Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            self.object.word(slot + HITS_AT).store(0, Ordering::Relaxed);
            self.object.word(slot + ROWS_AT).store(0, Ordering::Relaxed);
        }
        self.object
            .word(slot + HITS_AT)
            .fetch_add(1, Ordering::Relaxed);
        self.object
            .word(slot + ROWS_AT)
            .fetch_add(rows, Ordering::Relaxed);
    }

    /// What was counted of a chunk.
    pub fn counts(&self, entry: &Entry) -> Counts {
        match self.object.slot(entry.ordinal()) {
            Some(slot)
                if self.object.word(slot + TAG_AT).load(Ordering::Relaxed) == entry.tag() =>
            {
                Counts {
                    hits: self.object.word(slot + HITS_AT).load(Ordering::Relaxed),
                    rows: self.object.word(slot + ROWS_AT).load(Ordering::Relaxed),
                }
            }
            _ => Counts::default(),
        }
    }
}

/// Name of the object of a cache directory, given its absolute path.
fn object_name(path: &Path) -> String {
    format!(
        "/stoa-counters-{:016x}",
        hash(path.as_os_str().as_encoded_bytes())
    )
}

fn name_of(path: &Path) -> Result<String> {
    let absolute = path
        .canonicalize()
        .map_err(|error| Error::io("resolve cache directory", path, error))?;
    Ok(object_name(&absolute))
}

/// Where the C library keeps the object on Linux.
fn object_file(name: &str) -> PathBuf {
    PathBuf::from(format!("/dev/shm{name}"))
}

/// The object of the cache in `path`, as a file.
#[cfg(test)]
pub(crate) fn file_of(path: &Path) -> PathBuf {
    object_file(&name_of(path).expect("the cache directory is there"))
}

/// Gives the object all of its memory now: on a full tmpfs the first access to a page that has none is
/// a signal, for loads too.
fn allocate(path: &Path, bytes: usize) -> std::io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    Ok(reserve(&file, 0, bytes as u64)?)
}

/// Opens the object of this name, which must be `owner`'s and have all of its memory.
fn open_object(name: &str, owner: u32) -> Result<Object> {
    let refused = |problem: String| Error::Counters {
        name: name.to_string(),
        problem,
    };
    let (before, complete) = inspect(name, owner)?;
    if !complete {
        return Err(refused("not all of its memory is there".to_owned()));
    }
    let memory = ShmemConf::new().os_id(name).open().map_err(|error| {
        refused(match error {
            ShmemError::MapOpenFailed(code) => {
                let source = std::io::Error::from_raw_os_error(code as i32);
                format!("cannot open: {source}; the worker of the cache makes them")
            }
            other => format!("cannot open: {other}"),
        })
    })?;
    // Nobody but its owner can take this name from an object, so what has it before and after is
    // what was opened.
    let (after, _) = inspect(name, owner)?;
    if before != after {
        return Err(refused("was replaced while it was opened".to_owned()));
    }
    Object::checked(name, memory)
}

/// Which object has this name, and whether there is memory behind all of it. Anybody may make one of
/// this name first; only the cache's owner's is used.
fn inspect(name: &str, expected: u32) -> Result<(FileIdentity, bool)> {
    const BLOCK_BYTES: u64 = 512;
    let refused = |problem: String| Error::Counters {
        name: name.to_string(),
        problem,
    };
    let found = std::fs::symlink_metadata(object_file(name)).map_err(|error| {
        refused(format!(
            "cannot open: {error}; the worker of the cache makes them"
        ))
    })?;
    if found.uid() != expected {
        return Err(refused(format!(
            "owner uid {}, expected {expected}, the owner of the cache: remove it",
            found.uid()
        )));
    }
    let complete = found.blocks().saturating_mul(BLOCK_BYTES) >= found.len();
    Ok((FileIdentity::from(&found), complete))
}

/// Gives the object the directory's group, and write permission to it, if the directory is shared.
fn share_with_group(dir: &Path, name: &str) -> std::io::Result<()> {
    const GROUP_READS: u32 = 0o040;
    let metadata = std::fs::metadata(dir)?;
    if metadata.mode() & GROUP_READS != 0 {
        std::os::unix::fs::chown(object_file(name), None, Some(metadata.gid()))?;
        std::fs::set_permissions(object_file(name), PermissionsExt::from_mode(0o660))?;
    }
    Ok(())
}
