//! Stoa for DataFusion: tables whose hot column chunks are read in place from shared memory.
//!
//! An engine that runs DataFusion registers the cache of its machine in three lines:
//!
//! ```
//! # use datafusion::prelude::SessionContext;
//! use stoa_datafusion::{Origin, Stoa};
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> datafusion::error::Result<()> {
//! # let session = SessionContext::new();
//! let stoa = Stoa::open("/dev/shm/stoa-example".as_ref(), Origin::default());
//! stoa.register(&session).await?;
//! let tables = session.sql("select * from stoa_tables()").await?;
//! # assert_eq!(tables.count().await?, 0);
//! # Ok(())
//! # }
//! ```
//!
//! Then `select count(*) from tpch.lineitem` reads shared memory where a worker of this machine has
//! loaded it, and the origin where not. Without a worker at all, [`Embedded`] runs one in the
//! process.
//!
//! This crate and the command line are the only ones that name DataFusion. How the scan fits in is
//! told in [`StoaSource`]'s module, what sessions can set in [`StoaOptions`].

#![forbid(unsafe_code)]

mod catalog;
mod claims;
mod clock;
mod dropping;
mod embedded;
mod factory;
mod footers;
mod functions;
mod min_max;
mod observe;
mod one_state;
mod options;
mod rule;
mod scan;
mod selectivity;
mod session;
mod statistics;
mod table;
mod zeros;

pub use embedded::{EMBEDDED_WORKER, Embedded, EmbeddedError, EmbeddedSettings, Publisher};
pub use footers::DoubtFooters;
pub use observe::reader_metrics;
pub use options::StoaOptions;
pub use rule::CacheParquetScans;
pub use scan::StoaSource;
pub use selectivity::EstimateFilters;
pub use session::Stoa;
pub use stoa_origin::Origin;
pub use stoa_reader::Reader;
pub use table::StoaTable;
