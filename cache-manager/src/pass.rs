//! One pass: the difference between what the tables want and what memory holds, made good.
//!
//! ```text
//! gather wants ── decide ──┬─ tight: publish the smaller generation, reclaim, compact
//!                          └─ publish catalogs that readers should see at once
//!   fill: fetch, decode, append ── publish now and then ── …
//! last publication: the other catalogs, without the chunks that nobody wants ── reclaim, compact
//! ```
//!
//! A newer plan interrupts the fill; what is in flight then still arrives and is kept.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use stoa_layout::{Form, TableCatalog};
use stoa_metastore::PlanTarget;
use stoa_shm::{ChunkKey, MemoryReport};
use tokio::time::{Instant, sleep_until};

use crate::batch::{BATCH_BYTES_MAX, Batch, batches};
use crate::diff::{Decision, Want, decide, footprint, merge};
use crate::engine::{Engine, Flow, catalog_name};
use crate::events::Event;
use crate::failures::Remedy;
use crate::fill::{Fill, FillContext, FillLimits, Loaded};
use crate::metrics::add;
use crate::resolve::shows_at_once;
use crate::shared::jitter;
use crate::store::{Published, Stored};
use crate::tally::Tally;

/// How long an interrupted fill waits for what is in flight.
const DRAIN: Duration = Duration::from_secs(2);
/// A publication may take at most this share of a load's time.
const PUBLISH_SHARE: u32 = 10;

const NO_ROOM: &str =
    "no room: raise cache.size, or cache less; what is most wanted is held";

/// A table of the pass.
struct Table {
    name: String,
    target: PlanTarget,
    catalog_name: String,
    catalog: Option<Arc<TableCatalog>>,
}

/// A catalog to be published.
struct NewCatalog {
    name: String,
    catalog: Arc<TableCatalog>,
    bytes: Vec<u8>,
    at_once: bool,
}

/// What one pass works on.
struct Pass {
    tables: Vec<Table>,
    wants: Arc<Vec<Want>>,
    decision: Decision,
    tally: Tally,
    catalogs: Vec<NewCatalog>,
    room_bytes: u64,
    tight: bool,
    started: Instant,
    /// Spreads the retries of what this pass could not have.
    jitter: f64,
    /// Where in the wants each chunk is that is to be fetched.
    fetching: HashMap<ChunkKey, usize>,
    /// Tables whose files turned out to have changed.
    changed: HashSet<usize>,
}

/// How the fill ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Filled {
    Completely,
    Interrupted,
    Stopped,
}

impl Engine {
    /// Makes memory hold what the tables want, as far as it fits and can be had.
    pub(crate) async fn pass(&mut self) -> Flow {
        self.needs_pass = false;
        self.loading = true;
        self.report();
        let flow = match self.try_pass().await {
            Ok(flow) => {
                self.shared.problem("cache", None);
                flow
            }
            Err(error) => {
                let text = format!("the shared memory cannot be written: {error}");
                self.shared.problem("cache", Some(text));
                let again = Instant::now() + self.shared.settings.retry.0;
                self.loading = false;
                self.report();
                self.pause(again).await
            }
        };
        self.loading = false;
        self.report();
        flow
    }

    /// Waits before the next pass, but not for orders.
    async fn pause(&mut self, until: Instant) -> Flow {
        while Instant::now() < until {
            let event = self.events.next(until).await;
            if self.handle(event).await == Flow::Stop {
                return Flow::Stop;
            }
        }
        self.needs_pass = true;
        Flow::Continue
    }

    async fn try_pass(&mut self) -> stoa_shm::Result<Flow> {
        let mut pass = self.prepare().await?;
        self.count(&pass);
        self.begin(&mut pass).await?;
        let filled = self.fill(&mut pass).await?;
        if filled == Filled::Completely {
            self.complete(&mut pass).await?;
        } else {
            let published = self
                .shared
                .with_store(|store| {
                    store.seal()?;
                    store.publish()
                })
                .await?;
            self.take_published(&mut pass, published);
        }
        self.count(&pass);
        for table in pass.changed {
            self.look(&pass.tables[table].name);
        }
        Ok(if filled == Filled::Stopped { Flow::Stop } else { Flow::Continue })
    }

