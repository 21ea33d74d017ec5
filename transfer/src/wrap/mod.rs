//! Links around links: what every transport gets without doing it itself, and what tests add.

mod deadline;
#[cfg(any(test, feature = "conformance"))]
mod fault;
mod metered;
#[cfg(any(test, feature = "conformance"))]
mod throttle;
mod verified;

pub(crate) use deadline::{DeadlineLink, passed};
pub(crate) use metered::MeteredLink;
pub(crate) use verified::VerifiedLink;

#[cfg(any(test, feature = "conformance"))]
pub use fault::{Fault, FaultPlan, Faulty};
#[cfg(any(test, feature = "conformance"))]
pub use throttle::Throttled;

/// Passes on what a wrapper of a link leaves as it is.
macro_rules! delegate_link {
    ($inner:ident) => {
        fn received_bytes(&self) -> u64 {
            self.$inner.received_bytes()
        }
        fn outstanding_bytes(&self) -> u64 {
            self.$inner.outstanding_bytes()
        }
        fn is_closed(&self) -> bool {
            self.$inner.is_closed()
        }
        fn close(&self, reason: &str) {
            self.$inner.close(reason);
        }
    };
}
pub(crate) use delegate_link;
