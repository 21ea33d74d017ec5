//! How a pass begins: what is wanted is gathered, and every chunk decided about.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use stoa_shm::{ChunkKey, MemoryReport};
use tokio::time::Instant;

use crate::diff::{Decision, Known, Want, correct_estimates, decide, footprint, merge};
use crate::engine::{Engine, catalog_name};
use crate::metrics::add;
use crate::pass::{NewCatalog, Pass, Table};
use crate::resolve::shows_at_once;
use crate::settings::headroom_bytes;
use crate::shared::jitter;
use crate::store::Store;
use crate::tally::Tally;

impl Engine {
    /// Gathers what is wanted and decides about every chunk.
    pub(crate) async fn prepare(&mut self) -> stoa_shm::Result<Pass> {
        let started = Instant::now();
        let mut tables = Vec::new();
        let mut lists = Vec::new();
        for (name, slot) in &self.slots {
            let Some(resolved) = &slot.resolved else {
                continue;
            };
            let list = resolved.wants.iter().cloned();
            lists.push(
                list.map(|want| Want {
                    table: tables.len(),
                    ..want
                })
                .collect(),
            );
            tables.push(Table {
                name: name.clone(),
                target: resolved.target,
                catalog_name: catalog_name(name),
                catalog: resolved.catalog.clone(),
                rivals: Arc::clone(&resolved.rivals),
            });
        }
        // One that turned out to be damaged was dropped, and has to be written anew.
        let held = self
            .shared
            .with_store(|store| store.catalogs().clone())
            .await;
        self.shown.retain(|name, _| held.contains_key(name));
        let mut pending = Vec::new();
        for table in &tables {
            let shown = self.shown.get(&table.catalog_name);
            let Some(catalog) = table.catalog.clone() else {
                continue;
            };
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
        let mut known = std::mem::take(&mut self.known);
        known.blocked = self.failures.blocked(started.into_std()).cloned().collect();
        let decided = self.shared.with_store(move |store| {
            let catalogs: Vec<NewCatalog> = pending
                .into_iter()
                .map(|(name, catalog, at_once)| {
                    let bytes = catalog.encode();
                    NewCatalog {
                        name,
                        catalog,
                        bytes,
                        at_once,
                    }
                })
                .collect();
            let mut wants = merge(lists);
            let planned: Vec<u64> = wants.iter().map(|want| want.bytes).collect();
            correct_estimates(&mut wants, store.held(), &known);
            let wanted: HashSet<&ChunkKey> = wants.iter().map(|want| &want.key).collect();
            known.sizes.retain(|key, _| wanted.contains(key));
            known.parquet_only.retain(|key| wanted.contains(key));
            let result = decide_in(store, &wants, &known, &catalogs, &gone, &protected);
            let learned = result
                .as_ref()
                .map(|decided| decided.decision.learned.clone());
            known.sizes.extend(learned.unwrap_or_default());
            drop(wanted);
            (result, wants, planned, catalogs, known)
        });
        let (result, wants, planned, catalogs, known) = decided.await;
        self.known = known;
        let Decided {
            decision,
            sizes,
            room_bytes,
            tight,
            memory,
            no_room,
        } = result?;
        self.memory = memory;
        self.found_work |= !decision.fetch.is_empty()
            || !decision.drop.is_empty()
            || !decision.left_out.is_empty()
            || !decision.blocked.is_empty()
            || !catalogs.is_empty();
        let blocked_reason = |at: usize| {
            self.failures
                .reason(&wants[at].key)
                .unwrap_or("it failed before")
                .to_owned()
        };
        let size = |at: usize| sizes.get(&at).copied().unwrap_or(0);
        let tally = Tally::new(
            tables.len(),
            &wants,
            planned,
            &decision,
            size,
            &no_room,
            blocked_reason,
        );
        let fetching = decision
            .fetch
            .iter()
            .map(|at| (wants[*at].key.clone(), *at))
            .collect();
        let wanted: HashSet<&ChunkKey> = if self.failures.is_empty() {
            HashSet::new()
        } else {
            wants.iter().map(|want| &want.key).collect()
        };
        self.failures.retain(|key| wanted.contains(key));
        // Room is what these wait for now, not time.
        for at in &decision.left_out {
            self.failures.forget(&wants[*at].key);
        }
        add(
            &self.shared.counters.chunks_kept,
            decision.keep.len() as u64,
        );
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
            overflowed: false,
            no_room,
            encoded_bytes: 0,
        })
    }

    /// Says which unplanned chunks stay: those of tables whose plan is not known (yet).
    pub(crate) fn protected(
        &self,
        tables: &[Table],
    ) -> impl Fn(&ChunkKey) -> bool + Send + 'static + use<> {
        let settled: HashSet<&str> = tables
            .iter()
            .map(|table| table.catalog_name.as_str())
            .collect();
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
    /// Why what is left out has no room.
    no_room: String,
}

fn decide_in(
    store: &mut Store,
    wants: &[Want],
    known: &Known,
    catalogs: &[NewCatalog],
    gone: &HashSet<String>,
    protected: &dyn Fn(&ChunkKey) -> bool,
) -> stoa_shm::Result<Decided> {
    store.seal()?;
    let memory = store.reclaim()?;
    let capacity = store.capacity(&memory)?;
    let headroom_bytes = headroom_bytes(capacity);
    let no_room = store.no_room(&memory)?;
    let new_catalog_bytes: u64 = catalogs
        .iter()
        .map(|catalog| footprint(catalog.bytes.len() as u64))
        .sum();
    let staying: u64 = store
        .catalogs()
        .iter()
        .filter(|(name, _)| {
            !gone.contains(*name) && !catalogs.iter().any(|catalog| catalog.name == **name)
        })
        .map(|(_, location)| footprint(location.length))
        .sum();
    let fixed = memory
        .retained_bytes
        .saturating_add(new_catalog_bytes)
        .saturating_add(staying);
    let available = capacity.saturating_sub(fixed);
    let held_bytes: u64 = store.held().values().map(|at| footprint(at.length)).sum();
    // What is held already may fill the head-room too: dropping it would win nothing.
    let budget_bytes = available
        .saturating_sub(headroom_bytes)
        .max(held_bytes.min(available));
    let decision = decide(wants, store.held(), known, budget_bytes, protected);
    let to_come = decision.fetch_bytes.saturating_add(new_catalog_bytes);
    let tight =
        memory.total_bytes().saturating_add(to_come) > capacity.saturating_sub(headroom_bytes / 2);
    let sizes = decision
        .keep
        .iter()
        .filter_map(|at| Some((*at, store.held().get(&wants[*at].key)?.length)))
        .collect();
    let room_bytes = capacity.saturating_sub(memory.retained_bytes);
    Ok(Decided {
        decision,
        sizes,
        room_bytes,
        tight,
        memory,
        no_room,
    })
}
