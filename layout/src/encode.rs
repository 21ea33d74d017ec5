//! A catalog as bytes, as shared memory carries it.
//!
//! ```text
//! offset  size  field
//!      0     4  length of the JSON, u32 little-endian
//!      4     n  JSON: everything but the blobs, and where they are
//!  4 + n        blobs: Arrow IPC schemas, footers, Bloom filters
//! ```
//!
//! Offsets of blobs count from the first of them. Decoding slices the blobs out of the bytes
//! without a copy, and parses the footers on all cores where there are many.

use std::sync::Arc;

use arrow::datatypes::{Field, Schema};
use arrow::ipc::convert::try_schema_from_flatbuffer_bytes;
use arrow::ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteOptions};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use stoa_origin::ObjectIdentity;

use crate::catalog::{CatalogFile, RejectedFile, TableCatalog};
use crate::document::LayoutDocument;
use crate::error::{Error, Result};
use crate::footer::{self, FOOTER_TAIL_BYTES, Footer, Rejection};
use crate::load::share_schemas;
use crate::names::{LayoutVersion, TableName};

/// The format this build writes and reads.
const FORMAT: u32 = 1;
const LENGTH_BYTES: usize = 4;
/// Footers of less than this many bytes are parsed on one core: starting threads takes longer.
const PARALLEL_BYTES_MIN: usize = 256 << 10;
const THREADS_MAX: usize = 16;

/// Offset and length of a blob.
type Blob = (u64, u64);

/// What of the JSON every format has.
#[derive(Serialize, Deserialize)]
struct Probe {
    format: u32,
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: u32,
    table: TableName,
    version: LayoutVersion,
    location: String,
    looked_at_unix_ms: u64,
    schema: Blob,
    partition_schema: Blob,
    files: Vec<FileHeader>,
    rejected: Vec<RejectedFile>,
    layout: LayoutDocument,
}

#[derive(Serialize, Deserialize)]
struct FileHeader {
    identity: ObjectIdentity,
    last_modified_unix_ms: u64,
    partition_values: Vec<String>,
    footer: Blob,
    /// Start in the file, and blob.
    extra: Vec<(u64, Blob)>,
}

impl TableCatalog {
    /// The catalog as self-describing bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut blobs = Vec::new();
        let mut push = |bytes: &[u8]| -> Blob {
            let offset = blobs.len() as u64;
            blobs.extend_from_slice(bytes);
            (offset, bytes.len() as u64)
        };
        let partitions = self.partition_columns.iter();
        let partitions: Vec<Field> = partitions
            .map(|(name, data_type)| Field::new(name, data_type.clone(), false))
            .collect();
        let schema = push(&encode_schema(&self.schema));
        let partition_schema = push(&encode_schema(&Schema::new(partitions)));
        let files = self.files.iter();
        let files = files
            .map(|file| FileHeader {
                identity: file.identity.clone(),
                last_modified_unix_ms: file.last_modified_unix_ms,
                partition_values: file.partition_values.clone(),
                footer: push(&file.footer_bytes),
                extra: file
                    .extra
                    .iter()
                    .map(|(start, bytes)| (*start, push(bytes)))
                    .collect(),
            })
            .collect();
        let header = Header {
            format: FORMAT,
            table: self.table.clone(),
            version: self.version,
            location: self.location.clone(),
            looked_at_unix_ms: self.looked_at_unix_ms,
            schema,
            partition_schema,
            files,
            rejected: self.rejected.clone(),
            layout: self.layout.clone(),
        };
        let json = serde_json::to_vec(&header).expect("strings, numbers and lists are JSON");
        let length = u32::try_from(json.len()).expect("a catalog's file list is less than 4 GiB");
        let mut bytes = Vec::with_capacity(LENGTH_BYTES + json.len() + blobs.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&json);
        bytes.extend_from_slice(&blobs);
        bytes
    }

    /// The catalog in these bytes, which it shares.
    ///
    /// # Errors
    /// [`Error::CatalogFormat`] for another format version, [`Error::CorruptCatalog`] for what is
    /// no catalog. Never panics, whatever the bytes are.
    pub fn decode(bytes: &Bytes) -> Result<TableCatalog> {
        let (length, rest) = bytes
            .split_first_chunk::<LENGTH_BYTES>()
            .ok_or_else(|| corrupt(format!("{} bytes, expected a length", bytes.len())))?;
        let length = u32::from_le_bytes(*length) as usize;
        if length > rest.len() {
            return Err(corrupt(format!(
                "header of {length} bytes where {} are",
                rest.len()
            )));
        }
        let json = &rest[..length];
        let header = read_header(json)?;
        let blobs = bytes.slice(LENGTH_BYTES + length..);
        let blob = |(offset, length): Blob| -> Result<Bytes> {
            let end = offset
                .checked_add(length)
                .filter(|end| *end <= blobs.len() as u64);
            let end = end.ok_or_else(|| {
                corrupt(format!(
                    "blob of {length} bytes at {offset} where {} are",
                    blobs.len()
                ))
            })?;
            Ok(blobs.slice(offset as usize..end as usize))
        };
        let schema = decode_schema(&blob(header.schema)?)?;
        let partitions = decode_schema(&blob(header.partition_schema)?)?;
        let footers = header.files.iter().map(|file| {
            let data_end = file.identity.size.saturating_sub(FOOTER_TAIL_BYTES);
            Ok((blob(file.footer)?, data_end))
        });
        let footers = parse_footers(footers.collect::<Result<_>>()?)?;
        let mut files = Vec::with_capacity(header.files.len());
        for (file, footer) in header.files.into_iter().zip(footers) {
            if file.partition_values.len() != partitions.fields().len() {
                return Err(corrupt(format!(
                    "partition values of {}",
                    file.identity.url()
                )));
            }
            let extra = file
                .extra
                .into_iter()
                .map(|(start, range)| Ok((start, blob(range)?)));
            files.push(CatalogFile {
                identity: file.identity,
                last_modified_unix_ms: file.last_modified_unix_ms,
                partition_values: file.partition_values,
                extra: extra.collect::<Result<_>>()?,
                metadata: footer.metadata,
                footer_bytes: footer.bytes,
                schema: footer.schema,
                roots: footer.roots,
            });
        }
        share_schemas(&mut files);
        let partition_columns = partitions.fields().iter();
        Ok(TableCatalog {
            table: header.table,
            version: header.version,
            location: header.location,
            schema: Arc::new(schema),
            partition_columns: partition_columns
                .map(|field| (field.name().clone(), field.data_type().clone()))
                .collect(),
            files,
            rejected: header.rejected,
            looked_at_unix_ms: header.looked_at_unix_ms,
            layout: header.layout,
        })
    }
}

