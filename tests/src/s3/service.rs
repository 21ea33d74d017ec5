//! The wrapper of the `S3` trait: honest etags, preconditions, counts and faults around `s3s-fs`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use axum::http::{HeaderMap, HeaderValue, header};
use bytes::Bytes;
use futures::stream;
use s3s::dto::*;
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;

use super::Shared;
use super::faults::{Effect, Fate};
use super::habits::{bare_token, condition, dressed_token, is_quoted};
use super::ledger::{Access, Kind};

/// How many bytes of a body are read from the file at a time.
const PIECE_BYTES: u64 = 256 << 10;

/// `s3s-fs` with the truth about contents. See the module above for what it adds.
pub(crate) struct Honest {
    files: FileSystem,
    shared: Arc<Shared>,
}

/// A content that is open: what is served is what was looked at, even if the key is overwritten.
struct Opened {
    file: Arc<File>,
    size: u64,
    modified: Timestamp,
    etag: ETag,
}

/// A request between its arrival and its line in the ledger.
struct Request<'a> {
    shared: &'a Shared,
    access: Access,
    fate: Fate,
}

impl Honest {
    pub(crate) fn new(files: FileSystem, shared: Arc<Shared>) -> Honest {
        Honest { files, shared }
    }

    /// Notes a request, lets it wait if it has to, and answers it with an error if it has to.
    async fn arrive(&self, kind: Kind, bucket: &str, key: &str) -> S3Result<Request<'_>> {
        let fate = self.shared.faults.decide(kind, key);
        let request = Request {
            shared: &self.shared,
            access: Access {
                kind,
                bucket: bucket.to_owned(),
                key: key.to_owned(),
                range: None,
                if_match: false,
                status: 200,
                bytes: 0,
            },
            fate,
        };
        if !fate.delay.is_zero() {
            tokio::time::sleep(fate.delay).await;
        }
        match fate.effect {
            Some(Effect::Status(status)) => {
                let retry_after = self.shared.habits.get().retry_after;
                Err(request.refuse(injected(status, retry_after.as_deref())))
            }
            _ => Ok(request),
        }
    }

    /// Opens the file of a key and names its content.
    async fn open(&self, bucket: &str, key: &str) -> S3Result<Opened> {
        let path = object_path(&self.shared.root, bucket, key)
            .ok_or_else(|| s3_error!(NoSuchKey, "no object has this name"))?;
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            let file = File::open(&path)?;
            let metadata = file.metadata()?;
            if !metadata.is_file() {
                return Err(std::io::ErrorKind::NotFound.into());
            }
            Ok(Opened {
                etag: ETag::Strong(shared.etags.of(&path, &file)?),
                size: metadata.len(),
                modified: Timestamp::from(metadata.modified()?),
                file: Arc::new(file),
            })
        })
        .await
    }

    /// The etag of a key as it is now; `None` when it is not there.
    async fn etag(&self, bucket: &str, key: &str) -> S3Result<Option<ETag>> {
        match self.open(bucket, key).await {
            Ok(opened) => Ok(Some(opened.etag)),
            Err(error) if *error.code() == S3ErrorCode::NoSuchKey => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Request<'_> {
    /// Writes the line of a refused request.
    fn refuse(mut self, error: S3Error) -> S3Error {
        let status = error.status_code().or(error.code().status_code());
        self.access.status = status.map_or(500, |status| status.as_u16());
        self.shared.ledger.add(self.access);
        error
    }

    /// Writes the line of an answered request.
    fn answer<T>(mut self, result: S3Result<S3Response<T>>) -> S3Result<S3Response<T>> {
        match result {
            Ok(response) => {
                if let Some(status) = response.status {
                    self.access.status = status.as_u16();
                }
                self.shared.ledger.add(self.access);
                Ok(response)
            }
            Err(error) => Err(self.refuse(error)),
        }
    }
}

/// The error of an injected status.
fn injected(status: u16, retry_after: Option<&str>) -> S3Error {
    let code = match status {
        400 => S3ErrorCode::RequestTimeout,
        403 => S3ErrorCode::AccessDenied,
        404 => S3ErrorCode::NoSuchKey,
        503 => S3ErrorCode::SlowDown,
        _ => S3ErrorCode::InternalError,
    };
    let mut error = S3Error::with_message(code, "injected by the test");
    if let Ok(status) = axum::http::StatusCode::from_u16(status) {
        error.set_status_code(status);
    }
    if let Some(Ok(wait)) = retry_after.map(HeaderValue::from_str) {
        error.set_headers(HeaderMap::from_iter([(header::RETRY_AFTER, wait)]));
    }
    error
}

/// The file of a key; `None` for keys that would leave the bucket's directory.
fn object_path(root: &Path, bucket: &str, key: &str) -> Option<PathBuf> {
    let relative = Path::new(bucket).join(key);
    relative
        .components()
        .all(|component| matches!(component, Component::Normal(_)))
        .then(|| root.join(relative))
}

/// Runs file work off the async threads. A missing file is a missing key.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> S3Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
                s3_error!(NoSuchKey, "the key is not there")
            }
            _ => S3Error::with_source(S3ErrorCode::InternalError, Box::new(error)),
        }),
        Err(error) => Err(S3Error::with_source(
            S3ErrorCode::InternalError,
            Box::new(error),
        )),
    }
}

