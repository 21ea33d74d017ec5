//! One request for bytes of one content, checked in every respect before they are believed.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, GetResult, GetResultPayload, ObjectStore};

use crate::dialect::{Dialect, Difference, difference};
use crate::error::{Error, Result};
use crate::identity::{ObjectIdentity, ObjectTag};

/// The bytes of `range` of exactly this content, in one request where the store takes conditions
/// as most do; where its answer could mean several things, it is asked what it meant.
pub(crate) async fn attempt(
    store: &dyn ObjectStore,
    path: &Path,
    object: &ObjectIdentity,
    range: Range<u64>,
    dialect: &Dialect,
) -> Result<Bytes> {
    let url = object.url();
    let ask = |if_match: Option<String>| {
        let mut options = GetOptions::new().with_range(Some(GetRange::Bounded(range.clone())));
        options.if_match = if_match;
        if let ObjectTag::Version(version) = &object.tag {
            options.version = Some(version.clone());
        }
        store.get_opts(path, options)
    };
    let sent = dialect.if_match(&object.tag);
    let has_condition = sent.is_some();
    let mut is_checked = has_condition;
    let result = match ask(sent).await {
        Err(refusal) if has_condition && dialect.may_be_habit(&refusal) => {
            dialect.look(store, path, object, refusal).await?;
            is_checked = false;
            ask(None).await
        }
        result => result,
    };
    let changed = |found: String| Error::Changed {
        url: url.clone(),
        expected: object.content(),
        found,
    };
    let result = result.map_err(|error| match Error::from_store(&url, error) {
        Error::Changed { found, .. } => changed(found),
        error => error,
    })?;
    match difference(object, &result.meta) {
        Difference::None => {}
        Difference::Other(found) => return Err(changed(found)),
        Difference::Unsaid => dialect.prove(store, path, object, is_checked).await?,
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
