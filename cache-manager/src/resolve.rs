//! From a plan in force to the chunks that this worker wants: its part of the plan, the layout that
//! the plan places, and the catalog of the table's files.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::StreamExt;
use serde::Deserialize;
use stoa_layout::{ChunkRef, Form, LayoutDocument, TableCatalog};
use stoa_metastore::{CacheVersion, PlanTarget, Records, WorkerPlan};
use stoa_origin::{ObjectIdentity, Origin};
use stoa_shm::ChunkKey;

use crate::diff::Want;
use crate::peers::Peers;
use crate::route::{Place, shares};

/// A worker's part of a plan, parsed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct PlannedChunks {
    /// The files that the chunks speak of.
    pub(crate) files: Vec<ObjectIdentity>,
    /// File (a position in `files`), row group, column and form, most wanted first.
    pub(crate) chunks: Vec<(u32, u32, u32, Form)>,
}

impl PlannedChunks {
    /// Parses what the metastore holds.
    ///
    /// # Errors
    /// Text that says which file is no identity.
    pub(crate) fn parse(plan: &WorkerPlan) -> Result<PlannedChunks, String> {
        let file = |(at, value): (usize, &serde_json::Value)| {
            ObjectIdentity::deserialize(value)
                .map_err(|error| format!("file {at} of the plan is no identity: {error}"))
        };
        Ok(PlannedChunks {
            files: plan
                .files
                .iter()
                .enumerate()
                .map(file)
                .collect::<Result<_, _>>()?,
            chunks: plan
                .chunks
                .iter()
                // A form that this build cannot make is replaced by the one that always works.
                .map(|(file, row_group, column, form)| {
                    (
                        *file,
                        *row_group,
                        *column,
                        form.parse().unwrap_or(Form::Parquet),
                    )
                })
                .collect(),
        })
    }
}

/// Other workers that are to hold the same chunks by the same plan.
pub(crate) type Rivals = HashMap<ChunkKey, Rival>;

/// Who else is to hold a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rival {
    pub(crate) others: Arc<[String]>,
    /// Which of them is the first to load it; `None` if this worker is.
    pub(crate) first: Option<u32>,
}

impl Rival {
    /// Whether that one of the others is the first.
    pub(crate) fn is_first(&self, worker: &str) -> bool {
        self.first
            .and_then(|first| self.others.get(first as usize))
            .is_some_and(|first| first == worker)
    }
}

/// What a worker is to hold of a table.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    pub(crate) target: PlanTarget,
    pub(crate) planned: Arc<PlannedChunks>,
    /// The parts of the other workers, by worker, where some chunks are planned more than once.
    pub(crate) others: Arc<Others>,
    pub(crate) rivals: Arc<Rivals>,
    /// `None` when the table is to be dropped.
    pub(crate) catalog: Option<Arc<TableCatalog>>,
    pub(crate) wants: Arc<Vec<Want>>,
    /// Planned chunks that the files do not have, and one of the reasons.
    pub(crate) missing: Option<(u64, String)>,
    /// Names the catalog's files; empty when the table is to be dropped.
    pub(crate) files: String,
    /// Whether the plan was made for other files than the catalog has: one of them is out of date.
    pub(crate) differs: bool,
}

/// The parts of other workers of a plan.
pub(crate) type Others = Vec<(String, PlannedChunks)>;

/// Parts of other workers that are read at the same time.
const OTHERS_AT_ONCE: usize = 8;

/// Everything that resolving reads from.
#[derive(Clone)]
pub(crate) struct Sources {
    pub(crate) records: Records,
    pub(crate) origin: Origin,
    pub(crate) worker: String,
    /// Whether files are ever looked at again.
    pub(crate) snapshot_only: bool,
    /// The other workers, where they can be asked.
    pub(crate) peers: Option<Arc<Peers>>,
}

