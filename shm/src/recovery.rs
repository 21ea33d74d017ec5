//! What a new writer makes of a directory that another one left, however it ended.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher;
use std::os::unix::fs::MetadataExt;

use crate::dir::{CacheDir, FileIdentity, Name, open_file};
use crate::error::{Error, Result};
use crate::format::SegmentHeader;
use crate::handover::Doubt;
use crate::index::check_range_in;
use crate::reader::map_index;
use crate::scrub::{self, Claim};
use crate::segment::Content;
use crate::types::{
    CatalogLocation, ChunkKey, ChunkLocation, Dropped, Generation, IndexContents, Miss, Recovery,
    SegmentId,
};
use crate::writer::{Known, PublishedIndex};

/// The state from which a writer goes on.
pub(crate) struct Recovered {
    pub(crate) published: Option<PublishedIndex>,
    /// What of the published generation is intact.
    pub(crate) surviving: IndexContents,
    pub(crate) recovery: Recovery,
    pub(crate) known: BTreeMap<SegmentId, Known>,
    pub(crate) next_segment: u64,
    pub(crate) generation: Generation,
    /// Whether there is an index, and it names something that is not intact.
    pub(crate) damaged: bool,
}

/// Takes stock: checks the shape of everything, and hashes what is in doubt. Does not read what is
/// published otherwise. The caller holds the directory's lock.
pub(crate) fn recover(dir: &CacheDir, doubt: Doubt) -> Result<Recovered> {
    let names = dir.names()?;
    for name in &names {
        // Nobody else writes here: what is temporary was left by a death.
        if matches!(
            name,
            Name::IndexTemp | Name::SegmentTemp(_) | Name::DirectoryTemp
        ) {
            let path = dir.name_path(*name);
            std::fs::remove_file(&path).map_err(|error| Error::io("remove", &path, error))?;
        }
    }
    let mut dropped = Vec::new();
    let mut drop_it = |what: String, reason: String| dropped.push(Dropped { what, reason });
    let (published, index_exists) = match read_index(dir) {
        Ok(published) => {
            let exists = published.is_some();
            (published, exists)
        }
        Err(error) => {
            drop_it("index".to_string(), error.to_string());
            (None, true)
        }
    };
    let index = published.as_ref().map(|(index, _)| index);
    let mut damaged = index_exists && index.is_none();

    let mut known = BTreeMap::new();
    let mut unsound = BTreeMap::new();
    let mut orphans = BTreeMap::new();
    for id in names.iter().filter_map(|name| {
        if let Name::Segment(id) = name {
            Some(*id)
        } else {
            None
        }
    }) {
        let path = dir.name_path(Name::Segment(id));
        let metadata =
            std::fs::symlink_metadata(&path).map_err(|error| Error::io("inspect", &path, error))?;
        let allocated = metadata.blocks() * 512;
        let (file_bytes, data_end) = match scrub::map_segment(dir.path(), id) {
            Ok((map, geometry)) => {
                // Contents of a segment that the index names are dead unless the index names them.
                if index.and_then(|index| index.segment(id)).is_none() {
                    orphans.insert(id, geometry.contents(map.bytes()));
                }
                (geometry.file_bytes, geometry.data_end)
            }
            Err(problem) => {
                drop_it(format!("segment {id}"), problem.clone());
                unsound.insert(id, problem);
                (metadata.len(), SegmentHeader::BYTES as u64)
            }
        };
        known.insert(
            id,
            Known {
                file_bytes,
                data_end,
                allocated,
                unpublished: false,
            },
        );
    }

    let mut chunks: Vec<(ChunkKey, ChunkLocation)> = Vec::new();
    let mut catalogs: Vec<(String, CatalogLocation)> = Vec::new();
    if let Some(index) = index {
        let mut entries = 0;
        for slot in 0..index.chunk_slots() {
            match index.chunk_in(slot) {
                None => {}
                Some(Ok((file, entry))) => {
                    entries += 1;
                    let key = ChunkKey {
                        file: file.into(),
                        row_group: entry.row_group(),
                        column: entry.column(),
                    };
                    chunks.push((key, entry.location()));
                }
                Some(Err(miss)) => {
                    entries += 1;
                    drop_it(format!("index entry {slot}"), miss.to_string());
                    damaged = true;
                }
            }
        }
        if entries != index.chunk_count() {
            drop_it(
                "index".to_string(),
                format!(
                    "{entries} entries are there, expected {}",
                    index.chunk_count()
                ),
            );
            damaged = true;
        }
        for found in index.catalogs() {
            match found {
                Ok((name, location)) => catalogs.push((name.to_string(), location)),
                Err(miss) => {
                    drop_it("catalog".to_string(), miss.to_string());
                    damaged = true;
                }
            }
        }
        damaged |= index.segments().count() as u64 != index.segment_count();
    }
    let indexed = chunks.len();
    for (id, contents) in orphans {
        for content in contents {
            match content {
                Ok(Content::Chunk(key, location)) => chunks.push((key, location)),
                // A catalog's name does not fix its bytes: which of several is meant, only an index
                // can say.
                Ok(Content::Catalog(..)) => {}
                Err(problem) => drop_it(format!("segment {id}"), problem),
            }
        }
    }
    let of_chunks = chunks.iter().map(|(_, at)| Claim {
        segment: at.segment,
        offset: at.offset,
        length: at.length,
        checksum: at.checksum,
    });
    let of_catalogs = catalogs.iter().map(|(_, at)| Claim {
        segment: at.segment,
        offset: at.offset,
        length: at.length,
        checksum: at.checksum,
    });
    let claims: Vec<Claim> = of_chunks.chain(of_catalogs).collect();
    let shape = |claim: &Claim| {
        let id = claim.segment;
        match (unsound.get(&id), known.get(&id)) {
            (Some(problem), _) => Some(problem.clone()),
            (None, None) => Some(format!("cannot open segment {id}: it is not there")),
            (None, Some(known)) => {
                check_range_in(claim.offset, claim.length, id, known.data_end).err()
            }
        }
    };
    // Chunks of segments that no index names were sealed, but by whom and how is not known: hashed
    // before they are adopted. A catalog is hashed by whoever decodes it.
    let (sure, in_doubt) = match doubt {
        Doubt::Nothing => (indexed, indexed..chunks.len()),
        Doubt::Everything => (0, 0..claims.len()),
    };
    let mut problems: Vec<Option<String>> = Vec::with_capacity(claims.len());
    problems.extend(claims[..sure].iter().map(shape));
    problems.extend(scrub::check(dir.path(), &claims[in_doubt.clone()]));
    problems.extend(claims[in_doubt.end..].iter().map(shape));

    let hashed_bytes = claims[in_doubt].iter().map(|claim| claim.length).sum();
    let mut recovery = Recovery {
        hashed_bytes,
        ..Recovery::default()
    };
    let mut surviving = IndexContents::default();
    let mut adopted = BTreeSet::new();
    let (chunk_problems, catalog_problems) = problems.split_at(chunks.len());
    for (at, ((key, location), problem)) in chunks.into_iter().zip(chunk_problems).enumerate() {
        if let Some(problem) = problem {
            drop_it(key.readable(), Miss::Corrupt(problem.clone()).to_string());
            damaged |= at < indexed;
        } else if at < indexed {
            surviving.chunks.push((key.clone(), location));
            recovery.chunks.insert(key, location);
        } else if let std::collections::hash_map::Entry::Vacant(vacant) = recovery.chunks.entry(key)
        {
            vacant.insert(location);
            adopted.insert(location.segment);
        }
    }
    for ((name, location), problem) in catalogs.into_iter().zip(catalog_problems) {
        if let Some(problem) = problem {
            drop_it(
                format!("catalog {name:?}"),
                Miss::Corrupt(problem.clone()).to_string(),
            );
            damaged = true;
        } else {
            surviving.catalogs.push((name, location));
        }
    }
    recovery.catalogs.clone_from(&surviving.catalogs);
    for id in &adopted {
        if let Some(known) = known.get_mut(id) {
            known.unpublished = true;
        }
    }
    recovery.adopted = adopted.into_iter().collect();
    // One damaged segment can hold thousands of chunks.
    if let Some(first) = dropped.first() {
        let count = dropped.len();
        tracing::warn!(count, first = %first.what, reason = %first.reason, "dropped from the cache");
    }
    for problem in &dropped {
        tracing::debug!(what = %problem.what, reason = %problem.reason, "dropped from the cache");
    }
    recovery.dropped = dropped;

    let largest = names
        .iter()
        .filter_map(|name| name.segment())
        .map(|id| id.0)
        .max();
    let next_segment = next_segment(
        index.map(|index| index.next_segment()),
        largest,
        RandomState::new().hash_one(0),
    );
    let retired = names.iter().filter_map(|name| {
        if let Name::IndexRetired(at) = name {
            Some(*at)
        } else {
            None
        }
    });
    let generation = retired
        .chain(index.map(|index| index.generation()))
        .max()
        .unwrap_or(0);
    Ok(Recovered {
        published,
        surviving,
        recovery,
        known,
        next_segment,
        generation,
        damaged,
    })
}

