//! A segment under construction: a temporary file until it is complete.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};
use nix::libc;
use twox_hash::XxHash3_64;

use crate::dir::{CacheDir, Name, SEALED_MODE, open_file};
use crate::error::{Error, Result};
use crate::faults::{Step, reached};
use crate::format::{SegmentHeader, aligned};
use crate::index_build::check_key_length;
use crate::map::FileMap;
use crate::mapped::{check_bytes, guard};
use crate::segment::{Footer, SegmentGeometry};
use crate::types::{
    CATALOG_NAME_BYTES_MAX, CatalogLocation, ChunkKey, ChunkLocation, FILE_KEY_BYTES_MAX,
    SealedSegment, SegmentId,
};
use crate::writer::{Known, Shared};

/// Allocated at once for the footer, which is extended when it turns out larger.
const FOOTER_RESERVE_BYTES: u64 = 16 << 10;
/// Bytes that are hashed, then written while the processor still has them in its cache.
const PIECE_BYTES: usize = 128 << 10;
/// Largest segment: far beyond any chunk, far below overflow.
const CAPACITY_MAX: u64 = 1 << 44;

/// Writes the chunks of one new segment. Dropping it gives the segment up and its memory back.
#[derive(Debug)]
pub struct SegmentWriter {
    shared: Arc<Shared>,
    id: SegmentId,
    temp: PathBuf,
    /// `None` once sealed, so that dropping leaves the file alone.
    file: Option<File>,
    cursor: u64,
    data_end_max: u64,
    allocated: u64,
    footer: Footer,
    chunks: Vec<(ChunkKey, ChunkLocation)>,
    catalogs: Vec<(String, CatalogLocation)>,
    #[cfg(feature = "mutants")]
    deferred: Vec<(u64, Vec<u8>)>,
}

