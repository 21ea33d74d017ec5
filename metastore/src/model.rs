//! The values behind the keys: JSON, tolerant of fields it does not know.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Splits `tpch.lineitem:1` at its last colon into table and version. The version is at least 1.
pub fn split_table_version(text: &str) -> Result<(&str, u64)> {
    let invalid = || Error::InvalidTableVersion {
        found: text.to_owned(),
    };
    let (table, digits) = text.rsplit_once(':').ok_or_else(invalid)?;
    // Digits only: `u64::from_str` would take a sign as well, and one number must have one text.
    let plain = !digits.is_empty()
        && digits.bytes().all(|b| b.is_ascii_digit())
        && !digits.starts_with('0');
    if table.is_empty() || !plain {
        return Err(invalid());
    }
    Ok((table, digits.parse().map_err(|_| invalid())?))
}

/// Writes what [`split_table_version`] reads.
pub fn table_version(table: &str, version: u64) -> String {
    format!("{table}:{version}")
}

/// What somebody wants of a table: the value of `layout_version/{table}`.
///
/// As text: `tpch.lineitem:3` to have version 3 loaded, `tpch.lineitem:3 unloaded` to have the
/// table dropped from memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadRequest {
    /// The table.
    pub table: String,
    /// The newest version that was asked for.
    pub version: u64,
    /// Whether the table should be dropped instead.
    pub unloaded: bool,
}

const UNLOADED_SUFFIX: &str = " unloaded";

impl LoadRequest {
    /// Table and version as one text.
    pub fn table_version(&self) -> String {
        table_version(&self.table, self.version)
    }
}

impl fmt::Display for LoadRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = if self.unloaded { UNLOADED_SUFFIX } else { "" };
        write!(f, "{}:{}{suffix}", self.table, self.version)
    }
}

impl FromStr for LoadRequest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim_end_matches(['\n', '\r']);
        let (rest, unloaded) = match text.strip_suffix(UNLOADED_SUFFIX) {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let (table, version) = split_table_version(rest)?;
        Ok(LoadRequest {
            table: table.to_owned(),
            version,
            unloaded,
        })
    }
}

/// Where a worker can be reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerAddresses {
    /// The gRPC control service, `host:port`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<String>,
    /// Metrics and health over HTTP, `host:port`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// The memory itself, for reads of other hosts: `host:port` of each way, the preferred one
    /// first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub transfer: Vec<String>,
}

/// That a worker lives: the value of `worker/{id}`, under the worker's lease.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerRecord {
    /// Names the worker across restarts; any characters, not empty.
    pub id: String,
    /// The host it runs on.
    pub host: String,
    /// Where it can be reached.
    pub addresses: WorkerAddresses,
    /// How much it may hold.
    pub capacity_bytes: u64,
    /// The forms it can produce, such as `arrow` and `parquet`.
    pub formats: Vec<String>,
    /// When this process started.
    pub started_unix_ms: u64,
    /// Drawn at each start: tells a restarted worker from the one before.
    pub incarnation: String,
    /// Drawn with the cache directory, 16 hexadecimal digits: part of the name under which others
    /// read its segments. Empty where they cannot.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cache_incarnation: String,
    /// The directory of its shared memory: processes that share an embedded state must fill one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cache_dir: String,
}

impl WorkerRecord {
    /// The addresses of its memory that lead to it from `host`: on another host a loopback address
    /// leads elsewhere.
    pub fn transfer_from(&self, host: &str) -> Vec<&str> {
        let leads = |address: &&str| self.host == host || !is_loopback(address);
        let addresses = self.addresses.transfer.iter().map(String::as_str);
        addresses.filter(leads).collect()
    }
}

fn is_loopback(address: &str) -> bool {
    match address.parse::<std::net::SocketAddr>() {
        Ok(address) => address.ip().to_canonical().is_loopback(),
        Err(_) => address.starts_with("localhost:"),
    }
}

/// What a worker is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerPhase {
    /// Nothing to hold.
    #[default]
    Idle,
    /// Fetching towards a newer plan; what was published before is still served.
    Loading,
    /// Everything that its plans name is published.
    Ready,
    /// Serving, but not all that its plans name; `problems` says why.
    Degraded,
}

