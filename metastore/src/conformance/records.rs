//! The promises of [`Records`] on a backend.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use futures::{StreamExt, TryStreamExt};
use serde_json::json;

use super::{Harness, PATIENCE, commit, events_only, eventually, put, soon, until};
use crate::error::{Error, Result};
use crate::keys::{self, Key};
use crate::model::{PlanTarget, Rejection, TableState, WorkerPhase, WorkerRecord, WorkerState};
use crate::plan::WorkerPlan;
use crate::records::{FollowOptions, LayoutsDropped, Leadership, REJECTIONS_MAX, Records};
use crate::store::{
    ClusterIdentity, Entry, LeaseId, Listing, Metastore, Op, Txn, TxnOutcome, WatchEvent,
    WatchStream,
};

const LONG: Duration = Duration::from_secs(60);
const DOCUMENT: &str = r#"{"columns": ["l_shipdate"]}"#;

async fn records(harness: &dyn Harness) -> Records {
    Records::new(harness.fresh().await)
}

async fn elect(records: &Records, candidate: &str) -> Leadership {
    tokio::time::timeout(PATIENCE, records.campaign(candidate, LONG))
        .await
        .expect("elected in time")
        .unwrap()
}

fn worker(id: &str, host: &str, incarnation: &str) -> WorkerRecord {
    WorkerRecord {
        id: id.into(),
        host: host.into(),
        incarnation: incarnation.into(),
        capacity_bytes: 1 << 30,
        formats: vec!["arrow".into(), "parquet".into()],
        ..Default::default()
    }
}

fn state(id: &str, table: &str, plan: u64, version: u64) -> WorkerState {
    let target = Some(PlanTarget { plan, version });
    let table_state = TableState {
        target,
        current: target,
        ..Default::default()
    };
    WorkerState {
        id: id.into(),
        state: WorkerPhase::Ready,
        tables: [(table.to_owned(), table_state)].into(),
        ..Default::default()
    }
}

fn plan(chunks: u32) -> WorkerPlan {
    WorkerPlan {
        files: vec![json!({"store": "s3://b", "path": "p", "tag": {"etag": "x"}, "size": 7})],
        chunks: (0..chunks)
            .map(|i| (0, i, i % 16, "arrow".to_owned()))
            .collect(),
    }
}

fn plans(workers: &[(&str, u32)]) -> BTreeMap<String, WorkerPlan> {
    workers
        .iter()
        .map(|(id, chunks)| ((*id).to_owned(), plan(*chunks)))
        .collect()
}

pub(super) async fn any_characters_are_fine(harness: &dyn Harness) {
    let records = records(harness).await;
    let leader = elect(&records, "c").await;
    let odd = [
        "node_1",
        "node/1:2.3",
        "%2F",
        "käse 🧀\n",
        "..",
        "a b\t\"'",
        "10",
        "{}",
    ];
    for (i, name) in odd.iter().enumerate() {
        let table = format!("s.{name}");
        records.publish_layout(&table, 1, DOCUMENT).await.unwrap();
        assert_eq!(
            records.layout(&table, 1).await.unwrap().as_deref(),
            Some(DOCUMENT)
        );
        records.request_load(&format!("{table}:1")).await.unwrap();
        let registration = records
            .register_worker(&worker(name, "h", &i.to_string()), LONG)
            .await
            .unwrap();
        records
            .publish_state(&registration, &state(name, &table, 1, 1))
            .await
            .unwrap();
        let written = records
            .write_plan(&leader, &format!("{table}:1"), 1, &plans(&[(name, 3)]))
            .await
            .unwrap();
        assert_eq!(
            records.cache_version(&table).await.unwrap(),
            Some(written.clone())
        );
        assert_eq!(
            records.worker_plan(&written, name).await.unwrap(),
            Some(plan(3))
        );
        assert_eq!(records.worker_plan(&written, "nobody").await.unwrap(), None);
    }
    let mut expected: Vec<String> = odd.iter().map(|name| format!("s.{name}")).collect();
    expected.sort();
    assert_eq!(records.layout_tables().await.unwrap(), expected);
    let wanted: Vec<String> = records
        .load_requests()
        .await
        .unwrap()
        .into_iter()
        .map(|r| r.table)
        .collect();
    assert_eq!(wanted, expected);
    let mut ids: Vec<&str> = odd.to_vec();
    ids.sort_unstable();
    let live: Vec<String> = records
        .workers()
        .await
        .unwrap()
        .into_iter()
        .map(|w| w.id)
        .collect();
    assert_eq!(live, ids);
    let reported: Vec<String> = records
        .states()
        .await
        .unwrap()
        .into_iter()
        .map(|s| s.id)
        .collect();
    assert_eq!(reported, ids);
    for entry in records.store().list_keys("").await.unwrap().entries {
        assert!(
            keys::parse(&entry.key).is_some(),
            "{} is no key of ours",
            entry.key
        );
    }
}

