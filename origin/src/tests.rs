//! Reads and listings against stores that fail in every way we know.

// Lists of one range are what is meant here, and so are reversed ones.
#![allow(clippy::single_range_in_vec_init, clippy::reversed_empty_ranges)]

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};

use crate::{
    Backoff, Error, ErrorKind, Location, ObjectIdentity, ObjectTag, Origin, OriginLimits,
    StoreSettings, Stores,
};

/// What happens to one request for bytes.
#[derive(Clone, Debug)]
enum Fault {
    /// The server answers 503, as a client without retries reports it.
    Unavailable,
    /// The body ends after so many bytes.
    Short(usize),
    /// The body goes on for longer than it should.
    Long,
    /// The connection breaks within the body.
    Reset,
    /// No answer ever.
    Hang,
    /// Credentials are refused.
    Denied,
}

/// A store with faults, delays and habits.
#[derive(Debug, Default)]
struct Troubled {
    inner: InMemory,
    faults: Mutex<VecDeque<Fault>>,
    delay: Duration,
    /// Answers a request with If-Match as if it had none.
    ignores_if_match: bool,
    /// Lists without etags.
    lists_without_tags: bool,
    /// Gives versions and no etags.
    versions: bool,
    /// Gives neither.
    without_identity: bool,
    /// Prefix of every etag, such as `W/`.
    etag_prefix: &'static str,
    now: AtomicUsize,
    most: AtomicUsize,
    seen: Mutex<Vec<GetOptions>>,
}

impl fmt::Display for Troubled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Troubled")
    }
}

fn store_error(text: &'static str) -> object_store::Error {
    object_store::Error::Generic {
        store: "Troubled",
        source: text.into(),
    }
}

impl Troubled {
    fn dress(&self, mut meta: ObjectMeta) -> ObjectMeta {
        if self.versions {
            meta.version = meta.e_tag.take();
        }
        if self.without_identity {
            meta.e_tag = None;
        }
        meta.e_tag = meta.e_tag.map(|tag| match self.etag_prefix {
            "" => tag,
            prefix => format!("{prefix}\"{tag}\""),
        });
        meta
    }
}

#[async_trait]
impl ObjectStore for Troubled {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(
        &self,
        location: &Path,
        mut options: GetOptions,
    ) -> object_store::Result<GetResult> {
        self.seen.lock().unwrap().push(options.clone());
        if self.ignores_if_match || self.versions || !self.etag_prefix.is_empty() {
            options.if_match = None;
        }
        options.version = None;
        let fault = match options.head {
            true => None,
            false => self.faults.lock().unwrap().pop_front(),
        };
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(self.delay).await;
        self.now.fetch_sub(1, Ordering::SeqCst);
        match fault {
            Some(Fault::Unavailable) => return Err(store_error("503 Service Unavailable")),
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Denied) => {
                return Err(object_store::Error::PermissionDenied {
                    path: location.to_string(),
                    source: "403 Forbidden".into(),
                });
            }
            _ => {}
        }
        let mut result = self.inner.get_opts(location, options).await?;
        result.meta = self.dress(result.meta);
        let body = |parts: Vec<object_store::Result<Bytes>>| {
            GetResultPayload::Stream(futures::stream::iter(parts).boxed())
        };
        if let Some(fault) = fault {
            let (meta, range) = (result.meta.clone(), result.range.clone());
            let bytes = result.bytes().await?;
            let payload = match fault {
                Fault::Short(length) => body(vec![Ok(bytes.slice(..length))]),
                Fault::Long => body(vec![Ok(bytes.clone()), Ok(bytes)]),
                Fault::Reset => {
                    let half = bytes.slice(..bytes.len() / 2);
                    body(vec![Ok(half), Err(store_error("connection reset"))])
                }
                _ => unreachable!("handled before"),
            };
            return Ok(GetResult {
                payload,
                meta,
                range,
                attributes: Default::default(),
            });
        }
        Ok(result)
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let (versions, untagged) = (
            self.versions,
            self.lists_without_tags || self.without_identity,
        );
        self.inner
            .list(prefix)
            .map(move |meta| {
                meta.map(|mut meta| {
                    if versions {
                        meta.version = meta.e_tag.take();
                    }
                    if untagged {
                        meta.e_tag = None;
                    }
                    meta
                })
            })
            .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &Path,
        to: &Path,
        options: CopyOptions,
    ) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

