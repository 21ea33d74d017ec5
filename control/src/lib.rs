//! Control and metrics: the gRPC services of worker and coordinator, and their HTTP side.
//!
//! What this crate promises:
//!
//! - **Loopback unless told otherwise.** There is no encryption yet, so [`Listen::check`] refuses
//!   every other address, to serve on or to talk to, unless `insecure` says that the network is
//!   trusted.
//! - **Everything is bounded**: connections, requests in flight, message sizes, deadlines.
//! - **Nothing here decides.** Services are traits ([`WorkerService`], [`CoordinatorService`]) that
//!   the roles implement; this crate carries their answers.
//!
//! `/metrics` speaks Prometheus' text format, or OpenMetrics to whom asks for it. Names start with
//! `stoa_`, end in their unit, and counters in `_total`; see [`Metric`].
#![forbid(unsafe_code)]

mod address;
mod client;
mod error;
mod grpc;
mod http;
mod listen;
mod metrics;
mod observe;

/// The messages of `proto/control.proto`, with serde for JSON, and what tonic makes of its services.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod proto {
    tonic::include_proto!("stoa.control.v1");
}

pub use address::Listen;
pub use client::{ClientSettings, CoordinatorClient, WorkerClient};
pub use error::{Error, ErrorKind, Result};
pub use grpc::{CoordinatorService, ServiceError, Services, WorkerService, serve_grpc};
pub use http::{Health, serve_http};
pub use listen::Server;
pub use metrics::{Metric, MetricKind, MetricsRegistry};
pub use observe::{coordinator_metrics, worker_metrics};
pub use proto::{
    CoordinatorStatus, KnownWorker, PeerPath, PeersReport, PinReport, PlannedTable, RefreshReport,
    RefusedRequest, TableStatus, VerifyReport, WorkerStatus,
};

/// For implementations of the service traits: `#[stoa_control::async_trait]`.
pub use tonic::async_trait;

/// Metrics of one's own can be registered natively, see [`MetricsRegistry::register`].
pub use prometheus_client;
