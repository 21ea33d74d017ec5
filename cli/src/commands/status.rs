//! `stoa status`: tables, versions, workers, problems.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use stoa_metastore::{
    CacheVersion, CoordinatorState, LeftOut, LoadRequest, Records, Rejection, WorkerPhase,
    WorkerRecord, WorkerState, keys,
};

use super::memory::{Memory, MemoryTable, memory};
use super::peers::unreachable_by_others;
use super::print_json;
use crate::args::StatusArgs;
use crate::config::format_bytes;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::table::{Align, TextTable};

/// How many refusals the table shows; JSON has all that are kept.
const REJECTIONS_SHOWN: usize = 5;

/// The state of a table that lies in memory although no record asks for it: after a reset, or where
/// a worker was away when it was dropped.
const HELD: &str = "held, not wanted";

/// What the records say, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Overview {
    /// Where the records are.
    pub metastore: String,
    /// The elected coordinator.
    pub coordinator: Option<String>,
    /// Published layout versions, by table.
    pub layouts: BTreeMap<String, Vec<u64>>,
    /// What is wanted of tables.
    pub requests: Vec<LoadRequest>,
    /// The plans in force.
    pub plans: Vec<CacheVersion>,
    /// The live workers.
    pub workers: Vec<WorkerRecord>,
    /// What they report.
    pub states: Vec<WorkerState>,
    /// Workers whose memory is to be locked.
    pub pins: BTreeSet<String>,
    /// Requests that were refused, oldest first.
    pub rejections: Vec<Rejection>,
    /// What keeps the coordinator from planning.
    pub coordinating: CoordinatorState,
    /// What lies in this machine's memory, where nothing runs and memory is all there is.
    pub at_rest: Option<Memory>,
}

/// How far one table is, over all workers.
#[derive(Clone, Debug, Default, PartialEq)]
struct TableLine {
    table: String,
    published: Option<u64>,
    wanted: Option<u64>,
    planned: Option<u64>,
    state: &'static str,
    chunks_done: u64,
    chunks_total: u64,
    bytes_done: u64,
    bytes_total: u64,
    held_bytes: u64,
    kept_chunks: u64,
    fetched_chunks: u64,
    peer_chunks: u64,
    peer_bytes: u64,
    left_out_chunks: u64,
    left_out_bytes: u64,
    unplaced: LeftOut,
    missing_copies: LeftOut,
    problems: Vec<String>,
}

impl Overview {
    /// Reads the records.
    pub async fn gather(records: &Records, metastore: String) -> Result<Overview> {
        let mut layouts = BTreeMap::new();
        for table in records.layout_tables().await? {
            let versions = records.layouts(&table).await?;
            layouts.insert(table, versions);
        }
        let election = records.store().get(keys::ELECTION).await?;
        let coordinator = election.and_then(|entry| {
            let record: Value = serde_json::from_slice(&entry.value).ok()?;
            record["candidate"].as_str().map(str::to_string)
        });
        Ok(Overview {
            metastore,
            coordinator,
            layouts,
            requests: records.load_requests().await?,
            plans: records.cache_versions().await?,
            workers: records.workers().await?,
            states: records.states().await?,
            pins: records
                .pins()
                .await?
                .into_iter()
                .map(|pin| pin.worker)
                .collect(),
            rejections: records.rejections().await?,
            coordinating: records.coordinator_state().await?,
            at_rest: None,
        })
    }

    /// The table as it lies in memory, where nothing runs.
    fn resting(&self, table: &str) -> Option<&MemoryTable> {
        let memory = self.at_rest.as_ref()?;
        memory.tables.iter().find(|found| found.table == table)
    }

    fn state_of(&self, worker: &str) -> Option<&WorkerState> {
        self.states.iter().find(|state| state.id == worker)
    }

    fn tables(&self) -> Vec<TableLine> {
        let mut names: BTreeSet<&str> = self.layouts.keys().map(String::as_str).collect();
        names.extend(self.requests.iter().map(|request| request.table.as_str()));
        names.extend(self.plans.iter().filter_map(|plan| plan.table().ok()));
        names.extend(
            self.states
                .iter()
                .flat_map(|state| state.tables.keys().map(String::as_str)),
        );
        let resting = self.at_rest.iter().flat_map(|memory| &memory.tables);
        names.extend(resting.map(|table| table.table.as_str()));
        let lines = names.into_iter().map(|name| self.table(name));
        // Of a dropped table only numbers are left.
        let is_there = |line: &TableLine| {
            let versions = [line.published, line.wanted, line.planned];
            versions.iter().any(Option::is_some) || line.held_bytes > 0
        };
        lines.filter(is_there).collect()
    }

