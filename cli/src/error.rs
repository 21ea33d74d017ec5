//! What a command can fail with, and the exit code that says so to scripts.

use std::process::ExitCode;

/// What a command failed with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(#[from] crate::config::Problems),
    /// The command line is wrong in a way that clap cannot know.
    #[error("{0}")]
    Usage(String),
    /// What was waited for did not come about in time, or is not there yet.
    #[error("{0}")]
    NotReady(String),
    /// The request was understood and refused: a stale version, an unknown table.
    #[error("{0}")]
    Refused(String),
    /// Another process owns what this command needs.
    #[error("{0}")]
    Busy(String),
    /// It was done as far as it could be; the message says what is missing, and why.
    #[error("{0}")]
    Partial(String),
    /// The user interrupted it.
    #[error("interrupted")]
    Interrupted,
    /// Anything else; the message says what was being done and what went wrong.
    #[error("{0}")]
    Failed(String),
}

/// The result of a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the exit codes mean, for `stoa --help`.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    it failed; the message says what and where
  2    the command line or the configuration is wrong
  3    not ready: a time-out, nothing to wait for, or a store or etcd that does not answer
  4    refused: a stale version, another layout under this version, an unknown table or column
  5    busy: another process owns the cache directory or the embedded state, and does not share it
  6    loaded in part: what fits is in use, the message says what was left out
  130  interrupted (SIGINT)";

impl Error {
    /// The process's exit code.
    pub fn code(&self) -> u8 {
        match self {
            Error::Failed(_) => 1,
            Error::Config(_) | Error::Usage(_) => 2,
            Error::NotReady(_) => 3,
            Error::Refused(_) => 4,
            Error::Busy(_) => 5,
            Error::Partial(_) => 6,
            Error::Interrupted => 130,
        }
    }

    /// The process's exit code, as main returns it.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code())
    }

    /// A failure while doing `what`.
    pub fn while_doing(what: impl std::fmt::Display, error: impl std::fmt::Display) -> Error {
        Error::Failed(format!("{what}: {error}"))
    }
}

/// An error and all that caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Many errors repeat their source's text already.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_documented() {
        for error in [
            Error::Failed(String::new()),
            Error::Usage(String::new()),
            Error::NotReady(String::new()),
            Error::Refused(String::new()),
            Error::Busy(String::new()),
            Error::Partial(String::new()),
            Error::Interrupted,
        ] {
            assert!(
                EXIT_CODES.contains(&format!("\n  {:<5}", error.code())),
                "{error:?}"
            );
        }
    }

    #[test]
    fn a_chain_says_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("inner"));
        assert_eq!(chain(&error), "outer: inner");
    }
}
