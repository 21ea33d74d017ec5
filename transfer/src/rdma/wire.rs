//! The messages by which RDMA is set up: bodies of calls, and a connection request's private data.
//! `docs/transfer.md` describes them; a test compares its tables with this module.

use crate::error::RefusalKind;
use crate::segment::SegmentKey;
use crate::transport::RESERVED_METHODS;
use crate::wire::{FieldPlace, WireError, wire_struct};

/// First bytes of what sets up a connection.
pub const RDMA_MAGIC: [u8; 8] = *b"STOARDMA";
/// The other end refuses another version.
pub const RDMA_VERSION: u16 = 1;
/// Asks for a session.
pub const METHOD_OPEN: u16 = RESERVED_METHODS + 0x10;
/// Asks for segments to read in a session.
pub const METHOD_GRANT: u16 = RESERVED_METHODS + 0x11;
/// Waits for segments that are taken back; the session ends when nobody waits.
pub const METHOD_HOLD: u16 = RESERVED_METHODS + 0x12;
/// Segments in one request at most.
pub const KEYS_MAX: u32 = 4096;

wire_struct! {
    /// Body of an `OPEN` call.
    OpenRequest, 16 bytes {
        /// [`RDMA_MAGIC`], as a number.
        magic: u64,
        /// [`RDMA_VERSION`].
        version: u16,
        /// Zero.
        reserved_a: u16,
        /// Zero.
        reserved_b: u32,
    }
}

wire_struct! {
    /// Answer to an `OPEN` call.
    OpenAnswer, 32 bytes {
        /// Number of the session.
        session: u64,
        /// What the connection request has to show, once.
        token_a: u64,
        /// Its other half.
        token_b: u64,
        /// Where the server's connection manager listens.
        port: u16,
        /// Zero.
        reserved_a: u16,
        /// Zero.
        reserved_b: u32,
    }
}

wire_struct! {
    /// Private data of the connection request.
    ConnectData, 32 bytes {
        /// [`RDMA_MAGIC`], as a number.
        magic: u64,
        /// [`RDMA_VERSION`].
        version: u16,
        /// Zero.
        reserved_a: u16,
        /// Zero.
        reserved_b: u32,
        /// The token.
        token_a: u64,
        /// Its other half.
        token_b: u64,
    }
}

wire_struct! {
    /// Beginning of a `GRANT` or `HOLD` call's body; `count` keys follow.
    SessionRequest, 16 bytes {
        /// Number of the session.
        session: u64,
        /// Keys that follow; zero for `HOLD`.
        count: u32,
        /// Zero.
        reserved: u32,
    }
}

wire_struct! {
    /// A segment, in requests and in the answer to a `HOLD` call.
    KeyRow, 16 bytes {
        /// Which memory.
        incarnation: u64,
        /// Which segment in it.
        segment: u64,
    }
}

wire_struct! {
    /// A segment in the answer to a `GRANT` call; in the order of the request.
    GrantRow, 24 bytes {
        /// Address of the segment's first byte.
        address: u64,
        /// Bytes of the segment.
        length: u64,
        /// What a read has to show.
        key: u32,
        /// Zero, or the kind of refusal; then the rest is zero.
        refusal: u16,
        /// Zero.
        reserved: u16,
    }
}

/// Proof that a connection was authorised, good for one.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Token(pub(crate) [u64; 2]);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(not shown)")
    }
}

/// What a grant says of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) address: u64,
    pub(crate) length: u64,
    pub(crate) key: u32,
}

fn exactly<const N: usize>(what: &str, body: &[u8]) -> Result<[u8; N], WireError> {
    body.try_into().map_err(|_| {
        WireError::new(format!(
            "{what} of {} bytes, expected {N}",
            body.len()
        ))
    })
}

fn check_beginning(what: &str, magic: u64, version: u16) -> Result<(), WireError> {
    if magic != u64::from_le_bytes(RDMA_MAGIC) {
        return Err(WireError::new(format!(
            "{what} begins with {:02x?}, expected {RDMA_MAGIC:02x?}",
            magic.to_le_bytes()
        )));
    }
    if version != RDMA_VERSION {
        return Err(WireError::new(format!(
            "{what} is of version {version}, expected {RDMA_VERSION}; run the same release on both hosts"
        )));
    }
    Ok(())
}

/// The body of an `OPEN` call.
pub(crate) fn open_request() -> [u8; OpenRequest::BYTES] {
    OpenRequest {
        magic: u64::from_le_bytes(RDMA_MAGIC),
        version: RDMA_VERSION,
        ..OpenRequest::default()
    }
    .write()
}

/// Understands the body of an `OPEN` call.
///
/// # Errors
/// Another length, magic or version.
pub fn parse_open_request(body: &[u8]) -> Result<(), WireError> {
    let request = OpenRequest::read(&exactly("request for a session", body)?);
    check_beginning("request for a session", request.magic, request.version)
}

pub(crate) fn open_answer(session: u64, token: Token, port: u16) -> [u8; OpenAnswer::BYTES] {
    OpenAnswer {
        session,
        token_a: token.0[0],
        token_b: token.0[1],
        port,
        ..OpenAnswer::default()
    }
    .write()
}

/// Understands the answer to an `OPEN` call.
///
/// # Errors
/// Another length, or a port that is none.
pub fn parse_open_answer(body: &[u8]) -> Result<OpenAnswer, WireError> {
    let answer = OpenAnswer::read(&exactly("answer with a session", body)?);
    if answer.port == 0 {
        return Err(WireError::new("answer with a session on port 0"));
    }
    Ok(answer)
}

