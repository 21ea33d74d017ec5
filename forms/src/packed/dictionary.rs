//! Dictionaries: the distinct values once a chunk, and a packed code a row.
//!
//! The shared part of numbers is their values, one after the other; of text:
//!
//! ```text
//! offset  size  field
//!      0     8  bytes of the symbols, 0 of raw text
//!      8        the symbols
//!      …        for each 8192 values: bytes of the block, u64, then the block, padded to 8
//! ```
//!
//! The values of a sorted dictionary ascend, floats in their total order. A dictionary is unpacked when it is first used.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, OnceLock};

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::buffer::{Buffer, NullBuffer};
use arrow::datatypes::{ArrowNativeType, DataType, i256};
use bytes::Bytes;
use twox_hash::XxHash3_64;

use super::bits::{self, Allow, Scratch, Stream};
use super::text::{self, Symbols};
use super::{Parts, integers};
use crate::bytes::{buffer, pad, part, read_u64, shared, typed};
use crate::error::corrupt;
use crate::{BLOCK_ROWS, Result};

/// Larger dictionaries are left in the order in which their values came.
const SORTED_MAX: usize = 1 << 16;

/// The dictionary of an opened chunk.
#[derive(Debug)]
pub(super) struct Dictionary {
    bytes: Bytes,
    data_type: DataType,
    pub(super) len: usize,
    unpacked: OnceLock<std::result::Result<Unpacked, String>>,
}

/// A dictionary that was used.
#[derive(Debug)]
struct Unpacked {
    values: ArrayRef,
    /// What the views of text point into.
    buffers: Arc<[Buffer]>,
}

impl Dictionary {
    pub(super) fn open(bytes: Bytes, data_type: &DataType, len: usize) -> Result<Self> {
        if len == 0 {
            return Err(corrupt("values of the dictionary", 0, "at least 1"));
        }
        match data_type.primitive_width() {
            _ if text::is_text(data_type) => {
                part(&bytes, "dictionary", 0, 8)?;
                // A value takes no byte where its length is zero, but its block has a header.
                if len.div_ceil(BLOCK_ROWS) > bytes.len() {
                    return Err(corrupt("values of the dictionary", len, "as many as fit"));
                }
            }
            Some(width) if bytes.len() == len.saturating_mul(width) => {}
            _ => {
                return Err(corrupt(
                    "dictionary",
                    format!("{} bytes", bytes.len()),
                    format!("{len} values of {data_type}"),
                ));
            }
        }
        Ok(Self {
            bytes,
            data_type: data_type.clone(),
            len,
            unpacked: OnceLock::new(),
        })
    }

    /// The distinct values.
    pub(super) fn values(&self, scratch: &mut Scratch) -> Result<&ArrayRef> {
        Ok(&self.unpacked(scratch)?.values)
    }

    fn unpacked(&self, scratch: &mut Scratch) -> Result<&Unpacked> {
        let unpacked = self
            .unpacked
            .get_or_init(|| self.unpack(scratch).map_err(|error| error.to_string()));
        unpacked
            .as_ref()
            .map_err(|error| corrupt("dictionary", error, "values of the chunk's type"))
    }

    fn unpack(&self, scratch: &mut Scratch) -> Result<Unpacked> {
        if !text::is_text(&self.data_type) {
            let values = buffer(self.bytes.clone());
            return Ok(Unpacked {
                values: integers::array(&self.data_type, self.len, values, None)?,
                buffers: Arc::new([]),
            });
        }
        let symbols_bytes = read_u64(&self.bytes, 0) as usize;
        let symbols = part(&self.bytes, "symbols", 8, symbols_bytes)?;
        let symbols = match symbols_bytes {
            0 => None,
            _ => Some(Symbols::open(symbols)?),
        };
        let mut at = 8 + symbols_bytes;
        let mut views = Vec::with_capacity(self.len);
        let mut buffers: Vec<Buffer> = vec![];
        while views.len() < self.len {
            part(&self.bytes, "dictionary", at, 8)?;
            let length = read_u64(&self.bytes, at) as usize;
            let block = shared(&self.bytes, "dictionary", at + 8, length)?;
            at += 8 + length.next_multiple_of(8);
            let rows = BLOCK_ROWS.min(self.len - views.len());
            let number = buffers.len() as u32;
            let block = text::Block::open(&block, rows)?;
            let block = block.decode(symbols.as_ref(), number, scratch)?;
            views.extend_from_slice(&block.views);
            buffers.push(block.data);
        }
        let buffers: Arc<[Buffer]> = buffers.into();
        Ok(Unpacked {
            values: text::array(&self.data_type, views, Arc::clone(&buffers), None)?,
            buffers,
        })
    }