impl fmt::Display for WorkerPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WorkerPhase::Idle => "idle",
            WorkerPhase::Loading => "loading",
            WorkerPhase::Ready => "ready",
            WorkerPhase::Degraded => "degraded",
        })
    }
}

/// A plan and the layout version it belongs to.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct PlanTarget {
    /// The plan's number within its table.
    pub plan: u64,
    /// The layout version it places.
    pub version: u64,
}

/// What has no place, or could not be had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LeftOut {
    /// How many chunks.
    pub chunks: u64,
    /// Their bytes, as planned.
    pub bytes: u64,
    /// The same by what the others of their columns turned out to take; 0 where nobody knows.
    #[serde(skip_serializing_if = "is_no_bytes")]
    pub expected_bytes: u64,
    /// How many of them had no room; the others could not be had.
    #[serde(skip_serializing_if = "is_no_bytes")]
    pub no_room: u64,
    /// Why, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl LeftOut {
    /// Whether everything has its place.
    pub fn is_nothing(&self) -> bool {
        self.chunks == 0
    }

    /// What they would take, as well as it is known.
    pub fn likely_bytes(&self) -> u64 {
        match self.expected_bytes {
            0 => self.bytes,
            expected => expected,
        }
    }
}

/// How far a worker is with one table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TableState {
    /// What it is working towards.
    pub target: Option<PlanTarget>,
    /// What is carried out: published, all but what is left out and not tried again before there is
    /// more room or another plan.
    pub current: Option<PlanTarget>,
    /// Chunks of the target that are published.
    pub chunks_done: u64,
    /// Chunks of the target.
    pub chunks_total: u64,
    /// Bytes of the target that are published.
    pub bytes_done: u64,
    /// Bytes of the target, as planned until they are known.
    pub bytes_total: u64,
    /// Bytes that this table holds in shared memory.
    pub held_bytes: u64,
    /// Chunks of the target that were there already.
    pub kept_chunks: u64,
    /// Chunks of the target that were fetched, from wherever.
    pub fetched_chunks: u64,
    /// Those of them that another worker had.
    pub peer_chunks: u64,
    /// Bytes of these.
    pub peer_bytes: u64,
    /// What did not fit or could not be had.
    pub left_out: LeftOut,
    /// Names the files that the worker saw at its last look; empty before the first. Another name
    /// than that of the files a plan was made for is a reason to make it anew.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub files: String,
    /// The last error with this table, if it stands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What a worker reports: the value of `worker_state/{id}`, under the worker's lease.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerState {
    /// The worker.
    pub id: String,
    /// What it is doing.
    pub state: WorkerPhase,
    /// How far it is, by table.
    pub tables: BTreeMap<String, TableState>,
    /// Bytes of published chunks.
    pub held_bytes: u64,
    /// Bytes that readers keep of what is no longer published.
    pub retained_bytes: u64,
    /// How much it may hold.
    pub capacity_bytes: u64,
    /// What an operator should know, newest last.
    pub problems: Vec<String>,
    /// Bytes that the hashing of what is published, which is under way, has still to go through.
    #[serde(skip_serializing_if = "is_no_bytes")]
    pub unverified_bytes: u64,
}

/// Names the parts of one worker's plan and fixes their content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartPointer {
    /// How many parts.
    pub parts: u32,
    /// xxh3-64 of the parts, each preceded by its length, as 16 hexadecimal digits.
    pub digest: String,
}

/// The plan in force: the value of `cache_version/{table}`. It is written after its parts.
///
/// A worker follows the highest `plan`; a missing key never means "drop", only `unloaded` does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheVersion {
    /// Table and version, such as `tpch.lineitem:1`.
    pub table_version: String,
    /// The plan's number: grows with every plan of the table, across versions.
    pub plan: u64,
    /// Where each worker's part is, by worker id.
    #[serde(default)]
    pub parts: BTreeMap<String, PartPointer>,
    /// Whether the table is to be dropped from memory.
    #[serde(default)]
    pub unloaded: bool,
    /// What else is worth knowing of it.
    #[serde(flatten)]
    pub notes: PlanNotes,
}

