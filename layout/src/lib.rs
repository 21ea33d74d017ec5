//! What to cache: tables, versions, chunk identities, the Parquet catalog and layout documents.
//!
//! - A [`LayoutDocument`] says which columns or chunks of which table are worth caching, in which
//!   order. It is what `stoa layout` publishes.
//! - A [`TableCatalog`] is what the table's files say about themselves: identities, footers, page
//!   indexes, the merged schema. A query plans from it without asking the origin.
//! - [`wanted`] puts the two together: the chunks to cache, most wanted first, with their sizes.
//!
//! Files are not trusted. A file whose footer cannot be believed is rejected by name
//! ([`TableCatalog::rejected`]) and never makes anything panic.
//!
//! This crate knows nothing of etcd, shared memory or DataFusion.
#![forbid(unsafe_code)]

mod belief;
mod catalog;
mod choice;
mod document;
mod encode;
mod error;
mod estimate;
mod footer;
mod form;
mod indexes;
mod load;
mod names;
mod partitions;
mod replicas;
mod schema;
mod thrift;
mod wanted;

pub use belief::without_claims;
pub use catalog::{CatalogFile, RejectedFile, RootColumn, TableCatalog};
pub use choice::{Candidate, Choice, Why, candidates, choose_forms, forms_of};
pub use document::{ChunkSpec, ColumnRef, LayoutDocument};
pub use error::{Error, Result};
pub use estimate::{ColumnSize, FormBytes, Values, chunk_bytes, sizes};
pub use form::{ChunkRef, Form, FormChoice};
pub use names::{LayoutVersion, TableName, TableVersion};
pub use replicas::Replicas;
pub use schema::{allows_arrow, decoded_schema};
pub use wanted::{WantedChunk, wanted, wanted_within};

pub use parquet::file::metadata::ParquetMetaData;
pub use stoa_origin::{Location, ObjectIdentity, ObjectTag, Origin};

#[cfg(test)]
mod tests;
