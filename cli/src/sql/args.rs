//! The flags of `stoa sql`: those of datafusion-cli, with their meaning.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use datafusion_cli::object_storage::instrumented::InstrumentedObjectStoreMode;
use datafusion_cli::object_storage::is_stdin_location;
use datafusion_cli::pool_type::PoolType;
use datafusion_cli::print_format::PrintFormat;
use datafusion_cli::print_options::MaxRows;

use crate::config::parse_bytes;

/// Query with SQL: datafusion-cli, with every cached table in it.
///
/// Tables with a published layout are there as `schema.table`. `CREATE EXTERNAL TABLE … STORED AS
/// STOA LOCATION '…'` publishes a layout of a table that has none and loads it in the background,
/// while queries read the origin. `stoa_tables()`, `stoa_chunks()` and `stoa_workers()` show what
/// is cached. A second `stoa sql` shares the memory of the first.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  stoa sql                                  the prompt; \\? lists its commands, \\q leaves it
  stoa sql -c 'select count(*) from tpch.lineitem'
  stoa sql -q --format csv -f report.sql > report.csv
  stoa sql -c \"create external table hits stored as stoa location 's3://bucket/hits/'\" \\
           -c 'select status, count(*) from hits group by status'
  stoa sql -f existing.sql                  STORED AS PARQUET tables read what is cached of them")]
pub struct SqlArgs {
    /// Execute these commands, then exit.
    #[arg(short, long, num_args = 0.., value_name = "SQL", value_parser = non_empty)]
    pub command: Vec<String>,
    /// Execute the commands in these files, then exit.
    #[arg(short, long, num_args = 0.., value_name = "FILE", value_parser = existing_file)]
    pub file: Vec<String>,
    /// Run these files at the start of the prompt instead of ~/.datafusionrc.
    #[arg(short, long, num_args = 0.., value_name = "FILE", value_parser = existing_file, conflicts_with = "file")]
    pub rc: Option<Vec<String>>,
    /// The directory that relative paths start from.
    #[arg(short = 'p', long, value_name = "DIR", value_parser = existing_directory)]
    pub data_path: Option<PathBuf>,
    /// The form of results.
    #[arg(long, value_enum, default_value_t = PrintFormat::Automatic)]
    pub format: PrintFormat,
    /// How many rows the table format shows: a number, or `inf`.
    #[arg(long, value_name = "ROWS", default_value = "40")]
    pub maxrows: MaxRows,
    /// Print results and nothing else.
    #[arg(short, long)]
    pub quiet: bool,
    /// Highlight SQL at the prompt.
    #[arg(long)]
    pub color: bool,
    /// The memory that queries may use, such as `10g`; unlimited when not given.
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    pub memory_limit: Option<usize>,
    /// How queries share the memory: `greedy` or `fair`.
    #[arg(long, value_name = "TYPE", default_value_t = PoolType::Greedy)]
    pub mem_pool_type: PoolType,
    /// How many of the largest consumers the error names when memory runs out; 0 tracks none.
    #[arg(long, value_name = "NUMBER", default_value_t = 3)]
    pub top_memory_consumers: usize,
    /// The disk space for spilling, such as `10g`; DataFusion's default when not given.
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    pub disk_limit: Option<usize>,
    /// The rows of a batch; DataFusion's default when not given.
    #[arg(short, long, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch_size: Option<u32>,
    /// Report requests to object stores: `disabled`, `summary` or `trace`.
    #[arg(long, value_name = "MODE", default_value_t = InstrumentedObjectStoreMode::Disabled)]
    pub object_store_profiling: InstrumentedObjectStoreMode,
}

impl SqlArgs {
    /// Whether commands come from the prompt (or a pipe into it).
    pub fn is_prompt(&self) -> bool {
        self.command.is_empty() && self.file.is_empty()
    }

    /// Whether stdin carries commands, so that no table can be read from it.
    pub fn stdin_carries_commands(&self) -> bool {
        self.is_prompt() || self.file.iter().any(|file| is_stdin_location(file))
    }
}

