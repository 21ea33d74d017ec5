//! Queries whose chunks lie in the memory of neighbours: the answers are those of stock DataFusion,
//! whatever the neighbours do.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use arrow::util::pretty::pretty_format_batches;
use datafusion::execution::context::{SessionConfig, SessionContext};
use datafusion::prelude::ParquetReadOptions;
use futures::StreamExt;
use stoa_cli::demo::{QUERIES, compare};
use stoa_datafusion::{Embedded, EmbeddedSettings, Stoa};
use stoa_layout::{FormChoice, LayoutDocument, LayoutVersion, TableCatalog, TableName};
use stoa_origin::{Origin, OriginLimits, StoreSettings, Stores};
use stoa_reader::neighbours::{Arrivals, Directory, Holder, Holdings, PeerReads};
use stoa_reader::{NeighbourSettings, Neighbours, Reader, ReaderOptions, RemoteMiss};
use stoa_shm::CacheReader;
use stoa_tests::cluster::{ClusterOptions, PATIENCE};
use stoa_tests::scratch::CacheDirectory;
use stoa_tests::tpch;
use stoa_transfer::{
    Client, ClientSettings, InProcess, NoCalls, PeerAddress, Read, Refusal, Segment, SegmentKey,
    SegmentSource,
};

use super::spine;

/// Workers that hold a third of the columns of every table each.
const WORKERS: usize = 3;

pub(super) struct Worker {
    pub(super) embedded: Embedded,
    directory: CacheDirectory,
}

impl Worker {
    fn name(index: usize) -> String {
        format!("worker-{index}")
    }

    pub(super) async fn start() -> Worker {
        let directory = CacheDirectory::new().unwrap();
        let settings = EmbeddedSettings {
            cache_directory: directory.path(),
            capacity_bytes: 512 << 20,
            freshness: None,
            ..EmbeddedSettings::default()
        };
        let embedded = Embedded::start(settings).await.unwrap();
        assert!(embedded.is_owner());
        Worker {
            embedded,
            directory,
        }
    }

    /// Loads the columns of every table whose position is `third` modulo the number of workers.
    async fn load(&self, tables: &[&str], third: usize, form: FormChoice) {
        for table in tables {
            let name = TableName::new("tpch", table).unwrap();
            let location = format!("{}/", tpch::data().unwrap().join(table).display());
            let mut document = LayoutDocument::new(name, LayoutVersion::FIRST, location);
            let catalog = TableCatalog::load(self.embedded.origin(), &document, 1)
                .await
                .unwrap();
            let columns = catalog.schema.fields().iter().enumerate();
            let own = columns.filter(|(position, _)| position % WORKERS == third);
            document.columns = Some(own.map(|(_, field)| field.name().clone()).collect());
            document.form = form;
            self.embedded.publish(&document).await.unwrap();
            self.embedded
                .wait_loaded(&document, Duration::from_secs(60))
                .await
                .unwrap();
        }
    }
}

/// The segments of a cache directory, read from the same files that readers map.
#[derive(Debug)]
struct Segments {
    directory: PathBuf,
    incarnation: u64,
    opened: Mutex<HashMap<u64, Segment>>,
}

impl SegmentSource for Segments {
    fn open(&self, key: SegmentKey) -> Result<Segment, Refusal> {
        if key.incarnation != self.incarnation {
            return Err(Refusal::wrong_incarnation(key, self.incarnation));
        }
        let mut opened = lock(&self.opened);
        if let Some(segment) = opened.get(&key.segment) {
            return Ok(segment.clone());
        }
        let path = self.directory.join(format!("seg-{:016x}", key.segment));
        let bytes = std::fs::read(path).map_err(|_| Refusal::unknown_segment(key))?;
        let segment = Segment::new(bytes);
        opened.insert(key.segment, segment.clone());
        Ok(segment)
    }
}

/// What is wrong with the way to the neighbours.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// No answer ever comes, not even a refusal.
    Hang,
    /// Every answer takes this long.
    Slow(Duration),
    /// One byte of every chunk that has a checksum is flipped before the checksum is compared.
    Flip,
}

