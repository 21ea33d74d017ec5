//! How stores of other makes speak S3: habits that a client meets in the field.

use std::sync::{Arc, Mutex, MutexGuard};

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use s3s::dto::{ETag, ETagCondition};
use s3s::{S3Result, s3_error};
use serde::{Deserialize, Serialize};

use super::Shared;

/// How an etag is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EtagStyle {
    /// `"a"`, as the standard has it.
    #[default]
    Quoted,
    /// `a`, without its quotes.
    Bare,
    /// `W/"a"`, as compressing proxies write it.
    Weak,
    /// Not at all.
    Missing,
}

/// What becomes of `If-Match` on reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Conditions {
    /// It is compared.
    #[default]
    Checked,
    /// Quoted, as the standard has it, it never matches.
    Unquoted,
    /// It is answered with 501.
    Refused,
    /// It is not looked at.
    Ignored,
}

/// The habits of a store. By default it has none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Habits {
    /// How listings write etags.
    pub list_etags: EtagStyle,
    /// How GET and HEAD write them.
    pub get_etags: EtagStyle,
    /// What becomes of conditions.
    pub conditions: Conditions,
    /// Whether a range is answered with the whole object.
    pub ignores_ranges: bool,
    /// How many keys a page of a listing has at most.
    pub page_keys: Option<i32>,
    /// The Retry-After of every injected error.
    pub retry_after: Option<String>,
    /// Keys that listings name, although they are none that a file can have.
    pub listed_beside: Vec<String>,
}

/// The habits in force.
#[derive(Debug, Default)]
pub(crate) struct Current(Mutex<Habits>);

impl Current {
    pub(crate) fn set(&self, habits: Habits) {
        *self.lock() = habits;
    }

    pub(crate) fn get(&self) -> Habits {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Habits> {
        self.0.lock().unwrap_or_else(|broken| broken.into_inner())
    }
}

impl EtagStyle {
    /// The etag as `s3s` can write it, the rest is left to [`redress`]: it always quotes, and
    /// knows no weak one in a listing.
    pub(crate) fn dress(self, etag: ETag) -> Option<ETag> {
        match (self, etag) {
            (EtagStyle::Missing, _) => None,
            (EtagStyle::Weak, ETag::Strong(text)) => Some(ETag::Weak(text)),
            (_, etag) => Some(etag),
        }
    }
}

/// Rewrites etags on their way out, where that is the store's habit.
pub(crate) async fn redress(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    let habits = shared.habits.get();
    let mut response = next.run(request).await;
    if habits.get_etags == EtagStyle::Bare
        && let Some(Ok(etag)) = response
            .headers()
            .get(header::ETAG)
            .map(|etag| etag.to_str())
        && let Ok(bare) = HeaderValue::from_str(etag.trim_matches('"'))
    {
        response.headers_mut().insert(header::ETAG, bare);
    }
    let is_xml = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/xml"));
    let (open, close) = match habits.list_etags {
        EtagStyle::Bare => ("<ETag>", "</ETag>"),
        EtagStyle::Weak => ("<ETag>W/&quot;", "&quot;</ETag>"),
        EtagStyle::Quoted | EtagStyle::Missing => return response,
    };
    if !is_xml {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let Ok(body) = to_bytes(body, usize::MAX).await else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let text = String::from_utf8_lossy(&body)
        .replace("<ETag>&quot;", open)
        .replace("&quot;</ETag>", close)
        .replace("<ETag>\"", open)
        .replace("\"</ETag>", close);
    parts.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(parts, Body::from(text))
}

/// Whether `If-Match` is written as the standard has it, which `s3s` does not insist on.
pub(crate) fn is_quoted(headers: &HeaderMap) -> bool {
    let text = headers.get(header::IF_MATCH).map(HeaderValue::as_bytes);
    text.is_some_and(|text| text.starts_with(b"\"") || text.starts_with(b"W/") || text == b"*")
}

/// What is left to compare of an `If-Match` under these habits.
pub(crate) fn condition(
    habit: Conditions,
    if_match: Option<&ETagCondition>,
    is_quoted: bool,
) -> S3Result<Option<&ETagCondition>> {
    match (habit, if_match) {
        (Conditions::Ignored, _) | (_, None) => Ok(None),
        (Conditions::Checked, _) if !is_quoted => Err(s3_error!(PreconditionFailed, "unquoted")),
        (Conditions::Checked, condition) => Ok(condition),
        (Conditions::Unquoted, Some(_)) => Err(s3_error!(PreconditionFailed, "quoted")),
        (Conditions::Refused, Some(_)) => Err(s3_error!(NotImplemented, "If-Match is unknown")),
    }
}

/// A continuation token with what is lost where it is encoded once too little or too often.
pub(crate) fn dressed_token(token: String) -> String {
    format!("+{token}%2B=")
}

pub(crate) fn bare_token(token: &str) -> S3Result<String> {
    let bare = token
        .strip_prefix('+')
        .and_then(|rest| rest.strip_suffix("%2B="));
    Ok(bare.ok_or_else(|| s3_error!(InvalidToken))?.to_owned())
}
