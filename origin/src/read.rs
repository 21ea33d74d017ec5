//! Reads of known objects.

use std::future::Future;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::future::try_join_all;
use object_store::{GetOptions, GetRange, GetResult, GetResultPayload, ObjectMeta, ObjectStore};
use tokio::sync::Semaphore;

use crate::coalesce::coalesce;
use crate::counted::OriginCounters;
use crate::error::{Error, ErrorKind, Result};
use crate::flight::Flights;
use crate::identity::{ObjectIdentity, ObjectTag, bare_etag};
use crate::location::object_path;
use crate::retry::{Backoff, random_unit};
use crate::stores::{StoreSettings, Stores};

/// Bounds on what is asked of the stores.
#[derive(Clone, Debug, PartialEq)]
pub struct OriginLimits {
    /// Bytes requested and not yet received, over all callers; a larger single range goes alone.
    pub in_flight_bytes_max: u64,
    /// Requests at the same time, over all callers, for bytes and (separately) for identities.
    pub requests_max: usize,
    /// Ranges this close are one request, the bytes between them thrown away.
    pub coalesce_gap_bytes: u64,
    /// A request does not grow past this by coalescing.
    pub request_bytes_max: u64,
    /// Attempts for one request, the first included; at least 1.
    pub attempts: u32,
    /// Waits between attempts.
    pub backoff: Backoff,
    /// Deadline of one attempt, to which the time for its bytes at `slowest_bytes_per_second` is
    /// added.
    pub timeout: Duration,
    /// The slowest transfer that is waited for.
    pub slowest_bytes_per_second: u64,
}

impl Default for OriginLimits {
    fn default() -> Self {
        OriginLimits {
            in_flight_bytes_max: 256 << 20,
            requests_max: 64,
            coalesce_gap_bytes: 1 << 20,
            request_bytes_max: 32 << 20,
            attempts: 4,
            backoff: Backoff::default(),
            timeout: Duration::from_secs(20),
            slowest_bytes_per_second: 1 << 20,
        }
    }
}

impl OriginLimits {
    fn deadline(&self, bytes: u64) -> Duration {
        self.timeout + Duration::from_secs(bytes / self.slowest_bytes_per_second.max(1))
    }
}

/// Reads of known objects, from any store. Cheap to clone, shared.
#[derive(Clone)]
pub struct Origin {
    inner: Arc<Inner>,
}

struct Inner {
    stores: Stores,
    limits: OriginLimits,
    flights: Flights<(Arc<ObjectIdentity>, Range<u64>), Result<Bytes>>,
    /// Bytes in flight, in units of [`PERMIT_BYTES`].
    bytes: Arc<Semaphore>,
    requests: Arc<Semaphore>,
}

/// A permit stands for this many bytes, so that its count fits the semaphore.
const PERMIT_BYTES: u64 = 4096;

impl Default for Origin {
    /// Stores by their standard credential chains, usual limits.
    fn default() -> Origin {
        Origin::new(
            Stores::new(StoreSettings::default()),
            OriginLimits::default(),
        )
    }
}

impl Origin {
    /// Reads from `stores` within `limits`.
    pub fn new(stores: Stores, limits: OriginLimits) -> Origin {
        let permits = permits(limits.in_flight_bytes_max);
        Origin {
            inner: Arc::new(Inner {
                stores,
                flights: Flights::new(),
                bytes: Arc::new(Semaphore::new(permits as usize)),
                requests: Arc::new(Semaphore::new(limits.requests_max.max(1))),
                limits: OriginLimits {
                    attempts: limits.attempts.max(1),
                    requests_max: limits.requests_max.max(1),
                    ..limits
                },
            }),
        }
    }

    /// The stores that are read from.
    pub fn stores(&self) -> &Stores {
        &self.inner.stores
    }

    /// The bounds on what is asked of the stores.
    pub fn limits(&self) -> &OriginLimits {
        &self.inner.limits
    }

    /// What was asked of the stores so far.
    pub fn counters(&self) -> OriginCounters {
        self.inner.stores.counters()
    }

