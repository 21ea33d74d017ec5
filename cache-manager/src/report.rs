//! How the engine tells everybody how things are.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use stoa_metastore::{TableState, WorkerPhase, WorkerState};

use crate::engine::{Engine, catalog_name};
use crate::looks;
use crate::shared::Details;

impl Engine {
    /// Tells everybody how things are.
    pub(crate) fn report(&mut self) {
        let mut failed: Vec<String> = Vec::new();
        let mut degraded = self.shared.has_problem("pin") || self.shared.has_problem("cache");
        let mut busy = self.loading || self.needs_pass && !self.slots.is_empty();
        let mut tables = BTreeMap::new();
        for (table, slot) in &self.slots {
            // A look may bring what was left out for an object that has changed.
            busy |= slot.resolving || slot.looking && slot.state.left_out.chunks > 0;
            degraded |= slot.state.error.is_some()
                || slot.unshown.is_some()
                || slot.state.left_out.chunks > 0;
            if let Some(error) = &slot.state.error {
                failed.push(format!("{table}: {error}"));
            }
            if let Some(error) = &slot.look_error {
                failed.push(format!("{table} cannot be looked at: {error}"));
            }
            if let Some((chunks, reason)) = slot
                .resolved
                .as_ref()
                .and_then(|resolved| resolved.missing.as_ref())
            {
                failed.push(format!(
                    "{table}: {chunks} planned chunks are not in its files: {reason}"
                ));
            }
            if slot.state.left_out.chunks > 0 {
                failed.push(format!(
                    "{table}: {} chunks are left out: {}",
                    slot.state.left_out.chunks,
                    slot.state
                        .left_out
                        .reason
                        .as_deref()
                        .unwrap_or("no reason is known")
                ));
            }
            let resolved = slot.resolved.as_ref();
            let state = TableState {
                files: resolved.map_or_else(String::new, |resolved| resolved.files.clone()),
                error: slot.state.error.clone().or_else(|| slot.unshown.clone()),
                ..slot.state.clone()
            };
            tables.insert(table.clone(), state);
        }
        // Before the plans are known, nothing is without one.
        for (table, bytes) in self.unplanned.iter().filter(|_| self.seen_plans) {
            // One whose plan has just come is held until a pass has followed it.
            let state = tables.entry(table.clone()).or_default();
            state.held_bytes = state.held_bytes.max(*bytes);
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
        // While a plan is being read or a pass decides, what is absent here may be about to come.
        let resolving = self.slots.values().any(|slot| slot.resolving);
        let settled = self.seen_plans && !resolving && !self.needs_pass && !self.preparing;
        self.shared.board.set_settled(settled);
        let holds = self.slots.values().any(|slot| {
            slot.resolved
                .as_ref()
                .is_some_and(|resolved| resolved.catalog.is_some())
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
            capacity_bytes: self.shared.capacity_bytes,
            problems,
            unverified_bytes: self
                .shared
                .counters
                .unverified_bytes
                .load(Ordering::Relaxed),
        };
        self.shared.state.send_if_modified(|now| {
            let modified = *now != state;
            *now = state;
            modified
        });
    }

    /// When each table was last looked at, for readers on this host too.
    pub(crate) async fn tell_looks(&mut self) {
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
        match (written, self.looks_unwritten) {
            (Ok(Err(error)), false) => {
                tracing::warn!(%error, "the times of the last looks cannot be written");
                self.looks_unwritten = true;
            }
            (Ok(Ok(())), _) => self.looks_unwritten = false,
            _ => {}
        }
    }
}
