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

/// Whether the API server says that what is asked about is not there. Of a kind that it does not know it says so in a line of text,
/// not in a `Status` with a reason: the code is all that both have.
pub(crate) fn not_there(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}
