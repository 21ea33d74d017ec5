//! The other side: a process that asks the owner.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use hyper_util::rt::TokioIo;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Response, Status};
use tower::service_fn;

use super::socket::{self, PROTOCOL, SOCKET_NAME};
use super::wire::proto::owner_client::OwnerClient;
use super::wire::{self, proto};
use crate::error::{Error, Result};
use crate::store::{
    ClusterIdentity, Entry, LeaseId, Listing, Metastore, Txn, TxnOutcome, WatchStream,
};

/// How long an owner may take to answer the first call.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// How long it may take to answer any other call, or to send the next part of a listing.
pub const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// A connection to the owner of a store. It is not made anew: when it breaks, the owner is gone,
/// and with it every lease.
#[derive(Debug)]
pub(super) struct Client {
    grpc: OwnerClient<Channel>,
    socket: PathBuf,
    pid: Option<u32>,
}

impl Client {
    /// Connects to the owner that listens in `dir`. [`Error::OwnerGone`] where nobody does.
    pub(super) async fn connect(dir: &Path) -> Result<Client> {
        let socket = dir.join(SOCKET_NAME);
        let gone = |reason: String| Error::OwnerGone {
            socket: socket.clone(),
            reason,
        };
        let stream = timeout(CONNECT_DEADLINE, socket::connect(dir)).await;
        let stream = match stream {
            Ok(stream) => stream.map_err(|error| gone(error.to_string()))?,
            // The backlog of an owner that accepts nobody is full.
            Err(_) => return Err(silent(&socket, None, CONNECT_DEADLINE)),
        };
        let owner = stream
            .peer_cred()
            .map_err(|error| gone(error.to_string()))?;
        let own = socket::own_user();
        // Root looks after everybody's state; a state that lies open to others must not lead to one
        // of theirs.
        if own != 0 && !socket::admits(own, owner.uid()) {
            return Err(Error::Stranger {
                socket: socket.clone(),
                found: owner.uid(),
                expected: own,
            });
        }
        let pid = socket::pid_of(&stream);
        let once = Mutex::new(Some(TokioIo::new(stream)));
        let connector = service_fn(move |_: Uri| {
            let stream = once.lock().ok().and_then(|mut once| once.take());
            let stream = stream.ok_or_else(|| std::io::Error::other("the owner is gone"));
            std::future::ready(stream)
        });
        // The address is not used: the connection is there.
        let endpoint = Endpoint::from_static("http://owner.invalid");
        let channel = endpoint.connect_with_connector_lazy(connector);
        let grpc = OwnerClient::new(channel)
            .max_decoding_message_size(wire::ANSWER_BYTES_MAX)
            .max_encoding_message_size(super::REQUEST_BYTES_MAX);
        let client = Client { grpc, socket, pid };
        let hello = proto::HelloRequest {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let mut grpc = client.grpc.clone();
        let answer = client
            .answer("hello", CONNECT_DEADLINE, grpc.hello(hello))
            .await;
        let answer = match answer {
            // Somebody who speaks, and not this.
            Err(Error::Server { .. }) => proto::HelloAnswer::default(),
            other => other?,
        };
        if answer.protocol != PROTOCOL {
            return Err(Error::OwnerVersion {
                socket: client.socket.clone(),
                pid,
                found: answer.protocol,
                version: answer.version,
                expected: PROTOCOL,
            });
        }
        Ok(client)
    }

    /// The owner's process.
    pub(super) fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// The answer to a call, in time.
    async fn answer<T>(
        &self,
        call: &'static str,
        deadline: Duration,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T> {
        match timeout(deadline, answer).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.error(call, &status)),
            Err(_) => Err(silent(&self.socket, self.pid, deadline)),
        }
    }

    fn error(&self, call: &'static str, status: &Status) -> Error {
        if let Some(error) = wire::error_of(call, status) {
            return error;
        }
        match status.code() {
            // What only the transport says: the connection is over.
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal => {
                Error::OwnerGone {
                    socket: self.socket.clone(),
                    reason: status.message().to_owned(),
                }
            }
            _ => Error::Server {
                call,
                reason: status.to_string(),
            },
        }
    }

