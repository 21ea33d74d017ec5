//! The codecs of a cached column chunk.
//!
//! A chunk in the cache is a run of bytes with a *form*: a tag in the index and a codec at two
//! ends, nothing else. This crate holds the codecs and knows nothing of where the bytes come from
//! or go to.
//!
//! - [`FORM_ARROW`]: the decoded values, laid out as Arrow, see [`arrow_form`]. Opening a chunk
//!   checks its geometry; every array then points into the chunk's own bytes.
//! - [`FORM_PARQUET`]: the bytes of the column chunk as they stand in the Parquet file. They need
//!   no codec here: the Parquet reader reads them as if they came from the file.
//!
//! The value 2 is kept for the packed form.
//!
//! This crate is also the fence for arrays built without validation: no other crate builds one.

pub mod arrow_form;
mod error;

pub use arrow_form::{ArrowChunk, ArrowChunkWriter, encode_arrow, supports, validate};
pub use error::{Error, Result};

/// Rows of one block of the arrow form, and of the batches a scan emits: DataFusion's default
/// batch size, so that a block is a batch.
pub const BLOCK_ROWS: usize = 8192;

/// Form tag of decoded Arrow values.
pub const FORM_ARROW: u8 = 1;

/// Form tag of a column chunk's bytes as they are in the Parquet file.
pub const FORM_PARQUET: u8 = 3;
