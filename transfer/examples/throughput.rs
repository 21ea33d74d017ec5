//! Measures transfers over loopback: large chunks over one connection beside iperf3 in the same
//! run, the same verified, and with TLS; what the server's CPU costs a GiB; and a batch of a
//! thousand small reads over a path with delay, in round trips.
//!
//! ```sh
//! cargo run --release -p stoa-transfer --features conformance --example throughput -- \
//!     --rounds 5 --seconds 3
//! ```
//!
//! Everything stays on loopback. `iperf3` is left out where it is not installed. Rounds are
//! interleaved; medians are shown, and ratios are taken within a round.

use std::io::{BufRead, BufReader, Read as _, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use stoa_transfer::conformance::{Echo, Segments, content, read};
use stoa_transfer::{
    Client, ClientSettings, PeerAddress, Read, Server, ServerSettings, Tcp, TcpSettings, Tls,
    TlsSettings,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use twox_hash::XxHash3_64;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const SEGMENTS: usize = 4;
const SEGMENT_BYTES: usize = 64 << 20;
const GIB: f64 = (1_u64 << 30) as f64;

struct Arguments {
    rounds: usize,
    seconds: u64,
    chunk_bytes: u64,
    delay: Duration,
    threads: usize,
}

impl Arguments {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut parsed = Self {
            rounds: 5,
            seconds: 3,
            chunk_bytes: 1 << 20,
            delay: Duration::from_millis(10),
            threads: 1,
        };
        while let Some(name) = arguments.next() {
            let value = arguments
                .next()
                .ok_or_else(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--rounds" => parsed.rounds = value.parse()?,
                "--seconds" => parsed.seconds = value.parse()?,
                "--chunk-bytes" => parsed.chunk_bytes = value.parse()?,
                "--delay-ms" => parsed.delay = Duration::from_millis(value.parse()?),
                "--threads" => parsed.threads = value.parse()?,
                _ => return Err(format!(
                    "unknown argument {name}; known are --rounds, --seconds, --chunk-bytes, --delay-ms, --threads"
                )
                .into()),
            }
        }
        Ok(parsed)
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.peek().map(String::as_str) == Some("serve") {
        let directory = arguments.nth(1).ok_or("serve needs a directory")?;
        let threads = arguments.next().ok_or("serve needs threads")?.parse()?;
        return runtime(threads)?.block_on(serve(Path::new(&directory)));
    }
    let arguments = Arguments::parse(arguments)?;
    runtime(arguments.threads)?.block_on(measure(&arguments))
}

/// As many threads as iperf3 has at each end, unless more are asked for.
fn runtime(threads: usize) -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()?)
}

/// The server's process: serves in plain text and with TLS until its standard input ends.
async fn serve(directory: &Path) -> Result<()> {
    let segments = Arc::new(Segments::in_files(&[SEGMENT_BYTES; SEGMENTS], directory)?);
    let tls = Tls::open(tls_settings(directory))?;
    let plain = ServerSettings::default();
    let secret = ServerSettings {
        tls: Some(tls),
        ..ServerSettings::default()
    };
    let plain = Server::start(plain, segments.clone(), Arc::new(Echo)).await?;
    let secret = Server::start(secret, segments, Arc::new(Echo)).await?;
    println!("{} {}", plain.address(), secret.address());
    std::io::stdout().flush()?;
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    Ok(())
}

fn tls_settings(directory: &Path) -> TlsSettings {
    let path = |name: &str| directory.join(name);
    TlsSettings::new(path("ca.pem"), path("cert.pem"), path("key.pem"))
}

/// An authority and one certificate of it, for this run.
fn make_certificates(directory: &Path) -> Result<()> {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate()?;
    let certificate = authority.self_signed(&authority_key)?;
    std::fs::write(directory.join("ca.pem"), certificate.pem())?;
    let issuer = Issuer::new(authority, authority_key);
    let mut node = CertificateParams::default();
    let role = "stoa://role/node".try_into()?;
    node.subject_alt_names.push(SanType::URI(role));
    let key = KeyPair::generate()?;
    let certificate = node.signed_by(&key, &issuer)?;
    std::fs::write(directory.join("cert.pem"), certificate.pem())?;
    std::fs::write(directory.join("key.pem"), key.serialize_pem())?;
    Ok(())
}

/// A process that ends with this value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// CPU that it has used so far.
    fn cpu(&self) -> Result<Duration> {
        const TICKS_PER_SECOND: f64 = 100.0;
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let behind_name = stat.rsplit_once(')').ok_or("a stat line")?.1;
        let fields: Vec<&str> = behind_name.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        Ok(Duration::from_secs_f64(ticks as f64 / TICKS_PER_SECOND))
    }
}

