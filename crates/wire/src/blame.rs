//! Which of a request's parameters a leader refuses it for, in its status's metadata.

use tonic::Status;
use tonic::metadata::MetadataValue;

/// Metadata key that carries the parameter's name.
const KEY: &str = "galerne-parameter";

/// What a leader can blame; what else could be wrong, a router has checked before.
const PARAMETERS: [&str; 3] = ["grammar", "max_tokens", "prompt"];

/// Says which of `grammar`, `max_tokens` and `prompt` a refusal is about.
#[must_use]
pub fn blaming(mut status: Status, parameter: &'static str) -> Status {
    status.metadata_mut().insert(KEY, MetadataValue::from_static(parameter));
    status
}

/// The parameter that a refusal is about, if it says so.
pub fn blamed(status: &Status) -> Option<&'static str> {
    let said = status.metadata().get(KEY)?;
    PARAMETERS.into_iter().find(|name| said.as_bytes() == name.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_is_named() {
        let status = Status::invalid_argument("wrong");
        assert_eq!(blamed(&status), None);
        assert_eq!(blamed(&blaming(status.clone(), "grammar")), Some("grammar"));
        assert_eq!(blamed(&blaming(status, "other")), None);
    }
}
