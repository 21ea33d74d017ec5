//! What can go wrong between two hosts, and what the caller should do about it.

use std::fmt;

use crate::segment::SegmentKey;

/// The result of everything in this crate.
pub type Result<T, E = TransferError> = std::result::Result<T, E>;

/// What a peer says instead of what it was asked for. It travels as a code and a text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What the asker should do about it.
    pub kind: RefusalKind,
    /// Found, expected, and what to do; at most [`crate::wire::MESSAGE_BYTES_MAX`] bytes travel.
    pub message: String,
}

/// Why a request was refused. The numbers are the codes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
#[non_exhaustive]
pub enum RefusalKind {
    /// The peer has no such segment (any more): what named it is out of date.
    UnknownSegment = 1,
    /// The peer's memory is another one than the one that was named.
    WrongIncarnation = 2,
    /// The range does not lie inside of the segment.
    OutOfRange = 3,
    /// A length is over a limit of the peer.
    TooLarge = 4,
    /// The peer does not know who asks, or not as somebody who may.
    Unauthenticated = 5,
    /// The peer has as many connections or calls as it takes.
    Busy = 6,
    /// The asker took the request back.
    Cancelled = 7,
    /// The asker broke the protocol, or speaks another one.
    Protocol = 8,
    /// The peer knows no such method.
    UnknownMethod = 9,
    /// The peer tried and failed.
    Failed = 10,
    /// The peer is stopping.
    Stopping = 11,
}

impl RefusalKind {
    /// Every kind there is.
    pub const ALL: [Self; 11] = [
        Self::UnknownSegment,
        Self::WrongIncarnation,
        Self::OutOfRange,
        Self::TooLarge,
        Self::Unauthenticated,
        Self::Busy,
        Self::Cancelled,
        Self::Protocol,
        Self::UnknownMethod,
        Self::Failed,
        Self::Stopping,
    ];

    /// The code on the wire.
    pub fn code(self) -> u16 {
        self as u16
    }

    /// The kind with this code; a peer of a later version may have more.
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// A word for metrics and documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnknownSegment => "unknown_segment",
            Self::WrongIncarnation => "wrong_incarnation",
            Self::OutOfRange => "out_of_range",
            Self::TooLarge => "too_large",
            Self::Unauthenticated => "unauthenticated",
            Self::Busy => "busy",
            Self::Cancelled => "cancelled",
            Self::Protocol => "protocol",
            Self::UnknownMethod => "unknown_method",
            Self::Failed => "failed",
            Self::Stopping => "stopping",
        }
    }
}

impl Refusal {
    /// A refusal with a text of its own.
    pub fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// There is no such segment.
    pub fn unknown_segment(key: SegmentKey) -> Self {
        Self::new(
            RefusalKind::UnknownSegment,
            format!("segment {key} is not here; look up again where its bytes are"),
        )
    }

    /// The memory that was named is not the one that is here.
    pub fn wrong_incarnation(key: SegmentKey, current: u64) -> Self {
        Self::new(
            RefusalKind::WrongIncarnation,
            format!(
                "segment {key} was asked for, this memory is incarnation {current:016x}; look up again where its bytes are"
            ),
        )
    }

    /// The range ends behind the segment.
    pub fn out_of_range(key: SegmentKey, offset: u64, length: u64, segment_bytes: u64) -> Self {
        Self::new(
            RefusalKind::OutOfRange,
            format!(
                "range of {length} bytes from {offset} is not inside segment {key} of {segment_bytes} bytes"
            ),
        )
    }

    /// A length is over a limit.
    pub fn too_large(what: &str, found: u64, limit: u64) -> Self {
        Self::new(
            RefusalKind::TooLarge,
            format!("{what} of {found} bytes, limit {limit}; ask for less at a time"),
        )
    }

    /// There is no such method.
    pub fn unknown_method(method: u16) -> Self {
        Self::new(
            RefusalKind::UnknownMethod,
            format!("no method {method:#06x} here; are both ends of the same version?"),
        )
    }

    /// The peer tried and failed.
    pub fn failed(reason: impl fmt::Display) -> Self {
        Self::new(RefusalKind::Failed, reason.to_string())
    }
}

