//! The names of all keys. `docs/metastore.md` tells who writes each of them, and when.
//!
//! Fields are percent-encoded, so that names may hold any characters and never a `/` or `:` that
//! is read as a separator. Every prefix ends in a separator: version 1 is no prefix of version 10,
//! nor `tpch.line` of `tpch.lineitem`.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

/// What stays as it is in a field: the unreserved characters of RFC 3986.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// The inbox: `etcdctl put layout_version tpch.lineitem:1` asks for a load.
pub const INBOX: &str = "layout_version";
/// How far the coordinator has read the inbox.
pub const INBOX_HANDLED: &str = "inbox/handled";
/// The one coordinator.
pub const ELECTION: &str = "election/coordinator";

/// What the elected coordinator could not do; it vanishes with its office.
pub const COORDINATOR_STATE: &str = "coordinator_state";

/// All of `layout_version/{table}`.
pub const LAYOUT_VERSION_PREFIX: &str = "layout_version/";
/// All of `layout/{table}/{version}[/{part}]`.
pub const LAYOUT_PREFIX: &str = "layout/";
/// All of `layout_head/{table}`.
pub const LAYOUT_HEAD_PREFIX: &str = "layout_head/";
/// All of `cache_version/{table}`.
pub const CACHE_VERSION_PREFIX: &str = "cache_version/";
/// All of `cache_location/{table}:{version}/{worker}/{plan}.{part}`.
pub const CACHE_LOCATION_PREFIX: &str = "cache_location/";
/// All of `worker/{id}`.
pub const WORKER_PREFIX: &str = "worker/";
/// All of `worker_state/{id}`.
pub const WORKER_STATE_PREFIX: &str = "worker_state/";
/// All of `rejection/{revision}`.
pub const REJECTION_PREFIX: &str = "rejection/";
/// All of `pin/{worker}`.
pub const PIN_PREFIX: &str = "pin/";

/// All of `plan_basis/{table}`: what the plan in force of a table was made of, written by the
/// coordinator after the plan. Safe to delete.
pub const PLAN_BASIS_PREFIX: &str = "plan_basis/";
/// Prefixes that name what was asked for and planned; [`crate::Records::reset`] with these forgets
/// what is cached but keeps layouts and live workers.
pub const PLAN_PREFIXES: &[&str] = &[
    PLAN_BASIS_PREFIX,
    LAYOUT_VERSION_PREFIX,
    INBOX,
    CACHE_VERSION_PREFIX,
    CACHE_LOCATION_PREFIX,
    REJECTION_PREFIX,
];
/// Every prefix that holds state which outlives processes: plans, layouts and pins, but neither
/// the election nor the registrations of live workers.
pub const ALL_PREFIXES: &[&str] = &[
    LAYOUT_VERSION_PREFIX,
    INBOX,
    CACHE_VERSION_PREFIX,
    CACHE_LOCATION_PREFIX,
    REJECTION_PREFIX,
    PLAN_BASIS_PREFIX,
    LAYOUT_PREFIX,
    LAYOUT_HEAD_PREFIX,
    PIN_PREFIX,
];

/// A field as it stands in a key.
pub fn encode(field: &str) -> String {
    utf8_percent_encode(field, ESCAPED).to_string()
}

/// The field that [`encode`] gave this text for; `None` for any other text.
pub fn decode(text: &str) -> Option<String> {
    let field = percent_decode_str(text).decode_utf8().ok()?.into_owned();
    (encode(&field) == text).then_some(field)
}

/// What is wanted of a table.
pub fn layout_version(table: &str) -> String {
    format!("{LAYOUT_VERSION_PREFIX}{}", encode(table))
}

/// A layout document, or the pointer to its parts.
pub fn layout(table: &str, version: u64) -> String {
    format!("{LAYOUT_PREFIX}{}/{version}", encode(table))
}

/// One part of a large layout document; the digest keeps concurrent publishers apart.
pub fn layout_part(table: &str, version: u64, digest: &str, part: u32) -> String {
    format!("{}/{digest}.{part}", layout(table, version))
}

/// All layout documents of a table.
pub fn layouts_of(table: &str) -> String {
    format!("{LAYOUT_PREFIX}{}/", encode(table))
}

/// The newest published version of a table.
pub fn layout_head(table: &str) -> String {
    format!("{LAYOUT_HEAD_PREFIX}{}", encode(table))
}

