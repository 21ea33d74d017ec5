//! The other workers: their memory, what they hold, and what they are told of ours.
//!
//! - [`ServedSegments`] and [`PeerCalls`] answer them: the bytes of segments, and where chunks are.
//! - [`Peers`] knows who lives, and how to ask them.
//! - The keeper (`keeper.rs`) asks what they hold, and writes it down for the query processes here.
//!
//! What it means for a load is in `gather.rs`.

mod board;
mod calls;
mod keeper;
mod network;
mod segments;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoa_metastore::WorkerRecord;
use stoa_shm::holdings::{LOCATE_METHOD, LocateReply, LocateRequest};
use stoa_shm::{ChunkKey, Directory};
use stoa_transfer::{Client, PathStatistics, PeerAddress, TransferError};
use tokio::sync::watch;

pub(crate) use board::LoadBoard;
pub(crate) use calls::PeerCalls;
pub(crate) use keeper::keep;
pub use network::{Listener, PeerNetwork};
pub(crate) use network::{Serving, advertised};
pub(crate) use segments::ServedSegments;

/// Another worker whose memory can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) address: PeerAddress,
    /// The incarnation of its cache directory, as its record has it.
    pub(crate) cache_incarnation: String,
}

/// Why a peer did not say what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error(transparent)]
    Transfer(#[from] TransferError),
    #[error(transparent)]
    Malformed(#[from] stoa_shm::holdings::Malformed),
}

/// The live workers beside this one, and the means to ask them.
pub(crate) struct Peers {
    /// This worker's id.
    pub(crate) me: String,
    host: String,
    pub(crate) client: Client,
    /// What a peer may take before it is left alone.
    pub(crate) deadline: Duration,
    live: watch::Sender<BTreeMap<String, Peer>>,
    /// What each of them holds, as it said last.
    holdings: Mutex<BTreeMap<String, Arc<Directory>>>,
    /// Counts the changes of `live` and `holdings`.
    changes: watch::Sender<u64>,
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peers")
            .field("me", &self.me)
            .field("live", &*self.live.borrow())
            .finish_non_exhaustive()
    }
}

impl Peers {
    pub(crate) fn new(me: String, host: String, client: Client, deadline: Duration) -> Peers {
        Peers {
            me,
            host,
            client,
            deadline,
            live: watch::Sender::new(BTreeMap::new()),
            holdings: Mutex::default(),
            changes: watch::Sender::new(0),
        }
    }

    /// The live peers, by id.
    pub(crate) fn live(&self) -> BTreeMap<String, Peer> {
        self.live.borrow().clone()
    }

