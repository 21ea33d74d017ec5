//! A view of the bytes of an index that trusts nothing.
//!
//! [`Index::parse`] checks header and geometry, at a cost that does not grow with the number of
//! chunks; every slot is checked when it is used.

use std::path::Path;

use crate::error::{Error, Result};
use crate::format::{
    CatalogRow, ChunkSlot, FileSlot, INDEX_MAGIC, IndexHeader, SLOT_USED, SegmentHeader,
    SegmentRow, aligned, check_preamble, check_section, hash,
};
use crate::map::prefetch;
use crate::types::{CHUNK_ALIGN, CatalogLocation, ChunkLocation, Miss, SegmentId};

/// A file of the snapshot that returned it; means nothing to another snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    pub(crate) slot: u32,
    pub(crate) key_hash: u64,
}

/// Which chunk is looked up among many: one of a file that the same snapshot returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wanted {
    /// The file.
    pub file: FileId,
    /// Row group ordinal.
    pub row_group: u32,
    /// Leaf column ordinal of the first leaf.
    pub column: u32,
}

/// How many lookups have their cache lines on the way at the same time: more than a core can wait
/// for at once.
const LOOKUPS_TOGETHER: usize = 32;

/// A chunk's entry, read from the index and checked: the bytes of the entry are intact, its range
/// is aligned and does not overflow. Whether the range lies inside the segment is checked when the
/// chunk is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    file: FileId,
    row_group: u32,
    column: u32,
    ordinal: u32,
    location: ChunkLocation,
}

impl Entry {
    /// The file, in the snapshot that returned the entry.
    pub fn file(&self) -> FileId {
        self.file
    }
    /// Row group ordinal.
    pub fn row_group(&self) -> u32 {
        self.row_group
    }
    /// Leaf column ordinal.
    pub fn column(&self) -> u32 {
        self.column
    }
    /// Where the bytes lie.
    pub fn location(&self) -> ChunkLocation {
        self.location
    }
    /// How the bytes are encoded.
    pub fn form(&self) -> u8 {
        self.location.form
    }
    /// Rows in the chunk.
    pub fn rows(&self) -> u32 {
        self.location.rows
    }
    /// Length in bytes.
    pub fn length(&self) -> u64 {
        self.location.length
    }
    /// Slot of the access counters; a chunk keeps it as long as it stays published.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }
    /// Hash of the key: tells whose counts a slot of the access counters holds.
    pub(crate) fn tag(&self) -> u64 {
        chunk_hash(self.file.key_hash, self.row_group, self.column)
    }
}

impl Wanted {
    /// Where its probe begins among `slots`, which is not 0.
    #[inline]
    fn first_slot(&self, slots: u32) -> u32 {
        let hash = chunk_hash(self.file.key_hash, self.row_group, self.column);
        first_slot(hash, slots)
    }
}

/// A segment that an index names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IndexedSegment {
    pub(crate) id: SegmentId,
    /// Size of its file.
    pub(crate) file_bytes: u64,
    /// Sum of the aligned lengths of what the index names in it.
    pub(crate) live_bytes: u64,
}

/// Where a chunk's probing begins, before scaling to the number of slots: the folded 128-bit
/// product of what identifies it.
pub(crate) fn chunk_hash(file_key_hash: u64, row_group: u32, column: u32) -> u64 {
    let place = u64::from(row_group) << 32 | u64::from(column);
    let product = u128::from(file_key_hash ^ 0x9E37_79B9_7F4A_7C15)
        * u128::from(place ^ 0xD1B5_4A32_D192_ED03);
    product as u64 ^ (product >> 64) as u64
}

/// Scales a hash to a slot number.
pub(crate) fn first_slot(hash: u64, slots: u32) -> u32 {
    ((u128::from(hash) * u128::from(slots)) >> 64) as u32
}

/// A view of an index file whose header and geometry were checked.
#[derive(Debug)]
pub(crate) struct Index<B> {
    bytes: B,
    header: IndexHeader,
}

