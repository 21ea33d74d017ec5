//! Object stores by name: ranges coalesced, made once, checked against the object's identity.
//!
//! What this crate promises its callers:
//!
//! - **Same identity, same bytes.** [`Origin::read`] returns the bytes of exactly the content that
//!   an [`ObjectIdentity`] names, or an error. It sends `If-Match` (or asks for the version) and
//!   compares what the response says; a store that refuses conditions is read by comparison alone,
//!   and one whose answers prove nothing is an error.
//! - **One request for one range**, however many callers ask for it at the same time.
//! - **Everything is bounded**: attempts, back-off, the waits that stores ask for, time, bytes in
//!   flight. There is one layer of retries.
//! - **Every request is counted once**, in the wrapper that [`Stores`] puts around each store.
//!
//! It knows nothing of Parquet, shared memory or etcd.
#![forbid(unsafe_code)]

mod answer;
mod coalesce;
mod connector;
mod content;
mod counted;
mod dialect;
mod error;
mod flight;
mod identity;
mod list;
mod location;
mod read;
mod retry;
mod stores;

pub use coalesce::{MergedRange, coalesce};
pub use counted::OriginCounters;
pub use error::{Error, ErrorKind, Result};
pub use identity::{ObjectIdentity, ObjectTag};
pub use list::ListedObject;
pub use location::{Location, object_path};
pub use read::{Origin, OriginLimits};
pub use retry::Backoff;
pub use stores::{StoreSettings, Stores};

// Callers need these types to use the API above; one version of them for everybody.
pub use object_store;

#[cfg(test)]
mod tests;
