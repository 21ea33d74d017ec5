//! The bytes of segments and index: little-endian structures of fixed size without implicit
//! padding. Offsets follow from the order of the fields; `docs/format.md` shows them, and a test
//! compares its tables with [`STRUCTURES`].

use std::path::Path;

use twox_hash::XxHash3_64;

use crate::error::{Error, Result};

/// First bytes of an index file.
pub(crate) const INDEX_MAGIC: [u8; 8] = *b"STOAINDX";
/// First bytes of a segment file.
pub(crate) const SEGMENT_MAGIC: [u8; 8] = *b"STOASEGM";
/// First bytes of the file that holds a cache directory's incarnation.
pub(crate) const IDENTITY_MAGIC: [u8; 8] = *b"STOAIDNT";
/// First bytes of the file that says how the last writer left the directory.
pub(crate) const HANDOVER_MAGIC: [u8; 8] = *b"STOAHAND";
/// First bytes of the directory of what other workers hold.
pub(crate) const DIRECTORY_MAGIC: [u8; 8] = *b"STOADIRY";
/// Readers refuse another major format.
pub(crate) const FORMAT_MAJOR: u16 = 1;
/// Readers accept any minor format of their major one.
pub(crate) const FORMAT_MINOR: u16 = 1;
/// Reads as another number on a machine of the other byte order.
pub(crate) const ENDIAN_MARK: u32 = 0x0A0B_0C0D;
/// Alignment of everything that an index or a segment header points to.
pub(crate) const SECTION_ALIGN: u64 = 64;

/// State byte of a slot that holds an entry; an empty slot is all zeros.
pub(crate) const SLOT_USED: u8 = 1;
/// Kind byte of a footer entry for a chunk.
pub(crate) const KIND_CHUNK: u8 = 1;
/// Kind byte of a footer entry for a catalog.
pub(crate) const KIND_CATALOG: u8 = 2;

/// The checksum of contents.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// A number at its place in a structure.
pub(crate) trait Field: Sized {
    /// Size in bytes.
    const BYTES: usize;
    /// Required alignment of its offset.
    const ALIGN: usize;
    fn put(&self, at: &mut [u8]);
    fn get(at: &[u8]) -> Self;
}

macro_rules! number_field {
    ($($number:ty),*) => {$(
        impl Field for $number {
            const BYTES: usize = size_of::<$number>();
            const ALIGN: usize = size_of::<$number>();
            fn put(&self, at: &mut [u8]) {
                at.copy_from_slice(&self.to_le_bytes());
            }
            fn get(at: &[u8]) -> Self {
                let mut bytes = [0; size_of::<$number>()];
                bytes.copy_from_slice(at);
                <$number>::from_le_bytes(bytes)
            }
        }
    )*};
}
number_field!(u8, u16, u32, u64);

impl<const N: usize> Field for [u8; N] {
    const BYTES: usize = N;
    const ALIGN: usize = 1;
    fn put(&self, at: &mut [u8]) {
        at.copy_from_slice(self);
    }
    fn get(at: &[u8]) -> Self {
        let mut bytes = [0; N];
        bytes.copy_from_slice(at);
        bytes
    }
}

