//! What the coordinator does next: a deterministic state machine of what it sees and remembers.
//!
//! Nothing here reads or writes anything, and time is an argument. The shell ([`crate::Coordinator`])
//! brings the [`View`] up to date, asks [`decide`], carries out the actions, tells [`Memory`] what
//! became of them, and asks again. Everything is level-triggered: what counts is what is wanted and
//! what is there now, not how it came about, so a missed or repeated event does no harm.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};

use stoa_metastore::{CacheVersion, WorkerRecord, WorkerState, all_reported};

use crate::memory::{Memory, Unit};
use crate::plan::PlanWorker;

pub use crate::action::{Action, DecideSettings, Decision, Requested, Unreadable, View, Why};

/// A capacity that changed by more than this factor makes the balance worth another look.
const CAPACITY_CHANGE: f64 = 1.25;

/// Decides what to do next. `now_ms` is on the monotonic clock.
pub fn decide(
    memory: &mut Memory,
    view: &View,
    settings: &DecideSettings,
    now_ms: u64,
) -> Decision {
    let mut decision = Decision::default();
    if view.frozen.is_some() {
        return decision;
    }
    memory.observe(view, settings, now_ms);
    for at_ms in memory.grace_ends(settings) {
        decision.wake(at_ms);
    }
    for unreadable in &view.unreadable {
        if memory.rejects(unreadable.revision) {
            decision.actions.push(Action::Reject {
                request: unreadable.text.clone(),
                reason: unreadable.reason.clone(),
                revision: unreadable.revision,
            });
        }
    }
    // First come, first served: the table that was asked for first gets its room first.
    let mut tables: Vec<(&String, &Requested)> = view.requests.iter().collect();
    tables.sort_by_key(|(_, requested)| requested.revision);
    let reports = OnceCell::new();
    for (table, requested) in tables {
        Table {
            memory,
            view,
            reports: &reports,
            settings,
            now_ms,
            table,
            requested,
        }
        .decide(&mut decision);
    }
    decision
}

/// Live workers and what they report, as `all_reported` takes them.
type Reports = (Vec<WorkerRecord>, Vec<WorkerState>);

/// The decision about one table.
struct Table<'a> {
    memory: &'a mut Memory,
    view: &'a View,
    reports: &'a OnceCell<Reports>,
    settings: &'a DecideSettings,
    now_ms: u64,
    table: &'a str,
    requested: &'a Requested,
}

