//! Bounded accepting, shared by gRPC and HTTP, and the handle of what is being served.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinHandle;
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::address::Listen;
use crate::error::{Error, Result};

/// The most connections that one listener serves at a time; more wait in the system's backlog.
pub(crate) const CONNECTIONS_MAX: usize = 256;
/// How long a shutdown waits for requests that are being served.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
/// How long accepting pauses when the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Something that is being served. Dropping it stops it at once.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

impl Server {
    /// Where it is served; the port is the real one even if 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops accepting and waits for what is being served, at most 5 s.
    pub async fn shutdown(mut self) {
        if let Some(stop) = self.stop.take() {
            // The receiver is gone only if the task is.
            let _ = stop.send(());
        }
        if let Some(mut task) = self.task.take()
            && tokio::time::timeout(SHUTDOWN_GRACE, &mut task)
                .await
                .is_err()
        {
            tracing::warn!(address = %self.address, "requests still open at shutdown were cut off");
            task.abort();
        }
    }

    /// Runs `serve` with a bounded listener and a future that ends when the server is to stop.
    pub(crate) async fn start<F>(
        listen: &Listen,
        serve: impl FnOnce(BoundedListener, oneshot::Receiver<()>) -> F,
    ) -> Result<Server>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        listen.check()?;
        let bind = |source| Error::Bind {
            address: listen.address,
            source,
        };
        let tcp = TcpListener::bind(listen.address).await.map_err(bind)?;
        let address = tcp.local_addr().map_err(bind)?;
        let (stop, stopped) = oneshot::channel();
        let listener = BoundedListener {
            tcp,
            permits: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        };
        let task = tokio::spawn(serve(listener, stopped));
        Ok(Server {
            address,
            stop: Some(stop),
            task: Some(task),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Accepts while fewer than [`CONNECTIONS_MAX`] connections are open.
#[derive(Debug)]
pub(crate) struct BoundedListener {
    tcp: TcpListener,
    permits: Arc<Semaphore>,
}

impl BoundedListener {
    /// The next connection. Errors of single connections are passed over.
    pub(crate) async fn next(&mut self) -> (Connection, SocketAddr) {
        let permit = self.permits.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        loop {
            match self.tcp.accept().await {
                Ok((stream, peer)) => {
                    // Small requests and answers: waiting to fill packets only delays them.
                    let _ = stream.set_nodelay(true);
                    return (
                        Connection {
                            stream,
                            _permit: permit,
                        },
                        peer,
                    );
                }
                Err(error) => {
                    tracing::debug!(%error, "accept failed");
                    let of_one_connection = matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted
                            | io::ErrorKind::ConnectionReset
                            | io::ErrorKind::ConnectionRefused
                    );
                    if !of_one_connection {
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
    }
}

impl axum::serve::Listener for BoundedListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        self.next().await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

/// A connection that counts until it is closed.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    _permit: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
