//! What can go wrong between Galerne and etcd.

use std::error::Error as _;

use galerne_types::{Epoch, GroupId, RankId};

use crate::formation::Ended;

/// Why something could not be agreed on.
#[derive(Debug, thiserror::Error)]
pub enum CoordError {
    /// No endpoint, or one that is not an address.
    #[error("etcd endpoint {endpoint:?} is not HOST:PORT or {scheme}://HOST:PORT")]
    Endpoint {
        /// As it was given.
        endpoint: String,
        /// What it would begin with.
        scheme: &'static str,
    },
    /// An endpoint that wants TLS, and nothing to trust.
    #[error("etcd endpoint {0:?} wants TLS: name the authority of etcd's certificate with --etcd-ca")]
    NoAuthority(
        /// As it was given.
        String,
    ),
    /// A file that says how etcd is spoken to is wrong.
    #[error("{file}, which is needed to speak to etcd, cannot be used: {reason}")]
    Access {
        /// Which.
        file: String,
        /// Why not.
        reason: String,
    },
    /// A cluster's, group's or rank's name that would not make a key of its own.
    #[error("{what} name {name:?} must be of letters, digits, '.', '_' and '-'")]
    Name {
        /// What is named.
        what: &'static str,
        /// As it was given.
        name: String,
    },
    /// No answer in time.
    #[error("etcd at {endpoints} does not answer ({reason}): could not {what}")]
    Unreachable {
        /// Where it was expected.
        endpoints: String,
        /// What was to be done.
        what: &'static str,
        /// The last failure.
        reason: String,
    },
    /// An answer that refuses.
    #[error("etcd at {endpoints} refused to {what}: {reason}")]
    Refused {
        /// Who refused.
        endpoints: String,
        /// What was to be done.
        what: &'static str,
        /// etcd's own words.
        reason: String,
    },
    /// Another process stands in this one's place.
    #[error(
        "rank {rank} of group {group} has been taken over by another process, which this one yields to: \
         if both are wanted, give them different host names or indices"
    )]
    Replaced {
        /// The group.
        group: GroupId,
        /// The place.
        rank: RankId,
    },
    /// The epoch is not the group's last one, or cannot go on.
    #[error("epoch {} of group {group} is over: {ended}", epoch.0)]
    Over {
        /// The group.
        group: GroupId,
        /// The one that is over.
        epoch: Epoch,
        /// Why it is.
        ended: Ended,
    },
    /// The rank's lease is gone and not renewed yet.
    #[error("rank {rank} of group {group} is not registered at present; try again")]
    Unregistered {
        /// The group.
        group: GroupId,
        /// The rank.
        rank: RankId,
    },
    /// The system gives no random bytes for the epoch's secret.
    #[error("no random bytes for the epoch's secret: {0}")]
    Random(#[from] getrandom::Error),
    /// The embedded store cannot serve.
    #[error("the embedded store cannot serve: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// The words at the bottom of a failure: `Connection refused (os error 111)` rather than `transport error`.
pub(crate) fn root_cause(error: &etcd_client::Error) -> String {
    let etcd_client::Error::GRpcStatus(status) = error else { return error.to_string() };
    let mut cause = status.source();
    while let Some(deeper) = cause.and_then(|cause| cause.source()) {
        cause = Some(deeper);
    }
    cause.map_or_else(|| status.message().to_owned(), ToString::to_string)
}