/// A client with faults.
#[derive(Debug)]
struct Faulty {
    client: Client,
    faults: Mutex<HashMap<String, Fault>>,
    /// Chunks that were flipped.
    flipped: AtomicUsize,
    reads: AtomicU64,
}

impl Faulty {
    fn set(&self, peer: &str, fault: Fault) {
        lock(&self.faults).insert(peer.to_owned(), fault);
    }
}

impl PeerReads for Faulty {
    fn submit(&self, peer: &PeerAddress, reads: Vec<Read>, deadline: Instant) -> Arrivals {
        self.reads.fetch_add(reads.len() as u64, Ordering::SeqCst);
        let fault = lock(&self.faults).get(&peer.id).copied();
        match fault.unwrap_or(Fault::None) {
            Fault::None => PeerReads::submit(&self.client, peer, reads, deadline),
            Fault::Hang => futures::stream::pending().boxed(),
            Fault::Slow(delay) => {
                let answers = PeerReads::submit(&self.client, peer, reads, deadline);
                let wait = futures::stream::once(tokio::time::sleep(delay));
                wait.filter_map(|()| async { None }).chain(answers).boxed()
            }
            Fault::Flip => {
                // A flipped byte is one that the checksum does not match: ask for the same bytes
                // under the checksum of others.
                let flipped = |read: Read| Read {
                    checksum: read.checksum.map(|checksum| checksum ^ 1),
                    ..read
                };
                self.flipped.fetch_add(reads.len(), Ordering::SeqCst);
                let reads = reads.into_iter().map(flipped).collect();
                PeerReads::submit(&self.client, peer, reads, deadline)
            }
        }
    }

    fn expected(&self, peer: &PeerAddress, bytes: u64) -> Option<Duration> {
        PeerReads::expected(&self.client, peer, bytes)
    }
}

/// Who holds what, taken from the indexes of the workers' caches.
#[derive(Debug, Default)]
struct Known {
    generation: u64,
    holders: HashMap<(Vec<u8>, u32, u32), Vec<Holder>>,
}

impl Holdings for Known {
    fn generation(&self) -> u64 {
        self.generation
    }

    fn holders(&self, file: &[u8], row_group: u32, column: u32) -> Vec<Holder> {
        let key = (file.to_vec(), row_group, column);
        self.holders.get(&key).cloned().unwrap_or_default()
    }
}

#[derive(Debug)]
struct Shown(Mutex<Arc<Known>>);

impl Directory for Shown {
    fn current(&self) -> Arc<dyn Holdings> {
        Arc::clone(&*lock(&self.0)) as Arc<dyn Holdings>
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) struct Neighbourhood {
    workers: Vec<Worker>,
    network: InProcess,
}

impl Neighbourhood {
    /// Three workers with a third of the columns each.
    async fn start(tables: &[&str], form: FormChoice) -> Neighbourhood {
        let mut workers = vec![];
        for third in 0..WORKERS {
            let worker = Worker::start().await;
            worker.load(tables, third, form).await;
            workers.push(worker);
        }
        Neighbourhood::of(workers)
    }

    /// Workers that serve each other what they have loaded by now.
    pub(super) fn of(workers: Vec<Worker>) -> Neighbourhood {
        let network = InProcess::default();
        for (index, worker) in workers.iter().enumerate() {
            let segments = Segments {
                directory: worker.directory.path(),
                incarnation: index as u64,
                opened: Mutex::default(),
            };
            network.serve(&Worker::name(index), Arc::new(segments), Arc::new(NoCalls));
        }
        Neighbourhood { workers, network }
    }

    /// What the workers except `own` hold.
    fn known(&self, own: usize, change: impl Fn(&mut Holder)) -> Known {
        let mut holders: HashMap<_, Vec<Holder>> = HashMap::new();
        for (index, worker) in self.workers.iter().enumerate() {
            if index == own {
                continue;
            }
            let peer = Arc::new(PeerAddress {
                id: Worker::name(index),
                addresses: vec![Worker::name(index)],
            });
            let snapshot = CacheReader::open(worker.directory.path()).snapshot();
            for (file, entry) in snapshot.iter() {
                let location = entry.location();
                let mut holder = Holder {
                    peer: Arc::clone(&peer),
                    segment: SegmentKey {
                        incarnation: index as u64,
                        segment: location.segment.0,
                    },
                    offset: location.offset,
                    length: location.length,
                    checksum: location.checksum,
                    form: location.form,
                    rows: location.rows,
                };
                change(&mut holder);
                let key = (file.to_vec(), entry.row_group(), entry.column());
                holders.entry(key).or_default().push(holder);
            }
        }
        Known {
            generation: 1,
            holders,
        }
    }

