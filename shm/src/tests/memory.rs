//! What memory is held, by whom, and how it comes back.

use super::*;

fn keys(objects: std::ops::Range<u32>, version: u32) -> Vec<ChunkKey> {
    objects.map(|object| key(object, version)).collect()
}

/// A reader that never releases costs memory that is reported, and nothing else.
#[test]
fn held_bytes_never_change_and_are_seen_as_retained() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let first = seal(&writer, &keys(0..10, 1));
    writer.publish(contents(&[&first])).unwrap();
    let reader = CacheReader::open(scratch.path());
    let held = get(&reader.snapshot(), &key(3, 1)).unwrap();

    for version in 2..12 {
        let next = seal(&writer, &keys(0..10, version));
        writer.publish(contents(&[&next])).unwrap();
        reader.snapshot();
        let report = writer.reclaim().unwrap();
        assert_eq!(
            (report.segments, report.retained_segments),
            (1, 1),
            "version {version}"
        );
        assert!(report.retained_bytes >= first.bytes);
        assert_eq!(*held, *content(&key(3, 1)));
        assert_eq!(
            get(&reader.snapshot(), &key(3, 1)).unwrap_err(),
            Miss::Absent
        );
        assert_eq!(
            *get(&reader.snapshot(), &key(3, version)).unwrap(),
            *content(&key(3, version))
        );
    }
    let slice = held.slice(0..1);
    drop(held);
    assert_eq!(
        writer.reclaim().unwrap().retained_segments,
        1,
        "a slice is enough to hold it"
    );
    drop(slice);
    let report = writer.reclaim().unwrap();
    assert_eq!((report.retained_segments, report.retained_bytes), (0, 0));
}

/// Retained memory stays visible when the worker restarts.
#[test]
fn a_restarted_worker_sees_what_readers_retain() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let first = seal(&writer, &keys(0..4, 1));
    writer.publish(contents(&[&first])).unwrap();
    let old = CacheReader::open(scratch.path()).snapshot();
    let held = get(&old, &key(1, 1)).unwrap();
    writer.publish(IndexContents::default()).unwrap();
    assert_eq!(writer.reclaim().unwrap().retained_segments, 1);
    drop(writer);

    let (mut writer, recovery) = scratch.open();
    assert!(
        recovery.chunks.is_empty(),
        "a retired segment is not adopted"
    );
    let report = writer.reclaim().unwrap();
    assert_eq!(report.retained_segments, 1);
    drop(held);
    assert_eq!(
        writer.reclaim().unwrap().retained_segments,
        1,
        "the old snapshot keeps what it opened"
    );
    drop(old);
    let report = writer.reclaim().unwrap();
    assert_eq!((report.retained_segments, report.retained_bytes), (0, 0));
}

/// An index is memory too: 64 bytes a chunk, held by every snapshot of it.
#[test]
fn a_held_index_is_accounted() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let sealed = seal(&writer, &keys(0..4, 1));
    writer.publish(contents(&[&sealed])).unwrap();
    let old = CacheReader::open(scratch.path()).snapshot();
    for _ in 0..3 {
        writer.publish(contents(&[&sealed])).unwrap();
    }
    let report = writer.reclaim().unwrap();
    assert_eq!(report.retained_bytes, 4096, "one index of one page is held");
    assert!(report.index_bytes >= 4096);
    assert_eq!(old.chunk_count(), 4);
    drop(old);
    assert_eq!(writer.reclaim().unwrap().retained_bytes, 0);
}

/// The mapping alone keeps the lock: no descriptor is spent on a segment.
#[test]
fn a_mapping_is_locked_without_a_descriptor() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let sealed = seal(&writer, &[key(1, 1)]);
    writer.publish(contents(&[&sealed])).unwrap();
    let path = segment_path(&scratch, sealed.id);
    assert!(!is_locked(&path));
    let held = get(&CacheReader::open(scratch.path()).snapshot(), &key(1, 1)).unwrap();
    assert!(is_locked(&path));
    let open = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
        .filter(|target| *target == path)
        .count();
    assert_eq!(open, 0);
    drop(held);
    assert!(!is_locked(&path));
}