impl<B: AsRef<[u8]>> Index<B> {
    /// Checks header and geometry of the bytes of `path`.
    pub(crate) fn parse(path: &Path, bytes: B) -> Result<Self> {
        let all = bytes.as_ref();
        check_preamble(path, all, INDEX_MAGIC, IndexHeader::BYTES)?;
        let header = IndexHeader::read_checked(all, 0)
            .ok_or_else(|| Error::corrupt(path, "check of the index header does not match"))?;
        if header.file_bytes != all.len() as u64 {
            return Err(Error::corrupt(
                path,
                format!(
                    "file has {} bytes, expected {}",
                    all.len(),
                    header.file_bytes
                ),
            ));
        }
        let from = IndexHeader::BYTES as u64;
        let sections = [
            (
                "file table",
                header.file_slots_offset,
                u64::from(header.file_slots),
                FileSlot::BYTES,
            ),
            (
                "chunk table",
                header.chunk_slots_offset,
                u64::from(header.chunk_slots),
                ChunkSlot::BYTES,
            ),
            (
                "catalog table",
                header.catalogs_offset,
                u64::from(header.catalogs),
                CatalogRow::BYTES,
            ),
            (
                "segment table",
                header.segments_offset,
                u64::from(header.segments),
                SegmentRow::BYTES,
            ),
            (
                "string area",
                header.strings_offset,
                header.strings_bytes,
                1,
            ),
        ];
        for (what, offset, rows, row_bytes) in sections {
            check_section(
                what,
                offset,
                rows,
                row_bytes as u64,
                from,
                header.file_bytes,
            )
            .map_err(|problem| Error::corrupt(path, problem))?;
        }
        for (what, rows, slots) in [
            ("files", header.files, header.file_slots),
            ("chunks", header.chunks, header.chunk_slots),
        ] {
            if rows > slots {
                return Err(Error::corrupt(
                    path,
                    format!("{rows} {what} in {slots} slots"),
                ));
            }
        }
        Ok(Index { bytes, header })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    pub(crate) fn generation(&self) -> u64 {
        self.header.generation
    }

    pub(crate) fn next_segment(&self) -> u64 {
        self.header.next_segment
    }

    pub(crate) fn chunk_count(&self) -> u64 {
        u64::from(self.header.chunks)
    }

    pub(crate) fn chunk_slots(&self) -> u32 {
        self.header.chunk_slots
    }

    /// Rows of the segment table, intact or not.
    pub(crate) fn segment_count(&self) -> u64 {
        u64::from(self.header.segments)
    }

    /// Row `at` of the section at `offset`; inside of the file because the geometry was checked.
    #[inline]
    fn row(&self, offset: u64, at: u32, row_bytes: usize) -> &[u8] {
        let start = offset as usize + at as usize * row_bytes;
        &self.bytes()[start..start + row_bytes]
    }

    /// Interned bytes, if they lie in the string area.
    fn string(&self, offset: u64, length: u32) -> Option<&[u8]> {
        let end = offset.checked_add(u64::from(length))?;
        let area =
            self.header.strings_offset..self.header.strings_offset + self.header.strings_bytes;
        (offset >= area.start && end <= area.end)
            .then(|| &self.bytes()[offset as usize..end as usize])
    }

    /// The file with exactly this key.
    pub(crate) fn file(&self, key: &[u8]) -> Option<FileId> {
        let slots = self.header.file_slots;
        if slots == 0 {
            return None;
        }
        let key_hash = hash(key);
        let mut slot = first_slot(key_hash, slots);
        for _ in 0..self.header.file_probe_max.min(slots) {
            let row = self.row(self.header.file_slots_offset, slot, FileSlot::BYTES);
            let found = FileSlot::read(row);
            if found.state == 0 {
                return None;
            }
            if found.key_hash == key_hash
                && FileSlot::read_checked(row, 0).is_some()
                && self.string(found.key_offset, found.key_bytes) == Some(key)
            {
                return Some(FileId { slot, key_hash });
            }
            slot = if slot + 1 == slots { 0 } else { slot + 1 };
        }
        None
    }

    /// The checked key and id of the file in `slot`.
    fn file_in(&self, slot: u32) -> Option<(&[u8], FileId)> {
        if slot >= self.header.file_slots {
            return None;
        }
        let row = self.row(self.header.file_slots_offset, slot, FileSlot::BYTES);
        let found = FileSlot::read_checked(row, 0).filter(|found| found.state == SLOT_USED)?;
        let key = self.string(found.key_offset, found.key_bytes)?;
        (hash(key) == found.key_hash).then_some((
            key,
            FileId {
                slot,
                key_hash: found.key_hash,
            },
        ))
    }

    /// The entry of a chunk.
    #[inline]
    pub(crate) fn lookup(&self, file: FileId, row_group: u32, column: u32) -> Result<Entry, Miss> {
        let wanted = Wanted {
            file,
            row_group,
            column,
        };
        match self.header.chunk_slots {
            0 => Err(Miss::Absent),
            slots => self.probe(&wanted, wanted.first_slot(slots)),
        }
    }

    /// The entries of many chunks, in their order. The slots where their probes begin are fetched
    /// before the first one is followed, so that the memory is waited for once and not once a chunk.
    pub(crate) fn lookup_many(
        &self,
        wanted: &[Wanted],
        mut found: impl FnMut(Result<Entry, Miss>),
    ) {
        let slots = self.header.chunk_slots;
        if slots == 0 {
            wanted.iter().for_each(|_| found(Err(Miss::Absent)));
            return;
        }
        for together in wanted.chunks(LOOKUPS_TOGETHER) {
            let mut first = [0; LOOKUPS_TOGETHER];
            let table = self.header.chunk_slots_offset as usize;
            for (slot, wanted) in first.iter_mut().zip(together) {
                *slot = wanted.first_slot(slots);
                prefetch(self.bytes(), table + *slot as usize * ChunkSlot::BYTES);
            }
            for (slot, wanted) in first.iter().zip(together) {
                found(self.probe(wanted, *slot));
            }
        }
    }

    /// Follows a probe from its first slot.
    #[inline]
    fn probe(&self, wanted: &Wanted, first: u32) -> Result<Entry, Miss> {
        let slots = self.header.chunk_slots;
        let mut slot = first;
        for _ in 0..self.header.chunk_probe_max.min(slots) {
            let row = self.row(self.header.chunk_slots_offset, slot, ChunkSlot::BYTES);
            let found = ChunkSlot::read(row);
            if found.state == 0 {
                return Err(Miss::Absent);
            }
            if found.file == wanted.file.slot
                && found.row_group == wanted.row_group
                && found.column == wanted.column
            {
                return check_slot(slot, row, &found, wanted.file);
            }
            slot = if slot + 1 == slots { 0 } else { slot + 1 };
        }
        Err(Miss::Absent)
    }

    /// Key and entry in `slot`; `None` where it is empty.
    pub(crate) fn chunk_in(&self, slot: u32) -> Option<Result<(&[u8], Entry), Miss>> {
        let row = self.row(self.header.chunk_slots_offset, slot, ChunkSlot::BYTES);
        let found = ChunkSlot::read(row);
        if found.state == 0 {
            return None;
        }
        Some(match self.file_in(found.file) {
            None => Err(Miss::Corrupt(format!(
                "index entry {slot}: its file {} is not intact",
                found.file
            ))),
            Some((key, file)) => check_slot(slot, row, &found, file).map(|entry| (key, entry)),
        })
    }

    /// Keys and entries of all intact chunks, in no order.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = (&[u8], Entry)> + '_ {
        (0..self.header.chunk_slots).filter_map(|slot| self.chunk_in(slot)?.ok())
    }