    /// A query process beside worker `own`.
    pub(super) async fn node(&self, own: usize) -> Node {
        self.node_that_knows(own, self.known(own, |_| {})).await
    }

    async fn node_that_knows(&self, own: usize, known: Known) -> Node {
        let peers = Arc::new(Faulty {
            client: Client::new(
                ClientSettings::default(),
                vec![Arc::new(self.network.clone())],
            ),
            faults: Mutex::default(),
            flipped: AtomicUsize::new(0),
            reads: AtomicU64::new(0),
        });
        let directory = Arc::new(Shown(Mutex::new(Arc::new(known))));
        let settings = NeighbourSettings {
            deadline: Duration::from_millis(500),
            ..NeighbourSettings::default()
        };
        let neighbours = Neighbours::new(
            settings,
            Arc::clone(&directory) as Arc<dyn Directory>,
            Arc::clone(&peers) as Arc<dyn PeerReads>,
        );
        // An origin of its own: the worker's requests are not the queries'.
        let origin = Origin::new(
            Stores::new(StoreSettings::default()),
            OriginLimits::default(),
        );
        let reader = Reader::open_among(
            &self.workers[own].directory.path(),
            ReaderOptions::default(),
            origin,
            Some(neighbours),
        );
        let config = SessionConfig::new().with_target_partitions(2);
        let session = SessionContext::new_with_config(config);
        let stoa = Stoa::with_reader(reader.clone(), None);
        stoa.register(&session).await.unwrap();
        session
            .sql("set datafusion.catalog.default_schema = 'tpch'")
            .await
            .unwrap();
        Node {
            session,
            reader,
            peers,
            directory,
        }
    }

    pub(super) async fn shutdown(self) {
        for worker in self.workers {
            worker.embedded.shutdown().await;
        }
    }
}

pub(super) struct Node {
    session: SessionContext,
    pub(super) reader: Reader,
    peers: Arc<Faulty>,
    directory: Arc<Shown>,
}

impl Node {
    async fn rows(&self, sql: &str) -> Vec<RecordBatch> {
        rows(&self.session, sql).await
    }

    fn origin_requests(&self) -> u64 {
        self.reader.origin().counters().requests()
    }

    fn failed(&self, miss: RemoteMiss) -> u64 {
        let counts = self.reader.statistics().remote_misses();
        counts.filter(|(m, _)| *m == miss).map(|(_, n)| n).sum()
    }

    fn show(&self, known: Known) {
        let mut shown = lock(&self.directory.0);
        let generation = shown.generation + 1;
        *shown = Arc::new(Known {
            generation,
            ..known
        });
    }
}

async fn rows(session: &SessionContext, sql: &str) -> Vec<RecordBatch> {
    session.sql(sql).await.unwrap().collect().await.unwrap()
}

async fn stock(tables: &[&str]) -> SessionContext {
    let session = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(2));
    for table in tables {
        let path = format!("{}/", tpch::data().unwrap().join(table).display());
        session
            .register_parquet(*table, path, ParquetReadOptions::default())
            .await
            .unwrap();
    }
    session
}

fn equal(what: &str, ours: &[RecordBatch], theirs: &[RecordBatch]) {
    let difference = compare::difference(ours, theirs).unwrap();
    assert_eq!(difference, None, "{what}");
}

/// The counters of the scans of a query, summed: name and value.
async fn metrics(node: &Node, sql: &str) -> HashMap<String, u64> {
    let plan = node.rows(&format!("explain analyze {sql}")).await;
    summed(&pretty_format_batches(&plan).unwrap().to_string())
}

/// The counters in the text of an analysed plan, summed: name and value.
fn summed(plan: &str) -> HashMap<String, u64> {
    let mut sums = HashMap::new();
    for part in plan.split("stoa_").skip(1) {
        let Some((name, rest)) = part.split_once('=') else {
            continue;
        };
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        let value: u64 = digits.parse().unwrap_or(0);
        *sums.entry(name.to_owned()).or_default() += value;
    }
    sums
}

