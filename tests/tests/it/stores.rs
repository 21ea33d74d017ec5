//! Object stores as the field has them: other dialects of S3, stores that throttle and stumble,
//! names and listings that are odd. Stock DataFusion reads them; so does the cache, or it says why.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use serde_json::{Value, json};
use stoa_origin::{Backoff, ErrorKind, Location, Origin, OriginLimits, StoreSettings, Stores};
use stoa_tests::cluster::{Ran, binary};
use stoa_tests::s3::{Conditions, Effect, EtagStyle, FaultRule, Habits, Kind, S3Options, S3Server};
use stoa_tests::scratch::CacheDirectory;

/// Rows of one file: `id` counts them, `v` follows from `id`.
fn parquet(ids: std::ops::Range<i64>) -> Vec<u8> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int64, false),
        Field::new("v", DataType::Int64, false),
    ]));
    let columns: [Int64Array; 2] = [
        ids.clone().collect(),
        ids.map(|id| id * 7919 % 1_000_003).collect(),
    ];
    let columns = columns.map(|column| Arc::new(column) as _).to_vec();
    let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(1000));
    let mut writer = ArrowWriter::try_new(Vec::new(), schema, Some(properties.build())).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

/// What `select count(*) as n, sum(v) as s` says of rows with these ids, by hand.
fn answer(ids: impl Iterator<Item = i64> + Clone) -> Value {
    let sum: i64 = ids.clone().map(|id| id * 7919 % 1_000_003).sum();
    json!([{"n": ids.count(), "s": sum}])
}

const QUERY: &str = "select count(*) as n, sum(v) as s from s3.t";

/// A store with bucket `wares`, and an embedded Stoa with a home and a cache of its own.
struct Shop {
    s3: S3Server,
    home: tempfile::TempDir,
    cache: CacheDirectory,
    _objects: tempfile::TempDir,
}

impl Shop {
    fn open() -> Shop {
        let objects = tempfile::tempdir().unwrap();
        let s3 = S3Server::start(S3Options::at(objects.path())).unwrap();
        s3.create_bucket("wares").unwrap();
        let shop = Shop {
            s3,
            home: tempfile::tempdir().unwrap(),
            cache: CacheDirectory::new().unwrap(),
            _objects: objects,
        };
        shop.configure("allow_http = true\n");
        shop
    }

    fn configure(&self, more: &str) {
        let text = format!(
            "[store.\"s3://wares\"]\nendpoint = {:?}\nregion = {:?}\naccess_key_id = {:?}\n\
             secret_access_key = {:?}\n{more}",
            self.s3.endpoint(),
            S3Server::REGION,
            self.s3.access_key(),
            self.s3.secret_key(),
        );
        std::fs::write(self.home.path().join("stoa.toml"), text).unwrap();
    }

