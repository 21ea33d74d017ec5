//! The writer's role: replaces objects without pause, within a budget.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use stoa_shm::{
    CacheDir, CacheDirOptions, CacheWriter, ChunkKey, ChunkLocation, DEAD_SHARE_MAX, Error,
    ErrorKind, IndexContents, Recovery, SegmentWriter,
};

use crate::content::{CATALOG, CHUNK_BYTES, CHUNKS, OBJECTS, OBJECTS_PER_SEGMENT, Random};
use crate::content::{bytes, catalog, key, object_of, wrong_bytes};
use crate::report::Reporter;

/// Capacity of a segment: chunks, and the catalog in one more chunk's place.
const SEGMENT_CAPACITY: u64 =
    ((OBJECTS_PER_SEGMENT as u32 * CHUNKS + 1) as usize * CHUNK_BYTES) as u64;
/// Memory that a compaction takes at most: its segment, the footer's reserve, and the index.
const COMPACTION_BYTES: u64 = SEGMENT_CAPACITY + (256 << 10);
/// Memory that a replacement takes at most.
const REPLACEMENT_BYTES: u64 = 3 * COMPACTION_BYTES;
/// How long the writer waits for readers before it publishes less.
const PATIENCE: Duration = Duration::from_millis(300);

/// The objects of a cache and where their chunks are.
#[derive(Debug)]
pub struct Worker {
    writer: CacheWriter,
    random: Random,
    budget: u64,
    versions: Vec<u64>,
    next_version: u64,
    places: BTreeMap<ChunkKey, ChunkLocation>,
}

impl Worker {
    /// Opens the cache and takes over what is in it. Returns what did not hold.
    pub fn open(
        dir: &Path,
        seed: u64,
        budget: u64,
    ) -> Result<(Worker, Recovery, Vec<String>), Error> {
        let (writer, recovery) =
            CacheWriter::open(CacheDir::open(dir, CacheDirOptions::default())?)?;
        let mut problems = Vec::new();
        let mut versions = vec![0; OBJECTS as usize];
        let mut next_version = 1;
        for (key, location) in &recovery.chunks {
            match writer.read(location) {
                Ok(found) if wrong_bytes(key, &found) == 0 => {}
                Ok(_) => problems.push(format!("recovered {} with wrong bytes", key.readable())),
                Err(miss) => problems.push(format!("recovered {}, but {miss}", key.readable())),
            }
            if let Some((object, version)) = object_of(&key.file) {
                next_version = next_version.max(version + 1);
                // Whole objects only: the others are fetched again.
                let whole = (0..CHUNKS).all(|chunk| {
                    recovery
                        .chunks
                        .contains_key(&crate::content::key(object, version, chunk))
                });
                if whole {
                    let known = &mut versions[object as usize];
                    *known = version.max(*known);
                }
            }
        }
        let mut worker = Worker {
            writer,
            random: Random(seed),
            budget,
            versions,
            next_version,
            places: BTreeMap::new(),
        };
        for (object, chunk) in all_chunks() {
            let key = key(object, worker.versions[object as usize], chunk);
            if let Some(location) = recovery.chunks.get(&key) {
                worker.places.insert(key, *location);
            }
        }
        Ok((worker, recovery, problems))
    }

    /// The cache's writer.
    pub fn writer(&mut self) -> &mut CacheWriter {
        &mut self.writer
    }

    /// Replaces some objects and publishes; returns the bytes written.
    pub fn replace(&mut self) -> Result<u64, Error> {
        let segments = 1 + self.random.below(3);
        let mut objects: Vec<u32> = Vec::new();
        while objects.len() < segments as usize * OBJECTS_PER_SEGMENT {
            let object = self.random.below(u64::from(OBJECTS)) as u32;
            if !objects.contains(&object) {
                objects.push(object);
            }
        }
        let version = self.next_version;
        self.next_version += 1;
        let mut written = 0;
        let groups: Vec<&[u32]> = objects.chunks(OBJECTS_PER_SEGMENT).collect();
        let mut places = BTreeMap::new();
        for (at, group) in groups.iter().enumerate() {
            let mut segment = self.writer.new_segment(SEGMENT_CAPACITY)?;
            for &object in *group {
                for chunk in 0..CHUNKS {
                    let key = key(object, version, chunk);
                    let bytes = bytes(&key);
                    places.insert(key.clone(), segment.append(&key, 1, chunk, &bytes)?);
                    written += bytes.len() as u64;
                }
            }
            if at + 1 < groups.len() {
                // Every segment has a catalog, so that all have the same size.
                segment.append_catalog(CATALOG, &catalog(&self.versions))?;
                segment.seal()?;
                continue;
            }
            for object in &objects {
                self.versions[*object as usize] = version;
            }
            // Now and then an object is not cached any more.
            if self.random.percent(20) {
                let object = self.random.below(u64::from(OBJECTS)) as usize;
                self.versions[object] = 0;
            }
            self.places.append(&mut places);
            self.publish_with(segment)?;
        }
        Ok(written)
    }

