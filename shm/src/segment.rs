//! A segment as bytes: header, chunks, self-describing footer.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::format::{
    ENDIAN_MARK, FORMAT_MAJOR, FORMAT_MINOR, FooterEntry, KIND_CATALOG, KIND_CHUNK, SEGMENT_MAGIC,
    SegmentHeader, check_preamble, check_section, hash,
};
use crate::index::check_range_in;
use crate::types::{CatalogLocation, ChunkKey, ChunkLocation, SegmentId};

/// The header of a segment, checked against its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentGeometry {
    pub(crate) id: SegmentId,
    pub(crate) file_bytes: u64,
    /// Where chunks end and the footer begins.
    pub(crate) data_end: u64,
    entries: u32,
}

impl SegmentGeometry {
    /// Checks the header of the segment file `path`, which should be `id`.
    pub(crate) fn parse(path: &Path, bytes: &[u8], id: SegmentId) -> Result<Self> {
        check_preamble(path, bytes, SEGMENT_MAGIC, SegmentHeader::BYTES)?;
        let header = SegmentHeader::read_checked(bytes, 0)
            .ok_or_else(|| Error::corrupt(path, "check of the segment header does not match"))?;
        if header.segment != id.0 {
            let found = SegmentId(header.segment);
            return Err(Error::corrupt(
                path,
                format!("holds segment {found}, expected {id}"),
            ));
        }
        if header.file_bytes != bytes.len() as u64 {
            return Err(Error::corrupt(
                path,
                format!(
                    "file has {} bytes, expected {}",
                    bytes.len(),
                    header.file_bytes
                ),
            ));
        }
        check_section(
            "footer",
            header.footer_offset,
            u64::from(header.entries),
            FooterEntry::BYTES as u64,
            SegmentHeader::BYTES as u64,
            header.file_bytes,
        )
        .map_err(|problem| Error::corrupt(path, problem))?;
        Ok(SegmentGeometry {
            id,
            file_bytes: header.file_bytes,
            data_end: header.footer_offset,
            entries: header.entries,
        })
    }

    /// What the footer says lies in the segment; damaged entries come as what is wrong with them.
    pub(crate) fn contents(&self, bytes: &[u8]) -> Vec<Result<Content, String>> {
        let mut files: HashMap<(u64, u32), Arc<[u8]>> = HashMap::new();
        (0..self.entries)
            .map(|at| {
                let start = self.data_end as usize + at as usize * FooterEntry::BYTES;
                let row = &bytes[start..start + FooterEntry::BYTES];
                self.content(bytes, row, &mut files)
                    .map_err(|problem| format!("footer entry {at}: {problem}"))
            })
            .collect()
    }

    fn content(
        &self,
        bytes: &[u8],
        row: &[u8],
        files: &mut HashMap<(u64, u32), Arc<[u8]>>,
    ) -> Result<Content, String> {
        let entry = FooterEntry::read(row);
        let keys_from = self.data_end + u64::from(self.entries) * FooterEntry::BYTES as u64;
        let key_end = entry
            .key_offset
            .checked_add(u64::from(entry.key_bytes))
            .filter(|end| entry.key_offset >= keys_from && *end <= self.file_bytes)
            .ok_or("its key lies outside of the key area")?;
        let key = &bytes[entry.key_offset as usize..key_end as usize];
        if FooterEntry::read_checked(row, hash(key)).is_none() {
            return Err("check does not match".to_string());
        }
        check_range_in(entry.offset, entry.length, self.id, self.data_end)?;
        match entry.kind {
            KIND_CHUNK => Ok(Content::Chunk(
                ChunkKey {
                    file: files
                        .entry((entry.key_offset, entry.key_bytes))
                        .or_insert_with(|| Arc::from(key))
                        .clone(),
                    row_group: entry.row_group,
                    column: entry.column,
                },
                ChunkLocation {
                    segment: self.id,
                    offset: entry.offset,
                    length: entry.length,
                    form: entry.form,
                    checksum: entry.checksum,
                    rows: entry.rows,
                },
            )),
            KIND_CATALOG => Ok(Content::Catalog(
                String::from_utf8(key.to_vec()).map_err(|_| "its name is not UTF-8")?,
                CatalogLocation {
                    segment: self.id,
                    offset: entry.offset,
                    length: entry.length,
                    checksum: entry.checksum,
                },
            )),
            kind => Err(format!("kind {kind} is unknown")),
        }
    }
}

/// Something that a segment holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Chunk(ChunkKey, ChunkLocation),
    Catalog(String, CatalogLocation),
}

/// The footer under construction.
#[derive(Debug, Default)]
pub(crate) struct Footer {
    entries: Vec<(FooterEntry, u64)>,
    keys: Vec<u8>,
    interned: HashMap<Arc<[u8]>, u64>,
}

impl Footer {
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn push_chunk(&mut self, key: &ChunkKey, location: &ChunkLocation) {
        let key_offset = match self.interned.get(&key.file) {
            Some(&offset) => offset,
            None => {
                let offset = self.keys.len() as u64;
                self.keys.extend_from_slice(&key.file);
                self.interned.insert(key.file.clone(), offset);
                offset
            }
        };
        let entry = FooterEntry {
            kind: KIND_CHUNK,
            form: location.form,
            rows: location.rows,
            row_group: key.row_group,
            column: key.column,
            key_offset,
            key_bytes: key.file.len() as u32,
            offset: location.offset,
            length: location.length,
            checksum: location.checksum,
            ..FooterEntry::default()
        };
        self.entries.push((entry, hash(&key.file)));
    }

    pub(crate) fn push_catalog(&mut self, name: &str, location: &CatalogLocation) {
        let entry = FooterEntry {
            kind: KIND_CATALOG,
            key_offset: self.keys.len() as u64,
            key_bytes: name.len() as u32,
            offset: location.offset,
            length: location.length,
            checksum: location.checksum,
            ..FooterEntry::default()
        };
        self.keys.extend_from_slice(name.as_bytes());
        self.entries.push((entry, hash(name.as_bytes())));
    }

    /// Bytes of the footer and of the header, for a segment whose data end at `data_end`.
    pub(crate) fn finish(
        &self,
        id: SegmentId,
        data_end: u64,
    ) -> (Vec<u8>, [u8; SegmentHeader::BYTES]) {
        let keys_from = data_end + (self.entries.len() * FooterEntry::BYTES) as u64;
        let mut footer =
            Vec::with_capacity(self.entries.len() * FooterEntry::BYTES + self.keys.len() + 64);
        for (entry, key_hash) in &self.entries {
            let entry = FooterEntry {
                key_offset: keys_from + entry.key_offset,
                ..*entry
            };
            footer.extend_from_slice(&entry.to_bytes(*key_hash));
        }
        footer.extend_from_slice(&self.keys);
        footer.resize(footer.len().next_multiple_of(64), 0);
        let header = SegmentHeader {
            magic: SEGMENT_MAGIC,
            format_major: FORMAT_MAJOR,
            format_minor: FORMAT_MINOR,
            endian_mark: ENDIAN_MARK,
            segment: id.0,
            file_bytes: data_end + footer.len() as u64,
            footer_offset: data_end,
            entries: self.entries.len() as u32,
            ..SegmentHeader::default()
        };
        (footer, header.to_bytes(0))
    }
}
