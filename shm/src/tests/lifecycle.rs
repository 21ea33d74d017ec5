//! Writing, publishing, reading, replacing, restarting.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FallocateFlags, fallocate};

use super::*;

#[test]
fn what_is_published_is_read_in_place() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let keys: Vec<ChunkKey> = (0..40).map(|object| key(object, 1)).collect();
    let mut segment = writer.new_segment(SEGMENT_BYTES).unwrap();
    for key in &keys {
        let bytes = content(key);
        let (head, tail) = bytes.split_at(bytes.len() / 3);
        segment.append_parts(key, 3, 17, &[head, tail]).unwrap();
    }
    segment
        .append_catalog("tpch.lineitem", b"catalog bytes")
        .unwrap();
    let sealed = segment.seal().unwrap();
    assert_eq!(writer.publish(contents(&[&sealed])).unwrap(), 1);

    let snapshot = CacheReader::open(scratch.path()).snapshot();
    assert_eq!((snapshot.generation(), snapshot.chunk_count()), (1, 40));
    for key in &keys {
        let file = snapshot.file(&key.file).unwrap();
        let entry = snapshot.lookup(file, key.row_group, key.column).unwrap();
        assert_eq!(
            (
                entry.form(),
                entry.rows(),
                entry.row_group(),
                entry.column()
            ),
            (3, 17, key.row_group, key.column)
        );
        let chunk = snapshot.open_chunk(&entry).unwrap();
        assert_eq!(*chunk, *content(key));
        let owner = chunk.owner();
        assert!(
            owner.bytes().as_ptr_range().contains(&chunk.as_ptr()),
            "the bytes lie in the mapping"
        );
        assert_eq!(chunk.as_ptr() as usize % CHUNK_ALIGN as usize, 0);
        assert_eq!(*chunk.slice(1..chunk.len()), content(key)[1..]);
        assert!(snapshot.lookup(file, 7, 0).is_none());
    }
    // Together, more of them than are waited for at once, with absent ones between.
    let many: Vec<Wanted> = keys
        .iter()
        .flat_map(|key| {
            let file = snapshot.file(&key.file).unwrap();
            [
                want(file, key.row_group, key.column),
                want(file, key.row_group + 100, key.column),
            ]
        })
        .collect();
    let mut found = vec![None; 3];
    snapshot.lookup_many(&many, &mut found);
    let single = |wanted: &Wanted| snapshot.lookup(wanted.file, wanted.row_group, wanted.column);
    assert_eq!(found, many.iter().map(single).collect::<Vec<_>>());
    assert_eq!(found.iter().flatten().count(), 40);
    let nothing = CacheReader::open(scratch.path().join("nothing"));
    nothing.snapshot().lookup_many(&many, &mut found);
    assert_eq!(found, vec![None; 80]);
    assert_eq!(snapshot.file(b"another identity"), None);
    assert_eq!(snapshot.catalogs(), ["tpch.lineitem"]);
    assert_eq!(
        &*snapshot.catalog("tpch.lineitem").unwrap().unwrap(),
        b"catalog bytes"
    );
    assert!(snapshot.catalog("tpch.orders").unwrap().is_none());
    let mut listed: Vec<ChunkKey> = snapshot
        .iter()
        .map(|(file, entry)| ChunkKey {
            file: file.into(),
            row_group: entry.row_group(),
            column: entry.column(),
        })
        .collect();
    listed.sort();
    let mut expected = keys;
    expected.sort();
    assert_eq!(listed, expected);
    assert!(snapshot.verify().is_clean() && writer.verify().is_clean());
    assert_eq!(writer.verify().checked, 41);
}

/// Buffers of an Arrow array own the map, also across threads and panics.
#[test]
fn owners_can_go_into_foreign_buffers() {
    fn accepts<T: Send + Sync + std::panic::RefUnwindSafe + 'static>() {}
    accepts::<SegmentMap>();
    accepts::<ChunkBytes>();
    accepts::<CacheReader>();
    accepts::<Snapshot>();
    accepts::<CacheWriter>();
    accepts::<SegmentWriter>();
    accepts::<AccessCounters>();
}

#[test]
fn a_snapshot_is_the_same_until_the_index_is_replaced() {
    let scratch = Scratch::new();
    let reader = CacheReader::open(scratch.path());
    assert_eq!(reader.snapshot().generation(), 0, "there is no cache yet");
    let mut writer = scratch.writer();
    let sealed = seal(&writer, &[key(1, 1)]);
    writer.publish(contents(&[&sealed])).unwrap();

    let first = reader.snapshot();
    assert_eq!(first.generation(), 1);
    assert!(Arc::ptr_eq(&first, &reader.clone().snapshot()));
    let held = get(&first, &key(1, 1)).unwrap();

    writer.publish(contents(&[&sealed])).unwrap();
    let second = reader.snapshot();
    assert_eq!((first.generation(), second.generation()), (1, 2));
    let again = get(&second, &key(1, 1)).unwrap();
    assert!(
        Arc::ptr_eq(&held.owner(), &again.owner()),
        "a kept segment stays mapped"
    );
    let other_reader = CacheReader::open(scratch.path()).snapshot();
    assert!(
        Arc::ptr_eq(
            &held.owner(),
            &get(&other_reader, &key(1, 1)).unwrap().owner()
        ),
        "a segment is mapped once a process"
    );
}

