//! Starting a worker, and the handle of one that runs.

use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use stoa_control::{
    Health, MetricsRegistry, Server, Services, serve_grpc, serve_http, worker_metrics,
};
use stoa_metastore::{
    Records, TableState, WorkerAddresses, WorkerPhase, WorkerRecord, WorkerState, keys,
    split_table_version,
};
use stoa_origin::Origin;
use stoa_transfer::PathStatistics;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::background::Background;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::events::{Events, Jobs};
use crate::looks::looks;
use crate::opening::Opening;
use crate::peers::{self, PeerCalls, PeerNetwork, Peers, Serving, advertised};
use crate::registration;
use crate::resolve::Sources;
use crate::service::WorkerControl;
use crate::settings::WorkerSettings;
use crate::shared::{Shared, unix_ms};

/// Commands that may wait for the engine.
const COMMANDS_MAX: usize = 16;

/// A worker: owns one cache directory and fills it by its part of the plans.
#[derive(Debug)]
pub struct Worker;

impl Worker {
    /// Takes the cache directory over with all that is intact in it, registers, and follows the
    /// plans in a task of its own until the handle is shut down or dropped. What is in the directory
    /// is looked into at once, or only when there is something to do (`takeover_delay`).
    ///
    /// The metastore need not answer: what is held is served, and plans are followed once it does.
    ///
    /// # Errors
    /// [`Error::Setting`]; [`Error::Cache`] for a directory that is not safe or has another worker;
    /// [`Error::Control`] for an address that cannot be served.
    pub async fn start(
        settings: WorkerSettings,
        records: Records,
        origin: Origin,
    ) -> Result<WorkerHandle> {
        settings.validate()?;
        let network = match &settings.transfer {
            Some(transfer) => Some(PeerNetwork::new(transfer)?),
            None => None,
        };
        Worker::start_in(settings, records, origin, network).await
    }

    /// [`Worker::start`] with other means to reach other workers than the settings say, or none.
    ///
    /// # Errors
    /// As [`Worker::start`].
    pub async fn start_in(
        settings: WorkerSettings,
        records: Records,
        origin: Origin,
        network: Option<PeerNetwork>,
    ) -> Result<WorkerHandle> {
        settings.validate()?;
        let opening = {
            let settings = settings.clone();
            blocking(move || Opening::take(&settings)).await?
        };
        let dir = opening.dir().clone();
        let background = Background::start().map_err(Error::Threads)?;
        let shared = Arc::new(Shared::new(settings.clone(), opening, background));
        // Other workers ask for what is there as soon as they know of this one.
        if network.is_some() || settings.pin || settings.takeover_delay.is_zero() {
            shared.open_store().await?;
        }
        let (stop, stopped) = watch::channel(false);
        let mut incarnation = 0;
        let (peers, serving) = match network {
            Some(network) => {
                let deadline = settings.transfer.clone().unwrap_or_default().deadline;
                let peers = Arc::new(Peers::new(
                    settings.id.clone(),
                    settings.host.clone(),
                    network.client,
                    deadline,
                ));
                let (served, changes) = shared
                    .with_store(|store| (store.served(), store.changes()))
                    .await;
                incarnation = served.incarnation();
                shared.cache_incarnation.send_replace(incarnation);
                let calls = PeerCalls::new(
                    Arc::clone(&shared),
                    Arc::clone(&served),
                    Arc::clone(&peers),
                    changes,
                );
                let (segments, calls) = (Arc::clone(&served) as _, Arc::new(calls));
                let host = &settings.host;
                let serving = Serving::start(&network.listeners, host, segments, calls).await?;
                shared.set_transfer_addresses(serving.addresses().to_vec());
                (Some(peers), Some(serving))
            }
            None => (None, None),
        };
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        let control = WorkerControl::new(
            Arc::clone(&shared),
            records.clone(),
            commands,
            peers.clone(),
        );
        let metrics = metrics(&shared, &control, &origin);
        let (grpc, http) = serve(&settings, &control, &metrics).await?;

        let plans = records.follow(keys::CACHE_VERSION_PREFIX);
        let events = Events {
            worker: settings.id.clone(),
            stop: stopped.clone(),
            commands: received,
            health: plans.health(),
            plans,
            pins: records.follow(keys::PIN_PREFIX),
            jobs: Jobs::default(),
        };
        let sources = Sources {
            records: records.clone(),
            origin,
            worker: settings.id.clone(),
            snapshot_only: settings.freshness.is_none(),
            peers: peers.clone(),
        };
        let cache_dir = dir.path().to_string_lossy().into_owned();
        let reached = |listening: SocketAddr| advertised(listening, &settings.host);
        let record = WorkerRecord {
            id: settings.id.clone(),
            host: settings.host.clone(),
            addresses: WorkerAddresses {
                control: grpc.as_ref().map(Server::address).map(reached),
                http: http.as_ref().map(Server::address).map(reached),
                transfer: shared.transfer_addresses(),
            },
            capacity_bytes: shared.capacity_bytes,
            formats: vec!["arrow".into(), "packed".into(), "parquet".into()],
            started_unix_ms: shared.started_unix_ms,
            incarnation: shared.incarnation.clone(),
            cache_incarnation: match &serving {
                Some(_) => format!("{incarnation:016x}"),
                None => String::new(),
            },
            cache_dir,
        };
        let engine = Engine::new(Arc::clone(&shared), sources, events);
        // Should the engine end for any other reason, the registration must not outlive it.
        let ended = StopWhenDropped(stop.clone());
        let mut tasks = vec![
            tokio::spawn(async move {
                let _ended = ended;
                engine.run().await;
            }),
            tokio::spawn(registration::run(
                Arc::clone(&shared),
                records.clone(),
                record,
                stopped.clone(),
            )),
        ];
        if let Some(peers) = &peers {
            let (shared, peers) = (Arc::clone(&shared), Arc::clone(peers));
            tasks.push(tokio::spawn(peers::keep(
                shared, records, peers, dir, stopped,
            )));
        }
        Ok(WorkerHandle {
            shared,
            control,
            metrics,
            stop,
            tasks,
            grpc,
            http,
            peers,
            serving,
        })
    }
}

