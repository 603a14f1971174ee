//! Whole groups on loopback: threads as ranks, and processes as ranks.

mod common;
mod failures;
mod nccl;
mod processes;
mod ranks;
