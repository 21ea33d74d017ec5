//! The benchmark harness: modes run interleaved in one process, compared as paired ratios.
//!
//! The machines this runs on are shared and noisy. So every iteration runs each query in every mode,
//! one after the other, and a mode is compared with another by the ratio of two times that were
//! measured seconds apart; of those ratios the median and its 90 % interval are reported.

#![forbid(unsafe_code)]

pub mod modes;
pub mod report;
pub mod stats;
