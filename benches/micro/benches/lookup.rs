//! A lookup among a million chunks: our index in its mapping, one at a time and together, a hash map
//! and a radix tree on the heap; beside them what it costs to read one cache line of a hundred
//! megabytes, at a place that only the line before tells. And what it costs to attach to that index.
//!
//! The keys are drawn before, many more than the processor's caches hold, so that what is timed is
//! the lookup at a random place and nothing else. The time is the thread's CPU time, which other
//! work on the machine changes least.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nix::time::{ClockId, clock_gettime};
use radix_trie::{Trie, TrieCommon};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stoa_shm::{
    AccessCounters, CacheDir, CacheDirOptions, CacheReader, CacheWriter, ChunkKey, ChunkLocation,
    IndexContents, Wanted,
};

const FILES: u32 = 500;
const ROW_GROUPS: u32 = 20;
const COLUMNS: u32 = 100;

/// Lookups of one timed iteration.
const LOOKUPS: usize = 1_000_000;

/// As many as the columns of a wide table: what dividing a file between partitions looks up at once.
const TOGETHER: usize = 100;

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

/// CPU time of this thread that `times` runs of `work` take.
fn cpu_time(times: u64, mut work: impl FnMut()) -> Duration {
    let now = || {
        let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every Linux has it");
        Duration::from(now)
    };
    let start = now();
    for _ in 0..times {
        work();
    }
    now() - start
}

/// A cache line that names another.
#[repr(align(64))]
struct Line(usize);

/// As much memory as the index takes, on the heap, in lines of which each names the next: one circle
/// through all of them, at random (Sattolo's shuffle).
fn chain(random: &mut StdRng) -> Vec<Line> {
    let lines = (FILES * ROW_GROUPS * COLUMNS) as usize * 8 / 5;
    let mut lines: Vec<Line> = (0..lines).map(Line).collect();
    for last in (1..lines.len()).rev() {
        lines.swap(last, random.random_range(0..last));
    }
    lines
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
    let places: Vec<(u32, u32, u32)> = (0..LOOKUPS)
        .map(|_| {
            (
                random.random_range(0..FILES),
                random.random_range(0..ROW_GROUPS),
                random.random_range(0..COLUMNS),
            )
        })
        .collect();
    let wanted: Vec<Wanted> = places
        .iter()
        .map(|(file, row_group, column)| Wanted {
            file: files[*file as usize],
            row_group: *row_group,
            column: *column,
        })
        .collect();
    let tree_keys: Vec<Vec<u8>> = places
        .iter()
        .map(|(file, row_group, column)| tree_key(*file, *row_group, *column))
        .collect();

    let mut group = criterion.benchmark_group(format!("lookup_{count}"));
    group.throughput(Throughput::Elements(LOOKUPS as u64));
    group.sample_size(20);
    group.bench_function("index", |b| {
        b.iter_custom(|times| {
            cpu_time(times, || {
                for wanted in &wanted {
                    black_box(snapshot.lookup(wanted.file, wanted.row_group, wanted.column));
                }
            })
        });
    });
    group.bench_function("index_together", |b| {
        let mut found = Vec::with_capacity(TOGETHER);
        b.iter_custom(|times| {
            cpu_time(times, || {
                for wanted in wanted.chunks(TOGETHER) {
                    snapshot.lookup_many(wanted, &mut found);
                    black_box(&found);
                }
            })
        });
    });
    // The same few over and over: what the processor takes when it waits for no memory.
    group.bench_function("index_together_in_cache", |b| {
        let mut found = Vec::with_capacity(TOGETHER);
        b.iter_custom(|times| {
            cpu_time(times, || {
                for _ in wanted.chunks(TOGETHER) {
                    snapshot.lookup_many(&wanted[..TOGETHER], &mut found);
                    black_box(&found);
                }
            })
        });
    });
    group.bench_function("hash_map", |b| {
        b.iter_custom(|times| {
            cpu_time(times, || {
                for place in &places {
                    black_box(map.get(place));
                }
            })
        });
    });
    let lines = chain(&mut random);
    group.bench_function("one_line_of_memory", |b| {
        let mut at = 0;
        b.iter_custom(|times| {
            cpu_time(times, || {
                for _ in 0..LOOKUPS {
                    at = lines[at].0;
                }
                black_box(at);
            })
        });
    });
    group.bench_function("radix_tree", |b| {
        b.iter_custom(|times| {
            cpu_time(times, || {
                for key in &tree_keys {
                    black_box(tree.get(key));
                }
            })
        });
    });
    group.finish();

    criterion.bench_function(&format!("attach_{count}"), |b| {
        b.iter_custom(|times| {
            cpu_time(times, || {
                let snapshot = CacheReader::open(scratch.path()).snapshot();
                assert!(snapshot.chunk_count() > 0);
                black_box(snapshot);
            })
        });
    });
    drop(writer);
    // Before the directory goes, whose name they bear.
    let _ = AccessCounters::remove(scratch.path());
}

criterion_group!(benches, lookups);
criterion_main!(benches);
