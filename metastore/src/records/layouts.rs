//! Layout documents, and requests to load them.

use serde::{Deserialize, Serialize};

use super::{
    ATTEMPTS_MAX, BATCH_OPS_MAX, Leadership, Records, contention, decode, text, unchanged,
};
use crate::error::{Error, Result};
use crate::keys::{self, Key};
use crate::model::{
    CacheVersion, LoadRequest, PartPointer, Rejection, TableState, split_table_version,
    table_version,
};
use crate::plan::{PART_BYTES_MAX, check_parts, pointer_to, split_text};
use crate::store::{Condition, Entry, Op, Txn};

/// The value of `layout/{table}/{version}` when the document lies in parts.
#[derive(Serialize, Deserialize)]
struct Split {
    #[serde(rename = "$parts")]
    pointer: PartPointer,
}

/// The value of `layout_head/{table}`.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Head {
    version: u64,
    /// Whether all layouts were dropped; the version stays, so that those to come are greater.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dropped: bool,
    /// Who made the table, where that was not `stoa layout`.
    #[serde(skip_serializing_if = "Option::is_none")]
    made_by: Option<String>,
}

/// Who makes the tables of `CREATE EXTERNAL TABLE … STORED AS STOA`.
pub const MADE_BY_SQL: &str = "sql";

/// How far a table that is to be dropped from memory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// A plan still wants it, or none says yet that it is to be dropped.
    Planned,
    /// These workers still hold it, or have not heard of that plan.
    HeldBy(Vec<String>),
    /// No live worker has anything of it.
    Gone,
}

/// What became of a request to drop a table's layouts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayoutsDropped {
    /// There were none.
    Nothing,
    /// They were published by somebody else than was asked for, and stay.
    NotTheirs,
    /// They are gone; whether the table was asked to be loaded, so that it has to leave memory.
    Dropped {
        /// Whether it may be in memory.
        was_requested: bool,
    },
}

impl Records {
    /// Publishes a layout document. Publishing the same content again is fine.
    ///
    /// Fails with [`Error::StaleVersion`] when the server holds a later version, with
    /// [`Error::Conflict`] when it holds this version with other content. Versions may skip.
    pub async fn publish_layout(
        &self,
        table: &str,
        version: u64,
        document_json: &str,
    ) -> Result<()> {
        self.publish_layout_by(None, table, version, document_json)
            .await
    }

    /// [`Records::publish_layout`], noting who makes the table, so that whoever makes tables drops
    /// no others. What `stoa layout` publishes is noted as nobody's, and takes the table over.
    pub async fn publish_layout_by(
        &self,
        made_by: Option<&str>,
        table: &str,
        version: u64,
        document_json: &str,
    ) -> Result<()> {
        let key = keys::layout(table, version);
        split_table_version(&table_version(table, version))?;
        let content: serde_json::Value = serde_json::from_str(document_json)
            .ok()
            .filter(serde_json::Value::is_object)
            .ok_or_else(|| Error::Corrupt {
                key: key.clone(),
                reason: "a layout document is a JSON object, and this is none".to_owned(),
            })?;
        let head_key = keys::layout_head(table);
        let mut value: Option<Vec<u8>> = None;
        for _ in 0..ATTEMPTS_MAX {
            let head = self.store.get(&head_key).await?;
            let Head {
                version: current,
                dropped,
                ..
            } = head
                .as_ref()
                .map(decode::<Head>)
                .transpose()?
                .unwrap_or_default();
            if current > version || current == version && dropped {
                return Err(Error::StaleVersion {
                    table: table.to_owned(),
                    current,
                    given: version,
                });
            }
            if current == version {
                // Either somebody else's, or our own transaction whose answer was lost.
                let published = self.layout(table, version).await?;
                let published = published.and_then(|p| serde_json::from_str(&p).ok());
                return if published.as_ref() == Some(&content) {
                    Ok(())
                } else {
                    Err(Error::Conflict {
                        table: table.to_owned(),
                        version,
                    })
                };
            }
            let document = match &value {
                Some(value) => value.clone(),
                None => value
                    .insert(self.store_document(table, version, document_json).await?)
                    .clone(),
            };
            let then = vec![
                Op::put(&key, document),
                Op::put(
                    &head_key,
                    super::encode(&Head {
                        version,
                        dropped: false,
                        made_by: made_by.map(str::to_owned),
                    }),
                ),
            ];
            let when = vec![unchanged(&head_key, head.as_ref())];
            if self.store.txn(Txn { when, then }).await?.committed {
                return Ok(());
            }
        }
        Err(contention(head_key))
    }

