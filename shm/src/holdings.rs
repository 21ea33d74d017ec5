//! What workers say to each other about what they hold: the bodies of two calls, as pure functions
//! over bytes. `docs/directory.md` describes every byte.
//!
//! - **Holdings**: everything that a worker holds, or that it knows of the whole cluster, as the
//!   bytes of a [`Directory`]; the answer waits until there is news.
//! - **Locate**: where some chunks are right now, or whether they are being loaded.

use std::collections::HashMap;
use std::sync::Arc;

use crate::directory::Directory;
use crate::format::Field;
use crate::types::{ChunkKey, ChunkLocation, FILE_KEY_BYTES_MAX, SegmentId};

/// The number of the call for [`HoldingsRequest`].
pub const HOLDINGS_METHOD: u16 = 1;
/// The number of the call for [`LocateRequest`].
pub const LOCATE_METHOD: u16 = 2;
/// Most bytes of a directory in one answer.
pub const HOLDINGS_PAGE_BYTES: usize = 8 << 20;
/// Most chunks that one call locates.
pub const LOCATE_CHUNKS_MAX: usize = 32 << 10;
/// Largest directory that is taken over from a peer.
const HOLDINGS_BYTES_MAX: u64 = 1 << 30;
/// The format of all these messages; another one is refused.
const FORMAT: u16 = 1;

/// Bytes that are no such message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed {what}: {problem}")]
pub struct Malformed {
    /// Which message was expected.
    pub what: &'static str,
    /// What does not hold, with the numbers.
    pub problem: String,
}

/// Takes fields off the front of a message, none of which may be missing.
struct Cursor<'a> {
    what: &'static str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// Begins with the format, which every message begins with.
    fn new(what: &'static str, bytes: &'a [u8]) -> Result<Cursor<'a>, Malformed> {
        let mut cursor = Cursor { what, bytes, at: 0 };
        let format: u16 = cursor.take()?;
        if format != FORMAT {
            return Err(cursor.wrong(format!(
                "format {format}, expected {FORMAT}: run the same version on all nodes"
            )));
        }
        Ok(cursor)
    }

    fn wrong(&self, problem: String) -> Malformed {
        Malformed {
            what: self.what,
            problem,
        }
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let rest = &self.bytes[self.at..];
        if count > rest.len() {
            let (at, rest) = (self.at, rest.len());
            return Err(self.wrong(format!("{count} bytes expected at {at}, {rest} are there")));
        }
        self.at += count;
        Ok(&rest[..count])
    }

    fn take<T: Field>(&mut self) -> Result<T, Malformed> {
        Ok(T::get(self.bytes(T::BYTES)?))
    }

    fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    fn end(&self) -> Result<(), Malformed> {
        match self.rest().len() {
            0 => Ok(()),
            more => Err(self.wrong(format!("{more} bytes behind its end"))),
        }
    }
}

fn put<T: Field>(bytes: &mut Vec<u8>, value: T) {
    let at = bytes.len();
    bytes.resize(at + T::BYTES, 0);
    value.put(&mut bytes[at..]);
}

/// Whose holdings are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Scope {
    /// The worker's own.
    Own = 1,
    /// Also those of its peers, as it knows them: for a query node without a worker.
    Cluster = 2,
}

/// Asks for everything that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldingsRequest {
    /// Whose.
    pub scope: Scope,
    /// How long the answer may wait for news, in milliseconds.
    pub wait_ms: u32,
    /// The revision that the asker has; 0 for none.
    pub since: u64,
    /// First byte of the page that is asked for.
    pub offset: u64,
}

/// A page of what is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldingsReply<'a> {
    /// The state that the page is of.
    pub revision: u64,
    /// Bytes of the whole directory; 0 when the asker has this revision already.
    pub total_bytes: u64,
    /// First byte of the page.
    pub offset: u64,
    /// The page.
    pub page: &'a [u8],
}

