//! Peers that do what no peer should: nothing hangs past its deadline, nothing wrong is seen, and
//! nobody else notices.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use twox_hash::XxHash3_64;

use super::{peer, read_one, soon, tcp};
use crate::conformance::{Echo, INCARNATION, Segments, content, read};
use crate::wire::{FrameHeader, FrameKind, Hello, ResponseHead};
use crate::{
    Client, ClientSettings, ErrorKind, Fault, Faulty, PeerAddress, Read, RefusalKind, Segment,
    Server, ServerHandle, ServerSettings, Throttled, TransferError, Transport, TransportKind,
};

/// How much later than its deadline something may be noticed on a busy machine.
const SLACK: Duration = Duration::from_millis(1500);

fn client() -> Client {
    client_over(vec![tcp()])
}

fn client_over(transports: Vec<Arc<dyn Transport>>) -> Client {
    Client::new(ClientSettings::default(), transports)
}

async fn serve_at(address: &str, sizes: &[usize]) -> ServerHandle {
    let settings = ServerSettings {
        address: address.to_string(),
        ..ServerSettings::default()
    };
    Server::start(
        settings,
        Arc::new(Segments::in_memory(sizes)),
        Arc::new(Echo),
    )
    .await
    .unwrap()
}

async fn serve(sizes: &[usize]) -> ServerHandle {
    serve_at("127.0.0.1:0", sizes).await
}

/// A peer that does to every connection what `script` says. It counts them.
async fn fake<F, S>(script: S) -> (SocketAddr, Arc<AtomicU64>)
where
    F: Future<Output = ()> + Send,
    S: Fn(TcpStream) -> F + Send + Sync + Clone + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicU64::new(0));
    let counted = connections.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            let script = script.clone();
            tokio::spawn(async move { script(stream).await });
        }
    });
    (address, connections)
}

/// Exchanges hellos as a server, and waits for the first request.
async fn greet(stream: &mut TcpStream) {
    let mut hello = [0; Hello::BYTES];
    stream.read_exact(&mut hello).await.unwrap();
    stream
        .write_all(&Hello::new(1 << 30, 16 << 20).to_bytes())
        .await
        .unwrap();
    let mut request = [0; FrameHeader::BYTES + 24];
    let _ = stream.read_exact(&mut request).await;
}

/// Keeps a connection open and says nothing.
async fn hang(stream: TcpStream) {
    std::future::pending::<()>().await;
    drop(stream);
}

fn in_ms(time: u64) -> Instant {
    Instant::now() + Duration::from_millis(time)
}

