//! What can go wrong between us and an object store.

use std::sync::Arc;
use std::time::Duration;

use crate::answer::Answer;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller should do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The store or the network failed; the same request may succeed later.
    Retry,
    /// The object is not the one that was asked for; look at it again.
    Changed,
    /// There is no such object.
    NotFound,
    /// A path, a store, a credential or a setting is wrong; somebody has to correct it.
    Config,
    /// Anything else, among it our own mistakes.
    Other,
}

/// Why a request to an object store was refused or failed.
///
/// Cloneable, because one failed request answers every caller that waited for it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// An object path that could leave its store's prefix, or that no store can hold.
    #[error(
        "invalid object path {path:?}: {reason}; expected a path inside its store such as \
         dir/file.parquet"
    )]
    InvalidPath {
        /// The path as given.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A table location that is neither a path nor a URL of a store.
    #[error(
        "invalid location {location:?}: {reason}; expected a path or a URL such as \
         s3://bucket/dir/"
    )]
    InvalidLocation {
        /// The location as given, without credentials.
        location: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A store that is neither registered nor of a known scheme.
    #[error("unknown store {store:?}; known are {}; configure the store or correct the location", known.join(", "))]
    UnknownStore {
        /// The store's root URL as asked for.
        store: String,
        /// The registered stores and the schemes that need no registration.
        known: Vec<String>,
    },
    /// A store whose settings do not make a client.
    #[error(
        "store {store} cannot be set up: {source}; check its settings and its environment variables"
    )]
    StoreSettings {
        /// The store's root URL.
        store: String,
        /// What the client's builder said.
        source: Arc<object_store::Error>,
    },
    /// A setting of a store that its client does not know.
    #[error("store {store} has no setting {key:?}; correct the key in the store's settings")]
    UnknownSetting {
        /// The store's root URL.
        store: String,
        /// The unknown key.
        key: String,
    },
    /// The object at this path has other content than the identity says.
    #[error("object {url} has changed: expected {expected}, found {found}; look at it again")]
    Changed {
        /// The object.
        url: String,
        /// Tag and size that were expected.
        expected: String,
        /// What the store has instead.
        found: String,
    },
    /// There is no object at this path.
    #[error("object {url} is not found")]
    NotFound {
        /// The object.
        url: String,
    },
    /// The store gives neither etag nor version, so nobody can say which bytes these are.
    #[error(
        "object {url} has neither etag nor version; an object without identity cannot be cached"
    )]
    NoIdentity {
        /// The object.
        url: String,
    },
    /// The store's answers do not say which content they are, and nothing else proves it.
    #[error(
        "nobody can say which content of {url} is read: the answer carries no etag, and the store \
         {conditions} If-Match; check whether a proxy drops the ETag header"
    )]
    Unidentified {
        /// The object.
        url: String,
        /// What the store does with conditions.
        conditions: &'static str,
    },
    /// The store sends whole objects where parts are asked for.
    #[error(
        "{url} cannot be read in parts: the store answers a range with the whole object; use a \
         store that honours the Range header"
    )]
    NoRanges {
        /// The object.
        url: String,
    },
    /// A store that would be asked in plain text without consent.
    #[error(
        "{url} would be asked for over plain http://, which its store does not allow; set \
         `allow_http = true` for the store (or AWS_ALLOW_HTTP=true), or use an https:// endpoint"
    )]
    PlainHttp {
        /// The object or prefix.
        url: String,
    },
    /// A store that answers a page of a listing with the same page.
    #[error(
        "listing {url} does not end: the store answers a continuation token with the same token"
    )]
    EndlessListing {
        /// The prefix.
        url: String,
    },
    /// A range that is reversed or reaches past the object's end; a mistake of the caller.
    #[error("range {start}..{end} of {url} is not within its {size} bytes")]
    InvalidRange {
        /// The object.
        url: String,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// The object's size.
        size: u64,
    },
    /// The body ended before, or went on after, the range that was asked for.
    #[error(
        "short body from {url}: expected {expected} bytes of {start}.., found {found}, after {attempts} attempts"
    )]
    ShortBody {
        /// The object.
        url: String,
        /// First byte of the range.
        start: u64,
        /// Bytes asked for.
        expected: u64,
        /// Bytes that came.
        found: u64,
        /// How often it was tried.
        attempts: u32,
    },
    /// The store did not answer in time.
    #[error("no answer from {url} within {timeout_ms} ms, after {attempts} attempts")]
    Timeout {
        /// The object or prefix.
        url: String,
        /// The deadline of one attempt.
        timeout_ms: u64,
        /// How often it was tried.
        attempts: u32,
    },
    /// The store answered with an error, as often as we were willing to ask.
    #[error("request to {url} failed after {attempts} attempts: {source}")]
    Request {
        /// The object or prefix.
        url: String,
        /// How often it was tried.
        attempts: u32,
        /// What the last answer was.
        source: Arc<object_store::Error>,
    },
    /// The store refused us, and will refuse again.
    #[error("request to {url} is refused: {source}; check the store's credentials and settings")]
    Refused {
        /// The object or prefix.
        url: String,
        /// What the store said.
        source: Arc<object_store::Error>,
    },
    /// A local file that could not be read.
    #[error("cannot read {url}: {source}")]
    File {
        /// The object.
        url: String,
        /// What the system said.
        source: Arc<std::io::Error>,
    },
    /// The runtime that made the request is shutting down.
    #[error("request to {url} was abandoned: the runtime is shutting down")]
    Abandoned {
        /// The object.
        url: String,
    },
}

