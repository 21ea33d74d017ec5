//! Who is let in, and what the others are told: mutual TLS with certificates made here.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

use super::{peer, read_one, soon};
use crate::conformance::{self, Echo, Pair, Pairs, Segments};
use crate::{
    CallHandler, Client, ClientSettings, ErrorKind, Role, SegmentSource, Server, ServerHandle,
    ServerSettings, Tcp, TcpSettings, Tls, TlsSettings, TransferError, Transport,
};

/// An authority, and files of what it signs.
pub(crate) struct Authority {
    directory: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(directory.path().join("ca.pem"), certificate.pem()).unwrap();
        Self {
            directory,
            issuer: Issuer::new(params, key),
        }
    }

    fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// Signs for `name` with a role, for one year of the past or for long.
    pub(crate) fn sign(&self, name: &str, role: Option<&str>, expired: bool) -> TlsSettings {
        self.sign_into(name, name, role, expired)
    }

    fn sign_into(&self, file: &str, name: &str, role: Option<&str>, expired: bool) -> TlsSettings {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let host = name.to_string().try_into().unwrap();
        params.subject_alt_names.push(SanType::DnsName(host));
        if let Some(role) = role {
            let uri = format!("stoa://role/{role}").try_into().unwrap();
            params.subject_alt_names.push(SanType::URI(uri));
        }
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        let until = if expired { 2021 } else { 4000 };
        params.not_after = rcgen::date_time_ymd(until, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let path = |kind: &str| self.directory.path().join(format!("{file}.{kind}.pem"));
        replace(&path("cert"), &certificate.pem());
        replace(&path("key"), &key.serialize_pem());
        TlsSettings::new(self.ca(), path("cert"), path("key"))
    }
}

fn replace(path: &Path, text: &str) {
    let next = path.with_extension("next");
    std::fs::write(&next, text).unwrap();
    std::fs::rename(&next, path).unwrap();
}

async fn serve(settings: TlsSettings) -> ServerHandle {
    let settings = ServerSettings {
        tls: Some(Tls::open(settings).unwrap()),
        ..ServerSettings::default()
    };
    let segments = Arc::new(Segments::in_memory(&[1000]));
    Server::start(settings, segments, Arc::new(Echo))
        .await
        .unwrap()
}

fn transport(settings: TlsSettings) -> Arc<dyn Transport> {
    Arc::new(Tcp::new(TcpSettings {
        tls: Some(Tls::open(settings).unwrap()),
        ..TcpSettings::default()
    }))
}

fn client(settings: TlsSettings) -> Client {
    Client::new(ClientSettings::default(), vec![transport(settings)])
}

/// What a read ends with; it must end at once.
async fn ends_with(client: &Client, server: &ServerHandle) -> crate::Result<()> {
    let started = Instant::now();
    let outcome = read_one(client, &peer(server.address()), soon()).await;
    assert!(started.elapsed() < Duration::from_secs(5), "it hangs");
    outcome.map(|_block| ())
}

async fn refused(client: &Client, server: &ServerHandle) -> String {
    let error = ends_with(client, server).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
    error.to_string()
}

