//! What follows from what is asked and what is there. Pure: no client, no clock.

mod judge;
mod preload;
mod rollout;
mod seen;
mod status;
mod step;
#[cfg(test)]
mod tests;
mod validate;

pub use judge::{Judged, judge};
pub use seen::{GroupSeen, PodPhase, PodSeen, PreloadSeen, Retired, Seen, TrialSeen};
pub use status::{About, Refusal, refused, status};
pub use step::{Plan, Step, plan};
pub use validate::{Asked, Invalid, validate};

/// So long a group whose pods all run may take to form anew, in seconds, before it is started afresh as a whole.
pub const REFORM_S_MAX: i64 = 120;

/// Pause before what failed to bring a version to a node is tried again, in seconds.
pub const PRELOAD_AGAIN_S: i64 = 60;

/// So much longer than it was given a drained group's ranks may take to end, in seconds, before its pods go all the same.
pub const END_S_MAX: i64 = 60;
