//! The headers in docs/format.md against chunks as they are written.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array};
use arrow::datatypes::DataType;

use crate::packed::{self, Encoding};
use crate::{BLOCK_ROWS, arrow_form, encode_arrow, encode_packed};

const ROWS: usize = 20_000;
const BLOCKS: usize = ROWS.div_ceil(BLOCK_ROWS);

/// The text below a heading, up to the next one.
fn section(heading: &str) -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/format.md");
    let text = std::fs::read_to_string(path).unwrap();
    let found = text
        .split("\n### ")
        .find(|section| section.starts_with(heading));
    found
        .unwrap_or_else(|| panic!("docs/format.md has no heading `### {heading}`"))
        .to_owned()
}

/// Offset and size of each field of a table; reserved ones have to be zero in `bytes`, and none
/// may be missing up to `end`.
fn fields(heading: &str, bytes: &[u8], end: usize) -> BTreeMap<String, (usize, usize)> {
    let (mut fields, mut at) = (BTreeMap::new(), 0);
    for line in section(heading).lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, offset, size, field, meaning, _] = cells[..] else {
            continue;
        };
        let (Ok(offset), Ok(size)) = (offset.parse::<usize>(), size.parse::<usize>()) else {
            continue;
        };
        assert!(!meaning.is_empty(), "{heading}: {field} has no meaning");
        assert_eq!(offset, at, "{heading}: {field}");
        at += size;
        match field.trim_matches('`') {
            "reserved" => assert!(bytes[offset..at].iter().all(|byte| *byte == 0), "{heading}"),
            name => assert!(fields.insert(name.to_owned(), (offset, size)).is_none()),
        }
    }
    assert_eq!(at, end, "{heading}: bytes of the header");
    fields
}

/// The number in a documented field.
struct Read<'a>(&'a [u8], BTreeMap<String, (usize, usize)>);

impl Read<'_> {
    fn bytes(&self, field: &str) -> &[u8] {
        let (offset, size) = self.1[field];
        &self.0[offset..offset + size]
    }

    fn number(&self, field: &str) -> u64 {
        let mut number = [0; 8];
        let bytes = self.bytes(field);
        number[..bytes.len().min(8)].copy_from_slice(&bytes[..bytes.len().min(8)]);
        u64::from_le_bytes(number)
    }
}

/// Numbers with a few nulls, none of which repeats.
fn column() -> ArrayRef {
    let value = |row: i64| (row % 100 != 7).then_some(1_000_000 + row * 37 % 65_521);
    Arc::new((0..ROWS as i64).map(value).collect::<Int64Array>())
}

fn check_common(read: &Read<'_>, magic: [u8; 8], version: u16) {
    assert_eq!(read.bytes("magic"), magic);
    assert_eq!(read.number("version"), u64::from(version));
    assert_eq!(read.number("block_rows"), BLOCK_ROWS as u64);
    assert_eq!(read.number("rows"), ROWS as u64);
    assert_eq!(read.number("blocks"), BLOCKS as u64);
    assert_eq!(read.number("length"), read.0.len() as u64);
    let at = read.number("statistics_offset") as usize;
    let length = read.number("statistics_length") as usize;
    let statistics = &read.0[at..at + length];
    let known = Read(statistics, fields("Statistics", statistics, 24));
    assert_eq!(known.number("nulls"), ROWS as u64 / 100);
    assert_eq!(known.number("bounds"), 1, "those of integers are exact");
    assert!(known.number("bounds_bytes") > 0);
    assert_eq!(known.number("sketch"), 2, "of many values it is dense");
    assert_eq!(known.number("entries"), 0);
}

#[test]
fn the_headers_of_chunks_are_as_documented() {
    let arrays = [column()];
    let bytes = encode_arrow(&arrays, &DataType::Int64).unwrap();
    let heading = format!("The arrow form, version {}\n", arrow_form::VERSION);
    let read = Read(&bytes, fields(&heading, &bytes, arrow_form::HEADER_BYTES));
    check_common(&read, arrow_form::MAGIC, arrow_form::VERSION);
    assert_eq!((read.number("nodes"), read.number("buffers")), (1, 2));

    let bytes = encode_packed(&arrays, &DataType::Int64).unwrap();
    let heading = format!("The packed form, version {}\n", packed::VERSION);
    let read = Read(&bytes, fields(&heading, &bytes, packed::HEADER_BYTES));
    check_common(&read, packed::MAGIC, packed::VERSION);
    assert_eq!(read.number("encoding"), Encoding::Integers as u64);
    assert_eq!(read.number("base"), 1_000_000);
    assert_eq!(
        (read.number("values"), read.number("shared_length")),
        (0, 0)
    );
}

#[test]
fn the_encodings_are_as_documented() {
    let text = section("The packed form, version");
    let documented: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| "))
        .filter(|line| line.starts_with(|c: char| c.is_ascii_digit()))
        .filter_map(|line| line.split(" |").next())
        .filter(|cell| cell.contains(' '))
        .collect();
    let tags = (0..=u8::MAX).map_while(|tag| Encoding::from_tag(tag).ok());
    let actual: Vec<String> = tags
        .map(|encoding| format!("{} {}", encoding as u8, encoding.name()))
        .collect();
    assert_eq!(documented, actual);
}
