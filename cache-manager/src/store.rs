//! The worker's side of the shared memory: what is held, the segment being filled, publication.
//!
//! Everything here blocks (it writes memory and asks the kernel), so the async side calls it from
//! blocking tasks. One lock around it makes publications follow each other.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stoa_shm::{
    AccessCounters, CacheDir, CacheDirOptions, CacheWriter, CatalogLocation, ChunkKey,
    ChunkLocation, Handover, IndexContents, MemoryReport, Recovery, SealedSegment, SegmentCheck,
    SegmentId, SegmentReport, SegmentWriter, VerifyReport, Walk,
};

use tokio::sync::watch;

use crate::decode::EncodedChunk;
use crate::diff::{ENTRY_OVERHEAD_BYTES, form_tag};
use crate::peers::ServedSegments;
use crate::settings::{headroom_bytes, segment_bytes};
use crate::walk;

/// A segment is sealed when it is this old, so that a slow load that crashes has something to show.
const SEGMENT_AGE_MAX: Duration = Duration::from_secs(5);
/// The same when another worker waits for what is in it.
const SEGMENT_AGE_WHEN_WANTED: Duration = Duration::from_millis(200);
/// Share of dead bytes from which a segment is copied together.
const DEAD_SHARE_MAX: f64 = 0.15;
/// The same when memory is short.
const DEAD_SHARE_MAX_WHEN_SHORT: f64 = 0.02;
/// The most segments that one call compacts, so that the lock is not held for long.
const COMPACTIONS_MAX: usize = 16;

/// What became of a chunk that was to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    /// It lies in a segment, sealed or about to be.
    Yes,
    /// There is no room for its bytes.
    NoRoom,
}

/// Limits that the settings give.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// What `cache.size` allows; how much of that there is, the store finds out each time.
    pub(crate) capacity_bytes: u64,
}

struct Open {
    writer: SegmentWriter,
    since: Instant,
    chunks: HashSet<ChunkKey>,
}

/// The cache directory as its worker knows it.
pub(crate) struct Store {
    writer: CacheWriter,
    limits: Limits,
    /// Chunks in sealed segments: published, or to be published next.
    held: HashMap<ChunkKey, ChunkLocation>,
    catalogs: BTreeMap<String, CatalogLocation>,
    open: Option<Open>,
    /// Chunks sealed since the last publication.
    fresh: Vec<(ChunkKey, u64)>,
    /// Whether `held` or `catalogs` differ from what is published.
    dirty: bool,
    pinned: bool,
    pin_problem: Option<String>,
    /// Segments that are open for other workers.
    served: Arc<ServedSegments>,
    /// Counts the changes of `held`.
    changes: watch::Sender<u64>,
    /// How the worker before left the directory.
    left: Option<Handover>,
    walk: Walk,
    /// Whether the last word is said to the next one.
    ended: bool,
}

/// Where a chunk is, as far as the store knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Located {
    /// In a sealed segment.
    Sealed(ChunkLocation),
    /// In the segment that is being filled.
    Open,
    Absent,
}

/// What one publication did.
#[derive(Debug, Default)]
pub(crate) struct Published {
    /// The chunks that it made visible, with their bytes.
    pub(crate) fresh: Vec<(ChunkKey, u64)>,
    pub(crate) memory: MemoryReport,
    pub(crate) generation: u64,
    /// Chunks that are published.
    pub(crate) chunks: u64,
    pub(crate) took: Duration,
}

/// What to say where `there` bytes, by `limit`, can be had of a cache of `capacity_bytes`.
fn no_room(capacity_bytes: u64, there: u64, limit: &str) -> String {
    if there < capacity_bytes {
        return format!(
            "no room: {limit} leaves {there} bytes to the cache, whatever cache.size allows; enlarge \
             that, or cache less; what is most wanted is held"
        );
    }
    "no room: raise cache.size, or cache less; what is most wanted is held".to_owned()
}

/// What was done about a directory that is not as it was left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Repaired {
    /// Nothing was wrong.
    Intact,
    /// The index was published anew; how many chunks and catalogs had lost their segments.
    Published { problem: String, lost: usize },
    /// The directory was made anew, with nothing in it but what was found there.
    Anew { problem: String },
}

