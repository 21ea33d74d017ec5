//! Plans: bounded immutable parts first, the pointer that puts them in force last, all fenced.

use std::collections::BTreeMap;

use super::{ATTEMPTS_MAX, Leadership, Records, contention, decode, decode_all, encode, unchanged};
use crate::error::{Error, Result};
use crate::keys::{self, Key};
use crate::model::{CacheVersion, PlanNotes, all_reported, split_table_version};
use crate::plan::{PART_BYTES_MAX, PlanPart, WorkerPlan, join_plan, split_plan};
use crate::store::{Entry, Op};

impl Records {
    /// Writes a plan of a table and puts it in force.
    ///
    /// [`crate::next_plan`] gives the number. Fails with [`Error::Fenced`] when somebody else was
    /// elected, with [`Error::StaleVersion`] when a plan of a later version is in force, with
    /// [`Error::StalePlan`] when the number is not greater. Writing the very plan that is in force
    /// again is fine, so that a call whose answer was lost can be repeated.
    pub async fn write_plan(
        &self,
        leadership: &Leadership,
        table_version: &str,
        plan: u64,
        workers: &BTreeMap<String, WorkerPlan>,
    ) -> Result<CacheVersion> {
        let notes = PlanNotes::default();
        self.write_plan_with(leadership, table_version, plan, workers, notes)
            .await
    }

    /// [`Records::write_plan`] with what else is worth knowing of the plan.
    pub async fn write_plan_with(
        &self,
        leadership: &Leadership,
        table_version: &str,
        plan: u64,
        workers: &BTreeMap<String, WorkerPlan>,
        notes: PlanNotes,
    ) -> Result<CacheVersion> {
        let (table, version) = split_table_version(table_version)?;
        let mut pointer = CacheVersion {
            table_version: table_version.to_owned(),
            plan,
            notes,
            ..CacheVersion::default()
        };
        let mut ops = Vec::new();
        for (worker, whole) in workers {
            let encoded = split_plan(table_version, plan, worker, whole, PART_BYTES_MAX)?;
            for (number, bytes) in encoded.parts.into_iter().enumerate() {
                let key = keys::cache_location(table, version, worker, plan, number as u32);
                ops.push(Op::put(key, bytes));
            }
            pointer.parts.insert(worker.clone(), encoded.pointer);
        }
        // First a look, so that parts of a plan in force are never touched.
        let current = self.store.get(&keys::cache_version(table)).await?;
        if succeeds(&pointer, current.as_ref())? {
            self.fenced_batches(leadership, ops).await?;
        }
        self.write_pointer(leadership, pointer).await
    }

    /// Puts "drop this table from memory" in force, as a plan without parts.
    pub async fn write_unloaded(
        &self,
        leadership: &Leadership,
        table_version: &str,
        plan: u64,
    ) -> Result<CacheVersion> {
        let pointer = CacheVersion {
            table_version: table_version.to_owned(),
            plan,
            unloaded: true,
            ..CacheVersion::default()
        };
        self.write_pointer(leadership, pointer).await
    }

    async fn write_pointer(
        &self,
        leadership: &Leadership,
        pointer: CacheVersion,
    ) -> Result<CacheVersion> {
        let key = keys::cache_version(pointer.table()?);
        for _ in 0..ATTEMPTS_MAX {
            let current = self.store.get(&key).await?;
            if !succeeds(&pointer, current.as_ref())? {
                leadership.check(&self.store).await?;
                return Ok(pointer);
            }
            let when = vec![unchanged(&key, current.as_ref())];
            let then = vec![Op::put(&key, encode(&pointer))];
            if self.fenced(leadership, when, then).await?.is_some() {
                return Ok(pointer);
            }
        }
        Err(contention(key))
    }

    /// The plan in force of a table.
    pub async fn cache_version(&self, table: &str) -> Result<Option<CacheVersion>> {
        self.store
            .get(&keys::cache_version(table))
            .await?
            .as_ref()
            .map(decode)
            .transpose()
    }

    /// The plans in force of all tables, sorted by table.
    pub async fn cache_versions(&self) -> Result<Vec<CacheVersion>> {
        let mut versions: Vec<CacheVersion> =
            decode_all(&self.store.list(keys::CACHE_VERSION_PREFIX).await?.entries);
        versions.sort_by(|a, b| a.table_version.cmp(&b.table_version));
        Ok(versions)
    }

