//! `docs/metastore.md` cannot drift: every key has a section, every example is read by the code.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use stoa_metastore::{
    CacheVersion, CoordinatorState, ElectionRecord, LoadRequest, PinRecord, PlanPart, Rejection,
    WorkerRecord, WorkerState, keys,
};

const PAGE: &str = include_str!("../../docs/metastore.md");

/// The fenced blocks of each `### \`key\`` section, by key.
fn examples() -> BTreeMap<&'static str, Vec<String>> {
    let mut sections = BTreeMap::new();
    for section in PAGE.split("\n### `").skip(1) {
        let (key, body) = section.split_once('`').unwrap();
        let body = body.split("\n## ").next().unwrap();
        let blocks = body.split("```").skip(1).step_by(2);
        let texts = blocks
            .map(|block| block.split_once('\n').unwrap().1.to_owned())
            .collect();
        sections.insert(key, texts);
    }
    sections
}

/// Reads an example as its type and writes it again: nothing may be lost.
fn same<T: serde::Serialize + serde::de::DeserializeOwned>(example: &str) {
    let written: Value = serde_json::from_str(example).unwrap();
    let read: T = serde_json::from_str(example).unwrap();
    assert_eq!(serde_json::to_value(read).unwrap(), written);
}

#[test]
fn every_key_is_documented_with_an_example_that_reads_back() {
    let examples = examples();
    let example = |key: &str| {
        examples
            .get(key)
            .unwrap_or_else(|| panic!("no section for {key}"))[0]
            .clone()
    };
    same::<CacheVersion>(&example("cache_version/{table}"));
    same::<PlanPart>(&example(
        "cache_location/{table}:{version}/{worker}/{plan}.{part}",
    ));
    same::<WorkerRecord>(&example("worker/{id}"));
    same::<WorkerState>(&example("worker_state/{id}"));
    same::<PinRecord>(&example("pin/{worker}"));
    same::<Rejection>(&example("rejection/{revision}"));
    same::<ElectionRecord>(&example("election/coordinator"));
    same::<CoordinatorState>(&example("coordinator_state"));
    let lines = example("layout_version/{table}");
    for line in lines.lines() {
        assert_eq!(line.parse::<LoadRequest>().unwrap().to_string(), line);
    }
    assert!(
        example("layout_version")
            .trim()
            .parse::<LoadRequest>()
            .is_ok()
    );
    for key in [
        "layout/{table}/{version}",
        "layout_head/{table}",
        "inbox/handled",
    ] {
        serde_json::from_str::<Value>(&example(key)).unwrap();
    }
    // And the other way round: each key the code can make is a row of the table.
    let made = [
        keys::INBOX.to_owned(),
        keys::INBOX_HANDLED.to_owned(),
        keys::COORDINATOR_STATE.to_owned(),
        keys::ELECTION.to_owned(),
        keys::layout_version("T"),
        keys::layout("T", 7),
        keys::layout_head("T"),
        keys::cache_version("T"),
        keys::cache_location("T", 7, "W", 8, 9),
        keys::worker("W"),
        keys::worker_state("W"),
        keys::rejection(7),
        keys::pin("W"),
    ];
    for key in made {
        let kind = key.split('/').next().unwrap();
        let row = PAGE
            .lines()
            .any(|line| line.starts_with(&format!("| `{kind}")));
        assert!(row, "no row for {key}");
    }
}

#[test]
fn the_limits_on_the_page_are_those_of_the_code() {
    assert_eq!(stoa_metastore::PART_BYTES_MAX, 512 << 10);
    assert_eq!(stoa_metastore::TXN_BYTES_MAX, 1 << 20);
    assert_eq!(stoa_metastore::TXN_OPS_MAX, 128);
    assert_eq!(stoa_metastore::REJECTIONS_MAX, 64);
    for text in ["512 KiB", "1 MiB and 128 operations", "when 64 newer ones"] {
        assert!(PAGE.contains(text), "{text}");
    }
    let example = json!({"parts": 1, "digest": stoa_metastore::digest(&["x"])});
    serde_json::from_value::<stoa_metastore::PartPointer>(example).unwrap();
}

/// `docs/owner.md` cannot drift either: its bounds are those of the code.
#[test]
fn the_bounds_of_the_owners_socket_are_the_documented_ones() {
    use stoa_metastore::shared::{
        ANSWER_BYTES_MAX, CALL_DEADLINE, CONNECT_DEADLINE, CONNECTIONS_MAX, LIST_PART_BYTES,
        PATIENCE, PROTOCOL, REQUEST_BYTES_MAX, REQUESTS_IN_FLIGHT_MAX, SOCKET_MODE, SOCKET_NAME,
    };
    let page = include_str!("../../docs/owner.md");
    let proto = include_str!("../proto/owner.proto");
    for row in [
        format!("| connections | {CONNECTIONS_MAX} |"),
        format!("| requests in flight | {REQUESTS_IN_FLIGHT_MAX} a connection |"),
        format!("| size of a request | {REQUEST_BYTES_MAX} bytes |"),
        format!("| size of a message of an answer | {ANSWER_BYTES_MAX} bytes |"),
        format!("| part of a listing | {LIST_PART_BYTES} bytes |"),
        format!("| first answer | {} s |", CONNECT_DEADLINE.as_secs()),
        format!(
            "| any other answer, and each part of a listing | {} s |",
            CALL_DEADLINE.as_secs()
        ),
        format!("| patience | {} s |", PATIENCE.as_secs()),
        format!("`{SOCKET_NAME}` in the state directory"),
        format!("mode {SOCKET_MODE:04o}."),
        format!("the protocol's number is {PROTOCOL}."),
        format!("`stoa.owner.v{PROTOCOL}`"),
    ] {
        assert!(page.contains(&row), "docs/owner.md does not say {row:?}");
    }
    let package = format!("package stoa.owner.v{PROTOCOL};");
    assert!(proto.contains(&package));
    for line in proto.lines() {
        if let Some(call) = line.trim().strip_prefix("rpc ") {
            let call = call.split('(').next().unwrap();
            assert!(
                page.contains(&format!("`{call}`")),
                "docs/owner.md misses {call}"
            );
        }
    }
}