impl Store {
    pub(crate) fn new(writer: CacheWriter, recovery: Recovery, limits: Limits) -> Store {
        Store {
            walk: walk::resumed(recovery.left.as_ref()),
            left: recovery.left,
            ended: false,
            limits,
            dirty: !recovery.adopted.is_empty() || !recovery.dropped.is_empty(),
            held: recovery.chunks,
            catalogs: recovery.catalogs.into_iter().collect(),
            served: Arc::new(ServedSegments::new(
                writer.incarnation(),
                writer.segment_files(),
            )),
            changes: watch::Sender::new(0),
            open: None,
            fresh: Vec::new(),
            pinned: false,
            pin_problem: None,
            writer,
        }
    }

    /// The segments as other workers read them.
    pub(crate) fn served(&self) -> Arc<ServedSegments> {
        Arc::clone(&self.served)
    }

    /// Follows how often what is held has changed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Where chunks are that somebody else asks for. What is asked for and lies in the segment that
    /// is being filled has that segment sealed, unless it has only just been begun.
    pub(crate) fn locate(&mut self, keys: &[ChunkKey]) -> stoa_shm::Result<Vec<Located>> {
        let wanted = self.open.as_ref().is_some_and(|open| {
            open.since.elapsed() >= SEGMENT_AGE_WHEN_WANTED
                && keys.iter().any(|key| open.chunks.contains(key))
        });
        if wanted {
            self.seal()?;
        }
        let locate = |key: &ChunkKey| match self.held.get(key) {
            Some(location) => Located::Sealed(*location),
            None if self
                .open
                .as_ref()
                .is_some_and(|open| open.chunks.contains(key)) =>
            {
                Located::Open
            }
            None => Located::Absent,
        };
        Ok(keys.iter().map(locate).collect())
    }

    fn changed(&mut self) {
        self.dirty = true;
        self.changes.send_modify(|changes| *changes += 1);
    }

    pub(crate) fn held(&self) -> &HashMap<ChunkKey, ChunkLocation> {
        &self.held
    }

    pub(crate) fn catalogs(&self) -> &BTreeMap<String, CatalogLocation> {
        &self.catalogs
    }

    pub(crate) fn generation(&self) -> u64 {
        self.writer.generation()
    }

    pub(crate) fn memory(&self) -> stoa_shm::Result<MemoryReport> {
        self.writer.memory()
    }

    /// Bytes that may be held in all, as far as the tmpfs and the control group have them too.
    pub(crate) fn capacity(&self, memory: &MemoryReport) -> stoa_shm::Result<u64> {
        let space = self.writer.dir().space()?;
        let physical = memory.total_bytes().saturating_add(space.available_bytes);
        Ok(self.limits.capacity_bytes.min(physical))
    }

    /// Looks whether the directory is still what this process made of it, and makes good what is
    /// not: what somebody has removed is gone, but nothing keeps the cache from being filled again.
    pub(crate) fn repair(&mut self, options: CacheDirOptions) -> stoa_shm::Result<Repaired> {
        let found = self.writer.inspect()?;
        if let Some(problem) = found.lost {
            self.open_anew(options)?;
            return Ok(Repaired::Anew { problem });
        }
        if found.is_intact() {
            return Ok(Repaired::Intact);
        }
        let gone: HashSet<SegmentId> = found.segments.iter().copied().collect();
        let named = |store: &Store| store.held.len() + store.catalogs.len();
        let before = named(self);
        self.held.retain(|_, at| !gone.contains(&at.segment));
        self.catalogs.retain(|_, at| !gone.contains(&at.segment));
        self.writer.forget(&found.segments);
        if !gone.is_empty() {
            // So is what was being filled, most likely.
            self.open = None;
        }
        self.changed();
        self.commit()?;
        let problem = found.index.unwrap_or_else(|| {
            let path = self.writer.dir().path().display();
            format!("{} segments of {path} are gone", gone.len())
        });
        Ok(Repaired::Published {
            problem,
            lost: before - named(self),
        })
    }