#[test]
fn an_old_snapshot_misses_what_is_gone() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let first = seal(&writer, &[key(1, 1)]);
    writer.publish(contents(&[&first])).unwrap();
    let old = CacheReader::open(scratch.path()).snapshot();
    writer.publish(IndexContents::default()).unwrap();
    writer.reclaim().unwrap();
    assert_eq!(get(&old, &key(1, 1)).unwrap_err(), Miss::SegmentGone);
}

#[test]
fn what_is_sealed_waits_for_its_publication_or_is_given_up() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let published = seal(&writer, &[key(1, 1)]);
    let waiting = seal(&writer, &[key(2, 1)]);
    writer.publish(contents(&[&published])).unwrap();
    let report = writer.reclaim().unwrap();
    assert!(report.unpublished_bytes >= waiting.bytes);
    assert!(report.total_bytes() >= report.live_bytes + report.unpublished_bytes);
    writer.publish(contents(&[&published, &waiting])).unwrap();
    assert_eq!(writer.reclaim().unwrap().unpublished_bytes, 0);

    let one = seal(&writer, &[key(3, 1)]);
    seal(&writer, &[key(4, 1)]);
    writer.discard(&[one.id]);
    let report = writer.reclaim().unwrap();
    assert!(report.unpublished_bytes > 0 && !segment_path(&scratch, one.id).exists());
    writer.discard_unpublished();
    assert_eq!(writer.reclaim().unwrap().unpublished_bytes, 0);
    assert_eq!(writer.live_segments().len(), 2);
}

#[test]
fn dead_bytes_are_counted_and_worth_copying() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let mut segment = writer.new_segment(1 << 20).unwrap();
    for object in 0..10 {
        segment
            .append(&key(object, 1), 1, 0, &[object as u8; 6400])
            .unwrap();
    }
    let first = segment.seal().unwrap();
    writer.publish(contents(&[&first])).unwrap();
    assert_eq!(writer.memory().unwrap().dead_bytes_in_live, 0);
    assert!(writer.compaction(DEAD_SHARE_MAX).is_empty());

    let mut smaller = contents(&[&first]);
    smaller.chunks.truncate(8);
    writer.publish(smaller).unwrap();
    assert_eq!(writer.memory().unwrap().dead_bytes_in_live, 2 * 6400);
    assert!(writer.compaction(0.2).is_empty());
    let candidates = writer.compaction(DEAD_SHARE_MAX);
    let [candidate] = &candidates[..] else {
        panic!("one segment: {candidates:?}")
    };
    assert_eq!(
        (
            candidate.segment,
            candidate.dead_bytes,
            candidate.chunks.len()
        ),
        (first.id, 2 * 6400, 8)
    );

    // What a worker does with it.
    let mut segment = writer.new_segment(1 << 20).unwrap();
    for (key, location) in &candidate.chunks {
        let bytes = writer.read(location).unwrap();
        segment
            .append(key, location.form, location.rows, &bytes)
            .unwrap();
    }
    let copied = segment.seal().unwrap();
    writer.publish(contents(&[&copied])).unwrap();
    let report = writer.reclaim().unwrap();
    assert_eq!(
        (
            report.segments,
            report.dead_bytes_in_live,
            report.retained_bytes
        ),
        (1, 0, 0)
    );
}

