//! Parquet footers of files that are not trusted.

use std::collections::HashSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use bytes::{Bytes, BytesMut};
use parquet::arrow::parquet_to_arrow_schema;
use parquet::basic::Type as PhysicalType;
use parquet::errors::ParquetError;
use parquet::file::metadata::{
    ColumnChunkMetaData, FooterTail, ParquetMetaData, ParquetMetaDataReader, RowGroupMetaData,
};
use parquet::schema::types::SchemaDescriptor;
use stoa_origin::{ObjectIdentity, Origin};

use crate::belief::believable;
use crate::catalog::RootColumn;
use crate::indexes::{
    BLOOM_HEADER_BYTES, bloom_ranges, index_range, read_unsized_blooms, with_page_index,
    without_page_index,
};
use crate::schema::without_metadata;
use crate::thrift;

/// The largest footer, and the largest page index of a file, that is read.
pub(crate) const FOOTER_BYTES_MAX: u64 = 64 << 20;
/// The most values, and the most bytes uncompressed, of a chunk: so that sums do not overflow.
const CHUNK_NUMBERS_MAX: i64 = 1 << 40;
/// How much of a file's end is read at once, in the hope that it holds footer and page index.
const TAIL_BYTES: u64 = 256 << 10;
/// Magic at both ends, and the footer's length.
const FILE_BYTES_MIN: u64 = 12;
/// Footer's length and magic.
pub(crate) const FOOTER_TAIL_BYTES: u64 = 8;

/// Why a file cannot be believed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum Rejection {
    #[error("file of {size} bytes is shorter than any Parquet file ({FILE_BYTES_MIN} bytes)")]
    TooShort { size: u64 },
    #[error("not a Parquet file: it ends in {found:?}, expected \"PAR1\"")]
    NotParquet { found: String },
    #[error("the footer is encrypted, which is not supported; write it without encryption")]
    EncryptedFooter,
    #[error("columns are encrypted, which is not supported; write them without encryption")]
    EncryptedColumns,
    #[error("Parquet footer of {length} bytes is longer than the file of {size} bytes")]
    FooterLongerThanFile { length: u64, size: u64 },
    #[error("Parquet footer of {length} bytes is longer than {FOOTER_BYTES_MAX}")]
    FooterTooLong { length: u64 },
    #[error("corrupt Parquet footer: {0}")]
    Corrupt(String),
    #[error("corrupt Parquet footer: the parser panicked: {0}")]
    Panicked(String),
    #[error("row group {row_group} has {rows} rows, expected 0 to {}", u32::MAX)]
    Rows { row_group: usize, rows: i64 },
    #[error(
        "chunk of row group {row_group}, column {column} at {start} with {length} bytes is not \
         within the {data_end} bytes before the footer"
    )]
    Chunk {
        row_group: usize,
        column: String,
        start: i64,
        length: i64,
        data_end: u64,
    },
    #[error(
        "chunk of row group {row_group}, column {column} has {values} values in {bytes} bytes, expected at most 2^40"
    )]
    Values {
        row_group: usize,
        column: String,
        values: i64,
        bytes: i64,
    },
    #[error("chunk of row group {row_group}, column {column} lies in another file")]
    Elsewhere { row_group: usize, column: String },
    #[error("no Arrow schema: {0}")]
    Schema(String),
}

/// A footer that was believed, and what is made of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Footer {
    pub(crate) metadata: Arc<ParquetMetaData>,
    pub(crate) bytes: Bytes,
    pub(crate) schema: SchemaRef,
    pub(crate) roots: Arc<[RootColumn]>,
}

/// A footer and the Bloom filters beside it, by start in the file.
pub(crate) type ReadFooter = (Footer, Vec<(u64, Bytes)>);