    fn table(&self, name: &str) -> TableLine {
        let request = self.requests.iter().find(|request| request.table == name);
        let plan = self
            .plans
            .iter()
            .find(|plan| plan.table().is_ok_and(|table| table == name));
        let mut line = TableLine {
            table: name.to_string(),
            published: self
                .layouts
                .get(name)
                .and_then(|versions| versions.last().copied()),
            wanted: request.filter(|r| !r.unloaded).map(|r| r.version),
            planned: plan.filter(|p| !p.unloaded).and_then(|p| p.version().ok()),
            ..TableLine::default()
        };
        let mut behind = false;
        for state in &self.states {
            let Some(table) = state.tables.get(name) else {
                continue;
            };
            line.chunks_done += table.chunks_done;
            line.chunks_total += table.chunks_total;
            line.bytes_done += table.bytes_done;
            line.bytes_total += table.bytes_total;
            line.held_bytes += table.held_bytes;
            line.kept_chunks += table.kept_chunks;
            line.fetched_chunks += table.fetched_chunks;
            line.peer_chunks += table.peer_chunks;
            line.peer_bytes += table.peer_bytes;
            line.left_out_chunks += table.left_out.chunks;
            line.left_out_bytes += table.left_out.likely_bytes();
            if table.left_out.chunks > 0 {
                line.problems.push(format!(
                    "{name}: worker {} left out {} chunks ({}): {}",
                    state.id,
                    table.left_out.chunks,
                    format_bytes(table.left_out.likely_bytes()),
                    table
                        .left_out
                        .reason
                        .as_deref()
                        .unwrap_or("no reason given")
                ));
            }
            if let Some(error) = &table.error {
                line.problems
                    .push(format!("{name}: worker {}: {error}", state.id));
            }
        }
        if self.at_rest.is_some() {
            let resting = self.resting(name);
            line.chunks_done = resting.map_or(0, |table| table.chunks);
            line.held_bytes = resting.map_or(0, |table| table.bytes);
            line.state = match (line.wanted, resting) {
                (Some(wanted), Some(table)) if table.version >= wanted => "in memory",
                (Some(_), Some(_)) => "older in memory",
                (Some(_), None) => "waiting",
                (None, Some(_)) => HELD,
                (None, None) => "not loaded",
            };
            return line;
        }
        if let Some(unplanned) = self.coordinating.unplanned.get(name) {
            line.problems.push(format!(
                "{name}:{} cannot be planned: {}",
                unplanned.version, unplanned.reason
            ));
        }
        if let Some(plan) = plan.filter(|plan| !plan.unloaded) {
            let shortfalls = plan.notes.shortfalls(format_bytes).into_iter();
            line.problems
                .extend(shortfalls.map(|said| format!("{name}: {said}")));
            line.unplaced = plan.notes.left_out.clone();
            line.missing_copies = plan.notes.missing_copies.clone();
            for worker in plan.parts.keys() {
                let current = self
                    .state_of(worker)
                    .and_then(|state| state.tables.get(name))
                    .and_then(|table| table.current);
                behind |= current.is_none_or(|current| current.plan < plan.plan);
                if !self.workers.iter().any(|record| record.id == *worker) {
                    line.problems
                        .push(format!("{name}: worker {worker} is gone"));
                }
            }
        }
        line.state = match (line.wanted, line.planned) {
            (None, None) if line.held_bytes > 0 && request.is_none() && plan.is_none() => {
                let holds = |state: &&WorkerState| {
                    let table = state.tables.get(name);
                    table.is_some_and(|table| table.held_bytes > 0)
                };
                let holders = self.states.iter().filter(holds);
                let holders: Vec<&str> = holders.map(|state| state.id.as_str()).collect();
                line.problems.push(format!(
                    "{name}: held by {}, and nothing wants it; `stoa unload {name}` frees it",
                    holders.join(", ")
                ));
                HELD
            }
            (None, None) if line.held_bytes > 0 => "unloading",
            (None, None) => "not loaded",
            (None, Some(_)) => "unloading",
            (Some(_), None) => "waiting",
            (Some(wanted), Some(planned)) if planned < wanted => "waiting",
            _ if behind => "loading",
            _ if !line.problems.is_empty() => "partial",
            _ => "loaded",
        };
        line
    }

