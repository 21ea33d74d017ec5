//! Choosing an encoding, and writing a chunk in it.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanBufferBuilder, new_null_array};
use arrow::buffer::BooleanBuffer;
use arrow::datatypes::DataType;

use super::bits::{self, Allow};
use super::dictionary::Distinct;
use super::{ENTRY_BYTES, Encoding, HEADER_BYTES, MAGIC, VERSION, floats, integers, text};
use crate::arrow_form::{ArrowChunkWriter, supports};
use crate::bytes::{ALIGN, pad};
use crate::statistics::Collector;
use crate::{BLOCK_ROWS, Error, Result};

/// Largest dictionary of numbers: 16 bits a code.
const NUMBERS_MAX: usize = 1 << 16;
/// The share of rows with values of their own up to which text gets a dictionary.
const DISTINCT_SHARE: f64 = 0.4;

/// Packs one chunk, from arrays of any lengths.
#[derive(Debug)]
pub struct PackedChunkWriter {
    data_type: DataType,
    blocks: Vec<ArrayRef>,
    pending: Vec<ArrayRef>,
    pending_rows: usize,
    rows: u64,
}

impl PackedChunkWriter {
    /// Starts a chunk of values of `data_type`.
    ///
    /// # Errors
    /// [`Error::UnsupportedType`] where [`supports`] is false.
    pub fn new(data_type: DataType) -> Result<Self> {
        if !supports(&data_type) {
            return Err(Error::UnsupportedType(data_type));
        }
        Ok(Self {
            data_type,
            blocks: vec![],
            pending: vec![],
            pending_rows: 0,
            rows: 0,
        })
    }

    /// Appends values.
    ///
    /// # Errors
    /// [`Error::TypeMismatch`] for an array of another type.
    pub fn push(&mut self, array: &ArrayRef) -> Result<()> {
        if array.data_type() != &self.data_type {
            return Err(Error::TypeMismatch {
                found: array.data_type().clone(),
                expected: self.data_type.clone(),
            });
        }
        self.rows += array.len() as u64;
        let mut at = 0;
        while at < array.len() {
            let take = (BLOCK_ROWS - self.pending_rows).min(array.len() - at);
            self.pending.push(array.slice(at, take));
            self.pending_rows += take;
            at += take;
            if self.pending_rows == BLOCK_ROWS {
                self.cut()?;
            }
        }
        Ok(())
    }

    fn cut(&mut self) -> Result<()> {
        let parts = std::mem::take(&mut self.pending);
        self.pending_rows = 0;
        self.blocks.push(match &parts[..] {
            [one] => Arc::clone(one),
            many => arrow::compute::concat(&many.iter().map(|a| a.as_ref()).collect::<Vec<_>>())?,
        });
        Ok(())
    }

