//! A view of the bytes of a directory that trusts nothing.

use std::fmt;
use std::path::Path;

use crate::dir::DIRECTORY_NAME;
use crate::error::{Error, Result};
use crate::format::{
    DIRECTORY_MAGIC, DirectoryHeader, FileSlot, HeldSlot, HolderRow, SLOT_USED, WorkerRow,
    check_preamble, check_section, hash,
};
use crate::index::{FileId, check_range, chunk_hash, probe};
use crate::map::FileMap;
use crate::types::{ChunkLocation, SegmentId};

/// A worker that holds chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct HoldingWorker {
    /// Its id in the cluster.
    pub id: String,
    /// The incarnation of its cache directory: part of the name of each of its segments.
    pub incarnation: u64,
    /// `host:port` of each way to its memory, the preferred one first.
    pub addresses: Vec<String>,
}

/// Somebody who has a chunk, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder<'a> {
    /// Who.
    pub worker: &'a HoldingWorker,
    /// Where in its memory.
    pub location: ChunkLocation,
}

/// The bytes of a directory.
enum Bytes {
    Mapped(FileMap),
    Owned(Vec<u8>),
}

impl Bytes {
    #[inline]
    fn get(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map.bytes(),
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// What workers hold, as one directory says. Immutable; a lookup costs about as much as one in the
/// index, whatever the number of chunks.
pub struct Directory {
    /// `None` where there is no directory, or none that can be used.
    read: Option<(Bytes, DirectoryHeader)>,
    /// By row; `None` for a damaged one.
    workers: Vec<Option<HoldingWorker>>,
}

impl Default for Directory {
    fn default() -> Directory {
        Directory::empty()
    }
}

impl fmt::Debug for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Directory")
            .field("revision", &self.revision())
            .field("chunks", &self.chunk_count())
            .field("workers", &self.workers)
            .finish()
    }
}

impl Directory {
    /// A directory in which nobody holds anything.
    pub fn empty() -> Directory {
        Directory {
            read: None,
            workers: Vec::new(),
        }
    }

    /// The directory in this cache directory. Never fails: one that is missing or cannot be used is
    /// empty. [`DirectoryReader`](crate::DirectoryReader) follows it as it is replaced.
    pub fn open(cache: impl AsRef<Path>) -> std::sync::Arc<Directory> {
        crate::DirectoryReader::open(cache).current()
    }

    /// The directory that these bytes are.
    ///
    /// # Errors
    /// What is wrong with header, geometry or version.
    pub fn parse(bytes: Vec<u8>) -> Result<Directory> {
        Directory::new(Path::new("holdings"), Bytes::Owned(bytes))
    }

    pub(crate) fn map(path: &Path, map: FileMap) -> Result<Directory> {
        Directory::new(path, Bytes::Mapped(map))
    }

