//! What the coordinator says of itself.

use std::collections::BTreeMap;

use stoa_control::{CoordinatorStatus, KnownWorker, PlannedTable, RefusedRequest};

use stoa_metastore::{CoordinatorState, Unplanned};

use crate::decide::Decision;
use crate::sized::corrected;
use crate::term::Term;

/// How many tables that cannot be planned are told of, and how much of each reason: what is told is
/// one value of the metastore.
const UNPLANNED_MAX: usize = 100;
const REASON_CHARS_MAX: usize = 1000;

impl Term<'_> {
    /// Publishes what is known now; watchers are woken only if it is news.
    pub(crate) fn publish_status(&self, decision: &Decision) {
        let status = self.compose_status(decision);
        self.shared.status.send_if_modified(|shown| {
            let news = *shown != status;
            if news {
                *shown = status;
            }
            news
        });
    }

    /// Tells everybody, by the metastore, which tables cannot be planned and why; only what is news.
    pub(crate) async fn tell_unplanned(&mut self) -> Result<(), stoa_metastore::Error> {
        let requests = self.view.requests.iter();
        let unplanned = requests.filter_map(|(table, requested)| {
            let version = requested.request.version;
            let failure = self.memory.table(table).failure(version)?;
            let reason = failure.message.chars().take(REASON_CHARS_MAX).collect();
            Some((table.clone(), Unplanned { version, reason }))
        });
        let state = CoordinatorState {
            unplanned: unplanned.take(UNPLANNED_MAX).collect(),
        };
        if state != self.told {
            let records = &self.shared.records;
            records
                .publish_coordinator_state(self.leadership, &state)
                .await?;
            self.told = state;
        }
        Ok(())
    }

    fn compose_status(&self, decision: &Decision) -> CoordinatorStatus {
        let candidate = self.shared.settings.candidate.clone();
        let mut problems: Vec<String> = self.problems.values().cloned().collect();
        problems.extend(
            self.view
                .unreadable
                .iter()
                .map(|unreadable| unreadable.reason.clone()),
        );
        problems.extend(self.sized.iter().filter_map(|((table, version), sized)| {
            Some(format!("{table}:{version}: {}", sized.rejected()?))
        }));
        CoordinatorStatus {
            leader: candidate.clone(),
            candidate,
            leading: true,
            tables: self.tables(decision),
            workers: self.workers(),
            rejections: self
                .rejections
                .iter()
                .map(|rejection| RefusedRequest {
                    request: rejection.request.clone(),
                    reason: rejection.reason.clone(),
                    rejected_unix_ms: rejection.rejected_unix_ms,
                })
                .collect(),
            problems,
            plans_written: self.plans_written,
            rejections_written: self.rejections_written,
        }
    }

    fn tables(&self, decision: &Decision) -> BTreeMap<String, PlannedTable> {
        let mut tables: BTreeMap<String, PlannedTable> = BTreeMap::new();
        for (table, plan) in &self.view.in_force {
            let memory = self.memory.table(table);
            let mut planned = PlannedTable {
                planned_version: plan.version().unwrap_or(0),
                plan: plan.plan,
                unloaded: plan.unloaded,
                size_correction: memory.correction(),
                ..PlannedTable::default()
            };
            if let Some(basis) = memory.basis(plan.plan).filter(|_| !plan.unloaded) {
                let raw: u64 = basis.raw_bytes.values().sum();
                planned.placed_chunks = basis.placed_chunks;
                planned.placed_bytes = corrected(raw, memory.correction());
                planned.left_out_chunks = basis.left_out_chunks;
                planned.left_out_bytes = corrected(basis.left_out_bytes, memory.correction());
                planned.left_out_reason = basis.left_out_reason.clone();
                planned.missing_copies = basis.missing_copies;
                planned.missing_bytes = corrected(basis.missing_bytes, memory.correction());
            }
            tables.insert(table.clone(), planned);
        }
        for (table, requested) in &self.view.requests {
            let memory = self.memory.table(table);
            let planned = tables.entry(table.clone()).or_insert_with(|| PlannedTable {
                size_correction: memory.correction(),
                ..PlannedTable::default()
            });
            planned.wanted_version = requested.request.version;
            let failure = memory
                .failure(requested.request.version)
                .map(|failure| failure.message.clone());
            planned.error = failure
                .or_else(|| decision.waiting.get(table).cloned())
                .unwrap_or_default();
        }
        tables
    }

    fn workers(&self) -> BTreeMap<String, KnownWorker> {
        let now_unix_ms = self.shared.clock.unix_ms();
        let now_ms = self.shared.clock.monotonic_ms();
        let plans = || self.view.in_force.iter().filter(|(_, plan)| !plan.unloaded);
        let known = |seen: crate::memory::Seen<'_>| {
            let planned_bytes = plans()
                .map(|(table, plan)| self.memory.holding(table, plan, seen.id, &self.view))
                .sum();
            let worker = KnownWorker {
                state: if seen.gone_ms.is_none() {
                    "live"
                } else {
                    "gone"
                }
                .to_owned(),
                capacity_bytes: seen.capacity_bytes,
                planned_bytes,
                gone_since_unix_ms: seen.gone_ms.map_or(0, |gone| {
                    now_unix_ms.saturating_sub(now_ms.saturating_sub(gone))
                }),
            };
            (seen.id.to_owned(), worker)
        };
        self.memory.seen().map(known).collect()
    }
}