const ROOT: &str = "s3://troubled";
const PATH: &str = "t/a.parquet";

fn content(length: usize) -> Bytes {
    (0..length).map(|i| (i * 7 + i / 256) as u8).collect()
}

fn limits() -> OriginLimits {
    OriginLimits {
        attempts: 3,
        backoff: Backoff {
            base: Duration::from_millis(1),
            max: Duration::from_millis(2),
        },
        timeout: Duration::from_secs(5),
        coalesce_gap_bytes: 16,
        ..OriginLimits::default()
    }
}

/// An origin over `store` with one object of 100 kB at [`PATH`].
async fn origin_of(
    store: Troubled,
    limits: OriginLimits,
) -> (Origin, Arc<Troubled>, ObjectIdentity) {
    let store = Arc::new(store);
    store
        .inner
        .put(&PATH.into(), content(100_000).into())
        .await
        .unwrap();
    let stores = Stores::new(StoreSettings::default());
    stores.register(ROOT, store.clone());
    let origin = Origin::new(stores, limits);
    let identity = origin.head(ROOT, PATH).await.unwrap();
    (origin, store, identity)
}

async fn faulty(faults: &[Fault]) -> (Origin, Arc<Troubled>, ObjectIdentity) {
    let store = Troubled::default();
    store.faults.lock().unwrap().extend(faults.iter().cloned());
    origin_of(store, limits()).await
}

fn part(range: Range<u64>) -> Bytes {
    content(100_000).slice(range.start as usize..range.end as usize)
}

#[tokio::test]
async fn near_ranges_are_one_request_and_come_in_the_order_asked_for() {
    let (origin, _, object) = faulty(&[]).await;
    let ranges = [500..600, 0..100, 110..120, 50..60, 7..7];
    let bodies = origin.read(&object, &ranges).await.unwrap();
    for (range, body) in ranges.iter().zip(&bodies) {
        assert_eq!(*body, part(range.clone()));
    }
    let counters = origin.counters();
    assert_eq!((counters.get_requests, counters.bytes), (2, 220));
    assert_eq!((counters.head_requests, counters.retries), (1, 0));
    assert_eq!(counters.requests(), 3);
}

#[tokio::test]
async fn nothing_asked_is_nothing_requested() {
    let (origin, _, object) = faulty(&[]).await;
    assert!(origin.read(&object, &[]).await.unwrap().is_empty());
    assert_eq!(origin.read(&object, &[5..5]).await.unwrap(), [Bytes::new()]);
    assert_eq!(origin.counters().get_requests, 0);
}

/// A thundering herd on one chunk must be one request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_at_the_same_time_share_one_request() {
    let store = Troubled {
        delay: Duration::from_millis(50),
        ..Troubled::default()
    };
    let (origin, _, object) = origin_of(store, limits()).await;
    let callers = (0..100).map(|_| {
        let (origin, object) = (origin.clone(), object.clone());
        tokio::spawn(async move { origin.read(&object, &[10..5000]).await.unwrap().remove(0) })
    });
    for body in futures::future::join_all(callers).await {
        assert_eq!(body.unwrap(), part(10..5000));
    }
    assert_eq!(origin.counters().get_requests, 1);
}

#[tokio::test]
async fn a_failed_request_fails_all_its_callers_alike() {
    let store = Troubled {
        delay: Duration::from_millis(20),
        ..Troubled::default()
    };
    store.faults.lock().unwrap().push_back(Fault::Denied);
    let (origin, _, object) = origin_of(store, limits()).await;
    let ranges = [0..10];
    let (a, b) = tokio::join!(origin.read(&object, &ranges), origin.read(&object, &ranges));
    assert_eq!(a.unwrap_err().to_string(), b.unwrap_err().to_string());
    assert_eq!(origin.counters().get_requests, 1);
}

/// An object overwritten between planning and reading must never be taken for the old one.
#[tokio::test]
async fn an_overwritten_object_is_noticed_by_if_match() {
    let (origin, store, object) = faulty(&[]).await;
    store
        .inner
        .put(&PATH.into(), content(100_000).into())
        .await
        .unwrap();
    let error = origin.read(&object, &[0..10]).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "object s3://troubled/t/a.parquet has changed: expected etag 0, 100000 bytes, found etag \
         1, 100000 bytes; look at it again"
    );
    assert_eq!(error.kind(), ErrorKind::Changed);
    let counters = origin.counters();
    assert_eq!(
        (counters.get_requests, counters.changed, counters.retries),
        (1, 1, 0)
    );
}

