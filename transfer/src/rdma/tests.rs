//! Transfers over a real device. They are ignored where there is none: `tests/rdma/run.sh` runs them
//! in guests with soft-RoCE, whose address is in `STOA_RDMA_ADDRESS`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::future::BoxFuture;
use twox_hash::XxHash3_64;

use super::*;
use crate::client::{Client, ClientSettings, PeerAddress};
use crate::conformance::{self, INCARNATION, content};
use crate::error::{ErrorKind, Refusal};
use crate::in_process::InProcess;
use crate::segment::{Segment, SegmentKey, SegmentSource};
use crate::tcp::{ServerHandle, ServerSettings, Tcp, TcpSettings};
use crate::tests::certificates::Authority;
use crate::tls::Tls;
use crate::transport::{Link, Outcomes, PeerIdentity, Read, TransportKind};

fn address() -> IpAddr {
    std::env::var("STOA_RDMA_ADDRESS")
        .expect("STOA_RDMA_ADDRESS is not set; run tests/rdma/run.sh")
        .parse()
        .expect("STOA_RDMA_ADDRESS is no IP address")
}

/// A sealed file on tmpfs, mapped read-only, as segments of a cache are.
fn sealed(segment: u64, bytes: usize) -> Segment {
    // Tests run side by side in one process.
    static FILES: AtomicU64 = AtomicU64::new(0);
    let file = FILES.fetch_add(1, Ordering::Relaxed);
    let path = format!("/dev/shm/stoa-rdma-{}-{file}", std::process::id());
    let mut options = std::fs::OpenOptions::new();
    let options = options.create_new(true).write(true).mode(0o440);
    options
        .open(&path)
        .unwrap()
        .write_all(&truth(segment, bytes))
        .unwrap();
    let file = File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let map = crate::memory::map_file(&file).unwrap();
    Segment::new(map).with_file(Arc::new(file))
}

/// Segments 1 to `count`, until they are taken away.
#[derive(Debug)]
struct Segments {
    segments: Mutex<Vec<Option<Segment>>>,
}

impl Segments {
    fn new(count: u64, bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            segments: Mutex::new((1..=count).map(|n| Some(sealed(n, bytes))).collect()),
        })
    }

    fn take_away(&self, segment: u64) {
        self.segments.lock().unwrap()[segment as usize - 1] = None;
    }
}

impl SegmentSource for Segments {
    fn open(&self, key: SegmentKey) -> crate::error::Result<Segment, Refusal> {
        if key.incarnation != INCARNATION {
            return Err(Refusal::wrong_incarnation(key, INCARNATION));
        }
        let segments = self.segments.lock().unwrap();
        let index = usize::try_from(key.segment).unwrap_or(0).wrapping_sub(1);
        segments
            .get(index)
            .cloned()
            .flatten()
            .ok_or_else(|| Refusal::unknown_segment(key))
    }
}

/// A source that has nothing: bytes that arrive did not come through it.
#[derive(Debug)]
struct Nothing;

impl SegmentSource for Nothing {
    fn open(&self, key: SegmentKey) -> crate::error::Result<Segment, Refusal> {
        Err(Refusal::failed(format!(
            "{key} came over the transport below"
        )))
    }
}

/// Hands set-up calls to a server, with what a test does to them.
#[derive(Debug)]
struct SetUp {
    server: RdmaServer,
    /// Exclusive-ored to each byte of the keys of grants.
    wrong_key: AtomicBool,
    /// Announces segments to be longer than they are.
    longer: AtomicBool,
    /// Swallows notices of segments that are taken back.
    deaf: AtomicBool,
}

#[async_trait]
impl CallHandler for SetUp {
    async fn call(
        &self,
        peer: &PeerIdentity,
        method: u16,
        body: Bytes,
    ) -> crate::error::Result<Bytes, Refusal> {
        let answer = self.server.call(peer, method, body).await?;
        if method == wire::METHOD_HOLD && self.deaf.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        if method != wire::METHOD_GRANT {
            return Ok(answer);
        }
        let mut answer = BytesMut::from(&answer[..]);
        for row in answer.chunks_exact_mut(wire::GrantRow::BYTES) {
            if self.wrong_key.load(Ordering::Relaxed) {
                row[17] ^= 0xff;
            }
            if self.longer.load(Ordering::Relaxed) {
                row[13] ^= 0x10;
            }
        }
        Ok(answer.freeze())
    }
}

/// A server and a client in one process, over one device.
struct Pair {
    setup: Arc<SetUp>,
    network: Arc<InProcess>,
    client: Client,
    peer: PeerAddress,
}

