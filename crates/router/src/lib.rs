//! The faces in front of a fleet of groups: HTTP as OpenAI speaks it, and gRPC.
//!
//! Text stops here. A request is tokenized, sent to the least loaded group that serves its model, and what comes
//! back, token by token, is turned into text until a stop string or the engine ends it:
//!
//! ```text
//! http::openai ─┐            ┌─ tokenize ─ groups::place ─ Engine.Run ─┐
//!               ├─▶ answer ──┤                                         ├─▶ deltas
//! grpc ─────────┘            └─ detokenize, stop strings ◀── tokens ───┘
//! ```
//!
//! Both faces sit on that one pipeline (`answer`). It is pulled by its reader and holds no queue: a slow reader
//! slows its own stream, and a reader that leaves drops the pipeline, which cancels the request at the leader.
//!
//! A router holds nothing that the client's request and the fleet do not give back.

mod admin;
mod again;
mod answer;
mod ask;
mod choices;
mod demand;
mod failure;
mod gate;
mod groups;
mod grpc;
mod http;
mod inside;
mod limits;
mod link;
mod loads;
mod metrics;
mod model;
mod repeats;
mod serve;
mod server;
mod standing;
mod tokens;
mod trace;
mod traffic;

pub use again::SharedBans;
pub use galerne_dispatch::BAN_S;
pub use galerne_text::ChatFormatKind;
pub use gate::{ApiKey, Gate, GateError, GateOptions, KeyFileError, key_entry};
pub use inside::{Inside, inside};
pub use limits::RequestLimits;
pub use model::ModelSource;
pub use serve::{Listeners, RouterError, RouterOptions, RouterTls, serve};
pub use server::ServerLimits;
