//! Files that are not what they should be: detected, a miss, and repaired by the worker.

use proptest::prelude::*;

use super::*;
use crate::format::{ENDIAN_MARK, IndexHeader};
use crate::index::{Index, IndexedSegment, TAG_READS_MAX, TAGS_TOGETHER, first_slot};
use crate::index_build::{IndexInput, build};

fn published(scratch: &Scratch, keys: &[ChunkKey]) -> SealedSegment {
    let mut writer = scratch.writer();
    let sealed = seal(&writer, keys);
    writer.publish(contents(&[&sealed])).unwrap();
    sealed
}

#[test]
fn a_bit_flip_costs_one_chunk() {
    let scratch = Scratch::new();
    let keys: Vec<ChunkKey> = (0..20).map(|object| key(object, 1)).collect();
    let sealed = published(&scratch, &keys);
    let (bad_key, bad) = sealed.chunks[7].clone();
    damage(&segment_path(&scratch, sealed.id), |bytes| {
        bytes[bad.offset as usize] ^= 4
    });

    // A reader that hashes notices at once.
    let options = ReaderOptions {
        verify: Verify::FirstTouch,
        ..ReaderOptions::default()
    };
    let miss = get(
        &CacheReader::open_with(scratch.path(), options).snapshot(),
        &bad_key,
    )
    .unwrap_err();
    let text = miss.to_string();
    assert!(
        text.starts_with("corrupt: checksum of ") && text.contains(", expected 0x"),
        "{text}"
    );
    // So does a scrub.
    let report = CacheReader::open(scratch.path()).snapshot().verify();
    assert_eq!(report.bad_chunks.len(), 1);
    assert_eq!(report.bad_chunks[0].0, bad_key);
    assert_eq!(report.checked, 20);

    // A restarted worker takes it over as it is and finds it behind; then it publishes without that
    // chunk alone.
    let reader = CacheReader::open(scratch.path());
    let (mut writer, recovery) = scratch.open();
    assert_eq!((recovery.chunks.len(), recovery.hashed_bytes), (20, 0));
    assert_eq!((recovery.dropped, writer.generation()), (vec![], 1));
    let report = walk(&writer, sealed.id);
    let lengths: u64 = sealed.chunks.iter().map(|(_, at)| at.length).sum();
    assert_eq!((report.bytes, &report.problem), (lengths, &None));
    let found: Vec<_> = report
        .bad_chunks
        .iter()
        .map(|(key, at, _)| (key.clone(), *at))
        .collect();
    assert_eq!(found, [(bad_key.clone(), bad)]);
    let mut whole = recovery.chunks;
    whole.remove(&bad_key);
    writer
        .publish(IndexContents {
            chunks: whole.into_iter().collect(),
            catalogs: Vec::new(),
        })
        .unwrap();
    let snapshot = reader.snapshot();
    assert_eq!(get(&snapshot, &bad_key).unwrap_err(), Miss::Absent);
    for key in keys.iter().filter(|key| **key != bad_key) {
        assert_eq!(*get(&snapshot, key).unwrap(), *content(key));
    }
}

/// Walks through a segment in small steps.
fn walk(writer: &CacheWriter, segment: SegmentId) -> crate::SegmentReport {
    let mut check = writer.check(segment).unwrap();
    let mut bytes = 0;
    while let Some(hashed) = check.step(1) {
        bytes += hashed;
    }
    let report = check.into_report();
    assert_eq!(report.bytes, bytes);
    report
}

/// A footer that cannot be read says so: then its segment is to be checked by the index.
#[test]
fn a_damaged_footer_does_not_hide_what_it_names() {
    let scratch = Scratch::new();
    let sealed = published(&scratch, &[key(1, 1), key(2, 1)]);
    let (_, last) = sealed.chunks[1];
    let footer = (last.offset + last.length).next_multiple_of(64);
    damage(&segment_path(&scratch, sealed.id), |bytes| {
        bytes[footer as usize + 40] ^= 1
    });
    let (writer, _) = scratch.open();
    let report = walk(&writer, sealed.id);
    assert!(report.bad_chunks.is_empty());
    assert_eq!(
        report.problem.as_deref(),
        Some("footer entry 0: check does not match")
    );
    assert!(writer.verify_segments(&[sealed.id]).is_clean());
    assert!(writer.check(SegmentId(77)).is_err());
}

