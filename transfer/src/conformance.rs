//! What every transport promises, as one suite: run it on anything that makes connected pairs.
//!
//! A case opens with the hazard it is about and panics where the promise does not hold.

use std::collections::HashMap;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use twox_hash::XxHash3_64;

use crate::client::{Client, ClientSettings, PeerAddress};
use crate::error::{ErrorKind, Refusal, RefusalKind, TransferError};
use crate::memory::BLOCK_ALIGN;
use crate::segment::{Segment, SegmentKey, SegmentSource};
use crate::transport::{CallHandler, PeerIdentity, Read, Transport};

/// Makes servers and ways to them.
#[async_trait]
pub trait Pairs: Send + Sync {
    /// Segments 1, 2, … of these sizes; in memory unless the pairs are about other ones.
    fn segments(&self, sizes: &[usize]) -> Segments {
        Segments::in_memory(sizes)
    }

    /// A server of these, and a transport that leads to it.
    async fn pair(&self, segments: Arc<dyn SegmentSource>, calls: Arc<dyn CallHandler>) -> Pair;
}

/// A server and a way to it.
pub struct Pair {
    /// Leads to the server.
    pub transport: Arc<dyn Transport>,
    /// Where the server is.
    pub address: String,
    /// Ends the server when dropped.
    pub server: Box<dyn Send + Sync>,
}