    /// What an operator should know.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        // Where everything is embedded, nothing has to run while nobody asks.
        let waiting =
            self.at_rest.is_none() && self.requests.iter().any(|request| !request.unloaded);
        if self.coordinator.is_none() && waiting {
            problems.push("no coordinator is elected; run `stoa coordinator`".to_string());
        }
        if self.workers.is_empty() && waiting {
            problems.push("no worker is alive; run `stoa worker`".to_string());
        }
        for table in self.tables() {
            problems.extend(table.problems);
        }
        problems.extend(unreachable_by_others(&self.workers));
        for state in &self.states {
            for problem in &state.problems {
                problems.push(format!("worker {}: {problem}", state.id));
            }
        }
        problems
    }

    /// One object for scripts.
    pub fn to_json(&self) -> Value {
        let tables: Vec<Value> = self
            .tables()
            .iter()
            .map(|line| {
                json!({
                    "table": line.table,
                    "versions": self.layouts.get(&line.table).cloned().unwrap_or_default(),
                    "wanted_version": line.wanted,
                    "planned_version": line.planned,
                    "state": line.state,
                    "chunks_done": line.chunks_done,
                    "chunks_total": line.chunks_total,
                    "bytes_done": line.bytes_done,
                    "bytes_total": line.bytes_total,
                    "held_bytes": line.held_bytes,
                    "kept_chunks": line.kept_chunks,
                    "fetched_chunks": line.fetched_chunks,
                    "peer_chunks": line.peer_chunks,
                    "peer_bytes": line.peer_bytes,
                    "left_out_chunks": line.left_out_chunks,
                    "left_out_bytes": line.left_out_bytes,
                    "unplaced": line.unplaced,
                    "missing_copies": line.missing_copies,
                    "problems": line.problems,
                })
            })
            .collect();
        let workers: Vec<Value> = self
            .workers
            .iter()
            .map(|worker| {
                let state = self.state_of(&worker.id);
                json!({
                    "id": worker.id,
                    "host": worker.host,
                    "state": state.map(|state| state.state.to_string()),
                    "control": worker.addresses.control,
                    "http": worker.addresses.http,
                    "capacity_bytes": worker.capacity_bytes,
                    "held_bytes": state.map_or(0, |state| state.held_bytes),
                    "retained_bytes": state.map_or(0, |state| state.retained_bytes),
                    "unverified_bytes": state.map_or(0, |state| state.unverified_bytes),
                    "pin_requested": self.pins.contains(&worker.id),
                    "started_unix_ms": worker.started_unix_ms,
                    "tables": state.map(|state| json!(state.tables)),
                    "problems": state.map(|state| state.problems.clone()).unwrap_or_default(),
                })
            })
            .collect();
        json!({
            "metastore": self.metastore,
            "coordinator": self.coordinator,
            "tables": tables,
            "workers": workers,
            "rejections": self.rejections,
            "problems": self.problems(),
            "memory": self.at_rest.as_ref().map(Memory::to_json),
        })
    }

    /// Tables for people.
    pub fn to_text(&self) -> String {
        let mut text = match &self.at_rest {
            Some(memory) => format!(
                "{}; nothing runs, the cache lies in {}\n\n",
                self.metastore, memory.location
            ),
            None => format!(
                "{}; coordinator {}\n\n",
                self.metastore,
                self.coordinator.as_deref().unwrap_or("none")
            ),
        };
        let mut tables = TextTable::new([
            ("table", Align::Left),
            ("published", Align::Right),
            ("wanted", Align::Right),
            ("planned", Align::Right),
            ("state", Align::Left),
            ("chunks", Align::Right),
            ("held", Align::Right),
        ]);
        let version = |version: Option<u64>| version.map_or("-".to_string(), |v| v.to_string());
        for line in self.tables() {
            tables.row([
                line.table.clone(),
                version(line.published),
                version(line.wanted),
                version(line.planned),
                line.state.to_string(),
                match &self.at_rest {
                    Some(_) => line.chunks_done.to_string(),
                    None => format!("{}/{}", line.chunks_done, line.chunks_total),
                },
                format_bytes(line.held_bytes),
            ]);
        }
        match tables.is_empty() {
            true => text.push_str("no tables; `stoa layout create --help` shows how to begin\n"),
            false => text.push_str(&tables.to_string()),
        }
        if self.at_rest.is_some() {
            if self.tables().iter().any(|line| line.state == HELD) {
                text.push_str("\n`stoa unload TABLE` frees what is held and not wanted\n");
            }
            text.push_str("\n`stoa sql` or `stoa worker` goes on from here\n");
            return text;
        }
        text.push('\n');
        let mut workers = TextTable::new([
            ("worker", Align::Left),
            ("host", Align::Left),
            ("state", Align::Left),
            ("capacity", Align::Right),
            ("held", Align::Right),
            ("retained", Align::Right),
            ("pinned", Align::Left),
            ("control", Align::Left),
            ("http", Align::Left),
        ]);
        for worker in &self.workers {
            let state = self.state_of(&worker.id);
            let address = |address: &Option<String>| address.clone().unwrap_or_else(|| "-".into());
            workers.row([
                worker.id.clone(),
                worker.host.clone(),
                state.map_or("starting".into(), |state| state.state.to_string()),
                format_bytes(worker.capacity_bytes),
                format_bytes(state.map_or(0, |state| state.held_bytes)),
                format_bytes(state.map_or(0, |state| state.retained_bytes)),
                match self.pins.contains(&worker.id) {
                    true => "yes".into(),
                    false => "no".to_string(),
                },
                address(&worker.addresses.control),
                address(&worker.addresses.http),
            ]);
        }
        match workers.is_empty() {
            true => text.push_str("no workers\n"),
            false => text.push_str(&workers.to_string()),
        }
        for state in self
            .states
            .iter()
            .filter(|state| state.unverified_bytes > 0)
        {
            let to_go = format_bytes(state.unverified_bytes);
            text.push_str(&format!(
                "{} hashes its memory again: {to_go} to go\n",
                state.id
            ));
        }
        let problems = self.problems();
        if !problems.is_empty() {
            text.push_str("\nproblems:\n");
            for problem in problems {
                text.push_str(&format!("  {problem}\n"));
            }
        }
        if !self.rejections.is_empty() {
            text.push_str("\nrefused requests, newest last:\n");
            let skipped = self.rejections.len().saturating_sub(REJECTIONS_SHOWN);
            for rejection in &self.rejections[skipped..] {
                let at = Duration::from_millis(rejection.rejected_unix_ms);
                let at = humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + at);
                let Rejection {
                    request, reason, ..
                } = rejection;
                text.push_str(&format!("  {at}  {request}: {reason}\n"));
            }
        }
        text
    }

    /// Why the cluster is not ready, when at least `workers` are needed.
    fn not_ready(&self, workers: usize) -> Option<String> {
        if self.at_rest.is_some() {
            return Some("nothing runs".into());
        }
        if self.coordinator.is_none() {
            return Some("no coordinator is elected".into());
        }
        if self.workers.len() < workers {
            return Some(format!(
                "{} of {workers} workers are alive",
                self.workers.len()
            ));
        }
        let busy: Vec<&str> = self
            .states
            .iter()
            .filter(|state| matches!(state.state, WorkerPhase::Loading | WorkerPhase::Degraded))
            .map(|state| state.id.as_str())
            .collect();
        if !busy.is_empty() {
            return Some(format!("loading or degraded: {}", busy.join(", ")));
        }
        self.tables()
            .iter()
            .find(|table| matches!(table.state, "waiting" | "loading"))
            .map(|table| format!("{} is {}", table.table, table.state))
    }
}

