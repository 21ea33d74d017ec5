//! The benchmark harness: modes run interleaved in one process, compared as paired ratios.
//!
//! The machines this runs on are shared and noisy. So every iteration runs each query in every mode,
//! one after the other, and a mode is compared with another by the ratio of two times that were
//! measured seconds apart; of those ratios the median and its 90 % interval are reported.
//!
//! What was measured is kept and shown by the crate `stoa-figures`, which knows no engine.

#![forbid(unsafe_code)]

pub mod child;
pub mod clickbench;
pub mod fill;
pub mod hot;
pub mod modes;
pub mod processes;
pub mod remote;
pub mod served;
pub mod suite;
pub mod touch;

/// What goes wrong in a benchmark ends it; nobody handles it.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
