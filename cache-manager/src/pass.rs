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

use stoa_layout::TableCatalog;
use stoa_metastore::PlanTarget;
use stoa_shm::ChunkKey;
use tokio::time::Instant;

use crate::diff::{Decision, Want};
use crate::engine::{Engine, Flow};
use crate::load::Filled;
use crate::metrics::add;
use crate::resolve::Rivals;
use crate::store::Published;
use crate::tally::Tally;

const NO_ROOM_FOR_CATALOG: &str = "no room for its catalog, so that queries see nothing of it";
/// So often in a row a pass is decided again because chunks turned out larger than estimated. The
/// first time nearly all sizes are known; what still has no room then is left out.
const DECIDED_AGAIN_MAX: u32 = 3;

/// A table of the pass.
pub(crate) struct Table {
    pub(crate) name: String,
    pub(crate) target: PlanTarget,
    pub(crate) catalog_name: String,
    pub(crate) catalog: Option<Arc<TableCatalog>>,
    pub(crate) rivals: Arc<Rivals>,
}

/// A catalog to be published.
pub(crate) struct NewCatalog {
    pub(crate) name: String,
    pub(crate) catalog: Arc<TableCatalog>,
    pub(crate) bytes: Vec<u8>,
    pub(crate) at_once: bool,
}

/// What one pass works on.
pub(crate) struct Pass {
    pub(crate) tables: Vec<Table>,
    pub(crate) wants: Arc<Vec<Want>>,
    pub(crate) decision: Decision,
    pub(crate) tally: Tally,
    pub(crate) catalogs: Vec<NewCatalog>,
    pub(crate) room_bytes: u64,
    pub(crate) tight: bool,
    pub(crate) started: Instant,
    /// Spreads the retries of what this pass could not have.
    pub(crate) jitter: f64,
    /// Where in the wants each chunk is that is to be fetched.
    pub(crate) fetching: HashMap<ChunkKey, usize>,
    /// Tables whose files turned out to have changed.
    pub(crate) changed: HashSet<usize>,
    /// Whether a chunk that was fetched had no room after all.
    pub(crate) overflowed: bool,
    /// Why what is left out has no room, and what to do about it.
    pub(crate) no_room: String,
    /// What the chunks that were stored have taken of the budget.
    pub(crate) encoded_bytes: u64,
}

impl Pass {
    /// Whether what was fetched takes so much less than it was expected to that there may be room
    /// for what was left out.
    fn took_less(&self) -> bool {
        self.encoded_bytes < self.decision.fetch_bytes / 10 * 9
    }
}

impl Engine {
    /// Makes memory hold what the tables want, as far as it fits and can be had.
    pub(crate) async fn pass(&mut self) -> Flow {
        self.look_after_directory().await;
        self.needs_pass = false;
        self.repeat_at = None;
        self.loading = true;
        self.preparing = true;
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
        self.preparing = false;
        self.weigh_unplanned().await;
        self.shared.board.end();
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
        let fetch = pass.decision.fetch.iter();
        self.shared
            .board
            .begin(fetch.map(|at| pass.wants[*at].key.clone()));
        self.preparing = false;
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
        Ok(if filled == Filled::Stopped {
            Flow::Stop
        } else {
            Flow::Continue
        })
    }

    /// Before the fill: makes room where memory is short, and shows what should be seen at once.
    async fn begin(&mut self, pass: &mut Pass) -> stoa_shm::Result<()> {
        let tight = pass.tight;
        let early: Vec<NewCatalog> = if tight {
            // Chunks of the old catalogs go now, so the old catalogs are worth nothing.
            std::mem::take(&mut pass.catalogs)
        } else {
            pass.catalogs
                .extract_if(.., |catalog| catalog.at_once)
                .collect()
        };
        let gone = self.gone(pass);
        let drop = if tight {
            std::mem::take(&mut pass.decision.drop)
        } else {
            vec![]
        };
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
            self.shown
                .insert(catalog.name.clone(), Arc::clone(&catalog.catalog));
        }
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
            format!(
                "no room for the catalog of {}: {}",
                unwritten.join(", "),
                pass.no_room
            )
        });
        self.shared.problem("catalogs", problem);
        let fetched = !pass.decision.fetch.is_empty();
        let mut short = !pass.decision.left_out.is_empty() || !unwritten.is_empty();
        // With the sizes that are known now, what is wanted less makes room for what is wanted more.
        let learned = pass.overflowed
            || fetched && !unwritten.is_empty()
            || fetched && !pass.decision.left_out.is_empty() && pass.took_less();
        let again = learned && self.decided_again < DECIDED_AGAIN_MAX;
        if again {
            self.decided_again += 1;
            self.wants_pass();
        } else if !learned {
            self.decided_again = 0;
        }
        let retried = self.retried(pass);
        // Stored, and then not published: as when a segment could not be sealed.
        let mut lost = false;
        for (at, table) in pass.tables.iter().enumerate() {
            let tally = pass.tally.table(at);
            short |= tally.left_out > 0;
            lost |= !tally.is_settled() && !again;
            let Some(slot) = self.slots.get_mut(&table.name) else {
                continue;
            };
            let shown = !unwritten.contains(&table.catalog_name);
            slot.unshown = (!shown).then(|| format!("{NO_ROOM_FOR_CATALOG}: {}", pass.no_room));
            // What is left out for good does not keep the plan from being carried out.
            let all_it_can = tally.is_settled() && !retried.contains(&at) && !again;
            slot.after_look = None;
            if tally.is_complete() && shown || all_it_can && !pass.changed.contains(&at) {
                slot.state.current = Some(table.target);
            } else if all_it_can {
                slot.after_look = Some(table.target);
            }
        }
        self.short_of = short.then_some(pass.room_bytes);
        self.repeat_at = lost.then(|| Instant::now() + self.shared.settings.retry.0);
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

    /// The tables that chunks are missing of which are tried again by and by.
    fn retried(&self, pass: &Pass) -> HashSet<usize> {
        if self.failures.is_empty() {
            return HashSet::new();
        }
        let wants = pass.wants.iter();
        let retried = wants.filter(|want| self.failures.is_retried(&want.key));
        retried
            .flat_map(|want| std::iter::once(want.table).chain(want.also.iter().copied()))
            .collect()
    }

    /// Takes notice of a new generation.
    pub(crate) fn take_published(&mut self, pass: &mut Pass, published: Published) {
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
    pub(crate) fn count(&mut self, pass: &Pass) {
        for (at, table) in pass.tables.iter().enumerate() {
            let tally = pass.tally.table(at);
            let Some(slot) = self.slots.get_mut(&table.name) else {
                continue;
            };
            // A newer plan may have come meanwhile: its pass counts for it.
            if slot
                .resolved
                .as_ref()
                .is_none_or(|resolved| resolved.target != table.target)
            {
                continue;
            }
            if slot.counted != Some(table.target) {
                slot.counted = Some(table.target);
                slot.state.kept_chunks = tally.kept;
                slot.state.fetched_chunks = 0;
                slot.state.peer_chunks = 0;
                slot.state.peer_bytes = 0;
            }
            tally.report(&mut slot.state);
            slot.state.held_bytes = tally.bytes_done;
        }
    }
}
