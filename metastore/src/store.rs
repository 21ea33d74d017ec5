//! The small contract that every backend keeps: keys with revisions, transactions, leases, watches.
//!
//! The words are etcd's. Every change of the store gets the next **revision**, a number that only
//! grows; a transaction that changes several keys changes them at one revision. A key remembers
//! the revision that created it and the one that last changed it.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The most conditions, and the most operations, in one transaction (etcd's default limit).
pub const TXN_OPS_MAX: usize = 128;
/// The most bytes of keys and values in one transaction; etcd's own limit is 1.5 MiB a request.
pub const TXN_BYTES_MAX: usize = 1 << 20;
/// What one operation costs beside its key and value, generously, on etcd's wire.
const OP_OVERHEAD_BYTES: usize = 64;

/// A lease: keys put under it vanish when it is not kept alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// One key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// The revision that created the key (since it was last absent).
    pub create_revision: i64,
    /// The revision that last put the key.
    pub mod_revision: i64,
    /// The lease the key lives under, if any.
    pub lease: Option<LeaseId>,
}

/// Everything under a prefix at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// The entries, sorted by key.
    pub entries: Vec<Entry>,
    /// The revision at which this was the state: watch from `revision + 1`.
    pub revision: i64,
}

/// What must hold for a transaction to happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The key does not exist.
    Absent(String),
    /// The key exists.
    Exists(String),
    /// The key exists and was created at this revision.
    CreateRevision(String, i64),
    /// The key exists and was last put at this revision.
    ModRevision(String, i64),
}

impl Condition {
    /// The key it speaks of.
    pub fn key(&self) -> &str {
        match self {
            Condition::Absent(key)
            | Condition::Exists(key)
            | Condition::CreateRevision(key, _)
            | Condition::ModRevision(key, _) => key,
        }
    }
}

/// One change within a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Sets the key; under a lease it vanishes with the lease, without one an older lease lets go.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
        /// The lease to live under.
        lease: Option<LeaseId>,
    },
    /// Removes the key, if it is there.
    Delete {
        /// The key.
        key: String,
    },
}

impl Op {
    /// A put without a lease.
    pub fn put(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Op {
        Op::Put {
            key: key.into(),
            value: value.into(),
            lease: None,
        }
    }

    /// A put under a lease.
    pub fn put_leased(key: impl Into<String>, value: impl Into<Vec<u8>>, lease: LeaseId) -> Op {
        Op::Put {
            key: key.into(),
            value: value.into(),
            lease: Some(lease),
        }
    }

    /// A removal.
    pub fn delete(key: impl Into<String>) -> Op {
        Op::Delete { key: key.into() }
    }

    /// The key it changes.
    pub fn key(&self) -> &str {
        match self {
            Op::Put { key, .. } | Op::Delete { key } => key,
        }
    }

    /// What it weighs in a request, in bytes.
    pub fn weight(&self) -> usize {
        let value = match self {
            Op::Put { value, .. } => value.len(),
            Op::Delete { .. } => 0,
        };
        self.key().len() + value + OP_OVERHEAD_BYTES
    }
}

/// If all of `when` holds, all of `then` happens at one revision; else nothing happens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// What must hold.
    pub when: Vec<Condition>,
    /// What then happens. No key twice.
    pub then: Vec<Op>,
}

