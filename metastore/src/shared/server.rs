//! The owner's side: the store for the other processes of the machine.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};

use super::socket::{self, PROTOCOL, SOCKET_NAME};
use super::wire::proto::owner_server::{Owner, OwnerServer};
use super::wire::{self, proto};
use crate::embedded::{EmbeddedMetastore, WeakEmbedded};
use crate::store::{LeaseId, Metastore};

/// Connections that are served at a time; more wait in the system's backlog.
pub const CONNECTIONS_MAX: usize = 256;
/// Requests that one connection may have open, watches among them.
pub const REQUESTS_IN_FLIGHT_MAX: u32 = 256;
/// The largest request that is read: a transaction of the largest size, and its frame.
pub const REQUEST_BYTES_MAX: usize = 2 << 20;
/// How long accepting pauses when the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The socket, and what is served over it. Dropping it takes the name away and ends what is served.
#[derive(Debug)]
pub(super) struct Serving {
    path: PathBuf,
    stop: watch::Sender<bool>,
}

impl Serving {
    /// Serves the store to the processes of this machine. `None` where there can be no socket: the
    /// store is this process's alone then, and the others are told that it is busy.
    pub(super) fn start(dir: &Path, store: &EmbeddedMetastore) -> Option<Serving> {
        Serving::start_as(dir, store, PROTOCOL)
    }

    /// As an owner that speaks another version of the protocol.
    pub(super) fn start_as(
        dir: &Path,
        store: &EmbeddedMetastore,
        protocol: u32,
    ) -> Option<Serving> {
        let listener = match socket::listen(dir).and_then(UnixListener::from_std) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(
                    %error,
                    socket = %dir.join(SOCKET_NAME).display(),
                    "other processes cannot share this state while this one runs"
                );
                return None;
            }
        };
        let (stop, stopped) = watch::channel(false);
        let accepting = Accepting {
            listener,
            store: store.downgrade(),
            permits: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            stopped: stopped.clone(),
        };
        let incoming = futures::stream::unfold(accepting, Accepting::next);
        let service = OwnerServer::new(Service {
            store: store.downgrade(),
            protocol,
        })
        .max_decoding_message_size(REQUEST_BYTES_MAX)
        .max_encoding_message_size(wire::ANSWER_BYTES_MAX);
        let mut ended = stopped;
        tokio::spawn(async move {
            let served = Server::builder()
                .max_concurrent_streams(REQUESTS_IN_FLIGHT_MAX)
                .add_service(service)
                .serve_with_incoming_shutdown(incoming, async move {
                    // An error means that the owner is gone: the same.
                    let _ = ended.wait_for(|ended| *ended).await;
                });
            if let Err(error) = served.await {
                tracing::warn!(%error, "the state is not shared any more");
            }
        });
        Some(Serving {
            path: dir.join(SOCKET_NAME),
            stop,
        })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // While the file is still held, so that the name is nobody else's yet.
        let _ = std::fs::remove_file(&self.path);
        self.stop.send_replace(true);
    }
}

struct Accepting {
    listener: UnixListener,
    store: WeakEmbedded,
    permits: Arc<Semaphore>,
    stopped: watch::Receiver<bool>,
}