    fn stoa(&self, arguments: &[&str]) -> Ran {
        let output = Command::new(binary().unwrap())
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.home.path())
            .env("STOA_CACHE__LOCATION", self.cache.path())
            .env("STOA_CACHE__SIZE", "64MiB")
            .env("STOA_CACHE__FRESHNESS", "snapshot")
            .current_dir(self.home.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ran {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let ran = self.stoa(arguments);
        assert_eq!(ran.code, Some(0), "{arguments:?}: {ran:?}");
        ran.stdout
    }

    fn ask(&self, sql: &str) -> Value {
        let text = self.ok(&["sql", "-q", "--format", "json", "-c", sql]);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{sql}: {error}: {text}"))
    }

    /// Reads of the store, in this process.
    fn origin(&self, limits: OriginLimits) -> Origin {
        let settings = StoreSettings::default()
            .with_option("s3://wares", "endpoint", self.s3.endpoint())
            .with_option("s3://wares", "region", S3Server::REGION)
            .with_option("s3://wares", "allow_http", "true")
            .with_option("s3://wares", "access_key_id", self.s3.access_key())
            .with_option("s3://wares", "secret_access_key", self.s3.secret_key());
        Origin::new(Stores::new(settings), limits)
    }

    /// Two files, one of several row groups; the ids are 0 to 999 and 0 to 3999.
    fn two_files(&self) -> Value {
        self.s3
            .put("wares", "t/0.parquet", parquet(0..1000))
            .unwrap();
        self.s3
            .put("wares", "t/1.parquet", parquet(0..4000))
            .unwrap();
        answer((0..1000).chain(0..4000))
    }
}

fn table() -> Location {
    Location::parse("s3://wares/t/").unwrap()
}

/// Every dialect that a client meets, and whether its contents can be told apart.
fn dialects() -> Vec<(Habits, bool)> {
    use Conditions::*;
    use EtagStyle::*;
    let dialect = |list_etags, get_etags, conditions| Habits {
        list_etags,
        get_etags,
        conditions,
        ..Habits::default()
    };
    vec![
        (dialect(Quoted, Quoted, Checked), true),
        // The server checks as strictly as the standard says: unquoted it never matches.
        (dialect(Bare, Quoted, Checked), true),
        (dialect(Bare, Bare, Checked), true),
        (dialect(Bare, Bare, Ignored), true),
        (dialect(Quoted, Quoted, Unquoted), true),
        (dialect(Bare, Quoted, Unquoted), true),
        (dialect(Quoted, Quoted, Refused), true),
        (dialect(Quoted, Quoted, Ignored), true),
        (dialect(Missing, Quoted, Checked), true),
        (dialect(Quoted, Missing, Checked), true),
        (dialect(Weak, Weak, Checked), true),
        (dialect(Quoted, Weak, Ignored), true),
        // Nothing in these answers says what they are.
        (dialect(Quoted, Missing, Ignored), false),
        (dialect(Quoted, Missing, Refused), false),
        (dialect(Missing, Missing, Checked), false),
    ]
}

/// A user's bucket lies on a store of another make: layouts are made and loaded, queries answered
/// cold and hot; or one message says what is wrong with the store, at once.
#[test]
fn stores_of_every_make_are_read_or_named() {
    for (habits, is_readable) in dialects() {
        let shop = Shop::open();
        let expected = shop.two_files();
        shop.s3.set_habits(habits.clone());
        let created = shop.stoa(&["layout", "create", "s3.t", "--location", "s3://wares/t/"]);
        if !is_readable {
            assert_eq!(created.code, Some(2), "{habits:?}: {created:?}");
            assert!(created.stderr.contains("etag"), "{habits:?}: {created:?}");
            assert!(!created.stderr.contains("changed"), "{created:?}");
            let asked = shop.s3.counts().reads();
            assert!(asked <= 12, "{habits:?}: {asked} requests");
            continue;
        }
        assert_eq!(created.code, Some(0), "{habits:?}: {created:?}");
        assert_eq!(shop.ask(QUERY), expected, "{habits:?}, cold");
        shop.ok(&["load", "s3.t:1"]);
        shop.s3.forget();
        assert_eq!(shop.ask(QUERY), expected, "{habits:?}, hot");
        assert_eq!(shop.s3.counts().gets(), 0, "{habits:?}");
    }
}

/// An object is overwritten under a reader's eyes, on a store of every make: never are the new
/// bytes taken for the old content, nor is anything else said than that it has changed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overwritten_object_is_noticed_on_every_make() {
    for (habits, is_readable) in dialects() {
        // Whether the first thing that is asked of the store is about the old or the new content.
        for reads_before in [true, false] {
            let shop = Shop::open();
            let old: Vec<u8> = (0..200).collect();
            shop.s3.put("wares", "t/a", &old).unwrap();
            shop.s3.set_habits(habits.clone());
            let origin = shop.origin(OriginLimits::default());
            let Ok(listed) = origin.list(&table()).await else {
                assert!(!is_readable, "{habits:?}");
                continue;
            };
            let object = &listed[0].identity;
            let range = [10..20];
            if reads_before {
                match origin.read(object, &range).await {
                    Ok(bytes) => assert_eq!(bytes[0], old[10..20], "{habits:?}"),
                    Err(error) => {
                        assert!(!is_readable, "{habits:?}: {error}");
                        assert_eq!(error.kind(), ErrorKind::Config, "{habits:?}: {error}");
                    }
                }
            }
            let new: Vec<u8> = (0..200).rev().collect();
            shop.s3.put("wares", "t/a", &new).unwrap();
            let error = origin.read(object, &range).await.unwrap_err();
            let expected = match is_readable {
                true => ErrorKind::Changed,
                false => ErrorKind::Config,
            };
            assert_eq!(error.kind(), expected, "{habits:?}: {error}");
            let now = origin.list(&table()).await.unwrap();
            if is_readable {
                let bytes = origin.read(&now[0].identity, &range).await.unwrap();
                assert_eq!(bytes[0], new[10..20], "{habits:?}");
            }
            assert_eq!(origin.counters().retries, 0, "{habits:?}");
        }
    }
}

/// A web server that knows no ranges would send a file for every chunk.
#[test]
fn a_store_that_ignores_ranges_is_named_and_not_asked_again() {
    let shop = Shop::open();
    shop.two_files();
    shop.s3.set_habits(Habits {
        ignores_ranges: true,
        ..Habits::default()
    });
    let created = shop.stoa(&["layout", "create", "s3.t", "--location", "s3://wares/t/"]);
    assert_eq!(created.code, Some(2), "{created:?}");
    assert!(
        created.stderr.contains("cannot be read in parts"),
        "{created:?}"
    );
    assert!(shop.s3.counts().gets() <= 2, "{:?}", shop.s3.counts());
}

/// Somebody forgets that plain HTTP needs consent: that is no fault of the network.
#[test]
fn plain_http_without_consent_is_a_mistake_of_the_configuration() {
    let shop = Shop::open();
    shop.two_files();
    shop.configure("");
    let created = shop.stoa(&["layout", "create", "s3.t", "--location", "s3://wares/t/"]);
    assert_eq!(created.code, Some(2), "{created:?}");
    assert!(created.stderr.contains("allow_http = true"), "{created:?}");
    assert_eq!(shop.s3.counts().reads(), 0);
}

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
    origin.read(&object, &[0..10]).await.unwrap();
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
    let error = hasty.read(&object, &[0..10]).await.unwrap_err();
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
