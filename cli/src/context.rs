//! What a command works with: the configuration, and the parts made from it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stoa_cache_manager::{PeerNetwork, TransferSettings, TransferTls};
use stoa_control::ClientSettings;
use stoa_datafusion::{Embedded, EmbeddedSettings};
use stoa_layout::{TableName, TableVersion};
use stoa_metastore::{EmbeddedMetastore, EtcdMetastore, EtcdSettings, Records};
use stoa_origin::{Origin, OriginLimits, StoreSettings, Stores};
use stoa_reader::neighbours::{Directory, LocalDirectory, ToldDirectory};
use stoa_reader::{NeighbourSettings, Neighbours, Reader, ReaderOptions, Verify};

use crate::args::Global;
use crate::config::{Config, EtcdConfig, Machine};
use crate::error::{Error, Result};
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

    /// The records of etcd, or of the embedded metastore, which has one owner at a time.
    pub async fn records(&self) -> Result<Records> {
        Ok(match &self.config.etcd {
            Some(etcd) => {
                Records::new(Arc::new(EtcdMetastore::connect(etcd_settings(etcd)).await?))
            }
            None => Records::new(Arc::new(EmbeddedMetastore::open(self.state_directory())?)),
        })
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

    /// Metastore, coordinator and worker in this process, or attached to another's memory.
    ///
    /// What another process has left is looked into when there is something to do, or after a while:
    /// most commands end before.
    pub async fn embedded(&self) -> Result<Embedded> {
        self.start_embedded(TAKEOVER_DELAY).await
    }

    async fn start_embedded(&self, takeover_delay: Duration) -> Result<Embedded> {
        let settings = EmbeddedSettings {
            cache_directory: self.config.cache.location.clone(),
            capacity_bytes: self.config.cache.size_bytes,
            state_directory: Some(self.state_directory().to_path_buf()),
            group_access: self.config.cache.group_access,
            pin: self.config.cache.pin,
            freshness: self.config.cache.freshness,
            scrub_interval: self.config.cache.scrub_interval,
            takeover_delay,
            verify: self.verify(),
            prefault: self.config.cache.prefault,
            stores: self.store_settings(),
            origin: self.origin_limits(),
        };
        Embedded::start(settings).await.map_err(embedded_error)
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

    /// Like [`Context::embedded`], for what only the owner can do.
    pub async fn embedded_owner(&self) -> Result<Embedded> {
        let embedded = self.start_embedded(Duration::ZERO).await?;
        if !embedded.is_owner() {
            return Err(Error::Busy(format!(
                "another process runs the cache in {} with the state in {}: stop it first, or \
                 share the state between processes with --etcd (inside `stoa sql`, CREATE EXTERNAL \
                 TABLE … STORED AS STOA loads a table too)",
                self.config.cache.location.display(),
                self.state_directory().display()
            )));
        }
        Ok(embedded)
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
