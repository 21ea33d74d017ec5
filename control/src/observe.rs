//! The metrics of the roles, read from what their status says: one truth for both.

use crate::metrics::Metric;
use crate::proto::{CoordinatorStatus, PlannedTable, TableStatus, WorkerStatus};

const WORKER_STATES: [&str; 4] = ["idle", "loading", "ready", "degraded"];

/// What a worker's status says, as metrics.
pub fn worker_metrics(status: &WorkerStatus) -> Vec<Metric> {
    let mut state = Metric::gauge("worker_state", "What the worker is doing: 1 at its state");
    for name in WORKER_STATES {
        state = state.sample(&[("state", name)], status.state == name);
    }
    let mut metrics = vec![
        state,
        Metric::gauge("worker_capacity", "How much the worker may hold")
            .bytes()
            .value(status.capacity_bytes),
        Metric::gauge("worker_held", "Bytes of published chunks")
            .bytes()
            .value(status.held_bytes),
        Metric::gauge(
            "worker_retained",
            "Bytes that readers keep of what is no longer published",
        )
        .bytes()
        .value(status.retained_bytes),
        Metric::gauge("worker_chunks", "Published chunks").value(status.chunks),
        Metric::gauge(
            "worker_generation",
            "The published generation of the shared memory",
        )
        .value(status.generation),
        Metric::gauge(
            "worker_pinned",
            "Whether what is published is locked into memory",
        )
        .value(status.pinned),
        Metric::gauge("worker_problems", "Problems that stand").value(status.problems.len()),
    ];
    type Of = fn(&TableStatus) -> f64;
    let tables: [(&str, &str, bool, Of); 14] = [
        (
            "table_target_version",
            "The layout version worked towards",
            false,
            |t| t.target_version as f64,
        ),
        (
            "table_current_version",
            "The layout version published completely",
            false,
            |t| t.current_version as f64,
        ),
        ("table_target_chunks", "Chunks of the target", false, |t| {
            t.chunks_total as f64
        }),
        (
            "table_published_chunks",
            "Chunks of the target that are published",
            false,
            |t| t.chunks_done as f64,
        ),
        (
            "table_kept_chunks",
            "Chunks of the target that were there already",
            false,
            |t| t.kept_chunks as f64,
        ),
        (
            "table_fetched_chunks",
            "Chunks of the target that were fetched",
            false,
            |t| t.fetched_chunks as f64,
        ),
        (
            "table_peer_chunks",
            "Chunks of the target that were fetched from another worker",
            false,
            |t| t.peer_chunks as f64,
        ),
        (
            "table_peer",
            "Bytes of the target that were fetched from another worker",
            true,
            |t| t.peer_bytes as f64,
        ),
        (
            "table_left_out_chunks",
            "Chunks of the target that did not fit or could not be had",
            false,
            |t| t.left_out_chunks as f64,
        ),
        (
            "table_target",
            "Bytes of the target, as planned until they are known",
            true,
            |t| t.bytes_total as f64,
        ),
        (
            "table_published",
            "Bytes of the target that are published",
            true,
            |t| t.bytes_done as f64,
        ),
        (
            "table_held",
            "Bytes that the table holds in shared memory",
            true,
            |t| t.held_bytes as f64,
        ),
        (
            "table_left_out",
            "Bytes of what did not fit or could not be had",
            true,
            |t| t.left_out_bytes as f64,
        ),
        (
            "table_failed",
            "Whether an error with the table stands",
            false,
            |t| f64::from(!t.error.is_empty()),
        ),
    ];
    if status.tables.is_empty() {
        return metrics;
    }
    for (name, help, bytes, of) in tables {
        let mut metric = Metric::gauge(name, help);
        if bytes {
            metric = metric.bytes();
        }
        for (table, state) in &status.tables {
            metric = metric.sample(&[("table", table)], of(state));
        }
        metrics.push(metric);
    }
    metrics
}

