//! A real etcd server for tests, here and in the crates above.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::etcd::{EtcdMetastore, EtcdSettings};

/// How long a server may take to answer for the first time.
const START_MAX: Duration = Duration::from_secs(30);
/// Free ports are found by asking for them and letting go: somebody may come between.
const START_ATTEMPTS: u32 = 5;

/// An etcd server of our own on free loopback ports, killed when dropped.
#[derive(Debug)]
pub struct EtcdServer {
    child: Option<Child>,
    data_dir: PathBuf,
    client_port: u16,
    peer_port: u16,
    tls: Option<TlsFiles>,
}

/// PEM files for a server that speaks TLS and asks its clients for certificates.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The authority of all certificates.
    pub ca: PathBuf,
    /// The server's certificate, for 127.0.0.1.
    pub server_cert: PathBuf,
    /// The server's private key.
    pub server_key: PathBuf,
    /// A client's certificate.
    pub client_cert: PathBuf,
    /// The client's private key.
    pub client_key: PathBuf,
}

impl EtcdServer {
    /// Starts a server with its data in `dir`. Panics if etcd is not installed: a test that needs
    /// it must fail, not pass without it.
    pub async fn start(dir: &Path) -> EtcdServer {
        Self::launch(dir, None).await
    }

    /// Like [`EtcdServer::start`], with mutual TLS.
    pub async fn start_tls(dir: &Path, files: TlsFiles) -> EtcdServer {
        Self::launch(dir, Some(files)).await
    }

    async fn launch(dir: &Path, tls: Option<TlsFiles>) -> EtcdServer {
        for attempt in 1..=START_ATTEMPTS {
            let mut server = EtcdServer {
                child: None,
                data_dir: dir.join(format!("etcd-{attempt}")),
                client_port: free_port(),
                peer_port: free_port(),
                tls: tls.clone(),
            };
            if server.run().await {
                return server;
            }
        }
        panic!("etcd did not start in {START_ATTEMPTS} attempts; see its output above");
    }

    /// Starts the process again on the same data and ports, after [`EtcdServer::kill`].
    pub async fn restart(&mut self) {
        assert!(self.child.is_none(), "etcd still runs");
        assert!(
            self.run().await,
            "etcd did not start again; see its output above"
        );
    }

    /// Ends the process as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Where its data is.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Its client URL.
    pub fn endpoint(&self) -> String {
        format!(
            "{}://127.0.0.1:{}",
            if self.tls.is_some() { "https" } else { "http" },
            self.client_port
        )
    }

    /// Settings to connect to it.
    pub fn settings(&self) -> EtcdSettings {
        let tls = self.tls.as_ref();
        EtcdSettings {
            ca_file: tls.map(|files| files.ca.clone()),
            cert_file: tls.map(|files| files.client_cert.clone()),
            key_file: tls.map(|files| files.client_key.clone()),
            ..EtcdSettings::new([self.endpoint()])
        }
    }

    /// A connection to it.
    pub async fn connect(&self) -> EtcdMetastore {
        EtcdMetastore::connect(self.settings())
            .await
            .expect("connect to the etcd just started")
    }

    /// Whether it came up.
    async fn run(&mut self) -> bool {
        let client = self.endpoint();
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let mut command = Command::new(etcd_program());
        command
            .arg("--name=test")
            .arg(format!("--data-dir={}", self.data_dir.display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=test={peer}"))
            // Short ticks allow leases of one second.
            .args([
                "--heartbeat-interval=20",
                "--election-timeout=200",
                "--logger=zap",
                "--enable-grpc-gateway=false",
                "--log-level=error",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if let Some(files) = &self.tls {
            command
                .arg("--client-cert-auth")
                .arg(format!("--trusted-ca-file={}", files.ca.display()))
                .arg(format!("--cert-file={}", files.server_cert.display()))
                .arg(format!("--key-file={}", files.server_key.display()));
        }
        self.child = Some(command.spawn().expect("start etcd"));
        let begun = Instant::now();
        while begun.elapsed() < START_MAX {
            let gone = self
                .child
                .as_mut()
                .is_none_or(|child| !matches!(child.try_wait(), Ok(None)));
            if gone {
                break;
            }
            if let Ok(Ok(_)) = tokio::time::timeout(
                Duration::from_secs(1),
                EtcdMetastore::connect(self.settings()),
            )
            .await
            {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.kill();
        false
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The etcd program: `$STOA_ETCD` if it is set, else Debian's, else one in the path.
fn etcd_program() -> PathBuf {
    let candidates = match std::env::var_os("STOA_ETCD") {
        Some(named) => vec![PathBuf::from(named)],
        None => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let in_path = std::env::split_paths(&path).map(|dir| dir.join("etcd"));
            [PathBuf::from("/usr/bin/etcd")]
                .into_iter()
                .chain(in_path)
                .collect()
        }
    };
    candidates
        .iter()
        .find(|program| program.is_file())
        .unwrap_or_else(|| {
            panic!(
                "etcd is missing (looked for {candidates:?}): install etcd-server, or set STOA_ETCD"
            )
        })
        .clone()
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
    listener
        .local_addr()
        .expect("address of a bound socket")
        .port()
}
