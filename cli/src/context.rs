//! What a command works with: the configuration, and the parts made from it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stoa_cache_manager::{PeerNetwork, TransferSettings, TransferTls};
use stoa_control::ClientSettings;
use stoa_datafusion::{Embedded, EmbeddedSettings};
use stoa_layout::{TableName, TableVersion};
use stoa_metastore::{EmbeddedMetastore, EtcdMetastore, EtcdSettings, Records, SharedMetastore};
use stoa_origin::{Origin, OriginLimits, StoreSettings, Stores};
use stoa_reader::neighbours::{Directory, LocalDirectory, ToldDirectory};
use stoa_reader::{NeighbourSettings, Neighbours, Reader, ReaderOptions, Verify};
use stoa_shm::{CacheDir, CacheDirOptions};

use crate::args::Global;
use crate::config::{Config, EtcdConfig, Machine};
use crate::error::{Error, Result, chain};
use crate::failures::embedded_error;

/// How long a command leaves the cache alone that it runs beside its queries.
const TAKEOVER_DELAY: Duration = Duration::from_secs(1);

/// The configuration, and what is made from it on demand.
#[derive(Clone, Debug)]
pub struct Context {
    /// The effective configuration.
    pub config: Config,
    /// The machine this runs on.
    pub machine: Machine,
    /// The command line that asks the same metastore and cache, for advice to be pasted.
    pub command: String,
}

impl Context {
    /// Reads the configuration, starts the log, and says what was accepted with a warning.
    pub fn start(global: &Global, daemon: bool) -> Result<Context> {
        let machine = Machine::here();
        let config = Config::load(&global.inputs(), &machine)?;
        crate::log::init(&config.log, daemon)?;
        for warning in config.warnings() {
            tracing::warn!("{warning}");
        }
        Ok(Context {
            config,
            machine,
            command: global.command(),
        })
    }

    /// Whether everything runs in one process.
    pub fn is_embedded(&self) -> bool {
        self.config.etcd.is_none()
    }

    /// Where the state lies, for messages.
    pub fn metastore_name(&self) -> String {
        match &self.config.etcd {
            Some(etcd) => format!("etcd at {}", etcd.endpoints.join(", ")),
            None => format!("the embedded state in {}", self.state_directory().display()),
        }
    }

    /// The directory of the embedded metastore.
    pub fn state_directory(&self) -> &Path {
        &self.config.state_location
    }

    /// The records of etcd, or of the embedded state, be it this process's or another one's.
    pub async fn records(&self) -> Result<Records> {
        Ok(match &self.config.etcd {
            Some(etcd) => {
                Records::new(Arc::new(EtcdMetastore::connect(etcd_settings(etcd)).await?))
            }
            None => Records::new(Arc::new(
                SharedMetastore::open(self.state_directory()).await?,
            )),
        })
    }

    /// As [`Context::records`], for a command that only looks: where the embedded state cannot be
    /// written, what lies in it is shown all the same.
    pub async fn records_to_read(&self) -> Result<Records> {
        if !self.is_embedded() {
            return self.records().await;
        }
        let directory = self.state_directory();
        let unwritable = match SharedMetastore::open(directory).await {
            Ok(store) => return Ok(Records::new(Arc::new(store))),
            Err(error @ stoa_metastore::Error::Storage { .. }) => error,
            Err(error) => return Err(error.into()),
        };
        match EmbeddedMetastore::read_only(directory) {
            Ok(store) => {
                tracing::warn!("{unwritable}");
                Ok(Records::new(Arc::new(store)))
            }
            Err(_) => Err(unwritable.into()),
        }
    }

    /// Object stores as configured.
    pub fn store_settings(&self) -> StoreSettings {
        let mut settings = StoreSettings::default();
        for (root, options) in &self.config.stores {
            for (option, value) in options {
                settings = settings.with_option(root, option, value.reveal());
            }
        }
        settings
    }

    /// Bounds on reads of object stores, as configured.
    pub fn origin_limits(&self) -> OriginLimits {
        let origin = &self.config.origin;
        OriginLimits {
            in_flight_bytes_max: origin.inflight_bytes,
            coalesce_gap_bytes: origin.coalesce_gap_bytes,
            request_bytes_max: origin.request_bytes,
            attempts: origin.attempts,
            retry_time: origin.retry_time,
            timeout: origin.timeout,
            ..OriginLimits::default()
        }
    }

    /// Object stores, to read from.
    pub fn origin(&self) -> Origin {
        Origin::new(Stores::new(self.store_settings()), self.origin_limits())
    }