/// What a coordinator's status says, as metrics.
pub fn coordinator_metrics(status: &CoordinatorStatus) -> Vec<Metric> {
    let mut workers = Metric::gauge("coordinator_workers", "Workers known, by state");
    for name in ["live", "gone"] {
        let count = status.workers.values().filter(|w| w.state == name).count();
        workers = workers.sample(&[("state", name)], count);
    }
    let mut metrics = vec![
        Metric::gauge(
            "coordinator_leading",
            "Whether this candidate is the elected coordinator",
        )
        .value(status.leading),
        workers,
        Metric::counter("coordinator_plans", "Plans written by this process")
            .value(status.plans_written),
        Metric::counter("coordinator_rejections", "Requests refused by this process")
            .value(status.rejections_written),
        Metric::gauge("coordinator_problems", "Problems that stand").value(status.problems.len()),
    ];
    if !status.workers.is_empty() {
        let mut capacity =
            Metric::gauge("coordinator_worker_capacity", "How much a worker may hold").bytes();
        let mut planned = Metric::gauge(
            "coordinator_worker_planned",
            "Estimated bytes that plans give a worker",
        )
        .bytes();
        for (id, worker) in &status.workers {
            capacity = capacity.sample(&[("worker", id)], worker.capacity_bytes);
            planned = planned.sample(&[("worker", id)], worker.planned_bytes);
        }
        metrics.extend([capacity, planned]);
    }
    type Of = fn(&PlannedTable) -> f64;
    let tables: [(&str, &str, bool, Of); 9] = [
        (
            "coordinator_table_wanted_version",
            "The layout version asked for",
            false,
            |t| t.wanted_version as f64,
        ),
        (
            "coordinator_table_planned_version",
            "The layout version planned",
            false,
            |t| t.planned_version as f64,
        ),
        (
            "coordinator_table_plan",
            "The number of the plan in force",
            false,
            |t| t.plan as f64,
        ),
        (
            "coordinator_table_placed_chunks",
            "Chunks that have a place",
            false,
            |t| t.placed_chunks as f64,
        ),
        (
            "coordinator_table_left_out_chunks",
            "Chunks that have none",
            false,
            |t| t.left_out_chunks as f64,
        ),
        (
            "coordinator_table_missing_copies",
            "Copies that have no place, of chunks that have one",
            false,
            |t| t.missing_copies as f64,
        ),
        (
            "coordinator_table_placed",
            "Estimated bytes that have a place",
            true,
            |t| t.placed_bytes as f64,
        ),
        (
            "coordinator_table_left_out",
            "Estimated bytes that have none",
            true,
            |t| t.left_out_bytes as f64,
        ),
        (
            "coordinator_table_failed",
            "Whether an error with the table stands",
            false,
            |t| f64::from(!t.error.is_empty()),
        ),
    ];
    if status.tables.is_empty() {
        return metrics;
    }
    for (name, help, bytes, of) in tables {
        let mut metric = Metric::gauge(name, help);
        if bytes {
            metric = metric.bytes();
        }
        for (table, planned) in &status.tables {
            metric = metric.sample(&[("table", table)], of(planned));
        }
        metrics.push(metric);
    }
    metrics
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::MetricsRegistry;
    use crate::proto::KnownWorker;

    #[test]
    fn a_worker_shows_what_its_status_says() {
        let status = WorkerStatus {
            state: "loading".into(),
            held_bytes: 77,
            tables: [(
                "tpch.orders".to_owned(),
                TableStatus {
                    chunks_total: 9,
                    bytes_done: 5,
                    ..Default::default()
                },
            )]
            .into(),
            ..Default::default()
        };
        let metrics = MetricsRegistry::new("worker");
        metrics.observe(move || worker_metrics(&status));
        let text = metrics.prometheus_text();
        for line in [
            "stoa_worker_state{state=\"loading\"} 1.0",
            "stoa_worker_state{state=\"ready\"} 0.0",
            "stoa_worker_held_bytes 77.0",
            "stoa_table_target_chunks{table=\"tpch.orders\"} 9.0",
            "stoa_table_published_bytes{table=\"tpch.orders\"} 5.0",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in\n{text}"
            );
        }
    }

    #[test]
    fn a_coordinator_shows_what_its_status_says() {
        let status = CoordinatorStatus {
            leading: true,
            plans_written: 4,
            workers: [(
                "w".to_owned(),
                KnownWorker {
                    state: "live".into(),
                    planned_bytes: 8,
                    ..Default::default()
                },
            )]
            .into(),
            tables: [(
                "a.b".to_owned(),
                PlannedTable {
                    plan: 3,
                    ..Default::default()
                },
            )]
            .into(),
            ..Default::default()
        };
        let metrics = MetricsRegistry::new("coordinator");
        metrics.observe(move || coordinator_metrics(&status));
        let text = metrics.prometheus_text();
        for line in [
            "stoa_coordinator_leading 1.0",
            "stoa_coordinator_plans_total 4.0",
            "stoa_coordinator_workers{state=\"live\"} 1.0",
            "stoa_coordinator_worker_planned_bytes{worker=\"w\"} 8.0",
            "stoa_coordinator_table_plan{table=\"a.b\"} 3.0",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in\n{text}"
            );
        }
    }
}