/// What one way of transferring came to in each round.
#[derive(Default)]
struct Series {
    /// Bytes a second.
    rates: Vec<f64>,
    /// Seconds of the server's CPU for each GiB.
    cpu: Vec<f64>,
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// The median of values in a unit, with the least and the most.
fn shown(values: &[f64], unit: f64) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!(
        "{:.2} ({:.2} to {:.2})",
        median(values) / unit,
        least / unit,
        most / unit
    )
}

fn client(tls: Option<Tls>) -> Client {
    let settings = ClientSettings {
        bulk_connections: 1,
        ..ClientSettings::default()
    };
    let tcp = Tcp::new(TcpSettings {
        tls,
        ..TcpSettings::default()
    });
    Client::new(settings, vec![Arc::new(tcp)])
}

fn peer(address: impl ToString) -> PeerAddress {
    PeerAddress {
        id: "server".to_string(),
        addresses: vec![address.to_string()],
    }
}

async fn measure(arguments: &Arguments) -> Result<()> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    make_certificates(directory.path())?;
    let mut server = Process(
        Command::new(std::env::current_exe()?)
            .arg("serve")
            .arg(directory.path())
            .arg(arguments.threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?,
    );
    let mut addresses = String::new();
    let stdout = server.0.stdout.take().ok_or("the server's output")?;
    BufReader::new(stdout).read_line(&mut addresses)?;
    let (plain, secret) = addresses
        .trim()
        .split_once(' ')
        .ok_or("the server did not start")?;

    let clear = client(None);
    let encrypted = client(Some(Tls::open(tls_settings(directory.path()))?));
    let unverified = chunks(arguments.chunk_bytes, false);
    let verified = chunks(arguments.chunk_bytes, true);
    let ways: [(&str, &Client, &str, &[Read]); 4] = [
        ("plain", &clear, plain, &unverified),
        ("plain, checksums verified", &clear, plain, &verified),
        ("TLS", &encrypted, secret, &unverified),
        ("TLS, checksums verified", &encrypted, secret, &verified),
    ];
    let mut series: Vec<Series> = ways.iter().map(|_| Series::default()).collect();
    let mut iperf = Vec::new();
    let time = Duration::from_secs(arguments.seconds);
    for (_, client, address, reads) in ways {
        transfer(client, &peer(address), reads, Duration::from_millis(200)).await?;
    }
    for _ in 0..arguments.rounds {
        if let Some(rate) = iperf3(arguments.seconds)? {
            iperf.push(rate);
        }
        for ((_, client, address, reads), series) in ways.iter().zip(&mut series) {
            let before = server.cpu()?;
            let (rate, bytes) = transfer(client, &peer(address), reads, time).await?;
            series.rates.push(rate);
            let cpu = (server.cpu()? - before).as_secs_f64();
            series.cpu.push(cpu / (bytes as f64 / GIB));
        }
    }

    println!(
        "one loopback connection, chunks of {} KiB, {} threads at each end, medians (least to most) of {} interleaved rounds of {} s\n",
        arguments.chunk_bytes >> 10,
        arguments.threads,
        arguments.rounds,
        arguments.seconds
    );
    println!("| | GiB/s | of iperf3 | server CPU, s a GiB |");
    println!("|---|---|---|---|");
    match &iperf[..] {
        [] => println!("| iperf3 | (not installed) | | |"),
        rates => println!("| iperf3 | {} | 1.00 | |", shown(rates, GIB)),
    }
    for ((name, ..), series) in ways.iter().zip(&series) {
        let ratios: Vec<f64> = series
            .rates
            .iter()
            .zip(&iperf)
            .map(|(rate, iperf)| rate / iperf)
            .collect();
        println!(
            "| {name} | {} | {} | {:.2} |",
            shown(&series.rates, GIB),
            shown(&ratios, 1.0),
            median(&series.cpu)
        );
    }
    println!();
    small_reads(plain.parse()?, arguments).await
}

/// Reads that go through all segments, with their checksums where they are to be verified.
fn chunks(chunk_bytes: u64, verified: bool) -> Vec<Read> {
    let mut reads = Vec::new();
    for segment in 1..=SEGMENTS as u64 {
        let bytes = content(segment, SEGMENT_BYTES);
        let size = usize::try_from(chunk_bytes).unwrap_or(usize::MAX);
        for (number, chunk) in bytes.chunks_exact(size).enumerate() {
            reads.push(Read {
                checksum: verified.then(|| XxHash3_64::oneshot(chunk)),
                ..read(segment, number as u64 * chunk_bytes, chunk_bytes)
            });
        }
    }
    reads
}

