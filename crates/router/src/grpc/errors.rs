//! Failures as gRPC statuses, in words for people and in details for programs.

use std::collections::HashMap;
use std::time::Duration;

use axum::http::Response;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::failure::Failure;
use crate::limits::RETRY_AFTER_S;

/// `google.rpc.ErrorInfo.domain` of every error: reasons are unique within it.
const DOMAIN: &str = "galerne";

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let (code, reason) = match &failure {
            Failure::Invalid { .. } => (Code::InvalidArgument, "INVALID_REQUEST"),
            Failure::NoModel { .. } => (Code::NotFound, "MODEL_NOT_FOUND"),
            Failure::Overloaded(_) => (Code::ResourceExhausted, "OVERLOADED"),
            Failure::Quota(_) => (Code::ResourceExhausted, "QUOTA_EXCEEDED"),
            Failure::NoGroup { .. } => (Code::Unavailable, "NO_GROUP_READY"),
            Failure::Lost { .. } => (Code::Unavailable, "GROUP_LOST"),
            Failure::KillsGroups => (Code::Internal, "REQUEST_KILLS_GROUPS"),
            Failure::Queued { .. } => (Code::ResourceExhausted, "QUEUE_TIMEOUT"),
            Failure::Stalled { .. } => (Code::Unavailable, "GROUP_STALLED"),
            Failure::Closing => (Code::Unavailable, "SHUTTING_DOWN"),
            Failure::TooSlow { .. } => (Code::Aborted, "READER_TOO_SLOW"),
            Failure::Superseded => (Code::Aborted, "SUPERSEDED"),
            Failure::KeyReused => (Code::InvalidArgument, "IDEMPOTENCY_KEY_REUSED"),
            Failure::Engine(_) => (Code::Internal, "ENGINE_FAILED"),
        };
        let message = failure.to_string();
        let mut details = details(reason);
        match &failure {
            Failure::Invalid { field: Some(field), .. } => {
                details.add_bad_request_violation(*field, &message);
            }
            Failure::Quota(exceeded) => {
                details.set_retry_info(Some(Duration::from_secs(exceeded.retry_after_s())));
            }
            _ if matches!(code, Code::ResourceExhausted | Code::Unavailable) => {
                details.set_retry_info(Some(Duration::from_secs(RETRY_AFTER_S.into())));
            }
            _ => {}
        }
        Self::with_error_details(code, message, details)
    }
}

/// What a call gets whose own deadline has passed.
pub(super) fn deadline_exceeded(after: Duration) -> Status {
    let message = format!("the call's deadline of {} ms has passed: give it more time", after.as_millis());
    Status::with_error_details(Code::DeadlineExceeded, message, details("DEADLINE_EXCEEDED"))
}

/// What a caller gets who shows no key, or a wrong one.
pub(super) fn unauthenticated(message: String) -> Status {
    Status::with_error_details(Code::Unauthenticated, message, details("API_KEY_NEEDED"))
}

/// What a caller gets whose message does not come.
pub(super) fn message_too_slow(message: String) -> Status {
    Status::with_error_details(Code::Aborted, message, details("MESSAGE_TOO_SLOW"))
}

/// What a caller gets whose messages are too large together; one that is too large by itself tonic refuses.
pub(super) fn messages_too_large(bytes_max: usize) -> Status {
    let message = format!("the messages of a call must have at most {bytes_max} bytes together");
    Status::with_error_details(Code::OutOfRange, message, details("MESSAGES_TOO_LARGE"))
}

/// What a caller gets whose request's head is refused before any service sees it.
pub(crate) fn head_refused(message: String) -> Status {
    Status::with_error_details(Code::ResourceExhausted, message, details("HEAD_TOO_LARGE"))
}

/// Puts the blame for a message that cannot be read on whoever sent it. tonic calls that an internal error, without
/// details; ours always have some.
pub(super) fn blame<B: Default>(response: Response<B>) -> Response<B> {
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() == Code::Internal && status.details().is_empty() => {
            let message = format!("the message cannot be read: {}", status.message());
            Status::with_error_details(Code::InvalidArgument, message, details("BAD_MESSAGE")).into_http()
        }
        _ => response,
    }
}

/// What a dialect calls the fields that failures name: pairs of our name and its own.
#[derive(Clone, Copy)]
pub(super) struct Fields(pub(super) &'static [(&'static str, &'static str)]);

impl Fields {
    /// The failure's status, with the field as the client knows it.
    pub(super) fn name(self, failure: Failure) -> Status {
        let Failure::Invalid { field: Some(field), message } = failure else { return failure.into() };
        let named = self.0.iter().find(|(ours, _)| *ours == field);
        Failure::Invalid { field: Some(named.map_or(field, |(_, theirs)| theirs)), message }.into()
    }
}

fn details(reason: &str) -> ErrorDetails {
    ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new())
}
