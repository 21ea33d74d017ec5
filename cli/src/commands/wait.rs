//! How far a load is, and waiting for it.

use std::time::Duration;

use indicatif::ProgressBar;
use stoa_layout::TableVersion;
use stoa_metastore::{
    CacheVersion, CoordinatorState, Records, Rejection, WorkerRecord, WorkerState, keys,
};
use tokio::time::Instant;

use crate::config::format_bytes;
use crate::error::{Error, Result};
use crate::progress::{Unit, Waiting, bar};

/// How often the records are looked at while waiting.
const LOOK_EVERY: Duration = Duration::from_millis(150);

/// How long a plan that does not place the whole table must stand before it counts as the result:
/// what workers report of sizes, and workers that come back, make another one.
const SHORT_PLAN_STANDS: Duration = Duration::from_secs(3);

/// What was loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// The version in force, which may be newer than the one waited for.
    pub table_version: String,
    /// Chunks in shared memory, over all workers.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Chunks that were there before.
    pub kept_chunks: u64,
    /// Chunks that were fetched.
    pub fetched_chunks: u64,
    /// Those of them that came from another worker.
    pub peer_chunks: u64,
    /// Bytes of these.
    pub peer_bytes: u64,
    /// Chunks that did not fit or could not be had.
    pub left_out_chunks: u64,
    /// Their bytes, as estimated.
    pub left_out_bytes: u64,
    /// Those of them that did not fit.
    pub no_room_chunks: u64,
    /// What did not fit or could not be had, and all else that falls short, in words; empty when
    /// the whole version is in memory.
    pub left_out: Vec<String>,
}

/// How far a load is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadProgress {
    /// Nothing moves yet; the text says what is missing.
    Waiting(String),
    /// Workers are filling.
    Loading {
        /// Bytes published.
        bytes_done: u64,
        /// Bytes of the plan, as far as known.
        bytes_total: u64,
        /// Chunks published.
        chunks_done: u64,
        /// Chunks of the plan.
        chunks_total: u64,
        /// What is wrong at the moment, by worker.
        errors: Vec<String>,
    },
    /// The plan has no part for anybody.
    Empty(Loaded),
    /// Everything that fits and can be had is there.
    Done(Loaded),
    /// The coordinator refused the version.
    Rejected(String),
}

/// What the records say about a load, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Whether somebody is elected.
    pub coordinator: bool,
    /// The plan in force of the table.
    pub plan: Option<CacheVersion>,
    /// The live workers.
    pub workers: Vec<WorkerRecord>,
    /// What they report.
    pub states: Vec<WorkerState>,
    /// Requests that were refused since the load was asked for.
    pub rejections: Vec<Rejection>,
    /// What keeps the coordinator from planning.
    pub coordinating: CoordinatorState,
}

impl Observed {
    /// Looks at the records.
    pub async fn look(records: &Records, table: &str, since_revision: i64) -> Result<Observed> {
        let mut rejections = records.rejections().await?;
        rejections.retain(|rejection| rejection.revision > since_revision);
        // The plan last: reports that are older than it are never taken for reports of it.
        let states = records.states().await?;
        Ok(Observed {
            coordinator: records.store().get(keys::ELECTION).await?.is_some(),
            workers: records.workers().await?,
            states,
            rejections,
            coordinating: records.coordinator_state().await?,
            plan: records.cache_version(table).await?,
        })
    }
}

