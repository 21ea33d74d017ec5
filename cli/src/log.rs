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
        (None, _) => "error,stoa=warn,".to_string() + &ours("warn"),
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

fn ours(level: &str) -> String {
    [
        "cli",
        "cache_manager",
        "control",
        "coordinator",
        "datafusion",
        "forms",
        "layout",
        "metastore",
        "origin",
        "reader",
        "shm",
    ]
    .map(|name| format!("stoa_{name}={level}"))
    .join(",")
}
