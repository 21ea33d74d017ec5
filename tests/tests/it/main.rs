//! Hazards that cross crates and processes, in one binary: linking DataFusion is what costs.

mod blocks;
mod cases;
mod faults;
mod files;
mod floats;
mod foreign;
mod fuzz;
mod neighbours;
mod operator;
mod s3_server;
mod scan;
mod scripts;
mod slt;
mod snapshots;
mod spine;
mod states;
mod stores;
