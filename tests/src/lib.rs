//! Fixtures for the hazards that cross crates, processes and hosts.
//!
//! What a test needs around Stoa, each owned by a value that cleans up when it is dropped:
//! an S3-compatible server that counts and misbehaves on request ([`s3`]), a real etcd
//! ([`etcd`]), coordinator and workers as real processes ([`cluster`]), TPC-H as Parquet
//! ([`tpch`]), tables that hold what readers get wrong ([`edges`]) and footers as other writers make
//! them ([`footers`]). [`compare`] sets stock DataFusion beside Stoa. The tests themselves are in
//! `tests/it`.

#![forbid(unsafe_code)]

pub mod cluster;
pub mod compare;
pub mod edges;
pub mod etcd;
pub mod footers;
pub mod http;
pub mod process;
pub mod s3;
pub mod scratch;
pub mod tpch;
pub mod wait;

use std::path::PathBuf;
use std::time::Duration;

/// What a fixture could not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file, directory or socket refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the path or address.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A program that the test needs is not there.
    #[error("{program} not found at {}: {remedy}", path.display())]
    Missing {
        /// The program.
        program: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
    /// Something did not happen in time.
    #[error("{what}: not within {waited:?}; last seen: {seen}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
        /// The last thing seen instead.
        seen: String,
    },
    /// A command failed or a server answered with an error.
    #[error("{what} failed with {status}: {output}")]
    Failed {
        /// The command line or request.
        what: String,
        /// The exit or HTTP status.
        status: String,
        /// What it said.
        output: String,
    },
    /// An answer could not be understood.
    #[error("{what}: unexpected answer: {answer}")]
    Answer {
        /// What was asked.
        what: String,
        /// What came back.
        answer: String,
    },
}

/// A fixture's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Names what was tried when it failed.
pub(crate) trait Tried<T> {
    /// Wraps an I/O error with what was tried.
    fn tried(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Tried<T> for std::io::Result<T> {
    fn tried(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io {
            what: what(),
            source,
        })
    }
}
