//! Calls of tools: how a model writes them, and how to make it write one.

use serde_json::Value;

use crate::error::TextError;

/// How one model writes calls of tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolFormat {
    markers: Vec<u32>,
}

/// Which tool the model must call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolForce<'a> {
    /// At least one, whichever (`tool_choice` required).
    Any,
    /// This one.
    Named(&'a str),
}

/// A part of an answer, in the order in which the model wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Text for the user.
    Content(String),
    /// A call begins; comes once for each index, from 0.
    Call {
        /// Place of the call in the answer.
        index: usize,
        /// Its name in the conversation to come.
        id: String,
        /// The function.
        name: String,
    },
    /// More of a call's arguments; the texts of one index make up one JSON text.
    Arguments {
        /// The call.
        index: usize,
        /// Some of its JSON.
        text: String,
    },
}

impl ToolFormat {
    pub(crate) fn mistral(tool_calls: u32) -> Self {
        Self { markers: vec![tool_calls] }
    }

    /// Special tokens that mark a call: the detokenizer must spell them out though it leaves out special tokens.
    pub fn markers(&self) -> &[u32] {
        &self.markers
    }

    /// A grammar, in llguidance's dialect of Lark, of the answers that call what `force` says, with arguments
    /// that meet the schema of `tools`; several calls only if `parallel`.
    ///
    /// # Errors
    /// [`TextError::Tools`] if `force` names no tool or a tool is not described as it should be.
    pub fn grammar(
        &self,
        _tools: &[Value],
        _force: ToolForce<'_>,
        _parallel: bool,
    ) -> Result<String, TextError> {
        Err(TextError::Tools("this model's format of calls is not known".into()))
    }
}

/// Takes an answer's text as it comes and parts the calls of tools from what is for the user.
///
/// However the text is cut into pieces, the parts put together are the same.
pub struct ToolParser {
    _new_id: Box<dyn FnMut() -> String + Send>,
}

impl ToolParser {
    /// `new_id` names each call that has no name of its own.
    pub fn new(_format: &ToolFormat, new_id: impl FnMut() -> String + Send + 'static) -> Self {
        Self { _new_id: Box::new(new_id) }
    }

    /// Takes the next text; markers are spelled out in it.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        vec![Part::Content(text.to_owned())]
    }

    /// The answer ends here: what was held back.
    pub fn finish(&mut self) -> Vec<Part> {
        Vec::new()
    }
}
