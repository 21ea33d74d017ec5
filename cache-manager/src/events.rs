//! What a worker reacts to, from one place and in order of urgency.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures::StreamExt;
use stoa_metastore::{CacheVersion, Entry, Follow, FollowHealth, PlanTarget};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{Id, JoinSet};
use tokio::time::{Instant, sleep_until};

use crate::resolve::Resolved;

/// What a fresh look at tables found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Looked {
    /// Tables whose files had changed.
    pub changed: BTreeSet<String>,
    /// Tables whose files were the same.
    pub unchanged: BTreeSet<String>,
    /// Tables that could not be looked at, and why.
    pub failed: BTreeMap<String, String>,
}

/// What somebody asks of the engine.
pub(crate) enum Command {
    /// Look at these tables (none: all) now.
    Look {
        tables: Vec<String>,
        reply: oneshot::Sender<Looked>,
    },
    /// The store has lost chunks: load them again.
    Reload,
}

/// Work that was given to a task, done.
pub(crate) enum Done {
    /// A plan was read and matched with the files.
    Resolved {
        table: String,
        target: PlanTarget,
        result: Result<Resolved, String>,
    },
    /// A table was looked at; `None` if nothing has changed.
    Looked {
        table: String,
        at_unix_ms: u64,
        result: Result<Option<Resolved>, String>,
    },
    /// Everything was hashed; so many chunks were damaged.
    Scrubbed { damaged: usize },
}

/// One thing that happened.
pub(crate) enum Event {
    /// The worker is to stop.
    Stop,
    Command(Command),
    /// The plans in force, all of them.
    Plans(Vec<CacheVersion>),
    /// Whether this worker's memory is to be locked.
    Pinned(bool),
    /// How the metastore is, in words; `None` if well.
    Metastore(Option<String>),
    Done(Done),
    /// A deadline passed.
    Tick,
}

/// Where events come from.
pub(crate) struct Events {
    pub(crate) worker: String,
    pub(crate) stop: watch::Receiver<bool>,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) plans: Follow,
    pub(crate) health: watch::Receiver<FollowHealth>,
    pub(crate) pins: Follow,
    pub(crate) jobs: Jobs,
}

/// Tasks of the worker. One that panics has failed as it said beforehand that it would.
#[derive(Default)]
pub(crate) struct Jobs {
    tasks: JoinSet<Done>,
    failed: HashMap<Id, Done>,
}

impl Jobs {
    /// Starts a task; `failed` is what is told of it should it panic.
    pub(crate) fn spawn(
        &mut self,
        failed: Done,
        task: impl Future<Output = Done> + Send + 'static,
    ) {
        let task = self.tasks.spawn(task);
        self.failed.insert(task.id(), failed);
    }

    /// What the next task has done; `None` if there is none. Nothing is lost if it is dropped.
    async fn next(&mut self) -> Option<Done> {
        loop {
            match self.tasks.join_next_with_id().await? {
                Ok((id, done)) => {
                    self.failed.remove(&id);
                    return Some(done);
                }
                Err(error) => {
                    tracing::error!(%error, "a task of the worker failed");
                    if let Some(failed) = self.failed.remove(&error.id()) {
                        return Some(failed);
                    }
                }
            }
        }
    }
}

impl Events {
    /// The next event, at `deadline` at the latest. Nothing is lost if it is dropped while waiting.
    pub(crate) async fn next(&mut self, deadline: Instant) -> Event {
        tokio::select! {
            biased;
            _ = self.stop.wait_for(|stop| *stop) => Event::Stop,
            Some(command) = self.commands.recv() => Event::Command(command),
            Some(done) = self.jobs.next() => Event::Done(done),
            Some(entries) = self.plans.next() => Event::Plans(read(&entries)),
            Some(entries) = self.pins.next() => {
                let key = stoa_metastore::keys::pin(&self.worker);
                Event::Pinned(entries.iter().any(|entry| entry.key == key))
            }
            Ok(()) = self.health.changed() => {
                Event::Metastore(in_words(&self.health.borrow_and_update()))
            }
            () = sleep_until(deadline) => Event::Tick,
        }
    }
}

/// The plans that can be read; one broken value must not hide the others.
fn read(entries: &[Entry]) -> Vec<CacheVersion> {
    let read = |entry: &Entry| match serde_json::from_slice(&entry.value) {
        Ok(plan) => Some(plan),
        Err(error) => {
            tracing::warn!(key = entry.key, %error, "a plan in force cannot be read");
            None
        }
    };
    entries.iter().filter_map(read).collect()
}

fn in_words(health: &FollowHealth) -> Option<String> {
    match health {
        FollowHealth::Starting | FollowHealth::Connected => None,
        FollowHealth::Unreachable { reason } => Some(format!(
            "the metastore cannot be reached, what is held is served: {reason}"
        )),
        FollowHealth::Frozen(continuity) => Some(continuity.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Else its table would wait for it for ever.
    #[tokio::test]
    async fn a_task_that_panics_has_failed() {
        let mut jobs = Jobs::default();
        assert!(jobs.next().await.is_none());
        jobs.spawn(Done::Scrubbed { damaged: 7 }, async {
            panic!("on purpose")
        });
        let done = jobs.next().await;
        assert!(matches!(done, Some(Done::Scrubbed { damaged: 7 })));
        jobs.spawn(Done::Scrubbed { damaged: 7 }, async {
            Done::Scrubbed { damaged: 1 }
        });
        let done = jobs.next().await;
        assert!(matches!(done, Some(Done::Scrubbed { damaged: 1 })));
        assert!(jobs.next().await.is_none() && jobs.failed.is_empty());
    }
}
