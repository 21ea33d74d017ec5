//! Names and listings that are odd.

use std::collections::BTreeSet;

use serde_json::json;
use stoa_tests::cluster::{ClusterOptions, PATIENCE};
use stoa_tests::s3::{Effect, FaultRule, Habits, Kind};
use stoa_tests::wait;

use super::{QUERY, Shop, answer, parquet};
use crate::spine::world;

/// Names as S3 allows them.
const NAMES: [&str; 23] = [
    "plain.parquet",
    "a..b.parquet",
    "a+b.parquet",
    "a%2Bb.parquet",
    "p%20q.parquet",
    "50%.parquet",
    "q&r.parquet",
    "what?.parquet",
    "hash#1.parquet",
    "semi;colon:@,$.parquet",
    "~tilde!'()*.parquet",
    "Köln ü.parquet",
    "日本語.parquet",
    "€ \u{1f40e}.parquet",
    "e\u{301}.parquet",
    "é.parquet",
    "brackets[1]{2}.parquet",
    "quote\"s.parquet",
    "back\\slash.parquet",
    "pipe|^`.parquet",
    "less<than>.parquet",
    "dots..parquet",
    "UPPER.PARQUET",
];

/// A key travels from the listing through the layout, the catalog and the chunks' names back to a
/// request: each object is asked for by its own name, and is found as a location of its own.
#[test]
fn keys_are_asked_for_as_they_are() {
    let shop = Shop::open();
    for (number, name) in NAMES.iter().enumerate() {
        let first = number as i64 * 10;
        let content = parquet(first..first + 10);
        shop.s3.put("wares", &format!("t/{name}"), content).unwrap();
    }
    shop.s3.set_habits(Habits {
        page_keys: Some(5),
        ..Habits::default()
    });
    let expected = answer(0..NAMES.len() as i64 * 10);
    shop.ok(&["layout", "create", "s3.t", "--location", "s3://wares/t/"]);
    assert_eq!(shop.ask(QUERY), expected, "cold");
    shop.ok(&["load", "s3.t:1"]);
    let asked: BTreeSet<String> = shop
        .s3
        .log()
        .into_iter()
        .filter_map(|line| {
            assert!(line.status < 400, "{line:?}");
            (line.kind == Kind::Get).then_some(line.key)
        })
        .collect();
    let keys = NAMES.iter().map(|name| format!("t/{name}"));
    assert_eq!(asked, keys.collect());
    shop.s3.forget();
    assert_eq!(shop.ask(QUERY), expected, "hot");
    assert_eq!(shop.s3.counts().gets(), 0);
    for (number, (location, name)) in [
        ("a+b.parquet", "a+b.parquet"),
        ("a%2Bb.parquet", "a+b.parquet"),
        ("a%252Bb.parquet", "a%2Bb.parquet"),
        ("p%2520q.parquet", "p%20q.parquet"),
        ("what%3F.parquet", "what?.parquet"),
        ("hash%231.parquet", "hash#1.parquet"),
        ("K%C3%B6ln%20%C3%BC.parquet", "Köln ü.parquet"),
        ("Köln ü.parquet", "Köln ü.parquet"),
        ("50%25.parquet", "50%.parquet"),
        ("50%.parquet", "50%.parquet"),
    ]
    .into_iter()
    .enumerate()
    {
        let table = format!("one.t{number}");
        let at = format!("s3://wares/t/{location}");
        shop.ok(&["layout", "create", &table, "--location", &at]);
        let first = NAMES.iter().position(|known| *known == name).unwrap() as i64 * 10;
        let got = shop.ask(&format!("select min(id) as a, count(*) as n from {table}"));
        assert_eq!(got, json!([{"a": first, "n": 10}]), "{location}");
    }
}