    /// Gathers what is wanted and decides about every chunk.
    async fn prepare(&mut self) -> stoa_shm::Result<Pass> {
        let started = Instant::now();
        let mut tables = Vec::new();
        let mut lists = Vec::new();
        for (name, slot) in &self.slots {
            let Some(resolved) = &slot.resolved else { continue };
            let list = resolved.wants.iter().cloned();
            lists.push(list.map(|want| Want { table: tables.len(), ..want }).collect());
            tables.push(Table {
                name: name.clone(),
                target: resolved.target,
                catalog_name: catalog_name(name),
                catalog: resolved.catalog.clone(),
            });
        }
        let mut pending = Vec::new();
        for table in &tables {
            let shown = self.shown.get(&table.catalog_name);
            let Some(catalog) = table.catalog.clone() else { continue };
            if !shown.is_some_and(|shown| Arc::ptr_eq(shown, &catalog)) {
                let at_once = shows_at_once(shown.map(Arc::as_ref), &catalog);
                pending.push((table.catalog_name.clone(), catalog, at_once));
            }
        }
        let gone: HashSet<String> = tables
            .iter()
            .filter(|table| table.catalog.is_none())
            .map(|table| table.catalog_name.clone())
            .collect();
        let protected = self.protected(&tables);
        let headroom = self.shared.settings.headroom_bytes();
        let mut known = std::mem::take(&mut self.known);
        known.blocked = self.failures.blocked(started.into_std()).cloned().collect();
        let decided = self.shared.with_store(move |store| {
            let catalogs: Vec<NewCatalog> = pending
                .into_iter()
                .map(|(name, catalog, at_once)| {
                    let bytes = catalog.encode();
                    NewCatalog { name, catalog, bytes, at_once }
                })
                .collect();
            let wants = merge(lists);
            let wanted: HashSet<&ChunkKey> = wants.iter().map(|want| &want.key).collect();
            known.sizes.retain(|key, _| wanted.contains(key));
            known.parquet_only.retain(|key| wanted.contains(key));
            let result = decide_in(store, &wants, &known, &catalogs, &gone, headroom, &protected);
            drop(wanted);
            (result, wants, catalogs, known)
        });
        let (result, wants, catalogs, known) = decided.await;
        self.known = known;
        let Decided { decision, sizes, room_bytes, tight, memory } = result?;
        self.memory = memory;
        let blocked_reason = |at: usize| {
            self.failures.reason(&wants[at].key).unwrap_or("it failed before").to_owned()
        };
        let size = |at: usize| sizes.get(&at).copied().unwrap_or(0);
        let tally =
            Tally::new(tables.len(), &wants, &decision, size, NO_ROOM, blocked_reason);
        let fetching = decision.fetch.iter().map(|at| (wants[*at].key.clone(), *at)).collect();
        let wanted: HashSet<&ChunkKey> = if self.failures.is_empty() {
            HashSet::new()
        } else {
            wants.iter().map(|want| &want.key).collect()
        };
        self.failures.retain(|key| wanted.contains(key));
        add(&self.shared.counters.chunks_kept, decision.keep.len() as u64);
        tracing::info!(
            keep = decision.keep.len(),
            fetch = decision.fetch.len(),
            drop = decision.drop.len(),
            left_out = decision.left_out.len(),
            blocked = decision.blocked.len(),
            tight,
            "pass"
        );
        Ok(Pass {
            tables,
            wants: Arc::new(wants),
            decision,
            tally,
            catalogs,
            room_bytes,
            tight,
            started,
            jitter: jitter(),
            fetching,
            changed: HashSet::new(),
        })
    }