fn read_index(dir: &CacheDir) -> Result<Option<PublishedIndex>> {
    let path = dir.index_path();
    let file = match open_file(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open index", &path, error)),
    };
    let metadata = file
        .metadata()
        .map_err(|error| Error::io("inspect", &path, error))?;
    if !metadata.is_file() {
        return Err(Error::corrupt(&path, "is not a file"));
    }
    Ok(Some((
        map_index(&path, &file, metadata.len())?,
        FileIdentity::from(&metadata),
    )))
}

/// The first segment name that was certainly never used. An index knows it. Without one, segments
/// may have been named and removed that nobody remembers but a reader with an old snapshot: names
/// then go on at a random distance.
fn next_segment(known: Option<u64>, largest: Option<u64>, random: u64) -> u64 {
    let after = largest.map_or(0, |largest| largest.saturating_add(1));
    match known {
        Some(known) => known.max(after),
        None if largest.is_none() => (random >> 2).max(1 << 32),
        None => after.saturating_add(random & 0xFF_FFFF_FFFF),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_name_is_never_used_again() {
        assert_eq!(
            next_segment(Some(10), Some(3), 7),
            10,
            "the index remembers removed segments"
        );
        assert_eq!(
            next_segment(Some(10), Some(12), 7),
            13,
            "a segment sealed after the last publication"
        );
        assert_eq!(
            next_segment(None, Some(12), 1 << 20),
            13 + (1 << 20),
            "the index is lost"
        );
        assert_eq!(
            next_segment(None, None, u64::MAX),
            u64::MAX >> 2,
            "everything is lost"
        );
        assert_eq!(next_segment(None, None, 0), 1 << 32);
    }
}