    /// What to write under the document's key: itself if it is small, else the pointer to its
    /// parts, which are written here.
    async fn store_document(&self, table: &str, version: u64, document: &str) -> Result<Vec<u8>> {
        if document.len() <= PART_BYTES_MAX {
            return Ok(document.as_bytes().to_vec());
        }
        let pieces = split_text(document, PART_BYTES_MAX);
        let pointer = pointer_to(&pieces);
        for (number, piece) in pieces.iter().enumerate() {
            // The digest in the key makes this put the same whoever does it, and however often.
            let key = keys::layout_part(table, version, &pointer.digest, number as u32);
            self.store
                .txn(Txn {
                    when: Vec::new(),
                    then: vec![Op::put(key, *piece)],
                })
                .await?;
        }
        Ok(super::encode(&Split { pointer }))
    }

    /// The document of a version, as it was published.
    pub async fn layout(&self, table: &str, version: u64) -> Result<Option<String>> {
        let key = keys::layout(table, version);
        let Some(entry) = self.store.get(&key).await? else {
            return Ok(None);
        };
        let Ok(Split { pointer }) = serde_json::from_slice::<Split>(&entry.value) else {
            return Ok(Some(text(&entry)?.to_owned()));
        };
        let prefix = format!("{key}/{}.", pointer.digest);
        let mut parts: Vec<(u32, Entry)> = Vec::new();
        for part in self.store.list(&prefix).await?.entries {
            if let Some(Key::LayoutPart { part: number, .. }) = keys::parse(&part.key) {
                parts.push((number, part));
            }
        }
        parts.sort_by_key(|(number, _)| *number);
        let pieces = parts
            .iter()
            .map(|(_, part)| text(part))
            .collect::<Result<Vec<_>>>()?;
        check_parts(&pointer, &pieces).map_err(|reason| Error::Corrupt { key, reason })?;
        Ok(Some(pieces.concat()))
    }

    /// Forgets all layouts of a table, and asks for it to be dropped from memory. With `made_by`
    /// only where that was who made it.
    ///
    /// What is left are the numbers: a version published later is greater than all before, so that
    /// a worker that is away meanwhile does not take the new table for the old one.
    pub async fn drop_layouts(&self, table: &str, made_by: Option<&str>) -> Result<LayoutsDropped> {
        let head_key = keys::layout_head(table);
        let request_key = keys::layout_version(table);
        for _ in 0..ATTEMPTS_MAX {
            let entry = self.store.get(&head_key).await?;
            let head = entry.as_ref().map(decode::<Head>).transpose()?;
            let Some(head) = head.filter(|head| !head.dropped) else {
                return Ok(LayoutsDropped::Nothing);
            };
            if made_by.is_some() && head.made_by.as_deref() != made_by {
                return Ok(LayoutsDropped::NotTheirs);
            }
            let requested = self.store.get(&request_key).await?;
            let mut then = vec![Op::put(
                &head_key,
                super::encode(&Head {
                    version: head.version,
                    dropped: true,
                    made_by: None,
                }),
            )];
            if let Some(requested) = &requested {
                let request = LoadRequest {
                    unloaded: true,
                    ..load_request_of(requested)?
                };
                then.push(Op::put(&request_key, request.to_string()));
            }
            let when = vec![
                unchanged(&head_key, entry.as_ref()),
                unchanged(&request_key, requested.as_ref()),
            ];
            if self.store.txn(Txn { when, then }).await?.committed {
                self.forget_documents(table, head.version).await?;
                return Ok(LayoutsDropped::Dropped {
                    was_requested: requested.is_some(),
                });
            }
        }
        Err(contention(head_key))
    }

    /// Removes the documents up to a version; later ones may be published meanwhile.
    async fn forget_documents(&self, table: &str, up_to: u64) -> Result<()> {
        let listing = self.store.list_keys(&keys::layouts_of(table)).await?;
        let forgotten = |key: &str| match keys::parse(key) {
            Some(Key::Layout { version, .. } | Key::LayoutPart { version, .. }) => version <= up_to,
            _ => false,
        };
        let keys = listing.entries.iter().map(|entry| &entry.key);
        let doomed: Vec<Op> = keys.filter(|key| forgotten(key)).map(Op::delete).collect();
        for then in doomed.chunks(BATCH_OPS_MAX) {
            let then = then.to_vec();
            self.store
                .txn(Txn {
                    when: Vec::new(),
                    then,
                })
                .await?;
        }
        Ok(())
    }

    /// The published versions of a table, ascending.
    pub async fn layouts(&self, table: &str) -> Result<Vec<u64>> {
        let listing = self.store.list_keys(&keys::layouts_of(table)).await?;
        let mut versions: Vec<u64> = listing
            .entries
            .iter()
            .filter_map(|entry| match keys::parse(&entry.key) {
                Some(Key::Layout { version, .. }) => Some(version),
                _ => None,
            })
            .collect();
        versions.sort_unstable();
        Ok(versions)
    }

