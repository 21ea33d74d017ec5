//! LiquidCache over the data of `benches/run.sh`, beside the stock DataFusion of its own version.
//!
//! Its DataFusion is an older one than ours. So not times are compared but speed-ups: LiquidCache
//! over its stock DataFusion, Stoa over its own, at the same memory. The document that is written
//! has the shape of `stoa-bench run`'s, and `stoa-bench tables` reads it.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use datafusion::arrow::array::RecordBatch;
use datafusion::prelude::{ParquetReadOptions, SessionConfig, SessionContext};
use liquid_cache_datafusion_local::LiquidCacheLocalBuilder;
use serde_json::json;
use stoa_figures::document::Summary;
use stoa_figures::times::turns;
use stoa_figures::{Block, Document, Times};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const TABLES: [&str; 8] = [
    "lineitem", "orders", "partsupp", "part", "customer", "supplier", "nation", "region",
];

/// LiquidCache and stock DataFusion, interleaved, over TPC-H.
#[derive(Debug, Parser)]
struct Arguments {
    /// Scale of the data.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Where `benches/run.sh` keeps its data.
    #[arg(long, default_value = "target/bench-data")]
    path: PathBuf,
    /// Where the texts of the queries lie.
    #[arg(long, default_value = "cli/queries")]
    queries: PathBuf,
    /// Memory of LiquidCache, as so many times the Parquet's bytes; a mode each.
    #[arg(long, value_delimiter = ',', default_value = "0.5,1,2")]
    budgets: Vec<f64>,
    /// Measured iterations, after two that are not: LiquidCache fills during the first.
    #[arg(long, default_value_t = 15)]
    iterations: usize,
    /// Target partitions.
    #[arg(long, default_value_t = 2)]
    partitions: usize,
    /// Where the document goes.
    #[arg(short, long)]
    output: PathBuf,
}

type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments = Arguments::parse();
    let data = arguments.path.join(format!("tpch-sf{}", arguments.scale));
    let parquet_bytes = bytes_of(&data)?;
    let queries = queries(&arguments.queries)?;
    let config = || SessionConfig::new().with_target_partitions(arguments.partitions);
    let mut sessions = vec![];
    for pushdown in [false, true] {
        let mut config = config();
        config.options_mut().execution.parquet.pushdown_filters = pushdown;
        let name = if pushdown {
            "parquet-pushdown"
        } else {
            "parquet"
        };
        sessions.push((
            name.to_owned(),
            SessionContext::new_with_config(config),
            None,
        ));
    }
    let scratch = tempfile::tempdir()?;
    for budget in &arguments.budgets {
        let directory = scratch.path().join(budget.to_string());
        std::fs::create_dir(&directory)?;
        let (session, cache) = LiquidCacheLocalBuilder::new()
            .with_max_memory_bytes((parquet_bytes as f64 * budget) as usize)
            .with_cache_dir(directory)
            .build(config())
            .await?;
        sessions.push((format!("liquid-cache@{budget}"), session, Some(cache)));
    }
    for (_, session, _) in &sessions {
        for table in TABLES {
            let path = format!("{}/", data.join(table).display());
            session
                .register_parquet(table, path, ParquetReadOptions::default())
                .await?;
        }
    }
    let mut block = Block::default();
    let mut rows = BTreeMap::new();
    for round in 0..arguments.iterations + 2 {
        for (number, sql) in &queries {
            for i in turns(sessions.len(), round, *number) {
                let (mode, session, _) = &sessions[i];
                let start = Instant::now();
                let answer = session.sql(sql).await?.collect().await?;
                let elapsed_ms = start.elapsed().as_secs_f64() * 1000.0;
                let found: usize = answer.iter().map(RecordBatch::num_rows).sum();
                if *rows.entry(*number).or_insert(found) != found {
                    return Err(
                        format!("q{number} in {mode}: {found} rows, expected others").into(),
                    );
                }
                if round > 1 {
                    block.push(mode, *number, elapsed_ms);
                }
            }
        }
        eprintln!("round {round} of {}", arguments.iterations + 1);
    }
    let times = Times {
        blocks: vec![block],
    };
    let mut document = Document {
        context: json!({
            "benchmark_version": env!("CARGO_PKG_VERSION"),
            "datafusion_version": datafusion::DATAFUSION_VERSION,
            "liquid_cache_version": "0.1.13",
            "num_cpus": std::thread::available_parallelism()?.get(),
            "start_time": SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
            "arguments": std::env::args().skip(1).collect::<Vec<_>>(),
        }),
        engine: Some(format!(
            "LiquidCache 0.1.13, DataFusion {}",
            datafusion::DATAFUSION_VERSION
        )),
        suite: "tpch".to_owned(),
        scale: arguments.scale,
        parquet_bytes,
        modes: sessions.iter().map(|session| session.0.clone()).collect(),
        ..Document::default()
    };
    for (mode, _, cache) in &sessions {
        let held = cache
            .as_ref()
            .map(|cache| cache.memory_usage_bytes() as u64);
        let summary = Summary {
            bytes: held.unwrap_or(parquet_bytes),
            ..Summary::default()
        };
        document.summary.insert(mode.clone(), summary);
    }
    document.summarize(&times);
    for mode in &document.modes {
        let dfbench = times.dfbench(mode, &document.context, &rows);
        let file = arguments.output.with_extension(format!("{mode}.json"));
        std::fs::write(file, serde_json::to_vec_pretty(&dfbench)?)?;
    }
    std::fs::write(&arguments.output, serde_json::to_vec_pretty(&document)?)?;
    print!("{}", stoa_figures::tables::report(&document));
    Ok(())
}

/// The texts by number.
fn queries(directory: &Path) -> Result<BTreeMap<u32, String>, Error> {
    let mut queries = BTreeMap::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str());
        let number = name.and_then(|name| name.strip_prefix('q')?.parse().ok());
        if let Some(number) = number {
            queries.insert(number, std::fs::read_to_string(&path)?);
        }
    }
    if queries.is_empty() {
        return Err(format!(
            "no queries in {}, expected q01.sql and on",
            directory.display()
        )
        .into());
    }
    Ok(queries)
}

fn bytes_of(data: &Path) -> Result<u64, Error> {
    let mut bytes = 0;
    for table in TABLES {
        let place = data.join(table);
        let files = std::fs::read_dir(&place).map_err(|error| {
            format!(
                "{}: {error}; generate it with benches/run.sh",
                place.display()
            )
        })?;
        for file in files {
            bytes += file?.metadata()?.len();
        }
    }
    Ok(bytes)
}
