//! A router on real sockets, between real clients and scripted leaders.

mod access;
mod admin;
mod bad_requests;
mod bounds;
mod calls;
mod choices;
mod failover;
mod grpc;
mod inference;
mod leader;
mod lifecycle;
mod limits;
mod malformed;
mod migration;
mod mistral;
mod openai;
mod operation;
mod prefixes;
mod repeats;
mod responses;
mod shaped;
mod stage;
mod tls;
mod tokens;
mod vllm_engine;
mod vllm_fields;
