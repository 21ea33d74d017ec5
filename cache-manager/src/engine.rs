//! The worker's loop: takes notice of plans, has them resolved, and runs passes until memory holds
//! what they name.
//!
//! Everything is level-triggered: an event changes what is wanted, and a pass (see `pass.rs`)
//! makes the difference between what is wanted and what is held. A pass that is overtaken by a
//! newer plan keeps what it has stored and gives way.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use stoa_layout::{TableCatalog, TableName};
use stoa_metastore::{CacheVersion, PlanTarget, TableState, WorkerPhase, WorkerState};
use stoa_shm::MemoryReport;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::diff::Known;
use crate::events::{Command, Done, Event, Events, Looked};
use crate::failures::Failures;
use crate::looks;
use crate::metrics::add;
use crate::resolve::{Resolved, Sources, resolved_with};
use crate::shared::{Details, Shared, jitter, unix_ms};
use crate::targets::Targets;

/// A pass waits this long for plans that are still being resolved, so that tables published
/// together are loaded together.
const GATHER: Duration = Duration::from_millis(300);
/// The longest sleep without anything to do.
const IDLE: Duration = Duration::from_secs(3600);
/// Problems of one kind that are told one by one.
const TOLD_MAX: usize = 5;

/// One table.
#[derive(Default)]
pub(crate) struct Slot {
    pub(crate) target: PlanTarget,
    pub(crate) resolved: Option<Resolved>,
    /// Whether a task is reading the target.
    resolving: bool,
    attempts: u32,
    resolve_again: Option<Instant>,
    look_due: Option<Instant>,
    looking: bool,
    /// Why the last look failed.
    look_error: Option<String>,
    /// The target that the counts of kept and fetched chunks belong to.
    pub(crate) counted: Option<PlanTarget>,
    pub(crate) state: TableState,
    pub(crate) looked_at_unix_ms: u64,
}

/// What an event asks of a pass that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    Continue,
    /// What is wanted has changed: give way to a new pass.
    Interrupt,
    Stop,
}

/// Somebody who waits for several tables to be looked at.
struct Waiting {
    outstanding: Vec<String>,
    looked: Looked,
    reply: oneshot::Sender<Looked>,
}

/// The worker's state, owned by its one task.
pub(crate) struct Engine {
    pub(crate) shared: Arc<Shared>,
    pub(crate) sources: Sources,
    pub(crate) events: Events,
    pub(crate) targets: Targets,
    pub(crate) slots: BTreeMap<String, Slot>,
    /// The published catalogs, by their name in the index.
    pub(crate) shown: HashMap<String, Arc<TableCatalog>>,
    pub(crate) failures: Failures,
    pub(crate) known: Known,
    pub(crate) needs_pass: bool,
    /// Since when a pass is needed.
    gather_since: Instant,
    /// Whether the metastore has told the plans in force at least once.
    seen_plans: bool,
    pub(crate) loading: bool,
    /// What the last pass could hold in all, if it left something out for want of room.
    pub(crate) short_of: Option<u64>,
    pub(crate) memory: MemoryReport,
    next_reclaim: Instant,
    next_scrub: Option<Instant>,
    scrubbing: bool,
    waiting: Vec<Waiting>,
    /// What the metastore said last about pinning.
    pin_wanted: Option<bool>,
    told_looks: BTreeMap<String, u64>,
    pub(crate) generation: u64,
    pub(crate) chunks: u64,
}

/// A table's name in the index.
pub(crate) fn catalog_name(table: &str) -> String {
    TableName::parse(table).map_or_else(|_| table.to_owned(), |name| name.to_string())
}

impl Engine {
    pub(crate) fn new(shared: Arc<Shared>, sources: Sources, events: Events) -> Engine {
        let now = Instant::now();
        let (first, longest) = shared.settings.retry;
        Engine {
            sources,
            events,
            targets: Targets::default(),
            slots: BTreeMap::new(),
            shown: HashMap::new(),
            failures: Failures::new(first, longest),
            known: Known::default(),
            needs_pass: false,
            gather_since: now,
            seen_plans: false,
            loading: false,
            short_of: None,
            memory: MemoryReport::default(),
            next_reclaim: now + shared.settings.reclaim_interval,
            next_scrub: shared.settings.scrub_interval.map(|interval| now + interval),
            scrubbing: false,
            waiting: Vec::new(),
            pin_wanted: None,
            told_looks: BTreeMap::new(),
            generation: 0,
            chunks: 0,
            shared,
        }
    }

