//! The typed configuration, and what cannot hold together.

use std::collections::BTreeMap;
use std::net::ToSocketAddrs;
use std::path::PathBuf;
use std::time::Duration;

use super::error::{Contradiction, Problem, Problems};
use super::machine::Machine;
use super::sources::{Inputs, Resolved, Source, resolve};
use super::value::{Secret, Value, split_port};

/// The whole configuration, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// `cache.*`
    pub cache: CacheConfig,
    /// `state.location`
    pub state_location: PathBuf,
    /// `etcd.*`; `None` runs embedded.
    pub etcd: Option<EtcdConfig>,
    /// `heartbeat.*`
    pub heartbeat: HeartbeatConfig,
    /// `coordinator.*`
    pub coordinator: CoordinatorConfig,
    /// `worker.*`
    pub worker: WorkerConfig,
    /// `control.*` and `http.address`
    pub control: ControlConfig,
    /// `transfer.*`
    pub transfer: TransferConfig,
    /// `origin.*`
    pub origin: OriginConfig,
    /// `store."URL".*`: options by store root URL; secrets are in here, so it is not `Display`.
    pub stores: BTreeMap<String, BTreeMap<&'static str, StoreOption>>,
    /// `log.*`
    pub log: LogConfig,
    /// The values as they were resolved, for `stoa config check`.
    pub resolved: Resolved,
}

/// `cache.*`
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// `cache.enabled`
    pub enabled: bool,
    /// `cache.location`
    pub location: PathBuf,
    /// `cache.size`
    pub size_bytes: u64,
    /// `cache.freshness`; `None` is `snapshot`.
    pub freshness: Option<Duration>,
    /// `cache.scrub.interval`; `None` is `off`.
    pub scrub_interval: Option<Duration>,
    /// `cache.verify = "first-touch"`
    pub verify_first_touch: bool,
    /// `cache.prefault.enabled`
    pub prefault: bool,
    /// `cache.pin.enabled`
    pub pin: bool,
    /// `cache.group.enabled`
    pub group_access: bool,
    /// `cache.parquet.enabled`
    pub parquet: bool,
    /// `cache.remote.*`; `None` with `cache.remote.enabled = false`.
    pub remote: Option<RemoteConfig>,
    /// `cache.storage.scheme`
    pub storage_scheme: String,
    /// `cache.absolute.balancer.enabled`
    pub absolute_balancer: bool,
}

/// `cache.remote.*`
#[derive(Clone, Debug)]
pub struct RemoteConfig {
    /// `cache.remote.deadline`
    pub deadline: Duration,
    /// `cache.remote.inflight.size`
    pub inflight_bytes: u64,
    /// `cache.remote.peers`
    pub peers: Vec<String>,
}

/// `etcd.*`
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// URLs of the members, with scheme and port.
    pub endpoints: Vec<String>,
    /// `etcd.user`
    pub user: Option<String>,
    /// `etcd.password`
    pub password: Option<Secret>,
    /// `etcd.timeout`
    pub timeout: Duration,
    /// `etcd.tls.*`; `None` talks plain text.
    pub tls: Option<EtcdTls>,
}

/// `etcd.tls.*`
#[derive(Clone, Debug, Default)]
pub struct EtcdTls {
    /// `etcd.tls.ca`
    pub ca: Option<PathBuf>,
    /// `etcd.tls.cert`
    pub cert: Option<PathBuf>,
    /// `etcd.tls.key`
    pub key: Option<PathBuf>,
    /// `etcd.tls.domain`
    pub domain: Option<String>,
}

/// `heartbeat.*`
#[derive(Clone, Copy, Debug)]
pub struct HeartbeatConfig {
    /// `heartbeat.lease.ttl.seconds`
    pub lease_ttl: Duration,
    /// `heartbeat.period.seconds`
    pub period: Duration,
}

/// `coordinator.*`
#[derive(Clone, Copy, Debug)]
pub struct CoordinatorConfig {
    /// `coordinator.grace.seconds`
    pub grace: Duration,
}