pub(crate) fn connect_data(token: Token) -> [u8; ConnectData::BYTES] {
    ConnectData {
        magic: u64::from_le_bytes(RDMA_MAGIC),
        version: RDMA_VERSION,
        token_a: token.0[0],
        token_b: token.0[1],
        ..ConnectData::default()
    }
    .write()
}

/// Understands a connection request's private data, behind which the connection manager may leave
/// more bytes. Returns the two halves of the token.
///
/// # Errors
/// Less bytes, another magic or version.
pub fn parse_connect_data(data: &[u8]) -> Result<[u64; 2], WireError> {
    let found = data.first_chunk().ok_or_else(|| {
        WireError::new(format!(
            "connection request with {} bytes of private data, expected {}",
            data.len(),
            ConnectData::BYTES
        ))
    })?;
    let found = ConnectData::read(found);
    check_beginning("connection request", found.magic, found.version)?;
    Ok([found.token_a, found.token_b])
}

fn key_row(key: &SegmentKey) -> [u8; KeyRow::BYTES] {
    KeyRow {
        incarnation: key.incarnation,
        segment: key.segment,
    }
    .write()
}

/// The body of a `GRANT` or `HOLD` call.
pub(crate) fn session_request(session: u64, keys: &[SegmentKey]) -> Vec<u8> {
    let head = SessionRequest {
        session,
        count: u32::try_from(keys.len()).unwrap_or(u32::MAX),
        reserved: 0,
    };
    let mut body = head.write().to_vec();
    body.extend(keys.iter().flat_map(key_row));
    body
}

/// Understands the body of a `GRANT` or `HOLD` call: the session and the keys.
///
/// # Errors
/// A length that contradicts the count, or more than [`KEYS_MAX`] keys.
pub fn parse_session_request(body: &[u8]) -> Result<(u64, Vec<SegmentKey>), WireError> {
    let (head, rows) = body
        .split_first_chunk()
        .ok_or_else(|| WireError::new(format!("request of {} bytes in a session", body.len())))?;
    let head = SessionRequest::read(head);
    if head.count > KEYS_MAX {
        return Err(WireError::new(format!(
            "request for {} segments, limit {KEYS_MAX}",
            head.count
        )));
    }
    let keys = parse_keys(rows)?;
    if keys.len() != head.count as usize {
        return Err(WireError::new(format!(
            "request for {} segments names {}",
            head.count,
            keys.len()
        )));
    }
    Ok((head.session, keys))
}

pub(crate) fn keys(keys: &[SegmentKey]) -> Vec<u8> {
    keys.iter().flat_map(key_row).collect()
}

/// Understands rows of keys: the answer to a `HOLD` call.
///
/// # Errors
/// A body that is no whole number of rows.
pub fn parse_keys(body: &[u8]) -> Result<Vec<SegmentKey>, WireError> {
    let (rows, rest) = body.as_chunks::<{ KeyRow::BYTES }>();
    if !rest.is_empty() {
        return Err(WireError::new(format!(
            "{} bytes of keys, expected a multiple of {}",
            body.len(),
            KeyRow::BYTES
        )));
    }
    Ok(rows
        .iter()
        .map(KeyRow::read)
        .map(|row| SegmentKey {
            incarnation: row.incarnation,
            segment: row.segment,
        })
        .collect())
}

pub(crate) fn grants(grants: &[Result<Grant, RefusalKind>]) -> Vec<u8> {
    grants
        .iter()
        .flat_map(|grant| {
            match grant {
                Ok(grant) => GrantRow {
                    address: grant.address,
                    length: grant.length,
                    key: grant.key,
                    ..GrantRow::default()
                },
                Err(kind) => GrantRow {
                    refusal: kind.code(),
                    ..GrantRow::default()
                },
            }
            .write()
        })
        .collect()
}

/// Understands the answer to a `GRANT` call for `expected` segments.
///
/// # Errors
/// Another number of rows; memory that ends behind the last address.
pub(crate) fn parse_grants(
    body: &[u8],
    expected: usize,
) -> Result<Vec<Result<Grant, RefusalKind>>, WireError> {
    let (rows, rest) = body.as_chunks::<{ GrantRow::BYTES }>();
    if !rest.is_empty() || rows.len() != expected {
        return Err(WireError::new(format!(
            "answer of {} bytes for {expected} segments, expected {}",
            body.len(),
            expected * GrantRow::BYTES
        )));
    }
    rows.iter()
        .map(|row| {
            let row = GrantRow::read(row);
            if row.refusal != 0 {
                return Ok(Err(
                    RefusalKind::from_code(row.refusal).unwrap_or(RefusalKind::Failed)
                ));
            }
            if row.address.checked_add(row.length).is_none() {
                return Err(WireError::new(format!(
                    "a segment of {} bytes at address {:#x}",
                    row.length, row.address
                )));
            }
            Ok(Ok(Grant {
                address: row.address,
                length: row.length,
                key: row.key,
            }))
        })
        .collect()
}

/// Understands any message of this module; for fuzzing.
#[doc(hidden)]
pub fn parse_any(body: &[u8]) {
    // What comes of it does not matter here; that nothing panics does.
    let _ = parse_open_request(body);
    let _ = parse_open_answer(body);
    let _ = parse_connect_data(body);
    let _ = parse_session_request(body);
    let _ = parse_keys(body);
    let _ = parse_grants(body, body.len() / GrantRow::BYTES);
}
