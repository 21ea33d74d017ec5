//! Client against server, over real sockets on loopback.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::{
    CoordinatorService, Listen, PeerPath, ServiceError, Services, TableStatus, WorkerService,
    serve_grpc,
};

/// Answers with what it was given; `verify` never comes back.
struct Fake;

#[tonic::async_trait]
impl WorkerService for Fake {
    async fn status(&self) -> Result<WorkerStatus, ServiceError> {
        let table = TableStatus {
            chunks_done: 3,
            chunks_total: 7,
            ..Default::default()
        };
        Ok(WorkerStatus {
            id: "w1".into(),
            state: "loading".into(),
            tables: [("tpch.lineitem".to_owned(), table)].into(),
            ..Default::default()
        })
    }

    async fn verify(&self) -> Result<VerifyReport, ServiceError> {
        std::future::pending().await
    }

    async fn pin(&self) -> Result<PinReport, ServiceError> {
        Err(ServiceError::Failed(
            "mlock: the limit is 64 KiB; raise LimitMEMLOCK".into(),
        ))
    }

    async fn unpin(&self) -> Result<PinReport, ServiceError> {
        Err(ServiceError::Busy("a load is running".into()))
    }

    async fn peers(&self) -> Result<PeersReport, ServiceError> {
        Ok(PeersReport {
            addresses: vec!["127.0.0.1:7420".into()],
            paths: vec![PeerPath {
                peer: "b".into(),
                errors: [("deadline".to_owned(), 2)].into(),
                ..PeerPath::default()
            }],
        })
    }

    async fn refresh(&self, tables: Vec<String>) -> Result<RefreshReport, ServiceError> {
        Ok(RefreshReport {
            changed: tables,
            ..Default::default()
        })
    }
}

#[tonic::async_trait]
impl CoordinatorService for Fake {
    async fn status(&self) -> Result<CoordinatorStatus, ServiceError> {
        Ok(CoordinatorStatus {
            candidate: "c1".into(),
            leading: true,
            ..Default::default()
        })
    }
}

async fn serve() -> (crate::Server, String) {
    let services = Services::new()
        .worker(Arc::new(Fake))
        .coordinator(Arc::new(Fake));
    let server = serve_grpc(&Listen::loopback(0), services).await.unwrap();
    let address = server.address().to_string();
    (server, address)
}

#[tokio::test]
async fn answers_arrive_as_they_were_given() {
    let (server, address) = serve().await;
    let worker = WorkerClient::new(&address, &ClientSettings::default()).unwrap();
    let status = worker.status().await.unwrap();
    assert_eq!(
        (status.id.as_str(), status.state.as_str()),
        ("w1", "loading")
    );
    assert_eq!(status.tables["tpch.lineitem"].chunks_total, 7);
    let report = worker.peers().await.unwrap();
    assert_eq!(report.addresses, ["127.0.0.1:7420"]);
    assert_eq!(report.paths[0].errors["deadline"], 2);
    let report = worker.refresh(vec!["tpch.orders".into()]).await.unwrap();
    assert_eq!(report.changed, ["tpch.orders"]);
    let coordinator = CoordinatorClient::new(&address, &ClientSettings::default()).unwrap();
    assert!(coordinator.status().await.unwrap().leading);
    server.shutdown().await;
}

#[tokio::test]
async fn errors_keep_their_words() {
    let (_server, address) = serve().await;
    let worker = WorkerClient::new(&address, &ClientSettings::default()).unwrap();
    assert_eq!(
        worker.pin().await.unwrap_err().to_string(),
        format!("`pin` at {address} failed: mlock: the limit is 64 KiB; raise LimitMEMLOCK")
    );
    let busy = worker.unpin().await.unwrap_err();
    assert_eq!(busy.kind(), crate::ErrorKind::Retry);
    assert!(busy.to_string().contains("a load is running"), "{busy}");
}

#[tokio::test]
async fn a_peer_that_hangs_costs_the_deadline_and_no_more() {
    let (_server, address) = serve().await;
    let settings = ClientSettings {
        verify_timeout_ms: 100,
        ..Default::default()
    };
    let worker = WorkerClient::new(&address, &settings).unwrap();
    let before = std::time::Instant::now();
    let error = worker.verify().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("`verify` at {address} did not finish within 100 ms")
    );
    assert!(before.elapsed() < Duration::from_secs(5));
    // The connection is unharmed.
    worker.status().await.unwrap();
}

#[tokio::test]
async fn nobody_there_says_so() {
    let (server, address) = serve().await;
    server.shutdown().await;
    let worker = WorkerClient::new(&address, &ClientSettings::default()).unwrap();
    let error = worker.status().await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(
        error
            .to_string()
            .starts_with(&format!("no answer from {address}: ")),
        "{error}"
    );
}

#[tokio::test]
async fn a_shutdown_frees_the_port() {
    let (server, address) = serve().await;
    server.shutdown().await;
    let listen = Listen::parse(&address, false).unwrap();
    let mut again = serve_grpc(&listen, Services::new().worker(Arc::new(Fake))).await;
    for _ in 0..50 {
        if again.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        again = serve_grpc(&listen, Services::new().worker(Arc::new(Fake))).await;
    }
    again.unwrap();
}

#[tokio::test]
async fn the_wrong_role_says_so() {
    let server = serve_grpc(
        &Listen::loopback(0),
        Services::new().coordinator(Arc::new(Fake)),
    )
    .await
    .unwrap();
    let worker =
        WorkerClient::new(&server.address().to_string(), &ClientSettings::default()).unwrap();
    let error = worker.status().await.unwrap_err();
    assert!(matches!(error, Error::NotServed { .. }), "{error}");
}

#[tokio::test]
async fn taken_and_insecure_addresses_are_refused_before_anything_is_served() {
    let (server, _) = serve().await;
    let taken = Listen {
        address: server.address(),
        insecure: false,
    };
    let error = serve_grpc(&taken, Services::new()).await.unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with(&format!("cannot listen on {}: ", server.address())),
        "{error}"
    );
    let open = Listen {
        address: "0.0.0.0:0".parse().unwrap(),
        insecure: false,
    };
    assert!(matches!(
        serve_grpc(&open, Services::new()).await,
        Err(Error::InsecureAddress { .. })
    ));
    assert!(matches!(
        WorkerClient::new("192.0.2.1:1", &ClientSettings::default()),
        Err(Error::InsecureAddress { .. })
    ));
}

#[test]
fn messages_read_json_of_older_peers() {
    let status: WorkerStatus = serde_json_like();
    assert_eq!(status, WorkerStatus::default());
}

/// Every field is optional when a status is read back.
fn serde_json_like() -> WorkerStatus {
    use serde::de::IntoDeserializer;
    let empty: Vec<(String, u64)> = vec![];
    let map = serde::de::value::MapDeserializer::<_, serde::de::value::Error>::new(
        empty.into_iter().map(|(k, v)| (k.into_deserializer(), v)),
    );
    WorkerStatus::deserialize(map).unwrap()
}
