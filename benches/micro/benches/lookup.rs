//! A lookup among a million chunks: our index in its mapping, a hash map and a radix tree on the
//! heap. And what it costs to attach to that index.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use radix_trie::{Trie, TrieCommon};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stoa_shm::{
    CacheDir, CacheDirOptions, CacheReader, CacheWriter, ChunkKey, ChunkLocation, IndexContents,
};

const FILES: u32 = 500;
const ROW_GROUPS: u32 = 20;
const COLUMNS: u32 = 100;

/// The key of a Pixels-like tree: file, row group and column, big-endian, so that near chunks
/// share a path.
fn tree_key(file: u32, row_group: u32, column: u32) -> Vec<u8> {
    let mut key = u64::from(file).to_be_bytes().to_vec();
    key.extend_from_slice(&(row_group as u16).to_be_bytes());
    key.extend_from_slice(&(column as u16).to_be_bytes());
    key
}

fn file_key(file: u32) -> Arc<[u8]> {
    Arc::from(
        format!("s3://bucket/tpch/lineitem/part-{file:05}.parquet etag={file:032x}").as_bytes(),
    )
}

fn lookups(criterion: &mut Criterion) {
    let scratch = tempfile::Builder::new()
        .prefix("stoa-bench-")
        .tempdir_in("/dev/shm")
        .expect("a directory on tmpfs");
    let dir = CacheDir::open(scratch.path(), CacheDirOptions::default()).expect("own directory");
    let (mut writer, _) = CacheWriter::open(dir).expect("no other writer");
    let keys: Vec<Arc<[u8]>> = (0..FILES).map(file_key).collect();
    let mut segment = writer.new_segment(1 << 20).expect("space");
    let first = ChunkKey {
        file: Arc::clone(&keys[0]),
        row_group: 0,
        column: 0,
    };
    segment.append(&first, 1, 1, &[7; 64]).expect("space");
    let sealed = segment.seal().expect("sealed");
    let location: ChunkLocation = sealed.chunks[0].1;
    let mut chunks = vec![];
    let mut map = HashMap::new();
    let mut tree = Trie::new();
    for file in 0..FILES {
        for row_group in 0..ROW_GROUPS {
            for column in 0..COLUMNS {
                let key = ChunkKey {
                    file: Arc::clone(&keys[file as usize]),
                    row_group,
                    column,
                };
                map.insert((file, row_group, column), location);
                tree.insert(tree_key(file, row_group, column), location);
                chunks.push((key, location));
            }
        }
    }
    let count = chunks.len();
    writer
        .publish(IndexContents {
            chunks,
            catalogs: vec![],
        })
        .expect("published");
    let snapshot = CacheReader::open(scratch.path()).snapshot();
    assert_eq!(snapshot.chunk_count() as usize, count);
    assert_eq!(tree.len(), count);
    let files: Vec<_> = keys
        .iter()
        .map(|key| snapshot.file(key).expect("every file is in the index"))
        .collect();

    let mut random = StdRng::seed_from_u64(1);
    let mut next = move || {
        (
            random.random_range(0..FILES),
            random.random_range(0..ROW_GROUPS),
            random.random_range(0..COLUMNS),
        )
    };
    let mut group = criterion.benchmark_group(format!("lookup_{count}"));
    let mut wanted = next.clone();
    group.bench_function("index", |b| {
        b.iter_batched(
            &mut wanted,
            |(file, row_group, column)| {
                black_box(snapshot.lookup(files[file as usize], row_group, column))
            },
            BatchSize::SmallInput,
        );
    });
    let mut wanted = next.clone();
    group.bench_function("hash_map", |b| {
        b.iter_batched(
            &mut wanted,
            |key| black_box(map.get(&key)),
            BatchSize::SmallInput,
        );
    });
    group.bench_function("radix_tree", |b| {
        b.iter_batched(
            || {
                let (file, row_group, column) = next();
                tree_key(file, row_group, column)
            },
            |key| black_box(tree.get(&key)),
            BatchSize::SmallInput,
        );
    });
    group.finish();

    criterion.bench_function(&format!("attach_{count}"), |b| {
        b.iter(|| {
            let snapshot = CacheReader::open(scratch.path()).snapshot();
            assert!(snapshot.chunk_count() > 0);
            black_box(snapshot)
        });
    });
}

criterion_group!(benches, lookups);
criterion_main!(benches);
