//! A layout version with its sizes: between the catalog, the planner and the records.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use stoa_layout::{Form, Replicas, TableCatalog, WantedChunk, wanted_within};
use stoa_metastore::WorkerPlan;
use stoa_origin::ObjectIdentity;
use twox_hash::XxHash3_64;

use crate::error::{Error, Result};
use crate::plan::{Plan, PlanChunk};

/// What a layout version wants, with sizes, and nothing more of the catalog: footers are large.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SizedTable {
    files: Vec<ObjectIdentity>,
    chunks: Vec<WantedChunk>,
    groups: Vec<u64>,
    replicas: Replicas,
    /// Files that cannot be cached, and why, for people.
    rejected: Option<String>,
    /// Names the files, readable or not.
    digest: String,
}

impl SizedTable {
    /// Everything that the catalog's layout wants. Fails on layouts that name what is not there,
    /// and on those that want nothing of rows that are there: a table without rows is small, and no
    /// mistake. Forms that are to be chosen fill `budget_bytes`.
    pub(crate) fn new(catalog: &TableCatalog, budget_bytes: u64) -> Result<SizedTable> {
        let table_version = || catalog.table_version().to_string();
        let chunks = wanted_within(catalog, budget_bytes).map_err(|source| Error::Layout {
            table_version: table_version(),
            source: Box::new(source),
        })?;
        let has_rows = catalog
            .files
            .iter()
            .any(|file| file.metadata.file_metadata().num_rows() > 0);
        if chunks.is_empty() && (has_rows || !catalog.rejected.is_empty()) {
            let reason = describe_rejected(catalog).unwrap_or_else(|| {
                let (files, layout) = (catalog.files.len(), &catalog.layout);
                let budget = layout.budget_bytes.map_or_else(String::new, |budget| {
                    format!(", or no column fits its budget of {budget} bytes")
                });
                format!("full_files_only passes over its {files} files{budget}")
            });
            return Err(Error::NothingWanted {
                table_version: table_version(),
                reason,
            });
        }
        let files: Vec<ObjectIdentity> = catalog
            .files
            .iter()
            .map(|file| file.identity.clone())
            .collect();
        let keys: Vec<Vec<u8>> = files.iter().map(ObjectIdentity::to_key).collect();
        let group_of = |chunk: &WantedChunk| {
            let mut key = keys[chunk.chunk.file as usize].clone();
            key.extend_from_slice(&chunk.chunk.row_group.to_le_bytes());
            XxHash3_64::oneshot(&key)
        };
        let groups = chunks.iter().map(group_of).collect();
        Ok(SizedTable {
            files,
            chunks,
            groups,
            replicas: catalog.layout.replicas,
            rejected: describe_rejected(catalog),
            digest: catalog.files_digest(),
        })
    }

    /// The files that cannot be cached, in words.
    pub(crate) fn rejected(&self) -> Option<&str> {
        self.rejected.as_deref()
    }

    /// Names the files that were seen, readable or not.
    pub(crate) fn files_digest(&self) -> &str {
        &self.digest
    }

    /// On how many workers each chunk should lie.
    pub(crate) fn replicas(&self) -> Replicas {
        self.replicas
    }

    /// How many chunks are wanted.
    pub(crate) fn len(&self) -> usize {
        self.chunks.len()
    }

    /// The planner's view, sizes times `correction`.
    pub(crate) fn plan_chunks(&self, correction: f64) -> Vec<PlanChunk> {
        let corrected = |chunk: &WantedChunk| corrected(chunk.bytes, correction);
        self.chunks
            .iter()
            .zip(&self.groups)
            .map(|(chunk, group)| PlanChunk {
                group: *group,
                bytes: corrected(chunk),
            })
            .collect()
    }