fn settings() -> RdmaSettings {
    RdmaSettings {
        enabled: true,
        revocation_grace: Duration::ZERO,
        ..RdmaSettings::default()
    }
}

/// A pair whose transport below serves `below`.
fn pair(segments: Arc<dyn SegmentSource>, below: Arc<dyn SegmentSource>) -> Pair {
    pair_with(settings(), segments, below)
}

fn pair_with(
    settings: RdmaSettings,
    segments: Arc<dyn SegmentSource>,
    below: Arc<dyn SegmentSource>,
) -> Pair {
    let server = RdmaServer::start(address(), settings.clone(), segments)
        .unwrap()
        .expect("there is a device at STOA_RDMA_ADDRESS");
    let setup = Arc::new(SetUp {
        server,
        wrong_key: AtomicBool::new(false),
        longer: AtomicBool::new(false),
        deaf: AtomicBool::new(false),
    });
    let network = Arc::new(InProcess::default());
    let address = format!("{}:1", address());
    network.serve(&address, below, setup.clone());
    let transports = with_rdma(&settings, network.clone());
    assert_eq!(transports[0].kind(), TransportKind::Rdma);
    Pair {
        setup,
        network,
        client: Client::new(ClientSettings::default(), transports),
        peer: PeerAddress {
            id: "a".to_string(),
            addresses: vec![address],
        },
    }
}

/// The bytes of a segment, made once: guests are slow.
fn truth(segment: u64, bytes: usize) -> Arc<Vec<u8>> {
    type Made = BTreeMap<(u64, usize), Arc<Vec<u8>>>;
    static MADE: Mutex<Made> = Mutex::new(Made::new());
    let mut made = MADE.lock().unwrap();
    made.entry((segment, bytes))
        .or_insert_with(|| Arc::new(content(segment, bytes)))
        .clone()
}

fn read(segment: u64, offset: usize, length: usize, whole: usize) -> Read {
    Read {
        segment: SegmentKey {
            incarnation: INCARNATION,
            segment,
        },
        offset: offset as u64,
        length: length as u64,
        checksum: Some(XxHash3_64::oneshot(
            &truth(segment, whole)[offset..offset + length],
        )),
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

impl Pair {
    async fn read(&self, reads: Vec<Read>) -> Vec<crate::error::Result<crate::memory::Block>> {
        self.client
            .submit(&self.peer, reads, soon())
            .into_vec()
            .await
    }

    fn path(&self, kind: TransportKind) -> crate::statistics::PathStatistics {
        let mut paths = self.client.paths();
        paths.retain(|path| path.transport == kind);
        paths.pop().unwrap()
    }
}

/// Reads of all sizes arrive, and nothing but the device brought them: the other transport's source
/// refuses.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn a_device_brings_reads_of_every_size() {
    const BYTES: usize = 8 << 20;
    let pair = pair(Segments::new(3, BYTES), Arc::new(Nothing));
    let mut reads = Vec::new();
    for segment in 1..=3 {
        for (offset, length) in [
            (0, 1),
            (1, 63),
            (4095, 2),
            (4096, 4096),
            (100_000, 65_537),
            (1 << 20, 1 << 20),
            (7, (1 << 20) + 1),
            (0, BYTES),
            (BYTES - 1, 1),
        ] {
            reads.push(read(segment, offset, length, BYTES));
        }
    }
    let outcomes = pair.read(reads.clone()).await;
    assert_eq!(outcomes.len(), reads.len());
    for (read, outcome) in reads.iter().zip(outcomes) {
        let block = outcome.unwrap_or_else(|error| panic!("{read:?}: {error}"));
        let start = read.offset as usize;
        let expected = &truth(read.segment.segment, BYTES)[start..start + block.len()];
        assert!(*block == *expected, "{read:?} brought other bytes");
        assert!(
            block
                .as_ptr()
                .addr()
                .is_multiple_of(crate::memory::BLOCK_ALIGN)
        );
    }
    assert_eq!(pair.setup.server.registered_bytes(), 3 * BYTES as u64);
    let path = pair.path(TransportKind::Rdma);
    assert_eq!(path.reads, reads.len() as u64);
    assert_eq!(path.errors.len(), 0, "{path:?}");
}

/// A thousand small reads, more than the queue of the connection holds, and twice: the second time
/// into memory that was used before.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn a_thousand_small_reads_wait_for_room() {
    const BYTES: usize = 4 << 20;
    let pair = pair(Segments::new(1, BYTES), Arc::new(Nothing));
    for _ in 0..2 {
        let reads = (0..1000).map(|n| read(1, n * 4096, 4096, BYTES)).collect();
        for outcome in pair.read(reads).await {
            assert_eq!(outcome.unwrap().len(), 4096);
        }
    }
    assert_eq!(pair.path(TransportKind::Rdma).bytes, 2 * 1000 * 4096);
}

