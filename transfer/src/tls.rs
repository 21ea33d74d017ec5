//! Who may connect: mutual TLS 1.3 under a private authority, with the role in the certificate.

use std::fmt;
use std::fs::Metadata;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore,
    ServerConfig, SignatureScheme,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::error::{Refusal, RefusalKind, Result, TransferError};
use crate::transport::{PeerIdentity, Role};

/// A certificate's role is the URI of this and [`Role::as_str`] among its alternative names.
pub const ROLE_PREFIX: &str = "stoa://role/";
/// Files are looked at this often, when a connection is made.
const RELOAD_PERIOD: Duration = Duration::from_secs(1);

/// Where certificates come from. All files are PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsSettings {
    /// The private authority: whoever it signed for is trusted in its role.
    pub ca: PathBuf,
    /// This end's certificate, with what is between it and the authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Which roles a server lets in.
    pub roles: Vec<Role>,
}

impl TlsSettings {
    /// Settings that let in every role.
    pub fn new(
        ca: impl Into<PathBuf>,
        certificate: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
    ) -> Self {
        Self {
            ca: ca.into(),
            certificate: certificate.into(),
            key: key.into(),
            roles: vec![Role::Node, Role::Reader],
        }
    }
}

/// Certificates in use. Clones share them; they are read again when their files change.
#[derive(Clone)]
pub struct Tls {
    state: Arc<State>,
}

struct State {
    settings: TlsSettings,
    current: Mutex<Current>,
}

struct Current {
    loaded: Arc<Loaded>,
    stamps: [Stamp; 3],
    looked: Instant,
}

/// What makes two states of a file different ones.
type Stamp = Option<(u64, u64, i64, i64)>;

/// What the files say.
struct Loaded {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    identity: Arc<CertifiedKey>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("settings", &self.state.settings)
            .finish_non_exhaustive()
    }
}

fn stamp(path: &Path) -> Stamp {
    let of = |file: Metadata| (file.ino(), file.len(), file.mtime(), file.mtime_nsec());
    std::fs::metadata(path).ok().map(of)
}

fn stamps(settings: &TlsSettings) -> [Stamp; 3] {
    [&settings.ca, &settings.certificate, &settings.key].map(|path| stamp(path))
}

fn setup(path: &Path, what: &str, reason: impl fmt::Display) -> TransferError {
    TransferError::Setup {
        what: format!("reading {what} from {}", path.display()),
        reason: reason.to_string(),
    }
}

fn certificates(path: &Path, what: &str) -> Result<Vec<CertificateDer<'static>>> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| setup(path, what, error))?;
    if certificates.is_empty() {
        return Err(setup(path, what, "it has no PEM certificate"));
    }
    Ok(certificates)
}