impl HoldingsRequest {
    /// The bytes of the request.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(32);
        put(&mut bytes, FORMAT);
        put(&mut bytes, self.scope as u8);
        put(&mut bytes, 0u8);
        put(&mut bytes, self.wait_ms);
        put(&mut bytes, self.since);
        put(&mut bytes, self.offset);
        put(&mut bytes, 0u64);
        bytes
    }

    /// Reads a request.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn parse(bytes: &[u8]) -> Result<HoldingsRequest, Malformed> {
        let mut cursor = Cursor::new("request for holdings", bytes)?;
        let scope = match cursor.take::<u8>()? {
            1 => Scope::Own,
            2 => Scope::Cluster,
            other => return Err(cursor.wrong(format!("scope {other}, expected 1 or 2"))),
        };
        cursor.take::<u8>()?;
        let request = HoldingsRequest {
            scope,
            wait_ms: cursor.take()?,
            since: cursor.take()?,
            offset: cursor.take()?,
        };
        cursor.take::<u64>()?;
        cursor.end()?;
        Ok(request)
    }
}

impl<'a> HoldingsReply<'a> {
    /// The answer to a request out of the directory that has that revision: the page that was asked
    /// for, or the first one if the asker was reading another state.
    pub fn of(request: &HoldingsRequest, revision: u64, directory: &'a [u8]) -> HoldingsReply<'a> {
        let offset = usize::try_from(request.offset)
            .ok()
            .filter(|offset| *offset < directory.len())
            .unwrap_or(0);
        let end = directory.len().min(offset + HOLDINGS_PAGE_BYTES);
        HoldingsReply {
            revision,
            total_bytes: directory.len() as u64,
            offset: offset as u64,
            page: &directory[offset..end],
        }
    }

    /// The answer that nothing has changed.
    pub fn unchanged(revision: u64) -> HoldingsReply<'static> {
        HoldingsReply {
            revision,
            total_bytes: 0,
            offset: 0,
            page: &[],
        }
    }

    /// The bytes of the answer.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(32 + self.page.len());
        put(&mut bytes, FORMAT);
        put(&mut bytes, [0u8; 6]);
        put(&mut bytes, self.revision);
        put(&mut bytes, self.total_bytes);
        put(&mut bytes, self.offset);
        bytes.extend_from_slice(self.page);
        bytes
    }

    /// Reads an answer.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn parse(bytes: &'a [u8]) -> Result<HoldingsReply<'a>, Malformed> {
        let mut cursor = Cursor::new("holdings", bytes)?;
        cursor.take::<[u8; 6]>()?;
        let reply = HoldingsReply {
            revision: cursor.take()?,
            total_bytes: cursor.take()?,
            offset: cursor.take()?,
            page: cursor.rest(),
        };
        let end = reply.offset.checked_add(reply.page.len() as u64);
        if end.is_none_or(|end| end > reply.total_bytes) {
            return Err(cursor.wrong(format!(
                "a page of {} bytes at {} of {}",
                reply.page.len(),
                reply.offset,
                reply.total_bytes
            )));
        }
        if reply.total_bytes > HOLDINGS_BYTES_MAX {
            return Err(cursor.wrong(format!(
                "{} bytes in all, limit {HOLDINGS_BYTES_MAX}",
                reply.total_bytes
            )));
        }
        Ok(reply)
    }
}

/// What came of one answer to [`HoldingsFetch`].
#[derive(Debug)]
// Taken apart where it is returned, once a fetch.
#[expect(clippy::large_enum_variant)]
pub enum Fetched {
    /// Ask again: pages are missing.
    More,
    /// The asker's revision is still the newest.
    Unchanged,
    /// Everything is there.
    Whole(Directory),
}

/// Fetches holdings page by page: says what to ask, takes the answers. When the state changes
/// between two pages it begins again.
#[derive(Debug)]
pub struct HoldingsFetch {
    scope: Scope,
    since: u64,
    wait_ms: u32,
    revision: u64,
    bytes: Vec<u8>,
}

