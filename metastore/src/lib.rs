//! What hosts agree on: keys, records, leases, election, fenced transactions, watches.
//!
//! [`Metastore`] is the small contract; [`EtcdMetastore`], [`EmbeddedMetastore`] and
//! [`SharedMetastore`], which shares an embedded one between the processes of a machine, keep it, and
//! [`conformance`] holds them to it. [`Records`] knows what is written where: layouts, load
//! requests, workers, the election, plans. The metastore decides where column chunks are placed
//! and how fresh they are, never whether an answer is right: readers do not need it.
//!
//! Tables and versions are plain text and numbers here; documents are JSON that others define.
//!
//! ```
//! use std::sync::Arc;
//! use stoa_metastore::{EmbeddedMetastore, Records};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> stoa_metastore::Result<()> {
//! let records = Records::new(Arc::new(EmbeddedMetastore::in_memory()));
//! records.publish_layout("tpch.lineitem", 1, r#"{"columns": ["l_shipdate"]}"#).await?;
//! records.request_load("tpch.lineitem:1").await?;
//! let refused = records.request_load("tpch.lineitem:2").await.unwrap_err();
//! assert_eq!(refused.to_string(), "unknown layout tpch.lineitem:2: known versions are 1");
//! # Ok(()) }
//! ```

#![forbid(unsafe_code)]

pub mod keys;

#[doc(hidden)]
pub mod conformance;
mod embedded;
mod error;
mod etcd;
mod model;
mod plan;
mod records;
pub mod shared;
mod store;
#[doc(hidden)]
pub mod testing;

pub use embedded::{EmbeddedMetastore, EmbeddedOptions};
pub use error::{Error, ErrorKind, Result};
pub use etcd::{EtcdMetastore, EtcdSettings, Secret};
pub use model::{
    CacheVersion, CoordinatorState, ElectionRecord, LeftOut, LoadRequest, PartPointer, PinRecord,
    PlanNotes, PlanTarget, Rejection, TableState, Unplanned, WorkerAddresses, WorkerPhase,
    WorkerRecord, WorkerState, all_reported, next_plan, split_table_version, table_version,
};
pub use plan::{
    EncodedPlan, PART_BYTES_MAX, PlanChunk, PlanPart, WorkerPlan, digest, join_plan, pointer_to,
    split_plan,
};
pub use records::{
    Follow, FollowHealth, FollowOptions, InboxEntry, InboxStream, LayoutsDropped, Leadership,
    Leaving, MADE_BY_SQL, OnDiscontinuity, REJECTIONS_MAX, Records, Registration,
};
pub use shared::SharedMetastore;
pub use store::{
    ClusterIdentity, Condition, Continuity, Entry, LeaseId, Listing, Metastore, Op, TXN_BYTES_MAX,
    TXN_OPS_MAX, Txn, TxnOutcome, WatchEvent, WatchStream, continuity,
};