impl SegmentWriter {
    pub(crate) fn new(shared: Arc<Shared>, capacity: u64) -> Result<SegmentWriter> {
        let id = shared.take_segment_id()?;
        let temp = shared.dir.name_path(Name::SegmentTemp(id));
        let data_end_max = SegmentHeader::BYTES as u64
            + capacity
                .clamp(1, CAPACITY_MAX)
                .next_multiple_of(crate::CHUNK_ALIGN);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temp)
            .map_err(|error| storage_error(&shared.dir, "create", &temp, 0, error))?;
        let mut writer = SegmentWriter {
            shared,
            id,
            temp,
            file: Some(file),
            cursor: SegmentHeader::BYTES as u64,
            data_end_max,
            allocated: 0,
            footer: Footer::default(),
            chunks: Vec::new(),
            catalogs: Vec::new(),
            #[cfg(feature = "mutants")]
            deferred: Vec::new(),
        };
        // From here on dropping the writer removes the file, whatever fails.
        writer.allocate(data_end_max + FOOTER_RESERVE_BYTES)?;
        reached(Step::SegmentAllocated);
        Ok(writer)
    }

    /// The segment's name.
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// Whether nothing was appended.
    pub fn is_empty(&self) -> bool {
        self.footer.is_empty()
    }

    /// Length in bytes of the largest chunk that still fits.
    pub fn remaining(&self) -> u64 {
        self.data_end_max - self.cursor
    }

    /// Appends a chunk.
    ///
    /// # Errors
    /// [`Error::SegmentFull`] if it does not fit: seal this segment and begin another.
    pub fn append(
        &mut self,
        key: &ChunkKey,
        form: u8,
        rows: u32,
        bytes: &[u8],
    ) -> Result<ChunkLocation> {
        self.append_parts(key, form, rows, &[bytes])
    }

    /// Appends a chunk whose bytes come in several pieces.
    pub fn append_parts(
        &mut self,
        key: &ChunkKey,
        form: u8,
        rows: u32,
        parts: &[&[u8]],
    ) -> Result<ChunkLocation> {
        check_key_length("file key", key.file.len(), FILE_KEY_BYTES_MAX)?;
        let (offset, length, checksum) = self.write(parts)?;
        let location = ChunkLocation {
            segment: self.id,
            offset,
            length,
            form,
            checksum,
            rows,
        };
        self.footer.push_chunk(key, &location);
        self.chunks.push((key.clone(), location));
        reached(Step::ChunkWritten);
        Ok(location)
    }

    /// Appends a catalog.
    pub fn append_catalog(&mut self, name: &str, bytes: &[u8]) -> Result<CatalogLocation> {
        check_key_length("catalog name", name.len(), CATALOG_NAME_BYTES_MAX)?;
        let (offset, length, checksum) = self.write(&[bytes])?;
        let location = CatalogLocation {
            segment: self.id,
            offset,
            length,
            checksum,
        };
        self.footer.push_catalog(name, &location);
        self.catalogs.push((name.to_string(), location));
        Ok(location)
    }

    /// Completes the segment: footer, comparison of every checksum with what lies in memory, mode
    /// 0440, final name. From then on nobody writes to it.
    ///
    /// # Errors
    /// [`Error::EmptySegment`] if nothing was appended. After any error the segment is given up.
    pub fn seal(mut self) -> Result<SealedSegment> {
        if self.is_empty() {
            return Err(Error::EmptySegment { segment: self.id });
        }
        let data_end = self.cursor;
        let (footer, header) = self.footer.finish(self.id, data_end);
        let file_bytes = data_end + footer.len() as u64;
        self.allocate(file_bytes)?;
        #[cfg(feature = "mutants")]
        let deferred = self.deferred_file()?;
        let file = self.file()?;
        let write = |bytes: &[u8], at| {
            file.write_all_at(bytes, at).map_err(|error| {
                storage_error(
                    &self.shared.dir,
                    "write",
                    &self.temp,
                    bytes.len() as u64,
                    error,
                )
            })
        };
        write(&footer, data_end)?;
        write(&header, 0)?;
        file.set_len(file_bytes)
            .map_err(|error| Error::io("shorten", &self.temp, error))?;
        file.set_permissions(PermissionsExt::from_mode(SEALED_MODE))
            .map_err(|error| Error::io("set the mode of", &self.temp, error))?;
        // The only descriptor through which the segment could be written.
        self.file = None;
        let sealed = self.check_and_rename(data_end, file_bytes);
        if sealed.is_err() {
            let _ = std::fs::remove_file(&self.temp);
        }
        let allocated = sealed?;
        reached(Step::SegmentSealed);
        #[cfg(feature = "mutants")]
        guard(&self.shared.deferred).extend(deferred);
        let known = Known {
            file_bytes,
            data_end,
            allocated,
            unpublished: true,
        };
        guard(&self.shared.known).insert(self.id, known);
        Ok(SealedSegment {
            id: self.id,
            bytes: file_bytes,
            chunks: std::mem::take(&mut self.chunks),
            catalogs: std::mem::take(&mut self.catalogs),
        })
    }

    /// Compares what lies in memory with what was to be written, then gives it its final name.
    /// Returns the memory that the file takes.
    fn check_and_rename(&self, data_end: u64, file_bytes: u64) -> Result<u64> {
        let file = open_file(&self.temp).map_err(|error| Error::io("open", &self.temp, error))?;
        let metadata = file
            .metadata()
            .map_err(|error| Error::io("inspect", &self.temp, error))?;
        if metadata.len() != file_bytes {
            let problem = format!(
                "file has {} bytes after writing, expected {file_bytes}",
                metadata.len()
            );
            return Err(Error::corrupt(&self.temp, problem));
        }
        let map =
            FileMap::new(&file, file_bytes).map_err(|error| Error::io("map", &self.temp, error))?;
        let geometry = SegmentGeometry::parse(&self.temp, map.bytes(), self.id)?;
        debug_assert_eq!(geometry.data_end, data_end);
        let written = self
            .chunks
            .iter()
            .map(|(_, location)| (location.offset, location.length, location.checksum))
            .chain(
                self.catalogs
                    .iter()
                    .map(|(_, location)| (location.offset, location.length, location.checksum)),
            );
        for (offset, length, checksum) in written {
            #[cfg(feature = "mutants")]
            if crate::faults::Mutant::PublishBeforeSeal.is_chosen() {
                break;
            }
            check_bytes(
                &map.bytes()[offset as usize..(offset + length) as usize],
                checksum,
            )
            .map_err(|problem| {
                Error::corrupt(&self.temp, format!("{problem} at {offset} after writing"))
            })?;
        }
        reached(Step::SegmentWritten);
        #[cfg(feature = "mutants")]
        if crate::faults::Mutant::InPlaceWrite.is_chosen() && self.overwrite_retired(map.bytes())? {
            return Ok(metadata.blocks() * 512);
        }
        // Never over another file: a name means the same bytes for ever.
        let path = self.shared.dir.name_path(Name::Segment(self.id));
        renameat2(
            AT_FDCWD,
            &self.temp,
            AT_FDCWD,
            &path,
            RenameFlags::RENAME_NOREPLACE,
        )
        .map_err(|error| Error::io("rename sealed", &path, error))?;
        Ok(metadata.blocks() * 512)
    }

    fn file(&self) -> Result<&File> {
        // Only `seal` takes the file, and it takes the writer too.
        self.file
            .as_ref()
            .ok_or_else(|| Error::corrupt(&self.temp, "is sealed already"))
    }

    /// Writes the parts behind one another at the next aligned place.
    fn write(&mut self, parts: &[&[u8]]) -> Result<(u64, u64, u64)> {
        let length: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let offset = self.cursor;
        let end = offset
            .checked_add(length)
            .and_then(aligned)
            .filter(|end| *end <= self.data_end_max)
            .ok_or(Error::SegmentFull {
                needed: length,
                remaining: self.data_end_max - offset,
            })?;
        let mut hasher = XxHash3_64::new();
        let mut at = offset;
        for part in parts {
            #[cfg(feature = "mutants")]
            if crate::faults::Mutant::PublishBeforeSeal.is_chosen() {
                self.deferred.push((at, part.to_vec()));
                std::hash::Hasher::write(&mut hasher, part);
                at += part.len() as u64;
                continue;
            }
            for piece in part.chunks(PIECE_BYTES) {
                std::hash::Hasher::write(&mut hasher, piece);
                self.file()?.write_all_at(piece, at).map_err(|error| {
                    storage_error(
                        &self.shared.dir,
                        "write",
                        &self.temp,
                        offset + length - at,
                        error,
                    )
                })?;
                at += piece.len() as u64;
            }
        }
        self.cursor = end;
        Ok((offset, length, std::hash::Hasher::finish(&hasher)))
    }

    fn allocate(&mut self, bytes: u64) -> Result<()> {
        if bytes > self.allocated {
            allocate(
                &self.shared.dir,
                &self.temp,
                self.file()?,
                self.allocated,
                bytes,
            )?;
            self.allocated = bytes;
        }
        Ok(())
    }
}

