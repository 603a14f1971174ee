//! The gRPC messages and services of `proto/galerne/v1`, and their conversions to and from `galerne-types`.
//!
//! The bytes on a wire are hostile: every conversion into a type checks what the type promises and says what is
//! wrong, naming the field.

mod codec;
mod convert;
mod failed;
mod news;
mod secret;

pub use convert::{RepeatKey, WireError, check_sampling};
pub use news::TokenRun;
pub use secret::{show_epoch, show_secret, shown_epoch, shows_secret};

/// Generated messages, clients and servers.
pub mod v1 {
    #![allow(clippy::all, missing_docs, unreachable_pub, reason = "generated code")]
    tonic::include_proto!("galerne.v1");
}

/// Wire formats of vLLM's that the gRPC face speaks too: clients and servers generated from our description of them.
pub mod vllm {
    #![allow(clippy::all, missing_docs, unreachable_pub, reason = "generated code")]
    tonic::include_proto!("vllm");

    /// Between SMG's routers and vLLM's engines.
    pub mod grpc {
        /// The package's last part.
        pub mod engine {
            tonic::include_proto!("vllm.grpc.engine");
        }
    }
}

/// The encoded descriptors of all files, for gRPC reflection.
pub const DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("galerne");
