//! Deadlines: every read ends by its deadline, whatever the link does.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use tokio::time::Sleep;

use crate::error::{Result, TransferError};
use crate::memory::Block;
use crate::transport::{Link, Outcomes, Read};
use crate::wrap::delegate_link;

/// Ends at the deadline what the inner link has not ended by then, and makes sure that each read
/// has exactly one outcome.
#[derive(Debug)]
pub(crate) struct DeadlineLink {
    pub(crate) inner: Arc<dyn Link>,
    pub(crate) peer: String,
}

impl Link for DeadlineLink {
    fn submit(&self, reads: Vec<Read>, deadline: Instant) -> Outcomes {
        Watched {
            open: vec![true; reads.len()],
            left: reads.len(),
            inner: Some(self.inner.submit(reads, deadline)),
            timer: Box::pin(tokio::time::sleep_until(deadline.into())),
            ending: None,
            started: Instant::now(),
            peer: self.peer.clone(),
        }
        .boxed()
    }

    fn call(
        &self,
        method: u16,
        body: Bytes,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes>> {
        let answer = self.inner.call(method, body, deadline);
        let (peer, started) = (self.peer.clone(), Instant::now());
        async move {
            match tokio::time::timeout_at(deadline.into(), answer).await {
                Ok(answer) => answer,
                Err(_elapsed) => Err(passed(&peer, started)),
            }
        }
        .boxed()
    }

    delegate_link!(inner);
}

/// The error of a deadline that has passed now.
pub(crate) fn passed(peer: &str, started: Instant) -> TransferError {
    TransferError::Deadline {
        peer: peer.to_string(),
        waited_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}

struct Watched {
    inner: Option<Outcomes>,
    /// Which reads have no outcome yet.
    open: Vec<bool>,
    left: usize,
    timer: Pin<Box<Sleep>>,
    /// How what is open ends, once that is decided.
    ending: Option<TransferError>,
    started: Instant,
    peer: String,
}

impl Stream for Watched {
    type Item = (usize, Result<Block>);

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        while this.left > 0 {
            if let Some(ending) = &this.ending {
                let Some(index) = this.open.iter().position(|open| *open) else {
                    break;
                };
                this.open[index] = false;
                this.left -= 1;
                return Poll::Ready(Some((index, Err(ending.clone()))));
            }
            match this
                .inner
                .as_mut()
                .map(|inner| inner.poll_next_unpin(context))
            {
                Some(Poll::Ready(Some((index, outcome)))) => {
                    if this.open.get(index) == Some(&true) {
                        this.open[index] = false;
                        this.left -= 1;
                        return Poll::Ready(Some((index, outcome)));
                    }
                }
                Some(Poll::Ready(None)) | None => {
                    this.ending = Some(TransferError::Closed {
                        peer: this.peer.clone(),
                        reason: "it ended without an answer".to_string(),
                    });
                }
                Some(Poll::Pending) => match this.timer.poll_unpin(context) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(()) => {
                        this.inner = None;
                        this.ending = Some(passed(&this.peer, this.started));
                    }
                },
            }
        }
        this.inner = None;
        Poll::Ready(None)
    }
}
