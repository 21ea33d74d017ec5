//! HTTP clients for stores: object_store's own, except that redirects are refused, and that
//! answers which are no content keep their meaning.
//!
//! A store's address comes from local configuration. A redirect would let whoever answers there
//! send us, and what we sign, somewhere else.

use std::time::SystemTime;

use async_trait::async_trait;
use object_store::client::{
    ClientConfigKey, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest,
    HttpResponse, HttpService,
};
use object_store::{ClientOptions, Error, Result};
use reqwest::header::{RANGE, RETRY_AFTER};

use crate::answer::Answer;

/// Makes HTTP clients that follow no redirect.
#[derive(Debug)]
pub(crate) struct NoRedirectConnector {
    /// Whether answers that are no content become errors that hold an [`Answer`]: for callers who
    /// understand it. Others get what object_store makes of them.
    pub(crate) tells_answers: bool,
}

/// A client whose answers are content, or an [`Answer`] as the error, or one of the few statuses
/// that object_store itself tells apart.
#[derive(Debug)]
struct Plain {
    client: HttpClient,
    allow_http: bool,
    tells_answers: bool,
}

#[async_trait]
impl HttpService for Plain {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        // Of this kind object_store's own retries ask no second time.
        let none = |answer| Err(HttpError::new(HttpErrorKind::Unknown, answer));
        if !self.allow_http && request.uri().scheme_str() == Some("http") {
            return none(Answer::PlainHttp);
        }
        let has_range = request.headers().contains_key(RANGE);
        let response = self.client.execute(request).await?;
        let status = response.status().as_u16();
        if !self.tells_answers {
            return Ok(response);
        }
        if has_range && status == 200 {
            return none(Answer::WholeObject);
        }
        if Answer::is_passed_on(status) {
            return Ok(response);
        }
        let header = response.headers().get(RETRY_AFTER);
        let retry_after = header.and_then(|text| Some(text.to_str().ok()?.to_owned()));
        let body = response.into_body().bytes().await.unwrap_or_default();
        let body = String::from_utf8_lossy(&body);
        none(Answer::of_status(
            status,
            &body,
            retry_after.as_deref(),
            SystemTime::now(),
        ))
    }
}

impl HttpConnector for NoRedirectConnector {
    fn connect(&self, options: &ClientOptions) -> Result<HttpClient> {
        let value = |key: ClientConfigKey| options.get_config_value(&key);
        let is_set = |key| value(key).as_deref() == Some("true");
        let allow_http = is_set(ClientConfigKey::AllowHttp);
        let duration = |key| value(key).and_then(|text| humantime::parse_duration(&text).ok());

        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("stoa/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .https_only(!allow_http);
        if let Some(headers) = options.get_default_headers() {
            builder = builder.default_headers(headers.clone());
        }
        if let Some(proxy) = value(ClientConfigKey::ProxyUrl) {
            let mut proxy = reqwest::Proxy::all(proxy).map_err(client_error)?;
            if let Some(excludes) = value(ClientConfigKey::ProxyExcludes) {
                proxy = proxy.no_proxy(reqwest::NoProxy::from_string(&excludes));
            }
            builder = builder.proxy(proxy);
        }
        // Of every wait for bytes, not of the whole body: a large body may take its time.
        if let Some(timeout) = duration(ClientConfigKey::Timeout) {
            builder = builder.read_timeout(timeout);
        }
        if let Some(timeout) = duration(ClientConfigKey::ConnectTimeout) {
            builder = builder.connect_timeout(timeout);
        }
        if let Some(timeout) = duration(ClientConfigKey::PoolIdleTimeout) {
            builder = builder.pool_idle_timeout(timeout);
        }
        let idle = value(ClientConfigKey::PoolMaxIdlePerHost).and_then(|max| max.parse().ok());
        if let Some(max) = idle {
            builder = builder.pool_max_idle_per_host(max);
        }
        if is_set(ClientConfigKey::Http1Only) {
            builder = builder.http1_only();
        }
        if is_set(ClientConfigKey::Http2Only) {
            builder = builder.http2_prior_knowledge();
        }
        if is_set(ClientConfigKey::AllowInvalidCertificates) {
            builder = builder.danger_accept_invalid_certs(true);
        }
        // A compressed body has another length than the range that was asked for.
        builder = builder.no_gzip().no_brotli().no_zstd().no_deflate();
        let client = HttpClient::new(builder.build().map_err(client_error)?);
        Ok(HttpClient::new(Plain {
            client,
            allow_http,
            tells_answers: self.tells_answers,
        }))
    }
}

fn client_error(error: reqwest::Error) -> Error {
    Error::Generic {
        store: "HTTP client",
        source: Box::new(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    /// A server that answers everything with a redirect must not be followed.
    #[tokio::test]
    async fn redirects_are_refused() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let target = elsewhere.local_addr().unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                let answer = format!(
                    "HTTP/1.1 302 Found\r\nLocation: http://{target}/x\r\nContent-Length: 0\r\n\
                     Connection: close\r\n\r\n"
                );
                stream.write_all(answer.as_bytes()).ok();
            }
        });
        let stores = crate::Stores::new(crate::StoreSettings::default());
        let limits = crate::OriginLimits {
            attempts: 1,
            ..Default::default()
        };
        let origin = crate::Origin::new(stores, limits);
        let error = origin
            .head(&format!("http://{address}"), "x")
            .await
            .unwrap_err();
        assert!(matches!(error, crate::Error::Refused { .. }), "{error:?}");
        assert!(error.to_string().contains("302"), "{error}");
        elsewhere.set_nonblocking(true).unwrap();
        assert!(elsewhere.accept().is_err(), "the redirect was followed");
    }
}