/// How far the load of a version is, from what the records say.
pub fn progress_of(wanted: &TableVersion, observed: &Observed) -> LoadProgress {
    let name = wanted.table.to_string();
    let refused = observed
        .rejections
        .iter()
        .find(|rejection| rejection.request == wanted.to_string());
    if let Some(rejection) = refused {
        return LoadProgress::Rejected(rejection.reason.clone());
    }
    let plan = observed.plan.as_ref().filter(|plan| {
        !plan.unloaded
            && plan
                .version()
                .is_ok_and(|version| version >= wanted.version.get())
    });
    let Some(plan) = plan else {
        return LoadProgress::Waiting(if !observed.coordinator {
            "no coordinator is elected; is `stoa coordinator` running?".into()
        } else if observed.workers.is_empty() {
            "no worker is alive; is `stoa worker` running?".into()
        } else if let Some(unplanned) = observed.coordinating.unplanned.get(&name) {
            format!("{} cannot be planned: {}", wanted, unplanned.reason)
        } else {
            "waiting for the coordinator's plan".into()
        });
    };
    if plan.parts.is_empty() {
        return match observed.workers.is_empty() {
            true => LoadProgress::Waiting("no worker is alive; is `stoa worker` running?".into()),
            false => LoadProgress::Empty(Loaded {
                table_version: plan.table_version.clone(),
                left_out_chunks: plan.notes.left_out.chunks,
                left_out_bytes: plan.notes.left_out.bytes,
                no_room_chunks: plan.notes.left_out.no_room,
                left_out: plan.notes.shortfalls(format_bytes),
                ..Loaded::default()
            }),
        };
    }
    let mut loaded = Loaded {
        table_version: plan.table_version.clone(),
        left_out_chunks: plan.notes.left_out.chunks,
        left_out_bytes: plan.notes.left_out.bytes,
        no_room_chunks: plan.notes.left_out.no_room,
        ..Loaded::default()
    };
    let (mut bytes_total, mut chunks_total, mut missing) = (0, 0, Vec::new());
    let mut errors = Vec::new();
    for worker in plan.parts.keys() {
        let state = observed.states.iter().find(|state| state.id == *worker);
        let table = state.and_then(|state| state.tables.get(&name));
        let Some(table) = table else {
            missing.push(worker.clone());
            continue;
        };
        loaded.chunks += table.chunks_done;
        loaded.bytes += table.bytes_done;
        loaded.kept_chunks += table.kept_chunks;
        loaded.fetched_chunks += table.fetched_chunks;
        loaded.peer_chunks += table.peer_chunks;
        loaded.peer_bytes += table.peer_bytes;
        bytes_total += table.bytes_total;
        chunks_total += table.chunks_total;
        if table.left_out.chunks > 0 {
            loaded.left_out_chunks += table.left_out.chunks;
            loaded.left_out_bytes += table.left_out.likely_bytes();
            loaded.no_room_chunks += table.left_out.no_room;
            let reason = table
                .left_out
                .reason
                .as_deref()
                .unwrap_or("no reason given");
            loaded.left_out.push(format!(
                "worker {worker} left out {} chunks ({}): {reason}",
                table.left_out.chunks,
                format_bytes(table.left_out.likely_bytes())
            ));
        }
        if let Some(error) = &table.error {
            errors.push(format!("worker {worker}: {error}"));
        }
        if table.current.is_none_or(|current| current.plan < plan.plan) {
            missing.push(worker.clone());
        }
    }
    if missing.is_empty() {
        // What the plan had no place for is nobody's part, so no worker says it.
        let mut left_out = plan.notes.shortfalls(format_bytes);
        left_out.append(&mut loaded.left_out);
        loaded.left_out = left_out;
        // What stands as an error after all was done is part of the result.
        loaded.left_out.extend(errors);
        return LoadProgress::Done(loaded);
    }
    // What is left out so far may still come; why it has not is worth knowing.
    errors.append(&mut loaded.left_out);
    LoadProgress::Loading {
        bytes_done: loaded.bytes,
        bytes_total,
        chunks_done: loaded.chunks,
        chunks_total,
        errors,
    }
}

