//! Predicates on packed values.

use arrow::buffer::BooleanBuffer;

use super::PackedChunk;
use crate::Result;
use crate::comparison::Comparison;

/// A predicate made ready for the blocks of one chunk.
#[derive(Clone, Debug)]
pub struct Prepared {
    chunk: PackedChunk,
    test: Test,
}

#[derive(Clone, Debug)]
enum Test {
    Null(bool),
}

impl Prepared {
    pub(super) fn new(chunk: &PackedChunk, comparison: &Comparison) -> Option<Self> {
        let test = match comparison {
            Comparison::IsNull => Test::Null(true),
            Comparison::IsNotNull => Test::Null(false),
            _ => return None,
        };
        Some(Self {
            chunk: chunk.clone(),
            test,
        })
    }

    /// The rows of one block of which the predicate is true, which it is not where it is null.
    ///
    /// # Errors
    /// As [`PackedChunk::block`].
    ///
    /// # Panics
    /// If there is no such block.
    pub fn evaluate(&self, block: usize) -> Result<BooleanBuffer> {
        let chunk = &self.chunk.inner;
        match &self.test {
            Test::Null(null) => {
                let array = chunk.block(block)?;
                let rows = array.len();
                let valid = match array.logical_nulls() {
                    Some(nulls) => nulls.into_inner(),
                    None => BooleanBuffer::new_set(rows),
                };
                Ok(if *null { !&valid } else { valid })
            }
        }
    }
}
