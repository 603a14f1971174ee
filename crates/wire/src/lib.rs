//! The gRPC messages and services of `proto/galerne/v1`, and their conversions to and from `galerne-types`.
//!
//! The bytes on a wire are hostile: every conversion into a type checks what the type promises and says what is
//! wrong, naming the field.

mod convert;
mod secret;

pub use convert::{WireError, check_sampling};
pub use secret::{show_secret, shows_secret};

/// Generated messages, clients and servers.
pub mod v1 {
    #![allow(clippy::all, missing_docs, unreachable_pub, reason = "generated code")]
    tonic::include_proto!("galerne.v1");
}

/// The encoded descriptors of all files, for gRPC reflection.
pub const DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("galerne");
