//! What the coordinator remembers of one table.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::decide::{View, Why};

/// How often sizes are corrected in the plans of one version.
const CORRECTIONS_MAX: u32 = 4;

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
    /// Copies that have no place, of chunks that have one.
    pub missing_copies: u64,
    /// Their estimated bytes, uncorrected.
    pub missing_bytes: u64,
    /// The room there was for the table on all workers together.
    pub room_bytes: u64,
    /// The correction it counted with.
    pub correction: f64,
    /// Names the files that it was made for.
    pub files: String,
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
    /// By worker, the files it reported and those of the plan, when they differed last.
    compared: BTreeMap<String, (String, String)>,
    /// The worker whose report made what was read of the files out of date.
    outdated_by: Option<String>,
    /// The version that was asked for last, and the revision of that request.
    asked: (u64, i64),
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
            compared: BTreeMap::new(),
            outdated_by: None,
            asked: (0, 0),
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
        let Some(forms) = self.loaded.values().next_back() else {
            return true;
        };
        let Some(record) = view.workers.get(worker) else {
            return true;
        };
        // A worker that says nothing about forms is taken to make all of them.
        record.formats.is_empty()
            || forms
                .iter()
                .all(|form| record.formats.iter().any(|known| known == form))
    }

    /// Forgets versions that are neither wanted nor in force.
    pub(crate) fn keep_only(&mut self, is_needed: impl Fn(u64) -> bool) {
        self.loaded.retain(|version, _| is_needed(*version));
        self.failures.retain(|version, _| is_needed(*version));
    }

    /// Takes notice of the request. Where the same version is asked for again, what failed is tried
    /// at once, for its files may have been put right.
    pub(crate) fn asked(&mut self, version: u64, revision: i64) {
        if self.asked.0 == version && self.asked.1 < revision {
            self.failures.remove(&version);
        }
        self.asked = (version, revision);
    }

    pub(crate) fn start_loading(&mut self, version: u64) {
        self.loading.insert(version);
    }

    pub(crate) fn finish_loading(&mut self, version: u64, forms: BTreeSet<&'static str>) {
        self.loading.remove(&version);
        self.failures.remove(&version);
        self.loaded.insert(version, forms);
    }

    pub(crate) fn fail(
        &mut self,
        version: u64,
        message: String,
        is_passing: bool,
        (shortest, longest): (u64, u64),
        now_ms: u64,
    ) {
        self.loading.remove(&version);
        let before = self.failures.get(&version);
        let attempts = before
            .map_or(0, |failure| failure.attempts)
            .saturating_add(1);
        let doubled = shortest.saturating_mul(1 << (attempts - 1).min(20));
        let pause = if is_passing {
            doubled.min(longest)
        } else {
            longest
        };
        let retry_ms = now_ms.saturating_add(pause);
        let failure = Failure {
            message,
            retry_ms,
            is_passing,
            attempts,
        };
        self.failures.insert(version, failure);
    }

    pub(crate) fn plan(&mut self, version: u64, basis: Basis, why: Option<&Why>) {
        self.failures.remove(&version);
        if self.corrected_version != version {
            self.corrected_version = version;
            self.corrections = 0;
        }
        if why == Some(&Why::SizesCorrected) {
            self.corrections += 1;
        }
        self.outdated_by = None;
        self.basis = Some(basis);
    }

    pub(crate) fn take_over(&mut self, version: u64, basis: Basis) {
        self.correction = basis.correction;
        self.plan(version, basis, None);
    }

    pub(crate) fn unload(&mut self) {
        self.basis = None;
        self.failures.clear();
    }

    pub(crate) fn prune(&mut self, plan: u64) {
        self.pruned = plan;
    }

    /// Whether the files have to be looked at again, rather than taken as the layout names them.
    pub(crate) fn is_outdated(&self) -> bool {
        self.outdated_by.is_some()
    }

    /// Compares the files that live workers saw with those the plan was made for. Where they
    /// differ the footers are read again, once for each such difference: who looked earlier than
    /// others reports the older files for a while.
    pub(crate) fn compare_files<'a>(
        &mut self,
        plan: u64,
        version: u64,
        reports: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Option<Why> {
        let planned = self.basis(plan)?.files.clone();
        for (worker, files) in reports {
            if files.is_empty() {
                continue;
            }
            if files == planned {
                self.compared.remove(worker);
                continue;
            }
            let difference = (files.to_owned(), planned.clone());
            let known = self.compared.insert(worker.to_owned(), difference.clone());
            if known.as_ref() != Some(&difference) {
                self.loaded.remove(&version);
                self.outdated_by = Some(worker.to_owned());
            }
        }
        self.outdated_by.clone().map(Why::FilesChanged)
    }

    /// Takes in what workers reported, and says whether that is reason for another plan: sizes were
    /// underestimated and something did not fit, overestimated and something was left out in vain,
    /// or there is more room now for what was left out.
    pub(crate) fn reconsider(
        &mut self,
        plan: u64,
        reported: Option<Correction>,
        room: u64,
    ) -> Option<Why> {
        let basis = self.basis.as_ref().filter(|basis| basis.plan == plan)?;
        if let Some(reported) = reported {
            self.correction = reported.factor;
            let too_small = reported.overflow && reported.factor > basis.correction * 1.01;
            let too_large = basis.left_out_chunks > 0 && reported.factor < basis.correction * 0.9;
            if (too_small || too_large) && self.corrections < CORRECTIONS_MAX {
                return Some(Why::SizesCorrected);
            }
        }
        let more_room = (basis.left_out_chunks > 0 || basis.missing_copies > 0)
            && room > basis.room_bytes.saturating_add(basis.room_bytes / 100);
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
