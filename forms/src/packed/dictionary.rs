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

use std::sync::{Arc, OnceLock};

use arrow::array::{Array, ArrayRef, AsArray, BooleanBufferBuilder};
use arrow::buffer::{BooleanBuffer, Buffer, NullBuffer};
use arrow::datatypes::{ArrowNativeType, DataType, i256};
use bytes::Bytes;

use super::bits::{self, Allow, Scratch, Stream};
use super::search::Search;
use super::text::{self, Symbols};
use super::{Parts, integers};
use crate::bytes::{buffer, pad, part, read_u64, shared, typed};
use crate::error::corrupt;
use crate::sketch::{Sketch, hash, hash_bytes};
use crate::{BLOCK_ROWS, Result};

/// Larger dictionaries are left in the order in which their values came.
const SORTED_MAX: usize = 1 << 16;
/// Text of smaller dictionaries is not compressed.
const RAW_MAX: usize = 16 * 1024;

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
        // As many as there are bytes, until their blocks have shown that there are more.
        let mut views = Vec::with_capacity(self.len.min(self.bytes.len()));
        let mut buffers: Vec<Buffer> = vec![];
        self.text_blocks(|symbols, block| {
            let block = block.decode(symbols, buffers.len() as u32, scratch)?;
            views.extend_from_slice(&block.views);
            buffers.push(block.data);
            Ok(())
        })?;
        let buffers = text::needed(&views, buffers.into());
        Ok(Unpacked {
            values: text::array(&self.data_type, views, Arc::clone(&buffers), None)?,
            buffers,
        })
    }

    /// Shows the blocks of text one after the other, with the symbols that they all have.
    fn text_blocks(
        &self,
        mut each: impl FnMut(Option<&Symbols>, &text::Block<'_>) -> Result<()>,
    ) -> Result<()> {
        let symbols_bytes = read_u64(&self.bytes, 0) as usize;
        let symbols = part(&self.bytes, "symbols", 8, symbols_bytes)?;
        let symbols = match symbols_bytes {
            0 => None,
            _ => Some(Symbols::open(symbols)?),
        };
        let mut at = 8 + symbols_bytes;
        let mut shown = 0;
        while shown < self.len {
            part(&self.bytes, "dictionary", at, 8)?;
            let length = read_u64(&self.bytes, at) as usize;
            let block = shared(&self.bytes, "dictionary", at + 8, length)?;
            at += 8 + length.next_multiple_of(8);
            let rows = BLOCK_ROWS.min(self.len - shown);
            each(symbols.as_ref(), &text::Block::open(&block, rows)?)?;
            shown += rows;
        }
        Ok(())
    }

    /// The values that have `texts` in them, each behind the one before it; `None` where unpacking
    /// and comparing is better.
    pub(super) fn containing(
        &self,
        texts: &[String],
        scratch: &mut Scratch,
    ) -> Result<Option<BooleanBuffer>> {
        let mut search = None;
        let mut hits = BooleanBufferBuilder::new(self.len);
        self.text_blocks(|symbols, block| {
            if search.is_none() {
                search = Search::new(texts, symbols);
            }
            if let Some(search) = &search {
                hits.append_buffer(&search.rows(block, symbols, scratch)?);
            }
            Ok(())
        })?;
        Ok(search.map(|_| hits.finish()))
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

/// A value that is looked up by its hash.
pub(super) trait Key: Copy + Eq {
    fn hash(self) -> u64;
}

impl Key for &[u8] {
    #[inline]
    fn hash(self) -> u64 {
        hash_bytes(self)
    }
}

impl Key for i128 {
    #[inline(always)]
    fn hash(self) -> u64 {
        hash(self)
    }
}

/// Slots that are looked at for one value. A table that is half full needs a few; values of one hash
/// need as many as there are.
const PROBES_MAX: usize = 1000;

/// Distinct values in the order in which they came, and a table to find them in.
pub(super) struct Distinct<K> {
    pub(super) values: Vec<K>,
    /// For each block, a code for each row; of null rows, that of the row before.
    pub(super) codes: Vec<Vec<u32>>,
    hashes: Vec<u64>,
    /// Codes plus one by their hash, 0 where there is none; twice as many as values at least.
    slots: Vec<u32>,
    /// Whether the values' hashes are so much alike that finding one takes too long.
    pub(super) is_flooded: bool,
}

impl<K: Key> Distinct<K> {
    pub(super) fn new() -> Self {
        Self {
            values: vec![],
            codes: vec![],
            hashes: vec![],
            slots: vec![0; 1024],
            is_flooded: false,
        }
    }

    /// The code of a value, which may be a new one. Any code once there are too many values of one
    /// hash, which somebody may choose.
    #[inline]
    fn code(&mut self, value: K, hash: u64) -> u32 {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        let mut probes = 0;
        loop {
            match self.slots[at] {
                0 => break,
                found => {
                    let code = found as usize - 1;
                    if self.hashes[code] == hash && self.values[code] == value {
                        return found - 1;
                    }
                }
            }
            if probes == PROBES_MAX || self.is_flooded {
                self.is_flooded = true;
                return 0;
            }
            probes += 1;
            at = (at + 1) & mask;
        }
        self.values.push(value);
        self.hashes.push(hash);
        let code = self.values.len() as u32;
        self.slots[at] = code;
        if self.values.len() * 2 > self.slots.len() {
            self.grow();
        }
        code - 1
    }

    #[cold]
    fn grow(&mut self) {
        let mask = self.slots.len() * 4 - 1;
        self.slots = vec![0; mask + 1];
        for (code, hash) in self.hashes.iter().enumerate() {
            let mut at = *hash as usize & mask;
            while self.slots[at] != 0 {
                at = (at + 1) & mask;
            }
            self.slots[at] = code as u32 + 1;
        }
    }

    /// Looks at one block of values.
    pub(super) fn block(&mut self, values: impl Iterator<Item = K>, nulls: Option<&NullBuffer>) {
        let mut codes = Vec::with_capacity(BLOCK_ROWS);
        match nulls.filter(|nulls| nulls.null_count() > 0) {
            None => codes.extend(values.map(|value| self.code(value, value.hash()))),
            Some(nulls) => {
                let mut before = 0;
                for (row, value) in values.enumerate() {
                    if nulls.is_valid(row) {
                        before = self.code(value, value.hash());
                    }
                    codes.push(before);
                }
            }
        }
        self.codes.push(codes);
    }

    /// Counts the distinct values.
    pub(super) fn count(&self, sketch: &mut Sketch) {
        self.hashes.iter().for_each(|hash| sketch.add_hash(*hash));
    }

    /// Puts the values in ascending order, if they are few enough; whether they are.
    ///
    /// Then what a range of values matches is a range of codes.
    pub(super) fn sort(&mut self, order: impl Fn(&K, &K) -> std::cmp::Ordering) -> bool {
        if self.values.is_empty() || self.values.len() > SORTED_MAX {
            return false;
        }
        let mut by_value: Vec<u32> = (0..self.values.len() as u32).collect();
        by_value
            .sort_unstable_by(|a, b| order(&self.values[*a as usize], &self.values[*b as usize]));
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
        true
    }

    /// The payload of a block.
    pub(super) fn encode_block(&self, block: usize, out: &mut Vec<u8>) {
        let codes: Vec<u64> = self.codes[block]
            .iter()
            .map(|code| u64::from(*code))
            .collect();
        bits::encode(&codes, Allow::All, out);
    }
}

/// Views seen last in a block, by their hash.
const VIEWS: usize = 256;

impl<'a> Distinct<&'a [u8]> {
    /// Looks at one block of text.
    ///
    /// Equal views of one array are equal values, and values that come from a dictionary of the
    /// file have equal views: most need no look at their bytes.
    pub(super) fn text_block(&mut self, block: &'a ArrayRef) {
        match block.as_string_view_opt() {
            Some(block) => self.views(block.views(), block.nulls(), |row| {
                block.value(row).as_bytes()
            }),
            None => {
                let block = block.as_binary_view();
                self.views(block.views(), block.nulls(), |row| block.value(row));
            }
        }
    }

    fn views(
        &mut self,
        views: &[u128],
        nulls: Option<&NullBuffer>,
        value: impl Fn(usize) -> &'a [u8],
    ) {
        // A code of none is that of a view that was not seen.
        let mut seen = [(0u128, u32::MAX); VIEWS];
        let mut codes = Vec::with_capacity(views.len());
        let mut before = 0;
        for (row, view) in views.iter().enumerate() {
            if nulls.is_none_or(|nulls| nulls.is_valid(row)) {
                let place = &mut seen[Key::hash(*view as i128) as usize % VIEWS];
                if place.0 == *view && place.1 != u32::MAX {
                    before = place.1;
                } else {
                    let value = value(row);
                    before = self.code(value, value.hash());
                    *place = (*view, before);
                }
            }
            codes.push(before);
        }
        self.codes.push(codes);
    }

    /// The shared part.
    pub(super) fn encode_text(&self, out: &mut Vec<u8>) -> Result<()> {
        let bytes: usize = self.values.iter().map(|v| v.len()).sum();
        // Unpacking a small dictionary costs more than the bytes that it saves.
        let compressor = match bytes < RAW_MAX {
            true => None,
            false => text::train(std::slice::from_ref(&self.values)),
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

    /// The least and the largest value of a block of a sorted dictionary, nulls aside.
    pub(super) fn bounds(&self, block: usize, nulls: Option<&NullBuffer>) -> Option<[&[u8]; 2]> {
        let codes = &self.codes[block];
        let (mut low, mut high) = (u32::MAX, 0);
        match nulls.filter(|nulls| nulls.null_count() > 0) {
            None => {
                for code in codes {
                    (low, high) = (low.min(*code), high.max(*code));
                }
            }
            Some(nulls) => {
                for at in nulls.valid_indices() {
                    (low, high) = (low.min(codes[at]), high.max(codes[at]));
                }
            }
        }
        let value = |code: u32| self.values.get(code as usize).copied();
        Some([value(low)?, value(high)?])
    }
}
