//! Metrics: what every link does is counted and measured for its path.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};

use crate::error::Result;
use crate::memory::Block;
use crate::statistics::{Observation, Recorder};
use crate::transport::{Link, Outcomes, Read};
use crate::wrap::delegate_link;

/// Tells a recorder what comes of reads and calls, and how quickly.
#[derive(Debug)]
pub(crate) struct MeteredLink {
    pub(crate) inner: Arc<dyn Link>,
    pub(crate) recorder: Recorder,
}

impl Link for MeteredLink {
    fn submit(&self, reads: Vec<Read>, deadline: Instant) -> Outcomes {
        Observed {
            inner: self.inner.submit(reads, deadline),
            recorder: self.recorder.clone(),
            observation: Observation::started_at(Instant::now()),
        }
        .boxed()
    }

    fn call(
        &self,
        method: u16,
        body: Bytes,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes>> {
        let recorder = self.recorder.clone();
        let answer = self.inner.call(method, body, deadline);
        async move {
            let answer = answer.await;
            recorder.called(answer.as_ref().err());
            answer
        }
        .boxed()
    }

    delegate_link!(inner);
}

struct Observed {
    inner: Outcomes,
    recorder: Recorder,
    observation: Observation,
}

impl Stream for Observed {
    type Item = (usize, Result<Block>);

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = self.inner.poll_next_unpin(context);
        if let Poll::Ready(Some((_, outcome))) = &polled {
            let now = Instant::now();
            match outcome {
                Ok(block) => match block.via() {
                    // What came another way says nothing about this one.
                    Some(transport) => self.recorder.handed_down(transport, block.len() as u64),
                    None => {
                        self.observation.arrived(now, block.len() as u64);
                        self.recorder.read(block.len() as u64);
                    }
                },
                Err(error) => self.recorder.failed(error),
            }
        }
        polled
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        self.recorder.observed(&self.observation);
    }
}