/// Why a read, a call or a connection failed. `peer` is always the peer's name and path.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The peer answered, with a refusal.
    #[error("{peer} refuses: {refusal}")]
    Refused {
        /// Who.
        peer: String,
        /// Its words.
        refusal: Refusal,
    },
    /// The deadline passed. What was asked for is dropped when it comes later.
    #[error("{peer} did not answer within {waited_ms} ms")]
    Deadline {
        /// Who.
        peer: String,
        /// How long it had, in milliseconds.
        waited_ms: u64,
    },
    /// The connection ended before the answer did; another one may do better.
    #[error("connection to {peer} ended: {reason}")]
    Closed {
        /// Who.
        peer: String,
        /// Why, as far as known.
        reason: String,
    },
    /// No path leads to the peer now.
    #[error("{peer} is not reachable: {reason}")]
    Unreachable {
        /// Who.
        peer: String,
        /// What was tried.
        reason: String,
    },
    /// One of the two ends does not accept the other's identity.
    #[error("{peer} and this process do not trust each other: {reason}")]
    Unauthenticated {
        /// Who.
        peer: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// The bytes that arrived are not the ones that were asked for.
    #[error(
        "{peer} sent wrong bytes for {length} bytes from {offset} of segment {key}: checksum {found:016x}, expected {expected:016x}; they are not used"
    )]
    Corrupt {
        /// Who.
        peer: String,
        /// The segment.
        key: SegmentKey,
        /// First byte of the range.
        offset: u64,
        /// Bytes of the range.
        length: u64,
        /// What the asker knows about the range.
        expected: u64,
        /// What the bytes hash to.
        found: u64,
    },
    /// The peer does not keep to the protocol, or speaks another one.
    #[error("{peer} does not speak this protocol: {reason}")]
    Protocol {
        /// Who.
        peer: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// A request is over a limit of this end; nothing was sent.
    #[error("{what} of {found} bytes, limit {limit}; ask for less at a time")]
    TooLarge {
        /// What was measured.
        what: &'static str,
        /// Its bytes.
        found: u64,
        /// What is allowed.
        limit: u64,
    },
    /// Plain text beyond loopback without consent.
    #[error(
        "{address} is not a loopback address and transfer.tls is not set; set transfer.tls.ca, transfer.tls.cert and transfer.tls.key, or consent to plain text with transfer.insecure = true"
    )]
    Insecure {
        /// The address.
        address: String,
    },
    /// Something of this end's settings or machine.
    #[error("{what}: {reason}")]
    Setup {
        /// What was to be done.
        what: String,
        /// Why it cannot be, and what to do.
        reason: String,
    },
}

/// [`TransferError`] as a word to count by and to decide by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The peer lacks what was asked for: look up again where it is.
    Stale,
    /// The peer refused for another reason.
    Refused,
    /// Too late.
    Deadline,
    /// The connection ended.
    Closed,
    /// No path.
    Unreachable,
    /// Identity.
    Unauthenticated,
    /// Wrong bytes.
    Corrupt,
    /// Wrong protocol.
    Protocol,
    /// Over a limit.
    TooLarge,
    /// Settings of this end.
    Setup,
}

impl ErrorKind {
    /// A word for metrics and documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stale => "stale",
            Self::Refused => "refused",
            Self::Deadline => "deadline",
            Self::Closed => "closed",
            Self::Unreachable => "unreachable",
            Self::Unauthenticated => "unauthenticated",
            Self::Corrupt => "corrupt",
            Self::Protocol => "protocol",
            Self::TooLarge => "too_large",
            Self::Setup => "setup",
        }
    }
}

impl TransferError {
    /// What the caller should do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { refusal, .. } => match refusal.kind {
                RefusalKind::UnknownSegment
                | RefusalKind::WrongIncarnation
                | RefusalKind::OutOfRange => ErrorKind::Stale,
                RefusalKind::Unauthenticated => ErrorKind::Unauthenticated,
                RefusalKind::TooLarge => ErrorKind::TooLarge,
                RefusalKind::Protocol => ErrorKind::Protocol,
                RefusalKind::Stopping => ErrorKind::Closed,
                _ => ErrorKind::Refused,
            },
            Self::Deadline { .. } => ErrorKind::Deadline,
            Self::Closed { .. } => ErrorKind::Closed,
            Self::Unreachable { .. } => ErrorKind::Unreachable,
            Self::Unauthenticated { .. } => ErrorKind::Unauthenticated,
            Self::Corrupt { .. } => ErrorKind::Corrupt,
            Self::Protocol { .. } => ErrorKind::Protocol,
            Self::TooLarge { .. } => ErrorKind::TooLarge,
            Self::Insecure { .. } | Self::Setup { .. } => ErrorKind::Setup,
        }
    }

    /// Whether the fault is the path's rather than the request's: another path may do better.
    pub fn is_of_the_path(&self) -> bool {
        matches!(
            self.kind(),
            ErrorKind::Closed | ErrorKind::Unreachable | ErrorKind::Protocol
        )
    }
}
