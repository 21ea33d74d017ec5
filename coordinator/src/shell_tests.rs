//! The whole coordinator over an embedded metastore and local Parquet files, with workers that
//! only pretend to load.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use futures::StreamExt;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use stoa_control::{CoordinatorService, CoordinatorStatus};
use stoa_layout::{FormChoice, LayoutDocument, TableName};
use stoa_metastore::{
    CacheVersion, EmbeddedMetastore, LeftOut, Op, Records, Registration, TableState, Txn,
    WorkerPhase, WorkerPlan, WorkerRecord, WorkerState, keys,
};
use stoa_origin::{Origin, OriginLimits, StoreSettings, Stores};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::{Coordinator, CoordinatorSettings, SystemClock};

const PATIENCE: Duration = Duration::from_secs(20);
const ROW_GROUPS: usize = 4;
const ROWS: usize = 1000;
const TTL: Duration = Duration::from_secs(5);

/// Writes a file of [`ROW_GROUPS`] row groups with columns a, b and c.
fn write_file(path: &Path, seed: i64) {
    let column = |salt: i64| -> ArrayRef {
        let values = (0..(ROWS * ROW_GROUPS) as i64).map(|row| {
            row.wrapping_mul(seed + salt)
                .wrapping_mul(0x5851_F42D_4C95_7F2D)
        });
        Arc::new(Int64Array::from_iter_values(values))
    };
    let batch =
        RecordBatch::try_from_iter([("a", column(1)), ("b", column(2)), ("c", column(3))]).unwrap();
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(ROWS))
        .build();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

/// A metastore, tables on disk, and what runs on them.
struct Place {
    records: Records,
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        Place {
            records: Records::new(Arc::new(EmbeddedMetastore::in_memory())),
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn origin() -> Origin {
        Origin::new(
            Stores::new(StoreSettings::default()),
            OriginLimits::default(),
        )
    }

    /// A table of so many files.
    fn table(&self, name: &str, files: usize) {
        for file in 0..files {
            write_file(
                &self
                    .directory
                    .path()
                    .join(name)
                    .join(format!("{file}.parquet")),
                file as i64 * 7 + 1,
            );
        }
    }

    async fn publish(&self, name: &str, version: u64, columns: &[&str]) {
        let location = format!("{}/", self.directory.path().join(name).display());
        let version_number = serde_json::from_value(serde_json::json!(version)).unwrap();
        let mut document =
            LayoutDocument::new(TableName::parse(name).unwrap(), version_number, location);
        document.columns = Some(columns.iter().map(|column| (*column).to_owned()).collect());
        document.form = FormChoice::Arrow;
        self.records
            .publish_layout(name, version, &document.to_json())
            .await
            .unwrap();
    }

    async fn load(&self, table_version: &str) {
        self.records.request_load(table_version).await.unwrap();
    }

    /// What somebody does with a bare `etcdctl put layout_version …`.
    async fn put_inbox(&self, text: &str) {
        let txn = Txn {
            when: vec![],
            then: vec![Op::put(keys::INBOX, text)],
        };
        self.records.store().txn(txn).await.unwrap();
    }

    fn start(&self, candidate: &str) -> Running {
        self.start_with(
            CoordinatorSettings {
                candidate: candidate.into(),
                ..settings()
            },
            Self::origin(),
        )
    }

    fn start_with(&self, settings: CoordinatorSettings, origin: Origin) -> Running {
        let coordinator = Coordinator::new(
            self.records.clone(),
            origin,
            settings,
            Arc::new(SystemClock::new()),
        );
        let (stop, stopped) = oneshot::channel::<()>();
        let running = coordinator.clone();
        let task = tokio::spawn(async move { running.run(async { drop(stopped.await) }).await });
        Running {
            coordinator,
            stop: Some(stop),
            task,
        }
    }

    async fn worker(&self, id: &str, capacity_bytes: u64) -> FakeWorker {
        FakeWorker::start(self.records.clone(), id, capacity_bytes, None).await
    }

    /// Waits for a plan of this version that satisfies the condition.
    async fn plan(
        &self,
        table_version: &str,
        is_it: impl Fn(&CacheVersion) -> bool,
    ) -> (CacheVersion, Parts) {
        let (table, _) = stoa_metastore::split_table_version(table_version).unwrap();
        let pointer = until("a plan", async || {
            let pointer = self.records.cache_version(table).await.unwrap()?;
            (pointer.table_version == table_version && is_it(&pointer)).then_some(pointer)
        })
        .await;
        let parts = self.parts(&pointer).await;
        (pointer, parts)
    }

    async fn parts(&self, pointer: &CacheVersion) -> Parts {
        let mut parts = Parts::new();
        for worker in pointer.parts.keys() {
            parts.insert(
                worker.clone(),
                self.records
                    .worker_plan(pointer, worker)
                    .await
                    .unwrap()
                    .unwrap(),
            );
        }
        parts
    }
}

type Parts = BTreeMap<String, WorkerPlan>;

fn settings() -> CoordinatorSettings {
    CoordinatorSettings {
        election_ttl_ms: 1_000,
        grace_ms: 400,
        settle_ms: 100,
        retry_ms_min: 50,
        retry_ms_max: 200,
        ..CoordinatorSettings::default()
    }
}

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "{what} did not come within {PATIENCE:?}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A coordinator in a task of its own.
struct Running {
    coordinator: Coordinator,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<crate::Result<()>>,
}

impl Running {
    async fn stop(mut self) {
        drop(self.stop.take());
        (&mut self.task).await.unwrap().unwrap();
    }