#[tokio::test]
async fn an_overwritten_object_is_noticed_by_a_store_that_ignores_if_match() {
    let store = Troubled {
        ignores_if_match: true,
        ..Troubled::default()
    };
    let (origin, store, object) = origin_of(store, limits()).await;
    origin.read(&object, &[0..10]).await.unwrap();
    store
        .inner
        .put(&PATH.into(), content(100_000).into())
        .await
        .unwrap();
    let error = origin.read(&object, &[0..10]).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "object s3://troubled/t/a.parquet has changed: expected etag 0, 100000 bytes, found etag \
         1, 100000 bytes; look at it again"
    );
}

#[tokio::test]
async fn an_answer_without_etag_proves_nothing() {
    let (origin, _, object) = faulty(&[]).await;
    let silent = Arc::new(Troubled {
        ignores_if_match: true,
        without_identity: true,
        ..Troubled::default()
    });
    silent
        .inner
        .put(&PATH.into(), content(100_000).into())
        .await
        .unwrap();
    origin.stores().register(ROOT, silent);
    let error = origin.read(&object, &[0..10]).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "nobody can say which content of s3://troubled/t/a.parquet is read: the answer carries no \
         etag, and the store ignores If-Match; check whether a proxy drops the ETag header"
    );
    assert_eq!(error.kind(), ErrorKind::Config);
    // Nothing was asked twice, and what was learnt is remembered.
    let asked = origin.counters().get_requests;
    assert!(origin.read(&object, &[0..10]).await.is_err());
    assert_eq!(origin.counters().get_requests, asked + 1);
    assert_eq!(origin.counters().retries, 0);
}

#[tokio::test]
async fn another_size_is_another_object() {
    let (origin, _, object) = faulty(&[]).await;
    let object = ObjectIdentity {
        size: 99_999,
        ..object
    };
    let error = origin.read(&object, &[0..10]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Changed);
}

/// A weak etag never matches an If-Match, so sending it would make every read fail.
#[tokio::test]
async fn weak_etags_are_compared_and_not_sent() {
    let store = Troubled {
        etag_prefix: "W/",
        ..Troubled::default()
    };
    let (origin, store, object) = origin_of(store, limits()).await;
    assert_eq!(object.tag, ObjectTag::Etag("W/\"0\"".into()));
    origin.read(&object, &[0..10]).await.unwrap();
    assert_eq!(store.seen.lock().unwrap().last().unwrap().if_match, None);
    store
        .inner
        .put(&PATH.into(), content(100_000).into())
        .await
        .unwrap();
    assert_eq!(
        origin.read(&object, &[0..10]).await.unwrap_err().kind(),
        ErrorKind::Changed
    );
}

#[tokio::test]
async fn versions_are_asked_for_by_name() {
    let store = Troubled {
        versions: true,
        ..Troubled::default()
    };
    let (origin, store, object) = origin_of(store, limits()).await;
    assert_eq!(object.tag, ObjectTag::Version("0".into()));
    origin.read(&object, &[0..10]).await.unwrap();
    let sent = store.seen.lock().unwrap().last().unwrap().clone();
    assert_eq!((sent.version.as_deref(), sent.if_match), (Some("0"), None));
    store
        .inner
        .put(&PATH.into(), content(100_000).into())
        .await
        .unwrap();
    let error = origin.read(&object, &[0..10]).await.unwrap_err();
    assert!(
        error.to_string().contains("found version 1, 100000 bytes"),
        "{error}"
    );
}

#[tokio::test]
async fn faults_that_pass_are_retried() {
    for fault in [
        Fault::Unavailable,
        Fault::Short(3),
        Fault::Long,
        Fault::Reset,
    ] {
        let (origin, _, object) = faulty(&[fault.clone(), fault.clone()]).await;
        let bodies = origin.read(&object, &[100..200]).await.unwrap();
        assert_eq!(bodies, [part(100..200)], "{fault:?}");
        let counters = origin.counters();
        assert_eq!(
            (counters.get_requests, counters.retries),
            (3, 2),
            "{fault:?}"
        );
    }
}

