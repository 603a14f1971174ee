//! What the store refuses, in etcd's own words and codes: clients match on both.

use tonic::{Code, Status};

/// Why a request was not done; nothing of it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    #[error("etcdserver: too many operations in txn request")]
    TooManyOps,
    #[error("etcdserver: request is too large")]
    TooLarge,
    #[error("etcdserver: mvcc: database space exceeded")]
    NoSpace,
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    #[error("etcdserver: mvcc: required revision is a future revision")]
    Future,
    #[error("etcdserver: requested lease not found")]
    LeaseNotFound,
    #[error("etcdserver: lease already exists")]
    LeaseExists,
    #[error("etcdserver: too large lease TTL")]
    LeaseTtlTooLarge,
    #[error("the embedded store holds at most {} leases", super::LEASES_MAX)]
    TooManyLeases,
    #[error("the embedded store does not know {0}: use a real etcd")]
    Unknown(&'static str),
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal {
            Refusal::EmptyKey | Refusal::DuplicateKey | Refusal::TooManyOps | Refusal::TooLarge => {
                Code::InvalidArgument
            }
            Refusal::NoSpace | Refusal::TooManyLeases => Code::ResourceExhausted,
            Refusal::Compacted | Refusal::Future | Refusal::LeaseTtlTooLarge => Code::OutOfRange,
            Refusal::LeaseNotFound => Code::NotFound,
            Refusal::LeaseExists => Code::FailedPrecondition,
            Refusal::Unknown(_) => Code::Unimplemented,
        };
        Self::new(code, refusal.to_string())
    }
}