impl Sources {
    /// Reads plan, layout and catalog. `known` is the table's catalog so far: of the same layout
    /// it is taken as it is, of another its footers are used again where files are the same.
    ///
    /// The same version is not enough: a directory may outlive the metastore that filled it, and
    /// then version 1 is somebody else's.
    pub(crate) async fn resolve(
        &self,
        pointer: &CacheVersion,
        target: PlanTarget,
        known: Option<Arc<TableCatalog>>,
        now_unix_ms: u64,
    ) -> Result<Resolved, String> {
        if pointer.unloaded {
            return Ok(Resolved {
                target,
                planned: Arc::default(),
                others: Arc::default(),
                rivals: Arc::default(),
                catalog: None,
                wants: Arc::default(),
                missing: None,
                files: String::new(),
                differs: false,
            });
        }
        let plan = self
            .records
            .worker_plan(pointer, &self.worker)
            .await
            .map_err(|error| error.to_string())?
            .unwrap_or_default();
        let planned = Arc::new(PlannedChunks::parse(&plan)?);
        let others = Arc::new(self.others(pointer).await);
        let document = self.document(pointer, target).await?;
        let catalog = match known {
            Some(known) if known.layout == document => known,
            known => Arc::new(
                self.catalog(document, known.as_deref(), now_unix_ms)
                    .await?,
            ),
        };
        resolved_with(&self.worker, target, planned, others, catalog).await
    }

    /// The parts of the other workers, where chunks are planned more than once and somebody can be
    /// asked for them. One that cannot be read is passed over: its worker is just not waited for.
    async fn others(&self, pointer: &CacheVersion) -> Others {
        if pointer.notes.replicas < 2 || self.peers.is_none() {
            return vec![];
        }
        let read = |worker: String| async move {
            let read = self.records.worker_plan(pointer, &worker).await;
            let parsed = read
                .map_err(|error| error.to_string())
                .and_then(|plan| PlannedChunks::parse(&plan.unwrap_or_default()));
            match parsed {
                Ok(planned) => Some((worker, planned)),
                Err(error) => {
                    tracing::debug!(worker, error, "the part of another worker is passed over");
                    None
                }
            }
        };
        let mut workers: Vec<String> = pointer.parts.keys().cloned().collect();
        workers.retain(|id| *id != self.worker);
        futures::stream::iter(workers)
            .map(read)
            .buffer_unordered(OTHERS_AT_ONCE)
            .filter_map(std::future::ready)
            .collect()
            .await
    }

    async fn document(
        &self,
        pointer: &CacheVersion,
        target: PlanTarget,
    ) -> Result<LayoutDocument, String> {
        let table = pointer.table().map_err(|error| error.to_string())?;
        let json = self
            .records
            .layout(table, target.version)
            .await
            .map_err(|e| e.to_string())?;
        let json = json.ok_or_else(|| {
            format!(
                "layout {} is not in the metastore; publish it again",
                pointer.table_version
            )
        })?;
        LayoutDocument::from_json(&json).map_err(|error| error.to_string())
    }

    async fn catalog(
        &self,
        document: LayoutDocument,
        known: Option<&TableCatalog>,
        now_unix_ms: u64,
    ) -> Result<TableCatalog, String> {
        let text = |error: stoa_layout::Error| error.to_string();
        let loaded = match reuse(&document, known, self.snapshot_only) {
            Reuse::AsItIs(catalog) => return Ok(*catalog),
            Reuse::LookAgain(base) => match base.refresh(&self.origin, now_unix_ms).await {
                Ok(Some(newer)) => newer,
                Ok(None) => TableCatalog {
                    looked_at_unix_ms: now_unix_ms,
                    ..*base
                },
                Err(error) => return Err(text(error)),
            },
            Reuse::Nothing => TableCatalog::load(&self.origin, &document, now_unix_ms)
                .await
                .map_err(text)?,
        };
        Ok(loaded)
    }
}

/// What an earlier catalog of the table is good for.
enum Reuse {
    /// The version names the very same files.
    AsItIs(Box<TableCatalog>),
    /// The files may differ: those that do not keep their footers.
    LookAgain(Box<TableCatalog>),
    Nothing,
}

