//! Mapping files read-only: one of the two modules with `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::{MmapOptions, MmapRaw};

/// A file mapped read-only and shared, for as long as the value lives.
///
/// The kernel keeps the open file of a mapping, and so the locks on it, until the last process that
/// inherited the mapping unmaps it; the descriptor itself may be closed.
#[derive(Debug)]
pub(crate) struct FileMap {
    /// `None` for an empty file, which cannot be mapped.
    map: Option<MmapRaw>,
}

impl FileMap {
    /// Maps the first `length` bytes of `file`, which must have them.
    pub(crate) fn new(file: &File, length: u64) -> io::Result<Self> {
        let length =
            usize::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        if length == 0 {
            return Ok(FileMap { map: None });
        }
        Ok(FileMap {
            map: Some(MmapOptions::new().len(length).map_raw_read_only(file)?),
        })
    }

    /// The bytes.
    #[inline]
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.map {
            None => &[],
            // SAFETY: the mapping covers `len` bytes from `as_ptr` and lives as long as `self`. Its
            // bytes do not change: segments and indexes are written before they are renamed to the
            // name under which they are opened, and never again (kept by `SegmentWriter` and
            // `CacheWriter`, the only writers); nobody but their owner may write to the directory
            // or to the files (kept by `CacheDir` and their mode). The file is at least as long as
            // the mapping, because its length was checked after opening and it is never truncated.
            Some(map) => unsafe { std::slice::from_raw_parts(map.as_ptr(), map.len()) },
        }
    }

    /// Lets the kernel map the pages of a range at once, so that no reader waits for each of them.
    pub(crate) fn populate(&self, offset: usize, length: usize) -> io::Result<()> {
        self.map.as_ref().map_or(Ok(()), |map| {
            map.advise_range(memmap2::Advice::PopulateRead, offset, length)
        })
    }

    /// Keeps the pages in memory until the mapping ends.
    pub(crate) fn lock(&self) -> io::Result<()> {
        self.map.as_ref().map_or(Ok(()), MmapRaw::lock)
    }
}

impl AsRef<[u8]> for FileMap {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

/// Has the processor fetch the cache line of a byte without waiting for it; nothing where there is
/// no such byte.
#[inline]
pub(crate) fn prefetch(bytes: &[u8], at: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(byte) = bytes.get(at) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program sees and cannot fault; its address is
        // that of a byte that is borrowed here.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(byte).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::hint::black_box(bytes.get(at));
}
