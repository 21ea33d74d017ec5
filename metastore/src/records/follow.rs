//! Following a prefix: not its changes but its state, as new as can be had, for as long as it takes.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{FutureExt, Stream, StreamExt};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, error, info, warn};

use super::Records;
use crate::error::{Error, Result};
use crate::store::{
    ClusterIdentity, Continuity, Entry, FROZEN_MAX, Metastore, WatchEvent, continuity,
};

/// What to do when another store answers, or the same one with lost revisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDiscontinuity {
    /// Keep the last state and say so in [`Follow::health`], until [`Follow::thaw`].
    Freeze,
    /// The same, but no longer than this: time to notice the alarm, and for an address that was a
    /// mistake to be put right.
    FreezeFor(Duration),
    /// Say so in the log and go on with the state that is there now.
    Continue,
}

/// How to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FollowOptions {
    /// List again after this long, whatever the watch says.
    pub relist: Duration,
    /// The first pause after an error; it doubles up to `back_off_max`.
    pub back_off_min: Duration,
    /// The longest pause after errors.
    pub back_off_max: Duration,
    /// What to do when the store is not the one seen before.
    pub on_discontinuity: OnDiscontinuity,
}

impl Default for FollowOptions {
    fn default() -> Self {
        FollowOptions {
            relist: Duration::from_secs(60),
            back_off_min: Duration::from_millis(100),
            back_off_max: Duration::from_secs(5),
            on_discontinuity: OnDiscontinuity::FreezeFor(FROZEN_MAX),
        }
    }
}

/// How well a [`Follow`] is connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FollowHealth {
    /// No answer yet.
    Starting,
    /// The state is as new as the store.
    Connected,
    /// The store does not answer; the last state stands.
    Unreachable {
        /// The last error.
        reason: String,
    },
    /// The store is not the one seen before; the last state stands until [`Follow::thaw`], or for
    /// as long as [`OnDiscontinuity::FreezeFor`] says.
    Frozen(Continuity),
}

/// A stream of the entries under a prefix, sorted by key: the whole state each time, the newest
/// only. A slow reader misses states in between, never the last. It ends with the runtime.
pub struct Follow {
    states: BoxStream<'static, Vec<Entry>>,
    health: watch::Receiver<FollowHealth>,
    thaw: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Follow {
    /// How well it is connected; changes can be waited for.
    pub fn health(&self) -> watch::Receiver<FollowHealth> {
        self.health.clone()
    }

    /// Accepts the store as it is now, after [`FollowHealth::Frozen`].
    pub fn thaw(&self) {
        self.thaw.notify_one();
    }
}

impl std::fmt::Debug for Follow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follow")
            .field("health", &*self.health.borrow())
            .finish_non_exhaustive()
    }
}

impl Stream for Follow {
    type Item = Vec<Entry>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.states.poll_next_unpin(cx)
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Records {
    /// Follows what is under `prefix`: lists at a revision, watches from the next, lists again on
    /// compaction, on any error and every 60 s. The first item is the first listing.
    pub fn follow(&self, prefix: &str) -> Follow {
        self.follow_with(prefix, FollowOptions::default())
    }

    /// [`Records::follow`] with other times.
    pub fn follow_with(&self, prefix: &str, options: FollowOptions) -> Follow {
        let (state_tx, state_rx) = watch::channel(None);
        let (health_tx, health_rx) = watch::channel(FollowHealth::Starting);
        let thaw = Arc::new(Notify::new());
        let follower = Follower {
            store: Arc::clone(&self.store),
            prefix: prefix.to_owned(),
            options,
            states: state_tx,
            health: health_tx,
            thaw: Arc::clone(&thaw),
            entries: BTreeMap::new(),
            farthest: None,
            frozen_since: None,
        };
        let task = tokio::spawn(follower.run());
        let states = futures::stream::unfold(state_rx, |mut rx| async move {
            rx.changed().await.ok()?;
            let entries = rx.borrow_and_update().clone()?;
            Some((entries, rx))
        });
        Follow {
            states: states.boxed(),
            health: health_rx,
            thaw,
            task,
        }
    }
}

struct Follower {
    store: Arc<dyn Metastore>,
    prefix: String,
    options: FollowOptions,
    states: watch::Sender<Option<Vec<Entry>>>,
    health: watch::Sender<FollowHealth>,
    thaw: Arc<Notify>,
    entries: BTreeMap<String, Entry>,
    /// The farthest that was ever seen of the store.
    farthest: Option<ClusterIdentity>,
    /// Since when the store is not believed.
    frozen_since: Option<Instant>,
}

impl Follower {
    async fn run(mut self) {
        let mut back_off = self.options.back_off_min;
        loop {
            let started = Instant::now();
            if let Err(error) = self.round().await {
                match &error {
                    Error::Compacted { .. } | Error::WatchEnded { .. } => {
                        debug!(prefix = self.prefix, %error, "listing again");
                    }
                    _ => self.unreachable(&error),
                }
                // A round that lasted was a good one: an error after it is the first of its kind.
                if started.elapsed() > self.options.back_off_max {
                    back_off = self.options.back_off_min;
                }
                sleep(back_off).await;
                back_off = (back_off * 2).min(self.options.back_off_max);
            } else {
                back_off = self.options.back_off_min;
            }
        }
    }

