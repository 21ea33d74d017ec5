//! What the packed form costs and saves, column by column.
//!
//! ```sh
//! cargo run --release -p stoa-forms --example packed -- DIRECTORY [COLUMN…]
//! ```
//!
//! reads every Parquet file below the directory and prints, for each column: its bytes in the
//! file, as Arrow and packed; then nanoseconds a value: the parquet crate's decoding, packing
//! (statistics, choice and validation included), unpacking whole blocks, unpacking one row in a
//! hundred, and evaluating `column <= value` where it is evaluated on packed values. Each figure is
//! the best of some rounds for each row group, in one thread, over the first file that has the
//! column; bytes are of all files.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{Array, ArrayRef, Scalar};
use arrow::buffer::{BooleanBuffer, Buffer};
use arrow::datatypes::{DataType, Field, Schema};
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use stoa_forms::{
    BLOCK_ROWS, Comparison, Operator, PackedChunk, encode_arrow, encode_packed, validate_packed,
};

const ROUNDS: usize = 7;

type Failure = Box<dyn std::error::Error>;

/// What is known of one column.
#[derive(Default)]
struct Column {
    encoding: String,
    file_bytes: usize,
    arrow_bytes: usize,
    packed_bytes: usize,
    rows: usize,
    times: Option<Times>,
}

/// Nanoseconds a value.
struct Times {
    parquet: f64,
    pack: f64,
    unpack: f64,
    sparse: f64,
    evaluate: Option<f64>,
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments
        .next()
        .ok_or("give a directory of Parquet files")?;
    let wanted: Vec<String> = arguments.collect();
    let mut files = vec![];
    find(Path::new(&directory), &mut files)?;
    files.sort();
    let mut columns: BTreeMap<(String, usize, String), Column> = BTreeMap::new();
    for path in &files {
        let table = path.parent().and_then(Path::file_name).unwrap_or_default();
        let table = table.to_string_lossy().into_owned();
        let bytes = Bytes::from(std::fs::read(path)?);
        let metadata = reader(&File::open(path)?)?;
        for (index, field) in metadata.schema().fields().iter().enumerate() {
            if !wanted.is_empty() && !wanted.contains(field.name()) {
                continue;
            }
            let key = (table.clone(), index, field.name().clone());
            let column = columns.entry(key).or_default();
            measure(&bytes, &metadata, index, field.data_type(), column)?;
        }
    }
    println!(
        "{:<22}{:>9}{:>9}{:>9}{:>7} |{:>8}{:>7}{:>8}{:>8}{:>8}  encoding",
        "column",
        "file kB",
        "arrow kB",
        "packed",
        "ratio",
        "parquet",
        "pack",
        "unpack",
        "1 %",
        "<="
    );
    let (mut file, mut arrow, mut packed) = (0, 0, 0);
    let (mut decode_ns, mut pack_ns) = (0.0, 0.0);
    let mut before = String::new();
    for ((table, _, name), column) in &columns {
        if *table != before {
            println!("{table}");
            before = table.clone();
        }
        let kb = |bytes: usize| bytes as f64 / 1000.0;
        print!(
            "  {name:<20}{:>9.0}{:>9.0}{:>9.0}{:>7.2} |",
            kb(column.file_bytes),
            kb(column.arrow_bytes),
            kb(column.packed_bytes),
            column.packed_bytes as f64 / column.file_bytes as f64
        );
        if let Some(times) = &column.times {
            decode_ns += times.parquet * column.rows as f64;
            pack_ns += times.pack * column.rows as f64;
            let evaluate = times.evaluate.map_or("-".into(), |t| format!("{t:.2}"));
            print!(
                "{:>8.2}{:>7.1}{:>8.2}{:>8.2}{evaluate:>8}",
                times.parquet, times.pack, times.unpack, times.sparse
            );
        }
        println!("  {}", column.encoding);
        file += column.file_bytes;
        arrow += column.arrow_bytes;
        packed += column.packed_bytes;
    }
    println!(
        "all: file {:.1} MB, arrow {:.1} MB ({:.2}), packed {:.1} MB ({:.3})",
        file as f64 / 1e6,
        arrow as f64 / 1e6,
        arrow as f64 / file as f64,
        packed as f64 / 1e6,
        packed as f64 / file as f64
    );
    println!(
        "the parquet crate decodes all in {:.2} s, packing takes {:.2} s more: {:.2} of its rate",
        decode_ns / 1e9,
        pack_ns / 1e9,
        decode_ns / (decode_ns + pack_ns)
    );
    Ok(())
}

fn find(directory: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "parquet") {
            files.push(path);
        }
    }
    Ok(())
}

/// The file's reader, which yields strings as views, as a worker does.
fn reader(file: &File) -> Result<ArrowReaderMetadata, Failure> {
    let plain = ArrowReaderMetadata::load(file, ArrowReaderOptions::new())?;
    let fields = plain.schema().fields().iter().map(|field| {
        let data_type = match field.data_type() {
            DataType::Utf8 | DataType::LargeUtf8 => DataType::Utf8View,
            DataType::Binary | DataType::LargeBinary => DataType::BinaryView,
            other => other.clone(),
        };
        Field::clone(field).with_data_type(data_type)
    });
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    let options = ArrowReaderOptions::new().with_schema(schema);
    Ok(ArrowReaderMetadata::load(file, options)?)
}

