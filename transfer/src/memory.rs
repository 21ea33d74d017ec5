//! Memory that transfers arrive in: aligned, initialised once, and used again.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;
use memmap2::MmapMut;

use crate::transport::TransportKind;

/// Blocks begin at a multiple of this many bytes: what Arrow wants of its buffers.
pub const BLOCK_ALIGN: usize = 64;
/// Blocks of at least this many bytes are mappings of their own.
const MAPPED_BYTES_MIN: usize = 64 << 10;

/// Received bytes: aligned to [`BLOCK_ALIGN`], owned, and back in the pool when dropped.
#[derive(Debug)]
pub struct Block {
    memory: Owner,
    length: usize,
    via: Option<TransportKind>,
}

enum Owner {
    Pooled {
        /// `None` only while dropping.
        memory: Option<Memory>,
        pool: Weak<PoolState>,
    },
    Foreign(Box<dyn AsRef<[u8]> + Send + Sync>),
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pooled { .. } => "Pooled",
            Self::Foreign(_) => "Foreign",
        })
    }
}

impl Block {
    /// A block over memory of another pool, such as one that a device knows.
    ///
    /// # Panics
    /// When the bytes are not aligned to [`BLOCK_ALIGN`].
    pub fn from_owner(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        let owner: Box<dyn AsRef<[u8]> + Send + Sync> = Box::new(owner);
        let bytes = (*owner).as_ref();
        assert!(
            bytes.is_empty() || bytes.as_ptr().addr().is_multiple_of(BLOCK_ALIGN),
            "a block must be aligned to {BLOCK_ALIGN} bytes"
        );
        Self {
            length: bytes.len(),
            memory: Owner::Foreign(owner),
            via: None,
        }
    }

    /// Over which transport a [`Client`](crate::Client) received it: not always that of the path,
    /// because links over RDMA hand some reads to the transport below.
    pub fn via(&self) -> Option<TransportKind> {
        self.via
    }

    pub(crate) fn came_via(mut self, via: TransportKind) -> Self {
        self.via = Some(via);
        self
    }

    /// The same bytes as shared ones; nothing is copied.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }

    /// The bytes for writing, as long as nobody else has seen them; empty for foreign memory.
    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Owner::Pooled {
                memory: Some(memory),
                ..
            } => &mut memory.as_mut()[..self.length],
            _ => &mut [],
        }
    }
}

impl Deref for Block {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.memory {
            Owner::Pooled {
                memory: Some(memory),
                ..
            } => &memory.as_ref()[..self.length],
            Owner::Pooled { memory: None, .. } => &[],
            Owner::Foreign(owner) => &(**owner).as_ref()[..self.length],
        }
    }
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Block> for Bytes {
    fn from(block: Block) -> Self {
        block.into_bytes()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Owner::Pooled { memory, pool } = &mut self.memory
            && let (Some(memory), Some(pool)) = (memory.take(), pool.upgrade())
        {
            pool.give_back(memory);
        }
    }
}

/// Initialised memory that begins at a multiple of [`BLOCK_ALIGN`].
enum Memory {
    /// On the heap, with room to align in.
    Heap { bytes: Box<[u8]>, start: usize },
    /// Whole pages, zero until touched.
    Mapped(MmapMut),
}

impl Memory {
    fn new(bytes: usize) -> std::io::Result<Self> {
        if bytes >= MAPPED_BYTES_MIN {
            return Ok(Self::Mapped(MmapMut::map_anon(bytes)?));
        }
        let heap = vec![0; bytes + BLOCK_ALIGN - 1].into_boxed_slice();
        let start = heap.as_ptr().addr().next_multiple_of(BLOCK_ALIGN) - heap.as_ptr().addr();
        Ok(Self::Heap { bytes: heap, start })
    }

    fn capacity(&self) -> usize {
        match self {
            Self::Heap { bytes, .. } => bytes.len() - (BLOCK_ALIGN - 1),
            Self::Mapped(map) => map.len(),
        }
    }

    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Heap { bytes, start } => &bytes[*start..],
            Self::Mapped(map) => map,
        }
    }

    fn as_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Heap { bytes, start } => &mut bytes[*start..],
            Self::Mapped(map) => map,
        }
    }
}

/// Hands out blocks and keeps what comes back, up to a limit: fresh pages cost more than the copy
/// into them.
#[derive(Clone, Debug)]
pub struct BlockPool {
    state: Arc<PoolState>,
}