/// Runs what may wait for the disk or the kernel.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

struct StopWhenDropped(watch::Sender<bool>);

impl Drop for StopWhenDropped {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

fn metrics(shared: &Arc<Shared>, control: &WorkerControl, origin: &Origin) -> MetricsRegistry {
    let registry = MetricsRegistry::new("worker");
    let control = control.clone();
    registry.observe(move || worker_metrics(&control.status_now()));
    let (shared, origin) = (Arc::clone(shared), origin.clone());
    registry.observe(move || shared.counters.metrics(&origin.counters()));
    registry
}

async fn serve(
    settings: &WorkerSettings,
    control: &WorkerControl,
    metrics: &MetricsRegistry,
) -> Result<(Option<Server>, Option<Server>)> {
    let grpc = match &settings.control {
        Some(listen) => {
            let services = Services::new().worker(Arc::new(control.clone()));
            Some(serve_grpc(listen, services).await?)
        }
        None => None,
    };
    let http = match &settings.http {
        Some(listen) => {
            let control = control.clone();
            let health = move || {
                let status = control.status_now();
                if status.state == WorkerPhase::Degraded.to_string() || !status.problems.is_empty()
                {
                    Health::Degraded(status.problems.join("; "))
                } else {
                    Health::Healthy
                }
            };
            Some(serve_http(listen, metrics.clone(), health).await?)
        }
        None => None,
    };
    Ok((grpc, http))
}

/// Wakes a worker that leaves its directory alone because it has nothing to do.
#[derive(Clone)]
pub struct Waker {
    /// Weak: who reads tables does not keep the directory from its next worker.
    shared: Weak<Shared>,
}

impl Waker {
    /// Tells that a table is being read: a worker at rest takes its directory over when it is time
    /// to look whether the table's files have changed. Costs a read of a small file at most.
    pub fn table_is_read(&self, table: &str) {
        let Some(shared) = self.shared.upgrade().filter(|shared| !shared.is_open()) else {
            return;
        };
        let settings = &shared.settings;
        let Some(freshness) = settings.freshness else {
            return;
        };
        let looked_at = looks(&settings.cache_dir).get(table).copied();
        if is_due(looked_at, freshness, unix_ms()) {
            shared.wake();
        }
    }
}

impl std::fmt::Debug for Waker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waker").finish_non_exhaustive()
    }
}

/// Whether it is time for another look. A clock that was set back does not put it off.
fn is_due(looked_at_unix_ms: Option<u64>, freshness: Duration, now_unix_ms: u64) -> bool {
    let since = looked_at_unix_ms.and_then(|at| now_unix_ms.checked_sub(at));
    since.is_none_or(|since| Duration::from_millis(since) >= freshness)
}

/// A running worker. Dropping it stops the worker without waiting; the cache stays for its
/// readers and for the next worker of the directory.
pub struct WorkerHandle {
    shared: Arc<Shared>,
    control: WorkerControl,
    metrics: MetricsRegistry,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
    grpc: Option<Server>,
    http: Option<Server>,
    peers: Option<Arc<Peers>>,
    serving: Option<Serving>,
}

