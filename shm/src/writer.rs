//! The writing side: one process a directory, one rename a generation.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nix::libc;

use crate::dir::{CacheDir, FileIdentity, Name, SEALED_MODE, open_file};
use crate::error::{Error, Result};
use crate::faults::{Step, reached};
use crate::format::aligned;
use crate::handover::{self, Handover, Left};
use crate::identity;
use crate::index::{Index, IndexedSegment, Wanted, check_range_in};
use crate::index_build::{IndexInput, build};
use crate::lock::WriteLock;
use crate::map::FileMap;
use crate::mapped::{DirPlace, SegmentFiles, guard};
use crate::reader::map_index;
use crate::recovery::{Recovered, recover};
use crate::segment_writer::{SegmentWriter, allocate, storage_error};
use crate::types::{ChunkKey, ChunkLocation, Generation, IndexContents, Recovery, SegmentId};

/// A sealed segment as its writer knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    pub(crate) file_bytes: u64,
    pub(crate) data_end: u64,
    /// Memory that the file takes.
    pub(crate) allocated: u64,
    /// Never named by a published index, and not given up: kept, though nothing refers to it.
    pub(crate) unpublished: bool,
}

/// Bytes that a mutant writes too late.
#[cfg(feature = "mutants")]
pub(crate) type Deferred = (File, Vec<(u64, Vec<u8>)>);

/// What the writer shares with segments under construction on other threads.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) dir: CacheDir,
    pub(crate) known: Mutex<BTreeMap<SegmentId, Known>>,
    next_segment: AtomicU64,
    /// The write lock that makes this process the writer.
    pub(crate) lock: Mutex<WriteLock>,
    #[cfg(feature = "mutants")]
    pub(crate) deferred: Mutex<Vec<Deferred>>,
}

impl Shared {
    /// A name that no segment of this directory ever had.
    pub(crate) fn take_segment_id(&self) -> Result<SegmentId> {
        #[cfg(feature = "mutants")]
        if crate::faults::Mutant::ReusedSegmentName.is_chosen() {
            let names = self.dir.names()?;
            let free = |id: &SegmentId| {
                !names.contains(&Name::Segment(*id)) && !names.contains(&Name::SegmentTemp(*id))
            };
            return Ok((1..).map(SegmentId).find(free).unwrap_or(SegmentId(1)));
        }
        Ok(SegmentId(self.next_segment.fetch_add(1, Ordering::Relaxed)))
    }
}

/// The index that has the name now.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) index: Index<FileMap>,
    pub(crate) identity: FileIdentity,
}

/// The one process that may change a cache directory.
///
/// Segments may be filled on several threads at once; publishing and reclaiming take turns. Dropping
/// the writer leaves the cache as it is, for readers and for the next writer.
#[derive(Debug)]
pub struct CacheWriter {
    pub(crate) shared: Arc<Shared>,
    pub(crate) place: DirPlace,
    generation: Generation,
    incarnation: u64,
    pub(crate) published: Option<Published>,
    /// Maps that keep live segments in memory, once asked to.
    pub(crate) pins: Mutex<Option<BTreeMap<SegmentId, FileMap>>>,
}

/// A directory that this process alone may change, of which it has looked at nothing yet.
///
/// Costs the same whatever the directory holds: what is in it, [`Ownership::open`] finds out.
#[derive(Debug)]
pub struct Ownership {
    dir: CacheDir,
    lock: WriteLock,
    left: Option<Left>,
}

impl Ownership {
    /// Becomes the one process that may change the directory.
    ///
    /// # Errors
    /// [`Error::Locked`] if another process is its writer.
    pub fn take(dir: CacheDir) -> Result<Ownership> {
        let lock = take_lock(&dir)?;
        let left = handover::read(&dir);
        Ok(Ownership { dir, lock, left })
    }

    /// The directory.
    pub fn dir(&self) -> &CacheDir {
        &self.dir
    }

    /// How the last writer left the directory; `None` where it is not known. Where the index is gone
    /// that it published, nothing of what it has done is there any more.
    pub fn left(&self) -> Option<Handover> {
        let left = self.left.map(|left| left.handover)?;
        let published = self.dir.index_path().exists();
        let carried_out = if published { left.carried_out } else { 0 };
        Some(Handover {
            carried_out,
            ..left
        })
    }