#[tokio::test]
async fn faults_that_stay_are_errors_after_bounded_attempts() {
    for (fault, text) in [
        (
            Fault::Unavailable,
            "request to s3://troubled/t/a.parquet failed after 3 attempts: Generic Troubled \
             error: 503 Service Unavailable",
        ),
        (
            Fault::Short(3),
            "short body from s3://troubled/t/a.parquet: expected 100 bytes of 100.., found 3, \
             after 3 attempts",
        ),
    ] {
        let (origin, _, object) = faulty(&vec![fault; 10]).await;
        let error = origin.read(&object, &[100..200]).await.unwrap_err();
        assert_eq!(error.to_string(), text);
        assert_eq!(error.kind(), ErrorKind::Retry);
        assert_eq!(origin.counters().get_requests, 3);
    }
}

#[tokio::test]
async fn a_store_that_hangs_is_given_up() {
    let store = Troubled::default();
    store
        .faults
        .lock()
        .unwrap()
        .extend([Fault::Hang, Fault::Hang, Fault::Hang]);
    let limits = OriginLimits {
        timeout: Duration::from_millis(30),
        ..limits()
    };
    let (origin, _, object) = origin_of(store, limits).await;
    let error = origin.read(&object, &[0..10]).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "no answer from s3://troubled/t/a.parquet within 30 ms, after 3 attempts"
    );
    origin.read(&object, &[0..10]).await.unwrap();
}

#[tokio::test]
async fn a_refusal_is_not_asked_again() {
    let (origin, _, object) = faulty(&[Fault::Denied]).await;
    let error = origin.read(&object, &[0..10]).await.unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("check the store's credentials and settings"),
        "{error}"
    );
    assert_eq!(
        (error.kind(), origin.counters().get_requests),
        (ErrorKind::Config, 1)
    );
}

#[tokio::test]
async fn ranges_have_to_lie_within_the_object() {
    let (origin, _, object) = faulty(&[]).await;
    let error = origin
        .read(&object, &[0..5, 99_990..100_001])
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "range 99990..100001 of s3://troubled/t/a.parquet is not within its 100000 bytes"
    );
    let reversed = origin.read(&object, &[9..5]).await;
    assert!(matches!(reversed, Err(Error::InvalidRange { .. })));
    assert_eq!(origin.counters().get_requests, 0);
}

#[tokio::test]
async fn a_path_in_an_identity_cannot_leave_its_store() {
    let (origin, _, object) = faulty(&[]).await;
    let object = ObjectIdentity {
        path: "t/../secret".into(),
        ..object
    };
    let error = origin.read(&object, &[0..10]).await.unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("invalid object path \"t/../secret\""),
        "{error}"
    );
    assert!(origin.head(ROOT, "/etc/passwd").await.is_err());
}

