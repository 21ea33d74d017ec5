//! One term of office: from being elected to losing the election.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use stoa_metastore::{
    CacheVersion, CoordinatorState, Entry, Error as StoreError, ErrorKind, Follow, FollowHealth,
    InboxStream, Leadership, Rejection, WorkerPlan, keys,
};
use tokio::task::JoinSet;

use crate::basis::{self, KnownBasis};
use crate::coordinator::Shared;
use crate::decide::{Action, DecideSettings, Decision, View, decide};
use crate::error::{Error, Result};
use crate::inbox::next_of;
use crate::loading::Loaded;
use crate::memory::Memory;
use crate::sized::SizedTable;
use crate::view;

/// The pause after the metastore did not answer.
const STORE_PAUSE: Duration = Duration::from_millis(500);
/// Rejections and problems that the status shows.
const SHOWN_MAX: usize = 64;
/// The longest wait before everything is looked over again, whatever happens.
const TICK: Duration = Duration::from_secs(5);
/// Decisions in a row; more of them would be a mistake of ours, and must not stop everything else.
const ROUNDS_MAX: u32 = 1000;
/// Layout versions of a table that are kept, for people who want an earlier one back; those that
/// are wanted or in force are kept anyway.
const LAYOUTS_KEPT: usize = 16;
/// How long a plan of our own counts although the followed state does not show it yet.
const OWN_PLAN_MS: u64 = 10_000;

/// How a term ended without an error.
#[derive(Debug)]
pub(crate) enum End {
    /// Somebody else may be elected now.
    Lost,
}

pub(crate) struct Term<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) leadership: &'a Leadership,
    follows: Follows,
    pub(crate) view: View,
    pub(crate) memory: Memory,
    /// Plans that we wrote, and when, until the followed state shows them.
    pub(crate) own_plans: BTreeMap<String, (CacheVersion, u64)>,
    pub(crate) loads: JoinSet<Loaded>,
    pub(crate) sized: BTreeMap<(String, u64), Arc<SizedTable>>,
    /// The parts of plans in force, by table, with the plan's number.
    pub(crate) parts: BTreeMap<String, (u64, Arc<BTreeMap<String, WorkerPlan>>)>,
    /// What the plans that were found were made of.
    bases: BTreeMap<String, KnownBasis>,
    pub(crate) inbox: Option<InboxStream>,
    pub(crate) inbox_handled: i64,
    pub(crate) rejections: VecDeque<Rejection>,
    pub(crate) rejections_written: u64,
    pub(crate) plans_written: u64,
    pub(crate) problems: BTreeMap<&'static str, String>,
    /// What was said last of tables that cannot be planned.
    pub(crate) told: CoordinatorState,
}

/// The four prefixes that decisions depend on, and whether each was listed once.
struct Follows {
    requests: Follow,
    in_force: Follow,
    workers: Follow,
    states: Follow,
    listed: [bool; 4],
}

/// A new state of one of them.
enum News {
    Requests(Vec<Entry>),
    InForce(Vec<Entry>),
    Workers(Vec<Entry>),
    States(Vec<Entry>),
}

impl Follows {
    async fn next(&mut self) -> Option<News> {
        tokio::select! {
            entries = self.requests.next() => { self.listed[0] = true; entries.map(News::Requests) }
            entries = self.in_force.next() => { self.listed[1] = true; entries.map(News::InForce) }
            entries = self.workers.next() => { self.listed[2] = true; entries.map(News::Workers) }
            entries = self.states.next() => { self.listed[3] = true; entries.map(News::States) }
        }
    }

    fn health(&self) -> impl Iterator<Item = FollowHealth> {
        [&self.requests, &self.in_force, &self.workers, &self.states]
            .into_iter()
            .map(|follow| follow.health().borrow().clone())
    }
}