    /// Takes stock of what is in the directory: adopts sealed segments that no index names, and
    /// drops what is damaged, chunk by chunk. If anything published was damaged, a generation
    /// without it is published.
    ///
    /// Hashes only what the end of the last writer has left in doubt: what is published was
    /// verified when it was sealed. Otherwise it takes as long as listing the directory and
    /// reading the index.
    ///
    /// # Errors
    /// What the system says, and [`Error::NoSpace`] where not even a few bytes can be written.
    pub fn open(self) -> Result<(CacheWriter, Recovery)> {
        let Ownership { dir, lock, left } = self;
        let metadata = std::fs::metadata(dir.path())
            .map_err(|error| Error::io("inspect", dir.path(), error))?;
        let place = DirPlace {
            path: dir.path().to_path_buf(),
            identity: FileIdentity::from(&metadata),
        };
        let incarnation = identity::ensure(&dir)?;
        let doubt = handover::doubt(left.as_ref(), handover::boot_id(), dir.in_memory);
        let Recovered {
            published,
            surviving,
            mut recovery,
            known,
            next_segment,
            generation,
            damaged,
        } = recover(&dir, doubt)?;
        recovery.left = left.map(|left| left.handover);
        let mut writer = CacheWriter {
            shared: Arc::new(Shared {
                dir,
                known: Mutex::new(known),
                next_segment: AtomicU64::new(next_segment),
                lock: Mutex::new(lock),
                #[cfg(feature = "mutants")]
                deferred: Mutex::default(),
            }),
            place,
            generation,
            incarnation,
            published: published.map(|(index, identity)| Published { index, identity }),
            pins: Mutex::new(None),
        };
        // From here on a death is not an end in order.
        let at_work = Handover {
            carried_out: 0,
            in_order: false,
            ..recovery.left.unwrap_or_default()
        };
        if let Err(error) = writer.hand_over(&at_work) {
            tracing::debug!(%error, "cannot note that a writer is at work");
        }
        if damaged && let Err(error) = writer.publish(surviving) {
            // Readers go on with the damaged index, whose damage is a miss for them.
            tracing::warn!(%error, "cannot publish the cache without its damaged parts");
        }
        Ok((writer, recovery))
    }
}

impl CacheWriter {
    /// Becomes the writer of the directory and takes stock of what is in it, as
    /// [`Ownership::open`] does.
    ///
    /// # Errors
    /// [`Error::Locked`] if another process is its writer.
    pub fn open(dir: CacheDir) -> Result<(CacheWriter, Recovery)> {
        Ownership::take(dir)?.open()
    }

    /// Leaves word for the next writer of the directory.
    ///
    /// # Errors
    /// [`Error::NoSpace`], or what the system says. The next writer then knows nothing.
    pub fn hand_over(&self, handover: &Handover) -> Result<()> {
        handover::write(self.dir(), handover)
    }

    /// The directory.
    pub fn dir(&self) -> &CacheDir {
        &self.shared.dir
    }

    /// The generation published last; 0 if none was.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Names this directory among all that ever were: together with it, a segment's name never
    /// means other bytes. Drawn when the directory was made, and kept in it.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Opens sealed segments of this directory, published or not.
    pub fn segment_files(&self) -> SegmentFiles {
        SegmentFiles::new(self.place.clone())
    }

    /// Begins a segment that takes chunks of `capacity` bytes in total, each rounded up to
    /// [`CHUNK_ALIGN`](crate::CHUNK_ALIGN). Usually [`SEGMENT_BYTES`](crate::SEGMENT_BYTES).
    ///
    /// # Errors
    /// [`Error::NoSpace`] if that much memory is not there; nothing is left behind then.
    pub fn new_segment(&self, capacity: u64) -> Result<SegmentWriter> {
        SegmentWriter::new(Arc::clone(&self.shared), capacity)
    }

