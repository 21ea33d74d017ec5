//! Random sequences of operations against a model in plain maps.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const OBJECTS: u32 = 12;

#[derive(Clone, Debug)]
enum Op {
    Seal(Vec<(u32, u32)>),
    /// Publishes what the mask selects of everything sealed.
    Publish(u64),
    Reclaim,
    Discard,
    Restart,
    Hold(u32, u32),
    Release,
    KeepSnapshot,
    DropSnapshots,
    Compact,
}

fn op() -> impl Strategy<Value = Op> {
    let object = || (0..OBJECTS, 1..4u32);
    prop_oneof![
        4 => prop::collection::vec(object(), 1..6).prop_map(Op::Seal),
        4 => any::<u64>().prop_map(Op::Publish),
        2 => Just(Op::Reclaim),
        1 => Just(Op::Discard),
        1 => Just(Op::Restart),
        4 => object().prop_map(|(object, version)| Op::Hold(object, version)),
        1 => Just(Op::Release),
        2 => Just(Op::KeepSnapshot),
        1 => Just(Op::DropSnapshots),
        1 => Just(Op::Compact),
    ]
}

#[derive(Default)]
struct Model {
    /// Everything that may be published: key to location.
    usable: BTreeMap<ChunkKey, ChunkLocation>,
    published: BTreeMap<ChunkKey, ChunkLocation>,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_operations_reads_what_was_published(ops in prop::collection::vec(op(), 1..40)) {
        let scratch = Scratch::new();
        let mut writer = Some(scratch.writer());
        let reader = CacheReader::open(scratch.path());
        let mut model = Model::default();
        let mut held: Vec<(ChunkKey, ChunkBytes)> = Vec::new();
        let mut snapshots: Vec<(Arc<Snapshot>, BTreeMap<ChunkKey, ChunkLocation>)> = Vec::new();
        for op in ops {
            let current = writer.as_mut().unwrap();
            match op {
                Op::Seal(objects) => {
                    let mut keys: Vec<ChunkKey> = objects.iter().map(|&(object, version)| key(object, version)).collect();
                    keys.sort();
                    keys.dedup();
                    model.usable.extend(seal(current, &keys).chunks);
                }
                Op::Publish(mask) => {
                    let chunks: BTreeMap<ChunkKey, ChunkLocation> = model
                        .usable
                        .clone()
                        .into_iter()
                        .enumerate()
                        .filter(|(at, _)| mask >> (at % 64) & 1 == 1)
                        .map(|(_, chunk)| chunk)
                        .collect();
                    let before = current.generation();
                    let contents = IndexContents { chunks: chunks.clone().into_iter().collect(), catalogs: Vec::new() };
                    prop_assert_eq!(current.publish(contents).unwrap(), before + 1);
                    model.published = chunks;
                }
                Op::Reclaim => {
                    let report = current.reclaim().unwrap();
                    let files = CacheDir::open(scratch.path(), CacheDirOptions::default()).unwrap().names().unwrap();
                    let retired = files.iter().filter(|name| matches!(name, Name::SegmentRetired(_))).count();
                    prop_assert_eq!(report.retained_segments as usize, retired);
                    let exists = |location: &ChunkLocation| segment_path(&scratch, location.segment).exists();
                    prop_assert!(model.published.values().all(exists));
                    model.usable.retain(|_, location| exists(location));
                }
                Op::Discard => {
                    current.discard_unpublished();
                    current.reclaim().unwrap();
                    model.usable.retain(|_, location| segment_path(&scratch, location.segment).exists());
                }
                Op::Restart => {
                    drop(writer.take());
                    let (restarted, recovery) = scratch.open();
                    prop_assert!(recovery.dropped.is_empty());
                    for (key, location) in &model.published {
                        prop_assert_eq!(recovery.chunks.get(key), Some(location));
                    }
                    for (key, location) in &recovery.chunks {
                        prop_assert_eq!(&*restarted.read(location).unwrap(), &*content(key));
                    }
                    model.usable = recovery.chunks.into_iter().collect();
                    writer = Some(restarted);
                }
                Op::Hold(object, version) => {
                    let key = key(object, version);
                    if let Ok(chunk) = get(&reader.snapshot(), &key) {
                        held.push((key, chunk));
                    }
                }
                Op::Release => held.clear(),
                Op::KeepSnapshot => snapshots.push((reader.snapshot(), model.published.clone())),
                Op::DropSnapshots => snapshots.clear(),
                Op::Compact => {
                    for candidate in current.compaction(0.0) {
                        prop_assert!(candidate.dead_bytes > 0);
                        let mut segment = current.new_segment(1 << 20).unwrap();
                        for (key, location) in &candidate.chunks {
                            prop_assert_eq!(model.published.get(key), Some(location));
                            segment.append(key, location.form, location.rows, &current.read(location).unwrap()).unwrap();
                        }
                        let copied = segment.seal().unwrap();
                        model.published.extend(copied.chunks.clone());
                        model.usable.extend(copied.chunks);
                    }
                    let chunks = model.published.clone().into_iter().collect();
                    current.publish(IndexContents { chunks, catalogs: Vec::new() }).unwrap();
                    prop_assert_eq!(current.memory().unwrap().dead_bytes_in_live, 0);
                }
            }
            let snapshot = reader.snapshot();
            prop_assert_eq!(snapshot.chunk_count() as usize, model.published.len());
            for object in 0..OBJECTS {
                for version in 1..4 {
                    let key = key(object, version);
                    match model.published.get(&key) {
                        Some(location) => {
                            let chunk = get(&snapshot, &key).unwrap();
                            prop_assert_eq!(chunk.owner().id(), location.segment);
                            prop_assert_eq!(&*chunk, &*content(&key));
                        }
                        None => prop_assert_eq!(get(&snapshot, &key).unwrap_err(), Miss::Absent),
                    }
                }
            }
            for (key, chunk) in &held {
                prop_assert_eq!(&**chunk, &*content(key));
            }
            for (snapshot, published) in &snapshots {
                for key in published.keys() {
                    match get(snapshot, key) {
                        Ok(chunk) => prop_assert_eq!(&*chunk, &*content(key)),
                        Err(miss) => prop_assert_eq!(miss, Miss::SegmentGone),
                    }
                }
            }
        }
        // In the end memory returns.
        drop((held, snapshots));
        let mut writer = writer.take().unwrap();
        writer.publish(IndexContents::default()).unwrap();
        reader.snapshot();
        writer.discard_unpublished();
        let report = writer.reclaim().unwrap();
        prop_assert_eq!((report.live_bytes, report.retained_bytes, report.unpublished_bytes), (0, 0, 0));
    }
}