    /// The chunk's bytes.
    ///
    /// # Errors
    /// [`Error::BlockTooLarge`] where the strings of a block do not fit one buffer.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        if self.pending_rows > 0 {
            self.cut()?;
        }
        let mut collector = Collector::new(&self.data_type);
        let body = match &self.data_type {
            data_type if text::is_text(data_type) => self.text(&mut collector)?,
            data_type => {
                for block in &self.blocks {
                    collector.block_without_sketch(block);
                }
                match data_type {
                    DataType::Boolean => self.booleans(&mut collector)?,
                    _ if integers::width(data_type).is_some() => self.integers(&mut collector)?,
                    DataType::Float32 | DataType::Float64 => self.floats(&mut collector)?,
                    _ => {
                        self.count(&mut collector);
                        self.plain()?
                    }
                }
            }
        };
        Ok(self.assemble(body, collector.finish()?))
    }

    /// Counts the values of all blocks.
    fn count(&self, collector: &mut Collector) {
        if let Some(sketch) = collector.sketch() {
            self.blocks.iter().for_each(|block| sketch.add(block));
        }
    }

    fn has_nulls(&self) -> bool {
        self.blocks.iter().any(|block| block.null_count() > 0)
    }

    /// Everything is null, or nothing is there.
    fn nothing(&self) -> Result<Option<Body>> {
        let mut blocks = self.blocks.iter();
        match blocks.any(|block| block.null_count() < block.len()) {
            true => Ok(None),
            false => self.constant(&new_null_array(&self.data_type, 1)).map(Some),
        }
    }

    fn constant(&self, value: &ArrayRef) -> Result<Body> {
        let mut body = Body::new(Encoding::Constant);
        let mut one = ArrowChunkWriter::bare(self.data_type.clone())?;
        one.push(value)?;
        body.shared = one.finish()?.to_vec();
        Ok(body)
    }

    fn plain(&self) -> Result<Body> {
        let mut plain = ArrowChunkWriter::bare(self.data_type.clone())?;
        for block in &self.blocks {
            plain.push(block)?;
        }
        let mut body = Body::new(Encoding::Plain);
        body.shared = plain.finish()?.to_vec();
        Ok(body)
    }

    /// A body whose blocks are written by `encode`, empty where all is null.
    fn of_blocks(
        &self,
        encoding: Encoding,
        mut encode: impl FnMut(usize, &ArrayRef, &mut Vec<u8>) -> Result<()>,
    ) -> Result<Body> {
        let mut body = Body::new(encoding);
        for (index, block) in self.blocks.iter().enumerate() {
            let mut payload = vec![];
            if block.null_count() < block.len() {
                encode(index, block, &mut payload)?;
            }
            body.blocks.push(payload);
        }
        Ok(body)
    }

    fn booleans(&self, collector: &mut Collector) -> Result<Body> {
        self.count(collector);
        if let Some(body) = self.nothing()? {
            return Ok(body);
        }
        let trues = |block: &ArrayRef| block.as_boolean().values().count_set_bits();
        let all_alike = |hit: bool| {
            self.blocks
                .iter()
                .all(|block| trues(block) == if hit { block.len() } else { 0 })
        };
        if !self.has_nulls() && (all_alike(true) || all_alike(false)) {
            return self.constant(&self.blocks[0].slice(0, 1));
        }
        self.of_blocks(Encoding::Bits, |_, block, out| {
            out.extend_from_slice(&bitmap(block.as_boolean().values()));
            Ok(())
        })
    }

    fn integers(&self, collector: &mut Collector) -> Result<Body> {
        if let Some(body) = self.nothing()? {
            return Ok(body);
        }
        let range = integers::range(collector.bounds());
        let span = range.and_then(|(low, high)| u64::try_from(high.wrapping_sub(low) as u128).ok());
        let bits = match span {
            Some(span) => u64::BITS - span.leading_zeros(),
            None => self.data_type.primitive_width().unwrap_or(0) as u32 * 8,
        };
        self.count(collector);
        let repeated = self.dictionary(collector, bits)?;
        let body = match (range, span) {
            (_, Some(0)) if !self.has_nulls() => {
                return self.constant(&self.blocks[0].slice(0, 1));
            }
            (Some((low, _)), Some(_)) => {
                let mut body = self.of_blocks(Encoding::Integers, |_, block, out| {
                    bits::encode(&integers::offsets(block, low), Allow::All, out);
                    Ok(())
                })?;
                body.base = low;
                body
            }
            _ => self.plain()?,
        };
        Ok(smaller_of(body, repeated))
    }

    fn floats(&self, collector: &mut Collector) -> Result<Body> {
        if let Some(body) = self.nothing()? {
            return Ok(body);
        }
        let width = self.data_type.primitive_width().unwrap_or(0) as u32;
        self.count(collector);
        let repeated = self.dictionary(collector, width * 8)?;
        if let Some(body) = &repeated
            && body.values == 1
            && !self.has_nulls()
        {
            return self.constant(&self.blocks[0].slice(0, 1));
        }
        let body = match floats::exponents(&self.blocks, &self.data_type) {
            None => self.plain()?,
            Some(exponents) => self.of_blocks(Encoding::Floats, |_, block, out| {
                floats::encode(block, exponents, out);
                Ok(())
            })?,
        };
        Ok(smaller_of(body, repeated))
    }

    /// Numbers with a dictionary, where as many distinct values as were counted, and a code for
    /// each row, take clearly less than `bits` bits a row.
    fn dictionary(&self, collector: &mut Collector, bits: u32) -> Result<Option<Body>> {
        let width = self.data_type.primitive_width().unwrap_or(0);
        let counted = collector.sketch().map(|sketch| sketch.estimate() as usize);
        let Some(counted) = counted.filter(|counted| width <= 16 && *counted <= NUMBERS_MAX) else {
            return Ok(None);
        };
        let code_bits = |values: usize| (usize::BITS - values.leading_zeros()) as usize;
        let bits_of = |values: usize| values * width * 8 + self.rows as usize * code_bits(values);
        let bits_most = self.rows as usize * bits as usize / 4 * 3;
        if bits_of(counted) > bits_most {
            return Ok(None);
        }
        let mut distinct = Distinct::new();
        for block in &self.blocks {
            distinct.block(integers::words(block).into_iter(), block.nulls());
            let found = distinct.values.len();
            if distinct.is_flooded || found > NUMBERS_MAX || bits_of(found) > bits_most {
                return Ok(None);
            }
        }
        distinct.sort(integers::order(&self.data_type));
        let mut body = self.of_blocks(Encoding::Dictionary, |index, _, out| {
            distinct.encode_block(index, out);
            Ok(())
        })?;
        for value in &distinct.values {
            body.shared.extend_from_slice(&value.to_le_bytes()[..width]);
        }
        body.values = distinct.values.len();
        Ok(Some(body))
    }

    fn text(&self, collector: &mut Collector) -> Result<Body> {
        let mut distinct = Distinct::new();
        let mut rows = 0;
        let mut repeats = true;
        for block in &self.blocks {
            distinct.text_block(block);
            rows += block.len();
            let most = rows as f64 * DISTINCT_SHARE + 64.0;
            repeats = !distinct.is_flooded && distinct.values.len() as f64 <= most;
            if !repeats {
                break;
            }
        }
        let all: Vec<Vec<&[u8]>> = match repeats {
            true => vec![],
            false => self.blocks.iter().map(text::values).collect(),
        };
        let sorted = repeats && distinct.sort(|a, b| a.cmp(b));
        for (index, block) in self.blocks.iter().enumerate() {
            match sorted {
                true => {
                    let bounds = distinct.bounds(index, block.nulls());
                    let bounds = bounds.filter(|_| block.null_count() < block.len());
                    let bounds = bounds.map(|pair| text::pair(&self.data_type, pair));
                    collector.block_with_bounds(block, bounds);
                }
                false => collector.block_without_sketch(block),
            }
        }
        if let Some(sketch) = collector.sketch() {
            match repeats {
                true => distinct.count(sketch),
                false => {
                    for (block, values) in self.blocks.iter().zip(&all) {
                        let valid = |row: &usize| block.is_valid(*row);
                        let rows = (0..values.len()).filter(valid);
                        rows.for_each(|row| sketch.add_bytes(values[row]));
                    }
                }
            }
        }
        if let Some(body) = self.nothing()? {
            return Ok(body);
        }
        if repeats {
            if distinct.values.len() == 1 && !self.has_nulls() {
                return self.constant(&self.blocks[0].slice(0, 1));
            }
            let mut body = self.of_blocks(Encoding::Dictionary, |index, _, out| {
                distinct.encode_block(index, out);
                Ok(())
            })?;
            distinct.encode_text(&mut body.shared)?;
            body.values = distinct.values.len();
            return Ok(body);
        }
        let compressor = text::train(&all);
        let encoding = match compressor {
            None => Encoding::Text,
            Some(_) => Encoding::CompressedText,
        };
        let mut body = self.of_blocks(encoding, |index, _, out| {
            text::encode(&all[index], compressor.as_ref(), out)
        })?;
        if let Some(compressor) = &compressor {
            text::write_symbols(compressor, &mut body.shared);
        }
        Ok(body)
    }

    fn assemble(&self, body: Body, known: Vec<u8>) -> Vec<u8> {
        let directory = HEADER_BYTES + self.blocks.len() * ENTRY_BYTES;
        let values: usize = body.blocks.iter().map(|b| b.len() + 2 * ALIGN).sum();
        let mut out =
            Vec::with_capacity(directory + values + known.len() + body.shared.len() + 4 * ALIGN);
        out.resize(directory, 0);
        let place = |out: &mut Vec<u8>, section: &[u8]| {
            pad(out, ALIGN);
            let offset = out.len();
            out.extend_from_slice(section);
            offset
        };
        let known_at = place(&mut out, &known);
        let shared_at = place(&mut out, &body.shared);
        for (index, block) in self.blocks.iter().enumerate() {
            pad(&mut out, ALIGN);
            let offset = out.len();
            let nulls = block.logical_null_count();
            if let Some(payload) = body.blocks.get(index)
                && nulls < block.len()
            {
                if let Some(bitmap) = block.nulls().filter(|_| nulls > 0) {
                    out.extend_from_slice(&self::bitmap(bitmap.inner()));
                    pad(&mut out, ALIGN);
                }
                out.extend_from_slice(payload);
            }
            let entry = HEADER_BYTES + index * ENTRY_BYTES;
            let length = (out.len() - offset) as u32;
            out[entry..entry + 8].copy_from_slice(&(offset as u64).to_le_bytes());
            out[entry + 8..entry + 12].copy_from_slice(&length.to_le_bytes());
            out[entry + 12..entry + 16].copy_from_slice(&(nulls as u32).to_le_bytes());
        }
        pad(&mut out, ALIGN);
        let total = out.len() as u64;
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&VERSION.to_le_bytes());
        out[10] = body.encoding as u8;
        out[12..16].copy_from_slice(&(BLOCK_ROWS as u32).to_le_bytes());
        out[16..24].copy_from_slice(&self.rows.to_le_bytes());
        out[24..28].copy_from_slice(&(self.blocks.len() as u32).to_le_bytes());
        out[28..32].copy_from_slice(&(body.values as u32).to_le_bytes());
        out[32..40].copy_from_slice(&total.to_le_bytes());
        out[40..48].copy_from_slice(&(known_at as u64).to_le_bytes());
        out[48..56].copy_from_slice(&(known.len() as u64).to_le_bytes());
        out[56..64].copy_from_slice(&(shared_at as u64).to_le_bytes());
        out[64..72].copy_from_slice(&(body.shared.len() as u64).to_le_bytes());
        out[72..88].copy_from_slice(&body.base.to_le_bytes());
        out
    }
}