/// Without a checksum nothing would tell bytes that a reused key brought, so such reads take the
/// transport below; and so do reads that find no registered memory.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn reads_without_checksum_or_memory_take_the_transport_below() {
    const BYTES: usize = 1 << 20;
    let segments = Segments::new(1, BYTES);
    let little = RdmaSettings {
        receive_bytes_max: 0,
        ..settings()
    };
    let pair = pair_with(little, segments.clone(), segments);
    let checked = read(1, 0, BYTES, BYTES);
    let unchecked = Read {
        checksum: None,
        ..checked
    };
    for outcome in pair.read(vec![checked, unchecked]).await {
        let block = outcome.unwrap();
        assert!(*block == **truth(1, BYTES));
        assert_eq!(block.via(), Some(TransportKind::InProcess));
    }
    // They count where they came.
    assert_eq!(pair.path(TransportKind::Rdma).reads, 0);
    assert_eq!(pair.path(TransportKind::InProcess).reads, 2);
    assert!(
        pair.setup.server.registered_bytes() > 0,
        "the segment was granted"
    );
}

/// What the server refuses over TCP it refuses here, with the same kind: the caller looks up again
/// where the bytes are.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn refusals_are_those_of_the_other_transports() {
    const BYTES: usize = 1 << 16;
    let pair = pair(Segments::new(1, BYTES), Arc::new(Nothing));
    let good = read(1, 0, BYTES, BYTES);
    let key = |incarnation, segment| SegmentKey {
        incarnation,
        segment,
    };
    let unknown = Read {
        segment: key(INCARNATION, 9),
        ..good
    };
    let old = Read {
        segment: key(INCARNATION + 1, 1),
        ..good
    };
    let behind = Read { offset: 1, ..good };
    let overflowing = Read {
        offset: u64::MAX,
        ..good
    };
    let outcomes = pair
        .read(vec![unknown, old, behind, overflowing, good])
        .await;
    for (outcome, words) in outcomes.iter().zip([
        "is not here",
        "wrong_incarnation",
        "is not inside segment",
        "is not inside segment",
    ]) {
        let error = outcome.as_ref().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    assert!(
        outcomes[4].is_ok(),
        "the connection goes on: {:?}",
        outcomes[4]
    );
    assert_eq!(pair.path(TransportKind::Rdma).connections, 1);
}

/// A checksum that does not fit what arrives is noticed, as over TCP.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn wrong_bytes_are_never_seen() {
    const BYTES: usize = 1 << 16;
    let pair = pair(Segments::new(1, BYTES), Arc::new(Nothing));
    let wrong = Read {
        checksum: Some(1),
        ..read(1, 0, BYTES, BYTES)
    };
    let outcomes = pair.read(vec![wrong]).await;
    assert_eq!(outcomes[0].as_ref().unwrap_err().kind(), ErrorKind::Corrupt);
}

/// A key that the server never gave: the peer's device refuses, the connection is dead, and what
/// was outstanding comes over the transport below.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn a_wrong_key_ends_the_connection_and_the_batch_comes_another_way() {
    const BYTES: usize = 1 << 20;
    let segments = Segments::new(1, BYTES);
    let pair = pair(segments.clone(), segments);
    pair.setup.wrong_key.store(true, Ordering::Relaxed);
    let reads: Vec<Read> = (0..64).map(|n| read(1, n * 4096, 4096, BYTES)).collect();
    for outcome in pair.read(reads).await {
        assert_eq!(outcome.unwrap().len(), 4096);
    }
    let path = pair.path(TransportKind::Rdma);
    assert_eq!(path.reads, 0);
    let error = path.last_error.unwrap();
    assert!(error.contains("completion status 10"), "{error}");
    assert_eq!(pair.path(TransportKind::InProcess).reads, 64);

    // With right keys the path is used again, once it has been left alone.
    pair.setup.wrong_key.store(false, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(1)).await;
    pair.read(vec![read(1, 0, BYTES, BYTES)]).await[0]
        .as_ref()
        .unwrap();
    assert_eq!(pair.path(TransportKind::Rdma).reads, 1);
}

