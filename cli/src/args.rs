//! The command line: every flag, with the help that teaches it.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use stoa_layout::{FormChoice, Replicas};

use crate::config::{Inputs, parse_bytes};
use crate::demo::DemoArgs;
use crate::error::EXIT_CODES;
use crate::sql::SqlArgs;

/// A shared-memory column cache for DataFusion.
///
/// Stoa keeps the hot columns of Parquet tables in shared memory, decoded or packed, so that every
/// query process on a machine reads them in place. On one machine nothing needs to be set up: `stoa
/// demo` shows what it does, `stoa sql` queries. With --etcd, coordinator and workers run as
/// separate daemons on as many hosts as there are.
#[derive(Debug, Parser)]
#[command(
    name = "stoa",
    version,
    max_term_width = 100,
    after_help = "Start with `stoa demo`, or `stoa help layout` for tables of your own.",
    after_long_help = after_long_help(),
)]
pub struct Cli {
    /// What holds for all commands.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

fn after_long_help() -> String {
    format!(
        "Examples:
  stoa demo --scale 0.1                     22 TPC-H queries, plain Parquet beside the cache
  stoa sql -c 'select count(*) from tpch.lineitem'
  stoa layout create web.hits --location s3://bucket/hits/ --columns ts,url,status
  stoa load web.hits:1                      fill the cache, with progress
  stoa --etcd node1,node2,node3 status      tables, workers, problems of a cluster
  stoa config check                         effective settings and where each came from

{EXIT_CODES}"
    )
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_./:=,@%+".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// Flags of all commands.
#[derive(Clone, Debug, Default, Args)]
pub struct Global {
    /// The configuration file; else ./stoa.toml, $XDG_CONFIG_HOME/stoa/stoa.toml,
    /// /etc/stoa/stoa.toml, the first that exists.
    #[arg(
        long,
        value_name = "FILE",
        global = true,
        env = "STOA_CONFIG",
        help_heading = "Configuration"
    )]
    pub config: Option<PathBuf>,
    /// The etcd cluster; without it everything runs embedded, for one machine.
    #[arg(
        long,
        value_name = "HOST:PORT,…",
        global = true,
        help_heading = "Configuration"
    )]
    pub etcd: Option<String>,
    /// Set any key of the configuration; `stoa config keys` lists them.
    #[arg(
        long,
        value_name = "KEY=VALUE",
        global = true,
        help_heading = "Configuration"
    )]
    pub set: Vec<String>,
    /// The form of log lines on stderr: human or json.
    #[arg(
        long,
        value_name = "FORMAT",
        global = true,
        help_heading = "Configuration"
    )]
    pub log_format: Option<String>,
    /// What is logged: error, warn, info, debug, trace, or directives as in RUST_LOG.
    #[arg(
        long,
        value_name = "LEVEL",
        global = true,
        help_heading = "Configuration"
    )]
    pub log_level: Option<String>,
}

impl Global {
    /// The command line that asks the same metastore and cache as this one: `stoa` with those of
    /// these flags that say where they are.
    pub fn command(&self) -> String {
        const PLACES: [&str; 4] = [
            "cache.location",
            "etcd.hosts",
            "etcd.port",
            "state.location",
        ];
        let mut words = vec!["stoa".to_owned()];
        let mut say = |flag: &str, value: &str| words.extend([flag.to_owned(), quoted(value)]);
        if let Some(file) = &self.config {
            say("--config", &file.display().to_string());
        }
        if let Some(hosts) = &self.etcd {
            say("--etcd", hosts);
        }
        for set in &self.set {
            let key = set.split('=').next().unwrap_or_default().trim();
            if PLACES.contains(&key) {
                say("--set", set);
            }
        }
        words.join(" ")
    }

