//! The whole product as an operator runs it: etcd, an S3 server over HTTP, coordinator, three
//! workers and query processes, each a process of its own, with what can happen to them.

use std::time::{Duration, Instant};

use serde_json::Value;
use stoa_tests::cluster::{Cluster, ClusterOptions, PATIENCE};
use stoa_tests::etcd::Etcd;
use stoa_tests::s3::faults::{Effect, FaultRule};
use stoa_tests::s3::ledger::Kind;
use stoa_tests::s3::{S3Options, S3Server};
use stoa_tests::{tpch, wait};

/// etcd, S3 with TPC-H in bucket `tpch`, and a cluster over both.
pub(crate) struct World {
    pub(crate) cluster: Cluster,
    pub(crate) etcd: Etcd,
    pub(crate) s3: S3Server,
    _objects: tempfile::TempDir,
}

pub(crate) fn world(options: &ClusterOptions, tables: &[&str]) -> World {
    let objects = tempfile::tempdir().unwrap();
    let s3 = S3Server::start(S3Options::at(objects.path())).unwrap();
    s3.create_bucket("tpch").unwrap();
    for table in tables {
        tpch::copy_table_to(table, &objects.path().join("tpch").join(table)).unwrap();
    }
    let etcd = Etcd::start().unwrap();
    let cluster = Cluster::start(&etcd, &s3, options).unwrap();
    World {
        cluster,
        etcd,
        s3,
        _objects: objects,
    }
}

impl World {
    pub(crate) fn create(&self, table: &str, columns: &[&str]) {
        let location = format!("s3://tpch/{table}/");
        self.cluster
            .create_layout(&format!("tpch.{table}"), &location, columns)
            .unwrap();
    }

    pub(crate) fn count(&self, worker: usize, table: &str) -> i64 {
        number(
            &self
                .cluster
                .sql(worker, &format!("select count(*) as n from tpch.{table}"))
                .unwrap(),
        )
    }

    /// Chunks kept and fetched for a table, summed over the workers.
    pub(crate) fn kept_and_fetched(&self, table: &str) -> (u64, u64) {
        let states = self.cluster.states(&self.etcd).unwrap();
        let tables = states.iter().filter_map(|state| state.tables.get(table));
        tables.fold((0, 0), |sum, t| {
            (sum.0 + t.kept_chunks, sum.1 + t.fetched_chunks)
        })
    }

    /// Data requests (ranged GETs) that were answered since the ledger was last cleared.
    fn data_gets(&self) -> Vec<(String, u64, u64)> {
        let log = self.s3.log();
        let gets = log
            .iter()
            .filter(|access| access.kind == Kind::Get && access.status < 400);
        gets.filter_map(|get| get.range.map(|(start, end)| (get.key.clone(), start, end)))
            .collect()
    }
}

pub(crate) fn number(rows: &[Value]) -> i64 {
    rows[0]["n"].as_i64().unwrap()
}

/// Somebody lays a table out, loads it, asks a fourth process, and then wants one column more:
/// only that column may be fetched, and every read must name the content it wants.
#[test]
fn a_second_version_fetches_only_its_new_column() {
    let world = world(&ClusterOptions::default(), &["lineitem"]);
    let columns = ["l_shipdate", "l_discount", "l_quantity"];
    world.create("lineitem", &columns);
    world.cluster.load("tpch.lineitem:1").unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.lineitem", 1)
        .unwrap();
    let (_, first) = world.kept_and_fetched("tpch.lineitem");
    let row_groups = first / columns.len() as u64;
    assert!(
        row_groups >= 3,
        "every worker has a share of {row_groups} row groups"
    );
    for worker in 0..3 {
        assert_eq!(world.count(worker, "lineitem"), 60_175);
    }
    let revenue = "select sum(l_quantity) as n from tpch.lineitem where l_discount > 0.05";
    let expected = world.cluster.sql(0, revenue).unwrap();
    assert_eq!(world.cluster.sql(1, revenue).unwrap(), expected);

    world.s3.forget();
    world.create(
        "lineitem",
        &["l_shipdate", "l_discount", "l_quantity", "l_tax"],
    );
    world.cluster.load("tpch.lineitem:2").unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.lineitem", 2)
        .unwrap();
    let (kept, fetched) = world.kept_and_fetched("tpch.lineitem");
    assert_eq!((kept, fetched), (first, row_groups));
    let log = world.s3.log();
    let reads = log
        .iter()
        .filter(|a| a.kind == Kind::Get && a.range.is_some());
    assert!(
        reads.clone().all(|read| read.if_match),
        "every read of a known object sends If-Match"
    );
    assert_eq!(world.cluster.sql(2, revenue).unwrap(), expected);
    let status = world.cluster.status().unwrap().to_string();
    assert!(status.contains("tpch.lineitem"), "{status}");
}

