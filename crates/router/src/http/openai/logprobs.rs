//! Log probabilities in OpenAI's two shapes, and the prompt's in vLLM's.

use galerne_text::Tokenizer;
use galerne_types::{TokenId, TokenOut};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// JSON has no infinity; a token that was impossible gets what OpenAI and vLLM write.
const LOGPROB_MIN: f32 = -9999.0;

/// A log probability with the digits that it has elsewhere: a [`Value`] would show those of the next f64.
fn shown(logprob: f32) -> Value {
    let logprob = logprob.max(LOGPROB_MIN);
    logprob.to_string().parse::<f64>().map_or_else(|_| logprob.into(), Value::from)
}

/// How tokens are written in log probabilities.
#[derive(Clone, Copy)]
pub(in crate::http) struct Spelling<'a> {
    pub(in crate::http) tokenizer: &'a Tokenizer,
    /// As `token_id:5` instead of as text.
    pub(in crate::http) as_ids: bool,
}

/// One or several tokens' log probabilities.
#[derive(Serialize)]
#[serde(untagged)]
pub(in crate::http) enum Logprobs {
    Chat { content: Vec<ChatToken>, refusal: Option<()> },
    Text(TextLogprobs),
}

#[derive(Serialize)]
pub(in crate::http) struct ChatToken {
    #[serde(flatten)]
    token: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Serialize)]
struct Alternative {
    token: String,
    /// Mistral's clients ask for it; others do not mind.
    token_id: TokenId,
    logprob: f32,
    bytes: Vec<u8>,
}

/// Lists with one entry a token.
#[derive(Serialize, Default)]
pub(in crate::http) struct TextLogprobs {
    tokens: Vec<String>,
    /// Null for a token that nothing stands before.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where each token's text begins, in characters.
    text_offset: Vec<usize>,
    #[serde(skip)]
    chars: usize,
}

impl Spelling<'_> {
    /// Bytes that are only a part of a character show as U+FFFD.
    fn text(self, id: TokenId) -> String {
        if self.as_ids {
            return format!("token_id:{id}");
        }
        String::from_utf8_lossy(self.tokenizer.token_bytes(id)).into_owned()
    }

    fn alternative(self, id: TokenId, logprob: f32) -> Alternative {
        let bytes = self.tokenizer.token_bytes(id).to_vec();
        Alternative { token: self.text(id), token_id: id, logprob: logprob.max(LOGPROB_MIN), bytes }
    }
}

impl Logprobs {
    pub(in crate::http) fn chat(spelling: Spelling<'_>, tokens: &[TokenOut]) -> Self {
        let content = tokens.iter().map(|token| ChatToken {
            token: spelling.alternative(token.id, token.logprob),
            top_logprobs: token.top.iter().map(|top| spelling.alternative(top.id, top.logprob)).collect(),
        });
        Self::Chat { content: content.collect(), refusal: None }
    }
}

impl TextLogprobs {
    /// `offset`: where the first token's text begins.
    pub(in crate::http) fn at(offset: usize) -> Self {
        Self { chars: offset, ..Self::default() }
    }

    /// Where the next token's text begins.
    pub(in crate::http) fn offset(&self) -> usize {
        self.chars
    }

    /// The prompt: its first token has no log probability.
    pub(in crate::http) fn prompt(
        &mut self,
        spelling: Spelling<'_>,
        prompt: &[TokenId],
        scores: &[TokenOut],
    ) {
        let Some((&first, rest)) = prompt.split_first() else { return };
        self.push(spelling, first, None, None);
        for (at, &id) in rest.iter().enumerate() {
            match scores.get(at) {
                Some(score) => self.token(spelling, score),
                None => self.push(spelling, id, None, None),
            }
        }
    }

    pub(in crate::http) fn token(&mut self, spelling: Spelling<'_>, token: &TokenOut) {
        let own = std::iter::once((token.id, token.logprob));
        let all = own.chain(token.top.iter().map(|top| (top.id, top.logprob)));
        let all = all.map(|(id, logprob)| (spelling.text(id), shown(logprob))).collect();
        self.push(spelling, token.id, Some(token.logprob.max(LOGPROB_MIN)), Some(all));
    }

    fn push(
        &mut self,
        spelling: Spelling<'_>,
        id: TokenId,
        logprob: Option<f32>,
        top: Option<Map<String, Value>>,
    ) {
        let shown = spelling.text(id);
        let chars = |text: &str| text.chars().count();
        self.text_offset.push(self.chars);
        self.chars += match spelling.as_ids {
            true => chars(&String::from_utf8_lossy(spelling.tokenizer.token_bytes(id))),
            false => chars(&shown),
        };
        self.tokens.push(shown);
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
    }
}

/// vLLM's `prompt_logprobs`: null for the first token, then an object for each, by token ids.
pub(in crate::http) fn of_prompt(spelling: Spelling<'_>, scores: &[TokenOut]) -> Vec<Value> {
    let entry = |id: TokenId, logprob: f32, rank: u32| {
        let decoded = String::from_utf8_lossy(spelling.tokenizer.token_bytes(id));
        (id.to_string(), json!({ "logprob": shown(logprob), "rank": rank, "decoded_token": decoded }))
    };
    let object = |score: &TokenOut| {
        let top = score.top.iter().zip(1..).map(|(top, rank)| entry(top.id, top.logprob, rank));
        let own = std::iter::once(entry(score.id, score.logprob, score.rank));
        Value::Object(top.chain(own).collect())
    };
    std::iter::once(Value::Null).chain(scores.iter().map(object)).collect()
}
