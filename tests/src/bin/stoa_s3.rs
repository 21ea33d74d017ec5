//! An S3-compatible server over a directory, for trying Stoa out without a cloud.
//!
//! Prints `listening on http://127.0.0.1:PORT` and serves until it is interrupted. Its counts and
//! faults are reached under `/_stoa/`, see `stoa_tests::s3::admin`. Not for production: it is
//! slow, and it serves whoever knows the keys.

#![forbid(unsafe_code)]

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use stoa_tests::s3::{S3Options, S3Server};
use tokio::signal::unix::{SignalKind, signal};

/// Serves a directory as an S3-compatible store on loopback.
#[derive(Debug, Parser)]
#[command(name = "stoa-s3", version)]
struct Arguments {
    /// The directory whose subdirectories are the buckets; created when missing.
    #[arg(long)]
    root: PathBuf,
    /// The address to listen on; another one than loopback only inside of a test's own network.
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// The port there; 0 takes a free one.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// The access key that requests must be signed with.
    #[arg(long, env = "AWS_ACCESS_KEY_ID", default_value = "stoa-test")]
    access_key: String,
    /// The secret of the access key.
    #[arg(
        long,
        env = "AWS_SECRET_ACCESS_KEY",
        hide_env_values = true,
        default_value = "stoa-test-secret"
    )]
    secret_key: String,
    /// A bucket to make; may be repeated.
    #[arg(long = "bucket")]
    buckets: Vec<String>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .init();
    match serve(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stoa-s3: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(arguments: Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let server = S3Server::start(S3Options {
        root: arguments.root,
        host: arguments.host,
        port: arguments.port,
        access_key: arguments.access_key,
        secret_key: arguments.secret_key,
    })?;
    for bucket in &arguments.buckets {
        server.create_bucket(bucket)?;
    }
    println!("listening on {}", server.endpoint());
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = interrupted.recv() => {}
        _ = terminated.recv() => {}
    }
    Ok(())
}
