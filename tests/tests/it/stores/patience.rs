//! Stores that throttle, stumble and stay down.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Value;
use stoa_origin::{Backoff, ErrorKind, OriginLimits};
use stoa_tests::s3::{Effect, FaultRule, Habits, Kind};

use super::{QUERY, Shop, table};

/// A store stumbles at each third request, in every way: no wrong answer, no part of a table that
/// passes for all of it.
#[test]
fn a_store_that_stumbles_costs_time_and_nothing_else() {
    let read = [Kind::Get, Kind::Head, Kind::List];
    let status =
        |status| read.map(|kind| FaultRule::always(Effect::Status(status)).on(kind).each(3));
    let body = |effect| vec![FaultRule::always(effect).on(Kind::Get).each(3)];
    for faults in [
        status(503).to_vec(),
        status(429).to_vec(),
        status(500).to_vec(),
        status(400).to_vec(),
        body(Effect::ResetAfter(0)),
        body(Effect::ResetAfter(100)),
        body(Effect::ShortBody(100)),
        body(Effect::ShortBody(0)),
    ] {
        let shop = Shop::open();
        let expected = shop.two_files();
        shop.s3.set_faults(faults.clone());
        shop.ok(&["layout", "create", "s3.t", "--location", "s3://wares/t/"]);
        assert_eq!(shop.ask(QUERY), expected, "{faults:?}, cold");
        shop.ok(&["load", "s3.t:1"]);
        shop.s3.forget();
        assert_eq!(shop.ask(QUERY), expected, "{faults:?}, hot");
        assert_eq!(shop.s3.counts().gets(), 0, "{faults:?}");
    }
}

/// A store that asks for patience gets it: no request comes earlier than it said.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_that_the_store_asks_for_is_kept() {
    let shop = Shop::open();
    shop.s3.put("wares", "t/a", vec![7; 100]).unwrap();
    shop.s3.set_habits(Habits {
        retry_after: Some("1".to_owned()),
        ..Habits::default()
    });
    let origin = shop.origin(OriginLimits {
        backoff: Backoff {
            base: Duration::from_millis(1),
            max: Duration::from_millis(1),
        },
        ..OriginLimits::default()
    });
    let object = origin.head("s3://wares", "t/a").await.unwrap();
    shop.s3
        .set_faults(vec![FaultRule::always(Effect::Status(503)).times(2)]);
    let started = Instant::now();
    origin
        .read(&object, std::slice::from_ref(&(0..10)))
        .await
        .unwrap();
    let waited = started.elapsed();
    assert!(waited >= Duration::from_secs(2), "{waited:?}");
    assert_eq!(origin.counters().retries, 2);

    // What it asks for beyond the patience there is ends the request.
    let hasty = shop.origin(OriginLimits {
        retry_time: Duration::from_millis(500),
        ..OriginLimits::default()
    });
    shop.s3
        .set_faults(vec![FaultRule::always(Effect::Status(503))]);
    let started = Instant::now();
    let error = hasty
        .read(&object, std::slice::from_ref(&(0..10)))
        .await
        .unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(1), "{error}");
    assert_eq!(error.kind(), ErrorKind::Retry);
    assert!(error.to_string().contains("SlowDown"), "{error}");
}

/// What is none of the cache's business is read through the same settings, and as patiently.
#[test]
fn tables_that_are_not_cached_are_read_as_patiently() {
    let shop = Shop::open();
    let expected = shop.two_files();
    shop.s3
        .set_faults(vec![FaultRule::always(Effect::Status(503)).each(3)]);
    let sql = "create external table u stored as parquet location 's3://wares/t/'; \
               select count(*) as n, sum(v) as s from u";
    let text = shop.ok(&["sql", "-q", "--format", "json", "-c", sql]);
    let rows = text.lines().find(|line| line.starts_with('['));
    let rows: Value = serde_json::from_str(rows.unwrap_or_default()).expect(&text);
    assert_eq!(rows, expected);
}

/// A store that is down is given up within the time that the configuration says.
#[test]
fn a_store_that_stays_down_is_given_up_in_time() {
    let shop = Shop::open();
    shop.two_files();
    shop.s3
        .set_faults(vec![FaultRule::always(Effect::Status(503))]);
    let arguments = ["layout", "create", "s3.t", "--location", "s3://wares/t/"];
    let limit = ["--set", "origin.retry.time=2s"];
    let started = Instant::now();
    let created = shop.stoa(&[&limit[..], &arguments[..]].concat());
    let took = started.elapsed();
    assert_eq!(created.code, Some(3), "{created:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(created.stderr.contains("attempts"), "{created:?}");
    assert!(shop.s3.counts().reads() >= 4, "{:?}", shop.s3.counts());
}

/// A listing of many pages under throttling goes on where it was, and so comes to its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_throttled_listing_goes_on_from_its_page() {
    let shop = Shop::open();
    for number in 0..60 {
        shop.s3
            .put("wares", &format!("t/{number:03}"), b"x")
            .unwrap();
    }
    shop.s3.set_habits(Habits {
        page_keys: Some(5),
        ..Habits::default()
    });
    // More failures in all than one request has attempts.
    let rule = FaultRule::always(Effect::Status(503)).on(Kind::List);
    shop.s3.set_faults(vec![rule.each(2)]);
    let origin = shop.origin(OriginLimits {
        attempts: 3,
        backoff: Backoff {
            base: Duration::from_millis(1),
            max: Duration::from_millis(1),
        },
        ..OriginLimits::default()
    });
    let listed = origin.list(&table()).await.unwrap();
    let names: BTreeSet<&str> = listed.iter().map(|file| &*file.identity.path).collect();
    assert_eq!((listed.len(), names.len()), (60, 60));
    let lists = shop.s3.counts().of(Kind::List);
    assert_eq!(lists.requests - lists.errors, 12, "each page once");
    assert_eq!(origin.counters().list_requests, lists.requests);
}
