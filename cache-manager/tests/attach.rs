//! What it costs to take a directory over: nothing where there is nothing to do, and never a second
//! look at what was verified when it was sealed; that happens behind.

mod support;

use std::time::Duration;

use stoa_cache_manager::{WorkerHandle, WorkerSettings};
use stoa_metastore::WorkerPhase;
use support::*;

const CAPACITY: u64 = 64 << 20;
const COLUMNS: [&str; 2] = ["number", "word"];

/// Settings of a worker that leaves its directory alone for longer than any test takes.
fn at_rest(world: &World) -> WorkerSettings {
    WorkerSettings {
        takeover_delay: Duration::from_secs(3600),
        ..world.settings(CAPACITY)
    }
}

/// A world whose table is loaded, and whose worker has ended in order.
async fn loaded() -> World {
    let mut world = World::with_table(2).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &COLUMNS).await;
    ready(&worker, &version).await;
    worker.shutdown().await;
    world
}

async fn metric(worker: &WorkerHandle, name: &str) -> f64 {
    let text = worker.metrics().prometheus_text();
    let line = text.lines().find(|line| line.starts_with(name));
    let line = line.unwrap_or_else(|| panic!("{name} is missing in\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nothing_is_left_to_do_nothing_is_done() {
    let mut world = loaded().await;
    let worker = world.start(at_rest(&world)).await;
    // Long enough for the plans to be known.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!worker.has_taken_over());
    assert_eq!(
        metric(&worker, "stoa_worker_verified_bytes_total").await,
        0.0
    );
    // Queries do not need it.
    assert_cached(&world.reader(), 1, "word", 1);
    worker.shutdown().await;

    // It has not become something to do meanwhile.
    let worker = world.start(at_rest(&world)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!worker.has_taken_over());
    // A new plan is something to do; what is there is kept.
    let version = world.load(2, &["number", "word", "price"]).await;
    let state = ready(&worker, &version).await;
    assert!(worker.has_taken_over());
    assert_eq!((state.kept_chunks, state.fetched_chunks), (8, 4));
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_to_do_is_done_at_once() {
    let mut world = loaded().await;
    // The worker died: nobody says that all was done.
    std::fs::remove_file(world.cache.path().join("handover")).unwrap();
    let worker = world.start(at_rest(&world)).await;
    ready(&worker, &format!("{TABLE}:1")).await;
    worker.shutdown().await;

    // A plan came while nobody was there.
    let version = world.load(2, &["number"]).await;
    let worker = world.start(at_rest(&world)).await;
    ready(&worker, &version).await;
    worker.shutdown().await;

    // Somebody asks, or time passes.
    let worker = world.start(at_rest(&world)).await;
    use stoa_control::WorkerService;
    let status = worker.control().status().await.unwrap();
    assert!(status.generation > 0);
    assert!(worker.has_taken_over());
    worker.shutdown().await;
    let settings = WorkerSettings {
        takeover_delay: Duration::from_millis(50),
        ..at_rest(&world)
    };
    let worker = world.start(settings).await;
    ready(&worker, &version).await;
    worker.shutdown().await;
}

/// A process that ends soon still has files looked at, when it reads a table and it is time.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_read_wakes_the_worker_when_a_look_is_due() {
    let world = loaded().await;
    let settings = |freshness| WorkerSettings {
        freshness: Some(freshness),
        ..at_rest(&world)
    };
    let worker = world.start(settings(Duration::from_secs(3600))).await;
    worker.waker().table_is_read(TABLE);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!worker.has_taken_over());
    worker.shutdown().await;
    let worker = world.start(settings(Duration::from_millis(100))).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!worker.has_taken_over());
    let waker = worker.waker();
    waker.table_is_read(TABLE);
    until("the files are looked at", async || {
        metric(&worker, "stoa_worker_looks_total").await > 0.0
    })
    .await;
    worker.shutdown().await;
    waker.table_is_read(TABLE);
    world
        .start(settings(Duration::from_secs(1)))
        .await
        .shutdown()
        .await;
}

/// Processes that end while they take the directory over do not make the next one do it at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_that_is_stopped_leaves_what_was_said() {
    let world = loaded().await;
    for _ in 0..5 {
        let settings = WorkerSettings {
            takeover_delay: Duration::from_millis(1),
            ..at_rest(&world)
        };
        let worker = world.start(settings).await;
        until("it is taken over", async || worker.has_taken_over()).await;
        worker.shutdown().await;
    }
    let worker = world.start(at_rest(&world)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!worker.has_taken_over());
    worker.shutdown().await;
}

/// A load that was interrupted is gone on with, although its process ended in order.
#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_has_no_room_is_not_taken_for_done() {
    let mut world = World::with_table(2).await;
    let settings = WorkerSettings {
        capacity_bytes: 1 << 20,
        ..at_rest(&world)
    };
    let worker = world.start(settings.clone()).await;
    let version = world.load(1, &["number", "price", "word"]).await;
    let state = ready(&worker, &version).await;
    worker.shutdown().await;
    if state.left_out.chunks == 0 {
        return;
    }
    let worker = world.start(settings).await;
    until("it is taken over", async || worker.has_taken_over()).await;
    worker.shutdown().await;
}

/// A restart serves what it finds; what memory has lost is found behind and loaded again.
#[tokio::test(flavor = "multi_thread")]
async fn a_flip_while_nobody_was_there_is_found_behind() {
    let world = loaded().await;
    flip_a_bit(&segments(world.cache.path()).1);
    let settings = WorkerSettings {
        scrub_interval: Some(Duration::from_millis(500)),
        ..world.settings(CAPACITY)
    };
    let worker = world.start(settings).await;
    let state = ready(&worker, &format!("{TABLE}:1")).await;
    assert_eq!((state.kept_chunks, state.fetched_chunks), (8, 0));
    until("it is found and loaded again", async || {
        let state = worker.state();
        state.state == WorkerPhase::Ready && state.tables[TABLE].fetched_chunks == 1
    })
    .await;
    assert_eq!(
        metric(&worker, "stoa_worker_damaged_chunks_total").await,
        1.0
    );
    assert!(metric(&worker, "stoa_worker_verified_bytes_total").await > 0.0);
    let reader = world.reader();
    for (file, seed) in [(0, 0), (1, 1)] {
        for column in COLUMNS {
            assert_cached(&reader, file, column, seed);
        }
    }
    until("the walk is through", async || {
        metric(&worker, "stoa_worker_unverified_bytes").await == 0.0
    })
    .await;
    worker.shutdown().await;
}

/// What one process has walked through, the next one does not walk through again.
#[tokio::test(flavor = "multi_thread")]
async fn a_walk_is_not_begun_anew_by_every_process() {
    let world = loaded().await;
    let settings = |interval| WorkerSettings {
        scrub_interval: Some(interval),
        ..world.settings(CAPACITY)
    };
    let worker = world.start(settings(Duration::from_millis(100))).await;
    until("a walk has ended", async || {
        metric(&worker, "stoa_worker_verified_bytes_total").await > 0.0
            && metric(&worker, "stoa_worker_unverified_bytes").await == 0.0
    })
    .await;
    worker.shutdown().await;
    // Where none had ended, one would begin after two seconds.
    let worker = world.start(settings(Duration::from_secs(3600))).await;
    ready(&worker, &format!("{TABLE}:1")).await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(
        metric(&worker, "stoa_worker_verified_bytes_total").await,
        0.0
    );
    worker.shutdown().await;
}