impl WorkerHandle {
    /// What the worker does and holds.
    pub fn state(&self) -> WorkerState {
        self.shared.state.borrow().clone()
    }

    /// Follows the state: every change of progress can be waited for.
    pub fn subscribe(&self) -> watch::Receiver<WorkerState> {
        self.shared.state.subscribe()
    }

    /// Whether it has looked into its directory, rather than waiting for something to do.
    pub fn has_taken_over(&self) -> bool {
        self.shared.is_open()
    }

    /// To be told when a table is read.
    pub fn waker(&self) -> Waker {
        Waker {
            shared: Arc::downgrade(&self.shared),
        }
    }

    /// The worker's answers to control requests, for a process that embeds it.
    pub fn control(&self) -> &WorkerControl {
        &self.control
    }

    /// What the worker's `/metrics` shows.
    pub fn metrics(&self) -> &MetricsRegistry {
        &self.metrics
    }

    /// Where control is served, if it is.
    pub fn control_address(&self) -> Option<SocketAddr> {
        self.grpc.as_ref().map(Server::address)
    }

    /// Where metrics and health are served, if they are.
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http.as_ref().map(Server::address)
    }

    /// Where other workers can read its memory.
    pub fn transfer_addresses(&self) -> Vec<String> {
        self.shared.transfer_addresses()
    }

    /// Every path to another worker's memory, with what was seen of it.
    pub fn peer_paths(&self) -> Vec<PathStatistics> {
        self.peers
            .as_ref()
            .map_or_else(Vec::new, |peers| peers.paths())
    }

    /// Waits until a plan of this version, or of a later one, is published as far as it can be,
    /// and says how far that is: chunks may be left out for want of room or because they cannot be
    /// had. Waits as long as it takes; put a deadline around it.
    ///
    /// # Errors
    /// [`Error::Table`] for text that is no table and version; [`Error::Stopped`].
    pub async fn wait_ready(&self, table_version: &str) -> Result<TableState> {
        let (table, version) =
            split_table_version(table_version).map_err(|error| Error::Table {
                table: table_version.to_owned(),
                reason: error.to_string(),
            })?;
        let mut states = self.subscribe();
        let settled = |state: &WorkerState| {
            let busy = state.state == WorkerPhase::Loading;
            state
                .tables
                .get(table)
                .is_some_and(|table| is_settled(table, version, busy))
        };
        tokio::select! {
            state = states.wait_for(settled) => match state {
                Ok(state) => Ok(state.tables[table].clone()),
                Err(_) => Err(self.stopped()),
            },
            // The engine holds no end of the channel: it may stop while somebody waits.
            () = self.ended() => Err(self.stopped()),
        }
    }

    async fn ended(&self) {
        while !self.tasks.iter().any(JoinHandle::is_finished) {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    fn stopped(&self) -> Error {
        Error::Stopped {
            id: self.shared.settings.id.clone(),
        }
    }

    /// Stops the worker in order: nothing is lost that was stored, the registration ends at once,
    /// and the directory is free for the next worker when this returns.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        if let Some(serving) = self.serving.take() {
            serving.stop().await;
        }
        for task in std::mem::take(&mut self.tasks) {
            if let Err(error) = task.await
                && error.is_panic()
            {
                tracing::error!(%error, "a task of the worker panicked");
            }
        }
        for server in [self.grpc.take(), self.http.take()].into_iter().flatten() {
            server.shutdown().await;
        }
    }
}

impl std::fmt::Debug for WorkerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerHandle")
            .field("id", &self.shared.settings.id)
            .field("cache_dir", &self.shared.settings.cache_dir)
            .field("control", &self.control_address())
            .field("http", &self.http_address())
            .finish_non_exhaustive()
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// Whether a table has got as far as it can with that version. While the worker is `busy`, what
/// was left out may still come.
fn is_settled(table: &TableState, version: u64, busy: bool) -> bool {
    let reached = table.target.is_some_and(|target| target.version >= version);
    let complete = table.current.is_some() && table.current == table.target;
    let partial = table.left_out.chunks > 0
        && table.chunks_done + table.left_out.chunks >= table.chunks_total;
    reached && (complete || partial && !busy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_is_due_when_the_last_is_too_long_ago_or_unknown() {
        let minute = Duration::from_secs(60);
        assert!(is_due(None, minute, 100_000));
        assert!(is_due(Some(40_000), minute, 100_000));
        assert!(!is_due(Some(40_001), minute, 100_000));
        assert!(is_due(Some(100_001), minute, 100_000), "a clock set back");
    }
}