    /// The bytes of `ranges` of exactly this content, in the order asked for.
    ///
    /// Near ranges are one request, and one request answers all callers that wait for the same
    /// one. The results of ranges that shared a request share its memory. Must be called within a
    /// tokio runtime.
    ///
    /// # Errors
    /// [`Error::Changed`] if the object has other content by now, [`Error::NotFound`] if it is
    /// gone, [`Error::InvalidRange`] for a range past its end, and what requests can fail with,
    /// after as many attempts as the limits allow.
    pub async fn read(&self, object: &ObjectIdentity, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        if let Some(range) = ranges
            .iter()
            .find(|r| r.start > r.end || r.end > object.size)
        {
            return Err(Error::InvalidRange {
                url: object.url(),
                start: range.start,
                end: range.end,
                size: object.size,
            });
        }
        let limits = &self.inner.limits;
        let merged = coalesce(ranges, limits.coalesce_gap_bytes, limits.request_bytes_max);
        let object = Arc::new(object.clone());
        let bodies = try_join_all(merged.iter().map(|merged| {
            let range = merged.range.clone();
            self.inner
                .flights
                .join((object.clone(), range.clone()), || {
                    spawned(self.clone(), object.clone(), range)
                })
        }))
        .await?;
        let mut results = vec![Bytes::new(); ranges.len()];
        for (merged, body) in merged.iter().zip(bodies) {
            for &member in &merged.members {
                let range = &ranges[member];
                let offset = (range.start - merged.range.start) as usize;
                let length = (range.end - range.start) as usize;
                results[member] = body.slice(offset..offset + length);
            }
        }
        Ok(results)
    }

    /// Runs `request` as often as the limits allow, while its error may go away.
    pub(crate) async fn retried<T, E, F>(
        &self,
        url: &str,
        deadline: Duration,
        mut request: impl FnMut() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T, E>>,
        E: IntoError,
    {
        let limits = &self.inner.limits;
        let mut attempt = 1;
        loop {
            let error = match tokio::time::timeout(deadline, request()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => error.into_error(url),
                Err(_) => Error::Timeout {
                    url: url.to_owned(),
                    timeout_ms: deadline.as_millis() as u64,
                    attempts: attempt,
                },
            };
            match error.kind() {
                ErrorKind::Retry if attempt < limits.attempts => {}
                ErrorKind::Changed => {
                    self.inner.stores.live_counters().found_changed();
                    return Err(error);
                }
                _ => return Err(error.after(attempt)),
            }
            let wait = limits.backoff.wait(attempt, random_unit());
            tracing::debug!(url, attempt, wait_ms = wait.as_millis() as u64, %error, "asking again");
            tokio::time::sleep(wait).await;
            self.inner.stores.live_counters().retried();
            attempt += 1;
        }
    }

    /// One merged range, within the bounds on what is in flight.
    async fn fetch(&self, object: &ObjectIdentity, range: Range<u64>) -> Result<Bytes> {
        let store = self.inner.stores.get(&object.store)?;
        let path = object_path(&object.path)?;
        let length = range.end - range.start;
        let limits = &self.inner.limits;
        let wanted = permits(length).min(permits(limits.in_flight_bytes_max));
        // Both semaphores live as long as `self` and are never closed; taken in one order only.
        let _bytes = self.inner.bytes.acquire_many(wanted).await;
        let _request = self.inner.requests.acquire().await;
        self.retried(&object.url(), limits.deadline(length), || {
            attempt(&*store, &path, object, range.clone())
        })
        .await
    }
}

impl std::fmt::Debug for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Origin")
            .field("stores", &self.inner.stores)
            .field("limits", &self.inner.limits)
            .finish()
    }
}

/// Errors of one attempt: a store's, which still need the URL, or ours.
pub(crate) trait IntoError {
    fn into_error(self, url: &str) -> Error;
}

impl IntoError for Error {
    fn into_error(self, _url: &str) -> Error {
        self
    }
}

impl IntoError for object_store::Error {
    fn into_error(self, url: &str) -> Error {
        Error::from_store(url, self)
    }
}

fn permits(bytes: u64) -> u32 {
    let permits = bytes.div_ceil(PERMIT_BYTES).max(1);
    u32::try_from(permits)
        .unwrap_or(u32::MAX)
        .min(Semaphore::MAX_PERMITS as u32)
}

/// The fetch as a task of its own: it goes on while its callers are busy elsewhere, so that a
/// caller that does not poll cannot hold up the others through the bounds. Dropped with the last
/// caller.
async fn spawned(origin: Origin, object: Arc<ObjectIdentity>, range: Range<u64>) -> Result<Bytes> {
    struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);
    impl<T> Drop for AbortOnDrop<T> {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
    let url = object.url();
    let mut task = AbortOnDrop(tokio::spawn(
        async move { origin.fetch(&object, range).await },
    ));
    match (&mut task.0).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Error::Abandoned { url }),
    }
}

