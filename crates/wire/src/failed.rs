//! Why a leader does not go on with a request.

use tonic::{Code, Status};

use crate::v1::Failed;

/// What a leader can blame; what else could be wrong, a router has checked before.
const PARAMETERS: [&str; 3] = ["grammar", "max_tokens", "prompt"];

impl Failed {
    /// A failure with a sentence.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code: code as u32, message: message.into(), parameter: String::new() }
    }

    /// Says which of `grammar`, `max_tokens` and `prompt` it is about.
    #[must_use]
    pub fn about(self, parameter: &'static str) -> Self {
        Self { parameter: parameter.to_owned(), ..self }
    }

    /// What it is about, if it says so.
    pub fn blames(&self) -> Option<&'static str> {
        PARAMETERS.into_iter().find(|name| *name == self.parameter)
    }

    /// It as a status.
    pub fn status(self) -> Status {
        Status::new(Code::from_i32(i32::try_from(self.code).unwrap_or(i32::MAX)), self.message)
    }
}

impl From<Status> for Failed {
    fn from(status: Status) -> Self {
        Self::new(status.code(), status.message())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_is_named() {
        let failed = Failed::from(Status::invalid_argument("wrong"));
        assert_eq!(failed.blames(), None);
        assert_eq!(failed.clone().about("grammar").blames(), Some("grammar"));
        assert_eq!(failed.clone().about("other").blames(), None);
        assert_eq!(
            (failed.clone().status().code(), failed.status().message()),
            (Code::InvalidArgument, "wrong")
        );
    }
}
