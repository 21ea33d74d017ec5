//! The S3 server of the tests itself: a cache tested against a store that lies proves nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};
use stoa_tests::http;
use stoa_tests::s3::{Conditions, Effect, EtagStyle, FaultRule, Habits, Kind, S3Options, S3Server};

/// A server with bucket `bucket`, and a client that does not retry.
struct Store {
    server: S3Server,
    client: Arc<dyn ObjectStore>,
    _root: tempfile::TempDir,
}

fn store() -> Store {
    let root = tempfile::tempdir().unwrap();
    let server = S3Server::start(S3Options::at(root.path())).unwrap();
    server.create_bucket("bucket").unwrap();
    let client = server.object_store("bucket").unwrap();
    Store {
        server,
        client,
        _root: root,
    }
}

fn matching(etag: &str, range: std::ops::Range<u64>) -> GetOptions {
    GetOptions {
        if_match: Some(etag.to_owned()),
        range: Some(GetRange::Bounded(range)),
        ..GetOptions::default()
    }
}

/// Whoever wrote an object, by whatever way: GET, HEAD and LIST name the same content, and
/// If-Match holds exactly as long as that content is there.
#[tokio::test]
async fn one_content_has_one_etag_in_every_answer() {
    let store = store();
    let path = Path::from("dir/object");
    let put = store
        .client
        .put(&path, PutPayload::from_static(b"first content"))
        .await
        .unwrap();
    let listed = || async {
        let all: Vec<_> = store
            .client
            .list(Some(&Path::from("dir")))
            .try_collect()
            .await
            .unwrap();
        all[0].e_tag.clone()
    };
    let head = store.client.head(&path).await.unwrap();
    let get = store.client.get(&path).await.unwrap();
    assert!(put.e_tag.is_some());
    assert_eq!(head.e_tag, put.e_tag);
    assert_eq!(get.meta.e_tag, put.e_tag);
    assert_eq!(listed().await, put.e_tag);

    // Overwritten around the protocol, with the same length: everything changes together.
    store
        .server
        .put("bucket", "dir/object", b"other content")
        .unwrap();
    let old = put.e_tag.unwrap();
    let new = store.client.head(&path).await.unwrap().e_tag.unwrap();
    assert_ne!(new, old);
    assert_eq!(listed().await.unwrap(), new);
    let refused = store.client.get_opts(&path, matching(&old, 0..5)).await;
    assert!(
        matches!(refused, Err(Error::Precondition { .. })),
        "{refused:?}"
    );
    let taken = store.client.get_opts(&path, matching(&new, 0..5)).await;
    let taken = taken.unwrap();
    assert_eq!(taken.range, 0..5);
    assert_eq!(taken.bytes().await.unwrap(), "other");

    // Conditional writes see the same truth, also of an object that s3s-fs did not write itself.
    let update = |etag: &str| PutOptions {
        mode: PutMode::Update(object_store::UpdateVersion {
            e_tag: Some(etag.to_owned()),
            version: None,
        }),
        ..PutOptions::default()
    };
    let third = || PutPayload::from_static(b"third");
    assert!(
        store
            .client
            .put_opts(&path, third(), update(&old))
            .await
            .is_err()
    );
    store
        .client
        .put_opts(&path, third(), update(&new))
        .await
        .unwrap();
    assert_eq!(store.server.read("bucket", "dir/object").unwrap(), "third");

    // A store whose lists name no etags is one call away.
    store.server.set_habits(Habits {
        list_etags: EtagStyle::Missing,
        ..Habits::default()
    });
    assert_eq!(listed().await, None);
}

/// Requests and bytes are counted by kind and key, and the log has the ranges.
#[tokio::test]
async fn every_request_is_in_the_books() {
    let store = store();
    store.server.put("bucket", "t/one", vec![7; 1000]).unwrap();
    store.server.put("bucket", "t/two", vec![8; 2000]).unwrap();
    let (one, two) = (Path::from("t/one"), Path::from("t/two"));
    store.client.get_range(&one, 100..300).await.unwrap();
    store.client.get_range(&two, 0..50).await.unwrap();
    store.client.get(&two).await.unwrap().bytes().await.unwrap();
    store.client.head(&one).await.unwrap();
    assert!(store.client.head(&Path::from("t/none")).await.is_err());
    let counts = store.server.counts();
    assert_eq!(counts.gets(), 3);
    assert_eq!(counts.of(Kind::Get).bytes, 200 + 50 + 2000);
    assert_eq!(counts.on(Kind::Get, "bucket/t/two").requests, 2);
    assert_eq!(counts.of(Kind::Head).requests, 2);
    assert_eq!(counts.of(Kind::Head).errors, 1);
    assert_eq!(counts.of(Kind::List).requests, 0);
    let log = store.server.log();
    assert_eq!(log[0].range, Some((100, 300)));
    assert_eq!((log[0].status, log[0].if_match), (206, false));
    assert_eq!((log[2].status, log[2].range), (200, None));

    // The same over HTTP, for whoever does not hold the handle.
    let address = store.server.address();
    let answer = http::get(address, "/_stoa/counts").unwrap();
    let counts: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(counts["kinds"]["get"]["requests"], 3);
    let answer = http::request("DELETE", address, "/_stoa/counts", "").unwrap();
    assert_eq!(answer.status, 204);
    assert_eq!(store.server.counts().reads(), 0);

    // Unsigned requests are none of its business.
    assert_eq!(http::get(address, "/bucket/t/one").unwrap().status, 403);
}

