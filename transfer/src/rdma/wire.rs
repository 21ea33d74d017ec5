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
pub struct Token(pub [u64; 2]);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(not shown)")
    }
}

/// What a grant says of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Address of the segment's first byte in the server.
    pub address: u64,
    /// Bytes of the segment.
    pub length: u64,
    /// What a read has to show.
    pub key: u32,
}

fn exactly<const N: usize>(what: &str, body: &[u8]) -> Result<[u8; N], WireError> {
    body.try_into()
        .map_err(|_| WireError::new(format!("{what} of {} bytes, expected {N}", body.len())))
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
pub fn open_request() -> [u8; OpenRequest::BYTES] {
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

/// The answer to an `OPEN` call.
pub fn open_answer(session: u64, token: Token, port: u16) -> [u8; OpenAnswer::BYTES] {
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

/// Private data of a connection request.
pub fn connect_data(token: Token) -> [u8; ConnectData::BYTES] {
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
pub fn session_request(session: u64, keys: &[SegmentKey]) -> Vec<u8> {
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

/// The answer to a `HOLD` call.
pub fn keys(keys: &[SegmentKey]) -> Vec<u8> {
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

/// The answer to a `GRANT` call.
pub fn grants(grants: &[Result<Grant, RefusalKind>]) -> Vec<u8> {
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
pub fn parse_grants(
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A table that drifts from the code is worse than none.
    #[test]
    fn documented_offsets_are_the_constants() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/transfer.md");
        let text = std::fs::read_to_string(path).unwrap();
        let structures: [(&str, usize, &[FieldPlace]); 6] = [
            ("OpenRequest", OpenRequest::BYTES, &OpenRequest::FIELDS),
            ("OpenAnswer", OpenAnswer::BYTES, &OpenAnswer::FIELDS),
            ("ConnectData", ConnectData::BYTES, &ConnectData::FIELDS),
            (
                "SessionRequest",
                SessionRequest::BYTES,
                &SessionRequest::FIELDS,
            ),
            ("KeyRow", KeyRow::BYTES, &KeyRow::FIELDS),
            ("GrantRow", GrantRow::BYTES, &GrantRow::FIELDS),
        ];
        for (name, bytes, fields) in structures {
            let heading = format!("### `{name}`, {bytes} bytes\n");
            let section = text
                .split_once(&heading)
                .unwrap_or_else(|| panic!("docs/transfer.md has no heading {heading:?}"))
                .1
                .split("\n#")
                .next()
                .unwrap_or_default();
            let rows: Vec<&str> = section
                .lines()
                .filter(|line| line.starts_with("| ") && !line.starts_with("| offset"))
                .collect();
            assert_eq!(rows.len(), fields.len(), "{name} in docs/transfer.md");
            for (row, (field, offset, size)) in rows.iter().zip(fields) {
                let expected = format!("| {offset} | {size} | `{field}` | ");
                assert!(row.starts_with(&expected), "{name}: {row:?}, {expected:?}");
            }
        }
        for (name, value) in [
            ("RDMA_MAGIC", RDMA_MAGIC.escape_ascii().to_string()),
            ("RDMA_VERSION", RDMA_VERSION.to_string()),
            ("METHOD_OPEN", METHOD_OPEN.to_string()),
            ("METHOD_GRANT", METHOD_GRANT.to_string()),
            ("METHOD_HOLD", METHOD_HOLD.to_string()),
            ("KEYS_MAX", KEYS_MAX.to_string()),
        ] {
            let row = format!("| `{name}` | {value} |");
            assert!(text.contains(&row), "docs/transfer.md lacks {row:?}");
        }
    }

    /// The bytes themselves: code that writes and reads alike proves nothing about them.
    #[test]
    fn messages_are_these_bytes() {
        let open = open_request();
        assert_eq!(&open, b"STOARDMA\x01\0\0\0\0\0\0\0");
        let token = Token([0x0102, 0x0304]);
        let answer = open_answer(7, token, 4791);
        assert_eq!(answer[..8], [7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(answer[8..10], [2, 1]);
        assert_eq!(answer[16..18], [4, 3]);
        assert_eq!(answer[24..], [0xb7, 0x12, 0, 0, 0, 0, 0, 0]);
        let connect = connect_data(token);
        assert_eq!(connect[..16], open);
        assert_eq!(connect[16..18], [2, 1]);
        let key = SegmentKey {
            incarnation: 5,
            segment: 6,
        };
        let request = session_request(7, &[key]);
        assert_eq!(request[..12], [7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(
            request[16..],
            [5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]
        );
        let grant = Grant {
            address: 0x1000,
            length: 2,
            key: 0x0a0b,
        };
        let rows = grants(&[Ok(grant), Err(RefusalKind::UnknownSegment)]);
        assert_eq!(rows[..2], [0, 0x10]);
        assert_eq!(
            rows[8..24],
            [2, 0, 0, 0, 0, 0, 0, 0, 0x0b, 0x0a, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(rows[24..], {
            let mut refused = [0; 24];
            refused[20] = 1;
            refused
        });
    }

    #[test]
    fn what_is_not_this_protocol_is_said() {
        let text = |error: WireError| error.to_string();
        let mut open = open_request();
        open[8] = 2;
        let error = text(parse_open_request(&open).unwrap_err());
        assert!(error.contains("version 2, expected 1"), "{error}");
        open[0] = b'X';
        let error = text(parse_open_request(&open).unwrap_err());
        assert!(error.contains("begins with"), "{error}");
        let error = text(parse_open_request(&open[1..]).unwrap_err());
        assert!(error.contains("of 15 bytes, expected 16"), "{error}");
        let error = text(parse_connect_data(&[0; 31]).unwrap_err());
        assert!(error.contains("31 bytes of private data"), "{error}");
        let mut request = session_request(1, &[]);
        request[8] = 1;
        let error = text(parse_session_request(&request).unwrap_err());
        assert!(error.contains("for 1 segments names 0"), "{error}");
        request[10] = 1;
        let error = text(parse_session_request(&request).unwrap_err());
        assert!(error.contains("limit 4096"), "{error}");
        let wraps = Grant {
            address: u64::MAX,
            length: 2,
            key: 1,
        };
        let error = text(parse_grants(&grants(&[Ok(wraps)]), 1).unwrap_err());
        assert!(error.contains("2 bytes at address"), "{error}");
        let error = text(parse_grants(&grants(&[Ok(wraps)]), 2).unwrap_err());
        assert!(
            error.contains("answer of 24 bytes for 2 segments"),
            "{error}"
        );
    }

    #[test]
    fn tokens_are_not_shown() {
        let shown = format!("{:?}", Token([0xDEAD, 0xBEEF]));
        assert!(
            !shown.contains("57005") && !shown.contains("dead"),
            "{shown}"
        );
    }

    proptest! {
        #[test]
        fn messages_come_back(
            session in any::<u64>(),
            keys in prop::collection::vec((any::<u64>(), any::<u64>()), 0..20),
            data in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let keys: Vec<SegmentKey> = keys
                .into_iter()
                .map(|(incarnation, segment)| SegmentKey { incarnation, segment })
                .collect();
            let body = session_request(session, &keys);
            prop_assert_eq!(parse_session_request(&body).unwrap(), (session, keys.clone()));
            prop_assert_eq!(parse_keys(&super::keys(&keys)).unwrap(), keys);
            let token = Token([session, !session]);
            let mut connect = connect_data(token).to_vec();
            connect.extend(&data);
            prop_assert_eq!(parse_connect_data(&connect).unwrap(), token.0);
            let answer = open_answer(session, token, 1 + (session as u16 >> 1));
            prop_assert_eq!(parse_open_answer(&answer).unwrap().session, session);
        }
    }
}
