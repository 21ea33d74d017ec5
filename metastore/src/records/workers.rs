//! Workers: that they live, what they hold, whether their memory is pinned.

use std::time::Duration;

use super::{ATTEMPTS_MAX, Records, contention, decode, decode_all, encode, unchanged};
use crate::error::{Error, Result};
use crate::keys;
use crate::model::{PinRecord, WorkerRecord, WorkerState};
use crate::store::{Condition, LeaseId, Op, Txn};

/// A worker's hold on its id: its record, under its lease, as this process wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// The worker's id.
    pub id: String,
    /// The lease its record and state live under.
    pub lease: LeaseId,
    /// The revision at which this process wrote the record; another one means another process did.
    pub revision: i64,
}

impl Registration {
    fn held(&self) -> Condition {
        Condition::ModRevision(keys::worker(&self.id), self.revision)
    }

    fn lost(&self) -> Error {
        Error::LeaseLost { lease: self.lease }
    }
}

impl Records {
    /// Registers a worker under a new lease of `ttl`; renew it about every half of that.
    ///
    /// A worker that restarts on the same host takes its id over from the process before.
    /// [`Error::WorkerIdTaken`] when a worker on another host is alive under this id.
    pub async fn register_worker(
        &self,
        record: &WorkerRecord,
        ttl: Duration,
    ) -> Result<Registration> {
        if record.id.is_empty() {
            return Err(Error::InvalidName {
                what: "worker id",
                found: record.id.clone(),
                reason: "expected at least one character in worker.id",
            });
        }
        let key = keys::worker(&record.id);
        let lease = self.store.grant_lease(ttl).await?;
        let registered = self.write_record(&key, record, lease).await;
        if registered.is_err() {
            // Whether or not the put arrived: with its lease gone, nothing of it remains.
            let _ = self.store.revoke_lease(lease).await;
        }
        Ok(Registration {
            id: record.id.clone(),
            lease,
            revision: registered?,
        })
    }

    async fn write_record(&self, key: &str, record: &WorkerRecord, lease: LeaseId) -> Result<i64> {
        for _ in 0..ATTEMPTS_MAX {
            let entry = self.store.get(key).await?;
            if let Some(other) = entry.as_ref().and_then(|e| decode::<WorkerRecord>(e).ok())
                && other.host != record.host
            {
                return Err(Error::WorkerIdTaken {
                    id: record.id.clone(),
                    host: other.host,
                });
            }
            let when = vec![unchanged(key, entry.as_ref())];
            let then = vec![Op::put_leased(key, encode(record), lease)];
            let outcome = self.store.txn(Txn { when, then }).await?;
            if outcome.committed {
                return Ok(outcome.revision);
            }
        }
        Err(contention(key.to_owned()))
    }

    /// Keeps the registration alive. [`Error::LeaseLost`] when it expired, or when another process
    /// took the id over: register again, and keep the cache.
    pub async fn renew(&self, registration: &Registration) -> Result<()> {
        self.store.keep_alive(registration.lease).await?;
        match self.store.get(&keys::worker(&registration.id)).await? {
            Some(entry) if entry.mod_revision == registration.revision => Ok(()),
            _ => Err(registration.lost()),
        }
    }

    /// Rewrites the record (another capacity, another address) under the same lease.
    pub async fn update_worker(
        &self,
        registration: &Registration,
        record: &WorkerRecord,
    ) -> Result<Registration> {
        let key = keys::worker(&registration.id);
        let then = vec![Op::put_leased(key, encode(record), registration.lease)];
        let outcome = self
            .store
            .txn(Txn {
                when: vec![registration.held()],
                then,
            })
            .await?;
        if !outcome.committed {
            return Err(registration.lost());
        }
        Ok(Registration {
            revision: outcome.revision,
            ..registration.clone()
        })
    }

    /// Ends the registration at once, for a worker that shuts down.
    pub async fn deregister_worker(&self, registration: Registration) -> Result<()> {
        self.store.revoke_lease(registration.lease).await
    }

    /// Publishes what the worker does and holds. [`Error::LeaseLost`] as in [`Records::renew`].
    pub async fn publish_state(
        &self,
        registration: &Registration,
        state: &WorkerState,
    ) -> Result<()> {
        let key = keys::worker_state(&registration.id);
        let then = vec![Op::put_leased(key, encode(state), registration.lease)];
        if self
            .store
            .txn(Txn {
                when: vec![registration.held()],
                then,
            })
            .await?
            .committed
        {
            Ok(())
        } else {
            Err(registration.lost())
        }
    }

    /// The live workers, by id.
    pub async fn workers(&self) -> Result<Vec<WorkerRecord>> {
        let mut workers: Vec<WorkerRecord> =
            decode_all(&self.store.list(keys::WORKER_PREFIX).await?.entries);
        workers.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(workers)
    }

    /// What the live workers report, by id.
    pub async fn states(&self) -> Result<Vec<WorkerState>> {
        let mut states: Vec<WorkerState> =
            decode_all(&self.store.list(keys::WORKER_STATE_PREFIX).await?.entries);
        states.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(states)
    }

    /// Asks a worker to lock its memory, or to let go. It holds across the worker's restarts.
    pub async fn set_pin(&self, worker: &str, pinned: bool, now_unix_ms: u64) -> Result<()> {
        let key = keys::pin(worker);
        let op = if pinned {
            let record = PinRecord {
                worker: worker.to_owned(),
                since_unix_ms: now_unix_ms,
            };
            Op::put(key, encode(&record))
        } else {
            Op::delete(key)
        };
        self.store
            .txn(Txn {
                when: Vec::new(),
                then: vec![op],
            })
            .await?;
        Ok(())
    }

    /// Whose memory is to be locked.
    pub async fn pins(&self) -> Result<Vec<PinRecord>> {
        Ok(decode_all(
            &self.store.list(keys::PIN_PREFIX).await?.entries,
        ))
    }
}
