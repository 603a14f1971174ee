//! Calls of tools: how a model writes them, and how to make it write one.

mod call;
mod grammar;
mod parser;

use crate::tokenizer::Tokenizer;

pub use grammar::{ToolElse, ToolForce};
pub use parser::{Part, ToolParser};

/// How one model writes calls of tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolFormat {
    style: Style,
    /// What stands before a call.
    open: Mark,
    /// What stands behind one.
    close: Option<Mark>,
    markers: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// `[TOOL_CALLS] [{"name": …, "arguments": …}, …]`.
    Mistral,
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`, once for each call: Hermes, Qwen and their kin.
    Hermes,
    /// `{"name": …, "parameters": …}` and nothing else, behind `<|python_tag|>` or not: Llama 3.
    Llama,
}

/// A text that marks a call, and its token if that is a special one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mark {
    text: &'static str,
    special: Option<u32>,
}

impl ToolFormat {
    /// Mistral's own, from v2 on.
    pub(crate) fn mistral(tool_calls: u32) -> Self {
        Self::new(Style::Mistral, Mark { text: "[TOOL_CALLS]", special: Some(tool_calls) }, None)
    }

    /// The format that a chat template shows; `None` for one that shows none, or one that is not known here.
    pub(crate) fn of_template(template: &str, tokenizer: &Tokenizer) -> Option<Self> {
        let mark = |text| Mark { text, special: tokenizer.special_token(text) };
        if template.contains("[TOOL_CALLS]") && !template.contains("[ARGS]") {
            Some(Self::new(Style::Mistral, mark("[TOOL_CALLS]"), None))
        } else if template.contains("<tool_call>") && !template.contains("<function=") {
            Some(Self::new(Style::Hermes, mark("<tool_call>"), Some(mark("</tool_call>"))))
        } else if template.contains("<|python_tag|>") || template.contains("\"parameters\": dictionary") {
            Some(Self::new(Style::Llama, mark("<|python_tag|>"), None))
        } else {
            None
        }
    }

    fn new(style: Style, open: Mark, close: Option<Mark>) -> Self {
        let markers =
            open.special.into_iter().chain(close.as_ref().and_then(|close| close.special)).collect();
        Self { style, open, close, markers }
    }

    /// Whether calls are written as Mistral's models write them: their ids are nine letters and digits then, and what
    /// refers to them must be, too.
    pub fn is_mistral(&self) -> bool {
        self.style == Style::Mistral
    }

    /// Special tokens that mark a call: the detokenizer must spell them out though it leaves out special tokens.
    pub fn markers(&self) -> &[u32] {
        &self.markers
    }
}
