//! The vocabulary: keys, locations, contents and reports.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::handover::Handover;

/// Usual size of a segment: small enough that one held buffer retains little, large enough that a
/// cache of 64 GiB has about a thousand. A larger chunk gets a segment of its own.
pub const SEGMENT_BYTES: u64 = 64 << 20;
/// Alignment of every chunk inside its segment, and so in memory.
pub const CHUNK_ALIGN: u64 = 64;
/// Longest file key that an index or a segment stores.
pub const FILE_KEY_BYTES_MAX: usize = 64 << 10;
/// Longest catalog name that an index or a segment stores.
pub const CATALOG_NAME_BYTES_MAX: usize = 4 << 10;

/// A published state of the cache; grows by one with each publication.
pub type Generation = u64;

/// Name of a segment inside its cache directory; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SegmentId(pub u64);

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Which chunk: a file's full identity, a row group, a column. Equal keys mean equal bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkKey {
    /// Canonical bytes of the file's identity (store, path, etag or version, size).
    pub file: Arc<[u8]>,
    /// Row group ordinal in the file.
    pub row_group: u32,
    /// Leaf column ordinal of the first leaf.
    pub column: u32,
}

impl ChunkKey {
    /// The key for messages: the texts of the file's identity, row group and column.
    pub fn readable(&self) -> String {
        let texts = texts(&self.file);
        let file = match texts.as_slice() {
            [] => self.file.escape_ascii().to_string(),
            [store, path, rest @ ..] => [&[&*format!("{store}/{path}")], rest].concat().join(" "),
            [text] => (*text).to_owned(),
        };
        format!(
            "chunk {{file {file}, row group {}, column {}}}",
            self.row_group, self.column
        )
    }
}

/// The texts in a file's identity, each behind its length in four little-endian bytes; none where
/// the bytes are something else. For messages only.
fn texts(mut bytes: &[u8]) -> Vec<&str> {
    let mut texts = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let text = rest.get(..length).filter(|text| !text.is_empty());
        let text = text.and_then(|text| std::str::from_utf8(text).ok());
        match text.filter(|text| !text.contains(char::is_control)) {
            Some(text) => {
                texts.push(text);
                bytes = &rest[length..];
            }
            None => bytes = &bytes[1..],
        }
    }
    texts
}

/// Where a chunk lies, and how to tell that it is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChunkLocation {
    /// The segment.
    pub segment: SegmentId,
    /// First byte in the segment's file; a multiple of [`CHUNK_ALIGN`].
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// How the bytes are encoded; the codecs' business.
    pub form: u8,
    /// xxh3-64 of the bytes.
    pub checksum: u64,
    /// Rows in the chunk.
    pub rows: u32,
}

/// Where a catalog lies, and how to tell that it is whole. Equal locations mean equal bytes, so a
/// decoded catalog may be kept under its location.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CatalogLocation {
    /// The segment.
    pub segment: SegmentId,
    /// First byte in the segment's file; a multiple of [`CHUNK_ALIGN`].
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// xxh3-64 of the bytes.
    pub checksum: u64,
}

/// Everything that a generation names.
#[derive(Clone, Debug, Default)]
pub struct IndexContents {
    /// Chunks, each key once.
    pub chunks: Vec<(ChunkKey, ChunkLocation)>,
    /// Catalogs, each name once.
    pub catalogs: Vec<(String, CatalogLocation)>,
}

/// A segment that is complete, immutable and renamed to its final name, but not yet published.
///
/// It is kept until a published index names it, or until
/// [`CacheWriter::discard`](crate::CacheWriter::discard) gives it up.
#[derive(Clone, Debug)]
pub struct SealedSegment {
    /// Its name.
    pub id: SegmentId,
    /// Size of its file in bytes.
    pub bytes: u64,
    /// The chunks in it.
    pub chunks: Vec<(ChunkKey, ChunkLocation)>,
    /// The catalogs in it.
    pub catalogs: Vec<(String, CatalogLocation)>,
}

