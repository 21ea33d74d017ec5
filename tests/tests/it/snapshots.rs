//! Objects that are overwritten under a cached table: an answer is of one content, never of two.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arrow::array::{Array, AsArray};
use arrow::datatypes::Int64Type;
use datafusion::error::DataFusionError;
use datafusion::execution::context::SessionContext;
use stoa_datafusion::{Origin, Stoa};
use stoa_origin::{OriginLimits, StoreSettings, Stores};
use stoa_tests::cluster::{ClusterOptions, PATIENCE};
use stoa_tests::s3::{Kind, S3Server};
use stoa_tests::wait;

use crate::spine::{World, world};

/// A query process on the host of worker 0, in this process: asking is quicker than starting one.
fn stoa(world: &World) -> Stoa {
    let root = "s3://tpch";
    let settings = StoreSettings {
        environment: Some(Vec::new()),
        ..StoreSettings::default()
    };
    let settings = settings
        .with_option(root, "endpoint", world.s3.endpoint())
        .with_option(root, "region", S3Server::REGION)
        .with_option(root, "allow_http", "true")
        .with_option(root, "access_key_id", world.s3.access_key())
        .with_option(root, "secret_access_key", world.s3.secret_key());
    let origin = Origin::new(Stores::new(settings), OriginLimits::default());
    Stoa::open(world.cluster.cache(0), origin)
}

async fn session(stoa: &Stoa) -> SessionContext {
    let session = SessionContext::new();
    stoa.register(&session).await.unwrap();
    session
}

/// The integers of a query's only row.
async fn numbers(session: &SessionContext, sql: &str) -> Result<Vec<i64>, DataFusionError> {
    let batches = session.sql(sql).await?.collect().await?;
    let row = batches.iter().find(|batch| batch.num_rows() == 1).unwrap();
    let integers = row.columns().iter().map(|column| {
        let column = column.as_primitive::<Int64Type>();
        assert!(!column.is_null(0), "{sql}: null");
        column.value(0)
    });
    Ok(integers.collect())
}

/// What `sum(a), sum(b), count(*)` are when the second file of customer holds `content`.
const SUMS: &str = "select sum(c_custkey), sum(c_nationkey), count(*) from tpch.customer";
/// The same columns, of which the cache holds only the first.
const ONE_MISSING: &str = "select sum(c_custkey), sum(length(c_name)), count(*) from tpch.customer";

