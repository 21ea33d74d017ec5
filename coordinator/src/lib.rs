//! Planning as a pure function, election, and the loop that turns layouts into plans.
//!
//! - [`plan`] decides which chunk goes to which worker: a pure function.
//! - [`decide`](decide::decide) decides what to do next from what is seen in the metastore, what is
//!   remembered, and the time: without I/O, and deterministic, but it notes in its memory what it
//!   decided.
//! - [`Coordinator`] is the shell around both: it campaigns, follows the metastore, reads footers
//!   through the origin, and writes plans, every one of them fenced by its election.
//!
//! What holds whatever happens:
//!
//! - **A plan is whole or not in force.** Its parts are written first, the pointer last.
//! - **A coordinator that was replaced writes nothing.**
//! - **Level-triggered**: what is wanted and what is there count, not the events in between; of
//!   versions 5, 6, 7 the last is planned, and no event can be missed.
//! - **Nothing needs this crate to go on**: without a coordinator, workers serve what they hold.
#![forbid(unsafe_code)]

mod action;
mod balance;
mod basis;
mod coordinator;
pub mod decide;
mod error;
mod handle;
mod inbox;
mod loading;
mod making;
pub mod memory;
mod nodes;
mod plan;
mod settings;
mod sized;
mod status;
mod table;
mod term;
mod view;

pub use coordinator::Coordinator;
pub use error::{Error, Result};
pub use handle::{CoordinatorHandle, CoordinatorListeners};
pub use plan::{Balancer, Plan, PlanChunk, PlanInput, PlanWorker, Reason, plan};
pub use settings::{Clock, CoordinatorSettings, SystemClock};

#[cfg(test)]
mod shell_tests;