/// A server that announces more than there is: the device still reads nothing behind the segment.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn nothing_is_read_behind_a_segment() {
    const BYTES: usize = 1 << 16;
    let segments = Segments::new(1, BYTES);
    let pair = pair(segments.clone(), segments);
    pair.setup.longer.store(true, Ordering::Relaxed);
    let behind = Read {
        offset: BYTES as u64 - 16,
        length: 32,
        ..read(1, 0, BYTES, BYTES)
    };
    let outcomes = pair.read(vec![behind]).await;
    // The transport below, asked next, knows the length.
    assert_eq!(outcomes[0].as_ref().unwrap_err().kind(), ErrorKind::Stale);
    let error = pair.path(TransportKind::Rdma).last_error.unwrap();
    assert!(error.contains("completion status 10"), "{error}");
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{what} does not come"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A segment that its source gives up is deregistered soon after, and clients that are told ask
/// again instead of using the key: the connection lives on.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn a_segment_that_is_taken_back_is_refused_and_the_connection_goes_on() {
    const BYTES: usize = 1 << 20;
    let segments = Segments::new(2, BYTES);
    let patient = RdmaSettings {
        revocation_grace: Duration::from_secs(1),
        ..settings()
    };
    let pair = pair_with(patient, segments.clone(), Arc::new(Nothing));
    let both = vec![read(1, 0, 4096, BYTES), read(2, 0, 4096, BYTES)];
    for outcome in pair.read(both.clone()).await {
        outcome.unwrap();
    }
    segments.take_away(1);
    until("deregistration", || {
        pair.setup.server.registered_bytes() == BYTES as u64
    })
    .await;
    let outcomes = pair.read(both).await;
    assert_eq!(outcomes[0].as_ref().unwrap_err().kind(), ErrorKind::Stale);
    assert!(outcomes[1].is_ok());
    let path = pair.path(TransportKind::Rdma);
    assert_eq!(path.errors.get(&ErrorKind::Closed), None, "{path:?}");
}

/// A client that uses a key after it was revoked gets nothing, and its connection ends.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn a_revoked_region_cannot_be_read() {
    const BYTES: usize = 1 << 20;
    let segments = Segments::new(1, BYTES);
    let pair = pair(segments.clone(), segments.clone());
    pair.setup.deaf.store(true, Ordering::Relaxed);
    let rdma = Rdma::new(settings(), pair.network.clone()).unwrap();
    let link = rdma.connect(&pair.peer.addresses[0]).await.unwrap();
    let reads = vec![read(1, 0, 4096, BYTES)];
    let (_, outcome) = link.submit(reads.clone(), soon()).next().await.unwrap();
    assert_eq!(outcome.unwrap().len(), 4096);
    segments.take_away(1);
    until("deregistration", || {
        pair.setup.server.registered_bytes() == 0
    })
    .await;
    let (_, outcome) = link.submit(reads.clone(), soon()).next().await.unwrap();
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    assert!(
        error.to_string().contains("completion status 10"),
        "{error}"
    );
    assert!(link.is_closed());
    let (_, outcome) = link.submit(reads.clone(), soon()).next().await.unwrap();
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Closed);
    // A new connection is told what is the matter.
    let outcomes = pair.read(reads).await;
    assert_eq!(outcomes[0].as_ref().unwrap_err().kind(), ErrorKind::Stale);
}

/// A connection request without a token of a session, or with one that was used, is rejected.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn a_connection_needs_a_token_and_a_token_is_good_once() {
    const BYTES: usize = 1 << 16;
    let pair = pair(Segments::new(1, BYTES), Arc::new(Nothing));
    let me = PeerIdentity {
        role: None,
        name: "(test)".to_string(),
        address: "here".to_string(),
    };
    let rdma = Rdma::new(settings(), Arc::new(InProcess::default())).unwrap();
    let open = Bytes::copy_from_slice(&wire::open_request());
    let answer = pair.setup.call(&me, wire::METHOD_OPEN, open).await.unwrap();
    let answer = wire::parse_open_answer(&answer).unwrap();
    let host = std::net::SocketAddr::new(address(), answer.port);

    let invented = wire::connect_data(wire::Token([1, 2]));
    for data in [&invented[..], &[], b"no connection data of ours at all"] {
        let error = rdma.connect_device(host, data).await.unwrap_err();
        assert!(error.contains("rejected"), "{data:?}: {error}");
    }
    let token = wire::connect_data(wire::Token([answer.token_a, answer.token_b]));
    let connected = rdma.connect_device(host, &token).await.unwrap();
    assert_eq!(pair.setup.server.connections(), 1);
    let error = rdma.connect_device(host, &token).await.unwrap_err();
    assert!(error.contains("rejected"), "{error}");
    drop(connected);
}