/// Segments that no index names are hashed before they are adopted, and nothing else is.
#[test]
fn only_what_an_end_leaves_in_doubt_is_hashed_at_once() {
    let scratch = Scratch::new();
    let published = published(&scratch, &[key(1, 1)]);
    let (writer, recovery) = scratch.open();
    assert_eq!(recovery.left.map(|left| left.in_order), Some(false));
    let orphan = seal(&writer, &[key(2, 1), key(3, 1)]);
    drop(writer);
    for segment in [&published, &orphan] {
        let (_, bad) = segment.chunks[0];
        damage(&segment_path(&scratch, segment.id), |bytes| {
            bytes[bad.offset as usize] ^= 1
        });
    }
    let (writer, recovery) = scratch.open();
    let in_doubt: u64 = orphan.chunks.iter().map(|(_, at)| at.length).sum();
    assert_eq!(recovery.hashed_bytes, in_doubt);
    assert_eq!(recovery.dropped.len(), 1);
    assert_eq!(recovery.dropped[0].what, orphan.chunks[0].0.readable());
    let mut kept: Vec<_> = recovery.chunks.into_keys().collect();
    kept.sort();
    assert_eq!(kept, [key(1, 1), key(3, 1)]);

    // What a writer says at its end, the next one knows.
    let handover = crate::Handover {
        carried_out: 5,
        in_order: true,
        ..crate::Handover::default()
    };
    writer.hand_over(&handover).unwrap();
    drop(writer);
    let dir = CacheDir::open(scratch.path(), CacheDirOptions::default()).unwrap();
    let ownership = crate::Ownership::take(dir).unwrap();
    assert_eq!(ownership.left(), Some(handover));
    let index = scratch.path().join("index");
    std::fs::rename(&index, scratch.path().join("aside")).unwrap();
    assert_eq!(ownership.left().unwrap().carried_out, 0, "it is gone");
    std::fs::rename(scratch.path().join("aside"), &index).unwrap();
    drop(ownership);
    let (_, recovery) = scratch.open();
    assert_eq!(
        recovery.left,
        Some(handover),
        "nobody was at work meanwhile"
    );
}

/// The end of a machine may lose what a disk had not written yet: then all is hashed.
#[test]
fn on_a_disk_another_boot_puts_everything_in_doubt() {
    let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let options = CacheDirOptions {
        allow_non_tmpfs: true,
        ..CacheDirOptions::default()
    };
    let open = || CacheWriter::open(CacheDir::open(disk.path(), options).unwrap()).unwrap();
    let (mut writer, _) = open();
    if writer.dir().in_memory {
        return;
    }
    let sealed = seal(&writer, &[key(1, 1), key(2, 1)]);
    writer.publish(contents(&[&sealed])).unwrap();
    drop(writer);
    let (bad_key, bad) = sealed.chunks[0].clone();
    damage(
        &disk.path().join(Name::Segment(sealed.id).to_string()),
        |bytes| bytes[bad.offset as usize] = 0xFF,
    );
    let (writer, recovery) = open();
    assert_eq!((recovery.chunks.len(), recovery.hashed_bytes), (2, 0));
    drop(writer);
    // As a handover of another boot: without one nothing is known.
    std::fs::remove_file(disk.path().join("handover")).unwrap();
    let (writer, recovery) = open();
    assert!(recovery.hashed_bytes > 0 && !recovery.chunks.contains_key(&bad_key));
    assert_eq!((recovery.chunks.len(), writer.generation()), (1, 2));
}

