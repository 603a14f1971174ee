//! Errors as the API tells them: a `Status`.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Why a request failed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Failure {
    pub(crate) code: u16,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    pub(crate) causes: Vec<Value>,
}

impl Failure {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), causes: Vec::new() }
    }

    pub(crate) fn not_found(what: &str, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{what} {name:?} not found"))
    }

    pub(crate) fn not_served() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    pub(crate) fn exists(what: &str, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{what} {name:?} already exists"))
    }

    pub(crate) fn conflict(what: &str, name: &str, why: &str) -> Self {
        Self::new(409, "Conflict", format!("Operation cannot be fulfilled on {what} {name:?}: {why}"))
    }

    pub(crate) fn modified(what: &str, name: &str) -> Self {
        let why =
            "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(what, name, why)
    }

    /// Fields that another manager owns.
    pub(crate) fn owned(fields: &[(String, String)]) -> Self {
        let causes = fields.iter().map(|(field, manager)| {
            json!({ "reason": "FieldManagerConflict", "message": format!("conflict with {manager:?}"), "field": field })
        });
        let message = format!("Apply failed with {} conflict(s): {fields:?}", fields.len());
        Self { causes: causes.collect(), ..Self::new(409, "Conflict", message) }
    }

    pub(crate) fn invalid(what: &str, name: &str, why: &str) -> Self {
        Self::new(422, "Invalid", format!("{what} {name:?} is invalid: {why}"))
    }

    pub(crate) fn internal(what: &str) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {what}"))
    }

    /// A quota lets no more of this in.
    pub(crate) fn quota(what: &str, name: &str, why: &str) -> Self {
        Self::new(403, "Forbidden", format!("{what} {name:?} is forbidden: exceeded quota: {why}"))
    }

    pub(crate) fn bad(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    pub(crate) fn media(message: impl Into<String>) -> Self {
        Self::new(415, "UnsupportedMediaType", message)
    }

    pub(crate) fn gone(oldest: u64, asked: u64) -> Self {
        Self::new(410, "Expired", format!("too old resource version: {asked} ({oldest})"))
    }

    /// A budget does not let a pod go.
    pub(crate) fn budget(name: &str) -> Self {
        let message = "Cannot evict pod as it would violate the pod's disruption budget.";
        let cause = json!({
            "reason": "DisruptionBudget",
            "message": format!("The disruption budget {name} does not allow evicting pods currently"),
        });
        Self { causes: vec![cause], ..Self::new(429, "TooManyRequests", message) }
    }

    pub(crate) fn status(&self) -> Value {
        let Self { code, reason, message, causes } = self;
        json!({
            "apiVersion": "v1",
            "kind": "Status",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": { "causes": causes },
            "code": code,
        })
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let code = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (code, Json(self.status())).into_response()
    }
}
