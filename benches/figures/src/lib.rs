//! What benchmarks measured, apart from how: paired ratios and their intervals, the document that a
//! run writes, and the tables and the plot that are made of it.
//!
//! This crate knows no engine, so that the peers in `benches/peers`, which are built against other
//! versions of DataFusion, report in the same words.

#![forbid(unsafe_code)]

pub mod criterion;
pub mod document;
pub mod plot;
pub mod stats;
pub mod tables;
pub mod times;

pub use document::Document;
pub use stats::Interval;
pub use times::{Block, Comparison, Times};
