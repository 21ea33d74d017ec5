//! The reading side: snapshots of the cache, and chunks in place.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind as IoErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use crate::dir::{FileIdentity, INDEX_NAME, check_for_reader, open_file};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{Entry, FileId, Index, Wanted};
use crate::lock;
use crate::map::FileMap;
use crate::mapped::{ChunkBytes, DirPlace, SegmentMap};
use crate::scrub;
use crate::types::{CatalogLocation, Generation, Miss, SegmentId, VerifyReport};

/// What [`ReaderOptions::retry`] is unless it is given.
pub(crate) const RETRY: Duration = Duration::from_secs(5);
/// How often attaching starts over because the index was replaced meanwhile.
const ATTACH_ATTEMPTS: usize = 8;

/// Whether a reader hashes what it maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Trust the worker, which hashes at sealing, at restart and in its scrub.
    #[default]
    Never,
    /// Hash each chunk when this process first opens it.
    FirstTouch,
}

/// How a cache is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReaderOptions {
    /// Whether chunks are hashed. Catalogs always are, at first touch.
    pub verify: Verify,
    /// Whether all segments of a new generation are mapped and their pages touched by a thread of
    /// its own, so that the first queries of a process do not wait for page faults.
    pub prefault: bool,
    /// How long a cache is left alone that could not be opened for a reason that may pass: no
    /// descriptor or memory for it, or a directory that somebody else may write to.
    pub retry: Duration,
}

impl Default for ReaderOptions {
    fn default() -> Self {
        ReaderOptions {
            verify: Verify::default(),
            prefault: false,
            retry: RETRY,
        }
    }
}

/// Reads a cache directory that some process may be writing. Cheap to clone; clones share their
/// snapshot.
///
/// A process that keeps a reader for long without scanning should call
/// [`snapshot`](CacheReader::snapshot) now and then: what it mapped of an older generation is
/// memory that the worker cannot use again.
#[derive(Clone, Debug)]
pub struct CacheReader {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    index_path: PathBuf,
    options: ReaderOptions,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    seen: Seen,
    snapshot: Arc<Snapshot>,
    /// An index that could not be used, kept open so that its inode number is not given to another.
    _broken: Option<File>,
    /// When to try again although nothing has changed there.
    again: Option<Instant>,
}

/// What lay at the index's name when it was last looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    NotLooked,
    Nothing,
    Unreadable(IoErrorKind),
    /// Which file, and its length: one truncated in place must not be trusted again.
    File(FileIdentity, u64),
}

impl CacheReader {
    /// A reader of the cache in `path`, which may not exist yet. Never fails: a cache that cannot
    /// be used is empty.
    pub fn open(path: impl AsRef<Path>) -> CacheReader {
        CacheReader::open_with(path, ReaderOptions::default())
    }

    /// As [`CacheReader::open`], with options.
    pub fn open_with(path: impl AsRef<Path>, options: ReaderOptions) -> CacheReader {
        let path = std::path::absolute(&path).unwrap_or_else(|_| path.as_ref().to_path_buf());
        let state = State {
            seen: Seen::NotLooked,
            snapshot: Arc::new(Snapshot::empty(options)),
            _broken: None,
            again: None,
        };
        CacheReader {
            inner: Arc::new(Inner {
                index_path: path.join(INDEX_NAME),
                path,
                options,
                state: RwLock::new(state),
            }),
        }
    }

    /// The cache directory.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The current generation: one statx of the index, and an attach if it was replaced. A broken
    /// index, or one of a newer format, is an empty snapshot and one warning.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        let inner = &*self.inner;
        let seen = match std::fs::symlink_metadata(&inner.index_path) {
            Ok(metadata) => Seen::File(FileIdentity::from(&metadata), metadata.len()),
            Err(error) if error.kind() == IoErrorKind::NotFound => Seen::Nothing,
            Err(error) => Seen::Unreadable(error.kind()),
        };
        {
            let state = read(&inner.state);
            if state.seen == seen && !state.is_due() {
                return Arc::clone(&state.snapshot);
            }
        }
        let mut state = write(&inner.state);
        if state.seen != seen || state.is_due() {
            let repeated = state.seen == seen;
            *state = inner.attach(&state.snapshot, repeated);
            if inner.options.prefault {
                prefault(&state.snapshot);
            }
        }
        Arc::clone(&state.snapshot)
    }
}

