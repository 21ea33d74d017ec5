//! What can go wrong between hosts, and what the caller should do about it.

use std::path::PathBuf;

use crate::store::LeaseId;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a metastore call, or a record on top of it, failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No server answered; what was asked may or may not have happened.
    #[error("metastore unreachable at {endpoints}: {reason}; is etcd running there?")]
    Unavailable {
        /// The endpoints tried, comma-separated.
        endpoints: String,
        /// The transport's words.
        reason: String,
    },
    /// The deadline of one call passed; what was asked may or may not have happened.
    #[error(
        "metastore call `{call}` did not finish within {timeout_ms} ms at {endpoints}; is etcd running there?"
    )]
    Timeout {
        /// The operation.
        call: &'static str,
        /// The deadline.
        timeout_ms: u64,
        /// The endpoints tried, comma-separated.
        endpoints: String,
    },
    /// The server knows us but refuses, or does not know us.
    #[error(
        "metastore access denied for user {user}: {reason}; check etcd.user, etcd.password and the role's key ranges"
    )]
    Denied {
        /// The user name in use, or "(none)".
        user: String,
        /// The server's words.
        reason: String,
    },
    /// The one who listens in the state directory is not to be trusted with it.
    #[error(
        "user {found} listens on {}, expected user {expected}: choose a state.location that only you can write to",
        socket.display()
    )]
    Stranger {
        /// Where it listens.
        socket: PathBuf,
        /// Whose process it is.
        found: u32,
        /// Who this process is.
        expected: u32,
    },
    /// The server answered with an error of its own.
    #[error("metastore call `{call}` failed: {reason}")]
    Server {
        /// The operation.
        call: &'static str,
        /// The server's words.
        reason: String,
    },
    /// History before `compacted` is gone: list again, then watch from the listing's revision.
    #[error(
        "watch from revision {requested} impossible: history is compacted up to {compacted}; list again"
    )]
    Compacted {
        /// Where the watch stood, or wanted to begin.
        requested: i64,
        /// The oldest revision that can no longer be watched from.
        compacted: i64,
    },
    /// The watch ended for another reason: list again and watch anew.
    #[error("watch of `{prefix}` ended: {reason}; list again")]
    WatchEnded {
        /// What was watched.
        prefix: String,
        /// Why it ended.
        reason: String,
    },
    /// The lease expired or was revoked, or what it held belongs to somebody else now.
    #[error("lease {lease} is lost (expired, revoked or taken over); register again")]
    LeaseLost {
        /// The lease.
        lease: LeaseId,
    },
    /// A transaction or a value is larger than etcd takes.
    #[error("{what} too large: {found}, limit {limit}; split it")]
    TooLarge {
        /// What was measured, with its unit.
        what: &'static str,
        /// Its size.
        found: u64,
        /// The largest allowed.
        limit: u64,
    },
    /// A transaction that etcd would refuse whatever the state.
    #[error("invalid transaction: {reason}")]
    InvalidTxn {
        /// What is wrong with it.
        reason: String,
    },
    /// Another process owns the embedded metastore, and does not share it.
    #[error(
        "metastore {} is in use by {}, which does not share it (another version of Stoa, or a directory that holds no sockets); stop that process, or use --etcd to share a metastore",
        path.display(),
        describe_process(*holder)
    )]
    Busy {
        /// The database file.
        path: PathBuf,
        /// The process, where the system says.
        holder: Option<u32>,
    },
    /// The process that owned the embedded metastore has ended, or lets it go; what was asked may
    /// or may not have happened.
    #[error("the owner of the state has ended ({}: {reason}); try again", socket.display())]
    OwnerGone {
        /// Where it listened.
        socket: PathBuf,
        /// The transport's words.
        reason: String,
    },
    /// The process that owns the embedded metastore does not answer; what was asked may or may not
    /// have happened.
    #[error(
        "{} owns the state and did not answer within {timeout_ms} ms on {}; is it stopped?",
        describe_process(*pid),
        socket.display()
    )]
    OwnerSilent {
        /// Where it listens.
        socket: PathBuf,
        /// The process, where the system says.
        pid: Option<u32>,
        /// The deadline.
        timeout_ms: u64,
    },
    /// The process that owns the embedded metastore is of another version of Stoa.
    #[error(
        "{} owns the state; it is Stoa {version} and speaks protocol {found} on {}, this is Stoa {} with protocol {expected}: use the same version, or stop that process",
        describe_process(*pid),
        socket.display(),
        env!("CARGO_PKG_VERSION")
    )]
    OwnerVersion {
        /// Where it listens.
        socket: PathBuf,
        /// The process, where the system says.
        pid: Option<u32>,
        /// The protocol it speaks; 0 where it does not say.
        found: u32,
        /// Its version.
        version: String,
        /// The protocol spoken here.
        expected: u32,
    },
    /// The embedded metastore's file could not be read or written.
    #[error("metastore file {}: {reason}", path.display())]
    Storage {
        /// The database file or its directory.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
    /// A setting cannot work.
    #[error("setting {key}: {reason}")]
    Settings {
        /// The configuration key.
        key: &'static str,
        /// What was found and what was expected.
        reason: String,
    },
    /// A key holds something that is not what we write there.
    #[error("metastore key `{key}` is not readable: {reason}; rewrite or delete it")]
    Corrupt {
        /// The key.
        key: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// Text that should be `schema.table:version` is not.
    #[error(
        "invalid table version `{found}`: expected schema.table:version with a version of 1 or more, such as tpch.lineitem:1"
    )]
    InvalidTableVersion {
        /// The text.
        found: String,
    },
    /// A worker id or candidate name that cannot be used.
    #[error("invalid {what} `{found}`: {reason}")]
    InvalidName {
        /// What it names.
        what: &'static str,
        /// The text.
        found: String,
        /// What was expected.
        reason: &'static str,
    },
    /// Versions only increase.
    #[error("stale layout version of {table}: current is {current}, given {given}; publish the content as version {} or later", current.saturating_add(1))]
    StaleVersion {
        /// The table.
        table: String,
        /// The version the server holds.
        current: u64,
        /// The version that was refused.
        given: u64,
    },
    /// The same version exists with other content.
    #[error("layout conflict: {table}:{version} is already published with other content; publish yours as version {}", version.saturating_add(1))]
    Conflict {
        /// The table.
        table: String,
        /// The version both claim.
        version: u64,
    },
    /// A version was asked for that nobody published.
    #[error("unknown layout {table_version}: {}", describe_known(known))]
    UnknownLayout {
        /// What was asked for.
        table_version: String,
        /// The versions there are, ascending.
        known: Vec<u64>,
    },
    /// Plan numbers only increase.
    #[error("stale plan of {table}: current is {current}, given {given}")]
    StalePlan {
        /// The table.
        table: String,
        /// The plan the server holds.
        current: u64,
        /// The plan that was refused.
        given: u64,
    },
    /// This coordinator is no longer the elected one: nothing was written.
    #[error(
        "fenced: {candidate} is not the coordinator any more{}; nothing was written",
        describe_holder(holder)
    )]
    Fenced {
        /// Who tried to write.
        candidate: String,
        /// Who holds the election key now.
        holder: Option<String>,
    },
    /// A worker of the same id is alive on another host.
    #[error(
        "worker id `{id}` is taken by a live worker on {host}; give this one another worker.id"
    )]
    WorkerIdTaken {
        /// The id.
        id: String,
        /// The other worker's host.
        host: String,
    },
    /// What was read of a plan is not what its pointer names.
    #[error("plan of {table_version} for worker {worker} is damaged: {reason}")]
    DamagedPlan {
        /// The table version.
        table_version: String,
        /// The worker.
        worker: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// Others kept changing the same key; what was asked did not happen.
    #[error("gave up on `{key}` after {attempts} attempts: it kept changing; try again")]
    Contention {
        /// The contended key.
        key: String,
        /// How often it was tried.
        attempts: u32,
    },
}

