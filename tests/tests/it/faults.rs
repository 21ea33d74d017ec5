//! What goes wrong around a cluster, as real processes meet it: masters that come back, workers
//! that do not, stores that stumble, memory that is too small.

use std::collections::BTreeMap;
use std::fs::File;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use parquet::file::reader::{FileReader, SerializedFileReader};
use stoa_metastore::keys;
use stoa_tests::cluster::{ClusterOptions, PATIENCE};
use stoa_tests::s3::{Effect, FaultRule, Kind};
use stoa_tests::wait;

use crate::spine::{World, number, world};

/// Where each column chunk of an object lies: column, start, end.
fn chunks(world: &World, key: &str) -> Vec<(String, u64, u64)> {
    let file = File::open(world.s3.root().join("tpch").join(key)).unwrap();
    let reader = SerializedFileReader::new(file).unwrap();
    let groups = reader.metadata().row_groups().iter();
    groups
        .flat_map(|group| group.columns())
        .map(|chunk| {
            let (start, length) = chunk.byte_range();
            (chunk.column_path().string(), start, start + length)
        })
        .collect()
}

/// The objects of a table.
fn objects(world: &World, table: &str) -> Vec<String> {
    let directory = world.s3.root().join("tpch").join(table);
    let names = std::fs::read_dir(directory).unwrap();
    names
        .map(|entry| format!("{table}/{}", entry.unwrap().file_name().to_str().unwrap()))
        .collect()
}

/// One column more is wanted. The store's own books, not the worker's word, say what was read:
/// each chunk of the new column once, and no byte of another.
#[test]
fn the_store_saw_only_the_new_column() {
    let options = ClusterOptions {
        // Ranges that lie apart must not be joined, or the gap between them is read as well.
        more: vec!["origin.coalesce.gap = 0".to_owned()],
        ..ClusterOptions::default()
    };
    let world = world(&options, &["lineitem"]);
    world.create("lineitem", &["l_shipdate", "l_discount"]);
    world.cluster.load("tpch.lineitem:1").unwrap();
    world.create("lineitem", &["l_shipdate", "l_discount", "l_tax"]);
    world.s3.forget();
    world.cluster.load("tpch.lineitem:2").unwrap();
    let log = world.s3.log();
    for key in objects(&world, "lineitem") {
        let size = world.s3.read("tpch", &key).unwrap().len() as u64;
        let chunks = chunks(&world, &key);
        let mut read: BTreeMap<(u64, u64), u32> = BTreeMap::new();
        for access in &log {
            let Some((start, end)) = access.range.filter(|_| access.key == key) else {
                continue;
            };
            // The tail of a file is its footer, which a small file's chunks lie close to.
            if access.kind != Kind::Get || end == size {
                continue;
            }
            for (column, from, to) in &chunks {
                if start < *to && *from < end {
                    assert_eq!(column, "l_tax", "{start}..{end} of {key}");
                    *read.entry((*from, *to)).or_default() += 1;
                }
            }
        }
        let wanted = chunks.iter().filter(|(column, _, _)| column == "l_tax");
        let wanted: BTreeMap<_, _> = wanted.map(|(_, from, to)| ((*from, *to), 1)).collect();
        assert_eq!(read, wanted, "the chunks of l_tax in {key}, each once");
    }
}

/// Somebody writes the inbox with bare `etcdctl put`s, twice in a row and once with nonsense: both
/// requests count, and the refusal can be read.
#[test]
fn bare_puts_into_the_inbox_both_count() {
    let world = world(&ClusterOptions::default(), &["orders", "customer"]);
    world.create("orders", &["o_orderkey"]);
    world.create("customer", &["c_custkey"]);
    world.etcd.put(keys::INBOX, "tpch.orders:1").unwrap();
    world.etcd.put(keys::INBOX, "no such thing").unwrap();
    world.etcd.put(keys::INBOX, "tpch.customer:1").unwrap();
    for table in ["tpch.orders", "tpch.customer"] {
        world.cluster.wait_loaded(&world.etcd, table, 1).unwrap();
    }
    let refused = wait::until("the refusal", PATIENCE, || {
        let status = world.cluster.status().map_err(|error| error.to_string())?;
        match status["rejections"].as_array() {
            Some(refused) if !refused.is_empty() => Ok(refused.clone()),
            _ => Err(status.to_string()),
        }
    })
    .unwrap();
    assert_eq!(refused[0]["request"], "no such thing", "{refused:?}");

    // The same version again is no progress, whoever asks.
    world.etcd.put(keys::INBOX, "tpch.orders:1").unwrap();
    world.create("orders", &["o_orderkey", "o_clerk"]);
    world.etcd.put(keys::INBOX, "tpch.orders:2").unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.orders", 2)
        .unwrap();
}