fn reuse(document: &LayoutDocument, known: Option<&TableCatalog>, snapshot_only: bool) -> Reuse {
    let Some(known) = known.filter(|known| {
        known.location == document.location
            && known.layout.partition_columns == document.partition_columns
    }) else {
        return Reuse::Nothing;
    };
    let base = TableCatalog {
        version: document.version,
        layout: document.clone(),
        ..known.clone()
    };
    let mut have: Vec<&ObjectIdentity> = known
        .files
        .iter()
        .map(|file| &file.identity)
        .chain(known.rejected.iter().map(|file| &file.identity))
        .collect();
    let mut named: Vec<&ObjectIdentity> = document.files.iter().collect();
    have.sort();
    named.sort();
    if !named.is_empty() && have == named {
        Reuse::AsItIs(Box::new(base))
    } else if named.is_empty() || !snapshot_only {
        Reuse::LookAgain(Box::new(base))
    } else {
        Reuse::Nothing
    }
}

/// Puts plan and catalog together, for the worker of this id.
pub(crate) async fn resolved_with(
    worker: &str,
    target: PlanTarget,
    planned: Arc<PlannedChunks>,
    others: Arc<Others>,
    catalog: Arc<TableCatalog>,
) -> Result<Resolved, String> {
    let (of_plan, of_catalog) = (Arc::clone(&planned), Arc::clone(&catalog));
    let (of_others, me) = (Arc::clone(&others), worker.to_owned());
    let matched = tokio::task::spawn_blocking(move || {
        let (wants, missing) = find_chunks(&of_plan, &of_catalog);
        let rivals = find_rivals(&me, &wants, &of_others, &of_catalog);
        (wants, missing, rivals, of_catalog.files_digest())
    });
    let (wants, missing, rivals, files) = matched
        .await
        .map_err(|panic| format!("the plan cannot be matched with the files: {panic}"))?;
    let known: HashSet<&ObjectIdentity> = catalog.files.iter().map(|file| &file.identity).collect();
    let differs = planned.files.iter().any(|file| !known.contains(file));
    let catalog = Some(Arc::clone(&catalog));
    Ok(Resolved {
        target,
        planned,
        others,
        rivals: Arc::new(rivals),
        catalog,
        wants: Arc::new(wants),
        missing,
        files,
        differs,
    })
}

/// Finds each planned chunk in the catalog.
///
/// A file that was overwritten since the plan was made is followed by its path, as long as it still
/// has that row group and column: the plan's intent was the place, not the bytes. Chunks that the
/// files do not have are counted, with one reason.
pub(crate) fn find_chunks(
    planned: &PlannedChunks,
    catalog: &TableCatalog,
) -> (Vec<Want>, Option<(u64, String)>) {
    let by_path: HashMap<(&str, &str), usize> = catalog
        .files
        .iter()
        .enumerate()
        .map(|(at, file)| {
            (
                (file.identity.store.as_str(), file.identity.path.as_str()),
                at,
            )
        })
        .collect();
    let files: Vec<Option<(u32, Arc<[u8]>)>> = planned
        .files
        .iter()
        .map(|file| {
            let at = *by_path.get(&(file.store.as_str(), file.path.as_str()))?;
            Some((at as u32, Arc::from(catalog.files[at].identity.to_key())))
        })
        .collect();
    let mut wants = Vec::with_capacity(planned.chunks.len());
    let mut missing: Option<(u64, String)> = None;
    let mut miss = |reason: String| missing.get_or_insert((0, reason)).0 += 1;
    for (file, row_group, column, form) in &planned.chunks {
        let Some(Some((at, key))) = files.get(*file as usize) else {
            miss(match planned.files.get(*file as usize) {
                Some(file) => format!("{} is not among the table's files", file.url()),
                None => format!("the plan has no file {file}"),
            });
            continue;
        };
        if let Err(error) = catalog.files[*at as usize].chunk_ranges(*row_group, *column) {
            miss(error.to_string());
            continue;
        }
        // In the form that the plan names, which the coordinator chose by a budget that is not known
        // here.
        let bytes = stoa_layout::chunk_bytes(
            catalog,
            ChunkRef {
                file: *at,
                row_group: *row_group,
                column: *column,
            },
        )
        .unwrap_or_default();
        wants.push(Want {
            key: ChunkKey {
                file: Arc::clone(key),
                row_group: *row_group,
                column: *column,
            },
            table: 0,
            also: vec![],
            file: *at,
            form: *form,
            bytes: bytes.of(*form),
            compressed_bytes: bytes.parquet,
            decoded_bytes: match form {
                Form::Parquet => 0,
                _ => bytes.arrow,
            },
        });
    }
    (wants, missing)
}

