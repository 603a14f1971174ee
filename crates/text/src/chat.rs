//! Conversations, and the format in which a model was taught to read them.

mod mistral;
mod turns;

use std::fmt;
use std::str::FromStr;

use galerne_checkpoint::{MistralVersion, TextAssets};
use serde_json::{Map, Value};

use crate::error::TextError;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::tools::ToolFormat;
use mistral::Mistral;

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
    /// More variables for a Jinja template (`chat_template_kwargs`). Mistral's own formats heed none, as a template
    /// heeds none that it does not name.
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
    format: Format,
    tools: Option<ToolFormat>,
}

enum Format {
    Mistral(Mistral),
    Jinja(Box<ChatTemplate>),
}

impl ChatFormat {
    /// The format that the model's files call for, or the one that is `forced`; `None` for a model that has none.
    ///
    /// Mistral's own vocabulary calls for Mistral's own format of its version, unless a template beside it is no
    /// rendering of that: models derived from Mistral's keep its vocabulary and learn other formats. Everything else
    /// has its template.
    ///
    /// # Errors
    /// [`TextError::Template`] for a template that is not valid Jinja, [`TextError::ChatFormat`] if the forced
    /// format does not go with the model's files.
    pub fn load(
        assets: &TextAssets,
        tokenizer: &Tokenizer,
        forced: Option<ChatFormatKind>,
    ) -> Result<Option<Self>, TextError> {
        let own = |version| {
            let mistral = Mistral::new(version, tokenizer)?;
            let tools = mistral.tool_calls().map(ToolFormat::mistral);
            Ok(Some(Self { format: Format::Mistral(mistral), tools }))
        };
        let jinja = || {
            let template = ChatTemplate::load(assets)?;
            let source = assets.chat_template.as_deref().unwrap_or_default();
            let tools = ToolFormat::of_template(source, tokenizer);
            Ok(template.map(|template| Self { format: Format::Jinja(template.into()), tools }))
        };
        match forced {
            Some(ChatFormatKind::MistralV1) => own(MistralVersion::V1),
            Some(ChatFormatKind::MistralV2) => own(MistralVersion::V2),
            Some(ChatFormatKind::MistralV3) => own(MistralVersion::V3),
            Some(ChatFormatKind::Jinja) if assets.chat_template.is_none() => {
                Err(TextError::ChatFormat("jinja needs a chat template, which the model has not".to_owned()))
            }
            Some(ChatFormatKind::Jinja) => jinja(),
            None => match (tokenizer.mistral(), &assets.chat_template) {
                (Some(version), None) => own(version),
                (Some(version), Some(template)) if renders_mistrals(template) => own(version),
                _ => jinja(),
            },
        }
    }

    /// Which format it is.
    pub fn kind(&self) -> ChatFormatKind {
        match &self.format {
            Format::Jinja(_) => ChatFormatKind::Jinja,
            Format::Mistral(mistral) => match mistral.version {
                MistralVersion::V1 => ChatFormatKind::MistralV1,
                MistralVersion::V2 => ChatFormatKind::MistralV2,
                MistralVersion::V3 => ChatFormatKind::MistralV3,
            },
        }
    }

    /// Ids of the prompt that `chat` makes, complete with BOS.
    ///
    /// # Errors
    /// [`TextError::Refused`], [`TextError::Render`] and [`TextError::Endless`] from a template,
    /// [`TextError::Conversation`] and [`TextError::Tools`] for what the format cannot express.
    pub fn encode(&self, tokenizer: &Tokenizer, chat: &Chat) -> Result<Vec<u32>, TextError> {
        match &self.format {
            Format::Mistral(mistral) => mistral.encode(tokenizer, chat),
            Format::Jinja(template) => tokenizer.encode(&template.render_chat(chat)?, false),
        }
    }

    /// How the model writes calls of tools; `None` if it was not taught to.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.tools.clone()
    }
}

/// Whether a template writes `[INST]` as Mistral's formats do; Llama 2 has it too, with a mark of its own inside.
fn renders_mistrals(template: &str) -> bool {
    template.contains("[INST]") && !template.contains("<<SYS>>")
}
