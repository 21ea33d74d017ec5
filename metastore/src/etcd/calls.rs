//! Calls to etcd: each with a deadline, each error in our words.

use std::error::Error as StdError;
use std::future::Future;
use std::time::Duration;

use etcd_client::Error as EtcdError;
use tokio::time::{sleep, timeout};

use crate::error::{Error, Result};
use crate::store::LeaseId;

/// How often a call is tried at another endpoint when one does not even connect.
const CONNECT_ATTEMPTS: u32 = 4;
const CONNECT_PAUSE: Duration = Duration::from_millis(50);

// gRPC status codes, by number: the crate that names them is not ours to depend on.
const CODE_INVALID_ARGUMENT: i32 = 3;
const CODE_NOT_FOUND: i32 = 5;
const CODE_PERMISSION_DENIED: i32 = 7;
const CODE_OUT_OF_RANGE: i32 = 11;
const CODE_UNAVAILABLE: i32 = 14;
const CODE_UNAUTHENTICATED: i32 = 16;
const CODES_TIMED_OUT: [i32; 2] = [1, 4];

/// How to call one cluster.
#[derive(Clone, Copy)]
pub(super) struct Calls<'a> {
    pub(super) endpoints: &'a str,
    pub(super) user: &'a str,
    pub(super) timeout: Duration,
}

impl Calls<'_> {
    pub(super) async fn once<T>(
        &self,
        call: &'static str,
        work: impl Future<Output = Result<T, EtcdError>>,
    ) -> Result<T> {
        match timeout(self.timeout, work).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.explain(call, error)),
            Err(_) => Err(self.timed_out(call)),
        }
    }

    /// Tries again, within the one deadline, when a request was never sent because its endpoint
    /// could not be connected to: another member of the cluster may answer.
    pub(super) async fn retried<T, F>(&self, call: &'static str, work: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let attempts = async {
            for attempt in 1.. {
                match work().await {
                    Err(error) if attempt < CONNECT_ATTEMPTS && never_sent(&error) => {
                        sleep(CONNECT_PAUSE * attempt).await;
                    }
                    other => return other,
                }
            }
            unreachable!("the loop above only ends by returning")
        };
        self.once(call, attempts).await
    }

    fn timed_out(&self, call: &'static str) -> Error {
        Error::Timeout {
            call,
            timeout_ms: self.timeout.as_millis() as u64,
            endpoints: self.endpoints.to_owned(),
        }
    }

    pub(super) fn explain(&self, call: &'static str, error: EtcdError) -> Error {
        let unavailable = |reason| Error::Unavailable {
            endpoints: self.endpoints.to_owned(),
            reason,
        };
        let status = match error {
            EtcdError::GRpcStatus(status) => status,
            // The client says this, and only this, when the server does not know the lease.
            EtcdError::LeaseKeepAliveError(_) => return Error::LeaseLost { lease: LeaseId(0) },
            EtcdError::TransportError(error) => {
                return unavailable(with_causes(error.to_string(), &error));
            }
            EtcdError::IoError(error) => return unavailable(error.to_string()),
            other => {
                return Error::Server {
                    call,
                    reason: other.to_string(),
                };
            }
        };
        let message = status.message().to_owned();
        let denied = |reason| Error::Denied {
            user: self.user.to_owned(),
            reason,
        };
        // A cause means that this side made the status up, of a connection that broke: whatever
        // its code, no server said it.
        let broken = status.source().is_some();
        match i32::from(status.code()) {
            code if broken || code == CODE_UNAVAILABLE => {
                unavailable(with_causes(message, &status))
            }
            code if CODES_TIMED_OUT.contains(&code) => self.timed_out(call),
            CODE_NOT_FOUND if message.contains("lease") => Error::LeaseLost { lease: LeaseId(0) },
            CODE_OUT_OF_RANGE if message.contains("compacted") => Error::Compacted {
                requested: 0,
                compacted: 0,
            },
            CODE_UNAUTHENTICATED | CODE_PERMISSION_DENIED => denied(message),
            CODE_INVALID_ARGUMENT if message.contains("authentication failed") => denied(message),
            CODE_INVALID_ARGUMENT if message.contains("user name is empty") => {
                denied("the server asks for a user".to_owned())
            }
            _ => Error::Server {
                call,
                reason: message,
            },
        }
    }
}

/// Whether the request cannot have reached a server.
fn never_sent(error: &EtcdError) -> bool {
    let EtcdError::GRpcStatus(status) = error else {
        return false;
    };
    let text = with_causes(status.message().to_owned(), status);
    i32::from(status.code()) == CODE_UNAVAILABLE && text.contains("tcp connect error")
}

/// A text with its causes: a transport's own text only says that there was one.
fn with_causes(mut text: String, error: &dyn StdError) -> String {
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