/// Runs every case.
///
/// # Panics
/// At the first promise that does not hold.
pub async fn all(pairs: &dyn Pairs) {
    let cases: [(&str, futures::future::BoxFuture<'_, ()>); 10] = [
        (
            "every size and offset",
            every_size_and_offset(pairs).boxed(),
        ),
        (
            "a thousand small reads",
            a_thousand_small_reads(pairs).boxed(),
        ),
        (
            "bad reads among good ones",
            bad_reads_among_good_ones(pairs).boxed(),
        ),
        ("overlapping ranges", overlapping_ranges(pairs).boxed()),
        ("wrong checksums", wrong_checksums(pairs).boxed()),
        ("calls", calls(pairs).boxed()),
        ("long calls", long_calls(pairs).boxed()),
        (
            "batches that are dropped",
            batches_that_are_dropped(pairs).boxed(),
        ),
        ("many batches at once", many_batches_at_once(pairs).boxed()),
        ("a server that goes", a_server_that_goes(pairs).boxed()),
    ];
    for (name, case) in cases {
        let limit = Duration::from_secs(120);
        assert!(
            tokio::time::timeout(limit, case).await.is_ok(),
            "case \"{name}\" hangs"
        );
        eprintln!("conformance: {name}: holds");
    }
}

/// The memory that [`Segments`] names its segments by.
pub const INCARNATION: u64 = 0x5704_0000_0000_0001;

/// Segments of known bytes.
#[derive(Debug, Default)]
pub struct Segments {
    segments: HashMap<u64, Segment>,
}

impl Segments {
    /// Segments 1, 2, … of these sizes, in memory.
    pub fn in_memory(sizes: &[usize]) -> Self {
        let segments = (1..)
            .zip(sizes)
            .map(|(number, &size)| (number, Segment::new(content(number, size))));
        Self {
            segments: segments.collect(),
        }
    }

    /// The same in files in `directory`, mapped.
    ///
    /// # Errors
    /// Of the file system.
    pub fn in_files(sizes: &[usize], directory: &std::path::Path) -> std::io::Result<Self> {
        let mut segments = HashMap::new();
        for (number, &size) in (1_u64..).zip(sizes) {
            let path = directory.join(format!("segment-{number}"));
            let mut file = std::fs::File::create_new(&path)?;
            file.write_all(&content(number, size))?;
            let file = std::fs::File::open(&path)?;
            let map = crate::memory::map_file(&file)?;
            segments.insert(number, Segment::new(map).with_file(Arc::new(file)));
        }
        Ok(Self { segments })
    }
}

impl SegmentSource for Segments {
    fn open(&self, key: SegmentKey) -> Result<Segment, Refusal> {
        if key.incarnation != INCARNATION {
            return Err(Refusal::wrong_incarnation(key, INCARNATION));
        }
        self.segments
            .get(&key.segment)
            .cloned()
            .ok_or_else(|| Refusal::unknown_segment(key))
    }
}

/// The bytes of a segment of [`Segments`].
pub fn content(segment: u64, size: usize) -> Vec<u8> {
    let mut state = segment.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// A read of a segment of [`Segments`].
pub fn read(segment: u64, offset: u64, length: u64) -> Read {
    Read {
        segment: SegmentKey {
            incarnation: INCARNATION,
            segment,
        },
        offset,
        length,
        checksum: None,
    }
}

/// Method 1 answers with its body; 2 refuses; 3 never answers; any other is not known.
#[derive(Debug)]
pub struct Echo;

#[async_trait]
impl CallHandler for Echo {
    async fn call(&self, _: &PeerIdentity, method: u16, body: Bytes) -> Result<Bytes, Refusal> {
        match method {
            1 => Ok(body),
            2 => Err(Refusal::failed("this method always fails")),
            3 => std::future::pending().await,
            other => Err(Refusal::unknown_method(other)),
        }
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

struct Setting {
    client: Client,
    peer: PeerAddress,
    _server: Box<dyn Send + Sync>,
}

async fn setting(pairs: &dyn Pairs, sizes: &[usize]) -> Setting {
    let segments = Arc::new(pairs.segments(sizes));
    let pair = pairs.pair(segments, Arc::new(Echo)).await;
    let settings = ClientSettings {
        in_flight_bytes_max: 8 << 20,
        ..ClientSettings::default()
    };
    Setting {
        client: Client::new(settings, vec![pair.transport]),
        peer: PeerAddress {
            id: "the server".to_string(),
            addresses: vec![pair.address],
        },
        _server: pair.server,
    }
}

impl Setting {
    async fn read_all(&self, reads: Vec<Read>) -> Vec<crate::Result<crate::Block>> {
        self.client
            .submit(&self.peer, reads, soon())
            .into_vec()
            .await
    }
}

fn assert_bytes(outcome: &crate::Result<crate::Block>, expected: &[u8], what: &str) {
    match outcome {
        Ok(block) => {
            assert!(**block == *expected, "{what}: other bytes");
            assert!(block.as_ptr().addr().is_multiple_of(BLOCK_ALIGN), "{what}");
        }
        Err(error) => panic!("{what}: {error}"),
    }
}

/// Sizes around every border (header, buffer, page, kinds of connection, budget), at offsets that
/// are aligned to nothing.
async fn every_size_and_offset(pairs: &dyn Pairs) {
    let size = 12 << 20;
    let setting = setting(pairs, &[size]).await;
    let truth = content(1, size);
    let sizes = [
        1,
        7,
        39,
        40,
        41,
        63,
        64,
        4095,
        4096,
        65_535,
        65_536,
        65_537,
        262_143,
        262_144,
        1 << 20,
        9 << 20,
    ];
    for offset in [0, 1, 4097] {
        let reads: Vec<Read> = sizes
            .iter()
            .map(|&length| read(1, offset, length))
            .collect();
        let outcomes = setting.read_all(reads).await;
        assert_eq!(outcomes.len(), sizes.len());
        for (outcome, length) in outcomes.iter().zip(sizes) {
            let start = usize::try_from(offset).unwrap();
            let end = start + usize::try_from(length).unwrap();
            assert_bytes(
                outcome,
                &truth[start..end],
                &format!("{length} from {offset}"),
            );
        }
    }
    let last = (size - 1) as u64;
    let end = setting
        .read_all(vec![read(1, last, 1), read(1, 0, size as u64)])
        .await;
    assert_bytes(&end[0], &truth[size - 1..], "the last byte");
    assert_bytes(&end[1], &truth, "all bytes");
}

/// Every read of a large batch has exactly one outcome, under its own number.
async fn a_thousand_small_reads(pairs: &dyn Pairs) {
    let (count, length) = (1000_usize, 4096_usize);
    let setting = setting(pairs, &[count * length, count * length]).await;
    let reads: Vec<Read> = (0..count)
        .map(|number| {
            read(
                1 + (number % 2) as u64,
                (number * length) as u64,
                length as u64,
            )
        })
        .collect();
    let mut batch = setting.client.submit(&setting.peer, reads, soon());
    assert_eq!(batch.remaining(), count);
    let truth = [content(1, count * length), content(2, count * length)];
    let mut seen = vec![false; count];
    while let Some((number, outcome)) = batch.next().await {
        assert!(
            !std::mem::replace(&mut seen[number], true),
            "{number} twice"
        );
        let expected = &truth[number % 2][number * length..(number + 1) * length];
        assert_bytes(&outcome, expected, &format!("read {number}"));
    }
    assert!(seen.iter().all(|seen| *seen), "a read has no outcome");
}

fn refusal_kind(outcome: &crate::Result<crate::Block>) -> Option<RefusalKind> {
    match outcome {
        Err(TransferError::Refused { refusal, .. }) => Some(refusal.kind),
        _ => None,
    }
}

/// What is wrong with one read is said of that read, and no other one suffers.
async fn bad_reads_among_good_ones(pairs: &dyn Pairs) {
    let setting = setting(pairs, &[1000]).await;
    let mut other_memory = read(1, 0, 10);
    other_memory.segment.incarnation = 77;
    let reads = vec![
        read(1, 0, 1000),
        read(9, 0, 10),
        other_memory,
        read(1, 991, 10),
        read(1, u64::MAX, 10),
        read(1, 1000, 1),
        read(1, 0, 0),
        read(1, 0, u64::MAX),
        read(1, 990, 10),
    ];
    let outcomes = setting.read_all(reads).await;
    let truth = content(1, 1000);
    assert_bytes(&outcomes[0], &truth, "the first");
    assert_bytes(&outcomes[8], &truth[990..], "the last");
    let kinds: Vec<Option<RefusalKind>> = outcomes[1..6].iter().map(refusal_kind).collect();
    assert_eq!(
        kinds,
        [
            Some(RefusalKind::UnknownSegment),
            Some(RefusalKind::WrongIncarnation),
            Some(RefusalKind::OutOfRange),
            Some(RefusalKind::OutOfRange),
            Some(RefusalKind::OutOfRange),
        ],
        "{outcomes:?}"
    );
    for outcome in &outcomes[6..8] {
        let kind = outcome.as_ref().map_err(TransferError::kind).unwrap_err();
        assert_eq!(kind, ErrorKind::TooLarge, "{outcome:?}");
    }
    let text = outcomes[3].as_ref().unwrap_err().to_string();
    let expected = "range of 10 bytes from 991 is not inside segment 5704000000000001/0000000000000001 of 1000 bytes";
    assert!(text.ends_with(expected), "{text}");
}

/// Ranges that overlap are each read whole, into memory of their own.
async fn overlapping_ranges(pairs: &dyn Pairs) {
    let setting = setting(pairs, &[100_000]).await;
    let truth = content(1, 100_000);
    let reads: Vec<Read> = (0..200)
        .map(|number| read(1, number * 100, 70_000))
        .collect();
    for (number, outcome) in setting.read_all(reads).await.iter().enumerate() {
        let start = number * 100;
        assert_bytes(outcome, &truth[start..start + 70_000], "overlapping");
    }
}

/// Bytes that do not hash to what is known of them are never seen; right ones are.
async fn wrong_checksums(pairs: &dyn Pairs) {
    let setting = setting(pairs, &[100_000]).await;
    let truth = content(1, 100_000);
    let right = Read {
        checksum: Some(XxHash3_64::oneshot(&truth[5..70_005])),
        ..read(1, 5, 70_000)
    };
    let wrong = Read {
        checksum: Some(1),
        ..right
    };
    let outcomes = setting.read_all(vec![right, wrong, right]).await;
    assert_bytes(&outcomes[0], &truth[5..70_005], "right");
    assert_bytes(&outcomes[2], &truth[5..70_005], "right");
    let error = outcomes[1].as_ref().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

/// Calls share the connection and have their own answers, whatever their size.
async fn calls(pairs: &dyn Pairs) {
    let setting = setting(pairs, &[1000]).await;
    let bodies: Vec<Bytes> = [0, 1, 100, 70_000, 1 << 20]
        .iter()
        .map(|&size| content(size as u64, size).into())
        .collect();
    let asked = bodies
        .iter()
        .map(|body| setting.client.call(&setting.peer, 1, body.clone(), soon()));
    for (answer, body) in futures::future::join_all(asked).await.iter().zip(&bodies) {
        assert_eq!(answer.as_ref().unwrap(), body);
    }
    let failed = setting
        .client
        .call(&setting.peer, 2, Bytes::new(), soon())
        .await;
    let text = failed.unwrap_err().to_string();
    assert!(
        text.ends_with("refuses: this method always fails"),
        "{text}"
    );
    let unknown = setting
        .client
        .call(&setting.peer, 4, Bytes::new(), soon())
        .await;
    let text = unknown.unwrap_err().to_string();
    assert!(text.contains("no method 0x0004 here"), "{text}");
    let reserved = setting
        .client
        .call(&setting.peer, 0xfff0, Bytes::new(), soon())
        .await;
    assert!(reserved.is_err(), "a handler sees the transports' methods");
    let large = vec![0; (16 << 20) + 1].into();
    let large = setting.client.call(&setting.peer, 1, large, soon()).await;
    assert_eq!(large.unwrap_err().kind(), ErrorKind::TooLarge);
}

/// A call that waits for something holds up neither reads nor other calls, and ends at its
/// deadline.
async fn long_calls(pairs: &dyn Pairs) {
    let setting = setting(pairs, &[1 << 20]).await;
    let started = Instant::now();
    let deadline = started + Duration::from_millis(1500);
    let waiting: Vec<_> = (0..8)
        .map(|_| {
            setting
                .client
                .call(&setting.peer, 3, Bytes::new(), deadline)
        })
        .collect();
    let meanwhile = async {
        for _ in 0..20 {
            let outcomes = setting.read_all(vec![read(1, 0, 4096)]).await;
            assert!(outcomes[0].is_ok(), "{outcomes:?}");
            let answer = setting
                .client
                .call(&setting.peer, 1, Bytes::new(), soon())
                .await;
            assert!(answer.is_ok(), "{answer:?}");
        }
    };
    let (waited, ()) = tokio::join!(futures::future::join_all(waiting), meanwhile);
    for answer in waited {
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::Deadline);
    }
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(1500), "{took:?}");
    let answer = setting
        .client
        .call(&setting.peer, 1, Bytes::from_static(b"x"), soon())
        .await;
    assert_eq!(answer.unwrap(), "x");
}

/// Whoever loses interest costs the others nothing: the connection goes on.
async fn batches_that_are_dropped(pairs: &dyn Pairs) {
    let setting = setting(pairs, &[4 << 20]).await;
    let truth = content(1, 4 << 20);
    for round in 0..20_u64 {
        let reads = vec![read(1, round, 3 << 20); 4];
        let mut batch = setting.client.submit(&setting.peer, reads, soon());
        if round % 2 == 0 {
            let _ = batch.next().await;
        }
        drop(batch);
        let outcomes = setting
            .read_all(vec![read(1, 17, 100), read(1, round, 1 << 20)])
            .await;
        assert_bytes(&outcomes[0], &truth[17..117], "after a dropped batch");
    }
}

/// More bytes than the budget allows at once, from many sides, all come.
async fn many_batches_at_once(pairs: &dyn Pairs) {
    let setting = setting(pairs, &[6 << 20, 100_000]).await;
    let (large, small) = (content(1, 6 << 20), content(2, 100_000));
    let rounds = (0..12_usize).map(|round| {
        let (setting, large, small) = (&setting, &large, &small);
        async move {
            let reads = vec![
                read(1, round as u64, 5 << 20),
                read(2, round as u64, 50_000),
                read(1, 0, 300_000),
            ];
            let outcomes = setting.read_all(reads).await;
            assert_bytes(&outcomes[0], &large[round..round + (5 << 20)], "large");
            assert_bytes(&outcomes[1], &small[round..round + 50_000], "small");
            assert_bytes(&outcomes[2], &large[..300_000], "middle");
        }
    });
    futures::future::join_all(rounds).await;
    let paths = setting.client.paths();
    let bytes: u64 = paths.iter().map(|path| path.bytes).sum();
    assert_eq!(bytes, 12 * ((5 << 20) + 50_000 + 300_000));
    assert!(setting.client.expected("the server", 1 << 20).is_some());
}

/// A server that goes ends what it was asked for with a typed error, soon and not at the deadline.
async fn a_server_that_goes(pairs: &dyn Pairs) {
    let setting = setting(pairs, &[1000]).await;
    assert!(setting.read_all(vec![read(1, 0, 10)]).await[0].is_ok());
    let started = Instant::now();
    let waiting = setting.client.call(&setting.peer, 3, Bytes::new(), soon());
    let client = setting.client.clone();
    let (peer, server) = (setting.peer.clone(), setting._server);
    let going = async move {
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(server);
    };
    tokio::join!(going, async {
        let reads = client
            .submit(&peer, vec![read(1, 0, 10)], soon())
            .into_vec()
            .await;
        assert_eq!(reads.len(), 1);
    });
    // Its memory may still be read until all of it has gone.
    let after = loop {
        let mut after = client
            .submit(&peer, vec![read(1, 0, 10)], soon())
            .into_vec()
            .await;
        match after.remove(0) {
            Ok(_) if started.elapsed() < Duration::from_secs(10) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            after => break after,
        }
    };
    let kind = after.as_ref().map_err(TransferError::kind).unwrap_err();
    assert!(
        matches!(kind, ErrorKind::Closed | ErrorKind::Unreachable),
        "{after:?}"
    );
    drop(waiting);
    assert!(started.elapsed() < Duration::from_secs(30));
}