#[test]
fn kept_chunks_keep_their_place_and_their_counter() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let first = seal(
        &writer,
        &(0..8).map(|object| key(object, 1)).collect::<Vec<_>>(),
    );
    writer.publish(contents(&[&first])).unwrap();
    let reader = CacheReader::open(scratch.path());
    let ordinals = |keys: &[ChunkKey]| -> Vec<u32> {
        let snapshot = reader.snapshot();
        keys.iter()
            .map(|key| {
                snapshot
                    .lookup(snapshot.file(&key.file).unwrap(), key.row_group, key.column)
                    .unwrap()
                    .ordinal()
            })
            .collect()
    };
    let kept: Vec<ChunkKey> = (4..8).map(|object| key(object, 1)).collect();
    let before = ordinals(&kept);

    let second = seal(
        &writer,
        &(10..18).map(|object| key(object, 2)).collect::<Vec<_>>(),
    );
    let mut next = contents(&[&second]);
    next.chunks.extend(
        first
            .chunks
            .iter()
            .filter(|(key, _)| kept.contains(key))
            .cloned(),
    );
    writer.publish(next.clone()).unwrap();
    assert_eq!(ordinals(&kept), before);
    let mut all = ordinals(
        &next
            .chunks
            .iter()
            .map(|(key, _)| key.clone())
            .collect::<Vec<_>>(),
    );
    all.sort_unstable();
    assert_eq!(
        all,
        (0..12).collect::<Vec<_>>(),
        "ordinals are dense and each is used once"
    );
}

#[test]
fn two_workers_on_one_directory_the_second_is_refused() {
    let scratch = Scratch::new();
    let writer = scratch.writer();
    let dir = CacheDir::open(scratch.path(), CacheDirOptions::default()).unwrap();
    let refused = CacheWriter::open(dir.clone()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert_eq!(
        scratch.text(refused),
        format!(
            "cache directory DIR is in use by process {}: one directory has one worker; stop that one or choose \
             another cache.location",
            std::process::id()
        )
    );
    let pending = writer.new_segment(1 << 10).unwrap();
    drop(writer);
    assert!(
        CacheWriter::open(dir.clone()).is_err(),
        "a segment under construction still belongs to the first"
    );
    drop(pending);
    assert!(CacheWriter::open(dir).is_ok());
}

#[test]
fn a_restarted_worker_finds_what_was_published_and_what_was_sealed() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let published = seal(&writer, &[key(1, 1), key(2, 1)]);
    let mut segment = writer.new_segment(1 << 16).unwrap();
    segment.append_catalog("t", b"one").unwrap();
    let catalog = segment.seal().unwrap();
    writer.publish(contents(&[&published, &catalog])).unwrap();
    // Sealed, then killed before publishing; and killed while writing.
    let mut segment = writer.new_segment(1 << 16).unwrap();
    segment
        .append(&key(3, 1), 1, 0, &content(&key(3, 1)))
        .unwrap();
    segment.append_catalog("t", b"two").unwrap();
    let orphan = segment.seal().unwrap();
    let mut unfinished = writer.new_segment(1 << 16).unwrap();
    unfinished
        .append(&key(4, 1), 1, 0, &content(&key(4, 1)))
        .unwrap();
    std::mem::forget(unfinished);
    drop(writer);

    // The forgotten segment keeps the lock's file open: release it as a death would.
    let lock = scratch.path().join("lock");
    std::fs::remove_file(&lock).unwrap();
    let (mut writer, recovery) = scratch.open();
    assert_eq!(recovery.adopted, [orphan.id]);
    assert_eq!(recovery.dropped, []);
    assert_eq!(recovery.chunks.len(), 3);
    assert_eq!(
        recovery.catalogs, catalog.catalogs,
        "a catalog's name does not fix its bytes: only published ones count"
    );
    assert!(
        !scratch
            .names()
            .iter()
            .any(|name| matches!(name, Name::SegmentTemp(_) | Name::IndexTemp))
    );
    for (key, location) in &recovery.chunks {
        assert_eq!(*writer.read(location).unwrap(), *content(key));
    }
    assert_eq!(writer.generation(), 1);
    writer.reclaim().unwrap();
    let all = IndexContents {
        chunks: recovery.chunks.clone().into_iter().collect(),
        catalogs: recovery.catalogs.clone(),
    };
    assert_eq!(
        writer.publish(all).unwrap(),
        2,
        "an adopted segment is not reclaimed before it is published"
    );
    let snapshot = CacheReader::open(scratch.path()).snapshot();
    assert_eq!(*get(&snapshot, &key(3, 1)).unwrap(), *content(&key(3, 1)));
}

