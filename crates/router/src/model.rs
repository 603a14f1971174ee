//! A model's text side: its tokenizer, its template, and what it says of itself.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use galerne_checkpoint::{Checkpoint, CheckpointError};
use galerne_text::{ChatFormat, ChatFormatKind, TextError, Tokenizer};
use galerne_types::TokenId;

use crate::metrics::{Metrics, ModelMetrics};

/// Where a model's files are. The router reads its tokenizer and its chat template, and no weights.
#[derive(Clone, Debug)]
pub struct ModelSource {
    /// A checkpoint directory or a GGUF file, the same that its ranks load.
    pub path: PathBuf,
    /// The name that clients ask for; `None` takes the folder's name, or the file's without its ending.
    pub name: Option<String>,
    /// How conversations become prompts; `None` takes what the model's files call for.
    pub chat_format: Option<ChatFormatKind>,
}

/// Why a model's text side cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Its files are not a checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Its tokenizer or its chat template cannot be used.
    #[error("{path}: {source}")]
    Text {
        /// The checkpoint.
        path: String,
        /// What is wrong.
        source: TextError,
    },
    /// Two models of one name.
    #[error("two models are named {0:?}: give one of them another name")]
    Twice(String),
}

/// A model as the router knows it.
pub(crate) struct Model {
    pub(crate) name: String,
    /// Groups of the same name but another digest are other weights, and get no requests.
    pub(crate) digest: String,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// How conversations become prompts; `None` for a model that was not taught any.
    pub(crate) chat: Option<ChatFormat>,
    /// End-of-sequence tokens.
    pub(crate) eos: Vec<TokenId>,
    /// Tokens of the vocabulary.
    pub(crate) vocab: usize,
    /// Token that a sequence starts with.
    pub(crate) bos: Option<TokenId>,
    /// Tokens of prompt and answer together that the model was made for; its groups may serve fewer.
    pub(crate) context_tokens_max: u32,
    pub(crate) metrics: Arc<ModelMetrics>,
}

/// Models by the names that clients ask for.
pub(crate) type Models = BTreeMap<String, Arc<Model>>;

/// Reads the text side of all models, and tells of each how its conversations become prompts; blocks on files.
pub(crate) fn load(sources: &[ModelSource], metrics: &Metrics, tell: fn(&str)) -> Result<Models, ModelError> {
    let mut models = Models::new();
    for source in sources {
        let checkpoint = Checkpoint::open(&source.path)?;
        let text = |source| ModelError::Text { path: checkpoint.path().display().to_string(), source };
        let name = source.name.clone().unwrap_or_else(|| checkpoint.name().to_owned());
        let tokenizer = Tokenizer::load(checkpoint.text()).map_err(text)?;
        let chat = ChatFormat::load(checkpoint.text(), &tokenizer, source.chat_format).map_err(text)?;
        tell(&format!("{name}: {}", described(chat.as_ref(), source.chat_format.is_some())));
        let model = Model {
            digest: checkpoint.digest().to_owned(),
            tokenizer: Arc::new(tokenizer),
            chat,
            eos: checkpoint.config().eos.clone(),
            vocab: checkpoint.config().vocab,
            bos: checkpoint.config().bos,
            context_tokens_max: checkpoint.config().context_tokens_max as u32,
            metrics: metrics.of_model(&name, checkpoint.config().context_tokens_max),
            name: name.clone(),
        };
        if models.insert(name.clone(), Arc::new(model)).is_some() {
            return Err(ModelError::Twice(name));
        }
    }
    Ok(models)
}

/// Which chat format applies, why, and whether it has calls of tools.
fn described(chat: Option<&ChatFormat>, forced: bool) -> String {
    let Some(chat) = chat else {
        return "no chat format, because it has no chat template and no vocabulary of Mistral's: plain prompts only"
            .to_owned();
    };
    let why = match chat.kind() {
        _ if forced => "as --chat-format says",
        ChatFormatKind::Jinja => "its chat template",
        ChatFormatKind::MistralV1 | ChatFormatKind::MistralV2 | ChatFormatKind::MistralV3 => {
            "its vocabulary is Mistral's"
        }
    };
    let tools = if chat.tool_format().is_some() { "with" } else { "without" };
    format!("chat format {} ({why}), {tools} calls of tools", chat.kind())
}
