//! The scan: stock Parquet's [`FileSource`] with the cached row groups taken out.
//!
//! [`StoaSource`] wraps a `ParquetSource` and delegates every decision of planning to it. When a
//! file is opened, its row groups are pruned as stock Parquet does and then split:
//!
//! - a *hit*: every needed column is in shared memory, decoded or packed; its blocks become batches;
//! - a *mixture*: some are; the missing columns are decoded block by block beside them;
//! - a *miss*: none is; it goes back to stock Parquet, which reads through our
//!   [`file_reader`], so that bytes cached in the parquet form and footers still come from memory.
//!
//! Columns that [neighbours](remote) hold and this host does not count as hits while row groups are
//! split; they are fetched ahead of reading, and those that do not come in time are decoded beside
//! the others.
//!
//! What is known of a block is used to do less ([`stream`]): zone maps and dictionaries rule blocks
//! out ([`zones`]), the conjuncts of the predicate that pay are applied early ([`filters`],
//! [`adaptive`]), dynamic filters as they tighten (on floats as they are meant, [`zeros`]), and of
//! packed columns that only the output needs the surviving rows are unpacked. Row groups are divided
//! between partitions at blocks ([`share`]).
//!
//! Where this module cannot do what stock would (virtual columns, encryption, INT96, a row
//! selection by the user), the whole file is a miss.
//!
//! [`FileSource`]: datafusion_datasource::file::FileSource

mod adaptive;
pub(crate) mod context;
pub(crate) mod file_reader;
mod filters;
mod memo;
mod metrics;
mod morsel;
mod pruning;
mod remote;
mod row_group;
mod share;
mod source;
mod stream;
mod zeros;
mod zones;

pub(crate) use context::resolve;
pub use source::StoaSource;
pub(crate) use source::store_of;
