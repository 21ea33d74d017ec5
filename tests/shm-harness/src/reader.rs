//! The reader's role: checks every byte it reads, and what it goes on holding.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stoa_shm::{CacheReader, ChunkBytes, ChunkKey, Miss, Snapshot};

use crate::content::{CATALOG, CHUNKS, OBJECTS, Random, key, versions, wrong_bytes};
use crate::report::Reporter;

/// Chunks that a reader holds at most.
const HELD_MAX: usize = 48;
/// Old snapshots that a reader keeps at most.
const SNAPSHOTS_MAX: usize = 3;

struct Reader {
    report: Reporter,
    random: Random,
    held: VecDeque<(ChunkKey, ChunkBytes)>,
    old: VecDeque<(Arc<Snapshot>, Vec<u64>)>,
    /// Snapshots of which nothing is opened before their time: they find segments gone, and would
    /// find those whose name was used again.
    late: VecDeque<(Arc<Snapshot>, Instant)>,
}

/// Reads until standard input ends.
pub fn run(dir: &Path, seed: u64) {
    let mut reader = Reader {
        report: Reporter::start(),
        random: Random(seed),
        held: VecDeque::new(),
        old: VecDeque::new(),
        late: VecDeque::new(),
    };
    let cache = CacheReader::open(dir);
    let mut last_generation = 0;
    while !reader.report.stopped() {
        let snapshot = cache.snapshot();
        let generation = snapshot.generation();
        if generation < last_generation {
            reader.report.violation(format!(
                "generation went back from {last_generation} to {generation}"
            ));
        }
        last_generation = generation;
        reader.read(&snapshot);
        reader.read_old();
        reader.read_late(dir);
        reader.check_held();
        reader.report.beat(0, 0);
    }
    reader.report.flush();
}

impl Reader {
    fn read(&mut self, snapshot: &Arc<Snapshot>) {
        let generation = snapshot.generation();
        let listed = match snapshot.catalog(CATALOG) {
            Ok(Some(catalog)) => versions(&catalog),
            Ok(None) if generation == 0 => return std::thread::yield_now(),
            Err(Miss::SegmentGone) => return,
            broken => {
                self.report
                    .violation(format!("catalog of generation {generation}: {broken:?}"));
                return self.read_any(snapshot);
            }
        };
        if listed.len() != OBJECTS as usize {
            return self
                .report
                .violation(format!("catalog lists {} objects", listed.len()));
        }
        for _ in 0..8 {
            self.read_one(snapshot, &listed, true);
        }
        if self.random.percent(10) {
            if self.old.len() == SNAPSHOTS_MAX {
                self.old.pop_front();
            }
            self.old.push_back((Arc::clone(snapshot), listed));
        }
    }

    /// Opens chunks of generations that were replaced: their bytes, or a miss.
    fn read_old(&mut self) {
        for _ in 0..3 {
            if !self.old.is_empty() {
                let at = self.random.below(self.old.len() as u64) as usize;
                let (snapshot, listed) = self.old[at].clone();
                self.read_one(&snapshot, &listed, false);
            }
        }
        if self.random.percent(2) {
            self.old.clear();
        }
    }

    /// Opens chunks of a snapshot some time after it was taken.
    fn read_late(&mut self, dir: &Path) {
        if self.late.len() < SNAPSHOTS_MAX && self.random.percent(5) {
            // Of a reader of its own, which has opened nothing.
            let due = Instant::now() + Duration::from_millis(self.random.below(200));
            self.late
                .push_back((CacheReader::open(dir).snapshot(), due));
        }
        if self
            .late
            .front()
            .is_some_and(|(_, due)| Instant::now() >= *due)
            && let Some((snapshot, _)) = self.late.pop_front()
        {
            self.read_any(&snapshot);
        }
    }

    /// Opens a few chunks of a snapshot, whichever it names.
    fn read_any(&mut self, snapshot: &Snapshot) {
        let skipped = self.random.below(snapshot.chunk_count().max(1)) as usize;
        for (file, entry) in snapshot.iter().skip(skipped).take(8) {
            let key = ChunkKey {
                file: file.into(),
                row_group: entry.row_group(),
                column: entry.column(),
            };
            match snapshot.open_chunk(&entry) {
                Ok(bytes) => {
                    self.report.check(wrong_bytes(&key, &bytes), || {
                        format!(
                            "read late in {} of generation {}",
                            key.readable(),
                            snapshot.generation()
                        )
                    });
                    self.report.beat(1, bytes.len() as u64);
                }
                Err(Miss::SegmentGone) => {}
                Err(miss) => self.report.violation(format!("{}: {miss}", key.readable())),
            }
        }
    }

    fn read_one(&mut self, snapshot: &Snapshot, listed: &[u64], current: bool) {
        let object = self.random.below(u64::from(OBJECTS)) as u32;
        let chunk = self.random.below(u64::from(CHUNKS)) as u32;
        let version = listed[object as usize];
        let key = key(object, version.max(1), chunk);
        let found = snapshot
            .file(&key.file)
            .ok_or(Miss::Absent)
            .and_then(|file| snapshot.try_lookup(file, key.row_group, key.column))
            .and_then(|entry| snapshot.open_chunk(&entry));
        match found {
            Ok(bytes) => {
                let what = if current {
                    "read"
                } else {
                    "read through an old snapshot"
                };
                self.report.check(wrong_bytes(&key, &bytes), || {
                    format!(
                        "{what} in {} of generation {}",
                        key.readable(),
                        snapshot.generation()
                    )
                });
                self.report.beat(1, bytes.len() as u64);
                if self.random.percent(30) {
                    if self.held.len() == HELD_MAX {
                        self.held.pop_front();
                    }
                    self.held.push_back((key, bytes));
                }
            }
            // Retired meanwhile: the origin would be read.
            Err(Miss::SegmentGone) => {}
            Err(Miss::Absent) if version == 0 => {}
            Err(miss) => self.report.violation(format!(
                "{} of generation {}, which lists it: {miss}",
                key.readable(),
                snapshot.generation()
            )),
        }
    }

    /// Bytes that are held must not change, however many generations have passed.
    fn check_held(&mut self) {
        for _ in 0..4 {
            if !self.held.is_empty() {
                let at = self.random.below(self.held.len() as u64) as usize;
                let (key, bytes) = &self.held[at];
                let wrong = wrong_bytes(key, bytes);
                self.report.check(wrong, || {
                    format!("changed while held in {}", key.readable())
                });
                let length = bytes.len() as u64;
                self.report.beat(0, length);
            }
        }
        if self.random.percent(2) {
            self.held.clear();
        }
    }
}
