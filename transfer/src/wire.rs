//! The bytes between two hosts: structures, and parsers that are pure functions over bytes.
//! `docs/transfer.md` describes all of it; a test compares its tables with this module.

use std::fmt;

use twox_hash::XxHash3_64;

use crate::error::{Refusal, RefusalKind};

/// First bytes of a connection, both ways.
pub const WIRE_MAGIC: [u8; 8] = *b"STOAXFER";
/// The other end refuses another major version.
pub const WIRE_MAJOR: u16 = 1;
/// The other end accepts any minor version of its major one.
pub const WIRE_MINOR: u16 = 0;
/// Bytes of one read at most, whatever the settings say.
pub const READ_BYTES_MAX: u64 = 1 << 30;
/// Bytes of a call's or an answer's body at most, whatever the settings say.
pub const CALL_BYTES_MAX: u64 = 16 << 20;
/// Bytes of a refusal's text at most.
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Reads in one frame at most.
pub const READS_PER_FRAME_MAX: u32 = 4096;

/// A bit of a server's `features`: it refuses, and a `GOODBYE` that says why follows at once.
pub const HELLO_REFUSES: u32 = 1;

/// Why bytes are not what the protocol says: what was found, and what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WireError(String);

impl WireError {
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// Name, offset and size of a field.
pub type FieldPlace = (&'static str, usize, usize);

/// Declares a structure of `$total` bytes without padding: a value with public fields, its bytes,
/// and the place of each field.
macro_rules! wire_struct {
    ($(#[$meta:meta])* $name:ident, $total:literal bytes { $($(#[$field_meta:meta])* $field:ident : $ty:ty),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name { $($(#[$field_meta])* pub $field: $ty),+ }

        impl $name {
            /// Size of the structure.
            pub const BYTES: usize = $total;
            const FIELD_COUNT: usize = [$(stringify!($field)),+].len();
            /// Where each field lies.
            pub const FIELDS: [FieldPlace; Self::FIELD_COUNT] = {
                let mut at = 0;
                let fields = [$({
                    let offset = at;
                    at += size_of::<$ty>();
                    assert!(offset.is_multiple_of(align_of::<$ty>()), "a field is not aligned");
                    (stringify!($field), offset, size_of::<$ty>())
                }),+];
                assert!(at == $total, "fields do not fill the structure");
                fields
            };

            fn read(bytes: &[u8; $total]) -> Self {
                let mut rest = &bytes[..];
                $(
                    let (field, behind) = rest.split_at(size_of::<$ty>());
                    rest = behind;
                    let mut number = [0; size_of::<$ty>()];
                    number.copy_from_slice(field);
                    let $field = <$ty>::from_le_bytes(number);
                )+
                debug_assert!(rest.is_empty());
                Self { $($field),+ }
            }

            fn write(&self) -> [u8; $total] {
                let mut bytes = [0; $total];
                let mut rest = &mut bytes[..];
                $(
                    let (field, behind) = rest.split_at_mut(size_of::<$ty>());
                    field.copy_from_slice(&self.$field.to_le_bytes());
                    rest = behind;
                )+
                debug_assert!(rest.is_empty());
                bytes
            }
        }
    };
}

// The messages that set up RDMA are declared the same way.
#[cfg(any(test, feature = "rdma", feature = "conformance"))]
pub(crate) use wire_struct;

wire_struct! {
    /// The first bytes of each side.
    Hello, 48 bytes {
        /// [`WIRE_MAGIC`], as a number.
        magic: u64,
        /// [`WIRE_MAJOR`].
        major: u16,
        /// [`WIRE_MINOR`].
        minor: u16,
        /// Bits of later minor versions.
        features: u32,
        /// The server's limit of one read.
        read_bytes_max: u64,
        /// The server's limit of a call's body.
        call_bytes_max: u64,
        /// Zero.
        reserved: u64,
        /// Check of what is before.
        check: u64,
    }
}

wire_struct! {
    /// What is before every body.
    FrameHeader, 40 bytes {
        /// A [`FrameKind`].
        kind: u8,
        /// Zero.
        flags: u8,
        /// Method, or kind of refusal.
        code: u16,
        /// Rows or requests.
        count: u32,
        /// Number of the (first) request.
        request: u64,
        /// Bytes behind the header.
        body_bytes: u64,
        /// The memory that rows mean.
        incarnation: u64,
        /// Check of what is before.
        check: u64,
    }
}

wire_struct! {
    /// One read of a `READS` frame.
    ReadRow, 24 bytes {
        /// Which segment.
        segment: u64,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    }
}

/// Check of all bytes before the last eight.
fn check_of(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(&bytes[..bytes.len() - 8])
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Asks for ranges.
    Reads = 1,
    /// Asks an upper layer.
    Call = 2,
    /// Takes requests back.
    Cancel = 3,
    /// Bytes of a range.
    Data = 16,
    /// Answer of an upper layer.
    Answer = 17,
    /// A request is refused.
    Refused = 18,
    /// The connection ends.
    Goodbye = 19,
}

impl FrameKind {
    /// Every kind there is.
    pub const ALL: [Self; 7] = [
        Self::Reads,
        Self::Call,
        Self::Cancel,
        Self::Data,
        Self::Answer,
        Self::Refused,
        Self::Goodbye,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl Hello {
    /// A hello of this version.
    pub fn new(read_bytes_max: u64, call_bytes_max: u64) -> Self {
        Self {
            magic: u64::from_le_bytes(WIRE_MAGIC),
            major: WIRE_MAJOR,
            minor: WIRE_MINOR,
            read_bytes_max,
            call_bytes_max,
            ..Self::default()
        }
    }

    /// The bytes, with their check.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = self.write();
        let check = check_of(&bytes);
        bytes[Self::BYTES - 8..].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// Understands the other side's hello, in the order in which it can be understood.
    ///
    /// # Errors
    /// Another magic, another major version, or a wrong check.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Result<Self, WireError> {
        let hello = Self::read(bytes);
        if hello.magic != u64::from_le_bytes(WIRE_MAGIC) {
            return Err(WireError::new(format!(
                "it begins with \"{}\", expected \"{}\"; is this the address of something else?",
                bytes[..8].escape_ascii(),
                WIRE_MAGIC.escape_ascii()
            )));
        }
        if hello.major != WIRE_MAJOR {
            return Err(WireError::new(format!(
                "it speaks version {}.{}, this end {WIRE_MAJOR}.{WIRE_MINOR}; run one major version on all hosts",
                hello.major, hello.minor
            )));
        }
        if hello.check != check_of(bytes) {
            return Err(WireError::new(format!(
                "the check of its hello is {:016x}, expected {:016x}",
                hello.check,
                check_of(bytes)
            )));
        }
        Ok(hello)
    }
}

impl FrameHeader {
    /// A header of `kind` for one request.
    pub fn new(kind: FrameKind, code: u16, request: u64, body_bytes: u64) -> Self {
        Self {
            kind: kind as u8,
            code,
            count: 1,
            request,
            body_bytes,
            ..Self::default()
        }
    }

    /// The bytes, with their check.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = self.write();
        let check = check_of(&bytes);
        bytes[Self::BYTES - 8..].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// The fields, where the check is right.
    fn parse(bytes: &[u8; Self::BYTES]) -> Result<(FrameKind, Self), WireError> {
        let header = Self::read(bytes);
        if header.check != check_of(bytes) {
            return Err(WireError::new(format!(
                "the check of a frame is {:016x}, expected {:016x}",
                header.check,
                check_of(bytes)
            )));
        }
        let kind = FrameKind::from_byte(header.kind).ok_or_else(|| {
            WireError::new(format!(
                "a frame is of kind {}, which is not known",
                header.kind
            ))
        })?;
        Ok((kind, header))
    }
}

/// The limits that a frame is compared with before memory is taken for its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLimits {
    /// Of one read.
    pub read_bytes_max: u64,
    /// Of a call's or an answer's body.
    pub call_bytes_max: u64,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self {
            read_bytes_max: READ_BYTES_MAX,
            call_bytes_max: CALL_BYTES_MAX,
        }
    }
}

/// A frame of the client, without its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestHead {
    /// `rows` rows follow, of numbers from `first` on.
    Reads {
        /// Number of the first.
        first: u64,
        /// How many.
        rows: u32,
        /// The memory that they mean.
        incarnation: u64,
    },
    /// A body of `body_bytes` follows.
    Call {
        /// Its number.
        request: u64,
        /// Its method.
        method: u16,
        /// Its bytes.
        body_bytes: u64,
    },
    /// Nothing follows.
    Cancel {
        /// Number of the first.
        first: u64,
        /// How many.
        count: u32,
    },
}

impl RequestHead {
    /// Understands what a client sent.
    ///
    /// # Errors
    /// A wrong check, a kind that no client sends, a count or length that contradicts another one
    /// or is over its limit.
    pub fn parse(bytes: &[u8; FrameHeader::BYTES], limits: FrameLimits) -> Result<Self, WireError> {
        let (kind, header) = FrameHeader::parse(bytes)?;
        let numbers_end = header.request.checked_add(u64::from(header.count));
        if header.count == 0 || numbers_end.is_none() {
            return Err(WireError::new(format!(
                "a {kind} frame has {} requests from number {} on",
                header.count, header.request
            )));
        }
        let contradiction = |expected: u64| {
            WireError::new(format!(
                "a {kind} frame of {} requests has a body of {} bytes, expected {expected}",
                header.count, header.body_bytes
            ))
        };
        match kind {
            FrameKind::Reads => {
                if header.count > READS_PER_FRAME_MAX {
                    return Err(WireError::new(format!(
                        "a {kind} frame has {} rows, limit {READS_PER_FRAME_MAX}",
                        header.count
                    )));
                }
                let expected = u64::from(header.count) * ReadRow::BYTES as u64;
                if header.body_bytes != expected {
                    return Err(contradiction(expected));
                }
                Ok(Self::Reads {
                    first: header.request,
                    rows: header.count,
                    incarnation: header.incarnation,
                })
            }
            FrameKind::Call => {
                if header.body_bytes > limits.call_bytes_max || header.count != 1 {
                    return Err(WireError::new(format!(
                        "{} calls of {} bytes in a frame, limit one of {}",
                        header.count, header.body_bytes, limits.call_bytes_max
                    )));
                }
                Ok(Self::Call {
                    request: header.request,
                    method: header.code,
                    body_bytes: header.body_bytes,
                })
            }
            FrameKind::Cancel => {
                if header.body_bytes != 0 {
                    return Err(contradiction(0));
                }
                Ok(Self::Cancel {
                    first: header.request,
                    count: header.count,
                })
            }
            FrameKind::Data | FrameKind::Answer | FrameKind::Refused | FrameKind::Goodbye => {
                Err(WireError::new(format!("a {kind} frame came from a client")))
            }
        }
    }
}

/// The rows of a `READS` frame's body.
///
/// # Errors
/// A body that is no whole number of rows.
pub fn parse_rows(body: &[u8]) -> Result<impl Iterator<Item = ReadRow>, WireError> {
    let (rows, rest) = body.as_chunks::<{ ReadRow::BYTES }>();
    if !rest.is_empty() {
        return Err(WireError::new(format!(
            "{} bytes of rows, expected a multiple of {}",
            body.len(),
            ReadRow::BYTES
        )));
    }
    Ok(rows.iter().map(ReadRow::read))
}

/// A `READS` frame.
///
/// # Panics
/// On no rows, or more than [`READS_PER_FRAME_MAX`].
pub fn reads_frame(first: u64, incarnation: u64, rows: &[ReadRow]) -> Vec<u8> {
    let count = u32::try_from(rows.len()).expect("few enough rows");
    assert!((1..=READS_PER_FRAME_MAX).contains(&count));
    let body_bytes = rows.len() * ReadRow::BYTES;
    let header = FrameHeader {
        count,
        incarnation,
        ..FrameHeader::new(FrameKind::Reads, 0, first, body_bytes as u64)
    };
    let mut frame = Vec::with_capacity(FrameHeader::BYTES + body_bytes);
    frame.extend_from_slice(&header.to_bytes());
    for row in rows {
        frame.extend_from_slice(&row.write());
    }
    frame
}

/// A frame of the server, without its body of `body_bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseHead {
    /// Bytes of a range.
    Data {
        /// Number of the read.
        request: u64,
        /// How many bytes.
        body_bytes: u64,
    },
    /// Answer to a call.
    Answer {
        /// Number of the call.
        request: u64,
        /// How many bytes.
        body_bytes: u64,
    },
    /// A request is refused; a text follows.
    Refused {
        /// Number of the request.
        request: u64,
        /// Why.
        kind: RefusalKind,
        /// How many bytes.
        body_bytes: u64,
    },
    /// The connection ends; a text follows.
    Goodbye {
        /// Why.
        kind: RefusalKind,
        /// How many bytes.
        body_bytes: u64,
    },
}

