//! Log probabilities in OpenAI's two shapes.

use galerne_text::Tokenizer;
use galerne_types::{TokenId, TokenOut};
use serde::Serialize;
use serde_json::{Map, Value};

/// JSON has no infinity; a token that was impossible gets what OpenAI and vLLM write.
const LOGPROB_MIN: f32 = -9999.0;

/// One or several tokens' log probabilities.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Logprobs {
    Chat {
        content: Vec<ChatToken>,
        refusal: Option<()>,
    },
    Text {
        tokens: Vec<String>,
        token_logprobs: Vec<f32>,
        top_logprobs: Vec<Map<String, Value>>,
        /// In characters of the tokens' texts.
        text_offset: Vec<usize>,
    },
}

#[derive(Serialize)]
pub(super) struct ChatToken {
    #[serde(flatten)]
    token: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Serialize)]
struct Alternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl Alternative {
    fn new(tokenizer: &Tokenizer, id: TokenId, logprob: f32) -> Self {
        let bytes = tokenizer.token_bytes(id).to_vec();
        Self { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: logprob.max(LOGPROB_MIN), bytes }
    }
}

impl Logprobs {
    pub(super) fn chat(tokenizer: &Tokenizer, tokens: &[TokenOut]) -> Self {
        let content = tokens.iter().map(|token| ChatToken {
            token: Alternative::new(tokenizer, token.id, token.logprob),
            top_logprobs: token
                .top
                .iter()
                .map(|top| Alternative::new(tokenizer, top.id, top.logprob))
                .collect(),
        });
        Self::Chat { content: content.collect(), refusal: None }
    }

    /// `offset`: where the first token's text begins.
    pub(super) fn text(tokenizer: &Tokenizer, drawn: &[TokenOut], mut offset: usize) -> Self {
        let mut tokens = Vec::with_capacity(drawn.len());
        let (mut token_logprobs, mut top_logprobs, mut text_offset) = (Vec::new(), Vec::new(), Vec::new());
        for token in drawn {
            let text = text_of(tokenizer, token.id);
            let own = std::iter::once((token.id, token.logprob));
            let all = own.chain(token.top.iter().map(|top| (top.id, top.logprob)));
            let all = all.map(|(id, logprob)| (text_of(tokenizer, id), logprob.max(LOGPROB_MIN).into()));
            top_logprobs.push(all.collect());
            token_logprobs.push(token.logprob.max(LOGPROB_MIN));
            text_offset.push(offset);
            offset += text.chars().count();
            tokens.push(text);
        }
        Self::Text { tokens, token_logprobs, top_logprobs, text_offset }
    }
}

/// A token's text; bytes that are only a part of a character show as U+FFFD.
pub(super) fn text_of(tokenizer: &Tokenizer, id: TokenId) -> String {
    String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()
}
