//! Slowness on purpose: a transport with the latency and the rate that are asked for.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};

use crate::error::Result;
use crate::transport::{Link, Outcomes, Read, Transport, TransportKind};
use crate::wrap::delegate_link;

/// A transport that brings nothing sooner than its latency, and no more than its rate.
#[derive(Clone, Debug)]
pub struct Throttled {
    inner: Arc<dyn Transport>,
    latency: Duration,
    bytes_per_second: f64,
}

impl Throttled {
    /// `inner`, slower. All of a link's reads share its rate.
    ///
    /// # Panics
    /// Where the rate is not above zero.
    pub fn new(inner: Arc<dyn Transport>, latency: Duration, bytes_per_second: f64) -> Self {
        assert!(bytes_per_second > 0.0, "a rate must be above zero");
        Self {
            inner,
            latency,
            bytes_per_second,
        }
    }
}

#[async_trait]
impl Transport for Throttled {
    fn kind(&self) -> TransportKind {
        self.inner.kind()
    }

    async fn connect(&self, address: &str) -> Result<Arc<dyn Link>> {
        tokio::time::sleep(self.latency).await;
        Ok(Arc::new(ThrottledLink {
            inner: self.inner.connect(address).await?,
            latency: self.latency,
            bytes_per_second: self.bytes_per_second,
            free_at: Arc::new(Mutex::new(Instant::now())),
        }))
    }
}

#[derive(Debug)]
struct ThrottledLink {
    inner: Arc<dyn Link>,
    latency: Duration,
    bytes_per_second: f64,
    /// When what was brought so far is paid for.
    free_at: Arc<Mutex<Instant>>,
}

impl Link for ThrottledLink {
    fn submit(&self, reads: Vec<Read>, deadline: Instant) -> Outcomes {
        let earliest = Instant::now() + self.latency;
        let free_at = self.free_at.clone();
        let rate = self.bytes_per_second;
        self.inner
            .submit(reads, deadline)
            .then(move |(place, outcome)| {
                let bytes = outcome.as_ref().map_or(0, |block| block.len());
                let due = {
                    let mut free_at = free_at.lock().unwrap_or_else(PoisonError::into_inner);
                    let cost = Duration::from_secs_f64(bytes as f64 / rate);
                    *free_at = (*free_at).max(earliest) + cost;
                    *free_at
                };
                async move {
                    tokio::time::sleep_until(due.into()).await;
                    (place, outcome)
                }
            })
            .boxed()
    }

    fn call(
        &self,
        method: u16,
        body: Bytes,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes>> {
        let answer = self.inner.call(method, body, deadline);
        let latency = self.latency;
        async move {
            tokio::time::sleep(latency).await;
            answer.await
        }
        .boxed()
    }

    delegate_link!(inner);
}