    /// Runs until it is told to stop.
    pub(crate) async fn run(mut self) {
        self.adopt_catalogs().await;
        if self.shared.settings.pin {
            self.pin(true).await;
        }
        self.report();
        loop {
            if self.needs_pass && !self.gathering() {
                if self.pass().await == Flow::Stop {
                    return;
                }
                continue;
            }
            let deadline = self.deadline();
            let event = self.events.next(deadline).await;
            if self.handle(event).await == Flow::Stop {
                return;
            }
        }
    }

    /// The catalogs that the process before has published.
    async fn adopt_catalogs(&mut self) {
        let found = self.shared.with_store(|store| {
            let names: Vec<String> = store.catalogs().keys().cloned().collect();
            let decode = |name: String| {
                // Copied, because a catalog that lay in its segment would keep it from being freed.
                let bytes = Bytes::copy_from_slice(&store.read_catalog(&name)?);
                match TableCatalog::decode(&bytes) {
                    Ok(catalog) => Some((name, Arc::new(catalog))),
                    Err(error) => {
                        tracing::warn!(catalog = name, %error, "the published catalog is made anew");
                        None
                    }
                }
            };
            let catalogs: Vec<_> = names.into_iter().filter_map(decode).collect();
            let counts = (store.generation(), store.held().len() as u64);
            (catalogs, store.memory().unwrap_or_default(), counts)
        });
        let (catalogs, memory, counts) = found.await;
        (self.generation, self.chunks) = counts;
        self.shown.extend(catalogs);
        self.memory = memory;
    }

    /// Whether it is worth waiting for plans that are being resolved.
    fn gathering(&self) -> bool {
        self.slots.values().any(|slot| slot.resolving) && self.gather_until() > Instant::now()
    }

    fn gather_until(&self) -> Instant {
        self.gather_since + GATHER
    }

    /// When something is due without any event.
    pub(crate) fn deadline(&self) -> Instant {
        let now = Instant::now();
        let mut deadline = (now + IDLE).min(self.next_reclaim_due());
        let mut due = |at: Option<Instant>| deadline = deadline.min(at.unwrap_or(deadline));
        due(self.next_scrub.filter(|_| !self.scrubbing));
        // While a pass is under way, its end is what these wait for.
        if !self.loading {
            due(self.failures.next_retry().map(Instant::from_std));
            due(self.needs_pass.then(|| self.gather_until()));
        }
        for slot in self.slots.values() {
            due(slot.resolve_again.filter(|_| !slot.resolving));
            due(slot.look_due.filter(|_| !slot.looking));
        }
        deadline
    }

    /// Memory is looked at while readers retain some, or while something was left out.
    fn next_reclaim_due(&self) -> Instant {
        if !self.loading && (self.memory.retained_bytes > 0 || self.short_of.is_some()) {
            self.next_reclaim
        } else {
            Instant::now() + IDLE
        }
    }

    /// Takes notice of one event.
    pub(crate) async fn handle(&mut self, event: Event) -> Flow {
        let flow = match event {
            Event::Stop => return Flow::Stop,
            Event::Command(Command::Reload) => self.wants_pass(),
            Event::Command(Command::Look { tables, reply }) => {
                self.look_for(tables, reply);
                Flow::Continue
            }
            Event::Plans(plans) => self.take_plans(plans),
            Event::Pinned(pinned) => {
                // Only what changed there: `worker.pin` of the configuration stands otherwise.
                let before = self.pin_wanted.replace(pinned);
                if before.unwrap_or(false) != pinned {
                    self.pin(pinned || self.shared.settings.pin).await;
                }
                Flow::Continue
            }
            Event::Metastore(problem) => {
                self.shared.problem("metastore", problem);
                Flow::Continue
            }
            Event::Done(done) => self.finish(done),
            Event::Tick => self.tick().await,
        };
        self.report();
        self.tell_looks().await;
        flow
    }

    fn wants_pass(&mut self) -> Flow {
        if !self.needs_pass {
            self.needs_pass = true;
            self.gather_since = Instant::now();
        }
        Flow::Interrupt
    }

    fn take_plans(&mut self, plans: Vec<CacheVersion>) -> Flow {
        let observed = self.targets.observe(plans);
        let told = observed.problems.len().min(TOLD_MAX);
        let problems = observed.problems[..told].join("; ");
        self.shared.problem("plans", (!problems.is_empty()).then_some(problems));
        for table in &observed.changed {
            if let Some((target, _)) = self.targets.get(table) {
                let slot = self.slots.entry(table.clone()).or_default();
                slot.target = target;
                slot.state.target = Some(target);
                slot.attempts = 0;
                self.resolve(table);
            }
        }
        if !self.seen_plans {
            // Even without a plan: what no table claims is given back.
            self.seen_plans = true;
            return self.wants_pass();
        }
        Flow::Continue
    }

