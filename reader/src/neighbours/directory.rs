//! Who holds what, as far as this process knows.

use std::fmt::Debug;
use std::sync::Arc;

use stoa_transfer::{PeerAddress, SegmentKey};

/// A chunk by its content: the file's key, row group and column.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ChunkName {
    pub(crate) file: Arc<[u8]>,
    pub(crate) row_group: u32,
    pub(crate) column: u32,
}

/// A neighbour that holds a chunk, and where in its memory.
///
/// It may be out of date: a read of it carries the memory's incarnation and the chunk's checksum,
/// so that an old one costs a miss and never a wrong byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// How the neighbour is reached.
    pub peer: Arc<PeerAddress>,
    /// The segment.
    pub segment: SegmentKey,
    /// First byte of the chunk.
    pub offset: u64,
    /// Bytes of the chunk.
    pub length: u64,
    /// xxh3-64 of the bytes.
    pub checksum: u64,
    /// How the bytes are encoded.
    pub form: u8,
    /// Rows in the chunk.
    pub rows: u32,
}

/// Who held what at one moment. Lookups neither wait nor fail: what is not known is not held.
pub trait Holdings: Debug + Send + Sync {
    /// Names this state: another one has another number.
    fn generation(&self) -> u64;

    /// The neighbours that hold a chunk; `file` is the file's key.
    fn holders(&self, file: &[u8], row_group: u32, column: u32) -> Vec<Holder>;
}

/// Where a process learns who holds what.
pub trait Directory: Debug + Send + Sync {
    /// The newest state; called once a scan, so it must be quick.
    fn current(&self) -> Arc<dyn Holdings>;
}
