//! Several workers on one host, each with a cache directory of its own: what they have from each
//! other, and what becomes of it when one of them fails.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoa_cache_manager::{PeerNetwork, TransferSettings, Worker, WorkerHandle, WorkerSettings};
use stoa_layout::{TableCatalog, WantedChunk};
use stoa_metastore::{PlanNotes, TableState, WorkerPlan};
use stoa_origin::Origin;
use stoa_reader::Reader;
use stoa_shm::holdings::{Fetched, HOLDINGS_METHOD, HoldingsFetch, Scope};
use stoa_shm::{Directory, DirectoryReader};
use stoa_transfer::{
    Client, ClientSettings, ErrorKind, Fault, Faulty, PeerAddress, Read, RefusalKind, SegmentKey,
    Tcp, TcpSettings, TransferError, Transport,
};
use support::*;

const CAPACITY: u64 = 128 << 20;
const COLUMNS: [&str; 3] = ["number", "price", "word"];

/// One host of a cluster.
struct Node {
    id: String,
    cache: tempfile::TempDir,
    /// Its own, so that its requests can be counted.
    origin: Origin,
    worker: Option<WorkerHandle>,
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = stoa_shm::counters::AccessCounters::remove(self.cache.path());
    }
}

impl Node {
    fn new(world: &World, id: &str) -> Node {
        Node {
            id: id.into(),
            cache: cache_directory(),
            origin: world.another_origin(),
            worker: None,
        }
    }

    async fn started(world: &World, id: &str) -> Node {
        let mut node = Node::new(world, id);
        node.start(world, None).await;
        node
    }

    fn settings(&self, world: &World) -> WorkerSettings {
        WorkerSettings {
            id: self.id.clone(),
            cache_dir: self.cache.path().into(),
            transfer: Some(transfer()),
            lease_ttl: Duration::from_secs(2),
            ..world.settings(CAPACITY)
        }
    }

    /// Starts the worker in a runtime of its own, which can die at once.
    async fn start_alone(&mut self, world: &World) -> tokio::runtime::Runtime {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let network = PeerNetwork::new(&transfer()).unwrap();
        let (settings, records) = (self.settings(world), world.records.clone());
        let starting = Worker::start_in(settings, records, self.origin.clone(), Some(network));
        self.worker = Some(runtime.spawn(starting).await.unwrap().unwrap());
        runtime
    }

    async fn start(&mut self, world: &World, network: Option<PeerNetwork>) {
        let settings = self.settings(world);
        let network = network.unwrap_or_else(|| PeerNetwork::new(&transfer()).unwrap());
        let (records, origin) = (world.records.clone(), self.origin.clone());
        let started = Worker::start_in(settings, records, origin, Some(network)).await;
        self.worker = Some(started.unwrap());
    }

    fn worker(&self) -> &WorkerHandle {
        self.worker.as_ref().unwrap()
    }

    /// Waits until the worker has got as far as it can with that plan.
    async fn ready(&self, plan: u64) -> TableState {
        until("the plan is carried out", async || {
            let tables = self.worker().state().tables;
            let current = tables.get(TABLE).and_then(|table| table.current);
            current.is_some_and(|current| current.plan >= plan)
        })
        .await;
        self.worker().state().tables[TABLE].clone()
    }

    fn reader(&self) -> Reader {
        Reader::open(self.cache.path(), self.origin.clone())
    }

    fn directory(&self) -> Arc<Directory> {
        Directory::open(self.cache.path())
    }

    fn address(&self) -> PeerAddress {
        PeerAddress {
            id: self.id.clone(),
            addresses: self.worker().transfer_addresses(),
        }
    }

    /// Bytes of chunks that the worker read from the origin; footers are not among them.
    fn fetched_bytes(&self) -> u64 {
        let text = self.worker().metrics().prometheus_text();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("stoa_worker_fetched_bytes_total "));
        line.expect("it is counted").parse::<f64>().unwrap() as u64
    }

    async fn stop(&mut self) {
        self.worker.take().unwrap().shutdown().await;
    }
}

fn transfer() -> TransferSettings {
    TransferSettings {
        deadline: Duration::from_secs(2),
        ..TransferSettings::default()
    }
}