#[test]
fn crash_loops_make_progress() {
    let scratch = Scratch::new();
    for round in 0..5 {
        let (writer, recovery) = scratch.open();
        assert_eq!(recovery.chunks.len(), round);
        seal(&writer, &[key(round as u32, 1)]);
    }
}

#[test]
fn a_segment_name_is_never_used_twice_in_a_directory() {
    let scratch = Scratch::new();
    let mut used = std::collections::HashSet::new();
    for round in 0..4 {
        let mut writer = scratch.writer();
        for _ in 0..3 {
            let sealed = seal(&writer, &[key(round, 1)]);
            assert!(used.insert(sealed.id), "segment {} twice", sealed.id);
            writer.publish(contents(&[&sealed])).unwrap();
            writer.reclaim().unwrap();
        }
        match round {
            // An empty generation: no segment is left, the index still knows the names.
            0 => {
                writer.publish(IndexContents::default()).unwrap();
                writer.reclaim().unwrap();
            }
            1 => std::fs::remove_file(scratch.path().join("index")).unwrap(),
            _ => {
                for name in scratch.names() {
                    std::fs::remove_file(scratch.path().join(name.to_string())).unwrap();
                }
            }
        }
    }
}

#[test]
fn only_what_is_sealed_can_be_published() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let sealed = seal(&writer, &[key(1, 1)]);
    let (key, location) = sealed.chunks[0].clone();
    let publish = |writer: &mut CacheWriter, chunks| {
        let error = writer
            .publish(IndexContents {
                chunks,
                catalogs: Vec::new(),
            })
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Input);
        error.to_string()
    };
    let name = "chunk {file s3://bucket/object-0000.parquet etag=000001, row group 0, column 1}";
    let advice = "publish only locations that a sealed segment or the recovery returned";
    assert_eq!(
        publish(
            &mut writer,
            vec![(key.clone(), location), (key.clone(), location)]
        ),
        format!("{name} occurs twice in one index: expected each key once")
    );
    let unknown = ChunkLocation {
        segment: SegmentId(5),
        ..location
    };
    assert_eq!(
        publish(&mut writer, vec![(key.clone(), unknown)]),
        format!(
            "cannot publish {name}: segment 0000000000000005 is not a sealed segment; {advice}"
        )
    );
    let past = ChunkLocation {
        length: 1 << 30,
        ..location
    };
    let text = publish(&mut writer, vec![(key.clone(), past)]);
    assert!(text.contains("is past the data of segment"), "{text}");
    let unaligned = ChunkLocation {
        offset: 65,
        ..location
    };
    let text = publish(&mut writer, vec![(key.clone(), unaligned)]);
    assert!(
        text.contains("offset 65 is unaligned, expected a multiple of 64"),
        "{text}"
    );
    assert_eq!(writer.generation(), 0);
    assert_eq!(
        CacheReader::open(scratch.path()).snapshot().generation(),
        0,
        "a refused publication changes nothing"
    );
}

#[test]
fn a_segment_takes_what_fits_and_says_so() {
    let scratch = Scratch::new();
    let writer = scratch.writer();
    let mut segment = writer.new_segment(256).unwrap();
    assert_eq!(segment.remaining(), 256);
    segment.append(&key(1, 1), 1, 1, &[1; 100]).unwrap();
    assert_eq!(segment.remaining(), 128);
    let full = segment.append(&key(2, 1), 1, 1, &[2; 129]).unwrap_err();
    assert_eq!(
        full.to_string(),
        "segment full: chunk needs 129 bytes, 128 are left; seal it and begin another"
    );
    segment.append(&key(2, 1), 1, 1, &[2; 128]).unwrap();
    segment.append(&key(3, 1), 1, 0, &[]).unwrap();
    let long = ChunkKey {
        file: Arc::from(vec![b'x'; FILE_KEY_BYTES_MAX + 1]),
        row_group: 0,
        column: 0,
    };
    assert_eq!(
        segment.append(&long, 1, 1, &[]).unwrap_err().to_string(),
        "file key has 65537 bytes, expected 1 to 65536"
    );
    assert_eq!(
        segment.append_catalog("", b"").unwrap_err().to_string(),
        "catalog name has 0 bytes, expected 1 to 4096"
    );
    assert_eq!(segment.seal().unwrap().chunks.len(), 3);

    let empty = writer.new_segment(64).unwrap();
    let id = empty.id();
    assert_eq!(
        empty.seal().unwrap_err().to_string(),
        format!("segment {id} holds nothing: append to it before sealing, or drop it")
    );
    drop(writer.new_segment(64).unwrap());
    assert!(
        !scratch
            .names()
            .iter()
            .any(|name| matches!(name, Name::SegmentTemp(_))),
        "a dropped segment is gone"
    );
}