#[test]
fn a_deleted_segment_is_a_miss_and_is_noticed() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let (one, two) = (seal(&writer, &[key(1, 1)]), seal(&writer, &[key(2, 1)]));
    writer.publish(contents(&[&one, &two])).unwrap();
    std::fs::remove_file(segment_path(&scratch, one.id)).unwrap();
    let snapshot = CacheReader::open(scratch.path()).snapshot();
    assert_eq!(get(&snapshot, &key(1, 1)).unwrap_err(), Miss::SegmentGone);
    assert_eq!(*get(&snapshot, &key(2, 1)).unwrap(), *content(&key(2, 1)));
    let report = writer.verify();
    assert_eq!(report.bad_chunks.len(), 1);
    assert!(
        report.bad_chunks[0].1.starts_with("cannot open segment "),
        "{report:?}"
    );
    assert!(writer.verify_segments(&[two.id]).is_clean());
    drop(writer);
    let (_, recovery) = scratch.open();
    assert_eq!(recovery.chunks.keys().collect::<Vec<_>>(), [&key(2, 1)]);
}

#[test]
fn a_broken_index_is_one_warning_and_then_misses() {
    let scratch = Scratch::new();
    let sealed = published(&scratch, &[key(1, 1)]);
    let index = scratch.path().join("index");
    type Change = fn(&mut Vec<u8>);
    let cases: [(&str, Change); 6] = [
        (
            "corrupt cache file DIR/index: file has 10 bytes, expected at least 192",
            |bytes| bytes.truncate(10),
        ),
        (
            "corrupt cache file DIR/index: file has 0 bytes, expected at least 192",
            Vec::clear,
        ),
        (
            "corrupt cache file DIR/index: check of the index header does not match",
            |bytes| bytes[130] = 1,
        ),
        (
            "DIR/index is not a cache file: found magic \"XTOAINDX\", expected \"STOAINDX\"",
            |bytes| bytes[0] = b'X',
        ),
        (
            "wrong endian in DIR/index: byte order mark is 0x0d0c0b0a, expected 0x0a0b0c0d; a cache directory cannot \
             be moved between machines, remove it",
            |bytes| bytes[12..16].copy_from_slice(&ENDIAN_MARK.to_be_bytes()),
        ),
        (
            "format 2.1 of DIR/index is unsupported: this version reads 1.x; upgrade this process or let its own \
             worker rebuild the cache",
            |bytes| bytes[8..10].copy_from_slice(&2u16.to_le_bytes()),
        ),
    ];
    let whole = std::fs::read(&index).unwrap();
    for (expected, change) in cases {
        damage(&index, |bytes| {
            bytes.clone_from(&whole);
            change(bytes);
        });
        let broken = std::fs::read(&index).unwrap();
        assert_eq!(
            scratch.text(Index::parse(&index, broken).unwrap_err()),
            expected
        );
        let warnings = Warnings::default();
        let reader = CacheReader::open(scratch.path());
        warnings.of(|| {
            for _ in 0..3 {
                assert_eq!(reader.snapshot().generation(), 0);
                assert_eq!(
                    get(&reader.snapshot(), &key(1, 1)).unwrap_err(),
                    Miss::Absent
                );
            }
        });
        assert_eq!(warnings.count(), 1, "{expected}");
    }
    // A minor version that is newer is read.
    damage(&index, |bytes| {
        bytes.clone_from(&whole);
        bytes[10] = 9;
        let check = IndexHeader::check_of(bytes, 0);
        bytes[184..192].copy_from_slice(&check.to_le_bytes());
    });
    assert_eq!(
        CacheReader::open(scratch.path()).snapshot().chunk_count(),
        1
    );

    // Without an index the worker finds the chunks by the segments' footers.
    damage(&index, Vec::clear);
    let reader = CacheReader::open(scratch.path());
    assert_eq!(reader.snapshot().generation(), 0);
    let (mut writer, recovery) = scratch.open();
    assert_eq!(
        (recovery.chunks.len(), &recovery.adopted[..]),
        (1, &[sealed.id][..])
    );
    assert_eq!(recovery.dropped[0].what, "index");
    writer
        .publish(IndexContents {
            chunks: recovery.chunks.into_iter().collect(),
            catalogs: Vec::new(),
        })
        .unwrap();
    assert_eq!(
        *get(&reader.snapshot(), &key(1, 1)).unwrap(),
        *content(&key(1, 1))
    );
}