/// Who else is to hold the wanted chunks; files are found by their paths, as in [`find_chunks`].
fn find_rivals(me: &str, wants: &[Want], others: &Others, catalog: &TableCatalog) -> Rivals {
    if others.is_empty() {
        return Rivals::new();
    }
    let by_path: HashMap<(&str, &str), Arc<[u8]>> = catalog
        .files
        .iter()
        .map(|file| {
            let identity = &file.identity;
            let place = (identity.store.as_str(), identity.path.as_str());
            (place, Arc::from(identity.to_key()))
        })
        .collect();
    let mut holders: HashMap<&ChunkKey, Vec<u32>> =
        wants.iter().map(|want| (&want.key, Vec::new())).collect();
    for (number, (_, planned)) in others.iter().enumerate() {
        let keys: Vec<Option<&Arc<[u8]>>> = planned
            .files
            .iter()
            .map(|file| by_path.get(&(file.store.as_str(), file.path.as_str())))
            .collect();
        for (file, row_group, column, _) in &planned.chunks {
            let Some(Some(file)) = keys.get(*file as usize) else {
                continue;
            };
            let key = ChunkKey {
                file: Arc::clone(file),
                row_group: *row_group,
                column: *column,
            };
            if let Some(holders) = holders.get_mut(&key) {
                holders.push(number as u32);
            }
        }
    }
    // There are few different sets of workers, and many chunks.
    let mut sets: HashMap<&[u32], HashMap<Place, u64>> = HashMap::new();
    for want in wants {
        if let Some(set) = holders.get(&want.key).filter(|set| !set.is_empty()) {
            let places = sets.entry(set).or_default();
            *places.entry(Place::of(&want.key)).or_default() += want.compressed_bytes;
        }
    }
    let shared = sets.into_iter().map(|(set, places)| {
        let named = set.iter().map(|at| others[*at as usize].0.clone());
        let named: Arc<[String]> = named.collect();
        // All members of the set number themselves in the same way.
        let mut members: Vec<(&str, Option<u32>)> = vec![(me, None)];
        members.extend(
            (0..)
                .zip(named.iter())
                .map(|(at, id)| (id.as_str(), Some(at))),
        );
        members.sort_unstable();
        let members: Vec<Option<u32>> = members.into_iter().map(|(_, at)| at).collect();
        let firsts = shares(&places, members.len() as u32);
        (set, (named, members, firsts))
    });
    let shared: HashMap<&[u32], _> = shared.collect();
    let mut rivals = Rivals::new();
    for (key, set) in &holders {
        if let Some((named, members, firsts)) = shared.get(set.as_slice()) {
            let rival = Rival {
                others: Arc::clone(named),
                first: members[firsts[&Place::of(key)] as usize],
            };
            rivals.insert((*key).clone(), rival);
        }
    }
    rivals
}

/// Whether a table's new catalog is published before its chunks are loaded, rather than with the
/// last of them.
///
/// A reader follows the catalog, so a new version of other files must not be shown before its
/// chunks are there: until then the old one is read from memory. But where there is no old one, or
/// where its files were overwritten and can no longer be read, the new one is better at once.
pub(crate) fn shows_at_once(published: Option<&TableCatalog>, next: &TableCatalog) -> bool {
    let Some(published) = published else {
        return true;
    };
    if published.version == next.version {
        return true;
    }
    let next_files: HashMap<(&str, &str), &ObjectIdentity> = next
        .files
        .iter()
        .map(|file| {
            (
                (file.identity.store.as_str(), file.identity.path.as_str()),
                &file.identity,
            )
        })
        .collect();
    published.files.iter().any(|file| {
        next_files
            .get(&(file.identity.store.as_str(), file.identity.path.as_str()))
            .is_some_and(|identity| **identity != file.identity)
    })
}
