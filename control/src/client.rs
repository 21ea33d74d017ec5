//! Clients of the control services. Every call has a deadline.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::address::check_peer;
use crate::error::{Error, Result};
use crate::grpc::ANSWER_BYTES_MAX;
use crate::proto::coordinator_control_client::CoordinatorControlClient;
use crate::proto::worker_control_client::WorkerControlClient;
use crate::proto::{
    CoordinatorStatus, CoordinatorStatusRequest, PeersReport, PeersRequest, PinReport, PinRequest,
    RefreshReport, RefreshRequest, UnpinRequest, VerifyReport, VerifyRequest, WorkerStatus,
    WorkerStatusRequest,
};

/// Deadlines of a client, and whether it may talk in plain text to other hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClientSettings {
    /// How long connecting may take.
    pub connect_timeout_ms: u64,
    /// How long a status may take.
    pub status_timeout_ms: u64,
    /// How long pinning, unpinning and a fresh look may take.
    pub action_timeout_ms: u64,
    /// How long the hashing of everything may take.
    pub verify_timeout_ms: u64,
    /// Whether an address other than loopback may be talked to in plain text.
    pub insecure: bool,
}

impl Default for ClientSettings {
    fn default() -> ClientSettings {
        ClientSettings {
            connect_timeout_ms: 2_000,
            status_timeout_ms: 5_000,
            action_timeout_ms: 60_000,
            verify_timeout_ms: 30 * 60_000,
            insecure: false,
        }
    }
}

/// Where one peer is, and how to call it.
#[derive(Clone, Debug)]
struct Peer {
    address: String,
    channel: Channel,
    settings: ClientSettings,
}

impl Peer {
    fn new(address: &str, settings: &ClientSettings) -> Result<Peer> {
        let url = check_peer(address, settings.insecure)?;
        let endpoint = Endpoint::from_shared(url)
            .map_err(|_| Error::InvalidAddress {
                found: address.to_owned(),
            })?
            .connect_timeout(Duration::from_millis(settings.connect_timeout_ms));
        Ok(Peer {
            address: address.to_owned(),
            channel: endpoint.connect_lazy(),
            settings: settings.clone(),
        })
    }

    /// Makes one call. The deadline goes along, so that the other side stops working too.
    async fn call<M, A, F>(
        &self,
        call: &'static str,
        timeout_ms: u64,
        message: M,
        send: impl FnOnce(Request<M>) -> F,
    ) -> Result<A>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let timeout = Duration::from_millis(timeout_ms);
        let mut request = Request::new(message);
        request.set_timeout(timeout);
        let deadline = || Error::Deadline {
            call,
            address: self.address.clone(),
            timeout_ms,
        };
        match tokio::time::timeout(timeout, send(request)).await {
            Err(_) => Err(deadline()),
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(match status.code() {
                // tonic says Cancelled when its own timer, set to the same moment, fires first.
                Code::DeadlineExceeded | Code::Cancelled => deadline(),
                Code::Unavailable => Error::Unreachable {
                    address: self.address.clone(),
                    reason: words(&status),
                },
                Code::Unimplemented => Error::NotServed {
                    call,
                    address: self.address.clone(),
                    reason: words(&status),
                },
                _ => Error::Failed {
                    call,
                    address: self.address.clone(),
                    reason: words(&status),
                },
            }),
        }
    }
}

/// What a status says, with the innermost cause: "transport error" alone helps nobody.
fn words(status: &Status) -> String {
    let mut reason = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        if cause.source().is_none() {
            let cause = cause.to_string();
            if !reason.contains(&cause) {
                reason = if reason.is_empty() {
                    cause
                } else {
                    format!("{reason}: {cause}")
                };
            }
        }
        source = source.and_then(std::error::Error::source);
    }
    if reason.is_empty() {
        format!("{:?}", status.code())
    } else {
        reason
    }
}

/// Asks a worker.
#[derive(Clone, Debug)]
pub struct WorkerClient {
    peer: Peer,
    grpc: WorkerControlClient<Channel>,
}

