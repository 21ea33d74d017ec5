//! The services as traits that the roles implement, and serving them over gRPC.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tonic::transport::server::Router;
use tonic::{Request, Response, Status};

use crate::address::Listen;
use crate::error::Result;
use crate::listen::{BoundedListener, Server};
use crate::proto::coordinator_control_server::{CoordinatorControl, CoordinatorControlServer};
use crate::proto::worker_control_server::{WorkerControl, WorkerControlServer};
use crate::proto::{
    CoordinatorStatus, CoordinatorStatusRequest, PeersReport, PeersRequest, PinReport, PinRequest,
    RefreshReport, RefreshRequest, UnpinRequest, VerifyReport, VerifyRequest, WorkerStatus,
    WorkerStatusRequest,
};

/// The largest request that is read; ours are tiny.
const REQUEST_BYTES_MAX: usize = 1 << 20;
/// The largest answer that is sent or read: a status with very many tables.
pub(crate) const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Requests that one connection may have open.
const REQUESTS_IN_FLIGHT_MAX: usize = 32;
/// The longest any request may take, whatever deadline the client has: the hashing of a full cache.
const SERVING_TIME_MAX: Duration = Duration::from_secs(30 * 60);
/// Peers that answer no ping for this long are gone.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Why a service refuses, in words for the one who asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceError {
    /// What was asked for is not there.
    NotFound(String),
    /// Not now; try again.
    Busy(String),
    /// It was tried, and failed.
    Failed(String),
}

impl fmt::Display for ServiceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ServiceError::NotFound(reason)
        | ServiceError::Busy(reason)
        | ServiceError::Failed(reason)) = self;
        f.write_str(reason)
    }
}

impl std::error::Error for ServiceError {}

impl From<ServiceError> for Status {
    fn from(error: ServiceError) -> Status {
        match error {
            ServiceError::NotFound(reason) => Status::not_found(reason),
            ServiceError::Busy(reason) => Status::unavailable(reason),
            ServiceError::Failed(reason) => Status::internal(reason),
        }
    }
}

/// What a worker answers.
#[tonic::async_trait]
pub trait WorkerService: Send + Sync + 'static {
    /// What it holds and how far it is.
    async fn status(&self) -> Result<WorkerStatus, ServiceError>;
    /// Hashes what is published and drops what is damaged.
    async fn verify(&self) -> Result<VerifyReport, ServiceError>;
    /// Locks what is published, now and from now on, into memory.
    async fn pin(&self) -> Result<PinReport, ServiceError>;
    /// Lets go of it.
    async fn unpin(&self) -> Result<PinReport, ServiceError>;
    /// Looks at the origin of these tables (none: all) at once.
    async fn refresh(&self, tables: Vec<String>) -> Result<RefreshReport, ServiceError>;
    /// How it reaches the memory of other workers.
    async fn peers(&self) -> Result<PeersReport, ServiceError>;
}

/// What a coordinator answers.
#[tonic::async_trait]
pub trait CoordinatorService: Send + Sync + 'static {
    /// Who leads, what is planned where, and what was refused.
    async fn status(&self) -> Result<CoordinatorStatus, ServiceError>;
}

/// What to serve: one role, or several in one process.
#[derive(Clone, Default)]
pub struct Services {
    worker: Option<Arc<dyn WorkerService>>,
    coordinator: Option<Arc<dyn CoordinatorService>>,
}

impl Services {
    /// Nothing yet.
    pub fn new() -> Services {
        Services::default()
    }

    /// Serves a worker too.
    pub fn worker(mut self, service: Arc<dyn WorkerService>) -> Services {
        self.worker = Some(service);
        self
    }

    /// Serves a coordinator too.
    pub fn coordinator(mut self, service: Arc<dyn CoordinatorService>) -> Services {
        self.coordinator = Some(service);
        self
    }

    fn router(self) -> Router {
        let worker = self.worker.map(|service| {
            WorkerControlServer::new(Worker(service))
                .max_decoding_message_size(REQUEST_BYTES_MAX)
                .max_encoding_message_size(ANSWER_BYTES_MAX)
        });
        let coordinator = self.coordinator.map(|service| {
            CoordinatorControlServer::new(Coordinator(service))
                .max_decoding_message_size(REQUEST_BYTES_MAX)
                .max_encoding_message_size(ANSWER_BYTES_MAX)
        });
        tonic::transport::Server::builder()
            .timeout(SERVING_TIME_MAX)
            .concurrency_limit_per_connection(REQUESTS_IN_FLIGHT_MAX)
            .max_concurrent_streams(REQUESTS_IN_FLIGHT_MAX as u32)
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .add_optional_service(worker)
            .add_optional_service(coordinator)
    }
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Services")
            .field("worker", &self.worker.is_some())
            .field("coordinator", &self.coordinator.is_some())
            .finish()
    }
}

/// Serves until the handle is shut down or dropped. Fails on an address that is not loopback
/// unless `listen` says otherwise, and on one that is taken.
pub async fn serve_grpc(listen: &Listen, services: Services) -> Result<Server> {
    let router = services.router();
    Server::start(listen, |listener, stopped| async move {
        let stop = async {
            let _ = stopped.await;
        };
        let served = router
            .serve_with_incoming_shutdown(incoming(listener), stop)
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "gRPC serving ended");
        }
    })
    .await
}

fn incoming(
    listener: BoundedListener,
) -> impl tokio_stream::Stream<Item = std::io::Result<crate::listen::Connection>> + Send {
    // A channel of one: at most one connection waits here, the rest in the system's backlog.
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let mut listener = listener;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                (connection, _) = listener.next() => {
                    if sender.send(Ok(connection)).await.is_err() {
                        return;
                    }
                }
                // Serving stopped and dropped the stream: the port has to become free.
                () = sender.closed() => return,
            }
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(receiver)
}

struct Worker(Arc<dyn WorkerService>);

#[tonic::async_trait]
impl WorkerControl for Worker {
    async fn status(
        &self,
        _: Request<WorkerStatusRequest>,
    ) -> Result<Response<WorkerStatus>, Status> {
        Ok(Response::new(self.0.status().await?))
    }

    async fn verify(&self, _: Request<VerifyRequest>) -> Result<Response<VerifyReport>, Status> {
        Ok(Response::new(self.0.verify().await?))
    }

    async fn pin(&self, _: Request<PinRequest>) -> Result<Response<PinReport>, Status> {
        Ok(Response::new(self.0.pin().await?))
    }

    async fn unpin(&self, _: Request<UnpinRequest>) -> Result<Response<PinReport>, Status> {
        Ok(Response::new(self.0.unpin().await?))
    }

    async fn refresh(
        &self,
        request: Request<RefreshRequest>,
    ) -> Result<Response<RefreshReport>, Status> {
        Ok(Response::new(
            self.0.refresh(request.into_inner().tables).await?,
        ))
    }

    async fn peers(&self, _: Request<PeersRequest>) -> Result<Response<PeersReport>, Status> {
        Ok(Response::new(self.0.peers().await?))
    }
}

struct Coordinator(Arc<dyn CoordinatorService>);

#[tonic::async_trait]
impl CoordinatorControl for Coordinator {
    async fn status(
        &self,
        _: Request<CoordinatorStatusRequest>,
    ) -> Result<Response<CoordinatorStatus>, Status> {
        Ok(Response::new(self.0.status().await?))
    }
}