    /// Has a table's newest plan read, by a task.
    fn resolve(&mut self, table: &str) {
        let Some((target, pointer)) = self.targets.get(table) else { return };
        let Some(slot) = self.slots.get_mut(table) else { return };
        slot.resolving = true;
        slot.resolve_again = None;
        let known = slot
            .resolved
            .as_ref()
            .and_then(|resolved| resolved.catalog.clone())
            .or_else(|| self.shown.get(&catalog_name(table)).cloned());
        let (sources, pointer, table) = (self.sources.clone(), pointer.clone(), table.to_owned());
        self.events.jobs.spawn(async move {
            let result = sources.resolve(&pointer, target, known, unix_ms()).await;
            Done::Resolved { table, target, result }
        });
    }

    fn finish(&mut self, done: Done) -> Flow {
        match done {
            Done::Resolved { table, target, result } => self.resolved(&table, target, result),
            Done::Looked { table, at_unix_ms, result } => self.looked(&table, at_unix_ms, result),
            Done::Scrubbed { damaged } => {
                self.scrubbing = false;
                let interval = self.shared.settings.scrub_interval.unwrap_or(IDLE);
                self.next_scrub = Some(Instant::now() + interval);
                if damaged > 0 { self.wants_pass() } else { Flow::Continue }
            }
        }
    }

    fn resolved(
        &mut self,
        table: &str,
        target: PlanTarget,
        result: Result<Resolved, String>,
    ) -> Flow {
        let (first, longest) = self.shared.settings.retry;
        let freshness = self.shared.settings.freshness;
        let Some(slot) = self.slots.get_mut(table) else { return Flow::Continue };
        if slot.target != target {
            // Overtaken: the task for the newer plan is under way.
            return Flow::Continue;
        }
        slot.resolving = false;
        match result {
            Ok(resolved) => {
                slot.attempts = 0;
                slot.state.error = None;
                let looked_at = resolved.catalog.as_ref().map_or(0, |c| c.looked_at_unix_ms);
                slot.looked_at_unix_ms = slot.looked_at_unix_ms.max(looked_at);
                slot.look_due = freshness.filter(|_| resolved.catalog.is_some()).map(|freshness| {
                    let age = Duration::from_millis(unix_ms().saturating_sub(slot.looked_at_unix_ms));
                    Instant::now() + freshness.saturating_sub(age)
                });
                let look_at_once = resolved.differs && freshness.is_some();
                slot.resolved = Some(resolved);
                // Somebody asked anew: what failed for good before gets another chance.
                self.failures.clear();
                if look_at_once {
                    self.look(table);
                }
                self.wants_pass()
            }
            Err(error) => {
                tracing::warn!(table, error, "the plan cannot be followed yet");
                slot.state.error = Some(error);
                let wait = first.saturating_mul(1 << slot.attempts.min(16)).min(longest);
                slot.attempts += 1;
                slot.resolve_again = Some(Instant::now() + wait.mul_f64(0.75 + 0.5 * jitter()));
                Flow::Continue
            }
        }
    }

    /// Has a table looked at, by a task. `false` if there is nothing to look at yet.
    pub(crate) fn look(&mut self, table: &str) -> bool {
        let Some(slot) = self.slots.get_mut(table) else { return false };
        let Some(resolved) = &slot.resolved else { return false };
        let Some(catalog) = resolved.catalog.clone() else { return false };
        if slot.looking {
            return true;
        }
        slot.looking = true;
        add(&self.shared.counters.looks, 1);
        let (target, planned) = (resolved.target, Arc::clone(&resolved.planned));
        let (origin, table) = (self.sources.origin.clone(), table.to_owned());
        self.events.jobs.spawn(async move {
            let at_unix_ms = unix_ms();
            let result = match catalog.refresh(&origin, at_unix_ms).await {
                Ok(None) => Ok(None),
                Ok(Some(newer)) => {
                    resolved_with(target, planned, Arc::new(newer)).await.map(Some)
                }
                Err(error) => Err(error.to_string()),
            };
            Done::Looked { table, at_unix_ms, result }
        });
        true
    }

