//! The serving end: listens, lets in who may, and keeps its limits.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use crate::error::{Refusal, RefusalKind, Result, TransferError};
use crate::segment::SegmentSource;
use crate::tcp::connect::may_connect;
use crate::tcp::io as halves;
use crate::tcp::session;
use crate::tls::Tls;
use crate::transport::{CallHandler, NoCalls, PeerIdentity};
use crate::wire::{self, FrameKind, FrameLimits, HELLO_REFUSES, Hello};

/// How a server listens, and its limits.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// `host:port` to listen on; port 0 takes a free one.
    pub address: String,
    /// Certificates; plain text without.
    pub tls: Option<Tls>,
    /// Consent to plain text beyond loopback.
    pub insecure: bool,
    /// Connections at once; more are refused.
    pub connections_max: usize,
    /// Bytes of one read.
    pub read_bytes_max: u64,
    /// Bytes of a call's or an answer's body.
    pub call_bytes_max: u64,
    /// Calls of one connection at once; more are refused.
    pub calls_max: usize,
    /// Bytes of the bodies of all calls at once; more are refused.
    pub calls_bytes_max: u64,
    /// How long a handshake, TLS included, may take.
    pub handshake_timeout: Duration,
    /// How long a client may take nothing of what it asked for.
    pub stall_timeout: Duration,
    /// How long connections have for what they are sending when the server stops.
    pub stop_timeout: Duration,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            address: "127.0.0.1:0".to_string(),
            tls: None,
            insecure: false,
            connections_max: 1024,
            read_bytes_max: wire::READ_BYTES_MAX,
            call_bytes_max: wire::CALL_BYTES_MAX,
            calls_max: 64,
            calls_bytes_max: 128 << 20,
            handshake_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(60),
            stop_timeout: Duration::from_secs(1),
        }
    }
}

/// What a server did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServerStatistics {
    /// Open connections.
    pub connections: u64,
    /// Reads that were answered with bytes.
    pub reads: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Calls that were answered.
    pub calls: u64,
    /// Requests that were refused.
    pub refusals: u64,
    /// Connections that were not let in.
    pub rejected: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) connections: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) calls: AtomicU64,
    pub(crate) refusals: AtomicU64,
    pub(crate) rejected: AtomicU64,
}

/// What every connection of a server needs.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) settings: ServerSettings,
    pub(crate) segments: Arc<dyn SegmentSource>,
    pub(crate) calls: Arc<dyn CallHandler>,
    /// Answers the transports' own methods.
    pub(crate) reserved: Arc<dyn CallHandler>,
    pub(crate) statistics: Counters,
    /// In units of [`CALL_UNIT`].
    call_memory: Arc<Semaphore>,
}

/// Bytes of one permit of the memory for calls.
const CALL_UNIT: u64 = 1024;

impl Serving {
    pub(crate) fn limits(&self) -> FrameLimits {
        FrameLimits {
            read_bytes_max: self.settings.read_bytes_max.min(wire::READ_BYTES_MAX),
            call_bytes_max: self.settings.call_bytes_max.min(wire::CALL_BYTES_MAX),
        }
    }

    /// Lets a call of a connection with `open` others in, or says why not.
    pub(crate) fn admit_call(
        &self,
        body_bytes: u64,
        open: usize,
    ) -> Result<OwnedSemaphorePermit, Refusal> {
        if open >= self.settings.calls_max {
            return Err(Refusal::new(
                RefusalKind::Busy,
                format!(
                    "{open} calls are open on this connection, limit {}; ask again later",
                    self.settings.calls_max
                ),
            ));
        }
        let permits = u32::try_from(body_bytes.div_ceil(CALL_UNIT)).unwrap_or(u32::MAX);
        self.call_memory
            .clone()
            .try_acquire_many_owned(permits)
            .map_err(|_none| {
                Refusal::new(
                    RefusalKind::Busy,
                    format!(
                        "the bodies of all open calls take {} bytes at most; ask again later",
                        self.settings.calls_bytes_max
                    ),
                )
            })
    }
}

/// Serves segments and calls over TCP.
#[derive(Debug)]
pub struct Server;

/// A running server; it stops when this is dropped.
#[derive(Debug)]
pub struct ServerHandle {
    address: SocketAddr,
    serving: Arc<Serving>,
    stop: watch::Sender<bool>,
    listener: tokio::task::JoinHandle<()>,
}