impl<'a> Term<'a> {
    pub(crate) async fn begin(shared: &'a Shared, leadership: &'a Leadership) -> Result<Term<'a>> {
        let records = &shared.records;
        let follows = Follows {
            requests: records.follow(keys::LAYOUT_VERSION_PREFIX),
            in_force: records.follow(keys::CACHE_VERSION_PREFIX),
            workers: records.follow(keys::WORKER_PREFIX),
            states: records.follow(keys::WORKER_STATE_PREFIX),
            listed: [false; 4],
        };
        Ok(Term {
            shared,
            leadership,
            follows,
            view: View::default(),
            memory: Memory::new(),
            own_plans: BTreeMap::new(),
            loads: JoinSet::new(),
            sized: BTreeMap::new(),
            parts: BTreeMap::new(),
            bases: basis::read_all(records).await?,
            inbox: None,
            inbox_handled: records.inbox_handled().await?,
            rejections: records.rejections().await?.into(),
            rejections_written: 0,
            plans_written: 0,
            problems: BTreeMap::new(),
            told: CoordinatorState::default(),
        })
    }

    pub(crate) async fn run(mut self) -> Result<End> {
        loop {
            let wake_ms = if self.follows.listed == [true; 4] {
                match self.act().await {
                    Ok(Some(decision)) => decision.wake_ms,
                    Ok(None) => return Ok(End::Lost),
                    Err(error) if error.kind() == ErrorKind::Retry => {
                        tracing::warn!(%error, "the metastore does not answer; trying again");
                        self.problems.insert("metastore", error.to_string());
                        self.publish_status(&Decision::default());
                        Some(self.now_ms() + STORE_PAUSE.as_millis() as u64)
                    }
                    Err(error) if error.kind() == ErrorKind::Lost => return Ok(End::Lost),
                    Err(error) => return Err(error.into()),
                }
            } else {
                None
            };
            if !self.wait(wake_ms).await? {
                return Ok(End::Lost);
            }
        }
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.shared.clock.monotonic_ms()
    }

    /// Waits for anything to happen, at the latest until `wake_ms`. False: the office is lost.
    async fn wait(&mut self, wake_ms: Option<u64>) -> Result<bool> {
        if self.inbox.is_none() {
            self.open_inbox().await;
        }
        let now = self.now_ms();
        let until = move |at: u64| Duration::from_millis(at.saturating_sub(now).max(1));
        // Without the inbox, look for it again soon.
        let longest = if self.inbox.is_none() {
            STORE_PAUSE
        } else {
            TICK
        };
        let pause = wake_ms.map_or(longest, |at| until(at).min(longest));
        tokio::select! {
            () = self.leadership.lost() => return Ok(false),
            news = self.follows.next() => match news {
                Some(news) => self.take(news),
                // Follows end with the runtime only.
                None => return Ok(false),
            },
            Some(loaded) = self.loads.join_next(), if !self.loads.is_empty() => self.loaded(loaded),
            entry = next_of(&mut self.inbox) => self.handle_inbox(entry).await?,
            () = tokio::time::sleep(pause) => {}
        }
        // Whatever else has happened belongs to the same decision.
        while let Some(Some(news)) = self.follows.next().now_or_never() {
            self.take(news);
        }
        Ok(true)
    }

    fn take(&mut self, news: News) {
        match news {
            News::Requests(entries) => {
                (self.view.requests, self.view.unreadable) = view::requests(&entries)
            }
            News::Workers(entries) => self.view.workers = view::workers(&entries),
            News::States(entries) => self.view.states = view::states(&entries),
            News::InForce(entries) => {
                let seen = view::plans(&entries);
                let now_ms = self.now_ms();
                self.own_plans.retain(|table, (own, written_ms)| {
                    let overtaken = seen.get(table).is_some_and(|plan| plan.plan >= own.plan);
                    !overtaken && now_ms < *written_ms + OWN_PLAN_MS
                });
                self.view.in_force = seen;
                for (table, (own, _)) in &self.own_plans {
                    self.view.in_force.insert(table.clone(), own.clone());
                }
            }
        }
    }

    pub(crate) fn take_own(&mut self, table: &str, plan: CacheVersion) {
        self.own_plans
            .insert(table.to_owned(), (plan.clone(), self.now_ms()));
        self.view.in_force.insert(table.to_owned(), plan);
        self.plans_written += 1;
    }

    /// Decides and acts until there is nothing left to do but wait; `None` when the metastore is
    /// followed again after it was found to be another one.
    async fn act(&mut self) -> Result<Option<Decision>, StoreError> {
        let frozen = self.follows.health().find_map(|health| match health {
            FollowHealth::Frozen(continuity) => Some(continuity.to_string()),
            _ => None,
        });
        let unreachable = self.follows.health().find_map(|health| match health {
            FollowHealth::Unreachable { reason } => Some(reason),
            _ => None,
        });
        // What is remembered of a metastore that was replaced under us is no guide to what is there
        // now: numbers may begin anew. A new term finds out everything again.
        if self.view.frozen.is_some() && frozen.is_none() {
            return Ok(None);
        }
        self.view.frozen = frozen.clone();
        self.note_problem("frozen", frozen);
        self.note_problem("metastore", unreachable);
        let settings = DecideSettings {
            grace_ms: self.shared.settings.grace_ms,
            settle_ms: self.shared.settings.settle_ms,
            reserve_ratio: self.shared.settings.reserve_ratio,
        };
        self.take_known_bases();
        for _ in 0..ROUNDS_MAX {
            let now_ms = self.now_ms();
            let decision = decide(&mut self.memory, &self.view, &settings, now_ms);
            self.forget_what_is_not_needed();
            self.publish_status(&decision);
            self.tell_unplanned().await?;
            if decision.actions.is_empty() {
                return Ok(Some(decision));
            }
            let mut only_loads = true;
            for action in decision.actions.clone() {
                only_loads &= matches!(action, Action::LoadCatalog { .. });
                self.carry_out(action).await?;
            }
            if only_loads {
                return Ok(Some(decision));
            }
        }
        tracing::error!(
            ROUNDS_MAX,
            "the coordinator goes round in circles; report this"
        );
        Ok(Some(Decision::default()))
    }

    /// What plans of earlier coordinators were made of, as they wrote it down.
    fn take_known_bases(&mut self) {
        for (table, pointer) in &self.view.in_force {
            if self.memory.table(table).basis(pointer.plan).is_some() {
                continue;
            }
            if let (Some(basis), Ok(version)) = (
                self.bases.get(table).and_then(|known| known.of(pointer)),
                pointer.version(),
            ) {
                self.memory.take_over(table, version, basis.clone());
            }
        }
    }

    fn note_problem(&mut self, what: &'static str, problem: Option<String>) {
        match problem {
            Some(problem) => drop(self.problems.insert(what, problem)),
            None => drop(self.problems.remove(what)),
        }
    }

    fn forget_what_is_not_needed(&mut self) {
        let memory = &self.memory;
        self.sized
            .retain(|(table, version), _| memory.table(table).is_loaded(*version));
        let in_force = &self.view.in_force;
        self.parts.retain(|table, (number, _)| {
            in_force
                .get(table)
                .is_some_and(|plan| plan.plan == *number && !plan.unloaded)
        });
    }

    async fn carry_out(&mut self, action: Action) -> Result<(), StoreError> {
        match action {
            Action::LoadCatalog { table, version } => {
                self.start_loading(table, version);
                Ok(())
            }
            Action::Reject {
                request,
                reason,
                revision,
            } => self.reject(request, reason, revision).await,
            Action::Prune { table } => {
                let records = &self.shared.records;
                let mut removed = records.prune_plans(self.leadership, &table).await?;
                let layouts = records.layouts(&table).await?;
                if let Some(keep_from) = layouts.iter().rev().nth(LAYOUTS_KEPT - 1) {
                    removed += records
                        .prune_layouts(self.leadership, &table, *keep_from)
                        .await?;
                }
                if removed > 0 {
                    tracing::debug!(
                        table,
                        removed,
                        "plans and layouts that nobody needs any more are removed"
                    );
                }
                let plan = self.view.in_force.get(&table).map_or(0, |plan| plan.plan);
                self.memory.pruned(&table, plan);
                Ok(())
            }
            Action::Adopt { table } => {
                let Some(pointer) = self.view.in_force.get(&table).cloned() else {
                    return Ok(());
                };
                let version = pointer.version()?;
                let outcome = self.adopt(&table, version, &pointer).await;
                self.note_outcome(&table, version, outcome)
            }
            Action::WriteUnloaded { table, version } => {
                let outcome = self.write_unloaded(&table, version).await;
                self.note_outcome(&table, version, outcome)
            }
            Action::WritePlan {
                table,
                version,
                why,
                workers,
                correction,
            } => {
                let outcome = self
                    .write_plan(&table, version, why, &workers, correction)
                    .await;
                self.note_outcome(&table, version, outcome)
            }
        }
    }

    /// Remembers what failed for one table only; passes on what concerns all of them.
    fn note_outcome(
        &mut self,
        table: &str,
        version: u64,
        outcome: Result<()>,
    ) -> Result<(), StoreError> {
        match outcome {
            Ok(()) => Ok(()),
            Err(Error::Metastore(error))
                if matches!(
                    error.kind(),
                    ErrorKind::Retry | ErrorKind::Lost | ErrorKind::Config
                ) =>
            {
                Err(error)
            }
            Err(error) => {
                self.failed(table, version, &error);
                Ok(())
            }
        }
    }

    pub(crate) fn failed(&mut self, table: &str, version: u64, error: &Error) {
        let before = self.memory.table(table).failure(version);
        // Tried again and again, it is said once.
        if before.is_none_or(|before| before.message != error.to_string()) {
            tracing::warn!(table, version, %error, "table not planned");
        }
        let settings = &self.shared.settings;
        let pauses = (settings.retry_ms_min, settings.retry_ms_max);
        let now_ms = self.now_ms();
        self.memory.failed(
            table,
            version,
            error.to_string(),
            error.is_passing(),
            pauses,
            now_ms,
        );
    }

    pub(crate) async fn reject(
        &mut self,
        request: String,
        reason: String,
        revision: i64,
    ) -> Result<(), StoreError> {
        let is_known = |known: &Rejection| known.revision == revision && known.reason == reason;
        if self.rejections.iter().any(is_known) {
            return Ok(());
        }
        tracing::warn!(request, reason, "request rejected");
        let rejection = Rejection {
            request,
            reason,
            revision,
            rejected_unix_ms: self.shared.clock.unix_ms(),
        };
        self.shared
            .records
            .reject(self.leadership, &rejection)
            .await?;
        self.rejections.retain(|known| known.revision != revision);
        self.rejections.push_back(rejection);
        if self.rejections.len() > SHOWN_MAX {
            self.rejections.pop_front();
        }
        self.rejections_written += 1;
        Ok(())
    }
}
