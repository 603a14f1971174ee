//! One target for each surface.

mod checkpoint;
mod collective;
mod grammar;
mod store;
mod template;
mod text;
mod wire;
