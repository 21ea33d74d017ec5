//! From fetched bytes of a row group to the bytes of a chunk in its form.
//!
//! Decoding runs the parquet crate over the fetched ranges only: it sees a file of which nothing
//! else can be read. Each root column is decoded alone, so that a broken one takes no other with
//! it; a panic of the parser becomes the reason why a chunk is skipped.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatchReader};
use arrow::buffer::Buffer as ArrowBuffer;
use arrow::datatypes::DataType;
use bytes::{Buf, Bytes};
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::arrow::{ProjectionMask, parquet_to_arrow_schema};
use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{ChunkReader, Length};
use stoa_forms::{ArrowChunkWriter, PackedChunkWriter};
use stoa_layout::Form;

/// Why a chunk has no bytes to be cached. Text for people; the chunk is read from the origin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Skipped(pub String);

/// A chunk ready to be appended to a segment.
#[derive(Clone, Debug)]
pub struct EncodedChunk {
    /// The form that it has, which may be parquet where another one was wanted.
    pub form: Form,
    /// Rows of the row group.
    pub rows: u32,
    /// The bytes, in one or several pieces. In the parquet form: the column chunks of all leaves
    /// of the root column, one after the other in leaf order.
    pub parts: Vec<Bytes>,
    /// Why the chunk has not the form that was wanted.
    pub fallback: Option<String>,
}

impl EncodedChunk {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.len() as u64).sum()
    }
}

/// What is the same for all row groups of a file.
#[derive(Clone, Debug)]
pub struct FileDecoder {
    metadata: Arc<ParquetMetaData>,
    /// The reader's view of the file, or why it has none: then only the parquet form is left.
    reader: Result<ArrowReaderMetadata, String>,
}

impl FileDecoder {
    /// Prepares to decode row groups of the file with that footer.
    pub fn new(metadata: &Arc<ParquetMetaData>) -> FileDecoder {
        let reader = guarded(|| {
            let file = metadata.file_metadata();
            let schema = parquet_to_arrow_schema(file.schema_descr(), file.key_value_metadata())?;
            let options =
                ArrowReaderOptions::new().with_schema(stoa_layout::decoded_schema(&schema));
            ArrowReaderMetadata::try_new(Arc::clone(metadata), options)
        });
        let reader = match reader {
            Ok(Ok(reader)) => Ok(reader),
            Ok(Err(error)) => Err(error.to_string()),
            Err(panic) => Err(panic),
        };
        FileDecoder {
            metadata: Arc::clone(metadata),
            reader,
        }
    }

    /// Rows of a row group, checked.
    fn rows(&self, row_group: u32) -> Result<u32, Skipped> {
        let groups = self.metadata.row_groups();
        let group = groups.get(row_group as usize).ok_or_else(|| {
            Skipped(format!(
                "row group {row_group} is not in the file, which has {}",
                groups.len()
            ))
        })?;
        let rows = group.num_rows();
        u32::try_from(rows).map_err(|_| {
            Skipped(format!(
                "row group {row_group} has {rows} rows, expected 0 to {}",
                u32::MAX
            ))
        })
    }

    fn leaves(&self, column: u32) -> Result<Range<usize>, Skipped> {
        let schema = self.metadata.file_metadata().schema_descr();
        let first = column as usize;
        if first >= schema.num_columns() {
            let largest = schema.num_columns().saturating_sub(1);
            return Err(Skipped(format!(
                "column {column} is not in the file, largest is {largest}"
            )));
        }
        let root = schema.get_column_root_idx(first);
        if first > 0 && schema.get_column_root_idx(first - 1) == root {
            return Err(Skipped(format!(
                "column {column} is not the first leaf of its root column"
            )));
        }
        let last = (first..schema.num_columns())
            .take_while(|leaf| schema.get_column_root_idx(*leaf) == root)
            .last()
            .unwrap_or(first);
        Ok(first..last + 1)
    }

    /// Makes a chunk in the wanted form from `fetched`: start and bytes of the column chunk of
    /// each leaf of the root column, `column` being the ordinal of the first one.
    ///
    /// A type that cannot be decoded, or has no decoded form, falls back to the parquet form.
    ///
    /// # Errors
    /// If the bytes are damaged, the file's row group is out of bounds, or the parser panics.
    pub fn encode(
        &self,
        row_group: u32,
        column: u32,
        form: Form,
        fetched: &[(u64, Bytes)],
    ) -> Result<EncodedChunk, Skipped> {
        let rows = self.rows(row_group)?;
        let as_parquet = |fallback| EncodedChunk {
            form: Form::Parquet,
            rows,
            parts: fetched.iter().map(|(_, bytes)| bytes.clone()).collect(),
            fallback,
        };
        if form == Form::Parquet {
            return Ok(as_parquet(None));
        }
        let leaves = self.leaves(column)?;
        let reader = match &self.reader {
            Ok(reader) => reader.clone(),
            Err(reason) => return Ok(as_parquet(Some(reason.clone()))),
        };
        let fetched_file = FetchedFile {
            ranges: fetched.to_vec(),
        };
        let decoded = guarded(|| decode(reader, fetched_file, row_group, rows, leaves, form))
            .map_err(Skipped)?;
        match decoded {
            Ok(bytes) => Ok(EncodedChunk {
                form,
                rows,
                parts: vec![bytes],
                fallback: None,
            }),
            Err(Failed::Unsupported(reason)) => Ok(as_parquet(Some(reason))),
            Err(Failed::Damaged(reason)) => Err(Skipped(reason)),
        }
    }
}