    /// How the cache is run where there is no cluster, by whichever command.
    pub fn embedded_settings(&self) -> EmbeddedSettings {
        let config = &self.config;
        EmbeddedSettings {
            cache_directory: config.cache.location.clone(),
            capacity_bytes: config.cache.size_bytes,
            state_directory: Some(self.state_directory().to_path_buf()),
            host: config.worker.host.clone(),
            group_access: config.cache.group_access,
            pin: config.cache.pin,
            freshness: config.cache.freshness,
            scrub_interval: config.cache.scrub_interval,
            takeover_delay: Duration::ZERO,
            lease_ttl: config.heartbeat.lease_ttl,
            heartbeat: config.heartbeat.period,
            fill_concurrency: config.worker.fill_concurrency,
            fill_memory_bytes: config.worker.fill_memory_bytes,
            absolute_balancer: config.cache.absolute_balancer,
            // Only a daemon is asked by others.
            control: None,
            http: None,
            verify: self.verify(),
            prefault: config.cache.prefault,
            // Of use to queries only, see `embedded_to_read`.
            neighbours: None,
            stores: self.store_settings(),
            origin: self.origin_limits(),
        }
    }

    /// The cache of this machine as a command that changes it needs it: run by this process, or by
    /// another one that does what this one asks for.
    pub async fn embedded(&self) -> Result<Embedded> {
        let embedded = Embedded::start(self.embedded_settings()).await;
        let mut embedded = embedded.map_err(embedded_error)?;
        match embedded.wait_for_worker().await {
            Ok(()) => Ok(embedded),
            Err(error) => {
                embedded.shutdown().await;
                Err(embedded_error(error))
            }
        }
    }

    /// The cache of this machine as queries need it: read in any case, and filled where it can be.
    pub async fn embedded_to_read(&self) -> Result<Embedded> {
        let settings = EmbeddedSettings {
            // What another process has left is looked into when there is something to do, or after a
            // while: most commands end before.
            takeover_delay: TAKEOVER_DELAY,
            neighbours: self.neighbours(),
            ..self.embedded_settings()
        };
        let embedded = Embedded::attach(settings).await;
        let embedded = embedded.map_err(embedded_error)?;
        if let Some(trouble) = embedded.trouble()
            // Of a directory that it cannot use, the reader warns by itself.
            && self.has_readable_cache()
        {
            tracing::warn!(
                "{}; what is in {} is read, the rest comes from the origin, and nothing is cached \
                 by this process",
                chain(trouble),
                self.config.cache.location.display()
            );
        }
        Ok(embedded)
    }

    /// Whether readers take the cache that lies there, if one does.
    fn has_readable_cache(&self) -> bool {
        let location = &self.config.cache.location;
        let missing = std::fs::symlink_metadata(location.join("index"))
            .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
        missing || CacheDir::open(location, CacheDirOptions::default()).is_ok()
    }

    /// This machine's cache, to be read; nothing of others.
    pub fn local_reader(&self) -> Reader {
        self.reader_among(None)
    }

    /// This machine's cache, to be read, and the memory of other workers beside it. Within a tokio
    /// runtime.
    pub fn reader(&self) -> Reader {
        self.reader_among(self.neighbours())
    }

    fn reader_among(&self, neighbours: Option<Neighbours>) -> Reader {
        let options = ReaderOptions {
            verify: self.verify(),
            prefault: self.config.cache.prefault,
            ..ReaderOptions::default()
        };
        let location = &self.config.cache.location;
        Reader::open_among(location, options, self.origin(), neighbours)
    }

    /// The memory of other workers, to be read by queries; none where there are no others. Wrong
    /// certificates cost their memory, not the queries.
    fn neighbours(&self) -> Option<Neighbours> {
        let remote = self.config.cache.remote.as_ref()?;
        if self.is_embedded() && remote.peers.is_empty() {
            return None;
        }
        let client = match PeerNetwork::new(&self.transfer()) {
            Ok(network) => network.client,
            Err(error) => {
                tracing::warn!(%error, "going on without the memory of other workers");
                return None;
            }
        };
        let directory: Arc<dyn Directory> = match remote.peers.is_empty() {
            true => Arc::new(LocalDirectory::open(&self.config.cache.location)),
            false => ToldDirectory::follow(&remote.peers, client.clone()),
        };
        let settings = NeighbourSettings {
            deadline: remote.deadline,
            in_flight_bytes_max: remote.inflight_bytes,
            ..NeighbourSettings::default()
        };
        Some(Neighbours::new(settings, directory, Arc::new(client)))
    }

