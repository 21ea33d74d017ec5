//! Stock DataFusion beside Stoa in one process: the same statements, the answers compared.
//!
//! [`answer`] asks and compares, [`cached`] is a cache that covers whatever files a session reads,
//! [`slt`] runs directories of sqllogictest files, [`files`] single Parquet files, and [`fuzz`]
//! statements that it makes up. The program `stoa-compare` is a command line for the last three.

pub mod answer;
pub mod cached;
pub mod files;
pub mod fuzz;

pub mod report;
pub mod slt;
