//! What crosses the modules of this crate.

mod conforming;

use std::sync::Arc;

use crate::{Tcp, TcpSettings, Transport};

/// A transport of its own for plain text.
fn tcp() -> Arc<dyn Transport> {
    Arc::new(Tcp::new(TcpSettings::default()))
}
