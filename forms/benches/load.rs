//! What a worker does with a fetched row group: decode, encode, validate, write. Each alone, then
//! all of it in either form, in bytes of the chunks' arrow form a second, so that rates compare.

use std::hint::black_box;
use std::sync::Arc;

use arrow::array::{ArrayRef, Decimal128Array, Int64Array, RecordBatch, StringViewArray};
use arrow::datatypes::DataType;
use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stoa_forms::{BLOCK_ROWS, FORM_ARROW, encode_arrow, encode_packed, validate, validate_packed};
use stoa_shm::{CacheDir, CacheDirOptions, CacheWriter, ChunkKey, SEGMENT_BYTES};

type Encode = fn(&[ArrayRef], &DataType) -> stoa_forms::Result<Vec<u8>>;
type Check = fn(Bytes, &DataType) -> stoa_forms::Result<()>;

const ROWS: usize = 131_072;

/// A row group shaped like lineitem's: keys, prices, short flags, comments.
fn row_group() -> RecordBatch {
    let mut random = StdRng::seed_from_u64(1);
    let keys: ArrayRef = Arc::new(Int64Array::from_iter_values(
        (0..ROWS as i64).map(|i| i / 4),
    ));
    let prices: ArrayRef = Arc::new(
        Decimal128Array::from_iter_values(
            (0..ROWS).map(|_| random.random_range(90_000..10_000_000)),
        )
        .with_precision_and_scale(15, 2)
        .expect("a decimal type"),
    );
    let flags: ArrayRef = Arc::new(StringViewArray::from_iter_values(
        (0..ROWS).map(|_| ["A", "N", "R"][random.random_range(0..3)]),
    ));
    let comments: ArrayRef = Arc::new(StringViewArray::from_iter_values((0..ROWS).map(|i| {
        format!(
            "carefully final deposits {} sleep {i}",
            random.random_range(0..999)
        )
    })));
    RecordBatch::try_from_iter([
        ("key", keys),
        ("price", prices),
        ("flag", flags),
        ("comment", comments),
    ])
    .expect("columns of one length")
}

fn loads(criterion: &mut Criterion) {
    let batch = row_group();
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .build();
    let mut file = vec![];
    let mut writer =
        ArrowWriter::try_new(&mut file, batch.schema(), Some(properties)).expect("a schema");
    writer.write(&batch).expect("written");
    writer.close().expect("closed");
    let file = Bytes::from(file);
    let decode = || -> Vec<RecordBatch> {
        ParquetRecordBatchReaderBuilder::try_new(file.clone())
            .and_then(|builder| builder.with_batch_size(BLOCK_ROWS).build())
            .expect("own file")
            .collect::<Result<_, _>>()
            .expect("own rows")
    };
    let columns = |batches: &[RecordBatch]| -> Vec<Vec<ArrayRef>> {
        let column = |at: usize| batches.iter().map(|b| Arc::clone(b.column(at))).collect();
        (0..batches[0].num_columns()).map(column).collect()
    };
    let each = |batches: &[RecordBatch], encode: Encode| -> Vec<Vec<u8>> {
        let encode = |arrays: &Vec<ArrayRef>| encode(arrays, arrays[0].data_type());
        let chunks = columns(batches)
            .iter()
            .map(encode)
            .collect::<Result<_, _>>();
        chunks.expect("supported types")
    };
    let lay_out = |batches: &[RecordBatch]| each(batches, encode_arrow);
    let pack = |batches: &[RecordBatch]| each(batches, encode_packed);
    let decoded = decode();
    let chunks = lay_out(&decoded);
    let bytes: usize = chunks.iter().map(Vec::len).sum();
    let scratch = tempfile::Builder::new()
        .prefix("stoa-bench-")
        .tempdir_in("/dev/shm")
        .expect("a directory on tmpfs");
    let dir = CacheDir::open(scratch.path(), CacheDirOptions::default()).expect("own directory");
    let (cache, _) = CacheWriter::open(dir).expect("no other writer");
    let write = |chunks: &[Vec<u8>]| {
        let mut segment = cache.new_segment(SEGMENT_BYTES).expect("space");
        for (column, chunk) in chunks.iter().enumerate() {
            let key = ChunkKey {
                file: Arc::from(&b"file"[..]),
                row_group: 0,
                column: column as u32,
            };
            segment
                .append(&key, FORM_ARROW, ROWS as u32, chunk)
                .expect("space");
        }
        // Dropped unsealed: the temporary file goes, so that the directory does not fill.
        black_box(segment);
    };

    let mut group = criterion.benchmark_group("load_row_group");
    group.sample_size(20);
    group.throughput(Throughput::Bytes(bytes as u64));
    group.bench_function("decode", |b| b.iter(|| black_box(decode())));
    group.bench_function("lay_out", |b| b.iter(|| black_box(lay_out(&decoded))));
    group.bench_function("pack", |b| b.iter(|| black_box(pack(&decoded))));
    let packed = pack(&decoded);
    let checks: [(&str, &[Vec<u8>], Check); 2] = [
        ("validate", &chunks, validate),
        ("validate_packed", &packed, validate_packed),
    ];
    for (name, chunks, check) in checks {
        // Validation reads in place, so that the chunk has to lie as it does in a segment.
        let aligned: Vec<Bytes> = chunks.iter().map(|chunk| align(chunk)).collect();
        group.bench_function(name, |b| {
            b.iter(|| {
                for (column, chunk) in aligned.iter().enumerate() {
                    let data_type = decoded[0].column(column).data_type();
                    check(chunk.clone(), data_type).expect("own chunk");
                }
            });
        });
    }
    group.bench_function("write", |b| b.iter(|| write(&chunks)));
    group.bench_function("all_arrow", |b| b.iter(|| write(&lay_out(&decode()))));
    group.bench_function("all_packed", |b| b.iter(|| write(&pack(&decode()))));
    group.finish();
}

fn align(chunk: &[u8]) -> Bytes {
    struct Owned(arrow::buffer::Buffer);
    impl AsRef<[u8]> for Owned {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    let mut buffer = arrow::buffer::MutableBuffer::with_capacity(chunk.len());
    buffer.extend_from_slice(chunk);
    Bytes::from_owner(Owned(buffer.into()))
}

criterion_group!(benches, loads);
criterion_main!(benches);