impl State {
    fn is_due(&self) -> bool {
        self.again.is_some_and(|again| again <= Instant::now())
    }
}

impl Inner {
    /// Looks again, and takes over from `old` what both generations name. What fails `repeated`ly
    /// was warned of before.
    fn attach(&self, old: &Snapshot, repeated: bool) -> State {
        match open_index(&self.path, &self.index_path) {
            Ok(Opened { dir, file, seen }) => match map_index(&self.index_path, &file, seen.1) {
                Ok(index) => State {
                    seen: Seen::File(seen.0, seen.1),
                    snapshot: Arc::new(Snapshot::new(dir, index, self.options, old)),
                    _broken: None,
                    again: None,
                },
                Err(error) => {
                    warn(&self.index_path, &error, repeated);
                    State {
                        seen: Seen::File(seen.0, seen.1),
                        snapshot: Arc::new(Snapshot::empty(self.options)),
                        _broken: Some(file),
                        again: self.again(&error),
                    }
                }
            },
            Err(error) => {
                // Seen as it is now, so that the warning is not repeated at every scan.
                let seen = match (&error, std::fs::symlink_metadata(&self.index_path)) {
                    (Error::Io { source, .. }, _) if source.kind() == IoErrorKind::NotFound => {
                        Seen::Nothing
                    }
                    (_, Ok(metadata)) => Seen::File(FileIdentity::from(&metadata), metadata.len()),
                    (_, Err(error)) => Seen::Unreadable(error.kind()),
                };
                if seen != Seen::Nothing {
                    warn(&self.index_path, &error, repeated);
                }
                State {
                    seen,
                    snapshot: Arc::new(Snapshot::empty(self.options)),
                    _broken: None,
                    again: self.again(&error).filter(|_| seen != Seen::Nothing),
                }
            }
        }
    }

    /// When to try again what failed so, if it may pass without the index being replaced.
    fn again(&self, error: &Error) -> Option<Instant> {
        may_pass(error).then(|| Instant::now() + self.options.retry)
    }
}

/// Touches what a snapshot names, in a thread that ends early when nobody needs it any more.
fn prefault(snapshot: &Arc<Snapshot>) {
    let wanted = Arc::downgrade(snapshot);
    let touch = move || {
        let segments = wanted.upgrade().map_or_else(Vec::new, |s| s.segment_ids());
        for id in segments {
            let Some(snapshot) = wanted.upgrade() else {
                return;
            };
            // A segment that is gone is a miss of whoever needs it.
            if let Ok(segment) = snapshot.segment(id) {
                drop(snapshot);
                segment.populate();
            }
        }
    };
    let thread = std::thread::Builder::new().name("stoa-prefault".to_owned());
    if let Err(error) = thread.spawn(touch) {
        tracing::debug!(%error, "no thread to touch the cache ahead of use");
    }
}

/// Whether a failure to open may be over although the file is what it was: that of the process or of
/// the directory's mode, not one of the bytes.
pub(crate) fn may_pass(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Io | ErrorKind::Configuration)
}

fn warn(path: &Path, error: &Error, repeated: bool) {
    if repeated {
        tracing::debug!(path = %path.display(), %error, "cache still not usable");
    } else {
        tracing::warn!(path = %path.display(), %error, "cache not usable, reading the origin");
    }
}

struct Opened {
    dir: DirPlace,
    file: File,
    seen: (FileIdentity, u64),
}