impl Txn {
    /// Checks what etcd would refuse: too many operations, too many bytes, one key twice, empty keys.
    pub fn check(&self) -> Result<()> {
        let too_large = |what, found: usize, limit: usize| {
            Err(Error::TooLarge {
                what,
                found: found as u64,
                limit: limit as u64,
            })
        };
        if self.when.len() > TXN_OPS_MAX {
            return too_large("conditions of a transaction", self.when.len(), TXN_OPS_MAX);
        }
        if self.then.len() > TXN_OPS_MAX {
            return too_large("operations of a transaction", self.then.len(), TXN_OPS_MAX);
        }
        let conditions: usize = self
            .when
            .iter()
            .map(|c| c.key().len() + OP_OVERHEAD_BYTES)
            .sum();
        let bytes = conditions + self.then.iter().map(Op::weight).sum::<usize>();
        if bytes > TXN_BYTES_MAX {
            return too_large("bytes of a transaction", bytes, TXN_BYTES_MAX);
        }
        let mut seen = BTreeSet::new();
        for op in &self.then {
            if op.key().is_empty() {
                return Err(Error::InvalidTxn {
                    reason: "a key is empty".to_owned(),
                });
            }
            if !seen.insert(op.key()) {
                return Err(Error::InvalidTxn {
                    reason: format!("key `{}` is changed twice", op.key()),
                });
            }
        }
        Ok(())
    }
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxnOutcome {
    /// Whether the conditions held and the operations happened.
    pub committed: bool,
    /// The store's revision afterwards; when committed with a change, the revision of that change.
    pub revision: i64,
}

/// What a watch sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// A key was put.
    Put(Entry),
    /// A key was removed, or its lease ended.
    Delete {
        /// The key.
        key: String,
        /// When.
        revision: i64,
    },
    /// Nothing new: everything up to here was delivered.
    Progress {
        /// Up to here.
        revision: i64,
    },
}

impl WatchEvent {
    /// The revision it happened at.
    pub fn revision(&self) -> i64 {
        match self {
            WatchEvent::Put(entry) => entry.mod_revision,
            WatchEvent::Delete { revision, .. } | WatchEvent::Progress { revision } => *revision,
        }
    }
}

/// Events in the order of their revisions. An error is the last item.
pub type WatchStream = BoxStream<'static, Result<WatchEvent>>;

/// Which store answered, and how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterIdentity {
    /// Drawn when the store was created.
    pub cluster_id: u64,
    /// Its revision now.
    pub revision: i64,
}

/// A store of keys that hosts agree on. Backends: [`crate::EtcdMetastore`],
/// [`crate::EmbeddedMetastore`], and [`crate::SharedMetastore`] over that one; all pass [`crate::conformance`].
///
/// Keys are UTF-8 and not empty. Reads see every transaction that committed before they began.
/// When [`Metastore::txn`] fails with [`crate::ErrorKind::Retry`], it may have happened: callers
/// make their transactions recognisable, so that trying again is safe.
#[async_trait]
pub trait Metastore: Send + Sync + fmt::Debug + 'static {
    /// The entry of a key.
    async fn get(&self, key: &str) -> Result<Option<Entry>>;

    /// All entries whose key starts with `prefix`, at one revision. An empty prefix lists everything.
    async fn list(&self, prefix: &str) -> Result<Listing>;

    /// Like [`Metastore::list`], but the values may be left empty: cheaper over a network.
    async fn list_keys(&self, prefix: &str) -> Result<Listing> {
        self.list(prefix).await
    }

    /// All conditions hold → all operations, atomically; else nothing.
    ///
    /// Fails with [`Error::TooLarge`] beyond [`TXN_OPS_MAX`] or [`TXN_BYTES_MAX`], with
    /// [`Error::LeaseLost`] when a put names a lease that is gone.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome>;

    /// What happens to keys starting with `prefix`, from `from_revision` (inclusive, at least 1) on.
    ///
    /// The stream ends with [`Error::Compacted`] when that history is gone, or when the reader is
    /// so slow that it went meanwhile, and with [`Error::WatchEnded`] when the connection does.
    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<WatchStream>;

    /// A new lease; it ends `ttl` after the last [`Metastore::keep_alive`]. Backends may round up.
    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId>;

    /// Starts the lease's time anew. [`Error::LeaseLost`] when it is gone.
    async fn keep_alive(&self, lease: LeaseId) -> Result<()>;

    /// Ends the lease now and removes its keys. Ending one that is gone is fine.
    async fn revoke_lease(&self, lease: LeaseId) -> Result<()>;

    /// Which store this is, and how far.
    async fn identity(&self) -> Result<ClusterIdentity>;

    /// Counts how often another process came to keep the store behind this handle: with each time
    /// every lease granted before is gone, and its holders need not wait to be told. `None` where
    /// that does not happen.
    fn changes(&self) -> Option<tokio::sync::watch::Receiver<u64>> {
        None
    }
}