/// The server counts once the client has had time to read what it was told.
async fn has_rejected(server: &ServerHandle, clients: u64) {
    let started = Instant::now();
    while server.statistics().rejected != clients {
        let statistics = server.statistics();
        assert!(started.elapsed() < Duration::from_secs(5), "{statistics:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

struct TlsPairs(Authority);

#[async_trait]
impl Pairs for TlsPairs {
    async fn pair(&self, segments: Arc<dyn SegmentSource>, calls: Arc<dyn CallHandler>) -> Pair {
        let settings = ServerSettings {
            tls: Some(Tls::open(self.0.sign("server", Some("node"), false)).unwrap()),
            ..ServerSettings::default()
        };
        let server = Server::start(settings, segments, calls).await.unwrap();
        Pair {
            transport: transport(self.0.sign("client", Some("reader"), false)),
            address: server.address().to_string(),
            server: Box::new(server),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_conforms() {
    conformance::all(&TlsPairs(Authority::new("stoa"))).await;
}

#[tokio::test]
async fn nodes_and_readers_are_let_in_and_readers_do_not_serve() {
    let authority = Authority::new("stoa");
    let node = authority.sign("node-1", Some("node"), false);
    let reader = authority.sign("reader-1", Some("reader"), false);
    let server = serve(node.clone()).await;
    ends_with(&client(node.clone()), &server).await.unwrap();
    ends_with(&client(reader.clone()), &server).await.unwrap();

    let nodes_only = TlsSettings {
        roles: vec![Role::Node],
        ..node.clone()
    };
    let server = serve(nodes_only).await;
    ends_with(&client(node.clone()), &server).await.unwrap();
    let text = refused(&client(reader.clone()), &server).await;
    let expected = "the certificate of CN=reader-1 has the role reader, expected the alternative name stoa://role/node";
    assert!(text.ends_with(expected), "{text}");
    has_rejected(&server, 1).await;

    let server = serve(reader).await;
    let text = refused(&client(node), &server).await;
    let expected = "the certificate of CN=reader-1 has the role reader, expected the alternative name stoa://role/node";
    assert!(text.ends_with(expected), "{text}");
}

#[tokio::test]
async fn clients_without_role_expired_and_foreign_are_told_apart() {
    let authority = Authority::new("stoa");
    let foreign = Authority::new("elsewhere");
    let server = serve(authority.sign("node-1", Some("node"), false)).await;

    let no_role = client(authority.sign("stranger", None, false));
    let text = refused(&no_role, &server).await;
    let expected = "the certificate of CN=stranger has no role, expected the alternative name stoa://role/node or stoa://role/reader";
    assert!(text.ends_with(expected), "{text}");
    let other_role = client(authority.sign("admin", Some("admin"), false));
    assert!(
        refused(&other_role, &server)
            .await
            .contains("CN=admin has no role")
    );

    let expired = client(authority.sign("old", Some("node"), true));
    let text = refused(&expired, &server).await;
    let expected = "it refuses this end's certificate, which has expired; renew transfer.tls.cert";
    assert!(text.ends_with(expected), "{text}");

    let elsewhere = TlsSettings {
        ca: authority.ca(),
        ..foreign.sign("spy", Some("node"), false)
    };
    let text = refused(&client(elsewhere), &server).await;
    let expected = "it refuses this end's certificate, which another authority signed than its transfer.tls.ca";
    assert!(text.ends_with(expected), "{text}");

    has_rejected(&server, 4).await;
    ends_with(
        &client(authority.sign("good", Some("node"), false)),
        &server,
    )
    .await
    .unwrap();
}

/// What the server itself says of whom it rejects names the certificate's subject.
#[tokio::test]
async fn the_server_knows_whom_it_rejects_and_why() {
    let authority = Authority::new("stoa");
    let foreign = Authority::new("elsewhere");
    let tls = Tls::open(authority.sign("node-1", Some("node"), false)).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let elsewhere = TlsSettings {
        ca: authority.ca(),
        ..foreign.sign("spy", Some("node"), false)
    };
    let clients = [
        (
            authority.sign("old", Some("node"), true),
            "the certificate of CN=old expired at Jan  1 00:00:00 2021 +00:00; renew it",
        ),
        (
            elsewhere,
            "the certificate of CN=spy is signed by another authority than transfer.tls.ca",
        ),
    ];
    for (settings, expected) in clients {
        let transport = transport(settings);
        let (accepted, connected) = tokio::join!(
            async {
                let (stream, from) = listener.accept().await.unwrap();
                tls.accept(stream, from).await.map(|_accepted| ())
            },
            transport.connect(&address)
        );
        assert!(connected.is_err());
        let error = accepted.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
        assert!(error.to_string().ends_with(expected), "{error}");
    }

    // A client that knows TLS and has no certificate at all.
    let connecting = async {
        let stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        connect_without_certificate(&authority, stream).await
    };
    let (accepted, told) = tokio::join!(
        async {
            let (stream, from) = listener.accept().await.unwrap();
            tls.accept(stream, from).await.map(|_accepted| ())
        },
        connecting
    );
    let error = accepted.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
    let expected = "no certificate was shown, expected one of transfer.tls.ca";
    assert!(error.to_string().ends_with(expected), "{error}");
    let told = crate::tls::refused_handshake("node-1:1", told);
    assert_eq!(told.kind(), ErrorKind::Unauthenticated, "{told}");
    let expected =
        "it expects a certificate of this end; set transfer.tls.cert and transfer.tls.key";
    assert!(told.to_string().ends_with(expected), "{told}");
}

/// Shakes hands with a node called node-1 without showing a certificate; what a client that does
/// so is told.
async fn connect_without_certificate(
    authority: &Authority,
    stream: tokio::net::TcpStream,
) -> std::io::Error {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, ServerName};
    use tokio::io::AsyncReadExt;
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(authority.ca()).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("node-1").unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    match connector.connect(name, stream).await {
        Ok(mut stream) => stream.read_u8().await.unwrap_err(),
        Err(error) => error,
    }
}

#[tokio::test]
async fn servers_expired_foreign_and_without_tls_are_told_apart() {
    let authority = Authority::new("stoa");
    let foreign = Authority::new("elsewhere");
    let client = || client(authority.sign("node-1", Some("node"), false));

    let server = serve(authority.sign("old", Some("node"), true)).await;
    let text = refused(&client(), &server).await;
    let expected = "the certificate of CN=old expired at Jan  1 00:00:00 2021 +00:00; renew it";
    assert!(text.ends_with(expected), "{text}");

    let server = serve(foreign.sign("spy", Some("node"), false)).await;
    let text = refused(&client(), &server).await;
    let expected = "the certificate of CN=spy is signed by another authority than transfer.tls.ca";
    assert!(text.ends_with(expected), "{text}");

    let segments = Arc::new(Segments::in_memory(&[1000]));
    let server = Server::start(ServerSettings::default(), segments, Arc::new(Echo))
        .await
        .unwrap();
    let error = ends_with(&client(), &server).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("is transfer.tls set on both ends?"),
        "{error}"
    );

    let server = serve(authority.sign("node-2", Some("node"), false)).await;
    let plain = Client::new(ClientSettings::default(), vec![super::tcp()]);
    let error = ends_with(&plain, &server).await.unwrap_err();
    assert!(error.to_string().contains("transfer.tls"), "{error}");
}

/// New certificates are for new connections; those in use go on.
#[tokio::test]
async fn certificates_are_read_again_when_they_change() {
    let authority = Authority::new("stoa");
    let files = authority.sign_into("node", "first", Some("node"), false);
    let server = serve(files.clone()).await;
    let settings = TlsSettings {
        roles: vec![Role::Node],
        ..authority.sign("client", Some("node"), false)
    };
    let in_use = client(settings.clone());
    ends_with(&in_use, &server).await.unwrap();

    // Half-written files change nothing.
    std::fs::write(&files.certificate, "-----BEGIN CERT").unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    ends_with(&client(settings.clone()), &server).await.unwrap();

    authority.sign_into("node", "second", None, false);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let text = refused(&client(settings.clone()), &server).await;
    assert!(text.contains("CN=second has no role"), "{text}");
    ends_with(&in_use, &server).await.unwrap();
    assert_eq!(in_use.paths()[0].connections, 1);

    authority.sign_into("node", "third", Some("node"), false);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    ends_with(&client(settings), &server).await.unwrap();
}

#[test]
fn files_that_are_missing_or_wrong_are_named() {
    let authority = Authority::new("stoa");
    let good = authority.sign("node-1", Some("node"), false);
    let other = authority.sign("node-2", Some("node"), false);
    let text = |settings: TlsSettings| Tls::open(settings).unwrap_err().to_string();

    let missing = TlsSettings {
        ca: "/nonexistent/ca.pem".into(),
        ..good.clone()
    };
    let text_missing = text(missing);
    assert!(
        text_missing.starts_with("reading transfer.tls.ca from /nonexistent/ca.pem: "),
        "{text_missing}"
    );
    let no_certificate = TlsSettings {
        certificate: good.key.clone(),
        ..good.clone()
    };
    assert!(text(no_certificate).ends_with("it has no PEM certificate"));
    let no_key = TlsSettings {
        key: good.certificate.clone(),
        ..good.clone()
    };
    assert!(text(no_key).starts_with("reading transfer.tls.key from "));
    let mixed = TlsSettings {
        key: other.key,
        ..good
    };
    assert!(text(mixed).starts_with("reading transfer.tls.cert and transfer.tls.key from "));
}

/// Beyond loopback nothing is plain without consent.
#[tokio::test]
async fn plain_text_beyond_loopback_needs_consent() {
    let open = ServerSettings {
        address: "0.0.0.0:0".to_string(),
        ..ServerSettings::default()
    };
    let start = |settings| {
        let segments = Arc::new(Segments::in_memory(&[1000]));
        Server::start(settings, segments, Arc::new(Echo))
    };
    let error = start(open.clone()).await.unwrap_err();
    let expected = "0.0.0.0:0 is not a loopback address and transfer.tls is not set; set transfer.tls.ca, transfer.tls.cert and transfer.tls.key, or consent to plain text with transfer.insecure = true";
    assert_eq!(error.to_string(), expected);
    let consented = ServerSettings {
        insecure: true,
        ..open
    };
    drop(start(consented).await.unwrap());
    // Documentation addresses lead nowhere; nothing is sent.
    let error = super::tcp().connect("192.0.2.1:9").await.unwrap_err();
    assert!(matches!(error, TransferError::Insecure { .. }), "{error}");
}
