//! How quickly Arrow Flight brings record batches of 1 MiB over one loopback connection: server and
//! client in processes of their own, as in `transfer/examples/throughput.rs`, beside which the
//! figures belong. The client decodes each message into a record batch and drops it.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{ArrayRef, Int64Array, RecordBatch};
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::flight_service_server::{FlightService, FlightServiceServer};
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightClient, FlightData, FlightDescriptor, FlightInfo,
    HandshakeRequest, HandshakeResponse, PollInfo, PutResult, SchemaResult, Ticket,
};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};
use tonic::{Request, Response, Status, Streaming};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const BATCH_BYTES: usize = 1 << 20;

/// Answers every ticket with the same batch, again and again, until the client goes.
struct Endless {
    batch: RecordBatch,
}

type Answers<T> =
    std::result::Result<Response<BoxStream<'static, std::result::Result<T, Status>>>, Status>;
type Answer<T> = std::result::Result<Response<T>, Status>;

fn not_here<T>() -> std::result::Result<T, Status> {
    Err(Status::unimplemented("this server only answers tickets"))
}

#[tonic::async_trait]
impl FlightService for Endless {
    type HandshakeStream = BoxStream<'static, std::result::Result<HandshakeResponse, Status>>;
    type ListFlightsStream = BoxStream<'static, std::result::Result<FlightInfo, Status>>;
    type DoGetStream = BoxStream<'static, std::result::Result<FlightData, Status>>;
    type DoPutStream = BoxStream<'static, std::result::Result<PutResult, Status>>;
    type DoExchangeStream = BoxStream<'static, std::result::Result<FlightData, Status>>;
    type DoActionStream = BoxStream<'static, std::result::Result<arrow_flight::Result, Status>>;
    type ListActionsStream = BoxStream<'static, std::result::Result<ActionType, Status>>;

    async fn do_get(&self, _: Request<Ticket>) -> Answers<FlightData> {
        let batch = self.batch.clone();
        let schema = batch.schema();
        let batches = stream::repeat_with(move || Ok(batch.clone()));
        let encoded = FlightDataEncoderBuilder::new()
            .with_schema(schema)
            .build(batches)
            .map_err(Status::from);
        Ok(Response::new(encoded.boxed()))
    }

    async fn handshake(
        &self,
        _: Request<Streaming<HandshakeRequest>>,
    ) -> Answers<HandshakeResponse> {
        not_here()
    }
    async fn list_flights(&self, _: Request<Criteria>) -> Answers<FlightInfo> {
        not_here()
    }
    async fn get_flight_info(&self, _: Request<FlightDescriptor>) -> Answer<FlightInfo> {
        not_here()
    }
    async fn poll_flight_info(&self, _: Request<FlightDescriptor>) -> Answer<PollInfo> {
        not_here()
    }
    async fn get_schema(&self, _: Request<FlightDescriptor>) -> Answer<SchemaResult> {
        not_here()
    }
    async fn do_put(&self, _: Request<Streaming<FlightData>>) -> Answers<PutResult> {
        not_here()
    }
    async fn do_exchange(&self, _: Request<Streaming<FlightData>>) -> Answers<FlightData> {
        not_here()
    }
    async fn do_action(&self, _: Request<Action>) -> Answers<arrow_flight::Result> {
        not_here()
    }
    async fn list_actions(&self, _: Request<Empty>) -> Answers<ActionType> {
        not_here()
    }
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (mut rounds, mut seconds) = (5_usize, 3_u64);
    while let Some(name) = arguments.next() {
        if name == "serve" {
            return serve().await;
        }
        let value = arguments.next().ok_or("an argument needs a value")?;
        match name.as_str() {
            "--rounds" => rounds = value.parse()?,
            "--seconds" => seconds = value.parse()?,
            _ => return Err("known arguments are --rounds and --seconds".into()),
        }
    }
    let mut server = Command::new(std::env::current_exe()?)
        .arg("serve")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut address = String::new();
    let stdout = server.stdout.take().ok_or("the server's output")?;
    BufReader::new(stdout).read_line(&mut address)?;
    let mut rates = Vec::new();
    for _ in 0..rounds {
        rates.push(transfer(address.trim(), Duration::from_secs(seconds)).await?);
    }
    server.kill()?;
    server.wait()?;
    rates.sort_by(f64::total_cmp);
    println!(
        "Arrow Flight, record batches of 1 MiB over one loopback connection: {:.2} GiB/s (median of {rounds}, {:.2} to {:.2})",
        rates[rates.len() / 2],
        rates[0],
        rates[rates.len() - 1]
    );
    Ok(())
}

async fn serve() -> Result<()> {
    let values = Int64Array::from_iter_values((0..BATCH_BYTES as i64 / 8).map(|n| n * 7919));
    let batch = RecordBatch::try_from_iter([("values", Arc::new(values) as ArrayRef)])?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    std::io::stdout().flush()?;
    let service = FlightServiceServer::new(Endless { batch });
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let serving = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(incoming);
    let ended = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    tokio::select! {
        served = serving => served?,
        _ = ended => {}
    }
    Ok(())
}

/// GiB a second of decoded batches.
async fn transfer(address: &str, time: Duration) -> Result<f64> {
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}"))?
        .connect()
        .await?;
    let mut client = FlightClient::new(channel);
    let mut batches = client.do_get(Ticket::default()).await?;
    let started = Instant::now();
    let mut bytes = 0;
    while started.elapsed() < time {
        let batch = batches.try_next().await?.ok_or("the stream ended")?;
        bytes += batch.num_rows() * 8;
    }
    Ok(bytes as f64 / (1_u64 << 30) as f64 / started.elapsed().as_secs_f64())
}
