//! Remotely readable memory: batches of reads of other hosts' segments over TCP or RDMA, and small
//! calls beside them. This crate knows nothing of what the bytes mean.
//!
//! - A [`Segment`] is immutable memory under a [`SegmentKey`] that never names other bytes. A server
//!   finds them in a [`SegmentSource`] and answers the [`CallHandler`]'s calls on the same
//!   connection.
//! - A [`Client`] submits many [`Read`]s of a peer together; the [`Batch`] ends each with its own
//!   outcome, by the deadline at the latest, in aligned memory ([`Block`]) that becomes a buffer
//!   without a copy. Bytes that do not hash to the read's checksum are never seen.
//! - A [`Transport`] makes [`Link`]s. Checksums, deadlines and metrics are around every link; paths
//!   that fail are left alone for a while and the next one is taken.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::{Duration, Instant};
//! use stoa_transfer::{
//!     Client, ClientSettings, InProcess, NoCalls, PeerAddress, Read, Refusal, Segment, SegmentKey,
//!     SegmentSource,
//! };
//!
//! #[derive(Debug)]
//! struct One;
//! impl SegmentSource for One {
//!     fn open(&self, key: SegmentKey) -> Result<Segment, Refusal> {
//!         match key.segment {
//!             7 => Ok(Segment::new(b"bytes of the segment".to_vec())),
//!             _ => Err(Refusal::unknown_segment(key)),
//!         }
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let network = InProcess::default();
//! network.serve("a", Arc::new(One), Arc::new(NoCalls));
//! let client = Client::new(ClientSettings::default(), vec![Arc::new(network)]);
//! let peer = PeerAddress { id: "a".to_string(), addresses: vec!["a".to_string()] };
//! let read = Read {
//!     segment: SegmentKey { incarnation: 1, segment: 7 },
//!     offset: 9,
//!     length: 11,
//!     checksum: None,
//! };
//! let deadline = Instant::now() + Duration::from_secs(1);
//! let outcomes = client.submit(&peer, vec![read], deadline).into_vec().await;
//! assert_eq!(&**outcomes[0].as_ref().unwrap(), b"the segment");
//! # }
//! ```

#![deny(unsafe_code)]

mod client;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
mod driver;
mod error;
mod health;
mod in_process;
mod memory;
mod path;
pub mod rdma;
mod segment;
mod statistics;
mod tcp;
#[cfg(test)]
mod tests;
mod tls;
mod transport;
pub mod wire;
mod wrap;

pub use client::{Batch, Client, ClientSettings, PeerAddress};
pub use error::{ErrorKind, Refusal, RefusalKind, Result, TransferError};
pub use in_process::InProcess;
pub use memory::{BLOCK_ALIGN, Block, BlockPool};
pub use rdma::{RdmaSettings, serve_with_rdma, with_rdma};
pub use segment::{Segment, SegmentKey, SegmentSource};
pub use statistics::PathStatistics;
pub use tcp::{Server, ServerHandle, ServerSettings, ServerStatistics, Tcp, TcpSettings};
#[cfg(any(test, feature = "conformance"))]
pub use tcp::{link_over, serve_over};
pub use tls::{ROLE_PREFIX, Tls, TlsSettings};
pub use transport::{
    CallHandler, Link, NoCalls, Outcomes, PeerIdentity, RESERVED_METHODS, Read, Role, Transport,
    TransportKind,
};
#[cfg(any(test, feature = "conformance"))]
pub use wrap::{Fault, FaultPlan, Faulty, Throttled};
