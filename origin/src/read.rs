//! Reads of known objects.

use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::try_join_all;
use tokio::sync::Semaphore;

use crate::coalesce::coalesce;
use crate::content::attempt;
use crate::counted::OriginCounters;
use crate::error::{Error, ErrorKind, Result};
use crate::flight::Flights;
use crate::identity::ObjectIdentity;
use crate::location::object_path;
use crate::retry::{Backoff, Patience, random_unit};
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
    /// Time for the attempts of one request, the waits between them included: none begins later.
    pub retry_time: Duration,
    /// Waits between attempts, beside those that a store asks for.
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
            request_bytes_max: 16 << 20,
            attempts: 10,
            retry_time: Duration::from_secs(60),
            backoff: Backoff::default(),
            timeout: Duration::from_secs(30),
            slowest_bytes_per_second: 1 << 20,
        }
    }
}

impl OriginLimits {
    fn deadline(&self, bytes: u64) -> Duration {
        self.timeout + Duration::from_secs(bytes / self.slowest_bytes_per_second.max(1))
    }

    pub(crate) fn patience(&self) -> Patience<'_> {
        Patience {
            attempts: self.attempts,
            time: self.retry_time,
            backoff: &self.backoff,
        }
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
    /// When it was last said that a store is asked again and again.
    complained: Mutex<Option<Instant>>,
}

/// Requests that fail for longer than this are worth a line in the log,
const COMPLAIN_AFTER: Duration = Duration::from_secs(2);
/// and so much later another one.
const COMPLAIN_EVERY: Duration = Duration::from_secs(600);

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
                complained: Mutex::default(),
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
        let started = Instant::now();
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
            let elapsed = started.elapsed();
            let wait = match error.kind() {
                ErrorKind::Retry => {
                    let asked = error.retry_after();
                    limits
                        .patience()
                        .again(attempt, elapsed, asked, random_unit())
                }
                ErrorKind::Changed => {
                    self.inner.stores.live_counters().found_changed();
                    return Err(error);
                }
                _ => None,
            };
            let error = error.after(attempt);
            let Some(wait) = wait else {
                return Err(error);
            };
            tracing::debug!(url, attempt, wait_ms = wait.as_millis() as u64, %error, "asking again");
            if elapsed + wait > COMPLAIN_AFTER && self.complains(Instant::now()) {
                let seconds = limits.retry_time.as_secs();
                tracing::warn!(url, attempt, %error, "a store fails; a request is tried for up to {seconds} s");
            }
            tokio::time::sleep(wait).await;
            self.inner.stores.live_counters().retried();
            attempt += 1;
        }
    }

    /// Whether it is time for another line about failing stores; then it counts as written.
    fn complains(&self, now: Instant) -> bool {
        let complained = &self.inner.complained;
        let mut last = complained.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.is_none_or(|last| now.duration_since(last) >= COMPLAIN_EVERY);
        if is_due {
            *last = Some(now);
        }
        is_due
    }

    /// One merged range, within the bounds on what is in flight.
    async fn fetch(&self, object: &ObjectIdentity, range: Range<u64>) -> Result<Bytes> {
        let made = self.inner.stores.made(&object.store)?;
        let path = object_path(&object.path)?;
        let length = range.end - range.start;
        let limits = &self.inner.limits;
        let wanted = permits(length).min(permits(limits.in_flight_bytes_max));
        // Both semaphores live as long as `self` and are never closed; taken in one order only.
        let _bytes = self.inner.bytes.acquire_many(wanted).await;
        let _request = self.inner.requests.acquire().await;
        self.retried(&object.url(), limits.deadline(length), || {
            attempt(&*made.store, &path, object, range.clone(), &made.dialect)
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
