//! Which group takes a request: routing policy and admission, pure.
//!
//! A router feeds its view of the fleet to one [`Dispatcher`] and asks it where each request goes. There is no
//! clock, no socket and no randomness here: the same calls give the same choices. [`Quotas`] says how much of a
//! minute's requests and tokens a tenant has left, [`RetryBudget`] how many requests may be sent again, [`Suspicion`] whether groups
//! die of one, and [`Bans`] which may not; time comes in as an argument.

mod bans;
mod breaker;
mod budget;
mod dispatcher;
mod quota;
mod suspicion;

pub use bans::{BAN_S, BANS_MAX, Bans, Digest};
pub use breaker::{BREAKER_FAILURES, BREAKER_MS_MAX, BREAKER_MS_MIN, BreakerState, full_jitter};
pub use budget::{RETRIES_PER_S_MIN, RETRIES_PERCENT_MAX, RETRY_WINDOW_S, RetryBudget};
pub use dispatcher::{Choice, Dispatcher, Ticket, Want};
pub use quota::{Admission, Exceeded, Gauge, Quota, Quotas, Standing};
pub use suspicion::{INNOCENT_TOKENS, Losses, Suspicion};