    /// Says which unplanned chunks stay: those of tables whose plan is not known (yet).
    fn protected(&self, tables: &[Table]) -> impl Fn(&ChunkKey) -> bool + Send + 'static + use<> {
        let settled: HashSet<&str> =
            tables.iter().map(|table| table.catalog_name.as_str()).collect();
        let files: HashSet<Vec<u8>> = self
            .shown
            .iter()
            .filter(|(name, _)| !settled.contains(name.as_str()))
            .flat_map(|(_, catalog)| catalog.files.iter().map(|file| file.identity.to_key()))
            .collect();
        // A table that was never published may own any chunk.
        let unknown = self.slots.iter().any(|(name, slot)| {
            slot.resolved.is_none() && !self.shown.contains_key(&catalog_name(name))
        });
        move |key: &ChunkKey| unknown || files.contains(&*key.file)
    }

    /// Before the fill: makes room where memory is short, and shows what should be seen at once.
    async fn begin(&mut self, pass: &mut Pass) -> stoa_shm::Result<()> {
        let tight = pass.tight;
        let early: Vec<NewCatalog> = if tight {
            // Chunks of the old catalogs go now, so the old catalogs are worth nothing.
            std::mem::take(&mut pass.catalogs)
        } else {
            pass.catalogs.extract_if(.., |catalog| catalog.at_once).collect()
        };
        let gone = self.gone(pass);
        let drop = if tight { std::mem::take(&mut pass.decision.drop) } else { vec![] };
        let expected = pass.decision.fetch_bytes;
        let (published, early, late, compacted) = self
            .shared
            .with_store(move |store| {
                gone.iter().for_each(|name| store.drop_catalog(name));
                store.drop_chunks(&drop);
                if tight {
                    // The smaller generation first: what it frees is what the rest is made of.
                    store.publish()?;
                }
                let (mut written, mut unwritten) = (Vec::new(), Vec::new());
                for catalog in early {
                    if store.write_catalog(&catalog.name, &catalog.bytes)? {
                        written.push(catalog);
                    } else {
                        unwritten.push(catalog);
                    }
                }
                let mut published = store.publish()?;
                let mut compacted = 0;
                let total = published.memory.total_bytes();
                let short = total.saturating_add(expected) > store.capacity(&published.memory)?;
                if tight && short && published.memory.dead_bytes_in_live > 0 {
                    compacted = store.compact(true)?;
                    published = store.publish()?;
                }
                Ok::<_, stoa_shm::Error>((published, written, unwritten, compacted))
            })
            .await?;
        add(&self.shared.counters.segments_compacted, compacted as u64);
        self.show(&early, pass);
        pass.catalogs.extend(late);
        self.take_published(pass, published);
        Ok(())
    }

    /// Names of the catalogs of tables that are to be dropped.
    fn gone(&self, pass: &Pass) -> Vec<String> {
        let gone = pass.tables.iter().filter(|table| table.catalog.is_none());
        gone.map(|table| table.catalog_name.clone()).collect()
    }

    /// Remembers which catalogs are published.
    fn show(&mut self, written: &[NewCatalog], pass: &Pass) {
        for name in self.gone(pass) {
            self.shown.remove(&name);
        }
        for catalog in written {
            self.shown.insert(catalog.name.clone(), Arc::clone(&catalog.catalog));
        }
    }

    /// Loads what is missing, while events go on being handled.
    async fn fill(&mut self, pass: &mut Pass) -> stoa_shm::Result<Filled> {
        if pass.decision.fetch.is_empty() {
            return Ok(Filled::Completely);
        }
        let settings = &self.shared.settings;
        let limits = FillLimits {
            concurrency: settings.fill_concurrency,
            decoders: settings.decoders(),
            memory_bytes: settings.fill_memory_bytes,
        };
        let bytes_max = BATCH_BYTES_MAX.min(settings.fill_memory_bytes / 8).max(1);
        let batches = Arc::new(batches(&pass.wants, &pass.decision.fetch, bytes_max));
        let context = FillContext {
            origin: self.sources.origin.clone(),
            wants: Arc::clone(&pass.wants),
            catalogs: pass.tables.iter().map(|table| table.catalog.clone()).collect(),
            limits,
        };
        let mut fill = Fill::start(context, Arc::clone(&batches));
        let mut expected = pass.decision.fetch_bytes;
        let mut next_publication = Instant::now() + settings.publish_interval;
        let mut drain: Option<Instant> = None;
        enum Step {
            Event(Event),
            Loaded(Option<Loaded>),
            Drained,
        }
        loop {
            let deadline = self.deadline();
            let drained = drain.unwrap_or_else(Instant::now);
            let step = tokio::select! {
                biased;
                event = self.events.next(deadline), if drain.is_none() => Step::Event(event),
                () = sleep_until(drained), if drain.is_some() => Step::Drained,
                loaded = fill.next() => Step::Loaded(loaded),
            };
            match step {
                Step::Event(event) => match self.handle(event).await {
                    Flow::Continue => {}
                    Flow::Interrupt => {
                        fill.halt();
                        drain = Some(Instant::now() + DRAIN);
                    }
                    Flow::Stop => return Ok(Filled::Stopped),
                },
                Step::Drained => return Ok(Filled::Interrupted),
                Step::Loaded(None) if drain.is_some() => return Ok(Filled::Interrupted),
                Step::Loaded(None) => return Ok(Filled::Completely),
                Step::Loaded(Some(loaded)) => {
                    let batch = &batches[loaded.batch];
                    let publish = Instant::now() >= next_publication;
                    let published = self.append(pass, batch, loaded, expected, publish).await?;
                    expected = expected.saturating_sub(batch_footprint(&pass.wants, batch));
                    if let Some(published) = published {
                        let pause = settings_pause(&self.shared.settings, published.took);
                        next_publication = Instant::now() + pause;
                        self.take_published(pass, published);
                    }
                    self.count(pass);
                    self.report();
                }
            }
        }
    }

    /// Appends one batch to the segments and takes notice of what failed.
    async fn append(
        &mut self,
        pass: &mut Pass,
        batch: &Batch,
        loaded: Loaded,
        expected: u64,
        publish: bool,
    ) -> stoa_shm::Result<Option<Published>> {
        let counters = &self.shared.counters;
        add(&counters.fetched_bytes, loaded.fetched_bytes);
        let mut good = Vec::with_capacity(loaded.chunks.len());
        for (at, chunk) in loaded.chunks {
            match chunk {
                Ok(chunk) => {
                    if let Some(reason) = &chunk.fallback {
                        tracing::debug!(chunk = %pass.wants[at].key.readable(), reason, "kept as parquet");
                        add(&counters.chunks_fallen_back, 1);
                        if pass.wants[at].form != Form::Parquet {
                            self.known.parquet_only.insert(pass.wants[at].key.clone());
                        }
                    }
                    good.push((at, chunk));
                }
                Err(failed) => {
                    let want = &pass.wants[at];
                    if failed.remedy == Remedy::Refresh {
                        pass.changed.insert(batch.table);
                    }
                    fail(&mut self.failures, pass, at, want.clone(), failed.remedy, failed.reason);
                    add(&self.shared.counters.chunks_failed, 1);
                }
            }
        }
        let wants = Arc::clone(&pass.wants);
        let (stored, published) = self
            .shared
            .with_store(move |store| {
                let mut stored = Vec::with_capacity(good.len());
                let mut expected = expected;
                for (at, chunk) in &good {
                    let outcome = store.append(&wants[*at].key, chunk, expected)?;
                    expected = expected.saturating_sub(footprint(chunk.bytes()));
                    stored.push((*at, chunk.bytes(), outcome));
                }
                let publish = publish && store.has_fresh();
                let published = if publish { Some(store.publish()?) } else { None };
                Ok::<_, stoa_shm::Error>((stored, published))
            })
            .await?;
        let counters = &self.shared.counters;
        for (at, bytes, outcome) in stored {
            let want = &pass.wants[at];
            match outcome {
                Stored::Yes => {
                    add(&counters.chunks_fetched, 1);
                    add(&counters.stored_bytes, bytes);
                    self.failures.forget(&want.key);
                    pass.tally.fetched(want);
                    for table in std::iter::once(&want.table).chain(&want.also) {
                        if let Some(slot) = self.slots.get_mut(&pass.tables[*table].name) {
                            slot.state.fetched_chunks += 1;
                        }
                    }
                }
                Stored::NoRoom => {
                    // Larger than estimated: now it is known, and the next pass decides with that.
                    self.known.sizes.insert(want.key.clone(), bytes);
                    fail(
                        &mut self.failures,
                        pass,
                        at,
                        want.clone(),
                        Remedy::Retry,
                        NO_ROOM.to_owned(),
                    );
                }
            }
        }
        drop(loaded.memory);
        Ok(published)
    }

    /// The last publication of a pass: all that is wanted and could be had, and nothing else.
    async fn complete(&mut self, pass: &mut Pass) -> stoa_shm::Result<()> {
        let late = std::mem::take(&mut pass.catalogs);
        let drop = std::mem::take(&mut pass.decision.drop);
        let (published, written, unwritten, compacted) = self
            .shared
            .with_store(move |store| {
                store.seal()?;
                store.drop_chunks(&drop);
                let (mut written, mut unwritten) = (Vec::new(), Vec::new());
                for catalog in late {
                    if store.write_catalog(&catalog.name, &catalog.bytes)? {
                        written.push(catalog);
                    } else {
                        unwritten.push(catalog.name);
                    }
                }
                let mut published = store.publish()?;
                published.memory = store.tidy()?;
                let compacted = store.compact(false)?;
                if compacted > 0 {
                    published.memory = store.tidy()?;
                }
                Ok::<_, stoa_shm::Error>((published, written, unwritten, compacted))
            })
            .await?;
        add(&self.shared.counters.segments_compacted, compacted as u64);
        self.show(&written, pass);
        self.take_published(pass, published);
        let problem = (!unwritten.is_empty()).then(|| {
            format!("no room for the catalog of {}; raise cache.size", unwritten.join(", "))
        });
        self.shared.problem("catalogs", problem);
        let fetched = !pass.decision.fetch.is_empty();
        let mut short = !pass.decision.left_out.is_empty() || !unwritten.is_empty();
        for (at, table) in pass.tables.iter().enumerate() {
            let tally = pass.tally.table(at);
            short |= tally.left_out > 0;
            let Some(slot) = self.slots.get_mut(&table.name) else { continue };
            if tally.is_complete() && !unwritten.contains(&table.catalog_name) {
                slot.state.current = Some(table.target);
            }
        }
        self.short_of = short.then_some(pass.room_bytes);
        if fetched {
            self.shared.counters.loaded(pass.started.elapsed());
            tracing::info!(
                chunks = self.shared.counters.chunks_fetched.load(Ordering::Relaxed),
                seconds = pass.started.elapsed().as_secs_f64(),
                generation = self.generation,
                "loaded"
            );
        }
        Ok(())
    }

    /// Takes notice of a new generation.
    fn take_published(&mut self, pass: &mut Pass, published: Published) {
        for (key, bytes) in &published.fresh {
            if let Some(&at) = pass.fetching.get(key) {
                pass.tally.published(&pass.wants[at], at, *bytes);
            }
        }
        self.memory = published.memory;
        self.generation = published.generation;
        self.chunks = published.chunks;
    }

    /// Brings the tables' states up to date.
    fn count(&mut self, pass: &Pass) {
        for (at, table) in pass.tables.iter().enumerate() {
            let tally = pass.tally.table(at);
            let Some(slot) = self.slots.get_mut(&table.name) else { continue };
            // A newer plan may have come meanwhile: its pass counts for it.
            if slot.resolved.as_ref().is_none_or(|resolved| resolved.target != table.target) {
                continue;
            }
            if slot.counted != Some(table.target) {
                slot.counted = Some(table.target);
                slot.state.kept_chunks = tally.kept;
                slot.state.fetched_chunks = 0;
            }
            tally.report(&mut slot.state);
            slot.state.held_bytes = tally.bytes_done;
        }
    }
}