/// What an error asks of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Try again later; what was asked may or may not have happened.
    Retry,
    /// List again and watch anew.
    Relist,
    /// Register or campaign again: a lease or an election was lost.
    Lost,
    /// What was asked contradicts what is there; the message says what to ask instead.
    Refused,
    /// Fix the configuration.
    Config,
    /// Something is broken: report it.
    Broken,
}

impl Error {
    /// What this error asks of the caller.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Unavailable { .. }
            | Error::Timeout { .. }
            | Error::OwnerGone { .. }
            | Error::OwnerSilent { .. }
            | Error::Contention { .. } => ErrorKind::Retry,
            Error::Compacted { .. } | Error::WatchEnded { .. } => ErrorKind::Relist,
            Error::LeaseLost { .. } | Error::Fenced { .. } => ErrorKind::Lost,
            Error::StaleVersion { .. }
            | Error::Conflict { .. }
            | Error::UnknownLayout { .. }
            | Error::StalePlan { .. }
            | Error::TooLarge { .. }
            | Error::InvalidTableVersion { .. } => ErrorKind::Refused,
            Error::Denied { .. }
            | Error::Stranger { .. }
            | Error::Settings { .. }
            | Error::Busy { .. }
            | Error::OwnerVersion { .. }
            | Error::InvalidName { .. }
            | Error::WorkerIdTaken { .. } => ErrorKind::Config,
            Error::Server { .. }
            | Error::InvalidTxn { .. }
            | Error::Storage { .. }
            | Error::Corrupt { .. }
            | Error::DamagedPlan { .. } => ErrorKind::Broken,
        }
    }
}

