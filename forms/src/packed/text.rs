//! Strings and binaries: raw, or compressed with FSST.
//!
//! A block of them:
//!
//! ```text
//! offset  size  field
//!      0     4  bytes of the text; of compressed text: before it was compressed
//!      4     4  bytes of the data
//!      8        a stream: the length of each value in the data
//!      …        the data, then 16 zeros, so that any value can be read as a whole view
//! ```
//!
//! The symbols of compressed text are the chunk's:
//!
//! ```text
//!      0     8  symbols, at most 255
//!      8        each symbol, 8 bytes, filled up with zeros
//!      …        each symbol's length, u8
//! ```
//!
//! Code `n` stands for symbol `n`, code 255 for the byte behind it.
//!
//! FSST's own crate trains and compresses. What decompresses is here, because readers must not
//! panic over damaged bytes, and because the ends of values inside of the text, which views need,
//! come for free while it is unpacked as a whole.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BinaryViewArray, StringViewArray};
use arrow::buffer::{Buffer, NullBuffer, ScalarBuffer};
use arrow::datatypes::DataType;
use bytes::Bytes;
use fsst::Compressor;

use super::bits::{self, Allow, Scratch, Stream};
use crate::bytes::{buffer, pad, part, read_u32, read_u64};
use crate::error::corrupt;
use crate::{Error, Result};

const HEADER_BYTES: usize = 8;
/// Zeros behind the data.
const SLACK_BYTES: usize = 16;
/// Values up to this length lie within their view.
const INLINE_MAX: usize = 12;
pub(super) const ESCAPE: u8 = 255;
/// Longest symbol.
const SYMBOL_BYTES: usize = 8;
/// Text that symbols are trained on.
const SAMPLE_BYTES: usize = 64 * 1024;

/// Whether values of this type are text here: strings and binaries as views.
pub(super) fn is_text(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Utf8View | DataType::BinaryView)
}

/// The values of an array of text, empty where they are null.
pub(super) fn values(array: &ArrayRef) -> Vec<&[u8]> {
    match array.data_type() {
        DataType::Utf8View => {
            let array = array.as_string_view();
            array
                .iter()
                .map(|v| v.map_or(&[][..], str::as_bytes))
                .collect()
        }
        _ => {
            let array = array.as_binary_view();
            array.iter().map(Option::unwrap_or_default).collect()
        }
    }
}

/// An array of two values, which are text where the type is.
pub(super) fn pair(data_type: &DataType, values: [&[u8]; 2]) -> ArrayRef {
    let binary: ArrayRef = Arc::new(BinaryViewArray::from_iter_values(values));
    match data_type {
        DataType::Utf8View => {
            let text = values.map(|value| std::str::from_utf8(value).ok());
            Arc::new(StringViewArray::from_iter(text))
        }
        _ => binary,
    }
}

/// Symbols trained on some of the values of some blocks; `None` where they save less than a fifth.
pub(super) fn train(blocks: &[Vec<&[u8]>]) -> Option<Compressor> {
    let total: usize = blocks.iter().flatten().map(|v| v.len()).sum();
    // Whole values from all over, so that a sorted column is seen from A to Z.
    let step = (total / SAMPLE_BYTES).max(1);
    let sample = blocks.iter().flat_map(|block| block.iter().step_by(step));
    let sample: Vec<&[u8]> = sample.copied().collect();
    let raw: usize = sample.iter().map(|v| v.len()).sum();
    if raw == 0 {
        return None;
    }
    let compressor = Compressor::train(&sample);
    let (mut data, mut ends) = (vec![], vec![]);
    compressor
        .compress_bulk_into::<{ Compressor::DEFAULT_BULK_LANES }>(&sample, &mut data, &mut ends);
    (data.len() * 5 <= raw * 4).then_some(compressor)
}

/// The symbols' bytes.
pub(super) fn write_symbols(compressor: &Compressor, out: &mut Vec<u8>) {
    let symbols = compressor.symbol_table();
    out.extend_from_slice(&(symbols.len() as u64).to_le_bytes());
    for symbol in symbols {
        out.extend_from_slice(&symbol.to_u64().to_le_bytes());
    }
    out.extend_from_slice(compressor.symbol_lengths());
    pad(out, 8);
}

