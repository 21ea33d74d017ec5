//! `stoa unload` and `stoa layout drop`: out of memory, and out of the records.

use std::collections::BTreeSet;
use std::time::Duration;

use stoa_layout::TableName;
use stoa_metastore::{LayoutsDropped, Leaving, Records};
use tokio::time::Instant;

use super::memory::memory;
use crate::args::UnloadArgs;
use crate::context::{Context, Target, unknown_table};
use crate::error::{Error, Result};
use crate::progress::{Waiting, spinner};

/// How often the records are looked at while waiting.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What is done with a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// It leaves memory.
    Unload,
    /// Its layouts are forgotten too.
    Drop,
}

/// Asks for tables to be dropped from memory, and waits until they are.
pub async fn unload(args: UnloadArgs, context: &Context) -> Result<()> {
    carry_out(Act::Unload, args, context).await
}

/// Forgets the layouts of tables, and waits until they have left memory.
pub(super) async fn drop_tables(args: UnloadArgs, context: &Context) -> Result<()> {
    carry_out(Act::Drop, args, context).await
}

async fn carry_out(act: Act, args: UnloadArgs, context: &Context) -> Result<()> {
    let tables = args
        .tables
        .iter()
        .map(|text| Ok(Target::parse(text)?.table().clone()))
        .collect::<Result<Vec<_>>>()?;
    // Embedded, the worker that holds them is this process, once it has begun.
    let (embedded, in_memory) = match context.is_embedded() {
        true => {
            let lying = memory(context).tables.into_iter();
            let lying: BTreeSet<String> = lying.map(|table| table.table).collect();
            (Some(context.embedded().await?), lying)
        }
        false => (None, BTreeSet::new()),
    };
    let records = match embedded.as_ref().and_then(|embedded| embedded.records()) {
        Some(records) => records.clone(),
        None => context.records().await?,
    };
    let mut result = Ok(());
    for table in &tables {
        let is_held = in_memory.contains(&table.to_string());
        result = one(act, &records, table, is_held, &args).await;
        if result.is_err() {
            break;
        }
    }
    if let Some(embedded) = embedded {
        embedded.shutdown().await;
    }
    result
}

/// Asks for one table to be dropped from memory, and waits until it is.
pub(super) async fn unload_one(records: &Records, table: &str, args: &UnloadArgs) -> Result<()> {
    one(Act::Unload, records, &table.parse()?, false, args).await
}

async fn one(
    act: Act,
    records: &Records,
    table: &TableName,
    is_held: bool,
    args: &UnloadArgs,
) -> Result<()> {
    let name = table.to_string();
    if act == Act::Drop {
        match records.drop_layouts(&name, None).await? {
            LayoutsDropped::Dropped { .. } => {}
            LayoutsDropped::Nothing | LayoutsDropped::NotTheirs => {
                return Err(unknown_table(records, table).await);
            }
        }
        eprintln!("{name} is dropped: its layouts are forgotten, its files stay");
    }
    // Where nobody has asked for it, it may be held all the same: after a reset.
    let mut was_planned = true;
    if records.request_unload(&name).await?.is_none() {
        if !is_held && holders(records, &name).await?.is_empty() {
            if act == Act::Unload {
                eprintln!("{name} was never loaded");
            }
            return Ok(());
        }
        records.request_unload_of_held(&name).await?;
        was_planned = false;
    }
    if args.no_wait {
        return Ok(());
    }
    let spinner = spinner(format!("{name} leaves the cache"));
    let result = wait_gone(records, &name, was_planned, args.timeout).await;
    spinner.finish_and_clear();
    if result.is_ok() {
        eprintln!("{name} is unloaded; memory that queries still read is freed when they end");
    }
    result
}

/// Waits until no plan wants the table and nobody holds it.
async fn wait_gone(
    records: &Records,
    table: &str,
    was_planned: bool,
    timeout: Duration,
) -> Result<()> {
    let deadline = Instant::now() + timeout;
    let mut waiting = Waiting::default();
    loop {
        let reason = match records.leaving(table, was_planned).await? {
            Leaving::Gone => return Ok(()),
            Leaving::Planned => {
                format!("{table} is still planned; is `stoa coordinator` running?")
            }
            Leaving::HeldBy(workers) => {
                format!("{table} is still held by {}", workers.join(", "))
            }
        };
        waiting.say(Some(&reason));
        if Instant::now() >= deadline {
            return Err(Error::NotReady(reason));
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            _ = tokio::signal::ctrl_c() => return Err(Error::Interrupted),
        }
    }
}

/// The workers that say they hold something of the table.
async fn holders(records: &Records, table: &str) -> Result<Vec<String>> {
    let states = records.states().await?.into_iter();
    let holds = |state: &stoa_metastore::WorkerState| {
        let table = state.tables.get(table);
        table.is_some_and(|table| table.held_bytes > 0)
    };
    Ok(states.filter(holds).map(|state| state.id).collect())
}
