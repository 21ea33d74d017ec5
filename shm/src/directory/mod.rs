//! What other workers hold: who has which chunk, and where in which segment.
//!
//! A directory is one immutable file in the cache directory, written by the worker there
//! ([`CacheDir::write_directory`](crate::CacheDir::write_directory)) and read in place by the query
//! processes of its host ([`DirectoryReader`]). The same bytes tell one worker's holdings to others
//! ([`crate::holdings`]). A directory is a hint: what it says was so when it was written.

mod build;
mod reader;
#[cfg(test)]
mod tests;
mod view;

pub use build::{DirectoryBuilder, HOLDERS_MAX};
pub use reader::DirectoryReader;
pub use view::{Directory, Holder, HoldingWorker};