#[tokio::test]
async fn an_object_that_is_gone_is_not_found() {
    let (origin, store, object) = faulty(&[]).await;
    store.inner.delete(&PATH.into()).await.unwrap();
    let error = origin.read(&object, &[0..10]).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "object s3://troubled/t/a.parquet is not found"
    );
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(
        origin.head(ROOT, PATH).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[tokio::test]
async fn bytes_and_requests_in_flight_are_bounded() {
    for (in_flight_bytes_max, requests_max) in [(8192, 64), (1 << 20, 2)] {
        let store = Troubled {
            delay: Duration::from_millis(5),
            ..Troubled::default()
        };
        let limits = OriginLimits {
            in_flight_bytes_max,
            requests_max,
            ..limits()
        };
        let (origin, store, object) = origin_of(store, limits).await;
        let ranges: Vec<Range<u64>> = (0..12).map(|i| i * 8000..i * 8000 + 4096).collect();
        origin.read(&object, &ranges).await.unwrap();
        assert_eq!(store.most.load(Ordering::SeqCst), 2);
        // A range larger than the bound goes alone instead of never.
        assert_eq!(
            origin.read(&object, &[0..100_000]).await.unwrap(),
            [content(100_000)]
        );
    }
}

/// Callers that stop polling must not keep others from their bytes.
#[tokio::test]
async fn a_caller_that_looks_away_holds_nobody_up() {
    let limits = OriginLimits {
        in_flight_bytes_max: 4096,
        ..limits()
    };
    let store = Troubled {
        delay: Duration::from_millis(5),
        ..Troubled::default()
    };
    let (origin, _, object) = origin_of(store, limits).await;
    let looked_away = [0..4096];
    let mut idle = Box::pin(origin.read(&object, &looked_away));
    assert!(futures::poll!(&mut idle).is_pending());
    tokio::task::yield_now().await;
    assert_eq!(
        origin.read(&object, &[50_000..54_096]).await.unwrap(),
        [part(50_000..54_096)]
    );
    assert_eq!(idle.await.unwrap(), [part(0..4096)]);
}

#[tokio::test]
async fn an_abandoned_read_is_taken_back() {
    let store = Troubled {
        delay: Duration::from_millis(20),
        ..Troubled::default()
    };
    let (origin, store, object) = origin_of(store, limits()).await;
    let ranges = [0..10];
    let read = origin.read(&object, &ranges);
    assert!(
        tokio::time::timeout(Duration::from_millis(5), read)
            .await
            .is_err()
    );
    tokio::time::sleep(Duration::from_millis(40)).await;
    assert_eq!(
        store.now.load(Ordering::SeqCst),
        1,
        "it was aborted within the store's delay"
    );
    origin.read(&object, &ranges).await.unwrap();
}

async fn put(store: &dyn ObjectStore, paths: &[&str]) {
    for path in paths {
        store
            .put(&Path::from(*path), content(10).into())
            .await
            .unwrap();
    }
}

fn paths(listed: &[crate::ListedObject]) -> Vec<&str> {
    listed
        .iter()
        .map(|object| object.identity.path.as_str())
        .collect()
}

#[tokio::test]
async fn a_listing_is_sorted_and_leaves_out_what_is_hidden_or_empty() {
    let (origin, store, _) = faulty(&[]).await;
    put(
        &store.inner,
        &[
            "t/c",
            "t/b/x",
            "t/_SUCCESS",
            "t/.a.crc",
            "tt/other",
            "t/_p=1/x",
        ],
    )
    .await;
    store
        .inner
        .put(&"t/empty".into(), PutPayload::new())
        .await
        .unwrap();
    let location = Location::parse("s3://troubled/t/").unwrap();
    let listed = origin.list(&location).await.unwrap();
    assert_eq!(paths(&listed), ["t/_p=1/x", "t/a.parquet", "t/b/x", "t/c"]);
    assert!(listed[0].last_modified.unwrap() <= SystemTime::now());
    assert_eq!(origin.counters().list_requests, 1);
    // Without the slash it may be one object, which costs a HEAD to know.
    let location = Location::parse("s3://troubled/t").unwrap();
    assert_eq!(origin.list(&location).await.unwrap(), listed);
    let location = Location::parse("s3://troubled/t/a.parquet").unwrap();
    assert_eq!(
        paths(&origin.list(&location).await.unwrap()),
        ["t/a.parquet"]
    );
    let location = Location::parse("s3://troubled/nothing").unwrap();
    assert!(origin.list(&location).await.unwrap().is_empty());
    let all = origin
        .list(&Location::parse("s3://troubled").unwrap())
        .await
        .unwrap();
    assert_eq!(all.len(), 5);
}

#[tokio::test]
async fn objects_listed_without_tag_are_asked_for_it() {
    let store = Troubled {
        lists_without_tags: true,
        ..Troubled::default()
    };
    let (origin, store, object) = origin_of(store, limits()).await;
    put(&store.inner, &["t/b"]).await;
    let location = Location::parse("s3://troubled/t/").unwrap();
    let listed = origin.list(&location).await.unwrap();
    assert_eq!(listed[0].identity, object);
    assert_eq!(listed.len(), 2);
    assert_eq!(origin.counters().head_requests, 3);
}

#[tokio::test]
async fn an_object_without_identity_cannot_be_cached() {
    let (origin, _, _) = faulty(&[]).await;
    let silent = Arc::new(Troubled {
        without_identity: true,
        ..Troubled::default()
    });
    put(&silent.inner, &["t/a"]).await;
    origin.stores().register("s3://silent", silent);
    let location = Location::parse("s3://silent/t/").unwrap();
    let error = origin.list(&location).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "object s3://silent/t/a has neither etag nor version; an object without identity cannot \
         be cached"
    );
    assert_eq!(error.kind(), ErrorKind::Config);
}

#[tokio::test]
async fn an_unknown_store_is_named() {
    let (origin, _, object) = faulty(&[]).await;
    let object = ObjectIdentity {
        store: "ftp://elsewhere".into(),
        ..object
    };
    let error = origin.read(&object, &[0..10]).await.unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("unknown store \"ftp://elsewhere\"; known are "),
        "{error}"
    );
    let location = Location::parse("ftp://elsewhere/t/").unwrap();
    assert_eq!(
        origin.list(&location).await.unwrap_err().kind(),
        ErrorKind::Config
    );
}