    /// What these flags say about the configuration.
    pub fn inputs(&self) -> Inputs {
        let mut flags = Vec::new();
        for (flag, key, text) in [
            ("--etcd", "etcd.hosts", &self.etcd),
            ("--log-format", "log.format", &self.log_format),
            ("--log-level", "log.level", &self.log_level),
        ] {
            if let Some(text) = text {
                flags.push((flag.to_string(), key, text.clone()));
            }
        }
        Inputs {
            file: self.config.clone(),
            set: self.set.clone(),
            flags,
        }
    }
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what the cache does: TPC-H generated, loaded, queried with and without it.
    Demo(DemoArgs),
    /// Query with SQL: datafusion-cli, with every cached table in it.
    Sql(Box<SqlArgs>),
    /// Say which columns of which files are worth caching.
    #[command(subcommand)]
    Layout(LayoutCommand),
    /// Load a layout version into the cache, and wait until it is there.
    ///
    /// Versions of a table only increase. To go back to an earlier content, publish it as a new
    /// version. What does not fit is left out from the end of the layout: then the exit code is 6,
    /// and warnings say what, how much and why.
    #[command(after_help = "Examples:
  stoa load tpch.lineitem:1 tpch.orders:1
  stoa load tpch.lineitem                   the newest layout version
  stoa --etcd node1 load web.hits:7 --no-wait")]
    Load(LoadArgs),
    /// Drop tables from the cache; their layouts stay.
    #[command(after_help = "Example:
  stoa unload tpch.lineitem")]
    Unload(UnloadArgs),
    /// Show tables, versions, workers and problems.
    Status(StatusArgs),
    /// Show how workers reach each other's memory: paths, latency, bandwidth, failures.
    #[command(after_help = "Examples:
  stoa --etcd node1 peers
  stoa --etcd node1 peers --json")]
    Peers(PeersArgs),
    /// Lock workers' caches in memory, so that they cannot be swapped out.
    #[command(after_help = "Examples:
  stoa --etcd node1 pin                     all workers
  stoa --etcd node1 pin node2 node3         those on two hosts")]
    Pin(PinArgs),
    /// Undo `stoa pin`.
    Unpin(PinArgs),
    /// Look after the cache directory of this machine.
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Forget what was published and loaded; with --files, free the memory too.
    ///
    /// Stop the workers first: a running one publishes its state again. Layouts are forgotten as
    /// well. No Parquet file is touched.
    #[command(after_help = "Examples:
  stoa reset --yes                          the embedded state
  stoa --etcd node1 reset --yes --files     etcd's keys, and this machine's cache directory")]
    Reset(ResetArgs),
    /// Run a worker: it fills the cache of this machine.
    ///
    /// With --etcd it takes its part of the plan from there. Without, it is coordinator and worker
    /// in one process, for this machine alone. SIGTERM and SIGINT stop it; the cache stays and is
    /// reused at the next start.
    #[command(after_help = "Examples:
  stoa --etcd node1,node2,node3 worker
  stoa worker --set cache.location=/mnt/stoa --set cache.size=64GiB
  stoa --etcd node1 worker --set worker.id=second --set cache.location=/dev/shm/stoa-second")]
    Worker,
    /// Run a coordinator: the elected one plans which worker holds what.
    ///
    /// Run one or more; all but the elected one wait to take over.
    #[command(after_help = "Example:
  stoa --etcd node1,node2,node3 coordinator")]
    Coordinator,
    /// Check and explain the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print completions for a shell.
    #[command(after_help = "Examples:
  stoa completions bash > ~/.local/share/bash-completion/completions/stoa
  stoa completions fish > ~/.config/fish/completions/stoa.fish")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// `stoa layout …`
#[derive(Debug, Subcommand)]
pub enum LayoutCommand {
    /// Publish a new layout version of a table.
    ///
    /// The version names the files as they are now, and what of them to cache: all columns, some
    /// in the order of their worth (what does not fit is left out from the end), or single chunks
    /// in a document. Publishing loads nothing yet; `stoa load` does, or --load.
    #[command(after_help = "Examples:
  stoa layout create tpch.lineitem --location /data/tpch/lineitem/
  stoa layout create tpch.lineitem --location s3://bucket/lineitem/ \\
      --columns l_shipdate,l_discount,l_quantity,l_extendedprice
  stoa layout create tpch.lineitem:7 --document lineitem.json --load")]
    Create(Box<LayoutCreateArgs>),
    /// Print a layout document.
    Show {
        /// The table, with or without `:version`.
        table: String,
        /// Print it as it is stored, as JSON.
        #[arg(long)]
        json: bool,
    },
    /// List tables and their layout versions.
    List {
        /// Print a JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Drop tables: forget all their layouts, and free their memory. Their files stay.
    ///
    /// A table that is created again under the name goes on with the next version.
    Drop(UnloadArgs),
    /// Say how many bytes a table's columns take in each form, before anything is loaded.
    #[command(after_help = "Examples:
  stoa layout size tpch.lineitem
  stoa layout size --location s3://bucket/lineitem/")]
    Size {
        /// A table with a published layout, with or without `:version`.
        #[arg(required_unless_present = "location")]
        table: Option<String>,
        /// Parquet files without a layout.
        #[arg(long, value_name = "LOCATION", conflicts_with = "table")]
        location: Option<String>,
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Say which form each column of a table is cached in, and why.
    #[command(after_help = "Examples:
  stoa layout explain tpch.lineitem
  stoa layout explain tpch.lineitem --budget 100MiB
  stoa layout explain --location s3://bucket/lineitem/ --budget 1GiB")]
    Explain {
        /// A table with a published layout, with or without `:version`.
        #[arg(required_unless_present = "location")]
        table: Option<String>,
        /// Parquet files without a layout.
        #[arg(long, value_name = "LOCATION", conflicts_with = "table")]
        location: Option<String>,
        /// The budget to choose for; else the layout's own, else cache.size.
        #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
        budget: Option<u64>,
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// `stoa layout create …`
#[derive(Debug, Args)]
pub struct LayoutCreateArgs {
    /// The table, `schema.table`; `:version` only when it must be that one.
    pub table: String,
    /// Where the Parquet files lie: a directory, a prefix, or one file.
    #[arg(long, value_name = "LOCATION", required_unless_present = "document")]
    pub location: Option<String>,
    /// The columns to cache, the most wanted first; else all.
    #[arg(long, value_name = "A,B,…", value_delimiter = ',')]
    pub columns: Vec<String>,
    /// Only the first N of the columns.
    #[arg(long, value_name = "N")]
    pub first_columns: Option<usize>,
    /// Only files with exactly N row groups (Pixels' rule); else the smaller tails too.
    #[arg(long, value_name = "N")]
    pub full_files_only: Option<u32>,
    /// On how many workers each chunk should lie: 1, 2, … or `all`, for small tables that every
    /// node reads; else on one.
    #[arg(long, value_name = "K|all")]
    pub replicas: Option<Replicas>,
    /// The form of cached chunks: auto, arrow, packed or parquet; COLUMN=FORM for one column.
    /// auto chooses what scans fastest within the budget, arrow is decoded (3 to 5 times the bytes
    /// of Parquet), packed takes about the bytes of Parquet or less and is unpacked while it is
    /// read, parquet is as in the file and saves the fetch only.
    #[arg(long, value_name = "[COLUMN=]FORM")]
    pub form: Vec<FormArg>,
    /// What --form auto fills, and the table takes at most; else what the workers have room for.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub budget: Option<u64>,
    /// The columns in the directory names (`year=2026/`); else found by themselves.
    #[arg(long, value_name = "A,B,…", value_delimiter = ',')]
    pub partition_columns: Vec<String>,
    /// Take the layout from a JSON document, as `layout show --json` prints it; `-` reads stdin.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["columns", "first_columns"])]
    pub document: Option<PathBuf>,
    /// Print the document instead of publishing it.
    #[arg(long)]
    pub dry_run: bool,
    /// Load it too, and wait.
    #[arg(long, conflicts_with = "dry_run")]
    pub load: bool,
    /// Print a JSON object about what was published.
    #[arg(long)]
    pub json: bool,
}

/// A form, as the command line names it: of all columns, or of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormArg {
    /// The column; none means all.
    pub column: Option<String>,
    /// Its form.
    pub form: FormChoice,
}

impl FromStr for FormArg {
    type Err = stoa_layout::Error;

    fn from_str(text: &str) -> Result<FormArg, stoa_layout::Error> {
        let (column, form) = match text.rsplit_once('=') {
            Some((column, form)) => (Some(column.to_owned()), form),
            None => (None, text),
        };
        Ok(FormArg {
            column,
            form: form.parse()?,
        })
    }
}

/// `stoa load …`
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// Tables, with or without `:version`; without, the newest one.
    #[arg(required = true, value_name = "TABLE[:VERSION]")]
    pub tables: Vec<String>,
    /// Return once the request is written. Needs --etcd, or another process that runs the cache.
    #[arg(long)]
    pub no_wait: bool,
    /// How long to wait.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_time)]
    pub timeout: Duration,
    /// Print a JSON object about what was loaded.
    #[arg(long)]
    pub json: bool,
}

/// `stoa unload …` and `stoa layout drop …`
#[derive(Debug, Args)]
pub struct UnloadArgs {
    /// The tables.
    #[arg(required = true, value_name = "TABLE")]
    pub tables: Vec<String>,
    /// Return once the request is written.
    #[arg(long)]
    pub no_wait: bool,
    /// How long to wait.
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = parse_time)]
    pub timeout: Duration,
}

/// `stoa status …`
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Fail with exit code 3 unless at least this many workers live and none is loading or
    /// degraded.
    #[arg(long, value_name = "WORKERS")]
    pub require_ready: Option<usize>,
}