impl Accepting {
    /// The next connection of somebody who may; `None`, and the listener closed, when it is over.
    async fn next(mut self) -> Option<(io::Result<Connection>, Self)> {
        loop {
            let accepted = tokio::select! {
                biased;
                _ = self.stopped.wait_for(|stopped| *stopped) => return None,
                accepted = accept(&self.listener, &self.permits) => accepted,
            };
            match accepted {
                Ok((stream, permit)) => {
                    let user = stream.peer_cred().map(|credentials| credentials.uid());
                    if !user
                        .as_ref()
                        .is_ok_and(|user| socket::admits(socket::own_user(), *user))
                    {
                        tracing::warn!(?user, "a caller of another user is turned away");
                        continue;
                    }
                    let caller = Caller {
                        pid: socket::pid_of(&stream),
                        leases: Mutex::default(),
                        store: self.store.clone(),
                        runtime: Handle::current(),
                    };
                    let connection = Connection {
                        stream,
                        caller: Arc::new(caller),
                        _permit: permit,
                    };
                    return Some((Ok(connection), self));
                }
                Err(error) => {
                    tracing::debug!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn accept(
    listener: &UnixListener,
    permits: &Arc<Semaphore>,
) -> io::Result<(UnixStream, OwnedSemaphorePermit)> {
    let permit = Arc::clone(permits).acquire_owned().await;
    let permit = permit.expect("the semaphore is never closed");
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
}

/// One process at the other end. The kernel says when it is gone: its leases end with it, so that
/// nobody waits for the time of a process that died.
#[derive(Debug)]
struct Caller {
    pid: Option<u32>,
    leases: Mutex<BTreeSet<LeaseId>>,
    store: WeakEmbedded,
    runtime: Handle,
}

impl Caller {
    fn leases(&self) -> std::sync::MutexGuard<'_, BTreeSet<LeaseId>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let leases = std::mem::take(&mut *self.leases());
        let Some(store) = self.store.upgrade().filter(|_| !leases.is_empty()) else {
            return;
        };
        tracing::debug!(pid = self.pid, "a process has ended; so do its leases");
        self.runtime.spawn(async move {
            for lease in leases {
                if let Err(error) = store.revoke_lease(lease).await {
                    tracing::debug!(%error, %lease, "the lease will run out");
                }
            }
        });
    }
}

/// A connection of a caller.
struct Connection {
    stream: UnixStream,
    caller: Arc<Caller>,
    _permit: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = Arc<Caller>;

    fn connect_info(&self) -> Arc<Caller> {
        Arc::clone(&self.caller)
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
}

/// The store, call by call. It is not held open: when the owner lets it go, calls are told so.
struct Service {
    store: WeakEmbedded,
    protocol: u32,
}

impl Service {
    fn store(&self) -> Result<EmbeddedMetastore, Status> {
        let store = self.store.upgrade();
        store.ok_or_else(|| Status::unavailable("the owner of the state has let it go"))
    }
}

fn caller<T>(request: &Request<T>) -> Result<Arc<Caller>, Status> {
    let caller = request.extensions().get::<Arc<Caller>>();
    caller
        .cloned()
        .ok_or_else(|| Status::internal("a request without a connection"))
}

#[tonic::async_trait]
impl Owner for Service {
    async fn hello(
        &self,
        _: Request<proto::HelloRequest>,
    ) -> Result<Response<proto::HelloAnswer>, Status> {
        Ok(Response::new(proto::HelloAnswer {
            protocol: self.protocol,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }

    async fn get(
        &self,
        request: Request<proto::GetRequest>,
    ) -> Result<Response<proto::GetAnswer>, Status> {
        let entry = self.store()?.get(&request.get_ref().key).await;
        let entry = entry.map_err(wire::status_of)?.map(Into::into);
        Ok(Response::new(proto::GetAnswer { entry }))
    }

    type ListStream = BoxStream<'static, Result<proto::ListPart, Status>>;

    async fn list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let request = request.into_inner();
        let listing = self.store()?.list(&request.prefix).await;
        let listing = listing.map_err(wire::status_of)?;
        let parts = wire::parts_of(listing.entries, listing.revision, request.keys_only);
        Ok(Response::new(
            futures::stream::iter(parts.into_iter().map(Ok)).boxed(),
        ))
    }

    async fn commit(
        &self,
        request: Request<proto::Txn>,
    ) -> Result<Response<proto::TxnOutcome>, Status> {
        let txn = wire::txn_of(request.into_inner()).map_err(wire::status_of)?;
        let outcome = self.store()?.txn(txn).await.map_err(wire::status_of)?;
        Ok(Response::new(outcome.into()))
    }

    type WatchStream = BoxStream<'static, Result<proto::WatchEvent, Status>>;

    async fn watch(
        &self,
        request: Request<proto::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        let events = self.store()?;
        let events = events.watch(&request.prefix, request.from_revision).await;
        let events = events.map_err(wire::status_of)?;
        let events = events.map(|event| event.map(Into::into).map_err(wire::status_of));
        Ok(Response::new(events.boxed()))
    }

    async fn grant_lease(
        &self,
        request: Request<proto::GrantRequest>,
    ) -> Result<Response<proto::Lease>, Status> {
        let caller = caller(&request)?;
        let ttl = Duration::from_millis(request.get_ref().ttl_ms);
        let lease = self.store()?.grant_lease(ttl).await;
        let lease = lease.map_err(wire::status_of)?;
        caller.leases().insert(lease);
        Ok(Response::new(proto::Lease { id: lease.0 }))
    }

    async fn keep_alive(
        &self,
        request: Request<proto::Lease>,
    ) -> Result<Response<proto::Done>, Status> {
        let lease = LeaseId(request.get_ref().id);
        let kept = self.store()?.keep_alive(lease).await;
        kept.map_err(wire::status_of)?;
        Ok(Response::new(proto::Done {}))
    }

    async fn revoke_lease(
        &self,
        request: Request<proto::Lease>,
    ) -> Result<Response<proto::Done>, Status> {
        let caller = caller(&request)?;
        let lease = LeaseId(request.get_ref().id);
        let revoked = self.store()?.revoke_lease(lease).await;
        revoked.map_err(wire::status_of)?;
        caller.leases().remove(&lease);
        Ok(Response::new(proto::Done {}))
    }

    async fn identity(
        &self,
        _: Request<proto::IdentityRequest>,
    ) -> Result<Response<proto::IdentityAnswer>, Status> {
        let identity = self.store()?.identity().await.map_err(wire::status_of)?;
        Ok(Response::new(proto::IdentityAnswer {
            cluster_id: identity.cluster_id,
            revision: identity.revision,
        }))
    }
}
