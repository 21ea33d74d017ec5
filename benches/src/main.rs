//! `stoa-bench`: TPC-H in several modes, interleaved, as dfbench reports it.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Parser;
use serde_json::json;
use stoa_benches::modes::{Mode, Running};
use stoa_benches::report::Times;
use stoa_cli::demo::{compare, generate, queries};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs TPC-H in several modes, interleaved, and compares them by paired ratios.
///
/// Every mode's results are written as `<output>.<mode>.json` in dfbench's format, so that its
/// compare.py reads them; `<output>` itself holds the summary.
#[derive(Debug, Parser)]
struct Args {
    /// Scale factor; the tables are generated when they are not there.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Where generated tables are kept.
    #[arg(long, default_value = "target/bench-data")]
    path: PathBuf,
    /// What to compare.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Mode::Parquet, Mode::Memtable, Mode::Stoa])]
    modes: Vec<Mode>,
    /// Which queries, as `1,6,14-16`; all where not given.
    #[arg(long)]
    query: Option<String>,
    /// Measured iterations, after one that is not.
    #[arg(long, default_value_t = 15)]
    iterations: usize,
    /// Target partitions.
    #[arg(long, default_value_t = 2)]
    partitions: usize,
    /// Where the results go; nothing is written where not given.
    #[arg(short, long)]
    output: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let data = generate::directory(&args.path, args.scale);
    let generated = match generate::find(&data, args.scale) {
        Some(generated) => generated,
        None => {
            eprintln!(
                "generating TPC-H scale {} in {}",
                args.scale,
                data.display()
            );
            generate::generate(&data, args.scale, 2, &|_| ())?
        }
    };
    let data = data.canonicalize()?;
    let mut modes = vec![];
    for mode in &args.modes {
        eprintln!("preparing {}", mode.name());
        modes.push(Running::start(*mode, &data, args.partitions).await?);
    }
    let times = measure(&args, &modes).await?;
    print!("{}", times.table());
    if let Some(output) = &args.output {
        let start = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let context = json!({
            "benchmark_version": env!("CARGO_PKG_VERSION"),
            "datafusion_version": datafusion::DATAFUSION_VERSION,
            "num_cpus": std::thread::available_parallelism()?.get(),
            "start_time": start,
            "arguments": std::env::args().skip(1).collect::<Vec<_>>(),
        });
        for mode in &args.modes {
            let file = output.with_extension(format!("{}.json", mode.name()));
            std::fs::write(
                file,
                serde_json::to_vec_pretty(&times.dfbench(*mode, &context))?,
            )?;
        }
        let summary = json!({
            "context": context,
            "parquet_bytes": generated.bytes(),
            "summary": times.summary(generated.bytes()),
        });
        std::fs::write(output, serde_json::to_vec_pretty(&summary)?)?;
    }
    for mode in modes {
        mode.stop().await;
    }
    Ok(())
}

async fn measure(args: &Args, modes: &[Running]) -> Result<Times, Box<dyn std::error::Error>> {
    let queries = queries::select(args.query.as_deref())?;
    let mut times = Times::default();
    for mode in modes {
        times.bytes.insert(mode.mode, mode.bytes);
        times.attach_ms.insert(mode.mode, mode.attach_ms);
    }
    // The first round warms up and compares the answers; it is not measured.
    for round in 0..=args.iterations {
        let before: Vec<u64> = modes.iter().map(Running::origin_requests).collect();
        for query in &queries {
            let mut first: Option<Vec<_>> = None;
            for i in 0..modes.len() {
                // Rotated, so that no mode always runs right after the same other.
                let running = &modes[(i + round) % modes.len()];
                let (answer, elapsed) = running.run(query.sql).await?;
                if round == 0 {
                    let rows = answer.iter().map(|batch| batch.num_rows()).sum();
                    times.rows.insert(query.number, rows);
                    if let Some(first) = &first {
                        if let Some(difference) = compare::difference(first, &answer)? {
                            return Err(format!(
                                "q{}: {} answers otherwise: {difference}",
                                query.number,
                                running.mode.name()
                            )
                            .into());
                        }
                    } else {
                        first = Some(answer);
                    }
                    continue;
                }
                times
                    .elapsed
                    .entry(running.mode)
                    .or_default()
                    .entry(query.number)
                    .or_default()
                    .push(elapsed.as_secs_f64() * 1000.0);
            }
        }
        if round > 0 {
            for (mode, before) in modes.iter().zip(before) {
                *times.hot_origin_requests.entry(mode.mode).or_default() +=
                    mode.origin_requests() - before;
            }
        }
        eprintln!("round {round} of {}", args.iterations);
    }
    Ok(times)
}