/// A network whose reads fail as planned.
fn faulty(plan: impl Fn(&Read) -> Option<Fault> + Send + Sync + 'static) -> PeerNetwork {
    let tcp: Arc<dyn Transport> = Arc::new(Tcp::new(TcpSettings::default()));
    let faulty: Arc<dyn Transport> = Arc::new(Faulty::new(tcp, plan));
    PeerNetwork {
        client: Client::new(ClientSettings::default(), vec![faulty]),
        ..PeerNetwork::new(&transfer()).unwrap()
    }
}

/// A client that is no worker.
fn stranger() -> Client {
    let tcp: Arc<dyn Transport> = Arc::new(Tcp::new(TcpSettings::default()));
    Client::new(ClientSettings::default(), vec![tcp])
}

/// Puts a plan in force that gives each of the workers what it accepts.
async fn put_plan(
    world: &mut World,
    catalog: &TableCatalog,
    workers: &[&str],
    accepts: impl Fn(&str, &WantedChunk) -> bool,
) -> u64 {
    let wanted = stoa_layout::wanted(catalog).unwrap();
    let files = catalog.files.iter();
    let files: Vec<_> = files
        .map(|file| serde_json::to_value(&file.identity).unwrap())
        .collect();
    let part = |worker: &str| WorkerPlan {
        files: files.clone(),
        chunks: wanted
            .iter()
            .filter(|chunk| accepts(worker, chunk))
            .map(|wanted| {
                let chunk = wanted.chunk;
                let form = wanted.form.to_string();
                (chunk.file, chunk.row_group, chunk.column, form)
            })
            .collect(),
    };
    let parts: BTreeMap<String, WorkerPlan> = workers
        .iter()
        .map(|worker| ((*worker).to_owned(), part(worker)))
        .collect();
    let notes = PlanNotes {
        replicas: workers.len() as u32,
        ..PlanNotes::default()
    };
    world.write_plan(catalog, &parts, notes).await;
    world.plan
}

/// Bytes of the wanted chunks in the files.
fn table_bytes(catalog: &TableCatalog) -> u64 {
    let wanted = stoa_layout::wanted(catalog).unwrap();
    wanted.iter().map(|chunk| chunk.compressed_bytes).sum()
}

fn assert_all_cached(node: &Node, files: usize) {
    let reader = node.reader();
    for file in 0..files {
        for column in COLUMNS {
            assert_cached(&reader, file, column, file as i64);
        }
    }
}

