//! How a store takes conditions: what is sent to it, and what was learnt from its answers.
//!
//! Stores that speak S3 differ in what they make of `If-Match`. Most check it. Some list etags
//! without quotes and want them quoted in the header, or the other way round; some refuse the
//! header; some ignore it, and proxies drop the etag from answers. None of that is a change of an
//! object, and in none of it may other bytes pass for those that were asked for: an answer is
//! believed when it carries the expected etag, or when it carries none and the store was seen to
//! refuse a condition that does not hold.

use std::sync::atomic::{AtomicU8, Ordering};

use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore};

use crate::answer::Answer;
use crate::error::{Error, Result};
use crate::identity::{ObjectIdentity, ObjectTag, bare_etag};

/// What is known of a store's `If-Match`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Conditions {
    /// Nothing yet. It is sent.
    Untried = 0,
    /// A condition that does not hold is refused. It is sent, and an answer to it needs no etag.
    Checked = 1,
    /// A condition that holds is refused too. It is not sent; answers are compared.
    Refused = 2,
    /// A condition that does not hold is answered. It is sent, and proves nothing.
    Ignored = 3,
}

/// An etag that no object has.
const NO_ETAG: &str = "\"stoa-asks-whether-this-is-checked\"";

/// What one store was found to do, for the life of the process.
#[derive(Debug)]
pub(crate) struct Dialect {
    /// Whether etags travel in a header, where they are quoted.
    is_http: bool,
    conditions: AtomicU8,
    /// Whoever asks the store whether it checks conditions, so that it is asked once.
    asking: tokio::sync::Mutex<()>,
}

impl Dialect {
    pub(crate) fn new(is_http: bool) -> Dialect {
        Dialect {
            is_http,
            conditions: AtomicU8::new(Conditions::Untried as u8),
            asking: tokio::sync::Mutex::default(),
        }
    }

    // Relaxed: it is a hint that orders nothing, and each answer is checked by itself.
    fn conditions(&self) -> Conditions {
        match self.conditions.load(Ordering::Relaxed) {
            1 => Conditions::Checked,
            2 => Conditions::Refused,
            3 => Conditions::Ignored,
            _ => Conditions::Untried,
        }
    }

    fn learnt(&self, store: &str, conditions: Conditions) {
        if self.conditions() != conditions {
            tracing::info!(store, ?conditions, "how the store takes If-Match");
        }
        self.conditions.store(conditions as u8, Ordering::Relaxed);
    }

    /// The `If-Match` to send with a request for this content.
    pub(crate) fn if_match(&self, tag: &ObjectTag) -> Option<String> {
        if_match(tag, self.conditions(), self.is_http)
    }

    /// Whether the refusal of a request that carried a condition may be the store's way with
    /// conditions rather than a changed object; then the object has to be looked at.
    pub(crate) fn may_be_habit(&self, error: &object_store::Error) -> bool {
        match error {
            object_store::Error::Precondition { .. } => self.conditions() != Conditions::Checked,
            object_store::Error::NotImplemented { .. } => true,
            error => Answer::within(error).is_some_and(Answer::may_mean_the_condition),
        }
    }

    /// Looks at the object after such a `refusal`. `Ok` when it is as expected: then the store
    /// gets no conditions any more, and the caller asks without.
    ///
    /// # Errors
    /// [`Error::Changed`] when it is another one, else what stands in the way of knowing.
    pub(crate) async fn look(
        &self,
        store: &dyn ObjectStore,
        path: &Path,
        object: &ObjectIdentity,
        refusal: object_store::Error,
    ) -> Result<()> {
        let url = object.url();
        let head = store
            .get_opts(path, GetOptions::new().with_head(true))
            .await;
        let is_precondition = matches!(refusal, object_store::Error::Precondition { .. });
        match head.map(|head| difference(object, &head.meta)) {
            Ok(Difference::None) => {
                self.learnt(&object.store, Conditions::Refused);
                Ok(())
            }
            Ok(Difference::Other(found)) => Err(Error::Changed {
                url,
                expected: object.content(),
                found,
            }),
            Ok(Difference::Unsaid) if !is_precondition => Err(unidentified(url, "refuses")),
            Err(error @ object_store::Error::NotFound { .. }) => {
                Err(Error::from_store(&url, error))
            }
            // Nothing contradicts the store's own word, or says what its refusal meant.
            Ok(Difference::Unsaid) | Err(_) => Err(match Error::from_store(&url, refusal) {
                Error::Changed { url, found, .. } => Error::Changed {
                    url,
                    expected: object.content(),
                    found,
                },
                error => error,
            }),
        }
    }

