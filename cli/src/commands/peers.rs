//! `stoa peers`: how workers reach each other's memory.

use std::time::Duration;

use serde_json::{Value, json};
use stoa_control::{PeerPath, PeersReport, WorkerClient};
use stoa_metastore::WorkerRecord;

use super::pin::choose;
use super::print_json;
use crate::args::PeersArgs;
use crate::config::format_bytes;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::table::{Align, TextTable};

/// What one worker says, or why it says nothing.
type Said = (String, std::result::Result<PeersReport, String>);

/// Asks the workers, and shows what they say.
pub async fn peers(args: PeersArgs, context: &Context) -> Result<()> {
    if context.is_embedded() {
        return Err(Error::Usage(
            "embedded there is one worker, which has no peers; give --etcd".into(),
        ));
    }
    let records = context.records().await?;
    let live = records.workers().await?;
    let chosen = choose(&args.workers, &live)?;
    let mut said: Vec<Said> = Vec::new();
    for worker in chosen.live() {
        said.push((worker.id.clone(), ask(worker, context).await));
    }
    for id in chosen.absent() {
        said.push(((*id).to_owned(), Err("it is not alive".into())));
    }
    let apart = unreachable_by_others(&live);
    if args.json {
        print_json(&as_json(&said, &apart));
    } else {
        print!("{}", as_text(&said, &apart));
    }
    Ok(())
}

/// Which workers serve their memory to nobody but their own host although there are others: with
/// the default `transfer.address` all of them do.
pub(super) fn unreachable_by_others(workers: &[WorkerRecord]) -> Vec<String> {
    let apart = |worker: &&WorkerRecord| {
        let serves = !worker.addresses.transfer.is_empty();
        let mut hosts = workers.iter().map(|other| &other.host);
        serves && hosts.any(|host| *host != worker.host && worker.transfer_from(host).is_empty())
    };
    workers
        .iter()
        .filter(apart)
        .map(|worker| {
            format!(
                "worker {}: its memory is served on loopback only ({}), so workers and queries of \
                 other hosts read the origin instead; set transfer.address there",
                worker.id,
                worker.addresses.transfer.join(", ")
            )
        })
        .collect()
}

async fn ask(worker: &WorkerRecord, context: &Context) -> std::result::Result<PeersReport, String> {
    let Some(address) = &worker.addresses.control else {
        return Err("it serves no control address".into());
    };
    let client = WorkerClient::new(address, &context.control_clients());
    let client = client.map_err(|error| error.to_string())?;
    client.peers().await.map_err(|error| error.to_string())
}

fn failures(path: &PeerPath) -> u64 {
    path.errors.values().sum()
}

fn as_json(said: &[Said], apart: &[String]) -> Value {
    let worker = |(id, said): &Said| match said {
        Ok(report) => json!({"worker": id, "addresses": report.addresses, "paths": report.paths}),
        Err(reason) => json!({"worker": id, "error": reason}),
    };
    json!({"workers": said.iter().map(worker).collect::<Vec<_>>(), "problems": apart})
}