/// How long a state is frozen by default: everybody has to converge within a minute.
pub(crate) const FROZEN_MAX: Duration = Duration::from_secs(30);

/// How a store looks compared to what was seen of it before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Continuity {
    /// The same store, as far or farther.
    Continuous,
    /// Another store answers: plans must not be believed, what is cached stays.
    OtherCluster {
        /// The cluster id seen before.
        expected: u64,
        /// The cluster id that answered.
        found: u64,
    },
    /// The same store lost revisions (restored from a backup): plans must not be believed.
    WentBack {
        /// The highest revision seen before.
        expected_at_least: i64,
        /// The revision that answered.
        found: i64,
    },
}

impl fmt::Display for Continuity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frozen = FROZEN_MAX.as_secs();
        match self {
            Continuity::Continuous => write!(f, "the metastore is the one seen before"),
            Continuity::OtherCluster { expected, found } => write!(
                f,
                "another metastore answers: cluster id {found:x}, expected {expected:x}; plans are frozen for {frozen} s and then follow it, serving goes on"
            ),
            Continuity::WentBack {
                expected_at_least,
                found,
            } => write!(
                f,
                "the metastore went back to revision {found} after {expected_at_least} (restored from a backup?); plans are frozen for {frozen} s and then follow it, serving goes on"
            ),
        }
    }
}

/// Compares what is seen of a store with the farthest that was seen of it before.
pub fn continuity(before: &ClusterIdentity, now: &ClusterIdentity) -> Continuity {
    if before.cluster_id != now.cluster_id {
        Continuity::OtherCluster {
            expected: before.cluster_id,
            found: now.cluster_id,
        }
    } else if now.revision < before.revision {
        Continuity::WentBack {
            expected_at_least: before.revision,
            found: now.revision,
        }
    } else {
        Continuity::Continuous
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_or_other_store_is_noticed() {
        let before = ClusterIdentity {
            cluster_id: 7,
            revision: 100,
        };
        let now = |cluster_id, revision| {
            continuity(
                &before,
                &ClusterIdentity {
                    cluster_id,
                    revision,
                },
            )
        };
        assert_eq!(now(7, 100), Continuity::Continuous);
        assert_eq!(now(7, 101), Continuity::Continuous);
        assert_eq!(
            now(7, 99),
            Continuity::WentBack {
                expected_at_least: 100,
                found: 99
            }
        );
        assert_eq!(
            now(8, 500),
            Continuity::OtherCluster {
                expected: 7,
                found: 8
            }
        );
        // Another store is another store even if it is behind as well.
        assert_eq!(
            now(8, 1),
            Continuity::OtherCluster {
                expected: 7,
                found: 8
            }
        );
    }

    #[test]
    fn what_etcd_would_refuse_is_refused_here() {
        let many: Vec<Op> = (0..=TXN_OPS_MAX)
            .map(|i| Op::put(format!("k{i}"), "v"))
            .collect();
        let txn = Txn {
            when: vec![],
            then: many,
        };
        assert_eq!(
            txn.check().unwrap_err().to_string(),
            "operations of a transaction too large: 129, limit 128; split it"
        );
        let txn = Txn {
            when: vec![],
            then: vec![Op::put("k", vec![0u8; TXN_BYTES_MAX])],
        };
        assert!(matches!(
            txn.check(),
            Err(Error::TooLarge {
                what: "bytes of a transaction",
                ..
            })
        ));
        let txn = Txn {
            when: vec![],
            then: vec![Op::put("k", "1"), Op::delete("k")],
        };
        assert_eq!(
            txn.check().unwrap_err().to_string(),
            "invalid transaction: key `k` is changed twice"
        );
        let txn = Txn {
            when: vec![],
            then: vec![Op::put("", "1")],
        };
        assert!(matches!(txn.check(), Err(Error::InvalidTxn { .. })));
    }
}