    /// How memory is read and served between hosts, as configured.
    pub fn transfer(&self) -> TransferSettings {
        let transfer = &self.config.transfer;
        TransferSettings {
            addresses: transfer.addresses.clone(),
            tls: transfer.tls.as_ref().map(|tls| TransferTls {
                ca: tls.ca.clone(),
                certificate: tls.cert.clone(),
                key: tls.key.clone(),
            }),
            insecure: transfer.insecure,
            rdma: transfer.rdma,
            deadline: transfer.deadline,
        }
    }

    fn verify(&self) -> Verify {
        match self.config.cache.verify_first_touch {
            true => Verify::FirstTouch,
            false => Verify::Never,
        }
    }

    /// How to talk to workers.
    pub fn control_clients(&self) -> ClientSettings {
        ClientSettings {
            insecure: self.config.control.insecure,
            ..ClientSettings::default()
        }
    }

    /// The directory for generated data.
    pub fn data_location(&self) -> PathBuf {
        PathBuf::from(self.machine.data_location())
    }
}

fn etcd_settings(etcd: &EtcdConfig) -> EtcdSettings {
    let tls = etcd.tls.clone().unwrap_or_default();
    EtcdSettings {
        endpoints: etcd.endpoints.clone(),
        user: etcd.user.clone(),
        password: etcd.password.as_ref().map(|secret| secret.reveal().into()),
        ca_file: tls.ca,
        cert_file: tls.cert,
        key_file: tls.key,
        server_name: tls.domain,
        timeout_ms: etcd.timeout.as_millis().max(1) as u64,
    }
}

/// Milliseconds since 1970.
pub fn now_unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// A table, with or without a version, as the command line names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The newest version.
    Newest(TableName),
    /// This one.
    Version(TableVersion),
}

impl Target {
    /// Parses `schema.table` or `schema.table:version`.
    pub fn parse(text: &str) -> Result<Target> {
        let versioned = text.rsplit_once(':').is_some_and(|(_, version)| {
            !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit())
        });
        Ok(match versioned {
            true => Target::Version(text.parse()?),
            // A colon without digits behind it belongs to the name.
            false => Target::Newest(text.parse()?),
        })
    }

    /// The table's name.
    pub fn table(&self) -> &TableName {
        match self {
            Target::Newest(table) => table,
            Target::Version(version) => &version.table,
        }
    }

    /// The version it means, asking for the newest one where it names none.
    pub async fn resolve(&self, records: &Records) -> Result<TableVersion> {
        match self {
            Target::Version(version) => Ok(version.clone()),
            Target::Newest(table) => match records.latest_layout(&table.to_string()).await? {
                Some(version) => Ok(TableVersion {
                    table: table.clone(),
                    version: version.try_into()?,
                }),
                None => Err(unknown_table(records, table).await),
            },
        }
    }
}

