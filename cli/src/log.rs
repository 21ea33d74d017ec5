//! Log lines on stderr, for people or as JSON.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::SystemTime;

use crate::config::{LogConfig, LogFormat};
use crate::error::{Error, Result};

/// Sends the log to stderr from now on. Daemons say what they do, commands only what is wrong.
pub(crate) fn init(config: &LogConfig, daemon: bool) -> Result<()> {
    let directives = match (&config.level, std::env::var("RUST_LOG")) {
        (Some(level), _) => level.clone(),
        (None, Ok(directives)) if !directives.is_empty() => directives,
        // DataFusion and the store clients talk a lot at info.
        (None, _) if daemon => "warn,stoa=info,".to_string() + &ours("info"),
        // Which tables cannot be planned is told to the commands that ask for them.
        (None, _) => "error,stoa=warn,".to_string() + &ours("warn") + ",stoa_coordinator=error",
    };
    let filter = EnvFilter::try_new(&directives).map_err(|error| {
        Error::Usage(format!(
            "`log.level` = `{directives}`: {error}; expected error, warn, info, debug, trace, or \
             directives as in RUST_LOG"
        ))
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_timer(SystemTime)
        .with_ansi(std::io::stderr().is_terminal());
    // A second initialisation in one process (tests) keeps the first.
    let _ = match config.format {
        LogFormat::Human => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}

/// The crates of this repository that a process runs, as their log targets begin.
const CRATES: [&str; 12] = [
    "cache_manager",
    "cli",
    "control",
    "coordinator",
    "datafusion",
    "forms",
    "layout",
    "metastore",
    "origin",
    "reader",
    "shm",
    "transfer",
];

fn ours(level: &str) -> String {
    CRATES.map(|name| format!("stoa_{name}={level}")).join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A crate that is missing here is one whose lines nobody sees.
    #[test]
    fn every_crate_of_ours_is_heard() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
        let read = |path: &str| {
            let text = std::fs::read_to_string(format!("{root}/{path}")).unwrap();
            text.parse::<toml::Table>().unwrap()
        };
        let workspace = read("Cargo.toml");
        let members = workspace["workspace"]["members"].as_array().unwrap();
        let crates: Vec<String> = members
            .iter()
            .map(|member| member.as_str().unwrap())
            // Those that only test and measure are in no product.
            .filter(|member| !member.starts_with("tests") && !member.starts_with("benches"))
            .map(|member| read(&format!("{member}/Cargo.toml")))
            .map(|manifest| manifest["package"]["name"].as_str().unwrap().to_owned())
            .collect();
        assert!(crates.len() > 10, "{crates:?}");
        let filter = ours("info");
        for name in crates {
            let directive = format!("{}=info", name.replace('-', "_"));
            assert!(
                filter.split(',').any(|one| one == directive),
                "{directive}: {filter}"
            );
        }
    }
}