/// A client that goes away takes its session with it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn sessions_end_with_their_clients() {
    const BYTES: usize = 1 << 16;
    let Pair {
        setup,
        client,
        peer,
        ..
    } = pair(Segments::new(1, BYTES), Arc::new(Nothing));
    let batch = client.submit(&peer, vec![read(1, 0, BYTES, BYTES)], soon());
    let block = batch.into_vec().await.remove(0).unwrap();
    assert_eq!(setup.server.connections(), 1);
    drop(client);
    until("the end of the session", || setup.server.connections() == 0).await;
    assert!(*block == **truth(1, BYTES), "a block outlives its client");
}

/// A peer without RDMA, and one whose address leads to no device, are read over the transport below.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn a_peer_without_rdma_is_read_over_the_transport_below() {
    const BYTES: usize = 1 << 16;
    let network = InProcess::default();
    let here = format!("{}:1", address());
    network.serve(&here, Segments::new(1, BYTES), Arc::new(NoCalls));
    let client = Client::new(
        ClientSettings::default(),
        with_rdma(&settings(), Arc::new(network)),
    );
    let peer = PeerAddress {
        id: "plain".to_string(),
        addresses: vec![here],
    };
    for _ in 0..2 {
        let batch = client.submit(&peer, vec![read(1, 0, BYTES, BYTES)], soon());
        assert!(*batch.into_vec().await.remove(0).unwrap() == **truth(1, BYTES));
    }
    let paths = client.paths();
    assert_eq!(paths[0].transport, TransportKind::Rdma);
    assert!(
        paths[0].last_error.as_ref().unwrap().contains("no method"),
        "{paths:?}"
    );
    assert_eq!(paths[1].transport, TransportKind::InProcess);
    assert_eq!(paths[1].reads, 2);
}

/// Of two addresses the first leads nowhere over RDMA: the second one does.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn the_second_address_is_taken_where_the_first_leads_nowhere() {
    const BYTES: usize = 1 << 20;
    let mut pair = pair(Segments::new(1, BYTES), Arc::new(Nothing));
    let nobody = "10.9.0.77:1".to_string();
    pair.peer.addresses.insert(0, nobody.clone());
    let outcomes = pair.read(vec![read(1, 0, BYTES, BYTES)]).await;
    outcomes[0].as_ref().unwrap();
    let paths = pair.client.paths();
    let used = paths
        .iter()
        .find(|path| path.transport == TransportKind::Rdma && path.address != nobody);
    assert_eq!(used.unwrap().reads, 1, "{paths:?}");
}

/// Memory that may not be locked: the error says what to raise, and the reads come another way.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device, and to be run without CAP_IPC_LOCK: tests/rdma/run.sh"]
async fn too_little_lockable_memory_is_said_and_costs_nothing_else() {
    const BYTES: usize = 8 << 20;
    let segments = Segments::new(1, BYTES);
    let pair = pair(segments.clone(), segments);
    let outcomes = pair.read(vec![read(1, 0, 4096, BYTES)]).await;
    outcomes[0].as_ref().unwrap();
    let error = pair.path(TransportKind::Rdma).last_error.unwrap();
    assert!(error.contains("ulimit -l"), "{error}");
    assert_eq!(pair.path(TransportKind::InProcess).reads, 1);
}

/// The device goes away under a batch: what it has not brought comes over the transport below.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device, which it removes: tests/rdma/run.sh"]
async fn a_batch_whose_device_is_removed_ends_over_the_transport_below() {
    const BYTES: usize = 16 << 20;
    let segments = Segments::new(2, BYTES);
    let pair = pair(segments.clone(), segments);
    // Enough that the device is gone long before they have all come.
    let reads: Vec<Read> = (0..512)
        .map(|n| read(1 + n as u64 % 2, n / 2 % 32 * (512 << 10), 512 << 10, BYTES))
        .collect();
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut batch = pair.client.submit(&pair.peer, reads.clone(), deadline);
    let (_, first) = batch.next().await.unwrap();
    first.unwrap();
    // The command may wait for this process to let go of the device's file, so nobody waits for it.
    let mut removal = std::process::Command::new("rdma")
        .args(["link", "delete", "rxe0"])
        .spawn()
        .unwrap();
    let mut arrived = 1;
    while let Some((index, outcome)) = batch.next().await {
        let block = outcome.unwrap_or_else(|error| panic!("read {index}: {error}"));
        assert_eq!(block.len(), 512 << 10);
        arrived += 1;
    }
    assert_eq!(arrived, reads.len());
    let rdma = pair.path(TransportKind::Rdma);
    let below = pair.path(TransportKind::InProcess);
    println!(
        "{} reads over RDMA, {} after it was gone: {:?}",
        rdma.reads, below.reads, rdma.last_error
    );
    assert!(rdma.reads > 0 && below.reads > 0, "{rdma:?} {below:?}");
    assert_eq!(rdma.reads + below.reads, reads.len() as u64);
    // What comes later takes the other way at once.
    pair.read(vec![reads[0]]).await[0].as_ref().unwrap();
    // It ends with this process at the latest.
    let _ = removal.try_wait();
}

