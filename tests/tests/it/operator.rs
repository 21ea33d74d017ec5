//! What an operator of a cluster meets: loads that nobody takes up, directories that vanish, memory
//! that nothing wants, workers that die in mid-load.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use stoa_metastore::{WorkerRecord, keys};
use stoa_tests::cluster::{ClusterOptions, PATIENCE};
use stoa_tests::s3::faults::{Effect, FaultRule};
use stoa_tests::s3::ledger::Kind;
use stoa_tests::wait;

use crate::spine::{World, world};

fn one_worker() -> ClusterOptions {
    ClusterOptions {
        workers: 1,
        ..ClusterOptions::default()
    }
}

fn segments(world: &World) -> usize {
    let names = std::fs::read_dir(world.cluster.cache(0)).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name());
    names
        .filter(|name| name.to_string_lossy().starts_with("seg-"))
        .count()
}

/// The state of a table in `stoa status`; `None` where it is not shown.
fn state(world: &World, table: &str) -> Option<String> {
    let status = world.cluster.status().unwrap();
    let tables = status["tables"].as_array().unwrap();
    let line = tables.iter().find(|line| line["table"] == table)?;
    Some(line["state"].as_str().unwrap().to_owned())
}

/// Cron and CI have no terminal: what a load waits for is a line in their logs.
#[test]
fn a_load_says_what_it_waits_for_where_nobody_sees_a_bar() {
    let mut world = world(&one_worker(), &["nation"]);
    world.create("nation", &[]);
    world.cluster.coordinator(0).kill();
    wait::until("the election is over", PATIENCE, || {
        match world.etcd.get(keys::ELECTION).unwrap() {
            None => Ok(()),
            Some(_) => Err("still elected".to_owned()),
        }
    })
    .unwrap();
    let waits = ["load", "tpch.nation", "--timeout", "4s"];
    let ran = world.cluster.run(&waits).unwrap();
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    let line = "waiting: tpch.nation:1: no coordinator is elected; is `stoa coordinator` running?";
    assert_eq!(ran.stderr.matches(line).count(), 1, "{}", ran.stderr);
    let ran = world
        .cluster
        .run(&["unload", "tpch.nation", "--timeout", "0s"]);
    assert_eq!(ran.unwrap().code, Some(0), "nothing was planned");
}

/// Somebody removes the cache directory under a worker. Queries go on from the origin, the worker
/// makes it anew without being told, and others learn that it is another directory.
#[test]
fn a_lost_directory_is_made_anew_and_loaded_again() {
    let mut world = world(&one_worker(), &["lineitem"]);
    world.create("lineitem", &[]);
    world.cluster.load("tpch.lineitem:1").unwrap();
    let record = |world: &World| -> WorkerRecord {
        let entry = world.etcd.get(&keys::worker("worker-0")).unwrap().unwrap();
        serde_json::from_slice(&entry.value).unwrap()
    };
    let before = record(&world);
    std::fs::remove_dir_all(world.cluster.cache(0)).unwrap();
    assert_eq!(world.count(0, "lineitem"), 60_175);
    let from_memory = |world: &World| {
        world.s3.forget();
        let sum = "select sum(l_orderkey) as n from tpch.lineitem";
        world.cluster.sql(0, sum).unwrap();
        world.s3.counts().gets() == 0
    };
    wait::until(
        "everything is loaded again",
        PATIENCE,
        || match from_memory(&world) {
            true => Ok(()),
            false => Err(format!("{:?}", world.cluster.states(&world.etcd))),
        },
    )
    .unwrap();
    wait::until("the new directory is registered", PATIENCE, || {
        let now = record(&world);
        let is_other = now.cache_incarnation != before.cache_incarnation;
        match is_other && now.incarnation == before.incarnation {
            true => Ok(()),
            false => Err(format!("{now:?}")),
        }
    })
    .unwrap();
    world.cluster.load("tpch.lineitem:1").unwrap();
    assert_eq!(state(&world, "tpch.lineitem").as_deref(), Some("loaded"));
    let log = world.cluster.worker(0).log();
    let said = "is gone: it is made anew, and the tables are loaded again";
    assert_eq!(log.matches(said).count(), 1, "{log}");
    assert!(!log.contains("cannot be written"), "{log}");
}

