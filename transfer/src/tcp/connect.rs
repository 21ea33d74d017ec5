//! From an address to a link.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::error::{RefusalKind, Result, TransferError};
use crate::memory::BlockPool;
use crate::tcp::io::{self as halves, Halves};
use crate::tcp::link::{TcpLink, farewell};
use crate::tls::Tls;
use crate::transport::{Link, Transport, TransportKind};
use crate::wire::{self, FrameHeader, FrameLimits, HELLO_REFUSES, Hello, ResponseHead};

/// How a client connects over TCP.
#[derive(Clone, Debug)]
pub struct TcpSettings {
    /// Certificates; plain text without.
    pub tls: Option<Tls>,
    /// Consent to plain text beyond loopback.
    pub insecure: bool,
    /// Bytes of receive memory that are kept for later use.
    pub kept_bytes_max: usize,
}

impl Default for TcpSettings {
    fn default() -> Self {
        Self {
            tls: None,
            insecure: false,
            kept_bytes_max: 256 << 20,
        }
    }
}

/// Connects to peers over TCP; addresses are `host:port`.
#[derive(Clone, Debug)]
pub struct Tcp {
    tls: Option<Tls>,
    insecure: bool,
    pool: BlockPool,
}

impl Tcp {
    /// A transport with receive memory of its own.
    pub fn new(settings: TcpSettings) -> Self {
        Self {
            tls: settings.tls,
            insecure: settings.insecure,
            pool: BlockPool::new(settings.kept_bytes_max),
        }
    }

    /// The memory that reads arrive in.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// The first of the addresses that answers.
    async fn dial(&self, address: &str) -> Result<TcpStream> {
        let unreachable = |reason: String| TransferError::Unreachable {
            peer: address.to_string(),
            reason,
        };
        let resolved: Vec<SocketAddr> = tokio::net::lookup_host(address)
            .await
            .map_err(|error| unreachable(format!("it is no known host and port: {error}")))?
            .collect();
        let mut last = unreachable("the name has no address".to_string());
        for candidate in resolved {
            if !may_connect(candidate, self.tls.is_some(), self.insecure) {
                last = TransferError::Insecure {
                    address: candidate.to_string(),
                };
                continue;
            }
            match TcpStream::connect(candidate).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = unreachable(error.to_string()),
            }
        }
        Err(last)
    }
}

/// Plain text is for loopback unless there is consent.
pub(crate) fn may_connect(address: SocketAddr, tls: bool, insecure: bool) -> bool {
    tls || insecure || address.ip().to_canonical().is_loopback()
}

#[async_trait]
impl Transport for Tcp {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    async fn connect(&self, address: &str) -> Result<Arc<dyn Link>> {
        let stream = self.dial(address).await?;
        let failed = |error: io::Error| TransferError::Closed {
            peer: address.to_string(),
            reason: error.to_string(),
        };
        halves::prepare(&stream).map_err(failed)?;
        let (halves, limits) = match &self.tls {
            None => {
                let mut stream = stream;
                let limits = greet(&mut stream, address).await?;
                (halves::plain(stream), limits)
            }
            Some(tls) => {
                let mut stream = tls.connect(stream, address).await?;
                let limits = greet(&mut stream, address).await?;
                (halves::other(stream), limits)
            }
        };
        Ok(start(address, halves, limits, &self.pool))
    }
}

fn start(address: &str, halves: Halves, limits: FrameLimits, pool: &BlockPool) -> Arc<dyn Link> {
    Arc::new(TcpLink::start(
        address.to_string(),
        halves,
        limits,
        pool.clone(),
    ))
}

/// Exchanges hellos; gives back what the server allows.
async fn greet(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    address: &str,
) -> Result<FrameLimits> {
    let peer = || address.to_string();
    let failed = |error: io::Error| crate::tls::refused_handshake(address, error);
    let protocol = |error: wire::WireError| TransferError::Protocol {
        peer: peer(),
        reason: error.to_string(),
    };
    stream
        .write_all(&Hello::new(0, 0).to_bytes())
        .await
        .map_err(failed)?;
    stream.flush().await.map_err(failed)?;
    let mut bytes = [0; Hello::BYTES];
    stream.read_exact(&mut bytes).await.map_err(failed)?;
    let hello = Hello::parse(&bytes).map_err(protocol)?;
    let limits = FrameLimits {
        read_bytes_max: hello.read_bytes_max.min(wire::READ_BYTES_MAX),
        call_bytes_max: hello.call_bytes_max.min(wire::CALL_BYTES_MAX),
    };
    if hello.features & HELLO_REFUSES == 0 {
        return Ok(limits);
    }
    let mut header = [0; FrameHeader::BYTES];
    stream.read_exact(&mut header).await.map_err(failed)?;
    let head = ResponseHead::parse(&header, limits).map_err(protocol)?;
    let ResponseHead::Goodbye { kind, body_bytes } = head else {
        return Err(protocol(wire::WireError::new(
            "it said that it refuses, and did not say why",
        )));
    };
    // At most MESSAGE_BYTES_MAX.
    let mut text = vec![0; usize::try_from(body_bytes).unwrap_or(0)];
    stream.read_exact(&mut text).await.map_err(failed)?;
    let error = farewell(address, kind, wire::message(&text));
    Err(match (kind, error) {
        (RefusalKind::Stopping, TransferError::Closed { peer, reason }) => {
            TransferError::Unreachable { peer, reason }
        }
        (_, error) => error,
    })
}

/// A link over any stream, as if it had been connected; for tests and fuzzing.
#[cfg(any(test, feature = "conformance"))]
pub async fn link_over(
    mut stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    pool: &BlockPool,
) -> Result<Arc<dyn Link>> {
    let limits = greet(&mut stream, "the other end").await?;
    Ok(start("the other end", halves::other(stream), limits, pool))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_is_for_loopback_unless_there_is_consent() {
        for address in [
            "127.0.0.1:1",
            "127.8.9.10:1",
            "[::1]:1",
            "[::ffff:127.0.0.1]:1",
        ] {
            assert!(
                may_connect(address.parse().unwrap(), false, false),
                "{address}"
            );
        }
        for address in [
            "10.0.0.1:1",
            "0.0.0.0:1",
            "[2001:db8::1]:1",
            "[::ffff:10.0.0.1]:1",
        ] {
            let address = address.parse().unwrap();
            assert!(!may_connect(address, false, false), "{address}");
            assert!(may_connect(address, true, false), "{address}");
            assert!(may_connect(address, false, true), "{address}");
        }
    }
}
