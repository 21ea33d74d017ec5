//! The demo's work: loading the tables, timing the queries.

use std::path::Path;
use std::time::{Duration, Instant};

use arrow::record_batch::RecordBatch;
use datafusion::prelude::{ParquetReadOptions, SessionConfig, SessionContext};
use stoa_datafusion::{Embedded, Stoa};
use stoa_layout::{LayoutDocument, LayoutVersion, TableName, TableVersion};
use stoa_metastore::Records;

use super::generate::TABLES;
use super::queries::Query;
use super::report::QueryResult;
use super::{DemoArgs, SCHEMA, compare};
use crate::commands::{publish_or_reuse, wait_all};
use crate::context::Context;
use crate::error::{Error, Result, chain};
use crate::progress::{Unit, bar};

/// What loading came to.
pub(super) struct LoadedTables {
    /// Shared memory that the tables hold.
    pub(super) memory_bytes: u64,
    /// How long it took.
    pub(super) took: Duration,
    /// What did not fit, in words.
    pub(super) left_out: Vec<String>,
}

/// Publishes a layout of every table where it is new, and loads them all.
pub(super) async fn load(
    embedded: &Embedded,
    directory: &Path,
    timeout: Duration,
) -> Result<LoadedTables> {
    let Some(records) = embedded.records() else {
        return Err(Error::Busy("the state is not at hand".into()));
    };
    let started = Instant::now();
    let since = records.identity().await?.revision;
    let mut versions = Vec::new();
    for table in TABLES {
        let name = TableName::new(SCHEMA, table.name)?;
        let location = format!("{}/", directory.join(table.name).display());
        let mut document = LayoutDocument::new(name, LayoutVersion::FIRST, location);
        let listed = embedded.origin().list(&document.parsed_location()?).await?;
        document.files = listed.into_iter().map(|file| file.identity).collect();
        versions.push(publish_or_reuse(document, records).await?);
    }
    let loaded = wait_all(records, &versions, since, timeout).await?;
    let took = started.elapsed();
    Ok(LoadedTables {
        memory_bytes: held_bytes(records, &versions).await?,
        took,
        left_out: loaded
            .into_iter()
            .flat_map(|table| table.left_out)
            .collect(),
    })
}

async fn held_bytes(records: &Records, versions: &[TableVersion]) -> Result<u64> {
    let names: Vec<String> = versions.iter().map(|v| v.table.to_string()).collect();
    let states = records.states().await?;
    let tables = states.iter().flat_map(|state| &state.tables);
    Ok(tables
        .filter(|(name, _)| names.contains(name))
        .map(|(_, table)| table.held_bytes)
        .sum())
}

/// What measuring came to.
pub(super) struct Measured {
    /// Query by query.
    pub(super) queries: Vec<QueryResult>,
    /// The share of chunks found in shared memory.
    pub(super) hit_rate: f64,
    /// Requests that cached queries sent to the origin.
    pub(super) origin_requests: u64,
}

/// Runs every query over both, once to warm up and compare, then `iterations` times.
pub(super) async fn measure(
    queries: &[Query],
    args: &DemoArgs,
    directory: &Path,
    embedded: &Embedded,
    context: &Context,
) -> Result<Measured> {
    let plain = session(args);
    for table in TABLES {
        let place = format!("{}/", directory.join(table.name).display());
        plain
            .register_parquet(table.name, &place, ParquetReadOptions::default())
            .await
            .map_err(|error| query_error(table.name, &error))?;
    }
    // A reader with stores of its own: the worker's looks at the files are not the queries'.
    let reader = context.local_reader();
    let stoa = Stoa::with_reader(reader.clone(), embedded.records().cloned());
    let cached = session(args);
    stoa.register(&cached)
        .await
        .map_err(|error| query_error("the session", &error))?;

    let chunks_before = reader.statistics().counts();
    let requests_before = reader.origin().counters().requests();
    let bar = bar(
        "querying",
        Unit::Items,
        queries.len() as u64 * (u64::from(args.iterations) + 1) * 2,
    );
    let mut results = Vec::new();
    for query in queries {
        bar.set_message(query.name());
        let (expected, _) = timed(&plain, query).await?;
        let (answer, _) = timed(&cached, query).await?;
        bar.inc(2);
        results.push(QueryResult {
            query: query.name(),
            parquet: Vec::new(),
            cached: Vec::new(),
            difference: compare::difference(&expected, &answer)
                .map_err(|error| query_error(&query.name(), &error))?,
        });
    }
    for iteration in 0..args.iterations {
        for (query, result) in queries.iter().zip(&mut results) {
            bar.set_message(query.name());
            // Whoever goes second finds warmer caches of the processor, so they take turns.
            for turn in 0..2 {
                if (iteration + turn) % 2 == 0 {
                    result.parquet.push(timed(&plain, query).await?.1);
                } else {
                    result.cached.push(timed(&cached, query).await?.1);
                }
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    Ok(Measured {
        queries: results,
        hit_rate: reader
            .statistics()
            .counts()
            .since(&chunks_before)
            .hit_rate(),
        origin_requests: reader.origin().counters().requests() - requests_before,
    })
}

fn session(args: &DemoArgs) -> SessionContext {
    let mut config = SessionConfig::new().with_default_catalog_and_schema("datafusion", SCHEMA);
    if let Some(partitions) = args.partitions {
        config = config.with_target_partitions(partitions as usize);
    }
    SessionContext::new_with_config(config)
}

/// Plans and runs a query to its end; the time includes both, as a user waits for both.
async fn timed(session: &SessionContext, query: &Query) -> Result<(Vec<RecordBatch>, Duration)> {
    let started = Instant::now();
    let answer = async { session.sql(query.sql).await?.collect().await }
        .await
        .map_err(|error| query_error(&query.name(), &error))?;
    Ok((answer, started.elapsed()))
}

fn query_error(what: &str, error: &dyn std::error::Error) -> Error {
    Error::while_doing(what, chain(error))
}