/// Reads the footer, page indexes and Bloom filters of a file.
///
/// One request where the file's end holds all of it, three at most.
pub(crate) async fn read(
    origin: &Origin,
    object: &ObjectIdentity,
) -> Result<Result<ReadFooter, Rejection>, stoa_origin::Error> {
    let size = object.size;
    if size < FILE_BYTES_MIN {
        return Ok(Err(Rejection::TooShort { size }));
    }
    let tail_start = size.saturating_sub(TAIL_BYTES);
    let mut tail = one(origin, object, tail_start..size).await?;
    let metadata_start = match metadata_start(&tail, size) {
        Ok(start) => start,
        Err(rejection) => return Ok(Err(rejection)),
    };
    let mut tail_start = tail_start;
    if metadata_start < tail_start {
        let missing = one(origin, object, metadata_start..tail_start).await?;
        let mut whole = BytesMut::with_capacity(missing.len() + tail.len());
        whole.extend_from_slice(&missing);
        whole.extend_from_slice(&tail);
        (tail, tail_start) = (whole.freeze(), metadata_start);
    }
    let last = tail.slice((metadata_start - tail_start) as usize..);
    let encoded = last.slice(..last.len() - FOOTER_TAIL_BYTES as usize);
    let parsed = blocking(move || parse_metadata(&encoded, metadata_start)).await;
    let metadata = match parsed {
        Ok(metadata) => metadata,
        Err(rejection) => return Ok(Err(rejection)),
    };

    let index = index_range(&metadata, metadata_start);
    let (blooms, unsized_blooms) = bloom_ranges(&metadata, metadata_start);
    let in_tail = |range: &Range<u64>| range.start >= tail_start;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    ranges.extend(index.clone().filter(|range| !in_tail(range)));
    let index_requested = !ranges.is_empty();
    ranges.extend(
        unsized_blooms
            .iter()
            .map(|&start| start..(start + BLOOM_HEADER_BYTES).min(metadata_start)),
    );
    ranges.extend(blooms.iter().cloned());
    let mut bodies = origin.read(object, &ranges).await?.into_iter();
    let index_bytes = match &index {
        Some(range) if !index_requested => {
            Some(tail.slice((range.start - tail_start) as usize..(range.end - tail_start) as usize))
        }
        Some(_) => bodies.next(),
        None => None,
    };
    let headers: Vec<Bytes> = bodies.by_ref().take(unsized_blooms.len()).collect();
    // Copied: a slice would keep the whole request's memory alive.
    let mut extra: Vec<(u64, Bytes)> = blooms
        .iter()
        .zip(bodies)
        .map(|(range, body)| (range.start, Bytes::copy_from_slice(&body)))
        .collect();
    extra.extend(
        read_unsized_blooms(origin, object, &unsized_blooms, &headers, metadata_start).await?,
    );
    extra.sort_by_key(|(start, _)| *start);
    extra.dedup_by_key(|(start, _)| *start);

    let index = index_bytes.unwrap_or_default();
    let footer = blocking(move || {
        // Copied: a slice would keep the whole request's memory alive. Not written anew: what the
        // parser reads in the file it reads here, also where it could not write it.
        let bytes = Bytes::from([index.as_ref(), last.as_ref()].concat());
        let footer = parse(bytes.clone(), metadata_start)?;
        let has_index =
            footer.metadata.column_index().is_some() || footer.metadata.offset_index().is_some();
        match index.is_empty() || has_index {
            true => Ok(footer),
            // Not believed: not kept either.
            false => parse(bytes.slice(index.len()..), metadata_start),
        }
    })
    .await;
    Ok(footer.map(|footer| (footer, extra)))
}

/// Parses a footer as it is cached, of a file whose data ends at `data_end` at the latest: the
/// file's page indexes, if any, then its metadata and tail. All offsets are those in the file.
///
/// Believes it no more than one from the origin: a reader does not hash what it maps.
pub(crate) fn parse(bytes: Bytes, data_end: u64) -> Result<Footer, Rejection> {
    let size = bytes.len() as u64;
    let length = footer_length(&bytes, size)?;
    let start = (size - FOOTER_TAIL_BYTES)
        .checked_sub(length)
        .ok_or(Rejection::FooterLongerThanFile { length, size })?;
    let encoded = bytes.slice(start as usize..(start + length) as usize);
    let metadata = parse_metadata(&encoded, data_end)?;
    let index = index_range(&metadata, data_end)
        .filter(|range| range.end - range.start == start)
        .map(|range| (range, bytes.slice(..start as usize)));
    let metadata = match with_page_index(metadata, index, data_end) {
        Some(metadata) => metadata,
        None => without_page_index(parse_metadata(&encoded, data_end)?),
    };
    let schema = guarded(|| {
        let file = metadata.file_metadata();
        parquet_to_arrow_schema(file.schema_descr(), file.key_value_metadata())
    })
    .map_err(|rejection| match rejection {
        Rejection::Corrupt(reason) => Rejection::Schema(reason),
        rejection => rejection,
    })?;
    let schema = Arc::new(without_metadata(schema));
    let roots = roots(metadata.file_metadata().schema_descr(), &schema)?;
    Ok(Footer {
        metadata: Arc::new(metadata),
        bytes,
        schema,
        roots,
    })
}

