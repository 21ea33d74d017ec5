//! What the coordinator remembers between decisions. All of it can be lost: a new coordinator
//! finds out again what it needs.

use std::collections::{BTreeMap, BTreeSet};

use stoa_metastore::{CacheVersion, TableState, WorkerState};

use crate::decide::{DecideSettings, View, Why, planned_workers};
use crate::sized::corrected;
use crate::table::Correction;
pub use crate::table::{Basis, Failure, TableMemory};

/// Corrections outside of this say that something else is wrong.
const CORRECTION_RANGE: std::ops::RangeInclusive<f64> = 0.0005..=50.0;
/// Rejections that are remembered; the metastore keeps fewer.
const REJECTED_MAX: usize = 1024;

/// A worker that plans can count on: live, or gone within its grace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    pub(crate) id: String,
    /// What it may hold of all tables together.
    pub(crate) capacity_bytes: u64,
}

#[derive(Clone, Debug)]
struct Known {
    unit: Unit,
    gone: Gone,
}

/// How long a worker has been gone, on the monotonic clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    Live,
    Since(u64),
    /// For longer than its grace.
    ForGood(u64),
}

/// A worker as the status shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen<'a> {
    pub(crate) id: &'a str,
    pub(crate) capacity_bytes: u64,
    /// Since when it is gone, on the monotonic clock.
    pub(crate) gone_ms: Option<u64>,
}

/// What the coordinator remembers.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    workers: BTreeMap<String, Known>,
    tables: BTreeMap<String, TableMemory>,
    nothing: TableMemory,
    joined_ms: u64,
    rejected: BTreeSet<i64>,
    /// Bytes that all plans in force together give each worker.
    planned_bytes: BTreeMap<String, u64>,
}

impl Memory {
    /// Nothing yet.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// Takes note of the workers that are there, and of those that are not.
    pub(crate) fn observe(&mut self, view: &View, settings: &DecideSettings, now_ms: u64) {
        for (id, record) in &view.workers {
            let reported = view.states.get(id).map_or(0, |state| state.capacity_bytes);
            // A worker may find less room than it was configured with.
            let capacity_bytes = if reported > 0 {
                reported.min(record.capacity_bytes)
            } else {
                record.capacity_bytes
            };
            if !self.is_live(id) {
                self.joined_ms = now_ms;
            }
            let unit = Unit {
                id: id.clone(),
                capacity_bytes,
            };
            self.workers.insert(
                id.clone(),
                Known {
                    unit,
                    gone: Gone::Live,
                },
            );
        }
        let planned = planned_workers(view);
        for id in &planned {
            // Planned by an earlier coordinator and not seen by this one: its grace starts now. It
            // keeps what it has, so any capacity will do.
            self.workers.entry((*id).clone()).or_insert_with(|| Known {
                unit: Unit {
                    id: (*id).clone(),
                    capacity_bytes: u64::MAX,
                },
                gone: Gone::Since(now_ms),
            });
        }
        for (id, known) in &mut self.workers {
            known.gone = match known.gone {
                Gone::Live if !view.workers.contains_key(id) => Gone::Since(now_ms),
                Gone::Since(since) if now_ms >= since.saturating_add(settings.grace_ms) => {
                    Gone::ForGood(since)
                }
                gone => gone,
            };
        }
        self.workers
            .retain(|id, known| !matches!(known.gone, Gone::ForGood(_)) || planned.contains(id));
        self.tables.retain(|table, _| {
            view.requests.contains_key(table) || view.in_force.contains_key(table)
        });
        for (table, memory) in &mut self.tables {
            let wanted = view
                .requests
                .get(table)
                .map(|requested| requested.request.version);
            let in_force = view
                .in_force
                .get(table)
                .and_then(|plan| plan.version().ok());
            let is_needed = |version: u64| wanted == Some(version) || in_force == Some(version);
            memory.keep_only(is_needed);
        }
        self.planned_bytes = self.sum_of_plans(view);
    }

