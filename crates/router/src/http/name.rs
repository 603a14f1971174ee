//! What a client calls its request: the answer's id ends with it, as vLLM's do.

use std::convert::Infallible;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;

use super::error::ApiError;
use super::fields::Fields;

/// Characters of a request's name; the answer's head repeats it.
const NAME_CHARS_MAX: usize = 128;

/// The header that names a request; it comes before the field.
const HEADER: &str = "x-request-id";

/// A request's name, if its client gave it one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RequestName(pub(super) Option<String>);

impl RequestName {
    /// A name of visible ASCII characters.
    fn of(name: &str) -> Option<Self> {
        let fits =
            (1..=NAME_CHARS_MAX).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then(|| Self(Some(name.to_owned())))
    }

    /// Takes the name that a body gives.
    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        const NAME: &str = "request_id";
        let Some(name) = fields.take::<String>(NAME, "a string")? else { return Ok(Self(None)) };
        Self::of(&name).ok_or_else(|| {
            let message = format!("request_id must have 1 to {NAME_CHARS_MAX} visible ASCII characters");
            ApiError::invalid(Some(NAME), message)
        })
    }

    /// This one, or else that.
    pub(super) fn or(self, other: Self) -> Self {
        Self(self.0.or(other.0))
    }
}

/// A header that is no name is what some proxy adds: it is ignored.
impl<S: Sync> FromRequestParts<S> for RequestName {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let name = parts.headers.get(HEADER).and_then(|value| value.to_str().ok());
        Ok(name.and_then(Self::of).unwrap_or_default())
    }
}