/// The range of a chunk in its file, `None` if it is negative or overflows.
pub(crate) fn chunk_range(chunk: &ColumnChunkMetaData) -> Option<Range<u64>> {
    let start = chunk
        .dictionary_page_offset()
        .unwrap_or(chunk.data_page_offset());
    let start = u64::try_from(start).ok()?;
    let length = u64::try_from(chunk.compressed_size()).ok()?;
    Some(start..start.checked_add(length)?)
}

/// The length of the metadata, from the last eight bytes.
fn footer_length(tail: &[u8], size: u64) -> Result<u64, Rejection> {
    let (_, last) = tail
        .split_last_chunk::<{ FOOTER_TAIL_BYTES as usize }>()
        .ok_or(Rejection::TooShort { size })?;
    let footer = FooterTail::try_new(last).map_err(|_| Rejection::NotParquet {
        found: String::from_utf8_lossy(&last[4..]).into_owned(),
    })?;
    if footer.is_encrypted_footer() {
        return Err(Rejection::EncryptedFooter);
    }
    Ok(footer.metadata_length() as u64)
}

/// Where the metadata of a file of `size` bytes starts, from its last eight bytes.
fn metadata_start(tail: &[u8], size: u64) -> Result<u64, Rejection> {
    let length = footer_length(tail, size)?;
    match (size - FILE_BYTES_MIN).checked_sub(length) {
        None => Err(Rejection::FooterLongerThanFile { length, size }),
        Some(_) if length > FOOTER_BYTES_MAX => Err(Rejection::FooterTooLong { length }),
        Some(_) => Ok(size - FOOTER_TAIL_BYTES - length),
    }
}

/// Parses the metadata of a file whose data ends at `data_end`, checks what it says, and leaves out
/// what it says of values where that cannot be believed.
fn parse_metadata(encoded: &Bytes, data_end: u64) -> Result<ParquetMetaData, Rejection> {
    let shape = thrift::check_footer(encoded).map_err(Rejection::Corrupt)?;
    if shape.encrypted {
        return Err(Rejection::EncryptedColumns);
    }
    let metadata = believable(guarded(|| ParquetMetaDataReader::decode_metadata(encoded))?);
    for (number, group) in metadata.row_groups().iter().enumerate() {
        check_row_group(number, group, data_end)?;
    }
    Ok(metadata)
}

fn check_row_group(
    number: usize,
    group: &RowGroupMetaData,
    data_end: u64,
) -> Result<(), Rejection> {
    let rows = group.num_rows();
    if u32::try_from(rows).is_err() {
        return Err(Rejection::Rows {
            row_group: number,
            rows,
        });
    }
    if group.num_columns() != group.schema_descr().num_columns() {
        return Err(Rejection::Corrupt(format!(
            "row group {number} has {} columns, the schema {}",
            group.num_columns(),
            group.schema_descr().num_columns()
        )));
    }
    for (leaf, chunk) in group.columns().iter().enumerate() {
        let column = || format!("{leaf} ({})", chunk.column_path());
        if chunk.file_path().is_some_and(|path| !path.is_empty()) {
            return Err(Rejection::Elsewhere {
                row_group: number,
                column: column(),
            });
        }
        if chunk_range(chunk).is_none_or(|range| range.end > data_end) {
            return Err(Rejection::Chunk {
                row_group: number,
                column: column(),
                start: chunk
                    .dictionary_page_offset()
                    .unwrap_or(chunk.data_page_offset()),
                length: chunk.compressed_size(),
                data_end,
            });
        }
        let is_plausible = |number: i64| (0..=CHUNK_NUMBERS_MAX).contains(&number);
        if !is_plausible(chunk.num_values()) || !is_plausible(chunk.uncompressed_size()) {
            return Err(Rejection::Values {
                row_group: number,
                column: column(),
                values: chunk.num_values(),
                bytes: chunk.uncompressed_size(),
            });
        }
    }
    Ok(())
}