#[test]
fn a_segment_of_another_kind_is_a_miss() {
    let scratch = Scratch::new();
    let sealed = published(&scratch, &[key(1, 1)]);
    let path = segment_path(&scratch, sealed.id);
    let whole = std::fs::read(&path).unwrap();
    let length = whole.len();
    type Change = fn(&mut Vec<u8>);
    let cases: [(String, Change); 6] = [
        ("DIR/SEG is not a cache file: found magic \"\\x00TOASEGM\", expected \"STOASEGM\"".into(), |bytes| bytes[0] = 0),
        (
            "wrong endian in DIR/SEG: byte order mark is 0x0d0c0b0a, expected 0x0a0b0c0d; a cache directory cannot be \
             moved between machines, remove it"
                .into(),
            |bytes| bytes[12..16].reverse(),
        ),
        (
            "format 3.1 of DIR/SEG is unsupported: this version reads 1.x; upgrade this process or let its own worker \
             rebuild the cache"
                .into(),
            |bytes| bytes[8] = 3,
        ),
        ("corrupt cache file DIR/SEG: check of the segment header does not match".into(), |bytes| bytes[33] ^= 1),
        (format!("corrupt cache file DIR/SEG: file has {} bytes, expected {length}", length - 1), |bytes| {
            bytes.pop();
        }),
        ("corrupt cache file DIR/SEG: file has 3 bytes, expected at least 64".into(), |bytes| bytes.truncate(3)),
    ];
    for (expected, change) in cases {
        damage(&path, |bytes| {
            bytes.clone_from(&whole);
            change(bytes);
        });
        let Miss::Corrupt(problem) =
            get(&CacheReader::open(scratch.path()).snapshot(), &key(1, 1)).unwrap_err()
        else {
            panic!("corrupt, not gone");
        };
        let problem = scratch
            .text(problem)
            .replace(&Name::Segment(sealed.id).to_string(), "SEG");
        assert_eq!(problem, expected);
    }
    // Another segment under its name.
    damage(&path, |bytes| bytes.clone_from(&whole));
    let other = SegmentId(sealed.id.0 + 1);
    std::fs::rename(&path, segment_path(&scratch, other)).unwrap();
    let (_, recovery) = scratch.open();
    assert!(recovery.dropped.iter().any(|dropped| {
        dropped
            .reason
            .ends_with(&format!("holds segment {}, expected {other}", sealed.id))
    }));
}

/// Entries that are intact but nonsense, as a faulty writer could make them.
#[test]
fn an_impossible_index_entry_is_a_miss() {
    let scratch = Scratch::new();
    let sealed = published(&scratch, &[key(1, 1)]);
    let (chunk_key, good) = sealed.chunks[0].clone();
    let data_end = 64 + good.length.next_multiple_of(64);
    let id = sealed.id;
    let elsewhere = SegmentId(3);
    let cases = [
        (
            ChunkLocation {
                offset: u64::MAX - 63,
                ..good
            },
            format!(
                "range of {} bytes at {} overflows",
                good.length,
                u64::MAX - 63
            ),
        ),
        (
            ChunkLocation {
                length: u64::MAX,
                ..good
            },
            format!("range of {} bytes at 64 overflows", u64::MAX),
        ),
        (
            ChunkLocation {
                offset: 100,
                ..good
            },
            "offset 100 is unaligned, expected a multiple of 64".to_string(),
        ),
        (
            ChunkLocation { offset: 0, ..good },
            "offset 0 lies in the segment's header, expected 64 or later".to_string(),
        ),
        (
            ChunkLocation {
                length: data_end,
                ..good
            },
            format!(
                "range 64..{} is past the data of segment {id}, which ends at {data_end}",
                64 + data_end
            ),
        ),
        (
            ChunkLocation {
                segment: elsewhere,
                ..good
            },
            format!("segment {elsewhere} is not in the index's segment table"),
        ),
    ];
    for (location, expected) in cases {
        let bytes = build(&IndexInput {
            generation: 5,
            next_segment: 9,
            chunks: &[(chunk_key.clone(), location)],
            ordinals: &[0],
            catalogs: &[(
                "t".to_string(),
                CatalogLocation {
                    segment: location.segment,
                    offset: location.offset,
                    length: location.length,
                    checksum: 0,
                },
            )],
            segments: &[IndexedSegment {
                id,
                file_bytes: sealed.bytes,
                live_bytes: 0,
            }],
        })
        .unwrap();
        damage(&scratch.path().join("index"), |index| *index = bytes);
        let snapshot = CacheReader::open(scratch.path()).snapshot();
        let miss = get(&snapshot, &chunk_key).unwrap_err();
        let Miss::Corrupt(problem) = &miss else {
            panic!("{miss}")
        };
        assert!(
            problem.contains("index entry") && problem.ends_with(&expected),
            "{problem}\nexpected {expected}"
        );
        assert!(!matches!(snapshot.catalog("t"), Ok(Some(_))));
        // The worker drops it too.
        let (writer, recovery) = scratch.open();
        assert!(recovery.catalogs.is_empty() && !recovery.dropped.is_empty());
        assert_eq!(writer.generation(), 6);
    }
}

