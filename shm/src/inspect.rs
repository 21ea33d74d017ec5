//! Whether a directory is still what its writer made of it: names can be taken away by people, by
//! cleaners of temporary files, and by logouts that empty /dev/shm.
//!
//! Mappings keep what they map, so nobody reads wrong bytes meanwhile; but what has no name any more
//! is found by nobody, and what is published beside another writer is lost to both.

use std::collections::BTreeSet;
use std::fs::symlink_metadata;
use std::io;
use std::path::Path;

use crate::dir::{FileIdentity, Name};
use crate::error::{Error, Result};
use crate::mapped::guard;
use crate::types::SegmentId;
use crate::writer::{CacheWriter, take_lock};

/// What of a directory is not as its writer left it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspection {
    /// Why the directory is not the writer's any more; nothing else is looked at then.
    pub lost: Option<String>,
    /// What is wrong with the name of the index.
    pub index: Option<String>,
    /// Sealed segments whose names are gone.
    pub segments: Vec<SegmentId>,
}

impl Inspection {
    /// Whether all is as it was left.
    pub fn is_intact(&self) -> bool {
        *self == Inspection::default()
    }
}

/// What lies at a path, beside what was expected there; `None` if it is that.
fn differs(path: &Path, expected: FileIdentity) -> io::Result<Option<&'static str>> {
    match symlink_metadata(path) {
        Ok(metadata) if FileIdentity::from(&metadata) == expected => Ok(None),
        Ok(_) => Ok(Some("has been replaced by somebody else")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some("is gone")),
        Err(error) => Err(error),
    }
}

impl CacheWriter {
    /// Looks at the names of the directory, at no file's content. A few system calls, and one a
    /// thousand names or so.
    ///
    /// # Errors
    /// Where that cannot be told: nothing is known to be wrong then.
    pub fn inspect(&self) -> Result<Inspection> {
        let place = &self.place;
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |error| Error::io("inspect", &path, error)
        };
        let mut found = Inspection::default();
        let directory = differs(&place.path, place.identity).map_err(failed(&place.path))?;
        if let Some(problem) = directory {
            found.lost = Some(format!("{} {problem}", place.path.display()));
            return Ok(found);
        }
        if let Some(published) = &self.published {
            let path = self.shared.dir.index_path();
            let index = differs(&path, published.identity).map_err(failed(&path))?;
            found.index = index.map(|problem| format!("{} {problem}", path.display()));
        }
        // Those that are known first: one that is sealed meanwhile is not missed.
        let known: Vec<SegmentId> = guard(&self.shared.known).keys().copied().collect();
        let names = self.shared.dir.names()?.into_iter();
        let there: BTreeSet<SegmentId> = names
            .filter_map(|name| match name {
                Name::Segment(id) => Some(id),
                _ => None,
            })
            .collect();
        found.segments = known;
        found.segments.retain(|id| !there.contains(id));
        Ok(found)
    }

    /// Forgets segments whose files are gone. Nothing that is published next may name them.
    pub fn forget(&self, segments: &[SegmentId]) {
        let mut known = guard(&self.shared.known);
        for id in segments {
            known.remove(id);
        }
    }

    /// Sees to it that this process still is the writer: a lock is worth something only as long as
    /// those who come find it. One whose name was taken away is taken anew.
    ///
    /// # Errors
    /// [`Error::Locked`] if another process has become the writer meanwhile, [`Error::Lost`] if the
    /// directory is not the one that this process opened: what it knows of lies in no other.
    pub(crate) fn hold_lock(&self) -> Result<()> {
        let (dir, place) = (&self.shared.dir, &self.place);
        let directory = differs(&place.path, place.identity)
            .map_err(|error| Error::io("inspect", &place.path, error))?;
        if let Some(problem) = directory {
            let problem = format!("{} {problem}", place.path.display());
            return Err(Error::Lost { problem });
        }
        let path = dir.lock_path();
        let mut lock = guard(&self.shared.lock);
        let ours = lock.file().metadata();
        let ours = ours.map_err(|error| Error::io("inspect", &path, error))?;
        let differs = differs(&path, FileIdentity::from(&ours));
        let differs = differs.map_err(|error| Error::io("inspect", &path, error))?;
        if let Some(problem) = differs {
            *lock = take_lock(dir)?;
            tracing::warn!(path = %path.display(), problem, "the directory's lock is taken anew");
        }
        Ok(())
    }
}
