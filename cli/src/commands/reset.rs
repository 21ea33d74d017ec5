//! `stoa reset`: forget what was published and loaded.

use std::collections::BTreeSet;
use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

use stoa_metastore::{Records, keys};
use stoa_shm::counters::AccessCounters;
use stoa_shm::{CacheDir, CacheDirOptions, CacheWriter, IndexContents};

use super::unload::unload_one;
use crate::args::{ResetArgs, UnloadArgs};
use crate::context::Context;
use crate::error::{Error, Result};

/// How long the process that runs the cache may take to let a table go.
const EMPTIED_WITHIN: Duration = Duration::from_secs(60);

/// Deletes the records; with `--files`, empties this machine's cache directory too.
pub async fn reset(args: ResetArgs, context: &Context) -> Result<()> {
    let location = &context.config.cache.location;
    if !args.yes {
        let files = match args.files {
            true => format!(", and the cache in {}", location.display()),
            false => String::new(),
        };
        confirm(&format!(
            "This forgets all layouts, plans and requests of {}{files}.",
            context.metastore_name()
        ))?;
    }
    let records = context.records().await?;
    let live = records.workers().await?;
    // A process that shares the state runs the cache on: it lets go of what is in it, as only it can.
    let shared = context.is_embedded() && !live.is_empty();
    if shared && args.files {
        empty(&records).await?;
    }
    if !live.is_empty() && !shared {
        let ids: Vec<&str> = live.iter().map(|worker| worker.id.as_str()).collect();
        eprintln!(
            "warning: workers are running: what they hold stays in memory until `stoa unload TABLE` \
             frees it (`stoa status` shows it), and they publish their state again: {}",
            ids.join(", ")
        );
    }
    let deleted = records.reset(keys::ALL_PREFIXES).await?;
    eprintln!(
        "{deleted} keys are deleted from {}",
        context.metastore_name()
    );
    if args.files && shared {
        eprintln!(
            "the cache in {} is empty; the process that runs it goes on",
            location.display()
        );
        return Ok(());
    }
    if args.files {
        if !location.exists() {
            eprintln!("there is no cache at {}", location.display());
            return Ok(());
        }
        // The writer's lock keeps a running worker's cache from being pulled away under it, and
        // its own way of retiring segments leaves what readers hold mapped alone.
        let directory = CacheDir::open(location, CacheDirOptions::default())?;
        let (mut writer, _) = CacheWriter::open(directory)?;
        writer.publish(IndexContents::default())?;
        writer.discard_unpublished();
        let report = writer.reclaim()?;
        // Hints about chunks that are there no more.
        AccessCounters::remove(location)?;
        eprintln!(
            "the cache in {} is empty{}",
            location.display(),
            match report.retained_bytes {
                0 => String::new(),
                bytes => format!(
                    "; {} are freed when the queries that read them end",
                    crate::config::format_bytes(bytes)
                ),
            }
        );
    }
    Ok(())
}

/// Unloads all that is wanted or held.
async fn empty(records: &Records) -> Result<()> {
    let mut tables: BTreeSet<String> = BTreeSet::new();
    let requests = records.load_requests().await?.into_iter();
    tables.extend(requests.map(|request| request.table));
    for state in records.states().await? {
        let held = state.tables.into_iter();
        tables.extend(held.filter(|(_, t)| t.held_bytes > 0).map(|(name, _)| name));
    }
    let args = UnloadArgs {
        tables: tables.into_iter().collect(),
        no_wait: false,
        timeout: EMPTIED_WITHIN,
    };
    for table in &args.tables {
        unload_one(records, table, &args).await?;
    }
    Ok(())
}

fn confirm(what: &str) -> Result<()> {
    if !std::io::stdin().is_terminal() {
        return Err(Error::Usage(format!("{what} Give --yes to do it.")));
    }
    eprint!("{what} Go on? [y/N] ");
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|error| Error::while_doing("cannot read the answer", error))?;
    match answer.trim().to_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Error::Interrupted),
    }
}