/// A chunk's values in one encoding.
struct Body {
    encoding: Encoding,
    base: i128,
    shared: Vec<u8>,
    /// The payload of each block; none where the shared part has everything.
    blocks: Vec<Vec<u8>>,
    /// Values of the dictionary.
    values: usize,
}

/// Numbers with a dictionary instead, if that is much smaller: looking codes up takes its time.
fn smaller_of(body: Body, repeated: Option<Body>) -> Body {
    match repeated {
        Some(repeated) if repeated.bytes() * 4 <= body.bytes() * 3 => repeated,
        _ => body,
    }
}

/// The bits as bytes from the first one on, zeros behind the last one.
fn bitmap(bits: &BooleanBuffer) -> Vec<u8> {
    let mut own = BooleanBufferBuilder::new(bits.len());
    own.append_buffer(bits);
    own.finish().values()[..bits.len().div_ceil(8)].to_vec()
}

impl Body {
    fn bytes(&self) -> usize {
        self.shared.len() + self.blocks.iter().map(Vec::len).sum::<usize>()
    }

    fn new(encoding: Encoding) -> Self {
        Self {
            encoding,
            base: 0,
            shared: vec![],
            blocks: vec![],
            values: 0,
        }
    }
}

/// Packs arrays of one type as one chunk: see [`PackedChunkWriter`].
pub fn encode_packed(arrays: &[ArrayRef], data_type: &DataType) -> Result<Vec<u8>> {
    let mut writer = PackedChunkWriter::new(data_type.clone())?;
    for array in arrays {
        writer.push(array)?;
    }
    writer.finish()
}