/// Checks `If-Match` (412) and `If-None-Match` (304 for reads) against a content.
fn check(
    etag: &ETag,
    if_match: Option<&ETagCondition>,
    if_none_match: Option<&ETagCondition>,
) -> S3Result<()> {
    if let Some(ETagCondition::ETag(wanted)) = if_match
        && !wanted.strong_cmp(etag)
    {
        return Err(s3_error!(
            PreconditionFailed,
            "at least one of the preconditions you specified did not hold"
        ));
    }
    let unwanted = match if_none_match {
        Some(ETagCondition::ETag(unwanted)) => unwanted.weak_cmp(etag),
        Some(ETagCondition::Any) => true,
        None => false,
    };
    if unwanted {
        return Err(s3_error!(NotModified));
    }
    Ok(())
}

/// The bytes `start..end` of a file as a body, cut by an error after `cut` bytes if given.
fn body(file: Arc<File>, start: u64, end: u64, cut: Option<u64>) -> StreamingBlob {
    let stop = cut.map_or(end, |cut| end.min(start + cut));
    let pieces = stream::unfold(Some(start), move |at| {
        let file = Arc::clone(&file);
        async move {
            let at = at?;
            if at == stop {
                let reset = || std::io::Error::other("connection cut by the test");
                return cut.map(|_| (Err(reset()), None));
            }
            let next = stop.min(at + PIECE_BYTES);
            let read = tokio::task::spawn_blocking(move || {
                let mut piece = vec![0; (next - at) as usize];
                file.read_exact_at(&mut piece, at)?;
                Ok(Bytes::from(piece))
            });
            let piece = read
                .await
                .unwrap_or_else(|error| Err(std::io::Error::other(error)));
            let after = piece.is_ok().then_some(next);
            Some((piece, after))
        }
    });
    StreamingBlob::wrap(pieces)
}

#[async_trait]
impl S3 for Honest {
    async fn get_object(
        &self,
        req: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        let is_quoted = is_quoted(&req.headers);
        let mut input = req.input;
        let habits = self.shared.habits.get();
        let mut request = self.arrive(Kind::Get, &input.bucket, &input.key).await?;
        request.access.if_match = input.if_match.is_some();
        if habits.ignores_ranges {
            input.range = None;
        }
        let result = async {
            let opened = self.open(&input.bucket, &input.key).await?;
            let if_match = condition(habits.conditions, input.if_match.as_ref(), is_quoted)?;
            check(&opened.etag, if_match, input.if_none_match.as_ref())?;
            let range = match input.range {
                Some(range) => range.check(opened.size)?,
                None => 0..opened.size,
            };
            Ok((opened, range))
        };
        let (opened, range) = match result.await {
            Ok(found) => found,
            Err(error) => return Err(request.refuse(error)),
        };
        let mut end = range.end;
        let mut cut = None;
        match request.fate.effect {
            Some(Effect::ShortBody(bytes)) => end = end.min(range.start + bytes),
            Some(Effect::ResetAfter(bytes)) => cut = Some(bytes),
            _ => {}
        }
        if input.range.is_some() {
            request.access.range = Some((range.start, range.end));
            request.access.status = 206;
        }
        request.access.bytes = (end - range.start).min(cut.unwrap_or(u64::MAX));
        let content_range = input
            .range
            .map(|_| format!("bytes {}-{}/{}", range.start, range.end - 1, opened.size));
        let output = GetObjectOutput {
            body: Some(body(opened.file, range.start, end, cut)),
            content_length: Some((end - range.start).cast_signed()),
            content_range,
            accept_ranges: Some("bytes".to_owned()),
            e_tag: habits.get_etags.dress(opened.etag),
            last_modified: Some(opened.modified),
            ..Default::default()
        };
        request.answer(Ok(S3Response::new(output)))
    }