fn roots(parquet: &SchemaDescriptor, schema: &SchemaRef) -> Result<Arc<[RootColumn]>, Rejection> {
    let mut roots: Vec<RootColumn> = Vec::with_capacity(schema.fields().len());
    let mut root_of_last = None;
    let mut names = HashSet::new();
    for leaf in 0..parquet.num_columns() {
        let int96 = parquet.column(leaf).physical_type() == PhysicalType::INT96;
        let root = parquet.get_column_root_idx(leaf);
        if root_of_last == Some(root) {
            let last = roots.last_mut().expect("the first leaf made it");
            last.leaves += 1;
            last.int96 |= int96;
            continue;
        }
        root_of_last = Some(root);
        let name = parquet.get_column_root(leaf).name();
        // Readers count columns in both schemas alike, and would take one for another.
        if root != roots.len() {
            return Err(Rejection::Schema(format!(
                "a group without columns stands before column {name:?}"
            )));
        }
        let field = schema
            .fields()
            .get(roots.len())
            .filter(|field| field.name() == name);
        let Some(field) = field else {
            return Err(Rejection::Schema(format!(
                "column {name:?} has no Arrow type"
            )));
        };
        roots.push(RootColumn {
            first_leaf: leaf as u32,
            leaves: 1,
            field: field.clone(),
            int96,
            shadowed: !names.insert(name),
        });
    }
    if roots.len() != schema.fields().len() {
        return Err(Rejection::Schema("it has columns without leaves".into()));
    }
    Ok(roots.into())
}

async fn one(
    origin: &Origin,
    object: &ObjectIdentity,
    range: Range<u64>,
) -> Result<Bytes, stoa_origin::Error> {
    let mut bodies = origin.read(object, &[range]).await?;
    Ok(bodies.pop().expect("one body a range"))
}

/// Runs the Parquet parser, which is not ours, so that neither its errors nor its panics go further.
pub(crate) fn guarded<T>(parse: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, Rejection> {
    match catch_unwind(AssertUnwindSafe(parse)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Rejection::Corrupt(error.to_string())),
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            Err(Rejection::Panicked(text))
        }
    }
}

/// Runs what may take long for a large footer where it holds up no request.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Rejection> + Send + 'static,
) -> Result<T, Rejection> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Rejection::Panicked(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_the_parser_is_a_rejection() {
        let error = guarded::<()>(|| panic!("out of bounds")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "corrupt Parquet footer: the parser panicked: out of bounds"
        );
    }

    #[test]
    fn a_footer_has_to_fit_its_file() {
        let tail = |length: u32, magic: &[u8]| [&length.to_le_bytes(), magic].concat();
        assert_eq!(metadata_start(&tail(88, b"PAR1"), 100), Ok(4));
        let message = |tail: &[u8], size| metadata_start(tail, size).unwrap_err().to_string();
        assert_eq!(
            message(&tail(89, b"PAR1"), 100),
            "Parquet footer of 89 bytes is longer than the file of 100 bytes"
        );
        assert_eq!(
            message(&tail(67_108_865, b"PAR1"), 1 << 30),
            "Parquet footer of 67108865 bytes is longer than 67108864"
        );
        assert_eq!(
            message(&tail(4, b"ORC1"), 100),
            "not a Parquet file: it ends in \"ORC1\", expected \"PAR1\""
        );
        assert_eq!(
            message(&tail(4, b"PARE"), 100),
            "the footer is encrypted, which is not supported; write it without encryption"
        );
    }
}