/// The plan in force of a table.
pub fn cache_version(table: &str) -> String {
    format!("{CACHE_VERSION_PREFIX}{}", encode(table))
}

/// One part of one worker's plan.
pub fn cache_location(table: &str, version: u64, worker: &str, plan: u64, part: u32) -> String {
    format!(
        "{CACHE_LOCATION_PREFIX}{}:{version}/{}/{plan}.{part}",
        encode(table),
        encode(worker)
    )
}

/// All parts of all plans of a table.
pub fn cache_locations_of(table: &str) -> String {
    format!("{CACHE_LOCATION_PREFIX}{}:", encode(table))
}

/// That a worker lives.
pub fn worker(id: &str) -> String {
    format!("{WORKER_PREFIX}{}", encode(id))
}

/// What a worker reports.
pub fn worker_state(id: &str) -> String {
    format!("{WORKER_STATE_PREFIX}{}", encode(id))
}

/// A refused request; the width keeps them sorted by age.
pub fn rejection(revision: i64) -> String {
    format!("{REJECTION_PREFIX}{revision:020}")
}

/// That a worker's memory is to be locked.
pub fn pin(worker: &str) -> String {
    format!("{PIN_PREFIX}{}", encode(worker))
}

/// What a key names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// [`INBOX`]
    Inbox,
    /// [`INBOX_HANDLED`]
    InboxHandled,
    /// [`ELECTION`]
    Election,
    /// [`layout_version`]
    LayoutVersion {
        /// The table.
        table: String,
    },
    /// [`layout`]
    Layout {
        /// The table.
        table: String,
        /// The version.
        version: u64,
    },
    /// [`layout_part`]
    LayoutPart {
        /// The table.
        table: String,
        /// The version.
        version: u64,
        /// The document's digest.
        digest: String,
        /// The part's number, from 0.
        part: u32,
    },
    /// [`layout_head`]
    LayoutHead {
        /// The table.
        table: String,
    },
    /// [`cache_version`]
    CacheVersion {
        /// The table.
        table: String,
    },
    /// [`cache_location`]
    CacheLocation {
        /// The table.
        table: String,
        /// The layout version.
        version: u64,
        /// The worker.
        worker: String,
        /// The plan's number.
        plan: u64,
        /// The part's number, from 0.
        part: u32,
    },
    /// [`worker`]
    Worker {
        /// The worker.
        id: String,
    },
    /// [`worker_state`]
    WorkerState {
        /// The worker.
        id: String,
    },
    /// [`rejection`]
    Rejection {
        /// The revision of the refused request.
        revision: i64,
    },
    /// [`pin`]
    Pin {
        /// The worker.
        worker: String,
    },
}

/// Reads a key; `None` if it is none of ours. The inverse of the functions of this module.
pub fn parse(key: &str) -> Option<Key> {
    match key {
        INBOX => return Some(Key::Inbox),
        INBOX_HANDLED => return Some(Key::InboxHandled),
        ELECTION => return Some(Key::Election),
        _ => {}
    }
    let (kind, rest) = key.split_once('/')?;
    Some(match kind {
        "layout_version" => Key::LayoutVersion {
            table: decode(rest)?,
        },
        "layout_head" => Key::LayoutHead {
            table: decode(rest)?,
        },
        "cache_version" => Key::CacheVersion {
            table: decode(rest)?,
        },
        "worker" => Key::Worker { id: decode(rest)? },
        "worker_state" => Key::WorkerState { id: decode(rest)? },
        "pin" => Key::Pin {
            worker: decode(rest)?,
        },
        "rejection" => {
            let revision = rest.parse().ok()?;
            (rejection(revision) == key).then_some(Key::Rejection { revision })?
        }
        "layout" => {
            let mut fields = rest.splitn(3, '/');
            let table = decode(fields.next()?)?;
            let version = number(fields.next()?)?;
            match fields.next() {
                None => Key::Layout { table, version },
                Some(last) => {
                    let (digest, part) = last.split_once('.')?;
                    Key::LayoutPart {
                        table,
                        version,
                        digest: hex(digest)?,
                        part: number(part)?,
                    }
                }
            }
        }
        "cache_location" => {
            let mut fields = rest.split('/');
            let (table, version) = fields.next()?.split_once(':')?;
            let worker = fields.next()?;
            let (plan, part) = fields.next()?.split_once('.')?;
            if fields.next().is_some() {
                return None;
            }
            Key::CacheLocation {
                table: decode(table)?,
                version: number(version)?,
                worker: decode(worker)?,
                plan: number(plan)?,
                part: number(part)?,
            }
        }
        _ => return None,
    })
}