    async fn head_object(
        &self,
        req: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let is_quoted = is_quoted(&req.headers);
        let input = req.input;
        let habits = self.shared.habits.get();
        let mut request = self.arrive(Kind::Head, &input.bucket, &input.key).await?;
        request.access.if_match = input.if_match.is_some();
        let result = async {
            let opened = self.open(&input.bucket, &input.key).await?;
            let if_match = condition(habits.conditions, input.if_match.as_ref(), is_quoted)?;
            check(&opened.etag, if_match, input.if_none_match.as_ref())?;
            Ok(S3Response::new(HeadObjectOutput {
                content_length: Some(opened.size.cast_signed()),
                accept_ranges: Some("bytes".to_owned()),
                e_tag: habits.get_etags.dress(opened.etag),
                last_modified: Some(opened.modified),
                ..Default::default()
            }))
        };
        let result = result.await;
        request.answer(result)
    }

    async fn list_objects_v2(
        &self,
        mut req: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let bucket = req.input.bucket.clone();
        let prefix = req.input.prefix.clone().unwrap_or_default();
        let request = self.arrive(Kind::List, &bucket, &prefix).await?;
        let habits = self.shared.habits.get();
        if habits.page_keys.is_some() {
            req.input.max_keys = habits.page_keys;
        }
        let is_first = req.input.continuation_token.is_none();
        let result = async {
            if let Some(token) = &mut req.input.continuation_token {
                *token = bare_token(token)?;
            }
            let mut response = self.files.list_objects_v2(req).await?;
            response.output.next_continuation_token =
                response.output.next_continuation_token.map(dressed_token);
            for object in response.output.contents.iter_mut().flatten() {
                let key = object.key.clone().unwrap_or_default();
                let etag = self.etag(&bucket, &key).await?;
                object.e_tag = etag.and_then(|etag| habits.list_etags.dress(etag));
            }
            if is_first {
                let beside = habits.listed_beside.into_iter().map(|key| Object {
                    size: Some(i64::from(!key.ends_with('/'))),
                    key: Some(key),
                    last_modified: Some(std::time::SystemTime::UNIX_EPOCH.into()),
                    ..Default::default()
                });
                let contents = response.output.contents.get_or_insert_default();
                contents.extend(beside);
            }
            Ok(response)
        };
        let result = result.await;
        request.answer(result)
    }

    async fn list_objects(
        &self,
        req: S3Request<ListObjectsInput>,
    ) -> S3Result<S3Response<ListObjectsOutput>> {
        let v2 = self.list_objects_v2(req.map_input(Into::into)).await?;
        Ok(v2.map_output(|v2| ListObjectsOutput {
            contents: v2.contents,
            common_prefixes: v2.common_prefixes,
            delimiter: v2.delimiter,
            encoding_type: v2.encoding_type,
            name: v2.name,
            prefix: v2.prefix,
            max_keys: v2.max_keys,
            is_truncated: v2.is_truncated,
            next_marker: v2.next_continuation_token,
            ..Default::default()
        }))
    }

    async fn put_object(
        &self,
        mut req: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        let request = self.arrive(Kind::Put, &bucket, &key).await?;
        let result = async {
            // s3s-fs would compare with what it remembers, not with what the file holds.
            if let Some(condition) = req.input.if_match.take() {
                match self.etag(&bucket, &key).await? {
                    Some(etag) => check(&etag, Some(&condition), None)?,
                    None => return Err(s3_error!(PreconditionFailed, "the key is not there")),
                }
            }
            let mut response = self.files.put_object(req).await?;
            response.output.e_tag = self.etag(&bucket, &key).await?;
            Ok(response)
        };
        let result = result.await;
        request.answer(result)
    }

