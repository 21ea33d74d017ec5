//! The table of keys: the one place that names a key, its type, its default and its meaning.
//!
//! Parsing, environment variables, `--set`, `stoa config keys` and docs/configuration.md all
//! read this table, so that they cannot disagree.

use super::machine::Machine;

/// What a value has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A number of bytes, also as `64GiB`; at least the given one.
    Bytes {
        /// The smallest value that makes sense.
        min: u64,
    },
    /// A whole number within bounds.
    Integer {
        /// The smallest value that makes sense.
        min: u64,
        /// The largest value that makes sense.
        max: u64,
    },
    /// A span of time, a number of seconds or `90s`, `2m`; never zero.
    Span,
    /// A span of time like [`Kind::Span`], or `snapshot` for never.
    SpanOrSnapshot,
    /// A span of time like [`Kind::Span`], or `off` for never.
    SpanOrOff,
    /// A span of time that may be zero.
    SpanOrZero,
    /// Any text.
    Text,
    /// An absolute path.
    Path,
    /// `host:port`; port 0 takes a free one.
    Address,
    /// One or several `host:port`, separated by commas; port 0 takes a free one.
    Addresses,
    /// Hosts separated by commas, each with an optional port.
    Hosts,
    /// One of a few words.
    Choice(&'static [&'static str]),
    /// A secret: `env:NAME`, `file:/path` or the text itself; never printed.
    Secret,
}

