//! Hazards that one process can meet, each in a directory of its own. Those that need several
//! processes and SIGKILL are in `tests/shm-harness`.

mod damage;
mod formats;
mod lifecycle;
mod memory;
mod model;
mod names;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::dir::{Name, open_file};
use crate::*;

/// A cache directory that vanishes with the test.
pub(super) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(super) fn new() -> Scratch {
        Scratch(
            tempfile::Builder::new()
                .prefix("stoa-test-")
                .tempdir_in("/dev/shm")
                .unwrap(),
        )
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(super) fn open(&self) -> (CacheWriter, Recovery) {
        CacheWriter::open(CacheDir::open(self.path(), CacheDirOptions::default()).unwrap()).unwrap()
    }

    pub(super) fn writer(&self) -> CacheWriter {
        self.open().0
    }

    pub(super) fn names(&self) -> Vec<Name> {
        let mut names = CacheDir::open(self.path(), CacheDirOptions::default())
            .unwrap()
            .names()
            .unwrap();
        names.sort();
        names
    }

    /// Messages name paths; tests compare them without.
    pub(super) fn text(&self, error: impl std::fmt::Display) -> String {
        error
            .to_string()
            .replace(self.path().to_str().unwrap(), "DIR")
    }
}

/// The key of object `object` in version `version`.
pub(super) fn key(object: u32, version: u32) -> ChunkKey {
    ChunkKey {
        file: Arc::from(
            format!(
                "s3://bucket/object-{:04}.parquet etag={version:06}",
                object / 4
            )
            .into_bytes(),
        ),
        row_group: object / 2 % 2,
        column: object % 2,
    }
}

/// The bytes of a chunk: a pure function of its key, so that every byte can be checked.
pub(super) fn content(key: &ChunkKey) -> Vec<u8> {
    let mut state =
        crate::format::hash(&key.file) ^ u64::from(key.row_group) << 32 ^ u64::from(key.column);
    let length = 1 + state % 700;
    (0..length)
        .map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
        .collect()
}

/// Seals one segment that holds the chunks of `keys`.
pub(super) fn seal(writer: &CacheWriter, keys: &[ChunkKey]) -> SealedSegment {
    let mut segment = writer.new_segment(1 << 20).unwrap();
    for (rows, key) in keys.iter().enumerate() {
        segment.append(key, 1, rows as u32, &content(key)).unwrap();
    }
    segment.seal().unwrap()
}

pub(super) fn contents(sealed: &[&SealedSegment]) -> IndexContents {
    IndexContents {
        chunks: sealed
            .iter()
            .flat_map(|sealed| sealed.chunks.clone())
            .collect(),
        catalogs: sealed
            .iter()
            .flat_map(|sealed| sealed.catalogs.clone())
            .collect(),
    }
}

/// A chunk among many that are looked up together.
pub(super) fn want(file: FileId, row_group: u32, column: u32) -> Wanted {
    Wanted {
        file,
        row_group,
        column,
    }
}

/// What a reader gets for a key: bytes or a miss.
pub(super) fn get(snapshot: &Snapshot, key: &ChunkKey) -> Result<ChunkBytes, Miss> {
    let file = snapshot.file(&key.file).ok_or(Miss::Absent)?;
    snapshot.open_chunk(&snapshot.try_lookup(file, key.row_group, key.column)?)
}

/// Changes a complete file as only an accident can: a new file under the old name, so that mappings
/// of the old one stay what they are.
pub(super) fn damage(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
    std::fs::set_permissions(path, Permissions::from_mode(0o440)).unwrap();
}

pub(super) fn segment_path(scratch: &Scratch, id: SegmentId) -> PathBuf {
    scratch.path().join(Name::Segment(id).to_string())
}

/// Counts warnings of this thread.
#[derive(Clone, Default)]
pub(super) struct Warnings(Arc<AtomicUsize>);

impl Warnings {
    pub(super) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
    /// Runs `work` and counts its warnings.
    pub(super) fn of<T>(&self, work: impl FnOnce() -> T) -> T {
        tracing::subscriber::with_default(self.clone(), work)
    }
}

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// The lock on a file, as the writer sees it.
pub(super) fn is_locked(path: &Path) -> bool {
    crate::lock::is_locked(&open_file(path).unwrap()).unwrap()
}
