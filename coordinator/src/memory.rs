//! What the coordinator remembers between decisions. All of it can be lost: a new coordinator
//! finds out again what it needs.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use stoa_metastore::{CacheVersion, TableState, WorkerState};

use crate::decide::{DecideSettings, View, Why, planned_workers};
use crate::sized::corrected;

/// How often sizes are corrected in the plans of one version.
const CORRECTIONS_MAX: u32 = 4;
/// Corrections outside of this say that something else is wrong.
const CORRECTION_RANGE: std::ops::RangeInclusive<f64> = 0.05..=50.0;
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

/// What a plan was made of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Basis {
    /// The plan's number.
    pub plan: u64,
    /// The capacities it counted with, by live worker.
    pub capacities: BTreeMap<String, u64>,
    /// Estimated bytes, uncorrected, by worker.
    pub raw_bytes: BTreeMap<String, u64>,
    /// Chunks that have a place.
    pub placed_chunks: u64,
    /// Chunks that have none.
    pub left_out_chunks: u64,
    /// Their estimated bytes, uncorrected.
    pub left_out_bytes: u64,
    /// Why they have none, in words.
    pub left_out_reason: String,
    /// The room there was for the table on all workers together.
    pub room_bytes: u64,
    /// The correction it counted with.
    pub correction: f64,
}

/// Why a table could not be loaded or planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The error.
    pub message: String,
    /// When to try again, on the monotonic clock.
    pub retry_ms: u64,
    /// Whether it may pass by itself.
    pub is_passing: bool,
    attempts: u32,
}

/// What is remembered of one table.
#[derive(Clone, Debug)]
pub struct TableMemory {
    loading: BTreeSet<u64>,
    loaded: BTreeMap<u64, BTreeSet<&'static str>>,
    failures: BTreeMap<u64, Failure>,
    basis: Option<Basis>,
    correction: f64,
    corrections: u32,
    corrected_version: u64,
    pruned: u64,
}

impl Default for TableMemory {
    fn default() -> TableMemory {
        TableMemory {
            loading: BTreeSet::new(),
            loaded: BTreeMap::new(),
            failures: BTreeMap::new(),
            basis: None,
            correction: 1.0,
            corrections: 0,
            corrected_version: 0,
            pruned: 0,
        }
    }
}

impl TableMemory {
    pub(crate) fn is_loading(&self, version: u64) -> bool {
        self.loading.contains(&version)
    }

    pub(crate) fn is_loaded(&self, version: u64) -> bool {
        self.loaded.contains_key(&version)
    }

    pub(crate) fn failure(&self, version: u64) -> Option<&Failure> {
        self.failures.get(&version)
    }

    /// What the plan of this number was made of; `None` if somebody else made it.
    pub(crate) fn basis(&self, plan: u64) -> Option<&Basis> {
        self.basis.as_ref().filter(|basis| basis.plan == plan)
    }

    /// Actual bytes over estimated bytes, as far as it is known.
    pub(crate) fn correction(&self) -> f64 {
        self.correction
    }

    /// The newest plan whose predecessors were pruned.
    pub(crate) fn pruned(&self) -> u64 {
        self.pruned
    }

    /// Whether a worker can make the forms that the newest loaded version needs.
    pub(crate) fn can_make(&self, worker: &str, view: &View) -> bool {
        let Some(forms) = self.loaded.values().next_back() else { return true };
        let Some(record) = view.workers.get(worker) else { return true };
        // A worker that says nothing about forms is taken to make all of them.
        record.formats.is_empty() || forms.iter().all(|form| record.formats.iter().any(|known| known == form))
    }

    /// Takes in what workers reported, and says whether that is reason for another plan: sizes were
    /// underestimated and something did not fit, overestimated and something was left out in vain,
    /// or there is more room now for what was left out.
    pub(crate) fn reconsider(&mut self, plan: u64, reported: Option<Correction>, room: u64) -> Option<Why> {
        let basis = self.basis.as_ref().filter(|basis| basis.plan == plan)?;
        if let Some(reported) = reported {
            self.correction = reported.factor;
            let too_small = reported.overflow && reported.factor > basis.correction * 1.01;
            let too_large = basis.left_out_chunks > 0 && reported.factor < basis.correction * 0.9;
            if (too_small || too_large) && self.corrections < CORRECTIONS_MAX {
                return Some(Why::SizesCorrected);
            }
        }
        let more_room = basis.left_out_chunks > 0 && room > basis.room_bytes.saturating_add(basis.room_bytes / 100);
        more_room.then_some(Why::RoomFreed)
    }
}