fn decode(
    bytes: &Bytes,
    metadata: &ArrowReaderMetadata,
    group: usize,
    column: usize,
) -> Result<Vec<ArrayRef>, Failure> {
    let mask = ProjectionMask::roots(metadata.parquet_schema(), [column]);
    let reader =
        ParquetRecordBatchReaderBuilder::new_with_metadata(bytes.clone(), metadata.clone())
            .with_row_groups(vec![group])
            .with_projection(mask)
            .with_batch_size(BLOCK_ROWS)
            .build()?;
    let batches = reader.collect::<Result<Vec<_>, _>>()?;
    Ok(batches
        .iter()
        .map(|batch| Arc::clone(batch.column(0)))
        .collect())
}

fn measure(
    bytes: &Bytes,
    metadata: &ArrowReaderMetadata,
    index: usize,
    data_type: &DataType,
    column: &mut Column,
) -> Result<(), Failure> {
    let first = column.times.is_none();
    let mut chunks = vec![];
    let mut decoded = vec![];
    for group in 0..metadata.metadata().num_row_groups() {
        let arrays = decode(bytes, metadata, group, index)?;
        let packed = encode_packed(&arrays, data_type)?;
        column.file_bytes += metadata
            .metadata()
            .row_group(group)
            .column(index)
            .compressed_size() as usize;
        column.arrow_bytes += encode_arrow(&arrays, data_type)?.len();
        column.packed_bytes += packed.len();
        column.rows += arrays.iter().map(|a| a.len()).sum::<usize>();
        let chunk = PackedChunk::open(aligned(&packed), data_type)?;
        column.encoding = chunk.encoding();
        if first {
            chunks.push(chunk);
            decoded.push(arrays);
        }
    }
    if !first {
        return Ok(());
    }
    let rows: usize = chunks.iter().map(PackedChunk::rows).sum();
    // The best round of each chunk: what else runs on the machine interrupts few of them.
    let best = |work: &mut dyn FnMut(usize) -> Result<(), Failure>| -> Result<f64, Failure> {
        let mut sum = 0.0;
        for chunk in 0..chunks.len() {
            let mut best = f64::INFINITY;
            for _ in 0..ROUNDS {
                let start = Instant::now();
                work(chunk)?;
                best = best.min(start.elapsed().as_nanos() as f64);
            }
            sum += best;
        }
        Ok(sum / rows as f64)
    };
    let parquet = best(&mut |at| {
        std::hint::black_box(decode(bytes, metadata, at, index)?);
        Ok(())
    })?;
    let pack = best(&mut |at| {
        let packed = aligned(&encode_packed(&decoded[at], data_type)?);
        Ok(validate_packed(packed, data_type)?)
    })?;
    let unpack = best(&mut |at| {
        for block in 0..chunks[at].blocks() {
            std::hint::black_box(chunks[at].block(block)?);
        }
        Ok(())
    })?;
    let keep = |rows: usize| -> BooleanBuffer {
        (0..rows).map(|row| (row * 7919 + 13) % 100 == 7).collect()
    };
    let whole = keep(BLOCK_ROWS);
    let sparse = best(&mut |at| {
        for block in 0..chunks[at].blocks() {
            let keep = whole.slice(0, chunks[at].block_rows(block));
            std::hint::black_box(chunks[at].filtered(block, &keep)?);
        }
        Ok(())
    })?;
    let middle = decoded
        .iter()
        .flatten()
        .find(|array| array.null_count() < array.len())
        .map(|array| {
            let at = (0..array.len()).find(|at| array.is_valid(*at)).unwrap_or(0);
            Scalar::new(array.slice(at, 1))
        });
    let comparison = middle.map(|value| Comparison::Compare {
        op: Operator::LtEq,
        value,
    });
    let evaluated = comparison
        .as_ref()
        .is_some_and(|c| chunks.iter().all(|chunk| chunk.prepare(c).is_some()));
    let evaluate = match (evaluated, &comparison) {
        (true, Some(comparison)) => Some(best(&mut |at| {
            if let Some(prepared) = chunks[at].prepare(comparison) {
                for block in 0..chunks[at].blocks() {
                    std::hint::black_box(prepared.evaluate(block)?);
                }
            }
            Ok(())
        })?),
        _ => None,
    };
    column.times = Some(Times {
        parquet,
        pack,
        unpack,
        sparse,
        evaluate,
    });
    Ok(())
}

/// Bytes at a 64-byte boundary, as they are in a segment.
fn aligned(bytes: &[u8]) -> Bytes {
    struct Owned(Buffer);
    impl AsRef<[u8]> for Owned {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    Bytes::from_owner(Owned(Buffer::from_slice_ref(bytes)))
}
