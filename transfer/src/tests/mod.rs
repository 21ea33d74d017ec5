//! What crosses the modules of this crate.

pub(crate) mod certificates;
mod conforming;
mod faults;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{Block, Client, PeerAddress, Result, Tcp, TcpSettings, Transport};

/// A deadline that only something that hangs reaches.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// A transport of its own for plain text.
fn tcp() -> Arc<dyn Transport> {
    Arc::new(Tcp::new(TcpSettings::default()))
}

/// A peer at one address.
fn peer(address: impl ToString) -> PeerAddress {
    PeerAddress {
        id: "the server".to_string(),
        addresses: vec![address.to_string()],
    }
}

/// The first bytes of the first segment.
async fn read_one(client: &Client, peer: &PeerAddress, deadline: Instant) -> Result<Block> {
    let reads = vec![crate::conformance::read(1, 0, 100)];
    let mut outcomes = client.submit(peer, reads, deadline).into_vec().await;
    outcomes.pop().expect("an outcome")
}