/// Transfers for a while; bytes a second, and bytes.
async fn transfer(
    client: &Client,
    peer: &PeerAddress,
    reads: &[Read],
    time: Duration,
) -> Result<(f64, u64)> {
    let (client, peer, reads) = (client.clone(), peer.clone(), reads.to_vec());
    let started = Instant::now();
    let transferring = async move {
        let mut bytes = 0;
        let deadline = started + time + Duration::from_secs(60);
        let submit = || client.submit(&peer, reads.clone(), deadline);
        let mut current = submit();
        let mut going = true;
        while going {
            // The next batch is asked for before this one ends: the connection never idles.
            going = started.elapsed() < time;
            let next = going.then(&submit);
            while let Some((_, outcome)) = current.next().await {
                bytes += outcome?.len() as u64;
            }
            if let Some(next) = next {
                current = next;
            }
        }
        Ok::<u64, stoa_transfer::TransferError>(bytes)
    };
    // On the runtime's threads rather than on this one.
    let bytes = tokio::spawn(transferring).await??;
    Ok((bytes as f64 / started.elapsed().as_secs_f64(), bytes))
}

/// The rate of iperf3 over one loopback connection, in bytes a second.
fn iperf3(seconds: u64) -> Result<Option<f64>> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port().to_string();
    drop(listener);
    let server = Command::new("iperf3")
        .args(["-s", "-1", "-p", &port])
        .stdout(Stdio::null())
        .spawn();
    let Ok(server) = server else {
        return Ok(None);
    };
    let _server = Process(server);
    std::thread::sleep(Duration::from_millis(300));
    let output = Command::new("iperf3")
        .args(["-c", "127.0.0.1", "-J", "-p", &port, "-t"])
        .arg(seconds.to_string())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let field = "\"bits_per_second\":";
    let rate = text
        .split_once("\"sum_received\"")
        .and_then(|(_, behind)| behind.split_once(field))
        .and_then(|(_, behind)| behind.split([',', '\n']).next())
        .and_then(|number| number.trim().parse::<f64>().ok())
        .ok_or_else(|| format!("iperf3 did not say its rate: {text}"))?;
    Ok(Some(rate / 8.0))
}

/// A thousand reads of 4 KiB in one batch, over a path with delay each way.
async fn small_reads(server: SocketAddr, arguments: &Arguments) -> Result<()> {
    let delayed = delaying_proxy(server, arguments.delay).await?;
    let client = client(None);
    let peer = peer(delayed);
    let deadline = || Instant::now() + Duration::from_secs(30);
    let reads: Vec<Read> = (0..1000)
        .map(|number| read(1 + number % SEGMENTS as u64, number * 4096, 4096))
        .collect();
    let (mut calls, mut batches) = (Vec::new(), Vec::new());
    client.call(&peer, 1, Bytes::new(), deadline()).await?;
    for _ in 0..20 {
        let started = Instant::now();
        client.call(&peer, 1, Bytes::new(), deadline()).await?;
        calls.push(started.elapsed().as_secs_f64());
        let started = Instant::now();
        let mut batch = client.submit(&peer, reads.clone(), deadline());
        while let Some((_, outcome)) = batch.next().await {
            outcome?;
        }
        batches.push(started.elapsed().as_secs_f64());
    }
    let round_trip = 2.0 * arguments.delay.as_secs_f64();
    println!(
        "{} ms of delay each way: an empty call {:.1} ms, 1000 reads of 4 KiB in one batch {:.1} ms: {:.2} round trips of {:.0} ms, {:.2} of the empty call's",
        arguments.delay.as_millis(),
        median(&calls) * 1e3,
        median(&batches) * 1e3,
        median(&batches) / round_trip,
        round_trip * 1e3,
        median(&batches) / median(&calls)
    );
    Ok(())
}

/// Passes bytes on to `target`, each `delay` later.
async fn delaying_proxy(target: SocketAddr, delay: Duration) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(target).await else {
                return;
            };
            let _ = near.set_nodelay(true);
            let _ = far.set_nodelay(true);
            let (near_read, near_write) = near.into_split();
            let (far_read, far_write) = far.into_split();
            tokio::spawn(pass_on(near_read, far_write, delay));
            tokio::spawn(pass_on(far_read, near_write, delay));
        }
    });
    Ok(address)
}

async fn pass_on(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    delay: Duration,
) {
    let (sender, mut pieces) = tokio::sync::mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    tokio::spawn(async move {
        while let Some((due, piece)) = pieces.recv().await {
            tokio::time::sleep_until(due.into()).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
    });
    let mut buffer = vec![0; 256 << 10];
    while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
        let piece = (Instant::now() + delay, buffer[..bytes].to_vec());
        if sender.send(piece).is_err() {
            return;
        }
    }
}