/// The second file takes turns between two contents of one size while two processes keep asking,
/// one for what is cached and one for what is only half cached. Each answer is that of one of the
/// two tables; a query that meets the change in its middle may at most say so.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn overwriting_never_mixes_two_contents() {
    let options = ClusterOptions {
        workers: 1,
        freshness: "1s".to_owned(),
        ..ClusterOptions::default()
    };
    let world = world(&options, &["customer"]);
    world.create("customer", &["c_custkey", "c_nationkey"]);
    world.cluster.load("tpch.customer:1").unwrap();
    let stoa = stoa(&world);
    let asking = session(&stoa).await;
    let key = "customer/part-1.parquet";
    let contents = [
        world.s3.read("tpch", key).unwrap(),
        world.s3.read("tpch", "customer/part-0.parquet").unwrap(),
    ];

    // What the whole table answers with each content, seen while nothing else happens.
    let mut whole = [BTreeSet::new(), BTreeSet::new()];
    for content in [1, 0] {
        world.s3.put("tpch", key, &contents[content]).unwrap();
        let deadline = Instant::now() + PATIENCE;
        // A half cached scan looks before it reads, so it knows at once; wait for the worker too.
        let half = numbers(&asking, ONE_MISSING).await.unwrap();
        loop {
            let covered = numbers(&asking, SUMS).await.unwrap();
            let settled = covered[0] == half[0];
            if settled {
                whole[0].insert(covered);
                whole[1].insert(half);
                break;
            }
            assert!(Instant::now() < deadline, "{covered:?} and {half:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let whole = whole.map(Arc::new);
    assert_eq!(
        (whole[0].len(), whole[1].len()),
        (2, 2),
        "the contents differ"
    );

    let done = Arc::new(AtomicBool::new(false));
    let asked = [SUMS, ONE_MISSING]
        .into_iter()
        .zip(&whole)
        .map(|(sql, whole)| {
            let (done, whole, stoa) = (Arc::clone(&done), Arc::clone(whole), stoa.clone());
            tokio::spawn(async move {
                let session = session(&stoa).await;
                let (mut answers, mut refused) = (BTreeSet::new(), 0_u32);
                while !done.load(Ordering::Relaxed) {
                    match numbers(&session, sql).await {
                        Ok(answer) => {
                            assert!(
                                whole.contains(&answer),
                                "a mixture: {answer:?} of {whole:?}"
                            );
                            answers.insert(answer);
                        }
                        Err(error) => {
                            let text = error.to_string();
                            assert!(text.contains("changed"), "{text}");
                            refused += 1;
                        }
                    }
                }
                (answers, refused)
            })
        });
    let asked: Vec<_> = asked.collect();
    for turn in 1..=8 {
        world.s3.put("tpch", key, &contents[turn % 2]).unwrap();
        tokio::time::sleep(Duration::from_millis(900)).await;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    done.store(true, Ordering::Relaxed);
    for asked in asked {
        let (answers, _refused) = asked.await.unwrap();
        assert_eq!(answers.len(), 2, "both contents were seen");
    }
}

/// Within the time that `cache.freshness` allows, a covered query sees the old snapshot as a
/// whole, asks the origin nothing, and its age can be seen; the look at a miss comes at once.
#[tokio::test(flavor = "multi_thread")]
async fn the_age_of_a_snapshot_is_visible_and_a_miss_renews_it() {
    let options = ClusterOptions {
        workers: 1,
        freshness: "1h".to_owned(),
        ..ClusterOptions::default()
    };
    let world = world(&options, &["customer"]);
    world.create("customer", &["c_custkey", "c_nationkey"]);
    world.cluster.load("tpch.customer:1").unwrap();
    let stoa = stoa(&world);
    let asking = session(&stoa).await;
    let old = numbers(&asking, SUMS).await.unwrap();
    let first = world.s3.read("tpch", "customer/part-0.parquet").unwrap();
    world
        .s3
        .put("tpch", "customer/part-1.parquet", &first)
        .unwrap();
    world.s3.forget();
    assert_eq!(numbers(&asking, SUMS).await.unwrap(), old);
    assert_eq!(world.s3.counts().reads(), 0, "{:?}", world.s3.log());
    let age = || async {
        let sql = "select cast(max(age_seconds) * 1000 as bigint) from stoa_tables()";
        numbers(&asking, sql).await.unwrap()[0]
    };
    let before = age().await;
    assert!((0..3_600_000).contains(&before), "{before} ms");
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(age().await >= before + 1_000, "the age grows");

    // What the cache does not cover is read as it is now, and with the etag it was seen with.
    let new = numbers(&asking, ONE_MISSING).await.unwrap();
    assert_ne!(new[0], old[0]);
    let log = world.s3.log();
    assert!(
        log.iter().any(|access| access.kind == Kind::List),
        "{log:?}"
    );
    let reads = log.iter().filter(|access| access.kind == Kind::Get);
    assert!(reads.clone().count() > 0);
    assert!(reads.clone().all(|read| read.if_match), "{log:?}");
    // The same process does not fall back behind what it has seen.
    assert_eq!(numbers(&asking, ONE_MISSING).await.unwrap(), new);
}

/// A file is appended. It is read at once after the look that finds it, and then cached like the
/// others, without anybody asking for another version.
#[test]
fn an_appended_file_is_read_and_then_cached() {
    let options = ClusterOptions {
        freshness: "2s".to_owned(),
        ..ClusterOptions::default()
    };
    let world = world(&options, &["customer"]);
    world.create("customer", &["c_custkey", "c_nationkey"]);
    world.cluster.load("tpch.customer:1").unwrap();
    let chunks = |world: &World| {
        let states = world.cluster.states(&world.etcd).unwrap();
        let tables = states.iter().filter_map(|s| s.tables.get("tpch.customer"));
        tables.map(|table| table.chunks_done).sum::<u64>()
    };
    let (rows, held) = (world.count(0, "customer"), chunks(&world));
    let first = world.s3.read("tpch", "customer/part-0.parquet").unwrap();
    let appended = "customer/part-9.parquet";
    world.s3.put("tpch", appended, &first).unwrap();
    wait::until("the appended rows", PATIENCE, || {
        match world.count(0, "customer") {
            n if n > rows => Ok(()),
            n => Err(format!("{n} rows")),
        }
    })
    .unwrap();
    wait::until("the appended chunks", PATIENCE, || match chunks(&world) {
        n if n > held => Ok(()),
        n => Err(format!("{n} chunks")),
    })
    .unwrap();
    // Each of the new chunks was fetched once, by whoever has the place for it.
    let plan = world.cluster.plan(&world.etcd, "tpch.customer").unwrap();
    assert_eq!(plan.unwrap().table_version, "tpch.customer:1");
    let log = world.s3.log();
    let reads = log
        .iter()
        .filter(|access| access.kind == Kind::Get && access.key == appended && access.status < 400);
    assert!(reads.count() > 0);

    // And its removal is followed as well.
    world.s3.remove("tpch", appended).unwrap();
    wait::until("the plan without it", PATIENCE, || {
        match (chunks(&world), world.count(0, "customer")) {
            (n, count) if n == held && count == rows => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
}

/// A file that is removed from the prefix is gone after the next look, and no query fails.
#[test]
fn a_removed_file_leaves_the_table() {
    let options = ClusterOptions {
        workers: 1,
        freshness: "2s".to_owned(),
        ..ClusterOptions::default()
    };
    let world = world(&options, &["customer"]);
    world.create("customer", &["c_custkey"]);
    world.cluster.load("tpch.customer:1").unwrap();
    let all = world.count(0, "customer");
    world.s3.remove("tpch", "customer/part-1.parquet").unwrap();
    wait::until("the look that misses the file", PATIENCE, || {
        match world.count(0, "customer") {
            n if n < all => Ok(()),
            n => Err(format!("{n} rows")),
        }
    })
    .unwrap();
}
