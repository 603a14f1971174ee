//! KV block pool and scheduler: continuous batching as a pure state machine.
//!
//! The leader of a group drives one [`Scheduler`] for each epoch: requests go in by
//! [`submit`](Scheduler::submit) and [`cancel`](Scheduler::cancel), forward passes come out of
//! [`plan`](Scheduler::plan), and what they drew goes back in through [`commit`](Scheduler::commit), which says
//! what to tell the clients. There is no clock, no thread and no randomness here: the same calls give the same
//! steps, so the simulator and production run the same code.

mod blocks;
mod chain;
mod check;
mod cost;
mod draft;
mod pace;
mod scheduler;
mod sequence;
mod tenants;

pub use cost::{Cost, CostError};
pub use scheduler::{Admitted, Limits, Load, Scheduler};
