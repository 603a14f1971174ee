//! The engine against goldens, against a plain forward pass, and against itself.

mod drafts;
mod formats;
mod golden;
mod gpu;
mod gpu_ahead;
mod gpu_draws;
mod gpu_edges;
mod gpu_fast;
mod gpu_peers;
mod invariance;
mod kv;
mod rounded;
mod sampling;
mod smollm2;
mod support;