/// Waits until all of these versions are loaded, with one bar on stderr. One result a version.
///
/// `since_revision`: refusals before this revision are of earlier requests.
pub async fn wait_all(
    records: &Records,
    wanted: &[TableVersion],
    since_revision: i64,
    timeout: Duration,
) -> Result<Vec<Loaded>> {
    let deadline = Instant::now() + timeout;
    let label = match wanted {
        [one] => one.to_string(),
        many => format!("loading {} tables", many.len()),
    };
    let bar = bar(label, Unit::Bytes, 0);
    let mut waiting = Waiting::default();
    let mut waits: Vec<Wait> = wanted.iter().map(Wait::new).collect();
    let outcome = loop {
        let mut refused = None;
        for wait in waits.iter_mut().filter(|wait| wait.loaded.is_none()) {
            // A metastore that does not answer for a while is waited for like everything else.
            match Observed::look(records, &wait.wanted.table.to_string(), since_revision).await {
                Ok(observed) => refused = refused.or(wait.step(&observed, Instant::now())),
                Err(error) => {
                    wait.last = error.to_string();
                    wait.held_up = Some(wait.last.clone());
                }
            }
        }
        show(&bar, &waits);
        if let Some(reason) = refused {
            break Err(Error::Refused(reason));
        }
        let Some(behind) = waits.iter().find(|wait| wait.loaded.is_none()) else {
            break Ok(());
        };
        let held_up = behind.held_up.as_ref();
        let held_up = held_up.map(|reason| format!("{}: {reason}", behind.wanted));
        waiting.say(held_up.as_deref());
        if Instant::now() >= deadline {
            break Err(Error::NotReady(format!(
                "{} is not loaded after {}: {}; `stoa status` shows how it goes on",
                behind.wanted,
                humantime::format_duration(Duration::from_secs(timeout.as_secs())),
                behind.last
            )));
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY.min(deadline - Instant::now())) => {}
            _ = tokio::signal::ctrl_c() => break Err(Error::Interrupted),
        }
    };
    bar.finish_and_clear();
    outcome?;
    Ok(waits.into_iter().filter_map(|wait| wait.loaded).collect())
}

/// The waiting for one version.
struct Wait<'a> {
    wanted: &'a TableVersion,
    loaded: Option<Loaded>,
    /// What the plan has come to, short of the whole table, and since when.
    short: Option<(Loaded, Instant)>,
    bytes: (u64, u64),
    chunks: (u64, u64),
    last: String,
    /// Why nothing moves, or not all.
    held_up: Option<String>,
}

