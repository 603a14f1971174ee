//! Which group takes a request: routing policy and admission, pure.
//!
//! A router feeds its view of the fleet to one [`Dispatcher`] and asks it where each request goes. There is no
//! clock, no socket and no randomness here: the same calls give the same choices.

mod dispatcher;

pub use dispatcher::{Choice, Dispatcher, Ticket};
