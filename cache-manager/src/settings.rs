//! What a worker is told: plain data, checked before it starts.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stoa_control::Listen;

use crate::error::{Error, Result};

/// The least that a worker can be given: below it the index alone would be a good part of it.
pub const CAPACITY_BYTES_MIN: u64 = 1 << 20;

/// The settings of a worker. [`WorkerSettings::new`] gives the usual ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerSettings {
    /// Names the worker across restarts (`worker.id`).
    pub id: String,
    /// The host that it runs on, as others see it (`worker.host`).
    pub host: String,
    /// The directory of the shared memory, on tmpfs (`cache.location`). Made if it is missing.
    pub cache_dir: PathBuf,
    /// Bytes that the directory may hold in all: what is published, what readers still keep of
    /// what was, and the index (`cache.size`).
    pub capacity_bytes: u64,
    /// Whether processes of the directory's group may read it.
    pub group_access: bool,
    /// Accepts a cache directory that is not on tmpfs: for tests only.
    pub allow_non_tmpfs: bool,
    /// How long the registration outlives the worker (`heartbeat.lease.ttl.seconds`).
    pub lease_ttl: Duration,
    /// How often it is renewed (`heartbeat.period.seconds`); less than `lease_ttl`.
    pub heartbeat: Duration,
    /// How often the origin is looked at for changed files (`cache.freshness`); `None`: never.
    pub freshness: Option<Duration>,
    /// Batches that are fetched at the same time.
    pub fill_concurrency: usize,
    /// Row groups that are decoded at the same time; 0: one a processor.
    pub decode_concurrency: usize,
    /// Memory that a load may take for what it has fetched and not yet written.
    pub fill_memory_bytes: u64,
    /// The shortest time between two publications during a load.
    pub publish_interval: Duration,
    /// The first and the longest wait before a failed chunk or table is tried again.
    pub retry: (Duration, Duration),
    /// How often memory that readers have let go is looked for.
    pub reclaim_interval: Duration,
    /// How often everything published is hashed again (`cache.scrub.interval`); `None`: only when
    /// asked.
    pub scrub_interval: Option<Duration>,
    /// How long a worker without peers, which finds that the last one has left nothing to do, does
    /// nothing: a process that ends before has paid nothing for what is in the directory. Zero takes
    /// stock of it at the start.
    pub takeover_delay: Duration,
    /// Where control is served over gRPC; `None`: nowhere.
    pub control: Option<Listen>,
    /// Where metrics and health are served over HTTP; `None`: nowhere.
    pub http: Option<Listen>,
    /// Locks what is published into memory from the start (`cache.pin`).
    pub pin: bool,
    /// How this worker and others read each other's memory; `None`: not at all.
    pub transfer: Option<TransferSettings>,
}

/// How workers read each other's memory (`transfer.*`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferSettings {
    /// `host:port` of each way to this worker's memory, the preferred one first; port 0 takes a free
    /// one (`transfer.address`).
    pub addresses: Vec<String>,
    /// Certificates for both directions; plain text without.
    pub tls: Option<TransferTls>,
    /// Consent to plain text beyond loopback (`transfer.insecure`).
    pub insecure: bool,
    /// Consent to reads over RDMA, which are not encrypted (`transfer.rdma.enabled`).
    pub rdma: bool,
    /// What another worker may take to answer before it is left alone (`transfer.deadline`).
    pub deadline: Duration,
}

/// Certificates, all in PEM (`transfer.tls.*`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferTls {
    /// The authority that signed for all nodes.
    pub ca: PathBuf,
    /// This node's certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Default for TransferSettings {
    fn default() -> TransferSettings {
        TransferSettings {
            addresses: vec!["127.0.0.1:0".into()],
            tls: None,
            insecure: false,
            rdma: false,
            deadline: Duration::from_secs(5),
        }
    }
}

