//! How many groups the service level needs.
//!
//! A loop outside feeds one [`Autoscaler`] with what happened, a [`Window`] at a time, and asks it for a [`Decision`]: how many
//! groups there should be once those that are started now will serve, and why. Nothing here does I/O or knows what time it
//! is: the same calls give the same decisions, so the simulation (`tests/traces`) and the operator run the same code.
//!
//! What it goes by are the steps that groups have run and the requests that came to routers, not how busy a device says it is:
//! a GPU that decodes one stream is as busy as one that decodes sixty.
//!
//! 1. **What a step costs** ([`StepCost`]) is fitted to the steps of all groups: a fixed part, and one for each token and for
//!    each key that a token attends to.
//! 2. **How many will come** (`forecast`) is a line through the arrivals since the last jump of their rate, continued for
//!    as long as a new group takes to serve, and the upper end of what this line may be.
//! 3. **What k groups would make of it** ([`Prediction`], `law`): percentiles of the time to the first token and between
//!    tokens.
//! 4. **The decision** (`autoscaler`): the smallest k that holds what is promised. More at once; fewer only when fewer
//!    would have been enough for minutes and for more requests than are expected.

mod autoscaler;
mod cold_start;
mod cost;
mod decision;
mod forecast;
mod law;
mod lengths;
mod queue;
mod sla;
mod window;

pub use autoscaler::{Autoscaler, CHANGES_PER_HOUR_MAX, HOLD_COLD_STARTS, RECOVERY_S};
pub use cold_start::COLD_START_S_FIRST;
pub use cost::StepCost;
pub use decision::{Decision, METRICS, Why};
pub use law::{Demand, Law, Prediction};
pub use lengths::Lengths;
pub use sla::{Bounds, Room, Sla, Target};
pub use window::{GroupWindow, Groups, Moments, Steps, Window};
