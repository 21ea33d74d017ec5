//! What filling the cache costs: from the bytes of column chunks to sealed segments, in each form,
//! beside the parquet crate's decode of the same chunks and beside `pwrite`.
//!
//! One thread does it all, and its CPU time is what counts: a shared machine changes that least.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use stoa_cache_manager::decode::{EncodedChunk, FileDecoder};
use stoa_cache_manager::diff::form_tag;
use stoa_figures::document::Fill;
use stoa_figures::stats::{median, median_interval};
use stoa_layout::{Form, decoded_schema};
use stoa_shm::{CacheDir, CacheDirOptions, CacheWriter, ChunkKey, SEGMENT_BYTES, SegmentWriter};

use crate::Error;
use crate::suite::Data;
use crate::touch::pages;

/// Rows of a decoded batch, for both sides.
const BATCH_ROWS: usize = 8192;

/// Room for the alignment of a segment's chunks.
const ALIGNMENT_BYTES: u64 = 1 << 20;

/// A column chunk, fetched.
struct Chunk {
    row_group: u32,
    column: u32,
    start: u64,
    bytes: Bytes,
}

/// A file of which some row groups are taken.
struct Source {
    bytes: Bytes,
    decoder: FileDecoder,
    reader: ArrowReaderMetadata,
    chunks: Vec<Chunk>,
    name: Arc<[u8]>,
}

/// Milliseconds of one repetition.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    decode: f64,
    fill: f64,
    pwrite: f64,
    bytes: u64,
}

/// Measures one form over the first `row_groups` row groups of each table.
///
/// # Errors
/// If a file cannot be read, or a chunk cannot be made.
pub fn measure(
    data: &Data,
    form: Form,
    row_groups: usize,
    iterations: usize,
    cache_root: &Path,
) -> Result<Fill, Error> {
    let sources = sources(data, row_groups)?;
    let scratch = tempfile::Builder::new()
        .prefix("stoa-bench-")
        .tempdir_in(cache_root)?;
    // The first one warms up, and tells how much is to come.
    let warm = once(&sources, form, scratch.path(), 0, u64::MAX)?;
    let all = (0..iterations)
        .map(|repetition| once(&sources, form, scratch.path(), repetition, warm.bytes))
        .collect::<Result<Vec<_>, _>>()?;
    let of = |value: fn(&Measured) -> f64| -> Vec<f64> { all.iter().map(value).collect() };
    let middle = |value| median(&of(value)).unwrap_or(0.0);
    let chunks = sources.iter().flat_map(|source| &source.chunks);
    Ok(Fill {
        pages: pages(cache_root)?,
        bytes: all.first().map_or(0, |found| found.bytes),
        parquet_bytes: chunks.map(|chunk| chunk.bytes.len() as u64).sum(),
        decode_ms: middle(|found| found.decode),
        fill_ms: middle(|found| found.fill),
        pwrite_ms: middle(|found| found.pwrite),
        rate_vs_decode: median_interval(&of(|found| found.decode / found.fill)),
        rate_vs_pwrite: median_interval(&of(|found| found.pwrite / found.fill)),
    })
}

fn sources(data: &Data, row_groups: usize) -> Result<Vec<Source>, Error> {
    let mut sources = vec![];
    for table in &data.tables {
        let mut left = row_groups;
        let mut paths: Vec<_> = std::fs::read_dir(data.directory.join(table))?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_, std::io::Error>>()?;
        paths.sort();
        for path in paths {
            if left == 0 {
                break;
            }
            let source = source(&path, left)?;
            left -= source.decoder_row_groups().min(left);
            sources.push(source);
        }
    }
    Ok(sources)
}

impl Source {
    fn decoder_row_groups(&self) -> usize {
        let last = self.chunks.last();
        last.map_or(0, |chunk| chunk.row_group as usize + 1)
    }
}

fn source(path: &Path, row_groups: usize) -> Result<Source, Error> {
    let bytes = Bytes::from(std::fs::read(path)?);
    let metadata: Arc<ParquetMetaData> =
        Arc::new(ParquetMetaDataReader::new().parse_and_finish(&bytes)?);
    let plain = ArrowReaderMetadata::try_new(Arc::clone(&metadata), ArrowReaderOptions::new())?;
    let options = ArrowReaderOptions::new().with_schema(decoded_schema(plain.schema()));
    let mut chunks = vec![];
    for (row_group, group) in metadata.row_groups().iter().enumerate().take(row_groups) {
        for (column, chunk) in group.columns().iter().enumerate() {
            let (start, length) = chunk.byte_range();
            // A copy of its own, as if it had been fetched.
            let part = &bytes[start as usize..(start + length) as usize];
            chunks.push(Chunk {
                row_group: row_group as u32,
                column: column as u32,
                start,
                bytes: Bytes::copy_from_slice(part),
            });
        }
    }
    Ok(Source {
        decoder: FileDecoder::new(&metadata),
        reader: ArrowReaderMetadata::try_new(metadata, options)?,
        chunks,
        name: Arc::from(path.display().to_string().as_bytes()),
        bytes,
    })
}