#[tokio::test]
async fn another_protocol_or_version_is_named() {
    let newer = Hello {
        major: 7,
        ..Hello::new(1, 1)
    };
    let http = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let hellos: [(&'static [u8], &str); 2] = [
        (
            http,
            "it begins with \"HTTP/1.1\", expected \"STOAXFER\"; is this the address of something else?",
        ),
        (
            newer.to_bytes().to_vec().leak(),
            "it speaks version 7.0, this end 1.0; run one major version on all hosts",
        ),
    ];
    for (hello, expected) in hellos {
        let (address, _) = fake(move |mut stream| async move {
            stream.write_all(hello).await.unwrap();
            hang(stream).await;
        })
        .await;
        let error = read_one(&client(), &peer(address), soon())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        assert!(error.to_string().ends_with(expected), "{error}");
    }
}

/// What a client reads that says `hello` and `frames` to a server, up to the server's end.
async fn what_a_server_says(hello: &[u8], frames: &[u8]) -> String {
    let server = serve(&[1000]).await;
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    stream.write_all(hello).await.unwrap();
    stream.write_all(frames).await.unwrap();
    let mut answer = Vec::new();
    let reading = stream.read_to_end(&mut answer);
    tokio::time::timeout(Duration::from_secs(5), reading)
        .await
        .expect("the server closes")
        .unwrap();
    let header = answer[Hello::BYTES..][..FrameHeader::BYTES]
        .try_into()
        .unwrap();
    let head = ResponseHead::parse(&header, Default::default()).unwrap();
    assert!(matches!(
        head,
        ResponseHead::Goodbye {
            kind: RefusalKind::Protocol,
            ..
        }
    ));
    String::from_utf8(answer[Hello::BYTES + FrameHeader::BYTES..].to_vec()).unwrap()
}

#[tokio::test]
async fn a_server_tells_clients_of_another_protocol_or_version_and_closes() {
    let mut http = b"GET /metrics HTTP/1.1\r\nHost: a\r\n".to_vec();
    http.resize(Hello::BYTES, b' ');
    let text = what_a_server_says(&http, &[]).await;
    assert!(text.starts_with("it begins with \"GET /met\""), "{text}");
    let newer = Hello {
        major: 2,
        ..Hello::new(0, 0)
    };
    let text = what_a_server_says(&newer.to_bytes(), &[]).await;
    assert!(
        text.starts_with("it speaks version 2.0, this end 1.0"),
        "{text}"
    );
    let hello = Hello::new(0, 0).to_bytes();
    let text = what_a_server_says(&hello, &[0; FrameHeader::BYTES]).await;
    assert!(
        text.starts_with("the check of a frame is 0000000000000000"),
        "{text}"
    );
    let data = FrameHeader::new(FrameKind::Data, 0, 1, 10).to_bytes();
    let text = what_a_server_says(&hello, &data).await;
    assert_eq!(text, "a Data frame came from a client");
    let endless = FrameHeader {
        count: u32::MAX,
        ..FrameHeader::new(FrameKind::Reads, 0, 1, u64::MAX)
    };
    let text = what_a_server_says(&hello, &endless.to_bytes()).await;
    assert_eq!(text, "a Reads frame has 4294967295 rows, limit 4096");
    let call = FrameHeader::new(FrameKind::Call, 1, 1, u64::MAX).to_bytes();
    let text = what_a_server_says(&hello, &call).await;
    assert!(text.ends_with("limit one of 16777216"), "{text}");
    let mut twice = Vec::new();
    for _ in 0..2 {
        // Method 3 is never answered, so the first one is still open.
        twice.extend(FrameHeader::new(FrameKind::Call, 3, 8, 0).to_bytes());
    }
    let text = what_a_server_says(&hello, &twice).await;
    assert_eq!(text, "request 8 is open already");
}

/// A frame that ends before its length: the read is asked for again on another connection, and
/// then given up with a word, at once.
#[tokio::test]
async fn truncated_answers_are_asked_for_once_more_and_then_given_up() {
    let (address, connections) = fake(|mut stream| async move {
        greet(&mut stream).await;
        let header = FrameHeader::new(FrameKind::Data, 0, 0, 100).to_bytes();
        stream.write_all(&header).await.unwrap();
        stream.write_all(&[1; 50]).await.unwrap();
    })
    .await;
    let started = Instant::now();
    let error = read_one(&client(), &peer(address), soon())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    assert!(
        error
            .to_string()
            .ends_with("it ended in the middle of a frame"),
        "{error}"
    );
    assert!(started.elapsed() < Duration::from_secs(5), "it waited");
    assert_eq!(connections.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn answers_that_were_not_asked_for_end_the_connection() {
    let answers: [(FrameHeader, &str); 4] = [
        (
            FrameHeader::new(FrameKind::Data, 0, 0, 101),
            "it sent 101 bytes for request 0, which asked for 100",
        ),
        (
            FrameHeader::new(FrameKind::Data, 0, 9, 100),
            "it sent 100 bytes for request 9, which asked for none",
        ),
        (
            FrameHeader::new(FrameKind::Answer, 0, 0, 0),
            "it answered request 0, which is no open call",
        ),
        (
            FrameHeader::new(FrameKind::Data, 0, 0, u64::MAX),
            "a Data frame has 18446744073709551615 bytes, limit 1073741824",
        ),
    ];
    for (header, expected) in answers {
        let (address, _) = fake(move |mut stream| async move {
            greet(&mut stream).await;
            stream.write_all(&header.to_bytes()).await.unwrap();
            stream.write_all(&[1; 200]).await.unwrap();
            hang(stream).await;
        })
        .await;
        let error = read_one(&client(), &peer(address), soon())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        assert!(error.to_string().ends_with(expected), "{error}");
    }
}

/// The acceptance of a neighbour that flips one byte in each of a thousand chunks.
#[tokio::test]
async fn every_flipped_bit_of_a_thousand_chunks_is_noticed() {
    let server = serve(&[1000 * 700]).await;
    let truth = content(1, 1000 * 700);
    let reads: Vec<Read> = truth
        .chunks(700)
        .enumerate()
        .map(|(number, chunk)| Read {
            checksum: Some(XxHash3_64::oneshot(chunk)),
            ..read(1, (number * 700) as u64, 700)
        })
        .collect();
    let flipping = Arc::new(Faulty::new(tcp(), |_| Some(Fault::FlipBit)));
    let client = client_over(vec![flipping]);
    let server = peer(server.address());
    let outcomes = client.submit(&server, reads, soon()).into_vec().await;
    assert_eq!(outcomes.len(), 1000);
    for outcome in outcomes {
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().ends_with("they are not used"), "{error}");
    }
    let errors = &client.paths()[0].errors;
    assert_eq!(errors.get(&ErrorKind::Corrupt), Some(&1000));
}

/// A server whose own memory is wrong is noticed as well.
#[tokio::test]
async fn a_corrupt_segment_is_noticed() {
    #[derive(Debug)]
    struct Rotten;
    impl crate::SegmentSource for Rotten {
        fn open(&self, _: crate::SegmentKey) -> Result<Segment, crate::Refusal> {
            let mut bytes = content(1, 300_000);
            bytes[123_456] ^= 1;
            Ok(Segment::new(bytes))
        }
    }
    let settings = ServerSettings::default();
    let server = Server::start(settings, Arc::new(Rotten), Arc::new(Echo))
        .await
        .unwrap();
    let whole = Read {
        checksum: Some(XxHash3_64::oneshot(&content(1, 300_000))),
        ..read(1, 0, 300_000)
    };
    let outcomes = client().submit(&peer(server.address()), vec![whole], soon());
    let error = outcomes.into_vec().await.remove(0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

/// A peer that hangs costs its own reads their deadline, twice; then it is left alone and costs
/// nothing. Another peer of the same client does not notice.
#[tokio::test]
async fn a_peer_that_hangs_costs_its_deadline_and_nothing_else() {
    let (address, connections) = fake(|mut stream| async move {
        greet(&mut stream).await;
        hang(stream).await;
    })
    .await;
    let server = serve(&[1 << 20]).await;
    let client = client();
    let hanging = PeerAddress {
        id: "hanging".to_string(),
        addresses: vec![address.to_string()],
    };
    let good = peer(server.address());
    for _ in 0..2 {
        let started = Instant::now();
        let deadline = in_ms(300);
        let waiting = read_one(&client, &hanging, deadline);
        let meanwhile = async {
            let mut reads = 0;
            while Instant::now() < deadline {
                read_one(&client, &good, soon()).await.unwrap();
                reads += 1;
            }
            reads
        };
        let (outcome, reads) = tokio::join!(waiting, meanwhile);
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Deadline, "{error}");
        assert!(started.elapsed() < Duration::from_millis(300) + SLACK);
        assert!(reads >= 10, "the other peer gave {reads} reads");
    }
    let started = Instant::now();
    let error = read_one(&client, &hanging, soon()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unreachable, "{error}");
    assert!(error.to_string().contains(" is left alone for "), "{error}");
    assert!(started.elapsed() < SLACK, "it waited");
    assert!(client.is_left("hanging") && !client.is_left("the server"));
    assert_eq!(connections.load(Ordering::Relaxed), 1);
    let call = client.call(&hanging, 1, Bytes::new(), soon()).await;
    assert_eq!(call.unwrap_err().kind(), ErrorKind::Unreachable);
}

/// A host that accepts and never says hello: the next address is taken, and from then on first.
#[tokio::test]
async fn a_path_that_does_not_answer_is_left_for_the_next_one() {
    let (silent, _) = fake(hang).await;
    let server = serve(&[1000]).await;
    let settings = ClientSettings {
        connect_timeout: Duration::from_millis(300),
        ..ClientSettings::default()
    };
    let client = Client::new(settings, vec![tcp()]);
    let both = PeerAddress {
        id: "both".to_string(),
        addresses: vec![silent.to_string(), server.address().to_string()],
    };
    read_one(&client, &both, soon()).await.unwrap();
    let started = Instant::now();
    read_one(&client, &both, in_ms(5000)).await.unwrap();
    assert!(started.elapsed() < SLACK, "the silent path was tried again");
    let paths = client.paths();
    let silent = paths.iter().find(|path| path.reads == 0).unwrap();
    assert_eq!(silent.errors.get(&ErrorKind::Unreachable), Some(&1));
    assert!(
        silent
            .last_error
            .as_ref()
            .unwrap()
            .ends_with("no connection within 300 ms")
    );
}

#[tokio::test]
async fn an_address_that_nobody_listens_at_is_left_for_the_next_one() {
    let gone = serve(&[1000]).await.address();
    let client = client();
    let error = read_one(&client, &peer(gone), soon()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unreachable, "{error}");
    let no_host = peer("no-such-host.invalid:1");
    let error = read_one(&client, &no_host, soon()).await.unwrap_err();
    assert!(
        error.to_string().contains("it is no known host and port"),
        "{error}"
    );
    let nowhere = PeerAddress {
        id: "nowhere".to_string(),
        addresses: Vec::new(),
    };
    let error = read_one(&client, &nowhere, soon()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "peer nowhere is not reachable: it has no address"
    );
    let server = serve(&[1000]).await;
    let both = PeerAddress {
        id: "both".to_string(),
        addresses: vec![gone.to_string(), server.address().to_string()],
    };
    read_one(&client, &both, soon()).await.unwrap();
}

/// A worker that is started again on its address serves the next read, not the one after.
#[tokio::test]
async fn a_peer_that_restarts_on_the_same_address_serves_the_next_read() {
    let server = serve(&[1000]).await;
    let address = server.address().to_string();
    let client = client();
    read_one(&client, &peer(&address), soon()).await.unwrap();
    server.stop().await;
    let server = serve_at(&address, &[1000]).await;
    read_one(&client, &peer(&address), soon()).await.unwrap();
    drop(server);
    // The listener's task is only told to end.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let server = serve_at(&address, &[1000]).await;
    let answer = client
        .call(&peer(&address), 1, Bytes::from_static(b"x"), soon())
        .await;
    assert_eq!(answer.unwrap(), "x");
    drop(server);
}

/// A peer a hundred times slower than its deadline allows: what came in time is used, the rest
/// ends at the deadline, and the other peer's rate stays.
#[tokio::test]
async fn a_slow_peer_ends_at_the_deadline_with_what_came() {
    let server = serve(&[10 << 20]).await;
    let slow: Arc<dyn Transport> = Arc::new(Throttled::new(tcp(), Duration::from_millis(20), 4e6));
    let client = client_over(vec![slow]);
    let peer = peer(server.address());
    let reads: Vec<Read> = (0..100)
        .map(|number| read(1, number * 1000, 100_000))
        .collect();
    let started = Instant::now();
    let outcomes = client.submit(&peer, reads, in_ms(500)).into_vec().await;
    let took = started.elapsed();
    assert!(took < Duration::from_millis(500) + SLACK, "{took:?}");
    let came = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert!((1..50).contains(&came), "{came} came");
    for outcome in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
        assert_eq!(outcome.kind(), ErrorKind::Deadline, "{outcome}");
    }
}

/// Two transports to one peer: when the preferred one fails in the middle of a batch, what is left
/// of the batch ends over the other one.
#[tokio::test]
async fn a_batch_whose_path_fails_ends_over_the_next_one() {
    #[derive(Debug)]
    struct Fabric(Faulty);
    #[async_trait::async_trait]
    impl Transport for Fabric {
        fn kind(&self) -> TransportKind {
            TransportKind::Rdma
        }
        async fn connect(&self, address: &str) -> crate::Result<Arc<dyn crate::Link>> {
            self.0.connect(address).await
        }
    }
    let server = serve(&[1 << 20]).await;
    let breaking = Fabric(Faulty::new(tcp(), |read| {
        (read.offset == 50 * 4096).then_some(Fault::Close)
    }));
    let client = client_over(vec![Arc::new(breaking), tcp()]);
    let truth = content(1, 1 << 20);
    let reads: Vec<Read> = (0..100)
        .map(|number| read(1, number * 4096, 4096))
        .collect();
    let mut batch = client.submit(&peer(server.address()), reads, soon());
    let mut ended = 0;
    while let Some((place, outcome)) = batch.next().await {
        assert_eq!(*outcome.unwrap(), truth[place * 4096..][..4096]);
        ended += 1;
    }
    assert_eq!(ended, 100);
    let paths = client.paths();
    let over = |kind| paths.iter().find(|path| path.transport == kind).unwrap();
    assert_eq!(over(TransportKind::Tcp).reads, 100);
    assert!(
        over(TransportKind::Rdma)
            .errors
            .contains_key(&ErrorKind::Closed)
    );
}

/// A link that hands some of its reads to the transport below: each counts where it came.
#[tokio::test]
async fn a_read_counts_with_the_transport_that_brought_it() {
    const BELOW_FROM: u64 = 60;
    #[derive(Debug)]
    struct Fabric(Arc<dyn Transport>);
    #[derive(Debug)]
    struct FabricLink(Arc<dyn crate::Link>);
    #[async_trait::async_trait]
    impl Transport for Fabric {
        fn kind(&self) -> TransportKind {
            TransportKind::Rdma
        }
        async fn connect(&self, address: &str) -> crate::Result<Arc<dyn crate::Link>> {
            Ok(Arc::new(FabricLink(self.0.connect(address).await?)))
        }
    }
    impl crate::Link for FabricLink {
        fn submit(&self, reads: Vec<Read>, deadline: Instant) -> crate::Outcomes {
            let asked = reads.clone();
            let outcomes = self.0.submit(reads, deadline);
            let marked = outcomes.map(move |(place, outcome)| {
                let below = asked[place].offset >= BELOW_FROM * 4096;
                let outcome = outcome.map(|block| match below {
                    true => block.came_via(TransportKind::Tcp),
                    false => block,
                });
                (place, outcome)
            });
            marked.boxed()
        }
        fn call(
            &self,
            method: u16,
            body: Bytes,
            deadline: Instant,
        ) -> futures::future::BoxFuture<'static, crate::Result<Bytes>> {
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
    let server = serve(&[1 << 20]).await;
    let client = client_over(vec![Arc::new(Fabric(tcp())), tcp()]);
    let reads: Vec<Read> = (0..100)
        .map(|number| read(1, number * 4096, 4096))
        .collect();
    let mut batch = client.submit(&peer(server.address()), reads, soon());
    while let Some((place, outcome)) = batch.next().await {
        let expected = match place as u64 >= BELOW_FROM {
            true => TransportKind::Tcp,
            false => TransportKind::Rdma,
        };
        assert_eq!(outcome.unwrap().via(), Some(expected), "read {place}");
    }
    let paths = client.paths();
    let seen: Vec<_> = paths
        .iter()
        .map(|path| (path.transport, path.reads, path.bytes))
        .collect();
    let expected = [
        (TransportKind::Rdma, 60, 60 * 4096),
        (TransportKind::Tcp, 40, 40 * 4096),
    ];
    assert_eq!(seen, expected, "the preferred path first");
}

#[tokio::test]
async fn reads_that_hang_end_at_their_deadline_and_the_others_come() {
    let server = serve(&[1 << 20]).await;
    let hanging = Faulty::new(tcp(), |read| (read.offset == 0).then_some(Fault::Hang));
    let client = client_over(vec![Arc::new(hanging)]);
    let peer = peer(server.address());
    let reads = vec![read(1, 0, 10), read(1, 1, 10), read(1, 2, 10)];
    let started = Instant::now();
    let mut batch = client.submit(&peer, reads, in_ms(400));
    for _ in 0..2 {
        let (place, outcome) = batch.next().await.unwrap();
        assert!(place > 0 && outcome.is_ok());
    }
    assert!(
        started.elapsed() < Duration::from_millis(400),
        "the others waited"
    );
    let (place, outcome) = batch.next().await.unwrap();
    assert_eq!(place, 0);
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Deadline);
    assert!(batch.next().await.is_none());
    assert!(started.elapsed() < Duration::from_millis(400) + SLACK);
}

#[tokio::test]
async fn halves_and_refusals_are_typed() {
    let server = serve(&[1 << 20]).await;
    let faulty = Faulty::new(tcp(), |read| match read.offset {
        0 => Some(Fault::Halve),
        1 => Some(Fault::Refuse(RefusalKind::Busy)),
        _ => None,
    });
    let client = client_over(vec![Arc::new(faulty)]);
    let reads = vec![read(1, 1, 10), read(1, 2, 10)];
    let outcomes = client
        .submit(&peer(server.address()), reads, soon())
        .into_vec()
        .await;
    assert_eq!(outcomes[0].as_ref().unwrap_err().kind(), ErrorKind::Refused);
    assert!(outcomes[1].is_ok());
    let half = read_one(&client, &peer(server.address()), soon())
        .await
        .unwrap_err();
    assert_eq!(half.kind(), ErrorKind::Protocol);
    assert!(
        half.to_string().contains("50 bytes came for a read of 100"),
        "{half}"
    );
}

/// More bytes than the budget, while nothing comes: the queue ends at the deadline too.
#[tokio::test]
async fn reads_that_wait_for_budget_end_at_the_deadline() {
    let (address, _) = fake(|mut stream| async move {
        greet(&mut stream).await;
        hang(stream).await;
    })
    .await;
    let settings = ClientSettings {
        in_flight_bytes_max: 1 << 20,
        ..ClientSettings::default()
    };
    let client = Client::new(settings, vec![tcp()]);
    let started = Instant::now();
    let reads = vec![read(1, 0, 1 << 20); 20];
    let outcomes = client
        .submit(&peer(address), reads, in_ms(300))
        .into_vec()
        .await;
    assert!(started.elapsed() < Duration::from_millis(300) + SLACK);
    assert_eq!(outcomes.len(), 20);
    for outcome in outcomes {
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Deadline);
    }
}

/// Large reads have connections of their own: small ones do not wait behind them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_reads_do_not_wait_behind_large_ones() {
    let server = serve(&[32 << 20]).await;
    let client = client();
    let peer = peer(server.address());
    let large = client.submit(&peer, vec![read(1, 0, 32 << 20); 16], soon());
    let mut small = 0;
    let mut large = std::pin::pin!(large.into_vec());
    loop {
        tokio::select! {
            biased;
            outcomes = &mut large => {
                assert!(outcomes.iter().all(Result::is_ok));
                break;
            }
            outcome = read_one(&client, &peer, soon()) => {
                outcome.unwrap();
                small += 1;
            }
        }
    }
    assert!(small >= 5, "{small} small reads while 512 MiB came");
    assert!(client.paths()[0].connections >= 2);
}