#[test]
fn pinned_segments_are_locked_in_memory_or_the_error_says_what_to_raise() {
    let locked_kib = || -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmLck:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").trim().parse().unwrap()
    };
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let first = seal(&writer, &keys(0..10, 1));
    writer.publish(contents(&[&first])).unwrap();
    match writer.pin() {
        Ok(bytes) => {
            assert_eq!(bytes, first.bytes);
            assert!(locked_kib() >= 4);
            let second = seal(&writer, &keys(0..10, 2));
            writer.publish(contents(&[&second])).unwrap();
            assert_eq!(
                writer.reclaim().unwrap().retained_bytes,
                0,
                "pinning is not reading"
            );
            assert!(locked_kib() >= 4, "the next generation is pinned too");
            writer.unpin();
        }
        Err(error) => {
            let text = error.to_string();
            assert!(
                text.starts_with("cannot pin ") && text.contains("LimitMEMLOCK="),
                "{text}"
            );
        }
    }
}

#[test]
fn without_space_nothing_is_left_behind() {
    let scratch = Scratch::new();
    let writer = scratch.writer();
    let refused = writer.new_segment(1 << 43).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Space);
    let text = scratch.text(refused);
    assert!(
        text.starts_with(&format!(
            "no space for {} bytes in DIR: ",
            (1u64 << 43) + 64 + (16 << 10)
        )),
        "{text}"
    );
    assert!(
        text.ends_with("; load less (cache.size) or raise that limit"),
        "{text}"
    );
    assert!(
        !scratch
            .names()
            .iter()
            .any(|name| matches!(name, Name::SegmentTemp(_)))
    );
}

/// A tmpfs of its own.
struct SmallTmpfs(tempfile::TempDir);

impl SmallTmpfs {
    fn mount(bytes: u64) -> SmallTmpfs {
        let dir = tempfile::tempdir().unwrap();
        let mounted = std::process::Command::new("mount")
            .args([
                "-t",
                "tmpfs",
                "-o",
                &format!("size={bytes},mode=0700"),
                "stoa-test",
            ])
            .arg(dir.path())
            .status();
        assert!(mounted.unwrap().success(), "this test needs root");
        SmallTmpfs(dir)
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(self.0.path())
            .status();
    }
}

#[test]
#[ignore = "needs root: mounts a tmpfs"]
fn mounted_on_a_full_tmpfs_what_fits_is_published_and_the_index_can_still_shrink() {
    let tmpfs = SmallTmpfs::mount(2 << 20);
    let dir = CacheDir::open(tmpfs.0.path(), CacheDirOptions::default()).unwrap();
    let (mut writer, _) = CacheWriter::open(dir).unwrap();
    let mut sealed = Vec::new();
    let mut object = 0;
    let refused = loop {
        match writer.new_segment(256 << 10) {
            Ok(mut segment) => {
                segment
                    .append(&key(object, 1), 1, 0, &vec![7; 256 << 10])
                    .unwrap();
                sealed.push(segment.seal().unwrap());
                writer
                    .publish(contents(&sealed.iter().collect::<Vec<_>>()))
                    .unwrap();
                object += 1;
            }
            Err(error) => break error,
        }
    };
    assert_eq!(refused.kind(), ErrorKind::Space, "{refused}");
    assert!(
        refused
            .to_string()
            .contains("the file system's size of 2097152 bytes"),
        "{refused}"
    );
    assert!(sealed.len() >= 5);
    let reader = CacheReader::open(tmpfs.0.path());
    assert_eq!(reader.snapshot().chunk_count(), sealed.len() as u64);

    // Somebody takes the rest; the reader holds the old generation, so that nothing comes back.
    let held = get(&reader.snapshot(), &key(0, 1)).unwrap();
    let old = reader.snapshot();
    let filler = tmpfs.0.path().join("filler");
    let _ = std::fs::write(&filler, vec![1; 2 << 20]);
    writer
        .publish(contents(&[&sealed[0]]))
        .expect("memory was set aside for the next index");
    assert_eq!(reader.snapshot().chunk_count(), 1);
    drop((held, old));
    let report = writer.reclaim().unwrap();
    assert_eq!((report.segments, report.retained_segments), (1, 0));
    std::fs::remove_file(filler).unwrap();
    writer.new_segment(1 << 20).expect("memory came back");
}

