//! One statement, one state: whatever a statement asks of a table, and however often, it asks of
//! one snapshot of its files. And the newest state that is published is the one that is seen.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch};
use arrow::datatypes::Int64Type;
use datafusion::error::DataFusionError;
use datafusion::execution::context::{SessionConfig, SessionContext};
use stoa_datafusion::{Embedded, EmbeddedSettings, Origin, Stoa};
use stoa_layout::{LayoutDocument, LayoutVersion, TableName};
use stoa_tests::edges::store;
use stoa_tests::scratch::CacheDirectory;
use stoa_tests::wait;

/// Replaces a file: `rows` rows of `columns`, all of them `value`.
fn replace(path: &Path, columns: &[&str], value: i64, rows: usize) {
    let of = |_: &&str| Arc::new(Int64Array::from(vec![value; rows])) as ArrayRef;
    let columns = columns.iter().map(|name| (*name, of(name)));
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let beside = path.with_extension("new");
    store(&beside, &[batch]).unwrap();
    std::fs::rename(&beside, path).unwrap();
}

struct World {
    embedded: Embedded,
    cache: Arc<CacheDirectory>,
    files: tempfile::TempDir,
}

impl World {
    async fn start(freshness: Option<Duration>) -> World {
        World::start_in(&Arc::new(CacheDirectory::new().unwrap()), freshness).await
    }

    async fn start_in(cache: &Arc<CacheDirectory>, freshness: Option<Duration>) -> World {
        let settings = EmbeddedSettings {
            cache_directory: cache.path(),
            capacity_bytes: 64 << 20,
            freshness,
            ..EmbeddedSettings::default()
        };
        World {
            embedded: Embedded::start(settings).await.unwrap(),
            cache: Arc::clone(cache),
            files: tempfile::tempdir().unwrap(),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        std::fs::create_dir_all(self.files.path().join("t")).unwrap();
        self.files.path().join("t").join(name)
    }

    /// Loads `columns` of the table `s.t`.
    async fn load(&self, version: u64, columns: Option<&[&str]>) {
        let location = format!("{}/", self.files.path().join("t").display());
        let version = LayoutVersion::new(version).unwrap();
        let mut document = LayoutDocument::new(table(), version, location);
        document.columns = columns.map(|c| c.iter().map(|c| (*c).to_owned()).collect());
        self.embedded.publish(&document).await.unwrap();
        let loaded = self
            .embedded
            .wait_loaded(&document, Duration::from_secs(60));
        loaded.await.unwrap();
    }

    /// As another process reads it.
    fn stoa(&self) -> Stoa {
        Stoa::open(&self.cache.path(), Origin::default())
    }
}

fn table() -> TableName {
    TableName::new("s", "t").unwrap()
}

async fn session(stoa: &Stoa) -> SessionContext {
    let session = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(2));
    stoa.register(&session).await.unwrap();
    session
}

/// The integers of a query's only row.
async fn numbers(session: &SessionContext, sql: &str) -> Result<Vec<i64>, DataFusionError> {
    let batches = session.sql(sql).await?.collect().await?;
    let row = batches.iter().find(|batch| batch.num_rows() == 1).unwrap();
    let columns = row.columns().iter();
    Ok(columns
        .map(|c| c.as_primitive::<Int64Type>().value(0))
        .collect())
}

const TWICE: &str = "select (select count(*) from s.t where a > 0) as x, \
                     (select count(*) from s.t where b > 0) as y";

