//! Hostile bytes at every surface: whatever comes, nothing panics, overflows the stack, runs long or takes memory that
//! its size does not warrant, and a refusal is a sentence that does not repeat what was sent.
//!
//! `cargo test` runs some hundreds or thousands of inputs a target, the same ones each time; `make fuzz` runs for hours,
//! guided by coverage. An input that ends in a fault lies under `target/tmp/fuzz/TARGET/found`, with the command that
//! runs it again; what was found becomes a test of its crate, under a name that says what it was.

mod engine;
mod targets;

#[global_allocator]
static MEMORY: engine::meter::Counting = engine::meter::Counting;