/// A number in its only spelling: no sign, no leading zero.
fn number<T: std::str::FromStr + ToString>(text: &str) -> Option<T> {
    let value: T = text.parse().ok()?;
    (value.to_string() == text).then_some(value)
}

fn hex(text: &str) -> Option<String> {
    let plain = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    plain.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn plain_names_stay_readable() {
        assert_eq!(
            layout_version("tpch.lineitem"),
            "layout_version/tpch.lineitem"
        );
        assert_eq!(
            cache_location("tpch.lineitem", 1, "node_1", 7, 0),
            "cache_location/tpch.lineitem:1/node_1/7.0"
        );
        assert_eq!(worker("a/b:c%"), "worker/a%2Fb%3Ac%25");
        assert_eq!(rejection(42), "rejection/00000000000000000042");
    }

    #[test]
    fn version_1_is_no_prefix_of_version_10() {
        let one = format!("{}/", layout("a.b", 1));
        assert!(!layout("a.b", 10).starts_with(&one));
        assert!(!layout_part("a.b", 10, "0123456789abcdef", 0).starts_with(&one));
        // Pixels' `cache_location_1` also matched version 10, and hosts with `_` broke it.
        assert!(!cache_location("a.b", 10, "h_1", 1, 0).starts_with("cache_location/a.b:1/"));
        assert!(!cache_location("a.bc", 1, "h", 1, 0).starts_with(&cache_locations_of("a.b")));
        assert!(!layout("tpch.lineitem", 1).starts_with(&layouts_of("tpch.line")));
    }

    #[test]
    fn foreign_spellings_are_not_ours() {
        for key in [
            "",
            "layout_version/a%2fb",
            "layout/a.b/01",
            "layout/a.b/+1",
            "layout/a.b/1/xyz.0",
            "cache_location/a.b:1/w/1",
            "cache_location/a.b:1/w/1.0/x",
            "rejection/42",
            "worker/%FF",
            "other/x",
            "layout/a.b",
            "worker/a/b",
        ] {
            assert_eq!(parse(key), None, "{key}");
        }
    }

    proptest! {
        #[test]
        fn any_field_reads_back(field in ".*") {
            let text = encode(&field);
            prop_assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~%".contains(&b)));
            prop_assert_eq!(decode(&text), Some(field));
        }

        #[test]
        fn any_key_reads_back(table in ".*", id in ".*", version in 1u64.., plan: u64, part: u32, revision in 0i64..) {
            let digest = "00ff00ff00ff00ff";
            let cases = [
                (layout_version(&table), Key::LayoutVersion { table: table.clone() }),
                (layout(&table, version), Key::Layout { table: table.clone(), version }),
                (layout_part(&table, version, digest, part), Key::LayoutPart { table: table.clone(), version, digest: digest.into(), part }),
                (layout_head(&table), Key::LayoutHead { table: table.clone() }),
                (cache_version(&table), Key::CacheVersion { table: table.clone() }),
                (cache_location(&table, version, &id, plan, part), Key::CacheLocation { table: table.clone(), version, worker: id.clone(), plan, part }),
                (worker(&id), Key::Worker { id: id.clone() }),
                (worker_state(&id), Key::WorkerState { id: id.clone() }),
                (rejection(revision), Key::Rejection { revision }),
                (pin(&id), Key::Pin { worker: id.clone() }),
            ];
            for (text, key) in cases {
                prop_assert_eq!(parse(&text), Some(key), "{}", text);
            }
            for (text, key) in [(INBOX, Key::Inbox), (INBOX_HANDLED, Key::InboxHandled), (ELECTION, Key::Election)] {
                prop_assert_eq!(parse(text), Some(key));
            }
        }

        #[test]
        fn distinct_fields_never_share_a_prefix(a in ".*", b in ".*") {
            prop_assume!(a != b);
            prop_assert!(!layouts_of(&a).starts_with(&layouts_of(&b)));
            prop_assert!(!cache_locations_of(&a).starts_with(&cache_locations_of(&b)));
        }

        #[test]
        fn parsing_never_panics(key in ".*") {
            let _ = parse(&key);
        }
    }
}