    /// The newest published version of a table.
    pub async fn latest_layout(&self, table: &str) -> Result<Option<u64>> {
        let head = self.layout_head(table).await?;
        Ok(head.filter(|head| !head.dropped).map(|head| head.version))
    }

    /// The version after all that were ever published of a table, dropped ones too.
    pub async fn next_layout(&self, table: &str) -> Result<u64> {
        let head = self.layout_head(table).await?;
        Ok(head.map_or(1, |head| head.version.saturating_add(1)))
    }

    async fn layout_head(&self, table: &str) -> Result<Option<Head>> {
        let head = self.store.get(&keys::layout_head(table)).await?;
        head.as_ref().map(decode::<Head>).transpose()
    }

    /// The tables that have a published layout, sorted.
    pub async fn layout_tables(&self) -> Result<Vec<String>> {
        let listing = self.store.list(keys::LAYOUT_HEAD_PREFIX).await?;
        let is_dropped = |entry: &Entry| decode::<Head>(entry).is_ok_and(|head| head.dropped);
        let mut tables: Vec<String> = listing
            .entries
            .iter()
            .filter(|entry| !is_dropped(entry))
            .filter_map(|entry| match keys::parse(&entry.key) {
                Some(Key::LayoutHead { table }) => Some(table),
                _ => None,
            })
            .collect();
        tables.sort_unstable();
        Ok(tables)
    }

    /// Removes documents of versions below `keep_from`, and parts that no document names.
    /// Returns how many keys that were. The version asked for and the one in force are kept.
    pub async fn prune_layouts(
        &self,
        leadership: &Leadership,
        table: &str,
        keep_from: u64,
    ) -> Result<u64> {
        let in_force = self
            .cache_version(table)
            .await?
            .map(|c| c.version())
            .transpose()?;
        let wanted = self
            .load_request(table)
            .await?
            .map(|request| request.version);
        let keep_from = [in_force, wanted]
            .into_iter()
            .flatten()
            .fold(keep_from, u64::min);
        let Some(Head { version: head, .. }) = self.layout_head(table).await? else {
            return Ok(0);
        };
        let listing = self.store.list(&keys::layouts_of(table)).await?;
        let named: std::collections::BTreeMap<u64, Option<String>> = listing
            .entries
            .iter()
            .filter_map(|entry| match keys::parse(&entry.key) {
                Some(Key::Layout { version, .. }) => {
                    let split = serde_json::from_slice::<Split>(&entry.value).ok();
                    Some((version, split.map(|s| s.pointer.digest)))
                }
                _ => None,
            })
            .collect();
        let doomed: Vec<Op> = listing
            .entries
            .iter()
            .filter(|entry| match keys::parse(&entry.key) {
                Some(Key::Layout { version, .. }) => version < keep_from && version != head,
                Some(Key::LayoutPart {
                    version, digest, ..
                }) => {
                    // Parts above the head may belong to a publication that is under way.
                    let orphan = named
                        .get(&version)
                        .is_none_or(|d| d.as_ref() != Some(&digest));
                    version != head && version < keep_from || orphan && version <= head
                }
                _ => false,
            })
            .map(|entry| Op::delete(&entry.key))
            .collect();
        for batch in doomed.chunks(BATCH_OPS_MAX) {
            self.fenced_batches(leadership, batch.to_vec()).await?;
        }
        Ok(doomed.len() as u64)
    }

    /// Asks for a version to be loaded: writes `layout_version/{table}`.
    ///
    /// Versions only increase ([`Error::StaleVersion`]; the same version again only after
    /// [`Records::request_unload`] or after it was refused: then it is tried anew), and must have
    /// been published ([`Error::UnknownLayout`]).
    pub async fn request_load(&self, table_version: &str) -> Result<LoadRequest> {
        let (table, version) = split_table_version(table_version)?;
        let request = LoadRequest {
            table: table.to_owned(),
            version,
            unloaded: false,
        };
        let key = keys::layout_version(table);
        let document = keys::layout(table, version);
        for attempt in 0..ATTEMPTS_MAX {
            let entry = self.store.get(&key).await?;
            if let Some(entry) = &entry {
                let current = load_request_of(entry)?;
                let again = current.version == version
                    && (current.unloaded || self.was_refused(entry).await?);
                if attempt > 0 && current == request && !again {
                    // Our own transaction, whose answer was lost; or somebody who wants the same.
                    return Ok(request);
                }
                if current.version >= version && !again {
                    return Err(Error::StaleVersion {
                        table: request.table,
                        current: current.version,
                        given: version,
                    });
                }
            }
            let when = vec![
                unchanged(&key, entry.as_ref()),
                Condition::Exists(document.clone()),
            ];
            let then = vec![Op::put(&key, request.to_string())];
            if self.store.txn(Txn { when, then }).await?.committed {
                return Ok(request);
            }
            if self.store.get(&document).await?.is_none() {
                let known = self.layouts(table).await?;
                return Err(Error::UnknownLayout {
                    table_version: table_version.to_owned(),
                    known,
                });
            }
        }
        Err(contention(key))
    }