/// One repetition, which makes about `expected_bytes`.
fn once(
    sources: &[Source],
    form: Form,
    scratch: &Path,
    repetition: usize,
    expected_bytes: u64,
) -> Result<Measured, Error> {
    let mut measured = Measured::default();
    let place = scratch.join("cache");
    let (cache, _) = CacheWriter::open(CacheDir::create(&place, CacheDirOptions::default())?)?;
    let plain = scratch.join("plain");
    let file = File::create(&plain)?;
    let mut segment: Option<SegmentWriter> = None;
    let write = |parts: &[Bytes], mut at: u64| -> Result<(), Error> {
        for part in parts {
            file.write_all_at(part, at)?;
            at += part.len() as u64;
        }
        Ok(())
    };
    let chunks = sources
        .iter()
        .flat_map(|source| source.chunks.iter().map(move |chunk| (source, chunk)));
    for (source, chunk) in chunks {
        measured.decode += spent(|| decode(source, chunk))?.0;
        // Who reads bytes first waits for memory. Where both write the same ones, they take turns.
        let turn = repetition + chunk.row_group as usize + chunk.column as usize;
        let before = form == Form::Parquet && turn.is_multiple_of(2);
        if before {
            let parts = std::slice::from_ref(&chunk.bytes);
            measured.pwrite += spent(|| write(parts, measured.bytes))?.0;
        }
        let to_come = expected_bytes.saturating_sub(measured.bytes);
        let (elapsed, encoded) =
            spent(|| fill(&cache, &mut segment, source, chunk, form, to_come))?;
        measured.fill += elapsed;
        if encoded.form != form {
            return Err(format!(
                "chunk {}/{} came out in form {}, expected {form}",
                chunk.row_group, chunk.column, encoded.form
            )
            .into());
        }
        if !before {
            measured.pwrite += spent(|| write(&encoded.parts, measured.bytes))?.0;
        }
        measured.bytes += encoded.bytes();
    }
    if let Some(segment) = segment.filter(|segment| !segment.is_empty()) {
        measured.fill += spent(|| Ok(segment.seal()?))?.0;
    }
    drop(cache);
    let _ = stoa_shm::AccessCounters::remove(&place);
    std::fs::remove_dir_all(&place)?;
    std::fs::remove_file(&plain)?;
    Ok(measured)
}

/// What the parquet crate does alone.
fn decode(source: &Source, chunk: &Chunk) -> Result<usize, Error> {
    let mask = ProjectionMask::leaves(source.reader.parquet_schema(), [chunk.column as usize]);
    let batches = ParquetRecordBatchReaderBuilder::new_with_metadata(
        source.bytes.clone(),
        source.reader.clone(),
    )
    .with_row_groups(vec![chunk.row_group as usize])
    .with_projection(mask)
    .with_batch_size(BATCH_ROWS)
    .build()?;
    let mut rows = 0;
    for batch in batches {
        rows += std::hint::black_box(batch?).num_rows();
    }
    Ok(rows)
}

/// What the worker does with a fetched chunk, which is the first of `to_come` bytes.
fn fill(
    cache: &CacheWriter,
    open: &mut Option<SegmentWriter>,
    source: &Source,
    chunk: &Chunk,
    form: Form,
    to_come: u64,
) -> Result<EncodedChunk, Error> {
    let fetched = [(chunk.start, chunk.bytes.clone())];
    let encoded = source
        .decoder
        .encode(chunk.row_group, chunk.column, form, &fetched)?;
    if let Some(full) = open.take_if(|segment| segment.remaining() < encoded.bytes())
        && !full.is_empty()
    {
        full.seal()?;
    }
    let segment = match open {
        Some(segment) => segment,
        None => {
            let capacity = SEGMENT_BYTES.min(to_come.saturating_add(ALIGNMENT_BYTES));
            open.insert(cache.new_segment(capacity.max(encoded.bytes()))?)
        }
    };
    let key = ChunkKey {
        file: Arc::clone(&source.name),
        row_group: chunk.row_group,
        column: chunk.column,
    };
    let parts: Vec<&[u8]> = encoded.parts.iter().map(|part| &part[..]).collect();
    segment.append_parts(&key, form_tag(encoded.form), encoded.rows, &parts)?;
    Ok(encoded)
}

/// CPU milliseconds of this thread that `work` takes, and what it returns.
fn spent<T>(work: impl FnOnce() -> Result<T, Error>) -> Result<(f64, T), Error> {
    let before = cpu_nanoseconds()?;
    let value = work()?;
    Ok(((cpu_nanoseconds()? - before) as f64 / 1e6, value))
}

fn cpu_nanoseconds() -> Result<u64, Error> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}