    /// The forms that workers must be able to make.
    pub(crate) fn forms(&self) -> BTreeSet<&'static str> {
        self.chunks
            .iter()
            .map(|chunk| chunk.form.as_str())
            .collect()
    }

    /// Which chunks of ours the plan in force has where. Files are found by where they lie: an
    /// overwritten file stays where it was.
    pub(crate) fn previous(
        &self,
        in_force: &BTreeMap<String, WorkerPlan>,
    ) -> HashMap<usize, Vec<String>> {
        let mut of_place: HashMap<(u32, u32, u32), usize> =
            HashMap::with_capacity(self.chunks.len());
        for (index, chunk) in self.chunks.iter().enumerate() {
            let place = chunk.chunk;
            of_place.insert((place.file, place.row_group, place.column), index);
        }
        let of_path: HashMap<(&str, &str), u32> = self
            .files
            .iter()
            .enumerate()
            .map(|(number, file)| ((file.store.as_str(), file.path.as_str()), number as u32))
            .collect();
        let mut previous: HashMap<usize, Vec<String>> = HashMap::new();
        for (worker, plan) in in_force {
            let files: Vec<Option<u32>> = plan
                .files
                .iter()
                .map(|value| {
                    let field = |name| value.get(name).and_then(|v| v.as_str());
                    of_path.get(&(field("store")?, field("path")?)).copied()
                })
                .collect();
            for (file, row_group, column, _) in &plan.chunks {
                let file = files.get(*file as usize).copied().flatten();
                let index = file.and_then(|file| of_place.get(&(file, *row_group, *column)));
                if let Some(index) = index {
                    previous.entry(*index).or_default().push(worker.clone());
                }
            }
        }
        previous
    }

    /// The records of a plan: each worker's chunks with the files they speak of.
    pub(crate) fn worker_plans(&self, plan: &Plan) -> BTreeMap<String, WorkerPlan> {
        let of_worker = |chunks: &Vec<usize>| {
            let mut plan = WorkerPlan::default();
            let mut numbers: HashMap<u32, u32> = HashMap::new();
            for index in chunks {
                let WantedChunk { chunk, form, .. } = &self.chunks[*index];
                let file = *numbers.entry(chunk.file).or_insert_with(|| {
                    let identity = &self.files[chunk.file as usize];
                    plan.files.push(
                        serde_json::to_value(identity).expect("strings and numbers are JSON"),
                    );
                    (plan.files.len() - 1) as u32
                });
                plan.chunks.push((
                    file,
                    chunk.row_group,
                    chunk.column,
                    Form::as_str(*form).to_owned(),
                ));
            }
            plan
        };
        plan.assignments
            .iter()
            .map(|(worker, chunks)| (worker.clone(), of_worker(chunks)))
            .collect()
    }

    /// Estimated bytes, uncorrected, that each worker of a plan in force has.
    pub(crate) fn raw_bytes(
        &self,
        in_force: &BTreeMap<String, WorkerPlan>,
    ) -> BTreeMap<String, u64> {
        let mut bytes: BTreeMap<String, u64> =
            in_force.keys().map(|worker| (worker.clone(), 0)).collect();
        for (index, workers) in self.previous(in_force) {
            for worker in workers {
                let at = bytes.entry(worker).or_default();
                *at = at.saturating_add(self.chunks[index].bytes);
            }
        }
        bytes
    }

    /// Estimated bytes, uncorrected, of these chunks.
    pub(crate) fn raw_bytes_of(&self, chunks: impl Iterator<Item = usize>) -> u64 {
        chunks.fold(0, |sum, chunk| sum.saturating_add(self.chunks[chunk].bytes))
    }
}

fn describe_rejected(catalog: &TableCatalog) -> Option<String> {
    let first = catalog.rejected.first()?;
    let count = catalog.rejected.len();
    let others = if count > 1 {
        format!(" (and {} more)", count - 1)
    } else {
        String::new()
    };
    Some(format!(
        "file {} is rejected: {}{others}",
        first.url, first.reason
    ))
}

/// Bytes times a correction, rounded up.
pub(crate) fn corrected(bytes: u64, correction: f64) -> u64 {
    if correction == 1.0 {
        bytes
    } else {
        (bytes as f64 * correction).ceil() as u64
    }
}