    /// Whether the request that stands there was refused, as far as refusals are remembered.
    async fn was_refused(&self, request: &Entry) -> Result<bool> {
        let rejections = self.rejections().await?;
        let refused = |rejection: &Rejection| rejection.revision == request.mod_revision;
        Ok(rejections.iter().any(refused))
    }

    /// Asks for a table to be dropped from memory that is held there although nobody asks for it:
    /// what is left where the records were reset, or the worker was away.
    pub async fn request_unload_of_held(&self, table: &str) -> Result<LoadRequest> {
        if let Some(request) = self.request_unload(table).await? {
            return Ok(request);
        }
        let key = keys::layout_version(table);
        // The least version, so that whatever is published next can be asked for.
        let request = LoadRequest {
            table: table.to_owned(),
            version: 1,
            unloaded: true,
        };
        let when = vec![Condition::Absent(key.clone())];
        let then = vec![Op::put(&key, request.to_string())];
        match self.store.txn(Txn { when, then }).await?.committed {
            true => Ok(request),
            // Somebody has asked for it meanwhile, one way or the other.
            false => Err(contention(key)),
        }
    }

    /// Asks for a table to be dropped from memory. `None` when it was never asked for.
    pub async fn request_unload(&self, table: &str) -> Result<Option<LoadRequest>> {
        let key = keys::layout_version(table);
        for attempt in 0..ATTEMPTS_MAX {
            let Some(entry) = self.store.get(&key).await? else {
                return Ok(None);
            };
            let current = load_request_of(&entry)?;
            if attempt > 0 && current.unloaded {
                // Our own transaction, whose answer was lost; or somebody who wants the same.
                return Ok(Some(current));
            }
            let request = LoadRequest {
                unloaded: true,
                ..current
            };
            let when = vec![unchanged(&key, Some(&entry))];
            let then = vec![Op::put(&key, request.to_string())];
            if self.store.txn(Txn { when, then }).await?.committed {
                return Ok(Some(request));
            }
        }
        Err(contention(key))
    }

    /// How far a table that is to be dropped from memory is. One that `was_planned` has left the
    /// plans where there is none of it; else a plan that drops it is yet to be written.
    pub async fn leaving(&self, table: &str, was_planned: bool) -> Result<Leaving> {
        // The plan first: a report that is older than it is not taken for one of it.
        let plan = self.cache_version(table).await?;
        if !plan.as_ref().map_or(was_planned, |plan| plan.unloaded) {
            return Ok(Leaving::Planned);
        }
        let behind = |state: &TableState| {
            let has_heard =
                |plan: &CacheVersion| state.target.is_some_and(|target| target.plan >= plan.plan);
            state.held_bytes > 0 || plan.as_ref().is_some_and(|plan| !has_heard(plan))
        };
        let states = self.states().await?.into_iter();
        let holders = states.filter(|state| state.tables.get(table).is_some_and(behind));
        let holders: Vec<String> = holders.map(|state| state.id).collect();
        Ok(match holders.is_empty() {
            true => Leaving::Gone,
            false => Leaving::HeldBy(holders),
        })
    }

    /// What is wanted of a table.
    pub async fn load_request(&self, table: &str) -> Result<Option<LoadRequest>> {
        self.store
            .get(&keys::layout_version(table))
            .await?
            .as_ref()
            .map(load_request_of)
            .transpose()
    }

    /// What is wanted of all tables, sorted by table; what cannot be read is skipped with a warning.
    pub async fn load_requests(&self) -> Result<Vec<LoadRequest>> {
        let listing = self.store.list(keys::LAYOUT_VERSION_PREFIX).await?;
        let mut requests = Vec::new();
        for entry in &listing.entries {
            match load_request_of(entry) {
                Ok(request) => requests.push(request),
                Err(error) => tracing::warn!(%error, "skipping a load request"),
            }
        }
        requests.sort_by(|a, b| a.table.cmp(&b.table));
        Ok(requests)
    }
}

/// The request in a `layout_version/{table}` entry, checked against its key.
pub(crate) fn load_request_of(entry: &Entry) -> Result<LoadRequest> {
    let corrupt = |reason: String| Error::Corrupt {
        key: entry.key.clone(),
        reason,
    };
    let request: LoadRequest = text(entry)?
        .parse()
        .map_err(|error: Error| corrupt(error.to_string()))?;
    if keys::layout_version(&request.table) != entry.key {
        return Err(corrupt(format!(
            "it asks for another table, {}",
            request.table_version()
        )));
    }
    Ok(request)
}
