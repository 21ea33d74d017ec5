//! The engine's view of the tables: their plans are resolved and their files looked at, by tasks
//! whose results come back as events.

use std::sync::Arc;
use std::time::Duration;

use stoa_metastore::PlanTarget;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::engine::{Engine, Flow, Slot, Waiting, catalog_name};
use crate::events::{Done, Looked};
use crate::metrics::add;
use crate::resolve::{Resolved, resolved_with};
use crate::shared::{jitter, unix_ms};

impl Engine {
    /// Has a table's newest plan read, by a task.
    pub(crate) fn resolve(&mut self, table: &str) {
        let Some((target, pointer)) = self.targets.get(table) else {
            return;
        };
        let Some(slot) = self.slots.get_mut(table) else {
            return;
        };
        slot.resolving = true;
        slot.resolve_again = None;
        let known = slot
            .resolved
            .as_ref()
            .and_then(|resolved| resolved.catalog.clone())
            .or_else(|| self.shown.get(&catalog_name(table)).cloned());
        let (sources, pointer, table) = (self.sources.clone(), pointer.clone(), table.to_owned());
        let failed = Done::Resolved {
            table: table.clone(),
            target,
            result: Err("reading the plan failed within the worker".to_owned()),
        };
        self.events.jobs.spawn(failed, async move {
            let result = sources.resolve(&pointer, target, known, unix_ms()).await;
            Done::Resolved {
                table,
                target,
                result,
            }
        });
    }

    pub(crate) fn resolved(
        &mut self,
        table: &str,
        target: PlanTarget,
        result: Result<Resolved, String>,
    ) -> Flow {
        let (first, longest) = self.shared.settings.retry;
        let freshness = self.shared.settings.freshness;
        let Some(slot) = self.slots.get_mut(table) else {
            return Flow::Continue;
        };
        if slot.target != target {
            // Overtaken: the task for the newer plan is under way.
            return Flow::Continue;
        }
        slot.resolving = false;
        self.shared.board.advance();
        match result {
            Ok(resolved) => {
                slot.attempts = 0;
                slot.state.error = None;
                let looked_at = resolved.catalog.as_ref().map_or(0, |c| c.looked_at_unix_ms);
                slot.looked_at_unix_ms = slot.looked_at_unix_ms.max(looked_at);
                slot.look_due = freshness
                    .filter(|_| resolved.catalog.is_some())
                    .map(|freshness| {
                        let age =
                            Duration::from_millis(unix_ms().saturating_sub(slot.looked_at_unix_ms));
                        Instant::now() + freshness.saturating_sub(age)
                    });
                let look_at_once = resolved.differs && freshness.is_some();
                slot.resolved = Some(resolved);
                // Somebody asked anew: what failed for good before gets another chance.
                self.failures.clear();
                self.decided_again = 0;
                if look_at_once {
                    self.look(table);
                }
                self.wants_pass()
            }
            Err(error) => {
                tracing::warn!(table, error, "the plan cannot be followed yet");
                self.found_work = true;
                slot.state.error = Some(error);
                let wait = first
                    .saturating_mul(1 << slot.attempts.min(16))
                    .min(longest);
                slot.attempts += 1;
                slot.resolve_again = Some(Instant::now() + wait.mul_f64(0.75 + 0.5 * jitter()));
                Flow::Continue
            }
        }
    }

    /// Has a table looked at, by a task. `false` if there is nothing to look at yet.
    pub(crate) fn look(&mut self, table: &str) -> bool {
        let Some(slot) = self.slots.get_mut(table) else {
            return false;
        };
        let Some(resolved) = &slot.resolved else {
            return false;
        };
        let Some(catalog) = resolved.catalog.clone() else {
            return false;
        };
        if slot.looking {
            return true;
        }
        slot.looking = true;
        add(&self.shared.counters.looks, 1);
        let target = resolved.target;
        let (planned, others) = (Arc::clone(&resolved.planned), Arc::clone(&resolved.others));
        let (origin, table) = (self.sources.origin.clone(), table.to_owned());
        let worker = self.sources.worker.clone();
        let failed = Done::Looked {
            table: table.clone(),
            at_unix_ms: unix_ms(),
            result: Err("looking at its files failed within the worker".to_owned()),
        };
        self.events.jobs.spawn(failed, async move {
            let at_unix_ms = unix_ms();
            let result = match catalog.refresh(&origin, at_unix_ms).await {
                Ok(None) => Ok(None),
                Ok(Some(newer)) => resolved_with(&worker, target, planned, others, Arc::new(newer))
                    .await
                    .map(Some),
                Err(error) => Err(error.to_string()),
            };
            Done::Looked {
                table,
                at_unix_ms,
                result,
            }
        });
        true
    }

    pub(crate) fn looked(
        &mut self,
        table: &str,
        at_unix_ms: u64,
        result: Result<Option<Resolved>, String>,
    ) -> Flow {
        let freshness = self.shared.settings.freshness;
        let Some(slot) = self.slots.get_mut(table) else {
            return Flow::Continue;
        };
        slot.looking = false;
        slot.look_due = freshness.map(|freshness| Instant::now() + freshness);
        let mut flow = Flow::Continue;
        let mut changed = Ok(false);
        let carried_out = slot.after_look.take();
        match result {
            Ok(newer) => {
                if slot.look_error.take().is_some() {
                    tracing::info!(table, "the table's files can be looked at again");
                }
                slot.looked_at_unix_ms = at_unix_ms;
                // A newer plan replaces what is wanted anyway, with a look of its own.
                if let Some(newer) = newer
                    && slot
                        .resolved
                        .as_ref()
                        .is_some_and(|now| now.target == newer.target)
                {
                    tracing::info!(table, "the table's files have changed");
                    slot.resolved = Some(newer);
                    changed = Ok(true);
                    self.found_work = true;
                    self.decided_again = 0;
                    flow = self.wants_pass();
                } else if carried_out.is_some() {
                    slot.state.current = carried_out;
                }
            }
            Err(error) => {
                // Looks go on, and what stands in their way mostly stays, in words that name the
                // time each request took. The status has the latest.
                match slot.look_error {
                    None => tracing::warn!(table, error, "the table's files cannot be looked at"),
                    Some(_) => tracing::debug!(table, error, "they still cannot be looked at"),
                }
                slot.look_error = Some(error.clone());
                slot.state.current = carried_out.or(slot.state.current);
                changed = Err(error);
            }
        }
        self.answer(table, &changed);
        flow
    }

    pub(crate) fn look_for(&mut self, tables: Vec<String>, reply: oneshot::Sender<Looked>) {
        let tables = if tables.is_empty() {
            let active = |(_, slot): &(&String, &Slot)| {
                slot.resolved
                    .as_ref()
                    .is_none_or(|resolved| resolved.catalog.is_some())
            };
            self.slots
                .iter()
                .filter(active)
                .map(|(table, _)| table.clone())
                .collect()
        } else {
            tables
        };
        let mut waiting = Waiting {
            outstanding: vec![],
            looked: Looked::default(),
            reply,
        };
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

    pub(crate) fn answer(&mut self, table: &str, changed: &Result<bool, String>) {
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

    pub(crate) fn answer_complete(&mut self) {
        for waiting in self
            .waiting
            .extract_if(.., |waiting| waiting.outstanding.is_empty())
        {
            // Whoever asked may have gone.
            let _ = waiting.reply.send(waiting.looked);
        }
    }
}
