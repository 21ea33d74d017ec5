//! This worker's segments as other hosts read them.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stoa_shm::{Miss, SegmentFiles, SegmentId, SegmentMap};
use stoa_transfer::{Refusal, Segment, SegmentKey, SegmentSource};

/// Descriptors that are kept for the kernel to send from; other segments are sent from their
/// mapping. Processes are often limited to 1,024 descriptors.
const FILES_MAX: usize = 256;

/// Opens segments for other hosts, and keeps them open while they hold anything.
#[derive(Debug)]
pub(crate) struct ServedSegments {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Of the cache directory, which is another one once it was made anew.
    incarnation: u64,
    files: SegmentFiles,
    open: HashMap<SegmentId, Segment>,
}

/// What keeps a segment's bytes.
struct Owner(Arc<SegmentMap>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl ServedSegments {
    pub(crate) fn new(incarnation: u64, files: SegmentFiles) -> ServedSegments {
        let state = State {
            incarnation,
            files,
            open: HashMap::new(),
        };
        ServedSegments {
            state: Mutex::new(state),
        }
    }

    /// The incarnation of the cache directory.
    pub(crate) fn incarnation(&self) -> u64 {
        self.lock().incarnation
    }

    /// Serves another directory from now on; what is being sent of the one before goes on.
    pub(crate) fn renew(&self, incarnation: u64, files: SegmentFiles) {
        *self.lock() = State {
            incarnation,
            files,
            open: HashMap::new(),
        };
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Entries are put in and taken out whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of all other segments, so that their memory is free once nothing is sent from it.
    pub(crate) fn keep_only(&self, live: &BTreeSet<SegmentId>) {
        self.lock().open.retain(|id, _| live.contains(id));
    }
}

impl SegmentSource for ServedSegments {
    fn open(&self, key: SegmentKey) -> Result<Segment, Refusal> {
        let check = |state: &State| match key.incarnation == state.incarnation {
            true => Ok(()),
            false => Err(Refusal::wrong_incarnation(key, state.incarnation)),
        };
        let id = SegmentId(key.segment);
        let files = {
            let state = self.lock();
            check(&state)?;
            if let Some(segment) = state.open.get(&id) {
                return Ok(segment.clone());
            }
            state.files.clone()
        };
        let map = files.map(id).map_err(|miss| match miss {
            Miss::Corrupt(reason) => Refusal::failed(reason),
            Miss::Absent | Miss::SegmentGone => Refusal::unknown_segment(key),
        })?;
        let mut state = self.lock();
        // It may have been renewed meanwhile.
        check(&state)?;
        let open = &mut state.open;
        let with_file = open.values().filter(|open| open.file().is_some()).count() < FILES_MAX;
        let file = with_file.then(|| files.file(&map)).flatten();
        let segment = Segment::new(Owner(map));
        let segment = match file {
            Some(file) => segment.with_file(Arc::new(file)),
            None => segment,
        };
        Ok(open.entry(id).or_insert(segment).clone())
    }
}

#[cfg(test)]
mod tests {
    use stoa_shm::{CacheDir, CacheDirOptions, CacheWriter, ChunkKey, IndexContents};
    use stoa_transfer::RefusalKind;

    use super::*;

    #[test]
    fn sealed_segments_are_served_until_they_are_retired() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let dir = CacheDir::open(scratch.path(), CacheDirOptions::default()).unwrap();
        let mut writer = CacheWriter::open(dir).unwrap().0;
        let served = ServedSegments::new(writer.incarnation(), writer.segment_files());
        let key = ChunkKey {
            file: Arc::from(&b"f"[..]),
            row_group: 0,
            column: 0,
        };
        let mut segment = writer.new_segment(4096).unwrap();
        let location = segment.append(&key, 1, 1, b"chunk").unwrap();
        let id = segment.id();
        let name = |incarnation, id: SegmentId| SegmentKey {
            incarnation,
            segment: id.0,
        };
        let ours = name(writer.incarnation(), id);
        let refused = |key| served.open(key).unwrap_err();
        assert_eq!(
            refused(ours).kind,
            RefusalKind::UnknownSegment,
            "not sealed yet"
        );
        let sealed = segment.seal().unwrap();
        // Before it is published.
        let open = served.open(ours).unwrap();
        assert_eq!(
            open.range(location.offset, location.length),
            Some(&b"chunk"[..])
        );
        assert!(open.file().is_some());
        let other = refused(name(writer.incarnation() ^ 1, id));
        assert_eq!(other.kind, RefusalKind::WrongIncarnation);
        let never = refused(name(writer.incarnation(), SegmentId(id.0 + 1)));
        assert_eq!(never.kind, RefusalKind::UnknownSegment);
        // Retired: what is being sent goes on; then its memory returns, and nobody finds it.
        let contents = IndexContents {
            chunks: sealed.chunks,
            catalogs: vec![],
        };
        writer.publish(contents).unwrap();
        writer.publish(IndexContents::default()).unwrap();
        served.keep_only(&BTreeSet::new());
        let report = writer.reclaim().unwrap();
        assert_eq!(report.retained_segments, 1);
        assert_eq!(
            open.range(location.offset, location.length),
            Some(&b"chunk"[..])
        );
        drop(open);
        assert_eq!(writer.reclaim().unwrap().retained_segments, 0);
        assert_eq!(refused(ours).kind, RefusalKind::UnknownSegment);
        // Another directory has other names.
        served.renew(writer.incarnation() ^ 1, writer.segment_files());
        assert_eq!(refused(ours).kind, RefusalKind::WrongIncarnation);
    }
}
