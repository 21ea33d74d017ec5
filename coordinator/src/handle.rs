//! A coordinator that runs as a task, with its listeners.

use stoa_control::{
    Health, Listen, MetricsRegistry, Server, Services, coordinator_metrics, serve_grpc, serve_http,
};
use stoa_metastore::Records;
use stoa_origin::Origin;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use std::sync::Arc;

use crate::coordinator::Coordinator;
use crate::error::Result;
use crate::settings::{CoordinatorSettings, SystemClock};

/// Where a coordinator can be asked; nowhere by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CoordinatorListeners {
    /// Control over gRPC.
    pub control: Option<Listen>,
    /// Metrics and health over HTTP.
    pub http: Option<Listen>,
}

/// A coordinator that runs until it is told to stop.
///
/// Dropping it stops the task without giving the office back: its lease runs out.
#[derive(Debug)]
pub struct CoordinatorHandle {
    coordinator: Coordinator,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<()>>,
    servers: Vec<Server>,
}

impl Coordinator {
    /// Runs a candidate as a task of the current runtime, and serves its control and metrics.
    ///
    /// # Errors
    /// For settings that cannot work, and addresses that cannot be served.
    pub async fn start(
        settings: CoordinatorSettings,
        listeners: CoordinatorListeners,
        records: Records,
        origin: Origin,
    ) -> Result<CoordinatorHandle> {
        settings.check()?;
        let coordinator = Coordinator::new(records, origin, settings, Arc::new(SystemClock::new()));
        let mut servers = vec![];
        if let Some(listen) = &listeners.control {
            let services = Services::new().coordinator(coordinator.service());
            servers.push(serve_grpc(listen, services).await?);
        }
        if let Some(listen) = &listeners.http {
            let metrics = MetricsRegistry::new("coordinator");
            let status = coordinator.status();
            metrics.observe(move || coordinator_metrics(&status.borrow()));
            // A candidate that waits for its election is healthy.
            servers.push(serve_http(listen, metrics, || Health::Healthy).await?);
        }
        let (stop, stopped) = oneshot::channel::<()>();
        let running = coordinator.clone();
        let task = tokio::spawn(async move {
            running
                .run(async move {
                    if stopped.await.is_err() {
                        // The handle was dropped without a word: nobody is left to ask for a stop.
                        std::future::pending::<()>().await;
                    }
                })
                .await
        });
        Ok(CoordinatorHandle {
            coordinator,
            stop,
            task,
            servers,
        })
    }
}

impl CoordinatorHandle {
    /// What it knows, as it changes.
    pub fn status(&self) -> watch::Receiver<stoa_control::CoordinatorStatus> {
        self.coordinator.status()
    }

    /// Stops it, gives the office back, and waits until both is done.
    ///
    /// # Errors
    /// What had ended it before.
    pub async fn shutdown(self) -> Result<()> {
        let _ = self.stop.send(());
        for server in self.servers {
            server.shutdown().await;
        }
        match self.task.await {
            Ok(ended) => ended,
            Err(panic) => {
                tracing::error!(%panic, "the coordinator's task died");
                Ok(())
            }
        }
    }
}
