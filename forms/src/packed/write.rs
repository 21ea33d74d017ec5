//! Choosing an encoding, and writing a chunk in it.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BooleanBufferBuilder};
use arrow::datatypes::DataType;

use super::bits::{self, Allow};
use super::{ENTRY_BYTES, Encoding, HEADER_BYTES, MAGIC, VERSION, integers};
use crate::arrow_form::{ArrowChunkWriter, supports};
use crate::bytes::{ALIGN, pad};
use crate::statistics::Collector;
use crate::{BLOCK_ROWS, Error, Result};

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
        for block in &self.blocks {
            collector.block(block);
        }
        let body = self.body()?;
        Ok(self.assemble(body, collector.finish()?))
    }

    fn body(&self) -> Result<Body> {
        if integers::width(&self.data_type).is_some()
            && let Some((low, high)) = integers::range(&self.blocks)
            && high
                .checked_sub(low)
                .is_some_and(|span| u64::try_from(span).is_ok())
        {
            let mut body = Body::new(Encoding::Integers);
            body.base = low;
            for block in &self.blocks {
                let mut payload = vec![];
                if block.null_count() < block.len() {
                    bits::encode(&integers::offsets(block, low), Allow::All, &mut payload);
                }
                body.blocks.push(payload);
            }
            return Ok(body);
        }
        let mut plain = ArrowChunkWriter::bare(self.data_type.clone())?;
        for block in &self.blocks {
            plain.push(block)?;
        }
        let mut body = Body::new(Encoding::Plain);
        body.shared = plain.finish()?;
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
                    let mut bits = BooleanBufferBuilder::new(block.len());
                    bits.append_buffer(bitmap.inner());
                    out.extend_from_slice(&bits.finish().values()[..block.len().div_ceil(8)]);
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
}

impl Body {
    fn new(encoding: Encoding) -> Self {
        Self {
            encoding,
            base: 0,
            shared: vec![],
            blocks: vec![],
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
