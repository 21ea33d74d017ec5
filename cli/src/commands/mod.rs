//! What operators do, and what the daemons run.

mod cache;
mod daemons;
mod layout;
mod load;
mod memory;
mod peers;
mod pin;
mod reset;
mod status;
mod unload;
mod wait;

pub use cache::verify;
pub use daemons::{coordinator, worker};
pub use layout::{layout, publish_or_reuse};
pub use load::load;
pub use memory::{Memory, MemoryTable};
pub use peers::peers;
pub use pin::pin;
pub use reset::reset;
pub use status::{Overview, status};
pub use unload::unload;
pub use wait::{LoadProgress, Loaded, Observed, progress_of, wait_all};

use crate::config::{report_as_json, report_as_text};
use crate::context::Context;

/// `stoa config check`: what is in force; what is wrong was said before this is reached.
pub fn config_check(context: &Context, json: bool) {
    let resolved = &context.config.resolved;
    if json {
        println!("{:#}", report_as_json(resolved));
    } else {
        print!("{}", report_as_text(resolved));
    }
}

/// Prints a value as one JSON text, indented for people who look.
fn print_json(value: &serde_json::Value) {
    println!("{value:#}");
}