#[tokio::test]
async fn connections_and_calls_over_the_limit_are_refused() {
    let settings = ServerSettings {
        connections_max: 1,
        calls_max: 2,
        calls_bytes_max: 4096,
        ..ServerSettings::default()
    };
    let segments = Arc::new(Segments::in_memory(&[1000]));
    let server = Server::start(settings, segments, Arc::new(Echo))
        .await
        .unwrap();
    let first = client();
    let peer = peer(server.address());
    read_one(&first, &peer, soon()).await.unwrap();
    let error = read_one(&client(), &peer, soon()).await.unwrap_err();
    let expected = "1 connections are open, which is the limit; come again later";
    assert!(error.to_string().ends_with(expected), "{error}");
    assert_eq!(error.kind(), ErrorKind::Unreachable);

    let endless = || first.call(&peer, 3, Bytes::new(), in_ms(500));
    let (one, two, three) = tokio::join!(endless(), endless(), endless());
    let kinds = [one, two, three].map(|answer| answer.unwrap_err().kind());
    assert_eq!(
        kinds,
        [ErrorKind::Deadline, ErrorKind::Deadline, ErrorKind::Refused]
    );
    // The two that passed their deadline were taken back: there is room again.
    let large = first
        .call(&peer, 1, vec![0; 5000].into(), soon())
        .await
        .unwrap_err();
    assert!(
        large.to_string().contains("take 4096 bytes at most"),
        "{large}"
    );
    let small = first.call(&peer, 1, vec![0; 3000].into(), soon()).await;
    assert_eq!(small.unwrap().len(), 3000);
    read_one(&first, &peer, soon()).await.unwrap();
}