impl WorkerClient {
    /// A client of the worker at `host:port`; connects with the first call. Must be called within
    /// a tokio runtime. Fails on an address that is not loopback unless the settings allow it.
    pub fn new(address: &str, settings: &ClientSettings) -> Result<WorkerClient> {
        let peer = Peer::new(address, settings)?;
        let grpc = WorkerControlClient::new(peer.channel.clone())
            .max_decoding_message_size(ANSWER_BYTES_MAX);
        Ok(WorkerClient { peer, grpc })
    }

    /// What it holds and how far it is.
    pub async fn status(&self) -> Result<WorkerStatus> {
        let (mut grpc, timeout) = (self.grpc.clone(), self.peer.settings.status_timeout_ms);
        let call = |request| async move { grpc.status(request).await };
        self.peer
            .call("status", timeout, WorkerStatusRequest {}, call)
            .await
    }

    /// Has it hash what is published and drop what is damaged.
    pub async fn verify(&self) -> Result<VerifyReport> {
        let (mut grpc, timeout) = (self.grpc.clone(), self.peer.settings.verify_timeout_ms);
        let call = |request| async move { grpc.verify(request).await };
        self.peer
            .call("verify", timeout, VerifyRequest {}, call)
            .await
    }

    /// Has it lock what is published into memory.
    pub async fn pin(&self) -> Result<PinReport> {
        let (mut grpc, timeout) = (self.grpc.clone(), self.peer.settings.action_timeout_ms);
        let call = |request| async move { grpc.pin(request).await };
        self.peer.call("pin", timeout, PinRequest {}, call).await
    }

    /// Has it let go of what is locked.
    pub async fn unpin(&self) -> Result<PinReport> {
        let (mut grpc, timeout) = (self.grpc.clone(), self.peer.settings.action_timeout_ms);
        let call = |request| async move { grpc.unpin(request).await };
        self.peer
            .call("unpin", timeout, UnpinRequest {}, call)
            .await
    }

    /// Has it look at the origin of these tables (none: all) at once.
    pub async fn refresh(&self, tables: Vec<String>) -> Result<RefreshReport> {
        let (mut grpc, timeout) = (self.grpc.clone(), self.peer.settings.action_timeout_ms);
        let call = |request| async move { grpc.refresh(request).await };
        self.peer
            .call("refresh", timeout, RefreshRequest { tables }, call)
            .await
    }
}

impl WorkerClient {
    /// How it reaches the memory of other workers.
    pub async fn peers(&self) -> Result<PeersReport> {
        let (mut grpc, timeout) = (self.grpc.clone(), self.peer.settings.status_timeout_ms);
        let call = |request| async move { grpc.peers(request).await };
        self.peer
            .call("peers", timeout, PeersRequest {}, call)
            .await
    }
}

/// Asks a coordinator.
#[derive(Clone, Debug)]
pub struct CoordinatorClient {
    peer: Peer,
    grpc: CoordinatorControlClient<Channel>,
}

impl CoordinatorClient {
    /// A client of the coordinator at `host:port`; as [`WorkerClient::new`].
    pub fn new(address: &str, settings: &ClientSettings) -> Result<CoordinatorClient> {
        let peer = Peer::new(address, settings)?;
        let grpc = CoordinatorControlClient::new(peer.channel.clone())
            .max_decoding_message_size(ANSWER_BYTES_MAX);
        Ok(CoordinatorClient { peer, grpc })
    }

    /// Who leads, what is planned where, and what was refused.
    pub async fn status(&self) -> Result<CoordinatorStatus> {
        let (mut grpc, timeout) = (self.grpc.clone(), self.peer.settings.status_timeout_ms);
        let call = |request| async move { grpc.status(request).await };
        self.peer
            .call("status", timeout, CoordinatorStatusRequest {}, call)
            .await
    }
}

#[cfg(test)]
#[path = "grpc_tests.rs"]
mod tests;