pub(super) async fn versions_only_increase_under_concurrency(harness: &dyn Harness) {
    let records = records(harness).await;
    let from = records.identity().await.unwrap().revision + 1;
    // Many publishers of two tables, in no order, each retrying nothing.
    let publish = |table: &'static str, version: u64| {
        let records = records.clone();
        async move {
            match records
                .publish_layout(table, version, &format!("{{\"v\": {version}}}"))
                .await
            {
                Ok(()) => Some(version),
                Err(Error::StaleVersion { current, given, .. }) => {
                    assert!(current > given, "{current} is not later than {given}");
                    None
                }
                Err(error) => panic!("{error}"),
            }
        }
    };
    let order = [3, 9, 1, 7, 12, 5, 2, 11, 4, 10, 6, 8];
    let (one, two) = futures::join!(
        join_all(order.map(|v| publish("s.one", v))),
        join_all(order.map(|v| publish("s.two", v))),
    );
    for (table, accepted) in [("s.one", one), ("s.two", two)] {
        let mut accepted: Vec<u64> = accepted.into_iter().flatten().collect();
        accepted.sort_unstable();
        assert_eq!(records.layouts(table).await.unwrap(), accepted);
        assert_eq!(
            accepted.last(),
            Some(&12),
            "the largest always gets through"
        );
        assert_eq!(records.latest_layout(table).await.unwrap(), Some(12));
        // What happened on the server, in its order.
        let mut events = events_only(
            records
                .store()
                .watch(&keys::layout_head(table), from)
                .await
                .unwrap(),
        );
        let mut heads = Vec::new();
        while heads.last() != Some(&12) {
            match soon(&mut events).await.unwrap() {
                WatchEvent::Put(entry) => {
                    let head: serde_json::Value = serde_json::from_slice(&entry.value).unwrap();
                    heads.push(head["version"].as_u64().unwrap());
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(heads, accepted, "in ascending order");
    }
    // The same for load requests.
    let versions = records.layouts("s.one").await.unwrap();
    let requests = versions.iter().rev().chain(&versions).map(|version| {
        let (records, text) = (records.clone(), format!("s.one:{version}"));
        async move { records.request_load(&text).await }
    });
    let mut loaded = 0;
    for outcome in join_all(requests).await {
        match outcome {
            Ok(request) => loaded = loaded.max(request.version),
            Err(Error::StaleVersion { current, given, .. }) => assert!(current >= given),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(loaded, 12);
    assert_eq!(
        records
            .load_request("s.one")
            .await
            .unwrap()
            .unwrap()
            .version,
        12
    );
}

pub(super) async fn one_content_wins_a_version(harness: &dyn Harness) {
    let records = records(harness).await;
    let rivals = (0..6).map(|i| {
        let records = records.clone();
        async move {
            records
                .publish_layout("s.t", 1, &format!("{{\"by\": {i}}}"))
                .await
        }
    });
    let outcomes = join_all(rivals).await;
    let won: Vec<usize> = (0..6).filter(|i| outcomes[*i].is_ok()).collect();
    assert_eq!(won.len(), 1);
    for outcome in outcomes {
        match outcome {
            Ok(()) | Err(Error::Conflict { version: 1, .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let content = records.layout("s.t", 1).await.unwrap().unwrap();
    assert_eq!(content, format!("{{\"by\": {}}}", won[0]));
    // The same content again, in another spelling, is no conflict.
    records
        .publish_layout("s.t", 1, &format!("{{ \"by\":{} }}", won[0]))
        .await
        .unwrap();
    let error = records
        .publish_layout("s.t", 1, "[]")
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("a layout document is a JSON object"),
        "{error}"
    );
}

pub(super) async fn large_documents_read_back(harness: &dyn Harness) {
    let records = records(harness).await;
    let files: Vec<String> = (0..18_000)
        .map(|i| format!("s3://bücket/{i:060}.parquet"))
        .collect();
    let large = json!({ "files": files }).to_string();
    assert!(large.len() > 1_400_000);
    records.publish_layout("s.large", 1, &large).await.unwrap();
    assert_eq!(records.layout("s.large", 1).await.unwrap().unwrap(), large);
    assert_eq!(records.layouts("s.large").await.unwrap(), [1]);
    records.publish_layout("s.large", 1, &large).await.unwrap();
    let other = large.replace("s3://", "gs://");
    let error = records
        .publish_layout("s.large", 1, &other)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Conflict { .. }), "{error}");
    records.publish_layout("s.large", 2, &other).await.unwrap();
    assert_eq!(records.layout("s.large", 1).await.unwrap().unwrap(), large);
    assert_eq!(records.layout("s.large", 2).await.unwrap().unwrap(), other);
    // A part that is gone is noticed.
    let listing = records
        .store()
        .list_keys(&keys::layouts_of("s.large"))
        .await
        .unwrap();
    let part = listing
        .entries
        .iter()
        .find(|e| {
            matches!(
                keys::parse(&e.key),
                Some(Key::LayoutPart { version: 1, .. })
            )
        })
        .unwrap();
    commit(records.store(), vec![Op::delete(&part.key)]).await;
    let error = records.layout("s.large", 1).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
}

pub(super) async fn loads_need_a_newer_published_version(harness: &dyn Harness) {
    let records = records(harness).await;
    let error = records.request_load("s.t:1").await.unwrap_err().to_string();
    assert!(
        error.starts_with("unknown layout s.t:1: no version of this table is published"),
        "{error}"
    );
    for version in [1, 2, 5] {
        records
            .publish_layout("s.t", version, DOCUMENT)
            .await
            .unwrap();
    }
    let error = records.request_load("s.t:3").await.unwrap_err().to_string();
    assert_eq!(error, "unknown layout s.t:3: known versions are 1, 2, 5");
    assert_eq!(records.load_request("s.t").await.unwrap(), None);
    records.request_load("s.t:2").await.unwrap();
    for given in [1, 2] {
        match records.request_load(&format!("s.t:{given}")).await {
            Err(Error::StaleVersion {
                current: 2,
                given: found,
                ..
            }) => assert_eq!(found, given),
            other => panic!("expected StaleVersion, found {other:?}"),
        }
    }
    // Other tables have versions of their own: `b:1` after `a:3` counts.
    records.publish_layout("s.u", 1, DOCUMENT).await.unwrap();
    records.request_load("s.u:1").await.unwrap();
    // What operators read and write is plain text.
    let entry = records
        .store()
        .get("layout_version/s.t")
        .await
        .unwrap()
        .unwrap();
    assert_eq!(entry.value, b"s.t:2");
    // Unloaded, it may come back as it was.
    let unloaded = records.request_unload("s.t").await.unwrap().unwrap();
    assert!(unloaded.unloaded && unloaded.version == 2);
    assert!(records.request_load("s.t:1").await.is_err());
    assert!(!records.request_load("s.t:2").await.unwrap().unloaded);
    assert_eq!(records.request_unload("s.unheard-of").await.unwrap(), None);
    for bad in ["s.t", "s.t:", "s.t:0", "s.t:-1", ":1"] {
        let error = records.request_load(bad).await.unwrap_err();
        assert!(
            matches!(error, Error::InvalidTableVersion { .. }),
            "{error}"
        );
    }
}

pub(super) async fn what_was_refused_may_be_asked_for_again(harness: &dyn Harness) {
    let records = records(harness).await;
    let leader = elect(&records, "c").await;
    records.publish_layout("s.t", 1, DOCUMENT).await.unwrap();
    records.request_load("s.t:1").await.unwrap();
    let revision = || async {
        let entry = records.store().get("layout_version/s.t").await.unwrap();
        entry.unwrap().mod_revision
    };
    let first = revision().await;
    let rejection = Rejection {
        request: "s.t:1".into(),
        reason: "no files".into(),
        revision: first,
        ..Default::default()
    };
    records.reject(&leader, &rejection).await.unwrap();
    records.request_load("s.t:1").await.unwrap();
    // A request of its own, which has not been refused yet.
    assert!(revision().await > first);
    assert!(matches!(
        records.request_load("s.t:1").await,
        Err(Error::StaleVersion { .. })
    ));
}

pub(super) async fn a_dropped_table_may_be_made_again(harness: &dyn Harness) {
    let records = records(harness).await;
    let drop = |made_by| records.drop_layouts("s.t", made_by);
    let dropped = |was_requested| LayoutsDropped::Dropped { was_requested };
    assert_eq!(drop(None).await.unwrap(), LayoutsDropped::Nothing);
    let large = format!("{{\"text\": \"{}\"}}", "x".repeat(1 << 20));
    for (version, document) in [(1, DOCUMENT), (3, &large)] {
        records
            .publish_layout("s.t", version, document)
            .await
            .unwrap();
    }
    records.publish_layout("s.tt", 1, DOCUMENT).await.unwrap();
    records.request_load("s.t:3").await.unwrap();
    // Who makes tables drops those alone.
    assert_eq!(drop(Some("sql")).await.unwrap(), LayoutsDropped::NotTheirs);
    assert_eq!(records.layouts("s.t").await.unwrap(), [1, 3]);
    assert_eq!(drop(None).await.unwrap(), dropped(true));
    assert_eq!(drop(None).await.unwrap(), LayoutsDropped::Nothing);
    assert_eq!(records.latest_layout("s.t").await.unwrap(), None);
    assert_eq!(records.layouts("s.t").await.unwrap(), Vec::<u64>::new());
    assert_eq!(records.layout_tables().await.unwrap(), ["s.tt"]);
    let listing = records.store().list_keys("layout/s.t/").await.unwrap();
    assert_eq!(listing.entries, [], "no part is left");
    let request = records.load_request("s.t").await.unwrap().unwrap();
    assert!(request.unloaded && request.version == 3);
    let gone = records.request_load("s.t:3").await.unwrap_err();
    assert!(matches!(gone, Error::UnknownLayout { .. }), "{gone}");
    // Numbers go on, so that nobody takes the new table for the old one.
    let stale = records.publish_layout("s.t", 3, DOCUMENT).await;
    assert!(matches!(stale, Err(Error::StaleVersion { current: 3, .. })));
    assert_eq!(records.next_layout("s.t").await.unwrap(), 4);
    let by_sql = records.publish_layout_by(Some("sql"), "s.t", 4, DOCUMENT);
    by_sql.await.unwrap();
    records.request_load("s.t:4").await.unwrap();
    // Taken over by whoever publishes the next version.
    records.publish_layout("s.t", 5, DOCUMENT).await.unwrap();
    assert_eq!(drop(Some("sql")).await.unwrap(), LayoutsDropped::NotTheirs);
    let by_sql = records.publish_layout_by(Some("sql"), "s.t", 6, DOCUMENT);
    by_sql.await.unwrap();
    assert_eq!(drop(Some("sql")).await.unwrap(), dropped(true));
    assert_eq!(records.next_layout("s.t").await.unwrap(), 7);
    assert_eq!(records.next_layout("s.new").await.unwrap(), 1);
}

pub(super) async fn what_nobody_asks_for_may_be_dropped(harness: &dyn Harness) {
    let records = records(harness).await;
    let request = records.request_unload_of_held("s.t").await.unwrap();
    assert_eq!(request.to_string(), "s.t:1 unloaded");
    // The first version published after it can be asked for.
    records.publish_layout("s.t", 1, DOCUMENT).await.unwrap();
    records.request_load("s.t:1").await.unwrap();
    records.publish_layout("s.t", 2, DOCUMENT).await.unwrap();
    records.request_load("s.t:2").await.unwrap();
    let request = records.request_unload_of_held("s.t").await.unwrap();
    assert_eq!(request.to_string(), "s.t:2 unloaded");
}

pub(super) async fn version_1_is_not_version_10(harness: &dyn Harness) {
    let records = records(harness).await;
    let leader = elect(&records, "c").await;
    for version in [1, 10, 100] {
        records
            .publish_layout("s.t", version, &format!("{{\"v\":{version}}}"))
            .await
            .unwrap();
        records
            .publish_layout(&format!("s.t{version}"), version, DOCUMENT)
            .await
            .unwrap();
    }
    assert_eq!(records.layouts("s.t").await.unwrap(), [1, 10, 100]);
    assert_eq!(records.layouts("s.t1").await.unwrap(), [1]);
    assert_eq!(
        records.layout("s.t", 1).await.unwrap().unwrap(),
        r#"{"v":1}"#
    );
    // Versions, workers and plans whose digits begin alike, and hosts with `_`.
    let one = records
        .write_plan(&leader, "s.t:1", 1, &plans(&[("h_1", 1), ("h_10", 2)]))
        .await
        .unwrap();
    let ten = records
        .write_plan(&leader, "s.t:1", 10, &plans(&[("h_1", 3)]))
        .await
        .unwrap();
    let newer = records
        .write_plan(&leader, "s.t:10", 11, &plans(&[("h_1", 4)]))
        .await
        .unwrap();
    for (pointer, worker, chunks) in [
        (&one, "h_1", 1),
        (&one, "h_10", 2),
        (&ten, "h_1", 3),
        (&newer, "h_1", 4),
    ] {
        let read = records.worker_plan(pointer, worker).await.unwrap().unwrap();
        assert_eq!(read.chunks.len(), chunks);
    }
}

pub(super) async fn one_coordinator_at_a_time(harness: &dyn Harness) {
    let records = records(harness).await;
    let rivals = (0..5).map(|i| {
        let records = records.clone();
        async move { records.try_campaign(&format!("c{i}"), LONG).await.unwrap() }
    });
    let mut elected: Vec<Leadership> = join_all(rivals).await.into_iter().flatten().collect();
    assert_eq!(elected.len(), 1);
    let leader = elected.pop().unwrap();
    assert_eq!(
        records.coordinator().await.unwrap().as_deref(),
        Some(leader.candidate())
    );
    assert!(records.try_campaign("late", LONG).await.unwrap().is_none());
    // A candidate that waits is elected as soon as the office is given back.
    let waiting = tokio::spawn({
        let records = records.clone();
        async move { records.campaign("next", LONG).await.unwrap() }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    leader.resign().await.unwrap();
    let next = tokio::time::timeout(PATIENCE, waiting)
        .await
        .expect("elected in time")
        .unwrap();
    assert_eq!(
        records.coordinator().await.unwrap().as_deref(),
        Some("next")
    );
    assert!(!next.is_lost());
}

pub(super) async fn a_stale_coordinator_writes_nothing(harness: &dyn Harness) {
    let records = records(harness).await;
    let stale = elect(&records, "stale").await;
    records
        .write_plan(&stale, "s.t:1", 1, &plans(&[("w", 1)]))
        .await
        .unwrap();
    // A pause longer than its lease: the server ended it, and another was elected.
    let lease = records
        .store()
        .get(keys::ELECTION)
        .await
        .unwrap()
        .unwrap()
        .lease
        .unwrap();
    records.store().revoke_lease(lease).await.unwrap();
    let fresh = elect(&records, "fresh").await;
    let before = records.store().list("").await.unwrap();
    let rejection = Rejection {
        revision: 3,
        ..Default::default()
    };
    let outcomes: Vec<Result<()>> = vec![
        records
            .write_plan(&stale, "s.t:2", 2, &plans(&[("w", 2)]))
            .await
            .map(drop),
        records.write_unloaded(&stale, "s.t:1", 2).await.map(drop),
        records.set_inbox_handled(&stale, 99).await,
        records.reject(&stale, &rejection).await,
        // Even what would change nothing is refused, so that the caller learns of it.
        records
            .write_plan(&stale, "s.t:1", 1, &plans(&[("w", 1)]))
            .await
            .map(drop),
    ];
    for outcome in outcomes {
        match outcome {
            Err(Error::Fenced { candidate, holder }) => {
                assert_eq!(
                    (candidate.as_str(), holder.as_deref()),
                    ("stale", Some("fresh"))
                );
            }
            other => panic!("expected Fenced, found {other:?}"),
        }
    }
    assert!(stale.is_lost());
    assert_eq!(
        records.store().list("").await.unwrap(),
        before,
        "nothing was written"
    );
    records
        .write_plan(&fresh, "s.t:2", 2, &plans(&[("w", 2)]))
        .await
        .unwrap();
    // The stale one's renewals must not end what is the other's.
    drop(stale);
    assert_eq!(
        records.coordinator().await.unwrap().as_deref(),
        Some("fresh")
    );
    assert!(!fresh.is_lost());
}

pub(super) async fn a_dead_coordinator_is_replaced(harness: &dyn Harness) {
    let records = records(harness).await;
    let ttl = harness.ttl_min();
    let first = records.campaign("first", ttl).await.unwrap();
    // As long as it lives it renews, and stays.
    tokio::time::sleep(ttl * 3).await;
    assert!(!first.is_lost());
    assert!(records.try_campaign("second", ttl).await.unwrap().is_none());
    // It dies without resigning: its lease runs out.
    drop(first);
    let second = tokio::time::timeout(PATIENCE, records.campaign("second", ttl)).await;
    let second = second.expect("elected in time").unwrap();
    // A lease that ends on the server is noticed by its holder.
    let lease = records
        .store()
        .get(keys::ELECTION)
        .await
        .unwrap()
        .unwrap()
        .lease
        .unwrap();
    records.store().revoke_lease(lease).await.unwrap();
    tokio::time::timeout(PATIENCE, second.lost())
        .await
        .expect("noticed in time");
}

pub(super) async fn plans_only_increase_and_are_checked(harness: &dyn Harness) {
    let records = records(harness).await;
    let leader = elect(&records, "c").await;
    // Large enough for several parts.
    let workers = plans(&[("w1", 60_000), ("w2", 1)]);
    let written = records
        .write_plan(&leader, "s.t:2", 5, &workers)
        .await
        .unwrap();
    assert!(written.parts["w1"].parts > 1);
    assert_eq!(
        records.worker_plan(&written, "w1").await.unwrap().unwrap(),
        workers["w1"]
    );
    let part = records
        .plan_part("s.t:2", "w1", 5, 1)
        .await
        .unwrap()
        .unwrap();
    assert_eq!((part.plan, part.part, part.worker.as_str()), (5, 1, "w1"));
    // The very same again is fine; anything else under this number or below is not.
    records
        .write_plan(&leader, "s.t:2", 5, &workers)
        .await
        .unwrap();
    for number in [4, 5] {
        match records
            .write_plan(&leader, "s.t:2", number, &plans(&[("w2", 2)]))
            .await
        {
            Err(Error::StalePlan {
                current: 5, given, ..
            }) => assert_eq!(given, number),
            other => panic!("expected StalePlan, found {other:?}"),
        }
    }
    match records
        .write_plan(&leader, "s.t:1", 6, &plans(&[("w2", 2)]))
        .await
    {
        Err(Error::StaleVersion {
            current: 2,
            given: 1,
            ..
        }) => {}
        other => panic!("expected StaleVersion, found {other:?}"),
    }
    assert_eq!(
        records.cache_version("s.t").await.unwrap().unwrap(),
        written
    );
    assert_eq!(
        records.worker_plan(&written, "w1").await.unwrap().unwrap(),
        workers["w1"]
    );
    // Unloading is a plan like any other; the table can come back.
    let unloaded = records.write_unloaded(&leader, "s.t:2", 6).await.unwrap();
    assert!(
        records
            .cache_version("s.t")
            .await
            .unwrap()
            .unwrap()
            .unloaded
    );
    assert_eq!(records.worker_plan(&unloaded, "w1").await.unwrap(), None);
    records
        .write_plan(&leader, "s.t:2", 7, &plans(&[("w2", 2)]))
        .await
        .unwrap();
    // Another table's numbers are its own.
    records
        .write_plan(&leader, "s.u:1", 1, &plans(&[("w2", 1)]))
        .await
        .unwrap();
    let tables: Vec<String> = records
        .cache_versions()
        .await
        .unwrap()
        .into_iter()
        .map(|c| c.table_version)
        .collect();
    assert_eq!(tables, ["s.t:2", "s.u:1"]);
    // A part changed by hand is noticed.
    let now = records.cache_version("s.t").await.unwrap().unwrap();
    put(
        records.store(),
        &keys::cache_location("s.t", 2, "w2", 7, 0),
        "{}",
    )
    .await;
    let error = records.worker_plan(&now, "w2").await.unwrap_err();
    assert!(matches!(error, Error::DamagedPlan { .. }), "{error}");
}

pub(super) async fn an_interrupted_plan_leaves_no_trace_in_the_next(harness: &dyn Harness) {
    let records = records(harness).await;
    let leader = elect(&records, "c").await;
    let first = records
        .write_plan(&leader, "s.t:1", 1, &plans(&[("w", 4)]))
        .await
        .unwrap();
    // A coordinator died after the parts of plan 2, before its pointer.
    for part in 0..4 {
        put(
            records.store(),
            &keys::cache_location("s.t", 1, "w", 2, part),
            "left over",
        )
        .await;
    }
    assert_eq!(
        records.cache_version("s.t").await.unwrap().unwrap(),
        first,
        "still in force"
    );
    assert_eq!(
        records.worker_plan(&first, "w").await.unwrap().unwrap(),
        plan(4)
    );
    let second = records
        .write_plan(&leader, "s.t:1", 2, &plans(&[("w", 5)]))
        .await
        .unwrap();
    assert_eq!(
        records.worker_plan(&second, "w").await.unwrap().unwrap(),
        plan(5)
    );
}

pub(super) async fn old_plans_go_once_all_have_reported(harness: &dyn Harness) {
    let records = records(harness).await;
    let leader = elect(&records, "c").await;
    let w1 = records
        .register_worker(&worker("w1", "h1", "a"), LONG)
        .await
        .unwrap();
    let w2 = records
        .register_worker(&worker("w2", "h2", "b"), LONG)
        .await
        .unwrap();
    let both = plans(&[("w1", 1), ("w2", 1)]);
    for (number, version) in [(1, 1), (2, 1), (3, 10), (4, 10)] {
        records
            .write_plan(&leader, &format!("s.t:{version}"), number, &both)
            .await
            .unwrap();
    }
    records
        .write_plan(&leader, "s.tt:1", 1, &both)
        .await
        .unwrap();
    let numbers = || async {
        let listing = records
            .store()
            .list_keys(keys::CACHE_LOCATION_PREFIX)
            .await
            .unwrap();
        let mut numbers: Vec<(String, u64)> = listing
            .entries
            .iter()
            .map(|entry| match keys::parse(&entry.key) {
                Some(Key::CacheLocation { table, plan, .. }) => (table, plan),
                other => panic!("{other:?}"),
            })
            .collect();
        numbers.sort();
        numbers.dedup();
        numbers
    };
    records
        .publish_state(&w1, &state("w1", "s.t", 4, 10))
        .await
        .unwrap();
    records
        .publish_state(&w2, &state("w2", "s.t", 3, 10))
        .await
        .unwrap();
    assert_eq!(
        records.prune_plans(&leader, "s.t").await.unwrap(),
        0,
        "w2 has not reported"
    );
    records
        .publish_state(&w2, &state("w2", "s.t", 4, 10))
        .await
        .unwrap();
    assert_eq!(records.prune_plans(&leader, "s.t").await.unwrap(), 4);
    let kept = |t: &str, p| (t.to_owned(), p);
    assert_eq!(
        numbers().await,
        [kept("s.t", 3), kept("s.t", 4), kept("s.tt", 1)]
    );
    assert_eq!(records.prune_plans(&leader, "s.t").await.unwrap(), 0);
    // A worker that died holds nothing up.
    records
        .write_plan(&leader, "s.t:10", 5, &both)
        .await
        .unwrap();
    records
        .publish_state(&w1, &state("w1", "s.t", 5, 10))
        .await
        .unwrap();
    records.deregister_worker(w2).await.unwrap();
    assert_eq!(records.prune_plans(&leader, "s.t").await.unwrap(), 2);
}

pub(super) async fn old_layouts_go_but_not_those_in_use(harness: &dyn Harness) {
    let records = records(harness).await;
    let leader = elect(&records, "c").await;
    for version in 1..=6 {
        records
            .publish_layout("s.t", version, DOCUMENT)
            .await
            .unwrap();
    }
    put(
        records.store(),
        &keys::layout_part("s.t", 5, "00ff00ff00ff00ff", 0),
        "orphan",
    )
    .await;
    records.request_load("s.t:3").await.unwrap();
    records
        .write_plan(&leader, "s.t:2", 1, &plans(&[]))
        .await
        .unwrap();
    assert_eq!(
        records.prune_layouts(&leader, "s.t", 5).await.unwrap(),
        2,
        "version 1, the orphan"
    );
    assert_eq!(records.layouts("s.t").await.unwrap(), [2, 3, 4, 5, 6]);
    records
        .write_plan(&leader, "s.t:3", 2, &plans(&[]))
        .await
        .unwrap();
    records.request_load("s.t:6").await.unwrap();
    assert_eq!(
        records
            .prune_layouts(&leader, "s.t", u64::MAX)
            .await
            .unwrap(),
        1
    );
    assert_eq!(records.layouts("s.t").await.unwrap(), [3, 4, 5, 6]);
}

pub(super) async fn two_puts_in_a_row_both_count(harness: &dyn Harness) {
    let records = records(harness).await;
    let store = records.store();
    assert_eq!(records.inbox_handled().await.unwrap(), 0);
    let handled = put(store, keys::INBOX, "s.a:1").await;
    let one = put(store, keys::INBOX, "s.a:2\n").await;
    put(store, &keys::layout_version("s.a"), "s.a:1").await;
    let two = put(store, keys::INBOX, "s.b:1").await;
    // The coordinator was away; it has handled the first.
    let mut inbox = records.inbox_since(handled).await.unwrap();
    for (revision, request) in [(one, "s.a:2"), (two, "s.b:1")] {
        let entry = soon(&mut inbox).await.unwrap();
        assert_eq!(
            (entry.revision, entry.request.as_str(), entry.history_lost),
            (revision, request, false)
        );
    }
    // And what comes while it listens.
    let three = put(store, keys::INBOX, "s.c:1").await;
    assert_eq!(soon(&mut inbox).await.unwrap().revision, three);
    let leader = elect(&records, "c").await;
    records.set_inbox_handled(&leader, three).await.unwrap();
    assert_eq!(records.inbox_handled().await.unwrap(), three);
    // From the very beginning, all count.
    let all: Vec<String> = records
        .inbox_since(handled - 1)
        .await
        .unwrap()
        .map_ok(|entry| entry.request)
        .take(4)
        .try_collect()
        .await
        .unwrap();
    assert_eq!(all, ["s.a:1", "s.a:2", "s.b:1", "s.c:1"]);
}

pub(super) async fn a_compacted_inbox_says_so(harness: &dyn Harness) {
    let records = records(harness).await;
    let store = records.store();
    let first = put(store, keys::INBOX, "s.a:1").await;
    put(store, keys::INBOX, "s.b:1").await;
    let last = put(store, keys::INBOX, "s.c:1").await;
    put(store, "other", "v").await;
    harness.compact().await;
    let mut inbox = records.inbox_since(first - 1).await.unwrap();
    let entry = soon(&mut inbox).await.unwrap();
    assert_eq!(
        (entry.revision, entry.request.as_str(), entry.history_lost),
        (last, "s.c:1", true)
    );
    let next = put(store, keys::INBOX, "s.d:1").await;
    let entry = soon(&mut inbox).await.unwrap();
    assert_eq!((entry.revision, entry.history_lost), (next, false));
    // What was handled already is not brought back by a compaction.
    put(store, "other", "w").await;
    harness.compact().await;
    let mut inbox = records.inbox_since(next).await.unwrap();
    let after = put(store, keys::INBOX, "s.e:1").await;
    assert_eq!(soon(&mut inbox).await.unwrap().revision, after);
}

pub(super) async fn rejections_are_bounded(harness: &dyn Harness) {
    let records = records(harness).await;
    let leader = elect(&records, "c").await;
    let total = REJECTIONS_MAX as i64 + 5;
    for revision in 1..=total {
        let rejection = Rejection {
            request: "nonsense".into(),
            reason: "invalid table version".into(),
            revision,
            rejected_unix_ms: 1,
        };
        records.reject(&leader, &rejection).await.unwrap();
    }
    let kept: Vec<i64> = records
        .rejections()
        .await
        .unwrap()
        .iter()
        .map(|r| r.revision)
        .collect();
    assert_eq!(kept, (6..=total).collect::<Vec<_>>());
}

pub(super) async fn a_restarted_worker_takes_its_id_over(harness: &dyn Harness) {
    let records = records(harness).await;
    let first = records
        .register_worker(&worker("w", "h1", "a"), LONG)
        .await
        .unwrap();
    records
        .publish_state(&first, &state("w", "s.t", 1, 1))
        .await
        .unwrap();
    records.renew(&first).await.unwrap();
    match records.register_worker(&worker("w", "h2", "b"), LONG).await {
        Err(Error::WorkerIdTaken { id, host }) => {
            assert_eq!((id.as_str(), host.as_str()), ("w", "h1"))
        }
        other => panic!("expected WorkerIdTaken, found {other:?}"),
    }
    assert!(
        records
            .register_worker(&worker("", "h", "b"), LONG)
            .await
            .is_err()
    );
    // Killed and started again on its host, before the old lease ran out.
    let second = records
        .register_worker(&worker("w", "h1", "c"), LONG)
        .await
        .unwrap();
    assert_eq!(records.workers().await.unwrap()[0].incarnation, "c");
    // The process before, should it still breathe, can neither renew nor report.
    let lost = |outcome: Result<()>| matches!(outcome, Err(Error::LeaseLost { .. }));
    assert!(lost(records.renew(&first).await));
    assert!(lost(
        records.publish_state(&first, &WorkerState::default()).await
    ));
    assert!(lost(
        records
            .update_worker(&first, &worker("w", "h1", "a"))
            .await
            .map(drop)
    ));
    // Nor does the end of its lease take anything away.
    records.deregister_worker(first).await.unwrap();
    records.renew(&second).await.unwrap();
    let larger = WorkerRecord {
        capacity_bytes: 2 << 30,
        ..worker("w", "h1", "c")
    };
    let second = records.update_worker(&second, &larger).await.unwrap();
    records.renew(&second).await.unwrap();
    records
        .publish_state(&second, &state("w", "s.t", 2, 1))
        .await
        .unwrap();
    assert_eq!(records.workers().await.unwrap(), [larger]);
    records.deregister_worker(second).await.unwrap();
    assert!(records.workers().await.unwrap().is_empty());
    // Pins are the operator's and outlive it.
    records.set_pin("w", true, 5).await.unwrap();
    assert_eq!(records.pins().await.unwrap()[0].worker, "w");
    records.set_pin("w", false, 6).await.unwrap();
    assert!(records.pins().await.unwrap().is_empty());
}

pub(super) async fn a_worker_that_stops_disappears(harness: &dyn Harness) {
    let records = records(harness).await;
    let registration = records
        .register_worker(&worker("w", "h", "a"), harness.ttl_min())
        .await
        .unwrap();
    records
        .publish_state(&registration, &state("w", "s.t", 1, 1))
        .await
        .unwrap();
    let mut workers = records.follow(keys::WORKER_PREFIX);
    until(&mut workers, |entries| entries.len() == 1).await;
    until(&mut workers, Vec::is_empty).await;
    eventually("its state goes with it", || async {
        records.states().await.unwrap().is_empty()
    })
    .await;
    assert!(matches!(
        records.renew(&registration).await,
        Err(Error::LeaseLost { .. })
    ));
    // It is not dead after all: it registers again.
    records
        .register_worker(&worker("w", "h", "a"), LONG)
        .await
        .unwrap();
    until(&mut workers, |entries| entries.len() == 1).await;
}

fn values(entries: &[Entry]) -> Vec<(&str, &str)> {
    entries
        .iter()
        .map(|entry| {
            (
                entry.key.as_str(),
                std::str::from_utf8(&entry.value).unwrap(),
            )
        })
        .collect()
}

pub(super) async fn following_converges(harness: &dyn Harness) {
    let records = records(harness).await;
    let store = records.store();
    put(store, "f/a", "1").await;
    put(store, "g/a", "not followed").await;
    let mut follow = records.follow("f/");
    assert_eq!(values(&soon(&mut follow).await), [("f/a", "1")]);
    commit(store, vec![Op::put("f/b", "1"), Op::delete("f/a")]).await;
    until(&mut follow, |entries| values(entries) == [("f/b", "1")]).await;
    // A reader that sleeps misses states in between, never the last.
    for i in 0..50 {
        put(store, "f/b", &i.to_string()).await;
    }
    let mut states = 0;
    loop {
        states += 1;
        if values(&soon(&mut follow).await) == [("f/b", "49")] {
            break;
        }
    }
    assert!(states <= 50);
    // Nobody is told of nothing: an empty prefix yields its emptiness once.
    let mut empty = records.follow("nothing/");
    assert!(soon(&mut empty).await.is_empty());
}

pub(super) async fn following_survives_compaction(harness: &dyn Harness) {
    let inner = harness.fresh().await;
    let faulty = Arc::new(Faulty {
        inner: Arc::clone(&inner),
        lists: AtomicU32::new(0),
    });
    let records = Records::new(Arc::<Faulty>::clone(&faulty));
    let options = FollowOptions {
        back_off_max: Duration::from_millis(200),
        ..Default::default()
    };
    let mut follow = records.follow_with("f/", options);
    assert!(soon(&mut follow).await.is_empty());
    for i in 0..10 {
        put(&inner, &format!("f/{i}"), "v").await;
        let expected = i + 1;
        until(&mut follow, |entries| entries.len() == expected).await;
    }
    commit(&inner, vec![Op::delete("f/3")]).await;
    until(&mut follow, |entries| entries.len() == 9).await;
    assert!(
        faulty.lists.load(Ordering::Relaxed) > 3,
        "it listed again after each loss"
    );
}

/// Loses every watch after its second event, one half of the times to a compaction.
#[derive(Debug)]
struct Faulty {
    inner: Arc<dyn Metastore>,
    lists: AtomicU32,
}

#[async_trait]
impl Metastore for Faulty {
    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        self.inner.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        self.lists.fetch_add(1, Ordering::Relaxed);
        self.inner.list(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        self.inner.txn(txn).await
    }

    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<WatchStream> {
        let error = if self.lists.load(Ordering::Relaxed).is_multiple_of(2) {
            Error::Compacted {
                requested: from_revision,
                compacted: from_revision,
            }
        } else {
            Error::WatchEnded {
                prefix: prefix.to_owned(),
                reason: "cut by the test".to_owned(),
            }
        };
        let end = futures::stream::once(async { Err(error) });
        Ok(events_only(self.inner.watch(prefix, from_revision).await?)
            .take(2)
            .chain(end)
            .boxed())
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId> {
        self.inner.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<()> {
        self.inner.revoke_lease(lease).await
    }

    async fn identity(&self) -> Result<ClusterIdentity> {
        self.inner.identity().await
    }
}

pub(super) async fn reset_forgets_plans_and_keeps_layouts(harness: &dyn Harness) {
    let records = records(harness).await;
    let leader = elect(&records, "c").await;
    let live = records
        .register_worker(&worker("w", "h", "a"), LONG)
        .await
        .unwrap();
    records.publish_layout("s.t", 1, DOCUMENT).await.unwrap();
    records.request_load("s.t:1").await.unwrap();
    put(records.store(), keys::INBOX, "s.t:1").await;
    records
        .write_plan(&leader, "s.t:1", 1, &plans(&[("w", 1)]))
        .await
        .unwrap();
    assert_eq!(records.reset(keys::PLAN_PREFIXES).await.unwrap(), 4);
    assert_eq!(records.cache_version("s.t").await.unwrap(), None);
    assert_eq!(records.load_request("s.t").await.unwrap(), None);
    assert_eq!(records.layouts("s.t").await.unwrap(), [1]);
    records.renew(&live).await.unwrap();
    records.request_load("s.t:1").await.unwrap();
    records.reset(keys::ALL_PREFIXES).await.unwrap();
    assert!(records.layouts("s.t").await.unwrap().is_empty());
    assert!(!leader.is_lost());
    // An empty prefix would be everything, registrations included: never by mistake.
    assert_eq!(records.reset(&[""]).await.unwrap(), 0);
}