#[test]
fn geometry_is_checked_before_arithmetic() {
    let bytes = build(&IndexInput {
        generation: 1,
        next_segment: 1,
        chunks: &[],
        ordinals: &[],
        catalogs: &[],
        segments: &[],
    })
    .unwrap();
    type Change = fn(&mut IndexHeader);
    let cases: [(&str, Change); 8] = [
        (
            "chunk table: 4294967295 rows of 64 bytes at 18446744073709551552 overflow",
            |header| {
                header.chunk_slots_offset = u64::MAX - 63;
                header.chunk_slots = u32::MAX;
            },
        ),
        (
            "file table ends at 224, expected 192 or earlier",
            |header| header.file_slots = 1,
        ),
        (
            "catalog table begins at 193, expected a multiple of 64",
            |header| header.catalogs_offset = 193,
        ),
        (
            "segment table begins at 64, expected 192 or later",
            |header| header.segments_offset = 64,
        ),
        ("tag table ends at 256, expected 192 or earlier", |header| {
            header.tags_offset = 256
        }),
        (
            "tag table begins at 200, expected a multiple of 64",
            |header| header.tags_offset = 200,
        ),
        ("3 chunks in 0 slots", |header| header.chunks = 3),
        ("file has 192 bytes, expected 4096", |header| {
            header.file_bytes = 4096
        }),
    ];
    let path = Path::new("index");
    assert!(Index::parse(path, &bytes[..]).is_ok());
    for (expected, change) in cases {
        let mut header = IndexHeader::read(&bytes);
        change(&mut header);
        let error = Index::parse(path, &header.to_bytes(0)[..]).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("corrupt cache file index: {expected}")
        );
    }
}

