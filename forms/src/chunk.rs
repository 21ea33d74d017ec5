//! A chunk in either decoded form, as a scan reads it.

use arrow::array::{ArrayRef, BooleanArray, Datum, Scalar};
use arrow::buffer::BooleanBuffer;
use arrow::compute::kernels::cmp;
use arrow::datatypes::DataType;
use bytes::Bytes;

use crate::comparison::Comparison;
use crate::error::corrupt;
use crate::packed::{self, PackedChunk};
use crate::statistics::{ChunkStatistics, Zones};
use crate::{ArrowChunk, Error, FORM_ARROW, FORM_PACKED, Result};

/// A chunk that is read block by block: cheap to clone, shared between threads.
///
/// Blocks have [`BLOCK_ROWS`](crate::BLOCK_ROWS) rows, the last one of a chunk fewer. A block is
/// decoded without any other one.
#[derive(Clone, Debug)]
pub enum Chunk {
    /// Decoded values, read in place.
    Arrow(ArrowChunk),
    /// Packed values, unpacked block by block.
    Packed(PackedChunk),
}

impl Chunk {
    /// Opens `bytes`, which have that form, as a chunk of values of `data_type`.
    ///
    /// # Errors
    /// [`Error::UnknownForm`] for another form than arrow and packed; else as
    /// [`ArrowChunk::open`] and [`PackedChunk::open`]. For a reader, each is a miss.
    pub fn open(form: u8, bytes: Bytes, data_type: &DataType) -> Result<Self> {
        match form {
            FORM_ARROW => ArrowChunk::open(bytes, data_type).map(Chunk::Arrow),
            FORM_PACKED => PackedChunk::open(bytes, data_type).map(Chunk::Packed),
            form => Err(Error::UnknownForm { form }),
        }
    }

    /// Its form's tag.
    pub fn form(&self) -> u8 {
        match self {
            Chunk::Arrow(_) => FORM_ARROW,
            Chunk::Packed(_) => FORM_PACKED,
        }
    }

    /// Rows of the chunk.
    pub fn rows(&self) -> usize {
        match self {
            Chunk::Arrow(chunk) => chunk.rows(),
            Chunk::Packed(chunk) => chunk.rows(),
        }
    }

    /// Bytes of the chunk.
    pub fn bytes(&self) -> usize {
        match self {
            Chunk::Arrow(chunk) => chunk.bytes(),
            Chunk::Packed(chunk) => chunk.bytes(),
        }
    }

    /// Blocks of the chunk.
    pub fn blocks(&self) -> usize {
        match self {
            Chunk::Arrow(chunk) => chunk.blocks(),
            Chunk::Packed(chunk) => chunk.blocks(),
        }
    }

    /// Rows of block `block`.
    pub fn block_rows(&self, block: usize) -> usize {
        match self {
            Chunk::Arrow(chunk) => chunk.block_rows(block),
            Chunk::Packed(chunk) => chunk.block_rows(block),
        }
    }

