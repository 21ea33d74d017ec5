//! What decisions are made of, and what they say.

use std::collections::BTreeMap;

use stoa_metastore::{CacheVersion, LoadRequest, WorkerRecord, WorkerState};

use crate::plan::PlanWorker;

/// The times that decisions depend on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecideSettings {
    /// How long a worker that is gone keeps its share.
    pub grace_ms: u64,
    /// How long to wait after a worker joined.
    pub settle_ms: u64,
    /// The part of each capacity that plans leave free.
    pub reserve_ratio: f64,
}

/// A load request as it stands in the metastore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requested {
    /// What is wanted.
    pub request: LoadRequest,
    /// When it was written.
    pub revision: i64,
}

/// Something in the place of a request that is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// What stands there.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
    /// When it was written.
    pub revision: i64,
}

/// What is seen in the metastore.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// What is wanted, by table.
    pub requests: BTreeMap<String, Requested>,
    /// What stands in place of requests and is none.
    pub unreadable: Vec<Unreadable>,
    /// The plans in force, by table.
    pub in_force: BTreeMap<String, CacheVersion>,
    /// The live workers, by id.
    pub workers: BTreeMap<String, WorkerRecord>,
    /// What they report, by id.
    pub states: BTreeMap<String, WorkerState>,
    /// Why the metastore is not to be believed: nothing is planned while it stands.
    pub frozen: Option<String>,
}

/// Why a table is planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// A version was asked for that is not in force.
    NewVersion,
    /// A worker is gone for longer than its grace.
    WorkerGone(String),
    /// A worker joined, or came back.
    WorkerJoined(String),
    /// A worker has another capacity.
    CapacityChanged(String),
    /// A worker looked and saw other files than the plan was made for.
    FilesChanged(String),
    /// A worker knows a later plan than the one in force: the metastore was restored.
    Overtaken(String),
    /// Workers reported actual sizes that make another plan better.
    SizesCorrected,
    /// Room became free for what was left out.
    RoomFreed,
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Why::NewVersion => write!(f, "new version"),
            Why::WorkerGone(worker) => write!(f, "worker {worker} is gone"),
            Why::WorkerJoined(worker) => write!(f, "worker {worker} joined"),
            Why::CapacityChanged(worker) => write!(f, "capacity of worker {worker} changed"),
            Why::FilesChanged(worker) => write!(f, "worker {worker} sees other files"),
            Why::Overtaken(worker) => write!(f, "worker {worker} knows a later plan"),
            Why::SizesCorrected => write!(f, "workers reported actual sizes"),
            Why::RoomFreed => write!(f, "room became free"),
        }
    }
}

/// Something to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Read the footers of a version's files, in the background.
    LoadCatalog {
        /// The table.
        table: String,
        /// The version.
        version: u64,
    },
    /// Find out what the plan in force, written by an earlier coordinator, gives each worker.
    Adopt {
        /// The table.
        table: String,
    },
    /// Make a plan and put it in force.
    WritePlan {
        /// The table.
        table: String,
        /// The version.
        version: u64,
        /// Why now.
        why: Why,
        /// Who can take how much of it.
        workers: Vec<PlanWorker>,
        /// Actual bytes over estimated bytes.
        correction: f64,
    },
    /// Put "drop this table" in force.
    WriteUnloaded {
        /// The table.
        table: String,
        /// The version, which is the one in force or later.
        version: u64,
    },
    /// Remove plans that nobody needs any more.
    Prune {
        /// The table.
        table: String,
    },
    /// Record that a request was refused.
    Reject {
        /// The request as it was written.
        request: String,
        /// Why.
        reason: String,
        /// When it was written.
        revision: i64,
    },
}

/// What to do now, and when to ask again at the latest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// At most one of them writes a plan: the next one depends on it.
    pub actions: Vec<Action>,
    /// On the monotonic clock.
    pub wake_ms: Option<u64>,
    /// What tables wait for, in words, by table.
    pub waiting: BTreeMap<String, String>,
}

impl Decision {
    pub(crate) fn wake(&mut self, at_ms: u64) {
        self.wake_ms = Some(self.wake_ms.map_or(at_ms, |wake| wake.min(at_ms)));
    }
}
