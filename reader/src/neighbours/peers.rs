//! How neighbours are read: the part of the transfer client that reads chunks, as a trait.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use stoa_transfer::{Client, PeerAddress, Read, TransferError, TransportKind};

/// A chunk's bytes, checked, and the way they took.
#[derive(Clone, Debug)]
pub struct Arrived {
    /// The bytes; they begin at a multiple of 64.
    pub bytes: Bytes,
    /// Over what.
    pub via: TransportKind,
}

/// What came of each read of a batch, by its place in it, in any order.
pub type Arrivals = BoxStream<'static, (usize, Result<Arrived, TransferError>)>;

/// Reads the memory of neighbours.
pub trait PeerReads: Debug + Send + Sync {
    /// Submits reads of one neighbour together. Each ends by `deadline`; dropping the stream takes
    /// back what has not come. Bytes that do not match their checksum are an error.
    fn submit(&self, peer: &PeerAddress, reads: Vec<Read>, deadline: Instant) -> Arrivals;

    /// How long a read of so many bytes is expected to take; `None` where nothing was measured.
    fn expected(&self, peer: &PeerAddress, bytes: u64) -> Option<Duration>;
}

impl PeerReads for Client {
    fn submit(&self, peer: &PeerAddress, reads: Vec<Read>, deadline: Instant) -> Arrivals {
        Client::submit(self, peer, reads, deadline)
            .map(|(index, block)| {
                let arrived = block.map(|block| Arrived {
                    via: block.via().unwrap_or(TransportKind::Tcp),
                    bytes: block.into_bytes(),
                });
                (index, arrived)
            })
            .boxed()
    }

    fn expected(&self, peer: &PeerAddress, bytes: u64) -> Option<Duration> {
        Client::expected(self, &peer.id, bytes)
    }
}