impl<'a> Wait<'a> {
    fn new(wanted: &'a TableVersion) -> Wait<'a> {
        Wait {
            wanted,
            loaded: None,
            short: None,
            bytes: (0, 0),
            chunks: (0, 0),
            last: "nothing was seen of it yet".into(),
            held_up: None,
        }
    }

    /// Takes notice of what was observed; the reason when the version was refused.
    fn step(&mut self, observed: &Observed, now: Instant) -> Option<String> {
        self.held_up = None;
        match progress_of(self.wanted, observed) {
            LoadProgress::Done(loaded) if loaded.no_room_chunks > 0 => {
                self.bytes = (loaded.bytes, loaded.bytes + loaded.left_out_bytes);
                self.chunks = (loaded.chunks, loaded.chunks + loaded.left_out_chunks);
                self.last = format!("{} chunks have no room so far", loaded.no_room_chunks);
                self.stands(loaded, now);
            }
            LoadProgress::Done(loaded) => {
                self.bytes = (loaded.bytes, loaded.bytes);
                self.chunks = (loaded.chunks, loaded.chunks);
                self.loaded = Some(loaded);
            }
            LoadProgress::Rejected(reason) => {
                return Some(format!("{} was refused: {reason}", self.wanted));
            }
            LoadProgress::Empty(loaded) => {
                self.last = "the plan has no part for any worker".into();
                self.stands(loaded, now);
            }
            LoadProgress::Waiting(reason) => {
                self.last.clone_from(&reason);
                self.held_up = Some(reason);
            }
            LoadProgress::Loading {
                bytes_done,
                bytes_total,
                chunks_done,
                chunks_total,
                errors,
            } => {
                self.bytes = (bytes_done, bytes_total);
                self.chunks = (chunks_done, chunks_total);
                self.last = format!("{chunks_done} of {chunks_total} chunks are loaded");
                self.held_up = errors.first().cloned();
                for error in errors {
                    self.last = format!("{}; {error}", self.last);
                }
            }
        }
        None
    }

    /// Takes what there is for the result once nothing about it has changed for a while.
    fn stands(&mut self, loaded: Loaded, now: Instant) {
        match &self.short {
            Some((before, since)) if *before == loaded => {
                if now.duration_since(*since) >= SHORT_PLAN_STANDS {
                    self.loaded = Some(loaded);
                }
            }
            _ => self.short = Some((loaded, now)),
        }
    }
}

fn show(bar: &ProgressBar, waits: &[Wait<'_>]) {
    let sum = |pick: fn(&Wait<'_>) -> u64| waits.iter().map(pick).sum::<u64>();
    bar.set_length(sum(|wait| wait.bytes.1));
    bar.set_position(sum(|wait| wait.bytes.0));
    let (done, total) = (sum(|wait| wait.chunks.0), sum(|wait| wait.chunks.1));
    let behind = waits.iter().find(|wait| wait.loaded.is_none());
    bar.set_message(match behind {
        Some(behind) if total == 0 => behind.last.clone(),
        _ => format!("{done}/{total} chunks"),
    });
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use stoa_metastore::{LeftOut, PartPointer, PlanTarget, TableState};

    use super::*;

    fn wanted() -> TableVersion {
        "tpch.orders:2".parse().unwrap()
    }

    fn worker(id: &str) -> WorkerRecord {
        WorkerRecord {
            id: id.into(),
            ..WorkerRecord::default()
        }
    }

    fn state(id: &str, plan: u64, done: u64) -> WorkerState {
        let table = TableState {
            current: Some(PlanTarget { plan, version: 2 }),
            chunks_done: done,
            chunks_total: 10,
            bytes_done: done * 100,
            bytes_total: 1000,
            kept_chunks: 1,
            fetched_chunks: done - 1,
            ..TableState::default()
        };
        WorkerState {
            id: id.into(),
            tables: BTreeMap::from([("tpch.orders".to_string(), table)]),
            ..WorkerState::default()
        }
    }

    fn observed() -> Observed {
        let parts = ["a", "b"].map(|id| (id.to_string(), PartPointer::default()));
        Observed {
            coordinator: true,
            plan: Some(CacheVersion {
                table_version: "tpch.orders:2".into(),
                plan: 7,
                parts: parts.into(),
                ..CacheVersion::default()
            }),
            workers: vec![worker("a"), worker("b")],
            states: vec![state("a", 7, 10), state("b", 7, 10)],
            rejections: Vec::new(),
            coordinating: CoordinatorState::default(),
        }
    }

    #[test]
    fn done_means_every_worker_of_the_plan_has_its_part() {
        let LoadProgress::Done(loaded) = progress_of(&wanted(), &observed()) else {
            panic!("not done");
        };
        assert_eq!((loaded.chunks, loaded.bytes), (20, 2000));
        assert_eq!((loaded.kept_chunks, loaded.fetched_chunks), (2, 18));

        let mut behind = observed();
        behind.states[1] = state("b", 6, 4);
        assert_eq!(
            progress_of(&wanted(), &behind),
            LoadProgress::Loading {
                bytes_done: 1400,
                bytes_total: 2000,
                chunks_done: 14,
                chunks_total: 20,
                errors: vec![],
            }
        );
        behind.states.pop();
        assert!(matches!(
            progress_of(&wanted(), &behind),
            LoadProgress::Loading { .. }
        ));
    }

    #[test]
    fn a_newer_version_in_force_counts_and_an_older_does_not() {
        let mut newer = observed();
        newer.plan.as_mut().unwrap().table_version = "tpch.orders:3".into();
        assert!(matches!(
            progress_of(&wanted(), &newer),
            LoadProgress::Done(_)
        ));
        newer.plan.as_mut().unwrap().table_version = "tpch.orders:1".into();
        assert_eq!(
            progress_of(&wanted(), &newer),
            LoadProgress::Waiting("waiting for the coordinator's plan".into())
        );
    }

    #[test]
    fn what_is_missing_is_said() {
        let waiting = |observed: &Observed| match progress_of(&wanted(), observed) {
            LoadProgress::Waiting(reason) => reason,
            other => panic!("{other:?}"),
        };
        let mut nothing = Observed::default();
        assert!(waiting(&nothing).contains("no coordinator"));
        nothing.coordinator = true;
        assert!(waiting(&nothing).contains("no worker"));
        let mut failing = observed();
        failing.plan = None;
        let unplanned = stoa_metastore::Unplanned {
            version: 2,
            reason: "the files are gone".into(),
        };
        let all = &mut failing.coordinating.unplanned;
        all.insert("tpch.orders".into(), unplanned);
        assert_eq!(
            waiting(&failing),
            "tpch.orders:2 cannot be planned: the files are gone"
        );
        nothing.plan = observed().plan;
        nothing.plan.as_mut().unwrap().parts.clear();
        assert!(waiting(&nothing).contains("no worker"));
        nothing.workers = vec![worker("a")];
        assert!(matches!(
            progress_of(&wanted(), &nothing),
            LoadProgress::Empty(_)
        ));
    }

    #[test]
    fn what_did_not_fit_and_what_failed_are_part_of_the_result() {
        let mut short = observed();
        let table = short.states[0].tables.get_mut("tpch.orders").unwrap();
        table.left_out = LeftOut {
            chunks: 3,
            bytes: 3 << 20,
            reason: Some("the cache is full".into()),
            ..LeftOut::default()
        };
        table.error = Some("one file is gone".into());
        let notes = &mut short.plan.as_mut().unwrap().notes;
        notes.left_out = LeftOut {
            chunks: 5,
            bytes: 7 << 20,
            reason: Some("the workers' capacity is used up".into()),
            ..LeftOut::default()
        };
        let LoadProgress::Done(loaded) = progress_of(&wanted(), &short) else {
            panic!("not done");
        };
        assert_eq!(
            (loaded.left_out_chunks, loaded.left_out_bytes),
            (8, 10 << 20)
        );
        assert_eq!(
            loaded.left_out,
            [
                "chunks without a place in the plan: 5 (7 MiB): the workers' capacity is used up",
                "worker a left out 3 chunks (3 MiB): the cache is full",
                "worker a: one file is gone"
            ]
        );
    }

    /// While a worker tries again, the load is not over, and what holds it up is seen.
    #[test]
    fn what_is_left_out_for_now_is_waited_for_and_said() {
        let mut trying = observed();
        let table = trying.states[0].tables.get_mut("tpch.orders").unwrap();
        table.current = None;
        table.left_out = LeftOut {
            chunks: 3,
            bytes: 3 << 20,
            reason: Some("503".into()),
            ..LeftOut::default()
        };
        let LoadProgress::Loading { errors, .. } = progress_of(&wanted(), &trying) else {
            panic!("over");
        };
        assert_eq!(errors, ["worker a left out 3 chunks (3 MiB): 503"]);
    }

    /// A plan that leaves something out may be followed by another one at once: when sizes turn out
    /// smaller, or a worker comes back. Only what stands is the result.
    #[test]
    fn what_is_left_out_counts_once_it_stands() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let wanted = wanted();
        let short = |chunks| {
            let mut short = observed();
            short.plan.as_mut().unwrap().notes.left_out = LeftOut {
                chunks,
                no_room: chunks,
                bytes: chunks << 30,
                ..LeftOut::default()
            };
            short
        };
        let mut wait = Wait::new(&wanted);
        for (chunks, ms) in [(9, 0), (9, 2900), (4, 3000), (4, 5900)] {
            assert_eq!(wait.step(&short(chunks), at(ms)), None);
            assert_eq!(wait.loaded, None, "{chunks} at {ms}");
        }
        // The whole of it is the result at once.
        let mut whole = Wait::new(&wanted);
        whole.step(&short(4), at(0));
        whole.step(&observed(), at(1));
        assert_eq!(whole.loaded.unwrap().left_out_chunks, 0);
        wait.step(&short(4), at(6000));
        assert_eq!(wait.loaded.unwrap().left_out_chunks, 4);
    }

    #[test]
    fn a_refusal_ends_the_waiting() {
        let mut refused = observed();
        refused.rejections.push(Rejection {
            request: "tpch.orders:2".into(),
            reason: "stale".into(),
            ..Rejection::default()
        });
        assert_eq!(
            progress_of(&wanted(), &refused),
            LoadProgress::Rejected("stale".into())
        );
    }
}