/// Chunks that somebody else holds, as the queries of this node see it.
async fn knows(node: &Node, worker: &str, chunks: usize) {
    let reader = DirectoryReader::open(node.cache.path());
    until("the directory knows it", async || {
        let directory = reader.current();
        let of_worker = directory
            .chunks()
            .filter(|(.., holders)| holders.iter().any(|holder| holder.worker.id == worker));
        of_worker.count() == chunks
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_worker_holds_is_had_from_there() {
    let mut world = World::with_table(4).await;
    let catalog = world.publish_layout(TABLE, LOCATION, 1, &COLUMNS).await;
    let a = Node::started(&world, "a").await;
    let b = Node::started(&world, "b").await;
    let plan = put_plan(&mut world, &catalog, &["a"], |_, _| true).await;
    let state = a.ready(plan).await;
    assert_eq!((state.fetched_chunks, state.peer_chunks), (24, 0));
    knows(&b, "a", 24).await;

    let requests = b.origin.counters().get_requests;
    let plan = put_plan(&mut world, &catalog, &["a", "b"], |_, _| true).await;
    let state = b.ready(plan).await;
    assert_eq!((state.fetched_chunks, state.peer_chunks), (24, 24));
    assert_eq!(state.peer_bytes, state.bytes_done);
    let metrics = b.worker().metrics().prometheus_text();
    for (transport, bytes) in [("tcp", state.peer_bytes), ("rdma", 0)] {
        let line =
            format!("stoa_worker_peer_fetched_bytes_total{{transport=\"{transport}\"}} {bytes}.0");
        assert!(
            metrics.lines().any(|found| found == line),
            "{line}: {metrics}"
        );
    }
    assert_all_cached(&b, 4);
    // Only footers came from the origin.
    assert_eq!(b.fetched_bytes(), 0);
    assert!(b.origin.counters().get_requests <= requests + 4);
    assert_eq!(a.ready(plan).await.kept_chunks, 24);
    // Each side's queries know what the other holds, and where it lies: the bytes are there.
    knows(&a, "b", 24).await;
    let directory = a.directory();
    let workers: Vec<&str> = directory
        .workers()
        .map(|worker| worker.id.as_str())
        .collect();
    assert_eq!(workers, ["b"]);
    let reads: Vec<Read> = directory
        .chunks()
        .map(|(.., holders)| read_of(&holders[0]))
        .collect();
    let deadline = Instant::now() + PATIENCE;
    let outcomes = stranger()
        .submit(&b.address(), reads, deadline)
        .into_vec()
        .await;
    assert_eq!(outcomes.len(), 24);
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    let paths = b.worker().peer_paths();
    assert_eq!((paths.len(), paths[0].peer.as_str()), (1, "a"));
    assert!(paths[0].reads >= 24 && paths[0].latency.is_some());
}

fn read_of(holder: &stoa_shm::Holder<'_>) -> Read {
    Read {
        segment: SegmentKey {
            incarnation: holder.worker.incarnation,
            segment: holder.location.segment.0,
        },
        offset: holder.location.offset,
        length: holder.location.length,
        checksum: Some(holder.location.checksum),
    }
}

/// Starts four cold workers, of which the first one can die at once, and has all of them want the
/// same table.
async fn four_cold_workers(
    world: &mut World,
    catalog: &TableCatalog,
) -> (Vec<Node>, tokio::runtime::Runtime, u64) {
    let mut first = Node::new(world, "a");
    let runtime = first.start_alone(world).await;
    let mut nodes = vec![first];
    for id in ["b", "c", "d"] {
        nodes.push(Node::started(world, id).await);
    }
    // They know of each other, as workers do that have been there for a while.
    for node in &nodes {
        until("everybody knows everybody", async || {
            node.directory().workers().count() == 3
        })
        .await;
    }
    let all = ["a", "b", "c", "d"];
    let plan = put_plan(world, catalog, &all, |_, _| true).await;
    (nodes, runtime, plan)
}

fn fetched_bytes(nodes: &[Node]) -> u64 {
    nodes.iter().map(Node::fetched_bytes).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn four_cold_workers_cost_the_origin_one_table() {
    let mut world = World::with_table(9).await;
    let catalog = world.publish_layout(TABLE, LOCATION, 1, &COLUMNS).await;
    world.store.delay_ms.store(20, Ordering::Relaxed);
    let (nodes, runtime, plan) = four_cold_workers(&mut world, &catalog).await;
    let mut from_peers = 0;
    for node in &nodes {
        let state = node.ready(plan).await;
        assert_eq!((state.fetched_chunks, state.left_out.chunks), (54, 0));
        from_peers += state.peer_chunks;
    }
    let (bytes, table) = (fetched_bytes(&nodes), table_bytes(&catalog));
    println!("origin: {bytes} bytes for a table of {table}, {from_peers} chunks from peers");
    assert_eq!(from_peers, 3 * 54);
    assert!(bytes as f64 <= table as f64 * 1.1, "{bytes} of {table}");
    for node in &nodes {
        assert_all_cached(node, 9);
    }
    runtime.shutdown_background();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_in_a_load_costs_the_origin_little_more() {
    let mut world = World::with_table(9).await;
    let catalog = world.publish_layout(TABLE, LOCATION, 1, &COLUMNS).await;
    world.store.delay_ms.store(60, Ordering::Relaxed);
    let (nodes, runtime, plan) = four_cold_workers(&mut world, &catalog).await;
    until("half is loaded", async || {
        let tables = nodes[0].worker().state().tables;
        tables
            .get(TABLE)
            .is_some_and(|table| table.fetched_chunks > 24)
    })
    .await;
    // Not in order: it just ends, and its registration stands until its lease is over.
    runtime.shutdown_background();
    for node in &nodes[1..] {
        let state = node.ready(plan).await;
        assert_eq!((state.fetched_chunks, state.left_out.chunks), (54, 0));
    }
    let (bytes, table) = (fetched_bytes(&nodes), table_bytes(&catalog));
    println!("origin: {bytes} bytes for a table of {table}");
    // At worst all of the dead one's share is lost, a quarter and a row group at most, and one of
    // the three loads it again.
    assert!(bytes as f64 <= table as f64 * 1.3, "{bytes} of {table}");
    for node in &nodes[1..] {
        assert_all_cached(node, 9);
        until("the dead are forgotten", async || {
            node.directory().workers().all(|worker| worker.id != "a")
        })
        .await;
    }
}

/// Two workers, one of which has everything; the other reads it over a network with that fault.
async fn with_fault(
    fault: impl Fn(&Read) -> Option<Fault> + Send + Sync + 'static,
) -> (TableState, u64, Duration) {
    let mut world = World::with_table(2).await;
    let catalog = world.publish_layout(TABLE, LOCATION, 1, &COLUMNS).await;
    let a = Node::started(&world, "a").await;
    let mut b = Node::new(&world, "b");
    b.start(&world, Some(faulty(fault))).await;
    let plan = put_plan(&mut world, &catalog, &["a"], |_, _| true).await;
    a.ready(plan).await;
    knows(&b, "a", 12).await;
    let plan = put_plan(&mut world, &catalog, &["a", "b"], |_, _| true).await;
    let started = Instant::now();
    let state = b.ready(plan).await;
    let took = started.elapsed();
    assert_eq!((state.fetched_chunks, state.left_out.chunks), (12, 0));
    assert_all_cached(&b, 2);
    (state, b.fetched_bytes(), took)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_corrupts_is_found_out_and_the_origin_asked() {
    let (state, origin_bytes, _) = with_fault(|_| Some(Fault::FlipBit)).await;
    assert_eq!(state.peer_chunks, 0);
    assert!(origin_bytes > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_corrupt_chunk_takes_no_other_with_it() {
    let once = std::sync::atomic::AtomicBool::new(false);
    let flip = move |_: &Read| (!once.swap(true, Ordering::Relaxed)).then_some(Fault::FlipBit);
    let (state, ..) = with_fault(flip).await;
    assert_eq!(state.peer_chunks, 11);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_hangs_costs_its_deadline() {
    let (state, _, took) = with_fault(|_| Some(Fault::Hang)).await;
    assert_eq!(state.peer_chunks, 0);
    assert!(took < Duration::from_secs(20), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_closes_or_refuses_is_done_without() {
    let (state, _, took) = with_fault(|_| Some(Fault::Close)).await;
    assert_eq!(state.peer_chunks, 0);
    assert!(took < Duration::from_secs(20), "{took:?}");
    let refuse = Fault::Refuse(RefusalKind::UnknownSegment);
    let (state, ..) = with_fault(move |_| Some(refuse)).await;
    assert_eq!(state.peer_chunks, 0);
}

/// The neighbour's directory is made anew at the same place, under the same id: what was known of
/// the old one is refused, forgotten, and learnt anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_made_anew_does_not_answer_for_the_old_one() {
    let mut world = World::with_table(2).await;
    let catalog = world.publish_layout(TABLE, LOCATION, 1, &COLUMNS).await;
    let mut a = Node::started(&world, "a").await;
    let b = Node::started(&world, "b").await;
    let plan = put_plan(&mut world, &catalog, &["a"], |_, _| true).await;
    a.ready(plan).await;
    knows(&b, "a", 12).await;
    let old = b.directory();
    let (.., holders) = old.chunks().next().unwrap();
    let old_read = read_of(&holders[0]);

    a.stop().await;
    for entry in std::fs::read_dir(a.cache.path()).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    a.start(&world, None).await;
    a.ready(plan).await;
    let deadline = Instant::now() + PATIENCE;
    let mut outcomes = stranger()
        .submit(&a.address(), vec![old_read], deadline)
        .into_vec()
        .await;
    let error = outcomes.remove(0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stale);
    let TransferError::Refused { refusal, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(refusal.kind, RefusalKind::WrongIncarnation);
    let reader = DirectoryReader::open(b.cache.path());
    until("the new directory is known", async || {
        let directory = reader.current();
        let mut chunks = directory.chunks();
        let incarnation = chunks
            .next()
            .map(|(.., holders)| holders[0].worker.incarnation);
        incarnation.is_some_and(|incarnation| incarnation != old_read.segment.incarnation)
    })
    .await;
}

/// A query node without a worker learns everything from one of them.
#[tokio::test(flavor = "multi_thread")]
async fn one_worker_tells_what_all_of_them_hold() {
    let mut world = World::with_table(3).await;
    let catalog = world.publish_layout(TABLE, LOCATION, 1, &COLUMNS).await;
    let a = Node::started(&world, "a").await;
    let b = Node::started(&world, "b").await;
    let halves = |worker: &str, chunk: &WantedChunk| (worker == "a") == (chunk.chunk.column == 0);
    let plan = put_plan(&mut world, &catalog, &["a", "b"], halves).await;
    assert_eq!(a.ready(plan).await.chunks_done, 6);
    assert_eq!(b.ready(plan).await.chunks_done, 12);
    knows(&a, "b", 12).await;
    let client = stranger();
    let ask = async |since: u64, wait_ms: u32| {
        let mut fetch = HoldingsFetch::new(Scope::Cluster, since, wait_ms);
        loop {
            let (body, deadline) = (Bytes::from(fetch.request()), Instant::now() + PATIENCE);
            let answer = client
                .call(&a.address(), HOLDINGS_METHOD, body, deadline)
                .await
                .unwrap();
            match fetch.take(&answer).unwrap() {
                Fetched::Whole(directory) => return (fetch.revision(), Some(directory)),
                Fetched::Unchanged => return (fetch.revision(), None),
                Fetched::More => {}
            }
        }
    };
    let (revision, directory) = ask(0, 0).await;
    let directory = directory.unwrap();
    assert_eq!(directory.chunk_count(), 18);
    let mut workers: Vec<_> = directory.workers().cloned().collect();
    workers.sort_by(|x, y| x.id.cmp(&y.id));
    assert_eq!(workers[0].addresses, a.worker().transfer_addresses());
    assert_eq!(workers[1].addresses, b.worker().transfer_addresses());
    // No news: the answer waits, and says so. News end the waiting.
    let started = Instant::now();
    assert!(ask(revision, 300).await.1.is_none());
    assert!(started.elapsed() >= Duration::from_millis(300));
    let dropped = put_plan(&mut world, &catalog, &["a", "b"], |worker, chunk| {
        worker == "b" && halves(worker, chunk)
    });
    let (plan, (_, news)) = tokio::join!(dropped, ask(revision, 20_000));
    assert!(news.is_some());
    b.ready(plan).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_refused_and_serving_goes_on() {
    let world = World::with_table(1).await;
    let a = Node::started(&world, "a").await;
    let client = stranger();
    let call = async |method: u16, body: &'static [u8]| {
        let deadline = Instant::now() + PATIENCE;
        let body = Bytes::from_static(body);
        client.call(&a.address(), method, body, deadline).await
    };
    let text = call(HOLDINGS_METHOD, b"nonsense")
        .await
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("malformed request for holdings: format"),
        "{text}"
    );
    let text = call(7777, b"").await.unwrap_err().to_string();
    assert!(text.contains("no method 0x1e61 here"), "{text}");
    let request = HoldingsFetch::new(Scope::Own, 0, 0).request();
    let deadline = Instant::now() + PATIENCE;
    let answer = client
        .call(&a.address(), HOLDINGS_METHOD, request.into(), deadline)
        .await
        .unwrap();
    assert!(answer.len() > 32);
}

/// Alone in its cluster, or with a network that leads nowhere, a worker does what it always did.
#[tokio::test(flavor = "multi_thread")]
async fn without_peers_the_origin_is_asked_at_once() {
    let mut world = World::with_table(2).await;
    let catalog = world.publish_layout(TABLE, LOCATION, 1, &COLUMNS).await;
    let a = Node::started(&world, "a").await;
    // Somebody who is registered and cannot be reached.
    let gone = stoa_metastore::WorkerRecord {
        id: "gone".into(),
        host: "localhost".into(),
        addresses: stoa_metastore::WorkerAddresses {
            transfer: vec!["127.0.0.1:1".into()],
            ..Default::default()
        },
        ..Default::default()
    };
    let ttl = Duration::from_secs(60);
    world.records.register_worker(&gone, ttl).await.unwrap();
    until("it is known", async || !a.worker().peer_paths().is_empty()).await;
    let started = Instant::now();
    let plan = put_plan(&mut world, &catalog, &["a", "gone"], |_, _| true).await;
    let state = a.ready(plan).await;
    assert_eq!((state.fetched_chunks, state.peer_chunks), (12, 0));
    assert!(started.elapsed() < Duration::from_secs(20));
    assert_all_cached(&a, 2);
}