/// Opens and locks the index that has the name now.
fn open_index(dir: &Path, path: &Path) -> Result<Opened> {
    let failed = |error| Error::io("open index", path, error);
    let mut attempt = 0;
    loop {
        attempt += 1;
        check_for_reader(dir)?;
        let identity = FileIdentity::from(&std::fs::symlink_metadata(dir).map_err(failed)?);
        let file = open_file(path).map_err(failed)?;
        if let Err(error) = lock::try_read_lock(&file) {
            tracing::debug!(%error, "no read lock on the index");
        }
        let metadata = file.metadata().map_err(failed)?;
        let seen = FileIdentity::from(&metadata);
        // As for segments: either the writer sees our lock, or we see that the name has moved on.
        // Even then the file is a complete index, good enough if replacements do not pause.
        let named = std::fs::symlink_metadata(path).map_err(failed)?;
        if seen == FileIdentity::from(&named) || attempt == ATTACH_ATTEMPTS {
            if !metadata.is_file() {
                return Err(Error::corrupt(path, "is not a file"));
            }
            return Ok(Opened {
                dir: DirPlace {
                    path: dir.to_path_buf(),
                    identity,
                },
                file,
                seen: (seen, metadata.len()),
            });
        }
    }
}

/// Maps and checks an opened index.
pub(crate) fn map_index(path: &Path, file: &File, length: u64) -> Result<Index<FileMap>> {
    let map = FileMap::new(file, length).map_err(|error| Error::io("map index", path, error))?;
    Index::parse(path, map)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// One generation of the cache, unchanging for as long as it is held.
///
/// Segments are opened when first needed and stay open until the reader moves to a generation that
/// does not name them. An older snapshot may find that a segment is gone: a miss.
#[derive(Debug)]
pub struct Snapshot {
    /// `None` where there is no cache, or none that can be used.
    attached: Option<Attached>,
    segments: RwLock<HashMap<SegmentId, Arc<SegmentMap>>>,
    options: ReaderOptions,
    warned: AtomicBool,
}

#[derive(Debug)]
struct Attached {
    dir: DirPlace,
    index: Index<FileMap>,
}

impl Snapshot {
    fn empty(options: ReaderOptions) -> Snapshot {
        Snapshot {
            attached: None,
            segments: RwLock::default(),
            options,
            warned: AtomicBool::new(false),
        }
    }

    fn new(
        dir: DirPlace,
        index: Index<FileMap>,
        options: ReaderOptions,
        old: &Snapshot,
    ) -> Snapshot {
        let mut segments = HashMap::new();
        if old
            .attached
            .as_ref()
            .is_some_and(|old| old.dir.identity == dir.identity)
        {
            for (id, map) in read(&old.segments).iter() {
                if index
                    .segment(*id)
                    .is_some_and(|segment| segment.file_bytes == map.file_bytes())
                {
                    segments.insert(*id, Arc::clone(map));
                }
            }
        }
        Snapshot {
            attached: Some(Attached { dir, index }),
            segments: RwLock::new(segments),
            options,
            warned: AtomicBool::new(false),
        }
    }

    fn index(&self) -> Option<&Index<FileMap>> {
        self.attached.as_ref().map(|attached| &attached.index)
    }

    /// Its number; 0 if there is no cache, or none that can be used.
    pub fn generation(&self) -> Generation {
        self.index().map_or(0, Index::generation)
    }

    /// Chunks in it.
    pub fn chunk_count(&self) -> u64 {
        self.index().map_or(0, Index::chunk_count)
    }

    /// The file whose identity is exactly `key`, if any of its chunks is cached.
    pub fn file(&self, key: &[u8]) -> Option<FileId> {
        self.index()?.file(key)
    }

    /// The entry of a chunk; a damaged one is absent, with one warning a snapshot.
    pub fn lookup(&self, file: FileId, row_group: u32, column: u32) -> Option<Entry> {
        let wanted = Wanted {
            file,
            row_group,
            column,
        };
        let index = self.index()?;
        self.entry(index, index.slot(&wanted)?, file)
    }

    /// The entries of many chunks, in their order, as [`Snapshot::lookup`] gives them; they replace
    /// what `found` holds. Costs a quarter of as many lookups where the index is larger than the
    /// processor's caches.
    pub fn lookup_many(&self, wanted: &[Wanted], found: &mut Vec<Option<Entry>>) {
        found.clear();
        found.reserve(wanted.len());
        let Some(index) = self.index() else {
            found.resize(wanted.len(), None);
            return;
        };
        index.slots(wanted, |wanted, slot| {
            found.push(slot.and_then(|slot| self.entry(index, slot, wanted.file)));
        });
    }

    #[inline(always)]
    fn entry(&self, index: &Index<FileMap>, slot: u32, file: FileId) -> Option<Entry> {
        let entry = index.entry(slot, file);
        if entry.is_none() {
            self.warn_of(index, slot, file);
        }
        entry
    }

    #[cold]
    fn warn_of(&self, index: &Index<FileMap>, slot: u32, file: FileId) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            let miss = index.damage(slot, file);
            tracing::warn!(generation = self.generation(), %miss, "damaged cache index, counted as misses");
        }
    }

    /// The entry of a chunk, or why there is none.
    pub fn try_lookup(&self, file: FileId, row_group: u32, column: u32) -> Result<Entry, Miss> {
        self.index().ok_or(Miss::Absent)?.lookup(&Wanted {
            file,
            row_group,
            column,
        })
    }

    /// The bytes of a chunk, in place. They stay valid and unchanged as long as they are held.
    pub fn open_chunk(&self, entry: &Entry) -> Result<ChunkBytes, Miss> {
        let location = entry.location();
        let checksum = (self.options.verify == Verify::FirstTouch).then_some(location.checksum);
        self.segment(location.segment)?
            .chunk(location.offset, location.length, checksum)
    }

    /// Segments that it names.
    fn segment_ids(&self) -> Vec<SegmentId> {
        let segments = self.index().into_iter().flat_map(Index::segments);
        segments.map(|segment| segment.id).collect()
    }

    /// Names of the catalogs, in order.
    pub fn catalogs(&self) -> Vec<&str> {
        self.index()
            .into_iter()
            .flat_map(Index::catalogs)
            .filter_map(|found| Some(found.ok()?.0))
            .collect()
    }

    /// Where a catalog lies. Equal locations mean equal bytes, so this is the key under which to keep
    /// what was decoded from it, over generations.
    pub fn catalog_location(&self, name: &str) -> Option<CatalogLocation> {
        self.index()?.catalog(name)
    }

    /// The bytes of a catalog, whose checksum was compared; `None` if there is none of this name.
    pub fn catalog(&self, name: &str) -> Result<Option<ChunkBytes>, Miss> {
        match self.catalog_location(name) {
            None => Ok(None),
            Some(location) => self
                .segment(location.segment)?
                .chunk(location.offset, location.length, Some(location.checksum))
                .map(Some),
        }
    }

    /// File keys and entries of all intact chunks, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], Entry)> + '_ {
        self.index().into_iter().flat_map(Index::chunks)
    }

    /// Hashes everything the generation names, as a scrub that needs no right to write. Takes as
    /// long as reading it all.
    pub fn verify(&self) -> VerifyReport {
        match &self.attached {
            None => VerifyReport::default(),
            Some(attached) => scrub::verify(&attached.index, &attached.dir.path, None),
        }
    }

    fn segment(&self, id: SegmentId) -> Result<Arc<SegmentMap>, Miss> {
        if let Some(map) = read(&self.segments).get(&id) {
            return Ok(Arc::clone(map));
        }
        let attached = self.attached.as_ref().ok_or(Miss::Absent)?;
        let known = attached.index.segment(id).ok_or_else(|| {
            Miss::Corrupt(format!(
                "corrupt index entry: segment {id} is not in the index's segment table"
            ))
        })?;
        let map = SegmentMap::shared(&attached.dir, id, Some(known.file_bytes))?;
        Ok(Arc::clone(write(&self.segments).entry(id).or_insert(map)))
    }
}