impl ResponseHead {
    /// Understands what a server sent.
    ///
    /// # Errors
    /// A wrong check, a kind that no server sends, a length over its limit.
    pub fn parse(bytes: &[u8; FrameHeader::BYTES], limits: FrameLimits) -> Result<Self, WireError> {
        let (kind, header) = FrameHeader::parse(bytes)?;
        let (request, body_bytes) = (header.request, header.body_bytes);
        let limit = match kind {
            FrameKind::Data => limits.read_bytes_max,
            FrameKind::Answer => limits.call_bytes_max,
            FrameKind::Refused | FrameKind::Goodbye => MESSAGE_BYTES_MAX as u64,
            FrameKind::Reads | FrameKind::Call | FrameKind::Cancel => {
                return Err(WireError::new(format!("a {kind} frame came from a server")));
            }
        };
        if body_bytes > limit {
            return Err(WireError::new(format!(
                "a {kind} frame has {body_bytes} bytes, limit {limit}"
            )));
        }
        let refusal = RefusalKind::from_code(header.code).unwrap_or(RefusalKind::Failed);
        Ok(match kind {
            FrameKind::Data => Self::Data {
                request,
                body_bytes,
            },
            FrameKind::Answer => Self::Answer {
                request,
                body_bytes,
            },
            FrameKind::Refused => Self::Refused {
                request,
                kind: refusal,
                body_bytes,
            },
            _ => Self::Goodbye {
                kind: refusal,
                body_bytes,
            },
        })
    }

