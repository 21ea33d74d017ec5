//! `stoa pin` and `stoa unpin`: caches that cannot be swapped out.

use stoa_control::WorkerClient;
use stoa_datafusion::EMBEDDED_WORKER;
use stoa_metastore::WorkerRecord;

use crate::args::PinArgs;
use crate::config::format_bytes;
use crate::context::{Context, now_unix_ms};
use crate::error::{Error, Result};

/// Asks workers to lock their memory or to let go, now and after their restarts.
pub async fn pin(args: PinArgs, pinned: bool, context: &Context) -> Result<()> {
    let records = context.records().await?;
    let live = records.workers().await?;
    // One worker runs for all processes that share a state. Where the process that ran it has just
    // ended and the next one has not taken over, or there is none, it is told at its next start.
    let embedded = [EMBEDDED_WORKER.to_owned()];
    let names = match args.workers.is_empty() && live.is_empty() && context.is_embedded() {
        true => &embedded[..],
        false => &args.workers[..],
    };
    let chosen = choose(names, &live)?;
    for id in chosen.absent() {
        records.set_pin(id, pinned, now_unix_ms()).await?;
        eprintln!("worker {id} is not alive; it will be told at its next start");
    }
    let mut failed = Vec::new();
    for worker in chosen.live() {
        records.set_pin(&worker.id, pinned, now_unix_ms()).await?;
        if let Err(error) = tell(worker, pinned, context).await {
            failed.push(format!("worker {}: {error}", worker.id));
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => Err(Error::Failed(failed.join("\n"))),
    }
}

async fn tell(worker: &WorkerRecord, pinned: bool, context: &Context) -> Result<()> {
    let Some(address) = &worker.addresses.control else {
        // A process that shares the state serves no control; it sees what was just written.
        if context.is_embedded() {
            eprintln!(
                "worker {}: {} as soon as it sees this; `stoa status` shows what hinders it",
                worker.id,
                match pinned {
                    true => "locks its memory",
                    false => "lets its memory go",
                }
            );
            return Ok(());
        }
        return Err(Error::NotReady("it serves no control address".into()));
    };
    let client = WorkerClient::new(address, &context.control_clients())?;
    let report = match pinned {
        true => client.pin().await?,
        false => client.unpin().await?,
    };
    if pinned && !report.problem.is_empty() {
        return Err(Error::Failed(report.problem));
    }
    let locked = format_bytes(report.pinned_bytes);
    eprintln!(
        "worker {}: {}",
        worker.id,
        match pinned {
            true => format!("pinned, {locked} locked in memory"),
            false => "unpinned".to_string(),
        }
    );
    Ok(())
}

/// The workers that were named, alive or not.
#[derive(Debug)]
pub(super) struct Chosen<'a> {
    live: Vec<&'a WorkerRecord>,
    absent: Vec<&'a str>,
}

impl<'a> Chosen<'a> {
    pub(super) fn live(&self) -> &[&'a WorkerRecord] {
        &self.live
    }

    pub(super) fn absent(&self) -> &[&'a str] {
        &self.absent
    }
}

/// Picks workers by id or host; all live ones when none is named.
pub(super) fn choose<'a>(names: &'a [String], live: &'a [WorkerRecord]) -> Result<Chosen<'a>> {
    if names.is_empty() {
        if live.is_empty() {
            return Err(Error::NotReady(
                "no worker is alive; name those to tell at their next start".into(),
            ));
        }
        return Ok(Chosen {
            live: live.iter().collect(),
            absent: Vec::new(),
        });
    }
    let mut chosen = Chosen {
        live: Vec::new(),
        absent: Vec::new(),
    };
    for name in names {
        let before = chosen.live.len();
        let same = |worker: &&WorkerRecord| worker.id == *name || worker.host == *name;
        chosen.live.extend(live.iter().filter(same));
        if chosen.live.len() == before {
            chosen.absent.push(name);
        }
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_chosen_by_id_or_host() {
        let worker = |id: &str, host: &str| WorkerRecord {
            id: id.into(),
            host: host.into(),
            ..WorkerRecord::default()
        };
        let live = [
            worker("a", "node1"),
            worker("b", "node1"),
            worker("c", "node2"),
        ];
        let ids = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            let chosen = choose(&names, &live).unwrap();
            let live: Vec<String> = chosen.live().iter().map(|w| w.id.clone()).collect();
            let absent: Vec<String> = chosen.absent().iter().map(ToString::to_string).collect();
            (live.join(","), absent.join(","))
        };
        assert_eq!(ids(&[]), ("a,b,c".into(), String::new()));
        assert_eq!(ids(&["node1", "c"]), ("a,b,c".into(), String::new()));
        assert_eq!(ids(&["c", "gone"]), ("c".into(), "gone".into()));
        assert!(choose(&[], &[]).is_err());
    }
}