/// Appends a block of values.
///
/// # Errors
/// [`Error::BlockTooLarge`] where their bytes do not fit one buffer.
pub(super) fn encode(
    values: &[&[u8]],
    compressor: Option<&Compressor>,
    out: &mut Vec<u8>,
) -> Result<()> {
    let raw: usize = values.iter().map(|v| v.len()).sum();
    // Compressed data may be twice as long.
    if raw > i32::MAX as usize / 2 {
        return Err(Error::BlockTooLarge { rows: values.len() });
    }
    let mut data = vec![];
    let lengths: Vec<u64> = match compressor {
        None => {
            data.reserve(raw);
            values.iter().for_each(|v| data.extend_from_slice(v));
            values.iter().map(|v| v.len() as u64).collect()
        }
        Some(compressor) => {
            let mut ends: Vec<u64> = Vec::with_capacity(values.len());
            compressor.compress_bulk_into::<{ Compressor::DEFAULT_BULK_LANES }>(
                values, &mut data, &mut ends,
            );
            let starts = std::iter::once(0).chain(ends.iter().copied());
            ends.iter()
                .zip(starts)
                .map(|(end, start)| end - start)
                .collect()
        }
    };
    out.extend_from_slice(&(raw as u32).to_le_bytes());
    out.extend_from_slice(&(data.len() as u32).to_le_bytes());
    bits::encode(&lengths, Allow::Packed, out);
    out.extend_from_slice(&data);
    out.resize(out.len() + SLACK_BYTES, 0);
    Ok(())
}

/// The symbols of a chunk.
pub(super) struct Symbols {
    words: [u64; 256],
    /// At most 8 each; 0 of codes that stand for nothing.
    lengths: [u8; 256],
}

impl std::fmt::Debug for Symbols {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Symbols").finish_non_exhaustive()
    }
}

impl Symbols {
    pub(super) fn open(bytes: &[u8]) -> Result<Self> {
        part(bytes, "symbols", 0, 8)?;
        let count = read_u64(bytes, 0);
        if count > 255 {
            return Err(corrupt("symbols", count, "at most 255"));
        }
        let count = count as usize;
        part(bytes, "symbols", 8, count * 9)?;
        let mut symbols = Self {
            words: [0; 256],
            lengths: [0; 256],
        };
        for at in 0..count {
            let length = bytes[8 + count * 8 + at];
            if !(1..=SYMBOL_BYTES as u8).contains(&length) {
                return Err(corrupt("length of a symbol", length, "1 to 8"));
            }
            symbols.words[at] = read_u64(bytes, 8 + at * 8);
            symbols.lengths[at] = length;
        }
        Ok(symbols)
    }

    /// What a code other than [`ESCAPE`] stands for, and its length; nothing where it is no symbol.
    pub(super) fn symbol(&self, code: u8) -> ([u8; SYMBOL_BYTES], usize) {
        let code = usize::from(code);
        (
            self.words[code].to_le_bytes(),
            usize::from(self.lengths[code]),
        )
    }

    /// Appends the text of `codes` to `out`, and to `starts` where in `out` the text of each code
    /// begins, the end of the last one included.
    fn expand(
        &self,
        codes: &[u8],
        out: &mut Text,
        mut starts: impl FnMut(usize, usize),
    ) -> Result<()> {
        let mut rest = codes;
        let mut at = 0;
        while !rest.is_empty() {
            // Eight codes at once, as long as whatever they stand for has room.
            while let Some((eight, others)) = rest.split_first_chunk::<8>()
                && out.room() >= 8 * SYMBOL_BYTES
            {
                let escapes = eight
                    .iter()
                    .fold(false, |any, code| any | (*code == ESCAPE));
                if escapes {
                    break;
                }
                for (index, code) in eight.iter().enumerate() {
                    starts(at + index, out.length);
                    // SAFETY: there is room for eight symbols, and this loop adds no more.
                    unsafe {
                        out.push_symbol(self.words[*code as usize], self.lengths[*code as usize])
                    };
                }
                at += 8;
                rest = others;
            }
            let mut budget = 8;
            while let Some((code, others)) = rest.split_first()
                && budget > 0
            {
                budget -= 1;
                starts(at, out.length);
                if out.room() < SYMBOL_BYTES {
                    return Err(corrupt("text", "more", "as long as the block says"));
                }
                if *code == ESCAPE {
                    let Some((byte, others)) = others.split_first() else {
                        return Err(corrupt("text", "an escape at the end", "a byte behind it"));
                    };
                    starts(at + 1, out.length);
                    // SAFETY: there is room for a symbol.
                    unsafe { out.push_symbol(u64::from(*byte), 1) };
                    at += 2;
                    rest = others;
                } else {
                    // SAFETY: there is room for a symbol.
                    unsafe {
                        out.push_symbol(self.words[*code as usize], self.lengths[*code as usize])
                    };
                    at += 1;
                    rest = others;
                }
            }
        }
        starts(at, out.length);
        Ok(())
    }
}

/// Text while it is unpacked: memory with room behind its end.
struct Text {
    bytes: Vec<u8>,
    /// Bytes that are written; the vector's own length is set at the end.
    length: usize,
}