fn describe_process(pid: Option<u32>) -> String {
    match pid {
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    }
}

fn describe_known(known: &[u64]) -> String {
    const SHOWN: usize = 10;
    if known.is_empty() {
        return "no version of this table is published; publish one with `stoa layout create`"
            .to_owned();
    }
    let newest: Vec<String> = known
        .iter()
        .skip(known.len().saturating_sub(SHOWN))
        .map(u64::to_string)
        .collect();
    let more = if known.len() > SHOWN { "…, " } else { "" };
    format!("known versions are {more}{}", newest.join(", "))
}

fn describe_holder(holder: &Option<String>) -> String {
    match holder {
        Some(holder) => format!(", {holder} is"),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_layout_names_the_known_versions() {
        let some = Error::UnknownLayout {
            table_version: "tpch.lineitem:7".into(),
            known: vec![1, 2, 5],
        };
        assert_eq!(
            some.to_string(),
            "unknown layout tpch.lineitem:7: known versions are 1, 2, 5"
        );
        let none = Error::UnknownLayout {
            table_version: "a.b:1".into(),
            known: vec![],
        };
        assert_eq!(
            none.to_string(),
            "unknown layout a.b:1: no version of this table is published; publish one with `stoa layout create`"
        );
        let many = Error::UnknownLayout {
            table_version: "a.b:99".into(),
            known: (1..=12).collect(),
        };
        assert_eq!(
            many.to_string(),
            "unknown layout a.b:99: known versions are …, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12"
        );
    }

    #[test]
    fn stale_and_conflict_say_what_to_do() {
        let stale = Error::StaleVersion {
            table: "tpch.orders".into(),
            current: 7,
            given: 7,
        };
        assert_eq!(
            stale.to_string(),
            "stale layout version of tpch.orders: current is 7, given 7; publish the content as version 8 or later"
        );
        let conflict = Error::Conflict {
            table: "tpch.orders".into(),
            version: 7,
        };
        assert_eq!(
            conflict.to_string(),
            "layout conflict: tpch.orders:7 is already published with other content; publish yours as version 8"
        );
        assert_eq!(stale.kind(), ErrorKind::Refused);
    }
}
