//! A transport within one process: the same promises without a network.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};

use crate::error::{Refusal, Result, TransferError};
use crate::memory::{Block, BlockPool};
use crate::segment::SegmentSource;
use crate::transport::{CallHandler, Link, Outcomes, PeerIdentity, Read, Transport, TransportKind};

/// Peers of this process by address. Clones share them.
#[derive(Clone, Debug)]
pub struct InProcess {
    peers: Arc<Mutex<HashMap<String, Arc<InProcessPeer>>>>,
    pool: BlockPool,
}

#[derive(Debug)]
struct InProcessPeer {
    segments: Arc<dyn SegmentSource>,
    calls: Arc<dyn CallHandler>,
    gone: AtomicBool,
}

impl Default for InProcess {
    fn default() -> Self {
        Self {
            peers: Arc::default(),
            pool: BlockPool::new(16 << 20),
        }
    }
}

impl InProcess {
    /// Makes a peer reachable at `address`, in place of the one that was there.
    pub fn serve(
        &self,
        address: &str,
        segments: Arc<dyn SegmentSource>,
        calls: Arc<dyn CallHandler>,
    ) {
        let peer = InProcessPeer {
            segments,
            calls,
            gone: AtomicBool::new(false),
        };
        self.put(address, Some(peer));
    }

    /// Takes the peer at `address` away; its links are closed.
    pub fn stop(&self, address: &str) {
        self.put(address, None);
    }

    fn put(&self, address: &str, peer: Option<InProcessPeer>) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match peer {
            Some(peer) => peers.insert(address.to_string(), Arc::new(peer)),
            None => peers.remove(address),
        };
        if let Some(before) = before {
            before.gone.store(true, Ordering::Release);
        }
    }
}

#[async_trait]
impl Transport for InProcess {
    fn kind(&self) -> TransportKind {
        TransportKind::InProcess
    }

    async fn connect(&self, address: &str) -> Result<Arc<dyn Link>> {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let peer = peers
            .get(address)
            .ok_or_else(|| TransferError::Unreachable {
                peer: address.to_string(),
                reason: "no such peer in this process".to_string(),
            })?;
        Ok(Arc::new(InProcessLink {
            end: Arc::new(End {
                peer: peer.clone(),
                address: address.to_string(),
                pool: self.pool.clone(),
                closed: Mutex::default(),
                received_bytes: AtomicU64::new(0),
            }),
        }))
    }
}

#[derive(Debug)]
struct InProcessLink {
    end: Arc<End>,
}

#[derive(Debug)]
struct End {
    peer: Arc<InProcessPeer>,
    address: String,
    pool: BlockPool,
    closed: Mutex<Option<String>>,
    received_bytes: AtomicU64,
}

impl End {
    fn check_open(&self) -> Result<()> {
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        let reason = match &*closed {
            Some(reason) => reason.clone(),
            None if self.peer.gone.load(Ordering::Acquire) => "the peer is gone".to_string(),
            None => return Ok(()),
        };
        Err(TransferError::Closed {
            peer: self.address.clone(),
            reason,
        })
    }

    fn refused(&self, refusal: Refusal) -> TransferError {
        TransferError::Refused {
            peer: self.address.clone(),
            refusal,
        }
    }

    fn read(&self, read: &Read) -> Result<Block> {
        self.check_open()?;
        let segment = self
            .peer
            .segments
            .open(read.segment)
            .map_err(|refusal| self.refused(refusal))?;
        let bytes = segment.range(read.offset, read.length).ok_or_else(|| {
            self.refused(Refusal::out_of_range(
                read.segment,
                read.offset,
                read.length,
                segment.bytes().len() as u64,
            ))
        })?;
        let mut block = self
            .pool
            .take(bytes.len())
            .map_err(|error| TransferError::Setup {
                what: format!("memory for {} bytes", bytes.len()),
                reason: error.to_string(),
            })?;
        block.as_mut().copy_from_slice(bytes);
        self.received_bytes
            .fetch_add(read.length, Ordering::Relaxed);
        Ok(block)
    }
}

impl Link for InProcessLink {
    fn submit(&self, reads: Vec<Read>, _deadline: Instant) -> Outcomes {
        let end = self.end.clone();
        stream::iter(reads.into_iter().enumerate())
            .map(move |(index, read)| (index, end.read(&read)))
            .boxed()
    }

    fn call(
        &self,
        method: u16,
        body: Bytes,
        _deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes>> {
        let end = self.end.clone();
        async move {
            end.check_open()?;
            let asker = PeerIdentity {
                role: None,
                name: "(this process)".to_string(),
                address: "in-process".to_string(),
            };
            let answer = end.peer.calls.call(&asker, method, body).await;
            end.check_open()?;
            answer.map_err(|refusal| end.refused(refusal))
        }
        .boxed()
    }

    fn received_bytes(&self) -> u64 {
        self.end.received_bytes.load(Ordering::Relaxed)
    }

    fn outstanding_bytes(&self) -> u64 {
        0
    }

    fn is_closed(&self) -> bool {
        self.end.check_open().is_err()
    }

    fn close(&self, reason: &str) {
        let mut closed = self
            .end
            .closed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        closed.get_or_insert_with(|| reason.to_string());
    }
}