/// `worker.*`
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// `worker.id`
    pub id: String,
    /// `worker.host`
    pub host: String,
    /// `worker.fill.concurrency`
    pub fill_concurrency: usize,
    /// `worker.fill.memory`
    pub fill_memory_bytes: u64,
}

/// `control.*` and `http.address`
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// `control.address`
    pub address: String,
    /// `http.address`
    pub http_address: String,
    /// `control.insecure`
    pub insecure: bool,
}

/// `transfer.*`
#[derive(Clone, Debug)]
pub struct TransferConfig {
    /// `transfer.address`
    pub addresses: Vec<String>,
    /// `transfer.tls.*`; `None` talks plain text.
    pub tls: Option<TransferTls>,
    /// `transfer.insecure`
    pub insecure: bool,
    /// `transfer.rdma.enabled`
    pub rdma: bool,
    /// `transfer.deadline`
    pub deadline: Duration,
}

/// `transfer.tls.*`
#[derive(Clone, Debug)]
pub struct TransferTls {
    /// `transfer.tls.ca`
    pub ca: PathBuf,
    /// `transfer.tls.cert`
    pub cert: PathBuf,
    /// `transfer.tls.key`
    pub key: PathBuf,
}

/// `origin.*`
#[derive(Clone, Copy, Debug)]
pub struct OriginConfig {
    /// `origin.inflight.size`
    pub inflight_bytes: u64,
    /// `origin.coalesce.gap`
    pub coalesce_gap_bytes: u64,
    /// `origin.request.size`
    pub request_bytes: u64,
    /// `origin.attempts`
    pub attempts: u32,
    /// `origin.retry.time`
    pub retry_time: Duration,
    /// `origin.timeout`
    pub timeout: Duration,
}

/// `log.*`
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// `log.format`
    pub format: LogFormat,
    /// `log.level`; `None` is `auto`.
    pub level: Option<String>,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// The value of an option of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreOption {
    /// May be shown.
    Plain(String),
    /// Must not be shown.
    Secret(Secret),
}

impl StoreOption {
    /// The text, for the one place that configures the store.
    pub fn reveal(&self) -> &str {
        match self {
            StoreOption::Plain(text) => text,
            StoreOption::Secret(secret) => secret.reveal(),
        }
    }
}

