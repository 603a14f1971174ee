//! Conversations, and the format in which a model was taught to read them.

use std::fmt;
use std::str::FromStr;

use galerne_checkpoint::TextAssets;
use serde_json::{Map, Value};

use crate::error::TextError;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::tools::ToolFormat;

/// A conversation to be continued.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// Turns as in OpenAI's API: `role` (system, developer, user, assistant, tool) and `content` (text, text
    /// parts or null), an assistant's `tool_calls`, a tool's `tool_call_id` and `name`.
    pub messages: Vec<Value>,
    /// Descriptions of functions, as in OpenAI's API; empty for none.
    pub tools: Vec<Value>,
    /// The last message is the beginning of the answer: Mistral's `prefix`, vLLM's `continue_final_message`.
    pub continue_final: bool,
    /// The prompt ends where the assistant's answer begins. Mistral's own formats always do.
    pub add_generation_prompt: bool,
    /// More variables for a Jinja template (`chat_template_kwargs`); Mistral's own formats have none.
    pub extra: Map<String, Value>,
}

/// How a conversation becomes a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChatFormatKind {
    /// Mistral's first: `[INST]` is written as text. No tools.
    MistralV1,
    /// Mistral's second: control tokens, tools.
    MistralV2,
    /// Mistral's third: tool calls have ids.
    MistralV3,
    /// The template that comes with the model.
    Jinja,
}

impl ChatFormatKind {
    const ALL: [Self; 4] = [Self::MistralV1, Self::MistralV2, Self::MistralV3, Self::Jinja];

    fn name(self) -> &'static str {
        match self {
            Self::MistralV1 => "mistral-v1",
            Self::MistralV2 => "mistral-v2",
            Self::MistralV3 => "mistral-v3",
            Self::Jinja => "jinja",
        }
    }
}

impl fmt::Display for ChatFormatKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ChatFormatKind {
    type Err = TextError;

    fn from_str(name: &str) -> Result<Self, TextError> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            TextError::ChatFormat("its name must be mistral-v1, mistral-v2, mistral-v3 or jinja".into())
        })
    }
}

/// The chat format of one model.
pub struct ChatFormat {
    template: ChatTemplate,
}

impl ChatFormat {
    /// The format that the model's files call for, or the one that is `forced`; `None` for a model that has none.
    ///
    /// # Errors
    /// [`TextError::Template`] for a template that is not valid Jinja, [`TextError::ChatFormat`] if the forced
    /// format does not go with the model's files.
    pub fn load(
        assets: &TextAssets,
        _tokenizer: &Tokenizer,
        forced: Option<ChatFormatKind>,
    ) -> Result<Option<Self>, TextError> {
        let template = ChatTemplate::load(assets)?;
        match (template, forced) {
            (template, None) => Ok(template.map(|template| Self { template })),
            (Some(template), Some(ChatFormatKind::Jinja)) => Ok(Some(Self { template })),
            (None, Some(ChatFormatKind::Jinja)) => {
                Err(TextError::ChatFormat("jinja is asked for, but the model has no template".into()))
            }
            (_, Some(other)) => Err(TextError::ChatFormat(format!("{other} is not available"))),
        }
    }

    /// Which format it is.
    pub fn kind(&self) -> ChatFormatKind {
        ChatFormatKind::Jinja
    }

    /// Ids of the prompt that `chat` makes, complete with BOS.
    ///
    /// # Errors
    /// [`TextError::Refused`], [`TextError::Render`] and [`TextError::Endless`] from a template,
    /// [`TextError::Conversation`] for a conversation that a format of Mistral's cannot express.
    pub fn encode(&self, tokenizer: &Tokenizer, chat: &Chat) -> Result<Vec<u32>, TextError> {
        tokenizer.encode(&self.template.render_chat(chat)?, false)
    }

    /// How the model writes calls of tools; `None` if it was not taught to.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        None
    }
}