/// `stoa peers …`
#[derive(Debug, Args)]
pub struct PeersArgs {
    /// Workers by id or host; else all.
    #[arg(value_name = "WORKER")]
    pub workers: Vec<String>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `stoa pin …` and `stoa unpin …`
#[derive(Debug, Args)]
pub struct PinArgs {
    /// Workers by id or host; else all.
    #[arg(value_name = "WORKER")]
    pub workers: Vec<String>,
}

/// `stoa cache …`
#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Check every byte of the cache against its checksum.
    ///
    /// Bad chunks are named and the exit code is 1; a worker drops and reloads them.
    Verify {
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// `stoa reset …`
#[derive(Debug, Args)]
pub struct ResetArgs {
    /// Remove this machine's cached segments and index too.
    #[arg(long)]
    pub files: bool,
    /// Do not ask.
    #[arg(long, short)]
    pub yes: bool,
}

/// `stoa config …`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the effective values with where each came from, or what is wrong with them.
    Check {
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Print every key with its meaning, default and environment variable.
    Keys {
        /// Print docs/configuration.md.
        #[arg(long)]
        markdown: bool,
    },
}

fn parse_time(text: &str) -> Result<Duration, String> {
    match text.parse::<u64>() {
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => humantime::parse_duration(text)
            .map_err(|_| "expected a number of seconds or a time such as 90s, 10m".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_stand_before_and_after_the_command() {
        for line in [
            "stoa --etcd a,b --set cache.size=1GiB status --json",
            "stoa status --json --etcd a,b --set cache.size=1GiB",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            let inputs = cli.global.inputs();
            assert_eq!(inputs.set, ["cache.size=1GiB"]);
            assert_eq!(
                inputs.flags,
                [("--etcd".to_string(), "etcd.hosts", "a,b".to_string())]
            );
        }
    }

    /// Advice is pasted: it has to ask where this command asked.
    #[test]
    fn advice_names_the_same_places() {
        let command = |line: &[&str]| Cli::try_parse_from(line).unwrap().global.command();
        assert_eq!(command(&["stoa", "config", "check"]), "stoa");
        let line = [
            "stoa",
            "--config",
            "/my files/stoa.toml",
            "--etcd",
            "node1,node2:2380",
            "--set",
            "etcd.password=secret",
            "--set",
            "cache.location=/dev/shm/it's",
            "config",
            "check",
        ];
        assert_eq!(
            command(&line),
            r"stoa --config '/my files/stoa.toml' --etcd node1,node2:2380 --set 'cache.location=/dev/shm/it'\''s'"
        );
    }

    #[test]
    fn every_command_explains_itself() {
        fn walk(command: &clap::Command, path: &str) {
            for child in command.get_subcommands() {
                let name = format!("{path} {}", child.get_name());
                assert!(child.get_about().is_some(), "{name} has no help");
                for arg in child.get_arguments() {
                    assert!(arg.get_help().is_some(), "{name} {}", arg.get_id());
                }
                walk(child, &name);
            }
        }
        walk(&Cli::command(), "stoa");
    }
}
