//! What a writer does between publications: give memory back, say who holds it, pin, scrub, compact.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::compact::{Compaction, is_worth_compacting};
use crate::dir::{FileIdentity, Name, open_file};
use crate::error::{Error, Result};
use crate::faults::{Step, reached};
use crate::format::SegmentHeader;
use crate::lock;
use crate::mapped::{ChunkBytes, SegmentMap, guard};
use crate::scrub::{self, SegmentCheck};
use crate::types::{ChunkKey, ChunkLocation, MemoryReport, Miss, SegmentId, VerifyReport};
use crate::writer::{CacheWriter, Known};

impl CacheWriter {
    /// Gives up segments that were sealed or adopted but never published: [`CacheWriter::reclaim`]
    /// removes them.
    pub fn discard(&self, segments: &[SegmentId]) {
        let mut known = guard(&self.shared.known);
        for id in segments {
            if let Some(known) = known.get_mut(id) {
                known.unpublished = false;
            }
        }
    }

    /// Gives up all segments that were sealed or adopted but never published. For when no load is
    /// under way.
    pub fn discard_unpublished(&self) {
        for known in guard(&self.shared.known).values_mut() {
            known.unpublished = false;
        }
    }

    /// Removes segments that the current generation does not name and no reader maps, and says what
    /// memory is held. Costs one look at each segment that some reader retains.
    ///
    /// # Errors
    /// [`Error::Locked`] if another process has become the writer, whose segments these may be.
    pub fn reclaim(&mut self) -> Result<MemoryReport> {
        self.hold_lock()?;
        let live = self.live_segments();
        let live: BTreeSet<SegmentId> = live.into_iter().collect();
        let garbage: Vec<SegmentId> = guard(&self.shared.known)
            .iter()
            .filter(|(id, known)| !known.unpublished && !live.contains(id))
            .map(|(id, _)| *id)
            .collect();
        let dir = &self.shared.dir;
        for id in garbage {
            // Out of the way first: whoever opens it afterwards finds no such segment, whoever
            // opened it before has its lock.
            let (from, to) = (
                dir.name_path(Name::Segment(id)),
                dir.name_path(Name::SegmentRetired(id)),
            );
            if ignore_missing(&from, std::fs::rename(&from, &to)) {
                guard(&self.shared.known).remove(&id);
            }
            reached(Step::SegmentRetired);
        }
        for name in dir.names()? {
            if !matches!(name, Name::SegmentRetired(_) | Name::IndexRetired(_)) {
                continue;
            }
            #[cfg(feature = "mutants")]
            if crate::faults::Mutant::InPlaceWrite.is_chosen() && name.segment().is_some() {
                continue;
            }
            let path = dir.name_path(name);
            let removable = || -> std::io::Result<bool> {
                let file = open_file(&path)?;
                // A death between linking and renaming leaves the current index with a second name.
                let current = self.published.as_ref().map(|published| published.identity);
                Ok(current == Some(FileIdentity::from(&file.metadata()?))
                    || !lock::is_locked(&file)?)
            };
            let remove = || {
                if removable()? {
                    std::fs::remove_file(&path)
                } else {
                    Ok(())
                }
            };
            ignore_missing(&path, remove());
        }
        self.memory()
    }

    /// What memory is held, without removing anything.
    pub fn memory(&self) -> Result<MemoryReport> {
        let mut report = MemoryReport::default();
        let known = guard(&self.shared.known).clone();
        let mut live = BTreeSet::new();
        for segment in self.index_segments() {
            live.insert(segment.id);
            report.segments += 1;
            if let Some(known) = known.get(&segment.id) {
                report.live_bytes += known.allocated;
                report.dead_bytes_in_live += data_bytes(known).saturating_sub(segment.live_bytes);
            }
        }
        for (_, known) in known.iter().filter(|(id, _)| !live.contains(id)) {
            if known.unpublished {
                report.unpublished_bytes += known.allocated;
            } else {
                report.retained_bytes += known.allocated;
            }
        }
        let dir = &self.shared.dir;
        for name in dir.names()? {
            let Ok(metadata) = std::fs::symlink_metadata(dir.name_path(name)) else {
                continue;
            };
            let allocated = metadata.blocks() * 512;
            match name {
                Name::Index | Name::IndexTemp | Name::Directory | Name::DirectoryTemp => {
                    report.index_bytes += allocated
                }
                Name::IndexRetired(_) => report.retained_bytes += allocated,
                Name::SegmentRetired(_) => {
                    report.retained_bytes += allocated;
                    report.retained_segments += 1;
                }
                Name::SegmentTemp(_) => report.unpublished_bytes += allocated,
                Name::Segment(_) => {}
            }
        }
        Ok(report)
    }

