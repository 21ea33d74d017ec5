//! Faults on purpose, for tests: a transport that does to reads what a test says.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{StreamExt, stream};

use crate::error::{Refusal, RefusalKind, Result, TransferError};
use crate::memory::{Block, BlockPool};
use crate::transport::{Link, Outcomes, Read, Transport, TransportKind};
use crate::wrap::delegate_link;

/// What happens to a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// One bit of its bytes is flipped.
    FlipBit,
    /// It is never answered.
    Hang,
    /// The link ends before it is answered.
    Close,
    /// The peer refuses it.
    Refuse(RefusalKind),
    /// Only its first half comes.
    Halve,
}

/// Decides what happens to a read; `None` leaves it as it is.
pub type FaultPlan = Arc<dyn Fn(&Read) -> Option<Fault> + Send + Sync>;

/// A transport whose reads fail as planned.
#[derive(Clone)]
pub struct Faulty {
    inner: Arc<dyn Transport>,
    plan: FaultPlan,
}

impl Faulty {
    /// `inner` with the faults of `plan`.
    pub fn new(
        inner: Arc<dyn Transport>,
        plan: impl Fn(&Read) -> Option<Fault> + Send + Sync + 'static,
    ) -> Self {
        Self {
            inner,
            plan: Arc::new(plan),
        }
    }
}

impl std::fmt::Debug for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Faulty").field(&self.inner).finish()
    }
}

#[async_trait]
impl Transport for Faulty {
    fn kind(&self) -> TransportKind {
        self.inner.kind()
    }

    async fn connect(&self, address: &str) -> Result<Arc<dyn Link>> {
        Ok(Arc::new(FaultyLink {
            inner: self.inner.connect(address).await?,
            plan: self.plan.clone(),
            peer: address.to_string(),
        }))
    }
}

struct FaultyLink {
    inner: Arc<dyn Link>,
    plan: FaultPlan,
    peer: String,
}

impl std::fmt::Debug for FaultyLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("FaultyLink").field(&self.inner).finish()
    }
}

fn copy(bytes: &[u8]) -> Block {
    let mut block = BlockPool::new(0).take(bytes.len()).expect("memory");
    block.as_mut().copy_from_slice(bytes);
    block
}

impl Link for FaultyLink {
    fn submit(&self, reads: Vec<Read>, deadline: Instant) -> Outcomes {
        let faults: Vec<Option<Fault>> = reads.iter().map(|read| (self.plan)(read)).collect();
        if faults.contains(&Some(Fault::Close)) {
            self.inner.close("a fault on purpose");
        }
        let hangs = faults.contains(&Some(Fault::Hang));
        let peer = self.peer.clone();
        let outcomes = self
            .inner
            .submit(reads, deadline)
            .filter_map(move |(place, outcome)| {
                let outcome = match faults[place] {
                    None | Some(Fault::Close) => Some(outcome),
                    Some(Fault::Hang) => None,
                    Some(Fault::Refuse(kind)) => Some(Err(TransferError::Refused {
                        peer: peer.clone(),
                        refusal: Refusal::new(kind, "a fault on purpose"),
                    })),
                    Some(Fault::Halve) => {
                        Some(outcome.map(|block| copy(&block[..block.len() / 2])))
                    }
                    Some(Fault::FlipBit) => Some(outcome.map(|block| {
                        let mut flipped = copy(&block);
                        let middle = flipped.len() / 2;
                        flipped.as_mut()[middle] ^= 0x10;
                        flipped
                    })),
                };
                std::future::ready(outcome.map(|outcome| (place, outcome)))
            });
        if hangs {
            outcomes.chain(stream::pending()).boxed()
        } else {
            outcomes.boxed()
        }
    }

    fn call(
        &self,
        method: u16,
        body: Bytes,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes>> {
        self.inner.call(method, body, deadline)
    }

    delegate_link!(inner);
}