/// Name, offset and size of a field.
pub(crate) type FieldPlace = (&'static str, usize, usize);

/// Declares a structure of `$total` bytes whose last field is `check`, the hash of all bytes before
/// it. Size, alignment of every field and the place of the check are asserted at compile time.
macro_rules! le_struct {
    ($(#[$meta:meta])* $name:ident, $total:literal bytes { $($field:ident : $ty:ty),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) struct $name { $(pub(crate) $field: $ty),+ }

        impl Default for $name {
            fn default() -> Self {
                Self::read(&[0; $total])
            }
        }

        impl $name {
            /// Size of the structure.
            pub(crate) const BYTES: usize = $total;
            const FIELD_COUNT: usize = [$(stringify!($field)),+].len();
            /// Where each field lies.
            pub(crate) const FIELDS: [FieldPlace; Self::FIELD_COUNT] = {
                let mut at = 0;
                let fields = [$({
                    let offset = at;
                    at += <$ty as Field>::BYTES;
                    assert!(offset.is_multiple_of(<$ty as Field>::ALIGN), "a field is not aligned");
                    (stringify!($field), offset, <$ty as Field>::BYTES)
                }),+];
                assert!(at == $total, "fields do not fill the structure");
                fields
            };
            const CHECK_AT: usize = $total - 8;
            const CHECKED: () = assert!(
                Self::FIELDS[Self::FIELD_COUNT - 1].1 == Self::CHECK_AT
                    && Self::FIELDS[Self::FIELD_COUNT - 1].2 == 8,
                "the last field must be the check"
            );

            /// Reads the fields of the first bytes of `bytes`, which holds at least `BYTES`.
            #[inline]
            pub(crate) fn read(bytes: &[u8]) -> Self {
                let () = Self::CHECKED;
                let bytes = &bytes[..$total];
                let mut at = 0;
                $(
                    let $field = <$ty as Field>::get(&bytes[at..at + <$ty as Field>::BYTES]);
                    at += <$ty as Field>::BYTES;
                )+
                debug_assert_eq!(at, $total);
                Self { $($field),+ }
            }

            /// The bytes, with the check computed under `seed`.
            pub(crate) fn to_bytes(self, seed: u64) -> [u8; $total] {
                let mut bytes = [0; $total];
                let mut at = 0;
                $(
                    self.$field.put(&mut bytes[at..at + <$ty as Field>::BYTES]);
                    at += <$ty as Field>::BYTES;
                )+
                debug_assert_eq!(at, $total);
                let check = Self::check_of(&bytes, seed);
                bytes[Self::CHECK_AT..].copy_from_slice(&check.to_le_bytes());
                bytes
            }

            /// The check of these bytes under `seed`.
            #[inline]
            pub(crate) fn check_of(bytes: &[u8], seed: u64) -> u64 {
                XxHash3_64::oneshot_with_seed(seed, &bytes[..Self::CHECK_AT])
            }

            /// Reads the fields if the check holds.
            #[inline]
            #[allow(dead_code, reason = "not every structure is read this way")]
            pub(crate) fn read_checked(bytes: &[u8], seed: u64) -> Option<Self> {
                let value = Self::read(bytes);
                (value.check == Self::check_of(bytes, seed)).then_some(value)
            }
        }
    };
}

le_struct! {
    /// First bytes of `index`: where everything else in it lies.
    IndexHeader, 192 bytes {
        magic: [u8; 8],
        format_major: u16,
        format_minor: u16,
        endian_mark: u32,
        generation: u64,
        file_bytes: u64,
        next_segment: u64,
        file_slots_offset: u64,
        file_slots: u32,
        files: u32,
        chunk_slots_offset: u64,
        chunk_slots: u32,
        chunks: u32,
        catalogs_offset: u64,
        catalogs: u32,
        chunk_probe_max: u32,
        segments_offset: u64,
        segments: u32,
        file_probe_max: u32,
        strings_offset: u64,
        strings_bytes: u64,
        tags_offset: u64,
        reserved: [u8; 56],
        check: u64,
    }
}

le_struct! {
    /// A slot of the file table: an interned identity.
    FileSlot, 32 bytes {
        key_offset: u64,
        key_hash: u64,
        key_bytes: u32,
        state: u8,
        reserved: [u8; 3],
        check: u64,
    }
}

le_struct! {
    /// A slot of the chunk table: one cache line.
    ChunkSlot, 64 bytes {
        file: u32,
        row_group: u32,
        column: u32,
        rows: u32,
        segment: u64,
        offset: u64,
        length: u64,
        checksum: u64,
        ordinal: u32,
        form: u8,
        state: u8,
        reserved: [u8; 2],
        check: u64,
    }
}

le_struct! {
    /// A row of the catalog table.
    CatalogRow, 64 bytes {
        name_offset: u64,
        name_bytes: u32,
        reserved: [u8; 4],
        segment: u64,
        offset: u64,
        length: u64,
        checksum: u64,
        reserved_2: [u8; 8],
        check: u64,
    }
}

le_struct! {
    /// A row of the segment table, which is sorted by segment.
    SegmentRow, 32 bytes {
        segment: u64,
        file_bytes: u64,
        live_bytes: u64,
        check: u64,
    }
}

le_struct! {
    /// First bytes of a segment: where its footer lies.
    SegmentHeader, 64 bytes {
        magic: [u8; 8],
        format_major: u16,
        format_minor: u16,
        endian_mark: u32,
        segment: u64,
        file_bytes: u64,
        footer_offset: u64,
        entries: u32,
        reserved: [u8; 12],
        check: u64,
    }
}

le_struct! {
    /// An entry of a segment's footer: what lies where in this segment.
    FooterEntry, 64 bytes {
        kind: u8,
        form: u8,
        reserved: [u8; 2],
        rows: u32,
        row_group: u32,
        column: u32,
        key_offset: u64,
        key_bytes: u32,
        reserved_2: [u8; 4],
        offset: u64,
        length: u64,
        checksum: u64,
        check: u64,
    }
}

le_struct! {
    /// The whole of `identity`.
    Identity, 64 bytes {
        magic: [u8; 8],
        format_major: u16,
        format_minor: u16,
        endian_mark: u32,
        incarnation: u64,
        reserved: [u8; 32],
        check: u64,
    }
}

le_struct! {
    /// The whole of `handover`.
    HandoverFile, 128 bytes {
        magic: [u8; 8],
        format_major: u16,
        format_minor: u16,
        endian_mark: u32,
        boot_id: [u8; 16],
        carried_out: u64,
        walk_next: u64,
        walk_began: u64,
        walk_ended: u64,
        ended: u8,
        reserved: [u8; 55],
        check: u64,
    }
}

le_struct! {
    /// First bytes of `directory`: where everything else in it lies.
    DirectoryHeader, 192 bytes {
        magic: [u8; 8],
        format_major: u16,
        format_minor: u16,
        endian_mark: u32,
        revision: u64,
        file_bytes: u64,
        file_slots_offset: u64,
        file_slots: u32,
        files: u32,
        chunk_slots_offset: u64,
        chunk_slots: u32,
        chunks: u32,
        holders_offset: u64,
        holders: u32,
        chunk_probe_max: u32,
        workers_offset: u64,
        workers: u32,
        file_probe_max: u32,
        strings_offset: u64,
        strings_bytes: u64,
        reserved: [u8; 72],
        check: u64,
    }
}

le_struct! {
    /// A slot of the directory's chunk table.
    HeldSlot, 32 bytes {
        file: u32,
        row_group: u32,
        column: u32,
        holder: u32,
        holders: u16,
        state: u8,
        reserved: [u8; 5],
        check: u64,
    }
}

le_struct! {
    /// A row of the directory's holder table: one worker's copy of one chunk.
    HolderRow, 64 bytes {
        worker: u32,
        rows: u32,
        segment: u64,
        offset: u64,
        length: u64,
        checksum: u64,
        form: u8,
        reserved: [u8; 15],
        check: u64,
    }
}

le_struct! {
    /// A row of the directory's worker table.
    WorkerRow, 64 bytes {
        id_offset: u64,
        id_bytes: u32,
        addresses_bytes: u32,
        addresses_offset: u64,
        incarnation: u64,
        reserved: [u8; 24],
        check: u64,
    }
}

// Magic, version and byte order lie at the same place in all headers and in every format to come,
// so that any version can tell what it does not understand.
const _: () = {
    let mut field = 0;
    while field < 4 {
        assert!(IndexHeader::FIELDS[field].1 == SegmentHeader::FIELDS[field].1);
        assert!(IndexHeader::FIELDS[field].1 == Identity::FIELDS[field].1);
        assert!(IndexHeader::FIELDS[field].1 == HandoverFile::FIELDS[field].1);
        assert!(IndexHeader::FIELDS[field].1 == DirectoryHeader::FIELDS[field].1);
        field += 1;
    }
    // A slot must not straddle cache lines, a section must begin at one.
    assert!(ChunkSlot::BYTES as u64 == SECTION_ALIGN && 64 % FileSlot::BYTES == 0);
    assert!((IndexHeader::BYTES as u64).is_multiple_of(SECTION_ALIGN));
    assert!((SegmentHeader::BYTES as u64).is_multiple_of(SECTION_ALIGN));
    assert!(64 % HeldSlot::BYTES == 0 && HolderRow::BYTES as u64 == SECTION_ALIGN);
    assert!((DirectoryHeader::BYTES as u64).is_multiple_of(SECTION_ALIGN));
    assert!(crate::types::CHUNK_ALIGN == SECTION_ALIGN);
};

/// Every structure by its name in `docs/format.md`.
#[cfg(test)]
pub(crate) const STRUCTURES: [(&str, usize, &[FieldPlace]); 15] = [
    ("IndexHeader", IndexHeader::BYTES, &IndexHeader::FIELDS),
    ("FileSlot", FileSlot::BYTES, &FileSlot::FIELDS),
    ("ChunkSlot", ChunkSlot::BYTES, &ChunkSlot::FIELDS),
    ("CatalogRow", CatalogRow::BYTES, &CatalogRow::FIELDS),
    ("SegmentRow", SegmentRow::BYTES, &SegmentRow::FIELDS),
    (
        "SegmentHeader",
        SegmentHeader::BYTES,
        &SegmentHeader::FIELDS,
    ),
    ("FooterEntry", FooterEntry::BYTES, &FooterEntry::FIELDS),
    ("Identity", Identity::BYTES, &Identity::FIELDS),
    ("HandoverFile", HandoverFile::BYTES, &HandoverFile::FIELDS),
    (
        "DirectoryHeader",
        DirectoryHeader::BYTES,
        &DirectoryHeader::FIELDS,
    ),
    ("HeldSlot", HeldSlot::BYTES, &HeldSlot::FIELDS),
    ("HolderRow", HolderRow::BYTES, &HolderRow::FIELDS),
    ("WorkerRow", WorkerRow::BYTES, &WorkerRow::FIELDS),
    ("CounterHeader", 64, &crate::counters::HEADER_FIELDS),
    ("CounterSlot", 32, &crate::counters::SLOT_FIELDS),
];

/// The next multiple of the alignment of sections and chunks, or `None` past `u64`.
pub(crate) fn aligned(offset: u64) -> Option<u64> {
    offset.checked_next_multiple_of(SECTION_ALIGN)
}

/// Checks what every format has in common, in the order in which it can be understood.
pub(crate) fn check_preamble(
    path: &Path,
    bytes: &[u8],
    magic: [u8; 8],
    header_bytes: usize,
) -> Result<()> {
    const PREAMBLE_BYTES: usize = 16;
    if bytes.len() < PREAMBLE_BYTES {
        return Err(Error::corrupt(
            path,
            format!(
                "file has {} bytes, expected at least {header_bytes}",
                bytes.len()
            ),
        ));
    }
    if bytes[..8] != magic {
        return Err(Error::NotACacheFile {
            path: path.to_path_buf(),
            found: bytes[..8].escape_ascii().to_string(),
            expected: magic.escape_ascii().to_string(),
        });
    }
    let mark = u32::get(&bytes[12..16]);
    if mark != ENDIAN_MARK {
        return Err(Error::WrongEndian {
            path: path.to_path_buf(),
            found: mark,
            expected: ENDIAN_MARK,
        });
    }
    let major = u16::get(&bytes[8..10]);
    if major != FORMAT_MAJOR {
        return Err(Error::FormatUnsupported {
            path: path.to_path_buf(),
            found: format!("{major}.{}", u16::get(&bytes[10..12])),
            supported: format!("{FORMAT_MAJOR}.x"),
        });
    }
    if bytes.len() < header_bytes {
        return Err(Error::corrupt(
            path,
            format!(
                "file has {} bytes, expected at least {header_bytes}",
                bytes.len()
            ),
        ));
    }
    Ok(())
}

/// Checks that `count` rows of `row_bytes` at `offset` lie, aligned, within `limit` bytes.
pub(crate) fn check_section(
    what: &str,
    offset: u64,
    count: u64,
    row_bytes: u64,
    from: u64,
    limit: u64,
) -> Result<u64, String> {
    let end = count
        .checked_mul(row_bytes)
        .and_then(|bytes| offset.checked_add(bytes));
    match end {
        None => Err(format!(
            "{what}: {count} rows of {row_bytes} bytes at {offset} overflow"
        )),
        Some(_) if !offset.is_multiple_of(SECTION_ALIGN) => Err(format!(
            "{what} begins at {offset}, expected a multiple of {SECTION_ALIGN}"
        )),
        Some(_) if offset < from => Err(format!(
            "{what} begins at {offset}, expected {from} or later"
        )),
        Some(end) if end > limit => {
            Err(format!("{what} ends at {end}, expected {limit} or earlier"))
        }
        Some(end) => Ok(end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A diagram that drifts from the code is worse than none: every table of docs/format.md is
    /// compared field by field.
    #[test]
    fn documented_offsets_are_the_constants() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/format.md");
        let text = std::fs::read_to_string(path).unwrap();
        for (name, bytes, fields) in STRUCTURES {
            let heading = format!("`{name}`, {bytes} bytes");
            let section = text
                .split("\n### ")
                .find(|section| section.starts_with(&heading))
                .unwrap_or_else(|| panic!("docs/format.md has no heading `### {heading}`"));
            let documented: Vec<(String, usize, usize)> = section
                .lines()
                .filter_map(|line| {
                    let cells: Vec<&str> = line.split('|').map(str::trim).collect();
                    let [_, offset, size, field, meaning, _] = cells[..] else {
                        return None;
                    };
                    let (offset, size) = (offset.parse().ok()?, size.parse().ok()?);
                    assert!(
                        !meaning.is_empty(),
                        "{name}.{field} has no meaning in docs/format.md"
                    );
                    Some((field.trim_matches('`').to_string(), offset, size))
                })
                .collect();
            let actual: Vec<(String, usize, usize)> = fields
                .iter()
                .map(|&(field, offset, size)| (field.to_string(), offset, size))
                .collect();
            assert_eq!(
                documented, actual,
                "{name} in docs/format.md differs from the code"
            );
        }
        for (constant, value) in [
            ("INDEX_MAGIC", INDEX_MAGIC.escape_ascii().to_string()),
            ("SEGMENT_MAGIC", SEGMENT_MAGIC.escape_ascii().to_string()),
            ("IDENTITY_MAGIC", IDENTITY_MAGIC.escape_ascii().to_string()),
            ("HANDOVER_MAGIC", HANDOVER_MAGIC.escape_ascii().to_string()),
            (
                "DIRECTORY_MAGIC",
                DIRECTORY_MAGIC.escape_ascii().to_string(),
            ),
            ("FORMAT_MAJOR", FORMAT_MAJOR.to_string()),
            ("FORMAT_MINOR", FORMAT_MINOR.to_string()),
            ("ENDIAN_MARK", format!("{ENDIAN_MARK:#010x}")),
            ("CHUNK_ALIGN", crate::CHUNK_ALIGN.to_string()),
            ("SEGMENT_BYTES", crate::SEGMENT_BYTES.to_string()),
            ("FILE_KEY_BYTES_MAX", crate::FILE_KEY_BYTES_MAX.to_string()),
            (
                "CATALOG_NAME_BYTES_MAX",
                crate::CATALOG_NAME_BYTES_MAX.to_string(),
            ),
            ("HOLDERS_MAX", crate::directory::HOLDERS_MAX.to_string()),
            ("TAGS_TOGETHER", crate::index::TAGS_TOGETHER.to_string()),
        ] {
            let row = format!("| `{constant}` | {value} |");
            assert!(text.contains(&row), "docs/format.md lacks the row {row:?}");
        }
    }

    #[test]
    fn a_check_covers_every_byte_and_the_seed() {
        let row = SegmentRow {
            segment: 7,
            file_bytes: 4096,
            live_bytes: 64,
            check: 0,
        };
        let bytes = row.to_bytes(5);
        assert_eq!(SegmentRow::read_checked(&bytes, 5).unwrap().segment, 7);
        assert!(SegmentRow::read_checked(&bytes, 6).is_none());
        for at in 0..SegmentRow::BYTES {
            let mut flipped = bytes;
            flipped[at] ^= 0x10;
            assert!(SegmentRow::read_checked(&flipped, 5).is_none(), "byte {at}");
        }
    }

    #[test]
    fn numbers_are_little_endian() {
        let bytes = SegmentRow {
            segment: 0x0102_0304,
            file_bytes: 0,
            live_bytes: 0,
            check: 0,
        }
        .to_bytes(0);
        assert_eq!(bytes[..8], [4, 3, 2, 1, 0, 0, 0, 0]);
    }
}