impl Config {
    /// Resolves the layers and checks the values, each by itself and together.
    pub fn load(inputs: &Inputs, machine: &Machine) -> Result<Config, Problems> {
        let mut resolved = resolve(inputs, machine)?;
        name_worker(&mut resolved, machine);
        let get = Getter(&resolved);
        let config = Config {
            cache: CacheConfig {
                enabled: get.bool("cache.enabled"),
                location: get.path("cache.location"),
                size_bytes: get.bytes("cache.size"),
                freshness: get.optional_span("cache.freshness"),
                scrub_interval: get.optional_span("cache.scrub.interval"),
                verify_first_touch: get.text("cache.verify") == "first-touch",
                prefault: get.bool("cache.prefault.enabled"),
                pin: get.bool("cache.pin.enabled"),
                group_access: get.bool("cache.group.enabled"),
                parquet: get.bool("cache.parquet.enabled"),
                remote: get.bool("cache.remote.enabled").then(|| RemoteConfig {
                    deadline: get.span("cache.remote.deadline"),
                    inflight_bytes: get.bytes("cache.remote.inflight.size"),
                    peers: match &get.0.get("cache.remote.peers").value {
                        Some(Value::Hosts(peers)) => peers.clone(),
                        _ => vec![],
                    },
                }),
                storage_scheme: get.text("cache.storage.scheme"),
                absolute_balancer: get.bool("cache.absolute.balancer.enabled"),
            },
            state_location: get.path("state.location"),
            etcd: etcd(&get),
            heartbeat: HeartbeatConfig {
                lease_ttl: get.span("heartbeat.lease.ttl.seconds"),
                period: get.span("heartbeat.period.seconds"),
            },
            coordinator: CoordinatorConfig {
                grace: get.span("coordinator.grace.seconds"),
            },
            worker: WorkerConfig {
                id: get.text("worker.id"),
                host: get.text("worker.host"),
                fill_concurrency: get.integer("worker.fill.concurrency") as usize,
                fill_memory_bytes: get.bytes("worker.fill.memory"),
            },
            control: ControlConfig {
                address: get.text("control.address"),
                http_address: get.text("http.address"),
                insecure: get.bool("control.insecure"),
            },
            transfer: TransferConfig {
                addresses: match &resolved.get("transfer.address").value {
                    Some(Value::Hosts(addresses)) => addresses.clone(),
                    _ => vec![],
                },
                tls: transfer_tls(&get),
                insecure: get.bool("transfer.insecure"),
                rdma: get.bool("transfer.rdma.enabled"),
                deadline: get.span("transfer.deadline"),
            },
            origin: OriginConfig {
                inflight_bytes: get.bytes("origin.inflight.size"),
                coalesce_gap_bytes: get.bytes("origin.coalesce.gap"),
                request_bytes: get.bytes("origin.request.size"),
                attempts: get.integer("origin.attempts") as u32,
                retry_time: get.span("origin.retry.time"),
                timeout: get.span("origin.timeout"),
            },
            stores: stores(&resolved),
            log: LogConfig {
                format: match get.text("log.format").as_str() {
                    "json" => LogFormat::Json,
                    _ => LogFormat::Human,
                },
                level: Some(get.text("log.level")).filter(|level| level != "auto"),
            },
            resolved: resolved.clone(),
        };
        let problems = contradictions(&resolved);
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(Problems(problems))
        }
    }

    /// What was accepted with a warning.
    pub fn warnings(&self) -> &[String] {
        &self.resolved.warnings
    }

    /// A table location with the standard scheme put before it when it names none.
    ///
    /// With `cache.storage.scheme = "file"` a relative path is one from the current directory.
    pub fn location(&self, text: &str, machine: &Machine) -> String {
        if text.contains("://") {
            return text.to_string();
        }
        match self.cache.storage_scheme.as_str() {
            "file" if text.starts_with('/') => text.to_string(),
            "file" => {
                // `./a` and `a` are one directory; the layout keeps one spelling of it.
                let bare = text.strip_prefix("./").unwrap_or(text);
                format!("{}/{bare}", machine.directory.display())
            }
            scheme => format!("{scheme}://{}", text.trim_start_matches('/')),
        }
    }
}

/// A worker's name has to differ between workers of one host, and directories have one owner.
fn name_worker(resolved: &mut Resolved, machine: &Machine) {
    let text = |resolved: &Resolved, name: &str| {
        resolved
            .get(name)
            .value
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default()
    };
    let host = text(resolved, "worker.host");
    let location = text(resolved, "cache.location");
    let id = if location == machine.cache_location() {
        host
    } else {
        format!("{host}:{location}")
    };
    for (key, effective) in &mut resolved.values {
        if key.name == "worker.id" && effective.value.is_none() {
            effective.value = Some(Value::Text(id.clone()));
        }
    }
}

/// All three or none: anything else is a contradiction, which is said elsewhere.
fn transfer_tls(get: &Getter<'_>) -> Option<TransferTls> {
    Some(TransferTls {
        ca: get.optional_path("transfer.tls.ca")?,
        cert: get.optional_path("transfer.tls.cert")?,
        key: get.optional_path("transfer.tls.key")?,
    })
}

fn etcd(get: &Getter<'_>) -> Option<EtcdConfig> {
    let Some(Value::Hosts(hosts)) = &get.0.get("etcd.hosts").value else {
        return None;
    };
    let tls = EtcdTls {
        ca: get.optional_path("etcd.tls.ca"),
        cert: get.optional_path("etcd.tls.cert"),
        key: get.optional_path("etcd.tls.key"),
        domain: get.optional_text("etcd.tls.domain"),
    };
    let wanted = get.bool("etcd.tls.enabled")
        || tls.ca.is_some()
        || tls.cert.is_some()
        || tls.domain.is_some()
        || hosts.iter().any(|host| host.starts_with("https://"));
    let port = get.integer("etcd.port");
    let endpoints = hosts
        .iter()
        .map(|host| endpoint(host, port, if wanted { "https" } else { "http" }))
        .collect();
    Some(EtcdConfig {
        endpoints,
        user: get.optional_text("etcd.user"),
        password: match &get.0.get("etcd.password").value {
            Some(Value::Secret(secret)) => Some(secret.clone()),
            _ => None,
        },
        timeout: get.span("etcd.timeout"),
        tls: wanted.then_some(tls),
    })
}