/// Markers of directories, hidden files and neighbours of the same prefix lie beside a table; keys
/// that are no path are refused by name, and when they are gone all is well.
#[test]
fn odd_keys_in_a_listing_are_left_out_or_named() {
    let shop = Shop::open();
    let one = |number: i64| parquet(number * 10..number * 10 + 10);
    for number in 0..25 {
        let key = format!("t/part-{number:05}.parquet");
        shop.s3.put("wares", &key, one(number)).unwrap();
    }
    for key in [
        "t_$folder$",
        "t/sub_$folder$",
        "t/_SUCCESS",
        "t/_delta_log/0.json",
        "t/.spark-staging-1/part.parquet",
        "t2/part.parquet",
        "t-old/part.parquet",
    ] {
        shop.s3.put("wares", key, one(99)).unwrap();
    }
    let habits = |page_keys, beside: &[&str]| Habits {
        page_keys: Some(page_keys),
        listed_beside: beside.iter().map(|key| (*key).to_owned()).collect(),
        ..Habits::default()
    };
    let expected = answer(0..250);
    for (number, (location, page_keys)) in [
        ("s3://wares/t/", 1000),
        ("s3://wares/t", 7),
        ("s3://wares/t", 1),
    ]
    .into_iter()
    .enumerate()
    {
        shop.s3.set_habits(habits(page_keys, &["t/", "t/sub/"]));
        let table = format!("s3.t{number}");
        shop.s3.forget();
        shop.ok(&["layout", "create", &table, "--location", location]);
        let pages = 29_u64.div_ceil(page_keys as u64);
        assert_eq!(
            shop.s3.counts().of(Kind::List).requests,
            pages,
            "{page_keys}"
        );
        let sql = format!("select count(*) as n, sum(v) as s from {table}");
        assert_eq!(shop.ask(&sql), expected, "{location}, {page_keys}");
    }
    for bad in [
        "t//double.parquet",
        "t/sub//",
        "t/./dot.parquet",
        "t/../up.parquet",
    ] {
        shop.s3.set_habits(habits(1000, &[bad]));
        let arguments = ["layout", "create", "s3.bad", "--location", "s3://wares/t/"];
        shop.s3.forget();
        let refused = shop.stoa(&arguments);
        assert_ne!(refused.code, Some(0), "{bad}: {refused:?}");
        assert!(
            refused.stderr.contains(bad.trim_end_matches('/')),
            "{bad}: {refused:?}"
        );
        assert_eq!(shop.s3.counts().of(Kind::List).requests, 1, "{bad}");
    }
    shop.s3.set_habits(Habits::default());
    shop.ok(&["layout", "create", "s3.bad", "--location", "s3://wares/t/"]);
    let sql = "select count(*) as n, sum(v) as s from s3.bad";
    assert_eq!(shop.ask(sql), expected);
}

/// A key that is no path appears beside a table that is loaded, and the store throttles on top: every
/// look fails from then on. Queries go on with what was there, the status names the key, the log says
/// it once, and when the key is gone all is well again.
#[test]
fn looks_that_fail_are_said_once_and_heal() {
    let options = ClusterOptions {
        workers: 1,
        freshness: "1s".to_owned(),
        ..ClusterOptions::default()
    };
    let world = world(&options, &["customer"]);
    world.create("customer", &["c_custkey"]);
    world.cluster.load("tpch.customer:1").unwrap();
    let count = world.count(0, "customer");
    let problems = || {
        let status = world.cluster.status().map_err(|error| error.to_string())?;
        Ok::<String, String>(status["problems"].to_string())
    };
    world.s3.set_faults(vec![
        FaultRule::always(Effect::Status(503))
            .on(Kind::List)
            .each(2),
    ]);
    world.s3.set_habits(Habits {
        listed_beside: vec!["customer//stray.parquet".to_owned()],
        ..Habits::default()
    });
    wait::until("the problem", PATIENCE, || {
        let problems = problems()?;
        let is_named = problems.contains("customer//stray.parquet");
        is_named.then_some(()).ok_or(problems)
    })
    .unwrap();
    let looks = world.s3.counts().of(Kind::List).requests;
    wait::until("four more looks", PATIENCE, || {
        let more = world.s3.counts().of(Kind::List).requests - looks;
        (more >= 8).then_some(()).ok_or(more.to_string())
    })
    .unwrap();
    assert_eq!(world.count(0, "customer"), count);
    let said = |text: &str| world.cluster.logs().unwrap().matches(text).count();
    assert_eq!(said("files cannot be looked at"), 1);
    world.s3.set_habits(Habits::default());
    wait::until("the end of the problem", PATIENCE, || {
        let problems = problems()?;
        (problems == "[]").then_some(()).ok_or(problems)
    })
    .unwrap();
    assert_eq!(said("can be looked at again"), 1);
    assert_eq!(world.count(0, "customer"), count);
}
