//! Comparing bytes with their checksums, segment by segment, on a few threads.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::dir::{Name, open_file};
use crate::index::{Index, check_range_in};
use crate::map::FileMap;
use crate::mapped::{check_bytes, guard};
use crate::segment::{Content, SegmentGeometry};
use crate::types::{CatalogLocation, ChunkKey, ChunkLocation, Miss, SegmentId, VerifyReport};

/// Threads of a scrub: enough to use the memory's bandwidth.
const THREADS_MAX: usize = 4;

/// Something said to lie in a segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) segment: SegmentId,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) checksum: u64,
}

/// Maps a segment without locking it: for its owner, who must not look like a reader to itself.
pub(crate) fn map_segment(dir: &Path, id: SegmentId) -> Result<(FileMap, SegmentGeometry), String> {
    let path = dir.join(Name::Segment(id).to_string());
    let map = open_file(&path)
        .and_then(|file| FileMap::new(&file, file.metadata()?.len()))
        .map_err(|error| format!("cannot open segment {id}: {error}"))?;
    let geometry =
        SegmentGeometry::parse(&path, map.bytes(), id).map_err(|error| error.to_string())?;
    Ok((map, geometry))
}

/// One segment on its way through a slow walk: hashed part by part, by its own footer, without the
/// writer and its locks.
#[derive(Debug)]
pub struct SegmentCheck {
    map: FileMap,
    /// What is still to be hashed, the next one last.
    left: Vec<Content>,
    report: SegmentReport,
}

/// What a walk through one segment has found so far.
#[derive(Clone, Debug, Default)]
pub struct SegmentReport {
    /// Bytes hashed.
    pub bytes: u64,
    /// Chunks that are not what they were when they were sealed.
    pub bad_chunks: Vec<(ChunkKey, ChunkLocation, String)>,
    /// Catalogs that are not.
    pub bad_catalogs: Vec<(String, CatalogLocation, String)>,
    /// What is wrong with the segment itself, if anything: then nothing in it is to be believed
    /// without its index.
    pub problem: Option<String>,
}

impl SegmentCheck {
    /// Opens the segment. One that is not there any more holds nothing.
    pub(crate) fn open(dir: &Path, id: SegmentId) -> Result<SegmentCheck, String> {
        let (map, geometry) = map_segment(dir, id)?;
        let mut report = SegmentReport::default();
        let mut left = Vec::new();
        for content in geometry.contents(map.bytes()) {
            match content {
                Ok(content) => left.push(content),
                Err(problem) => report.problem = Some(problem),
            }
        }
        left.reverse();
        Ok(SegmentCheck { map, left, report })
    }

    /// Hashes what comes next, `bytes` of it or one chunk more; returns how many bytes those were.
    /// `None` when all is through.
    pub fn step(&mut self, bytes: u64) -> Option<u64> {
        let before = self.report.bytes;
        while self.report.bytes - before < bytes
            && let Some(content) = self.left.pop()
        {
            let check = |offset: u64, length: u64, checksum| {
                let start = offset as usize;
                let bytes = &self.map.bytes()[start..start + length as usize];
                check_bytes(bytes, checksum).err()
            };
            match content {
                Content::Chunk(key, at) => {
                    self.report.bytes += at.length;
                    if let Some(problem) = check(at.offset, at.length, at.checksum) {
                        self.report.bad_chunks.push((key, at, problem));
                    }
                }
                Content::Catalog(name, at) => {
                    self.report.bytes += at.length;
                    if let Some(problem) = check(at.offset, at.length, at.checksum) {
                        self.report.bad_catalogs.push((name, at, problem));
                    }
                }
            }
        }
        let hashed = self.report.bytes - before;
        (hashed > 0 || !self.left.is_empty()).then_some(hashed)
    }

    /// What was found.
    pub fn into_report(self) -> SegmentReport {
        self.report
    }
}

/// What is wrong with each claim, `None` where nothing is.
pub(crate) fn check(dir: &Path, claims: &[Claim]) -> Vec<Option<String>> {
    let mut by_segment: BTreeMap<SegmentId, Vec<usize>> = BTreeMap::new();
    for (at, claim) in claims.iter().enumerate() {
        by_segment.entry(claim.segment).or_default().push(at);
    }
    let segments: Vec<(SegmentId, Vec<usize>)> = by_segment.into_iter().collect();
    let problems = Mutex::new(vec![None; claims.len()]);
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((id, members)) = segments.get(next.fetch_add(1, Ordering::Relaxed)) {
            let found = check_segment(dir, *id, members.iter().map(|&at| &claims[at]));
            let mut problems = guard(&problems);
            for (&at, problem) in members.iter().zip(found) {
                problems[at] = problem;
            }
        }
    };
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(THREADS_MAX)
        .min(segments.len());
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    problems
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn check_segment<'a>(
    dir: &Path,
    id: SegmentId,
    claims: impl Iterator<Item = &'a Claim>,
) -> Vec<Option<String>> {
    match map_segment(dir, id) {
        Err(problem) => claims.map(|_| Some(problem.clone())).collect(),
        Ok((map, geometry)) => claims
            .map(|claim| {
                check_range_in(claim.offset, claim.length, id, geometry.data_end)
                    .and_then(|()| {
                        let start = claim.offset as usize;
                        check_bytes(
                            &map.bytes()[start..start + claim.length as usize],
                            claim.checksum,
                        )
                    })
                    .err()
            })
            .collect(),
    }
}

/// Hashes what an index names, in the given segments or in all.
pub(crate) fn verify<B: AsRef<[u8]>>(
    index: &Index<B>,
    dir: &Path,
    only: Option<&[SegmentId]>,
) -> VerifyReport {
    let wanted = |segment: SegmentId| only.is_none_or(|only| only.contains(&segment));
    let mut report = VerifyReport::default();
    let mut damaged: Vec<String> = Vec::new();
    let mut claims = Vec::new();
    let mut slots = Vec::new();
    for slot in 0..index.chunk_slots() {
        match index.chunk_in(slot) {
            Some(Ok((_, entry))) if wanted(entry.location().segment) => {
                let location = entry.location();
                claims.push(Claim {
                    segment: location.segment,
                    offset: location.offset,
                    length: location.length,
                    checksum: location.checksum,
                });
                slots.push(slot);
            }
            Some(Err(Miss::Corrupt(problem))) => damaged.push(problem),
            _ => {}
        }
    }
    let mut names = Vec::new();
    for found in index.catalogs() {
        match found {
            Ok((name, location)) if wanted(location.segment) => {
                claims.push(Claim {
                    segment: location.segment,
                    offset: location.offset,
                    length: location.length,
                    checksum: location.checksum,
                });
                names.push(name);
            }
            Err(Miss::Corrupt(problem)) => damaged.push(problem),
            _ => {}
        }
    }
    report.checked = claims.len() as u64;
    report.bytes = claims.iter().map(|claim| claim.length).sum();
    for (at, problem) in check(dir, &claims).into_iter().enumerate() {
        let Some(problem) = problem else { continue };
        if let Some(&slot) = slots.get(at) {
            if let Some(Ok((file, entry))) = index.chunk_in(slot) {
                let key = ChunkKey {
                    file: file.into(),
                    row_group: entry.row_group(),
                    column: entry.column(),
                };
                report.bad_chunks.push((key, problem));
            }
        } else {
            report
                .bad_catalogs
                .push((names[at - slots.len()].to_string(), problem));
        }
    }
    if let Some(first) = damaged.first() {
        report.index_problem = Some(format!(
            "{} damaged entries, the first: {first}",
            damaged.len()
        ));
    }
    report
}
