//! How stores of other makes speak S3: habits that a client meets in the field.

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::sync::{Arc, Mutex, MutexGuard};

use s3s::dto::ETag;
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
