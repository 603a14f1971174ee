//! Style that matters is a test: lengths, orphan files, who may use whom, and what the pure crates may not do.

mod lengths;
mod orphans;
mod rooms;
mod tree;
