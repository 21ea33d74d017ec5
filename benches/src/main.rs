//! `stoa-bench`: benchmarks of the cache, as dfbench reports them, and their tables and plot.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};
use stoa_benches::hot::{Plan, blocks};
use stoa_benches::modes::Mode;
use stoa_benches::suite::{Suite, select};
use stoa_benches::{Error, child, fill, hot, processes, remote, touch};
use stoa_figures::{Document, criterion, plot, tables};
use stoa_layout::Form;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Benchmarks of the cache: modes interleaved, compared by paired ratios.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure, and write what was measured.
    Run(RunArguments),
    /// Markdown of documents that `run` wrote.
    Tables {
        /// The documents; of two about the same data, the later one's tables win.
        #[arg(required = true)]
        documents: Vec<PathBuf>,
        /// Write Markdown; the only format there is, and the default.
        #[arg(long)]
        markdown: bool,
        /// Replace the tables between the markers of these files, instead of printing.
        #[arg(long, value_name = "FILE", value_delimiter = ',')]
        into: Vec<PathBuf>,
    },
    /// A document of what `cargo bench -p stoa-micro` has measured.
    Lookup {
        /// Where criterion keeps it.
        #[arg(long, default_value = "target/criterion")]
        criterion: PathBuf,
        /// The pages of the mount that the caches lay on: `4 KiB` or `huge`.
        #[arg(long, default_value = "4 KiB")]
        pages: String,
        /// Where the document goes.
        #[arg(short, long)]
        output: PathBuf,
    },
    /// An SVG of time against memory.
    Plot {
        /// A document that `run` wrote, with hot times.
        document: PathBuf,
        /// Where the SVG goes.
        #[arg(short, long)]
        output: PathBuf,
    },
    /// What `run` starts in processes of their own.
    #[command(hide = true)]
    Child {
        /// The request as JSON.
        request: String,
    },
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum State {
    /// All in memory, one process.
    Hot,
    /// First execution in a new process, over a loaded cache.
    FirstTouch,
    /// First execution with nothing in memory.
    Cold,
    /// Several processes at once, one partition each.
    Processes,
    /// What filling the cache costs.
    Fill,
    /// Parquet in an object store whose answers come late, and Stoa out of another process's memory;
    /// modes with @BUDGET and the memory table are left out.
    Remote,
}

/// Every mode's hot times are written as `OUTPUT.<mode>.json` in dfbench's format, so that its
/// compare.py reads them; `OUTPUT` itself is the document with the summary.
#[derive(Debug, Args)]
struct RunArguments {
    /// Data and queries.
    #[arg(long, value_enum, default_value = "tpch")]
    suite: Suite,
    /// Scale of the data; they are generated when they are not there.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Where generated data are kept.
    #[arg(long, default_value = "target/bench-data")]
    path: PathBuf,
    /// What to compare: parquet, parquet-pushdown, memtable, stoa-FORM, stoa-FORM-pushdown, with
    /// @BUDGET for shared memory of so many times the Parquet's bytes.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "parquet,parquet-pushdown,memtable,stoa-auto"
    )]
    modes: Vec<Mode>,
    /// What to measure of them.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "hot")]
    states: Vec<State>,
    /// Which queries, as `1,6,14-16`; all where not given.
    #[arg(long)]
    query: Option<String>,
    /// Measured iterations, after one that is not.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u16).range(1..))]
    iterations: u16,
    /// Target partitions.
    #[arg(long, default_value_t = 2)]
    partitions: usize,
    /// Have only one mode in memory at a time, beside those over Parquet. Modes are then compared
    /// with the memory table by the ratio of their ratios to Parquet.
    #[arg(long)]
    one_at_a_time: bool,
    /// How many processes run at once in the state `processes`.
    #[arg(long, default_value_t = 4)]
    concurrency: usize,
    /// Row groups of each table that the state `fill` takes.
    #[arg(long, default_value_t = 8)]
    row_groups: usize,
    /// By how much the object store of the state `remote` delays every answer; whole milliseconds.
    #[arg(long, default_value = "20ms", value_parser = humantime::parse_duration)]
    origin_delay: Duration,
    /// Where caches lie: a tmpfs.
    #[arg(long, default_value = "/dev/shm")]
    cache_root: PathBuf,
    /// Where the results go; only tables are printed where not given.
    #[arg(short, long)]
    output: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    match Arguments::parse().command {
        Command::Run(arguments) => run(&arguments).await,
        Command::Tables {
            documents,
            markdown: _,
            into,
        } => print_tables(&documents, &into),
        Command::Lookup {
            criterion,
            pages,
            output,
        } => {
            let document = criterion::lookups(&criterion, &pages)?;
            Ok(std::fs::write(
                output,
                serde_json::to_vec_pretty(&document)?,
            )?)
        }
        Command::Plot { document, output } => {
            let svg = plot::svg(&read(&document)?)
                .ok_or("no mode of the document has both memory and time")?;
            Ok(std::fs::write(output, svg)?)
        }
        Command::Child { request } => child::serve(&serde_json::from_str(&request)?).await,
    }
}

