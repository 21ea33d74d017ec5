//! The server's switches over HTTP, for processes that do not hold the handle.
//!
//! | request | does |
//! |---|---|
//! | `GET /_stoa/counts` | the [`Snapshot`](super::Snapshot) as JSON |
//! | `GET /_stoa/log` | the list of [`Access`](super::Access) as JSON |
//! | `DELETE /_stoa/counts` | starts counting anew |
//! | `GET /_stoa/faults` | the [`FaultRule`]s in force |
//! | `PUT /_stoa/faults` | replaces them by the JSON list in the body |
//! | `PUT /_stoa/habits` | takes the [`Habits`] in the JSON body |

use std::sync::Arc;

use axum::Router;
use axum::error_handling::HandleError;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use s3s::HttpError;
use s3s::service::S3Service;
use serde::Serialize;

use super::Shared;
use super::faults::FaultRule;
use super::habits::{Habits, redress};

/// The admin endpoint in front of the S3 service.
pub(crate) fn router(shared: Arc<Shared>, service: S3Service) -> Router {
    let service = HandleError::new(service, |error: HttpError| async move {
        tracing::warn!(?error, "an S3 request failed below S3");
        StatusCode::INTERNAL_SERVER_ERROR
    });
    Router::new()
        .route("/_stoa/counts", get(counts).delete(forget))
        .route("/_stoa/log", get(log))
        .route("/_stoa/faults", get(faults).put(set_faults))
        .route("/_stoa/habits", axum::routing::put(set_habits))
        .with_state(Arc::clone(&shared))
        .fallback_service(service)
        .layer(axum::middleware::from_fn_with_state(shared, redress))
}

fn json(value: &impl Serialize) -> Response {
    match serde_json::to_string(value) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn counts(State(shared): State<Arc<Shared>>) -> Response {
    json(&shared.ledger.snapshot())
}

async fn log(State(shared): State<Arc<Shared>>) -> Response {
    json(&shared.ledger.log())
}

async fn forget(State(shared): State<Arc<Shared>>) -> StatusCode {
    shared.ledger.forget();
    StatusCode::NO_CONTENT
}

async fn faults(State(shared): State<Arc<Shared>>) -> Response {
    json(&shared.faults.rules())
}

async fn set_faults(State(shared): State<Arc<Shared>>, body: String) -> Response {
    match serde_json::from_str::<Vec<FaultRule>>(&body) {
        Ok(rules) => {
            shared.faults.set(rules);
            StatusCode::NO_CONTENT.into_response()
        }
        Err(error) => {
            let text = format!("expected a JSON list of fault rules: {error}\n");
            (StatusCode::BAD_REQUEST, text).into_response()
        }
    }
}

async fn set_habits(State(shared): State<Arc<Shared>>, body: String) -> Response {
    match serde_json::from_str::<Habits>(&body) {
        Ok(habits) => {
            shared.habits.set(habits);
            StatusCode::NO_CONTENT.into_response()
        }
        Err(error) => {
            let text = format!("expected habits as JSON: {error}\n");
            (StatusCode::BAD_REQUEST, text).into_response()
        }
    }
}