/// Clients that connect and say nothing, or ask and take nothing, do not stay for ever.
#[tokio::test]
async fn a_server_does_not_wait_for_ever() {
    let settings = ServerSettings {
        handshake_timeout: Duration::from_millis(200),
        stall_timeout: Duration::from_millis(300),
        ..ServerSettings::default()
    };
    let segments = Arc::new(Segments::in_memory(&[64 << 20]));
    let server = Server::start(settings, segments, Arc::new(Echo))
        .await
        .unwrap();
    let started = Instant::now();
    let mut silent = TcpStream::connect(server.address()).await.unwrap();
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0);
    assert!(started.elapsed() < Duration::from_millis(200) + SLACK);

    let mut greedy = TcpStream::connect(server.address()).await.unwrap();
    greedy
        .write_all(&Hello::new(0, 0).to_bytes())
        .await
        .unwrap();
    let row = crate::wire::ReadRow {
        segment: 1,
        offset: 0,
        length: 64 << 20,
    };
    let frame = crate::wire::reads_frame(0, INCARNATION, &[row]);
    greedy.write_all(&frame).await.unwrap();
    let started = Instant::now();
    while server.statistics().connections == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    while server.statistics().connections != 0 {
        assert!(
            started.elapsed() < Duration::from_millis(300) + 2 * SLACK,
            "it stays"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A server that stops says so; what was outstanding is typed and soon.
#[tokio::test]
async fn a_server_that_stops_says_so() {
    let server = serve(&[1000]).await;
    let client = client();
    let peer = peer(server.address());
    read_one(&client, &peer, soon()).await.unwrap();
    let started = Instant::now();
    let waiting = client.call(&peer, 3, Bytes::new(), soon());
    let stopping = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        server.stop().await;
    };
    let (answer, ()) = tokio::join!(waiting, stopping);
    let error = answer.unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Closed | ErrorKind::Unreachable),
        "{error}"
    );
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(!matches!(error, TransferError::Deadline { .. }));
}

/// A client that outlives the runtime of its connections makes new ones on the next runtime.
#[test]
fn a_client_outlives_the_runtime_of_its_connections() {
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    };
    let serving = runtime();
    let server = serving.block_on(serve(&[1000]));
    let client = client();
    let peer = peer(server.address());
    for _ in 0..3 {
        let asking = runtime();
        asking.block_on(async {
            read_one(&client, &peer, soon()).await.unwrap();
            // One that is still connecting when its runtime goes.
            drop(client.submit(&peer, vec![read(1, 0, 1 << 20)], soon()));
        });
        drop(asking);
    }
}
