//! How to get a column chunk wherever it is: shared memory first, then a neighbour's memory, else
//! the origin.
//!
//! A [`Reader`] belongs to a process: it follows the generations that a worker publishes in one
//! cache directory, decodes the catalog of a table when it is first asked for, and hands out [`View`]s. A view is what
//! one scan works with: one generation of the index and the tables that it names.
//!
//! A query process needs nothing else: neither the metastore nor, for a hot query, the origin.
//! Every failure here is a [`Miss`], never an error of the query and never a wait. What
//! [`Neighbours`] hold is fetched ahead of the scan; a neighbour that fails costs its deadline at
//! most, and then its chunks are misses too.

#![forbid(unsafe_code)]

mod chunk;
pub mod neighbours;
mod table;
mod tables;
mod view;

pub use chunk::{CachedChunk, ChunkSource, Miss, MissCounts, ReadStatistics, RemoteChunk};
pub use neighbours::{NeighbourSettings, Neighbours, RemoteMiss};
pub use stoa_layout::RootColumn;
pub use stoa_shm::{ReaderOptions, Verify};
pub use table::{Table, TableFile};
pub use view::{Reader, RemoteColumns, View, ViewState};