    fn sum_of_plans(&self, view: &View) -> BTreeMap<String, u64> {
        let mut planned: BTreeMap<String, u64> = BTreeMap::new();
        for (table, plan) in view.in_force.iter().filter(|(_, plan)| !plan.unloaded) {
            for worker in plan.parts.keys() {
                let bytes = planned.entry(worker.clone()).or_default();
                *bytes = bytes.saturating_add(self.holding(table, plan, worker, view));
            }
        }
        planned
    }

    /// All workers that are known, by id.
    pub(crate) fn seen(&self) -> impl Iterator<Item = Seen<'_>> {
        self.workers.values().map(|known| Seen {
            id: &known.unit.id,
            // Of a worker that was never seen alive, the capacity is not known.
            capacity_bytes: if known.unit.capacity_bytes == u64::MAX {
                0
            } else {
                known.unit.capacity_bytes
            },
            gone_ms: match known.gone {
                Gone::Live => None,
                Gone::Since(since) => Some(since),
                Gone::ForGood(since) => Some(since),
            },
        })
    }

    /// When the graces of planned workers end.
    pub(crate) fn grace_ends(&self, settings: &DecideSettings) -> Vec<u64> {
        let ends = |known: &Known| match known.gone {
            Gone::Since(since) => Some(since.saturating_add(settings.grace_ms)),
            Gone::Live | Gone::ForGood(_) => None,
        };
        self.workers.values().filter_map(ends).collect()
    }

    /// The workers that plans can count on, by id: live, or gone within their grace.
    pub(crate) fn eligible(&self) -> impl Iterator<Item = &Unit> {
        self.workers
            .values()
            .filter(|known| !matches!(known.gone, Gone::ForGood(_)))
            .map(|known| &known.unit)
    }

    /// The capacities that plans count with now, by live worker.
    pub(crate) fn capacities(&self) -> BTreeMap<String, u64> {
        let live = self
            .workers
            .values()
            .filter(|known| known.gone == Gone::Live);
        live.map(|known| (known.unit.id.clone(), known.unit.capacity_bytes))
            .collect()
    }

    pub(crate) fn is_live(&self, worker: &str) -> bool {
        self.workers
            .get(worker)
            .is_some_and(|known| known.gone == Gone::Live)
    }

    pub(crate) fn anybody_live(&self) -> bool {
        self.workers.values().any(|known| known.gone == Gone::Live)
    }

    /// When the last worker joined or came back.
    pub(crate) fn joined_ms(&self) -> u64 {
        self.joined_ms
    }

    /// Whether the request of this revision is yet to be rejected; it counts as rejected from now on.
    pub(crate) fn rejects(&mut self, revision: i64) -> bool {
        if self.rejected.len() >= REJECTED_MAX {
            self.rejected.pop_first();
        }
        self.rejected.insert(revision)
    }

    /// What is remembered of a table; nothing if it is new.
    pub(crate) fn table(&self, table: &str) -> &TableMemory {
        self.tables.get(table).unwrap_or(&self.nothing)
    }

    pub(crate) fn table_mut(&mut self, table: &str) -> &mut TableMemory {
        self.tables.entry(table.to_owned()).or_default()
    }

    /// What plans of all tables together may use of a worker.
    pub(crate) fn usable_on(&self, worker: &str, reserve_ratio: f64) -> u64 {
        let capacity = self
            .workers
            .get(worker)
            .map_or(0, |known| known.unit.capacity_bytes);
        capacity - ((capacity as f64 * reserve_ratio) as u64).min(capacity)
    }

    /// What plans of all tables together give a worker.
    pub(crate) fn planned_on(&self, worker: &str) -> u64 {
        self.planned_bytes.get(worker).copied().unwrap_or(0)
    }

    /// The room for one table on one worker: what plans of other tables leave of its capacity.
    pub(crate) fn room_on(
        &self,
        table: &str,
        worker: &str,
        view: &View,
        reserve_ratio: f64,
    ) -> u64 {
        let in_force = view.in_force.get(table).filter(|plan| !plan.unloaded);
        let own = in_force.map_or(0, |plan| self.holding(table, plan, worker, view));
        let others = self.planned_on(worker).saturating_sub(own);
        self.usable_on(worker, reserve_ratio).saturating_sub(others)
    }

    /// The room for one table on all live workers together.
    pub(crate) fn room_for(&self, table: &str, view: &View, reserve_ratio: f64) -> u64 {
        let live = self
            .workers
            .values()
            .filter(|known| known.gone == Gone::Live);
        live.fold(0, |room, known| {
            room.saturating_add(self.room_on(table, &known.unit.id, view, reserve_ratio))
        })
    }

    /// The bytes that a plan in force gives a worker, as well as they are known.
    pub(crate) fn holding(
        &self,
        table: &str,
        plan: &CacheVersion,
        worker: &str,
        view: &View,
    ) -> u64 {
        let memory = self.table(table);
        match memory.basis(plan.plan) {
            Some(basis) => corrected(
                basis.raw_bytes.get(worker).copied().unwrap_or(0),
                memory.correction(),
            ),
            None => reported(view, worker, table)
                .map_or(0, |state| state.bytes_total.max(state.held_bytes)),
        }
    }

    /// What the workers of a plan say about sizes, once all that are live are done with it.
    pub(crate) fn correction_from_reports(
        &self,
        table: &str,
        plan: &CacheVersion,
        view: &View,
    ) -> Option<Correction> {
        let basis = self.table(table).basis(plan.plan)?;
        let (mut actual, mut estimated, mut overflow) = (0u64, 0u64, false);
        for worker in plan.parts.keys().filter(|worker| self.is_live(worker)) {
            let state = reported(view, worker, table)?;
            let raw = basis.raw_bytes.get(worker).copied().unwrap_or(0);
            let knows = [state.target, state.current]
                .into_iter()
                .flatten()
                .any(|target| target.plan == plan.plan);
            let done = state.chunks_done + state.left_out.chunks >= state.chunks_total
                && (state.chunks_total > 0 || raw == 0);
            if !knows || !done {
                return None;
            }
            overflow |= state.left_out.chunks > 0;
            actual = actual.saturating_add(state.bytes_done);
            estimated = estimated.saturating_add(raw.saturating_sub(state.left_out.bytes));
        }
        if estimated == 0 {
            return None;
        }
        let factor = actual as f64 / estimated as f64;
        CORRECTION_RANGE
            .contains(&factor)
            .then_some(Correction { factor, overflow })
    }

    /// A version's footers are being read.
    pub fn catalog_loading(&mut self, table: &str, version: u64) {
        self.table_mut(table).start_loading(version);
    }

    /// A version's sizes are known; it needs these forms.
    pub fn catalog_loaded(&mut self, table: &str, version: u64, forms: BTreeSet<&'static str>) {
        self.table_mut(table).finish_loading(version, forms);
    }

    /// A version could not be loaded, planned or written, and why. Pauses double from the first of
    /// `pauses_ms` to the second; what does not pass by itself waits the longest at once.
    pub fn failed(
        &mut self,
        table: &str,
        version: u64,
        message: String,
        is_passing: bool,
        pauses_ms: (u64, u64),
        now_ms: u64,
    ) {
        self.table_mut(table)
            .fail(version, message, is_passing, pauses_ms, now_ms);
    }

    /// A plan is in force, or was understood, and this is what it was made of.
    pub fn planned(&mut self, table: &str, version: u64, basis: Basis, why: Option<&Why>) {
        self.table_mut(table).plan(version, basis, why);
    }

    /// A plan of an earlier coordinator, and what it was made of.
    pub(crate) fn take_over(&mut self, table: &str, version: u64, basis: Basis) {
        self.table_mut(table).take_over(version, basis);
    }

    /// A table was dropped from memory.
    pub fn unloaded(&mut self, table: &str) {
        self.table_mut(table).unload();
    }

    /// Plans before this one are gone, as far as nobody needs them.
    pub fn pruned(&mut self, table: &str, plan: u64) {
        self.table_mut(table).prune(plan);
    }
}

fn reported<'a>(view: &'a View, worker: &str, table: &str) -> Option<&'a TableState> {
    view.states
        .get(worker)
        .and_then(|state: &WorkerState| state.tables.get(table))
}
