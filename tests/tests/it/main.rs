//! Hazards that cross crates and processes, in one binary: linking DataFusion is what costs.

mod blocks;
mod neighbours;
mod scan;
mod slt;
mod spine;