/// Pairs over TCP and the device. The server is told when a read took TCP.
struct DevicePairs {
    authority: Option<Authority>,
}

impl DevicePairs {
    fn tls(&self, name: &str) -> Option<Tls> {
        let settings = self.authority.as_ref()?.sign(name, Some("node"), false);
        Some(Tls::open(settings).unwrap())
    }
}

/// Makes every read one that may go over the device. What is asked for is compared around this.
#[derive(Debug)]
struct Checked<T>(T);

#[async_trait]
impl Transport for Checked<Rdma> {
    fn kind(&self) -> TransportKind {
        self.0.kind()
    }

    async fn connect(&self, address: &str) -> crate::error::Result<Arc<dyn Link>> {
        Ok(Arc::new(Checked(self.0.connect(address).await?)))
    }
}

impl Link for Checked<Arc<dyn Link>> {
    fn submit(&self, mut reads: Vec<Read>, deadline: Instant) -> Outcomes {
        for read in &mut reads {
            read.checksum = Some(read.checksum.unwrap_or(0));
        }
        self.0.submit(reads, deadline)
    }

    fn call(
        &self,
        method: u16,
        body: Bytes,
        deadline: Instant,
    ) -> BoxFuture<'static, crate::error::Result<Bytes>> {
        self.0.call(method, body, deadline)
    }

    fn received_bytes(&self) -> u64 {
        self.0.received_bytes()
    }

    fn outstanding_bytes(&self) -> u64 {
        self.0.outstanding_bytes()
    }

    fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    fn close(&self, reason: &str) {
        self.0.close(reason);
    }
}

/// A server of one pair. At its end nothing may have been read over TCP.
struct ByDeviceOnly(ServerHandle);

impl Drop for ByDeviceOnly {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.0.statistics().reads, 0, "reads took TCP");
        }
    }
}

fn tcp() -> Arc<dyn Transport> {
    Arc::new(Tcp::new(TcpSettings {
        insecure: true,
        ..TcpSettings::default()
    }))
}

#[async_trait]
impl conformance::Pairs for DevicePairs {
    fn segments(&self, sizes: &[usize]) -> conformance::Segments {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        // The files live as long as they are mapped.
        conformance::Segments::in_files(sizes, directory.path()).unwrap()
    }

