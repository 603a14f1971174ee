//! What an answer must be, as masks over the vocabulary.
//!
//! A [`Vocabulary`] compiles a [`Grammar`](galerne_types::Grammar) into a [`Constraint`]. Its mask says which tokens
//! may come next: those whose bytes keep the text so far the beginning of a text of the grammar, and the model's end
//! tokens where the text is whole. Its state is a function of the grammar and the tokens drawn, so a replay feeds
//! them again. The parser is `llguidance`; this crate stands between it and what strangers send:
//!
//! * A schema is checked before it is compiled: what is too large, too deep or refers to itself without end is
//!   refused, and every refusal names the place in the schema, as in `$.properties.age`.
//! * A keyword that would change the answer and that cannot be held is refused by its name. One that changes nothing
//!   is ignored, as are formats of strings that no check here knows.
//! * JSON is written with at most one blank, or one line break and an indentation of up to 16, between two of its parts, so
//!   no answer loops on white space; and characters in strings are escaped only where JSON demands it, so a name has
//!   one spelling.
//! * Dates and times are such as every year has: no 29th of February, no leap second.
//! * Properties come in the order in which the schema names them.
//!
//! Rules come in llguidance's dialect of Lark or in GBNF; which one is seen by their first line.
//!
//! Compiling takes a thread of its own with a deep stack, and is bounded by [`Limits`]; panics of the parser end in
//! an error.

mod constraint;
mod error;
mod gbnf;
mod lark;
mod limits;
mod pointer;
mod schema;
mod vocabulary;

pub use constraint::Constraint;
pub use error::GrammarError;
pub use limits::Limits;
pub use vocabulary::Vocabulary;