impl Text {
    /// For `bytes` bytes, and as many more as the fastest loop needs to run to their end.
    fn with_capacity(bytes: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(bytes + 9 * SYMBOL_BYTES + SLACK_BYTES),
            length: 0,
        }
    }

    #[inline(always)]
    fn room(&self) -> usize {
        self.bytes.capacity() - self.length
    }

    /// Appends the first `length` bytes of a word.
    ///
    /// # Safety
    /// There is room for 8 bytes, and `length` is at most 8.
    #[inline(always)]
    unsafe fn push_symbol(&mut self, word: u64, length: u8) {
        // SAFETY: the caller knows that 8 bytes from the current end lie inside the allocation.
        unsafe {
            let end = self.bytes.as_mut_ptr().add(self.length);
            end.cast::<[u8; 8]>().write_unaligned(word.to_le_bytes());
        }
        self.length += usize::from(length);
    }

    /// The text, and zeros behind it to read views from.
    fn finish(mut self) -> Vec<u8> {
        // SAFETY: `push_symbol` has written every byte before `length`, which its callers keep
        // inside the capacity.
        unsafe { self.bytes.set_len(self.length) };
        self.bytes.extend_from_slice(&[0; SLACK_BYTES]);
        self.bytes
    }
}

/// A block of text found in bytes.
pub(super) struct Block<'a> {
    bytes: &'a Bytes,
    raw_bytes: usize,
    data_at: usize,
    data_bytes: usize,
    stream: Stream<'a>,
}

/// Views, and what they point into.
pub(super) struct Views {
    pub(super) views: Vec<u128>,
    /// The data that views with `buffer` point into.
    pub(super) data: Buffer,
}

impl<'a> Block<'a> {
    pub(super) fn open(bytes: &'a Bytes, rows: usize) -> Result<Self> {
        part(bytes, "text", 0, HEADER_BYTES)?;
        let stream = Stream::parse(&bytes[HEADER_BYTES..], rows)?;
        let data_at = HEADER_BYTES + stream.length;
        let data_bytes = read_u32(bytes, 4) as usize;
        part(bytes, "text", data_at, data_bytes + SLACK_BYTES)?;
        Ok(Self {
            raw_bytes: read_u32(bytes, 0) as usize,
            bytes,
            data_at,
            data_bytes,
            stream,
        })
    }

    /// Where in the data each value begins, and the end of the last one.
    pub(super) fn starts(&self, scratch: &mut Scratch) -> Result<Vec<u32>> {
        let mut starts: Vec<u32> = Vec::with_capacity(self.stream.len() + 1);
        self.stream.decode(0, scratch, &mut starts)?;
        // Lengths that wrap would make sums wrap: a length is a part of the data or is corrupt.
        let mut sum = 0u64;
        for start in &mut starts {
            let length = u64::from(*start);
            *start = sum as u32;
            sum += length;
        }
        if sum != self.data_bytes as u64 {
            return Err(corrupt("lengths of text", sum, self.data_bytes));
        }
        starts.push(self.data_bytes as u32);
        Ok(starts)
    }