/// A coordinator freezes, another is elected and plans, and then the first one wakes up believing
/// that nothing happened: the fence lets none of its writes through.
#[test]
fn a_coordinator_that_wakes_up_late_writes_nothing() {
    let mut world = world(&ClusterOptions::default(), &["orders"]);
    world.create("orders", &["o_orderkey"]);
    world.cluster.load("tpch.orders:1").unwrap();
    let elected = |world: &World| {
        let entry = world.etcd.get(keys::ELECTION).unwrap();
        entry.map(|entry| String::from_utf8(entry.value).unwrap())
    };
    let first = elected(&world);
    world.cluster.start_coordinator().unwrap();
    world.cluster.coordinator(0).signal(Signal::SIGSTOP);
    world.create("orders", &["o_orderkey", "o_custkey"]);
    world.cluster.request_load("tpch.orders:2").unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.orders", 2)
        .unwrap();
    let second = elected(&world);
    assert_ne!(second, first);
    let plan = world.etcd.get(&keys::cache_version("tpch.orders")).unwrap();

    world.cluster.coordinator(0).signal(Signal::SIGCONT);
    let until = Instant::now() + Duration::from_secs(6);
    while Instant::now() < until {
        let now = world.etcd.get(&keys::cache_version("tpch.orders")).unwrap();
        assert_eq!(now, plan, "the plan of the second stands");
        assert_eq!(elected(&world), second);
        std::thread::sleep(Duration::from_millis(200));
    }
    // It stands by, and takes over when it is its turn.
    world.cluster.coordinator(1).kill();
    world.create("orders", &["o_orderkey", "o_custkey", "o_clerk"]);
    world.cluster.request_load("tpch.orders:3").unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.orders", 3)
        .unwrap();
}

/// Coordinators are killed at one moment of planning after the other. Each successor finishes what
/// was begun, and no worker fetches anything twice because of it.
#[test]
fn coordinators_killed_at_any_moment_leave_whole_plans() {
    let mut world = world(&ClusterOptions::default(), &["orders"]);
    let columns = [
        "o_orderkey",
        "o_custkey",
        "o_orderdate",
        "o_clerk",
        "o_comment",
    ];
    world.create("orders", &columns[..1]);
    world.cluster.load("tpch.orders:1").unwrap();
    let (_, groups) = world.kept_and_fetched("tpch.orders");
    for (version, moment) in [(2, 0), (3, 15), (4, 60), (5, 200)] {
        let successor = world.cluster.start_coordinator().unwrap();
        world.create("orders", &columns[..version]);
        let request = format!("tpch.orders:{version}");
        world.cluster.request_load(&request).unwrap();
        std::thread::sleep(Duration::from_millis(moment));
        world.cluster.coordinator(successor - 1).kill();
        world
            .cluster
            .wait_loaded(&world.etcd, "tpch.orders", version as u64)
            .unwrap();
        let (kept, fetched) = world.kept_and_fetched("tpch.orders");
        assert_eq!(kept + fetched, version as u64 * groups, "{request}");
        assert!(fetched <= groups, "{request}: {fetched} fetched");
    }
    assert_eq!(world.count(0, "orders"), 15_000);
}