    fn holdings(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Directory>>> {
        // Only whole values are put in and taken out.
        self.holdings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes notice of who lives, and forgets what the others held.
    fn observe(&self, records: &[WorkerRecord]) {
        let live = peers_of(records, &self.me, &self.host);
        let before = self.live();
        if before == live {
            return;
        }
        let same = |id: &String| {
            let incarnation =
                |peers: &BTreeMap<String, Peer>| Some(peers.get(id)?.cache_incarnation.clone());
            incarnation(&before) == incarnation(&live)
        };
        // What a directory held that was made anew since, it holds no more.
        self.holdings()
            .retain(|id, _| live.contains_key(id) && same(id));
        for id in before.keys().filter(|id| !live.contains_key(*id)) {
            self.client.forget(id);
        }
        self.live.send_replace(live);
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Takes notice of what a peer holds.
    fn learn(&self, id: &str, directory: Directory) {
        if !self.live.borrow().contains_key(id) {
            return;
        }
        self.holdings().insert(id.to_owned(), Arc::new(directory));
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Has the directory of what they hold written again, although nothing has changed.
    pub(crate) fn write_again(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// What the live peers hold, as far as they said, with their addresses as they are now.
    pub(crate) fn known(&self) -> Vec<(Peer, Arc<Directory>)> {
        let live = self.live();
        let holdings = self.holdings();
        let known = holdings
            .iter()
            .filter_map(|(id, directory)| Some((live.get(id)?.clone(), Arc::clone(directory))));
        known.collect()
    }

    /// Asks a peer where chunks are; at most as many as one call takes.
    pub(crate) async fn locate(
        &self,
        peer: &PeerAddress,
        chunks: Vec<ChunkKey>,
        deadline: Instant,
    ) -> Result<LocateReply, AskError> {
        let expected = chunks.len();
        let body = LocateRequest { chunks }.to_bytes();
        let answer = self
            .client
            .call(peer, LOCATE_METHOD, Bytes::from(body), deadline)
            .await?;
        Ok(LocateReply::parse(&answer, expected)?)
    }

    /// Every path to a peer, with what was seen of it.
    pub(crate) fn paths(&self) -> Vec<PathStatistics> {
        self.client.paths()
    }
}

/// The workers that can be asked: all but this one that have an address which can lead to them.
fn peers_of(records: &[WorkerRecord], me: &str, host: &str) -> BTreeMap<String, Peer> {
    let peer = |record: &WorkerRecord| {
        let leading = record.transfer_from(host).into_iter();
        let addresses: Vec<String> = leading.map(str::to_owned).collect();
        (record.id != me && !addresses.is_empty()).then(|| Peer {
            address: PeerAddress {
                id: record.id.clone(),
                addresses,
            },
            cache_incarnation: record.cache_incarnation.clone(),
        })
    };
    records
        .iter()
        .filter_map(|record| Some((record.id.clone(), peer(record)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use stoa_metastore::WorkerAddresses;
    use stoa_shm::directory::{DirectoryBuilder, HoldingWorker};
    use stoa_transfer::ClientSettings;

    use super::*;

    fn record(id: &str, host: &str, addresses: &[&str], incarnation: &str) -> WorkerRecord {
        WorkerRecord {
            id: id.into(),
            host: host.into(),
            addresses: WorkerAddresses {
                transfer: addresses.iter().map(|a| (*a).to_owned()).collect(),
                ..WorkerAddresses::default()
            },
            cache_incarnation: incarnation.into(),
            ..WorkerRecord::default()
        }
    }

    #[test]
    fn peers_are_those_who_can_be_reached() {
        let records = [
            record("me", "h1", &["10.0.0.1:1"], "1"),
            record("b", "h1", &["127.0.0.1:2"], "2"),
            record("c", "h2", &["127.0.0.1:3", "10.0.0.3:3"], "3"),
            record("d", "h2", &["[::1]:4", "localhost:5"], "4"),
            record("e", "h3", &[], ""),
        ];
        let peers = peers_of(&records, "me", "h1");
        let addresses: Vec<(&str, &[String])> = peers
            .iter()
            .map(|(id, peer)| (id.as_str(), peer.address.addresses.as_slice()))
            .collect();
        let (b, c) = (["127.0.0.1:2".to_owned()], ["10.0.0.3:3".to_owned()]);
        assert_eq!(addresses, [("b", &b[..]), ("c", &c[..])]);
    }

    #[test]
    fn the_dead_and_the_remade_are_forgotten() {
        let client = Client::new(ClientSettings::default(), vec![]);
        let peers = Peers::new("me".into(), "h".into(), client, Duration::from_secs(1));
        let directory = || {
            let mut builder = DirectoryBuilder::new();
            builder.worker(HoldingWorker::default());
            Directory::empty()
        };
        let two = [
            record("a", "x", &["1.1.1.1:1"], "1"),
            record("b", "x", &["1.1.1.2:1"], "2"),
        ];
        peers.observe(&two);
        peers.learn("a", directory());
        peers.learn("b", directory());
        peers.learn("stranger", directory());
        let ids = || -> Vec<String> {
            let known = peers.known().into_iter();
            known.map(|(peer, _)| peer.address.id).collect()
        };
        assert_eq!(ids(), ["a", "b"]);
        // Another address is followed, another directory is forgotten.
        let moved = [
            record("a", "x", &["1.1.1.9:1"], "1"),
            record("b", "x", &["1.1.1.2:1"], "3"),
        ];
        peers.observe(&moved);
        assert_eq!(ids(), ["a"]);
        assert_eq!(peers.known()[0].0.address.addresses, ["1.1.1.9:1"]);
        peers.observe(&moved[1..]);
        assert!(ids().is_empty());
    }
}
