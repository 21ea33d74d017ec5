//! Fetching from neighbours that do what neighbours do: answer, lie, hang, vanish.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use stoa_forms::{FORM_ARROW, FORM_PARQUET};
use stoa_transfer::{PeerAddress, Read, Refusal, SegmentKey, TransferError, TransportKind};

use super::*;

const STORE: &str = "s3://bucket";
const CHUNK_BYTES: u64 = 1000;

/// What a neighbour does with reads.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Does {
    Answer,
    /// Says nothing, and does not keep to the deadline either.
    Hang,
    /// Ends each connection.
    Close,
    /// Holds nothing of what it is said to.
    Lack,
    /// Sends bytes that do not match their checksum, which the transfer finds out.
    Corrupt,
}

#[derive(Debug)]
struct FakePeer {
    does: Mutex<Does>,
    delay: Mutex<Duration>,
    expected: Mutex<Option<Duration>>,
    batches: AtomicUsize,
    reads: AtomicUsize,
    /// Batches whose stream was dropped before its end.
    dropped: Arc<AtomicUsize>,
}

/// Neighbours by name, and a count of the bytes that are asked of them at once.
#[derive(Debug, Default)]
struct FakePeers {
    peers: HashMap<String, FakePeer>,
    in_flight: Arc<AtomicU64>,
    in_flight_most: Arc<AtomicU64>,
}

impl FakePeers {
    fn new(names: &[&str]) -> FakePeers {
        let peer = || FakePeer {
            does: Mutex::new(Does::Answer),
            delay: Mutex::default(),
            expected: Mutex::default(),
            batches: AtomicUsize::new(0),
            reads: AtomicUsize::new(0),
            dropped: Arc::default(),
        };
        FakePeers {
            peers: names.iter().map(|n| ((*n).to_owned(), peer())).collect(),
            ..FakePeers::default()
        }
    }

    fn set(&self, name: &str, does: Does) {
        *lock(&self.peers[name].does) = does;
    }

    fn delay(&self, name: &str, delay: Duration) {
        *lock(&self.peers[name].delay) = delay;
    }

    fn measured(&self, name: &str, expected: Duration) {
        *lock(&self.peers[name].expected) = Some(expected);
    }

    fn batches(&self, name: &str) -> usize {
        self.peers[name].batches.load(Ordering::SeqCst)
    }

    fn reads(&self, name: &str) -> usize {
        self.peers[name].reads.load(Ordering::SeqCst)
    }
}