impl Loaded {
    fn read(settings: &TlsSettings) -> Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        for authority in certificates(&settings.ca, "transfer.tls.ca")? {
            roots
                .add(authority)
                .map_err(|error| setup(&settings.ca, "transfer.tls.ca", error))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&settings.certificate, "transfer.tls.cert")?;
        let key = PrivateKeyDer::from_pem_file(&settings.key)
            .map_err(|error| setup(&settings.key, "transfer.tls.key", error))?;
        let identity = CertifiedKey::from_der(chain, key, &provider).map_err(|error| {
            let what = "transfer.tls.cert and transfer.tls.key";
            setup(&settings.certificate, what, error)
        })?;
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
            roots.clone(),
            provider.clone(),
        )
        .build()
        .map_err(|error| setup(&settings.ca, "transfer.tls.ca", error))?;
        Ok(Self {
            roots,
            provider,
            identity: Arc::new(identity),
            verifier,
        })
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// A file that is missing or no PEM of what it should hold; a key of another certificate.
    pub fn open(settings: TlsSettings) -> Result<Self> {
        let stamps = stamps(&settings);
        let loaded = Arc::new(Loaded::read(&settings)?);
        Ok(Self {
            state: Arc::new(State {
                settings,
                current: Mutex::new(Current {
                    loaded,
                    stamps,
                    looked: Instant::now(),
                }),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.state
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What the files say now, or said when they were last whole.
    fn loaded(&self) -> Arc<Loaded> {
        let mut current = self.lock();
        if current.looked.elapsed() >= RELOAD_PERIOD {
            current.looked = Instant::now();
            let stamps = stamps(&self.state.settings);
            if stamps != current.stamps {
                match Loaded::read(&self.state.settings) {
                    Ok(loaded) => {
                        current.loaded = Arc::new(loaded);
                        tracing::info!("certificates were read again");
                    }
                    Err(error) => {
                        tracing::warn!(%error, "certificates stay as they were");
                    }
                }
                // A half-written file is another one once it is whole.
                current.stamps = stamps;
            }
        }
        current.loaded.clone()
    }

    /// The client's handshake over `stream`.
    pub(crate) async fn connect(
        &self,
        stream: TcpStream,
        address: &str,
    ) -> Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let loaded = self.loaded();
        let seen = Seen::default();
        let config = client_config(&loaded, &seen).map_err(|error| TransferError::Setup {
            what: "TLS as a client".to_string(),
            reason: error.to_string(),
        })?;
        TlsConnector::from(Arc::new(config))
            .connect(any_name(), stream)
            .await
            .map_err(|error| match seen.take() {
                Some(reason) => TransferError::Unauthenticated {
                    peer: address.to_string(),
                    reason,
                },
                None => refused_handshake(address, error),
            })
    }

    /// The server's handshake over `stream`, and who is at its other end: a certificate that is
    /// good but for its role is refused with words.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        from: SocketAddr,
    ) -> Result<(
        tokio_rustls::server::TlsStream<TcpStream>,
        Result<PeerIdentity, Refusal>,
    )> {
        let loaded = self.loaded();
        let seen = Seen::default();
        let config = server_config(&loaded, &seen).map_err(|error| TransferError::Setup {
            what: "TLS as a server".to_string(),
            reason: error.to_string(),
        })?;
        let accepted = TlsAcceptor::from(Arc::new(config))
            .accept(stream)
            .into_fallible()
            .await;
        let stream = match accepted {
            Ok(stream) => stream,
            Err((error, stream)) => {
                linger(stream).await;
                let reason = seen.take().unwrap_or_else(|| handshake_words(&error));
                return Err(TransferError::Unauthenticated {
                    peer: from.to_string(),
                    reason,
                });
            }
        };
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let identity = identify(certificates.first(), &self.state.settings.roles, from);
        Ok((stream, identity))
    }
}

/// Lets the other end read what it was told before the connection goes.
async fn linger(mut stream: TcpStream) {
    let drain = async {
        let _ = stream.shutdown().await;
        let mut rest = [0; 1024];
        while matches!(stream.read(&mut rest).await, Ok(1..)) {}
    };
    let _ = tokio::time::timeout(Duration::from_millis(200), drain).await;
}

/// The role and name of a certificate that the authority signed.
fn identify(
    certificate: Option<&CertificateDer<'_>>,
    roles: &[Role],
    from: SocketAddr,
) -> Result<PeerIdentity, Refusal> {
    let expected = expected_roles(roles);
    let refuse = |text: String| Refusal::new(RefusalKind::Unauthenticated, text);
    let certificate = certificate.ok_or_else(|| {
        refuse(format!(
            "no certificate was shown, expected one with {expected}"
        ))
    })?;
    let named = Named::of(certificate);
    match named.roles.iter().find(|role| roles.contains(role)) {
        Some(role) => Ok(PeerIdentity {
            role: Some(*role),
            name: named.subject,
            address: from.to_string(),
        }),
        None => Err(refuse(format!(
            "the certificate of {} has {}, expected {expected}",
            named.subject,
            named.roles_found()
        ))),
    }
}

fn expected_roles(roles: &[Role]) -> String {
    let uris: Vec<String> = roles
        .iter()
        .map(|role| format!("{ROLE_PREFIX}{}", role.as_str()))
        .collect();
    format!("the alternative name {}", uris.join(" or "))
}

/// What a certificate says of its owner.
struct Named {
    subject: String,
    roles: Vec<Role>,
    until: String,
}

impl Named {
    fn of(certificate: &[u8]) -> Self {
        let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
            return Self {
                subject: "(unreadable)".to_string(),
                roles: Vec::new(),
                until: "(unreadable)".to_string(),
            };
        };
        let names = parsed.subject_alternative_name().ok().flatten();
        let uris = names.iter().flat_map(|names| &names.value.general_names);
        let roles = uris
            .filter_map(|name| match name {
                GeneralName::URI(uri) => uri.strip_prefix(ROLE_PREFIX),
                _ => None,
            })
            .filter_map(|role| {
                [Role::Node, Role::Reader]
                    .into_iter()
                    .find(|known| known.as_str() == role)
            })
            .collect();
        Self {
            subject: crate::wire::message(parsed.subject().to_string().as_bytes()),
            roles,
            until: parsed.validity().not_after.to_string(),
        }
    }

    fn roles_found(&self) -> String {
        match &self.roles[..] {
            [] => "no role".to_string(),
            roles => {
                let words: Vec<&str> = roles.iter().map(|role| role.as_str()).collect();
                format!("the role {}", words.join(", "))
            }
        }
    }
}

/// Why a certificate was not accepted, with its subject.
fn rejection(certificate: &[u8], error: &rustls::Error) -> String {
    let named = Named::of(certificate);
    let subject = named.subject;
    match error {
        rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => format!(
            "the certificate of {subject} expired at {}; renew it",
            named.until
        ),
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => format!("the certificate of {subject} is not valid yet; compare the clocks"),
        rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => format!(
            "the certificate of {subject} is signed by another authority than transfer.tls.ca"
        ),
        other => format!("the certificate of {subject} is not accepted: {other}"),
    }
}

/// What a failed handshake says where no certificate was looked at by this end.
fn handshake_words(error: &io::Error) -> String {
    match tls_error(error) {
        Some(rustls::Error::NoCertificatesPresented) => {
            "no certificate was shown, expected one of transfer.tls.ca".to_string()
        }
        Some(rustls::Error::InvalidMessage(_)) => {
            "it does not speak TLS; is transfer.tls set on both ends?".to_string()
        }
        _ => format!("the TLS handshake failed: {error}"),
    }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// What an error while connecting means: the other end's alert is about this end's certificate.
pub(crate) fn refused_handshake(address: &str, error: io::Error) -> TransferError {
    use rustls::AlertDescription as Alert;
    let reason = match tls_error(&error) {
        Some(rustls::Error::AlertReceived(alert)) => match alert {
            Alert::CertificateExpired => {
                "it refuses this end's certificate, which has expired; renew transfer.tls.cert"
            }
            Alert::UnknownCA | Alert::DecryptError => {
                "it refuses this end's certificate, which another authority signed than its transfer.tls.ca"
            }
            Alert::CertificateRequired => {
                "it expects a certificate of this end; set transfer.tls.cert and transfer.tls.key"
            }
            other => {
                return TransferError::Unauthenticated {
                    peer: address.to_string(),
                    reason: format!("it ended the TLS handshake: {other:?}"),
                };
            }
        }
        .to_string(),
        Some(rustls::Error::InvalidMessage(_)) => {
            return TransferError::Protocol {
                peer: address.to_string(),
                reason: handshake_words(&error),
            };
        }
        Some(_) => handshake_words(&error),
        None => {
            let reason = match error.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                    "it closed the connection before its hello; is transfer.tls set on both ends?"
                        .to_string()
                }
                _ => error.to_string(),
            };
            return TransferError::Unreachable {
                peer: address.to_string(),
                reason,
            };
        }
    };
    TransferError::Unauthenticated {
        peer: address.to_string(),
        reason,
    }
}

