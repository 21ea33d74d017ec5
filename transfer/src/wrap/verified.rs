//! Checksums: no byte is seen that is not what was asked for.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use twox_hash::XxHash3_64;

use crate::error::{Result, TransferError};
use crate::memory::Block;
use crate::transport::{Link, Outcomes, Read};
use crate::wrap::delegate_link;

/// Compares every block with the checksum and the length of its read.
#[derive(Debug)]
pub(crate) struct VerifiedLink {
    pub(crate) inner: Arc<dyn Link>,
    pub(crate) peer: String,
}

/// Whether `block` is what `read` asks for.
pub(crate) fn verify(peer: &str, read: &Read, block: Block) -> Result<Block> {
    if block.len() as u64 != read.length {
        return Err(TransferError::Protocol {
            peer: peer.to_string(),
            reason: format!(
                "{} bytes came for a read of {}; both ends should be of one version",
                block.len(),
                read.length
            ),
        });
    }
    let Some(expected) = read.checksum else {
        return Ok(block);
    };
    let found = XxHash3_64::oneshot(&block);
    if found == expected {
        return Ok(block);
    }
    Err(TransferError::Corrupt {
        peer: peer.to_string(),
        key: read.segment,
        offset: read.offset,
        length: read.length,
        expected,
        found,
    })
}

impl Link for VerifiedLink {
    fn submit(&self, reads: Vec<Read>, deadline: Instant) -> Outcomes {
        let peer = self.peer.clone();
        let asked = reads.clone();
        self.inner
            .submit(reads, deadline)
            .map(move |(index, outcome)| {
                let verified = match asked.get(index) {
                    Some(read) => outcome.and_then(|block| verify(&peer, read, block)),
                    None => outcome,
                };
                (index, verified)
            })
            .boxed()
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