impl Error {
    /// What the caller should do about this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::InvalidPath { .. }
            | Error::InvalidLocation { .. }
            | Error::UnknownStore { .. }
            | Error::StoreSettings { .. }
            | Error::UnknownSetting { .. }
            | Error::NoIdentity { .. }
            | Error::Unidentified { .. }
            | Error::NoRanges { .. }
            | Error::PlainHttp { .. }
            | Error::Refused { .. } => ErrorKind::Config,
            Error::Changed { .. } => ErrorKind::Changed,
            Error::NotFound { .. } => ErrorKind::NotFound,
            Error::ShortBody { .. }
            | Error::Timeout { .. }
            | Error::Request { .. }
            | Error::File { .. } => ErrorKind::Retry,
            Error::InvalidRange { .. } | Error::EndlessListing { .. } | Error::Abandoned { .. } => {
                ErrorKind::Other
            }
        }
    }

    /// The same error with the number of attempts that led to it.
    pub(crate) fn after(mut self, tried: u32) -> Error {
        if let Error::ShortBody { attempts, .. }
        | Error::Timeout { attempts, .. }
        | Error::Request { attempts, .. } = &mut self
        {
            *attempts = tried;
        }
        self
    }

    /// How long the store asks to be left alone before the next attempt.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Error::Request { source, .. } => Answer::within(&**source)?.retry_after(),
            _ => None,
        }
    }

    /// Sorts a store's error by what can be done about it.
    pub(crate) fn from_store(url: &str, error: object_store::Error) -> Error {
        use object_store::Error as E;
        let url = url.to_owned();
        match Answer::within(&error) {
            Some(Answer::WholeObject) => return Error::NoRanges { url },
            Some(Answer::PlainHttp) => return Error::PlainHttp { url },
            Some(answer) if !answer.passes() => {
                return Error::Refused {
                    url,
                    source: Arc::new(error),
                };
            }
            _ => {}
        }
        match error {
            E::NotFound { .. } => Error::NotFound { url },
            E::InvalidPath { source } => Error::InvalidPath {
                path: url,
                reason: source.to_string(),
            },
            E::Precondition { .. } | E::NotModified { .. } => Error::Changed {
                url,
                expected: "the known tag".into(),
                found: "another one (precondition failed)".into(),
            },
            error @ (E::PermissionDenied { .. }
            | E::Unauthenticated { .. }
            | E::UnknownConfigurationKey { .. }
            | E::NotSupported { .. }
            | E::NotImplemented { .. }) => Error::Refused {
                url,
                source: Arc::new(error),
            },
            error => Error::Request {
                url,
                attempts: 1,
                source: Arc::new(error),
            },
        }
    }
}