    /// Publishes the current versions, their catalog in `segment`.
    fn publish_with(&mut self, mut segment: SegmentWriter) -> Result<(), Error> {
        segment.append_catalog(CATALOG, &catalog(&self.versions))?;
        let sealed = segment.seal()?;
        let wanted = |key: &ChunkKey| {
            object_of(&key.file)
                .is_some_and(|(object, version)| self.versions[object as usize] == version)
        };
        self.places.retain(|key, _| wanted(key));
        let chunks = self
            .places
            .iter()
            .map(|(key, location)| (key.clone(), *location))
            .collect();
        self.writer.publish(IndexContents {
            chunks,
            catalogs: sealed.catalogs,
        })?;
        Ok(())
    }

    /// Copies what is left in segments that are mostly dead.
    fn compact(&mut self) -> Result<(), Error> {
        let mut chunks: Vec<(ChunkKey, ChunkLocation)> = self
            .writer
            .compaction(DEAD_SHARE_MAX)
            .into_iter()
            .flat_map(|found| found.chunks)
            .collect();
        chunks.truncate(OBJECTS_PER_SEGMENT * CHUNKS as usize);
        let mut segment = self.writer.new_segment(SEGMENT_CAPACITY)?;
        for (key, location) in chunks {
            if let Ok(found) = self.writer.read(&location) {
                let copied = segment.append(&key, location.form, location.rows, &found)?;
                self.places.insert(key, copied);
            }
        }
        self.publish_with(segment)
    }

    /// Publishes half of it.
    fn shrink(&mut self) -> Result<(), Error> {
        for at in 0..self.versions.len() {
            if self.random.percent(50) {
                self.versions[at] = 0;
            }
        }
        self.republish()
    }

    /// Publishes what there is.
    pub fn republish(&mut self) -> Result<(), Error> {
        let segment = self.writer.new_segment(CHUNK_BYTES as u64)?;
        self.publish_with(segment)
    }

    /// Bytes of the budget that are left after reclaiming.
    fn room(&mut self) -> Result<u64, Error> {
        let report = self.writer.reclaim()?;
        Ok(self.budget.saturating_sub(report.total_bytes()))
    }
}

fn all_chunks() -> impl Iterator<Item = (u32, u32)> {
    (0..OBJECTS).flat_map(|object| (0..CHUNKS).map(move |chunk| (object, chunk)))
}

/// Replaces until standard input ends.
pub fn run(dir: &Path, seed: u64, budget: u64) -> Result<(), Error> {
    let mut report = Reporter::start();
    let (mut worker, recovery, problems) = Worker::open(dir, seed, budget)?;
    for problem in problems {
        report.violation(problem);
    }
    for dropped in recovery.dropped {
        report.violation(format!("dropped {}: {}", dropped.what, dropped.reason));
    }
    // What was adopted is in use from here on, or is given up.
    worker.republish()?;
    worker.writer().discard_unpublished();
    report.flush();
    let mut waiting_since: Option<Instant> = None;
    while !report.stopped() {
        let room = worker.room()?;
        let done = if room >= REPLACEMENT_BYTES {
            waiting_since = None;
            worker.replace()
        } else if room >= COMPACTION_BYTES && !worker.writer.compaction(DEAD_SHARE_MAX).is_empty() {
            worker.compact().map(|()| 0)
        } else {
            // Readers hold memory: publish less after a while, and never write over what they hold.
            if waiting_since.get_or_insert_with(Instant::now).elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(2));
                report.beat(0, 0);
                continue;
            }
            waiting_since = None;
            worker.shrink().map(|()| 0)
        };
        match done {
            Ok(bytes) => report.beat(1, bytes),
            // Another tenant's memory, not ours.
            Err(error) if error.kind() == ErrorKind::Space => {
                worker.writer().discard_unpublished();
                std::thread::sleep(Duration::from_millis(50));
                report.beat(0, 0);
            }
            Err(error) => return Err(error),
        }
    }
    report.flush();
    Ok(())
}
