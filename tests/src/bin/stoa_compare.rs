//! Compares Stoa with stock DataFusion, both in this process, over the same Parquet files.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use stoa_tests::compare::cached::Through;
use stoa_tests::compare::report::{Allowed, Tally};
use stoa_tests::compare::{files, fuzz, slt};

/// Compares Stoa with stock DataFusion over the same Parquet files: for each statement the answer of
/// a session as DataFusion makes it, and of one that reads through a cache of its own, whose files
/// are loaded first in each form. Ends with 1 where an answer differs that is not listed, or a
/// listed difference was not found.
#[derive(Debug, Parser)]
#[command(name = "stoa-compare", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs files of sqllogictest; what they expect does not count, only whether both sessions
    /// answer alike.
    ///
    /// A table that a file creates STORED AS PARQUET is loaded as soon as it is there, and again
    /// after each COPY and INSERT; in the way `stoa` it is made STORED AS STOA instead. Plans are
    /// not compared, nor is the order of rows where a statement has no ORDER BY. For DataFusion's own
    /// files: give --from the directory `datafusion/sqllogictest` of a copy of its repository, for
    /// they name files beside it, and write below `test_files/scratch`.
    Slt(SltArguments),
    /// Asks for all of each Parquet file, and for every column in ten ways.
    Files(FilesArguments),
    /// Makes up tables and statements, and compares the answers with DataFusion's over the same
    /// values in memory.
    ///
    /// Tables differ in types, values, nulls, files, schemas from file to file, directories of
    /// partitions, and how they are written; sessions in how they read; in half of the worlds chunks
    /// are taken away and others brought while statements run. Everything else follows from the
    /// seed: what is told of a difference names the statement, which `--only` asks again.
    Fuzz(FuzzArguments),
}

#[derive(Debug, Args)]
struct FuzzArguments {
    /// How many statements.
    #[arg(long, default_value_t = 2_000)]
    queries: u64,
    /// What everything follows from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this statement, as it was told: its world, a dot, its number.
    #[arg(long, value_parser = fuzz::parse_only)]
    only: Option<(u64, u64)>,
    /// No NaN, infinity or negative zero.
    #[arg(long)]
    plain_floats: bool,
    /// Leave the tables' files here.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// How many worlds at a time; as many as there are processors by default.
    #[arg(long)]
    at_a_time: Option<usize>,
    /// How long one statement may take, in seconds.
    #[arg(long, default_value_t = 60)]
    patience: u64,
}

#[derive(Debug, Args)]
struct Common {
    /// Differences that are known: where, how it was read (or *), and why, one a line.
    #[arg(long)]
    allow: Option<PathBuf>,
    /// Only these ways to read: arrow, packed, parquet, auto, stoa.
    #[arg(long, value_delimiter = ',', value_parser = way)]
    through: Vec<Through>,
    /// How long one statement may take, in seconds.
    #[arg(long, default_value_t = 120)]
    patience: u64,
}

impl Common {
    fn ways(&self) -> Vec<Through> {
        match self.through.as_slice() {
            [] => Through::CACHED.to_vec(),
            some => some.to_vec(),
        }
    }
}

#[derive(Debug, Args)]
struct SltArguments {
    /// The directory that paths in the files are relative to.
    #[arg(long, default_value = ".")]
    from: PathBuf,
    /// The directory that the files write to, relative to it; what lies there under a file's name is
    /// removed before the file is run.
    #[arg(long, default_value = "test_files/scratch")]
    scratch: PathBuf,
    /// Only files that contain this text, in any case.
    #[arg(long)]
    about: Option<String>,
    #[command(flatten)]
    common: Common,
    /// Files, or directories of files named *.slt.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
}

#[derive(Debug, Args)]
struct FilesArguments {
    #[command(flatten)]
    common: Common,
    /// Files, or directories of files named *.parquet.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
}

fn way(name: &str) -> Result<Through, String> {
    let known = Through::CACHED.into_iter();
    let mut found = known.filter(|way| way.to_string() == name);
    let expected = "expected arrow, packed, parquet, auto or stoa";
    found.next().ok_or_else(|| expected.to_owned())
}

#[tokio::main(flavor = "multi_thread")]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("error,sqllogictest=off")),
        )
        .init();
    let compared = match Arguments::parse().command {
        Command::Slt(arguments) => compare_slt(arguments).await,
        Command::Files(arguments) => compare_files(arguments).await,
        Command::Fuzz(arguments) => compare_made_up(arguments).await,
    };
    match compared {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("stoa-compare: {error}");
            ExitCode::from(2)
        }
    }
}

