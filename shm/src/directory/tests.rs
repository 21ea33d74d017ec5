use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::dir::DIRECTORY_NAME;
use crate::format::{
    DirectoryHeader, FORMAT_MAJOR, FORMAT_MINOR, FileSlot, SLOT_USED, WorkerRow, hash,
};
use crate::{CacheDir, CacheDirOptions, CacheWriter, ChunkLocation, DirectoryReader, SegmentId};

fn worker(n: u64) -> HoldingWorker {
    HoldingWorker {
        id: format!("worker-{n}"),
        incarnation: 1000 + n,
        addresses: (0..n).map(|a| format!("10.0.{a}.{n}:7420")).collect(),
    }
}

fn location(n: u64) -> ChunkLocation {
    ChunkLocation {
        segment: SegmentId(n / 7),
        offset: 64 * (n + 1),
        length: n * 3,
        form: (n % 3) as u8 + 1,
        checksum: n.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        rows: n as u32,
    }
}

/// `files` files of two row groups and three columns, each chunk at one to three workers.
fn example(files: u64) -> Vec<u8> {
    let mut builder = DirectoryBuilder::new();
    let workers: Vec<u32> = (0..3).map(|n| builder.worker(worker(n))).collect();
    for at in 0..files * 6 {
        let file = format!("s3://bucket/{}.parquet", at / 6);
        for worker in &workers[..(at % 3) as usize + 1] {
            builder.chunk(
                *worker,
                file.as_bytes(),
                (at % 6 / 3) as u32,
                (at % 3) as u32,
                location(at * 10 + u64::from(*worker)),
            );
        }
    }
    builder.build(5).unwrap()
}

fn check_example(directory: &Directory, files: u64) {
    assert_eq!(
        (directory.chunk_count(), directory.revision()),
        (files * 6, 5)
    );
    assert_eq!(
        directory.workers().cloned().collect::<Vec<_>>(),
        [worker(0), worker(1), worker(2)]
    );
    for at in 0..files * 6 {
        let file = format!("s3://bucket/{}.parquet", at / 6);
        let (row_group, column) = ((at % 6 / 3) as u32, (at % 3) as u32);
        let found: Vec<(String, ChunkLocation)> = directory
            .lookup(file.as_bytes(), row_group, column)
            .map(|holder| (holder.worker.id.clone(), holder.location))
            .collect();
        let expected: Vec<(String, ChunkLocation)> = (0..at % 3 + 1)
            .map(|n| (worker(n).id, location(at * 10 + n)))
            .collect();
        assert_eq!(found, expected);
        assert_eq!(directory.lookup(file.as_bytes(), row_group, 3).count(), 0);
    }
    assert_eq!(directory.lookup(b"s3://bucket/other", 0, 0).count(), 0);
}

#[test]
fn what_is_put_in_is_found() {
    for files in [0, 1, 50] {
        check_example(&Directory::parse(example(files)).unwrap(), files);
    }
    assert_eq!(Directory::empty().lookup(b"x", 0, 0).count(), 0);
}

/// The same pieces in another order are the same bytes: peers may be asked in any order.
#[test]
fn a_directory_lists_everything_that_it_holds() {
    let directory = Directory::parse(example(9)).unwrap();
    let mut builder = DirectoryBuilder::new();
    let mut numbers: HashMap<&str, u32> = HashMap::new();
    for worker in directory.workers() {
        numbers.insert(&worker.id, builder.worker(worker.clone()));
    }
    for (file, row_group, column, holders) in directory.chunks() {
        for holder in holders {
            let worker = numbers[holder.worker.id.as_str()];
            builder.chunk(worker, file, row_group, column, holder.location);
        }
    }
    check_example(&Directory::parse(builder.build(5).unwrap()).unwrap(), 9);
}

#[test]
fn readers_follow_what_the_worker_writes() {
    let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
    let reader = DirectoryReader::open(scratch.path());
    assert_eq!(reader.current().chunk_count(), 0);
    let dir = CacheDir::open(scratch.path(), CacheDirOptions::default()).unwrap();
    dir.write_directory(&example(4)).unwrap();
    let before = reader.current();
    check_example(&before, 4);
    dir.write_directory(&example(7)).unwrap();
    check_example(&reader.current(), 7);
    // What is held stays what it was.
    check_example(&before, 4);
    check_example(&Directory::open(scratch.path()), 7);
    // A new writer keeps it, and removes what a death left half written.
    std::fs::write(scratch.path().join("directory.tmp"), b"half").unwrap();
    let writer = CacheWriter::open(dir.clone()).unwrap().0;
    assert!(!scratch.path().join("directory.tmp").exists());
    check_example(&reader.current(), 7);
    let with = writer.memory().unwrap().index_bytes;
    std::fs::remove_file(scratch.path().join(DIRECTORY_NAME)).unwrap();
    assert!(
        writer.memory().unwrap().index_bytes < with,
        "its memory is counted"
    );
    assert_eq!(reader.current().chunk_count(), 0);
}

#[test]
fn a_broken_directory_is_empty_and_a_newer_one_too() {
    let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
    let dir = CacheDir::open(scratch.path(), CacheDirOptions::default()).unwrap();
    let reader = DirectoryReader::open(scratch.path());
    let good = example(3);
    let mut newer = good.clone();
    newer[8..10].copy_from_slice(&(FORMAT_MAJOR + 1).to_le_bytes());
    assert!(
        Directory::parse(newer.clone())
            .unwrap_err()
            .to_string()
            .starts_with(&format!(
                "format 2.{FORMAT_MINOR} of holdings is unsupported"
            ))
    );
    for broken in [vec![], b"STOADIRY".to_vec(), good[..300].to_vec(), newer] {
        dir.write_directory(&broken).unwrap();
        assert_eq!(reader.current().chunk_count(), 0);
        dir.write_directory(&good).unwrap();
        check_example(&reader.current(), 3);
    }
}

