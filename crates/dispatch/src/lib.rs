//! Which group takes a request: routing policy and admission, pure.
//!
//! A router feeds its view of the fleet to one [`Dispatcher`] and asks it where each request goes. There is no
//! clock, no socket and no randomness here: the same calls give the same choices. [`Quotas`] says how much of a
//! minute's requests and tokens a tenant has left; time comes in as an argument.

mod dispatcher;
mod quota;

pub use dispatcher::{Choice, Dispatcher, Ticket};
pub use quota::{Admission, Exceeded, Gauge, Quota, Quotas, Standing};