async fn compare_slt(arguments: SltArguments) -> Result<bool, String> {
    let mut allowed = list(&arguments.common)?;
    let absolute = |path: &Path| std::path::absolute(path).map_err(|error| error.to_string());
    let options = slt::SltOptions {
        from: absolute(&arguments.from)?,
        scratch: arguments.scratch,
        through: arguments.common.ways(),
        patience: Duration::from_secs(arguments.common.patience),
    };
    // Before the working directory is another one.
    let paths: Vec<_> = arguments
        .paths
        .iter()
        .map(|path| absolute(path))
        .collect::<Result<_, _>>()?;
    let (mut total, mut passed) = (Tally::default(), true);
    for path in every(&paths, "slt")? {
        let text = std::fs::read_to_string(&path);
        let text = text.map_err(|error| format!("{}: {error}", path.display()))?;
        let about = arguments.about.as_ref();
        if about.is_some_and(|about| !text.to_lowercase().contains(&about.to_lowercase())) {
            continue;
        }
        match slt::run_file(&path, &options).await {
            Ok(tally) => passed &= tell(&path, tally, &mut allowed, &mut total),
            Err(error) => {
                println!("{}: NOT RUN: {error}", path.display());
                passed = false;
            }
        }
    }
    Ok(sum_up(&total, &allowed) && passed)
}

async fn compare_files(arguments: FilesArguments) -> Result<bool, String> {
    let mut allowed = list(&arguments.common)?;
    let patience = Duration::from_secs(arguments.common.patience);
    let (mut total, mut passed) = (Tally::default(), true);
    for path in every(&arguments.paths, "parquet")? {
        let tally = files::run_file(&path, &arguments.common.ways(), patience).await?;
        passed &= tell(&path, tally, &mut allowed, &mut total);
    }
    Ok(sum_up(&total, &allowed) && passed)
}

async fn compare_made_up(arguments: FuzzArguments) -> Result<bool, String> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let options = fuzz::FuzzOptions {
        seed: arguments.seed,
        statements: arguments.queries,
        floats: if arguments.plain_floats {
            fuzz::Floats::Plain
        } else {
            fuzz::Floats::All
        },
        only: arguments.only,
        keep: arguments.keep,
        patience: Duration::from_secs(arguments.patience),
        at_a_time: arguments.at_a_time.unwrap_or(processors),
    };
    fuzz::prepare(options.keep.as_deref()).map_err(|error| error.to_string())?;
    let (started, mut told) = (std::time::Instant::now(), 0);
    let seed = options.seed;
    let outcome = fuzz::run(&options, |so_far, findings| {
        for finding in findings {
            println!(
                "DIFFERENT {} ({})\n      {}\n      {}\n      again: stoa-compare fuzz --seed {seed} \
                 --only {}",
                finding.at, finding.through, finding.sql, finding.what, finding.at
            );
        }
        if so_far.statements / 5_000 > told {
            told = so_far.statements / 5_000;
            println!(
                "{} statements after {} s",
                so_far.statements,
                started.elapsed().as_secs()
            );
        }
    });
    let outcome = outcome.await.map_err(|error| error.to_string())?;
    println!(
        "seed {seed}: {} statements, {} refused alike, {} as stock where not all was cached, {} \
         different; {} chunks from memory, {} from files; {} s",
        outcome.statements,
        outcome.refused_alike,
        outcome.as_stock,
        outcome.findings.len(),
        outcome.hits,
        outcome.misses,
        started.elapsed().as_secs()
    );
    Ok(outcome.findings.is_empty())
}

fn list(common: &Common) -> Result<Allowed, String> {
    common
        .allow
        .as_deref()
        .map_or_else(|| Ok(Allowed::default()), Allowed::read)
}

fn every(paths: &[PathBuf], extension: &str) -> Result<Vec<PathBuf>, String> {
    let mut all = vec![];
    for path in paths {
        let found = slt::files_below(path, extension);
        all.extend(found.map_err(|error| format!("{}: {error}", path.display()))?);
    }
    Ok(all)
}

/// Prints what was found in a file; whether all of it is listed.
fn tell(path: &Path, tally: Tally, allowed: &mut Allowed, total: &mut Tally) -> bool {
    println!("{}: {tally}", path.display());
    for uncached in &tally.uncached {
        println!("    not cached, {uncached}");
    }
    let mut passed = true;
    for finding in &tally.findings {
        if let Some(reason) = allowed.reason(finding) {
            println!("    {} {}: known: {reason}", finding.at, finding.through);
            continue;
        }
        passed = false;
        println!(
            "  DIFFERENT {} {}: {}\n      {}",
            finding.at, finding.through, finding.sql, finding.what
        );
    }
    total.add(tally);
    passed
}

/// Prints the sum; whether no listed difference is out of date.
fn sum_up(total: &Tally, allowed: &Allowed) -> bool {
    println!("in all: {total}");
    for (reason, count) in allowed.used() {
        println!("  {count} known: {reason}");
    }
    let mut passed = true;
    for unused in allowed.unused() {
        println!("  LISTED BUT NOT FOUND: {unused}");
        passed = false;
    }
    passed
}