    fn new(path: &Path, bytes: Bytes) -> Result<Directory> {
        let all = bytes.get();
        check_preamble(path, all, DIRECTORY_MAGIC, DirectoryHeader::BYTES)?;
        let header = DirectoryHeader::read_checked(all, 0).ok_or_else(|| {
            Error::corrupt(path, "check of the directory's header does not match")
        })?;
        if header.file_bytes != all.len() as u64 {
            return Err(Error::corrupt(
                path,
                format!(
                    "file has {} bytes, expected {}",
                    all.len(),
                    header.file_bytes
                ),
            ));
        }
        let sections = [
            (
                "file table",
                header.file_slots_offset,
                u64::from(header.file_slots),
                FileSlot::BYTES,
            ),
            (
                "chunk table",
                header.chunk_slots_offset,
                u64::from(header.chunk_slots),
                HeldSlot::BYTES,
            ),
            (
                "holder table",
                header.holders_offset,
                u64::from(header.holders),
                HolderRow::BYTES,
            ),
            (
                "worker table",
                header.workers_offset,
                u64::from(header.workers),
                WorkerRow::BYTES,
            ),
            (
                "string area",
                header.strings_offset,
                header.strings_bytes,
                1,
            ),
        ];
        let from = DirectoryHeader::BYTES as u64;
        for (what, offset, rows, row_bytes) in sections {
            check_section(
                what,
                offset,
                rows,
                row_bytes as u64,
                from,
                header.file_bytes,
            )
            .map_err(|problem| Error::corrupt(path, problem))?;
        }
        let mut directory = Directory {
            read: Some((bytes, header)),
            workers: Vec::new(),
        };
        // No two of them share bytes, so they cannot be more than there are: else a small directory
        // could ask for any amount of memory of who copies them.
        let mut texts = 0;
        for at in 0..header.workers {
            let worker = directory.read_worker(at);
            texts += worker.as_ref().map_or(0, |(_, bytes)| *bytes);
            if texts > header.strings_bytes {
                return Err(Error::corrupt(path, "texts of workers overlap"));
            }
            directory.workers.push(worker.map(|(worker, _)| worker));
        }
        if matches!(directory.read, Some((Bytes::Owned(_), _))) {
            // From somebody else. Here it is written from what was checked so.
            let slots = (0..header.file_slots).map(|at| {
                let row = directory.row(header.file_slots_offset, at, FileSlot::BYTES);
                FileSlot::read(row)
            });
            let keys = slots
                .filter(|slot| slot.state == SLOT_USED)
                .map(|slot| u64::from(slot.key_bytes));
            if keys.sum::<u64>() > header.strings_bytes {
                return Err(Error::corrupt(path, "keys of files overlap"));
            }
        }
        Ok(directory)
    }

    fn header(&self) -> Option<&DirectoryHeader> {
        self.read.as_ref().map(|(_, header)| header)
    }

    /// Tells this state of the directory from others; 0 for an empty one.
    pub fn revision(&self) -> u64 {
        self.header().map_or(0, |header| header.revision)
    }

    /// Chunks that somebody holds.
    pub fn chunk_count(&self) -> u64 {
        self.header().map_or(0, |header| u64::from(header.chunks))
    }

    /// The workers that hold something, or could.
    pub fn workers(&self) -> impl Iterator<Item = &HoldingWorker> {
        self.workers.iter().flatten()
    }

    /// Row `at` of the section at `offset`; inside of the file because the geometry was checked.
    #[inline]
    fn row(&self, offset: u64, at: u32, row_bytes: usize) -> &[u8] {
        let bytes = self.read.as_ref().map_or(&[][..], |(bytes, _)| bytes.get());
        let start = offset as usize + at as usize * row_bytes;
        &bytes[start..start + row_bytes]
    }

    /// Interned bytes, if they lie in the string area.
    fn string(&self, offset: u64, length: u32) -> Option<&[u8]> {
        let (bytes, header) = self.read.as_ref()?;
        let end = offset.checked_add(u64::from(length))?;
        let area = header.strings_offset..header.strings_offset + header.strings_bytes;
        (offset >= area.start && end <= area.end)
            .then(|| &bytes.get()[offset as usize..end as usize])
    }

    /// The worker of a row, and how many bytes its texts have.
    fn read_worker(&self, at: u32) -> Option<(HoldingWorker, u64)> {
        let header = self.header()?;
        let row = self.row(header.workers_offset, at, WorkerRow::BYTES);
        let found = WorkerRow::read(row);
        let id = self.string(found.id_offset, found.id_bytes)?;
        WorkerRow::read_checked(row, hash(id))?;
        let text = |bytes: &[u8]| Some(str::from_utf8(bytes).ok()?.to_owned());
        let addresses = text(self.string(found.addresses_offset, found.addresses_bytes)?)?;
        let bytes = u64::from(found.id_bytes) + u64::from(found.addresses_bytes);
        let worker = HoldingWorker {
            id: text(id)?,
            incarnation: found.incarnation,
            addresses: addresses.lines().map(str::to_owned).collect(),
        };
        Some((worker, bytes))
    }