/// Every bit of a small index, in memory: a lookup gives what it gave, or a miss.
#[test]
fn every_flipped_bit_of_an_index_is_a_miss_or_nothing() {
    let location = |object: u32| ChunkLocation {
        segment: SegmentId(4),
        offset: 64 + u64::from(object) * 128,
        length: 100,
        form: 1,
        checksum: u64::from(object) << 40,
        rows: object,
    };
    let chunks: Vec<(ChunkKey, ChunkLocation)> = (0..9)
        .map(|object| (key(object, 1), location(object)))
        .collect();
    let catalogs: Vec<(String, CatalogLocation)> = ["a", "b"]
        .map(|name| {
            let place = CatalogLocation {
                segment: SegmentId(4),
                offset: 6400,
                length: 7,
                checksum: 3,
            };
            (name.to_string(), place)
        })
        .to_vec();
    let whole = build(&IndexInput {
        generation: 1,
        next_segment: 5,
        chunks: &chunks,
        ordinals: &(0..9).collect::<Vec<_>>(),
        catalogs: &catalogs,
        segments: &[IndexedSegment {
            id: SegmentId(4),
            file_bytes: 1 << 16,
            live_bytes: 1,
        }],
    })
    .unwrap();
    let path = Path::new("index");
    let header = IndexHeader::read(&whole);
    let tags = header.tags_offset as usize..header.catalogs_offset as usize;
    let (mut misses, mut tag_bits) = (0, 0);
    for bit in 0..whole.len() * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let Ok(index) = Index::parse(path, &bytes[..]) else {
            continue;
        };
        let mut intact = 0;
        for (key, location) in &chunks {
            match index
                .file(&key.file)
                .map(|file| index.lookup(&want(file, key.row_group, key.column)))
            {
                Some(Ok(entry)) => {
                    assert_eq!(entry.location(), *location, "bit {bit}");
                    intact += 1;
                }
                _ => misses += 1,
            }
        }
        if tags.contains(&(bit / 8)) {
            assert_eq!(intact, chunks.len(), "bit {bit}: a tag is only a hint");
            tag_bits += 1;
        }
        let wanted: Vec<Wanted> = chunks
            .iter()
            .filter_map(|(key, _)| {
                let file = index.file(&key.file)?;
                Some(want(file, key.row_group, key.column))
            })
            .collect();
        let mut together = vec![];
        index.slots(&wanted, |_, slot| together.push(slot));
        let single: Vec<_> = wanted.iter().map(|wanted| index.slot(wanted)).collect();
        assert_eq!(together, single, "bit {bit}");
        for (file, entry) in index.chunks() {
            let key = ChunkKey {
                file: file.into(),
                row_group: entry.row_group(),
                column: entry.column(),
            };
            assert!(chunks.contains(&(key, entry.location())), "bit {bit}");
        }
        for (name, location) in index.catalogs().flatten() {
            assert!(
                catalogs.contains(&(name.to_string(), location)),
                "bit {bit}"
            );
        }
        assert!(
            index
                .segments()
                .all(|segment| segment.id == SegmentId(4) && segment.file_bytes == 1 << 16)
        );
    }
    assert!(misses > 0 && tag_bits > 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// The same slots with the tags and without them, as in format 1.0, in tables of every size.
    #[test]
    fn tags_lead_where_probing_does(names in prop::collection::btree_set((0..6u8, 0..8u32, 0..12u32), 0..300)) {
        let chunks: Vec<(ChunkKey, ChunkLocation)> = names
            .iter()
            .map(|(file, row_group, column)| {
                let key = ChunkKey { file: Arc::from([*file]), row_group: *row_group, column: *column };
                let location = ChunkLocation {
                    segment: SegmentId(4),
                    offset: 64,
                    length: u64::from(*file),
                    form: 1,
                    checksum: 0,
                    rows: row_group * 100 + column,
                };
                (key, location)
            })
            .collect();
        let bytes = build(&IndexInput {
            generation: 1,
            next_segment: 5,
            chunks: &chunks,
            ordinals: &vec![0; chunks.len()],
            catalogs: &[],
            segments: &[],
        })
        .unwrap();
        let mut plain = bytes.clone();
        let header = IndexHeader { tags_offset: 0, ..IndexHeader::read(&bytes) };
        plain[..IndexHeader::BYTES].copy_from_slice(&header.to_bytes(0));
        let path = Path::new("index");
        let (index, plain) = (Index::parse(path, &bytes[..]).unwrap(), Index::parse(path, &plain[..]).unwrap());
        let tags = IndexHeader::read(&bytes).tags_offset as usize;
        let (mut likely, mut all) = (0, vec![]);
        for (key, location) in &chunks {
            let file = index.file(&key.file).unwrap();
            let wanted = want(file, key.row_group, key.column);
            let slot = index.slot(&wanted).unwrap();
            prop_assert_eq!(Some(slot), plain.slot(&wanted));
            prop_assert_eq!(index.lookup(&wanted).unwrap().location(), *location);
            // The hint is a slot with its tag, and nearly always the right one, unless the probe is
            // longer than tags are read.
            let hint = index.likely(wanted.hash()).unwrap();
            let first = first_slot(wanted.hash(), header.chunk_slots);
            let distance = (slot + header.chunk_slots - first) % header.chunk_slots;
            let is_far = distance as usize >= TAG_READS_MAX * TAGS_TOGETHER;
            if !(is_far && hint == first) {
                prop_assert_eq!(bytes[tags + hint as usize], bytes[tags + slot as usize]);
            }
            likely += usize::from(hint == slot || is_far);
            // A row group and a column that no chunk has.
            let absent = [want(file, key.row_group + 8, key.column), want(file, key.row_group, key.column + 12)];
            for absent in absent {
                prop_assert_eq!((index.slot(&absent), plain.slot(&absent)), (None, None));
            }
            all.extend([wanted, absent[0], absent[1]]);
        }
        // Of 255 tags two may be alike.
        prop_assert!(likely + 2 + chunks.len() / 20 >= chunks.len(), "{likely} of {} hints are right", chunks.len());
        let mut together = vec![];
        index.slots(&all, |wanted, slot| together.push(slot == index.slot(wanted)));
        prop_assert_eq!(together, vec![true; all.len()]);
    }
}