/// Of a table of two equal columns only the first is cached, and its file has been replaced since:
/// a scan of the first is covered, one of the second finds the new state.
#[tokio::test(flavor = "multi_thread")]
async fn all_scans_of_a_statement_see_one_state() {
    let world = World::start(None).await;
    replace(&world.file("x.parquet"), &["a", "b"], 1, 1_000);
    world.load(1, Some(&["a"])).await;
    replace(&world.file("x.parquet"), &["a", "b"], 2, 5_000);
    let setup: [&[&str]; 4] = [
        &[],
        &["create view of_b as select b from s.t"],
        &["prepare p(bigint) as select (select max(a) from s.t), \
           (select max(b) from s.t where b < $1)"],
        &["set datafusion.optimizer.max_passes = 1"],
    ];
    let statements: [(&str, &[i64], usize); 9] = [
        (TWICE, &[5_000, 5_000], 0),
        (TWICE, &[5_000, 5_000], 3),
        (
            "select sum(n) from (select count(*) as n from s.t where a > 0 \
             union all select count(*) from s.t where b > 0)",
            &[10_000],
            0,
        ),
        (
            "select count(*) from (select a from s.t) x left join (select b from s.t) y \
             on x.a = y.b where y.b is null",
            &[0],
            0,
        ),
        (
            "with w as (select * from s.t) select (select max(a) from w), (select max(b) from w)",
            &[2, 2],
            0,
        ),
        (
            "select count(*) from s.t where a in (select b from s.t)",
            &[5_000],
            0,
        ),
        (
            "select max(a), max(b) from s.t where exists (select 1 from s.t o where o.b = s.t.a)",
            &[2, 2],
            0,
        ),
        (
            "select (select max(a) from s.t), (select max(b) from of_b)",
            &[2, 2],
            1,
        ),
        ("execute p(9)", &[2, 2], 2),
    ];
    for (sql, expected, before) in statements {
        // A process of its own, which knows nothing of the new state yet.
        let session = session(&world.stoa()).await;
        for sql in setup[before] {
            session.sql(sql).await.unwrap().collect().await.unwrap();
        }
        let found = numbers(&session, sql).await.unwrap();
        assert_eq!(found, expected, "{sql}");
    }
    // Where nobody may look, both scans see what was cached, footers' counts and bounds too.
    let session = session(&world.stoa()).await;
    session
        .sql("set stoa.check_before_miss = false")
        .await
        .unwrap();
    let covered = "select (select max(a) from s.t), (select count(a) from s.t)";
    assert_eq!(numbers(&session, covered).await.unwrap(), [1, 1_000]);
    assert_eq!(numbers(&session, TWICE).await.unwrap(), [1_000, 1_000]);
    world.embedded.shutdown().await;
}

/// A plan that is kept is planned anew each time it runs: it sees what is there then.
#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_runs_again_sees_the_state_of_its_time() {
    let world = World::start(None).await;
    replace(&world.file("x.parquet"), &["a", "b"], 1, 1_000);
    world.load(1, Some(&["a"])).await;
    let session = session(&world.stoa()).await;
    let frame = session.sql(TWICE).await.unwrap();
    let optimized = frame.clone().into_optimized_plan().unwrap();
    for rows in [1_000, 5_000, 3_000] {
        replace(&world.file("x.parquet"), &["a", "b"], 1, rows);
        for frame in [
            frame.clone(),
            session
                .execute_logical_plan(optimized.clone())
                .await
                .unwrap(),
        ] {
            let batches = frame.collect().await.unwrap();
            let found = batches[0].columns().iter();
            let found: Vec<i64> = found
                .map(|c| c.as_primitive::<Int64Type>().value(0))
                .collect();
            assert_eq!(found, [rows as i64, rows as i64]);
        }
    }
    world.embedded.shutdown().await;
}

/// Statements of one session at the same time, while the file goes back and forth.
#[tokio::test(flavor = "multi_thread")]
async fn statements_at_the_same_time_see_one_state_each() {
    let world = World::start(Some(Duration::from_millis(100))).await;
    replace(&world.file("x.parquet"), &["a", "b"], 1, 1_000);
    world.load(1, Some(&["a"])).await;
    let session = session(&world.stoa()).await;
    let done = Arc::new(AtomicBool::new(false));
    let asking = (0..4).map(|_| {
        let (session, done) = (session.clone(), Arc::clone(&done));
        tokio::spawn(async move {
            let mut answered = 0;
            while !done.load(Ordering::Relaxed) {
                match numbers(&session, TWICE).await {
                    Ok(found) => {
                        assert_eq!(found[0], found[1]);
                        answered += 1;
                    }
                    // The file was replaced between planning and reading.
                    Err(error) => {
                        let error = error.to_string();
                        let known = ["changed", "No such file", "not found"];
                        assert!(known.iter().any(|known| error.contains(known)), "{error}");
                    }
                }
            }
            answered
        })
    });
    let asking: Vec<_> = asking.collect();
    for turn in 0..40 {
        let rows = if turn % 2 == 0 { 5_000 } else { 1_000 };
        replace(&world.file("x.parquet"), &["a", "b"], 1, rows);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    done.store(true, Ordering::Relaxed);
    for asking in asking {
        assert!(asking.await.unwrap() > 0);
    }
    world.embedded.shutdown().await;
}

/// Tables that are stock Parquet, over files of which a part is cached: the listing says which
/// content a scan is of, and what the cache has of another content is never beside it.
#[tokio::test(flavor = "multi_thread")]
async fn stock_tables_over_cached_files_see_one_state() {
    let world = World::start(None).await;
    replace(&world.file("x.parquet"), &["a", "b"], 1, 1_000);
    world.load(1, Some(&["a"])).await;
    let session = session(&world.stoa()).await;
    let location = world.files.path().join("t");
    let create = format!(
        "create external table plain stored as parquet location '{}/'",
        location.display()
    );
    session.sql(&create).await.unwrap();
    let twice = TWICE.replace("s.t", "plain");
    assert_eq!(numbers(&session, &twice).await.unwrap(), [1_000, 1_000]);
    replace(&world.file("x.parquet"), &["a", "b"], 2, 5_000);
    match numbers(&session, &twice).await {
        Ok(found) => assert_eq!(found[0], found[1]),
        Err(error) => assert!(error.to_string().contains("changed"), "{error}"),
    }
    world.embedded.shutdown().await;
}

/// A column has come in front of the others: what is covered is told by name.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_covered_in_a_newer_schema_is_told_by_name() {
    let world = World::start(None).await;
    replace(&world.file("x.parquet"), &["a", "b"], 1, 1_000);
    world.load(1, None).await;
    let stoa = world.stoa();
    let session = session(&stoa).await;
    let held = Arc::new(stoa.table(&table()).await.unwrap().unwrap());
    session.register_table("held", held).unwrap();
    replace(&world.file("x.parquet"), &["z", "a", "b"], 2, 2_000);
    world.load(2, Some(&["a"])).await;
    let asked = || stoa.reader().origin().counters().requests();
    let before = asked();
    let found = numbers(&session, "select sum(a), count(a) from held").await;
    assert_eq!(found.unwrap(), [4_000, 2_000]);
    assert_eq!(asked(), before, "a is covered");
    // What is not covered is looked at, before it is read.
    replace(&world.file("x.parquet"), &["z", "a", "b"], 3, 3_000);
    let found = numbers(&session, "select sum(b), count(b) from held").await;
    assert_eq!(found.unwrap(), [9_000, 3_000]);
    world.embedded.shutdown().await;
}