/// What finished workers say about sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Correction {
    /// Actual bytes over estimated bytes.
    pub(crate) factor: f64,
    /// Whether something did not fit.
    pub(crate) overflow: bool,
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
            let capacity_bytes = if reported > 0 { reported.min(record.capacity_bytes) } else { record.capacity_bytes };
            if !self.is_live(id) {
                self.joined_ms = now_ms;
            }
            let unit = Unit { id: id.clone(), capacity_bytes };
            self.workers.insert(id.clone(), Known { unit, gone: Gone::Live });
        }
        let planned = planned_workers(view);
        for id in &planned {
            // Planned by an earlier coordinator and not seen by this one: its grace starts now. It
            // keeps what it has, so any capacity will do.
            self.workers.entry((*id).clone()).or_insert_with(|| Known {
                unit: Unit { id: (*id).clone(), capacity_bytes: u64::MAX },
                gone: Gone::Since(now_ms),
            });
        }
        for (id, known) in &mut self.workers {
            known.gone = match known.gone {
                Gone::Live if !view.workers.contains_key(id) => Gone::Since(now_ms),
                Gone::Since(since) if now_ms >= since.saturating_add(settings.grace_ms) => Gone::ForGood(since),
                gone => gone,
            };
        }
        self.workers.retain(|id, known| !matches!(known.gone, Gone::ForGood(_)) || planned.contains(id));
        self.tables.retain(|table, _| view.requests.contains_key(table) || view.in_force.contains_key(table));
        for (table, memory) in &mut self.tables {
            let wanted = view.requests.get(table).map(|requested| requested.request.version);
            let in_force = view.in_force.get(table).and_then(|plan| plan.version().ok());
            let is_needed = |version: &u64| wanted == Some(*version) || in_force == Some(*version);
            memory.loaded.retain(|version, _| is_needed(version));
            memory.failures.retain(|version, _| is_needed(version));
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
            capacity_bytes: if known.unit.capacity_bytes == u64::MAX { 0 } else { known.unit.capacity_bytes },
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
        self.workers.values().filter(|known| !matches!(known.gone, Gone::ForGood(_))).map(|known| &known.unit)
    }

    /// The capacities that plans count with now, by live worker.
    pub(crate) fn capacities(&self) -> BTreeMap<String, u64> {
        let live = self.workers.values().filter(|known| known.gone == Gone::Live);
        live.map(|known| (known.unit.id.clone(), known.unit.capacity_bytes)).collect()
    }

    pub(crate) fn is_live(&self, worker: &str) -> bool {
        self.workers.get(worker).is_some_and(|known| known.gone == Gone::Live)
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
        let capacity = self.workers.get(worker).map_or(0, |known| known.unit.capacity_bytes);
        capacity - ((capacity as f64 * reserve_ratio) as u64).min(capacity)
    }

    /// What plans of all tables together give a worker.
    pub(crate) fn planned_on(&self, worker: &str) -> u64 {
        self.planned_bytes.get(worker).copied().unwrap_or(0)
    }

    /// The room for one table on one worker: what plans of other tables leave of its capacity.
    pub(crate) fn room_on(&self, table: &str, worker: &str, view: &View, reserve_ratio: f64) -> u64 {
        let in_force = view.in_force.get(table).filter(|plan| !plan.unloaded);
        let own = in_force.map_or(0, |plan| self.holding(table, plan, worker, view));
        let others = self.planned_on(worker).saturating_sub(own);
        self.usable_on(worker, reserve_ratio).saturating_sub(others)
    }

    /// The room for one table on all live workers together.
    pub(crate) fn room_for(&self, table: &str, view: &View, reserve_ratio: f64) -> u64 {
        let live = self.workers.values().filter(|known| known.gone == Gone::Live);
        live.fold(0, |room, known| room.saturating_add(self.room_on(table, &known.unit.id, view, reserve_ratio)))
    }

    /// The bytes that a plan in force gives a worker, as well as they are known.
    pub(crate) fn holding(&self, table: &str, plan: &CacheVersion, worker: &str, view: &View) -> u64 {
        let memory = self.table(table);
        match memory.basis(plan.plan) {
            Some(basis) => corrected(basis.raw_bytes.get(worker).copied().unwrap_or(0), memory.correction),
            None => reported(view, worker, table).map_or(0, |state| state.bytes_total.max(state.held_bytes)),
        }
    }

    /// What the workers of a plan say about sizes, once all that are live are done with it.
    pub(crate) fn correction_from_reports(&self, table: &str, plan: &CacheVersion, view: &View) -> Option<Correction> {
        let basis = self.table(table).basis(plan.plan)?;
        let (mut actual, mut estimated, mut overflow) = (0u64, 0u64, false);
        for worker in plan.parts.keys().filter(|worker| self.is_live(worker)) {
            let state = reported(view, worker, table)?;
            let raw = basis.raw_bytes.get(worker).copied().unwrap_or(0);
            let knows = [state.target, state.current].into_iter().flatten().any(|target| target.plan == plan.plan);
            let done = state.chunks_done + state.left_out.chunks >= state.chunks_total && (state.chunks_total > 0 || raw == 0);
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
        CORRECTION_RANGE.contains(&factor).then_some(Correction { factor, overflow })
    }

    /// A version's footers are being read.
    pub fn catalog_loading(&mut self, table: &str, version: u64) {
        self.table_mut(table).loading.insert(version);
    }

    /// A version's sizes are known; it needs these forms.
    pub fn catalog_loaded(&mut self, table: &str, version: u64, forms: BTreeSet<&'static str>) {
        let memory = self.table_mut(table);
        memory.loading.remove(&version);
        memory.failures.remove(&version);
        memory.loaded.insert(version, forms);
    }

    /// A version could not be loaded, planned or written. Pauses double from `retry_ms_min` to
    /// `retry_ms_max`; what does not pass by itself waits the longest at once.
    pub fn failed(
        &mut self,
        table: &str,
        version: u64,
        message: String,
        is_passing: bool,
        retry_ms: (u64, u64),
        now_ms: u64,
    ) {
        let memory = self.table_mut(table);
        memory.loading.remove(&version);
        let attempts = memory.failures.get(&version).map_or(0, |failure| failure.attempts).saturating_add(1);
        let (shortest, longest) = retry_ms;
        let pause = if is_passing {
            shortest.saturating_mul(1 << (attempts - 1).min(20)).min(longest)
        } else {
            longest
        };
        let retry_ms = now_ms.saturating_add(pause);
        memory.failures.insert(version, Failure { message, retry_ms, is_passing, attempts });
    }

    /// A plan is in force, or was understood, and this is what it was made of.
    pub fn planned(&mut self, table: &str, version: u64, basis: Basis, why: Option<&Why>) {
        let memory = self.table_mut(table);
        memory.failures.remove(&version);
        if memory.corrected_version != version {
            memory.corrected_version = version;
            memory.corrections = 0;
        }
        if why == Some(&Why::SizesCorrected) {
            memory.corrections += 1;
        }
        memory.basis = Some(basis);
    }

    /// A plan of an earlier coordinator, and what it was made of.
    pub(crate) fn take_over(&mut self, table: &str, version: u64, basis: Basis) {
        self.table_mut(table).correction = basis.correction;
        self.planned(table, version, basis, None);
    }

    /// A table was dropped from memory.
    pub fn unloaded(&mut self, table: &str) {
        let memory = self.table_mut(table);
        memory.basis = None;
        memory.failures.clear();
    }

    /// Plans before this one are gone, as far as nobody needs them.
    pub fn pruned(&mut self, table: &str, plan: u64) {
        self.table_mut(table).pruned = plan;
    }
}

fn reported<'a>(view: &'a View, worker: &str, table: &str) -> Option<&'a TableState> {
    view.states.get(worker).and_then(|state: &WorkerState| state.tables.get(table))
}