#[derive(Debug)]
struct PoolState {
    kept_bytes_max: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    bytes: usize,
    /// By capacity; only those that [`capacity_for`] yields.
    free: BTreeMap<usize, Vec<Memory>>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.capacity())
    }
}

/// The capacity of blocks for `length` bytes: four steps between powers of two, so that at most a
/// quarter is wasted and blocks are found again.
pub(crate) fn capacity_for(length: usize) -> usize {
    const CAPACITY_MIN: usize = 256;
    if length <= CAPACITY_MIN {
        return CAPACITY_MIN;
    }
    let step = (length - 1).ilog2();
    length.next_multiple_of(1 << step.saturating_sub(2))
}

impl BlockPool {
    /// A pool that keeps at most `kept_bytes_max` bytes for later use.
    pub fn new(kept_bytes_max: usize) -> Self {
        Self {
            state: Arc::new(PoolState {
                kept_bytes_max,
                kept: Mutex::default(),
            }),
        }
    }

    /// A block of `length` bytes with whatever was in them last.
    ///
    /// # Errors
    /// When the system has no memory for it.
    pub fn take(&self, length: usize) -> std::io::Result<Block> {
        let capacity = capacity_for(length);
        let kept = self.state.take(capacity);
        let memory = match kept {
            Some(memory) => memory,
            None => Memory::new(capacity)?,
        };
        Ok(Block {
            memory: Owner::Pooled {
                memory: Some(memory),
                pool: Arc::downgrade(&self.state),
            },
            length,
            via: None,
        })
    }

    /// Bytes that wait for later use.
    pub fn kept_bytes(&self) -> usize {
        self.state.lock().bytes
    }
}

impl PoolState {
    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, capacity: usize) -> Option<Memory> {
        let mut kept = self.lock();
        let memory = kept.free.get_mut(&capacity)?.pop()?;
        kept.bytes -= memory.capacity();
        Some(memory)
    }

    fn give_back(&self, memory: Memory) {
        let capacity = memory.capacity();
        let mut kept = self.lock();
        if kept.bytes + capacity <= self.kept_bytes_max {
            kept.bytes += capacity;
            kept.free.entry(capacity).or_default().push(memory);
        }
    }
}

/// Maps a file that nobody changes while it is mapped, for the segments of tests.
#[cfg(any(test, feature = "conformance"))]
#[expect(unsafe_code, reason = "mapping a file")]
pub(crate) fn map_file(file: &std::fs::File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the conformance suite made the file for itself, and does not write it again.
    unsafe { memmap2::Mmap::map(file) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What arrives becomes Arrow buffers in place, so its beginning must suit them whatever its
    /// length.
    #[test]
    fn blocks_of_any_length_are_aligned_and_as_long_as_asked() {
        let pool = BlockPool::new(1 << 20);
        for length in [
            0, 1, 63, 64, 65, 255, 256, 257, 4096, 65_535, 65_536, 1_000_001,
        ] {
            let mut block = pool.take(length).unwrap();
            assert_eq!(block.len(), length);
            assert!(
                block.as_ptr().addr().is_multiple_of(BLOCK_ALIGN),
                "{length}"
            );
            block.as_mut().fill(7);
            assert!(block.iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn a_capacity_holds_its_length_and_wastes_at_most_a_quarter() {
        for length in (257..1 << 22).step_by(997) {
            let capacity = capacity_for(length);
            assert!(
                capacity >= length && capacity <= length + length / 4 + 1,
                "{length}"
            );
            assert_eq!(capacity_for(capacity), capacity, "{length}");
        }
    }

    #[test]
    fn blocks_come_back_to_the_pool_up_to_its_limit_and_outlive_it() {
        let pool = BlockPool::new(3 << 20);
        let first = pool.take(1 << 20).unwrap();
        let place = first.as_ptr();
        drop(first.into_bytes());
        assert_eq!(pool.kept_bytes(), 1 << 20);
        let again = pool.take((1 << 20) - 5).unwrap();
        assert_eq!(again.as_ptr(), place, "the kept block is used again");
        assert_eq!(pool.kept_bytes(), 0);
        let many: Vec<Block> = (0..5).map(|_| pool.take(1 << 20).unwrap()).collect();
        drop(many);
        assert_eq!(pool.kept_bytes(), 3 << 20);
        drop(pool);
        assert_eq!(again.len(), (1 << 20) - 5);
    }
}