/// What kept a reader from the cache and is over is found out without a new generation.
#[test]
fn readers_try_again_what_may_pass() {
    let scratch = Scratch::new();
    published(&scratch, &[key(1, 1)]);
    let mode =
        |mode| std::fs::set_permissions(scratch.path(), Permissions::from_mode(mode)).unwrap();
    mode(0o777);
    let reader = |retry| {
        let options = ReaderOptions {
            retry,
            ..ReaderOptions::default()
        };
        CacheReader::open_with(scratch.path(), options)
    };
    let chunks = |reader: &CacheReader| reader.snapshot().chunk_count();
    let (at_once, late) = (reader(Duration::ZERO), reader(Duration::from_secs(3600)));
    assert!(chunks(&at_once) == 0 && chunks(&late) == 0);
    mode(0o700);
    assert_eq!(chunks(&late), 0);
    assert_eq!(chunks(&at_once), 1);
}

/// A directory that anybody else may write to is not trusted by readers either.
#[test]
fn readers_refuse_an_open_directory() {
    let scratch = Scratch::new();
    published(&scratch, &[key(1, 1)]);
    std::fs::set_permissions(scratch.path(), Permissions::from_mode(0o777)).unwrap();
    let warnings = Warnings::default();
    let reader = CacheReader::open(scratch.path());
    warnings.of(|| {
        assert_eq!(reader.snapshot().generation(), 0);
        assert_eq!(reader.snapshot().generation(), 0);
    });
    assert_eq!(warnings.count(), 1);
    std::fs::set_permissions(scratch.path(), Permissions::from_mode(0o700)).unwrap();
    assert_eq!(CacheReader::open(scratch.path()).snapshot().generation(), 1);
}

#[derive(Clone, Debug)]
enum Accident {
    Flip {
        file: prop::sample::Index,
        bit: prop::sample::Index,
    },
    Truncate {
        file: prop::sample::Index,
        to: prop::sample::Index,
    },
    Fill {
        file: prop::sample::Index,
        from: prop::sample::Index,
        value: u8,
    },
    Delete {
        file: prop::sample::Index,
    },
}