fn endpoint(host: &str, port: u64, scheme: &str) -> String {
    let (scheme, bare) = match host.split_once("://") {
        Some((given, bare)) => (given, bare),
        None => (scheme, host),
    };
    if split_port(bare).is_some() {
        return format!("{scheme}://{bare}");
    }
    if bare.contains(':') && !bare.starts_with('[') {
        return format!("{scheme}://[{bare}]:{port}");
    }
    format!("{scheme}://{bare}:{port}")
}

fn stores(resolved: &Resolved) -> BTreeMap<String, BTreeMap<&'static str, StoreOption>> {
    resolved
        .stores
        .iter()
        .map(|(root, options)| {
            let options = options
                .iter()
                .filter_map(|(name, effective)| {
                    let option = match effective.value.as_ref()? {
                        Value::Secret(secret) => StoreOption::Secret(secret.clone()),
                        plain => StoreOption::Plain(plain.to_string()),
                    };
                    Some((*name, option))
                })
                .collect();
            (root.clone(), options)
        })
        .collect()
}

fn contradictions(resolved: &Resolved) -> Vec<Problem> {
    let get = Getter(resolved);
    let mut problems = Vec::new();
    let mut contradict = |key: &'static str, other: &'static str, reason: &'static str| {
        let shown = |name: &str| match &resolved.get(name).value {
            Some(value) => value.to_string(),
            None => "unset".to_string(),
        };
        let source = |name: &str| -> Source { resolved.get(name).source.clone() };
        problems.push(Problem::Contradiction(Box::new(Contradiction {
            key,
            value: shown(key),
            source_: source(key),
            other,
            other_value: shown(other),
            other_source: source(other),
            reason,
        })));
    };
    let set = |name: &str| resolved.get(name).value.is_some();
    if get.span("heartbeat.period.seconds") >= get.span("heartbeat.lease.ttl.seconds") {
        contradict(
            "heartbeat.period.seconds",
            "heartbeat.lease.ttl.seconds",
            "the lease would end before it is renewed; make the period at most half of the TTL",
        );
    }
    if set("etcd.user") != set("etcd.password") {
        let (present, absent) = match set("etcd.user") {
            true => ("etcd.user", "etcd.password"),
            false => ("etcd.password", "etcd.user"),
        };
        contradict(present, absent, "etcd needs both or neither");
    }
    if set("etcd.tls.cert") != set("etcd.tls.key") {
        let (present, absent) = match set("etcd.tls.cert") {
            true => ("etcd.tls.cert", "etcd.tls.key"),
            false => ("etcd.tls.key", "etcd.tls.cert"),
        };
        contradict(
            present,
            absent,
            "a certificate and its private key go together",
        );
    }
    let https = match &resolved.get("etcd.hosts").value {
        Some(Value::Hosts(hosts)) => hosts.iter().any(|host| host.starts_with("https://")),
        _ => false,
    };
    if !set("etcd.tls.ca") {
        let reason = "TLS needs the authority that signed etcd's certificate, in a PEM file";
        let wanting = ["etcd.tls.cert", "etcd.tls.domain"]
            .into_iter()
            .find(|key| set(key));
        if get.bool("etcd.tls.enabled") {
            contradict("etcd.tls.enabled", "etcd.tls.ca", reason);
        } else if let Some(wanting) = wanting {
            contradict(wanting, "etcd.tls.ca", reason);
        } else if https {
            contradict("etcd.hosts", "etcd.tls.ca", reason);
        }
    }
    for (address, shown) in [
        ("control.address", get.text("control.address")),
        ("http.address", get.text("http.address")),
    ] {
        if !get.bool("control.insecure") && !is_loopback(&shown) {
            contradict(
                address,
                "control.insecure",
                "other hosts could reach it in plain text without authentication; use a loopback \
                 address, or consent with control.insecure = true",
            );
        }
    }
    let tls = ["transfer.tls.ca", "transfer.tls.cert", "transfer.tls.key"];
    let given = tls.into_iter().find(|key| set(key));
    if let (Some(given), Some(absent)) = (given, tls.into_iter().find(|key| !set(key))) {
        contradict(
            given,
            absent,
            "both ends of a connection show a certificate and check the other's, which takes the \
             authority, a certificate and its key",
        );
    }
    let addresses = match &resolved.get("transfer.address").value {
        Some(Value::Hosts(addresses)) => addresses.as_slice(),
        _ => &[],
    };
    if given.is_none()
        && !get.bool("transfer.insecure")
        && addresses.iter().any(|address| !is_loopback(address))
    {
        contradict(
            "transfer.address",
            "transfer.insecure",
            "other hosts could read every cached column in plain text without authentication; \
             set transfer.tls.ca, transfer.tls.cert and transfer.tls.key, or consent with \
             transfer.insecure = true",
        );
    }
    if get.bytes("origin.request.size") > get.bytes("origin.inflight.size") {
        contradict(
            "origin.request.size",
            "origin.inflight.size",
            "a single request would exceed what may be in flight",
        );
    }
    problems
}

