//! Text to tokens and back, for clients that count or cut for themselves.

use std::sync::Arc;

use galerne_types::TokenId;

use crate::ask::{Caller, Prompt};
use crate::failure::Failure;
use crate::model::Model;
use crate::serve::Router;

/// The tokens of a text.
pub(crate) struct Tokenized {
    pub(crate) model: Arc<Model>,
    pub(crate) ids: Vec<TokenId>,
    /// Tokens of prompt and answer together.
    pub(crate) context_tokens_max: u32,
}

/// Turns a prompt into tokens. `again`: put in front of it what the model wants in front of a text, though it is
/// there already.
pub(crate) async fn tokenize(
    router: &Router,
    caller: &Caller,
    model: &str,
    prompt: Prompt,
    again: bool,
) -> Result<Tokenized, Failure> {
    caller.begin()?;
    let model = router.model(model)?;
    let mut ids = match &prompt {
        Prompt::Bare(text) if text.is_empty() => Vec::new(),
        Prompt::Text(text) if text.is_empty() => model.tokenizer.encode("", true)?,
        _ => router.tokenize(&model, prompt).await?,
    };
    if again {
        ids.splice(..0, model.tokenizer.encode("", true)?);
    }
    let served = router.groups.card(&model.name).map(|card| card.context_tokens_max);
    let context_tokens_max = served.unwrap_or(model.context_tokens_max);
    Ok(Tokenized { model, ids, context_tokens_max })
}

/// Turns tokens into text.
pub(crate) async fn detokenize(
    router: &Router,
    caller: &Caller,
    model: &str,
    ids: Vec<TokenId>,
    skip_special: bool,
) -> Result<String, Failure> {
    caller.begin()?;
    let model = router.model(model)?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= model.vocab) {
        let message =
            format!("tokens has the id {id}, but this model's vocabulary ends at {}", model.vocab - 1);
        return Err(Failure::invalid("tokens", message));
    }
    router.beside(ids.len(), move || Ok(model.tokenizer.decode(&ids, skip_special))).await
}

impl Tokenized {
    /// What each token stands for in the middle of a text.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        self.ids.iter().map(|&id| self.model.tokenizer.token_bytes(id))
    }
}