fn all_tables() -> Vec<&'static str> {
    tpch::TABLES.iter().map(|table| table.name).collect()
}

const SCAN: &str = "select count(*), sum(l_quantity), sum(l_extendedprice * l_discount), \
                    min(l_comment), max(l_shipmode), sum(l_tax), max(l_receiptdate) from lineitem";

/// Three nodes with a third each: every query from every node is answered from memory alone.
#[tokio::test(flavor = "multi_thread")]
async fn all_of_tpch_from_the_memory_of_three() {
    let tables = all_tables();
    let here = Neighbourhood::start(&tables, FormChoice::Auto).await;
    let plain = stock(&tables).await;
    let mut expected = vec![];
    for query in QUERIES {
        expected.push(rows(&plain, query.sql).await);
    }
    for own in 0..WORKERS {
        let node = here.node(own).await;
        for (query, expected) in QUERIES.iter().zip(&expected) {
            equal(&query.name(), &node.rows(query.sql).await, expected);
        }
        assert_eq!(node.origin_requests(), 0, "from node {own}");
        let counts = node.reader.statistics().counts();
        assert_eq!(counts.misses, 0);
        assert!(counts.hits > 0 && counts.remote_tcp > 0, "{counts:?}");
        assert!(counts.remote_tcp_bytes > 0, "{counts:?}");
    }
    here.shutdown().await;
}

/// Chunks by source add up to the chunks that the scan needs, in the plan and in the process.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_by_source_add_up() {
    let here = Neighbourhood::start(&["lineitem"], FormChoice::Auto).await;
    let node = here.node(0).await;
    let before = node.reader.statistics().counts();
    let metrics = metrics(&node, SCAN).await;
    let counts = node.reader.statistics().counts().since(&before);
    let view = node.reader.view();
    let table = view
        .table(&TableName::new("tpch", "lineitem").unwrap())
        .unwrap();
    let groups: usize = table
        .files()
        .iter()
        .map(|file| file.metadata().num_row_groups())
        .sum();
    // The columns that SCAN names.
    let needed = 7 * groups as u64;
    assert_eq!(
        metrics["shared_memory_chunks"]
            + metrics["remote_tcp_chunks"]
            + metrics["remote_rdma_chunks"]
            + metrics["origin_chunks"],
        needed,
        "{metrics:?}"
    );
    assert_eq!(counts.chunks(), needed, "{counts:?}");
    assert_eq!(metrics["remote_tcp_chunks"], counts.remote_tcp);
    assert_eq!(metrics["remote_failed_chunks"], 0);
    assert!(metrics["shared_memory_chunks"] > 0 && metrics["remote_tcp_chunks"] > 0);
    assert_eq!(metrics["origin_chunks"], 0);
    here.shutdown().await;
}

/// Chunks in the parquet form come from neighbours as well, and are decoded here.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_in_the_parquet_form_come_from_neighbours() {
    let here = Neighbourhood::start(&["orders"], FormChoice::Parquet).await;
    let node = here.node(1).await;
    let sql = "select count(*), sum(o_totalprice), min(o_comment), max(o_clerk), min(o_orderdate) \
               from orders where o_orderkey > 10";
    let plain = stock(&["orders"]).await;
    equal(sql, &node.rows(sql).await, &rows(&plain, sql).await);
    assert_eq!(node.origin_requests(), 0);
    assert!(node.reader.statistics().counts().remote_tcp > 0);
    here.shutdown().await;
}

