//! The embedded store's file: what outlives the process.

use std::collections::hash_map::RandomState;
use std::fs::DirBuilder;
use std::hash::{BuildHasher, Hasher};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};

use super::state::{Durable, REVISION_EMPTY};
use crate::error::{Error, Result};
use crate::store::Entry;

/// Key → (create revision, mod revision, value).
const ENTRIES: TableDefinition<'_, &str, (i64, i64, &[u8])> = TableDefinition::new("entries");
/// Name → number.
const META: TableDefinition<'_, &str, i64> = TableDefinition::new("meta");

const META_FORMAT: &str = "format";
const META_CLUSTER_ID: &str = "cluster_id";
/// A revision that was never reached. A store that is opened begins there, so that revisions grow
/// across restarts although not every one of them is written.
const META_REVISION_CEILING: &str = "revision_ceiling";

const FORMAT: i64 = 1;
/// How many revisions are reserved by one write of the ceiling.
const REVISIONS_RESERVED: i64 = 1 << 20;
/// The file's name in its directory.
const FILE_NAME: &str = "metastore.redb";
/// redb's default of 1 GiB is far beyond what some records need.
const CACHE_BYTES: usize = 8 << 20;

#[derive(Debug)]
pub(super) struct Disk {
    db: Database,
    path: PathBuf,
    ceiling: i64,
}

/// What was found in the file.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) cluster_id: u64,
    pub(super) revision: i64,
    pub(super) entries: Vec<Entry>,
}

/// A number that no other store has, without a generator of our own.
pub(super) fn draw_cluster_id() -> u64 {
    RandomState::new().build_hasher().finish()
}

impl Disk {
    /// Opens or creates the file in `dir` (made with mode 0700 if missing).
    pub(super) fn open(dir: &Path) -> Result<(Disk, Loaded)> {
        let path = dir.join(FILE_NAME);
        let storage = |error: &dyn std::fmt::Display| Error::Storage {
            path: path.clone(),
            reason: format!("{error}; move it away to start with an empty metastore"),
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|error| Error::Storage {
                path: dir.to_owned(),
                reason: error.to_string(),
            })?;
        let db = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(&path)
            .map_err(|error| match error {
                DatabaseError::DatabaseAlreadyOpen => Error::Busy { path: path.clone() },
                other => storage(&other),
            })?;
        let mut disk = Disk {
            db,
            path: path.clone(),
            ceiling: 0,
        };
        let loaded = disk.load().map_err(|error| storage(&error))?;
        Ok((disk, loaded))
    }

    fn load(&mut self) -> Result<Loaded, Failure> {
        let txn = self.db.begin_write()?;
        let (cluster_id, revision, entries);
        {
            let mut meta = txn.open_table(META)?;
            let read = |name: &str| -> Result<Option<i64>, Failure> {
                Ok(meta.get(name)?.map(|guard| guard.value()))
            };
            match read(META_FORMAT)? {
                None | Some(FORMAT) => {}
                Some(found) => return Err(Failure::Format { found }),
            }
            cluster_id = read(META_CLUSTER_ID)?.map_or_else(draw_cluster_id, |id| id as u64);
            revision = read(META_REVISION_CEILING)?.unwrap_or(REVISION_EMPTY);
            self.ceiling = revision + REVISIONS_RESERVED;
            meta.insert(META_FORMAT, FORMAT)?;
            meta.insert(META_CLUSTER_ID, cluster_id as i64)?;
            meta.insert(META_REVISION_CEILING, self.ceiling)?;

            let table = txn.open_table(ENTRIES)?;
            entries = table
                .iter()?
                .map(|row| {
                    let (key, value) = row?;
                    let (create_revision, mod_revision, value) = value.value();
                    Ok(Entry {
                        key: key.value().to_owned(),
                        value: value.to_vec(),
                        create_revision,
                        mod_revision,
                        lease: None,
                    })
                })
                .collect::<Result<Vec<_>, Failure>>()?;
        }
        txn.commit()?;
        // What was just written is read back by the next process only if it is readable at all.
        self.db.begin_read()?.open_table(META)?;
        Ok(Loaded {
            cluster_id,
            revision,
            entries,
        })
    }

    /// Writes rows, and the ceiling if `revision` comes near it. On an error nothing is written.
    pub(super) fn write(&mut self, revision: i64, rows: &[Durable<'_>]) -> Result<()> {
        let ceiling = (revision + 1 >= self.ceiling).then_some(revision + REVISIONS_RESERVED);
        if rows.is_empty() && ceiling.is_none() {
            return Ok(());
        }
        self.try_write(rows, ceiling)
            .map_err(|error| Error::Storage {
                path: self.path.clone(),
                reason: error.to_string(),
            })?;
        self.ceiling = ceiling.unwrap_or(self.ceiling);
        Ok(())
    }

    fn try_write(&self, rows: &[Durable<'_>], ceiling: Option<i64>) -> Result<(), Failure> {
        let txn = self.db.begin_write()?;
        {
            let mut table = txn.open_table(ENTRIES)?;
            for row in rows {
                match row {
                    Durable::Put(entry) => {
                        let value = (
                            entry.create_revision,
                            entry.mod_revision,
                            entry.value.as_slice(),
                        );
                        table.insert(entry.key.as_str(), value)?;
                    }
                    Durable::Remove(key) => {
                        table.remove(*key)?;
                    }
                }
            }
            if let Some(ceiling) = ceiling {
                txn.open_table(META)?
                    .insert(META_REVISION_CEILING, ceiling)?;
            }
        }
        txn.commit()?;
        Ok(())
    }
}

/// redb has an error type an operation; here they are all one.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Redb(#[from] redb::Error),
    #[error("metastore format is {found}, this version reads {FORMAT}")]
    Format { found: i64 },
}

macro_rules! failure_from {
    ($($error:ty),*) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Failure::Redb(error.into())
            }
        })*
    };
}
failure_from!(
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError
);