fn accident() -> impl Strategy<Value = Accident> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        6 => (index(), index()).prop_map(|(file, bit)| Accident::Flip { file, bit }),
        2 => (index(), index()).prop_map(|(file, to)| Accident::Truncate { file, to }),
        2 => (index(), index(), any::<u8>()).prop_map(|(file, from, value)| Accident::Fill { file, from, value }),
        1 => index().prop_map(|file| Accident::Delete { file }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// Whatever happens to the files: no panic, no wrong byte, and a worker that goes on.
    #[test]
    fn accidents_never_yield_wrong_bytes(accidents in prop::collection::vec(accident(), 1..4)) {
        let scratch = Scratch::new();
        let keys: Vec<ChunkKey> = (0..12).map(|object| key(object, 1)).collect();
        {
            let mut writer = scratch.writer();
            let first = seal(&writer, &keys[..6]);
            let mut segment = writer.new_segment(1 << 16).unwrap();
            for key in &keys[6..] {
                segment.append(key, 1, 0, &content(key)).unwrap();
            }
            segment.append_catalog("t", &[9; 300]).unwrap();
            let second = segment.seal().unwrap();
            writer.publish(contents(&[&first, &second])).unwrap();
        }
        for accident in accidents {
            let names: Vec<Name> = scratch.names();
            let pick = |file: &prop::sample::Index| scratch.path().join(names[file.index(names.len())].to_string());
            match accident {
                Accident::Flip { file, bit } => damage(&pick(&file), |bytes| {
                    if !bytes.is_empty() {
                        let bit = bit.index(bytes.len() * 8);
                        bytes[bit / 8] ^= 1 << (bit % 8);
                    }
                }),
                Accident::Truncate { file, to } => damage(&pick(&file), |bytes| bytes.truncate(to.index(bytes.len() + 1))),
                Accident::Fill { file, from, value } => damage(&pick(&file), |bytes| {
                    let from = from.index(bytes.len() + 1);
                    let to = (from + 100).min(bytes.len());
                    bytes[from..to].fill(value);
                }),
                Accident::Delete { file } => std::fs::remove_file(pick(&file)).unwrap(),
            }
            if scratch.names().is_empty() {
                break;
            }
        }
        let options = ReaderOptions { verify: Verify::FirstTouch, ..ReaderOptions::default() };
        let snapshot = CacheReader::open_with(scratch.path(), options).snapshot();
        for key in &keys {
            if let Ok(chunk) = get(&snapshot, key) {
                prop_assert_eq!(&*chunk, &*content(key));
            }
        }
        for (file, entry) in snapshot.iter() {
            let key = ChunkKey { file: file.into(), row_group: entry.row_group(), column: entry.column() };
            prop_assert!(keys.contains(&key));
        }
        if let Ok(Some(catalog)) = snapshot.catalog("t") {
            prop_assert_eq!(&*catalog, &[9; 300][..]);
        }
        snapshot.verify();

        // Bytes that rot in memory are not what a restart looks for: the walk behind finds them, part
        // by part where footers are whole, else by the index.
        let (mut writer, mut recovery) = scratch.open();
        for segment in writer.live_segments() {
            let by_index = writer.verify_segments(&[segment]);
            for (key, _) in &by_index.bad_chunks {
                recovery.chunks.remove(key);
            }
            recovery.catalogs.retain(|(name, _)| by_index.bad_catalogs.iter().all(|(bad, _)| bad != name));
            let Ok(mut check) = writer.check(segment) else {
                prop_assert!(!by_index.is_clean());
                continue;
            };
            while check.step(1000).is_some() {}
            let report = check.into_report();
            if report.problem.is_none() {
                let keys = |bad: &[(ChunkKey, ChunkLocation, String)]| {
                    bad.iter().map(|(key, ..)| key.clone()).collect::<std::collections::BTreeSet<_>>()
                };
                let bad = keys(&report.bad_chunks);
                prop_assert!(by_index.bad_chunks.iter().all(|(key, _)| bad.contains(key)));
            }
        }
        let reader = CacheReader::open(scratch.path());
        for round in 0..2 {
            // All that is left, published anew and read without hashing.
            let chunks = recovery.chunks.clone().into_iter().collect();
            writer.publish(IndexContents { chunks, catalogs: recovery.catalogs.clone() }).unwrap();
            writer.reclaim().unwrap();
            let snapshot = reader.snapshot();
            for key in &keys {
                if let Ok(chunk) = get(&snapshot, key) {
                    prop_assert_eq!(&*chunk, &*content(key), "round {}", round);
                }
            }
        }
        prop_assert_eq!(reader.snapshot().chunk_count(), recovery.chunks.len() as u64);
        prop_assert!(writer.verify().is_clean());
    }
}