    async fn pair(
        &self,
        segments: Arc<dyn SegmentSource>,
        calls: Arc<dyn CallHandler>,
    ) -> conformance::Pair {
        let server = ServerSettings {
            address: format!("{}:0", address()),
            tls: self.tls("server"),
            insecure: self.authority.is_none(),
            ..ServerSettings::default()
        };
        let below = Tcp::new(TcpSettings {
            tls: self.tls("client"),
            insecure: self.authority.is_none(),
            ..TcpSettings::default()
        });
        let rdma = Rdma::new(settings(), Arc::new(below)).unwrap();
        let server = serve_with_rdma(server, &settings(), segments, calls)
            .await
            .unwrap();
        conformance::Pair {
            transport: Arc::new(Checked(rdma)),
            address: server.address().to_string(),
            server: Box::new(ByDeviceOnly(server)),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn rdma_conforms() {
    conformance::all(&DevicePairs { authority: None }).await;
}

/// What sets RDMA up is inside of TLS.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn rdma_set_up_over_tls_conforms() {
    let authority = Some(Authority::new("test"));
    conformance::all(&DevicePairs { authority }).await;
}

#[tokio::test]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn rdma_conforms_on_one_thread() {
    conformance::all(&DevicePairs { authority: None }).await;
}

/// Calls that wait past their deadlines do not make the link look as if the peer hung: others are
/// answered over it meanwhile, and those count although no device brought them.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a device: tests/rdma/run.sh"]
async fn answers_to_calls_show_that_the_peer_lives() {
    let segments = Arc::new(conformance::Segments::in_memory(&[1000]));
    let pair = conformance::Pairs::pair(
        &DevicePairs { authority: None },
        segments,
        Arc::new(conformance::Echo),
    )
    .await;
    let client = Client::new(ClientSettings::default(), vec![pair.transport]);
    let peer = PeerAddress {
        id: "a".to_string(),
        addresses: vec![pair.address],
    };
    let answer = client.call(&peer, 1, Bytes::new(), soon()).await;
    answer.unwrap();
    for _ in 0..4 {
        let deadline = Instant::now() + Duration::from_millis(500);
        let waiting = client.call(&peer, 3, Bytes::new(), deadline);
        let meanwhile = client.call(&peer, 1, Bytes::from_static(b"x"), soon());
        let (waited, answer) = tokio::join!(waiting, meanwhile);
        assert_eq!(waited.unwrap_err().kind(), ErrorKind::Deadline);
        assert_eq!(answer.unwrap(), "x");
    }
    let paths = client.paths();
    assert_eq!(paths[0].connections, 1, "{paths:?}");
    assert_eq!(paths[0].errors.get(&ErrorKind::Closed), None, "{paths:?}");
}

/// Loopback has no device on any host: what allows RDMA is served and read over TCP all the same,
/// and nothing is said to be wrong.
#[tokio::test]
async fn where_no_device_leads_everything_takes_tcp() {
    const BYTES: usize = 1 << 16;
    let segments = Segments::new(1, BYTES);
    let enabled = settings();
    let server = serve_with_rdma(
        ServerSettings::default(),
        &enabled,
        segments,
        Arc::new(NoCalls),
    )
    .await
    .unwrap();
    let peer = PeerAddress {
        id: "a".to_string(),
        addresses: vec![server.address().to_string()],
    };
    let client = Client::new(ClientSettings::default(), with_rdma(&enabled, tcp()));
    let batch = client.submit(&peer, vec![read(1, 0, BYTES, BYTES)], soon());
    assert!(*batch.into_vec().await.remove(0).unwrap() == **truth(1, BYTES));
    let paths = client.paths();
    let tcp_path = paths.last().unwrap();
    assert_eq!(tcp_path.transport, TransportKind::Tcp);
    assert_eq!((tcp_path.reads, tcp_path.errors.len()), (1, 0));
    assert_eq!(server.statistics().reads, 1);
}

/// Without consent there is no RDMA, whatever the host has.
#[tokio::test]
async fn rdma_needs_consent() {
    let settings = RdmaSettings::default();
    assert!(!settings.enabled);
    let transports = with_rdma(&settings, tcp());
    assert_eq!(transports.len(), 1);
    assert_eq!(transports[0].kind(), TransportKind::Tcp);
    let any = IpAddr::from([0, 0, 0, 0]);
    let server = RdmaServer::start(any, settings, Segments::new(1, 64)).unwrap();
    assert!(server.is_none());
}

/// Where a guest of a pair serves.
const PAIR_PORT: u16 = 7000;
const PAIR_SEGMENTS: u64 = 4;
const PAIR_BYTES: usize = 8 << 20;
/// The call upon which the server's process ends without a word.
const METHOD_DIE: u16 = 13;

/// Dies when it is told to.
#[derive(Debug)]
struct Mortal;

#[async_trait]
impl CallHandler for Mortal {
    async fn call(
        &self,
        _: &PeerIdentity,
        method: u16,
        _: Bytes,
    ) -> crate::error::Result<Bytes, Refusal> {
        if method == METHOD_DIE {
            let me = nix::unistd::Pid::this();
            nix::sys::signal::kill(me, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        Err(Refusal::unknown_method(method))
    }
}

/// The serving guest of a pair, until it is told to die.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "half of a pair: tests/rdma/run.sh"]
async fn between_hosts_serving() {
    let any = IpAddr::from([0, 0, 0, 0]);
    let segments = Segments::new(PAIR_SEGMENTS, PAIR_BYTES);
    let server = ServerSettings {
        address: format!("{any}:{PAIR_PORT}"),
        insecure: true,
        ..ServerSettings::default()
    };
    let _server = serve_with_rdma(server, &settings(), segments, Arc::new(Mortal))
        .await
        .unwrap();
    std::future::pending().await
}

/// A client of the other guest, over these addresses of it.
fn pair_client(addresses: &[&str]) -> (Client, PeerAddress) {
    let client = Client::new(ClientSettings::default(), with_rdma(&settings(), tcp()));
    let peer = PeerAddress {
        id: "other".to_string(),
        addresses: addresses
            .iter()
            .map(|host| format!("{host}:{PAIR_PORT}"))
            .collect(),
    };
    (client, peer)
}

fn pair_reads(count: u64, length: usize) -> Vec<Read> {
    let fit = PAIR_BYTES / length;
    (0..count)
        .map(|n| {
            let offset = (n as usize * 7) % fit * length;
            read(1 + n % PAIR_SEGMENTS, offset, length, PAIR_BYTES)
        })
        .collect()
}

fn tell(client: &Client) {
    for path in client.paths() {
        println!(
            "{} {}: {} reads, {} bytes, errors {:?} {:?}",
            path.transport, path.address, path.reads, path.bytes, path.errors, path.last_error
        );
    }
}

async fn wait_for_peer(client: &Client, peer: &PeerAddress) {
    let start = Instant::now();
    loop {
        let batch = client.submit(
            peer,
            pair_reads(1, 4096),
            Instant::now() + Duration::from_secs(2),
        );
        match batch.into_vec().await.remove(0) {
            Ok(_) => return,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(120), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

fn run(command: &[&str]) {
    let status = std::process::Command::new(command[0])
        .args(&command[1..])
        .status()
        .unwrap();
    assert!(status.success(), "{command:?}");
}

/// One host reads the memory of another: all bytes right, all of them by the device, also where
/// the wire loses packets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "half of a pair: tests/rdma/run.sh"]
async fn between_hosts_1_reads_arrive() {
    let (client, peer) = pair_client(&["10.9.0.1"]);
    wait_for_peer(&client, &peer).await;
    let (client, peer) = pair_client(&["10.9.0.1"]);
    let mut count = 0;
    for loss in [false, true] {
        if loss {
            run(&[
                "/usr/bin/tc",
                "qdisc",
                "add",
                "dev",
                "eth0",
                "root",
                "netem",
                "loss",
                "0.5%",
            ]);
        }
        for (reads, length) in [(400, 4096), (24, 1 << 20)] {
            let batch = client.submit(
                &peer,
                pair_reads(reads, length),
                Instant::now() + Duration::from_secs(120),
            );
            for outcome in batch.into_vec().await {
                assert_eq!(outcome.unwrap().len(), length);
            }
            count += reads;
        }
    }
    run(&["/usr/bin/tc", "qdisc", "del", "dev", "eth0", "root"]);
    tell(&client);
    let paths = client.paths();
    let rdma = paths
        .iter()
        .find(|path| path.transport == TransportKind::Rdma);
    assert_eq!(rdma.unwrap().reads, count, "{paths:?}");
}

/// Two wires, and one is cut in the middle of a batch: the rest comes over the other one, still by a
/// device.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "half of a pair: tests/rdma/run.sh"]
async fn between_hosts_2_a_cut_wire_costs_no_read() {
    let (client, peer) = pair_client(&["10.9.0.1", "10.9.1.1"]);
    wait_for_peer(&client, &peer).await;
    // Enough that the wire is cut long before they have all come.
    let reads = pair_reads(384, 1 << 20);
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut batch = client.submit(&peer, reads.clone(), deadline);
    batch.next().await.unwrap().1.unwrap();
    let cutting = std::process::Command::new("/usr/bin/ip")
        .args(["link", "set", "eth0", "down"])
        .spawn();
    let mut arrived = 1;
    while let Some((index, outcome)) = batch.next().await {
        outcome.unwrap_or_else(|error| panic!("read {index}: {error}"));
        arrived += 1;
    }
    assert_eq!(arrived, reads.len());
    assert!(cutting.unwrap().wait().unwrap().success());
    tell(&client);
    let paths = client.paths();
    let second = paths
        .iter()
        .find(|path| path.transport == TransportKind::Rdma && path.address.starts_with("10.9.1.1"));
    assert!(second.unwrap().reads > 0, "{paths:?}");
}

/// The other host's process is killed under a batch: every read ends with an error, soon and long
/// before its deadline, and what came before stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "half of a pair: tests/rdma/run.sh"]
async fn between_hosts_3_a_dead_peer_ends_its_reads() {
    let (client, peer) = pair_client(&["10.9.1.1"]);
    wait_for_peer(&client, &peer).await;
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut batch = client.submit(&peer, pair_reads(192, 1 << 20), deadline);
    let (_, first) = batch.next().await.unwrap();
    let first = first.unwrap();
    let killed = Instant::now();
    let answer = client.call(&peer, METHOD_DIE, Bytes::new(), deadline).await;
    assert!(answer.is_err(), "{answer:?}");
    let mut failed = 0;
    while let Some((_, outcome)) = batch.next().await {
        if let Err(error) = outcome {
            let kind = error.kind();
            assert!(
                matches!(kind, ErrorKind::Closed | ErrorKind::Unreachable),
                "{error}"
            );
            failed += 1;
        }
    }
    tell(&client);
    println!(
        "{failed} reads ended {:?} after the peer's death",
        killed.elapsed()
    );
    assert!(failed > 0);
    assert!(killed.elapsed() < Duration::from_secs(20));
    assert_eq!(first.len(), 1 << 20);
}
