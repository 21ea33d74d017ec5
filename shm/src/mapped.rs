//! Mapped segments, each mapped once a process, and the bytes of chunks inside them.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use crate::dir::{FileIdentity, Name, open_file};
use crate::format::hash;
use crate::index::check_range_in;
use crate::lock;
use crate::map::FileMap;
use crate::segment::SegmentGeometry;
use crate::types::{Miss, SegmentId};

/// Maps of this process by directory and segment. Weak: a segment is unmapped with its last user.
static OPENED: LazyLock<Mutex<Opened>> = LazyLock::new(Mutex::default);
type Opened = HashMap<(FileIdentity, SegmentId), Weak<SegmentMap>>;

/// Locks a mutex whose data are consistent between any two statements.
pub(crate) fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cache directory as a reader knows it.
#[derive(Clone, Debug)]
pub(crate) struct DirPlace {
    pub(crate) path: PathBuf,
    pub(crate) identity: FileIdentity,
}

/// One mapped segment. Its bytes stay what they are until the last owner is dropped, whatever
/// happens to the segment's name, to the writer, or to other readers.
///
/// The file's descriptor is closed after mapping: a cache of 64 GiB has a thousand segments, and
/// processes are often limited to 1,024 descriptors. The mapping alone keeps the read lock by which
/// the writer sees that the memory is in use.
#[derive(Debug)]
pub struct SegmentMap {
    geometry: SegmentGeometry,
    map: FileMap,
    /// Offsets of the chunks whose checksum this process has compared.
    verified: Mutex<HashSet<u64>>,
    /// Whether some thread has begun to populate it.
    populated: AtomicBool,
}

/// How much of a segment is populated at a time: faults of queries wait for no more.
const POPULATE_BYTES: usize = 4 << 20;

impl SegmentMap {
    /// The segment.
    pub fn id(&self) -> SegmentId {
        self.geometry.id
    }

    /// All of its bytes: header, chunks and footer.
    pub fn bytes(&self) -> &[u8] {
        self.map.bytes()
    }

    /// The map of a segment: this process's, if it has one, else a new one. `file_bytes` is the
    /// size that the index knows.
    pub(crate) fn shared(
        dir: &DirPlace,
        id: SegmentId,
        file_bytes: Option<u64>,
    ) -> Result<Arc<SegmentMap>, Miss> {
        let mut opened = guard(&OPENED);
        let place = (dir.identity, id);
        let map = match opened.get(&place).and_then(Weak::upgrade) {
            Some(map) => map,
            None => {
                let map = Arc::new(SegmentMap::open(&dir.path, id)?);
                if opened.len()
                    >= 2 * opened.values().filter(|map| map.strong_count() > 0).count() + 16
                {
                    opened.retain(|_, map| map.strong_count() > 0);
                }
                opened.insert(place, Arc::downgrade(&map));
                map
            }
        };
        drop(opened);
        match file_bytes {
            Some(expected) if expected != map.geometry.file_bytes => Err(Miss::Corrupt(format!(
                "segment {id} has {} bytes, the index expects {expected}",
                map.geometry.file_bytes
            ))),
            _ => Ok(map),
        }
    }