    /// Names and locations of all catalogs by name; damaged rows come as what is wrong with them.
    pub(crate) fn catalogs(
        &self,
    ) -> impl Iterator<Item = Result<(&str, CatalogLocation), Miss>> + '_ {
        (0..self.header.catalogs).map(|at| {
            let row = self.row(self.header.catalogs_offset, at, CatalogRow::BYTES);
            let found = CatalogRow::read(row);
            let problem = |what: &str| Miss::Corrupt(format!("catalog entry {at}: {what}"));
            let name = self
                .string(found.name_offset, found.name_bytes)
                .and_then(|name| str::from_utf8(name).ok())
                .ok_or_else(|| {
                    problem("its name lies outside of the string area or is not UTF-8")
                })?;
            if CatalogRow::read_checked(row, hash(name.as_bytes())).is_none() {
                return Err(problem("check does not match"));
            }
            check_range(found.offset, found.length).map_err(|what| problem(&what))?;
            let location = CatalogLocation {
                segment: SegmentId(found.segment),
                offset: found.offset,
                length: found.length,
                checksum: found.checksum,
            };
            Ok((name, location))
        })
    }

    /// The location of the catalog with this name.
    pub(crate) fn catalog(&self, name: &str) -> Option<CatalogLocation> {
        self.catalogs()
            .filter_map(Result::ok)
            .find(|(found, _)| *found == name)
            .map(|(_, location)| location)
    }

    /// Row `at` of the segment table, whether or not it is intact.
    fn segment_row(&self, at: u32) -> &[u8] {
        self.row(self.header.segments_offset, at, SegmentRow::BYTES)
    }

    /// The segments that this index names and whose rows are intact.
    pub(crate) fn segments(&self) -> impl Iterator<Item = IndexedSegment> + '_ {
        (0..self.header.segments)
            .filter_map(|at| SegmentRow::read_checked(self.segment_row(at), 0).map(Into::into))
    }

    /// One segment that this index names, if its row is intact.
    pub(crate) fn segment(&self, id: SegmentId) -> Option<IndexedSegment> {
        let (mut low, mut high) = (0, self.header.segments);
        while low < high {
            let middle = low + (high - low) / 2;
            let row = self.segment_row(middle);
            match SegmentRow::read(row).segment.cmp(&id.0) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => {
                    return SegmentRow::read_checked(row, 0).map(Into::into);
                }
            }
        }
        None
    }
}

