//! The HTTP side: `/metrics` and `/healthz`, both read-only.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::address::Listen;
use crate::error::Result;
use crate::listen::Server;
use crate::metrics::MetricsRegistry;

const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPENMETRICS_TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What `/healthz` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// 200: all is well.
    Healthy,
    /// 200: serving, but an operator should look.
    Degraded(String),
    /// 503: restart it, or send nobody here.
    Unhealthy(String),
}

#[derive(Clone)]
struct Shared {
    metrics: MetricsRegistry,
    health: Arc<dyn Fn() -> Health + Send + Sync>,
}

/// Serves `/metrics` and `/healthz` until the handle is shut down or dropped. `health` is asked at
/// every request and must not block. Fails as [`crate::serve_grpc`].
pub async fn serve_http(
    listen: &Listen,
    metrics: MetricsRegistry,
    health: impl Fn() -> Health + Send + Sync + 'static,
) -> Result<Server> {
    let app = Router::new()
        .route("/metrics", get(show_metrics))
        .route("/healthz", get(show_health))
        .with_state(Shared {
            metrics,
            health: Arc::new(health),
        });
    Server::start(listen, |listener, stopped| async move {
        let stop = async {
            let _ = stopped.await;
        };
        if let Err(error) = axum::serve(listener, app)
            .with_graceful_shutdown(stop)
            .await
        {
            tracing::error!(%error, "HTTP serving ended");
        }
    })
    .await
}

async fn show_metrics(State(shared): State<Shared>, headers: HeaderMap) -> Response {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok());
    let openmetrics = accept.is_some_and(|accept| accept.contains("application/openmetrics-text"));
    let (kind, text) = if openmetrics {
        (OPENMETRICS_TEXT, shared.metrics.openmetrics_text())
    } else {
        (PROMETHEUS_TEXT, shared.metrics.prometheus_text())
    };
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn show_health(State(shared): State<Shared>) -> Response {
    match (shared.health)() {
        Health::Healthy => (StatusCode::OK, "ok\n".to_owned()),
        Health::Degraded(reason) => (StatusCode::OK, format!("degraded: {reason}\n")),
        Health::Unhealthy(reason) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("unhealthy: {reason}\n"),
        ),
    }
    .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metric;
    use std::sync::Mutex;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn get(server: &Server, path: &str, accept: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(server.address())
            .await
            .unwrap();
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn metrics_and_health_over_a_real_socket() {
        let metrics = MetricsRegistry::new("worker");
        metrics.observe(|| vec![Metric::counter("chunks_fetched", "Fetched").value(2u64)]);
        let health = Arc::new(Mutex::new(Health::Healthy));
        let asked = health.clone();
        let server = serve_http(&Listen::loopback(0), metrics, move || {
            asked.lock().unwrap().clone()
        })
        .await
        .unwrap();

        let plain = get(&server, "/metrics", "*/*").await;
        assert!(plain.starts_with("HTTP/1.1 200"), "{plain}");
        assert!(
            plain.contains("content-type: text/plain; version=0.0.4; charset=utf-8"),
            "{plain}"
        );
        assert!(
            plain.contains("\nstoa_chunks_fetched_total 2.0\n"),
            "{plain}"
        );
        let open = get(
            &server,
            "/metrics",
            "application/openmetrics-text;version=1.0.0,*/*;q=0.1",
        )
        .await;
        assert!(
            open.contains("content-type: application/openmetrics-text"),
            "{open}"
        );
        assert!(open.contains("# EOF"), "{open}");

        assert!(
            get(&server, "/healthz", "*/*")
                .await
                .ends_with("\r\n\r\nok\n")
        );
        *health.lock().unwrap() = Health::Degraded("readers keep 3 GiB".into());
        let degraded = get(&server, "/healthz", "*/*").await;
        assert!(
            degraded.starts_with("HTTP/1.1 200")
                && degraded.ends_with("degraded: readers keep 3 GiB\n"),
            "{degraded}"
        );
        *health.lock().unwrap() = Health::Unhealthy("the cache directory is gone".into());
        let unhealthy = get(&server, "/healthz", "*/*").await;
        assert!(unhealthy.starts_with("HTTP/1.1 503"), "{unhealthy}");

        assert!(get(&server, "/", "*/*").await.starts_with("HTTP/1.1 404"));
        server.shutdown().await;
    }

    #[tokio::test]
    async fn others_cannot_reach_it_unless_told() {
        let open = Listen {
            address: "0.0.0.0:0".parse().unwrap(),
            insecure: false,
        };
        let refused = serve_http(&open, MetricsRegistry::new("worker"), || Health::Healthy).await;
        assert!(matches!(refused, Err(crate::Error::InsecureAddress { .. })));
        let open = Listen {
            insecure: true,
            ..open
        };
        serve_http(&open, MetricsRegistry::new("worker"), || Health::Healthy)
            .await
            .unwrap();
    }
}