    /// The codes of a block, all or those of some rows, each less than the dictionary's length.
    pub(super) fn codes(
        &self,
        parts: &Parts,
        rows: Option<&[u32]>,
        scratch: &mut Scratch,
    ) -> Result<Vec<u32>> {
        let stream = Stream::parse(&parts.payload, parts.rows)?;
        let mut codes: Vec<u32> = vec![];
        match rows {
            None => stream.decode(0, scratch, &mut codes)?,
            Some(rows) => stream.gather(rows, 0, scratch, &mut codes)?,
        }
        let largest = codes.iter().copied().max().unwrap_or(0) as usize;
        if largest >= self.len {
            return Err(corrupt("code", largest, format!("less than {}", self.len)));
        }
        Ok(codes)
    }

    /// The values of a block, all or those of some rows.
    pub(super) fn decode(
        &self,
        parts: &Parts,
        rows: Option<&[u32]>,
        scratch: &mut Scratch,
    ) -> Result<ArrayRef> {
        let codes = self.codes(parts, rows, scratch)?;
        let unpacked = self.unpacked(scratch)?;
        self.look_up(unpacked, &codes, parts.nulls(rows))
    }

    fn look_up(
        &self,
        unpacked: &Unpacked,
        codes: &[u32],
        nulls: Option<NullBuffer>,
    ) -> Result<ArrayRef> {
        let data_type = &self.data_type;
        let values = &unpacked.values;
        let buffers = || Arc::clone(&unpacked.buffers);
        match data_type {
            DataType::Utf8View => {
                let views = gathered(values.as_string_view().views(), codes);
                text::array(data_type, views, buffers(), nulls)
            }
            DataType::BinaryView => {
                let views = gathered(values.as_binary_view().views(), codes);
                text::array(data_type, views, buffers(), nulls)
            }
            _ => {
                let data = values.to_data();
                let bytes = data.buffers()[0].as_slice();
                let gathered = match data_type.primitive_width() {
                    Some(1) => gathered_words::<i8>(bytes, codes)?,
                    Some(2) => gathered_words::<i16>(bytes, codes)?,
                    Some(4) => gathered_words::<i32>(bytes, codes)?,
                    Some(8) => gathered_words::<i64>(bytes, codes)?,
                    Some(16) => gathered_words::<i128>(bytes, codes)?,
                    Some(32) => gathered_words::<i256>(bytes, codes)?,
                    _ => return Err(corrupt("dictionary", data_type, "a type of fixed width")),
                };
                integers::array(data_type, codes.len(), gathered, nulls)
            }
        }
    }
}

fn gathered_words<N: ArrowNativeType>(bytes: &[u8], codes: &[u32]) -> Result<Buffer> {
    Ok(Buffer::from_vec(gathered(
        typed::<N>(bytes, "dictionary")?,
        codes,
    )))
}

/// The value of each code, which is known to have one.
fn gathered<T: Copy>(values: &[T], codes: &[u32]) -> Vec<T> {
    codes.iter().map(|code| values[*code as usize]).collect()
}

/// The distinct values of a chunk, and which one each row has.
pub(super) struct Distinct<'a> {
    /// In the order in which they came.
    pub(super) values: Vec<Word<'a>>,
    /// For each block, a code for each row; of null rows, that of the row before.
    pub(super) codes: Vec<Vec<u32>>,
}

