//! What every transport does, so that what is above it need not know which one it is.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

use crate::error::{Refusal, Result};
use crate::memory::Block;
use crate::segment::SegmentKey;

/// Methods from here on are the transports' own; a [`CallHandler`] never sees them.
pub const RESERVED_METHODS: u16 = 0xff00;

/// One range of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Read {
    /// Which segment.
    pub segment: SegmentKey,
    /// First byte.
    pub offset: u64,
    /// Bytes; at least one.
    pub length: u64,
    /// The xxh3-64 of exactly this range, where it is known: bytes that hash to another value are
    /// never seen.
    pub checksum: Option<u64>,
}

/// Which way bytes take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum TransportKind {
    /// Within this process, for tests.
    InProcess,
    /// TCP, with or without TLS.
    Tcp,
    /// One-sided reads over RDMA.
    Rdma,
}

impl TransportKind {
    /// A word for metrics and documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InProcess => "in_process",
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
        }
    }
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What came of each read, by its place in what was submitted, in any order. Dropping the stream
/// takes back what has not come.
pub type Outcomes = BoxStream<'static, (usize, Result<Block>)>;

/// A way to connect to peers.
#[async_trait]
pub trait Transport: Send + Sync + fmt::Debug {
    /// Which one.
    fn kind(&self) -> TransportKind;

    /// A new link to the peer at `address`, authenticated both ways where the transport is.
    ///
    /// It may take as long as it takes: the caller drops it at its deadline.
    ///
    /// # Errors
    /// [`crate::TransferError::Unreachable`] where nobody answers or this transport does not lead
    /// there, [`crate::TransferError::Unauthenticated`], [`crate::TransferError::Protocol`].
    async fn connect(&self, address: &str) -> Result<Arc<dyn Link>>;
}

/// A connection to one peer.
///
/// Every read ends with exactly one outcome, unless its stream is dropped first. A link that fails
/// ends all of its reads with [`crate::TransferError::Closed`] and stays closed.
pub trait Link: Send + Sync + fmt::Debug {
    /// Submits reads together; they are not more than the peer's limits allow. Checksums are not
    /// looked at here.
    fn submit(&self, reads: Vec<Read>, deadline: Instant) -> Outcomes;

    /// One opaque request and its answer.
    fn call(
        &self,
        method: u16,
        body: Bytes,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes>>;

    /// Bytes received so far. A link whose number stands while something is outstanding hangs.
    fn received_bytes(&self) -> u64;

    /// Bytes asked for and not received yet.
    fn outstanding_bytes(&self) -> u64;

    /// Whether nothing more can be submitted.
    fn is_closed(&self) -> bool;

    /// Ends everything that is outstanding, now.
    fn close(&self, reason: &str);
}

/// What a peer may do, as its certificate says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Serves segments and reads those of others.
    Node,
    /// Reads only.
    Reader,
}

impl Role {
    /// The role as it is written behind `stoa://role/`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Reader => "reader",
        }
    }
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The role of its certificate; `None` over a transport without certificates.
    pub role: Option<Role>,
    /// The certificate's subject, or "(plain text)".
    pub name: String,
    /// Where it comes from.
    pub address: String,
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.name, self.address)
    }
}

/// Answers calls: small requests of upper layers over the same authenticated connection.
#[async_trait]
pub trait CallHandler: Send + Sync + fmt::Debug {
    /// Answers one call. It may take long (the asker has a deadline and the connection goes on
    /// meanwhile); it is dropped when the connection ends.
    ///
    /// # Errors
    /// The refusal travels to the asker; [`Refusal::unknown_method`] for what is not known.
    async fn call(&self, peer: &PeerIdentity, method: u16, body: Bytes) -> Result<Bytes, Refusal>;
}

/// A handler that knows no method.
#[derive(Debug, Default)]
pub struct NoCalls;

#[async_trait]
impl CallHandler for NoCalls {
    async fn call(&self, _: &PeerIdentity, method: u16, _: Bytes) -> Result<Bytes, Refusal> {
        Err(Refusal::unknown_method(method))
    }
}