impl From<SegmentRow> for IndexedSegment {
    fn from(row: SegmentRow) -> Self {
        IndexedSegment {
            id: SegmentId(row.segment),
            file_bytes: row.file_bytes,
            live_bytes: row.live_bytes,
        }
    }
}

#[inline]
fn check_slot(slot: u32, row: &[u8], found: &ChunkSlot, file: FileId) -> Result<Entry, Miss> {
    if found.state != SLOT_USED || found.check != ChunkSlot::check_of(row, file.key_hash) {
        return Err(Miss::Corrupt(format!(
            "index entry {slot}: check does not match"
        )));
    }
    check_range(found.offset, found.length)
        .map_err(|problem| Miss::Corrupt(format!("index entry {slot}: {problem}")))?;
    Ok(Entry {
        file,
        row_group: found.row_group,
        column: found.column,
        ordinal: found.ordinal,
        location: ChunkLocation {
            segment: SegmentId(found.segment),
            offset: found.offset,
            length: found.length,
            form: found.form,
            checksum: found.checksum,
            rows: found.rows,
        },
    })
}

/// Checks what can be said of a range without its segment.
pub(crate) fn check_range(offset: u64, length: u64) -> Result<u64, String> {
    if !offset.is_multiple_of(CHUNK_ALIGN) {
        return Err(format!(
            "offset {offset} is unaligned, expected a multiple of {CHUNK_ALIGN}"
        ));
    }
    if offset < SegmentHeader::BYTES as u64 {
        return Err(format!(
            "offset {offset} lies in the segment's header, expected {} or later",
            SegmentHeader::BYTES
        ));
    }
    offset
        .checked_add(length)
        .filter(|end| aligned(*end).is_some() && usize::try_from(*end).is_ok())
        .ok_or_else(|| format!("range of {length} bytes at {offset} overflows"))
}

/// Checks a range against the end of its segment's data.
pub(crate) fn check_range_in(
    offset: u64,
    length: u64,
    segment: SegmentId,
    data_end: u64,
) -> Result<(), String> {
    let end = check_range(offset, length)?;
    if end > data_end {
        return Err(format!(
            "range {offset}..{end} is past the data of segment {segment}, which ends at {data_end}"
        ));
    }
    Ok(())
}