/// What a writer found in the directory when it opened it.
#[derive(Clone, Debug, Default)]
pub struct Recovery {
    /// The published chunks, and those of adopted segments. Their bytes are there, and match their
    /// checksums where the end of the last writer has left that in doubt.
    pub chunks: HashMap<ChunkKey, ChunkLocation>,
    /// Published catalogs.
    pub catalogs: Vec<(String, CatalogLocation)>,
    /// Sealed segments that no index named; kept until published or discarded.
    pub adopted: Vec<SegmentId>,
    /// What was left out, one by one.
    pub dropped: Vec<Dropped>,
    /// How the last writer left the directory; `None` where it is not known.
    pub left: Option<Handover>,
    /// Bytes that were hashed, because they were in doubt.
    pub hashed_bytes: u64,
}

/// Something in the cache directory that was not usable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// The file, chunk or catalog.
    pub what: String,
    /// What does not hold.
    pub reason: String,
}

/// Bytes of memory that a cache directory holds, by why it holds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// Segments that the current index names.
    pub live_bytes: u64,
    /// Segments and indexes that no current index names and some reader still maps.
    pub retained_bytes: u64,
    /// Part of `live_bytes` that no entry of the index names.
    pub dead_bytes_in_live: u64,
    /// Sealed segments that no index has named yet.
    pub unpublished_bytes: u64,
    /// The current index and the space reserved for the next, and the directory of what other
    /// workers hold.
    pub index_bytes: u64,
    /// Segments that the current index names.
    pub segments: u64,
    /// Segments that some reader retains.
    pub retained_segments: u64,
}

impl MemoryReport {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.live_bytes + self.retained_bytes + self.unpublished_bytes + self.index_bytes
    }
}

/// What a scrub found.
#[derive(Clone, Debug, Default)]
pub struct VerifyReport {
    /// Chunks and catalogs whose bytes were hashed.
    pub checked: u64,
    /// Bytes hashed.
    pub bytes: u64,
    /// Chunks that are not what the index says; publish without them and fetch them again.
    pub bad_chunks: Vec<(ChunkKey, String)>,
    /// Catalogs that are not what the index says.
    pub bad_catalogs: Vec<(String, String)>,
    /// What is wrong with the index file itself, if anything: publishing again repairs it.
    pub index_problem: Option<String>,
}

impl VerifyReport {
    /// Whether everything is as it should be.
    pub fn is_clean(&self) -> bool {
        self.bad_chunks.is_empty() && self.bad_catalogs.is_empty() && self.index_problem.is_none()
    }
}

/// Why a chunk cannot be had from the cache. Never a query's error: read the origin instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Miss {
    /// The index does not name it.
    #[error("not cached")]
    Absent,
    /// Its segment was retired meanwhile or is not there any more.
    #[error("segment gone")]
    SegmentGone,
    /// The entry, the segment or the bytes are not what they should be.
    #[error("corrupt: {0}")]
    Corrupt(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readable(file: &[u8]) -> String {
        let key = ChunkKey {
            file: file.into(),
            row_group: 2,
            column: 3,
        };
        key.readable()
    }

    /// Whoever reads a message about a damaged chunk wants to know which file it is of.
    #[test]
    fn a_key_reads_as_its_file_and_place() {
        let mut file = Vec::new();
        let text = |text: &str| [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
        file.extend(text("s3://bucket"));
        file.extend(text("data/zürich.parquet"));
        file.push(1);
        file.extend(text("\"5d41402abc4b2a76\""));
        file.extend(1_234_567_u64.to_le_bytes());
        assert_eq!(
            readable(&file),
            "chunk {file s3://bucket/data/zürich.parquet \"5d41402abc4b2a76\", row group 2, column 3}"
        );
        // What is built otherwise is shown as it is.
        assert_eq!(
            readable(b"plain"),
            "chunk {file plain, row group 2, column 3}"
        );
        assert_eq!(
            readable(b"\x01\xff"),
            "chunk {file \\x01\\xff, row group 2, column 3}"
        );
        assert_eq!(readable(b""), "chunk {file , row group 2, column 3}");
    }
}