/// Reads the JSON once where it is of this format: of a table of many files it is long.
fn read_header(json: &[u8]) -> Result<Header> {
    let not_json = |error: serde_json::Error| corrupt(format!("header: {error}"));
    let header = serde_json::from_slice::<Header>(json);
    let found = match &header {
        Ok(header) => header.format,
        Err(_) => {
            let probe: Probe = serde_json::from_slice(json).map_err(not_json)?;
            probe.format
        }
    };
    match found {
        FORMAT => header.map_err(not_json),
        found => Err(Error::CatalogFormat {
            found,
            expected: FORMAT,
        }),
    }
}

fn corrupt(reason: String) -> Error {
    Error::CorruptCatalog { reason }
}

fn encode_schema(schema: &Schema) -> Vec<u8> {
    let mut dictionaries = DictionaryTracker::new(false);
    IpcDataGenerator::default()
        .schema_to_bytes_with_dictionary_tracker(
            schema,
            &mut dictionaries,
            &IpcWriteOptions::default(),
        )
        .ipc_message
}

fn decode_schema(bytes: &[u8]) -> Result<Schema> {
    // The conversion from the verified flatbuffer still panics on types it does not know.
    std::panic::catch_unwind(|| try_schema_from_flatbuffer_bytes(bytes))
        .map_err(|_| corrupt("schema of unknown types".into()))?
        .map_err(|error| corrupt(format!("schema: {error}")))
}

/// Parses footers, each with the end of its file's data.
fn parse_footers(footers: Vec<(Bytes, u64)>) -> Result<Vec<Footer>> {
    let total: usize = footers.iter().map(|(footer, _)| footer.len()).sum();
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = match total < PARALLEL_BYTES_MIN {
        true => 1,
        false => cores.min(footers.len()).clamp(1, THREADS_MAX),
    };
    let parse = |(footer, data_end): &(Bytes, u64)| footer::parse(footer.clone(), *data_end);
    let parsed: Vec<Result<Footer, Rejection>> = if threads == 1 {
        footers.iter().map(parse).collect()
    } else {
        let share = footers.len().div_ceil(threads);
        std::thread::scope(|scope| {
            let workers: Vec<_> = footers
                .chunks(share)
                .map(|share| scope.spawn(move || share.iter().map(parse).collect::<Vec<_>>()))
                .collect();
            let finished = workers.into_iter();
            finished
                .flat_map(|worker| worker.join().expect("panics are caught within"))
                .collect()
        })
    };
    let footers = parsed.into_iter();
    footers
        .map(|footer| footer.map_err(|rejection| corrupt(rejection.to_string())))
        .collect()
}