    /// The data of all values, one after the other.
    pub(super) fn values(&self) -> &'a [u8] {
        &self.bytes[self.data_at..self.data_at + self.data_bytes]
    }

    fn data(&self) -> &'a [u8] {
        &self.bytes[self.data_at..self.data_at + self.data_bytes + SLACK_BYTES]
    }

    /// The block's own data as a buffer, in place.
    fn in_place(&self) -> Buffer {
        let end = self.data_at + self.data_bytes;
        buffer(self.bytes.slice(self.data_at..end))
    }

    /// All values, as views into buffer number `number`.
    pub(super) fn decode(
        &self,
        symbols: Option<&Symbols>,
        number: u32,
        scratch: &mut Scratch,
    ) -> Result<Views> {
        let starts = self.starts(scratch)?;
        let Some(symbols) = symbols else {
            let data = self.data();
            let views = make_views(data, &starts, number)?;
            return Ok(Views {
                views,
                data: self.in_place(),
            });
        };
        let codes = self.values();
        if self.raw_bytes > codes.len() * SYMBOL_BYTES {
            return Err(corrupt(
                "bytes of the text",
                self.raw_bytes,
                format!("at most {}", codes.len() * SYMBOL_BYTES),
            ));
        }
        let mut text = Text::with_capacity(self.raw_bytes);
        // Of a block before this one; each place is written anew.
        let places = &mut scratch.places;
        places.resize(places.len().max(codes.len() + 1), 0);
        let places = &mut places[..codes.len() + 1];
        symbols.expand(codes, &mut text, |code, at| places[code] = at as u32)?;
        if text.length != self.raw_bytes {
            return Err(corrupt("bytes of the text", text.length, self.raw_bytes));
        }
        let text = text.finish();
        let mut at: Vec<u32> = starts;
        for start in &mut at {
            *start = places[*start as usize];
        }
        let views = make_views(&text, &at, number)?;
        let length = self.raw_bytes;
        Ok(Views {
            views,
            data: Buffer::from_vec(text).slice_with_length(0, length),
        })
    }

    /// The values at `rows`, as views into buffer 0.
    pub(super) fn gather(
        &self,
        symbols: Option<&Symbols>,
        rows: &[u32],
        scratch: &mut Scratch,
    ) -> Result<Views> {
        let starts = self.starts(scratch)?;
        let places = rows.iter().map(|row| {
            let row = *row as usize;
            (starts[row] as usize, starts[row + 1] as usize)
        });
        let Some(symbols) = symbols else {
            let data = self.data();
            let views = places.map(|(start, end)| view(data, start, end - start, 0));
            return Ok(Views {
                views: views.collect::<Result<_>>()?,
                data: self.in_place(),
            });
        };
        let codes: usize = places.clone().map(|(start, end)| end - start).sum();
        let mut text = Text::with_capacity((codes * SYMBOL_BYTES).min(self.raw_bytes));
        let mut at = Vec::with_capacity(rows.len() + 1);
        for (start, end) in places {
            at.push(text.length as u32);
            symbols.expand(&self.data()[start..end], &mut text, |_, _| {})?;
        }
        at.push(text.length as u32);
        let length = text.length;
        let text = text.finish();
        Ok(Views {
            views: make_views(&text, &at, 0)?,
            data: Buffer::from_vec(text).slice_with_length(0, length),
        })
    }
}

/// Views of the values between `starts`; `data` has zeros behind the last one.
fn make_views(data: &[u8], starts: &[u32], number: u32) -> Result<Vec<u128>> {
    let mut views = Vec::with_capacity(starts.len());
    for pair in starts.windows(2) {
        let (start, end) = (pair[0] as usize, pair[1] as usize);
        let length = end
            .checked_sub(start)
            .ok_or_else(|| corrupt("text", end, format!("at least {start}")))?;
        views.push(view(data, start, length, number)?);
    }
    Ok(views)
}

/// The view of a value that the caller knows to lie in `data`, 16 bytes before its end.
#[inline(always)]
fn view(data: &[u8], start: usize, length: usize, number: u32) -> Result<u128> {
    let Some(first) = data.get(start..).and_then(|rest| rest.first_chunk::<16>()) else {
        return Err(corrupt("text", start, format!("inside {}", data.len())));
    };
    let first = u128::from_le_bytes(*first);
    Ok(if length <= INLINE_MAX {
        let mask = (1u128 << (length * 8)) - 1;
        length as u128 | (first & mask) << 32
    } else {
        let prefix = first & u128::from(u32::MAX);
        length as u128 | prefix << 32 | u128::from(number) << 64 | (start as u128) << 96
    })
}

/// The buffers of an array over these views: none where all values lie in their views, for which
/// kernels have shorter ways.
pub(super) fn needed(views: &[u128], buffers: Arc<[Buffer]>) -> Arc<[Buffer]> {
    if buffers.is_empty() {
        return buffers;
    }
    let longest = views.iter().fold(0, |most, view| most.max(*view as u32));
    match longest as usize {
        0..=INLINE_MAX => Arc::new([]),
        _ => buffers,
    }
}

/// An array over views.
///
/// The caller has made them with [`Block::decode`] or [`Block::gather`], or copied such ones.
pub(super) fn array(
    data_type: &DataType,
    views: Vec<u128>,
    buffers: impl Into<Arc<[Buffer]>>,
    nulls: Option<NullBuffer>,
) -> Result<ArrayRef> {
    if nulls
        .as_ref()
        .is_some_and(|nulls| nulls.len() != views.len())
    {
        return Err(corrupt("values", views.len(), "one for each row"));
    }
    let buffers = needed(&views, buffers.into());
    let views = ScalarBuffer::from(views);
    // SAFETY: `view` makes views of bytes that lie in their buffer, short ones inside of the view
    // with zeros behind, long ones with the prefix that stands there.
    let binary = unsafe { BinaryViewArray::new_unchecked(views, buffers, nulls) };
    if data_type != &DataType::Utf8View {
        return Ok(Arc::new(binary));
    }
    // SAFETY: that strings are UTF-8 was checked by `validate_packed` before the chunk was
    // published, and published bytes never change.
    let text = unsafe { binary.to_string_view_unchecked() };
    Ok(Arc::new(text))
}