/// The command line with SQL that begins with a comment told from flags: `-c '-- a comment'` is one
/// argument that no flag is spelt like. A space before it changes nothing about the SQL.
pub fn without_comments_as_flags(
    arguments: impl IntoIterator<Item = OsString>,
) -> impl Iterator<Item = OsString> {
    arguments.into_iter().map(|argument| {
        let is_comment = argument.to_str().is_some_and(|text| {
            let name = text.split('=').next().unwrap_or(text);
            text.starts_with("--") && name.contains(char::is_whitespace)
        });
        if !is_comment {
            return argument;
        }
        let mut sql = OsString::from(" ");
        sql.push(&argument);
        sql
    })
}

fn non_empty(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("it is empty; expected SQL".into()),
        _ => Ok(text.to_string()),
    }
}

fn existing_file(text: &str) -> Result<String, String> {
    // Pipes and `/dev/stdin` are files too, so only what is missing or a directory is refused.
    match Path::new(text) {
        path if path.is_dir() => Err("it is a directory, expected a file".into()),
        path if path.exists() => Ok(text.to_string()),
        _ => Err("no such file".into()),
    }
}

fn existing_directory(text: &str) -> Result<PathBuf, String> {
    match Path::new(text) {
        path if path.is_dir() => Ok(path.to_path_buf()),
        _ => Err("no such directory".into()),
    }
}

/// A size as datafusion-cli takes it: `gb` and `g` alike count in powers of 1024.
fn size(text: &str) -> Result<usize, String> {
    let lower = text.trim().to_ascii_lowercase();
    let short = match lower.strip_suffix('b') {
        Some(rest) if rest.ends_with(['k', 'm', 'g', 't']) => rest,
        _ => &lower,
    };
    let bytes = parse_bytes(short)?;
    match usize::try_from(bytes) {
        Ok(0) => Err("it must be greater than zero".into()),
        Ok(bytes) => Ok(bytes),
        Err(_) => Err("it is too large".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        sql: SqlArgs,
    }

    fn parse(line: &[&str]) -> Result<SqlArgs, clap::Error> {
        Line::try_parse_from([&["sql"], line].concat()).map(|line| line.sql)
    }

    #[test]
    fn the_flags_of_datafusion_cli_are_taken() {
        let args = parse(&[
            "-c",
            "select 1",
            "select 2",
            "-m",
            "10gb",
            "-d",
            "512m",
            "-b",
            "4096",
            "-q",
            "--format",
            "nd-json",
            "--maxrows",
            "inf",
            "--color",
            "--mem-pool-type",
            "fair",
            "--top-memory-consumers",
            "0",
            "--object-store-profiling",
            "summary",
        ])
        .unwrap();
        assert_eq!(args.command, ["select 1", "select 2"]);
        assert_eq!(args.memory_limit, Some(10 << 30));
        assert_eq!(args.disk_limit, Some(512 << 20));
        assert_eq!(args.batch_size, Some(4096));
        assert_eq!(args.format, PrintFormat::NdJson);
        assert_eq!(args.maxrows, MaxRows::Unlimited);
        assert!(!args.is_prompt() && !args.stdin_carries_commands());
        assert!(parse(&[]).unwrap().is_prompt());
    }

    #[test]
    fn a_comment_is_no_flag() {
        let line = [
            "-c",
            "-- a comment",
            "--\nselect 1",
            "--format=csv",
            "--maxrows",
            "7",
            "-q",
        ];
        let line = without_comments_as_flags(line.map(OsString::from));
        let line: Vec<String> = line
            .map(|argument| argument.into_string().unwrap())
            .collect();
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let args = parse(&line).unwrap();
        assert_eq!(args.command, [" -- a comment", " --\nselect 1"]);
        assert!(args.quiet && matches!(args.format, PrintFormat::Csv));
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        for (line, reason) in [
            (["-m", "0"], "must be greater than zero"),
            (["-m", "ten"], "expected a size"),
            (["-b", "0"], "0 is not in 1.."),
            (["-c", " "], "expected SQL"),
            (["-f", "/nowhere.sql"], "no such file"),
            (["-p", "/nowhere"], "no such directory"),
            (["--maxrows", "many"], "Invalid maxrows"),
        ] {
            let error = parse(&line).unwrap_err().to_string();
            assert!(error.contains(reason), "{line:?}: {error}");
        }
    }
}