/// A process whose clock is an hour ahead looked first. What the worker publishes later is newer,
/// whatever the clocks say.
#[tokio::test(flavor = "multi_thread")]
async fn a_look_with_a_clock_that_is_ahead_does_not_outlive_newer_ones() {
    let world = World::start(Some(Duration::from_millis(300))).await;
    replace(&world.file("x.parquet"), &["a", "b"], 1, 1_000);
    world.load(1, None).await;
    let stoa = world.stoa();
    let seen = || {
        let view = stoa.reader().view();
        view.table(&table())
            .map_or(0, |table| table.catalog().rows())
    };
    assert_eq!(seen(), 1_000);
    let session = session(&stoa).await;
    let before = Arc::clone(stoa.reader().view().table(&table()).unwrap());
    replace(&world.file("x.parquet"), &["a", "b"], 2, 2_000);
    let ahead = before.catalog().looked_at_unix_ms + 3_600_000;
    let origin = stoa.reader().origin();
    if let Some(fresh) = before.catalog().refresh(origin, ahead).await.unwrap() {
        stoa.reader().remember_fresh(Arc::new(fresh), Some(&before));
    }
    assert_eq!(seen(), 2_000);
    replace(&world.file("y.parquet"), &["a", "b"], 3, 3_000);
    wait::until("the newer state", Duration::from_secs(20), || {
        match seen() {
            5_000 => Ok(()),
            rows => Err(format!("{rows} rows")),
        }
    })
    .unwrap();
    assert_eq!(
        numbers(&session, "select count(*) from s.t").await.unwrap(),
        [5_000]
    );
    world.embedded.shutdown().await;
}

/// A cache directory is removed and made anew, and counts its generations from one again: what a
/// process knows of a generation of that number is of another directory.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_made_anew_is_another_one_at_the_same_number() {
    let cache = Arc::new(CacheDirectory::new().unwrap());
    let stoa = Stoa::open(&cache.path(), Origin::default());
    let generation = || stoa.reader().view().snapshot().generation();
    // The same steps lead to the same numbers, or to a few more.
    let mut last: Option<u64> = None;
    for (rows, value) in [(1_000, 1), (2_000, 2), (3_000, 3)] {
        let world = World::start_in(&cache, None).await;
        replace(&world.file("x.parquet"), &["a", "b"], value, rows);
        for version in 1.. {
            world.load(version, None).await;
            // Asked past the process's own reader, which shall see this number once.
            let fresh = Stoa::open(&cache.path(), Origin::default());
            let now = fresh.reader().view().snapshot().generation();
            if last.is_none_or(|last| now >= last) {
                last = Some(now);
                break;
            }
        }
        let session = session(&stoa).await;
        let found = numbers(&session, "select sum(a), count(b), min(a), max(a) from s.t").await;
        let rows = rows as i64;
        assert_eq!(found.unwrap(), [rows * value, rows, value, value]);
        assert_eq!(Some(generation()), last);
        world.embedded.shutdown().await;
        std::fs::remove_dir_all(cache.path()).unwrap();
    }
}
