//! The directory of a cache directory, and the one that workers elsewhere tell: as this crate's
//! traits.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoa_shm::DirectoryReader;
use stoa_shm::holdings::{Fetched, HOLDINGS_METHOD, HoldingsFetch, Scope};
use stoa_transfer::{Client, PeerAddress, SegmentKey};

use super::directory::{Directory, Holder, Holdings};

/// How long an answer may wait for news.
const WAIT: Duration = Duration::from_secs(20);
/// What is added to that for the answer's way.
const ANSWER: Duration = Duration::from_secs(5);
/// How long to wait after every worker that was asked has failed.
const PAUSE: Duration = Duration::from_secs(1);

/// A state of a directory, with the addresses of its workers worked out once.
#[derive(Debug)]
struct Held {
    directory: Arc<stoa_shm::Directory>,
    peers: HashMap<String, Arc<PeerAddress>>,
}

impl Held {
    /// What the workers hold that can be read at all.
    fn new(directory: Arc<stoa_shm::Directory>) -> Self {
        let peers = directory
            .workers()
            .filter(|worker| !worker.addresses.is_empty())
            .map(|worker| {
                let peer = PeerAddress {
                    id: worker.id.clone(),
                    addresses: worker.addresses.clone(),
                };
                (worker.id.clone(), Arc::new(peer))
            })
            .collect();
        Self { directory, peers }
    }
}

impl Holdings for Held {
    fn generation(&self) -> u64 {
        self.directory.revision()
    }

    fn holders(&self, file: &[u8], row_group: u32, column: u32) -> Vec<Holder> {
        self.directory
            .lookup(file, row_group, column)
            .filter_map(|held| {
                let location = held.location;
                Some(Holder {
                    peer: Arc::clone(self.peers.get(&held.worker.id)?),
                    segment: SegmentKey {
                        incarnation: held.worker.incarnation,
                        segment: location.segment.0,
                    },
                    offset: location.offset,
                    length: location.length,
                    checksum: location.checksum,
                    form: location.form,
                    rows: location.rows,
                })
            })
            .collect()
    }
}

/// What the worker of a cache directory knows of the others: the file `directory` in it.
#[derive(Debug)]
pub struct LocalDirectory {
    reader: DirectoryReader,
    held: RwLock<Arc<Held>>,
}

impl LocalDirectory {
    /// Follows the directory in the cache directory `cache`, which may not be there.
    pub fn open(cache: &Path) -> Self {
        let reader = DirectoryReader::open(cache);
        let held = RwLock::new(Arc::new(Held::new(reader.current())));
        Self { reader, held }
    }
}

impl Directory for LocalDirectory {
    fn current(&self) -> Arc<dyn Holdings> {
        let directory = self.reader.current();
        let held = Arc::clone(&self.held.read().unwrap_or_else(PoisonError::into_inner));
        if Arc::ptr_eq(&held.directory, &directory) {
            return held;
        }
        let held = Arc::new(Held::new(directory));
        *self.held.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&held);
        held
    }
}

/// What workers elsewhere tell of the whole cluster: for a query node without a worker.
#[derive(Debug)]
pub struct ToldDirectory {
    held: RwLock<Arc<Held>>,
}

impl ToldDirectory {
    /// Asks the workers at `addresses` (`host:port` of their transfer), one at a time, and goes on
    /// asking in a task of its own for as long as the directory is used.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn follow(addresses: &[String], client: Client) -> Arc<Self> {
        let nobody = Arc::new(stoa_shm::Directory::empty());
        let told = Arc::new(Self {
            held: RwLock::new(Arc::new(Held::new(nobody))),
        });
        let peers: Vec<PeerAddress> = addresses
            .iter()
            .map(|address| PeerAddress {
                id: format!("worker at {address}"),
                addresses: vec![address.clone()],
            })
            .collect();
        if !peers.is_empty() {
            tokio::spawn(follow(Arc::downgrade(&told), peers, client));
        }
        told
    }
}

impl Directory for ToldDirectory {
    fn current(&self) -> Arc<dyn Holdings> {
        Arc::clone(&*self.held.read().unwrap_or_else(PoisonError::into_inner)) as Arc<dyn Holdings>
    }
}

