//! A view of the bytes of an index that trusts nothing.
//!
//! [`Index::parse`] checks header and geometry, at a cost that does not grow with the number of
//! chunks; every slot is checked when it is used.

use std::path::Path;

use crate::error::{Error, Result};
use crate::format::{
    CatalogRow, ChunkSlot, Field, FileSlot, INDEX_MAGIC, IndexHeader, SLOT_USED, SegmentHeader,
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
const LOOKUPS_TOGETHER: usize = 64;

/// Tags that are compared at once. So many less one are repeated behind the last one, so that they
/// can be read from every slot on.
pub(crate) const TAGS_TOGETHER: usize = 8;
/// How often they are, at most: probes of more slots are rare.
pub(crate) const TAG_READS_MAX: usize = 4;
/// The lowest and the highest bit of every tag of those.
const LOW_BITS: u64 = u64::MAX / 0xFF;
const HIGH_BITS: u64 = LOW_BITS << 7;

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
    #[inline]
    pub(crate) fn hash(&self) -> u64 {
        chunk_hash(self.file.key_hash, self.row_group, self.column)
    }

    #[inline]
    fn is_in(&self, row: &[u8]) -> bool {
        let slot = ChunkSlot::read(row);
        slot.file == self.file.slot
            && slot.row_group == self.row_group
            && slot.column == self.column
            && slot.state != 0
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

/// The slots of a probe for a hash, in order, of which there are some.
#[inline]
pub(crate) fn probe(hash: u64, slots: u32, probe_max: u32) -> impl Iterator<Item = u32> {
    let first = u64::from(first_slot(hash, slots));
    (0..probe_max.min(slots)).map(move |step| ((first + u64::from(step)) % u64::from(slots)) as u32)
}

/// `slot`, counted around the end of a table of `slots` slots.
#[inline]
fn wrapped(slot: u32, slots: u32) -> u32 {
    if slot < slots { slot } else { slot % slots }
}

/// What the tag table holds for a used slot: never 0, which is that of an empty one. These are other
/// bits of the hash than those that a probe begins with.
pub(crate) fn slot_tag(hash: u64) -> u8 {
    (hash as u8).max(1)
}

/// Rows of the tag table of a chunk table of `slots` slots.
pub(crate) fn tags_for(slots: u32) -> u64 {
    match slots {
        0 => 0,
        slots => u64::from(slots) + TAGS_TOGETHER as u64 - 1,
    }
}

/// Which of eight tags are 0, as their highest bits. The lowest of these is right; above it, a 1 may
/// be taken for a 0.
#[inline]
fn zeros(tags: u64) -> u64 {
    tags.wrapping_sub(LOW_BITS) & !tags & HIGH_BITS
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
        let has_tags = header.tags_offset != 0;
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
                "tag table",
                // An index without tags, as format 1.0 has it, begins them nowhere.
                if has_tags { header.tags_offset } else { from },
                if has_tags {
                    tags_for(header.chunk_slots)
                } else {
                    0
                },
                1,
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
        for slot in probe(key_hash, slots, self.header.file_probe_max) {
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

    /// The entry of a chunk, or why there is none.
    pub(crate) fn lookup(&self, wanted: &Wanted) -> Result<Entry, Miss> {
        let slot = self.slot(wanted).ok_or(Miss::Absent)?;
        self.checked(slot, wanted.file)
    }

    /// The slot of a chunk, if the index names it.
    #[inline]
    pub(crate) fn slot(&self, wanted: &Wanted) -> Option<u32> {
        let hash = wanted.hash();
        self.slot_near(wanted, hash, self.likely(hash))
    }

    /// The slots of many chunks, in their order. Where they probably lie, or would lie, is fetched
    /// before the first one is looked at, so that the memory is waited for once and not once a chunk.
    #[inline]
    pub(crate) fn slots(&self, wanted: &[Wanted], mut found: impl FnMut(&Wanted, Option<u32>)) {
        let table = self.header.chunk_slots_offset as usize;
        for together in wanted.chunks(LOOKUPS_TOGETHER) {
            let mut places = [(0, None); LOOKUPS_TOGETHER];
            for (place, wanted) in places.iter_mut().zip(together) {
                let hash = wanted.hash();
                let likely = self.likely(hash);
                *place = (hash, likely);
                if let Some(slot) = likely {
                    prefetch(self.bytes(), table + slot as usize * ChunkSlot::BYTES);
                }
            }
            for ((hash, likely), wanted) in places.iter().zip(together) {
                found(wanted, self.slot_near(wanted, *hash, *likely));
            }
        }
    }

    /// The eight tags from `slot` on.
    #[inline]
    fn tags(&self, slot: u32) -> u64 {
        let start = self.header.tags_offset as usize + slot as usize;
        u64::get(&self.bytes()[start..start + TAGS_TOGETHER])
    }

    /// Where the chunk of this hash most probably lies, if it is in the table: the next slot with its
    /// tag, else the first one of its probe. `None` if there are no slots.
    #[inline(always)]
    pub(crate) fn likely(&self, hash: u64) -> Option<u32> {
        let slots = self.header.chunk_slots;
        if slots == 0 {
            return None;
        }
        let first = first_slot(hash, slots);
        if self.header.tags_offset == 0 {
            return Some(first);
        }
        let same_tags = LOW_BITS * u64::from(slot_tag(hash));
        let mut from = first;
        for _ in 0..TAG_READS_MAX {
            let tags = self.tags(from);
            let same = zeros(tags ^ same_tags);
            if same != 0 {
                let slot = from.wrapping_add(same.trailing_zeros() / 8);
                return Some(wrapped(slot, slots));
            }
            if zeros(tags) != 0 {
                break;
            }
            // Numbers wrap only in a table larger than any file, to a hint that is poor, no more.
            from = wrapped(from.wrapping_add(TAGS_TOGETHER as u32), slots);
        }
        Some(first)
    }

    /// The slot of a chunk whose hash is `hash`, and which most probably lies in `likely`.
    #[inline]
    fn slot_near(&self, wanted: &Wanted, hash: u64, likely: Option<u32>) -> Option<u32> {
        likely
            .filter(|slot| wanted.is_in(self.chunk_row(*slot)))
            .or_else(|| self.probe(wanted, hash))
    }

    /// Follows the probe of a chunk, which is probably not there.
    #[inline(never)]
    fn probe(&self, wanted: &Wanted, hash: u64) -> Option<u32> {
        for slot in probe(hash, self.header.chunk_slots, self.header.chunk_probe_max) {
            let row = self.chunk_row(slot);
            if ChunkSlot::read(row).state == 0 {
                return None;
            }
            if wanted.is_in(row) {
                return Some(slot);
            }
        }
        None
    }

    /// The entry in a slot that holds a chunk of this file; `None` if it is damaged.
    #[inline(always)]
    pub(crate) fn entry(&self, slot: u32, file: FileId) -> Option<Entry> {
        let row = self.chunk_row(slot);
        let found = ChunkSlot::read(row);
        let is_intact =
            found.state == SLOT_USED && found.check == ChunkSlot::check_of(row, file.key_hash);
        if !is_intact || range_end(found.offset, found.length).is_none() {
            return None;
        }
        Some(Entry {
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

    /// The entry in such a slot, or what is wrong with it.
    fn checked(&self, slot: u32, file: FileId) -> Result<Entry, Miss> {
        let entry = self.entry(slot, file);
        entry.ok_or_else(|| self.damage(slot, file))
    }

    /// What is wrong with a slot of which there is no entry: its bytes, or else the range that they
    /// name.
    #[cold]
    pub(crate) fn damage(&self, slot: u32, file: FileId) -> Miss {
        let row = self.chunk_row(slot);
        let found = ChunkSlot::read(row);
        let intact = found.check == ChunkSlot::check_of(row, file.key_hash);
        let range = check_range(found.offset, found.length);
        let problem = range.err().filter(|_| intact);
        let problem = problem.unwrap_or_else(|| "check does not match".to_owned());
        Miss::Corrupt(format!("index entry {slot}: {problem}"))
    }

    #[inline]
    fn chunk_row(&self, slot: u32) -> &[u8] {
        self.row(self.header.chunk_slots_offset, slot, ChunkSlot::BYTES)
    }

    /// Key and entry in `slot`; `None` where it is empty.
    pub(crate) fn chunk_in(&self, slot: u32) -> Option<Result<(&[u8], Entry), Miss>> {
        let row = self.chunk_row(slot);
        let found = ChunkSlot::read(row);
        if found.state == 0 {
            return None;
        }
        Some(match self.file_in(found.file) {
            None => Err(Miss::Corrupt(format!(
                "index entry {slot}: its file {} is not intact",
                found.file
            ))),
            Some((key, file)) => self.checked(slot, file).map(|entry| (key, entry)),
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

/// The end of a range, if it is one, as far as can be told without its segment.
#[inline]
fn range_end(offset: u64, length: u64) -> Option<u64> {
    if !offset.is_multiple_of(CHUNK_ALIGN) || offset < SegmentHeader::BYTES as u64 {
        return None;
    }
    let end = offset.checked_add(length)?;
    (aligned(end).is_some() && usize::try_from(end).is_ok()).then_some(end)
}

/// Checks what can be said of a range without its segment.
pub(crate) fn check_range(offset: u64, length: u64) -> Result<u64, String> {
    range_end(offset, length).ok_or_else(|| {
        let header = SegmentHeader::BYTES as u64;
        if !offset.is_multiple_of(CHUNK_ALIGN) {
            format!("offset {offset} is unaligned, expected a multiple of {CHUNK_ALIGN}")
        } else if offset < header {
            format!("offset {offset} lies in the segment's header, expected {header} or later")
        } else {
            format!("range of {length} bytes at {offset} overflows")
        }
    })
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
