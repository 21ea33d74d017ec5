//! The `stoa` binary: a subcommand for each role.
//!
//! - [`config`]: one table of keys, four layers, every value with its source
//! - [`args`]: the command line; [`run`] carries it out
//! - [`commands`]: what operators do and daemons run
//! - [`sql`]: datafusion-cli, embedded, with the cached tables in it
//! - [`demo`]: TPC-H with and without the cache

#![forbid(unsafe_code)]

pub mod args;
pub mod commands;
pub mod config;
pub mod context;
pub mod demo;
pub mod error;
mod failures;
mod log;
pub mod progress;
pub mod sql;
pub mod table;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{CacheCommand, Cli, Command, ConfigCommand};
use context::Context;
use error::Result;

/// Parses the command line, carries it out, and says how it went.
pub fn main() -> ExitCode {
    // clap exits by itself for help (0) and for a wrong command line (2).
    let cli = Cli::parse_from(sql::without_comments_as_flags(std::env::args_os()));
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            error.exit_code()
        }
    }
}

/// Carries out one command line.
pub fn run(cli: Cli) -> Result<ExitCode> {
    let daemon = matches!(cli.command, Command::Worker | Command::Coordinator);
    // These need no runtime, and no valid configuration.
    match &cli.command {
        Command::Completions { shell } => {
            let mut command = Cli::command();
            clap_complete::generate(*shell, &mut command, "stoa", &mut std::io::stdout());
            return Ok(ExitCode::SUCCESS);
        }
        Command::Config(ConfigCommand::Keys { markdown }) => {
            print!(
                "{}",
                match markdown {
                    true => config::keys_as_markdown(),
                    false => config::keys_as_text(),
                }
            );
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let context = Context::start(&cli.global, daemon)?;
    if let Command::Config(ConfigCommand::Check { json }) = &cli.command {
        commands::config_check(&context, *json);
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| error::Error::while_doing("cannot start", error))?;
    let result = runtime.block_on(carry_out(cli.command, &context));
    // Blocking work that nobody waits for (a DNS look-up, a decode) must not hold the exit.
    runtime.shutdown_background();
    result
}

async fn carry_out(command: Command, context: &Context) -> Result<ExitCode> {
    match command {
        Command::Demo(args) => return demo::run(args, context).await,
        Command::Sql(args) => sql::run(*args, context).await?,
        Command::Layout(command) => commands::layout(command, context).await?,
        Command::Load(args) => commands::load(args, context).await?,
        Command::Unload(args) => commands::unload(args, context).await?,
        Command::Status(args) => commands::status(args, context).await?,
        Command::Peers(args) => commands::peers(args, context).await?,
        Command::Pin(args) => commands::pin(args, true, context).await?,
        Command::Unpin(args) => commands::pin(args, false, context).await?,
        Command::Cache(CacheCommand::Verify { json }) => {
            return commands::verify(json, context).await;
        }
        Command::Reset(args) => commands::reset(args, context).await?,
        Command::Worker => commands::worker(context).await?,
        Command::Coordinator => commands::coordinator(context).await?,
        // Carried out before there was a runtime.
        Command::Config(_) | Command::Completions { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}
