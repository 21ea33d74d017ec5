//! What is cached: objects whose bytes follow from their key.

use std::sync::Arc;

use stoa_shm::ChunkKey;

/// Objects in the cache.
pub const OBJECTS: u32 = 64;
/// Chunks of an object.
pub const CHUNKS: u32 = 4;
/// Length of every chunk: equal, so that a mistaken segment looks as similar as possible.
pub const CHUNK_BYTES: usize = 16 << 10;
/// Objects whose chunks go into one segment.
pub const OBJECTS_PER_SEGMENT: usize = 8;
/// Name of the catalog that lists the versions of all objects.
pub const CATALOG: &str = "versions";

/// A small generator of random numbers (SplitMix64), replayed by its seed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// Whether something of this many per cent happens.
    pub fn percent(&mut self, share: u64) -> bool {
        self.below(100) < share
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The key of a chunk of `object` in `version`; all keys have the same length.
pub fn key(object: u32, version: u64, chunk: u32) -> ChunkKey {
    ChunkKey {
        file: Arc::from(format!("object-{object:06} etag={version:012}").into_bytes()),
        row_group: chunk / 2,
        column: chunk % 2,
    }
}

/// Object and version of a key.
pub fn object_of(file: &[u8]) -> Option<(u32, u64)> {
    let text = str::from_utf8(file).ok()?.strip_prefix("object-")?;
    let (object, version) = text.split_once(" etag=")?;
    Some((object.parse().ok()?, version.parse().ok()?))
}

/// The bytes of a chunk.
pub fn bytes(key: &ChunkKey) -> Vec<u8> {
    let mut seed = u64::from(key.row_group) << 32 | u64::from(key.column);
    for part in key.file.chunks(8) {
        let mut word = [0; 8];
        word[..part.len()].copy_from_slice(part);
        seed = mix(seed ^ u64::from_le_bytes(word));
    }
    let mut bytes = Vec::with_capacity(CHUNK_BYTES);
    for word in 0..(CHUNK_BYTES / 8) as u64 {
        bytes.extend_from_slice(&mix(seed.wrapping_add(word)).to_le_bytes());
    }
    bytes
}

/// How many bytes of `found` are not those of the chunk.
pub fn wrong_bytes(key: &ChunkKey, found: &[u8]) -> usize {
    let expected = bytes(key);
    if found == expected {
        return 0;
    }
    let differing = found
        .iter()
        .zip(&expected)
        .filter(|(found, expected)| found != expected)
        .count();
    differing + found.len().abs_diff(expected.len())
}

/// The catalog of a generation: the version of each object, 0 for one that is not cached.
pub fn catalog(versions: &[u64]) -> Vec<u8> {
    versions
        .iter()
        .flat_map(|version| version.to_le_bytes())
        .collect()
}

/// The versions that a catalog lists.
pub fn versions(catalog: &[u8]) -> Vec<u64> {
    catalog
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
        .collect()
}