/// A reset forgets what is wanted, and workers keep what they hold: that is shown as what it is, and
/// can be freed while they run.
#[test]
fn what_workers_hold_after_a_reset_can_be_freed() {
    let mut world = world(&one_worker(), &["orders", "nation"]);
    world.create("orders", &[]);
    world.create("nation", &[]);
    world.cluster.load("tpch.orders:1").unwrap();
    world.cluster.load("tpch.nation:1").unwrap();
    let reset = world.cluster.run(&["reset", "--yes"]).unwrap();
    assert_eq!(reset.code, Some(0), "{}", reset.stderr);
    assert!(
        reset.stderr.contains("`stoa unload TABLE` frees it"),
        "{}",
        reset.stderr
    );
    let held = Some("held, not wanted".to_owned());
    assert_eq!(state(&world, "tpch.orders"), held);
    // A worker that begins anew knows of no plan, and of what lies there all the same.
    world.cluster.worker(0).terminate(PATIENCE).unwrap();
    world.cluster.start_worker(0).unwrap();
    wait::until("the worker reports what it holds", PATIENCE, || {
        match state(&world, "tpch.orders") == held {
            true => Ok(()),
            false => Err(format!("{:?}", world.cluster.states(&world.etcd))),
        }
    })
    .unwrap();
    world.cluster.ok(&["unload", "tpch.orders"]).unwrap();
    world.cluster.ok(&["unload", "tpch.nation"]).unwrap();
    assert_eq!(state(&world, "tpch.orders"), None);
    assert_eq!(segments(&world), 0);
    world.create("orders", &[]);
    world.cluster.load("tpch.orders:1").unwrap();
    assert_eq!(state(&world, "tpch.orders").as_deref(), Some("loaded"));
}

/// A worker is away while a table is dropped. When it is back it drops it too, and does not take the
/// table that has the name by then for the one that it knows.
#[test]
fn a_worker_that_was_away_drops_what_was_dropped() {
    let mut world = world(&one_worker(), &["orders", "nation"]);
    world.create("orders", &[]);
    world.create("nation", &[]);
    world.cluster.load("tpch.orders:1").unwrap();
    world.cluster.load("tpch.nation:1").unwrap();
    world.cluster.worker(0).terminate(PATIENCE).unwrap();
    for table in ["tpch.orders", "tpch.nation"] {
        world.cluster.ok(&["layout", "drop", table]).unwrap();
    }
    world
        .cluster
        .create_layout("tpch.nation", "s3://tpch/orders/", &[])
        .unwrap();
    world.cluster.request_load("tpch.nation:2").unwrap();
    world.cluster.start_worker(0).unwrap();
    let loaded = world.cluster.wait_loaded(&world.etcd, "tpch.nation", 2);
    loaded.unwrap();
    assert_eq!(world.count(0, "nation"), 15_000, "of the files of orders");
    let status = world.cluster.status().unwrap();
    assert_eq!(status["tables"].as_array().unwrap().len(), 1, "{status}");
    let sql = "select count(*) as n from tpch.orders";
    assert!(world.cluster.sql(0, sql).is_err(), "the table is gone");
}

/// Numbers of which a file has each in full, though there are sixteen of them: packed they take a
/// fraction of what its footer says.
fn few_numbers(rows: usize) -> Vec<u8> {
    let numbers = Int64Array::from_iter_values((0..rows).map(|row| (row as i64 % 16) << 58));
    let batch = RecordBatch::try_from_iter([("n", Arc::new(numbers) as ArrayRef)]).unwrap();
    let properties = WriterProperties::builder()
        .set_dictionary_enabled(false)
        .build();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    bytes
}

/// One of two workers is killed and comes back in mid-load, and the estimates say that nothing fits.
/// The load ends when all is there, and says so.
#[test]
fn a_load_over_a_worker_that_is_killed_ends_with_all_of_it() {
    const FILES: usize = 16;
    let options = ClusterOptions {
        workers: 2,
        cache_size: "4MiB".to_owned(),
        more: vec!["worker.fill.concurrency = 1".to_owned()],
        ..ClusterOptions::default()
    };
    let mut world = world(&options, &[]);
    for file in 0..FILES {
        let key = format!("big/{file}.parquet");
        world.s3.put("tpch", &key, few_numbers(100_000)).unwrap();
    }
    let create = [
        "layout",
        "create",
        "tpch.big",
        "--location",
        "s3://tpch/big/",
    ];
    world
        .cluster
        .ok(&[&create[..], &["--form", "packed"]].concat())
        .unwrap();
    let slow = FaultRule::always(Effect::DelayMs(300)).on(Kind::Get);
    world.s3.set_faults(vec![slow]);
    let load = world.cluster.background("load", &["load", "tpch.big:1"]);
    let mut load = load.unwrap();
    wait::until("something is loaded", PATIENCE, || {
        let states = world.cluster.states(&world.etcd);
        let states = states.map_err(|error| error.to_string())?;
        let tables = states
            .iter()
            .filter_map(|state| state.tables.get("tpch.big"));
        match tables.map(|table| table.chunks_done).sum::<u64>() {
            0 => Err(load.log()),
            done => Ok(done),
        }
    })
    .unwrap();
    world.cluster.worker(1).kill();
    world.cluster.start_worker(1).unwrap();
    world.s3.set_faults(vec![]);
    let ended = load.wait(PATIENCE).unwrap();
    let said = load.log();
    assert!(ended.success(), "{ended}: {said}");
    assert!(
        said.contains(&format!("is loaded: {FILES} chunks")),
        "{said}"
    );
    assert!(!said.contains("left out"), "{said}");
}
