//! The bytes of an index, by a pure function.

use std::collections::{HashMap, HashSet};

use crate::error::{Error, Result};
use crate::format::{
    CatalogRow, ChunkSlot, ENDIAN_MARK, FORMAT_MAJOR, FORMAT_MINOR, FileSlot, INDEX_MAGIC,
    IndexHeader, SLOT_USED, SegmentRow, hash,
};
use crate::index::{FileId, IndexedSegment, chunk_hash, probe, slot_tag, tags_for};
use crate::types::{
    CATALOG_NAME_BYTES_MAX, CHUNK_ALIGN, CatalogLocation, ChunkKey, ChunkLocation,
    FILE_KEY_BYTES_MAX,
};

/// Most chunks, files and catalogs of one index: what 32-bit slot numbers hold with room to spare.
pub(crate) const ROWS_MAX: usize = 1 << 30;

/// What an index is built from.
pub(crate) struct IndexInput<'a> {
    pub(crate) generation: u64,
    pub(crate) next_segment: u64,
    pub(crate) chunks: &'a [(ChunkKey, ChunkLocation)],
    /// Slot of the access counters of each chunk.
    pub(crate) ordinals: &'a [u32],
    pub(crate) catalogs: &'a [(String, CatalogLocation)],
    pub(crate) segments: &'a [IndexedSegment],
}

/// Slots for `rows` rows: five of eight are used.
pub(crate) fn slots_for(rows: usize) -> u32 {
    if rows == 0 {
        0
    } else {
        (rows as u64 * 8 / 5 + 2) as u32
    }
}

pub(crate) fn check_count(what: &'static str, found: usize) -> Result<()> {
    if found > ROWS_MAX {
        Err(Error::TooMany {
            what,
            found,
            largest: ROWS_MAX,
        })
    } else {
        Ok(())
    }
}

/// Appends interned bytes and returns where they begin.
pub(crate) fn intern(strings: &mut Vec<u8>, base: u64, bytes: &[u8]) -> u64 {
    let at = base + strings.len() as u64;
    strings.extend_from_slice(bytes);
    at
}