    /// A worker's whole plan, checked against its pointer; `None` when the plan has no part for it.
    ///
    /// [`Error::DamagedPlan`] when parts are missing or differ. Read the pointer again then: a
    /// plan that was replaced meanwhile may have been pruned.
    pub async fn worker_plan(
        &self,
        pointer: &CacheVersion,
        worker: &str,
    ) -> Result<Option<WorkerPlan>> {
        let Some(part_pointer) = pointer.parts.get(worker) else {
            return Ok(None);
        };
        let (table, version) = split_table_version(&pointer.table_version)?;
        let first = keys::cache_location(table, version, worker, pointer.plan, 0);
        // All of the plan's parts: the key of part 0 without its number.
        let prefix = &first[..first.len() - 1];
        let mut parts: Vec<(u32, Vec<u8>)> = Vec::new();
        for entry in self.store.list(prefix).await?.entries {
            if let Some(Key::CacheLocation { part, .. }) = keys::parse(&entry.key)
                // Beyond the count lies what a coordinator that died had written under this number.
                && part < part_pointer.parts
            {
                parts.push((part, entry.value));
            }
        }
        parts.sort_by_key(|(part, _)| *part);
        let parts: Vec<Vec<u8>> = parts.into_iter().map(|(_, bytes)| bytes).collect();
        join_plan(
            &pointer.table_version,
            pointer.plan,
            worker,
            part_pointer,
            &parts,
        )
        .map(Some)
    }

    /// One part of a worker's plan, for display; [`Records::worker_plan`] checks the whole.
    pub async fn plan_part(
        &self,
        table_version: &str,
        worker: &str,
        plan: u64,
        part: u32,
    ) -> Result<Option<PlanPart>> {
        let (table, version) = split_table_version(table_version)?;
        let key = keys::cache_location(table, version, worker, plan, part);
        self.store.get(&key).await?.as_ref().map(decode).transpose()
    }

    /// Removes the parts of plans older than the one before the last, once all live workers with
    /// a part have reported the plan in force. Returns how many keys that were.
    pub async fn prune_plans(&self, leadership: &Leadership, table: &str) -> Result<u64> {
        let Some(current) = self.cache_version(table).await? else {
            return Ok(0);
        };
        if !all_reported(&current, &self.workers().await?, &self.states().await?) {
            return Ok(0);
        }
        let listing = self
            .store
            .list_keys(&keys::cache_locations_of(table))
            .await?;
        let found: Vec<(u64, String)> = listing
            .entries
            .into_iter()
            .filter_map(|entry| match keys::parse(&entry.key) {
                Some(Key::CacheLocation { plan, .. }) => Some((plan, entry.key)),
                _ => None,
            })
            .collect();
        let doomed = prunable(found, current.plan);
        let count = doomed.len() as u64;
        self.fenced_batches(leadership, doomed.into_iter().map(Op::delete).collect())
            .await?;
        Ok(count)
    }
}

/// The keys whose plan is older than the one before `current`.
fn prunable(found: Vec<(u64, String)>, current: u64) -> Vec<String> {
    let before = found
        .iter()
        .map(|(plan, _)| *plan)
        .filter(|plan| *plan < current)
        .max();
    let Some(before) = before else {
        return Vec::new();
    };
    found
        .into_iter()
        .filter(|(plan, _)| *plan < before)
        .map(|(_, key)| key)
        .collect()
}

/// Whether `next` may replace what is in force; false when it is what is in force.
fn succeeds(next: &CacheVersion, current: Option<&Entry>) -> Result<bool> {
    let Some(current) = current.map(decode::<CacheVersion>).transpose()? else {
        return Ok(true);
    };
    if *next == current {
        return Ok(false);
    }
    let table = || next.table().map(str::to_owned);
    let (was, given) = (current.version()?, next.version()?);
    if given < was {
        return Err(Error::StaleVersion {
            table: table()?,
            current: was,
            given,
        });
    }
    if next.plan <= current.plan {
        return Err(Error::StalePlan {
            table: table()?,
            current: current.plan,
            given: next.plan,
        });
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_in_force_and_the_one_before_stay() {
        let found = |plans: &[u64]| plans.iter().map(|p| (*p, format!("k{p}"))).collect();
        assert_eq!(prunable(found(&[1, 2, 5, 7, 8]), 7), ["k1", "k2"]);
        assert_eq!(prunable(found(&[7]), 7), Vec::<String>::new());
        assert_eq!(prunable(found(&[3, 7]), 7), Vec::<String>::new());
        assert_eq!(prunable(found(&[8, 9]), 7), Vec::<String>::new());
        assert_eq!(prunable(vec![], 7), Vec::<String>::new());
    }
}