    /// As `kill -9` would: the office is not given back.
    async fn kill(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }

    fn status(&self) -> CoordinatorStatus {
        self.coordinator.status().borrow().clone()
    }

    async fn status_when(
        &self,
        what: &str,
        is_it: impl Fn(&CoordinatorStatus) -> bool,
    ) -> CoordinatorStatus {
        until(what, async || Some(self.status()).filter(&is_it)).await
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Registers, and reports every plan as done; with `chunk_bytes`, every chunk takes that much, and
/// what exceeds the capacity is left out.
struct FakeWorker {
    records: Records,
    registration: Registration,
    task: JoinHandle<()>,
}

impl FakeWorker {
    async fn start(
        records: Records,
        id: &str,
        capacity_bytes: u64,
        chunk_bytes: Option<(u64, u64)>,
    ) -> FakeWorker {
        let record = WorkerRecord {
            id: id.into(),
            host: "here".into(),
            capacity_bytes,
            formats: vec!["arrow".into(), "parquet".into()],
            ..Default::default()
        };
        let registration = records.register_worker(&record, TTL).await.unwrap();
        let (store, held) = (records.clone(), registration.clone());
        let task = tokio::spawn(async move {
            let mut follow = store.follow(keys::CACHE_VERSION_PREFIX);
            while let Some(entries) = follow.next().await {
                let mut state = WorkerState {
                    id: held.id.clone(),
                    state: WorkerPhase::Ready,
                    capacity_bytes,
                    ..Default::default()
                };
                for entry in entries {
                    let pointer: CacheVersion = serde_json::from_slice(&entry.value).unwrap();
                    let Ok(Some(plan)) = store.worker_plan(&pointer, &held.id).await else {
                        continue;
                    };
                    let total = plan.chunks.len() as u64;
                    let (estimated, actual) = chunk_bytes.unwrap_or((8_000, 8_000));
                    let done = (capacity_bytes / actual).min(total);
                    let table = TableState {
                        target: pointer.target().ok(),
                        current: pointer.target().ok().filter(|_| done == total),
                        chunks_total: total,
                        chunks_done: done,
                        bytes_done: done * actual,
                        bytes_total: done * actual + (total - done) * estimated,
                        held_bytes: done * actual,
                        left_out: LeftOut {
                            chunks: total - done,
                            bytes: (total - done) * estimated,
                            reason: None,
                            ..LeftOut::default()
                        },
                        ..TableState::default()
                    };
                    state
                        .tables
                        .insert(pointer.table().unwrap().to_owned(), table);
                }
                let _ = store.publish_state(&held, &state).await;
            }
        });
        FakeWorker {
            records,
            registration,
            task,
        }
    }

    async fn leave(self) {
        self.task.abort();
        self.records
            .deregister_worker(self.registration.clone())
            .await
            .unwrap();
    }
}

impl Drop for FakeWorker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Where each chunk is: path, row group and column → worker. Panics if one is twice.
fn places(parts: &Parts) -> HashMap<(String, u32, u32), String> {
    let mut places = HashMap::new();
    for (worker, plan) in parts {
        for (file, row_group, column, form) in &plan.chunks {
            assert_eq!(form, "arrow");
            let path = plan.files[*file as usize]["path"]
                .as_str()
                .unwrap()
                .to_owned();
            let before = places.insert((path, *row_group, *column), worker.clone());
            assert_eq!(before, None, "a chunk is at two workers");
        }
    }
    places
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layout_is_planned_over_the_workers_that_are_there() {
    let place = Place::new();
    place.table("tpch.t", 6);
    place.publish("tpch.t", 1, &["b", "a"]).await;
    let _workers = [
        place.worker("w1", 1 << 30).await,
        place.worker("w2", 1 << 30).await,
    ];
    let running = place.start("c1");
    place.load("tpch.t:1").await;

    let (pointer, parts) = place.plan("tpch.t:1", |_| true).await;
    assert_eq!(pointer.parts.len(), 2);
    let places = places(&parts);
    assert_eq!(places.len(), 6 * ROW_GROUPS * 2);
    assert!(
        parts.values().all(|plan| !plan.chunks.is_empty()),
        "both get some: {parts:?}"
    );
    for plan in parts.values() {
        // Priority: all of b before any of a, whose leaves are 1 and 0.
        let columns: Vec<u32> = plan.chunks.iter().map(|chunk| chunk.2).collect();
        assert!(columns.is_sorted_by(|x, y| x >= y), "{columns:?}");
        let identity: stoa_origin::ObjectIdentity =
            serde_json::from_value(plan.files[0].clone()).unwrap();
        assert!(identity.path.ends_with(".parquet") && identity.size > 0);
    }
    // Columns of one row group are together.
    for ((path, row_group, _), worker) in &places {
        assert_eq!(&places[&(path.clone(), *row_group, 0)], worker);
    }
    let status = running
        .status_when("the plan in the status", |s| {
            s.tables.get("tpch.t").is_some_and(|t| t.plan > 0)
        })
        .await;
    assert!(status.leading);
    assert_eq!(status.tables["tpch.t"].placed_chunks, 48);
    assert_eq!(status.tables["tpch.t"].error, "");
    assert_eq!(status.workers["w1"].state, "live");
    assert!(status.workers["w1"].planned_bytes > 0);
    running.stop().await;
    assert_eq!(
        place.records.coordinator().await.unwrap(),
        None,
        "the office is given back"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_puts_into_the_inbox_both_count_and_nonsense_is_refused_visibly() {
    let place = Place::new();
    for table in ["s.a", "s.b"] {
        place.table(table, 1);
        place.publish(table, 1, &["a"]).await;
    }
    let _worker = place.worker("w1", 1 << 30).await;
    // Before any coordinator runs: the history is read.
    place.put_inbox("s.a:1").await;
    place.put_inbox("s.b:1\n").await;
    let running = place.start("c1");
    place.plan("s.a:1", |_| true).await;
    place.plan("s.b:1", |_| true).await;
    assert_eq!(running.status().problems, [""; 0], "no history was lost");
    place.put_inbox("nonsense").await;
    place.put_inbox("s.a:1").await;
    place.put_inbox("s.a:9").await;
    let status = running
        .status_when("three rejections", |status| status.rejections.len() == 3)
        .await;
    let reasons: Vec<&str> = status
        .rejections
        .iter()
        .map(|r| r.reason.as_str())
        .collect();
    assert!(
        reasons[0].starts_with("invalid table version `nonsense`: expected"),
        "{reasons:?}"
    );
    assert_eq!(
        reasons[1],
        "stale layout version of s.a: current is 1, given 1; publish the content as version 2 or later"
    );
    assert_eq!(reasons[2], "unknown layout s.a:9: known versions are 1");
    assert_eq!(place.records.rejections().await.unwrap().len(), 3);
    running.stop().await;
    // What was handled is not handled again, by nobody.
    let second = place.start("c2");
    second
        .status_when("another term", |status| {
            status.leading && status.tables.len() == 2
        })
        .await;
    place.put_inbox("s.b:1 unloaded").await;
    until("unloading", async || {
        place
            .records
            .cache_version("s.b")
            .await
            .unwrap()
            .filter(|plan| plan.unloaded)
    })
    .await;
    assert_eq!(place.records.rejections().await.unwrap().len(), 3);
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_more_leaves_every_chunk_where_it_is() {
    let place = Place::new();
    place.table("s.t", 5);
    place.publish("s.t", 1, &["a", "b"]).await;
    place.publish("s.t", 2, &["a", "b", "c"]).await;
    let _workers = [
        place.worker("w1", 1 << 30).await,
        place.worker("w2", 1 << 30).await,
        place.worker("w3", 1 << 30).await,
    ];
    let running = place.start("c1");
    place.load("s.t:1").await;
    let before = places(&place.plan("s.t:1", |_| true).await.1);
    place.load("s.t:2").await;
    let after = places(&place.plan("s.t:2", |_| true).await.1);
    assert_eq!(after.len(), 5 * ROW_GROUPS * 3);
    assert!(before.iter().all(|(chunk, worker)| &after[chunk] == worker));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_leaves_for_good_hands_over_its_share_and_one_that_joins_gets_one() {
    let place = Place::new();
    place.table("s.t", 10);
    place.publish("s.t", 1, &["a"]).await;
    let _stay = [
        place.worker("w1", 1 << 30).await,
        place.worker("w2", 1 << 30).await,
    ];
    let leaver = place.worker("w3", 1 << 30).await;
    let running = place.start("c1");
    place.load("s.t:1").await;
    let (first, parts) = place.plan("s.t:1", |plan| plan.parts.len() == 3).await;
    let before = places(&parts);

    // Back within its grace: nothing happens.
    leaver.leave().await;
    running
        .status_when("a worker gone", |status| {
            status.workers["w3"].state == "gone"
        })
        .await;
    let leaver = place.worker("w3", 1 << 30).await;
    running
        .status_when("a worker back", |status| {
            status.workers["w3"].state == "live"
        })
        .await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(
        place
            .records
            .cache_version("s.t")
            .await
            .unwrap()
            .unwrap()
            .plan,
        first.plan
    );

    leaver.leave().await;
    let (second, parts) = place.plan("s.t:1", |plan| plan.parts.len() == 2).await;
    assert!(second.plan > first.plan);
    let after = places(&parts);
    assert_eq!(after.len(), before.len());
    for (chunk, worker) in &before {
        assert!(
            worker == "w3" || &after[chunk] == worker,
            "{chunk:?} moved from {worker}"
        );
    }

    let _joiner = place.worker("w4", 1 << 30).await;
    let (_, parts) = place
        .plan("s.t:1", |plan| plan.parts.contains_key("w4"))
        .await;
    let share = parts["w4"].chunks.len();
    assert!((5..=14).contains(&share), "{share} of 40");
    let moved = places(&parts)
        .into_iter()
        .filter(|(chunk, worker)| after[chunk] != *worker && worker != "w4")
        .count();
    assert!(moved <= 4, "{moved} moved between those that stayed");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_coordinator_takes_over_what_the_first_left_undone() {
    let place = Place::new();
    for table in ["s.a", "s.b"] {
        place.table(table, 2);
        place.publish(table, 1, &["a"]).await;
    }
    let _worker = place.worker("w1", 1 << 30).await;
    let first = place.start("c1");
    place.load("s.a:1").await;
    let (plan_a, _) = place.plan("s.a:1", |_| true).await;
    until("its basis", async || {
        place.records.store().get("plan_basis/s.a").await.unwrap()
    })
    .await;
    let origin = Place::origin();
    let second = place.start_with(
        CoordinatorSettings {
            candidate: "c2".into(),
            ..settings()
        },
        origin.clone(),
    );
    tokio::time::sleep(Duration::from_millis(200)).await;
    let waiting = CoordinatorService::status(&second.coordinator)
        .await
        .unwrap();
    assert_eq!((waiting.leading, waiting.leader.as_str()), (false, "c1"));

    first.kill().await;
    second
        .status_when("the second to lead", |status| {
            status.leading && status.tables.contains_key("s.a")
        })
        .await;
    // What is in force needs nothing of the origin, and is known in full.
    assert_eq!(origin.counters().requests(), 0);
    assert_eq!(
        second.status().tables["s.a"].placed_chunks,
        2 * ROW_GROUPS as u64
    );
    place.load("s.b:1").await;
    place.plan("s.b:1", |_| true).await;
    assert_eq!(
        place.records.cache_version("s.a").await.unwrap().unwrap(),
        plan_a
    );
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sizes_are_corrected_by_what_workers_report() {
    let place = Place::new();
    place.table("s.t", 4);
    place.publish("s.t", 1, &["a", "b", "c"]).await;
    // First with room for all, to learn the estimate of a chunk.
    let probe = place.worker("w1", 1 << 30).await;
    let running = place.start("c1");
    place.load("s.t:1").await;
    let known = running
        .status_when("a plan", |s| {
            s.tables.get("s.t").is_some_and(|t| t.placed_chunks == 48)
        })
        .await;
    let estimated = known.tables["s.t"].placed_bytes / 48;
    running.stop().await;
    probe.leave().await;
    place.records.reset(keys::PLAN_PREFIXES).await.unwrap();

    // By the estimates all 48 fit; in truth chunks are twice as large, and 24 do.
    let capacity = estimated * 50;
    let _worker = FakeWorker::start(
        place.records.clone(),
        "w1",
        capacity,
        Some((estimated, estimated * 2)),
    )
    .await;
    let running = place.start("c2");
    place.load("s.t:1").await;
    let status = running
        .status_when("corrected sizes", |s| {
            s.tables.get("s.t").is_some_and(|t| t.left_out_chunks > 0)
        })
        .await;
    let table = &status.tables["s.t"];
    assert!(
        (1.95..2.05).contains(&table.size_correction),
        "{}",
        table.size_correction
    );
    assert!(
        (22..=25).contains(&table.placed_chunks),
        "{}",
        table.placed_chunks
    );
    assert_eq!(table.placed_chunks + table.left_out_chunks, 48);
    assert_eq!(
        table.left_out_reason,
        "the workers' capacity is used up by what is wanted more"
    );
    let (_, parts) = place.plan("s.t:1", |plan| plan.plan == table.plan).await;
    // What is left out is what is wanted least: all of a is there.
    assert_eq!(
        parts["w1"]
            .chunks
            .iter()
            .filter(|chunk| chunk.2 == 0)
            .count(),
        16
    );
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_plans_are_pruned_and_a_wrong_layout_changes_nothing() {
    let place = Place::new();
    place.table("s.t", 2);
    let _worker = place.worker("w1", 1 << 30).await;
    let running = place.start("c1");
    for version in 1..=4 {
        place
            .publish("s.t", version, &["a", "b", "c"][..1 + version as usize % 3])
            .await;
        place.load(&format!("s.t:{version}")).await;
        place.plan(&format!("s.t:{version}"), |_| true).await;
    }
    let plans = until("pruning", async || {
        let listing = place
            .records
            .store()
            .list(&keys::cache_locations_of("s.t"))
            .await
            .unwrap();
        let plans: BTreeSet<u64> = listing
            .entries
            .iter()
            .filter_map(|entry| match keys::parse(&entry.key) {
                Some(keys::Key::CacheLocation { plan, .. }) => Some(plan),
                _ => None,
            })
            .collect();
        (plans.len() == 2).then_some(plans)
    })
    .await;
    let current = place.records.cache_version("s.t").await.unwrap().unwrap();
    assert_eq!(plans.last(), Some(&current.plan));

    place.publish("s.t", 5, &["a", "bb"]).await;
    place.load("s.t:5").await;
    let status = running
        .status_when("a rejection", |status| !status.rejections.is_empty())
        .await;
    assert_eq!(status.rejections[0].request, "s.t:5");
    let reason = &status.rejections[0].reason;
    assert!(
        reason.starts_with("layout s.t:5 cannot be loaded: unknown column \"bb\" of table s.t"),
        "{reason}"
    );
    assert_eq!(&status.tables["s.t"].error, reason);
    assert_eq!(
        (
            status.tables["s.t"].wanted_version,
            status.tables["s.t"].planned_version
        ),
        (5, 4)
    );
    assert_eq!(
        place.records.cache_version("s.t").await.unwrap().unwrap(),
        current
    );
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layouts_but_the_newest_sixteen_are_pruned() {
    let place = Place::new();
    place.table("s.t", 1);
    let _worker = place.worker("w1", 1 << 30).await;
    for version in 1..=20 {
        place.publish("s.t", version, &["a"]).await;
    }
    place.load("s.t:2").await;
    let running = place.start("c1");
    place.plan("s.t:2", |_| true).await;
    let layouts = async |newest: u64| {
        let listed = place.records.layouts("s.t").await.unwrap();
        (listed.last() == Some(&newest)).then_some(listed)
    };
    // The one in force is among the oldest, and stays.
    until("pruning below the plan in force", async || {
        layouts(20).await.filter(|listed| listed[0] == 2)
    })
    .await;
    place.load("s.t:20").await;
    let kept = until("pruning", async || {
        layouts(20).await.filter(|listed| listed.len() == 16)
    })
    .await;
    assert_eq!(kept, (5..=20).collect::<Vec<u64>>());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twelve_versions_of_two_tables_interleaved_converge_under_changing_coordinators() {
    let place = Place::new();
    for table in ["s.a", "s.b"] {
        place.table(table, 2);
        for version in 1..=12 {
            place
                .publish(table, version, &["a", "b", "c"][..1 + version as usize % 3])
                .await;
        }
    }
    let _workers = [
        place.worker("w1", 1 << 30).await,
        place.worker("w2", 1 << 30).await,
    ];
    let mut running = place.start("c0");
    for version in 1..=12 {
        place.load(&format!("s.a:{version}")).await;
        place.put_inbox(&format!("s.b:{version}")).await;
        if version % 4 == 0 {
            let next = place.start(&format!("c{version}"));
            std::mem::replace(&mut running, next).kill().await;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    for table in ["s.a", "s.b"] {
        let (_, parts) = place.plan(&format!("{table}:12"), |_| true).await;
        assert_eq!(places(&parts).len(), 2 * ROW_GROUPS);
    }
    assert_eq!(place.records.rejections().await.unwrap(), []);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unloading_drops_the_table_and_makes_room() {
    let place = Place::new();
    for table in ["s.a", "s.b"] {
        place.table(table, 2);
        place.publish(table, 1, &["a", "b", "c"]).await;
    }
    // Room for one of them and a little more.
    let _worker = place.worker("w1", 250_000).await;
    let running = place.start("c1");
    place.load("s.a:1").await;
    running
        .status_when("all of a", |s| {
            s.tables.get("s.a").is_some_and(|t| t.placed_chunks == 24)
        })
        .await;
    place.load("s.b:1").await;
    let status = running
        .status_when("part of b", |s| {
            s.tables.get("s.b").is_some_and(|t| t.plan > 0)
        })
        .await;
    assert!(
        status.tables["s.b"].left_out_chunks > 0,
        "{:?}",
        status.tables
    );
    place.records.request_unload("s.a").await.unwrap();
    let status = running
        .status_when("all of b", |s| s.tables["s.b"].placed_chunks == 24)
        .await;
    assert!(status.tables["s.a"].unloaded);
    let capacity = status.workers["w1"].capacity_bytes;
    assert!(status.workers["w1"].planned_bytes <= capacity);
    // And loading the same version again is a new plan.
    place.records.request_unload("s.b").await.unwrap();
    place.load("s.a:1").await;
    running
        .status_when("all of a again", |s| s.tables["s.a"].placed_chunks == 24)
        .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_no_parquet_is_named_and_the_others_are_planned() {
    let place = Place::new();
    place.table("s.t", 2);
    std::fs::write(
        place.directory.path().join("s.t/broken.parquet"),
        b"PAR1 not really",
    )
    .unwrap();
    place.publish("s.t", 1, &["a"]).await;
    let _worker = place.worker("w1", 1 << 30).await;
    let running = place.start("c1");
    place.load("s.t:1").await;
    let (_, parts) = place.plan("s.t:1", |_| true).await;
    assert_eq!(places(&parts).len(), 2 * ROW_GROUPS);
    let status = running
        .status_when("a problem", |status| !status.problems.is_empty())
        .await;
    let problem = &status.problems[0];
    assert!(
        problem.starts_with("s.t:1: file file:///")
            && problem.contains("broken.parquet is rejected: "),
        "{problem}"
    );
    running.stop().await;
}

/// The same on a real etcd: the history of the inbox, the election, and the lease that runs out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_carries_requests_plans_and_the_election_across_a_killed_coordinator() {
    let directory = tempfile::tempdir().unwrap();
    let etcd = stoa_metastore::testing::EtcdServer::start(directory.path()).await;
    let place = Place {
        records: Records::new(Arc::new(etcd.connect().await)),
        directory,
    };
    for table in ["s.a", "s.b"] {
        place.table(table, 2);
        place.publish(table, 1, &["a"]).await;
        place.publish(table, 2, &["a", "b"]).await;
    }
    let _worker = place.worker("w1", 1 << 30).await;
    place.put_inbox("s.a:1").await;
    place.put_inbox("s.b:1").await;
    let first = place.start("c1");
    place.plan("s.a:1", |_| true).await;
    place.plan("s.b:1", |_| true).await;
    first.kill().await;
    place.put_inbox("s.a:2").await;
    place.put_inbox("s.b:2").await;
    let second = place.start("c2");
    for table in ["s.a:2", "s.b:2"] {
        let (_, parts) = place.plan(table, |_| true).await;
        assert_eq!(places(&parts).len(), 2 * ROW_GROUPS * 2);
    }
    assert_eq!(place.records.rejections().await.unwrap(), []);
    second.stop().await;
}

#[tokio::test]
async fn settings_that_cannot_work_end_it_at_once() {
    let place = Place::new();
    let wrong = CoordinatorSettings {
        load_max: 0.5,
        ..settings()
    };
    let mut running = place.start_with(wrong, Place::origin());
    let error = (&mut running.task).await.unwrap().unwrap_err();
    assert_eq!(
        error.to_string(),
        "setting load_max = 0.5: expected 1.0 or more, such as 1.25"
    );
}