#[test]
fn many_chunks_of_many_files_are_found() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let keys: Vec<ChunkKey> = (0..3000).map(|object| key(object, object / 100)).collect();
    let sealed = seal_large(&writer, &keys);
    writer.publish(contents(&[&sealed])).unwrap();
    let snapshot = CacheReader::open(scratch.path()).snapshot();
    for wanted in &keys {
        assert_eq!(*get(&snapshot, wanted).unwrap(), *content(wanted));
        let other = ChunkKey {
            column: 9,
            ..wanted.clone()
        };
        assert_eq!(get(&snapshot, &other).unwrap_err(), Miss::Absent);
    }
}

fn seal_large(writer: &CacheWriter, keys: &[ChunkKey]) -> SealedSegment {
    let mut segment = writer.new_segment(8 << 20).unwrap();
    for key in keys {
        segment.append(key, 1, 1, &content(key)).unwrap();
    }
    segment.seal().unwrap()
}

/// Removes the counters of a cache with it.
struct Removed<'a>(&'a Path);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        let _ = AccessCounters::remove(self.0);
    }
}

/// On a full tmpfs, an access to a page of them without memory would end the query's process.
#[test]
fn counters_without_all_their_memory_are_not_used() {
    let scratch = Scratch::new();
    let writer = scratch.writer();
    let _removed = Removed(scratch.path());
    drop(AccessCounters::create_with(writer.dir(), 4096).unwrap());
    let object = counters::file_of(scratch.path());
    let allocated = || std::fs::metadata(&object).unwrap().blocks() * 512;
    let bytes = std::fs::metadata(&object).unwrap().len();
    assert!(allocated() >= bytes, "{} of {bytes}", allocated());

    let file = File::options().write(true).open(&object).unwrap();
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, punch, 64 << 10, 4 << 10).unwrap();
    assert!(allocated() < bytes);
    let error = AccessCounters::open(scratch.path()).unwrap_err();
    assert!(
        error.to_string().contains("not all of its memory is there"),
        "{error}"
    );

    drop(AccessCounters::create_with(writer.dir(), 4096).unwrap());
    assert!(allocated() >= bytes);
    assert!(AccessCounters::open(scratch.path()).is_ok());
}

#[test]
fn access_is_counted_by_chunk_over_generations_and_processes() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let sealed = seal(&writer, &[key(1, 1), key(2, 1)]);
    writer.publish(contents(&[&sealed])).unwrap();
    let absent = AccessCounters::open(scratch.path())
        .unwrap_err()
        .to_string();
    assert!(
        absent.contains("cannot open: No such file or directory"),
        "{absent}"
    );
    assert!(
        absent.ends_with("the worker of the cache makes them"),
        "{absent}"
    );

    let _removed = Removed(scratch.path());
    let created = AccessCounters::create_with(writer.dir(), 2).unwrap();
    let opened = AccessCounters::open(scratch.path()).unwrap();
    let reader = CacheReader::open(scratch.path());
    let entry = |key: &ChunkKey| {
        let snapshot = reader.snapshot();
        snapshot
            .lookup(snapshot.file(&key.file).unwrap(), key.row_group, key.column)
            .unwrap()
    };
    opened.record(&entry(&key(1, 1)), 10);
    opened.record(&entry(&key(1, 1)), 5);
    assert_eq!(
        created.counts(&entry(&key(1, 1))),
        counters::Counts { hits: 2, rows: 15 }
    );
    assert_eq!(
        created.counts(&entry(&key(2, 1))),
        counters::Counts::default()
    );

    // A restarted worker goes on counting; a new chunk in a slot that was another's starts anew.
    drop((created, opened));
    let again = AccessCounters::create_with(writer.dir(), 99).unwrap();
    assert_eq!(again.counts(&entry(&key(1, 1))).hits, 2);
    let replaced = seal(&writer, &[key(5, 1), key(6, 1), key(7, 1)]);
    writer.publish(contents(&[&replaced])).unwrap();
    for object in 5..8 {
        assert_eq!(
            again.counts(&entry(&key(object, 1))),
            counters::Counts::default()
        );
        again.record(&entry(&key(object, 1)), 1);
    }
    let hits: u64 = (5..8)
        .map(|object| again.counts(&entry(&key(object, 1))).hits)
        .sum();
    assert_eq!(hits, 2, "a chunk beyond the slots is not counted");
}