/// A worker dies while it loads. What it had sealed by then costs nothing when it is back.
#[test]
fn a_worker_killed_during_a_load_keeps_what_it_had() {
    let one_by_one = vec!["worker.fill.concurrency = 1".to_owned()];
    let options = ClusterOptions {
        workers: 1,
        more: one_by_one,
        ..Default::default()
    };
    let mut world = world(&options, &["lineitem"]);
    world.create("lineitem", &[]);
    let slow = FaultRule::always(Effect::DelayMs(700)).on(Kind::Get);
    world.s3.set_faults(vec![slow]);
    world.cluster.request_load("tpch.lineitem:1").unwrap();
    let held = wait::until("something is published", PATIENCE, || {
        let states = world
            .cluster
            .states(&world.etcd)
            .map_err(|e| e.to_string())?;
        let table = states
            .first()
            .and_then(|s| s.tables.get("tpch.lineitem").cloned());
        match table {
            Some(t) if t.chunks_done > 0 && t.chunks_done < t.chunks_total => Ok(t.chunks_done),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
    world.cluster.worker(0).kill();
    world.s3.set_faults(vec![]);
    world.s3.forget();
    world.cluster.start_worker(0).unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.lineitem", 1)
        .unwrap();
    let (kept, fetched) = world.kept_and_fetched("tpch.lineitem");
    assert!(kept >= held, "{kept} kept of {held} that were published");
    assert!(fetched > 0 && kept > 0, "{kept} kept, {fetched} fetched");
    assert_eq!(world.count(0, "lineitem"), 60_175);

    // Killed again with all of it there: the restart asks the origin for no data at all.
    world.cluster.worker(0).kill();
    world.s3.forget();
    world.cluster.start_worker(0).unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.lineitem", 1)
        .unwrap();
    // The report of the process before stands until its lease runs out.
    wait::until(
        "the new process reports what it kept",
        PATIENCE,
        || match world.kept_and_fetched("tpch.lineitem") {
            (again, 0) if again == kept + fetched => Ok(()),
            other => Err(format!("{other:?}")),
        },
    )
    .unwrap();
    assert_eq!(world.data_gets(), vec![], "kept chunks cost no request");
}

/// The coordinator dies the moment it is asked. Another takes its place and finishes.
#[test]
fn a_second_coordinator_finishes_what_the_first_began() {
    let mut world = world(&ClusterOptions::default(), &["orders"]);
    world.create("orders", &[]);
    world.cluster.start_coordinator().unwrap();
    world.cluster.request_load("tpch.orders:1").unwrap();
    world.cluster.coordinator(0).kill();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.orders", 1)
        .unwrap();
    assert_eq!(world.count(0, "orders"), 15_000);
}

/// Versions arrive faster than they can be loaded, of two tables, interleaved: the last ones win.
#[test]
fn twelve_versions_of_two_tables_converge_to_the_last() {
    let world = world(&ClusterOptions::default(), &["orders", "customer"]);
    let orders = [
        "o_orderkey",
        "o_custkey",
        "o_orderstatus",
        "o_totalprice",
        "o_orderdate",
        "o_clerk",
    ];
    let customers = [
        "c_custkey",
        "c_name",
        "c_nationkey",
        "c_phone",
        "c_acctbal",
        "c_mktsegment",
    ];
    for version in 1..=6 {
        for (table, columns) in [("orders", &orders), ("customer", &customers)] {
            world.create(table, &columns[..version]);
            world
                .cluster
                .request_load(&format!("tpch.{table}:{version}"))
                .unwrap();
        }
    }
    for table in ["tpch.orders", "tpch.customer"] {
        let states = world.cluster.wait_loaded(&world.etcd, table, 6).unwrap();
        let done: u64 = states
            .iter()
            .filter_map(|s| s.tables.get(table))
            .map(|t| t.chunks_done)
            .sum();
        assert!(
            done > 0 && done.is_multiple_of(6),
            "{table}: {done} chunks of 6 columns"
        );
    }
    let stale = world
        .cluster
        .run(&["load", "tpch.orders:3", "--no-wait"])
        .unwrap();
    assert!(
        !stale.stderr.is_empty() && stale.stderr.contains("stale"),
        "{stale:?}"
    );
    assert_eq!(world.count(1, "customer"), 1_500);
}

/// etcd is gone for half a minute. Nothing that is asked in that time fails.
#[test]
fn queries_go_on_while_etcd_is_down() {
    let mut world = world(&ClusterOptions::default(), &["orders"]);
    world.create("orders", &[]);
    world.cluster.load("tpch.orders:1").unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.orders", 1)
        .unwrap();
    world.etcd.stop().unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    let mut asked = 0;
    while Instant::now() < until {
        assert_eq!(world.count(asked % 3, "orders"), 15_000);
        asked += 1;
    }
    assert!(asked >= 3, "{asked} queries in 30 s");
    world.etcd.restart().unwrap();
    world.create("orders", &["o_orderkey"]);
    world.cluster.load("tpch.orders:2").unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.orders", 2)
        .unwrap();
}

/// An object is overwritten with other bytes of the same length. Until the next look, queries that
/// the cache covers see the whole old table; one that it does not cover looks at once and sees the
/// whole new one; after the look all do. No answer mixes the two.
#[test]
fn an_overwritten_object_is_seen_whole_before_and_after() {
    let options = ClusterOptions {
        workers: 1,
        freshness: "8s".to_owned(),
        ..Default::default()
    };
    let world = world(&options, &["customer"]);
    world.create("customer", &["c_custkey", "c_nationkey"]);
    world.cluster.load("tpch.customer:1").unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.customer", 1)
        .unwrap();
    let covered = "select sum(c_custkey) as n from tpch.customer";
    let old = number(&world.cluster.sql(0, covered).unwrap());
    // The first file's content takes the place of the second's: other etag, other rows.
    let files: Vec<String> = {
        let mut names: Vec<String> = std::fs::read_dir(world.s3.root().join("tpch/customer"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert!(files.len() >= 2, "{files:?}");
    let first = world
        .s3
        .read("tpch", &format!("customer/{}", files[0]))
        .unwrap();
    world
        .s3
        .put("tpch", &format!("customer/{}", files[1]), &first)
        .unwrap();

    assert_eq!(
        number(&world.cluster.sql(0, covered).unwrap()),
        old,
        "the old snapshot, whole"
    );
    // Not covered: c_name is not cached, so the scan looks before it reads.
    let whole = "select sum(c_custkey) as n, max(c_name) as name from tpch.customer";
    let new = number(&world.cluster.sql(0, whole).unwrap());
    assert_ne!(new, old, "the new object, whole");
    wait::until(
        "the look that finds the new object",
        PATIENCE,
        || match number(&world.cluster.sql(0, covered).map_err(|e| e.to_string())?) {
            n if n == new => Ok(()),
            n if n == old => Err("still the old snapshot".to_owned()),
            n => panic!("a mixture: {n}, old {old}, new {new}"),
        },
    )
    .unwrap();

    // A file appended to the prefix appears likewise.
    let rows = world.count(0, "customer");
    world
        .s3
        .put("tpch", "customer/part-9.parquet", &first)
        .unwrap();
    wait::until("the appended file", PATIENCE, || {
        match world.count(0, "customer") {
            n if n > rows => Ok(()),
            n => Err(format!("{n} rows")),
        }
    })
    .unwrap();
    let age = world
        .cluster
        .sql(0, "select age_seconds as n from stoa_tables()")
        .unwrap();
    assert!(age[0]["n"].as_f64().unwrap() < 60.0, "{age:?}");
}