    fn unreachable(&self, error: &Error) {
        if matches!(*self.health.borrow(), FollowHealth::Frozen(_)) {
            return;
        }
        let health = FollowHealth::Unreachable {
            reason: error.to_string(),
        };
        if !matches!(
            self.health.send_replace(health),
            FollowHealth::Unreachable { .. }
        ) {
            warn!(prefix = self.prefix, %error, "metastore unreachable, the last state stands");
        }
    }

    /// One listing and the watch after it, until it is time to list again.
    async fn round(&mut self) -> Result<()> {
        let until = Instant::now() + self.options.relist;
        let cluster_id = self.store.identity().await?.cluster_id;
        let listing = self.store.list(&self.prefix).await?;
        let now = ClusterIdentity {
            cluster_id,
            revision: listing.revision,
        };
        if !self.accepts(&now) {
            self.wait_frozen(until).await;
            return Ok(());
        }
        self.farthest = Some(now);
        self.frozen_since = None;
        let entries = listing
            .entries
            .into_iter()
            .map(|entry| (entry.key.clone(), entry))
            .collect();
        if self.entries != entries || self.states.borrow().is_none() {
            self.entries = entries;
            self.publish();
        }
        if self.health.send_replace(FollowHealth::Connected) != FollowHealth::Connected {
            info!(
                prefix = self.prefix,
                revision = now.revision,
                "following the metastore"
            );
        }

        let open = self.store.watch(&self.prefix, now.revision + 1);
        let Ok(events) = timeout_at(until, open).await else {
            return Ok(());
        };
        let mut events = events?;
        loop {
            let Ok(next) = timeout_at(until, events.next()).await else {
                return Ok(());
            };
            let mut changed = self.apply(next)?;
            // Whatever else has arrived belongs to the same new state.
            while let Some(next) = events.next().now_or_never() {
                match self.apply(next) {
                    Ok(more) => changed |= more,
                    Err(error) => {
                        if changed {
                            self.publish();
                        }
                        return Err(error);
                    }
                }
            }
            if changed {
                self.publish();
            }
        }
    }

    fn apply(&mut self, next: Option<Result<WatchEvent>>) -> Result<bool> {
        let event = next.unwrap_or_else(|| {
            Err(Error::WatchEnded {
                prefix: self.prefix.clone(),
                reason: "end of stream".to_owned(),
            })
        })?;
        if let Some(farthest) = &mut self.farthest {
            farthest.revision = farthest.revision.max(event.revision());
        }
        Ok(match event {
            WatchEvent::Put(entry) => {
                self.entries.insert(entry.key.clone(), entry);
                true
            }
            WatchEvent::Delete { key, .. } => self.entries.remove(&key).is_some(),
            WatchEvent::Progress { .. } => false,
        })
    }

    fn publish(&self) {
        self.states
            .send_replace(Some(self.entries.values().cloned().collect()));
    }

    /// Whether the store is the one seen before, or may be taken as it is.
    fn accepts(&mut self, now: &ClusterIdentity) -> bool {
        let Some(before) = &self.farthest else {
            return true;
        };
        let continuity = continuity(before, now);
        let frozen = match &*self.health.borrow() {
            FollowHealth::Frozen(frozen) => Some(*frozen),
            _ => None,
        };
        match (continuity, frozen) {
            // A store that went back grows past the old revision some day, and is still not the
            // one seen before. Another cluster's address, though, may have been a mistake.
            (Continuity::Continuous, Some(Continuity::WentBack { .. })) => false,
            (Continuity::Continuous, _) => true,
            (_, _) if self.options.on_discontinuity == OnDiscontinuity::Continue => {
                warn!(
                    prefix = self.prefix,
                    "{continuity}; going on with what is there"
                );
                true
            }
            (_, was) => {
                if was.is_none() {
                    self.frozen_since = Some(Instant::now());
                }
                if was != Some(continuity) {
                    error!(prefix = self.prefix, "{continuity}");
                }
                self.health.send_replace(FollowHealth::Frozen(continuity));
                false
            }
        }
    }

    /// Waits for the next look, for the operator's word that the store is to be believed, or until
    /// it was frozen for long enough.
    async fn wait_frozen(&mut self, until: Instant) {
        let believed_at = match (self.options.on_discontinuity, self.frozen_since) {
            (OnDiscontinuity::FreezeFor(limit), Some(since)) => Some(since + limit),
            _ => None,
        };
        let woken = timeout_at(
            believed_at.unwrap_or(until).min(until),
            self.thaw.notified(),
        );
        let told = woken.await.is_ok();
        if told || believed_at.is_some_and(|at| at <= Instant::now()) {
            warn!(prefix = self.prefix, "taking the metastore as it is now");
            self.farthest = None;
            self.frozen_since = None;
            self.health.send_replace(FollowHealth::Starting);
        }
    }
}