/// Whether an address can only be reached from this host. An unknown name counts as another host.
fn is_loopback(address: &str) -> bool {
    if let Some((host, _)) = split_port(address) {
        let bare = host.trim_matches(['[', ']']);
        if let Ok(ip) = bare.parse::<std::net::IpAddr>() {
            return ip.is_loopback();
        }
        if bare == "localhost" {
            return true;
        }
    }
    match address.to_socket_addrs() {
        Ok(mut addresses) => {
            addresses.len() > 0 && addresses.all(|address| address.ip().is_loopback())
        }
        Err(_) => false,
    }
}

/// Typed access to the table; a wrong kind is a bug here, found by any test that loads a config.
struct Getter<'a>(&'a Resolved);

impl Getter<'_> {
    fn value(&self, name: &str) -> &Value {
        let effective = self.0.get(name);
        effective
            .value
            .as_ref()
            .unwrap_or_else(|| panic!("the key `{name}` has no default"))
    }

    fn bool(&self, name: &str) -> bool {
        match self.value(name) {
            Value::Bool(value) => *value,
            other => panic!("the key `{name}` is not a bool but {other:?}"),
        }
    }

    fn bytes(&self, name: &str) -> u64 {
        match self.value(name) {
            Value::Bytes(value) => *value,
            other => panic!("the key `{name}` is not a size but {other:?}"),
        }
    }

    fn integer(&self, name: &str) -> u64 {
        match self.value(name) {
            Value::Integer(value) => *value,
            other => panic!("the key `{name}` is not an integer but {other:?}"),
        }
    }

    fn optional_span(&self, name: &str) -> Option<Duration> {
        match self.value(name) {
            Value::Span(value) => *value,
            Value::Off => None,
            other => panic!("the key `{name}` is not a span but {other:?}"),
        }
    }

    fn span(&self, name: &str) -> Duration {
        self.optional_span(name).unwrap_or(Duration::MAX)
    }

    fn text(&self, name: &str) -> String {
        self.value(name).to_string()
    }

    fn optional_text(&self, name: &str) -> Option<String> {
        self.0.get(name).value.as_ref().map(ToString::to_string)
    }

    fn path(&self, name: &str) -> PathBuf {
        match self.value(name) {
            Value::Path(path) => path.clone(),
            other => panic!("the key `{name}` is not a path but {other:?}"),
        }
    }

    fn optional_path(&self, name: &str) -> Option<PathBuf> {
        match &self.0.get(name).value {
            Some(Value::Path(path)) => Some(path.clone()),
            _ => None,
        }
    }
}
