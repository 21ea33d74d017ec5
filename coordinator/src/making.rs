//! Making plans and putting them in force.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use stoa_metastore::{
    CacheVersion, Error as StoreError, LeftOut, PlanNotes, WorkerPlan, next_plan, table_version,
};

use crate::basis;
use crate::decide::Why;
use crate::error::{Error, Result};
use crate::memory::Basis;
use crate::plan::{Plan, PlanInput, PlanWorker, Reason, plan};
use crate::sized::corrected;
use crate::term::Term;

impl Term<'_> {
    /// The parts of a plan in force. Damaged ones are passed over: what they placed is placed anew.
    async fn parts_of(
        &mut self,
        table: &str,
        pointer: &CacheVersion,
    ) -> Result<Arc<BTreeMap<String, WorkerPlan>>> {
        if let Some((number, parts)) = self.parts.get(table)
            && *number == pointer.plan
        {
            return Ok(Arc::clone(parts));
        }
        let mut parts = BTreeMap::new();
        for worker in pointer.parts.keys() {
            match self.shared.records.worker_plan(pointer, worker).await {
                Ok(plan) => drop(parts.insert(worker.clone(), plan.unwrap_or_default())),
                Err(error @ (StoreError::DamagedPlan { .. } | StoreError::Corrupt { .. })) => {
                    tracing::warn!(%error, "a part of the plan in force is passed over");
                }
                Err(error) => return Err(error.into()),
            }
        }
        let parts = Arc::new(parts);
        self.parts
            .insert(table.to_owned(), (pointer.plan, Arc::clone(&parts)));
        Ok(parts)
    }

    pub(crate) async fn adopt(
        &mut self,
        table: &str,
        version: u64,
        pointer: &CacheVersion,
    ) -> Result<()> {
        let Some(sized) = self.sized.get(&(table.to_owned(), version)).cloned() else {
            return Ok(());
        };
        let parts = self.parts_of(table, pointer).await?;
        let placed = sized.previous(&parts).len();
        let basis = Basis {
            plan: pointer.plan,
            capacities: self.memory.capacities(),
            raw_bytes: sized.raw_bytes(&parts),
            placed_chunks: placed as u64,
            left_out_chunks: (sized.len() - placed) as u64,
            left_out_reason: String::new(),
            left_out_bytes: 0,
            missing_copies: 0,
            missing_bytes: 0,
            room_bytes: self.room_for(table),
            correction: self.memory.table(table).correction(),
            files: sized.files_digest().to_owned(),
        };
        self.memory.planned(table, version, basis, None);
        Ok(())
    }

    fn room_for(&self, table: &str) -> u64 {
        self.memory
            .room_for(table, &self.view, self.shared.settings.reserve_ratio)
    }

    /// Whether the plan in force is the one that was decided upon; takes a look at the truth.
    async fn is_as_seen(&mut self, table: &str) -> Result<bool> {
        let truth = self.shared.records.cache_version(table).await?;
        if truth.as_ref() == self.view.in_force.get(table) {
            return Ok(true);
        }
        self.own_plans.remove(table);
        match truth {
            Some(truth) => drop(self.view.in_force.insert(table.to_owned(), truth)),
            None => drop(self.view.in_force.remove(table)),
        }
        Ok(false)
    }

    fn next_number(&self, table: &str) -> u64 {
        let states: Vec<_> = self.view.states.values().cloned().collect();
        next_plan(table, self.view.in_force.get(table), &states)
    }

    pub(crate) async fn write_unloaded(&mut self, table: &str, version: u64) -> Result<()> {
        if !self.is_as_seen(table).await? {
            return Ok(());
        }
        let number = self.next_number(table);
        let written = self
            .shared
            .records
            .write_unloaded(self.leadership, &table_version(table, version), number)
            .await?;
        tracing::info!(table, version, plan = number, "table unloaded");
        self.memory.unloaded(table);
        if let Err(error) = basis::remove(&self.shared.records, self.leadership, table).await {
            tracing::debug!(table, %error, "what the plan was made of is still written down");
        }
        self.take_own(table, written);
        Ok(())
    }

    pub(crate) async fn write_plan(
        &mut self,
        table: &str,
        version: u64,
        why: Why,
        workers: &[PlanWorker],
        correction: f64,
    ) -> Result<()> {
        let Some(sized) = self.sized.get(&(table.to_owned(), version)).cloned() else {
            return Ok(());
        };
        if !self.is_as_seen(table).await? {
            return Ok(());
        }
        let in_force = self.view.in_force.get(table).cloned();
        let parts = match in_force.as_ref().filter(|plan| !plan.unloaded) {
            Some(pointer) => self.parts_of(table, pointer).await?,
            None => Arc::default(),
        };
        let (made, basis, plans) = {
            let (sized, workers, parts) =
                (Arc::clone(&sized), workers.to_vec(), Arc::clone(&parts));
            let balancer = self.shared.settings.balancer();
            let work = tokio::task::spawn_blocking(move || {
                let chunks = sized.plan_chunks(correction);
                let previous = sized.previous(&parts);
                let made = plan(&PlanInput {
                    chunks: &chunks,
                    workers: &workers,
                    previous: &previous,
                    balancer,
                    replicas: sized.replicas(),
                });
                let plans = sized.worker_plans(&made);
                let raw_bytes = made
                    .assignments
                    .iter()
                    .map(|(worker, chunks)| {
                        (worker.clone(), sized.raw_bytes_of(chunks.iter().copied()))
                    })
                    .collect();
                let basis = Basis {
                    raw_bytes,
                    placed_chunks: (sized.len() - made.left_out.len()) as u64,
                    left_out_chunks: made.left_out.len() as u64,
                    left_out_bytes: sized
                        .raw_bytes_of(made.left_out.iter().map(|(chunk, _)| *chunk)),
                    left_out_reason: made
                        .left_out
                        .first()
                        .map_or(String::new(), |(_, reason)| reason.to_string()),
                    missing_copies: made.fewer.iter().map(|(_, lacks)| u64::from(*lacks)).sum(),
                    missing_bytes: made.fewer.iter().fold(0, |sum, (chunk, lacks)| {
                        let bytes = sized.raw_bytes_of(std::iter::once(*chunk));
                        bytes.saturating_mul(u64::from(*lacks)).saturating_add(sum)
                    }),
                    correction,
                    files: sized.files_digest().to_owned(),
                    ..Basis::default()
                };
                (made, basis, plans)
            });
            work.await.map_err(|panic| Error::Died {
                table_version: table_version(table, version),
                reason: panic.to_string(),
            })?
        };
        let mut basis = Basis {
            capacities: self.memory.capacities(),
            room_bytes: self.room_for(table),
            ..basis
        };
        // One that workers have overtaken has to be written again, under a later number.
        let overtaken = matches!(why, Why::Overtaken(_));
        let same = in_force.as_ref().filter(|pointer| {
            !overtaken
                && !pointer.unloaded
                && pointer.version().ok() == Some(version)
                && *parts == plans
        });
        if let Some(pointer) = same {
            tracing::debug!(table, version, %why, "the plan in force is still the best");
            basis.plan = pointer.plan;
            self.write_basis(table, pointer, &basis).await;
            self.memory.planned(table, version, basis, Some(&why));
            return Ok(());
        }
        let number = self.next_number(table);
        let named = table_version(table, version);
        let written = self
            .shared
            .records
            .write_plan_with(
                self.leadership,
                &named,
                number,
                &plans,
                notes(&made, &basis),
            )
            .await?;
        tracing::info!(
            table, version, plan = number, %why, workers = made.assignments.len(),
            chunks = basis.placed_chunks, left_out = basis.left_out_chunks,
            missing_copies = basis.missing_copies, "plan in force"
        );
        basis.plan = number;
        self.write_basis(table, &written, &basis).await;
        self.parts
            .insert(table.to_owned(), (number, Arc::new(plans)));
        self.take_own(table, written);
        self.memory.planned(table, version, basis, Some(&why));
        Ok(())
    }

    /// Writes down what a plan was made of, for the next coordinator; it can do without.
    async fn write_basis(&mut self, table: &str, pointer: &CacheVersion, basis: &Basis) {
        if let Err(error) =
            basis::write(&self.shared.records, self.leadership, table, pointer, basis).await
        {
            tracing::debug!(table, %error, "what the plan was made of is not written down");
        }
    }
}

/// What a plan's pointer says beside the plan, for `stoa load` and `stoa status`.
fn notes(made: &Plan, basis: &Basis) -> PlanNotes {
    let left_out = |chunks: u64, raw_bytes: u64, reason: String| LeftOut {
        chunks,
        bytes: corrected(raw_bytes, basis.correction),
        no_room: chunks,
        reason: (chunks > 0).then_some(reason),
        ..LeftOut::default()
    };
    let mut copies: HashMap<usize, u32> = HashMap::new();
    for chunk in made.assignments.values().flatten() {
        *copies.entry(*chunk).or_default() += 1;
    }
    let most = copies.into_values().max().unwrap_or(0);
    PlanNotes {
        replicas: if most > 1 { most } else { 0 },
        left_out: left_out(
            basis.left_out_chunks,
            basis.left_out_bytes,
            basis.left_out_reason.clone(),
        ),
        missing_copies: left_out(
            basis.missing_copies,
            basis.missing_bytes,
            Reason::NoCapacity.to_string(),
        ),
    }
}