/// A value as its bytes.
pub(super) type Word<'a> = &'a [u8];

/// Collects the distinct values of blocks of values; `None` where there are more than `most`, or
/// after some block more than `share` of the rows so far have values of their own.
pub(super) fn distinct<'a>(
    blocks: impl Iterator<Item = (Vec<Word<'a>>, Option<NullBuffer>)>,
    most: usize,
    share: f64,
) -> Option<Distinct<'a>> {
    let mut known: HashMap<Word<'a>, u32, BuildHasherDefault<WordHasher>> = HashMap::default();
    let mut values = vec![];
    let mut codes = vec![];
    let mut rows = 0;
    for (words, nulls) in blocks {
        let mut of_block = Vec::with_capacity(words.len());
        let mut before = 0;
        for (row, word) in words.iter().enumerate() {
            if nulls.as_ref().is_none_or(|nulls| nulls.is_valid(row)) {
                before = *known.entry(word).or_insert_with(|| {
                    values.push(*word);
                    values.len() as u32 - 1
                });
            }
            of_block.push(before);
        }
        rows += words.len();
        codes.push(of_block);
        if values.len() > most || values.len() as f64 > rows as f64 * share + 64.0 {
            return None;
        }
    }
    Some(Distinct { values, codes })
}

/// Hashes the bytes of a value, whose length the map's key adds.
#[derive(Default)]
struct WordHasher(u64);

impl Hasher for WordHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = XxHash3_64::oneshot_with_seed(self.0, bytes);
    }

    fn write_usize(&mut self, _: usize) {
        // The length of a slice: its bytes are hashed as a whole, which tells lengths apart.
    }
}

impl Distinct<'_> {
    /// Puts the values in ascending order, if they are few enough.
    ///
    /// Then what a range of values matches is a range of codes.
    pub(super) fn sort(&mut self, order: impl Fn(&[u8], &[u8]) -> std::cmp::Ordering) {
        if self.values.len() > SORTED_MAX {
            return;
        }
        let mut by_value: Vec<u32> = (0..self.values.len() as u32).collect();
        by_value.sort_unstable_by(|a, b| order(self.values[*a as usize], self.values[*b as usize]));
        let mut place = vec![0; by_value.len()];
        for (to, from) in by_value.iter().enumerate() {
            place[*from as usize] = to as u32;
        }
        self.values = by_value
            .iter()
            .map(|from| self.values[*from as usize])
            .collect();
        for code in self.codes.iter_mut().flatten() {
            *code = place[*code as usize];
        }
    }

    /// The payload of a block.
    pub(super) fn encode_block(&self, block: usize, out: &mut Vec<u8>) {
        let codes: Vec<u64> = self.codes[block]
            .iter()
            .map(|code| u64::from(*code))
            .collect();
        bits::encode(&codes, Allow::All, out);
    }

    /// The shared part of text.
    pub(super) fn encode_text(&self, out: &mut Vec<u8>) -> Result<()> {
        let bytes: usize = self.values.iter().map(|v| v.len()).sum();
        // Unpacking a small dictionary costs more than the bytes that it saves.
        let compressor = match bytes < 16 * 1024 {
            true => None,
            false => text::train(&self.values),
        };
        let mut symbols = vec![];
        if let Some(compressor) = &compressor {
            text::write_symbols(compressor, &mut symbols);
        }
        out.extend_from_slice(&(symbols.len() as u64).to_le_bytes());
        out.extend_from_slice(&symbols);
        for values in self.values.chunks(BLOCK_ROWS) {
            let mut block = vec![];
            text::encode(values, compressor.as_ref(), &mut block)?;
            out.extend_from_slice(&(block.len() as u64).to_le_bytes());
            out.extend_from_slice(&block);
            pad(out, 8);
        }
        Ok(())
    }

    /// The shared part of numbers.
    pub(super) fn encode_words(&self, out: &mut Vec<u8>) {
        self.values
            .iter()
            .for_each(|value| out.extend_from_slice(value));
    }
}