    /// Makes `contents` the current generation, in one step for every reader.
    ///
    /// # Errors
    /// [`Error::Location`] if something would be named that no sealed segment holds,
    /// [`Error::Duplicate`] for a key that occurs twice, [`Error::NoSpace`] if the index itself does
    /// not fit, [`Error::Locked`] if another process has become the writer because the lock's name
    /// was taken away. The current generation stays as it is after any error.
    pub fn publish(&mut self, contents: IndexContents) -> Result<Generation> {
        self.hold_lock()?;
        let segments = self.check_contents(&contents)?;
        let ordinals = assign_ordinals(
            self.published.as_ref().map(|published| &published.index),
            &contents.chunks,
        );
        let generation = self.generation + 1;
        let bytes = build(&IndexInput {
            generation,
            next_segment: self.shared.next_segment.load(Ordering::Relaxed),
            chunks: &contents.chunks,
            ordinals: &ordinals,
            catalogs: &contents.catalogs,
            segments: &segments,
        })?;
        let published = match self.write_index(&bytes) {
            Err(Error::NoSpace { .. }) => {
                self.reclaim()?;
                self.write_index(&bytes)?
            }
            done => done?,
        };
        self.commit()?;
        self.generation = generation;
        self.published = Some(published);
        reached(Step::IndexPublished);
        #[cfg(feature = "mutants")]
        self.write_deferred()?;
        {
            let mut known = guard(&self.shared.known);
            for segment in &segments {
                if let Some(known) = known.get_mut(&segment.id) {
                    known.unpublished = false;
                }
            }
        }
        self.reserve(bytes.len() as u64);
        if guard(&self.pins).is_some()
            && let Err(error) = self.pin()
        {
            tracing::warn!(%error, "the cache is not pinned any more");
        }
        Ok(generation)
    }

    pub(crate) fn index_segments(&self) -> impl Iterator<Item = IndexedSegment> + '_ {
        self.published
            .iter()
            .flat_map(|published| published.index.segments())
    }

    /// Checks that every location lies in a sealed segment, and sums up what is live in each.
    fn check_contents(&self, contents: &IndexContents) -> Result<Vec<IndexedSegment>> {
        let known = guard(&self.shared.known);
        let mut segments: BTreeMap<SegmentId, IndexedSegment> = BTreeMap::new();
        let mut name = |segment: SegmentId, offset: u64, length: u64, what: &dyn Fn() -> String| {
            let refused = |problem: String| Error::Location {
                what: what(),
                problem,
            };
            let known = known
                .get(&segment)
                .ok_or_else(|| refused(format!("segment {segment} is not a sealed segment")))?;
            check_range_in(offset, length, segment, known.data_end).map_err(refused)?;
            segments
                .entry(segment)
                .or_insert(IndexedSegment {
                    id: segment,
                    file_bytes: known.file_bytes,
                    live_bytes: 0,
                })
                .live_bytes += aligned(length).unwrap_or(length);
            Ok::<(), Error>(())
        };
        for (key, location) in &contents.chunks {
            name(location.segment, location.offset, location.length, &|| {
                key.readable()
            })?;
        }
        for (catalog, location) in &contents.catalogs {
            name(location.segment, location.offset, location.length, &|| {
                format!("catalog {catalog:?}")
            })?;
        }
        Ok(segments.into_values().collect())
    }

    /// Writes the next index beside the current one and reads it back.
    fn write_index(&self, bytes: &[u8]) -> Result<Published> {
        let dir = &self.shared.dir;
        let temp = dir.index_temp_path();
        let length = bytes.len() as u64;
        let file = open_index_temp(dir)?;
        let metadata = file
            .metadata()
            .map_err(|error| Error::io("inspect", &temp, error))?;
        let reserved = metadata.len().min(metadata.blocks() * 512);
        if reserved < length {
            allocate(dir, &temp, &file, reserved, length)?;
        }
        file.set_len(length)
            .map_err(|error| Error::io("shorten", &temp, error))?;
        file.write_all_at(bytes, 0)
            .map_err(|error| storage_error(dir, "write", &temp, length, error))?;
        file.set_permissions(PermissionsExt::from_mode(SEALED_MODE))
            .map_err(|error| Error::io("set the mode of", &temp, error))?;
        drop(file);
        let file = open_file(&temp).map_err(|error| Error::io("open", &temp, error))?;
        let metadata = file
            .metadata()
            .map_err(|error| Error::io("inspect", &temp, error))?;
        let index = map_index(&temp, &file, metadata.len())?;
        if index.bytes() != bytes {
            return Err(Error::corrupt(&temp, "differs from what was written"));
        }
        reached(Step::IndexWritten);
        Ok(Published {
            index,
            identity: FileIdentity::from(&metadata),
        })
    }

    /// The commit point: the written index gets the name. The one it replaces keeps another name, so
    /// that the memory of readers that still map it is seen.
    fn commit(&self) -> Result<()> {
        let dir = &self.shared.dir;
        let path = dir.index_path();
        let retired = dir.name_path(Name::IndexRetired(self.generation));
        if let Err(error) = ignore_missing(std::fs::remove_file(&retired))
            .and_then(|()| ignore_missing(std::fs::hard_link(&path, &retired)))
        {
            tracing::debug!(%error, "the replaced index gets no second name, its memory is not accounted");
        }
        std::fs::rename(dir.index_temp_path(), &path)
            .map_err(|error| Error::io("publish", &path, error))
    }

    /// Sets memory aside for the next index, so that a smaller generation can be published even when
    /// nothing is left. Goes without if there is none.
    fn reserve(&self, bytes: u64) {
        let dir = &self.shared.dir;
        let reserved = open_index_temp(dir)
            .and_then(|file| allocate(dir, &dir.index_temp_path(), &file, 0, bytes));
        if let Err(error) = reserved {
            tracing::debug!(%error, "no memory set aside for the next index");
            let _ = std::fs::remove_file(dir.index_temp_path());
        }
    }

    #[cfg(feature = "mutants")]
    fn write_deferred(&self) -> Result<()> {
        for (file, parts) in std::mem::take(&mut *guard(&self.shared.deferred)) {
            std::thread::sleep(std::time::Duration::from_millis(2));
            for (at, part) in parts {
                file.write_all_at(&part, at)
                    .map_err(|error| Error::io("write", self.dir().path(), error))?;
            }
        }
        Ok(())
    }
}

