//! The Kubernetes operator: `GalerneCluster`s become groups, routers and what they need, and stay so.
//!
//! A pass over one cluster is a sentence, and each word of it a module: observe what is there, validate what is asked for,
//! [`plan`] what follows, apply it, and say so in the status. The middle is pure: it takes what was seen and what time it
//! is, and is tested from YAML and from seeds. So is what load calls for ([`scale`]).

pub mod api;
pub mod build;
pub mod names;
pub mod plan;
pub mod run;
pub mod scale;
mod yaml;