/// Shows the overview.
pub async fn status(args: StatusArgs, context: &Context) -> Result<()> {
    let records = match context.records_to_read().await {
        Ok(records) => records,
        // The state is not to be had; what lies in memory can be seen all the same.
        Err(error) if context.is_embedded() => {
            return status_of_memory(&args, &error.to_string(), context);
        }
        Err(error) => return Err(error),
    };
    let mut overview = Overview::gather(&records, context.metastore_name()).await?;
    if context.is_embedded() && overview.workers.is_empty() {
        overview.at_rest = Some(memory(context));
    }
    if args.json {
        print_json(&overview.to_json());
    } else {
        print!("{}", overview.to_text());
    }
    match args
        .require_ready
        .and_then(|workers| overview.not_ready(workers))
    {
        Some(reason) => Err(Error::NotReady(reason)),
        None => Ok(()),
    }
}

fn status_of_memory(args: &StatusArgs, reason: &str, context: &Context) -> Result<()> {
    let memory = memory(context);
    if args.json {
        print_json(&json!({
            "metastore": context.metastore_name(),
            "problems": [reason],
            "memory": memory.to_json(),
        }));
    } else {
        println!("{reason}\nWhat lies in memory:\n");
        print!("{}", memory.to_text());
    }
    match args.require_ready {
        Some(_) => Err(Error::NotReady(reason.to_string())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use stoa_metastore::{PartPointer, PlanNotes, PlanTarget, TableState, WorkerAddresses};

    use super::*;

    fn overview() -> Overview {
        let table = |plan, version, done| TableState {
            current: Some(PlanTarget { plan, version }),
            chunks_done: done,
            chunks_total: 12,
            bytes_done: done << 20,
            bytes_total: 12 << 20,
            held_bytes: done << 20,
            ..TableState::default()
        };
        let mut short = table(3, 2, 10);
        short.left_out = LeftOut {
            chunks: 2,
            bytes: 2 << 20,
            reason: Some("the cache is full".into()),
            ..LeftOut::default()
        };
        let state = |id: &str, phase, tables: Vec<(&str, TableState)>| WorkerState {
            id: id.into(),
            state: phase,
            held_bytes: 22 << 20,
            capacity_bytes: 64 << 20,
            tables: tables
                .into_iter()
                .map(|(name, t)| (name.to_string(), t))
                .collect(),
            ..WorkerState::default()
        };
        let worker = |id: &str, host: &str| WorkerRecord {
            id: id.into(),
            host: host.into(),
            capacity_bytes: 64 << 20,
            addresses: WorkerAddresses {
                control: Some("127.0.0.1:7001".into()),
                ..WorkerAddresses::default()
            },
            ..WorkerRecord::default()
        };
        let plan = |table_version: &str, plan, workers: &[&str]| CacheVersion {
            table_version: table_version.into(),
            plan,
            parts: workers
                .iter()
                .map(|worker| (worker.to_string(), PartPointer::default()))
                .collect(),
            ..CacheVersion::default()
        };
        let request = |table: &str, version| LoadRequest {
            table: table.into(),
            version,
            unloaded: false,
        };
        Overview {
            metastore: "etcd at http://node1:2379".into(),
            coordinator: Some("node1".into()),
            layouts: BTreeMap::from([
                ("tpch.lineitem".to_string(), vec![1, 2]),
                ("tpch.nation".to_string(), vec![1]),
                ("tpch.orders".to_string(), vec![1]),
            ]),
            requests: vec![request("tpch.lineitem", 2), request("tpch.orders", 1)],
            plans: vec![
                CacheVersion {
                    notes: PlanNotes {
                        left_out: LeftOut {
                            chunks: 4,
                            bytes: 5 << 20,
                            reason: Some("the workers' capacity is used up".into()),
                            ..LeftOut::default()
                        },
                        ..PlanNotes::default()
                    },
                    ..plan("tpch.lineitem:2", 3, &["a", "b"])
                },
                plan("tpch.orders:1", 1, &["a"]),
            ],
            workers: vec![worker("a", "node1"), worker("b", "node2")],
            states: vec![
                state(
                    "a",
                    WorkerPhase::Loading,
                    vec![
                        ("tpch.lineitem", table(3, 2, 12)),
                        ("tpch.orders", table(0, 1, 4)),
                    ],
                ),
                state("b", WorkerPhase::Degraded, vec![("tpch.lineitem", short)]),
            ],
            pins: BTreeSet::from(["b".to_string()]),
            rejections: vec![Rejection {
                request: "tpch.orders:0".into(),
                reason: "invalid layout version".into(),
                rejected_unix_ms: 1_796_012_800_000,
                ..Rejection::default()
            }],
            coordinating: CoordinatorState::default(),
            at_rest: None,
        }
    }

    #[test]
    fn a_cache_at_rest_is_no_problem() {
        let mut resting = overview();
        (resting.workers, resting.states, resting.coordinator) = (vec![], vec![], None);
        resting.metastore = "the embedded state in /state".into();
        resting.at_rest = Some(Memory {
            location: "/dev/shm/stoa-1000".into(),
            generation: 7,
            tables: vec![MemoryTable {
                table: "tpch.lineitem".into(),
                version: 2,
                chunks: 24,
                bytes: 24 << 20,
                ..MemoryTable::default()
            }],
        });
        assert_eq!(resting.problems(), Vec::<String>::new());
        insta::assert_snapshot!(resting.to_text(), @"
        the embedded state in /state; nothing runs, the cache lies in /dev/shm/stoa-1000

        table          published  wanted  planned  state       chunks    held
        tpch.lineitem          2       2        2  in memory       24  24 MiB
        tpch.nation            1       -        -  not loaded       0     0 B
        tpch.orders            1       1        1  waiting          0     0 B

        `stoa sql` or `stoa worker` goes on from here
        ");
    }

    /// After a reset workers keep what they hold, and nothing wants it: that is not unloading, which
    /// would end by itself. What was dropped is not shown at all.
    #[test]
    fn what_is_held_and_not_wanted_has_a_state_of_its_own() {
        let mut reset = overview();
        reset.layouts.clear();
        reset.requests.clear();
        reset.plans.clear();
        let line = |overview: &Overview, name: &str| {
            let lines = overview.tables();
            lines.into_iter().find(|line| line.table == name)
        };
        let held = line(&reset, "tpch.lineitem").unwrap();
        assert_eq!(held.state, "held, not wanted");
        assert_eq!(
            held.problems[1..],
            [
                "tpch.lineitem: held by a, b, and nothing wants it; `stoa unload tpch.lineitem` frees it"
            ]
        );
        reset.requests = vec![LoadRequest {
            table: "tpch.lineitem".into(),
            version: 1,
            unloaded: true,
        }];
        assert_eq!(line(&reset, "tpch.lineitem").unwrap().state, "unloading");
        reset.plans = vec![CacheVersion {
            table_version: "tpch.lineitem:1".into(),
            unloaded: true,
            ..CacheVersion::default()
        }];
        assert_eq!(line(&reset, "tpch.lineitem").unwrap().state, "unloading");
        reset.states.clear();
        assert!(line(&reset, "tpch.lineitem").is_none());
    }

    #[test]
    fn the_overview_reads_well() {
        insta::assert_snapshot!(overview().to_text(), @"
        etcd at http://node1:2379; coordinator node1

        table          published  wanted  planned  state       chunks    held
        tpch.lineitem          2       2        2  partial      22/24  22 MiB
        tpch.nation            1       -        -  not loaded     0/0     0 B
        tpch.orders            1       1        1  loading       4/12   4 MiB

        worker  host   state     capacity    held  retained  pinned  control         http
        a       node1  loading     64 MiB  22 MiB       0 B  no      127.0.0.1:7001  -
        b       node2  degraded    64 MiB  22 MiB       0 B  yes     127.0.0.1:7001  -

        problems:
          tpch.lineitem: worker b left out 2 chunks (2 MiB): the cache is full
          tpch.lineitem: chunks without a place in the plan: 4 (5 MiB): the workers' capacity is used up

        refused requests, newest last:
          2026-11-30T04:26:40Z  tpch.orders:0: invalid layout version
        ");
    }

    #[test]
    fn a_worker_that_verifies_says_how_much_is_to_come() {
        let mut overview = overview();
        overview.states[0].unverified_bytes = 3 << 30;
        let text = overview.to_text();
        assert!(
            text.contains("\na hashes its memory again: 3 GiB to go\n"),
            "{text}"
        );
        let json = overview.to_json();
        assert_eq!(json["workers"][0]["unverified_bytes"], 3u64 << 30);
    }

    #[test]
    fn readiness_names_what_is_missing() {
        let mut ready = overview();
        assert_eq!(
            ready.not_ready(3).as_deref(),
            Some("2 of 3 workers are alive")
        );
        assert_eq!(
            ready.not_ready(2).as_deref(),
            Some("loading or degraded: a, b")
        );
        for state in &mut ready.states {
            state.state = WorkerPhase::Ready;
        }
        assert_eq!(
            ready.not_ready(2).as_deref(),
            Some("tpch.orders is loading")
        );
        ready.plans[1].plan = 0;
        assert_eq!(ready.not_ready(2), None);
        ready.coordinator = None;
        assert_eq!(
            ready.not_ready(0).as_deref(),
            Some("no coordinator is elected")
        );
        assert!(ready.problems()[0].starts_with("no coordinator is elected"));
    }

    #[test]
    fn an_empty_overview_says_how_to_begin() {
        let text = Overview {
            metastore: "the embedded state in /state".into(),
            ..Overview::default()
        }
        .to_text();
        assert!(text.contains("`stoa layout create --help`"), "{text}");
        assert!(!text.contains("problems"), "{text}");
    }
}