    /// The file whose identity is exactly `key`, if anybody holds any of its chunks. It means
    /// nothing to another directory.
    pub fn file(&self, key: &[u8]) -> Option<FileId> {
        let header = self.header()?;
        let key_hash = hash(key);
        for slot in probe(key_hash, header.file_slots, header.file_probe_max) {
            let row = self.row(header.file_slots_offset, slot, FileSlot::BYTES);
            let found = FileSlot::read(row);
            if found.state == 0 {
                return None;
            }
            if found.key_hash == key_hash
                && FileSlot::read_checked(row, 0).is_some()
                && self.string(found.key_offset, found.key_bytes) == Some(key)
            {
                return Some(FileId { slot, key_hash });
            }
        }
        None
    }

    /// Who holds a chunk: nobody where it is not known, and nobody damaged.
    pub fn lookup<'a>(
        &'a self,
        file: &[u8],
        row_group: u32,
        column: u32,
    ) -> impl Iterator<Item = Holder<'a>> + use<'a> {
        self.file(file)
            .into_iter()
            .flat_map(move |file| self.lookup_in(file, row_group, column))
    }

    /// [`Directory::lookup`] for a file that was looked up before.
    pub fn lookup_in(
        &self,
        file: FileId,
        row_group: u32,
        column: u32,
    ) -> impl Iterator<Item = Holder<'_>> {
        self.find(file, row_group, column)
            .into_iter()
            .flat_map(move |slot| self.holders_of(file, slot))
    }

    #[inline]
    fn find(&self, file: FileId, row_group: u32, column: u32) -> Option<HeldSlot> {
        let header = self.header()?;
        let hash = chunk_hash(file.key_hash, row_group, column);
        for slot in probe(hash, header.chunk_slots, header.chunk_probe_max) {
            let row = self.row(header.chunk_slots_offset, slot, HeldSlot::BYTES);
            let found = HeldSlot::read(row);
            if found.state == 0 {
                return None;
            }
            if found.file == file.slot && found.row_group == row_group && found.column == column {
                return HeldSlot::read_checked(row, file.key_hash)
                    .filter(|found| found.state == SLOT_USED);
            }
        }
        None
    }

    fn holders_of(&self, file: FileId, slot: HeldSlot) -> impl Iterator<Item = Holder<'_>> {
        let seed = chunk_hash(file.key_hash, slot.row_group, slot.column);
        let (offset, rows) = self
            .header()
            .map_or((0, 0), |header| (header.holders_offset, header.holders));
        let end = slot
            .holder
            .saturating_add(u32::from(slot.holders))
            .min(rows);
        (slot.holder.min(end)..end).filter_map(move |at| {
            let row = self.row(offset, at, HolderRow::BYTES);
            let found = HolderRow::read_checked(row, seed)?;
            check_range(found.offset, found.length).ok()?;
            Some(Holder {
                worker: self.workers.get(found.worker as usize)?.as_ref()?,
                location: ChunkLocation {
                    segment: SegmentId(found.segment),
                    offset: found.offset,
                    length: found.length,
                    form: found.form,
                    checksum: found.checksum,
                    rows: found.rows,
                },
            })
        })
    }

    /// Every intact chunk in no order: the file's key, row group, column, and who holds it.
    pub fn chunks(&self) -> impl Iterator<Item = (&[u8], u32, u32, Vec<Holder<'_>>)> {
        let slots = self.header().map_or(0, |header| header.chunk_slots);
        (0..slots).filter_map(|at| {
            let header = self.header()?;
            let row = self.row(header.chunk_slots_offset, at, HeldSlot::BYTES);
            let found = HeldSlot::read(row);
            if found.state != SLOT_USED || found.file >= header.file_slots {
                return None;
            }
            let file = self.row(header.file_slots_offset, found.file, FileSlot::BYTES);
            let file = FileSlot::read_checked(file, 0).filter(|file| file.state == SLOT_USED)?;
            let key = self.string(file.key_offset, file.key_bytes)?;
            let slot = HeldSlot::read_checked(row, file.key_hash)?;
            let id = FileId {
                slot: slot.file,
                key_hash: file.key_hash,
            };
            let holders = self.holders_of(id, slot).collect();
            Some((key, slot.row_group, slot.column, holders))
        })
    }
}

/// Where the directory of a cache lies.
pub(crate) fn path_in(cache: &Path) -> std::path::PathBuf {
    cache.join(DIRECTORY_NAME)
}
