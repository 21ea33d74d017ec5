//! From entries of the metastore to what decisions are made of. One broken value must not hide
//! the others.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use stoa_layout::TableName;
use stoa_metastore::keys::{self, Key};
use stoa_metastore::{CacheVersion, Entry, LoadRequest, WorkerRecord, WorkerState};

use crate::decide::{Requested, Unreadable};

/// The load requests by table, and what stands in their place and is none.
pub(crate) fn requests(entries: &[Entry]) -> (BTreeMap<String, Requested>, Vec<Unreadable>) {
    let mut requests = BTreeMap::new();
    let mut unreadable = Vec::new();
    for entry in entries {
        let Some(Key::LayoutVersion { table }) = keys::parse(&entry.key) else {
            continue;
        };
        let text = String::from_utf8_lossy(&entry.value).into_owned();
        let revision = entry.mod_revision;
        let reason = match text.parse::<LoadRequest>() {
            Ok(request) if request.table == table => {
                requests.insert(table, Requested { request, revision });
                continue;
            }
            Ok(request) => format!(
                "the key {} is for {table}, not for {}",
                entry.key, request.table
            ),
            Err(error) => error.to_string(),
        };
        unreadable.push(Unreadable {
            text,
            reason,
            revision,
        });
    }
    (requests, unreadable)
}

/// The plans in force by table.
pub(crate) fn plans(entries: &[Entry]) -> BTreeMap<String, CacheVersion> {
    let plans = entries
        .iter()
        .filter_map(|entry| match keys::parse(&entry.key) {
            Some(Key::CacheVersion { table }) => Some((table, decode::<CacheVersion>(entry)?)),
            _ => None,
        });
    plans.collect()
}

/// The live workers by id.
pub(crate) fn workers(entries: &[Entry]) -> BTreeMap<String, WorkerRecord> {
    let workers = entries
        .iter()
        .filter_map(|entry| match keys::parse(&entry.key) {
            Some(Key::Worker { id }) => Some((id, decode::<WorkerRecord>(entry)?)),
            _ => None,
        });
    workers.collect()
}

/// What the live workers report, by id.
pub(crate) fn states(entries: &[Entry]) -> BTreeMap<String, WorkerState> {
    let states = entries
        .iter()
        .filter_map(|entry| match keys::parse(&entry.key) {
            Some(Key::WorkerState { id }) => Some((id, decode::<WorkerState>(entry)?)),
            _ => None,
        });
    states.collect()
}

fn decode<T: DeserializeOwned>(entry: &Entry) -> Option<T> {
    serde_json::from_slice(&entry.value)
        .inspect_err(
            |error| tracing::warn!(key = entry.key, %error, "a metastore entry is not readable"),
        )
        .ok()
}

/// A request as it is written into the inbox. A table without schema is in `public`, as everywhere.
pub(crate) fn parse_request(text: &str) -> Result<LoadRequest, String> {
    let request: LoadRequest = text
        .parse()
        .map_err(|error: stoa_metastore::Error| error.to_string())?;
    let table = TableName::parse(&request.table).map_err(|error| error.to_string())?;
    Ok(LoadRequest {
        table: table.to_string(),
        ..request
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: &str) -> Entry {
        Entry {
            key: key.into(),
            value: value.into(),
            create_revision: 1,
            mod_revision: 7,
            lease: None,
        }
    }

    #[test]
    fn requests_are_told_from_nonsense() {
        let (requests, unreadable) = requests(&[
            entry("layout_version/tpch.orders", "tpch.orders:3"),
            entry("layout_version/tpch.part", "tpch.part:2 unloaded"),
            entry("layout_version/tpch.nation", "tpch.region:1"),
            entry("layout_version/tpch.region", "what"),
            entry("something/else", "tpch.region:1"),
        ]);
        assert_eq!(requests.len(), 2);
        assert_eq!(requests["tpch.orders"].request.version, 3);
        assert!(requests["tpch.part"].request.unloaded);
        let reasons: Vec<&str> = unreadable.iter().map(|u| u.reason.as_str()).collect();
        assert_eq!(
            reasons[0],
            "the key layout_version/tpch.nation is for tpch.nation, not for tpch.region"
        );
        assert!(
            reasons[1].starts_with("invalid table version `what`"),
            "{}",
            reasons[1]
        );
    }

    #[test]
    fn a_broken_value_does_not_hide_the_others() {
        let plans = plans(&[
            entry("cache_version/a.b", "{"),
            entry("cache_version/a.c", r#"{"table_version":"a.c:1","plan":4}"#),
        ]);
        assert_eq!(plans.len(), 1);
        assert_eq!(plans["a.c"].plan, 4);
    }

    #[test]
    fn inbox_requests_are_normalised() {
        assert_eq!(
            parse_request("lineitem:2").unwrap().table_version(),
            "public.lineitem:2"
        );
        assert_eq!(
            parse_request("tpch.lineitem:2").unwrap().table_version(),
            "tpch.lineitem:2"
        );
        assert!(parse_request("tpch.lineitem:2 unloaded").unwrap().unloaded);
        assert!(
            parse_request("tpch.lineitem")
                .unwrap_err()
                .starts_with("invalid table version `tpch.lineitem`")
        );
        assert!(
            parse_request(".x:1")
                .unwrap_err()
                .starts_with("invalid table name")
        );
    }
}