async fn follow(told: Weak<ToldDirectory>, peers: Vec<PeerAddress>, client: Client) {
    // Revisions mean something only to the worker that gave them.
    let (mut asked, mut since, mut failures) = (0, 0, 0);
    while told.strong_count() > 0 {
        match ask(&client, &peers[asked], since).await {
            Ok((revision, directory)) => {
                (since, failures) = (revision, 0);
                if let (Some(directory), Some(told)) = (directory, told.upgrade()) {
                    let held = Arc::new(Held::new(Arc::new(directory)));
                    *told.held.write().unwrap_or_else(PoisonError::into_inner) = held;
                }
            }
            Err(error) => {
                tracing::warn!(worker = peers[asked].id, error, "holdings not told");
                (asked, since) = ((asked + 1) % peers.len(), 0);
                failures += 1;
                if failures % peers.len() == 0 {
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// What one worker tells, if it is news: the revision, and the directory.
async fn ask(
    client: &Client,
    peer: &PeerAddress,
    since: u64,
) -> Result<(u64, Option<stoa_shm::Directory>), String> {
    let mut fetch = HoldingsFetch::new(Scope::Cluster, since, WAIT.as_millis() as u32);
    loop {
        let deadline = Instant::now() + WAIT + ANSWER;
        let request = Bytes::from(fetch.request());
        let answer = client.call(peer, HOLDINGS_METHOD, request, deadline).await;
        let answer = answer.map_err(|error| error.to_string())?;
        match fetch.take(&answer).map_err(|error| error.to_string())? {
            Fetched::More => {}
            Fetched::Unchanged => return Ok((since, None)),
            Fetched::Whole(directory) => return Ok((fetch.revision(), Some(directory))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use stoa_shm::directory::DirectoryBuilder;
    use stoa_shm::holdings::{HoldingsReply, HoldingsRequest};
    use stoa_shm::{CacheDir, CacheDirOptions, ChunkLocation, HoldingWorker, SegmentId};
    use stoa_transfer::{
        CallHandler, ClientSettings, InProcess, PeerIdentity, Refusal, Segment, SegmentSource,
    };

    use super::*;

    /// A directory in which `worker` holds column 3 of row group 2 of `file`.
    fn directory(worker: &str, addresses: &[&str], revision: u64) -> Vec<u8> {
        let mut builder = DirectoryBuilder::new();
        let number = builder.worker(HoldingWorker {
            id: worker.to_owned(),
            incarnation: 9,
            addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
        });
        let location = ChunkLocation {
            segment: SegmentId(5),
            offset: 64,
            length: 100,
            form: 1,
            checksum: 7,
            rows: 10,
        };
        builder.chunk(number, b"file", 2, 3, location);
        builder.build(revision).unwrap()
    }

    fn holder(worker: &str, address: &str) -> Holder {
        Holder {
            peer: Arc::new(PeerAddress {
                id: worker.to_owned(),
                addresses: vec![address.to_owned()],
            }),
            segment: SegmentKey {
                incarnation: 9,
                segment: 5,
            },
            offset: 64,
            length: 100,
            checksum: 7,
            form: 1,
            rows: 10,
        }
    }

    /// The file in the cache directory is followed; without one, or with rubbish in its place,
    /// nobody holds anything.
    #[test]
    fn the_directory_of_the_local_worker_is_followed() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = scratch.path().join("cache");
        let followed = LocalDirectory::open(&path);
        assert!(followed.current().holders(b"file", 2, 3).is_empty());
        let cache = CacheDir::create(&path, CacheDirOptions::default()).unwrap();
        for (worker, revision) in [("a", 1), ("b", 2)] {
            cache
                .write_directory(&directory(worker, &["host:1"], revision))
                .unwrap();
            let current = followed.current();
            assert_eq!(current.holders(b"file", 2, 3), [holder(worker, "host:1")]);
            assert!(current.holders(b"file", 2, 4).is_empty());
            assert!(current.holders(b"other", 2, 3).is_empty());
            assert_eq!(current.generation(), revision);
            assert!(Arc::ptr_eq(&current, &followed.current()));
        }
        cache.write_directory(&directory("a", &[], 3)).unwrap();
        assert!(
            followed.current().holders(b"file", 2, 3).is_empty(),
            "no way leads there"
        );
        cache.write_directory(b"rubbish").unwrap();
        assert!(followed.current().holders(b"file", 2, 3).is_empty());
    }

    #[derive(Debug)]
    struct NoSegments;

    impl SegmentSource for NoSegments {
        fn open(&self, key: SegmentKey) -> Result<Segment, Refusal> {
            Err(Refusal::unknown_segment(key))
        }
    }

    /// Tells holdings, and waits for news where the asker has them already.
    #[derive(Debug)]
    struct Tells {
        state: Mutex<(u64, Vec<u8>)>,
        changed: tokio::sync::Notify,
    }

    #[async_trait]
    impl CallHandler for Tells {
        async fn call(&self, _: &PeerIdentity, method: u16, body: Bytes) -> Result<Bytes, Refusal> {
            assert_eq!(method, HOLDINGS_METHOD);
            let request = HoldingsRequest::parse(&body).unwrap();
            assert_eq!(request.scope, Scope::Cluster);
            loop {
                let changed = self.changed.notified();
                let (revision, bytes) = self.state.lock().unwrap().clone();
                if revision != request.since {
                    return Ok(HoldingsReply::of(&request, revision, &bytes)
                        .to_bytes()
                        .into());
                }
                changed.await;
            }
        }
    }

    async fn until(told: &ToldDirectory, expected: &Holder) {
        for _ in 0..500 {
            if told.current().holders(b"file", 2, 3) == std::slice::from_ref(expected) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!(
            "{:?}, expected {expected:?}",
            told.current().holders(b"file", 2, 3)
        );
    }

    /// A node without a worker is told by one elsewhere, hears of news, and asks the next one when
    /// that one is gone.
    #[tokio::test]
    async fn workers_elsewhere_tell_who_holds_what() {
        let network = InProcess::default();
        let tells = |worker: &str, revision| {
            Arc::new(Tells {
                state: Mutex::new((revision, directory(worker, &["host:1"], revision))),
                changed: tokio::sync::Notify::new(),
            })
        };
        let (first, second) = (tells("a", 1), tells("c", 1));
        network.serve(
            "first",
            Arc::new(NoSegments),
            Arc::clone(&first) as Arc<dyn CallHandler>,
        );
        network.serve("second", Arc::new(NoSegments), second);
        let client = Client::new(ClientSettings::default(), vec![Arc::new(network.clone())]);
        let addresses = ["first".to_owned(), "second".to_owned()];
        let told = ToldDirectory::follow(&addresses, client);
        until(&told, &holder("a", "host:1")).await;
        *first.state.lock().unwrap() = (2, directory("b", &["host:2"], 2));
        first.changed.notify_waiters();
        until(&told, &holder("b", "host:2")).await;
        network.stop("first");
        // Whatever it would still say, the connection to it is gone.
        *first.state.lock().unwrap() = (3, directory("a", &["host:1"], 3));
        first.changed.notify_waiters();
        until(&told, &holder("c", "host:1")).await;
    }
}
