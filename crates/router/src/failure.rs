//! Why a request got no answer, or only the beginning of one.

use std::time::Duration;

use galerne_dispatch::Exceeded;
use galerne_text::TextError;
use galerne_types::Refusal;
use galerne_wire::WireError;

use crate::limits::ECHO_CHARS_MAX;

/// What a group lacks that is ready for other requests than those that resume an answer.
const ALIKE: &str = " that computes as the one did which began this answer";

/// Each variant says what was wrong and what to do; none quotes a prompt. The faces map them to their own statuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    /// The request itself is wrong.
    #[error("{message}")]
    Invalid {
        /// The field that is wrong, if it is one.
        field: Option<&'static str>,
        /// What is wrong and what it should be.
        message: String,
    },
    /// Nobody here serves that model.
    #[error("the model {asked:?} does not exist here; this router serves {served}")]
    NoModel {
        /// What was asked for, shortened.
        asked: String,
        /// The models that there are, as a list to read.
        served: String,
    },
    /// Queues are full.
    #[error("{0}")]
    Overloaded(String),
    /// The first token did not come in time.
    #[error(
        "this answer has not begun within {} s, for which requests wait here at most: retry later", .wait.as_secs_f64()
    )]
    Queued {
        /// How long it was waited for.
        wait: Duration,
    },
    /// The group sent nothing for too long.
    #[error(
        "the group that works on this request has sent nothing for {} s behind token {tokens} of the answer: send the \
         request again", .wait.as_secs_f64()
    )]
    Stalled {
        /// How long it was waited for.
        wait: Duration,
        /// Tokens that had been generated.
        tokens: usize,
    },
    /// The tenant has used up its quota.
    #[error(transparent)]
    Quota(Exceeded),
    /// The model is known, but no group of it takes requests.
    #[error("no group of model {model:?} is ready{}: retry later", if *.begun { ALIKE } else { "" })]
    NoGroup {
        /// The model.
        model: String,
        /// It was to go on with an answer.
        begun: bool,
    },
    /// The group stopped answering.
    #[error(
        "the group that worked on this request was lost at token {tokens} of the answer: send the request again"
    )]
    Lost {
        /// Tokens that had been generated.
        tokens: usize,
    },
    /// Groups were lost on it, and no more are risked.
    #[error(
        "groups were lost one after the other while they worked on this request, and gave it few tokens or none: it \
         is refused for a while"
    )]
    KillsGroups,
    /// The leader or the client's own connection could not wait any longer for this reader.
    #[error("the answer was cut at token {tokens} because it was read too slowly")]
    TooSlow {
        /// Tokens that had been generated.
        tokens: usize,
    },
    /// Its client has sent it again.
    #[error("a request of the same name has come since, and has taken the place of this one")]
    Superseded,
    /// Another request has its name.
    #[error(
        "this Idempotency-Key names another request, which is under way: send that one again as it was, or give this \
         one a key of its own"
    )]
    KeyReused,
    /// The engine broke its promise.
    #[error("the engine failed: {0}")]
    Engine(String),
    /// The router stops.
    #[error("this router is shutting down: send the request again")]
    Closing,
}

impl Failure {
    /// All that [`reason`](Self::reason) can be.
    pub(crate) const REASONS: [&str; 14] = [
        "invalid",
        "no_model",
        "overloaded",
        "queued",
        "stalled",
        "quota",
        "no_group",
        "lost",
        "kills_groups",
        "too_slow",
        "superseded",
        "key_reused",
        "engine",
        "closing",
    ];

    /// What kind of failure it is, in a word for metrics.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "invalid",
            Self::NoModel { .. } => "no_model",
            Self::Overloaded(_) => "overloaded",
            Self::Queued { .. } => "queued",
            Self::Stalled { .. } => "stalled",
            Self::Quota(_) => "quota",
            Self::NoGroup { .. } => "no_group",
            Self::Lost { .. } => "lost",
            Self::KillsGroups => "kills_groups",
            Self::TooSlow { .. } => "too_slow",
            Self::Superseded => "superseded",
            Self::KeyReused => "key_reused",
            Self::Engine(_) => "engine",
            Self::Closing => "closing",
        }
    }

    /// Whether the request was turned away, as opposed to one that ran and failed.
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            Self::Invalid { .. }
            | Self::NoModel { .. }
            | Self::Overloaded(_)
            | Self::Queued { .. }
            | Self::Quota(_)
            | Self::KeyReused
            | Self::NoGroup { .. } => true,
            Self::Stalled { .. }
            | Self::Lost { .. }
            | Self::KillsGroups
            | Self::TooSlow { .. }
            | Self::Superseded
            | Self::Engine(_)
            | Self::Closing => false,
        }
    }

    pub(crate) fn invalid(field: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { field: Some(field), message: message.into() }
    }

    pub(crate) fn no_model<'a>(asked: &str, served: impl Iterator<Item = &'a str>) -> Self {
        let served: Vec<_> = served.map(|name| format!("{name:?}")).collect();
        Self::NoModel { asked: asked.chars().take(ECHO_CHARS_MAX).collect(), served: served.join(", ") }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoGroup { model } => Self::NoGroup { model, begun: false },
            Refusal::Overloaded { .. } => Self::Overloaded(refusal.to_string()),
            Refusal::TooLong { .. } | Refusal::NeverFits { .. } | Refusal::Invalid(_) => {
                Self::Invalid { field: None, message: refusal.to_string() }
            }
        }
    }
}

impl From<Exceeded> for Failure {
    fn from(exceeded: Exceeded) -> Self {
        match exceeded {
            Exceeded::Never { .. } => Self::Invalid { field: None, message: exceeded.to_string() },
            exceeded => Self::Quota(exceeded),
        }
    }
}

impl From<WireError> for Failure {
    fn from(error: WireError) -> Self {
        let (WireError::Missing(field) | WireError::Range { field, .. }) = &error;
        Self::invalid(field, error.to_string())
    }
}

/// Errors of a text that a client sent; a model's own files are checked at start.
impl From<TextError> for Failure {
    fn from(error: TextError) -> Self {
        Self::Invalid { field: None, message: error.to_string() }
    }
}