/// What chunks answer is left to the scan as it is where they lie here: no filter above it reads
/// comments again. Chunks in the parquet form answer nothing.
#[tokio::test(flavor = "multi_thread")]
async fn filters_are_the_scans_where_neighbours_hold_the_chunks() {
    let sql = "select count(*), min(o_custkey) from orders \
               where o_comment not like '%special%requests%'";
    let expected = rows(&stock(&["orders"]).await, sql).await;
    for (form, is_scans) in [
        (FormChoice::Packed, true),
        (FormChoice::Arrow, true),
        (FormChoice::Parquet, false),
    ] {
        let here = Neighbourhood::start(&["orders"], form).await;
        let node = here.node(0).await;
        let plan = node.rows(&format!("explain {sql}")).await;
        let plan = pretty_format_batches(&plan).unwrap().to_string();
        assert_eq!(!plan.contains("FilterExec"), is_scans, "{form:?}: {plan}");
        equal(sql, &node.rows(sql).await, &expected);
        assert!(node.reader.statistics().counts().remote_tcp > 0);
        assert_eq!(node.origin_requests(), 0);
        here.shutdown().await;
    }
}

/// A neighbour that flips a byte in every chunk: every flip is found out, no answer is wrong, and
/// the origin stands in.
#[tokio::test(flavor = "multi_thread")]
async fn flipped_bytes_are_found_out() {
    let here = Neighbourhood::start(&["lineitem"], FormChoice::Auto).await;
    let expected = rows(&stock(&["lineitem"]).await, SCAN).await;
    let (mut flipped, mut found) = (0, 0);
    while flipped < 1000 {
        // Nobody asks a neighbour that sent so much rubbish again soon: a new process does.
        let node = here.node(0).await;
        for other in 1..WORKERS {
            node.peers.set(&Worker::name(other), Fault::Flip);
        }
        equal("flipped", &node.rows(SCAN).await, &expected);
        assert_eq!(node.reader.statistics().counts().remote_tcp, 0);
        flipped += node.peers.flipped.load(Ordering::SeqCst) as u64;
        found += node.failed(RemoteMiss::Corrupt);
    }
    assert_eq!(found, flipped);
    here.shutdown().await;
}

/// A neighbour that hangs, is slow, or vanishes under a running query loop: no query fails or waits
/// longer than the deadline, and afterwards all is as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_failing_neighbour_fails_no_query() {
    let here = Neighbourhood::start(&["lineitem"], FormChoice::Auto).await;
    let node = here.node(0).await;
    let expected = rows(&stock(&["lineitem"]).await, SCAN).await;
    let timed = async || {
        let started = Instant::now();
        equal("loop", &node.rows(SCAN).await, &expected);
        started.elapsed()
    };
    let usual = timed().await.max(timed().await);
    // Two neighbours, each with its deadline and what its reads are expected to take.
    let bound = usual * 10 + Duration::from_secs(3);
    let faults = [
        Fault::Hang,
        Fault::Slow(usual * 100),
        Fault::Slow(Duration::from_millis(100)),
    ];
    for fault in faults {
        node.peers.set(&Worker::name(1), fault);
        let first = timed().await;
        assert!(first < bound, "{fault:?}: {first:?}, usually {usual:?}");
        for _ in 0..5 {
            let next = timed().await;
            assert!(next < bound, "{fault:?}: {next:?}, usually {usual:?}");
        }
        node.peers.set(&Worker::name(1), Fault::None);
        comes_back(&node).await;
    }
    // Gone, and back on the same address.
    here.network.stop(&Worker::name(2));
    for _ in 0..5 {
        let next = timed().await;
        assert!(next < bound, "gone: {next:?}, usually {usual:?}");
    }
    let segments = Segments {
        directory: here.workers[2].directory.path(),
        incarnation: 2,
        opened: Mutex::default(),
    };
    here.network
        .serve(&Worker::name(2), Arc::new(segments), Arc::new(NoCalls));
    comes_back(&node).await;
    here.shutdown().await;
}