/// The error for a table without a layout, with the nearest table that has one.
pub async fn unknown_table(records: &Records, table: &TableName) -> Error {
    let known = records.layout_tables().await.unwrap_or_default();
    let name = table.to_string();
    let nearest = known.iter().max_by(|a, b| {
        let score = |known: &str| strsim::normalized_damerau_levenshtein(known, &name);
        score(a).total_cmp(&score(b))
    });
    Error::Refused(match nearest {
        Some(nearest) => format!(
            "unknown table {name}: no layout of it is published; the nearest is {nearest} \
             (`stoa layout list` shows all)"
        ),
        None => format!(
            "unknown table {name}: no layout is published at all; publish one with \
             `stoa layout create {name} --location …`"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_may_name_a_version() {
        let version = |text: &str| match Target::parse(text).unwrap() {
            Target::Version(version) => Some(version.version.get()),
            Target::Newest(_) => None,
        };
        assert_eq!(version("tpch.lineitem"), None);
        assert_eq!(version("tpch.lineitem:12"), Some(12));
        assert_eq!(version("odd.name:with colon"), None);
        let table = Target::parse("odd.na:me:3").unwrap();
        assert_eq!(table.table().to_string(), "odd.na:me");
        assert!(Target::parse("tpch.lineitem:0").is_err());
    }

    /// What `stoa config check` shows is what is in force, for each command that runs the cache where
    /// there is no cluster: `sql`, `load`, `unload`, `demo` and `worker` all take these settings.
    #[test]
    fn every_key_reaches_the_embedded_cache() {
        use crate::config::{Inputs, KEYS};
        let set = [
            "cache.location=/dev/shm/stoa-keys",
            "cache.size=3GiB",
            "cache.freshness=7s",
            "cache.scrub.interval=5h",
            "cache.verify=first-touch",
            "cache.prefault.enabled=true",
            "cache.pin.enabled=true",
            "cache.group.enabled=true",
            "cache.absolute.balancer.enabled=true",
            "state.location=/keys/state",
            "heartbeat.lease.ttl.seconds=44",
            "heartbeat.period.seconds=11",
            "worker.host=somewhere",
            "worker.fill.concurrency=3",
            "worker.fill.memory=77MiB",
            "origin.inflight.size=99MiB",
            "origin.coalesce.gap=5MiB",
            "origin.request.size=9MiB",
            "origin.attempts=9",
            "origin.retry.time=21s",
            "origin.timeout=13s",
        ];
        // What the embedded cache does not have, and why.
        let elsewhere = [
            // Of sessions and queries, see `session_config` and `neighbours`.
            "cache.enabled",
            "cache.parquet.enabled",
            "cache.remote.enabled",
            "cache.remote.deadline",
            "cache.remote.inflight.size",
            "cache.remote.peers",
            // Of locations on the command line.
            "cache.storage.scheme",
            // Only the daemon serves these; it adds them to the same settings.
            "control.address",
            "control.insecure",
            "http.address",
            // One worker, of one name, that waits for no other.
            "worker.id",
            "coordinator.grace.seconds",
        ];
        let of_clusters = ["etcd.", "transfer.", "log."];
        let inputs = Inputs {
            set: set.map(str::to_string).to_vec(),
            ..Inputs::default()
        };
        let machine = Machine::here();
        let config = Config::load(&inputs, &machine).unwrap();
        let context = Context {
            config,
            machine,
            command: "stoa".into(),
        };
        let settings = context.embedded_settings();
        let (worker, coordinator) = (settings.worker(), settings.coordinator());
        let seconds = |span: std::time::Duration| format!("{}s", span.as_secs());
        let bytes = |bytes: u64| crate::config::format_bytes(bytes).replace(' ', "");
        let origin = &settings.origin;
        let in_force = [
            worker.cache_dir.display().to_string(),
            bytes(worker.capacity_bytes),
            seconds(worker.freshness.unwrap()),
            format!("{}h", worker.scrub_interval.unwrap().as_secs() / 3600),
            match settings.verify {
                Verify::FirstTouch => "first-touch".into(),
                Verify::Never => "off".into(),
            },
            settings.prefault.to_string(),
            worker.pin.to_string(),
            worker.group_access.to_string(),
            coordinator.absolute_balancer.to_string(),
            settings
                .state_directory
                .as_ref()
                .unwrap()
                .display()
                .to_string(),
            worker.lease_ttl.as_secs().to_string(),
            worker.heartbeat.as_secs().to_string(),
            worker.host.clone(),
            worker.fill_concurrency.to_string(),
            bytes(worker.fill_memory_bytes),
            bytes(origin.in_flight_bytes_max),
            bytes(origin.coalesce_gap_bytes),
            bytes(origin.request_bytes_max),
            origin.attempts.to_string(),
            seconds(origin.retry_time),
            seconds(origin.timeout),
        ];
        for (set, in_force) in set.iter().zip(in_force) {
            let (key, value) = set.split_once('=').unwrap();
            assert_eq!(in_force, value, "{key}");
        }
        assert_eq!(coordinator.election_ttl_ms, 44_000);
        for key in KEYS {
            let known = set
                .iter()
                .any(|set| set.split('=').next() == Some(key.name))
                || elsewhere.contains(&key.name)
                || of_clusters.iter().any(|of| key.name.starts_with(of));
            assert!(
                known,
                "whether {} reaches the embedded cache is not tested",
                key.name
            );
        }
    }

    #[tokio::test]
    async fn the_newest_version_is_found_and_an_unknown_table_has_a_neighbour() {
        let records = Records::new(Arc::new(EmbeddedMetastore::in_memory()));
        let target = Target::parse("tpch.lineitm").unwrap();
        insta::assert_snapshot!(
            target.resolve(&records).await.unwrap_err(),
            @"unknown table tpch.lineitm: no layout is published at all; publish one with `stoa layout create tpch.lineitm --location …`"
        );
        records
            .publish_layout("tpch.orders", 1, "{}")
            .await
            .unwrap();
        for version in [1, 4] {
            records
                .publish_layout("tpch.lineitem", version, "{}")
                .await
                .unwrap();
        }
        insta::assert_snapshot!(
            target.resolve(&records).await.unwrap_err(),
            @"unknown table tpch.lineitm: no layout of it is published; the nearest is tpch.lineitem (`stoa layout list` shows all)"
        );
        let target = Target::parse("tpch.lineitem").unwrap();
        let found = target.resolve(&records).await.unwrap();
        assert_eq!(found.to_string(), "tpch.lineitem:4");
    }
}