/// Counts the bytes of a batch for as long as it lives.
struct InFlight {
    now: Arc<AtomicU64>,
    bytes: u64,
    dropped: Arc<AtomicUsize>,
    left: usize,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.now.fetch_sub(self.bytes, Ordering::SeqCst);
        if self.left > 0 {
            self.dropped.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// The bytes that lie at an offset of any segment.
fn content(offset: u64, length: u64) -> Bytes {
    (offset..offset + length).map(|at| (at / 7) as u8).collect()
}

impl PeerReads for FakePeers {
    fn submit(&self, peer: &PeerAddress, reads: Vec<Read>, _deadline: Instant) -> Arrivals {
        let name = peer.id.clone();
        let fake = &self.peers[&name];
        fake.batches.fetch_add(1, Ordering::SeqCst);
        fake.reads.fetch_add(reads.len(), Ordering::SeqCst);
        let bytes = reads.iter().map(|read| read.length).sum();
        let now = self.in_flight.fetch_add(bytes, Ordering::SeqCst) + bytes;
        self.in_flight_most.fetch_max(now, Ordering::SeqCst);
        let guard = InFlight {
            now: Arc::clone(&self.in_flight),
            bytes,
            dropped: Arc::clone(&fake.dropped),
            left: reads.len(),
        };
        let (does, delay) = (*lock(&fake.does), *lock(&fake.delay));
        let outcome = move |read: &Read| match does {
            Does::Answer | Does::Hang => Ok(Arrived {
                bytes: content(read.offset, read.length),
                via: TransportKind::Tcp,
            }),
            Does::Close => Err(TransferError::Closed {
                peer: name.clone(),
                reason: "by peer".to_owned(),
            }),
            Does::Lack => Err(TransferError::Refused {
                peer: name.clone(),
                refusal: Refusal::unknown_segment(read.segment),
            }),
            Does::Corrupt => Err(TransferError::Corrupt {
                peer: name.clone(),
                key: read.segment,
                offset: read.offset,
                length: read.length,
                expected: read.checksum.unwrap_or_default(),
                found: 1,
            }),
        };
        let answers = stream::unfold(
            (reads.into_iter().enumerate(), guard, outcome),
            move |(mut reads, mut guard, outcome)| async move {
                if does == Does::Hang {
                    std::future::pending::<()>().await;
                }
                let (index, read) = reads.next()?;
                if index == 0 {
                    tokio::time::sleep(delay).await;
                }
                guard.left -= 1;
                Some(((index, outcome(&read)), (reads, guard, outcome)))
            },
        );
        answers.boxed()
    }

    fn expected(&self, peer: &PeerAddress, _bytes: u64) -> Option<Duration> {
        *lock(&self.peers[&peer.id].expected)
    }
}

/// A directory that a test changes.
#[derive(Debug)]
struct FakeDirectory {
    state: Mutex<Arc<FakeHoldings>>,
}

#[derive(Clone, Debug, Default)]
struct FakeHoldings {
    generation: u64,
    by_row_group: HashMap<u32, Vec<(String, u8)>>,
    /// Everything else is held by these.
    otherwise: Vec<String>,
}

impl Holdings for FakeHoldings {
    fn generation(&self) -> u64 {
        self.generation
    }

    fn holders(&self, _file: &[u8], row_group: u32, column: u32) -> Vec<Holder> {
        let holder = |peer: &String, form| Holder {
            peer: Arc::new(PeerAddress {
                id: peer.clone(),
                addresses: vec![],
            }),
            segment: SegmentKey {
                incarnation: 1,
                segment: u64::from(row_group),
            },
            offset: u64::from(column) * 1024,
            length: CHUNK_BYTES,
            checksum: 0,
            form,
            rows: 10,
        };
        match self.by_row_group.get(&row_group) {
            Some(holders) => holders
                .iter()
                .map(|(peer, form)| holder(peer, *form))
                .collect(),
            None => self
                .otherwise
                .iter()
                .map(|peer| holder(peer, FORM_ARROW))
                .collect(),
        }
    }
}

impl Directory for FakeDirectory {
    fn current(&self) -> Arc<dyn Holdings> {
        Arc::clone(&*lock(&self.state)) as Arc<dyn Holdings>
    }
}

struct Fixture {
    neighbours: Neighbours,
    peers: Arc<FakePeers>,
    directory: Arc<FakeDirectory>,
}

fn short() -> NeighbourSettings {
    NeighbourSettings {
        deadline: Duration::from_millis(200),
        patience: 1,
        ..NeighbourSettings::default()
    }
}

/// Every chunk is held by each of `names`.
fn fixture(names: &[&str], settings: NeighbourSettings) -> Fixture {
    let peers = Arc::new(FakePeers::new(names));
    let holdings = FakeHoldings {
        generation: 1,
        by_row_group: HashMap::new(),
        otherwise: names.iter().map(|n| (*n).to_owned()).collect(),
    };
    let directory = Arc::new(FakeDirectory {
        state: Mutex::new(Arc::new(holdings)),
    });
    Fixture {
        neighbours: Neighbours::new(
            settings,
            Arc::clone(&directory) as Arc<dyn Directory>,
            Arc::clone(&peers) as Arc<dyn PeerReads>,
        ),
        peers,
        directory,
    }
}

fn chunk(row_group: u32, column: u32) -> Wanted {
    Wanted {
        name: ChunkName {
            file: Arc::from(&b"file"[..]),
            row_group,
            column,
        },
        origin_bytes: CHUNK_BYTES,
    }
}

fn row_group(row_group: u32, columns: u32) -> Vec<Wanted> {
    (0..columns)
        .map(|column| chunk(row_group, column))
        .collect()
}

impl Fixture {
    fn change(&self, change: impl FnOnce(&mut FakeHoldings)) {
        let mut state = lock(&self.directory.state);
        let mut holdings = (**state).clone();
        holdings.generation += 1;
        change(&mut holdings);
        *state = Arc::new(holdings);
    }

    fn start(&self, wanted: &[Wanted]) -> Fetch {
        let holdings = self.neighbours.holdings();
        self.neighbours.fetch(&holdings, STORE, wanted)
    }

    async fn fetch(&self, wanted: &[Wanted]) -> Vec<Result<Fetched, RemoteMiss>> {
        self.start(wanted).landed().await
    }

    async fn misses(&self, wanted: &[Wanted]) -> Vec<RemoteMiss> {
        let landed = self.fetch(wanted).await;
        landed.into_iter().filter_map(Result::err).collect()
    }

    fn offers(&self, wanted: &Wanted) -> Result<u64, RemoteMiss> {
        let holdings = self.neighbours.holdings();
        self.neighbours.offers(&holdings, STORE, wanted)
    }
}

/// The chunks of a row group come in one batch from each neighbour, each in its place.
#[tokio::test]
async fn a_row_group_is_one_batch_to_each_neighbour() {
    let fixture = fixture(&["a", "b"], short());
    fixture.change(|holdings| {
        holdings
            .by_row_group
            .insert(1, vec![("a".to_owned(), FORM_ARROW)]);
        holdings
            .by_row_group
            .insert(2, vec![("b".to_owned(), FORM_PARQUET)]);
    });
    let mut wanted = row_group(1, 7);
    wanted.extend(row_group(2, 5));
    let landed = fixture.fetch(&wanted).await;
    assert_eq!(landed.len(), 12);
    for (wanted, landed) in wanted.iter().zip(landed) {
        let fetched = landed.unwrap();
        let offset = u64::from(wanted.name.column) * 1024;
        assert_eq!(fetched.bytes, content(offset, CHUNK_BYTES));
        let form = if wanted.name.row_group == 1 {
            FORM_ARROW
        } else {
            FORM_PARQUET
        };
        assert_eq!(fetched.form, form);
        assert_eq!(fetched.via, TransportKind::Tcp);
    }
    assert_eq!(
        (fixture.peers.batches("a"), fixture.peers.reads("a")),
        (1, 7)
    );
    assert_eq!(
        (fixture.peers.batches("b"), fixture.peers.reads("b")),
        (1, 5)
    );
}

/// Scans that want the same chunk at the same time, or while one of them still uses it, share it;
/// afterwards nothing of it is kept.
#[tokio::test]
async fn concurrent_scans_share_one_transfer() {
    let fixture = fixture(&["a"], short());
    fixture.peers.delay("a", Duration::from_millis(20));
    let wanted = row_group(0, 3);
    let (first, second) = tokio::join!(fixture.fetch(&wanted), fixture.fetch(&wanted));
    assert_eq!(fixture.peers.reads("a"), 3);
    let held = first[0].clone().unwrap().bytes;
    assert_eq!(second[0].clone().unwrap().bytes.as_ptr(), held.as_ptr());
    drop((first, second));
    assert_eq!(fixture.neighbours.in_flight(), 1);
    let third = fixture.fetch(&wanted).await;
    assert_eq!(third[0].clone().unwrap().bytes.as_ptr(), held.as_ptr());
    assert_eq!(fixture.peers.reads("a"), 5, "two of the three were dropped");
    drop((held, third));
    assert_eq!(fixture.neighbours.in_flight(), 0);
}

/// A scan that ends early takes its reads back, unless another one waits for them.
#[tokio::test]
async fn what_nobody_waits_for_is_given_up() {
    let fixture = fixture(&["a"], short());
    fixture.peers.delay("a", Duration::from_secs(60));
    let dropped = Arc::clone(&fixture.peers.peers["a"].dropped);
    let (first, second) = (
        fixture.start(&row_group(0, 2)),
        fixture.start(&row_group(0, 1)),
    );
    while fixture.peers.batches("a") == 0 {
        tokio::task::yield_now().await;
    }
    drop(first);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(dropped.load(Ordering::SeqCst), 0);
    drop(second);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    assert_eq!(fixture.neighbours.in_flight(), 0);
}

/// A neighbour that hangs costs its deadline once. Then it is left, then tried by a read that nobody
/// waits for, and asked again when that one was answered.
#[tokio::test]
async fn a_neighbour_that_hangs_costs_its_deadline_once() {
    let fixture = fixture(&["a"], short());
    fixture.peers.set("a", Does::Hang);
    let started = Instant::now();
    let misses = fixture.misses(&row_group(0, 4)).await;
    assert_eq!(misses, [RemoteMiss::Deadline; 4]);
    let waited = started.elapsed();
    assert!(waited >= Duration::from_millis(200), "{waited:?}");
    assert!(waited < Duration::from_millis(600), "{waited:?}");

    let started = Instant::now();
    assert_eq!(
        fixture.misses(&row_group(1, 4)).await,
        [RemoteMiss::NotWorth; 4]
    );
    assert_eq!(fixture.offers(&chunk(1, 0)), Err(RemoteMiss::NotWorth));
    assert!(started.elapsed() < Duration::from_millis(50));
    assert_eq!(fixture.peers.batches("a"), 1, "left alone");

    fixture.peers.set("a", Does::Answer);
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(fixture.offers(&chunk(1, 0)), Err(RemoteMiss::NotWorth));
    assert_eq!(fixture.offers(&chunk(1, 1)), Err(RemoteMiss::NotWorth));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(fixture.peers.batches("a"), 2, "one probe");
    assert_eq!(fixture.offers(&chunk(1, 0)), Ok(CHUNK_BYTES));
    assert!(fixture.misses(&row_group(1, 4)).await.is_empty());
}

/// Where one holder fails at once another one is asked; only then the origin.
#[tokio::test]
async fn a_replica_stands_in_for_a_neighbour_that_is_gone() {
    let fixture = fixture(&["a", "b", "c"], short());
    for (gone, does) in [("a", Does::Close), ("b", Does::Lack)] {
        fixture.peers.set(gone, does);
    }
    for group in 0..20 {
        assert!(fixture.misses(&row_group(group, 4)).await.is_empty());
    }
    assert!(fixture.peers.batches("a") <= 2, "left after it failed");
    fixture.peers.set("c", Does::Close);
    tokio::time::sleep(Duration::from_millis(1)).await;
    let misses = fixture.misses(&row_group(100, 4)).await;
    assert_eq!(misses.len(), 4);
    assert!(
        misses
            .iter()
            .all(|m| matches!(m, RemoteMiss::Unreachable | RemoteMiss::Stale)),
        "{misses:?}"
    );
}

/// A place that turned out to hold something else is not asked again until the directory changes.
#[tokio::test]
async fn an_old_directory_costs_one_miss() {
    let fixture = fixture(&["a"], short());
    fixture.peers.set("a", Does::Lack);
    assert_eq!(fixture.misses(&row_group(0, 1)).await, [RemoteMiss::Stale]);
    assert_eq!(
        fixture.misses(&row_group(0, 3)).await,
        [RemoteMiss::NotHeld; 3]
    );
    assert_eq!(fixture.offers(&chunk(0, 2)), Err(RemoteMiss::NotHeld));
    assert_eq!(fixture.peers.batches("a"), 1);
    assert_eq!(
        fixture.offers(&chunk(1, 0)),
        Ok(CHUNK_BYTES),
        "other segments are asked for"
    );
    fixture.peers.set("a", Does::Answer);
    fixture.change(|_| {});
    assert!(fixture.misses(&row_group(0, 3)).await.is_empty());
}

/// A thousand chunks with a flipped byte each: every one is found out, and none is handed on.
#[tokio::test]
async fn corrupt_chunks_are_never_handed_on() {
    let fixture = fixture(&["a"], short());
    fixture.peers.set("a", Does::Corrupt);
    let misses = fixture.misses(&row_group(0, 1000)).await;
    assert_eq!(misses, [RemoteMiss::Corrupt; 1000]);
    assert_eq!(
        fixture.offers(&chunk(1, 0)),
        Err(RemoteMiss::NotWorth),
        "so many are its fault"
    );
}

/// One damaged chunk is not the end of a neighbour.
#[tokio::test]
async fn one_corrupt_chunk_is_not_the_neighbours_fault() {
    let fixture = fixture(&["a"], short());
    fixture.peers.set("a", Does::Corrupt);
    assert_eq!(
        fixture.misses(&row_group(0, 1)).await,
        [RemoteMiss::Corrupt]
    );
    fixture.peers.set("a", Does::Answer);
    assert_eq!(
        fixture.offers(&chunk(0, 0)),
        Err(RemoteMiss::NotHeld),
        "not this one again"
    );
    assert!(fixture.misses(&row_group(1, 4)).await.is_empty());
}

/// A form of a later build is as good as nothing.
#[tokio::test]
async fn an_unknown_form_is_not_held() {
    let fixture = fixture(&["a"], short());
    fixture.change(|holdings| {
        holdings.by_row_group.insert(0, vec![("a".to_owned(), 200)]);
    });
    assert_eq!(fixture.offers(&chunk(0, 0)), Err(RemoteMiss::NotHeld));
    assert_eq!(
        fixture.misses(&row_group(0, 2)).await,
        [RemoteMiss::NotHeld; 2]
    );
    assert_eq!(fixture.peers.batches("a"), 0);
}

/// However many scans there are, no more is asked for at once than is allowed, and a neighbour that
/// hangs does not take all of it.
#[tokio::test]
async fn bytes_in_flight_are_bounded() {
    let max = 64 * PERMIT_BYTES;
    let settings = NeighbourSettings {
        in_flight_bytes_max: max,
        deadline: Duration::from_secs(5),
        ..short()
    };
    let fixture = fixture(&["a", "slow"], settings);
    for group in 0..200 {
        let peer = if group % 2 == 0 { "a" } else { "slow" };
        fixture.change(|holdings| {
            holdings
                .by_row_group
                .insert(group, vec![(peer.to_owned(), FORM_ARROW)]);
        });
    }
    fixture.peers.delay("a", Duration::from_millis(1));
    fixture.peers.delay("slow", Duration::from_secs(60));
    // Of the slow one's: more than it may have, for as long as this test takes.
    let stuck: Vec<Fetch> = (0..100)
        .map(|i| fixture.start(&row_group(i * 2 + 1, 40)))
        .collect();
    let quick: Vec<Fetch> = (0..100)
        .map(|i| fixture.start(&row_group(i * 2, 40)))
        .collect();
    let started = Instant::now();
    for fetch in quick {
        assert!(fetch.landed().await.iter().all(Result::is_ok));
    }
    assert!(started.elapsed() < Duration::from_secs(4));
    let most = fixture.peers.in_flight_most.load(Ordering::SeqCst);
    assert!(most <= max, "{most} of {max}");
    assert!(most > max / 2, "{most} of {max}");
    drop(stuck);
}

/// Replicas share the reads; one that is measured slower gets none of them.
#[tokio::test]
async fn reads_spread_over_replicas_by_what_they_cost() {
    let fixture = fixture(&["a", "b", "slow"], short());
    fixture.peers.measured("a", Duration::from_millis(2));
    fixture.peers.measured("b", Duration::from_millis(2));
    fixture.peers.measured("slow", Duration::from_millis(200));
    for group in 0..100 {
        assert!(fixture.misses(&row_group(group, 10)).await.is_empty());
    }
    let (a, b, slow) = (
        fixture.peers.reads("a"),
        fixture.peers.reads("b"),
        fixture.peers.reads("slow"),
    );
    assert_eq!((a + b, slow), (1000, 0));
    assert!(a > 300 && b > 300, "{a} and {b}");
}

/// A neighbour slower than the origin is not asked, except now and then to see.
#[tokio::test]
async fn the_origin_is_read_where_it_is_quicker() {
    let fixture = fixture(&["a"], short());
    fixture.peers.measured("a", Duration::from_millis(50));
    assert_eq!(
        fixture.offers(&chunk(0, 0)),
        Ok(CHUNK_BYTES),
        "the origin is not measured"
    );
    let quick = Duration::from_millis(1);
    fixture
        .neighbours
        .origin_answered(STORE, CHUNK_BYTES, quick);
    assert_eq!(fixture.offers(&chunk(0, 0)), Err(RemoteMiss::NotWorth));
    for _ in 0..40 {
        let slow = Duration::from_millis(300);
        fixture.neighbours.origin_answered(STORE, CHUNK_BYTES, slow);
    }
    assert_eq!(fixture.offers(&chunk(0, 0)), Ok(CHUNK_BYTES));
    let holdings = fixture.neighbours.holdings();
    let elsewhere = fixture
        .neighbours
        .offers(&holdings, "file://", &chunk(0, 0));
    assert_eq!(elsewhere, Ok(CHUNK_BYTES), "stores are measured apart");
}