fn read(path: &Path) -> Result<Document, Error> {
    let failed = |error: String| format!("{}: {error}", path.display());
    let text = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
    Ok(serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?)
}

fn print_tables(documents: &[PathBuf], into: &[PathBuf]) -> Result<(), Error> {
    let documents: Vec<Document> = documents
        .iter()
        .map(|path| read(path))
        .collect::<Result<_, _>>()?;
    if into.is_empty() {
        let reports: Vec<String> = documents.iter().map(tables::report).collect();
        print!("{}", reports.join("\n"));
    }
    for path in into {
        let text = std::fs::read_to_string(path)?;
        let replaced = tables::replace(&text, &documents)
            .map_err(|problem| format!("{}: {problem}", path.display()))?;
        std::fs::write(path, replaced)?;
    }
    Ok(())
}

async fn run(arguments: &RunArguments) -> Result<(), Error> {
    let data = arguments.suite.prepare(&arguments.path, arguments.scale)?;
    let queries = select(
        arguments.suite.queries(arguments.scale),
        arguments.query.as_deref(),
    )?;
    let plan = Plan {
        data: &data,
        queries: &queries,
        partitions: arguments.partitions,
        iterations: usize::from(arguments.iterations),
        cache_root: &arguments.cache_root,
    };
    let mut document = Document {
        context: context()?,
        suite: data.suite.name().to_owned(),
        scale: data.scale,
        parquet_bytes: data.bytes,
        modes: arguments.modes.iter().map(Mode::to_string).collect(),
        ..Document::default()
    };
    // What is in memory of one process cannot be touched first by another.
    let elsewhere: Vec<Mode> = arguments
        .modes
        .iter()
        .filter(|mode| **mode != Mode::Memtable)
        .cloned()
        .collect();
    for state in &arguments.states {
        match state {
            State::Hot => {
                let blocks = blocks(&arguments.modes, arguments.one_at_a_time);
                let found = hot::measure(plan, &blocks).await?;
                document.summary = found.summary;
                document.summarize(&found.times);
                if let Some(output) = &arguments.output {
                    for mode in &document.modes {
                        let times = found.times.dfbench(mode, &document.context, &found.rows);
                        let file = output.with_extension(format!("{mode}.json"));
                        std::fs::write(file, serde_json::to_vec_pretty(&times)?)?;
                    }
                }
            }
            State::FirstTouch => {
                for mode in &elsewhere {
                    document.first_touch.extend(touch::first(plan, mode).await?);
                }
            }
            State::Cold => {
                let times = touch::cold(plan, &elsewhere)?;
                document.summarize_cold(&times);
            }
            State::Processes => {
                for mode in &elsewhere {
                    let found = processes::measure(plan, mode, arguments.concurrency).await?;
                    document.processes.insert(mode.to_string(), found);
                }
            }
            State::Fill => {
                for form in forms(&arguments.modes)? {
                    let found = fill::measure(
                        &data,
                        form,
                        arguments.row_groups,
                        plan.iterations,
                        plan.cache_root,
                    )?;
                    document.fill.insert(form.to_string(), found);
                }
            }
            State::Remote => {
                let delay_ms = u64::try_from(arguments.origin_delay.as_millis())?;
                let one_at_a_time = arguments.one_at_a_time;
                let found =
                    remote::measure(plan, &arguments.modes, one_at_a_time, delay_ms).await?;
                document.summarize_remote(
                    delay_ms,
                    &found.times,
                    &found.sources,
                    &found.worker_bytes,
                );
                for (mode, chunks) in document.remote.iter().flat_map(|remote| remote.missed()) {
                    eprintln!("{mode}: {chunks} chunks came from the origin, expected none");
                }
            }
        }
        // Written after each, so that what was measured is not lost with what fails later.
        if let Some(output) = &arguments.output {
            std::fs::write(output, serde_json::to_vec_pretty(&document)?)?;
        }
    }
    print!("{}", tables::report(&document));
    Ok(())
}

/// The forms of the modes of Stoa, each once.
fn forms(modes: &[Mode]) -> Result<Vec<Form>, Error> {
    let mut forms = vec![];
    for mode in modes {
        if let Mode::Stoa { form, .. } = mode
            && form != "auto"
        {
            let form: Form = form.parse()?;
            if !forms.contains(&form) {
                forms.push(form);
            }
        }
    }
    Ok(forms)
}

/// What dfbench says of a run, and the machine.
fn context() -> Result<Value, Error> {
    let line = |path: &str, name: &str| -> Option<String> {
        let text = std::fs::read_to_string(path).ok()?;
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    Ok(json!({
        "benchmark_version": env!("CARGO_PKG_VERSION"),
        "datafusion_version": datafusion::DATAFUSION_VERSION,
        "num_cpus": std::thread::available_parallelism()?.get(),
        "start_time": SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        "arguments": std::env::args().skip(1).collect::<Vec<_>>(),
        "cpu": line("/proc/cpuinfo", "model name"),
        "memory": line("/proc/meminfo", "MemTotal"),
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease")
            .map(|text| text.trim().to_owned())
            .ok(),
    }))
}
