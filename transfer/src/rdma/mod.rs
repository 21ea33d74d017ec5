//! One-sided reads over RDMA, set up and authorised over another transport.
//!
//! An RDMA link is a link of the transport below it (TCP) with a reliable connection beside it. The
//! client asks over TCP for a session, connects with the token that it got, asks for the segments
//! that it wants to read, and its device reads them from the peer's memory: the peer's processor
//! has no part in it. `docs/transfer.md` has the messages and the states.
//!
//! - **A device's memory is registered once and for reading only**, and deregistered before it is
//!   freed: a registration owns its segment.
//! - **Only reads with a checksum go over RDMA.** A key that was revoked might mean other bytes
//!   later; nothing but the checksum tells. Other reads and all calls take the transport below.
//! - **What fails is a path.** The link closes, its reads end with [`crate::TransferError::Closed`],
//!   and the client asks for them over the next path: TCP.
//!
//! `verbs` is the only module with `unsafe`, `wire` the messages, `pool` the memory that is received
//! into, `link` the client, `server` the server.

#[cfg(feature = "rdma")]
mod link;
#[cfg(feature = "rdma")]
mod pool;
#[cfg(feature = "rdma")]
mod server;
#[cfg(all(test, feature = "rdma"))]
mod tests;
#[cfg(feature = "rdma")]
mod verbs;
// Its parsers are tested and fuzzed without a device as well.
#[cfg(any(test, feature = "rdma", feature = "conformance"))]
pub mod wire;

#[cfg(feature = "rdma")]
pub use link::Rdma;
#[cfg(feature = "rdma")]
pub use server::RdmaServer;

use std::sync::{Arc, Once};
use std::time::Duration;

use crate::error::Result;
use crate::segment::SegmentSource;
use crate::tcp::{Server, ServerHandle, ServerSettings};
use crate::transport::{CallHandler, NoCalls, Transport};

/// Whether and how to use RDMA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdmaSettings {
    /// Consent: what travels over RDMA is not encrypted, whatever the other transports do.
    pub enabled: bool,
    /// Bytes of memory that a client registers to receive into, at most. Reads that find none left
    /// take the transport below.
    pub receive_bytes_max: usize,
    /// How long a server that takes a segment back waits for its clients to stop using it. Reads
    /// that come later end their connection.
    pub revocation_grace: Duration,
}

impl Default for RdmaSettings {
    fn default() -> Self {
        Self {
            enabled: false,
            receive_bytes_max: 256 << 20,
            revocation_grace: Duration::from_millis(500),
        }
    }
}

/// What keeps this process from using RDMA at all, if anything does.
fn obstacle() -> Option<&'static str> {
    #[cfg(feature = "rdma")]
    {
        verbs::devices()
            .is_empty()
            .then_some("this host has no RDMA device")
    }
    #[cfg(not(feature = "rdma"))]
    {
        Some("this program was built without the cargo feature rdma")
    }
}

/// Whether the settings allow RDMA and nothing keeps this process from it. What does is said once,
/// whoever asks: clients and servers of a process have it in common.
fn is_usable(settings: &RdmaSettings) -> bool {
    static SAID: Once = Once::new();

    if !settings.enabled {
        return false;
    }
    let Some(obstacle) = obstacle() else {
        return true;
    };
    SAID.call_once(|| {
        tracing::warn!("RDMA is enabled and cannot be used, so TCP is: {obstacle}");
    });
    false
}

/// The transports of a client, the preferred one first: RDMA where the settings allow it, this
/// program was built with it (feature `rdma`) and this host has a device; then `below`.
pub fn with_rdma(settings: &RdmaSettings, below: Arc<dyn Transport>) -> Vec<Arc<dyn Transport>> {
    if !is_usable(settings) {
        return vec![below];
    }
    #[cfg(feature = "rdma")]
    if let Some(rdma) = Rdma::new(settings.clone(), below.clone()) {
        return vec![Arc::new(rdma), below];
    }
    vec![below]
}

/// Serves segments and calls over TCP, and segments over RDMA as well where the settings allow it,
/// this program was built with it (feature `rdma`) and a device has the server's address. What goes
/// wrong with RDMA is logged, and TCP alone is served.
///
/// # Errors
/// As [`Server::start`].
pub async fn serve_with_rdma(
    server: ServerSettings,
    rdma: &RdmaSettings,
    segments: Arc<dyn SegmentSource>,
    calls: Arc<dyn CallHandler>,
) -> Result<ServerHandle> {
    let reserved = match is_usable(rdma) {
        true => set_up_calls(&server.address, rdma, &segments).await,
        false => Arc::new(NoCalls),
    };
    Server::start_with_reserved(server, segments, calls, reserved).await
}

/// What answers the calls that set up RDMA.
#[cfg(feature = "rdma")]
async fn set_up_calls(
    address: &str,
    settings: &RdmaSettings,
    segments: &Arc<dyn SegmentSource>,
) -> Arc<dyn CallHandler> {
    let host = tokio::net::lookup_host(address)
        .await
        .ok()
        .and_then(|mut hosts| hosts.next());
    let started = match host {
        Some(host) => RdmaServer::start(host.ip(), settings.clone(), segments.clone()),
        // The server will say what is wrong with its address.
        None => Ok(None),
    };
    match started {
        Ok(Some(server)) => Arc::new(server),
        Ok(None) => Arc::new(NoCalls),
        Err(error) => {
            tracing::warn!(%error, "RDMA is enabled and cannot be used; serving TCP alone");
            Arc::new(NoCalls)
        }
    }
}

/// What answers the calls that set up RDMA: nothing, without the feature.
#[cfg(not(feature = "rdma"))]
async fn set_up_calls(
    _address: &str,
    _settings: &RdmaSettings,
    _segments: &Arc<dyn SegmentSource>,
) -> Arc<dyn CallHandler> {
    Arc::new(NoCalls)
}
