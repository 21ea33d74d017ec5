//! What can be wrong with a chunk's bytes.

use arrow::datatypes::DataType;

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a chunk cannot be encoded, or its bytes cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes do not describe a chunk: the reader treats it as a miss.
    #[error("corrupt chunk: {what}: found {found}, expected {expected}")]
    Corrupt {
        /// The field or range that is wrong.
        what: &'static str,
        /// What stands there.
        found: String,
        /// What should stand there.
        expected: String,
    },
    /// The bytes are a chunk of a version that this build does not read.
    #[error("chunk format unsupported: found version {found}, this build reads {supported}")]
    Version {
        /// The version in the bytes.
        found: u16,
        /// The version that this build reads.
        supported: u16,
    },
    /// The bytes do not start at a 64-byte boundary, so that arrays cannot point into them.
    #[error("chunk is not aligned: starts {offset} bytes past a 64-byte boundary")]
    Misaligned {
        /// Bytes past the boundary.
        offset: usize,
    },
    /// No decoded form holds this type; keep the chunk in the parquet form.
    #[error("type {0} has no arrow form; keep the chunk as parquet")]
    UnsupportedType(DataType),
    /// The form is not one that is read as a chunk of values.
    #[error(
        "form {form} has no chunks to open; expected {} (arrow) or {} (packed)",
        crate::FORM_ARROW,
        crate::FORM_PACKED
    )]
    UnknownForm {
        /// The form's tag.
        form: u8,
    },
    /// An array pushed has another type than the chunk.
    #[error("array of type {found} in a chunk of type {expected}")]
    TypeMismatch {
        /// The array's type.
        found: DataType,
        /// The chunk's type.
        expected: DataType,
    },
    /// The values of one block need more than 2 GiB.
    #[error("a block of {rows} rows needs more than one data buffer; keep the chunk as parquet")]
    BlockTooLarge {
        /// Rows of the block.
        rows: usize,
    },
    /// Arrow found the values invalid.
    #[error("invalid values: {0}")]
    Arrow(#[from] arrow::error::ArrowError),
}

pub(crate) fn corrupt(what: &'static str, found: impl ToString, expected: impl ToString) -> Error {
    Error::Corrupt {
        what,
        found: found.to_string(),
        expected: expected.to_string(),
    }
}
