//! What processes on one host agree on: the bytes of segments and index, who may write them and
//! when, and how they are mapped.
//!
//! A cache is one directory on tmpfs. One process writes it ([`CacheWriter`]), any number of
//! processes read it in place ([`CacheReader`]):
//!
//! - a **segment** holds many chunks and is immutable once sealed; its name is never reused;
//! - the **index** is one immutable file per generation; renaming it over `index` is the only
//!   moment at which a generation becomes visible;
//! - a reader's mapping pins the bytes it maps: no lease, clock or count is needed for them to
//!   stay what they were.
//!
//! The bytes are described in `docs/format.md`. This crate opens no connection and knows nothing of
//! etcd, Parquet or DataFusion; a chunk is bytes under a [`ChunkKey`]. What workers say to each other
//! about what they hold are bytes in its terms, so [`holdings`] has them; who sends them is others'
//! business.
//!
//! ```
//! use std::sync::Arc;
//! use stoa_shm::{CacheDir, CacheDirOptions, CacheReader, CacheWriter, ChunkKey, IndexContents};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let scratch = tempfile::tempdir_in("/dev/shm")?;
//! # let path = scratch.path();
//! let dir = CacheDir::open(path, CacheDirOptions::default())?;
//! let (mut writer, _recovery) = CacheWriter::open(dir)?;
//! let key = ChunkKey { file: Arc::from(&b"s3://bucket/a.parquet etag=1"[..]), row_group: 0, column: 2 };
//! let mut segment = writer.new_segment(1 << 20)?;
//! segment.append(&key, 1, 3, b"bytes of the chunk")?;
//! let sealed = segment.seal()?;
//! writer.publish(IndexContents { chunks: sealed.chunks, catalogs: sealed.catalogs })?;
//!
//! let snapshot = CacheReader::open(path).snapshot();
//! let file = snapshot.file(&key.file).expect("published");
//! let entry = snapshot.lookup(file, 0, 2).expect("published");
//! assert_eq!(&*snapshot.open_chunk(&entry)?, b"bytes of the chunk");
//! # Ok(())
//! # }
//! ```

#![deny(unsafe_code)]

mod compact;
pub mod counters;
mod dir;
pub mod directory;
mod error;
mod faults;
mod format;
mod handover;
pub mod holdings;
mod identity;
mod index;
mod index_build;
mod inspect;
mod lock;
mod map;
mod mapped;
mod reader;
mod recovery;
mod scrub;
mod segment;
mod segment_writer;
mod space;
#[cfg(test)]
mod tests;
mod types;
mod upkeep;
mod writer;

pub use compact::{Compaction, DEAD_SHARE_MAX};
pub use counters::AccessCounters;
pub use dir::{CacheDir, CacheDirOptions};
pub use directory::{Directory, DirectoryReader, Holder, HoldingWorker};
pub use error::{Error, ErrorKind, Result};
pub use handover::{Handover, Walk};
pub use index::{Entry, FileId, Wanted};
pub use inspect::Inspection;
pub use mapped::{ChunkBytes, SegmentFiles, SegmentMap};
pub use reader::{CacheReader, ReaderOptions, Snapshot, Verify};
pub use scrub::{SegmentCheck, SegmentReport};
pub use segment_writer::SegmentWriter;
pub use space::Space;
pub use types::*;
pub use writer::{CacheWriter, Ownership};
