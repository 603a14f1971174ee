//! What may go wrong in a pass. It is tried again, later and later.

use galerne_coord::CoordError;

/// Why a pass over a cluster ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PassError {
    /// The API server refused a write, or did not answer.
    #[error("cannot {verb} {kind} {name}: {source}")]
    Write { verb: &'static str, kind: String, name: String, source: Box<kube::Error> },
    /// etcd refused, or did not answer.
    #[error(transparent)]
    Etcd(#[from] CoordError),
    /// etcd has not been reached yet.
    #[error("etcd has not been reached yet")]
    NoEtcd,
}

impl PassError {
    pub(crate) fn writes(
        verb: &'static str,
        kind: impl Into<String>,
        name: impl Into<String>,
    ) -> impl FnOnce(kube::Error) -> Self {
        let (kind, name) = (kind.into(), name.into());
        move |error| Self::Write { verb, kind, name, source: Box::new(error) }
    }
}
