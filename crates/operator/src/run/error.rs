//! What may go wrong in a pass. It is tried again, later and later.

use galerne_coord::CoordError;

use crate::plan::Refusal;

/// Why a pass over a cluster ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PassError {
    /// The API server refused a write, or did not answer.
    #[error("cannot {verb} {kind} {name}: {source}")]
    Write { verb: &'static str, kind: String, name: String, source: Box<kube::Error> },
    /// Something of this name is there, and somebody else's.
    #[error(
        "cannot make {kind} {name}: there is one already that is not this cluster's. Delete it, or give one of them another name"
    )]
    Taken { kind: String, name: String },
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

    /// What people must be told of it, because it does not pass by itself.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Write { verb, kind, name, source } => match &**source {
                kube::Error::Api(status) if !matches!(status.code, 409 | 429 | 502..=504) => Some(Refusal {
                    reason: "WriteRefused",
                    what: format!("cannot {verb} {kind} {name}"),
                    why: status.message.clone(),
                }),
                _ => None,
            },
            Self::Taken { .. } => {
                Some(Refusal { reason: "NameTaken", what: self.to_string(), why: String::new() })
            }
            Self::Etcd(_) | Self::NoEtcd => None,
        }
    }
}

/// Whether the API server says that what is asked about is not there. Of a kind that it does not know it says so in a line of text,
/// not in a `Status` with a reason: the code is all that both have.
pub(crate) fn not_there(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}
