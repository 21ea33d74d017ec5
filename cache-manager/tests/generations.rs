//! A worker that publishes generation after generation keeps nothing of those before: what it has
//! allocated is the same after many as after a few.
//!
//! The test takes a few generations, so that it is quick; `STOA_GENERATIONS=1000 cargo test -p
//! stoa-cache-manager --test generations -- --nocapture` takes as many as one likes, and says how
//! much the process had resident on the way.

// An allocator is unsafe by its trait.
#![allow(unsafe_code)]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use stoa_metastore::WorkerPhase;
use support::*;

/// Counts the bytes that are allocated.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed on to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CAPACITY: u64 = 64 << 20;
const FILES: i64 = 40;
/// After so many generations whatever is kept once is there.
const WARM: u64 = 15;
const GENERATIONS: u64 = 60;

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() << 10
}

/// What is allocated, once the tasks of the last generation have ended: the least of a while.
async fn settled_bytes() -> usize {
    let mut least = usize::MAX;
    for _ in 0..20 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        least = least.min(LIVE.load(Ordering::Relaxed));
    }
    least
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_keeps_nothing_of_earlier_generations() {
    let generations = match std::env::var("STOA_GENERATIONS") {
        Ok(text) => text.parse().expect("STOA_GENERATIONS is a number"),
        Err(_) => GENERATIONS,
    };
    assert!(generations > WARM);
    let mut world = World::with_table(FILES).await;
    let worker = world.start(world.settings(CAPACITY)).await;
    let version = world.load(1, &["number", "word"]).await;
    ready(&worker, &version).await;
    let reader = world.reader();

    let mut warm = 0;
    for generation in 1..=generations {
        // One file is overwritten by another one of the same size; the worker looks, drops what it
        // had of it, and follows.
        let file = generation as i64 % FILES;
        let seed = file + FILES * (1 + generation as i64 / FILES % 2);
        world
            .put(
                &format!("numbers/{file}.parquet"),
                parquet(&batch(seed, ROWS), ROW_GROUP),
            )
            .await;
        let looked = worker.control().look(vec![]).await.unwrap();
        assert_eq!(looked.changed.len(), 1, "{looked:?}");
        let place = file as usize;
        until("it is loaded again", async || {
            worker.state().state == WorkerPhase::Ready
                && count_cached(&reader, place, "number") == ROWS / ROW_GROUP
        })
        .await;
        if generation == WARM {
            warm = settled_bytes().await;
        }
        if generation % 50 == 0 {
            let (live, resident) = (settled_bytes().await >> 10, resident_bytes() >> 20);
            println!("generation {generation}: {live} KiB allocated, {resident} MiB resident");
        }
    }
    let now = settled_bytes().await;
    println!("{warm} bytes after {WARM} generations, {now} after {generations}");
    // What is counted, named and cached once may still grow a little; a generation kept would be a
    // catalog and an index, of some hundred KiB.
    let most = warm + warm / 10 + (512 << 10);
    assert!(now <= most, "{now} bytes are allocated, {warm} were");
    worker.shutdown().await;
}
