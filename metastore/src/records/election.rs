//! One coordinator at a time, and a fence against those that were it.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tracing::{debug, warn};

use super::{Records, decode, encode};
use crate::error::{Error, ErrorKind, Result};
use crate::keys;
use crate::model::{CoordinatorState, ElectionRecord};
use crate::store::{Condition, LeaseId, Metastore, Op, Txn, WatchEvent};

/// A candidate looks again after this long even if no watch told it to.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// The pause after an error of the store.
const BACK_OFF: Duration = Duration::from_millis(500);

/// Being the elected coordinator. Every write of the coordinator takes it, and happens only if
/// the election key on the server is still the one that this election created.
///
/// Dropping it stops renewing: the lease runs out. [`Leadership::resign`] ends it at once.
#[derive(Debug)]
pub struct Leadership {
    store: Arc<dyn Metastore>,
    candidate: String,
    lease: LeaseId,
    revision: i64,
    lost: Arc<watch::Sender<bool>>,
    keeper: JoinHandle<()>,
}

impl Leadership {
    /// The condition that fences every write: nobody was elected since.
    pub fn fence(&self) -> Condition {
        Condition::CreateRevision(keys::ELECTION.to_owned(), self.revision)
    }

    /// Who was elected.
    pub fn candidate(&self) -> &str {
        &self.candidate
    }

    /// Whether it is known to be over. A hint: only the fence decides.
    pub fn is_lost(&self) -> bool {
        *self.lost.borrow()
    }

    /// Waits until it is known to be over.
    pub async fn lost(&self) {
        let mut lost = self.lost.subscribe();
        // The sender lives in `self`, so this ends only when the value is true.
        let _ = lost.wait_for(|lost| *lost).await;
    }

    /// Gives the office back, so that the next candidate need not wait for the lease to run out.
    pub async fn resign(self) -> Result<()> {
        self.keeper.abort();
        self.lost.send_replace(true);
        self.store.revoke_lease(self.lease).await
    }

    /// [`Error::Fenced`] when somebody else, or nobody, holds the office.
    pub(super) async fn check(&self, store: &Arc<dyn Metastore>) -> Result<()> {
        let holder = store.get(keys::ELECTION).await?;
        match &holder {
            Some(entry) if entry.create_revision == self.revision => Ok(()),
            _ => {
                self.lost.send_replace(true);
                let holder = holder.and_then(|e| decode::<ElectionRecord>(&e).ok());
                Err(Error::Fenced {
                    candidate: self.candidate.clone(),
                    holder: holder.map(|record| record.candidate),
                })
            }
        }
    }
}

