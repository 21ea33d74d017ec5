//! Names that are taken away under a writer: by people, by cleaners, by logouts.

use super::*;

fn published(writer: &mut CacheWriter) -> (SealedSegment, IndexContents) {
    let mut segment = writer.new_segment(SEGMENT_BYTES).unwrap();
    let chunk = key(1, 1);
    segment.append(&chunk, 1, 1, &content(&chunk)).unwrap();
    let sealed = segment.seal().unwrap();
    let contents = contents(&[&sealed]);
    writer.publish(contents.clone()).unwrap();
    (sealed, contents)
}

#[test]
fn what_is_gone_is_told() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    assert!(
        writer.inspect().unwrap().is_intact(),
        "before anything is published"
    );
    let (sealed, contents) = published(&mut writer);
    assert!(writer.inspect().unwrap().is_intact());
    let index = scratch.path().join("index");

    std::fs::remove_file(&index).unwrap();
    let found = writer.inspect().unwrap();
    assert_eq!(
        scratch.text(found.index.as_deref().unwrap()),
        "DIR/index is gone"
    );
    assert_eq!((found.lost, found.segments), (None, vec![]));
    std::fs::write(&index, b"somebody else's").unwrap();
    let found = writer.inspect().unwrap().index.unwrap();
    assert_eq!(
        scratch.text(found),
        "DIR/index has been replaced by somebody else"
    );
    // The next publication is the remedy.
    writer.publish(contents).unwrap();
    assert!(writer.inspect().unwrap().is_intact());
    assert_eq!(
        CacheReader::open(scratch.path()).snapshot().chunk_count(),
        1
    );

    let id = sealed.chunks[0].1.segment;
    std::fs::remove_file(scratch.path().join(Name::Segment(id).to_string())).unwrap();
    assert_eq!(writer.inspect().unwrap().segments, [id]);
    writer.forget(&[id]);
    writer.publish(IndexContents::default()).unwrap();
    assert!(writer.inspect().unwrap().is_intact());
}

#[test]
fn nothing_is_published_into_another_directory() {
    let scratch = Scratch::new();
    let path = scratch.path().join("cache");
    let dir = || CacheDir::create(&path, CacheDirOptions::default()).unwrap();
    let mut writer = CacheWriter::open(dir()).unwrap().0;
    let (_, contents) = published(&mut writer);
    std::fs::remove_dir_all(&path).unwrap();
    let lost = writer.inspect().unwrap().lost.unwrap();
    assert_eq!(scratch.text(lost), "DIR/cache is gone");
    assert!(matches!(
        writer.publish(contents.clone()),
        Err(Error::Lost { .. })
    ));
    dir();
    let lost = writer.inspect().unwrap().lost.unwrap();
    assert_eq!(
        scratch.text(lost),
        "DIR/cache has been replaced by somebody else"
    );
    assert!(matches!(writer.publish(contents), Err(Error::Lost { .. })));
    assert!(matches!(writer.reclaim(), Err(Error::Lost { .. })));
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0);
    // Opened anew, it is this one's.
    drop(writer);
    CacheWriter::open(dir()).unwrap();
}

/// The name of the lock is all that keeps a second writer away.
#[test]
fn a_lock_whose_name_was_removed_is_taken_anew_or_lost() {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let (_, contents) = published(&mut writer);
    let lock = scratch.path().join("lock");
    let dir = || CacheDir::open(scratch.path(), CacheDirOptions::default()).unwrap();
    std::fs::remove_file(&lock).unwrap();
    writer.publish(contents.clone()).unwrap();
    let refused = CacheWriter::open(dir()).unwrap_err();
    assert!(matches!(refused, Error::Locked { .. }), "{refused}");

    std::fs::remove_file(&lock).unwrap();
    let second = CacheWriter::open(dir()).unwrap().0;
    let index = std::fs::read(scratch.path().join("index")).unwrap();
    let names = scratch.names();
    for refused in [
        writer.publish(IndexContents::default()).unwrap_err(),
        writer.reclaim().unwrap_err(),
    ] {
        assert!(matches!(refused, Error::Locked { .. }), "{refused}");
        assert!(
            refused
                .to_string()
                .contains(&std::process::id().to_string())
        );
    }
    assert_eq!(std::fs::read(scratch.path().join("index")).unwrap(), index);
    assert_eq!(scratch.names(), names);
    // Once the other is gone, it is the writer again.
    drop(second);
    writer.publish(contents).unwrap();
}