/// Where a key's default comes from.
#[derive(Clone, Copy, Debug)]
pub enum Standard {
    /// Always the same text.
    Fixed(&'static str),
    /// Worked out from the machine; the text says how.
    Computed(&'static str, fn(&Machine) -> String),
    /// No value unless somebody gives one.
    Unset,
}

/// One key of the configuration.
#[derive(Debug)]
pub struct Key {
    /// The dotted name, as in stoa.toml.
    pub name: &'static str,
    /// What a value has to be.
    pub kind: Kind,
    /// The default.
    pub standard: Standard,
    /// One sentence for people.
    pub help: &'static str,
}

impl Key {
    /// The environment variable that sets this key: `cache.size` → `STOA_CACHE__SIZE`.
    pub fn variable(&self) -> String {
        variable_of(self.name)
    }
}

/// The environment variable of a dotted key.
pub(super) fn variable_of(name: &str) -> String {
    format!("STOA_{}", name.replace('.', "__").to_uppercase())
}

const fn key(name: &'static str, kind: Kind, standard: Standard, help: &'static str) -> Key {
    Key {
        name,
        kind,
        standard,
        help,
    }
}

use Kind::*;
use Standard::{Computed, Fixed, Unset};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Every key, in the order in which people read them.
pub const KEYS: &[Key] = &[
    key(
        "cache.enabled",
        Bool,
        Fixed("true"),
        "Whether queries look into the cache at all; false reads everything from the origin.",
    ),
    key(
        "cache.location",
        Path,
        Computed("/dev/shm/stoa-<uid>", |m| m.cache_location()),
        "The directory on tmpfs that holds segments and index; processes that map it share one copy.",
    ),
    key(
        "cache.size",
        Bytes { min: MIB },
        Computed(
            "half of what /dev/shm and this machine's or container's memory allow",
            |m| m.cache_size().to_string(),
        ),
        "The memory a worker may fill with cached chunks.",
    ),
    key(
        "cache.freshness",
        SpanOrSnapshot,
        Fixed("60s"),
        "How often a worker looks whether a table's files changed; `snapshot` never looks.",
    ),
    key(
        "cache.verify",
        Choice(&["off", "first-touch"]),
        Fixed("off"),
        "Whether a reader hashes a local chunk when it first uses it; workers verify in any case.",
    ),
    key(
        "cache.scrub.interval",
        SpanOrOff,
        Fixed("6h"),
        "How often a worker hashes again, behind and at 256 MiB a second, all that is published, and \
         loads again what memory has lost; `off` never does.",
    ),
    key(
        "cache.prefault.enabled",
        Bool,
        Fixed("false"),
        "Whether a process touches the whole cache when it attaches, in a thread of its own, so \
         that its first queries do not wait for page faults.",
    ),
    key(
        "cache.pin.enabled",
        Bool,
        Fixed("false"),
        "Whether a worker locks its cache in memory (mlock) so that it cannot be swapped out.",
    ),
    key(
        "cache.group.enabled",
        Bool,
        Fixed("false"),
        "Whether the processes of the cache directory's group may read every cached table (mode 0750).",
    ),
    key(
        "cache.parquet.enabled",
        Bool,
        Fixed("true"),
        "Whether `stoa sql` serves STORED AS PARQUET tables and other stock Parquet scans from the cache too.",
    ),
    key(
        "cache.remote.enabled",
        Bool,
        Fixed("true"),
        "Whether queries read what other workers hold from their memory before they ask the origin.",
    ),
    key(
        "cache.remote.deadline",
        Span,
        Fixed("1s"),
        "What another worker always has to answer a query, beside what its bytes should take; then the origin is read.",
    ),
    key(
        "cache.remote.inflight.size",
        Bytes { min: MIB },
        Fixed("256MiB"),
        "How many bytes the queries of a process request from other workers at a time; half of it from one.",
    ),
    key(
        "cache.remote.peers",
        Hosts,
        Unset,
        "Workers, `host:port,…` of their transfer.address, that tell a machine without a worker who holds what.",
    ),
    key(
        "cache.storage.scheme",
        Choice(&["file", "s3", "gs", "az", "http", "https"]),
        Fixed("file"),
        "The scheme of a table location that names none; with s3, `bucket/dir/` means s3://bucket/dir/.",
    ),
    key(
        "cache.absolute.balancer.enabled",
        Bool,
        Fixed("false"),
        "Whether the plan gives every worker the same number of row groups (the mean, rounded), as Pixels does, rather than a share of the bytes by its capacity; at the price of moving more.",
    ),
    key(
        "state.location",
        Path,
        Computed("$XDG_STATE_HOME/stoa, else ~/.local/state/stoa", |m| {
            m.state_location()
        }),
        "Where the embedded metastore lives; unused with etcd.",
    ),
    key(
        "etcd.hosts",
        Hosts,
        Unset,
        "The etcd cluster, `host,host:port,…`; unset runs everything embedded in one process.",
    ),
    key(
        "etcd.port",
        Integer {
            min: 1,
            max: 65_535,
        },
        Fixed("2379"),
        "The port of the etcd hosts that name none.",
    ),
    key("etcd.user", Text, Unset, "The etcd user."),
    key("etcd.password", Secret, Unset, "The etcd user's password."),
    key(
        "etcd.timeout",
        Span,
        Fixed("5s"),
        "How long one request to etcd may take.",
    ),
    key(
        "etcd.tls.enabled",
        Bool,
        Fixed("false"),
        "Whether to talk TLS to etcd; needs etcd.tls.ca, which implies it.",
    ),
    key(
        "etcd.tls.ca",
        Path,
        Unset,
        "The certificate authority (PEM) that signed etcd's certificate.",
    ),
    key(
        "etcd.tls.cert",
        Path,
        Unset,
        "Our certificate (PEM) towards etcd.",
    ),
    key(
        "etcd.tls.key",
        Path,
        Unset,
        "The private key (PEM) of etcd.tls.cert.",
    ),
    key(
        "etcd.tls.domain",
        Text,
        Unset,
        "The name expected in etcd's certificate, when it is not the host's.",
    ),
    key(
        "heartbeat.lease.ttl.seconds",
        Span,
        Fixed("20"),
        "How long a silent worker or coordinator counts as alive.",
    ),
    key(
        "heartbeat.period.seconds",
        Span,
        Fixed("10"),
        "How often workers and coordinator renew their lease; less than its TTL.",
    ),
    key(
        "coordinator.grace.seconds",
        SpanOrZero,
        Fixed("60"),
        "How long a vanished worker's part of the plan waits for it before it moves elsewhere.",
    ),
    key(
        "worker.id",
        Text,
        Computed(
            "worker.host, and cache.location when that is not the standard one",
            |_| String::new(),
        ),
        "The worker's name in the metastore; keep it across restarts, so that its cache is reused.",
    ),
    key(
        "worker.host",
        Text,
        Computed("the host's name", |m| m.hostname.clone()),
        "The host name that others reach this worker by.",
    ),
    key(
        "worker.fill.concurrency",
        Integer { min: 1, max: 1024 },
        Computed("twice the processors, at least 4", |m| {
            (m.processors * 2).clamp(4, 1024).to_string()
        }),
        "How many row groups a worker fetches and decodes at a time.",
    ),
    key(
        "worker.fill.memory",
        Bytes { min: 16 * MIB },
        Computed("an eighth of the memory, at most 1 GiB", |m| {
            (m.memory_bytes / 8).clamp(64 * MIB, 1 << 30).to_string()
        }),
        "How many bytes of chunks being fetched and decoded a worker holds at a time.",
    ),
    key(
        "control.address",
        Address,
        Fixed("127.0.0.1:0"),
        "Where workers and coordinator serve gRPC for control; port 0 takes a free one.",
    ),
    key(
        "control.insecure",
        Bool,
        Fixed("false"),
        "The consent to serve control or HTTP in plain text on an address other than loopback.",
    ),
    key(
        "http.address",
        Address,
        Fixed("127.0.0.1:0"),
        "Where workers and coordinator serve /metrics and /healthz; port 0 takes a free one.",
    ),
    key(
        "transfer.address",
        Addresses,
        Fixed("127.0.0.1:0"),
        "Where a worker's memory can be read by others; several addresses are several ways to it, the preferred one first.",
    ),
    key(
        "transfer.tls.ca",
        Path,
        Unset,
        "The certificate authority (PEM) that signed for all nodes; needed beyond loopback.",
    ),
    key(
        "transfer.tls.cert",
        Path,
        Unset,
        "This node's certificate (PEM), with the role stoa://role/node or stoa://role/reader among its names.",
    ),
    key(
        "transfer.tls.key",
        Path,
        Unset,
        "The private key (PEM) of transfer.tls.cert.",
    ),
    key(
        "transfer.insecure",
        Bool,
        Fixed("false"),
        "The consent to send cached columns in plain text over an address other than loopback.",
    ),
    key(
        "transfer.rdma.enabled",
        Bool,
        Fixed("false"),
        "The consent to read other workers' memory over RDMA, where both ends have a device and were built with the cargo feature rdma; what travels that way is not encrypted.",
    ),
    key(
        "transfer.deadline",
        Span,
        Fixed("5s"),
        "How long another worker may take to answer before the origin is asked instead.",
    ),
    key(
        "origin.inflight.size",
        Bytes { min: MIB },
        Fixed("256MiB"),
        "How many bytes a process requests from object stores at a time.",
    ),
    key(
        "origin.coalesce.gap",
        Bytes { min: 0 },
        Fixed("1MiB"),
        "Ranges of one object this close together become one request.",
    ),
    key(
        "origin.request.size",
        Bytes { min: 64 * KIB },
        Fixed("16MiB"),
        "The largest single request that coalescing makes.",
    ),
    key(
        "origin.attempts",
        Integer { min: 1, max: 100 },
        Fixed("10"),
        "How often a request to an object store is tried before it fails; the waits between grow to 10 s, and a store's Retry-After is heeded up to 30 s.",
    ),
    key(
        "origin.retry.time",
        Span,
        Fixed("60s"),
        "How long a request to an object store is tried again, waits included; no attempt begins later.",
    ),
    key(
        "origin.timeout",
        Span,
        Fixed("30s"),
        "How long one attempt of a request to an object store may take.",
    ),
    key(
        "log.format",
        Choice(&["human", "json"]),
        Fixed("human"),
        "The form of log lines on stderr.",
    ),
    key(
        "log.level",
        Text,
        Fixed("auto"),
        "What is logged: a level, or directives as in RUST_LOG; `auto` is info for daemons, warn for commands.",
    ),
];

/// What may stand under `store."<root URL>".`: how to reach one object store.
pub const STORE_OPTIONS: &[Key] = &[
    key(
        "endpoint",
        Text,
        Unset,
        "The URL of an S3-compatible (or other) server.",
    ),
    key("region", Text, Unset, "The region, for S3."),
    key(
        "allow_http",
        Bool,
        Unset,
        "Whether plain http:// endpoints are allowed.",
    ),
    key(
        "virtual_hosted_style_request",
        Bool,
        Unset,
        "Whether the bucket is part of the host name, for S3.",
    ),
    key(
        "skip_signature",
        Bool,
        Unset,
        "Whether to read anonymously.",
    ),
    key("access_key_id", Secret, Unset, "The access key, for S3."),
    key(
        "secret_access_key",
        Secret,
        Unset,
        "The secret of the access key, for S3.",
    ),
    key("session_token", Secret, Unset, "A session token, for S3."),
    key(
        "account_name",
        Text,
        Unset,
        "The storage account, for Azure.",
    ),
    key(
        "account_key",
        Secret,
        Unset,
        "The key of the storage account, for Azure.",
    ),
    key(
        "service_account",
        Path,
        Unset,
        "The file with the service account, for Google Cloud.",
    ),
];

/// A key that Pixels knows and that has no meaning here, with what to do instead.
#[derive(Debug)]
pub struct LegacyKey {
    /// The dotted name.
    pub name: &'static str,
    /// The key that took over its meaning, if any; its value is then used.
    pub renamed_to: Option<&'static str>,
    /// Why it is not needed.
    pub reason: &'static str,
}

/// The keys of Pixels that are accepted with one warning.
pub const LEGACY_KEYS: &[LegacyKey] = &[
    LegacyKey {
        name: "index.location",
        renamed_to: None,
        reason: "the index lies beside the segments in cache.location",
    },
    LegacyKey {
        name: "index.size",
        renamed_to: None,
        reason: "the index sizes itself",
    },
    LegacyKey {
        name: "cache.read.direct",
        renamed_to: None,
        reason: "cached columns are always read in place",
    },
    LegacyKey {
        name: "cache.schema",
        renamed_to: None,
        reason: "any number of tables is cached; `stoa layout create` names them",
    },
    LegacyKey {
        name: "cache.table",
        renamed_to: None,
        reason: "any number of tables is cached; `stoa layout create` names them",
    },
    LegacyKey {
        name: "lease.ttl.seconds",
        renamed_to: Some("heartbeat.lease.ttl.seconds"),
        reason: "it is called heartbeat.lease.ttl.seconds",
    },
];

/// The known key whose name is closest to `name`.
pub(super) fn nearest(name: &str) -> &'static str {
    nearest_of(name, KEYS.iter().map(|key| key.name))
}

/// The store option whose name is closest to `name`.
pub(super) fn nearest_store_option(name: &str) -> &'static str {
    nearest_of(name, STORE_OPTIONS.iter().map(|key| key.name))
}

