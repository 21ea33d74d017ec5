//! The worker: fills, publishes and retires shared memory by its part of the plan.
//!
//! A [`Worker`] owns one cache directory. It follows the plans in force, and makes its memory hold
//! what they name: chunks that are held are kept without any request, the others are fetched from
//! another worker that has them, or from the origin and decoded, appended to segments, and become
//! visible by one rename. Queries never wait for it and never see half of it. Other workers read its
//! memory, and it tells the queries of its host what they hold.
//!
//! - What to do is decided by pure functions: [`diff`] (keep, fetch, leave out, drop under a
//!   budget), [`batch`] (what is fetched together), [`targets`] (the newest plan wins),
//!   [`failures`] (what is tried again when), [`tally`] (how far it is).
//! - [`decode`] makes chunks from fetched bytes.
//! - The engine around them reacts to plans, looks at the origin, retries, and reports.
//!
//! What goes wrong with a chunk or a table is part of the worker's state; the worker goes on
//! serving. It knows nothing of DataFusion.

#![forbid(unsafe_code)]

mod background;
pub mod batch;
pub mod decode;
pub mod diff;
mod engine;
mod error;
mod events;
pub mod failures;
mod fill;
mod gather;
mod load;
mod lookout;
mod looks;
mod metrics;
mod opening;
mod pass;
mod peers;
mod prepare;
mod registration;
mod report;
mod resolve;
mod route;
mod service;
mod settings;
mod shared;
mod store;
pub mod tally;
pub mod targets;
mod upkeep;
mod walk;
mod worker;

pub use error::{Error, Result};
pub use events::Looked;
pub use looks::{LOOKS_FILE, looks};
pub use peers::{Listener, PeerNetwork};
pub use service::WorkerControl;
pub use settings::{CAPACITY_BYTES_MIN, TransferSettings, TransferTls, WorkerSettings};
pub use worker::{Waker, Worker, WorkerHandle};