    async fn copy_object(
        &self,
        req: S3Request<CopyObjectInput>,
    ) -> S3Result<S3Response<CopyObjectOutput>> {
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        let request = self.arrive(Kind::Put, &bucket, &key).await?;
        let result = async {
            let mut response = self.files.copy_object(req).await?;
            if let Some(copied) = &mut response.output.copy_object_result {
                copied.e_tag = self.etag(&bucket, &key).await?;
            }
            Ok(response)
        };
        let result = result.await;
        request.answer(result)
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        let request = self.arrive(Kind::Other, &bucket, &key).await?;
        let result = async {
            let mut response = self.files.complete_multipart_upload(req).await?;
            response.output.e_tag = self.etag(&bucket, &key).await?;
            Ok(response)
        };
        let result = result.await;
        request.answer(result)
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let request = self
            .arrive(Kind::Other, &req.input.bucket, &req.input.key)
            .await?;
        request.answer(self.files.create_multipart_upload(req).await)
    }

    async fn upload_part(
        &self,
        req: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let request = self
            .arrive(Kind::Put, &req.input.bucket, &req.input.key)
            .await?;
        request.answer(self.files.upload_part(req).await)
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let request = self
            .arrive(Kind::Other, &req.input.bucket, &req.input.key)
            .await?;
        request.answer(self.files.abort_multipart_upload(req).await)
    }

    async fn list_parts(
        &self,
        req: S3Request<ListPartsInput>,
    ) -> S3Result<S3Response<ListPartsOutput>> {
        let request = self
            .arrive(Kind::Other, &req.input.bucket, &req.input.key)
            .await?;
        request.answer(self.files.list_parts(req).await)
    }

    async fn delete_object(
        &self,
        req: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let request = self
            .arrive(Kind::Delete, &req.input.bucket, &req.input.key)
            .await?;
        request.answer(self.files.delete_object(req).await)
    }

    async fn delete_objects(
        &self,
        req: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let request = self.arrive(Kind::Delete, &req.input.bucket, "").await?;
        request.answer(self.files.delete_objects(req).await)
    }

    async fn create_bucket(
        &self,
        req: S3Request<CreateBucketInput>,
    ) -> S3Result<S3Response<CreateBucketOutput>> {
        let request = self.arrive(Kind::Other, &req.input.bucket, "").await?;
        request.answer(self.files.create_bucket(req).await)
    }

    async fn delete_bucket(
        &self,
        req: S3Request<DeleteBucketInput>,
    ) -> S3Result<S3Response<DeleteBucketOutput>> {
        let request = self.arrive(Kind::Other, &req.input.bucket, "").await?;
        request.answer(self.files.delete_bucket(req).await)
    }

    async fn head_bucket(
        &self,
        req: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        let request = self.arrive(Kind::Other, &req.input.bucket, "").await?;
        request.answer(self.files.head_bucket(req).await)
    }

    async fn list_buckets(
        &self,
        req: S3Request<ListBucketsInput>,
    ) -> S3Result<S3Response<ListBucketsOutput>> {
        let request = self.arrive(Kind::Other, "", "").await?;
        request.answer(self.files.list_buckets(req).await)
    }

    async fn get_bucket_location(
        &self,
        req: S3Request<GetBucketLocationInput>,
    ) -> S3Result<S3Response<GetBucketLocationOutput>> {
        let request = self.arrive(Kind::Other, &req.input.bucket, "").await?;
        request.answer(self.files.get_bucket_location(req).await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_stay_inside_their_bucket() {
        let root = Path::new("/root");
        assert_eq!(
            object_path(root, "b", "t/part-0.parquet"),
            Some(PathBuf::from("/root/b/t/part-0.parquet"))
        );
        assert_eq!(object_path(root, "b", "../../etc/passwd"), None);
        assert_eq!(object_path(root, "b", "/etc/passwd"), None);
        assert_eq!(object_path(root, "..", "x"), None);
    }

    #[test]
    fn preconditions_compare_strongly_for_match_and_weakly_for_none_match() {
        let etag = ETag::Strong("a".to_owned());
        let strong = ETagCondition::ETag(ETag::Strong("a".to_owned()));
        let weak = ETagCondition::ETag(ETag::Weak("a".to_owned()));
        let other = ETagCondition::ETag(ETag::Strong("b".to_owned()));
        assert!(check(&etag, Some(&strong), None).is_ok());
        assert!(check(&etag, Some(&ETagCondition::Any), None).is_ok());
        assert!(check(&etag, Some(&weak), None).is_err());
        assert!(check(&etag, Some(&other), None).is_err());
        assert!(check(&etag, None, Some(&weak)).is_err());
        assert!(check(&etag, None, Some(&other)).is_ok());
    }
}