/// Waits until queries read nothing from the origin again.
async fn comes_back(node: &Node) {
    let started = Instant::now();
    loop {
        let before = node.reader.statistics().counts();
        node.rows(SCAN).await;
        let counts = node.reader.statistics().counts().since(&before);
        if counts.misses == 0 && counts.remote_tcp > 0 {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "{counts:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A directory of another incarnation, of segments that are gone, and of unknown forms: misses.
#[tokio::test(flavor = "multi_thread")]
async fn a_stale_directory_costs_misses_only() {
    let here = Neighbourhood::start(&["lineitem"], FormChoice::Auto).await;
    let expected = rows(&stock(&["lineitem"]).await, SCAN).await;
    let other_incarnation = |holder: &mut Holder| holder.segment.incarnation += 77;
    let gone = |holder: &mut Holder| holder.segment.segment += 1_000_000;
    let beyond = |holder: &mut Holder| holder.offset += 1 << 40;
    let elsewhere = |holder: &mut Holder| holder.checksum ^= 1;
    type Change<'a> = &'a dyn Fn(&mut Holder);
    let changes: [(RemoteMiss, Change); 4] = [
        (RemoteMiss::Stale, &other_incarnation),
        (RemoteMiss::Stale, &gone),
        (RemoteMiss::Stale, &beyond),
        (RemoteMiss::Corrupt, &elsewhere),
    ];
    for (miss, change) in changes {
        let node = here.node_that_knows(0, here.known(0, change)).await;
        equal("stale", &node.rows(SCAN).await, &expected);
        assert!(node.failed(miss) > 0);
        assert_eq!(node.reader.statistics().counts().remote_tcp, 0);
        let asked = node.peers.reads.load(Ordering::SeqCst);
        equal("stale", &node.rows(SCAN).await, &expected);
        assert_eq!(
            node.peers.reads.load(Ordering::SeqCst),
            asked,
            "what was disproved is not asked again"
        );
        node.show(here.known(0, |_| {}));
        // Whoever sent many wrong chunks is left for a while first.
        comes_back(&node).await;
    }
    let unknown = here.known(0, |holder| holder.form = 99);
    let node = here.node_that_knows(0, unknown).await;
    equal("unknown form", &node.rows(SCAN).await, &expected);
    assert_eq!(node.peers.reads.load(Ordering::SeqCst), 0);
    here.shutdown().await;
}

/// Refused outright: whoever asks is not let in. The origin answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_neighbour_that_refuses_fails_no_query() {
    #[derive(Debug)]
    struct Refuses;
    impl SegmentSource for Refuses {
        fn open(&self, _: SegmentKey) -> Result<Segment, Refusal> {
            Err(Refusal::failed("out of sorts"))
        }
    }
    let here = Neighbourhood::start(&["lineitem"], FormChoice::Auto).await;
    let node = here.node(0).await;
    for other in 1..WORKERS {
        here.network
            .serve(&Worker::name(other), Arc::new(Refuses), Arc::new(NoCalls));
    }
    let expected = rows(&stock(&["lineitem"]).await, SCAN).await;
    equal("refused", &node.rows(SCAN).await, &expected);
    assert!(node.failed(RemoteMiss::Refused) > 0);
    here.shutdown().await;
}

/// The product as processes: three workers with a third each, over TCP. Every node answers every
/// query without a request to the store; with one worker dead, every query is still answered.
#[test]
fn three_workers_answer_from_each_others_memory() {
    let tables = all_tables();
    let options = ClusterOptions {
        cache_size: "256MiB".to_owned(),
        more: vec!["cache.remote.deadline = \"10s\"".to_owned()],
        ..ClusterOptions::default()
    };
    let mut world = spine::world(&options, &tables);
    for table in &tables {
        world.create(table, &[]);
    }
    for table in &tables {
        let name = format!("tpch.{table}");
        world.cluster.load(&format!("{name}:1")).unwrap();
        world.cluster.wait_loaded(&world.etcd, &name, 1).unwrap();
    }
    let answer = |world: &spine::World, worker: usize, sql: &str, more: &[&str]| {
        let config = world.cluster.worker_config(worker);
        let file = tempfile::NamedTempFile::new().unwrap();
        let schema = "set datafusion.catalog.default_schema = 'tpch'";
        std::fs::write(file.path(), format!("{schema};\n{sql};\n")).unwrap();
        let mut arguments = more.to_vec();
        arguments.extend(["sql", "-q", "--format", "csv", "-f"]);
        arguments.push(file.path().to_str().unwrap());
        let ran = world.cluster.run_at(config, &arguments).unwrap();
        assert_eq!(ran.code, Some(0), "{sql}: {}", ran.stderr);
        let mut rows: Vec<String> = ran.stdout.lines().map(str::to_owned).collect();
        rows.sort();
        rows
    };
    let stock: Vec<Vec<String>> = QUERIES
        .iter()
        .map(|query| answer(&world, 0, query.sql, &["--set", "cache.enabled=false"]))
        .collect();
    // The directories follow what was published within seconds.
    let everything: Vec<String> = tables
        .iter()
        .map(|table| format!("select * from {table}"))
        .collect();
    for worker in 0..WORKERS {
        stoa_tests::wait::until("a directory of all", PATIENCE, || {
            world.s3.forget();
            for sql in &everything {
                answer(&world, worker, sql, &[]);
            }
            match world.s3.log().len() {
                0 => Ok(()),
                asked => Err(format!("{asked} requests")),
            }
        })
        .unwrap();
    }
    world.s3.forget();
    for worker in 0..WORKERS {
        for (query, expected) in QUERIES.iter().zip(&stock) {
            let ours = answer(&world, worker, query.sql, &[]);
            assert_eq!(&ours, expected, "{} from {worker}", query.name());
        }
    }
    assert_eq!(world.s3.log().len(), 0, "{:?}", world.s3.log());

    world.cluster.worker(2).kill();
    for (query, expected) in QUERIES.iter().zip(&stock).take(6) {
        let ours = answer(&world, 0, query.sql, &[]);
        assert_eq!(&ours, expected, "{} without worker 2", query.name());
    }
    assert!(!world.s3.log().is_empty(), "a third of it is nowhere else");
}

/// RDMA is allowed where there is none: every process says so once, everything takes TCP, and
/// nothing is different otherwise.
#[test]
fn where_rdma_is_enabled_and_missing_tcp_is_used_and_that_is_said_once() {
    const SAID: &str = "RDMA is enabled and cannot be used, so TCP is: ";
    const SQL: &str = "select count(*), sum(o_totalprice), min(o_comment), max(o_clerk), \
                       min(o_orderdate), max(o_orderpriority) from tpch.orders";
    let options = ClusterOptions {
        workers: 2,
        more: vec![
            "transfer.rdma.enabled = true".to_owned(),
            "cache.remote.deadline = \"10s\"".to_owned(),
        ],
        ..ClusterOptions::default()
    };
    let mut world = spine::world(&options, &["orders"]);
    world.create("orders", &[]);
    world.cluster.load("tpch.orders:1").unwrap();
    world
        .cluster
        .wait_loaded(&world.etcd, "tpch.orders", 1)
        .unwrap();
    for worker in 0..2 {
        let config = world.cluster.worker_config(worker).to_owned();
        let sql = |more: &[&str], sql: &str| {
            let mut arguments = more.to_vec();
            arguments.extend(["sql", "-q", "--format", "json", "-c", sql]);
            let ran = world.cluster.run_at(&config, &arguments).unwrap();
            assert_eq!(ran.code, Some(0), "{sql}: {}", ran.stderr);
            ran
        };
        let analyse = format!("explain analyze {SQL}");
        // The directories follow what was published within seconds.
        stoa_tests::wait::until("a query without the origin", PATIENCE, || {
            let counts = summed(&sql(&[], &analyse).stdout);
            let done = counts["origin_chunks"] == 0 && counts["remote_tcp_chunks"] > 0;
            assert_eq!(counts["remote_rdma_chunks"], 0, "{counts:?}");
            done.then_some(()).ok_or_else(|| format!("{counts:?}"))
        })
        .unwrap();
        let answer = sql(&[], SQL);
        let said = answer.stderr.matches(SAID).count();
        assert_eq!(said, 1, "from {worker}: {}", answer.stderr);
        let stock = sql(&["--set", "cache.enabled=false"], SQL);
        assert_eq!(answer.stdout, stock.stdout, "from {worker}");
        let log = world.cluster.worker(worker).log();
        assert_eq!(log.matches(SAID).count(), 1, "worker {worker}: {log}");
    }
    let peers = world.cluster.ok(&["peers", "--json"]).unwrap();
    let peers: serde_json::Value = serde_json::from_str(&peers).unwrap();
    for worker in peers["workers"].as_array().unwrap() {
        let paths = worker["paths"].as_array().unwrap();
        assert!(!paths.is_empty(), "{peers:#}");
        for path in paths {
            assert_eq!(path["transport"], "tcp", "{peers:#}");
        }
    }
}