/// What the coordinator says of a plan beside the plan.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PlanNotes {
    /// On how many workers its chunks lie at most, where that is more than one: then other workers'
    /// parts name the same chunks.
    #[serde(skip_serializing_if = "is_zero")]
    pub replicas: u32,
    /// What has no place on any worker.
    #[serde(skip_serializing_if = "LeftOut::is_nothing")]
    pub left_out: LeftOut,
    /// Copies that have no place, of chunks that have one.
    #[serde(skip_serializing_if = "LeftOut::is_nothing")]
    pub missing_copies: LeftOut,
}

impl PlanNotes {
    /// What the plan could not place, a sentence each; `format` writes a number of bytes.
    pub fn shortfalls(&self, format: impl Fn(u64) -> String) -> Vec<String> {
        let say = |what: &str, left_out: &LeftOut| {
            let reason = left_out.reason.as_deref().unwrap_or("no reason given");
            let (chunks, bytes) = (left_out.chunks, format(left_out.bytes));
            (!left_out.is_nothing()).then(|| format!("{what} {chunks} ({bytes}): {reason}"))
        };
        let said = [
            say("chunks without a place in the plan:", &self.left_out),
            say("further copies without a place:", &self.missing_copies),
        ];
        said.into_iter().flatten().collect()
    }
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn is_no_bytes(bytes: &u64) -> bool {
    *bytes == 0
}

impl CacheVersion {
    /// The table's name.
    pub fn table(&self) -> Result<&str> {
        Ok(split_table_version(&self.table_version)?.0)
    }

    /// The layout version.
    pub fn version(&self) -> Result<u64> {
        Ok(split_table_version(&self.table_version)?.1)
    }

    /// Plan and version as workers report them.
    pub fn target(&self) -> Result<PlanTarget> {
        Ok(PlanTarget {
            plan: self.plan,
            version: self.version()?,
        })
    }
}

/// What keeps the coordinator from planning tables that are wanted: the value of
/// `coordinator_state`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CoordinatorState {
    /// By table.
    pub unplanned: BTreeMap<String, Unplanned>,
}

/// A version that is wanted and not planned.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Unplanned {
    /// The version.
    pub version: u64,
    /// Why it is not, in words.
    pub reason: String,
}

/// A request that the coordinator refused: the value of `rejection/{revision}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rejection {
    /// What was asked for, as it was written.
    pub request: String,
    /// Why it was refused.
    pub reason: String,
    /// The revision of the request.
    pub revision: i64,
    /// When it was refused.
    pub rejected_unix_ms: u64,
}

/// That a worker's memory is to be locked: the value of `pin/{worker}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PinRecord {
    /// The worker.
    pub worker: String,
    /// When it was asked for.
    pub since_unix_ms: u64,
}

/// Who coordinates: the value of `election/coordinator`, under the candidate's lease.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ElectionRecord {
    /// The elected candidate.
    pub candidate: String,
}

/// The next plan number of a table: above the plan in force and above all that workers know of,
/// so that plans grow even when the metastore was reset or restored under running workers.
pub fn next_plan(table: &str, current: Option<&CacheVersion>, states: &[WorkerState]) -> u64 {
    let in_force = current.map_or(0, |c| c.plan);
    let known = states
        .iter()
        .filter_map(|s| s.tables.get(table))
        .flat_map(|t| [t.target, t.current])
        .flatten()
        .map(|t| t.plan);
    known.fold(in_force, u64::max).saturating_add(1)
}