    /// Keeps all live segments in memory, now and as generations follow, until
    /// [`CacheWriter::unpin`]. Returns the bytes that are pinned.
    ///
    /// # Errors
    /// [`Error::Pin`], and nothing is pinned then.
    pub fn pin(&self) -> Result<u64> {
        let mut pins = guard(&self.pins);
        let mut kept = pins.take().unwrap_or_default();
        let mut next = BTreeMap::new();
        let mut bytes = 0;
        for id in self.live_segments() {
            let map = match kept.remove(&id) {
                Some(map) => map,
                None => {
                    let Ok((map, geometry)) = scrub::map_segment(&self.place.path, id) else {
                        continue;
                    };
                    map.lock().map_err(|source| Error::Pin {
                        bytes: geometry.file_bytes,
                        source,
                    })?;
                    map
                }
            };
            bytes += map.bytes().len() as u64;
            next.insert(id, map);
        }
        *pins = Some(next);
        Ok(bytes)
    }

    /// Lets the system swap the cache again.
    pub fn unpin(&self) {
        *guard(&self.pins) = None;
    }

    /// Hashes everything the current generation names. Takes as long as reading it all; a slow walk
    /// calls [`CacheWriter::check`] for one of [`CacheWriter::live_segments`] after the other.
    pub fn verify(&self) -> VerifyReport {
        self.verify_where(None)
    }

    /// As [`CacheWriter::verify`], for these segments only. Looks at every entry of the index.
    pub fn verify_segments(&self, segments: &[SegmentId]) -> VerifyReport {
        self.verify_where(Some(segments))
    }

    /// Begins to walk through a sealed segment, part by part, while the writer does other things.
    ///
    /// # Errors
    /// Why it cannot be opened, or what is wrong with its header.
    pub fn check(&self, segment: SegmentId) -> Result<SegmentCheck, String> {
        SegmentCheck::open(&self.place.path, segment)
    }

    /// What is wrong with the index itself, if anything, as in [`VerifyReport`].
    pub fn check_index(&self) -> Option<String> {
        self.verify_segments(&[]).index_problem
    }

    fn verify_where(&self, only: Option<&[SegmentId]>) -> VerifyReport {
        let Some(published) = &self.published else {
            return VerifyReport::default();
        };
        let mut report = scrub::verify(&published.index, &self.place.path, only);
        let path = self.shared.dir.index_path();
        match std::fs::symlink_metadata(&path) {
            Ok(metadata) if FileIdentity::from(&metadata) == published.identity => {}
            Ok(_) => {
                report.index_problem = Some("the index was replaced by somebody else".to_string())
            }
            Err(error) => {
                report.index_problem = Some(format!("the index cannot be inspected: {error}"))
            }
        }
        report
    }

    /// Segments that the current generation names.
    pub fn live_segments(&self) -> Vec<SegmentId> {
        self.index_segments().map(|segment| segment.id).collect()
    }

    /// Segments that the current generation names, with the sizes of their files.
    pub fn live_segment_files(&self) -> Vec<(SegmentId, u64)> {
        self.index_segments()
            .map(|segment| (segment.id, segment.file_bytes))
            .collect()
    }

    /// The bytes of a chunk that was sealed, published or recovered, for example to copy them.
    pub fn read(&self, location: &ChunkLocation) -> Result<ChunkBytes, Miss> {
        SegmentMap::shared(&self.place, location.segment, None)?.chunk(
            location.offset,
            location.length,
            Some(location.checksum),
        )
    }

    /// Live segments of whose data more than `dead_share_max` (usually
    /// [`DEAD_SHARE_MAX`](crate::DEAD_SHARE_MAX)) is named by nothing: copy what they hold into a new
    /// segment, publish, and reclaim.
    pub fn compaction(&self, dead_share_max: f64) -> Vec<Compaction> {
        let Some(published) = &self.published else {
            return Vec::new();
        };
        let known = guard(&self.shared.known);
        let mut found: BTreeMap<SegmentId, Compaction> = self
            .index_segments()
            .filter_map(|segment| {
                let known = known.get(&segment.id)?;
                let data = data_bytes(known);
                is_worth_compacting(data, segment.live_bytes, dead_share_max).then(|| {
                    let compaction = Compaction {
                        segment: segment.id,
                        file_bytes: known.file_bytes,
                        dead_bytes: data - segment.live_bytes,
                        chunks: Vec::new(),
                        catalogs: Vec::new(),
                    };
                    (segment.id, compaction)
                })
            })
            .collect();
        if !found.is_empty() {
            for (file, entry) in published.index.chunks() {
                if let Some(compaction) = found.get_mut(&entry.location().segment) {
                    let key = ChunkKey {
                        file: file.into(),
                        row_group: entry.row_group(),
                        column: entry.column(),
                    };
                    compaction.chunks.push((key, entry.location()));
                }
            }
            for (name, location) in published.index.catalogs().flatten() {
                if let Some(compaction) = found.get_mut(&location.segment) {
                    compaction.catalogs.push((name.to_string(), location));
                }
            }
        }
        found.into_values().collect()
    }
}

/// Bytes of a segment that hold chunks.
fn data_bytes(known: &Known) -> u64 {
    known.data_end - SegmentHeader::BYTES as u64
}

/// Whether it was done, or there was nothing to do. Something odd under one of our names must not
/// keep the rest from being reclaimed.
fn ignore_missing(path: &Path, done: std::io::Result<()>) -> bool {
    match done {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot be reclaimed");
            false
        }
        _ => true,
    }
}