impl Drop for Leadership {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Records {
    /// Waits until `candidate` is elected; the lease of `ttl` is then renewed in the background.
    ///
    /// Outages of the store are waited out; other errors (refused access, …) are returned.
    pub async fn campaign(&self, candidate: &str, ttl: Duration) -> Result<Leadership> {
        loop {
            match self.try_campaign(candidate, ttl).await {
                Ok(Some(leadership)) => return Ok(leadership),
                Ok(None) => self.wait_for_vacancy().await,
                Err(error) if waits(&error) => {
                    debug!(%error, "campaign waits for the metastore");
                    sleep(BACK_OFF).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Elects `candidate` if there is no coordinator; `None` if there is one.
    pub async fn try_campaign(&self, candidate: &str, ttl: Duration) -> Result<Option<Leadership>> {
        if self.store.get(keys::ELECTION).await?.is_some() {
            return Ok(None);
        }
        // Before the lease, so that no change after it is missed.
        let changes = self.store.changes();
        let lease = self.store.grant_lease(ttl).await?;
        let granted = Instant::now();
        let value = encode(&ElectionRecord {
            candidate: candidate.to_owned(),
        });
        let txn = Txn {
            when: vec![Condition::Absent(keys::ELECTION.to_owned())],
            then: vec![Op::put_leased(keys::ELECTION, value, lease)],
        };
        let outcome = self.store.txn(txn).await;
        match outcome {
            Ok(outcome) if outcome.committed => {}
            other => {
                // Whether or not the put arrived: with its lease gone, nothing of it remains.
                let _ = self.store.revoke_lease(lease).await;
                return other.map(|_| None);
            }
        }
        let revision = outcome?.revision;
        let lost = Arc::new(watch::Sender::new(false));
        let keeper = tokio::spawn(keep(
            Arc::clone(&self.store),
            lease,
            ttl,
            granted,
            changes,
            Arc::clone(&lost),
        ));
        Ok(Some(Leadership {
            store: Arc::clone(&self.store),
            candidate: candidate.to_owned(),
            lease,
            revision,
            lost,
            keeper,
        }))
    }

    /// Says what the coordinator cannot do, for as long as it holds the office. Fenced.
    pub async fn publish_coordinator_state(
        &self,
        leadership: &Leadership,
        state: &CoordinatorState,
    ) -> Result<()> {
        let value = encode(state);
        let then = vec![Op::put_leased(
            keys::COORDINATOR_STATE,
            value,
            leadership.lease,
        )];
        self.fenced(leadership, Vec::new(), then).await?;
        Ok(())
    }

    /// What the elected coordinator says that it cannot do.
    pub async fn coordinator_state(&self) -> Result<CoordinatorState> {
        let entry = self.store.get(keys::COORDINATOR_STATE).await?;
        let state = entry.as_ref().map(decode).transpose()?;
        Ok(state.unwrap_or_default())
    }

    /// The elected coordinator.
    pub async fn coordinator(&self) -> Result<Option<String>> {
        let entry = self.store.get(keys::ELECTION).await?;
        Ok(entry
            .as_ref()
            .map(decode::<ElectionRecord>)
            .transpose()?
            .map(|record| record.candidate))
    }

    /// Returns when the election key was seen to vanish, or after a while to look again.
    async fn wait_for_vacancy(&self) {
        let until = Instant::now() + LOOK_AGAIN;
        let wait = async {
            let Some(entry) = self.store.get(keys::ELECTION).await? else {
                return Ok(());
            };
            let mut events = self
                .store
                .watch(keys::ELECTION, entry.mod_revision + 1)
                .await?;
            while let Some(event) = events.next().await {
                if let WatchEvent::Delete { key, .. } = event?
                    && key == keys::ELECTION
                {
                    return Ok(());
                }
            }
            Ok(())
        };
        if let Ok(Err::<(), Error>(error)) = timeout_at(until, wait).await {
            debug!(%error, "watch of the election ended");
            sleep(BACK_OFF).await;
        }
    }
}

fn waits(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Retry | ErrorKind::Relist | ErrorKind::Lost
    )
}

/// Waits until another process keeps the store; for ever where that does not happen.
async fn changed(changes: &mut Option<watch::Receiver<u64>>) {
    if let Some(changes) = changes
        && changes.changed().await.is_ok()
    {
        return;
    }
    // Never; or the handle is gone, and with it who waits.
    std::future::pending().await
}

/// Renews the lease until it is lost, or until the store was silent for as long as it lasts.
async fn keep(
    store: Arc<dyn Metastore>,
    lease: LeaseId,
    ttl: Duration,
    granted: Instant,
    mut changes: Option<watch::Receiver<u64>>,
    lost: Arc<watch::Sender<bool>>,
) {
    let period = ttl / 3;
    let mut alive_until = granted + ttl;
    let mut next = granted + period;
    loop {
        tokio::select! {
            () = sleep_until(next.min(alive_until)) => {}
            () = changed(&mut changes) => {
                debug!("another process keeps the metastore; the election is lost");
                lost.send_replace(true);
                return;
            }
        }
        let asked = Instant::now();
        next = asked + period;
        match timeout_at(alive_until, store.keep_alive(lease)).await {
            Ok(Ok(())) => {
                alive_until = asked + ttl;
                continue;
            }
            Ok(Err(error))
                if matches!(error.kind(), ErrorKind::Retry) && Instant::now() < alive_until =>
            {
                debug!(%error, "lease of the coordinator not renewed yet");
                // Sooner than usual: the time that is left is short.
                next = asked + period.min(BACK_OFF);
                continue;
            }
            Ok(Err(error)) => warn!(%error, "coordinator lost its lease"),
            Err(_) => warn!("coordinator could not renew its lease in time"),
        }
        lost.send_replace(true);
        // Frees the office sooner, should the server still think that the lease lives.
        let _ = store.revoke_lease(lease).await;
        return;
    }
}
