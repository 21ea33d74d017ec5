//! What is written where, over any [`Metastore`]: layouts, load requests, workers, the election,
//! plans. `docs/metastore.md` lists every key with its writer and condition.

mod election;
mod follow;
mod inbox;
mod layouts;
mod plans;
mod workers;

use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::warn;

pub use election::Leadership;
pub use follow::{Follow, FollowHealth, FollowOptions, OnDiscontinuity};
pub use inbox::{InboxEntry, InboxStream, REJECTIONS_MAX};
pub use layouts::{LayoutsDropped, Leaving, MADE_BY_SQL};
pub use workers::Registration;

use crate::error::{Error, Result};
use crate::store::{ClusterIdentity, Condition, Entry, Metastore, Op, TXN_BYTES_MAX, Txn};

/// How often a transaction is tried anew after somebody else changed what it compares.
const ATTEMPTS_MAX: u32 = 64;
/// Operations in one batch; leaves room for the fence and what else is compared.
const BATCH_OPS_MAX: usize = 100;

/// The records that hosts agree on. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Records {
    store: Arc<dyn Metastore>,
}

impl Records {
    /// Records in this store.
    pub fn new(store: Arc<dyn Metastore>) -> Self {
        Records { store }
    }

    /// The store below.
    pub fn store(&self) -> &Arc<dyn Metastore> {
        &self.store
    }

    /// Which store this is, and how far; compare with [`crate::continuity`].
    pub async fn identity(&self) -> Result<ClusterIdentity> {
        self.store.identity().await
    }

    /// Deletes everything under these prefixes (such as [`crate::keys::PLAN_PREFIXES`]) and says
    /// how many keys that were. An operator's act: no fence, not atomic as a whole.
    pub async fn reset(&self, prefixes: &[&str]) -> Result<u64> {
        let mut deleted = 0;
        for prefix in prefixes.iter().filter(|prefix| !prefix.is_empty()) {
            let listing = self.store.list_keys(prefix).await?;
            for batch in listing.entries.chunks(BATCH_OPS_MAX) {
                let then = batch.iter().map(|entry| Op::delete(&entry.key)).collect();
                self.store
                    .txn(Txn {
                        when: Vec::new(),
                        then,
                    })
                    .await?;
                deleted += batch.len() as u64;
            }
        }
        Ok(deleted)
    }

    /// A transaction that happens only while `leadership` holds. `None`: it holds, but one of the
    /// other conditions does not. [`Error::Fenced`]: it holds no longer.
    async fn fenced(
        &self,
        leadership: &Leadership,
        mut when: Vec<Condition>,
        then: Vec<Op>,
    ) -> Result<Option<i64>> {
        when.push(leadership.fence());
        let outcome = self.store.txn(Txn { when, then }).await?;
        if outcome.committed {
            return Ok(Some(outcome.revision));
        }
        leadership.check(&self.store).await?;
        Ok(None)
    }

    /// Fenced operations without further conditions, in as few transactions as the limits allow.
    async fn fenced_batches(&self, leadership: &Leadership, ops: Vec<Op>) -> Result<()> {
        for then in batches(ops) {
            if self.fenced(leadership, Vec::new(), then).await?.is_none() {
                // The only condition was the fence, and a moment later it held: it was held by us
                // all along, so something broke the rules.
                return Err(Error::InvalidTxn {
                    reason: "a fence that holds was refused".to_owned(),
                });
            }
        }
        Ok(())
    }
}

/// Cuts operations into transactions within the limits, keeping their order.
fn batches(ops: Vec<Op>) -> Vec<Vec<Op>> {
    // Room for the fence and the transaction's own frame.
    const BYTES: usize = TXN_BYTES_MAX - 4096;
    let mut batches: Vec<Vec<Op>> = Vec::new();
    let mut bytes = 0;
    for op in ops {
        let weight = op.weight();
        match batches.last_mut() {
            Some(last) if last.len() < BATCH_OPS_MAX && bytes + weight <= BYTES => {
                bytes += weight;
                last.push(op);
            }
            _ => {
                bytes = weight;
                batches.push(vec![op]);
            }
        }
    }
    batches
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    // Our own types with string keys: serialising them cannot fail.
    serde_json::to_vec(value).expect("records serialise to JSON")
}

fn decode<T: DeserializeOwned>(entry: &Entry) -> Result<T> {
    serde_json::from_slice(&entry.value).map_err(|error| Error::Corrupt {
        key: entry.key.clone(),
        reason: error.to_string(),
    })
}

fn text(entry: &Entry) -> Result<&str> {
    std::str::from_utf8(&entry.value).map_err(|error| Error::Corrupt {
        key: entry.key.clone(),
        reason: error.to_string(),
    })
}

/// Reads what can be read: one broken value must not hide all others.
pub(crate) fn decode_all<T: DeserializeOwned>(entries: &[Entry]) -> Vec<T> {
    let mut values = Vec::with_capacity(entries.len());
    for entry in entries {
        match decode(entry) {
            Ok(value) => values.push(value),
            Err(error) => warn!(%error, "skipping a metastore entry"),
        }
    }
    values
}

/// The condition that a key is still as it was read.
fn unchanged(key: &str, entry: Option<&Entry>) -> Condition {
    match entry {
        Some(entry) => Condition::ModRevision(key.to_owned(), entry.mod_revision),
        None => Condition::Absent(key.to_owned()),
    }
}

fn contention(key: String) -> Error {
    Error::Contention {
        key,
        attempts: ATTEMPTS_MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_stay_within_the_limits_and_keep_the_order() {
        let mut ops: Vec<Op> = (0..250)
            .map(|i| Op::put(format!("small/{i}"), "v"))
            .collect();
        ops.extend((0..5).map(|i| Op::put(format!("large/{i}"), vec![0u8; 400 << 10])));
        let cut = batches(ops.clone());
        for then in &cut {
            let fence = Condition::CreateRevision("election/coordinator".to_owned(), 1);
            Txn {
                when: vec![fence],
                then: then.clone(),
            }
            .check()
            .unwrap();
        }
        assert_eq!(cut.concat(), ops);
        assert!(cut.len() <= 6, "{}", cut.len());
    }
}
