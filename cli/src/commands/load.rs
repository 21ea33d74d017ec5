//! `stoa load`.

use std::time::Duration;

use serde_json::json;
use stoa_layout::TableVersion;
use stoa_metastore::Records;
use tokio::time::Instant;

use super::print_json;
use super::wait::{Loaded, wait_all};
use crate::args::LoadArgs;
use crate::config::format_bytes;
use crate::context::{Context, Target, unknown_table};
use crate::error::{Error, Result};

/// Asks for versions to be loaded, and waits until all of them that fits is.
///
/// With etcd, coordinator and workers do the work. Without, the process that runs the cache does; if
/// none does, this one, and leaves the cache behind for the next.
///
/// # Errors
/// [`Error::Partial`] where that is not the whole of a version: what is there is used.
pub async fn load(args: LoadArgs, context: &Context) -> Result<()> {
    let targets = args
        .tables
        .iter()
        .map(|text| Target::parse(text))
        .collect::<Result<Vec<_>>>()?;
    if !context.is_embedded() {
        let records = context.records().await?;
        return load_all(&targets, &args, &records).await;
    }
    let embedded = context.embedded().await?;
    let result = match embedded.records() {
        Some(_) if args.no_wait && embedded.is_owner() => Err(Error::Usage(
            "`--no-wait` needs somebody who loads meanwhile: a cluster (--etcd), or another process \
             of this machine that runs the cache, such as `stoa worker`; here this process loads, \
             so leave it out"
                .into(),
        )),
        Some(records) => load_all(&targets, &args, records).await,
        None => Ok(()),
    };
    embedded.shutdown().await;
    result
}

async fn load_all(targets: &[Target], args: &LoadArgs, records: &Records) -> Result<()> {
    let mut versions = Vec::new();
    for target in targets {
        versions.push(target.resolve(records).await?);
    }
    let since = records.identity().await?.revision;
    for version in &versions {
        request(records, version).await?;
    }
    if args.no_wait {
        for version in &versions {
            eprintln!("{version} is requested; `stoa status` shows how far it is");
        }
        return Ok(());
    }
    let started = Instant::now();
    let all = wait_all(records, &versions, since, args.timeout).await?;
    for loaded in all.iter().filter(|_| !args.json) {
        say_loaded(loaded, started.elapsed());
    }
    if args.json {
        print_json(&json!({
            "tables": all.iter().map(|loaded| json!({
                "table_version": loaded.table_version,
                "chunks": loaded.chunks,
                "bytes": loaded.bytes,
                "kept_chunks": loaded.kept_chunks,
                "fetched_chunks": loaded.fetched_chunks,
                "peer_chunks": loaded.peer_chunks,
                "peer_bytes": loaded.peer_bytes,
                "left_out_chunks": loaded.left_out_chunks,
                "left_out_bytes": loaded.left_out_bytes,
                "no_room_chunks": loaded.no_room_chunks,
                "left_out": loaded.left_out,
            })).collect::<Vec<_>>(),
            "seconds": started.elapsed().as_secs_f64(),
        }));
    }
    let in_part: Vec<&Loaded> = all.iter().filter(|l| !l.left_out.is_empty()).collect();
    match in_part.is_empty() {
        true => Ok(()),
        false => Err(Error::Partial(what_is_missing(&in_part))),
    }
}

/// How much of these versions is not in memory, and what to do about it. The reasons are said
/// before.
fn what_is_missing(in_part: &[&Loaded]) -> String {
    let missing = in_part.iter().map(|loaded| {
        let name = &loaded.table_version;
        match loaded.left_out_chunks {
            0 => format!("{name} is not loaded as wanted, see its warnings"),
            left_out => format!(
                "{left_out} of {} chunks (about {}) of {name} are left out",
                left_out + loaded.chunks,
                format_bytes(loaded.left_out_bytes),
            ),
        }
    });
    let missing: Vec<String> = missing.collect();
    let no_room: u64 = in_part.iter().map(|loaded| loaded.no_room_chunks).sum();
    let advice = match no_room {
        0 => "The warnings say what could not be had, and why",
        _ => {
            "To have more in memory, raise cache.size as far as there is memory for it, or publish a \
             version with fewer columns or `--form packed` (`stoa layout size` says what they take)"
        }
    };
    format!(
        "{}; queries use what is there and read the rest from the origin. {advice}",
        missing.join("; ")
    )
}

/// Asks for a version; asking again for the version in force is a success, so that scripts can be
/// repeated.
pub(super) async fn request(records: &Records, version: &TableVersion) -> Result<()> {
    match records.request_load(&version.to_string()).await {
        Err(stoa_metastore::Error::StaleVersion { current, given, .. }) if current == given => {
            Ok(())
        }
        Err(stoa_metastore::Error::UnknownLayout { known, .. }) if known.is_empty() => {
            Err(unknown_table(records, &version.table).await)
        }
        other => {
            other?;
            Ok(())
        }
    }
}

fn say_loaded(loaded: &Loaded, took: Duration) {
    let from_peers = match loaded.peer_chunks {
        0 => String::new(),
        chunks => format!(", {chunks} of them from other workers"),
    };
    eprintln!(
        "{} is loaded{}: {} chunks, {} ({} fetched{from_peers}, {} kept) in {:.1} s",
        loaded.table_version,
        if loaded.left_out_chunks > 0 {
            " in part"
        } else {
            ""
        },
        loaded.chunks,
        format_bytes(loaded.bytes),
        loaded.fetched_chunks,
        loaded.kept_chunks,
        took.as_secs_f64()
    );
    for reason in &loaded.left_out {
        eprintln!("warning: {reason}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_counted_for_each_table_and_says_what_to_do() {
        let of = |name: &str, left_out_chunks, no_room_chunks| Loaded {
            table_version: name.into(),
            chunks: 12,
            left_out_chunks,
            left_out_bytes: 3 << 20,
            no_room_chunks,
            left_out: vec!["a reason".into()],
            ..Loaded::default()
        };
        let said = what_is_missing(&[&of("tpch.lineitem:1", 6, 6), &of("tpch.part:2", 0, 0)]);
        assert_eq!(
            said,
            "6 of 18 chunks (about 3 MiB) of tpch.lineitem:1 are left out; tpch.part:2 is not \
             loaded as wanted, see its warnings; queries use what is there and read the rest from \
             the origin. To have more in memory, raise cache.size as far as there is memory for \
             it, or publish a version with fewer columns or `--form packed` (`stoa layout size` \
             says what they take)"
        );
        // More room would not bring back what is damaged.
        let damaged = what_is_missing(&[&of("tpch.lineitem:1", 6, 0)]);
        assert!(!damaged.contains("cache.size"), "{damaged}");
        assert!(damaged.ends_with("The warnings say what could not be had, and why"));
    }
}