impl HoldingsFetch {
    /// To fetch what is newer than the revision `since`; 0 fetches in any case.
    pub fn new(scope: Scope, since: u64, wait_ms: u32) -> HoldingsFetch {
        HoldingsFetch {
            scope,
            since,
            wait_ms,
            revision: 0,
            bytes: Vec::new(),
        }
    }

    /// The body of the next call.
    pub fn request(&self) -> Vec<u8> {
        let goes_on = !self.bytes.is_empty();
        HoldingsRequest {
            scope: self.scope,
            // Only the first page is worth waiting for.
            wait_ms: if goes_on { 0 } else { self.wait_ms },
            since: if goes_on { 0 } else { self.since },
            offset: self.bytes.len() as u64,
        }
        .to_bytes()
    }

    /// The revision of what is being, or was, fetched.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Takes the answer to [`HoldingsFetch::request`].
    ///
    /// # Errors
    /// An answer that is none, or whole holdings that are no directory.
    pub fn take(&mut self, answer: &[u8]) -> Result<Fetched, Malformed> {
        let reply = HoldingsReply::parse(answer)?;
        let wrong = |problem: String| Malformed {
            what: "holdings",
            problem,
        };
        if reply.total_bytes == 0 {
            self.bytes.clear();
            self.revision = reply.revision;
            return Ok(Fetched::Unchanged);
        }
        if reply.revision != self.revision || reply.offset != self.bytes.len() as u64 {
            self.bytes.clear();
            self.revision = reply.revision;
            if reply.offset != 0 {
                return Ok(Fetched::More);
            }
        }
        if reply.page.is_empty() {
            return Err(wrong("a page without bytes".to_owned()));
        }
        self.bytes.extend_from_slice(reply.page);
        if (self.bytes.len() as u64) < reply.total_bytes {
            return Ok(Fetched::More);
        }
        Directory::parse(std::mem::take(&mut self.bytes))
            .map(Fetched::Whole)
            .map_err(|error| wrong(error.to_string()))
    }
}

/// Asks where chunks are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocateRequest {
    /// Which, at most [`LOCATE_CHUNKS_MAX`].
    pub chunks: Vec<ChunkKey>,
}

/// Where a chunk is, as its worker says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Not there, and not on its way.
    Absent,
    /// The worker is going to load it.
    Loading,
    /// In a segment that can be read.
    Held(ChunkLocation),
}

/// Where the chunks are that were asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocateReply {
    /// The incarnation of the worker's cache directory.
    pub incarnation: u64,
    /// Whether the worker does not know yet all that it is to hold: what is absent may come.
    pub unsettled: bool,
    /// Grows whenever the worker gets further with what it is to hold.
    pub progress: u64,
    /// One for each chunk of the request, in its order.
    pub standings: Vec<Standing>,
}

const LOCATE_CHUNK_BYTES: usize = 16;
const STANDING_BYTES: usize = 48;

