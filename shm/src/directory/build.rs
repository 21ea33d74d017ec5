//! The bytes of a directory, by a pure function, and their way into the cache directory.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::sync::Arc;

use nix::libc;

use crate::dir::{CacheDir, DIRECTORY_NAME, DIRECTORY_TEMP_NAME, SEALED_MODE};
use crate::directory::view::HoldingWorker;
use crate::error::{Error, Result};
use crate::format::{
    DIRECTORY_MAGIC, DirectoryHeader, ENDIAN_MARK, FORMAT_MAJOR, FORMAT_MINOR, FileSlot, HeldSlot,
    HolderRow, SLOT_USED, WorkerRow, hash,
};
use crate::index::chunk_hash;
use crate::index_build::{
    ROWS_MAX, check_count, check_key_length, intern, place, put_row, slots_for,
};
use crate::segment_writer::storage_error;
use crate::types::{CHUNK_ALIGN, ChunkLocation, FILE_KEY_BYTES_MAX};

/// Most holders of one chunk that a directory names; more than that help nobody.
pub const HOLDERS_MAX: usize = 1024;
/// Longest id, and longest addresses, of a worker.
const WORKER_TEXT_BYTES_MAX: usize = 64 << 10;

/// One worker's copy of one chunk, for the time being.
#[derive(Clone, Copy, Debug)]
struct Held {
    file: u32,
    row_group: u32,
    column: u32,
    worker: u32,
    location: ChunkLocation,
}

/// Gathers what workers hold into a directory.
///
/// ```
/// use stoa_shm::directory::{Directory, DirectoryBuilder, HoldingWorker};
/// use stoa_shm::{ChunkLocation, SegmentId};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut builder = DirectoryBuilder::new();
/// let worker = builder.worker(HoldingWorker {
///     id: "node-2".into(),
///     incarnation: 77,
///     addresses: vec!["10.0.0.2:7420".into()],
/// });
/// let location = ChunkLocation {
///     segment: SegmentId(5), offset: 64, length: 100, form: 1, checksum: 9, rows: 10,
/// };
/// builder.chunk(worker, b"s3://bucket/a.parquet etag=1", 0, 2, location);
/// let directory = Directory::parse(builder.build(1)?)?;
/// let holder = directory.lookup(b"s3://bucket/a.parquet etag=1", 0, 2).next().unwrap();
/// assert_eq!(holder.location, location);
/// assert_eq!(holder.worker.addresses, ["10.0.0.2:7420"]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct DirectoryBuilder {
    workers: Vec<HoldingWorker>,
    files: Vec<Arc<[u8]>>,
    file_numbers: HashMap<Arc<[u8]>, u32>,
    held: Vec<Held>,
}

impl DirectoryBuilder {
    /// A directory without workers.
    pub fn new() -> DirectoryBuilder {
        DirectoryBuilder::default()
    }

    /// Adds a worker and says how to name it in [`DirectoryBuilder::chunk`].
    pub fn worker(&mut self, worker: HoldingWorker) -> u32 {
        self.workers.push(worker);
        (self.workers.len() - 1) as u32
    }

    /// Adds a chunk that the worker holds; each chunk once a worker.
    pub fn chunk(
        &mut self,
        worker: u32,
        file: &[u8],
        row_group: u32,
        column: u32,
        location: ChunkLocation,
    ) {
        let file = match self.file_numbers.get(file) {
            Some(number) => *number,
            None => {
                let (key, number) = (Arc::<[u8]>::from(file), self.files.len() as u32);
                self.files.push(Arc::clone(&key));
                self.file_numbers.insert(key, number);
                number
            }
        };
        self.held.push(Held {
            file,
            row_group,
            column,
            worker,
            location,
        });
    }

