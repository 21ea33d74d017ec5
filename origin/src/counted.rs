//! The one place where requests to stores are counted: a wrapper around each store.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
};

/// What was asked of the stores so far; a snapshot, each number by itself exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OriginCounters {
    /// Requests for bytes, retries included.
    pub get_requests: u64,
    /// Listings, retries included; of stores over the network each page.
    pub list_requests: u64,
    /// Requests for an object's identity, retries included.
    pub head_requests: u64,
    /// Bytes that the answered requests promised.
    pub bytes: u64,
    /// Attempts after the first.
    pub retries: u64,
    /// Objects that turned out to have changed.
    pub changed: u64,
}

impl OriginCounters {
    /// All requests to stores together.
    pub fn requests(&self) -> u64 {
        self.get_requests + self.list_requests + self.head_requests
    }
}

/// The live counters behind [`OriginCounters`], shared by all stores of one set.
///
/// Relaxed everywhere: they order nothing, and each is read by itself.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    get_requests: AtomicU64,
    list_requests: AtomicU64,
    head_requests: AtomicU64,
    bytes: AtomicU64,
    retries: AtomicU64,
    changed: AtomicU64,
}

impl Counters {
    pub(crate) fn snapshot(&self) -> OriginCounters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        OriginCounters {
            get_requests: load(&self.get_requests),
            list_requests: load(&self.list_requests),
            head_requests: load(&self.head_requests),
            bytes: load(&self.bytes),
            retries: load(&self.retries),
            changed: load(&self.changed),
        }
    }

    pub(crate) fn retried(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn found_changed(&self) {
        self.changed.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn listed(&self) {
        self.list_requests.fetch_add(1, Ordering::Relaxed);
    }
}

/// A store whose requests are counted. Behaves as the store it wraps in every other respect.
#[derive(Debug)]
pub(crate) struct CountedStore {
    inner: Arc<dyn ObjectStore>,
    counters: Arc<Counters>,
}

impl CountedStore {
    pub(crate) fn new(inner: Arc<dyn ObjectStore>, counters: Arc<Counters>) -> Self {
        CountedStore { inner, counters }
    }
}

impl fmt::Display for CountedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for CountedStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        let counter = if head {
            &self.counters.head_requests
        } else {
            &self.counters.get_requests
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let result = self.inner.get_opts(location, options).await?;
        if !head {
            let bytes = result.range.end.saturating_sub(result.range.start);
            self.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        Ok(result)
    }

    // Counted as one request a range that the store is asked for: the stores over HTTP would
    // coalesce in here, where nobody can see it, so it is done before, in the open.
    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        object_store::coalesce_ranges(
            ranges,
            |range| async move {
                let options = GetOptions::new().with_range(Some(range));
                self.get_opts(location, options).await?.bytes().await
            },
            object_store::OBJECT_STORE_COALESCE_DEFAULT,
        )
        .await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.counters.listed();
        self.inner.list(prefix)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.counters.listed();
        self.inner.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.counters.listed();
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.inner.rename_opts(from, to, options).await
    }
}
