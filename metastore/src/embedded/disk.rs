//! The embedded store's file: what outlives the process.

use std::collections::hash_map::RandomState;
use std::fs::DirBuilder;
use std::hash::{BuildHasher, Hasher};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use redb::{
    Database, DatabaseError, ReadOnlyDatabase, ReadableDatabase, ReadableTable, TableDefinition,
};

use super::holder;
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
        let storage = |failure: Failure| failure.of(&path);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|error| Failure::Redb(redb::Error::Io(error)).of(dir))?;
        if !path.exists() {
            make(&path).map_err(storage)?;
        }
        let db = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(&path)
            .map_err(|error| match error {
                DatabaseError::DatabaseAlreadyOpen => Error::Busy {
                    holder: holder::of(&path),
                    path: path.clone(),
                },
                other => storage(Failure::Redb(other.into())),
            })?;
        let mut disk = Disk {
            db,
            path: path.clone(),
            ceiling: 0,
        };
        let loaded = disk.load().map_err(storage)?;
        Ok((disk, loaded))
    }

    /// What lies in the file of `dir`, without a write to it.
    pub(super) fn read(dir: &Path) -> Result<(PathBuf, Loaded)> {
        let path = dir.join(FILE_NAME);
        let read = || -> Result<Loaded, Failure> {
            let db = ReadOnlyDatabase::open(&path).map_err(redb::Error::from)?;
            let txn = db.begin_read()?;
            let meta = txn.open_table(META)?;
            let number = |name: &str| -> Result<Option<i64>, Failure> {
                Ok(meta.get(name)?.map(|guard| guard.value()))
            };
            match number(META_FORMAT)? {
                None | Some(FORMAT) => {}
                Some(found) => return Err(Failure::Format { found }),
            }
            Ok(Loaded {
                cluster_id: number(META_CLUSTER_ID)?.unwrap_or_default() as u64,
                revision: number(META_REVISION_CEILING)?.unwrap_or(REVISION_EMPTY),
                entries: entries_of(&txn.open_table(ENTRIES)?)?,
            })
        };
        let loaded = read().map_err(|failure| failure.of(&path))?;
        Ok((path, loaded))
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

            entries = entries_of(&txn.open_table(ENTRIES)?)?;
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
            .map_err(|failure| failure.of(&self.path))?;
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

/// Makes the file whole before it gets its name: what a full disk cut short would be taken for a
/// damaged store ever after.
fn make(path: &Path) -> Result<(), Failure> {
    let unfinished = path.with_extension(format!("{:016x}.new", draw_cluster_id()));
    let made = Database::builder()
        .set_cache_size(CACHE_BYTES)
        .create(&unfinished);
    let made = made.map(drop).map_err(|error| Failure::Redb(error.into()));
    if made.is_ok() {
        // A link is never made over another process's file. Where there are no links, or somebody
        // was faster, the file is opened or made under its name.
        let _ = std::fs::hard_link(&unfinished, path);
    }
    let _ = std::fs::remove_file(&unfinished);
    made
}

fn entries_of(
    table: &impl ReadableTable<&'static str, (i64, i64, &'static [u8])>,
) -> Result<Vec<Entry>, Failure> {
    let rows = table.iter()?.map(|row| {
        let (key, value) = row?;
        let (create_revision, mod_revision, value) = value.value();
        Ok(Entry {
            key: key.value().to_owned(),
            value: value.to_vec(),
            create_revision,
            mod_revision,
            lease: None,
        })
    });
    rows.collect()
}

/// redb has an error type an operation; here they are all one.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Redb(#[from] redb::Error),
    #[error("metastore format is {found}, this version reads {FORMAT}")]
    Format { found: i64 },
}

impl Failure {
    /// The error of the file or directory, with what to do about it. Only what cannot be read is
    /// worth to be moved away: it holds every layout.
    fn of(self, path: &Path) -> Error {
        use std::io::ErrorKind;
        const ELSEWHERE: &str =
            "set state.location (or XDG_STATE_HOME) to a directory that you can write to";
        let remedy = match &self {
            Failure::Redb(redb::Error::Io(error)) => match error.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                    "nothing is lost; make room there, or set state.location (or XDG_STATE_HOME) to \
                     another directory"
                }
                ErrorKind::InvalidData | ErrorKind::UnexpectedEof => {
                    "move it away to start with an empty metastore"
                }
                _ => ELSEWHERE,
            },
            Failure::Redb(_) => "move it away to start with an empty metastore",
            Failure::Format { .. } => {
                "use the version of Stoa that wrote it, or move it away to start with an empty \
                 metastore"
            }
        };
        Error::Storage {
            path: path.to_owned(),
            reason: format!("{self}; {remedy}"),
        }
    }
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