impl Table<'_> {
    fn decide(&mut self, decision: &mut Decision) {
        let wanted = self.requested.request.version;
        let in_force = self.view.in_force.get(self.table);
        let version_in_force = in_force.and_then(|plan| plan.version().ok());
        self.memory
            .table_mut(self.table)
            .asked(wanted, self.requested.revision);
        self.reject_what_failed(wanted, decision);
        if self.requested.request.unloaded {
            let is_heard = |plan: &CacheVersion| {
                plan.unloaded && overtaking(self.table, plan, self.view).is_none()
            };
            // Without a plan workers may hold it all the same: the records may have been reset.
            let is_held = || holders(self.table, self.view).next().is_some();
            let version = match in_force {
                Some(plan) if is_heard(plan) => None,
                Some(plan) => Some(plan.version().unwrap_or(wanted).max(wanted)),
                None => is_held().then_some(wanted),
            };
            if let Some(version) = version {
                if self.is_due(version, decision) {
                    decision.actions.push(Action::WriteUnloaded {
                        table: self.table.to_owned(),
                        version,
                    });
                }
                return;
            }
            self.prune(in_force, decision);
            return;
        }
        if let Some(current) = version_in_force.filter(|current| *current > wanted) {
            self.reject_as_stale(current, decision);
            return;
        }
        match self.why(in_force, wanted) {
            Some(why) => self.plan(why, wanted, decision),
            None => {
                self.adopt_if_overflowing(in_force, wanted, decision);
                self.prune(in_force, decision);
            }
        }
    }

    /// A layout that cannot be loaded is refused once, and tried again now and then: its files may
    /// be put right.
    fn reject_what_failed(&mut self, wanted: u64, decision: &mut Decision) {
        let Some(failure) = self.memory.table(self.table).failure(wanted) else {
            return;
        };
        if failure.is_passing {
            return;
        }
        let reason = failure.message.clone();
        if self.memory.rejects(self.requested.revision) {
            let request = self.requested.request.to_string();
            decision.actions.push(Action::Reject {
                request,
                reason,
                revision: self.requested.revision,
            });
        }
    }

    /// Written by somebody who went around the transaction that keeps versions growing.
    fn reject_as_stale(&mut self, current: u64, decision: &mut Decision) {
        let given = self.requested.request.version;
        let reason = stoa_metastore::Error::StaleVersion {
            table: self.table.to_owned(),
            current,
            given,
        }
        .to_string();
        decision
            .waiting
            .insert(self.table.to_owned(), reason.clone());
        if self.memory.rejects(self.requested.revision) {
            let request = self.requested.request.to_string();
            decision.actions.push(Action::Reject {
                request,
                reason,
                revision: self.requested.revision,
            });
        }
    }

    /// Why this table needs another plan, if it does.
    fn why(&mut self, in_force: Option<&CacheVersion>, wanted: u64) -> Option<Why> {
        let Some(plan) =
            in_force.filter(|plan| !plan.unloaded && plan.version().ok() == Some(wanted))
        else {
            return Some(Why::NewVersion);
        };
        let eligible: BTreeMap<String, u64> = self
            .memory
            .eligible()
            .map(|worker| (worker.id.clone(), worker.capacity_bytes))
            .collect();
        if let Some(gone) = plan
            .parts
            .keys()
            .find(|worker| !eligible.contains_key(*worker))
        {
            return Some(Why::WorkerGone(gone.clone()));
        }
        let memory = &*self.memory;
        let can_take = |worker: &&String| {
            memory.is_live(worker) && memory.table(self.table).can_make(worker, self.view)
        };
        if let Some(joined) = eligible
            .keys()
            .filter(can_take)
            .find(|worker| !plan.parts.contains_key(*worker))
        {
            return Some(Why::WorkerJoined(joined.clone()));
        }
        if let Some(worker) = overtaking(self.table, plan, self.view) {
            return Some(Why::Overtaken(worker.clone()));
        }
        let basis = memory.table(self.table).basis(plan.plan)?;
        let several = basis.capacities.len() > 1;
        for (worker, then) in &basis.capacities {
            let Some(now) = eligible.get(worker).filter(|_| memory.is_live(worker)) else {
                continue;
            };
            // Plans follow when they do not fit any more, or when the balance is far off. Room for
            // what was left out is another matter, see below.
            let misfit = now < then
                && memory.planned_on(worker)
                    > memory.usable_on(worker, self.settings.reserve_ratio);
            let (now, then) = (*now as f64, *then as f64);
            if misfit || several && (now > then * CAPACITY_CHANGE || now * CAPACITY_CHANGE < then) {
                return Some(Why::CapacityChanged(worker.clone()));
            }
        }
        let correction = memory.correction_from_reports(self.table, plan, self.view);
        let free = memory.room_for(self.table, self.view, self.settings.reserve_ratio);
        // A worker that has not heard of this version yet speaks of another one's files.
        let files = self.view.states.iter().filter_map(|(worker, state)| {
            let state = state.tables.get(self.table)?;
            let speaks = state.target.is_some_and(|target| target.version == wanted);
            (speaks && memory.is_live(worker)).then_some((worker.as_str(), state.files.as_str()))
        });
        let files: Vec<(&str, &str)> = files.collect();
        let table = self.memory.table_mut(self.table);
        if let Some(why) = table.compare_files(plan.plan, wanted, files.into_iter()) {
            return Some(why);
        }
        table.reconsider(plan.plan, correction, free)
    }

    fn plan(&mut self, why: Why, version: u64, decision: &mut Decision) {
        let table = self.table.to_owned();
        if !self.memory.anybody_live() {
            decision
                .waiting
                .insert(table, "no worker is live".to_owned());
            return;
        }
        let settled_ms = self
            .memory
            .joined_ms()
            .saturating_add(self.settings.settle_ms);
        if self.now_ms < settled_ms {
            decision.wake(settled_ms);
            decision.waiting.insert(
                table,
                "waiting for workers that join at the same time".to_owned(),
            );
            return;
        }
        if !self.is_due(version, decision) || !self.has_sizes(&table, version, decision) {
            return;
        }
        // What other tables hold is known only once their plans are.
        let mut ready = true;
        for (other, plan) in &self.view.in_force {
            if *other == table
                || plan.unloaded
                || self.memory.table(other).basis(plan.plan).is_some()
            {
                continue;
            }
            let Ok(version) = plan.version() else {
                continue;
            };
            if self.memory.table(other).failure(version).is_some() {
                continue;
            }
            ready = false;
            if self.has_sizes(other, version, decision) {
                push_once(
                    &mut decision.actions,
                    Action::Adopt {
                        table: other.clone(),
                    },
                );
            }
        }
        let writes = |action: &Action| {
            matches!(
                action,
                Action::WritePlan { .. } | Action::WriteUnloaded { .. }
            )
        };
        if !ready || decision.actions.iter().any(writes) {
            decision
                .waiting
                .insert(table, "waiting for the sizes of other tables".to_owned());
            return;
        }
        let workers = self.plan_workers();
        if !workers.iter().any(|worker| worker.accepts_new) {
            decision.waiting.insert(
                table,
                "no live worker can make the forms it needs".to_owned(),
            );
            return;
        }
        let correction = self.memory.table(&table).correction();
        decision.actions.push(Action::WritePlan {
            table,
            version,
            why,
            workers,
            correction,
        });
    }

    /// Who can take how much.
    fn plan_workers(&self) -> Vec<PlanWorker> {
        let in_force = self.view.in_force.get(self.table);
        let has_a_part = |id: &String| in_force.is_some_and(|plan| plan.parts.contains_key(id));
        let can_make = |id: &String| self.memory.table(self.table).can_make(id, self.view);
        self.memory
            .eligible()
            .map(|Unit { id, .. }| PlanWorker {
                id: id.clone(),
                capacity_bytes: self.memory.room_on(
                    self.table,
                    id,
                    self.view,
                    self.settings.reserve_ratio,
                ),
                accepts_new: self.memory.is_live(id),
            })
            .filter(|worker| {
                if worker.accepts_new {
                    can_make(&worker.id)
                } else {
                    has_a_part(&worker.id)
                }
            })
            .collect()
    }

    /// Whether the version's sizes are known; has them read if not.
    fn has_sizes(&self, table: &str, version: u64, decision: &mut Decision) -> bool {
        let memory = self.memory.table(table);
        if memory.is_loaded(version) {
            return true;
        }
        if !memory.is_loading(version) {
            push_once(
                &mut decision.actions,
                Action::LoadCatalog {
                    table: table.to_owned(),
                    version,
                },
            );
        }
        decision
            .waiting
            .entry(table.to_owned())
            .or_insert_with(|| "reading footers".to_owned());
        false
    }

    /// Whether it is time to try (again); sets the alarm if not.
    fn is_due(&self, version: u64, decision: &mut Decision) -> bool {
        match self.memory.table(self.table).failure(version) {
            Some(failure) if self.now_ms < failure.retry_ms => {
                decision.wake(failure.retry_ms);
                decision
                    .waiting
                    .insert(self.table.to_owned(), failure.message.clone());
                false
            }
            _ => true,
        }
    }

    /// A plan of an earlier coordinator that does not fit has to be understood to be corrected.
    fn adopt_if_overflowing(
        &mut self,
        in_force: Option<&CacheVersion>,
        version: u64,
        decision: &mut Decision,
    ) {
        let Some(plan) = in_force.filter(|plan| !plan.unloaded) else {
            return;
        };
        let unknown = self.memory.table(self.table).basis(plan.plan).is_none();
        if unknown
            && self.view.states.values().any(|state| {
                state
                    .tables
                    .get(self.table)
                    .is_some_and(|table| table.left_out.chunks > 0)
            })
            && self.is_due(version, decision)
            && self.has_sizes(self.table, version, decision)
        {
            push_once(
                &mut decision.actions,
                Action::Adopt {
                    table: self.table.to_owned(),
                },
            );
        }
    }

    fn prune(&mut self, in_force: Option<&CacheVersion>, decision: &mut Decision) {
        let Some(plan) = in_force.filter(|plan| self.memory.table(self.table).pruned() < plan.plan)
        else {
            return;
        };
        let View {
            workers, states, ..
        } = self.view;
        let all = || {
            (
                workers.values().cloned().collect(),
                states.values().cloned().collect(),
            )
        };
        let (workers, states) = self.reports.get_or_init(all);
        if all_reported(plan, workers, states) {
            decision.actions.push(Action::Prune {
                table: self.table.to_owned(),
            });
        }
    }
}

/// The workers that say they hold something of the table.
fn holders<'a>(table: &'a str, view: &'a View) -> impl Iterator<Item = &'a String> {
    view.states.iter().filter_map(move |(worker, state)| {
        let held = state.tables.get(table)?.held_bytes > 0;
        held.then_some(worker)
    })
}

/// A worker that knows a later plan of the table than the one in force, and so will not follow it.
fn overtaking<'a>(table: &str, in_force: &CacheVersion, view: &'a View) -> Option<&'a String> {
    let knows_later = |state: &WorkerState| {
        let known = state.tables.get(table);
        let known = known.map_or([None; 2], |known| [known.target, known.current]);
        known
            .iter()
            .flatten()
            .any(|known| known.plan > in_force.plan)
    };
    let mut states = view.states.iter();
    states.find_map(|(worker, state)| knows_later(state).then_some(worker))
}

fn push_once(actions: &mut Vec<Action>, action: Action) {
    if !actions.contains(&action) {
        actions.push(action);
    }
}

/// The ids of all workers that plans in force speak of.
pub(crate) fn planned_workers(view: &View) -> BTreeSet<&String> {
    view.in_force
        .values()
        .flat_map(|plan| plan.parts.keys())
        .collect()
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