enum Failed {
    /// Nothing is wrong with the bytes, but they have no decoded form.
    Unsupported(String),
    /// The bytes do not decode.
    Damaged(String),
}

impl From<stoa_forms::Error> for Failed {
    fn from(error: stoa_forms::Error) -> Failed {
        use stoa_forms::Error as E;
        match error {
            E::UnsupportedType(_) | E::BlockTooLarge { .. } | E::TypeMismatch { .. } => {
                Failed::Unsupported(error.to_string())
            }
            error => Failed::Damaged(error.to_string()),
        }
    }
}

fn decode(
    reader: ArrowReaderMetadata,
    file: FetchedFile,
    row_group: u32,
    rows: u32,
    leaves: Range<usize>,
    form: Form,
) -> Result<Bytes, Failed> {
    let mask = ProjectionMask::leaves(reader.parquet_schema(), leaves);
    let batches = ParquetRecordBatchReaderBuilder::new_with_metadata(file, reader)
        .with_row_groups(vec![row_group as usize])
        .with_projection(mask)
        .with_batch_size(stoa_forms::BLOCK_ROWS)
        .build()
        .map_err(|error| match error {
            ParquetError::NYI(_) | ParquetError::ArrowError(_) => {
                Failed::Unsupported(error.to_string())
            }
            error => Failed::Damaged(error.to_string()),
        })?;
    let data_type = match batches.schema().fields().as_ref() {
        [field] => field.data_type().clone(),
        fields => {
            return Err(Failed::Unsupported(format!(
                "{} columns instead of 1",
                fields.len()
            )));
        }
    };
    let mut writer = Writer::new(form, data_type.clone())?;
    let mut found = 0u64;
    for batch in batches {
        let batch = batch.map_err(|error| Failed::Damaged(error.to_string()))?;
        found += batch.num_rows() as u64;
        writer.push(batch.column(0))?;
    }
    if found != u64::from(rows) {
        return Err(Failed::Damaged(format!(
            "{found} rows decoded, the footer says {rows}"
        )));
    }
    validated(writer.finish()?, &data_type, form)
}

/// Lays values out in one of the forms that are read block by block.
enum Writer {
    Arrow(ArrowChunkWriter),
    Packed(PackedChunkWriter),
}

impl Writer {
    fn new(form: Form, data_type: DataType) -> stoa_forms::Result<Writer> {
        Ok(match form {
            Form::Packed => Writer::Packed(PackedChunkWriter::new(data_type)?),
            _ => Writer::Arrow(ArrowChunkWriter::new(data_type)?),
        })
    }

    fn push(&mut self, array: &ArrayRef) -> stoa_forms::Result<()> {
        match self {
            Writer::Arrow(writer) => writer.push(array),
            Writer::Packed(writer) => writer.push(array),
        }
    }

    /// The chunk's bytes, aligned as readers will see them.
    fn finish(self) -> stoa_forms::Result<ArrowBuffer> {
        match self {
            Writer::Arrow(writer) => writer.finish(),
            Writer::Packed(writer) => Ok(ArrowBuffer::from_slice_ref(writer.finish()?)),
        }
    }
}

/// The chunk's bytes, after the check that its readers leave out.
fn validated(chunk: ArrowBuffer, data_type: &DataType, form: Form) -> Result<Bytes, Failed> {
    let bytes = Bytes::from_owner(Aligned(chunk));
    match form {
        Form::Packed => stoa_forms::validate_packed(bytes.clone(), data_type)?,
        _ => stoa_forms::validate(bytes.clone(), data_type)?,
    }
    Ok(bytes)
}

/// Memory at a boundary that arrays may point into.
struct Aligned(ArrowBuffer);

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

/// Runs `work`; a panic becomes its message.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned());
        format!(
            "the parquet parser panicked: {}",
            text.as_deref().unwrap_or("without a message")
        )
    })
}

/// A file of which only some ranges are at hand.
#[derive(Clone, Debug)]
struct FetchedFile {
    ranges: Vec<(u64, Bytes)>,
}

impl FetchedFile {
    fn from(&self, start: u64) -> Result<Bytes, ParquetError> {
        self.ranges
            .iter()
            .find_map(|(at, bytes)| {
                let offset = usize::try_from(start.checked_sub(*at)?).ok()?;
                // Ranges of neighbouring leaves touch: the end of one is the start of the next.
                (offset < bytes.len()).then(|| bytes.slice(offset..))
            })
            .ok_or_else(|| {
                ParquetError::EOF(format!("offset {start} is outside of the column chunk"))
            })
    }
}

impl Length for FetchedFile {
    fn len(&self) -> u64 {
        self.ranges
            .iter()
            .map(|(at, bytes)| at + bytes.len() as u64)
            .max()
            .unwrap_or(0)
    }
}

impl ChunkReader for FetchedFile {
    type T = bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        Ok(self.from(start)?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let bytes = self.from(start)?;
        if length > bytes.len() {
            return Err(ParquetError::EOF(format!(
                "{length} bytes at offset {start} reach past the column chunk, {} are left",
                bytes.len()
            )));
        }
        Ok(bytes.slice(..length))
    }
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