/// Takes notice that a chunk could not be had.
fn fail(
    failures: &mut crate::failures::Failures,
    pass: &mut Pass,
    at: usize,
    want: Want,
    remedy: Remedy,
    reason: String,
) {
    tracing::debug!(chunk = %want.key.readable(), reason, "chunk left out");
    pass.tally.left_out(&want, at, &reason);
    failures.record(want.key, remedy, reason, std::time::Instant::now(), pass.jitter);
}

/// What a batch is expected to take from the budget.
fn batch_footprint(wants: &[Want], batch: &Batch) -> u64 {
    batch.wants.iter().map(|at| footprint(wants[*at].bytes)).sum()
}

/// The time until the next publication: what is set, or more where publishing is slow.
fn settings_pause(settings: &crate::settings::WorkerSettings, took: Duration) -> Duration {
    settings.publish_interval.max(took * PUBLISH_SHARE)
}

/// What was decided with the store at hand.
struct Decided {
    decision: Decision,
    /// Bytes of the kept chunks, by position in the wants.
    sizes: HashMap<usize, u64>,
    /// What may be held in all beside what readers retain.
    room_bytes: u64,
    tight: bool,
    memory: MemoryReport,
}

fn decide_in(
    store: &mut crate::store::Store,
    wants: &[Want],
    known: &crate::diff::Known,
    catalogs: &[NewCatalog],
    gone: &HashSet<String>,
    headroom_bytes: u64,
    protected: &dyn Fn(&ChunkKey) -> bool,
) -> stoa_shm::Result<Decided> {
    store.seal()?;
    let memory = store.reclaim()?;
    let capacity = store.capacity(&memory)?;
    let new_catalog_bytes: u64 = catalogs.iter().map(|catalog| footprint(catalog.bytes.len() as u64)).sum();
    let staying: u64 = store
        .catalogs()
        .iter()
        .filter(|(name, _)| {
            !gone.contains(*name) && !catalogs.iter().any(|catalog| catalog.name == **name)
        })
        .map(|(_, location)| footprint(location.length))
        .sum();
    let fixed = memory.retained_bytes.saturating_add(new_catalog_bytes).saturating_add(staying);
    let available = capacity.saturating_sub(fixed);
    let held_bytes: u64 = store.held().values().map(|at| footprint(at.length)).sum();
    // What is held already may fill the head-room too: dropping it would win nothing.
    let budget_bytes = available.saturating_sub(headroom_bytes).max(held_bytes.min(available));
    let decision = decide(wants, store.held(), known, budget_bytes, protected);
    let to_come = decision.fetch_bytes.saturating_add(new_catalog_bytes);
    let tight = memory.total_bytes().saturating_add(to_come)
        > capacity.saturating_sub(headroom_bytes / 2);
    let sizes = decision
        .keep
        .iter()
        .filter_map(|at| Some((*at, store.held().get(&wants[*at].key)?.length)))
        .collect();
    let room_bytes = capacity.saturating_sub(memory.retained_bytes);
    Ok(Decided { decision, sizes, room_bytes, tight, memory })
}