    /// Begins again in the directory that has the name now, made if there is none.
    fn open_anew(&mut self, options: CacheDirOptions) -> stoa_shm::Result<()> {
        // What was being filled lies nowhere any more.
        self.open = None;
        let dir = CacheDir::create(self.writer.dir().path(), options)?;
        let (writer, recovery) = CacheWriter::open(dir)?;
        if let Err(error) = AccessCounters::create(writer.dir()) {
            tracing::warn!(%error, "accesses are not counted");
        }
        self.writer = writer;
        self.walk = walk::resumed(recovery.left.as_ref());
        self.left = recovery.left;
        self.held = recovery.chunks;
        self.catalogs = recovery.catalogs.into_iter().collect();
        self.fresh.clear();
        self.served
            .renew(self.writer.incarnation(), self.writer.segment_files());
        // Also where it is empty: an index that says so ends the doubt of readers.
        self.changed();
        Ok(())
    }

    /// Names the directory among all that ever were.
    pub(crate) fn incarnation(&self) -> u64 {
        self.writer.incarnation()
    }

    /// Why something has no room, and what to do about it.
    pub(crate) fn no_room(&self, memory: &MemoryReport) -> stoa_shm::Result<String> {
        let space = self.writer.dir().space()?;
        let there = memory.total_bytes().saturating_add(space.available_bytes);
        Ok(no_room(self.limits.capacity_bytes, there, &space.limit))
    }

    /// Bytes that may still be written.
    fn room(&self) -> stoa_shm::Result<u64> {
        let memory = self.writer.memory()?;
        Ok(self.capacity(&memory)?.saturating_sub(memory.total_bytes()))
    }

    /// Appends a chunk to the open segment, or to a new one; `expected_bytes` is what is still to
    /// come, this chunk included.
    pub(crate) fn append(
        &mut self,
        key: &ChunkKey,
        chunk: &EncodedChunk,
        expected_bytes: u64,
    ) -> stoa_shm::Result<Stored> {
        let bytes = chunk.bytes();
        if let Some(open) = &self.open
            && (open.writer.remaining() < bytes || open.since.elapsed() > SEGMENT_AGE_MAX)
        {
            self.seal()?;
        }
        if self.open.is_none() {
            let Some(writer) = self.begin(bytes, expected_bytes)? else {
                return Ok(Stored::NoRoom);
            };
            self.open = Some(Open {
                writer,
                since: Instant::now(),
                chunks: HashSet::new(),
            });
        }
        let open = self.open.as_mut().expect("a segment was begun above");
        let parts: Vec<&[u8]> = chunk.parts.iter().map(|part| part.as_ref()).collect();
        match open
            .writer
            .append_parts(key, form_tag(chunk.form), chunk.rows, &parts)
        {
            Ok(_) => {
                open.chunks.insert(key.clone());
                Ok(Stored::Yes)
            }
            Err(error) => {
                // What was appended before is whole: keep it.
                self.seal()?;
                match error {
                    stoa_shm::Error::NoSpace { .. } | stoa_shm::Error::SegmentFull { .. } => {
                        Ok(Stored::NoRoom)
                    }
                    error => Err(error),
                }
            }
        }
    }

