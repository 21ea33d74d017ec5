//! Words in a chunk's bytes: little-endian, and read only where they are.

use arrow::buffer::{Buffer, MutableBuffer};
use arrow::datatypes::ArrowNativeType;
use bytes::Bytes;

use crate::error::corrupt;
use crate::{Error, Result};

/// Alignment of a chunk and of every buffer in it, a cache line.
pub const ALIGN: usize = 64;

/// The word at `at`, which the caller knows to lie inside.
pub(crate) fn read_u32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// The word at `at`, which the caller knows to lie inside.
pub(crate) fn read_u64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Zeros up to the next multiple of `to`.
pub(crate) fn pad(out: &mut Vec<u8>, to: usize) {
    out.resize(out.len().next_multiple_of(to), 0);
}

/// The `length` bytes from `offset`, if they lie inside of `bytes`.
pub(crate) fn part<'a>(
    bytes: &'a [u8],
    what: &'static str,
    offset: usize,
    length: usize,
) -> Result<&'a [u8]> {
    offset
        .checked_add(length)
        .and_then(|end| bytes.get(offset..end))
        .ok_or_else(|| outside(what, offset, length, bytes.len()))
}

/// As [`part`], keeping the memory alive.
pub(crate) fn shared(
    bytes: &Bytes,
    what: &'static str,
    offset: usize,
    length: usize,
) -> Result<Bytes> {
    match offset.checked_add(length) {
        Some(end) if end <= bytes.len() => Ok(bytes.slice(offset..end)),
        _ => Err(outside(what, offset, length, bytes.len())),
    }
}

fn outside(what: &'static str, offset: usize, length: usize, total: usize) -> Error {
    corrupt(
        what,
        format!("{offset}+{length}"),
        format!("inside {total}"),
    )
}

/// `bytes` as values of a plain type.
///
/// # Errors
/// [`Error::Corrupt`] where they are misaligned or end within a value.
pub(crate) fn typed<'a, T: ArrowNativeType>(
    bytes: &'a [u8],
    what: &'static str,
) -> Result<&'a [T]> {
    // SAFETY: Arrow's native types are plain numbers, valid for any bits; the trait is sealed.
    let (before, values, after) = unsafe { bytes.align_to::<T>() };
    if before.is_empty() && after.is_empty() {
        Ok(values)
    } else {
        Err(corrupt(
            what,
            format!("{} bytes at {:p}", bytes.len(), bytes.as_ptr()),
            format!("aligned values of {} bytes", size_of::<T>()),
        ))
    }
}

/// A buffer over `bytes`, in place.
pub(crate) fn buffer(bytes: Bytes) -> Buffer {
    if bytes.is_empty() {
        // Arrow wants even an empty buffer aligned to its type; an empty `Bytes` is not.
        return MutableBuffer::new(0).into();
    }
    Buffer::from(bytes)
}

/// Bytes past a 64-byte boundary are refused: arrays could not point into them.
pub(crate) fn check_aligned(bytes: &Bytes) -> Result<()> {
    match bytes.as_ptr() as usize % ALIGN {
        0 => Ok(()),
        offset => Err(Error::Misaligned { offset }),
    }
}
