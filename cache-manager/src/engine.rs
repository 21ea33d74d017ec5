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
use stoa_metastore::{CacheVersion, PlanTarget, TableState};
use stoa_shm::MemoryReport;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};
use twox_hash::XxHash3_64;

use crate::diff::Known;
use crate::events::{Command, Done, Event, Events, Looked};
use crate::failures::Failures;
use crate::resolve::{Resolved, Sources};
use crate::settings::segment_bytes;
use crate::shared::{Shared, unix_ms};
use crate::targets::Targets;
use crate::walk::{next_walk, walk};

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
    pub(crate) resolving: bool,
    pub(crate) attempts: u32,
    pub(crate) resolve_again: Option<Instant>,
    pub(crate) look_due: Option<Instant>,
    pub(crate) looking: bool,
    /// The target that is carried out as far as can be, if the look that is due finds no other
    /// files.
    pub(crate) after_look: Option<PlanTarget>,
    /// Why its catalog is not published.
    pub(crate) unshown: Option<String>,
    /// Why the last look failed.
    pub(crate) look_error: Option<String>,
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
pub(crate) struct Waiting {
    pub(crate) outstanding: Vec<String>,
    pub(crate) looked: Looked,
    pub(crate) reply: oneshot::Sender<Looked>,
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
    pub(crate) gather_since: Instant,
    /// Whether the metastore has told the plans in force at least once.
    pub(crate) seen_plans: bool,
    /// Whether anything was found that the last worker has left to do, or that has come since.
    pub(crate) found_work: bool,
    pub(crate) loading: bool,
    /// Whether a pass is deciding what it loads.
    pub(crate) preparing: bool,
    /// How often in a row a pass was decided again for sizes that came to be known.
    pub(crate) decided_again: u32,
    /// When to make up for chunks that the last pass stored and lost.
    pub(crate) repeat_at: Option<Instant>,
    /// What the last pass could hold in all, if it left something out for want of room.
    pub(crate) short_of: Option<u64>,
    pub(crate) memory: MemoryReport,
    pub(crate) next_reclaim: Instant,
    pub(crate) next_scrub: Option<Instant>,
    pub(crate) scrubbing: bool,
    pub(crate) waiting: Vec<Waiting>,
    /// What the metastore said last about pinning.
    pub(crate) pin_wanted: Option<bool>,
    pub(crate) told_looks: BTreeMap<String, u64>,
    /// Whether it was said that they cannot be written.
    pub(crate) looks_unwritten: bool,
    pub(crate) generation: u64,
    pub(crate) chunks: u64,
    /// When to see whether the directory is still there.
    pub(crate) next_inspection: Instant,
    /// Bytes of the tables in memory that no plan speaks of, by their name in the index.
    pub(crate) unplanned: BTreeMap<String, u64>,
}

/// Names a set of plans as worker `id` sees them; never 0.
fn digest<'a>(id: &str, plans: impl Iterator<Item = &'a CacheVersion>) -> u64 {
    let mut lines: Vec<String> = plans
        .map(|plan| {
            let part = plan.parts.get(id).map_or("", |part| &part.digest);
            let (number, version) = (plan.plan, &plan.table_version);
            format!("{version} {number} {} {part}", plan.unloaded)
        })
        .collect();
    lines.sort_unstable();
    XxHash3_64::oneshot(lines.join("\n").as_bytes()).max(1)
}