    /// A new segment with room for `bytes`; `None` if there is none to be had.
    fn begin(&self, bytes: u64, expected_bytes: u64) -> stoa_shm::Result<Option<SegmentWriter>> {
        let needed = bytes.next_multiple_of(stoa_shm::CHUNK_ALIGN);
        let memory = self.writer.memory()?;
        let all = self.capacity(&memory)?;
        // Half of the head-room stays: the other half is for the next index and this footer.
        let taken = memory.total_bytes().saturating_add(headroom_bytes(all) / 2);
        let room = all.saturating_sub(taken);
        if needed + ENTRY_OVERHEAD_BYTES > room {
            return Ok(None);
        }
        let mut capacity = segment_bytes(all)
            .min(expected_bytes.next_multiple_of(stoa_shm::CHUNK_ALIGN))
            .min(room - ENTRY_OVERHEAD_BYTES)
            .max(needed);
        loop {
            match self.writer.new_segment(capacity) {
                Ok(segment) => return Ok(Some(segment)),
                Err(stoa_shm::Error::NoSpace { .. }) if capacity > needed => {
                    capacity = (capacity / 2)
                        .next_multiple_of(stoa_shm::CHUNK_ALIGN)
                        .max(needed);
                }
                Err(error @ stoa_shm::Error::NoSpace { .. }) => {
                    tracing::warn!(%error, "the cache directory is full before cache.size is reached");
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Seals the open segment, if it holds anything.
    pub(crate) fn seal(&mut self) -> stoa_shm::Result<()> {
        if let Some(open) = self.open.take()
            && !open.writer.is_empty()
        {
            let sealed = open.writer.seal()?;
            self.adopt(sealed);
        }
        Ok(())
    }

    fn adopt(&mut self, sealed: SealedSegment) {
        for (key, location) in sealed.chunks {
            self.fresh.push((key.clone(), location.length));
            self.held.insert(key, location);
        }
        self.catalogs.extend(sealed.catalogs);
        self.changed();
    }

    /// Whether chunks were sealed that no publication has shown yet.
    pub(crate) fn has_fresh(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// Writes a catalog into a segment of its own, to be shown by the next publication. `false`
    /// without room.
    pub(crate) fn write_catalog(&mut self, name: &str, bytes: &[u8]) -> stoa_shm::Result<bool> {
        // Catalogs may use the head-room: without one the chunks are of no use.
        let capacity = (bytes.len() as u64).next_multiple_of(stoa_shm::CHUNK_ALIGN);
        if capacity > self.room()? {
            return Ok(false);
        }
        let mut segment = match self.writer.new_segment(capacity) {
            Ok(segment) => segment,
            Err(stoa_shm::Error::NoSpace { .. }) => return Ok(false),
            Err(error) => return Err(error),
        };
        segment.append_catalog(name, bytes)?;
        let sealed = segment.seal()?;
        self.adopt(sealed);
        Ok(true)
    }

    /// The bytes of a published or sealed catalog, if they are still what they were.
    pub(crate) fn read_catalog(&self, name: &str) -> Option<stoa_shm::ChunkBytes> {
        let location = self.catalogs.get(name)?;
        let as_chunk = ChunkLocation {
            segment: location.segment,
            offset: location.offset,
            length: location.length,
            form: 0,
            checksum: location.checksum,
            rows: 0,
        };
        match self.writer.read(&as_chunk) {
            Ok(bytes) => Some(bytes),
            Err(miss) => {
                tracing::warn!(catalog = name, %miss, "the published catalog cannot be read");
                None
            }
        }
    }

    /// Forgets chunks: the next publication is without them.
    pub(crate) fn drop_chunks<'a>(&mut self, keys: impl IntoIterator<Item = &'a ChunkKey>) {
        let mut dropped = false;
        for key in keys {
            dropped |= self.held.remove(key).is_some();
        }
        if dropped {
            self.changed();
        }
    }

    /// Forgets a catalog.
    pub(crate) fn drop_catalog(&mut self, name: &str) {
        self.dirty |= self.catalogs.remove(name).is_some();
    }

    /// Makes a new generation of everything held, if anything has changed, and frees what is no
    /// longer named and no longer read.
    pub(crate) fn publish(&mut self) -> stoa_shm::Result<Published> {
        let started = Instant::now();
        let memory = self.commit()?;
        Ok(Published {
            fresh: std::mem::take(&mut self.fresh),
            memory,
            generation: self.writer.generation(),
            chunks: self.held.len() as u64,
            took: started.elapsed(),
        })
    }

    /// [`Store::publish`] without telling which chunks became visible: a later one does.
    fn commit(&mut self) -> stoa_shm::Result<MemoryReport> {
        if self.dirty {
            let contents = IndexContents {
                chunks: self
                    .held
                    .iter()
                    .map(|(key, at)| (key.clone(), *at))
                    .collect(),
                catalogs: self
                    .catalogs
                    .iter()
                    .map(|(name, at)| (name.clone(), *at))
                    .collect(),
            };
            self.writer.publish(contents)?;
            self.dirty = false;
            if self.pinned {
                self.lock_memory();
            }
        }
        self.reclaim()
    }

    /// Lets go of segments that nothing held lies in any more; what is being sent keeps its own.
    fn let_go(&self) {
        let mut live: BTreeSet<SegmentId> = self.writer.live_segments().into_iter().collect();
        live.extend(self.held.values().map(|location| location.segment));
        self.served.keep_only(&live);
    }

    /// Gives up segments that were sealed and are wanted no more. Between loads only.
    pub(crate) fn tidy(&mut self) -> stoa_shm::Result<MemoryReport> {
        if self.open.is_none() && !self.dirty {
            self.writer.discard_unpublished();
        }
        self.reclaim()
    }

    /// Copies the live chunks out of segments with too many dead bytes, as far as there is room,
    /// and publishes. Returns how many segments that were.
    pub(crate) fn compact(&mut self, short: bool) -> stoa_shm::Result<usize> {
        let share = if short {
            DEAD_SHARE_MAX_WHEN_SHORT
        } else {
            DEAD_SHARE_MAX
        };
        if self.dirty || self.open.is_some() {
            self.seal()?;
            self.commit()?;
        }
        let mut candidates = self.writer.compaction(share);
        // The most is won where least has to be copied.
        candidates.sort_by_key(|segment| segment.file_bytes.saturating_sub(segment.dead_bytes));
        let mut compacted = 0;
        for candidate in candidates.into_iter().take(COMPACTIONS_MAX) {
            let live: u64 = candidate
                .chunks
                .iter()
                .map(|(_, at)| at.length)
                .chain(candidate.catalogs.iter().map(|(_, at)| at.length))
                .map(|length| length.next_multiple_of(stoa_shm::CHUNK_ALIGN))
                .sum();
            if live == 0 || live > self.room()? {
                continue;
            }
            let mut segment = match self.writer.new_segment(live) {
                Ok(segment) => segment,
                Err(stoa_shm::Error::NoSpace { .. }) => break,
                Err(error) => return Err(error),
            };
            let mut damaged = Vec::new();
            for (key, location) in &candidate.chunks {
                match self.writer.read(location) {
                    Ok(bytes) => {
                        segment.append(key, location.form, location.rows, &bytes)?;
                    }
                    Err(miss) => {
                        tracing::warn!(chunk = %key.readable(), %miss, "dropped while compacting");
                        damaged.push(key.clone());
                    }
                }
            }
            for (name, _) in &candidate.catalogs {
                if let Some(bytes) = self.read_catalog(name) {
                    segment.append_catalog(name, &bytes)?;
                }
            }
            self.drop_chunks(&damaged);
            if !segment.is_empty() {
                let sealed = segment.seal()?;
                let fresh = self.fresh.len();
                self.adopt(sealed);
                // Moved, not new.
                self.fresh.truncate(fresh);
            }
            // One at a time: the room for the next is what this one frees.
            self.commit()?;
            compacted += 1;
        }
        Ok(compacted)
    }

    /// Frees what readers have let go.
    pub(crate) fn reclaim(&mut self) -> stoa_shm::Result<MemoryReport> {
        // A segment may have been opened for another host just when it was retired.
        self.let_go();
        self.writer.reclaim()
    }

    /// Hashes everything published; what is damaged is dropped from the next publication.
    pub(crate) fn verify(&mut self) -> VerifyReport {
        let report = self.writer.verify();
        self.distrust(&report);
        report
    }

    /// How the worker before left the directory.
    pub(crate) fn left(&self) -> Option<Handover> {
        self.left
    }

    /// Begins a walk through what is published, or goes on with the one that is under way: the
    /// segments that are still to be hashed, with the sizes of their files.
    pub(crate) fn begin_walk(&mut self, now_unix_ms: u64) -> Vec<(SegmentId, u64)> {
        if self.walk.began_unix_ms == 0 {
            self.walk.next = 0;
            self.walk.began_unix_ms = now_unix_ms.max(1);
        }
        let mut segments = self.writer.live_segment_files();
        segments.retain(|(segment, _)| self.walk.awaits(*segment));
        segments.sort_unstable();
        segments
    }

    /// What is wrong with the index, which the next publication replaces then.
    pub(crate) fn check_index(&mut self) -> Option<String> {
        let problem = self.writer.check_index();
        self.dirty |= problem.is_some();
        problem
    }

    /// Opens a segment to be hashed without the store's lock.
    pub(crate) fn check(&self, segment: SegmentId) -> Result<SegmentCheck, String> {
        self.writer.check(segment)
    }

    /// Drops what was found to be damaged in a segment, and notes that the walk is through with it.
    pub(crate) fn checked(
        &mut self,
        segment: SegmentId,
        found: Result<SegmentReport, String>,
    ) -> VerifyReport {
        let mut report = VerifyReport::default();
        match found {
            Ok(found) if found.problem.is_none() => {
                // It may have been dropped, or made anew elsewhere, while it was hashed.
                let chunks = found.bad_chunks.into_iter();
                report.bad_chunks = chunks
                    .filter(|(key, at, _)| self.held.get(key) == Some(at))
                    .map(|(key, _, reason)| (key, reason))
                    .collect();
                let catalogs = found.bad_catalogs.into_iter();
                report.bad_catalogs = catalogs
                    .filter(|(name, at, _)| self.catalogs.get(name) == Some(at))
                    .map(|(name, _, reason)| (name, reason))
                    .collect();
            }
            // The segment does not say what is in it: the index does.
            _ => report = self.writer.verify_segments(&[segment]),
        }
        self.distrust(&report);
        self.walk.next = segment.0.saturating_add(1);
        self.note_walk();
        report
    }

    /// Notes that the walk came to its end.
    pub(crate) fn end_walk(&mut self, now_unix_ms: u64) {
        self.walk = Walk {
            next: 0,
            began_unix_ms: 0,
            ended_unix_ms: now_unix_ms,
        };
        self.note_walk();
    }

    /// Says to the next worker of the directory that this one has ended in order, and names the
    /// plans of which nothing was left to do, if there is nothing (0 otherwise).
    pub(crate) fn end(&mut self, carried_out: u64) {
        // A walk may still be at its last segment: that word must not come after this one.
        self.ended = true;
        let all_is_published = !self.dirty && self.open.is_none();
        self.leave_word(if all_is_published { carried_out } else { 0 }, true);
    }

    fn note_walk(&self) {
        if !self.ended {
            self.leave_word(0, false);
        }
    }

    fn leave_word(&self, carried_out: u64, in_order: bool) {
        let handover = Handover {
            carried_out,
            walk: self.walk,
            in_order,
        };
        if let Err(error) = self.writer.hand_over(&handover) {
            tracing::debug!(%error, "no word is left to the next worker of the directory");
        }
    }

    fn distrust(&mut self, report: &VerifyReport) {
        self.drop_chunks(report.bad_chunks.iter().map(|(key, _)| key));
        for (name, _) in &report.bad_catalogs {
            self.drop_catalog(name);
        }
        self.dirty |= report.index_problem.is_some();
    }

    /// Locks what is published, now and from now on, or lets go. Returns the locked bytes.
    pub(crate) fn set_pinned(&mut self, pinned: bool) -> u64 {
        self.pinned = pinned;
        self.pin_problem = None;
        if pinned {
            return self.lock_memory();
        }
        self.writer.unpin();
        0
    }

    fn lock_memory(&mut self) -> u64 {
        match self.writer.pin() {
            Ok(bytes) => {
                self.pin_problem = None;
                bytes
            }
            Err(error) => {
                self.pin_problem = Some(error.to_string());
                0
            }
        }
    }

    pub(crate) fn pin_problem(&self) -> Option<&str> {
        self.pin_problem.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advice_names_what_limits() {
        let set = no_room(1 << 20, 1 << 20, "the file system's size of 9 bytes");
        assert!(set.starts_with("no room: raise cache.size"), "{set}");
        let there = no_room(
            1 << 30,
            64 << 20,
            "the file system's size of 67108864 bytes",
        );
        assert!(!there.contains("raise cache.size"), "{there}");
        assert!(
            there.starts_with("no room: the file system's size of 67108864 bytes leaves 67108864"),
            "{there}"
        );
    }
}