impl Server {
    /// Listens, and serves until the handle is dropped or stopped.
    ///
    /// # Errors
    /// An address that is taken or is none; [`TransferError::Insecure`] for plain text beyond
    /// loopback without consent.
    pub async fn start(
        settings: ServerSettings,
        segments: Arc<dyn SegmentSource>,
        calls: Arc<dyn CallHandler>,
    ) -> Result<ServerHandle> {
        Self::start_with_reserved(settings, segments, calls, Arc::new(NoCalls)).await
    }

    /// The same with a handler of the transports' own methods.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn start_with_reserved(
        settings: ServerSettings,
        segments: Arc<dyn SegmentSource>,
        calls: Arc<dyn CallHandler>,
        reserved: Arc<dyn CallHandler>,
    ) -> Result<ServerHandle> {
        let setup = |reason: String| TransferError::Setup {
            what: format!("listening on {}", settings.address),
            reason,
        };
        let candidates: Vec<SocketAddr> = tokio::net::lookup_host(&settings.address)
            .await
            .map_err(|error| setup(format!("it is no host and port of this one: {error}")))?
            .collect();
        if let Some(open) = candidates
            .iter()
            .find(|address| !may_connect(**address, settings.tls.is_some(), settings.insecure))
        {
            return Err(TransferError::Insecure {
                address: open.to_string(),
            });
        }
        let listener = TcpListener::bind(&candidates[..])
            .await
            .map_err(|error| setup(error.to_string()))?;
        let address = listener
            .local_addr()
            .map_err(|error| setup(error.to_string()))?;
        let call_permits = usize::try_from(settings.calls_bytes_max / CALL_UNIT)
            .unwrap_or(usize::MAX)
            .clamp(1, Semaphore::MAX_PERMITS);
        let serving = Arc::new(Serving {
            call_memory: Arc::new(Semaphore::new(call_permits)),
            settings,
            segments,
            calls,
            reserved,
            statistics: Counters::default(),
        });
        let (stop, stopped) = watch::channel(false);
        Ok(ServerHandle {
            address,
            serving: serving.clone(),
            stop,
            listener: tokio::spawn(listen(serving, listener, stopped)),
        })
    }
}

impl ServerHandle {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it did so far.
    pub fn statistics(&self) -> ServerStatistics {
        let counters = &self.serving.statistics;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ServerStatistics {
            connections: get(&counters.connections),
            reads: get(&counters.reads),
            bytes: get(&counters.bytes),
            calls: get(&counters.calls),
            refusals: get(&counters.refusals),
            rejected: get(&counters.rejected),
        }
    }