/// A worker goes and stays away. After the grace its share moves, and nothing else does.
#[test]
fn only_the_share_of_a_lost_worker_moves() {
    let options = ClusterOptions {
        grace: 2,
        ..ClusterOptions::default()
    };
    let mut world = world(&options, &["lineitem"]);
    world.create("lineitem", &["l_orderkey", "l_shipdate"]);
    world.cluster.load("tpch.lineitem:1").unwrap();
    let states = world.cluster.states(&world.etcd).unwrap();
    let share = |id: &str| {
        let state = states.iter().find(|state| state.id == id);
        state.map_or(0, |state| state.tables["tpch.lineitem"].chunks_total)
    };
    let shares: Vec<u64> = ["worker-0", "worker-1", "worker-2"].map(share).to_vec();
    assert!(shares.iter().all(|share| *share > 0), "{shares:?}");
    world.s3.forget();
    world.cluster.worker(2).kill();
    wait::until("a plan without the lost worker", PATIENCE, || {
        let plan = world.cluster.plan(&world.etcd, "tpch.lineitem");
        match plan.map_err(|error| error.to_string())? {
            Some(plan) if !plan.parts.contains_key("worker-2") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.lineitem", 1)
        .unwrap();
    let (kept, fetched) = world.kept_and_fetched("tpch.lineitem");
    assert_eq!((kept, fetched), (shares[0] + shares[1], shares[2]));
    for worker in 0..2 {
        assert_eq!(world.count(worker, "lineitem"), 60_175);
    }
}

/// The store answers with errors, cut connections and short bodies while a table is loaded: what
/// is published is right, and what was tried is in the log without the keys to the store.
#[test]
fn a_stumbling_store_delays_a_load_and_spoils_nothing() {
    let options = ClusterOptions {
        more: vec!["log.level = \"debug\"".to_owned()],
        ..ClusterOptions::default()
    };
    let world = world(&options, &["orders"]);
    world.create("orders", &[]);
    let faults = [
        FaultRule::always(Effect::Status(503)).times(4),
        FaultRule::always(Effect::Status(500)).after(6).times(3),
        FaultRule::always(Effect::ResetAfter(1_000))
            .after(3)
            .times(4),
        FaultRule::always(Effect::ResetAfter(0)).after(2).times(2),
        FaultRule::always(Effect::ShortBody(500)).after(5).times(4),
        FaultRule::always(Effect::DelayMs(80)),
    ];
    world
        .s3
        .set_faults(faults.map(|rule| rule.on(Kind::Get)).to_vec());
    world.cluster.load("tpch.orders:1").unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.orders", 1)
        .unwrap();
    assert!(world.s3.counts().of(Kind::Get).errors >= 7);
    world.s3.set_faults(vec![]);
    let sum = "select sum(o_orderkey) + sum(length(o_comment)) as n from tpch.orders";
    let cached = number(&world.cluster.sql(0, sum).unwrap());
    let plain = number(
        &world
            .cluster
            .sql(0, &format!("set stoa.enabled = false; {sum}"))
            .unwrap(),
    );
    assert_eq!(cached, plain);
    let verified = world
        .cluster
        .run_at(world.cluster.worker_config(0), &["cache", "verify"]);
    assert_eq!(verified.unwrap().code, Some(0));
    let logs = world.cluster.logs().unwrap();
    assert!(
        !logs.contains(world.s3.secret_key()),
        "a secret is in a log"
    );
}

/// The store is gone. What is in memory is answered as if nothing were; what is not says why, and
/// works again when the store is back.
#[test]
fn hits_go_on_while_the_store_is_gone() {
    let options = ClusterOptions {
        workers: 1,
        freshness: "1s".to_owned(),
        more: vec![
            "origin.attempts = 2".to_owned(),
            "origin.timeout = \"2s\"".to_owned(),
        ],
        ..ClusterOptions::default()
    };
    let mut world = world(&options, &["customer"]);
    world.create("customer", &["c_custkey", "c_nationkey"]);
    world.cluster.load("tpch.customer:1").unwrap();
    world.s3.stop();
    let hot = "select sum(c_custkey) as n from tpch.customer where c_nationkey < 10";
    for _ in 0..4 {
        assert!(number(&world.cluster.sql(0, hot).unwrap()) > 0);
    }
    let cold = "select sum(length(c_name)) as n from tpch.customer";
    let config = world.cluster.worker_config(0).to_owned();
    let refused = world.cluster.sql_at(&config, cold).unwrap_err().to_string();
    assert!(refused.contains("customer/part-"), "{refused}");
    world.s3.restart().unwrap();
    assert_eq!(world.cluster.sql(0, cold).unwrap().len(), 1);
    world.create("customer", &["c_custkey", "c_nationkey", "c_name"]);
    world.cluster.load("tpch.customer:2").unwrap();
}

/// etcd does not refuse, it just stops answering, for longer than every lease lasts. Queries go
/// on; afterwards everybody is registered again and takes new work.
#[test]
fn a_frozen_etcd_stops_no_query_and_leases_come_back() {
    let mut world = world(&ClusterOptions::default(), &["orders"]);
    world.create("orders", &["o_orderkey"]);
    world.cluster.load("tpch.orders:1").unwrap();
    world.etcd.pause();
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until {
        assert_eq!(world.count(0, "orders"), 15_000);
    }
    world.etcd.resume();
    world.cluster.wait_registered(&world.etcd).unwrap();
    world.create("orders", &["o_orderkey", "o_clerk"]);
    world.cluster.load("tpch.orders:2").unwrap();
    let states = world
        .cluster
        .wait_loaded(&world.etcd, "tpch.orders", 2)
        .unwrap();
    assert_eq!(states.len(), 3);
}

/// etcd comes back from an older backup: its revisions go backwards. Serving never stops, nobody
/// drops what he holds because of what etcd forgot, and within a minute everybody follows the
/// plans of the restored etcd, under numbers that are later than any worker knows.
#[test]
fn an_etcd_from_an_older_backup_stops_no_query_and_converges() {
    let mut world = world(&ClusterOptions::default(), &["orders"]);
    world.create("orders", &["o_orderkey"]);
    world.cluster.load("tpch.orders:1").unwrap();
    world.etcd.stop().unwrap();
    let backup = world.etcd.backup().unwrap();
    world.etcd.restart().unwrap();
    world.create("orders", &["o_orderkey", "o_clerk", "o_comment"]);
    world.cluster.load("tpch.orders:2").unwrap();
    let plan = |world: &World| {
        let plan = world.cluster.plan(&world.etcd, "tpch.orders");
        plan.map_err(|error| error.to_string())
    };
    let lost = plan(&world).unwrap().unwrap();
    world.etcd.stop().unwrap();
    world.etcd.restore(&backup).unwrap();
    world.etcd.restart().unwrap();
    let restored = Instant::now();
    world.s3.forget();
    let hot = "select sum(length(o_comment)) as n from tpch.orders";
    let sum = number(&world.cluster.sql(0, hot).unwrap());
    let until = restored + Duration::from_secs(8);
    while Instant::now() < until {
        assert_eq!(number(&world.cluster.sql(0, hot).unwrap()), sum);
        let now = plan(&world).unwrap().unwrap();
        assert!(now.plan < lost.plan, "plans are frozen at first: {now:?}");
    }
    let status = world.cluster.status().unwrap();
    let alarm = status["problems"].to_string();
    assert!(alarm.contains("plans are frozen"), "{status}");

    wait::until("a plan later than all", Duration::from_secs(60), || {
        assert_eq!(number(&world.cluster.sql(0, hot).unwrap()), sum);
        match plan(&world)? {
            Some(plan) if plan.plan > lost.plan => Ok(plan),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.orders", 1)
        .unwrap();
    let took = restored.elapsed();
    assert!(took < Duration::from_secs(60), "converged after {took:?}");
    assert_eq!(number(&world.cluster.sql(0, hot).unwrap()), sum);
    for worker in 0..3 {
        world.cluster.worker(worker).expect_running().unwrap();
    }
    // What etcd forgot can be said again.
    world.create("orders", &["o_orderkey", "o_clerk"]);
    world.cluster.load("tpch.orders:2").unwrap();
    assert_eq!(world.count(1, "orders"), 15_000);
}

/// Two workers on one directory would overwrite each other. The second says so and ends.
#[test]
fn a_second_worker_on_a_directory_ends_with_a_clear_error() {
    let options = ClusterOptions {
        workers: 1,
        ..ClusterOptions::default()
    };
    let mut world = world(&options, &["nation"]);
    let config = world.cluster.worker_config(0).to_owned();
    let second = world.cluster.run_at(&config, &["worker"]).unwrap();
    assert_ne!(second.code, Some(0));
    let place = world.cluster.cache(0).display().to_string();
    assert!(second.stderr.contains(&place), "{}", second.stderr);
    world.cluster.worker(0).expect_running().unwrap();
    world.create("nation", &[]);
    world.cluster.load("tpch.nation:1").unwrap();
    assert_eq!(world.count(0, "nation"), 25);
}
/// The cache is smaller than what is wanted: the first columns are in it, the rest is named as
/// left out, and answers are the same.
#[test]
fn what_does_not_fit_is_left_out_by_priority_and_said() {
    let options = ClusterOptions {
        workers: 1,
        cache_size: "2MiB".to_owned(),
        ..ClusterOptions::default()
    };
    let world = world(&options, &["lineitem"]);
    let config = world.cluster.config().to_owned();
    // Decoded, for which the plan knows the bytes well; the automatic form would make it fit.
    let create = [
        "layout",
        "create",
        "tpch.lineitem",
        "--location",
        "s3://tpch/lineitem/",
        "--columns",
        "l_orderkey,l_shipdate,l_comment",
        "--form",
        "arrow",
    ];
    world.cluster.run_at(&config, &create).unwrap();
    let loaded = world
        .cluster
        .run_at(&config, &["load", "tpch.lineitem:1"])
        .unwrap();
    assert_eq!(loaded.code, Some(6), "{}{}", loaded.stdout, loaded.stderr);
    world.s3.forget();
    let first = "select sum(l_orderkey) as n from tpch.lineitem";
    assert!(number(&world.cluster.sql(0, first).unwrap()) > 0);
    assert_eq!(world.s3.counts().gets(), 0, "{:?}", world.s3.log());
    let last = "select sum(length(l_comment)) as n from tpch.lineitem";
    assert!(number(&world.cluster.sql(0, last).unwrap()) > 0);
    assert!(
        world.s3.counts().gets() > 0,
        "the last column is what did not fit"
    );
    let said = format!("{}{}", loaded.stdout, loaded.stderr);
    assert!(said.contains("without a place in the plan"), "{said}");
    let status = world.cluster.status().unwrap();
    let unplaced = &status["tables"][0]["unplaced"];
    assert!(unplaced["chunks"].as_u64().unwrap() > 0, "{status}");
    assert!(
        unplaced["reason"].to_string().contains("capacity"),
        "{status}"
    );
}

/// The table takes more than the cache has, whatever form its columns get. The load ends all the
/// same, with what fits, and says so; a second one has nothing to do and says the same.
#[test]
fn a_load_ends_where_the_cache_is_too_small() {
    let options = ClusterOptions {
        workers: 1,
        cache_size: "1MiB".to_owned(),
        ..ClusterOptions::default()
    };
    let world = world(&options, &["lineitem"]);
    let config = world.cluster.config().to_owned();
    world.create("lineitem", &[]);
    for _ in 0..2 {
        let started = Instant::now();
        let load = ["load", "tpch.lineitem:1", "--timeout", "60s"];
        let loaded = world.cluster.run_at(&config, &load).unwrap();
        let said = format!("{}{}", loaded.stdout, loaded.stderr);
        assert_eq!(loaded.code, Some(6), "{said}");
        assert!(started.elapsed() < Duration::from_secs(60), "{said}");
        for part in [
            "tpch.lineitem:1 is loaded in part",
            "of tpch.lineitem:1 are left out; queries use what is there",
            "raise cache.size",
        ] {
            assert!(said.contains(part), "{part:?} is not in {said}");
        }
    }
    let states = world.cluster.states(&world.etcd).unwrap();
    let table = &states[0].tables["tpch.lineitem"];
    assert_eq!(table.current, table.target, "{table:?}");
    assert!(table.chunks_done > 0, "{table:?}");
    assert_eq!(world.count(0, "lineitem"), 60_175);
    let first = "select sum(l_orderkey) as n from tpch.lineitem";
    world.s3.forget();
    assert!(number(&world.cluster.sql(0, first).unwrap()) > 0);
    assert_eq!(world.s3.counts().gets(), 0, "{:?}", world.s3.log());
    let status = world.cluster.status().unwrap();
    assert_eq!(status["tables"][0]["state"], "partial", "{status}");
}
