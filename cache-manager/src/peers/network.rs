//! How a worker reaches the memory of others, and how they reach its own.

use std::net::SocketAddr;
use std::sync::Arc;

use stoa_transfer::{
    CallHandler, Client, ClientSettings, InProcess, RdmaSettings, SegmentSource, ServerHandle,
    ServerSettings, Tcp, TcpSettings, Tls, TlsSettings, serve_with_rdma, with_rdma,
};

use crate::error::Result;
use crate::settings::TransferSettings;

/// A worker's means to read other workers' memory and to let them read its own.
#[derive(Clone, Debug)]
pub struct PeerNetwork {
    /// Asks other workers.
    pub client: Client,
    /// Where this worker answers; each is a way to it, the preferred one first.
    pub listeners: Vec<Listener>,
}

impl PeerNetwork {
    /// What the settings say: TCP both ways, with certificates where there are any, and RDMA where
    /// it is allowed and there is a device.
    ///
    /// # Errors
    /// [`crate::Error::Transfer`] for certificates that cannot be read.
    pub fn new(settings: &TransferSettings) -> Result<PeerNetwork> {
        let tls = match &settings.tls {
            Some(tls) => Some(Tls::open(TlsSettings::new(
                &tls.ca,
                &tls.certificate,
                &tls.key,
            ))?),
            None => None,
        };
        let tcp = Tcp::new(TcpSettings {
            tls: tls.clone(),
            insecure: settings.insecure,
            ..TcpSettings::default()
        });
        let limits = ClientSettings::default();
        let limits = ClientSettings {
            connect_timeout: limits.connect_timeout.min(settings.deadline),
            ..limits
        };
        let rdma = RdmaSettings {
            enabled: settings.rdma,
            ..RdmaSettings::default()
        };
        let listener = |address: &String| Listener::Tcp {
            server: ServerSettings {
                address: address.clone(),
                tls: tls.clone(),
                insecure: settings.insecure,
                ..ServerSettings::default()
            },
            rdma: rdma.clone(),
        };
        Ok(PeerNetwork {
            client: Client::new(limits, with_rdma(&rdma, Arc::new(tcp))),
            listeners: settings.addresses.iter().map(listener).collect(),
        })
    }
}

/// A place where a worker's memory can be read.
#[derive(Clone, Debug)]
pub enum Listener {
    /// Over TCP, and RDMA beside it.
    Tcp {
        /// Where and how TCP is served.
        server: ServerSettings,
        /// Whether a device may be used as well.
        rdma: RdmaSettings,
    },
    /// Within this process, for tests.
    InProcess {
        /// The peers of this process.
        network: InProcess,
        /// This worker's address among them.
        address: String,
    },
}

/// What answers as long as it lives.
#[derive(Debug, Default)]
pub(crate) struct Serving {
    addresses: Vec<String>,
    tcp: Vec<ServerHandle>,
    in_process: Vec<(InProcess, String)>,
}

impl Serving {
    /// Begins to answer; `host` stands for an address that means all of this host's.
    pub(crate) async fn start(
        listeners: &[Listener],
        host: &str,
        segments: Arc<dyn SegmentSource>,
        calls: Arc<dyn CallHandler>,
    ) -> Result<Serving> {
        let mut serving = Serving::default();
        for listener in listeners {
            match listener {
                Listener::Tcp { server, rdma } => {
                    let (segments, calls) = (Arc::clone(&segments), Arc::clone(&calls));
                    let server = serve_with_rdma(server.clone(), rdma, segments, calls).await?;
                    serving.addresses.push(advertised(server.address(), host));
                    serving.tcp.push(server);
                }
                Listener::InProcess { network, address } => {
                    network.serve(address, Arc::clone(&segments), Arc::clone(&calls));
                    serving.in_process.push((network.clone(), address.clone()));
                    serving.addresses.push(address.clone());
                }
            }
        }
        Ok(serving)
    }

    /// Where others can ask.
    pub(crate) fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Ends all answers, after a moment for what is being sent.
    pub(crate) async fn stop(mut self) {
        for server in std::mem::take(&mut self.tcp) {
            server.stop().await;
        }
    }
}

/// The address under which others reach what listens here.
pub(crate) fn advertised(listening: SocketAddr, host: &str) -> String {
    match listening.ip().is_unspecified() {
        true if host.contains(':') => format!("[{host}]:{}", listening.port()),
        true => format!("{host}:{}", listening.port()),
        false => listening.to_string(),
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        for (network, address) in &self.in_process {
            network.stop(address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_for_all_is_advertised_by_the_hosts_name() {
        let listening = |text: &str| advertised(text.parse().unwrap(), "node-1");
        assert_eq!(listening("0.0.0.0:7420"), "node-1:7420");
        assert_eq!(listening("[::]:7420"), "node-1:7420");
        assert_eq!(listening("10.0.0.1:7420"), "10.0.0.1:7420");
        assert_eq!(
            advertised("[::]:1".parse().unwrap(), "fe80::1"),
            "[fe80::1]:1"
        );
    }

    #[test]
    fn certificates_that_are_not_there_are_said_at_start() {
        let settings = TransferSettings {
            tls: Some(crate::TransferTls {
                ca: "/nonexistent/ca.pem".into(),
                certificate: "/nonexistent/node.pem".into(),
                key: "/nonexistent/node.key".into(),
            }),
            ..TransferSettings::default()
        };
        let error = PeerNetwork::new(&settings).unwrap_err().to_string();
        assert!(
            error.starts_with("reading transfer.tls.ca from /nonexistent/ca.pem: "),
            "{error}"
        );
    }

    #[tokio::test]
    async fn plain_text_beyond_loopback_needs_consent() {
        #[derive(Debug)]
        struct Nothing;
        impl SegmentSource for Nothing {
            fn open(
                &self,
                key: stoa_transfer::SegmentKey,
            ) -> std::result::Result<stoa_transfer::Segment, stoa_transfer::Refusal> {
                Err(stoa_transfer::Refusal::unknown_segment(key))
            }
        }
        let mut settings = TransferSettings {
            addresses: vec!["0.0.0.0:0".into()],
            ..TransferSettings::default()
        };
        let start = async |settings: &TransferSettings| {
            let network = PeerNetwork::new(settings).unwrap();
            let calls = Arc::new(stoa_transfer::NoCalls);
            Serving::start(&network.listeners, "node-1", Arc::new(Nothing), calls).await
        };
        let error = start(&settings).await.unwrap_err().to_string();
        assert!(error.contains("transfer.insecure = true"), "{error}");
        settings.insecure = true;
        let serving = start(&settings).await.unwrap();
        assert!(serving.addresses()[0].starts_with("node-1:"));
        serving.stop().await;
    }
}