    /// The values of one block.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where the bytes are not what the worker wrote: a miss.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn block(&self, block: usize) -> Result<ArrayRef> {
        match self {
            Chunk::Arrow(chunk) => Ok(chunk.block(block)),
            Chunk::Packed(chunk) => chunk.block(block),
        }
    }

    /// The values of the rows of one block that `keep` has set: as filtering
    /// [`Chunk::block`], but where few are kept, only those are decoded.
    ///
    /// # Errors
    /// As [`Chunk::block`].
    ///
    /// # Panics
    /// If there is no such block, or `keep` has not its length.
    pub fn filtered(&self, block: usize, keep: &BooleanBuffer) -> Result<ArrayRef> {
        assert_eq!(keep.len(), self.block_rows(block), "a bit for each row");
        match self {
            Chunk::Arrow(chunk) => {
                let keep = BooleanArray::new(keep.clone(), None);
                Ok(arrow::compute::filter(&chunk.block(block), &keep)?)
            }
            Chunk::Packed(chunk) => chunk.filtered(block, keep),
        }
    }

    /// Makes a predicate ready for all blocks; `None` where decoding them and using Arrow's
    /// kernels is better.
    pub fn prepare(&self, comparison: &Comparison) -> Option<Prepared> {
        match (self, comparison) {
            // Arrow's own kernel makes a regular expression of it.
            (Chunk::Arrow(chunk), Comparison::Contains { texts, .. })
                if texts.len() > 1 && chunk.data_type() == &DataType::Utf8View =>
            {
                Some(Prepared(Of::Arrow(chunk.clone(), comparison.clone())))
            }
            (Chunk::Arrow(_), _) => None,
            (Chunk::Packed(chunk), _) => {
                let prepared = chunk.prepare(comparison)?;
                Some(Prepared(Of::Packed(prepared)))
            }
        }
    }

    /// The rows of one block of which the predicate is true, which it is not where it is null;
    /// `None` as for [`Chunk::prepare`], which is to be used for more than one block.
    pub fn evaluate(&self, block: usize, comparison: &Comparison) -> Option<Result<BooleanBuffer>> {
        self.prepare(comparison)
            .map(|prepared| prepared.evaluate(block))
    }

    /// What is known of each block; `None` of a chunk that cannot be read.
    pub fn zones(&self) -> Option<&Zones> {
        match self {
            Chunk::Arrow(chunk) => chunk.zones(),
            Chunk::Packed(chunk) => chunk.zones(),
        }
    }

    /// Whether some row may equal `value`: false only where the chunk's dictionary or bounds show
    /// that none does.
    pub fn may_contain(&self, value: &Scalar<ArrayRef>) -> bool {
        if within(self.statistics(), value) == Some(false) {
            return false;
        }
        match self {
            Chunk::Arrow(_) => true,
            Chunk::Packed(chunk) => chunk.may_contain(value),
        }
    }

    /// What is known of the whole chunk.
    pub fn statistics(&self) -> &ChunkStatistics {
        match self {
            Chunk::Arrow(chunk) => chunk.statistics(),
            Chunk::Packed(chunk) => chunk.statistics(),
        }
    }

    /// How the values are encoded, for people.
    pub fn encoding(&self) -> String {
        match self {
            Chunk::Arrow(_) => "plain".to_owned(),
            Chunk::Packed(chunk) => chunk.encoding(),
        }
    }
}

/// Whether a value lies between the bounds; `None` where that is not known.
fn within(statistics: &ChunkStatistics, value: &Scalar<ArrayRef>) -> Option<bool> {
    let (array, _) = value.get();
    if array.is_null(0) {
        return Some(false);
    }
    if statistics.null_count == statistics.rows {
        return Some(false);
    }
    let (min, max) = (statistics.min.as_ref()?, statistics.max.as_ref()?);
    let above = cmp::gt_eq(value, min).ok()?;
    let below = cmp::lt_eq(value, max).ok()?;
    Some(above.value(0) && below.value(0))
}

/// A predicate made ready for the blocks of one chunk.
#[derive(Clone, Debug)]
pub struct Prepared(Of);

#[derive(Clone, Debug)]
enum Of {
    Arrow(ArrowChunk, Comparison),
    Packed(packed::Prepared),
}

impl Prepared {
    /// Whether it is known beforehand that the predicate is true of no row of the chunk.
    pub fn is_never(&self) -> bool {
        match &self.0 {
            Of::Arrow(..) => false,
            Of::Packed(prepared) => prepared.is_never(),
        }
    }

    /// The rows of one block of which the predicate is true, which it is not where it is null.
    ///
    /// # Errors
    /// As [`Chunk::block`].
    ///
    /// # Panics
    /// If there is no such block.
    pub fn evaluate(&self, block: usize) -> Result<BooleanBuffer> {
        match &self.0 {
            Of::Packed(prepared) => prepared.evaluate(block),
            Of::Arrow(chunk, comparison) => {
                let values = chunk.block(block);
                let hits = comparison.of_values(&values).ok_or_else(|| {
                    corrupt(
                        "values",
                        values.data_type(),
                        "of a type that can be compared",
                    )
                })?;
                let (hits, nulls) = hits.into_parts();
                Ok(match nulls {
                    Some(nulls) => &hits & nulls.inner(),
                    None => hits,
                })
            }
        }
    }
}