/// Whether all live workers have taken notice of the plan in force, so that older ones may go.
pub fn all_reported(
    current: &CacheVersion,
    workers: &[WorkerRecord],
    states: &[WorkerState],
) -> bool {
    let Ok(table) = current.table() else {
        return false;
    };
    workers.iter().all(|worker| {
        // A worker without a part need not ever have heard of the table.
        if !current.parts.contains_key(&worker.id) {
            return true;
        }
        states
            .iter()
            .find(|s| s.id == worker.id)
            .and_then(|s| s.tables.get(table))
            .is_some_and(|t| {
                [t.target, t.current]
                    .into_iter()
                    .flatten()
                    .any(|t| t.plan >= current.plan)
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_address_leads_nowhere_from_another_host() {
        let worker = WorkerRecord {
            host: "h1".into(),
            addresses: WorkerAddresses {
                transfer: [
                    "127.0.0.1:1",
                    "[::1]:2",
                    "[::ffff:127.0.0.1]:3",
                    "localhost:4",
                    "10.0.0.1:5",
                    "h1.local:6",
                ]
                .map(str::to_owned)
                .to_vec(),
                ..WorkerAddresses::default()
            },
            ..WorkerRecord::default()
        };
        assert_eq!(worker.transfer_from("h1").len(), 6);
        assert_eq!(worker.transfer_from("h2"), ["10.0.0.1:5", "h1.local:6"]);
    }

    #[test]
    fn table_versions_split_at_the_last_colon() {
        assert_eq!(
            split_table_version("tpch.lineitem:1").unwrap(),
            ("tpch.lineitem", 1)
        );
        assert_eq!(split_table_version("a:b.c:10").unwrap(), ("a:b.c", 10));
        for bad in [
            "",
            "tpch.lineitem",
            "tpch.lineitem:",
            ":1",
            "t:0",
            "t:-1",
            "t:+1",
            "t:01",
            "t:1 ",
            "t:99999999999999999999",
        ] {
            let error = split_table_version(bad).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("invalid table version `{bad}`")),
                "{error}"
            );
        }
    }

    #[test]
    fn load_requests_read_back() {
        for unloaded in [false, true] {
            let request = LoadRequest {
                table: "odd unloaded.x y:z".into(),
                version: 12,
                unloaded,
            };
            assert_eq!(request.to_string().parse::<LoadRequest>().unwrap(), request);
        }
        // What `echo … | etcdctl put layout_version` leaves at the end is forgiven.
        assert_eq!("tpch.orders:2\n".parse::<LoadRequest>().unwrap().version, 2);
    }

    #[test]
    fn plan_numbers_grow_past_what_workers_know() {
        let states = [WorkerState {
            id: "w".into(),
            tables: [(
                "s.t".to_owned(),
                TableState {
                    target: Some(PlanTarget {
                        plan: 41,
                        version: 3,
                    }),
                    ..Default::default()
                },
            )]
            .into(),
            ..Default::default()
        }];
        assert_eq!(next_plan("s.t", None, &[]), 1);
        assert_eq!(next_plan("s.t", None, &states), 42);
        assert_eq!(next_plan("other", None, &states), 1);
        let current = CacheVersion {
            table_version: "s.t:3".into(),
            plan: 50,
            ..Default::default()
        };
        assert_eq!(next_plan("s.t", Some(&current), &states), 51);
    }

    #[test]
    fn old_plans_wait_for_every_live_worker_with_a_part() {
        let current = CacheVersion {
            table_version: "s.t:3".into(),
            plan: 5,
            parts: [
                ("w1".to_owned(), PartPointer::default()),
                ("dead".to_owned(), PartPointer::default()),
            ]
            .into(),
            ..Default::default()
        };
        let worker = |id: &str| WorkerRecord {
            id: id.into(),
            ..Default::default()
        };
        let state = |id: &str, plan| WorkerState {
            id: id.into(),
            tables: [(
                "s.t".to_owned(),
                TableState {
                    target: Some(PlanTarget { plan, version: 3 }),
                    ..Default::default()
                },
            )]
            .into(),
            ..Default::default()
        };
        let live = [worker("w1"), worker("bystander")];
        assert!(!all_reported(&current, &live, &[]));
        assert!(!all_reported(&current, &live, &[state("w1", 4)]));
        assert!(all_reported(&current, &live, &[state("w1", 5)]));
    }

    #[test]
    fn unknown_and_missing_fields_are_no_error() {
        let state: WorkerState =
            serde_json::from_str(r#"{"id":"w","state":"ready","from_the_future":1}"#).unwrap();
        assert_eq!(state.state, WorkerPhase::Ready);
        assert!(state.tables.is_empty());
    }
}