/// The bytes of an index file.
pub(crate) fn build(input: &IndexInput<'_>) -> Result<Vec<u8>> {
    debug_assert_eq!(input.chunks.len(), input.ordinals.len());
    check_count("chunks", input.chunks.len())?;
    check_count("catalogs", input.catalogs.len())?;
    let mut files: Vec<&[u8]> = Vec::new();
    let mut file_numbers: HashMap<&[u8], u32> = HashMap::new();
    let mut chunk_files = Vec::with_capacity(input.chunks.len());
    for (key, _) in input.chunks {
        check_key_length("file key", key.file.len(), FILE_KEY_BYTES_MAX)?;
        let number = *file_numbers.entry(&key.file).or_insert_with(|| {
            files.push(&key.file);
            files.len() as u32 - 1
        });
        chunk_files.push(number);
    }

    let file_slots = slots_for(files.len());
    let chunk_slots = slots_for(input.chunks.len());
    let mut cursor = IndexHeader::BYTES as u64;
    let mut section = |rows: u64, row_bytes: usize| {
        let at = cursor;
        cursor = (cursor + rows * row_bytes as u64).next_multiple_of(CHUNK_ALIGN);
        at
    };
    let file_slots_offset = section(u64::from(file_slots), FileSlot::BYTES);
    let chunk_slots_offset = section(u64::from(chunk_slots), ChunkSlot::BYTES);
    let tags_offset = section(tags_for(chunk_slots), 1);
    let catalogs_offset = section(input.catalogs.len() as u64, CatalogRow::BYTES);
    let segments_offset = section(input.segments.len() as u64, SegmentRow::BYTES);
    let strings_offset = section(0, 1);

    let mut bytes = vec![0; strings_offset as usize];
    let mut strings = Vec::new();

    let mut file_places = Vec::with_capacity(files.len());
    let mut file_probe_max = 0;
    for key in &files {
        let key_hash = hash(key);
        let row = FileSlot {
            key_offset: intern(&mut strings, strings_offset, key),
            key_hash,
            key_bytes: key.len() as u32,
            state: SLOT_USED,
            ..FileSlot::default()
        };
        let slot = place(
            &mut bytes[file_slots_offset as usize..],
            FileSlot::BYTES,
            file_slots,
            key_hash,
            &row.to_bytes(0),
            &mut file_probe_max,
        );
        file_places.push(FileId { slot, key_hash });
    }

    let mut seen = HashSet::with_capacity(input.chunks.len());
    let mut chunk_probe_max = 0;
    for (at, (key, location)) in input.chunks.iter().enumerate() {
        let file = file_places[chunk_files[at] as usize];
        if !seen.insert((file.slot, key.row_group, key.column)) {
            return Err(Error::Duplicate {
                what: key.readable(),
            });
        }
        let row = ChunkSlot {
            file: file.slot,
            row_group: key.row_group,
            column: key.column,
            rows: location.rows,
            segment: location.segment.0,
            offset: location.offset,
            length: location.length,
            checksum: location.checksum,
            ordinal: input.ordinals[at],
            form: location.form,
            state: SLOT_USED,
            ..ChunkSlot::default()
        };
        let hash = chunk_hash(file.key_hash, key.row_group, key.column);
        let slot = place(
            &mut bytes[chunk_slots_offset as usize..],
            ChunkSlot::BYTES,
            chunk_slots,
            hash,
            &row.to_bytes(file.key_hash),
            &mut chunk_probe_max,
        );
        bytes[tags_offset as usize + slot as usize] = slot_tag(hash);
    }
    // The first ones again, so that eight can be read from the last slot too.
    let tags = &mut bytes[tags_offset as usize..][..tags_for(chunk_slots) as usize];
    for at in chunk_slots as usize..tags.len() {
        tags[at] = tags[at - chunk_slots as usize];
    }

    let mut catalogs: Vec<&(String, CatalogLocation)> = input.catalogs.iter().collect();
    catalogs.sort_by(|a, b| a.0.cmp(&b.0));
    for (at, (name, location)) in catalogs.iter().enumerate() {
        check_key_length("catalog name", name.len(), CATALOG_NAME_BYTES_MAX)?;
        if at > 0 && catalogs[at - 1].0 == *name {
            return Err(Error::Duplicate {
                what: format!("catalog {name:?}"),
            });
        }
        let row = CatalogRow {
            name_offset: intern(&mut strings, strings_offset, name.as_bytes()),
            name_bytes: name.len() as u32,
            segment: location.segment.0,
            offset: location.offset,
            length: location.length,
            checksum: location.checksum,
            ..CatalogRow::default()
        };
        put_row(
            &mut bytes,
            catalogs_offset,
            at,
            &row.to_bytes(hash(name.as_bytes())),
        );
    }

    debug_assert!(input.segments.is_sorted_by_key(|segment| segment.id));
    for (at, segment) in input.segments.iter().enumerate() {
        let row = SegmentRow {
            segment: segment.id.0,
            file_bytes: segment.file_bytes,
            live_bytes: segment.live_bytes,
            ..SegmentRow::default()
        };
        put_row(&mut bytes, segments_offset, at, &row.to_bytes(0));
    }

    let strings_bytes = strings.len() as u64;
    bytes.append(&mut strings);
    bytes.resize(bytes.len().next_multiple_of(CHUNK_ALIGN as usize), 0);
    let header = IndexHeader {
        magic: INDEX_MAGIC,
        format_major: FORMAT_MAJOR,
        format_minor: FORMAT_MINOR,
        endian_mark: ENDIAN_MARK,
        generation: input.generation,
        file_bytes: bytes.len() as u64,
        next_segment: input.next_segment,
        file_slots_offset,
        file_slots,
        files: files.len() as u32,
        chunk_slots_offset,
        chunk_slots,
        chunks: input.chunks.len() as u32,
        catalogs_offset,
        catalogs: input.catalogs.len() as u32,
        chunk_probe_max,
        segments_offset,
        segments: input.segments.len() as u32,
        file_probe_max,
        strings_offset,
        strings_bytes,
        tags_offset,
        ..IndexHeader::default()
    };
    bytes[..IndexHeader::BYTES].copy_from_slice(&header.to_bytes(0));
    Ok(bytes)
}

pub(crate) fn check_key_length(what: &'static str, found: usize, largest: usize) -> Result<()> {
    if found == 0 || found > largest {
        Err(Error::KeyLength {
            what,
            found,
            largest,
        })
    } else {
        Ok(())
    }
}

pub(crate) fn put_row(bytes: &mut [u8], section: u64, at: usize, row: &[u8]) {
    let start = section as usize + at * row.len();
    bytes[start..start + row.len()].copy_from_slice(row);
}

/// Puts a row into the first empty slot from its hash on, and returns the slot.
pub(crate) fn place(
    table: &mut [u8],
    row_bytes: usize,
    slots: u32,
    hash: u64,
    row: &[u8],
    probe_max: &mut u32,
) -> u32 {
    for (before, slot) in probe(hash, slots, slots).enumerate() {
        let at = slot as usize * row_bytes;
        let place = &mut table[at..at + row_bytes];
        if place.iter().all(|&byte| byte == 0) {
            place.copy_from_slice(row);
            *probe_max = (*probe_max).max(before as u32 + 1);
            return slot;
        }
    }
    unreachable!("a table has more slots than rows")
}