    /// Bytes behind the header.
    pub fn body_bytes(&self) -> u64 {
        match *self {
            Self::Data { body_bytes, .. }
            | Self::Answer { body_bytes, .. }
            | Self::Refused { body_bytes, .. }
            | Self::Goodbye { body_bytes, .. } => body_bytes,
        }
    }
}

/// The frame of a refusal: `kind` is [`FrameKind::Refused`] or [`FrameKind::Goodbye`]. A text that
/// is too long is cut.
pub fn refusal_frame(kind: FrameKind, request: u64, refusal: &Refusal) -> Vec<u8> {
    let text = &refusal.message[..refusal.message.floor_char_boundary(MESSAGE_BYTES_MAX)];
    let header = FrameHeader::new(kind, refusal.kind.code(), request, text.len() as u64);
    let mut frame = header.to_bytes().to_vec();
    frame.extend_from_slice(text.as_bytes());
    frame
}

/// A peer's text, made safe to show: no control characters, whatever the peer sent.
pub fn message(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transport::RESERVED_METHODS;

    const STRUCTURES: [(&str, usize, &[FieldPlace]); 3] = [
        ("Hello", Hello::BYTES, &Hello::FIELDS),
        ("FrameHeader", FrameHeader::BYTES, &FrameHeader::FIELDS),
        ("ReadRow", ReadRow::BYTES, &ReadRow::FIELDS),
    ];

    fn document() -> String {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/transfer.md");
        std::fs::read_to_string(path).unwrap()
    }

    /// A table that drifts from the code is worse than none.
    #[test]
    fn documented_offsets_are_the_constants() {
        let text = document();
        for (name, bytes, fields) in STRUCTURES {
            let heading = format!("`{name}`, {bytes} bytes");
            let section = text
                .split("\n### ")
                .find(|section| section.starts_with(&heading))
                .unwrap_or_else(|| panic!("docs/transfer.md has no heading `### {heading}`"));
            let documented: Vec<(String, usize, usize)> = section
                .lines()
                .filter_map(|line| {
                    let cells: Vec<&str> = line.split('|').map(str::trim).collect();
                    let [_, offset, size, field, meaning, _] = cells[..] else {
                        return None;
                    };
                    let (offset, size) = (offset.parse().ok()?, size.parse().ok()?);
                    assert!(!meaning.is_empty(), "{name}.{field} has no meaning");
                    Some((field.trim_matches('`').to_string(), offset, size))
                })
                .collect();
            let actual: Vec<(String, usize, usize)> = fields
                .iter()
                .map(|&(field, offset, size)| (field.to_string(), offset, size))
                .collect();
            assert_eq!(documented, actual, "{name} in docs/transfer.md differs");
        }
    }

    #[test]
    fn documented_constants_kinds_and_codes_are_the_constants() {
        let text = document();
        let mut rows = vec![
            ("WIRE_MAGIC", WIRE_MAGIC.escape_ascii().to_string()),
            ("WIRE_MAJOR", WIRE_MAJOR.to_string()),
            ("WIRE_MINOR", WIRE_MINOR.to_string()),
            ("READ_BYTES_MAX", READ_BYTES_MAX.to_string()),
            ("CALL_BYTES_MAX", CALL_BYTES_MAX.to_string()),
            ("MESSAGE_BYTES_MAX", MESSAGE_BYTES_MAX.to_string()),
            ("READS_PER_FRAME_MAX", READS_PER_FRAME_MAX.to_string()),
            ("HELLO_REFUSES", HELLO_REFUSES.to_string()),
            ("RESERVED_METHODS", RESERVED_METHODS.to_string()),
        ];
        rows.extend(RefusalKind::ALL.map(|kind| (kind.as_str(), kind.code().to_string())));
        let kinds = FrameKind::ALL.map(|kind| (kind.to_string().to_uppercase(), kind as u8));
        rows.extend(
            kinds
                .iter()
                .map(|(name, byte)| (name.as_str(), byte.to_string())),
        );
        for (name, value) in rows {
            let row = format!("| `{name}` | {value} |");
            assert!(
                text.contains(&row),
                "docs/transfer.md lacks the row {row:?}"
            );
        }
    }

    /// The bytes themselves, so that a change of field order or byte order cannot hide behind
    /// code that writes and reads alike.
    #[test]
    fn bytes_on_the_wire_are_these() {
        let hello = Hello::new(1 << 30, 16 << 20).to_bytes();
        assert_eq!(&hello[..12], b"STOAXFER\x01\0\0\0");
        assert_eq!(hello[16..24], [0, 0, 0, 0x40, 0, 0, 0, 0]);
        assert_eq!(hello[24..32], [0, 0, 0, 1, 0, 0, 0, 0]);
        let row = ReadRow {
            segment: 7,
            offset: 0x0102,
            length: 9,
        };
        let frame = reads_frame(5, 0x1122_3344_5566_7788, &[row]);
        assert_eq!(frame[..8], [1, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(frame[8..16], 5_u64.to_le_bytes());
        assert_eq!(frame[16..24], 24_u64.to_le_bytes());
        assert_eq!(
            frame[24..32],
            [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]
        );
        assert_eq!(
            frame[32..40],
            XxHash3_64::oneshot(&frame[..32]).to_le_bytes()
        );
        assert_eq!(frame[40..48], [7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(frame[48..56], [2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(frame[56..], [9, 0, 0, 0, 0, 0, 0, 0]);
        let refusal = Refusal::new(RefusalKind::Busy, "later");
        let frame = refusal_frame(FrameKind::Goodbye, 0, &refusal);
        assert_eq!(frame[..4], [19, 0, 6, 0]);
        assert_eq!(&frame[40..], b"later");
    }

    fn header(bytes: &[u8]) -> [u8; FrameHeader::BYTES] {
        bytes[..FrameHeader::BYTES].try_into().unwrap()
    }

    #[test]
    fn another_magic_version_or_check_is_refused_by_name() {
        let good = Hello::new(1, 1);
        assert_eq!(Hello::parse(&good.to_bytes()).unwrap().minor, WIRE_MINOR);
        let later_minor = Hello { minor: 9, ..good };
        assert_eq!(Hello::parse(&later_minor.to_bytes()).unwrap().minor, 9);

        let mut http = [b' '; Hello::BYTES];
        http[..14].copy_from_slice(b"GET / HTTP/1.1");
        let error = Hello::parse(&http).unwrap_err().to_string();
        assert_eq!(
            error,
            "it begins with \"GET / HT\", expected \"STOAXFER\"; is this the address of something else?"
        );
        let newer = Hello { major: 2, ..good };
        let error = Hello::parse(&newer.to_bytes()).unwrap_err().to_string();
        assert_eq!(
            error,
            "it speaks version 2.0, this end 1.0; run one major version on all hosts"
        );
        let mut flipped = good.to_bytes();
        flipped[20] ^= 1;
        let error = Hello::parse(&flipped).unwrap_err().to_string();
        assert!(error.starts_with("the check of its hello is "), "{error}");
    }

    #[test]
    fn contradictory_and_oversized_frames_are_refused_before_their_body() {
        let limits = FrameLimits {
            read_bytes_max: 100,
            call_bytes_max: 10,
        };
        let request = |header: FrameHeader| {
            RequestHead::parse(&header.to_bytes(), limits)
                .unwrap_err()
                .to_string()
        };
        let reads = FrameHeader::new(FrameKind::Reads, 0, 1, 24);
        assert_eq!(
            request(FrameHeader { count: 2, ..reads }),
            "a Reads frame of 2 requests has a body of 24 bytes, expected 48"
        );
        assert_eq!(
            request(FrameHeader {
                count: 4097,
                body_bytes: 4097 * 24,
                ..reads
            }),
            "a Reads frame has 4097 rows, limit 4096"
        );
        assert_eq!(
            request(FrameHeader { count: 0, ..reads }),
            "a Reads frame has 0 requests from number 1 on"
        );
        let last = FrameHeader {
            request: u64::MAX,
            ..reads
        };
        assert!(request(last).contains("from number 18446744073709551615 on"));
        assert_eq!(
            request(FrameHeader::new(FrameKind::Call, 3, 1, 11)),
            "1 calls of 11 bytes in a frame, limit one of 10"
        );
        assert_eq!(
            request(FrameHeader::new(FrameKind::Data, 0, 1, 1)),
            "a Data frame came from a client"
        );
        let response = |header: FrameHeader| {
            ResponseHead::parse(&header.to_bytes(), limits)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            response(FrameHeader::new(FrameKind::Data, 0, 1, 101)),
            "a Data frame has 101 bytes, limit 100"
        );
        assert_eq!(
            response(FrameHeader::new(FrameKind::Refused, 1, 1, 4097)),
            "a Refused frame has 4097 bytes, limit 4096"
        );
        assert_eq!(
            response(FrameHeader::new(FrameKind::Reads, 0, 1, 24)),
            "a Reads frame came from a server"
        );
        let unknown = FrameHeader {
            kind: 99,
            ..FrameHeader::default()
        };
        assert_eq!(
            response(unknown),
            "a frame is of kind 99, which is not known"
        );
    }

    #[test]
    fn texts_of_a_peer_are_cut_and_cannot_write_to_a_terminal() {
        let refusal = Refusal::new(RefusalKind::Failed, "ü".repeat(4000));
        let frame = refusal_frame(FrameKind::Refused, 1, &refusal);
        assert_eq!(frame.len(), FrameHeader::BYTES + MESSAGE_BYTES_MAX);
        assert!(ResponseHead::parse(&header(&frame), FrameLimits::default()).is_ok());
        assert_eq!(message(b"a\x1b[2Jb\n\xff"), "a\u{fffd}[2Jb\u{fffd}\u{fffd}");
    }

    proptest! {
        #[test]
        fn frames_come_back_as_they_went(
            first in 0..u64::MAX - 5000,
            incarnation: u64,
            numbers in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 1..50),
        ) {
            let rows: Vec<ReadRow> = numbers
                .iter()
                .map(|&(segment, offset, length)| ReadRow { segment, offset, length })
                .collect();
            let frame = reads_frame(first, incarnation, &rows);
            let head = RequestHead::parse(&header(&frame), FrameLimits::default()).unwrap();
            let rows_number = u32::try_from(rows.len()).unwrap();
            prop_assert_eq!(head, RequestHead::Reads { first, rows: rows_number, incarnation });
            let back: Vec<ReadRow> = parse_rows(&frame[FrameHeader::BYTES..]).unwrap().collect();
            prop_assert_eq!(back, rows);
        }

        /// One flipped bit anywhere in a header is noticed.
        #[test]
        fn a_flipped_bit_in_a_header_is_noticed(bit in 0..FrameHeader::BYTES * 8) {
            let mut bytes = FrameHeader::new(FrameKind::Data, 0, 77, 4096).to_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(ResponseHead::parse(&bytes, FrameLimits::default()).is_err());
        }
    }
}