    fn looked(
        &mut self,
        table: &str,
        at_unix_ms: u64,
        result: Result<Option<Resolved>, String>,
    ) -> Flow {
        let freshness = self.shared.settings.freshness;
        let Some(slot) = self.slots.get_mut(table) else { return Flow::Continue };
        slot.looking = false;
        slot.look_due = freshness.map(|freshness| Instant::now() + freshness);
        let mut flow = Flow::Continue;
        let mut changed = Ok(false);
        match result {
            Ok(newer) => {
                slot.look_error = None;
                slot.looked_at_unix_ms = at_unix_ms;
                // A newer plan replaces what is wanted anyway, with a look of its own.
                if let Some(newer) = newer
                    && slot.resolved.as_ref().is_some_and(|now| now.target == newer.target)
                {
                    tracing::info!(table, "the table's files have changed");
                    slot.resolved = Some(newer);
                    changed = Ok(true);
                    flow = self.wants_pass();
                }
            }
            Err(error) => {
                tracing::warn!(table, error, "the table's files cannot be looked at");
                slot.look_error = Some(error.clone());
                changed = Err(error);
            }
        }
        self.answer(table, &changed);
        flow
    }

    fn look_for(&mut self, tables: Vec<String>, reply: oneshot::Sender<Looked>) {
        let tables = if tables.is_empty() {
            let active = |(_, slot): &(&String, &Slot)| {
                slot.resolved.as_ref().is_none_or(|resolved| resolved.catalog.is_some())
            };
            self.slots.iter().filter(active).map(|(table, _)| table.clone()).collect()
        } else {
            tables
        };
        let mut waiting = Waiting { outstanding: vec![], looked: Looked::default(), reply };
        for table in tables {
            if self.look(&table) {
                waiting.outstanding.push(table);
            } else {
                let reason = match self.slots.get(&table) {
                    Some(_) => "it is not loaded yet".to_owned(),
                    None => {
                        let known: Vec<&str> = self.slots.keys().map(String::as_str).collect();
                        format!("unknown table; this worker has {}", known.join(", "))
                    }
                };
                waiting.looked.failed.insert(table, reason);
            }
        }
        self.waiting.push(waiting);
        self.answer_complete();
    }

    fn answer(&mut self, table: &str, changed: &Result<bool, String>) {
        for waiting in &mut self.waiting {
            let Some(at) = waiting.outstanding.iter().position(|name| name == table) else {
                continue;
            };
            let table = waiting.outstanding.swap_remove(at);
            match changed {
                Ok(true) => drop(waiting.looked.changed.insert(table)),
                Ok(false) => drop(waiting.looked.unchanged.insert(table)),
                Err(error) => drop(waiting.looked.failed.insert(table, error.clone())),
            }
        }
        self.answer_complete();
    }

    fn answer_complete(&mut self) {
        for waiting in self.waiting.extract_if(.., |waiting| waiting.outstanding.is_empty()) {
            // Whoever asked may have gone.
            let _ = waiting.reply.send(waiting.looked);
        }
    }

    async fn tick(&mut self) -> Flow {
        let now = Instant::now();
        let due: Vec<String> = self
            .slots
            .iter()
            .filter(|(_, slot)| !slot.resolving && slot.resolve_again.is_some_and(|at| at <= now))
            .map(|(table, _)| table.clone())
            .collect();
        due.iter().for_each(|table| self.resolve(table));
        let due: Vec<String> = self
            .slots
            .iter()
            .filter(|(_, slot)| !slot.looking && slot.look_due.is_some_and(|at| at <= now))
            .map(|(table, _)| table.clone())
            .collect();
        for table in due {
            if !self.look(&table)
                && let Some(slot) = self.slots.get_mut(&table)
            {
                slot.look_due = None;
            }
        }
        if self.next_scrub.is_some_and(|at| at <= now) && !self.scrubbing {
            self.scrub();
        }
        let mut flow = Flow::Continue;
        let retry_due = self.failures.next_retry().is_some_and(|at| Instant::from_std(at) <= now);
        if retry_due && !self.loading {
            flow = self.wants_pass();
        }
        if self.next_reclaim_due() <= now {
            self.next_reclaim = now + self.shared.settings.reclaim_interval;
            if self.has_more_room().await {
                flow = self.wants_pass();
            }
        }
        flow
    }

