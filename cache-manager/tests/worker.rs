//! A worker from its plan to what readers see.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use stoa_cache_manager::WorkerSettings;
use stoa_control::{ClientSettings, Listen, WorkerClient};
use stoa_layout::{Form, TableName};
use stoa_metastore::{PlanNotes, WorkerPhase, WorkerPlan};
use support::*;

const CAPACITY: u64 = 64 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_is_loaded_and_readers_see_exactly_the_files_values() {
    let mut world = World::with_table(2).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number", "price", "word"]).await;
    let state = ready(&worker, &version).await;
    assert_eq!((state.chunks_done, state.chunks_total), (12, 12));
    assert_eq!((state.kept_chunks, state.fetched_chunks), (0, 12));
    assert_eq!(state.left_out.chunks, 0);
    assert_eq!(state.current, state.target);
    assert_eq!(worker.state().state, WorkerPhase::Ready);
    let reader = world.reader();
    for file in 0..2 {
        for column in ["number", "price", "word"] {
            assert_cached(&reader, file, column, file as i64);
        }
    }
    // The catalog is there, and reading it asks nobody.
    let view = reader.view();
    let table = view.table(&TableName::parse(TABLE).unwrap()).unwrap();
    assert_eq!(table.catalog().rows(), 2 * ROWS as u64);
    let looks = stoa_cache_manager::looks(world.cache.path());
    assert!(looks[TABLE] > 0);
    // What the worker reports is in the metastore too.
    until("the state is published", async || {
        let states = world.records.states().await.unwrap();
        states
            .iter()
            .any(|state| state.id == WORKER && state.state == WorkerPhase::Ready)
    })
    .await;
    assert!(worker.state().held_bytes >= state.held_bytes);
    worker.shutdown().await;
    assert!(
        world.records.workers().await.unwrap().is_empty(),
        "the registration ends at once"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_column_more_fetches_that_column_only() {
    let mut world = World::with_table(2).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number", "price"]).await;
    ready(&worker, &version).await;
    let before = world.origin.counters();

    let catalog = world
        .publish_layout(TABLE, LOCATION, 2, &["number", "price", "word"])
        .await;
    let new_bytes: u64 = stoa_layout::wanted(&catalog)
        .unwrap()
        .iter()
        .filter(|chunk| chunk.chunk.column == 2)
        .map(|chunk| chunk.compressed_bytes)
        .sum();
    let version = world.plan(&catalog, |_| true).await;
    let state = ready(&worker, &version).await;
    assert_eq!((state.kept_chunks, state.fetched_chunks), (8, 4));
    let after = world.origin.counters();
    // The layout names the very files that are known: not even a footer is read again.
    assert_eq!(
        after.get_requests - before.get_requests,
        4,
        "one a row group"
    );
    assert_eq!(after.list_requests, before.list_requests);
    assert_eq!(after.bytes - before.bytes, new_bytes);
    assert_cached(&world.reader(), 1, "word", 1);
    assert_cached(&world.reader(), 1, "number", 1);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_worker_keeps_everything_without_a_request() {
    let mut world = World::with_table(2).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number", "word"]).await;
    ready(&worker, &version).await;
    worker.shutdown().await;

    let before = world.origin.counters();
    let worker = world.start(world.settings(CAPACITY)).await;
    let state = ready(&worker, &version).await;
    assert_eq!((state.kept_chunks, state.fetched_chunks), (8, 0));
    assert_eq!(world.origin.counters(), before);
    assert_cached(&world.reader(), 0, "word", 0);
    worker.shutdown().await;
}

/// The directory outlives the metastore that filled it. In the new one version 1 of the table is
/// another: what lies there under the same name and version must not be taken for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_filled_for_another_metastore_is_loaded_anew() {
    let mut world = World::with_table(2).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number", "word"]).await;
    ready(&worker, &version).await;
    worker.shutdown().await;

    world.forget_metastore().await;
    let file = parquet(&batch(7, ROWS), ROW_GROUP);
    world.put("elsewhere/7.parquet", file).await;
    let elsewhere = LOCATION.replace("numbers", "elsewhere");
    let catalog = world
        .publish_layout(TABLE, &elsewhere, 1, &["number"])
        .await;
    let version = world.plan(&catalog, |_| true).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let state = ready(&worker, &version).await;
    assert_eq!((state.kept_chunks, state.fetched_chunks), (0, 2));
    let view = world.reader().view();
    let table = view.tables().next().unwrap();
    assert_eq!(table.catalog().location, elsewhere);
    assert_eq!(table.files().len(), 1);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_in_a_load_goes_on_where_it_was() {
    let mut world = World::with_table(4).await;
    let settings = WorkerSettings {
        fill_concurrency: 1,
        ..world.settings(1 << 24)
    };
    let worker = world.start(settings.clone()).await;
    world.store.delay_ms.store(60, Ordering::Relaxed);
    let version = world.load(1, &["number", "price", "word"]).await;
    until("some chunks are published", async || {
        worker
            .state()
            .tables
            .get(TABLE)
            .is_some_and(|table| table.chunks_done > 6)
    })
    .await;
    // Not in order: the tasks just end.
    let fetched = worker.state().tables[TABLE].fetched_chunks;
    drop(worker);
    assert!(fetched < 24, "{fetched}");
    let mut worker = None;
    until("the directory is free", async || {
        let started = stoa_cache_manager::Worker::start(
            settings.clone(),
            world.records.clone(),
            world.origin.clone(),
        );
        worker = started.await.ok();
        worker.is_some()
    })
    .await;
    let worker = worker.unwrap();
    let state = ready(&worker, &version).await;
    assert_eq!(state.kept_chunks + state.fetched_chunks, 24);
    assert!(state.kept_chunks > 6, "{state:?}");
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_version_wins_in_the_middle_of_a_load() {
    let mut world = World::with_table(6).await;
    let worker = world
        .start(WorkerSettings {
            fill_concurrency: 1,
            ..world.settings(CAPACITY)
        })
        .await;
    let fifth = world.publish_layout(TABLE, LOCATION, 5, &["number"]).await;
    let sixth = world.publish_layout(TABLE, LOCATION, 6, &["price"]).await;
    let seventh = world
        .publish_layout(TABLE, LOCATION, 7, &["number", "word"])
        .await;
    world.store.delay_ms.store(40, Ordering::Relaxed);
    world.plan(&fifth, |_| true).await;
    until("the load has begun", async || {
        worker
            .state()
            .tables
            .get(TABLE)
            .is_some_and(|table| table.fetched_chunks > 0)
    })
    .await;
    world.plan(&sixth, |_| true).await;
    let version = world.plan(&seventh, |_| true).await;
    let state = ready(&worker, &version).await;
    assert_eq!(state.current.unwrap().version, 7);
    assert_eq!(state.chunks_total, 24);
    assert!(state.kept_chunks > 0, "what version 5 had loaded is kept");
    let reader = world.reader();
    for file in 0..6 {
        assert_cached(&reader, file, "number", file as i64);
        assert_cached(&reader, file, "word", file as i64);
        assert_eq!(count_cached(&reader, file, "price"), 0);
    }
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fits_is_loaded_by_priority_and_the_rest_reported() {
    let mut world = World::with_table(4).await;
    let capacity = 2 << 20;
    let worker = world.start(world.settings(capacity)).await;
    let version = world.load(1, &["number", "word", "price"]).await;
    let state = ready(&worker, &version).await;
    assert_eq!(worker.state().state, WorkerPhase::Degraded);
    assert!(
        state.left_out.chunks > 0 && state.chunks_done > 8,
        "{state:?}"
    );
    assert_eq!(state.chunks_done + state.left_out.chunks, 24);
    assert_eq!(state.current, state.target, "it has done all it can");
    assert!(
        state
            .left_out
            .reason
            .as_ref()
            .unwrap()
            .starts_with("no room"),
        "{state:?}"
    );
    assert!(
        worker
            .state()
            .problems
            .iter()
            .any(|problem| problem.contains("left out"))
    );
    let reader = world.reader();
    for file in 0..4 {
        assert_cached(&reader, file, "number", file as i64);
    }
    assert!(
        (0..4).any(|file| count_cached(&reader, file, "price") < 2),
        "least wanted"
    );
    drop(reader);
    assert!(
        world.used_bytes() <= capacity,
        "{} of {capacity}",
        world.used_bytes()
    );
    // It stays that way: no chunk is fetched in vain again and again.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let before = world.origin.counters();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(world.origin.counters(), before);
    worker.shutdown().await;
}

/// Text without any pattern, which the estimate of the packed form takes for compressible.
fn noise(seed: u64) -> RecordBatch {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut text = move |_| -> String {
        let next = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            char::from(b' ' + (state >> 32) as u8 % 95)
        };
        (0..32).map(next).collect()
    };
    let mut column = || Arc::new(StringArray::from_iter_values((0..ROWS).map(&mut text)));
    let (first, second) = (column() as ArrayRef, column() as ArrayRef);
    RecordBatch::try_from_iter([("first", first), ("second", second)]).unwrap()
}

/// Numbers of which a file has each in full, though there are sixteen of them: packed they take a
/// fraction of what its footer says.
fn few_numbers(file: u64) -> Bytes {
    let number = |row: usize| ((row as i64 % 16) << 58) + file as i64;
    let numbers = Int64Array::from_iter_values((0..ROWS).map(number));
    let batch = RecordBatch::try_from_iter([("number", Arc::new(numbers) as ArrayRef)]).unwrap();
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(ROW_GROUP))
        .set_dictionary_enabled(false)
        .build();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    bytes.into()
}

/// What was left out by estimates that are far too large is loaded as soon as the first chunks show
/// what they take.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_smaller_than_estimated_are_all_loaded() {
    const FILES: u64 = 24;
    let mut world = World::new().await;
    for file in 0..FILES {
        let key = format!("numbers/{file}.parquet");
        world.put(&key, few_numbers(file)).await;
    }
    let catalog = world.publish_layout(TABLE, LOCATION, 1, &["number"]).await;
    let wanted = stoa_layout::wanted(&catalog).unwrap();
    let sizes = wanted
        .iter()
        .map(|wanted| stoa_layout::chunk_bytes(&catalog, wanted.chunk).unwrap());
    let (estimated, capacity) = (sizes.map(|size| size.packed).sum::<u64>(), 2 << 20);
    assert!(estimated > capacity * 3 / 2, "{estimated}");
    let packed = |wanted: &stoa_layout::WantedChunk| {
        let chunk = wanted.chunk;
        let form = Form::Packed.to_string();
        (chunk.file, chunk.row_group, chunk.column, form)
    };
    let files = catalog.files.iter();
    let plan = WorkerPlan {
        files: files
            .map(|file| serde_json::to_value(&file.identity).unwrap())
            .collect(),
        chunks: wanted.iter().map(packed).collect(),
    };
    let worker = world.start(world.settings(capacity)).await;
    let parts = BTreeMap::from([(WORKER.to_owned(), plan)]);
    let version = world
        .write_plan(&catalog, &parts, PlanNotes::default())
        .await;
    let state = ready(&worker, &version).await;
    assert_eq!(
        (state.chunks_done, state.left_out.chunks),
        (2 * FILES, 0),
        "{state:?}"
    );
    assert!(world.used_bytes() <= capacity);
    worker.shutdown().await;
}

/// By the estimates everything fits, so the plan gives the worker more than it can hold. It has to
/// find that out, hold what is wanted most, say what it left out, and come to an end with it.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_larger_than_estimated_are_left_out_and_the_plan_is_carried_out() {
    const FILES: usize = 3;
    let mut world = World::new().await;
    for file in 0..FILES {
        let bytes = parquet(&noise(file as u64 + 1), ROW_GROUP);
        world.put(&format!("numbers/{file}.parquet"), bytes).await;
    }
    let columns = ["first", "second"];
    let catalog = world.publish_layout(TABLE, LOCATION, 1, &columns).await;
    let wanted = stoa_layout::wanted(&catalog).unwrap();
    let packed = |wanted: &stoa_layout::WantedChunk| {
        let chunk = wanted.chunk;
        let form = Form::Packed.to_string();
        (chunk.file, chunk.row_group, chunk.column, form)
    };
    let files = catalog.files.iter();
    let plan = WorkerPlan {
        files: files
            .map(|file| serde_json::to_value(&file.identity).unwrap())
            .collect(),
        chunks: wanted.iter().map(packed).collect(),
    };
    let sizes = wanted.iter();
    let estimated: u64 = sizes
        .map(|wanted| {
            stoa_layout::chunk_bytes(&catalog, wanted.chunk)
                .unwrap()
                .packed
        })
        .sum();
    let capacity = 3 << 20;
    assert!(estimated < capacity * 2 / 3, "{estimated}");
    let worker = world.start(world.settings(capacity)).await;
    let parts = BTreeMap::from([(WORKER.to_owned(), plan)]);
    let version = world
        .write_plan(&catalog, &parts, PlanNotes::default())
        .await;
    let state = ready(&worker, &version).await;
    assert_eq!(state.current, state.target, "{state:?}");
    assert_eq!(state.chunks_done + state.left_out.chunks, 12, "{state:?}");
    assert!(state.left_out.chunks > 0 && state.left_out.bytes > 0);
    let reason = state.left_out.reason.as_ref().unwrap();
    assert!(reason.starts_with("no room: raise cache.size"), "{reason}");
    assert_eq!(worker.state().state, WorkerPhase::Degraded);
    assert!(world.used_bytes() <= capacity);
    let reader = world.reader();
    for file in 0..FILES {
        assert_eq!(count_cached(&reader, file, "first"), 2, "most wanted");
    }
    drop(reader);
    // It is at rest: nothing is tried again, and nothing is decided again.
    let mut states = worker.subscribe();
    let before = world.origin.counters();
    states.mark_unchanged();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.origin.counters(), before);
    assert!(!states.has_changed().unwrap(), "{:?}", worker.state());
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_smaller_generation_makes_room_for_the_next() {
    let mut world = World::with_table(4).await;
    // Each version fits, but not both together.
    let worker = world.start(world.settings(3 << 20)).await;
    let version = world.load(1, &["word"]).await;
    let first = ready(&worker, &version).await;
    assert_eq!(first.chunks_done, 8);
    let version = world.load(2, &["number", "price"]).await;
    let state = ready(&worker, &version).await;
    assert_eq!((state.chunks_done, state.left_out.chunks), (16, 0));
    assert_cached(&world.reader(), 3, "price", 3);
    assert!(world.used_bytes() <= 3 << 20);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_readers_keep_is_counted_and_used_once_they_let_go() {
    let mut world = World::with_table(4).await;
    let worker = world.start(world.settings(3 << 20)).await;
    let version = world.load(1, &["word"]).await;
    ready(&worker, &version).await;
    let reader = world.reader();
    let held: Vec<_> = (0..4)
        .flat_map(|file| cached(&reader, TABLE, file, "word"))
        .collect();
    let view = reader.view();
    let version = world.load(2, &["number", "price"]).await;
    let state = ready(&worker, &version).await;
    assert!(state.left_out.chunks > 0, "{state:?}");
    let now = worker.state();
    assert_eq!(now.state, WorkerPhase::Degraded);
    assert!(now.retained_bytes > 2 << 20, "{now:?}");
    assert!(world.used_bytes() <= 3 << 20);
    drop((view, held, reader));
    until("all is there", async || {
        worker.state().state == WorkerPhase::Ready
    })
    .await;
    assert_eq!(worker.state().retained_bytes, 0);
    assert_cached(&world.reader(), 0, "price", 0);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_overwritten_in_the_middle_is_noticed_and_followed() {
    let mut world = World::with_table(3).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number"]).await;
    ready(&worker, &version).await;
    let catalog = world
        .publish_layout(TABLE, LOCATION, 2, &["number", "word"])
        .await;
    // Other content under the same path, after the plan was made.
    world
        .put("numbers/1.parquet", parquet(&batch(41, ROWS), ROW_GROUP))
        .await;
    world.plan(&catalog, |_| true).await;
    until("the new content is cached", async || {
        let reader = world.reader();
        let view = reader.view();
        let table = view.table(&TableName::parse(TABLE).unwrap()).unwrap();
        table.catalog().version.get() == 2
            && (0..3).all(|file| {
                count_cached(&reader, file, "number") == 2
                    && count_cached(&reader, file, "word") == 2
            })
    })
    .await;
    let reader = world.reader();
    for (file, seed) in [(0, 0), (1, 41), (2, 2)] {
        assert_cached(&reader, file, "number", seed);
        assert_cached(&reader, file, "word", seed);
    }
    until("it is told", async || {
        worker.state().state == WorkerPhase::Ready
    })
    .await;
    assert!(
        world.origin.counters().changed > 0,
        "it was noticed by its tag"
    );
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn appended_and_overwritten_files_show_within_the_freshness() {
    let mut world = World::with_table(2).await;
    let settings = WorkerSettings {
        freshness: Some(Duration::from_millis(200)),
        ..world.settings(CAPACITY)
    };
    let worker = world.start(settings).await;
    let version = world.load(1, &["number"]).await;
    ready(&worker, &version).await;
    world
        .put("numbers/1.parquet", parquet(&batch(7, ROWS), ROW_GROUP))
        .await;
    world
        .put("numbers/2.parquet", parquet(&batch(8, ROWS), ROW_GROUP))
        .await;
    let reader = world.reader();
    until("the files are seen", async || {
        let view = reader.view();
        let table = view.table(&TableName::parse(TABLE).unwrap()).unwrap();
        table.files().len() == 3 && count_cached(&reader, 1, "number") == 2
    })
    .await;
    assert_cached(&reader, 0, "number", 0);
    assert_cached(&reader, 1, "number", 7);
    assert_eq!(
        count_cached(&reader, 2, "number"),
        0,
        "no plan names it yet"
    );
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unloaded_table_gives_its_memory_back() {
    let mut world = World::with_table(2).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number", "word"]).await;
    ready(&worker, &version).await;
    let full = worker.state().held_bytes;
    world.unload(&version).await;
    until("the memory is back", async || {
        let state = worker.state();
        state.state == WorkerPhase::Idle && state.held_bytes < full / 10
    })
    .await;
    assert_eq!(world.reader().view().tables().count(), 0);
    let version = world.load(2, &["number"]).await;
    assert_eq!(ready(&worker, &version).await.fetched_chunks, 4);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_vanishes_drops_nothing() {
    let mut world = World::with_table(1).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number"]).await;
    ready(&worker, &version).await;
    worker.shutdown().await;
    world
        .records
        .reset(stoa_metastore::keys::PLAN_PREFIXES)
        .await
        .unwrap();
    let worker = world.start(world.settings(CAPACITY)).await;
    until("it has looked", async || {
        worker.state().state == WorkerPhase::Idle
    })
    .await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_cached(&world.reader(), 0, "number", 0);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fails_is_asked_again() {
    let mut world = World::with_table(2).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number"]).await;
    ready(&worker, &version).await;
    let catalog = world
        .publish_layout(TABLE, LOCATION, 2, &["number", "price"])
        .await;
    world.store.fails.store(true, Ordering::Relaxed);
    let version = world.plan(&catalog, |_| true).await;
    let state = ready(&worker, &version).await;
    assert_eq!(state.left_out.chunks, 4);
    assert!(
        state.left_out.reason.as_ref().unwrap().contains("503"),
        "{state:?}"
    );
    assert_eq!(state.current.unwrap().version, 1, "it goes on trying");
    // Hits go on meanwhile.
    assert_cached(&world.reader(), 1, "number", 1);
    world.store.fails.store(false, Ordering::Relaxed);
    until("it is loaded", async || {
        worker.state().state == WorkerPhase::Ready
    })
    .await;
    assert_cached(&world.reader(), 1, "price", 1);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_whose_layout_is_missing_is_told_and_tried_again() {
    let mut world = World::with_table(1).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let catalog = world.publish_layout(TABLE, LOCATION, 1, &["number"]).await;
    world
        .records
        .reset(&[
            stoa_metastore::keys::LAYOUT_PREFIX,
            stoa_metastore::keys::LAYOUT_HEAD_PREFIX,
        ])
        .await
        .unwrap();
    let version = world.plan(&catalog, |_| true).await;
    until("it is told", async || {
        let state = worker.state();
        let table = state.tables.get(TABLE);
        table.is_some_and(|table| {
            table.error.as_deref()
                == Some("layout test.numbers:1 is not in the metastore; publish it again")
        })
    })
    .await;
    world
        .records
        .publish_layout(TABLE, 1, &catalog.layout.to_json())
        .await
        .unwrap();
    ready(&worker, &version).await;
    assert_eq!(worker.state().tables[TABLE].error, None);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_tables_are_loaded_side_by_side_and_dropped_one_by_one() {
    let mut world = World::with_table(1).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let mut versions = vec![];
    for table in ["a.x", "b.y:z", "c.ü/%"] {
        let prefix = format!("tables/{}", table.len());
        world
            .put(
                &format!("{prefix}/0.parquet"),
                parquet(&batch(3, ROWS), ROW_GROUP),
            )
            .await;
        let location = format!("memory:///{prefix}/");
        let catalog = world
            .publish_layout(table, &location, 1, &["number", "price"])
            .await;
        versions.push(world.plan(&catalog, |_| true).await);
    }
    for version in &versions {
        assert_eq!(ready(&worker, version).await.chunks_done, 4);
    }
    world.unload(&versions[1]).await;
    until("it is gone", async || {
        world.reader().view().tables().count() == 2
    })
    .await;
    let reader = world.reader();
    assert_eq!(
        cached(&reader, "a.x", 0, "price").iter().flatten().count(),
        2
    );
    assert_eq!(
        cached(&reader, "c.ü/%", 0, "price")
            .iter()
            .flatten()
            .count(),
        2
    );
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn segments_with_dead_bytes_are_compacted() {
    let mut world = World::with_table(6).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number", "price", "word"]).await;
    ready(&worker, &version).await;
    // Every second row group goes: no segment dies as a whole.
    let version = world
        .load_where(2, &["number", "price", "word"], |chunk| {
            chunk.chunk.row_group == 0
        })
        .await;
    let state = ready(&worker, &version).await;
    assert_eq!((state.kept_chunks, state.fetched_chunks), (18, 0));
    let held = worker.state().held_bytes;
    assert!(
        held < state.held_bytes * 13 / 10,
        "{held} for {}",
        state.held_bytes
    );
    let reader = world.reader();
    for file in 0..6 {
        assert_eq!(count_cached(&reader, file, "word"), 1);
    }
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_lease_is_taken_anew_and_the_cache_kept() {
    let mut world = World::with_table(1).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number"]).await;
    ready(&worker, &version).await;
    let lease = async || {
        let entry = world
            .records
            .store()
            .get(&stoa_metastore::keys::worker(WORKER))
            .await
            .unwrap();
        entry.and_then(|entry| entry.lease)
    };
    let before = lease().await.unwrap();
    world.records.store().revoke_lease(before).await.unwrap();
    until("it is registered again", async || {
        lease().await.is_some_and(|now| now != before)
    })
    .await;
    until("its state is there again", async || {
        !world.records.states().await.unwrap().is_empty()
    })
    .await;
    assert_eq!(worker.state().tables[TABLE].chunks_done, 2);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_worker_on_the_same_directory_is_refused() {
    let world = World::with_table(1).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let second = stoa_cache_manager::Worker::start(
        world.settings(CAPACITY),
        world.records.clone(),
        world.origin.clone(),
    );
    let error = second.await.unwrap_err().to_string();
    assert!(error.contains("is in use by process"), "{error}");
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn control_verifies_pins_refreshes_and_answers() {
    let mut world = World::with_table(2).await;
    let settings = WorkerSettings {
        control: Some(Listen::loopback(0)),
        http: Some(Listen::loopback(0)),
        ..world.settings(CAPACITY)
    };
    let worker = world.start(settings).await;
    let version = world.load(1, &["number", "word"]).await;
    ready(&worker, &version).await;
    let address = worker.control_address().unwrap().to_string();
    let client = WorkerClient::new(&address, &ClientSettings::default()).unwrap();

    let status = client.status().await.unwrap();
    assert_eq!((status.state.as_str(), status.chunks), ("ready", 8));
    assert_eq!(status.tables[TABLE].chunks_done, 8);
    assert!(status.generation > 0 && status.tables[TABLE].looked_at_unix_ms > 0);

    let report = client.verify().await.unwrap();
    assert_eq!(
        (report.damaged_chunks, report.chunks),
        (0, 9),
        "8 chunks and a catalog"
    );

    let metric = |value: u8| {
        let line = format!("stoa_worker_pinned {value}.0");
        let text = worker.metrics().prometheus_text();
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    };
    metric(0);
    let pinned = client.pin().await.unwrap();
    assert!(pinned.pinned);
    if pinned.problem.is_empty() {
        assert!(pinned.pinned_bytes > 0);
        assert!(client.status().await.unwrap().pinned);
        metric(1);
    }
    assert_eq!(world.records.pins().await.unwrap().len(), 1);
    assert!(!client.unpin().await.unwrap().pinned);
    assert!(!client.status().await.unwrap().pinned);
    metric(0);

    let looked = client.refresh(vec![]).await.unwrap();
    assert_eq!(looked.unchanged, [TABLE]);
    world
        .put("numbers/5.parquet", parquet(&batch(5, ROWS), ROW_GROUP))
        .await;
    let looked = client
        .refresh(vec![TABLE.into(), "no.such".into()])
        .await
        .unwrap();
    assert_eq!(looked.changed, [TABLE]);
    assert!(looked.failed["no.such"].starts_with("unknown table; this worker has test.numbers"));

    let metrics = worker.metrics().prometheus_text();
    for line in [
        "stoa_worker_chunks_fetched_total 8",
        "stoa_worker_chunk_errors_total 0",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_found_dropped_and_loaded_again() {
    let mut world = World::with_table(2).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number"]).await;
    ready(&worker, &version).await;
    flip_a_bit(&segments(world.cache.path()).1);
    use stoa_control::WorkerService;
    let report = worker.control().verify().await.unwrap();
    assert_eq!(report.damaged_chunks, 1, "{report:?}");
    until("it is loaded again", async || {
        let state = worker.state();
        state.state == WorkerPhase::Ready && state.tables[TABLE].fetched_chunks == 5
    })
    .await;
    assert_cached(&world.reader(), 0, "number", 0);
    assert_cached(&world.reader(), 1, "number", 1);
    let report = worker.control().verify().await.unwrap();
    assert_eq!(report.damaged_chunks, 0, "{report:?}");
    worker.shutdown().await;
}

/// A table without its catalog is one that readers do not know.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_catalog_is_written_anew() {
    let mut world = World::with_table(2).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number"]).await;
    ready(&worker, &version).await;
    let generation = || world.reader().view().snapshot().generation();
    let before = generation();
    // The catalog has a segment of its own, smaller than that of the chunks.
    let (smaller, _) = segments(world.cache.path());
    smaller.iter().for_each(|segment| flip_a_bit(segment));
    use stoa_control::WorkerService;
    let report = worker.control().verify().await.unwrap();
    let mut damaged = report.damaged.iter();
    assert!(
        damaged.any(|what| what.starts_with("catalog ")),
        "{report:?}"
    );
    until("it is published again", async || {
        generation() > before && world.reader().view().tables().count() == 1
    })
    .await;
    assert_cached(&world.reader(), 0, "number", 0);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_pages_leave_out_their_chunk_only() {
    let mut world = World::with_table(1).await;
    let mut bytes = parquet(&batch(1, ROWS), ROW_GROUP).to_vec();
    // The page header of the first column's first page.
    for byte in &mut bytes[4..24] {
        *byte = 0xff;
    }
    world.put("numbers/1.parquet", bytes.into()).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number", "price"]).await;
    let state = ready(&worker, &version).await;
    assert_eq!(
        (state.chunks_done, state.left_out.chunks),
        (7, 1),
        "{state:?}"
    );
    assert_eq!(count_cached(&world.reader(), 1, "number"), 1);
    assert_cached(&world.reader(), 1, "price", 1);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_a_part_still_publishes_the_catalog() {
    let world = World::with_table(1).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let catalog = world.publish_layout(TABLE, LOCATION, 1, &["number"]).await;
    let others = BTreeMap::new();
    let version = catalog.table_version().to_string();
    world
        .records
        .write_plan(&world.leadership, &version, 1, &others)
        .await
        .unwrap();
    let state = ready(&worker, &version).await;
    assert_eq!(state.chunks_total, 0);
    assert_eq!(world.reader().view().tables().count(), 1);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_for_files_that_are_newer_than_the_catalog_leads_to_a_look() {
    let mut world = World::with_table(1).await;
    let settings = WorkerSettings {
        freshness: Some(Duration::from_secs(3600)),
        ..world.settings(CAPACITY)
    };
    let worker = world.start(settings).await;
    let version = world.load(1, &["number"]).await;
    ready(&worker, &version).await;
    world
        .put("numbers/1.parquet", parquet(&batch(1, ROWS), ROW_GROUP))
        .await;
    let mut document = stoa_layout::LayoutDocument::from_json(
        &world.records.layout(TABLE, 1).await.unwrap().unwrap(),
    )
    .unwrap();
    document.files.clear();
    let newer = stoa_layout::TableCatalog::load(&world.own_origin, &document, 2)
        .await
        .unwrap();
    assert_eq!(newer.files.len(), 2);
    world.plan(&newer, |_| true).await;
    until("the new file is cached", async || {
        worker.state().tables[TABLE].chunks_done == 4 && worker.state().state == WorkerPhase::Ready
    })
    .await;
    assert_cached(&world.reader(), 1, "number", 1);
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn local_files_are_loaded_and_a_rewritten_one_is_noticed() {
    let mut world = World::new().await;
    let files = tempfile::tempdir().unwrap();
    let write = |file: i64, seed: i64| {
        let path = files.path().join(format!("{file}.parquet"));
        std::fs::write(path, parquet(&batch(seed, ROWS), ROW_GROUP)).unwrap();
    };
    (0..2).for_each(|file| write(file, file));
    let location = files.path().to_str().unwrap().to_owned();
    let worker = world.start(world.settings(CAPACITY)).await;
    let catalog = world.publish_layout(TABLE, &location, 1, &["number"]).await;
    let version = world.plan(&catalog, |_| true).await;
    assert_eq!(ready(&worker, &version).await.chunks_done, 4);
    assert_cached(&world.reader(), 1, "number", 1);
    let catalog = world
        .publish_layout(TABLE, &location, 2, &["number", "price"])
        .await;
    write(1, 9);
    world.plan(&catalog, |_| true).await;
    until("the rewritten file is cached", async || {
        worker.state().state == WorkerPhase::Ready
            && worker.state().tables[TABLE]
                .current
                .is_some_and(|current| current.version == 2)
            && count_cached(&world.reader(), 1, "price") == 2
    })
    .await;
    let reader = world.reader();
    for (file, seed) in [(0, 0), (1, 9)] {
        assert_cached(&reader, file, "number", seed);
        assert_cached(&reader, file, "price", seed);
    }
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_found_by_the_slow_walk_too() {
    let mut world = World::with_table(2).await;
    let settings = WorkerSettings {
        scrub_interval: Some(Duration::from_millis(200)),
        ..world.settings(CAPACITY)
    };
    let worker = world.start(settings).await;
    let version = world.load(1, &["number"]).await;
    ready(&worker, &version).await;
    flip_a_bit(&segments(world.cache.path()).1);
    until("it is found and loaded again", async || {
        let state = worker.state();
        state.state == WorkerPhase::Ready && state.tables[TABLE].fetched_chunks == 5
    })
    .await;
    assert_cached(&world.reader(), 0, "number", 0);
    assert_cached(&world.reader(), 1, "number", 1);
    worker.shutdown().await;
}
