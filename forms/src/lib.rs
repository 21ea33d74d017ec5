//! The codecs of a cached column chunk.
//!
//! A chunk in the cache is a run of bytes with a *form*: a tag in the index and a codec at two
//! ends, nothing else. This crate holds the codecs and knows nothing of where the bytes come from
//! or go to.
//!
//! - [`FORM_ARROW`]: the decoded values, laid out as Arrow, see [`arrow_form`]. Opening a chunk
//!   checks its geometry; every array then points into the chunk's own bytes.
//! - [`FORM_PACKED`]: the values in about the bytes of compressed Parquet, unpacked block by block
//!   at nearly the speed of memory, see [`packed`].
//! - [`FORM_PARQUET`]: the bytes of the column chunk as they stand in the Parquet file. They need
//!   no codec here: the Parquet reader reads them as if they came from the file.
//!
//! A scan reads the first two through [`Chunk`]: blocks, filtered blocks, predicates, zone maps and
//! statistics.
//!
//! This crate is also the fence for arrays built without validation: no other crate builds one.

pub mod arrow_form;
mod bytes;
mod chunk;
mod comparison;
#[cfg(test)]
mod documentation;
mod error;
pub mod packed;
mod sketch;
mod statistics;

pub use arrow_form::{ArrowChunk, ArrowChunkWriter, encode_arrow, supports, validate};
pub use bytes::ALIGN;
pub use chunk::{Chunk, Prepared};
pub use comparison::{Comparison, OnDictionary, Operator};
pub use error::{Error, Result};
pub use packed::{PackedChunk, PackedChunkWriter, encode_packed, validate_packed};
pub use sketch::{REGISTERS, Sketch};
pub use statistics::{ChunkStatistics, Zones};

/// Rows of one block of the arrow and the packed form, and of the batches a scan emits:
/// DataFusion's default batch size, so that a block is a batch.
pub const BLOCK_ROWS: usize = 8192;

/// Form tag of decoded Arrow values.
pub const FORM_ARROW: u8 = 1;

/// Form tag of packed values.
pub const FORM_PACKED: u8 = 2;

/// Form tag of a column chunk's bytes as they are in the Parquet file.
pub const FORM_PARQUET: u8 = 3;
