//! The real binary in real processes: what a user would start, ask, kill and mistype.

mod bad_start;
mod clients;
mod commands;
mod fairness;
mod hosts;
mod hub;
mod limits;
mod load;
mod loss;
mod metrics;
mod process;
mod recovery;
mod secured;
mod serve;
mod setup;
mod traces;

#[path = "../../crates/tls/tests/tls/authority.rs"]
mod authority;