#[cfg(feature = "mutants")]
impl SegmentWriter {
    /// The mutant that publishes before sealing keeps a writable descriptor for later.
    fn deferred_file(&mut self) -> Result<Option<crate::writer::Deferred>> {
        let deferred = std::mem::take(&mut self.deferred);
        let file = self
            .file()?
            .try_clone()
            .map_err(|error| Error::io("duplicate", &self.temp, error))?;
        Ok((!deferred.is_empty()).then_some((file, deferred)))
    }

    /// The mutant that writes in place recycles the memory of a retired segment of the same size.
    fn overwrite_retired(&self, bytes: &[u8]) -> Result<bool> {
        for name in self.shared.dir.names()? {
            let Name::SegmentRetired(_) = name else {
                continue;
            };
            let retired = self.shared.dir.name_path(name);
            let io = |error| Error::io("overwrite", &retired, error);
            if std::fs::metadata(&retired).map_err(io)?.len() != bytes.len() as u64 {
                continue;
            }
            std::fs::set_permissions(&retired, PermissionsExt::from_mode(0o640)).map_err(io)?;
            let file = OpenOptions::new().write(true).open(&retired).map_err(io)?;
            file.write_all_at(bytes, 0).map_err(io)?;
            std::fs::rename(&retired, self.shared.dir.name_path(Name::Segment(self.id)))
                .map_err(io)?;
            std::fs::remove_file(&self.temp).map_err(io)?;
            return Ok(true);
        }
        Ok(false)
    }
}

impl Drop for SegmentWriter {
    fn drop(&mut self) {
        if self.file.is_some() {
            let _ = std::fs::remove_file(&self.temp);
        }
    }
}

/// Gives the file `from..to` bytes of memory now, so that writing it later cannot fail for want of
/// it and reading it cannot raise a signal.
pub(crate) fn allocate(dir: &CacheDir, path: &Path, file: &File, from: u64, to: u64) -> Result<()> {
    let needed = to - from;
    let space = dir.space()?;
    if space.available_bytes < needed {
        return Err(Error::NoSpace {
            path: dir.path().to_path_buf(),
            needed,
            available: space.available_bytes,
            limit: space.limit,
        });
    }
    match reserve(file, from, needed) {
        Ok(()) => Ok(()),
        // A file system for tests may not know how to.
        Err(Errno::EOPNOTSUPP) => file
            .set_len(to)
            .map_err(|error| Error::io("extend", path, error)),
        Err(error) => Err(storage_error(dir, "allocate", path, needed, error.into())),
    }
}

/// Has the kernel set memory aside for `bytes` bytes of a file from `from` on.
pub(crate) fn reserve(file: &File, from: u64, bytes: u64) -> nix::Result<()> {
    let (from, bytes) = (from as libc::off_t, bytes as libc::off_t);
    loop {
        match fallocate(file, FallocateFlags::empty(), from, bytes) {
            Err(Errno::EINTR) => {}
            done => return done,
        }
    }
}

/// The error of a failed write: lack of memory is one of its own.
pub(crate) fn storage_error(
    dir: &CacheDir,
    action: &'static str,
    path: &Path,
    needed: u64,
    error: std::io::Error,
) -> Error {
    let short = matches!(
        error.raw_os_error(),
        Some(libc::ENOSPC | libc::ENOMEM | libc::EDQUOT)
    );
    match dir.space() {
        Ok(space) if short => Error::NoSpace {
            path: dir.path().to_path_buf(),
            needed,
            available: space.available_bytes,
            limit: space.limit,
        },
        _ => Error::io(action, path, error),
    }
}
