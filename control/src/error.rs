//! What can go wrong between roles.

use std::net::SocketAddr;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a control call, or serving them, failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Plain text on an address that others can reach.
    #[error(
        "insecure address {address}: control is not encrypted yet, so only loopback addresses \
         are used; take 127.0.0.1, or set `insecure = true` if the network is trusted"
    )]
    InsecureAddress {
        /// What was asked for.
        address: String,
    },
    /// Text that is no address.
    #[error("invalid address `{found}`: expected host:port, such as 127.0.0.1:18888")]
    InvalidAddress {
        /// What was asked for.
        found: String,
    },
    /// The address could not be listened on.
    #[error("cannot listen on {address}: {source}; is another process there?")]
    Bind {
        /// What was asked for.
        address: SocketAddr,
        /// The system's words.
        source: std::io::Error,
    },
    /// Nobody answers there.
    #[error("no answer from {address}: {reason}; is it running?")]
    Unreachable {
        /// Whom we asked.
        address: String,
        /// The transport's words.
        reason: String,
    },
    /// The answer did not come in time; what was asked may or may not have happened.
    #[error("`{call}` at {address} did not finish within {timeout_ms} ms")]
    Deadline {
        /// What was asked.
        call: &'static str,
        /// Whom we asked.
        address: String,
        /// The deadline.
        timeout_ms: u64,
    },
    /// The other side answered with an error.
    #[error("`{call}` at {address} failed: {reason}")]
    Failed {
        /// What was asked.
        call: &'static str,
        /// Whom we asked.
        address: String,
        /// The other side's words.
        reason: String,
    },
    /// The other side does not offer what was asked.
    #[error("`{call}` is not served at {address}: {reason}; is that the right role and version?")]
    NotServed {
        /// What was asked.
        call: &'static str,
        /// Whom we asked.
        address: String,
        /// The other side's words.
        reason: String,
    },
}

/// What an error asks of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Try again later; what was asked may or may not have happened.
    Retry,
    /// Fix the configuration.
    Config,
    /// Report it.
    Failed,
}

impl Error {
    /// What this error asks of the caller.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::InsecureAddress { .. }
            | Error::InvalidAddress { .. }
            | Error::Bind { .. }
            | Error::NotServed { .. } => ErrorKind::Config,
            Error::Unreachable { .. } | Error::Deadline { .. } => ErrorKind::Retry,
            Error::Failed { .. } => ErrorKind::Failed,
        }
    }
}