    /// Frees what readers have let go; whether that makes room for what was left out.
    async fn has_more_room(&mut self) -> bool {
        let found = self
            .shared
            .with_store(|store| {
                let memory = store.reclaim()?;
                Ok::<_, stoa_shm::Error>((memory, store.capacity(&memory)?))
            })
            .await;
        match found {
            Ok((memory, capacity)) => {
                self.memory = memory;
                let room = capacity.saturating_sub(memory.retained_bytes);
                self.short_of.is_some_and(|before| room > before + self.shared.settings.segment_bytes() / 2)
            }
            Err(error) => {
                self.shared.problem("cache", Some(format!("memory cannot be reclaimed: {error}")));
                false
            }
        }
    }

    /// Has everything hashed, a few segments at a time, by a task.
    fn scrub(&mut self) {
        self.scrubbing = true;
        let shared = Arc::clone(&self.shared);
        self.events.jobs.spawn(async move {
            let mut damaged = 0;
            for segment in shared.with_store(|store| store.segments()).await {
                let report = shared.with_store(move |store| store.verify_segments(&[segment])).await;
                damaged += report.bad_chunks.len() + report.bad_catalogs.len();
                // A slow walk, so that loads and queries keep the memory's bandwidth.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Done::Scrubbed { damaged }
        });
    }

    async fn pin(&mut self, pinned: bool) {
        let problem = self
            .shared
            .with_store(move |store| {
                store.set_pinned(pinned);
                store.pin_problem().map(str::to_owned)
            })
            .await;
        self.shared.problem("pin", problem);
    }

    /// Tells everybody how things are.
    pub(crate) fn report(&mut self) {
        let mut failed: Vec<String> = Vec::new();
        let mut degraded = self.shared.has_problem("pin") || self.shared.has_problem("cache");
        let mut busy = self.loading || self.needs_pass && !self.slots.is_empty();
        let mut tables = BTreeMap::new();
        for (table, slot) in &self.slots {
            // A look may bring what was left out for an object that has changed.
            busy |= slot.resolving || slot.looking && slot.state.left_out.chunks > 0;
            degraded |= slot.state.error.is_some() || slot.state.left_out.chunks > 0;
            if let Some(error) = &slot.state.error {
                failed.push(format!("{table}: {error}"));
            }
            if let Some(error) = &slot.look_error {
                failed.push(format!("{table} cannot be looked at: {error}"));
            }
            if let Some((chunks, reason)) =
                slot.resolved.as_ref().and_then(|resolved| resolved.missing.as_ref())
            {
                failed.push(format!("{table}: {chunks} planned chunks are not in its files: {reason}"));
            }
            if slot.state.left_out.chunks > 0 {
                failed.push(format!(
                    "{table}: {} chunks are left out: {}",
                    slot.state.left_out.chunks,
                    slot.state.left_out.reason.as_deref().unwrap_or("no reason is known")
                ));
            }
            tables.insert(table.clone(), slot.state.clone());
        }
        self.shared.set_details(Details {
            generation: self.generation,
            chunks: self.chunks,
            looked_at_unix_ms: self
                .slots
                .iter()
                .map(|(table, slot)| (table.clone(), slot.looked_at_unix_ms))
                .collect(),
        });
        let holds = self.slots.values().any(|slot| {
            slot.resolved.as_ref().is_some_and(|resolved| resolved.catalog.is_some())
        });
        let mut problems = self.shared.problems();
        problems.extend(failed);
        let state = WorkerState {
            id: self.shared.settings.id.clone(),
            state: match (busy, degraded, holds) {
                (true, ..) => WorkerPhase::Loading,
                (_, true, _) => WorkerPhase::Degraded,
                (_, _, true) => WorkerPhase::Ready,
                _ => WorkerPhase::Idle,
            },
            tables,
            held_bytes: self.memory.total_bytes() - self.memory.retained_bytes,
            retained_bytes: self.memory.retained_bytes,
            capacity_bytes: self.shared.settings.capacity_bytes,
            problems,
        };
        self.shared.state.send_if_modified(|now| {
            let modified = *now != state;
            *now = state;
            modified
        });
    }

    /// When each table was last looked at, for readers on this host too.
    async fn tell_looks(&mut self) {
        let looks: BTreeMap<String, u64> = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.looked_at_unix_ms > 0)
            .map(|(table, slot)| (catalog_name(table), slot.looked_at_unix_ms))
            .collect();
        if looks == self.told_looks {
            return;
        }
        self.told_looks = looks.clone();
        let dir = self.shared.settings.cache_dir.clone();
        let written = tokio::task::spawn_blocking(move || looks::write(&dir, &looks)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(%error, "the times of the last looks cannot be written");
        }
    }
}