/// Delays, error statuses, cut connections and short bodies, each as a client meets it.
#[tokio::test]
async fn faults_strike_as_they_were_ordered() {
    let store = store();
    store
        .server
        .put("bucket", "object", vec![1; 100_000])
        .unwrap();
    let path = Path::from("object");
    let read = || async {
        let got = store.client.get_range(&path, 0..90_000).await?;
        Ok::<usize, Error>(got.len())
    };

    store.server.set_faults(vec![
        FaultRule::always(Effect::Status(503))
            .on(Kind::Get)
            .after(1)
            .times(2),
    ]);
    assert_eq!(read().await.unwrap(), 90_000);
    assert!(read().await.is_err());
    assert!(read().await.is_err());
    assert_eq!(read().await.unwrap(), 90_000);

    store.server.set_faults(vec![
        FaultRule::always(Effect::ResetAfter(40_000)).key("object"),
    ]);
    assert!(read().await.is_err(), "a cut body is an error");

    store
        .server
        .set_faults(vec![FaultRule::always(Effect::ShortBody(40_000))]);
    let short = store.client.get_opts(
        &path,
        GetOptions {
            range: Some(GetRange::Bounded(0..90_000)),
            ..GetOptions::default()
        },
    );
    let short = short.await.unwrap().bytes().await.unwrap();
    assert_eq!(short.len(), 40_000, "a short body is complete HTTP");

    let rules = r#"[{"kind":"get","effect":{"delay_ms":300}}]"#;
    let answer = http::request("PUT", store.server.address(), "/_stoa/faults", rules).unwrap();
    assert_eq!(answer.status, 204, "{}", answer.body);
    let started = Instant::now();
    assert_eq!(read().await.unwrap(), 90_000);
    assert!(started.elapsed() >= Duration::from_millis(300));
    let refused = http::request("PUT", store.server.address(), "/_stoa/faults", "{}").unwrap();
    assert_eq!(refused.status, 400);
}

/// A store that goes away and comes back is at the same place, with its objects and its books.
#[tokio::test]
async fn a_stopped_store_is_gone_and_comes_back() {
    let mut store = store();
    store.server.put("bucket", "object", b"x").unwrap();
    let path = Path::from("object");
    store.client.head(&path).await.unwrap();
    store.server.stop();
    assert!(store.client.head(&path).await.is_err());
    store.server.restart().unwrap();
    store.client.head(&path).await.unwrap();
    assert_eq!(store.server.counts().of(Kind::Head).requests, 2);
}

/// A store of another make writes etags and takes conditions as it is used to.
#[tokio::test]
async fn habits_are_those_that_were_ordered() {
    let store = store();
    store.server.put("bucket", "a", b"content").unwrap();
    store.server.put("bucket", "b", b"content").unwrap();
    let path = Path::from("a");
    let etag = store.client.head(&path).await.unwrap().e_tag.unwrap();
    let bare = etag.trim_matches('"').to_owned();
    let listed = async || {
        let all: Vec<_> = store.client.list(None).try_collect().await.unwrap();
        assert_eq!(all.len(), 2, "{all:?}");
        all[0].e_tag.clone()
    };
    let habits = |style| Habits {
        list_etags: style,
        get_etags: style,
        page_keys: Some(1),
        ..Habits::default()
    };
    for (style, expected) in [
        (EtagStyle::Quoted, Some(etag.clone())),
        (EtagStyle::Bare, Some(bare)),
        (EtagStyle::Weak, Some(format!("W/{etag}"))),
        (EtagStyle::Missing, None),
    ] {
        store.server.set_habits(habits(style));
        store.server.forget();
        assert_eq!(listed().await, expected, "{style:?}");
        assert_eq!(store.server.counts().of(Kind::List).requests, 2);
        assert_eq!(store.client.head(&path).await.unwrap().e_tag, expected);
        let got = store.client.get(&path).await.unwrap();
        assert_eq!(got.meta.e_tag, expected);
        assert_eq!(got.bytes().await.unwrap(), "content");
    }
    for (conditions, right, wrong) in [
        (Conditions::Checked, 206, 412),
        (Conditions::Unquoted, 412, 412),
        (Conditions::Refused, 501, 501),
        (Conditions::Ignored, 206, 206),
    ] {
        store.server.set_habits(Habits {
            conditions,
            ..Habits::default()
        });
        store.server.forget();
        let _ = store.client.get_opts(&path, matching(&etag, 0..2)).await;
        let _ = store.client.get_opts(&path, matching("\"x\"", 0..2)).await;
        let statuses: Vec<u16> = store.server.log().iter().map(|line| line.status).collect();
        assert_eq!(statuses, [right, wrong], "{conditions:?}");
    }
    store.server.set_habits(Habits {
        ignores_ranges: true,
        ..Habits::default()
    });
    assert!(store.client.get_range(&path, 0..2).await.is_err());
}