    /// Listens no more, tells every connection, gives each a moment for what it is sending, and
    /// ends them.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        // The listener ends by itself after its timeout at the latest.
        let _ = (&mut self.listener).await;
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

async fn listen(serving: Arc<Serving>, listener: TcpListener, mut stopped: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(serving.settings.connections_max));
    // Dropped with this task, and every connection with it.
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, from)) => {
                let place = places.clone().try_acquire_owned().ok();
                let (serving, stopped) = (serving.clone(), stopped.clone());
                connections.spawn(async move {
                    if let Err(error) = admit(serving.clone(), stream, from, place, stopped).await {
                        serving.statistics.rejected.fetch_add(1, Ordering::Relaxed);
                        tracing::warn!(%from, %error, "a connection was not let in");
                    }
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: others have to end first.
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    let all = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(serving.settings.stop_timeout, all).await;
}

/// Lets a client in, if it may, and serves it.
async fn admit(
    serving: Arc<Serving>,
    stream: TcpStream,
    from: SocketAddr,
    place: Option<OwnedSemaphorePermit>,
    stopped: watch::Receiver<bool>,
) -> Result<()> {
    let failed = |error: std::io::Error| TransferError::Closed {
        peer: from.to_string(),
        reason: error.to_string(),
    };
    halves::prepare(&stream).map_err(failed)?;
    let timeout = serving.settings.handshake_timeout;
    let late = |_elapsed| TransferError::Deadline {
        peer: from.to_string(),
        waited_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
    };
    let verdict = |identity: Result<PeerIdentity, Refusal>| match place {
        Some(_) => identity,
        None => Err(Refusal::new(
            RefusalKind::Busy,
            format!(
                "{} connections are open, which is the limit; come again later",
                serving.settings.connections_max
            ),
        )),
    };
    let (peer, halves) = match &serving.settings.tls {
        None => {
            let mut stream = stream;
            let identity = verdict(Ok(PeerIdentity {
                role: None,
                name: "(plain text)".to_string(),
                address: from.to_string(),
            }));
            let greeting = greet(&serving, &mut stream, from, identity);
            let peer = tokio::time::timeout(timeout, greeting)
                .await
                .map_err(late)??;
            (peer, halves::plain(stream))
        }
        Some(tls) => {
            let handshake = async {
                let (mut stream, identity) = tls.accept(stream, from).await?;
                let peer = greet(&serving, &mut stream, from, verdict(identity)).await?;
                Ok::<_, TransferError>((peer, stream))
            };
            let (peer, stream) = tokio::time::timeout(timeout, handshake)
                .await
                .map_err(late)??;
            (peer, halves::other(stream))
        }
    };
    run(serving, peer, halves, stopped).await;
    drop(place);
    Ok(())
}

async fn run(
    serving: Arc<Serving>,
    peer: PeerIdentity,
    halves: halves::Halves,
    mut stopped: watch::Receiver<bool>,
) {
    let connections = &serving.statistics.connections;
    connections.fetch_add(1, Ordering::Relaxed);
    let leave = scopeguard(|| {
        serving
            .statistics
            .connections
            .fetch_sub(1, Ordering::Relaxed);
    });
    let stop = async move {
        // A handle that is gone stops this task itself.
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    session::serve(serving.clone(), peer, halves, stop).await;
    drop(leave);
}

/// Runs `leave` when dropped, also when the task is aborted.
fn scopeguard<F: FnMut()>(leave: F) -> impl Drop {
    struct Guard<F: FnMut()>(F);
    impl<F: FnMut()> Drop for Guard<F> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    Guard(leave)
}

/// Exchanges hellos; a client that is refused is told why.
async fn greet(
    serving: &Serving,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    from: SocketAddr,
    identity: Result<PeerIdentity, Refusal>,
) -> Result<PeerIdentity> {
    let closed = |error: std::io::Error| TransferError::Closed {
        peer: from.to_string(),
        reason: error.to_string(),
    };
    let limits = serving.limits();
    let mut bytes = [0; Hello::BYTES];
    stream.read_exact(&mut bytes).await.map_err(closed)?;
    let identity = match Hello::parse(&bytes) {
        Ok(_hello) => identity,
        Err(error) => Err(Refusal::new(RefusalKind::Protocol, error.to_string())),
    };
    let mut hello = Hello::new(limits.read_bytes_max, limits.call_bytes_max);
    if identity.is_err() {
        hello.features |= HELLO_REFUSES;
    }
    let mut greeting = hello.to_bytes().to_vec();
    if let Err(refusal) = &identity {
        greeting.extend(wire::refusal_frame(FrameKind::Goodbye, 0, refusal));
    }
    stream.write_all(&greeting).await.map_err(closed)?;
    stream.flush().await.map_err(closed)?;
    match identity {
        Ok(peer) => Ok(peer),
        Err(refusal) => {
            // What was said must arrive before the connection is reset over unread requests.
            let _ = stream.shutdown().await;
            Err(TransferError::Refused {
                peer: "this server".to_string(),
                refusal,
            })
        }
    }
}

/// Serves one client over any stream, as if it had been accepted; for tests and fuzzing.
#[cfg(any(test, feature = "conformance"))]
pub async fn serve_over(
    settings: ServerSettings,
    mut stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    segments: Arc<dyn SegmentSource>,
    calls: Arc<dyn CallHandler>,
) -> Result<()> {
    let from = SocketAddr::from(([127, 0, 0, 1], 0));
    let serving = Arc::new(Serving {
        call_memory: Arc::new(Semaphore::new(1 << 16)),
        settings,
        segments,
        calls,
        reserved: Arc::new(NoCalls),
        statistics: Counters::default(),
    });
    let identity = Ok(PeerIdentity {
        role: None,
        name: "(plain text)".to_string(),
        address: from.to_string(),
    });
    let peer = greet(&serving, &mut stream, from, identity).await?;
    let stop = std::future::pending();
    session::serve(serving, peer, halves::other(stream), stop).await;
    Ok(())
}