/// A published index with its file, for recovery.
pub(crate) type PublishedIndex = (Index<FileMap>, FileIdentity);

fn open_index_temp(dir: &CacheDir) -> Result<File> {
    let temp = dir.index_temp_path();
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temp)
    };
    open()
        .or_else(|error| match error.kind() {
            // A publication failed between completing the file and giving it the name.
            std::io::ErrorKind::PermissionDenied => {
                std::fs::remove_file(&temp).and_then(|()| open())
            }
            _ => Err(error),
        })
        .map_err(|error| storage_error(dir, "create", &temp, 0, error))
}

fn ignore_missing(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Takes the lock by which a directory has one writer, and notes who has it.
pub(crate) fn take_lock(dir: &CacheDir) -> Result<WriteLock> {
    let path = dir.lock_path();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(|error| storage_error(dir, "open", &path, 0, error))?;
    let lock = match WriteLock::take(file).map_err(|error| Error::io("lock", &path, error))? {
        Ok(lock) => lock,
        Err(file) => {
            let mut holder = String::new();
            let _ = file.take(32).read_to_string(&mut holder);
            let holder = holder.trim();
            let holder = if holder.is_empty() { "unknown" } else { holder }.to_string();
            return Err(Error::Locked {
                path: dir.path().to_path_buf(),
                holder,
            });
        }
    };
    // Only for the message above: a full file system does not keep the writer from starting.
    let note = lock
        .file()
        .set_len(0)
        .and_then(|()| writeln!(lock.file(), "{}", std::process::id()));
    if let Err(error) = note {
        tracing::debug!(%error, "cannot note the process id in the lock file");
    }
    Ok(lock)
}

/// Slots of the access counters: a chunk keeps the one it has, a new one gets the lowest free one.
fn assign_ordinals<B: AsRef<[u8]>>(
    current: Option<&Index<B>>,
    chunks: &[(ChunkKey, ChunkLocation)],
) -> Vec<u32> {
    let mut taken = vec![0u64; chunks.len() / 64 + 1];
    let mut take = |ordinal: u32| {
        let (word, bit) = (ordinal as usize / 64, 1 << (ordinal % 64));
        // Beyond as many slots as there are chunks an ordinal is not kept: they stay dense.
        let free = taken.get(word).is_some_and(|taken| taken & bit == 0);
        if free {
            taken[word] |= bit;
        }
        free
    };
    let mut kept: Vec<Option<u32>> = Vec::with_capacity(chunks.len());
    for (key, _) in chunks {
        let ordinal = current.and_then(|index| {
            let file = index.file(&key.file)?;
            Some(
                index
                    .lookup(&Wanted {
                        file,
                        row_group: key.row_group,
                        column: key.column,
                    })
                    .ok()?
                    .ordinal(),
            )
        });
        kept.push(ordinal.filter(|&ordinal| take(ordinal)));
    }
    let mut next = 0;
    kept.into_iter()
        .map(|ordinal| {
            ordinal.unwrap_or_else(|| {
                while !take(next) {
                    next += 1;
                }
                next
            })
        })
        .collect()
}
