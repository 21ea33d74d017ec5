//! `stoa demo`: TPC-H with and without the cache.

pub mod compare;
pub mod generate;
pub mod queries;
mod report;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use stoa_datafusion::Embedded;

pub use queries::{QUERIES, Query};
pub use report::{QueryResult, Report};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::progress::{Unit, bar, say};

/// Show what the cache does: TPC-H generated, loaded, queried with and without it.
///
/// Generates the eight tables as Parquet files (once), loads all of them into shared memory, and
/// runs the 22 queries over the plain files and over the cache, interleaved, comparing the answers.
/// Afterwards the tables are there for `stoa sql`. Scale 1 takes about 0.4 GiB of disk and 2 GiB of
/// shared memory. `stoa reset --files` frees the memory.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  stoa demo                                 scale 1
  stoa demo --scale 0.1 --queries 1,6,14    a quick look
  stoa demo --scale 0.1 --json | jq .geomean_ratio")]
pub struct DemoArgs {
    /// TPC-H's scale factor: 1 has six million line items.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = scale)]
    pub scale: f64,
    /// Where the Parquet files lie; else $XDG_DATA_HOME/stoa.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// How often every query is timed; the median counts.
    #[arg(long, value_name = "TIMES", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub iterations: u32,
    /// Only these queries, such as `1,6,14-16`.
    #[arg(long, value_name = "NUMBERS")]
    pub queries: Option<String>,
    /// The partitions of each query; else one a processor.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    pub partitions: Option<u32>,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    pub json: bool,
}

/// The schema that the demo's tables lie in.
const SCHEMA: &str = "tpch";

/// How long loading may take before it counts as stuck.
const LOAD_TIMEOUT: Duration = Duration::from_secs(3600);

/// Generates, loads, queries, compares, and prints what came out.
pub async fn run(args: DemoArgs, context: &Context) -> Result<ExitCode> {
    let queries = queries::select(args.queries.as_deref()).map_err(Error::Usage)?;
    // Before anything is generated: whether tables can be cached at all.
    let embedded = context.embedded().await?;
    let outcome = load_and_measure(&args, &queries, &embedded, context).await;
    embedded.shutdown().await;
    let report = outcome?;
    if args.json {
        println!("{:#}", report.to_json());
    } else {
        print!("\n{}", report.to_text());
        println!("\n{}", next_steps(context));
    }
    Ok(match report.all_equal() {
        true => ExitCode::SUCCESS,
        false => {
            eprintln!("error: not all answers are equal");
            ExitCode::from(1)
        }
    })
}

async fn load_and_measure(
    args: &DemoArgs,
    queries: &[Query],
    embedded: &Embedded,
    context: &Context,
) -> Result<Report> {
    let (directory, parquet_bytes) = data(args, context).await?;
    let loaded = run::load(embedded, &directory, LOAD_TIMEOUT).await?;
    for reason in &loaded.left_out {
        say(
            false,
            format!(
                "warning: {reason}\n  give it more with --set cache.size=…, a larger {} (docker \
                 run --shm-size=4g), or take a smaller --scale",
                context.config.cache.location.display()
            ),
        );
    }
    say(
        args.json,
        format!(
            "running {} queries {} times over plain Parquet and over the cache",
            queries.len(),
            args.iterations + 1
        ),
    );
    let measured = run::measure(queries, args, &directory, embedded, context).await?;
    Ok(Report {
        scale: args.scale,
        queries: measured.queries,
        memory_bytes: loaded.memory_bytes,
        parquet_bytes,
        hit_rate: measured.hit_rate,
        hot_origin_requests: measured.origin_requests,
        load: loaded.took,
    })
}

/// The directory of the Parquet files, generated if they are not there, and their bytes.
async fn data(args: &DemoArgs, context: &Context) -> Result<(PathBuf, u64)> {
    let data = match &args.data {
        Some(data) if data.is_absolute() => data.clone(),
        Some(data) => context.machine.directory.join(data),
        None => context.data_location(),
    };
    let scale = args.scale;
    let directory = generate::directory(&data, scale);
    if let Some(found) = generate::find(&directory, scale) {
        say(
            args.json,
            format!("using TPC-H at scale {scale} in {}", directory.display()),
        );
        return Ok((directory, found.bytes()));
    }
    say(
        args.json,
        format!(
            "generating TPC-H at scale {scale} into {}",
            directory.display()
        ),
    );
    let threads = context.machine.processors as usize;
    let place = directory.clone();
    let generated = tokio::task::spawn_blocking(move || {
        let bar = bar("generating", Unit::Rows, generate::rows(scale));
        let generated = generate::generate(&place, scale, threads, &|rows| bar.inc(rows));
        bar.finish_and_clear();
        generated
    })
    .await
    .map_err(|error| Error::while_doing("generating ended early", error))??;
    Ok((directory, generated.bytes()))
}

fn next_steps(context: &Context) -> String {
    format!(
        "The tables stay in {} for every process of yours. Next:\n  \
         stoa sql -c 'select count(*) from tpch.lineitem'\n  \
         stoa sql -c 'select * from stoa_tables()'\n  \
         stoa status\n  \
         stoa layout create --help      your own Parquet files\n  \
         stoa reset --yes --files       free the memory",
        context.config.cache.location.display()
    )
}

fn scale(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(scale) if scale.is_finite() && (0.001..=10_000.0).contains(&scale) => Ok(scale),
        _ => Err("expected a number from 0.001 to 10000".into()),
    }
}