    fn open(dir: &Path, id: SegmentId) -> Result<SegmentMap, Miss> {
        let path = dir.join(Name::Segment(id).to_string());
        let gone = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => Miss::SegmentGone,
            _ => Miss::Corrupt(format!("cannot open segment {id}: {error}")),
        };
        let file = open_file(&path).map_err(gone)?;
        if let Err(error) = lock::try_read_lock(&file) {
            // Without the lock the writer cannot see that this memory is in use; the bytes are as
            // safe as with it.
            tracing::debug!(%id, %error, "no read lock on a segment");
        }
        let metadata = file.metadata().map_err(gone)?;
        // The writer renames before it looks for locks: either it sees ours, or we see the rename.
        let named = std::fs::symlink_metadata(&path).map_err(gone)?;
        if FileIdentity::from(&named) != FileIdentity::from(&metadata) {
            return Err(Miss::SegmentGone);
        }
        if !metadata.is_file() {
            return Err(Miss::Corrupt(format!("segment {id} is not a file")));
        }
        let map = FileMap::new(&file, metadata.len()).map_err(gone)?;
        let geometry = SegmentGeometry::parse(&path, map.bytes(), id)
            .map_err(|error| Miss::Corrupt(error.to_string()))?;
        Ok(SegmentMap {
            geometry,
            map,
            verified: Mutex::default(),
            populated: AtomicBool::new(false),
        })
    }

    /// Touches all pages, once a process. Without effect on a kernel that cannot (before 5.14).
    pub(crate) fn populate(&self) {
        if self.populated.swap(true, Ordering::Relaxed) {
            return;
        }
        let bytes = self.map.bytes().len();
        for start in (0..bytes).step_by(POPULATE_BYTES) {
            let length = POPULATE_BYTES.min(bytes - start);
            if let Err(error) = self.map.populate(start, length) {
                tracing::debug!(id = %self.id(), %error, "segment not populated ahead of use");
                return;
            }
        }
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        self.geometry.file_bytes
    }

    /// The bytes of a range that is inside of the data; with `checksum`, compares it the first time.
    pub(crate) fn chunk(
        self: &Arc<Self>,
        offset: u64,
        length: u64,
        checksum: Option<u64>,
    ) -> Result<ChunkBytes, Miss> {
        check_range_in(offset, length, self.geometry.id, self.geometry.data_end)
            .map_err(|problem| Miss::Corrupt(format!("corrupt index entry: {problem}")))?;
        let chunk = ChunkBytes {
            owner: Arc::clone(self),
            offset: offset as usize,
            length: length as usize,
        };
        if let Some(expected) = checksum
            && !guard(&self.verified).contains(&offset)
        {
            check_bytes(&chunk, expected).map_err(|problem| {
                Miss::Corrupt(format!("{problem} at {offset} of segment {}", self.id()))
            })?;
            guard(&self.verified).insert(offset);
        }
        Ok(chunk)
    }
}

/// Compares bytes with their checksum.
pub(crate) fn check_bytes(bytes: &[u8], expected: u64) -> Result<(), String> {
    let found = hash(bytes);
    if found == expected {
        return Ok(());
    }
    Err(format!(
        "checksum of {} bytes is {found:#018x}, expected {expected:#018x}",
        bytes.len()
    ))
}

/// Immutable bytes inside of a mapped segment, which they keep mapped.
#[derive(Clone)]
pub struct ChunkBytes {
    owner: Arc<SegmentMap>,
    offset: usize,
    length: usize,
}

impl ChunkBytes {
    /// What keeps the bytes mapped, for buffers that borrow from them by address.
    pub fn owner(&self) -> Arc<SegmentMap> {
        Arc::clone(&self.owner)
    }

    /// A part of the bytes, in the same mapping.
    ///
    /// # Panics
    /// If the range is not inside of the bytes.
    pub fn slice(&self, range: Range<usize>) -> ChunkBytes {
        assert!(
            range.start <= range.end && range.end <= self.length,
            "range {range:?} is not inside of {} bytes",
            self.length
        );
        ChunkBytes {
            owner: self.owner(),
            offset: self.offset + range.start,
            length: range.end - range.start,
        }
    }
}

impl Deref for ChunkBytes {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        &self.owner.bytes()[self.offset..self.offset + self.length]
    }
}

/// Opens whole sealed segments of one cache directory, for those who hand their bytes on.
#[derive(Clone, Debug)]
pub struct SegmentFiles {
    dir: DirPlace,
}

impl SegmentFiles {
    pub(crate) fn new(dir: DirPlace) -> SegmentFiles {
        SegmentFiles { dir }
    }

    /// Maps a sealed segment. Like any reader's, the map keeps the memory of a retired segment:
    /// let go of what [`CacheWriter::live_segments`](crate::CacheWriter::live_segments) no longer
    /// names.
    ///
    /// # Errors
    /// [`Miss::SegmentGone`], [`Miss::Corrupt`].
    pub fn map(&self, id: SegmentId) -> Result<Arc<SegmentMap>, Miss> {
        SegmentMap::shared(&self.dir, id, None)
    }

    /// A descriptor of the segment that `map` maps, from which the kernel can send; `None` if it
    /// was retired meanwhile.
    pub fn file(&self, map: &SegmentMap) -> Option<File> {
        let file = open_file(&self.dir.path.join(Name::Segment(map.id()).to_string())).ok()?;
        // Names are never used twice, so a file under this one that has the size is that segment.
        let bytes = file.metadata().ok()?.len();
        (bytes == map.file_bytes()).then_some(file)
    }
}

impl AsRef<[u8]> for SegmentMap {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl AsRef<[u8]> for ChunkBytes {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for ChunkBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkBytes")
            .field("segment", &self.owner.id())
            .field("offset", &self.offset)
            .field("length", &self.length)
            .finish()
    }
}