    /// Whether an answer without etag to a request with `sent` is the content that was asked for:
    /// only where the store refuses a condition that does not hold, which it is asked once.
    ///
    /// # Errors
    /// [`Error::Unidentified`], and what requests can fail with.
    pub(crate) async fn prove(
        &self,
        store: &dyn ObjectStore,
        path: &Path,
        object: &ObjectIdentity,
        sent: bool,
    ) -> Result<()> {
        if !sent {
            let why = match self.conditions() {
                Conditions::Refused => "refuses",
                _ => "cannot check a weak etag by",
            };
            return Err(unidentified(object.url(), why));
        }
        let _turn = self.asking.lock().await;
        match self.conditions() {
            Conditions::Checked => return Ok(()),
            Conditions::Ignored => return Err(unidentified(object.url(), "ignores")),
            Conditions::Refused | Conditions::Untried => {}
        }
        let mut options = GetOptions::new().with_range(Some(GetRange::Bounded(0..1)));
        options.if_match = Some(NO_ETAG.to_owned());
        match store.get_opts(path, options).await {
            Err(object_store::Error::Precondition { .. }) => {
                self.learnt(&object.store, Conditions::Checked);
                Ok(())
            }
            Ok(_) => {
                self.learnt(&object.store, Conditions::Ignored);
                Err(unidentified(object.url(), "ignores"))
            }
            Err(error) => Err(Error::from_store(&object.url(), error)),
        }
    }
}

fn unidentified(url: String, conditions: &'static str) -> Error {
    Error::Unidentified { url, conditions }
}

fn if_match(tag: &ObjectTag, conditions: Conditions, is_http: bool) -> Option<String> {
    match tag {
        _ if conditions == Conditions::Refused => None,
        // A weak etag never matches an If-Match, so for it only the answer's is compared.
        ObjectTag::Etag(etag) if etag.starts_with("W/") => None,
        ObjectTag::Etag(etag) if is_http && !etag.starts_with('"') => Some(format!("\"{etag}\"")),
        ObjectTag::Etag(etag) => Some(etag.clone()),
        ObjectTag::Version(_) => None,
    }
}

/// What an answer says about its content, beside what was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// It is the expected one.
    None,
    /// It is another one, this.
    Other(String),
    /// The answer carries nothing to tell by.
    Unsaid,
}

pub(crate) fn difference(object: &ObjectIdentity, meta: &ObjectMeta) -> Difference {
    let found_tag = match (&object.tag, &meta.e_tag, &meta.version) {
        (ObjectTag::Etag(expected), Some(found), _) if bare_etag(expected) == bare_etag(found) => {
            None
        }
        (ObjectTag::Etag(_), Some(found), _) => Some(format!("etag {found}")),
        (ObjectTag::Etag(_), None, _) if meta.size == object.size => return Difference::Unsaid,
        (ObjectTag::Etag(_), None, _) => Some("no etag".to_owned()),
        (ObjectTag::Version(expected), _, Some(found)) if expected != found => {
            Some(format!("version {found}"))
        }
        // The version was asked for by name; it is immutable.
        (ObjectTag::Version(_), _, _) => None,
    };
    match found_tag {
        Some(tag) => Difference::Other(format!("{tag}, {} bytes", meta.size)),
        None if meta.size != object.size => {
            Difference::Other(format!("{}, {} bytes", object.tag, meta.size))
        }
        None => Difference::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etag(text: &str) -> ObjectTag {
        ObjectTag::Etag(text.to_owned())
    }

    #[test]
    fn a_condition_is_quoted_where_it_travels_in_a_header() {
        let sent = |tag: &str, is_http| if_match(&etag(tag), Conditions::Untried, is_http);
        assert_eq!(sent("\"a\"", true).as_deref(), Some("\"a\""));
        assert_eq!(sent("a", true).as_deref(), Some("\"a\""));
        // Not HTTP: such stores compare text with text.
        assert_eq!(sent("a", false).as_deref(), Some("a"));
        assert_eq!(sent("W/\"a\"", true), None);
        let version = ObjectTag::Version("7".to_owned());
        assert_eq!(if_match(&version, Conditions::Untried, true), None);
    }

    #[test]
    fn a_store_that_refuses_conditions_gets_none() {
        let sent = |conditions| if_match(&etag("\"a\""), conditions, true);
        assert!(sent(Conditions::Checked).is_some());
        assert!(sent(Conditions::Ignored).is_some());
        assert_eq!(sent(Conditions::Refused), None);
    }

    #[test]
    fn an_answer_without_etag_is_neither_the_same_nor_another_one() {
        let object = ObjectIdentity {
            store: "s3://b".into(),
            path: "a".into(),
            tag: etag("\"x\""),
            size: 3,
        };
        let meta = |e_tag: Option<&str>, size| ObjectMeta {
            location: "a".into(),
            last_modified: Default::default(),
            size,
            e_tag: e_tag.map(str::to_owned),
            version: None,
        };
        assert_eq!(difference(&object, &meta(Some("x"), 3)), Difference::None);
        assert_eq!(difference(&object, &meta(None, 3)), Difference::Unsaid);
        let other = |text: &str| Difference::Other(text.to_owned());
        assert_eq!(
            difference(&object, &meta(None, 4)),
            other("no etag, 4 bytes")
        );
        assert_eq!(
            difference(&object, &meta(Some("\"y\""), 3)),
            other("etag \"y\", 3 bytes")
        );
    }
}
