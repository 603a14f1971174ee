//! How many groups a cluster's load calls for. Pure: what routers tell becomes windows ([`Books`]), these go to the law of
//! `galerne_autoscale`, and what it decides is told when it says something new ([`Scaler`]).

mod books;
mod scaler;

pub use books::Books;
pub use scaler::{Counted, Order, Scaler, started};
