/// Why a grammar is refused, or cannot go on. The sentences may quote the grammar, never what was drawn.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It is beyond one of the limits.
    #[error("the grammar {0}")]
    TooLarge(String),
    /// A JSON schema that cannot be met, or not be held.
    #[error("{path}: {says}")]
    Schema {
        /// Where in the schema, from `$`.
        path: String,
        /// What is wrong there.
        says: String,
    },
    /// Not a grammar: a sentence on what is not understood.
    #[error("{0}")]
    Syntax(String),
    /// Nothing could end an answer.
    #[error("this model has no end token, so it cannot keep to a grammar: it would not know how to end")]
    NoEndToken,
    /// A token was drawn that the mask forbade.
    #[error("token {0} was drawn against the grammar")]
    Forbidden(u32),
    /// The parser gave up on an answer under way.
    #[error("the grammar became too complex for this answer: {0}")]
    Failed(String),
}

/// Longest part of a message of the parser that is passed on, in bytes.
const MESSAGE_BYTES_MAX: usize = 300;

/// One line of the parser's message, fit for a terminal, without the states and places that it may carry.
pub(crate) fn sentence(message: &str) -> String {
    if message.starts_with("panic:") {
        return "the parser failed on it: this is a bug, please report it".into();
    }
    let message = message.split("\n<").next().unwrap_or_default();
    let line: Vec<&str> = message.split_whitespace().collect();
    let mut line = line.join(" ").replace(char::is_control, "\u{fffd}");
    if line.len() > MESSAGE_BYTES_MAX {
        line.truncate(line.floor_char_boundary(MESSAGE_BYTES_MAX));
        line.push('…');
    }
    line
}