fn nearest_of(name: &str, known: impl Iterator<Item = &'static str>) -> &'static str {
    let lower = name.to_lowercase();
    let mut best = ("", f64::NEG_INFINITY);
    for candidate in known {
        let score = strsim::normalized_damerau_levenshtein(&lower, candidate);
        if score > best.1 {
            best = (candidate, score);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_is_a_table_above_another() {
        // TOML cannot hold `a = 1` and `a.b = 2` at once.
        for a in KEYS {
            for b in KEYS {
                assert!(
                    !b.name.starts_with(&format!("{}.", a.name)),
                    "{} lies under {}",
                    b.name,
                    a.name
                );
            }
        }
    }

    #[test]
    fn names_are_unique_and_legacy_ones_are_free() {
        let mut names: Vec<_> = KEYS.iter().map(|key| key.name).collect();
        names.extend(LEGACY_KEYS.iter().map(|key| key.name));
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        for renamed in LEGACY_KEYS.iter().filter_map(|key| key.renamed_to) {
            assert!(KEYS.iter().any(|key| key.name == renamed), "{renamed}");
        }
    }

    #[test]
    fn every_key_has_a_dot_so_that_its_variable_has_a_double_underscore() {
        for key in KEYS {
            assert!(key.variable().contains("__"), "{}", key.name);
        }
    }

    #[test]
    fn the_nearest_key_forgives_typing() {
        assert_eq!(nearest("cache.sise"), "cache.size");
        assert_eq!(nearest("cache.lokation"), "cache.location");
        assert_eq!(nearest("ETCD.host"), "etcd.hosts");
        assert_eq!(
            nearest("heartbeat.ttl.seconds"),
            "heartbeat.lease.ttl.seconds"
        );
        assert_eq!(nearest_store_option("endpiont"), "endpoint");
    }
}
