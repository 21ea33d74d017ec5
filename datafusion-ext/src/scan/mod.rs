//! The scan: stock Parquet's [`FileSource`] with the cached row groups taken out.
//!
//! [`StoaSource`] wraps a `ParquetSource` and delegates every decision of planning to it. When a
//! file is opened, its row groups are pruned as stock Parquet does and then split:
//!
//! - a *hit*: every needed column is in shared memory as Arrow; its blocks become batches in place;
//! - a *mixture*: some are; the missing columns are decoded block by block beside them;
//! - a *miss*: none is; it goes back to stock Parquet, which reads through our
//!   [`file_reader`], so that bytes cached in the parquet form and footers still come from memory.
//!
//! Where this module cannot do what stock would (virtual columns, encryption, INT96, a row
//! selection by the user), the whole file is a miss.
//!
//! [`FileSource`]: datafusion_datasource::file::FileSource

pub(crate) mod context;
pub(crate) mod file_reader;
mod metrics;
mod morsel;
mod pruning;
mod row_group;
mod share;
mod source;
mod stream;

pub use source::StoaSource;