impl LocateRequest {
    /// The bytes of the request.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut files: Vec<&Arc<[u8]>> = Vec::new();
        let mut numbers: HashMap<&Arc<[u8]>, u32> = HashMap::new();
        let mut chunks = Vec::with_capacity(self.chunks.len() * LOCATE_CHUNK_BYTES);
        for chunk in &self.chunks {
            let number = *numbers.entry(&chunk.file).or_insert_with(|| {
                files.push(&chunk.file);
                (files.len() - 1) as u32
            });
            put(&mut chunks, number);
            put(&mut chunks, chunk.row_group);
            put(&mut chunks, chunk.column);
            put(&mut chunks, 0u32);
        }
        let mut bytes = Vec::with_capacity(chunks.len() + 4096);
        put(&mut bytes, FORMAT);
        put(&mut bytes, 0u16);
        put(&mut bytes, files.len() as u32);
        put(&mut bytes, self.chunks.len() as u32);
        put(&mut bytes, 0u32);
        for file in files {
            put(&mut bytes, file.len() as u32);
            bytes.extend_from_slice(file);
        }
        bytes.append(&mut chunks);
        bytes
    }

    /// Reads a request.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn parse(bytes: &[u8]) -> Result<LocateRequest, Malformed> {
        let mut cursor = Cursor::new("request to locate", bytes)?;
        cursor.take::<u16>()?;
        let (file_count, chunk_count): (u32, u32) = (cursor.take()?, cursor.take()?);
        cursor.take::<u32>()?;
        for (what, count) in [("files", file_count), ("chunks", chunk_count)] {
            if count as usize > LOCATE_CHUNKS_MAX {
                return Err(cursor.wrong(format!("{count} {what}, limit {LOCATE_CHUNKS_MAX}")));
            }
        }
        let mut files: Vec<Arc<[u8]>> = Vec::new();
        for _ in 0..file_count {
            let length: u32 = cursor.take()?;
            if length as usize > FILE_KEY_BYTES_MAX {
                return Err(cursor.wrong(format!(
                    "a file key of {length} bytes, limit {FILE_KEY_BYTES_MAX}"
                )));
            }
            files.push(Arc::from(cursor.bytes(length as usize)?));
        }
        let mut chunks = Vec::new();
        for _ in 0..chunk_count {
            let file: u32 = cursor.take()?;
            let (row_group, column) = (cursor.take()?, cursor.take()?);
            cursor.take::<u32>()?;
            let file = files
                .get(file as usize)
                .ok_or_else(|| cursor.wrong(format!("file {file}, there are {file_count}")))?;
            chunks.push(ChunkKey {
                file: Arc::clone(file),
                row_group,
                column,
            });
        }
        cursor.end()?;
        Ok(LocateRequest { chunks })
    }
}