/// Why a certificate was not accepted, told from the verifier of one connection to its owner.
#[derive(Clone, Debug, Default)]
struct Seen(Arc<Mutex<Option<String>>>);

impl Seen {
    fn note(&self, reason: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    }

    fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Names are not compared, so that any one does.
fn any_name() -> ServerName<'static> {
    ServerName::try_from("stoa.invalid").expect("a valid name")
}

fn client_config(loaded: &Loaded, seen: &Seen) -> Result<ClientConfig, rustls::Error> {
    let verifier = NodeVerifier {
        roots: loaded.roots.clone(),
        algorithms: loaded.provider.signature_verification_algorithms,
        seen: seen.clone(),
    };
    let mut config = ClientConfig::builder_with_provider(loaded.provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(OneIdentity(loaded.identity.clone())));
    config.enable_sni = false;
    // Every connection shows its certificate anew.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

fn server_config(loaded: &Loaded, seen: &Seen) -> Result<ServerConfig, rustls::Error> {
    let verifier = NamingVerifier {
        inner: loaded.verifier.clone(),
        seen: seen.clone(),
    };
    let mut config = ServerConfig::builder_with_provider(loaded.provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(OneIdentity(loaded.identity.clone())));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Shows the same certificate to everybody.
#[derive(Debug)]
struct OneIdentity(Arc<CertifiedKey>);

impl ResolvesClientCert for OneIdentity {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for OneIdentity {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

/// Accepts servers that the authority signed as nodes, under any host name.
#[derive(Debug)]
struct NodeVerifier {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    seen: Seen,
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = ParsedCertificate::try_from(end_entity).and_then(|certificate| {
            rustls::client::verify_server_cert_signed_by_trust_anchor(
                &certificate,
                &self.roots,
                intermediates,
                now,
                self.algorithms.all,
            )
        });
        if let Err(error) = verified {
            self.seen.note(rejection(end_entity, &error));
            return Err(error);
        }
        let named = Named::of(end_entity);
        if !named.roles.contains(&Role::Node) {
            self.seen.note(format!(
                "the certificate of {} has {}, expected {}",
                named.subject,
                named.roles_found(),
                expected_roles(&[Role::Node])
            ));
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The usual verification of clients, which notes whom it rejects.
#[derive(Debug)]
struct NamingVerifier {
    inner: Arc<dyn ClientCertVerifier>,
    seen: Seen,
}

impl ClientCertVerifier for NamingVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.inner
            .verify_client_cert(end_entity, intermediates, now)
            .inspect_err(|error| self.seen.note(rejection(end_entity, error)))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner
            .verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner
            .verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
