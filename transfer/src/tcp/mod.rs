//! TCP, with or without TLS. `docs/transfer.md` has the bytes.

mod connect;
mod io;
mod link;
mod serve;
mod session;

pub use connect::{Tcp, TcpSettings};
pub use serve::{Server, ServerHandle, ServerSettings, ServerStatistics};
#[cfg(any(test, feature = "conformance"))]
pub use {connect::link_over, serve::serve_over};