/// One request for one range, checked in every respect before its bytes are believed.
async fn attempt(
    store: &dyn ObjectStore,
    path: &object_store::path::Path,
    object: &ObjectIdentity,
    range: Range<u64>,
) -> Result<Bytes> {
    let url = object.url();
    let mut options = GetOptions::new().with_range(Some(GetRange::Bounded(range.clone())));
    match &object.tag {
        // A weak etag never matches an If-Match, so for it only the answer's is compared.
        ObjectTag::Etag(etag) if !etag.starts_with("W/") => options.if_match = Some(etag.clone()),
        ObjectTag::Etag(_) => {}
        ObjectTag::Version(version) => options.version = Some(version.clone()),
    }
    let result = match store.get_opts(path, options).await {
        Ok(result) => result,
        Err(error) => {
            return Err(match Error::from_store(&url, error) {
                Error::Changed { url, found, .. } => Error::Changed {
                    url,
                    expected: object.content(),
                    found,
                },
                error => error,
            });
        }
    };
    if let Some(found) = difference(object, &result.meta) {
        return Err(Error::Changed {
            url,
            expected: object.content(),
            found,
        });
    }
    let short = |found: u64| Error::ShortBody {
        url: url.clone(),
        start: range.start,
        expected: range.end - range.start,
        found,
        attempts: 1,
    };
    if result.range != range {
        return Err(short(result.range.end.saturating_sub(result.range.start)));
    }
    let body = body(result, object, &range).await?;
    if body.len() as u64 != range.end - range.start {
        return Err(short(body.len() as u64));
    }
    Ok(body)
}

/// What the answer says about its content, if that is not what was expected.
fn difference(object: &ObjectIdentity, meta: &ObjectMeta) -> Option<String> {
    let found_tag = match (&object.tag, &meta.e_tag, &meta.version) {
        (ObjectTag::Etag(expected), Some(found), _) if bare_etag(expected) == bare_etag(found) => {
            None
        }
        (ObjectTag::Etag(_), Some(found), _) => Some(format!("etag {found}")),
        // Without an etag in the answer nobody knows what it is.
        (ObjectTag::Etag(_), None, _) => Some("no etag".to_owned()),
        (ObjectTag::Version(expected), _, Some(found)) if expected != found => {
            Some(format!("version {found}"))
        }
        // The version was asked for by name; it is immutable.
        (ObjectTag::Version(_), _, _) => None,
    };
    match found_tag {
        Some(tag) => Some(format!("{tag}, {} bytes", meta.size)),
        None if meta.size != object.size => Some(format!("{}, {} bytes", object.tag, meta.size)),
        None => None,
    }
}

async fn body(result: GetResult, object: &ObjectIdentity, range: &Range<u64>) -> Result<Bytes> {
    let url = object.url();
    let length = (range.end - range.start) as usize;
    match result.payload {
        GetResultPayload::File(file, _) => {
            let modified: SystemTime = result.meta.last_modified.into();
            let (start, expected, size) = (range.start, object.content(), object.size);
            tokio::task::spawn_blocking(move || {
                read_file(&file, start, length, modified, size).map_err(|error| match error {
                    FileError::Changed(found) => Error::Changed {
                        url,
                        expected,
                        found,
                    },
                    FileError::Io(source) => Error::File {
                        url,
                        source: Arc::new(source),
                    },
                })
            })
            .await
            .unwrap_or_else(|_| Err(Error::Abandoned { url: object.url() }))
        }
        GetResultPayload::Stream(mut stream) => {
            let mut whole = Bytes::new();
            let mut parts = BytesMut::new();
            while let Some(part) = stream.next().await {
                let part = part.map_err(|error| Error::from_store(&url, error))?;
                if whole.is_empty() && parts.is_empty() {
                    // Most small bodies come in one piece, which needs no copy.
                    whole = part;
                    continue;
                }
                if parts.is_empty() {
                    parts.reserve(length);
                    parts.extend_from_slice(&whole);
                    whole = Bytes::new();
                }
                parts.extend_from_slice(&part);
                if parts.len() > length {
                    break;
                }
            }
            Ok(if parts.is_empty() {
                whole
            } else {
                parts.freeze()
            })
        }
    }
}

enum FileError {
    Changed(String),
    Io(std::io::Error),
}

/// Reads a local file, and looks afterwards whether it was written meanwhile: its tag was taken
/// when it was opened, and nothing keeps others from writing into it.
fn read_file(
    file: &std::fs::File,
    start: u64,
    length: usize,
    modified: SystemTime,
    size: u64,
) -> Result<Bytes, FileError> {
    let mut bytes = vec![0; length];
    let read = file.read_exact_at(&mut bytes, start);
    let after = file.metadata().map_err(FileError::Io)?;
    let modified_after = after.modified().map_err(FileError::Io)?;
    if after.len() != size || modified_after != modified {
        return Err(FileError::Changed(format!(
            "{} bytes written while they were read",
            after.len()
        )));
    }
    read.map_err(FileError::Io)?;
    Ok(bytes.into())
}