fn as_text(said: &[Said], apart: &[String]) -> String {
    let mut table = TextTable::new([
        ("worker", Align::Left),
        ("peer", Align::Left),
        ("address", Align::Left),
        ("by", Align::Left),
        ("reads", Align::Right),
        ("bytes", Align::Right),
        ("latency", Align::Right),
        ("bandwidth", Align::Right),
        ("failures", Align::Right),
        ("state", Align::Left),
    ]);
    let mut notes = String::new();
    for (id, said) in said {
        let report = match said {
            Ok(report) => report,
            Err(reason) => {
                notes.push_str(&format!("worker {id}: {reason}\n"));
                continue;
            }
        };
        if report.addresses.is_empty() {
            notes.push_str(&format!("worker {id}: its memory is not served\n"));
        }
        for path in &report.paths {
            table.row([
                id.clone(),
                path.peer.clone(),
                path.address.clone(),
                path.transport.clone(),
                path.reads.to_string(),
                format_bytes(path.bytes),
                match path.latency_us {
                    0 => "-".into(),
                    micros => format!("{:?}", Duration::from_micros(micros)),
                },
                match path.bytes_per_second {
                    rate if rate > 0.0 => format!("{}/s", format_bytes(rate as u64)),
                    _ => "-".into(),
                },
                failures(path).to_string(),
                match path.left_for_ms {
                    0 if path.connections > 0 => "connected".into(),
                    0 => "idle".to_string(),
                    left => format!("left for {left} ms: {}", path.last_error),
                },
            ]);
        }
    }
    let mut text = match table.is_empty() {
        true => "no worker has reached another one yet\n".to_string(),
        false => table.to_string(),
    };
    text.push_str(&notes);
    for problem in apart {
        text.push_str(&format!("{problem}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said() -> Vec<Said> {
        let good = PeerPath {
            peer: "b".into(),
            address: "10.0.0.2:7420".into(),
            transport: "rdma".into(),
            connections: 2,
            reads: 120,
            bytes: 300 << 20,
            calls: 9,
            latency_us: 180,
            bytes_per_second: (2u64 << 30) as f64,
            ..PeerPath::default()
        };
        let beside = PeerPath {
            peer: "b".into(),
            address: "10.0.0.2:7420".into(),
            transport: "tcp".into(),
            ..PeerPath::default()
        };
        let left = PeerPath {
            peer: "c".into(),
            address: "10.0.0.3:7420".into(),
            transport: "tcp".into(),
            errors: [("closed".to_string(), 2), ("deadline".to_string(), 1)].into(),
            last_error: "c did not answer within 5000 ms".into(),
            left_for_ms: 400,
            ..PeerPath::default()
        };
        let report = PeersReport {
            addresses: vec!["10.0.0.1:7420".into()],
            paths: vec![good, beside, left],
        };
        vec![
            ("a".into(), Ok(report)),
            ("d".into(), Ok(PeersReport::default())),
            ("e".into(), Err("it is not alive".into())),
        ]
    }

    #[test]
    fn paths_read_well() {
        insta::assert_snapshot!(as_text(&said(), &[]), @"
        worker  peer  address        by    reads    bytes  latency  bandwidth  failures  state
        a       b     10.0.0.2:7420  rdma    120  300 MiB    180µs    2 GiB/s         0  connected
        a       b     10.0.0.2:7420  tcp       0      0 B        -          -         0  idle
        a       c     10.0.0.3:7420  tcp       0      0 B        -          -         3  left for 400 ms: c did not answer within 5000 ms
        worker d: its memory is not served
        worker e: it is not alive
        ");
        assert_eq!(as_text(&[], &[]), "no worker has reached another one yet\n");
    }

    #[test]
    fn scripts_get_everything() {
        let value = as_json(&said(), &[]);
        assert_eq!(value["workers"][0]["paths"][0]["transport"], "rdma");
        assert_eq!(value["workers"][0]["paths"][2]["errors"]["closed"], 2);
        assert_eq!(value["workers"][0]["addresses"][0], "10.0.0.1:7420");
        assert_eq!(value["workers"][2]["error"], "it is not alive");
    }

    /// What README's cluster does on two real hosts with the defaults.
    #[test]
    fn workers_that_nobody_else_can_read_are_named() {
        let worker = |id: &str, host: &str, transfer: &[&str]| WorkerRecord {
            id: id.into(),
            host: host.into(),
            addresses: stoa_metastore::WorkerAddresses {
                transfer: transfer.iter().map(|text| (*text).to_owned()).collect(),
                ..Default::default()
            },
            ..WorkerRecord::default()
        };
        let a = worker("a", "h1", &["127.0.0.1:1"]);
        let beside = worker("a2", "h1", &["127.0.0.1:2"]);
        assert!(unreachable_by_others(&[a.clone(), beside]).is_empty());
        let b = worker("b", "h2", &["10.0.0.2:1", "127.0.0.1:1"]);
        let silent = worker("c", "h3", &[]);
        let apart = unreachable_by_others(&[a, b, silent]);
        insta::assert_snapshot!(as_text(&[], &apart), @r"
        no worker has reached another one yet
        worker a: its memory is served on loopback only (127.0.0.1:1), so workers and queries of other hosts read the origin instead; set transfer.address there
        ");
        assert_eq!(as_json(&[], &apart)["problems"][0], apart[0]);
    }
}