impl LocateReply {
    /// The bytes of the answer.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(32 + self.standings.len() * STANDING_BYTES);
        put(&mut bytes, FORMAT);
        put(&mut bytes, u8::from(self.unsettled));
        put(&mut bytes, 0u8);
        put(&mut bytes, self.standings.len() as u32);
        put(&mut bytes, self.incarnation);
        put(&mut bytes, self.progress);
        put(&mut bytes, 0u64);
        for standing in &self.standings {
            let (code, at) = match standing {
                Standing::Absent => (0u8, None),
                Standing::Loading => (1, None),
                Standing::Held(at) => (2, Some(at)),
            };
            put(&mut bytes, code);
            put(&mut bytes, at.map_or(0, |at| at.form));
            put(&mut bytes, 0u16);
            put(&mut bytes, at.map_or(0, |at| at.rows));
            put(&mut bytes, at.map_or(0, |at| at.segment.0));
            put(&mut bytes, at.map_or(0, |at| at.offset));
            put(&mut bytes, at.map_or(0, |at| at.length));
            put(&mut bytes, at.map_or(0, |at| at.checksum));
            put(&mut bytes, 0u64);
        }
        bytes
    }

    /// Reads an answer about `expected` chunks.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn parse(bytes: &[u8], expected: usize) -> Result<LocateReply, Malformed> {
        let mut cursor = Cursor::new("locations", bytes)?;
        let unsettled = cursor.take::<u8>()? != 0;
        cursor.take::<u8>()?;
        let count: u32 = cursor.take()?;
        if count as usize != expected {
            return Err(cursor.wrong(format!("{count} chunks, asked for {expected}")));
        }
        let (incarnation, progress) = (cursor.take()?, cursor.take()?);
        cursor.take::<u64>()?;
        let mut standings = Vec::new();
        for _ in 0..count {
            let code: u8 = cursor.take()?;
            let form = cursor.take()?;
            cursor.take::<u16>()?;
            let rows = cursor.take()?;
            let location = ChunkLocation {
                segment: SegmentId(cursor.take()?),
                offset: cursor.take()?,
                length: cursor.take()?,
                form,
                checksum: cursor.take()?,
                rows,
            };
            cursor.take::<u64>()?;
            standings.push(match code {
                0 => Standing::Absent,
                1 => Standing::Loading,
                2 => Standing::Held(location),
                other => return Err(cursor.wrong(format!("standing {other}, expected 0 to 2"))),
            });
        }
        cursor.end()?;
        Ok(LocateReply {
            incarnation,
            unsettled,
            progress,
            standings,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::directory::{DirectoryBuilder, HoldingWorker};

    fn chunk(file: &[u8], row_group: u32, column: u32) -> ChunkKey {
        ChunkKey {
            file: Arc::from(file),
            row_group,
            column,
        }
    }

    fn location(n: u64) -> ChunkLocation {
        ChunkLocation {
            segment: SegmentId(n),
            offset: 64 * n,
            length: n + 1,
            form: 2,
            checksum: !n,
            rows: n as u32,
        }
    }

    fn directory(chunks: u32) -> Vec<u8> {
        let mut builder = DirectoryBuilder::new();
        let worker = builder.worker(HoldingWorker {
            id: "a".into(),
            incarnation: 3,
            addresses: vec!["127.0.0.1:1".into()],
        });
        for at in 0..chunks {
            builder.chunk(worker, b"file", at, 0, location(u64::from(at) + 1));
        }
        builder.build(9).unwrap()
    }

    #[test]
    fn holdings_arrive_page_by_page_and_begin_again_when_they_change() {
        // More than two pages.
        let large = directory(200_000);
        assert!(large.len() > 2 * HOLDINGS_PAGE_BYTES);
        let small = directory(3);
        let mut fetch = HoldingsFetch::new(Scope::Own, 4, 1000);
        let answer = |fetch: &HoldingsFetch, revision, directory: &[u8]| {
            let request = HoldingsRequest::parse(&fetch.request()).unwrap();
            HoldingsReply::of(&request, revision, directory).to_bytes()
        };
        let request = HoldingsRequest::parse(&fetch.request()).unwrap();
        assert_eq!(
            (request.since, request.wait_ms, request.offset),
            (4, 1000, 0)
        );
        let page = answer(&fetch, 7, &large);
        assert!(matches!(fetch.take(&page), Ok(Fetched::More)));
        let request = HoldingsRequest::parse(&fetch.request()).unwrap();
        assert_eq!(
            (request.since, request.wait_ms),
            (0, 0),
            "no waiting between pages"
        );
        assert_eq!(request.offset, HOLDINGS_PAGE_BYTES as u64);
        // The state has changed, and is shorter than what was read of the one before.
        let page = answer(&fetch, 8, &small);
        let Ok(Fetched::Whole(found)) = fetch.take(&page) else {
            panic!("not whole");
        };
        assert_eq!((found.chunk_count(), fetch.revision()), (3, 8));

        let mut fetch = HoldingsFetch::new(Scope::Own, 0, 0);
        let mut pages = 0;
        let found = loop {
            // After the first page it is another state of the same size.
            let page = answer(&fetch, if pages == 0 { 7 } else { 8 }, &large);
            pages += 1;
            if let Fetched::Whole(found) = fetch.take(&page).unwrap() {
                break found;
            }
        };
        assert_eq!((found.chunk_count(), fetch.revision()), (200_000, 8));
        let unchanged = HoldingsReply::unchanged(8).to_bytes();
        assert!(matches!(fetch.take(&unchanged), Ok(Fetched::Unchanged)));
    }

    #[test]
    fn locations_read_back() {
        let request = LocateRequest {
            chunks: vec![chunk(b"x", 0, 1), chunk(b"yy", 2, 3), chunk(b"x", 4, 5)],
        };
        assert_eq!(LocateRequest::parse(&request.to_bytes()).unwrap(), request);
        let reply = LocateReply {
            incarnation: 5,
            unsettled: true,
            progress: 6,
            standings: vec![
                Standing::Absent,
                Standing::Held(location(7)),
                Standing::Loading,
            ],
        };
        assert_eq!(LocateReply::parse(&reply.to_bytes(), 3).unwrap(), reply);
        assert_eq!(
            LocateReply::parse(&reply.to_bytes(), 4)
                .unwrap_err()
                .to_string(),
            "malformed locations: 3 chunks, asked for 4"
        );
    }

    /// Every byte of these messages stands in the document, and is where it says.
    #[test]
    fn messages_are_as_documented() {
        let request = HoldingsRequest {
            scope: Scope::Cluster,
            wait_ms: 0x0403_0201,
            since: 5,
            offset: 6,
        };
        let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
        let locate = LocateRequest {
            chunks: vec![chunk(b"k", 2, 3)],
        };
        let reply = LocateReply {
            incarnation: 0xa,
            unsettled: false,
            progress: 0xb,
            standings: vec![Standing::Held(location(1))],
        };
        let text =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/directory.md"))
                .unwrap();
        let holdings = HoldingsReply {
            revision: 7,
            total_bytes: 2,
            offset: 0,
            page: &[0xee, 0xff],
        };
        for (name, bytes) in [
            ("HOLDINGS request", request.to_bytes()),
            ("HOLDINGS answer", holdings.to_bytes()),
            ("LOCATE request", locate.to_bytes()),
            ("LOCATE answer", reply.to_bytes()),
        ] {
            let example = format!("{name}: {}", hex(&bytes));
            assert!(
                text.contains(&example),
                "docs/directory.md lacks {example:?}"
            );
        }
    }

    #[test]
    fn nonsense_is_refused_in_words() {
        let text = |error: Malformed| error.to_string();
        assert_eq!(
            text(HoldingsRequest::parse(&[1]).unwrap_err()),
            "malformed request for holdings: 2 bytes expected at 0, 1 are there"
        );
        let mut other = HoldingsRequest {
            scope: Scope::Own,
            wait_ms: 0,
            since: 0,
            offset: 0,
        }
        .to_bytes();
        other[2] = 9;
        assert_eq!(
            text(HoldingsRequest::parse(&other).unwrap_err()),
            "malformed request for holdings: scope 9, expected 1 or 2"
        );
        other[0] = 2;
        assert_eq!(
            text(HoldingsRequest::parse(&other).unwrap_err()),
            "malformed request for holdings: format 2, expected 1: run the same version on all nodes"
        );
        let page = HoldingsReply {
            revision: 1,
            total_bytes: 3,
            offset: 2,
            page: &[0, 0],
        };
        assert_eq!(
            text(HoldingsReply::parse(&page.to_bytes()).unwrap_err()),
            "malformed holdings: a page of 2 bytes at 2 of 3"
        );
        let endless = HoldingsReply {
            total_bytes: u64::MAX,
            ..page
        };
        assert!(text(HoldingsReply::parse(&endless.to_bytes()).unwrap_err()).contains("limit"));
        let mut many = LocateRequest::default().to_bytes();
        many[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(
            text(LocateRequest::parse(&many).unwrap_err()),
            "malformed request to locate: 4294967295 files, limit 32768"
        );
    }

    proptest! {
        #[test]
        fn parsing_anything_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..200), expected in 0usize..6) {
            for plausible in [false, true] {
                if plausible && bytes.len() > 2 {
                    bytes[..2].copy_from_slice(&FORMAT.to_le_bytes());
                }
                let _ = HoldingsRequest::parse(&bytes);
                let _ = HoldingsReply::parse(&bytes);
                let _ = LocateRequest::parse(&bytes);
                let _ = LocateReply::parse(&bytes, expected);
                let _ = HoldingsFetch::new(Scope::Own, 0, 0).take(&bytes);
            }
        }
    }
}