    async fn listing(&self, prefix: &str, keys_only: bool) -> Result<Listing> {
        let request = proto::ListRequest {
            prefix: prefix.to_owned(),
            keys_only,
        };
        let mut grpc = self.grpc.clone();
        let mut parts = self
            .answer("list", CALL_DEADLINE, grpc.list(request))
            .await?;
        let mut listing = Listing::default();
        loop {
            match timeout(CALL_DEADLINE, parts.message()).await {
                Ok(Ok(Some(part))) => {
                    listing.revision = part.revision;
                    let entries = part.entries.into_iter();
                    listing.entries.extend(entries.map(Entry::from));
                }
                Ok(Ok(None)) => return Ok(listing),
                Ok(Err(status)) => return Err(self.error("list", &status)),
                Err(_) => return Err(silent(&self.socket, self.pid, CALL_DEADLINE)),
            }
        }
    }
}

fn silent(socket: &Path, pid: Option<u32>, deadline: Duration) -> Error {
    Error::OwnerSilent {
        socket: socket.to_owned(),
        pid,
        timeout_ms: deadline.as_millis() as u64,
    }
}

#[async_trait]
impl Metastore for Client {
    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        let request = proto::GetRequest {
            key: key.to_owned(),
        };
        let mut grpc = self.grpc.clone();
        let answer = self.answer("get", CALL_DEADLINE, grpc.get(request)).await?;
        Ok(answer.entry.map(Entry::from))
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        self.listing(prefix, false).await
    }

    async fn list_keys(&self, prefix: &str) -> Result<Listing> {
        self.listing(prefix, true).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        txn.check()?;
        let mut grpc = self.grpc.clone();
        let request = proto::Txn::from(txn);
        let outcome = self
            .answer("commit", CALL_DEADLINE, grpc.commit(request))
            .await?;
        Ok(TxnOutcome {
            committed: outcome.committed,
            revision: outcome.revision,
        })
    }

    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<WatchStream> {
        let request = proto::WatchRequest {
            prefix: prefix.to_owned(),
            from_revision,
        };
        let mut grpc = self.grpc.clone();
        let events = self
            .answer("watch", CALL_DEADLINE, grpc.watch(request))
            .await?;
        let prefix = prefix.to_owned();
        let ended = move |reason: &str| Error::WatchEnded {
            prefix: prefix.clone(),
            reason: reason.to_owned(),
        };
        // An error, whosever it is, and the end of the stream are the last item.
        let states = (Some(events), ended);
        let events = futures::stream::unfold(states, |(events, ended)| async move {
            let mut events = events?;
            let item = match events.message().await {
                Ok(Some(event)) => match wire::event_of(event) {
                    Some(event) => return Some((Ok(event), (Some(events), ended))),
                    None => Err(ended("an event is not known here")),
                },
                Ok(None) => Err(ended("the owner of the state has ended it")),
                Err(status) => {
                    Err(wire::error_of("watch", &status).unwrap_or_else(|| ended(status.message())))
                }
            };
            Some((item, (None, ended)))
        });
        Ok(events.boxed())
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId> {
        let request = proto::GrantRequest {
            ttl_ms: ttl.as_millis() as u64,
        };
        let mut grpc = self.grpc.clone();
        let lease = self
            .answer("grant lease", CALL_DEADLINE, grpc.grant_lease(request))
            .await?;
        Ok(LeaseId(lease.id))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        let mut grpc = self.grpc.clone();
        let request = proto::Lease { id: lease.0 };
        self.answer("keep alive", CALL_DEADLINE, grpc.keep_alive(request))
            .await?;
        Ok(())
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<()> {
        let mut grpc = self.grpc.clone();
        let request = proto::Lease { id: lease.0 };
        self.answer("revoke lease", CALL_DEADLINE, grpc.revoke_lease(request))
            .await?;
        Ok(())
    }

    async fn identity(&self) -> Result<ClusterIdentity> {
        let mut grpc = self.grpc.clone();
        let request = proto::IdentityRequest {};
        let answer = self
            .answer("identity", CALL_DEADLINE, grpc.identity(request))
            .await?;
        Ok(ClusterIdentity {
            cluster_id: answer.cluster_id,
            revision: answer.revision,
        })
    }
}