/// Odd things under our names, put there by hand, neither stop the worker nor are followed.
#[test]
fn odd_files_do_not_stop_the_worker() {
    let scratch = Scratch::new();
    let victim = scratch.path().join("precious");
    std::fs::write(&victim, b"do not touch").unwrap();
    let odd = |name: Name| scratch.path().join(name.to_string());
    std::os::unix::fs::symlink(&victim, odd(Name::Segment(SegmentId(5)))).unwrap();
    std::fs::create_dir(odd(Name::SegmentRetired(SegmentId(6)))).unwrap();
    std::os::unix::fs::symlink(&victim, odd(Name::IndexRetired(3))).unwrap();

    let (mut writer, recovery) = scratch.open();
    assert_eq!(recovery.dropped.len(), 1);
    assert!(
        recovery.dropped[0]
            .reason
            .starts_with("cannot open segment 0000000000000005: ")
    );
    let sealed = seal(&writer, &[key(1, 1)]);
    assert!(sealed.id.0 > 6);
    writer.publish(contents(&[&sealed])).unwrap();
    writer.reclaim().unwrap();
    assert!(writer.verify().is_clean());
    assert_eq!(std::fs::read(&victim).unwrap(), b"do not touch");
}

/// A cache directory that was removed and made anew under the same name.
#[test]
fn a_reader_follows_a_directory_that_was_replaced() {
    let scratch = Scratch::new();
    let dir = scratch.path().join("cache");
    let options = CacheDirOptions::default();
    let reader = CacheReader::open(&dir);
    for version in 1..4 {
        let (mut writer, recovery) =
            CacheWriter::open(CacheDir::create(&dir, options).unwrap()).unwrap();
        assert!(recovery.chunks.is_empty());
        let sealed = seal(&writer, &[key(1, version)]);
        writer.publish(contents(&[&sealed])).unwrap();
        let held = reader.snapshot();
        assert_eq!(
            *get(&held, &key(1, version)).unwrap(),
            *content(&key(1, version))
        );
        assert_eq!(get(&held, &key(1, version - 1)).unwrap_err(), Miss::Absent);
        drop(writer);
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(
            *get(&held, &key(1, version)).unwrap(),
            *content(&key(1, version))
        );
        assert_eq!(reader.snapshot().generation(), 0);
    }
}

/// A first query that waits for a fault a page is slow: with `prefault` the pages are there before.
#[test]
fn a_prefaulting_reader_has_touched_everything_before_it_is_asked() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let big = key(0, 1);
    let mut segment = writer.new_segment(9 << 20).unwrap();
    segment.append(&big, 1, 1, &vec![7; 9 << 20]).unwrap();
    let sealed = segment.seal().unwrap();
    writer.publish(contents(&[&sealed])).unwrap();
    // A writer's own mappings would count too.
    drop(writer);
    let resident = |prefault| {
        let options = ReaderOptions {
            prefault,
            ..ReaderOptions::default()
        };
        let reader = CacheReader::open_with(scratch.path(), options);
        let snapshot = reader.snapshot();
        assert_eq!(snapshot.chunk_count(), 1);
        let mut resident = 0;
        for _ in 0..if prefault { 500 } else { 5 } {
            resident = resident_kib(&segment_path(&scratch, sealed.id));
            if resident >= 9 << 10 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        resident
    };
    assert_eq!(
        resident(false),
        0,
        "nothing is mapped before it is asked for"
    );
    assert!(resident(true) >= 9 << 10);
}

/// What this process has of a file in its page tables, as the kernel counts it.
fn resident_kib(path: &Path) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let name = path.to_str().unwrap();
    let of_file = maps.lines().skip_while(|line| !line.ends_with(name));
    of_file
        .filter_map(|line| line.strip_prefix("Rss:"))
        .take(1)
        .filter_map(|rss| rss.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .sum()
}