fn decode_catalogs(catalogs: Vec<(String, Bytes)>) -> Vec<(String, Arc<TableCatalog>)> {
    let decode = |(name, bytes): (String, Bytes)| match TableCatalog::decode(&bytes) {
        Ok(catalog) => Some((name, Arc::new(catalog))),
        Err(error) => {
            tracing::warn!(catalog = name, %error, "the published catalog is made anew");
            None
        }
    };
    catalogs.into_iter().filter_map(decode).collect()
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
            found_work: false,
            loading: false,
            preparing: false,
            decided_again: 0,
            repeat_at: None,
            short_of: None,
            memory: MemoryReport::default(),
            next_reclaim: now + shared.settings.reclaim_interval,
            next_inspection: now + shared.settings.reclaim_interval,
            unplanned: BTreeMap::new(),
            next_scrub: None,
            scrubbing: false,
            waiting: Vec::new(),
            pin_wanted: None,
            told_looks: BTreeMap::new(),
            looks_unwritten: false,
            generation: 0,
            chunks: 0,
            shared,
        }
    }

    /// Runs until it is told to stop.
    pub(crate) async fn run(mut self) {
        if self.begin_work().await != Flow::Stop {
            self.work().await;
        }
        if self.shared.is_open() {
            self.hand_over().await;
        }
    }

    /// Waits until there is something to do, takes stock of the directory, and takes notice of what
    /// has happened meanwhile.
    async fn begin_work(&mut self) -> Flow {
        let Some(happened) = self.rest().await else {
            return Flow::Stop;
        };
        while let Err(error) = self.shared.open_store().await {
            let text = format!("the cache directory cannot be taken over: {error}");
            self.shared.problem("cache", Some(text));
            self.report();
            let again = Instant::now() + self.shared.settings.retry.0;
            tokio::select! {
                _ = self.events.stop.wait_for(|stop| *stop) => return Flow::Stop,
                () = sleep_until(again) => {}
            }
        }
        self.shared.problem("cache", None);
        if self.adopt_catalogs().await == Flow::Stop {
            return Flow::Stop;
        }
        for event in happened {
            if self.handle(event).await == Flow::Stop {
                return Flow::Stop;
            }
        }
        Flow::Continue
    }

    /// Leaves the directory alone as long as there is nothing to do: where the plans are those that
    /// the last worker has carried out, and nobody asks for anything, for `takeover_delay`. Returns
    /// what has happened meanwhile; `None` when told to stop.
    async fn rest(&mut self) -> Option<Vec<Event>> {
        let mut happened = Vec::new();
        let deadline = Instant::now() + self.shared.settings.takeover_delay;
        let carried_out = self.shared.left.map_or(0, |left| left.carried_out);
        while !self.shared.is_open() {
            let event = tokio::select! {
                event = self.events.next(deadline) => event,
                () = self.shared.wanted() => break,
            };
            let goes_on = match &event {
                Event::Stop => return None,
                Event::Plans(plans) => {
                    digest(&self.shared.settings.id, plans.iter()) == carried_out
                }
                Event::Pinned(pinned) => !pinned,
                Event::Metastore(_) => true,
                Event::Command(_) | Event::Done(_) | Event::Tick => false,
            };
            happened.push(event);
            if !goes_on {
                break;
            }
        }
        Some(happened)
    }

    async fn work(&mut self) {
        if self.shared.settings.pin {
            self.shared.set_pinned(true).await;
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

    /// The catalogs that the process before has published. Decoding them may take long: whoever
    /// stops the worker does not wait for it.
    pub(crate) async fn adopt_catalogs(&mut self) -> Flow {
        let found = self.shared.with_store(|store| {
            let names: Vec<String> = store.catalogs().keys().cloned().collect();
            // Copied, because a catalog that lay in its segment would keep it from being freed.
            let bytes = |name: String| {
                let bytes = Bytes::copy_from_slice(&store.read_catalog(&name)?);
                Some((name, bytes))
            };
            let catalogs: Vec<_> = names.into_iter().filter_map(bytes).collect();
            let counts = (store.generation(), store.held().len() as u64);
            let memory = store.memory().unwrap_or_default();
            (catalogs, memory, counts, store.left())
        });
        let (catalogs, memory, counts, left) = found.await;
        (self.generation, self.chunks) = counts;
        self.memory = memory;
        let nothing_there = self.chunks == 0 && catalogs.is_empty();
        self.next_scrub = self.shared.settings.scrub_interval.map(|interval| {
            let wait = match nothing_there {
                // All that is to come is verified as it is sealed.
                true => interval,
                false => next_walk(left.as_ref(), interval, unix_ms()),
            };
            Instant::now() + wait
        });
        let shared = Arc::clone(&self.shared);
        let decoded = shared.on_background(move || decode_catalogs(catalogs));
        let decoded = tokio::select! {
            biased;
            _ = self.events.stop.wait_for(|stop| *stop) => return Flow::Stop,
            decoded = decoded => decoded,
        };
        self.shown.extend(decoded);
        self.weigh_unplanned().await;
        Flow::Continue
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
            due(Some(self.next_inspection));
            due(self.failures.next_retry().map(Instant::from_std));
            due(self.repeat_at);
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
                    self.shared
                        .set_pinned(pinned || self.shared.settings.pin)
                        .await;
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

    pub(crate) fn wants_pass(&mut self) -> Flow {
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
        self.shared
            .problem("plans", (!problems.is_empty()).then_some(problems));
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

    fn finish(&mut self, done: Done) -> Flow {
        match done {
            Done::Resolved {
                table,
                target,
                result,
            } => self.resolved(&table, target, result),
            Done::Looked {
                table,
                at_unix_ms,
                result,
            } => self.looked(&table, at_unix_ms, result),
            Done::Scrubbed { damaged } => {
                self.scrubbing = false;
                let interval = self.shared.settings.scrub_interval.unwrap_or(IDLE);
                self.next_scrub = Some(Instant::now() + interval);
                if damaged > 0 {
                    self.wants_pass()
                } else {
                    Flow::Continue
                }
            }
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
        let retry_due = self
            .failures
            .next_retry()
            .is_some_and(|at| Instant::from_std(at) <= now);
        let repeat_due = self.repeat_at.is_some_and(|at| at <= now);
        if (retry_due || repeat_due) && !self.loading {
            flow = self.wants_pass();
        }
        if self.next_inspection <= now && !self.loading {
            self.next_inspection = now + self.shared.settings.reclaim_interval;
            match self.look_after_directory().await {
                Flow::Continue => {}
                changed => flow = changed,
            }
        }
        if self.next_reclaim_due() <= now {
            self.next_reclaim = now + self.shared.settings.reclaim_interval;
            if self.has_more_room().await {
                self.decided_again = 0;
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
                self.short_of
                    .is_some_and(|before| room > before + segment_bytes(capacity) / 2)
            }
            Err(error) => {
                self.shared.problem(
                    "cache",
                    Some(format!("memory cannot be reclaimed: {error}")),
                );
                false
            }
        }
    }

    /// Has everything hashed by and by, by a task.
    fn scrub(&mut self) {
        self.scrubbing = true;
        let shared = Arc::clone(&self.shared);
        let failed = Done::Scrubbed { damaged: 0 };
        self.events.jobs.spawn(failed, async move {
            let damaged = walk(&shared).await;
            Done::Scrubbed { damaged }
        });
    }

    /// Leaves word to the next worker of the directory.
    async fn hand_over(&mut self) {
        let plans = self.targets.iter().map(|(_, _, plan)| plan);
        let digest = digest(&self.shared.settings.id, plans);
        let said = self.shared.left.map_or(0, |left| left.carried_out);
        // One that is stopped before it has looked through everything has not disproved what the
        // last one has said of the same plans.
        let still_holds = !self.found_work && (!self.seen_plans || digest == said);
        let carried_out = match (self.has_nothing_to_do(), still_holds) {
            (true, _) => digest,
            (false, true) => said,
            (false, false) => 0,
        };
        self.shared
            .with_store(move |store| store.end(carried_out))
            .await;
    }

    /// Whether all plans are carried out, and nothing is left out, failed or due again.
    fn has_nothing_to_do(&self) -> bool {
        let open = self.needs_pass || self.repeat_at.is_some() || self.short_of.is_some();
        let done = |slot: &Slot| {
            let state = &slot.state;
            state.current == Some(slot.target)
                && state.left_out.chunks == 0
                && state.error.is_none()
                && slot.unshown.is_none()
                && slot.after_look.is_none()
        };
        self.seen_plans && !open && self.failures.is_empty() && self.slots.values().all(done)
    }
}
