//! What is sent: the body of a request, written before it is due.

use bytes::Bytes;
use galerne_wire::v1::generate_request::Prompt as WirePrompt;
use galerne_wire::v1::{GenerateRequest, Sampling, TokenIds as WireIds};
use galerne_workload::{Planned, Prompt, TokenIds};
use serde_json::{Value, json};

use crate::options::{Api, TargetOptions};

/// Writes requests the way that the target reads them.
pub(crate) struct Writer {
    api: Api,
    model: Option<String>,
    temperature: f64,
    ignore_eos: bool,
    token_ids: TokenIds,
    /// Of made-up prompts.
    seed: u64,
}

/// A request, ready to be sent.
#[derive(Debug)]
pub(crate) enum Body {
    Json(Bytes),
    Message(Box<GenerateRequest>),
}

impl Writer {
    pub(crate) fn new(target: &TargetOptions, seed: u64) -> Self {
        let TargetOptions { endpoint, model, temperature, ignore_eos, token_ids, .. } = target;
        Self {
            api: endpoint.api,
            model: model.clone(),
            temperature: *temperature,
            ignore_eos: *ignore_eos,
            token_ids: *token_ids,
            seed,
        }
    }

    pub(crate) fn write(&self, planned: Planned) -> Body {
        match self.api {
            Api::Grpc => Body::Message(Box::new(self.message(planned))),
            Api::Chat | Api::Completions => Body::Json(self.json(planned).to_string().into()),
        }
    }

    fn message(&self, planned: Planned) -> GenerateRequest {
        let prompt = match planned.prompt.ids(self.seed, self.token_ids) {
            Some(ids) => WirePrompt::Tokens(WireIds { ids }),
            None => WirePrompt::Text(planned.prompt.text(self.seed)),
        };
        let sampling = Sampling {
            temperature: Some(self.temperature as f32),
            seed: Some(planned.seed),
            ..Sampling::default()
        };
        GenerateRequest {
            model: self.model.clone().unwrap_or_default(),
            prompt: Some(prompt),
            sampling: Some(sampling),
            max_tokens: Some(planned.output_tokens),
            ignore_eos: self.ignore_eos,
            ..GenerateRequest::default()
        }
    }

    fn json(&self, Planned { prompt, output_tokens, seed, .. }: Planned) -> Value {
        let mut body = json!({
            "max_tokens": output_tokens,
            "temperature": self.temperature,
            "seed": seed >> 1, // some servers read it as a signed number
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if let Some(model) = &self.model {
            body["model"] = json!(model);
        }
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        if self.api == Api::Chat {
            body["messages"] = json!([{ "role": "user", "content": prompt.text(self.seed) }]);
        } else {
            body["prompt"] = self.prompt(prompt);
        }
        body
    }

    fn prompt(&self, prompt: Prompt) -> Value {
        match prompt.ids(self.seed, self.token_ids) {
            Some(ids) => json!(ids),
            None => json!(prompt.text(self.seed)),
        }
    }
}