impl WorkerSettings {
    /// The usual settings for a worker `id` with that directory and budget. Nothing is served.
    pub fn new(id: impl Into<String>, cache_dir: impl Into<PathBuf>, capacity_bytes: u64) -> Self {
        WorkerSettings {
            id: id.into(),
            host: "localhost".into(),
            cache_dir: cache_dir.into(),
            capacity_bytes,
            group_access: false,
            allow_non_tmpfs: false,
            lease_ttl: Duration::from_secs(20),
            heartbeat: Duration::from_secs(10),
            freshness: Some(Duration::from_secs(60)),
            fill_concurrency: 8,
            decode_concurrency: 0,
            fill_memory_bytes: 512 << 20,
            publish_interval: Duration::from_millis(250),
            retry: (Duration::from_secs(1), Duration::from_secs(60)),
            reclaim_interval: Duration::from_secs(2),
            scrub_interval: Some(Duration::from_secs(6 * 3600)),
            takeover_delay: Duration::ZERO,
            control: None,
            http: None,
            pin: false,
            transfer: None,
        }
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// [`Error::Setting`] with the name in the configuration, the value, and what is expected.
    pub fn validate(&self) -> Result<()> {
        let wrong = |key, value: String, reason: &str| {
            Err(Error::Setting {
                key,
                value,
                reason: reason.into(),
            })
        };
        if self.id.is_empty() || self.id.contains('\0') {
            return wrong("worker.id", format!("{:?}", self.id), "expected a name");
        }
        if self.host.is_empty() {
            return wrong("worker.host", "empty".into(), "expected this host's name");
        }
        if self.capacity_bytes < CAPACITY_BYTES_MIN {
            let expected = format!("expected at least {CAPACITY_BYTES_MIN} bytes");
            return wrong(
                "cache.size",
                format!("{} bytes", self.capacity_bytes),
                &expected,
            );
        }
        if self.heartbeat.is_zero() {
            return wrong(
                "heartbeat.period.seconds",
                "0".into(),
                "expected more than 0",
            );
        }
        if self.lease_ttl <= self.heartbeat {
            let expected = format!(
                "expected more than heartbeat.period.seconds, which is {}; twice that is usual",
                self.heartbeat.as_secs_f64()
            );
            let value = self.lease_ttl.as_secs_f64().to_string();
            return wrong("heartbeat.lease.ttl.seconds", value, &expected);
        }
        if self
            .freshness
            .is_some_and(|freshness| freshness < Duration::from_millis(100))
        {
            let expected = "expected at least 100ms, or snapshot to look never";
            return wrong("cache.freshness", format!("{:?}", self.freshness), expected);
        }
        if self.fill_concurrency == 0 {
            return wrong("worker.fill.concurrency", "0".into(), "expected at least 1");
        }
        if self.fill_memory_bytes < 1 << 20 {
            let value = format!("{} bytes", self.fill_memory_bytes);
            return wrong("worker.fill.memory", value, "expected at least 1 MiB");
        }
        if let Some(transfer) = &self.transfer {
            if transfer.deadline < Duration::from_millis(10) {
                let value = format!("{:?}", transfer.deadline);
                return wrong("transfer.deadline", value, "expected at least 10ms");
            }
            if transfer.addresses.is_empty() {
                let expected = "expected host:port, such as 127.0.0.1:0";
                return wrong("transfer.address", "empty".into(), expected);
            }
        }
        Ok(())
    }

    pub(crate) fn decoders(&self) -> usize {
        match self.decode_concurrency {
            0 => std::thread::available_parallelism().map_or(2, usize::from),
            given => given,
        }
    }
}

/// Size of the segments where `capacity_bytes` can be had: small in a small cache, so that one of
/// them is never much of it. The capacity is what there is, which may be less than what is set.
pub(crate) fn segment_bytes(capacity_bytes: u64) -> u64 {
    (capacity_bytes / 16).clamp(64 << 10, stoa_shm::SEGMENT_BYTES)
}

/// What is left free of that capacity, so that there is always room to copy one segment's live part
/// out of it, and for the next index beside the present one.
pub(crate) fn headroom_bytes(capacity_bytes: u64) -> u64 {
    segment_bytes(capacity_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_settings_say_key_value_and_what_is_expected() {
        let good = WorkerSettings::new("w", "/dev/shm/x", 1 << 30);
        good.validate().unwrap();
        let text = |settings: WorkerSettings| settings.validate().unwrap_err().to_string();
        assert_eq!(
            text(WorkerSettings {
                capacity_bytes: 0,
                ..good.clone()
            }),
            "cache.size is 0 bytes: expected at least 1048576 bytes"
        );
        assert_eq!(
            text(WorkerSettings {
                lease_ttl: Duration::from_secs(5),
                ..good.clone()
            }),
            "heartbeat.lease.ttl.seconds is 5: expected more than heartbeat.period.seconds, which \
             is 10; twice that is usual"
        );
        assert_eq!(
            text(WorkerSettings {
                fill_concurrency: 0,
                ..good.clone()
            }),
            "worker.fill.concurrency is 0: expected at least 1"
        );
        assert_eq!(
            text(WorkerSettings {
                transfer: Some(TransferSettings {
                    deadline: Duration::ZERO,
                    ..TransferSettings::default()
                }),
                ..good.clone()
            }),
            "transfer.deadline is 0ns: expected at least 10ms"
        );
        assert_eq!(
            text(WorkerSettings {
                id: "".into(),
                ..good
            }),
            "worker.id is \"\": expected a name"
        );
    }

    #[test]
    fn segments_of_a_small_cache_are_small() {
        assert_eq!(segment_bytes(64 << 30), 64 << 20);
        assert_eq!(segment_bytes(16 << 20), 1 << 20);
        // However little there is, most of it is for chunks.
        for capacity in [1 << 20, 6 << 20, 64 << 20, 1 << 40] {
            assert!(headroom_bytes(capacity) <= capacity / 16, "{capacity}");
        }
    }
}