    /// The bytes of the directory. `revision` tells it from other states.
    ///
    /// # Errors
    /// [`Error::TooMany`] and [`Error::KeyLength`] for what the format does not hold.
    pub fn build(mut self, revision: u64) -> Result<Vec<u8>> {
        check_count("holders", self.held.len())?;
        check_count("workers", self.workers.len())?;
        // Behind one another, so that a chunk names its holders by the first and their number.
        self.held
            .sort_by_key(|held| (held.file, held.row_group, held.column, held.worker));
        let same =
            |a: &Held, b: &Held| (a.file, a.row_group, a.column) == (b.file, b.row_group, b.column);
        self.held
            .dedup_by(|a, b| same(a, b) && a.worker == b.worker);
        let chunks = self.held.chunk_by(same).count();

        let file_slots = slots_for(self.files.len());
        let chunk_slots = slots_for(chunks);
        let mut cursor = DirectoryHeader::BYTES as u64;
        let mut section = |rows: u64, row_bytes: usize| {
            let at = cursor;
            cursor = (cursor + rows * row_bytes as u64).next_multiple_of(CHUNK_ALIGN);
            at
        };
        let file_slots_offset = section(u64::from(file_slots), FileSlot::BYTES);
        let chunk_slots_offset = section(u64::from(chunk_slots), HeldSlot::BYTES);
        let holders_offset = section(self.held.len() as u64, HolderRow::BYTES);
        let workers_offset = section(self.workers.len() as u64, WorkerRow::BYTES);
        let strings_offset = section(0, 1);
        let mut bytes = vec![0; strings_offset as usize];
        let mut strings = Vec::new();

        let mut file_places = Vec::with_capacity(self.files.len());
        let mut file_probe_max = 0;
        for key in &self.files {
            check_key_length("file key", key.len(), FILE_KEY_BYTES_MAX)?;
            let key_hash = hash(key);
            let row = FileSlot {
                key_offset: intern(&mut strings, strings_offset, key),
                key_hash,
                key_bytes: key.len() as u32,
                state: SLOT_USED,
                ..FileSlot::default()
            };
            let slot = place(
                &mut bytes[file_slots_offset as usize..],
                FileSlot::BYTES,
                file_slots,
                key_hash,
                &row.to_bytes(0),
                &mut file_probe_max,
            );
            file_places.push((slot, key_hash));
        }

        let mut chunk_probe_max = 0;
        let mut first = 0;
        for holders in self.held.chunk_by(same) {
            let (slot, key_hash) = file_places[holders[0].file as usize];
            let (row_group, column) = (holders[0].row_group, holders[0].column);
            let chunk_hash = chunk_hash(key_hash, row_group, column);
            let row = HeldSlot {
                file: slot,
                row_group,
                column,
                holder: first as u32,
                holders: holders.len().min(HOLDERS_MAX) as u16,
                state: SLOT_USED,
                ..HeldSlot::default()
            };
            place(
                &mut bytes[chunk_slots_offset as usize..],
                HeldSlot::BYTES,
                chunk_slots,
                chunk_hash,
                &row.to_bytes(key_hash),
                &mut chunk_probe_max,
            );
            for (at, held) in holders.iter().enumerate() {
                let row = HolderRow {
                    worker: held.worker,
                    rows: held.location.rows,
                    segment: held.location.segment.0,
                    offset: held.location.offset,
                    length: held.location.length,
                    checksum: held.location.checksum,
                    form: held.location.form,
                    ..HolderRow::default()
                };
                put_row(
                    &mut bytes,
                    holders_offset,
                    first + at,
                    &row.to_bytes(chunk_hash),
                );
            }
            first += holders.len();
        }

        for (at, worker) in self.workers.iter().enumerate() {
            let addresses = worker.addresses.join("\n");
            check_key_length("worker id", worker.id.len(), WORKER_TEXT_BYTES_MAX)?;
            if addresses.len() > WORKER_TEXT_BYTES_MAX {
                return Err(Error::KeyLength {
                    what: "worker's addresses",
                    found: addresses.len(),
                    largest: WORKER_TEXT_BYTES_MAX,
                });
            }
            let row = WorkerRow {
                id_offset: intern(&mut strings, strings_offset, worker.id.as_bytes()),
                id_bytes: worker.id.len() as u32,
                addresses_bytes: addresses.len() as u32,
                addresses_offset: intern(&mut strings, strings_offset, addresses.as_bytes()),
                incarnation: worker.incarnation,
                ..WorkerRow::default()
            };
            put_row(
                &mut bytes,
                workers_offset,
                at,
                &row.to_bytes(hash(worker.id.as_bytes())),
            );
        }

        let strings_bytes = strings.len() as u64;
        bytes.append(&mut strings);
        bytes.resize(bytes.len().next_multiple_of(CHUNK_ALIGN as usize), 0);
        let header = DirectoryHeader {
            magic: DIRECTORY_MAGIC,
            format_major: FORMAT_MAJOR,
            format_minor: FORMAT_MINOR,
            endian_mark: ENDIAN_MARK,
            revision,
            file_bytes: bytes.len() as u64,
            file_slots_offset,
            file_slots,
            files: self.files.len() as u32,
            chunk_slots_offset,
            chunk_slots,
            chunks: chunks as u32,
            holders_offset,
            holders: self.held.len() as u32,
            chunk_probe_max,
            workers_offset,
            workers: self.workers.len() as u32,
            file_probe_max,
            strings_offset,
            strings_bytes,
            ..DirectoryHeader::default()
        };
        bytes[..DirectoryHeader::BYTES].copy_from_slice(&header.to_bytes(0));
        debug_assert!(self.held.len() <= ROWS_MAX);
        Ok(bytes)
    }
}

impl CacheDir {
    /// Puts a directory in the place of the one that is there, in one step for every reader. For the
    /// one process that is the cache directory's writer.
    ///
    /// # Errors
    /// [`Error::NoSpace`], and the directory that is there stays.
    pub fn write_directory(&self, bytes: &[u8]) -> Result<()> {
        let path = self.path().join(DIRECTORY_NAME);
        let temp = self.path().join(DIRECTORY_TEMP_NAME);
        let write = || {
            if let Err(error) = std::fs::remove_file(&temp)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                return Err(error);
            }
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&temp)?;
            file.write_all(bytes)?;
            file.set_permissions(PermissionsExt::from_mode(SEALED_MODE))?;
            drop(file);
            std::fs::rename(&temp, &path)
        };
        write().map_err(|error| {
            // Half of a directory is worth nothing, and takes memory.
            let _ = std::fs::remove_file(&temp);
            storage_error(self, "write", &path, bytes.len() as u64, error)
        })
    }
}