#[tokio::test]
async fn local_files_are_listed_read_and_noticed_when_written() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.parquet");
    std::fs::write(&file, content(1000)).unwrap();
    let origin = Origin::new(Stores::new(StoreSettings::default()), limits());
    let location = Location::parse(directory.path().to_str().unwrap()).unwrap();
    let listed = origin.list(&location).await.unwrap();
    assert_eq!(listed.len(), 1);
    let object = &listed[0].identity;
    assert_eq!(object.url(), format!("file://{}", file.display()));
    assert_eq!(
        origin.read(object, &[10..20, 990..1000]).await.unwrap(),
        [part(10..20), part(990..1000)]
    );
    std::fs::write(&file, content(2000)).unwrap();
    let error = origin.read(object, &[10..20]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Changed, "{error}");
    std::fs::remove_file(&file).unwrap();
    assert_eq!(
        origin.read(object, &[10..20]).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

/// A file can be written into after it was opened: a read in between must not mix both contents.
#[tokio::test]
async fn a_local_file_written_while_it_is_read_has_changed() {
    #[derive(Debug)]
    struct WritesAfterOpening(LocalFileSystem, std::path::PathBuf);
    impl fmt::Display for WritesAfterOpening {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.fmt(f)
        }
    }
    #[async_trait]
    impl ObjectStore for WritesAfterOpening {
        async fn put_opts(
            &self,
            location: &Path,
            payload: PutPayload,
            options: PutOptions,
        ) -> object_store::Result<PutResult> {
            self.0.put_opts(location, payload, options).await
        }
        async fn put_multipart_opts(
            &self,
            location: &Path,
            options: PutMultipartOptions,
        ) -> object_store::Result<Box<dyn MultipartUpload>> {
            self.0.put_multipart_opts(location, options).await
        }
        async fn get_opts(
            &self,
            location: &Path,
            options: GetOptions,
        ) -> object_store::Result<GetResult> {
            let is_head = options.head;
            let result = self.0.get_opts(location, options).await;
            if !is_head {
                std::fs::write(&self.1, vec![0; 1000]).unwrap();
            }
            result
        }
        fn delete_stream(
            &self,
            locations: BoxStream<'static, object_store::Result<Path>>,
        ) -> BoxStream<'static, object_store::Result<Path>> {
            self.0.delete_stream(locations)
        }
        fn list(
            &self,
            prefix: Option<&Path>,
        ) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
            self.0.list(prefix)
        }
        async fn list_with_delimiter(
            &self,
            prefix: Option<&Path>,
        ) -> object_store::Result<ListResult> {
            self.0.list_with_delimiter(prefix).await
        }
        async fn copy_opts(
            &self,
            from: &Path,
            to: &Path,
            options: CopyOptions,
        ) -> object_store::Result<()> {
            self.0.copy_opts(from, to, options).await
        }
    }

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.parquet");
    std::fs::write(&file, content(1000)).unwrap();
    let stores = Stores::new(StoreSettings::default());
    let store = WritesAfterOpening(LocalFileSystem::new(), file.clone());
    stores.register("file://", Arc::new(store));
    let origin = Origin::new(stores, limits());
    let path = file.to_str().unwrap().trim_start_matches('/');
    let object = origin.head("file://", path).await.unwrap();
    // The clock of the file system may be coarse.
    std::thread::sleep(Duration::from_millis(20));
    let error = origin.read(&object, &[0..10]).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("1000 bytes written while they were read"),
        "{error}"
    );
}

#[test]
fn identities_are_json_as_documented() {
    let identity = ObjectIdentity {
        store: "s3://b".into(),
        path: "a".into(),
        tag: ObjectTag::Etag("\"x\"".into()),
        size: 3,
    };
    let json = r#"{"store":"s3://b","path":"a","tag":{"etag":"\"x\""},"size":3}"#;
    assert_eq!(serde_json::to_string(&identity).unwrap(), json);
    assert_eq!(
        serde_json::from_str::<ObjectIdentity>(json).unwrap(),
        identity
    );
    let version = r#"{"version":"7"}"#;
    assert_eq!(
        serde_json::from_str::<ObjectTag>(version).unwrap(),
        ObjectTag::Version("7".into())
    );
}
