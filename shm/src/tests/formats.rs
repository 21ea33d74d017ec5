//! Every released format stays readable, and the writer's bytes do not drift.

use super::*;
use crate::format::IndexHeader;
use crate::index::IndexedSegment;
use crate::index_build::{IndexInput, build};
use crate::segment::Footer;

/// The files of one small cache, written by the code of today.
fn files_of_today() -> Vec<(String, Vec<u8>)> {
    let id = SegmentId(0x20);
    let mut data = vec![0; 64];
    let mut footer = Footer::default();
    let mut chunks = Vec::new();
    for object in 0..3 {
        let key = key(object, 1);
        let bytes = content(&key);
        let location = ChunkLocation {
            segment: id,
            offset: data.len() as u64,
            length: bytes.len() as u64,
            form: 1 + object as u8,
            checksum: crate::format::hash(&bytes),
            rows: 100 + object,
        };
        data.extend_from_slice(&bytes);
        data.resize(data.len().next_multiple_of(64), 0);
        footer.push_chunk(&key, &location);
        chunks.push((key, location));
    }
    let catalog = b"a catalog";
    let location = CatalogLocation {
        segment: id,
        offset: data.len() as u64,
        length: catalog.len() as u64,
        checksum: crate::format::hash(catalog),
    };
    data.extend_from_slice(catalog);
    data.resize(data.len().next_multiple_of(64), 0);
    footer.push_catalog("tpch.lineitem", &location);
    let live_bytes = data.len() as u64 - 64;
    let (footer, header) = footer.finish(id, data.len() as u64);
    data[..64].copy_from_slice(&header);
    data.extend_from_slice(&footer);
    let index = build(&IndexInput {
        generation: 7,
        next_segment: 0x21,
        chunks: &chunks,
        ordinals: &[2, 0, 1],
        catalogs: &[("tpch.lineitem".to_string(), location)],
        segments: &[IndexedSegment {
            id,
            file_bytes: data.len() as u64,
            live_bytes,
        }],
    })
    .unwrap();
    vec![
        ("index".to_string(), index),
        (Name::Segment(id).to_string(), data),
    ]
}

/// Where the files of a released format lie.
fn released(format: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("testdata/format-{format}"))
}

/// The format of today. `STOA_WRITE_GOLDEN=1` writes the files anew, which only a new format may
/// need, into a directory of its own.
#[test]
fn format_1_1_is_read_and_written_byte_by_byte() {
    let golden = released("1.1");
    if std::env::var_os("STOA_WRITE_GOLDEN").is_some() {
        std::fs::create_dir_all(&golden).unwrap();
        for (name, bytes) in files_of_today() {
            std::fs::write(golden.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in files_of_today() {
        let released = std::fs::read(golden.join(&name)).unwrap();
        assert!(
            released == bytes,
            "{name} is written otherwise than format 1.1 was"
        );
    }
    is_read(&golden);
}

/// Format 1.0, whose index has no tags.
#[test]
fn format_1_0_is_read() {
    let golden = released("1.0");
    let index = std::fs::read(golden.join("index")).unwrap();
    assert_eq!(IndexHeader::read(&index).tags_offset, 0);
    is_read(&golden);
}

/// Reads the files of a released format, as a reader and as a writer that takes them over.
fn is_read(golden: &Path) {
    let scratch = Scratch::new();
    for (name, _) in files_of_today() {
        std::fs::copy(golden.join(&name), scratch.path().join(name)).unwrap();
    }
    let options = ReaderOptions {
        verify: Verify::FirstTouch,
        ..ReaderOptions::default()
    };
    let snapshot = CacheReader::open_with(scratch.path(), options).snapshot();
    assert_eq!((snapshot.generation(), snapshot.chunk_count()), (7, 3));
    for object in 0..3 {
        let key = key(object, 1);
        let entry = snapshot
            .lookup(snapshot.file(&key.file).unwrap(), key.row_group, key.column)
            .unwrap();
        assert_eq!(
            (entry.form(), entry.rows()),
            (1 + object as u8, 100 + object)
        );
        assert_eq!(*snapshot.open_chunk(&entry).unwrap(), *content(&key));
    }
    assert_eq!(
        &*snapshot.catalog("tpch.lineitem").unwrap().unwrap(),
        b"a catalog"
    );
    let (writer, recovery) = scratch.open();
    assert_eq!(
        (
            writer.generation(),
            recovery.chunks.len(),
            recovery.catalogs.len()
        ),
        (7, 3, 1)
    );
    assert!(recovery.dropped.is_empty());
}