/// Whatever byte is damaged: what is still found is what was put in, and nothing panics.
#[test]
fn a_flipped_byte_is_a_miss_and_never_another_answer() {
    let good = example(3);
    let whole = Directory::parse(good.clone()).unwrap();
    let all = |directory: &Directory| -> Vec<(u64, Vec<(HoldingWorker, ChunkLocation)>)> {
        (0..18)
            .map(|at| {
                let file = format!("s3://bucket/{}.parquet", at / 6);
                let holders = directory
                    .lookup(file.as_bytes(), (at % 6 / 3) as u32, (at % 3) as u32)
                    .map(|holder| (holder.worker.clone(), holder.location));
                (at, holders.collect())
            })
            .collect()
    };
    let expected = all(&whole);
    let mut missed = 0;
    for at in 0..good.len() {
        for bit in [0x01, 0x80] {
            let mut bytes = good.clone();
            bytes[at] ^= bit;
            let Ok(directory) = Directory::parse(bytes) else {
                continue;
            };
            for ((_, found), (_, expected)) in all(&directory).iter().zip(&expected) {
                // Addresses have no check of their own: a wrong one leads to a host that does not
                // know the incarnation.
                let known = |held: &(HoldingWorker, ChunkLocation)| {
                    expected.iter().any(|(worker, location)| {
                        worker.id == held.0.id
                            && worker.incarnation == held.0.incarnation
                            && *location == held.1
                    })
                };
                assert!(found.iter().all(known), "byte {at}: {found:?}");
                missed += expected.len() - found.len();
            }
            directory.chunks().count();
        }
    }
    assert!(missed > 0);
    assert_eq!(DirectoryHeader::BYTES, 192);
}

/// What others send must not ask for more memory than they sent.
#[test]
fn texts_that_overlap_are_refused() {
    let mut builder = DirectoryBuilder::new();
    let text = "x".repeat(4000);
    for n in 0..8 {
        let worker = builder.worker(HoldingWorker {
            id: text.clone(),
            incarnation: n,
            addresses: vec![],
        });
        let mut key = text.clone().into_bytes();
        key[0] = n as u8;
        builder.chunk(worker, &key, 0, 0, location(n));
    }
    let good = builder.build(1).unwrap();
    assert_eq!(Directory::parse(good.clone()).unwrap().chunk_count(), 8);
    let header = DirectoryHeader::read(&good);
    // All rows name the text of the first, as far as the area reaches.
    let mut overlapping = good.clone();
    let at = |n: u64| header.workers_offset as usize + n as usize * WorkerRow::BYTES;
    let first = WorkerRow::read(&good[at(0)..]);
    let long = (header.strings_offset + header.strings_bytes - first.id_offset) as u32;
    let id = &good[first.id_offset as usize..][..long as usize];
    for n in 0..8 {
        let row = WorkerRow {
            id_bytes: long,
            ..first
        };
        overlapping[at(n)..][..WorkerRow::BYTES].copy_from_slice(&row.to_bytes(hash(id)));
    }
    let error = Directory::parse(overlapping).unwrap_err().to_string();
    assert!(error.contains("texts of workers overlap"), "{error}");

    let mut overlapping = good.clone();
    for slot in 0..u64::from(header.file_slots) {
        let at = (header.file_slots_offset + slot * FileSlot::BYTES as u64) as usize;
        let mut row = FileSlot::read(&good[at..]);
        if row.state == SLOT_USED {
            (row.key_offset, row.key_bytes) = (header.strings_offset, header.strings_bytes as u32);
            overlapping[at..][..FileSlot::BYTES].copy_from_slice(&row.to_bytes(0));
        }
    }
    let error = Directory::parse(overlapping).unwrap_err().to_string();
    assert!(error.contains("keys of files overlap"), "{error}");
}

proptest! {
    #[test]
    fn anything_is_found_again(
        held in prop::collection::hash_map((0u8..5, 0u32..4, 0u32..4, 0u32..6), 0u64..1_000_000, 0..200),
    ) {
        let mut builder = DirectoryBuilder::new();
        let workers: Vec<u32> = (0..6).map(|n| builder.worker(worker(n))).collect();
        for ((file, row_group, column, at), n) in &held {
            builder.chunk(workers[*at as usize], &[*file], *row_group, *column, location(*n));
        }
        let directory = Directory::parse(builder.build(1).unwrap()).unwrap();
        for ((file, row_group, column, at), n) in &held {
            let of_worker: Vec<ChunkLocation> = directory
                .lookup(&[*file], *row_group, *column)
                .filter(|holder| holder.worker.id == worker(u64::from(*at)).id)
                .map(|holder| holder.location)
                .collect();
            prop_assert_eq!(of_worker, vec![location(*n)]);
        }
        let total: usize = directory.chunks().map(|(.., holders)| holders.len()).sum();
        prop_assert_eq!(total, held.len());
    }

    #[test]
    fn parsing_anything_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Directory::parse(bytes.clone());
        // With a header that looks right, too.
        let good = example(1);
        let copied = bytes.len().min(good.len() - 192);
        let at = 192 + copied;
        bytes.truncate(copied);
        let mut mixed = good.clone();
        mixed[192..at].copy_from_slice(&bytes);
        if let Ok(directory) = Directory::parse(mixed) {
            directory.chunks().count();
            directory.lookup(b"s3://bucket/0.parquet", 0, 0).count();
        }
    }
}
