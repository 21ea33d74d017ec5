//! What a worker answers over its control service.

use std::sync::Arc;
use std::time::{Duration, Instant};

use stoa_control::{
    PeerPath, PeersReport, PinReport, RefreshReport, ServiceError, TableStatus, VerifyReport,
    WorkerService, WorkerStatus,
};
use stoa_metastore::{Records, TableState, WorkerState};
use stoa_transfer::PathStatistics;
use tokio::sync::{mpsc, oneshot};

use crate::events::{Command, Looked};
use crate::peers::Peers;
use crate::shared::{Details, Shared, unix_ms};

/// Damaged chunks that a report names.
const DAMAGED_TOLD_MAX: usize = 100;

/// Answers for one worker. Cheap to clone.
#[derive(Clone)]
pub struct WorkerControl {
    shared: Arc<Shared>,
    records: Records,
    commands: mpsc::Sender<Command>,
    peers: Option<Arc<Peers>>,
}

impl std::fmt::Debug for WorkerControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerControl")
            .field("worker", &self.shared.settings.id)
            .finish()
    }
}

impl WorkerControl {
    pub(crate) fn new(
        shared: Arc<Shared>,
        records: Records,
        commands: mpsc::Sender<Command>,
        peers: Option<Arc<Peers>>,
    ) -> WorkerControl {
        WorkerControl {
            shared,
            records,
            commands,
            peers,
        }
    }

    /// What the worker holds and how far it is, without waiting for anything.
    pub fn status_now(&self) -> WorkerStatus {
        let state = self.shared.state.borrow().clone();
        let details = self.shared.details();
        status(&self.shared, state, &details)
    }

    /// Looks at these tables (none: all) at once.
    ///
    /// # Errors
    /// If the worker has stopped.
    pub async fn look(&self, tables: Vec<String>) -> Result<Looked, ServiceError> {
        let (reply, answer) = oneshot::channel();
        let stopped =
            || ServiceError::Failed(format!("worker {} has stopped", self.shared.settings.id));
        self.commands
            .send(Command::Look { tables, reply })
            .await
            .map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())
    }

    async fn set_pinned(&self, pinned: bool) -> PinReport {
        let id = &self.shared.settings.id;
        // Noted where it outlives this process; what is locked now does not depend on it.
        if let Err(error) = self.records.set_pin(id, pinned, unix_ms()).await {
            tracing::warn!(worker = id, %error, "pinning holds for this process only");
        }
        let (bytes, problem) = self.shared.set_pinned(pinned).await;
        PinReport {
            pinned,
            pinned_bytes: bytes,
            problem: problem.unwrap_or_default(),
        }
    }
}

#[stoa_control::async_trait]
impl WorkerService for WorkerControl {
    async fn status(&self) -> Result<WorkerStatus, ServiceError> {
        let generation = self.shared.with_store(|store| store.generation()).await;
        Ok(WorkerStatus {
            generation,
            ..self.status_now()
        })
    }

    async fn verify(&self) -> Result<VerifyReport, ServiceError> {
        let started = Instant::now();
        let report = self.shared.with_store(|store| store.verify()).await;
        let mut damaged: Vec<String> = report
            .bad_chunks
            .iter()
            .map(|(key, reason)| format!("{}: {reason}", key.readable()))
            .chain(
                report
                    .bad_catalogs
                    .iter()
                    .map(|(name, reason)| format!("catalog {name}: {reason}")),
            )
            .chain(report.index_problem.clone())
            .collect();
        let damaged_chunks = damaged.len() as u64;
        damaged.truncate(DAMAGED_TOLD_MAX);
        if !report.is_clean() {
            tracing::warn!(
                damaged_chunks,
                "verification found damage; it is loaded again"
            );
            // The engine is gone only when the worker stops.
            let _ = self.commands.send(Command::Reload).await;
        }
        Ok(VerifyReport {
            chunks: report.checked,
            bytes: report.bytes,
            damaged_chunks,
            damaged,
            elapsed_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        })
    }

    async fn peers(&self) -> Result<PeersReport, ServiceError> {
        let paths = self
            .peers
            .as_ref()
            .map_or_else(Vec::new, |peers| peers.paths());
        Ok(PeersReport {
            addresses: self.shared.transfer_addresses(),
            paths: paths.into_iter().map(peer_path).collect(),
        })
    }

    async fn pin(&self) -> Result<PinReport, ServiceError> {
        Ok(self.set_pinned(true).await)
    }

    async fn unpin(&self) -> Result<PinReport, ServiceError> {
        Ok(self.set_pinned(false).await)
    }

    async fn refresh(&self, tables: Vec<String>) -> Result<RefreshReport, ServiceError> {
        let looked = self.look(tables).await?;
        Ok(RefreshReport {
            changed: looked.changed.into_iter().collect(),
            unchanged: looked.unchanged.into_iter().collect(),
            failed: looked.failed.into_iter().collect(),
        })
    }
}

fn status(shared: &Shared, state: WorkerState, details: &Details) -> WorkerStatus {
    let tables = state
        .tables
        .iter()
        .map(|(table, of)| {
            let looked_at = details.looked_at_unix_ms.get(table).copied().unwrap_or(0);
            (table.clone(), table_status(of, looked_at))
        })
        .collect();
    WorkerStatus {
        id: state.id,
        host: shared.settings.host.clone(),
        incarnation: shared.incarnation.clone(),
        started_unix_ms: shared.started_unix_ms,
        state: state.state.to_string(),
        tables,
        held_bytes: state.held_bytes,
        retained_bytes: state.retained_bytes,
        capacity_bytes: state.capacity_bytes,
        generation: details.generation,
        chunks: details.chunks,
        pinned: shared.is_pinned(),
        cache_dir: shared.settings.cache_dir.display().to_string(),
        problems: state.problems,
    }
}

fn peer_path(path: PathStatistics) -> PeerPath {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    PeerPath {
        peer: path.peer,
        address: path.address,
        transport: path.transport.to_string(),
        connections: path.connections as u64,
        reads: path.reads,
        bytes: path.bytes,
        calls: path.calls,
        errors: path
            .errors
            .into_iter()
            .map(|(kind, count)| (kind.as_str().to_owned(), count))
            .collect(),
        last_error: path.last_error.unwrap_or_default(),
        // Less than a microsecond is seen too.
        latency_us: path.latency.map_or(0, |latency| {
            u64::try_from(latency.as_micros())
                .unwrap_or(u64::MAX)
                .max(1)
        }),
        bytes_per_second: path.bytes_per_second.unwrap_or(0.0),
        left_for_ms: path.left_for.map_or(0, |left| millis(left).max(1)),
    }
}

fn table_status(of: &TableState, looked_at_unix_ms: u64) -> TableStatus {
    let (target, current) = (
        of.target.unwrap_or_default(),
        of.current.unwrap_or_default(),
    );
    TableStatus {
        target_version: target.version,
        target_plan: target.plan,
        current_version: current.version,
        current_plan: current.plan,
        chunks_done: of.chunks_done,
        chunks_total: of.chunks_total,
        bytes_done: of.bytes_done,
        bytes_total: of.bytes_total,
        held_bytes: of.held_bytes,
        kept_chunks: of.kept_chunks,
        fetched_chunks: of.fetched_chunks,
        peer_chunks: of.peer_chunks,
        peer_bytes: of.peer_bytes,
        left_out_chunks: of.left_out.chunks,
        left_out_bytes: of.left_out.bytes,
        left_out_reason: of.left_out.reason.clone().unwrap_or_default(),
        error: of.error.clone().unwrap_or_default(),
        looked_at_unix_ms,
    }
}
