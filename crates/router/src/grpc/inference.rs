//! `vllm.Inference` and `vllm.Control`: the dialect of vLLM's own front end.
//!
//! It begins a stream with what there is to say of the prompt and then sends a message a token, the last of which
//! carries the end. Unset sampling is greedy.

use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, stream};
use galerne_types::limits::{KV_BLOCK_TOKENS, TOP_LOGPROBS_MAX};
use galerne_types::{Grammar, Sampling, TokenOut};
use galerne_wire::vllm as pb;
use galerne_wire::vllm::candidate_tokens::Select;
use galerne_wire::vllm::control_server::Control;
use galerne_wire::vllm::decoding_parameters::StructuredOutput;
use galerne_wire::vllm::finish_info::{FinishReason, StopReason};
use galerne_wire::vllm::generate_request::Prompt as WirePrompt;
use galerne_wire::vllm::inference_server::Inference;
use tonic::{Request, Response, Status};

use super::access;
use super::call::{Call, End, Names, News};
use super::deadline::Deadline;
use super::errors::Fields;
use crate::ask::{Caller, MaxTokens, Options, Prompt, Several, Truncate, salt};
use crate::failure::Failure;
use crate::serve::Router;

/// The version of the public description that ours was written after.
const PROTO_VERSION: &str = "0.6.0";

const FIELDS: Fields = Fields(&[
    ("frequency_penalty", "decoding.frequency_penalty"),
    ("grammar", "decoding.structured_output"),
    ("logit_bias", "decoding.logit_bias"),
    ("logprobs", "response.output_candidates"),
    ("max_tokens", "stopping.max_new_tokens"),
    ("min_p", "sampling.min_p"),
    ("min_tokens", "stopping.min_new_tokens"),
    ("n", "sampling.num_sequences"),
    ("presence_penalty", "decoding.presence_penalty"),
    ("prompt_logprobs", "response.prompt_candidates"),
    ("repetition_penalty", "decoding.repetition_penalty"),
    ("stop", "stopping.stop_strings"),
    ("stop_token_ids", "stopping.stop_token_ids"),
    ("top_p", "sampling.top_p"),
]);

pub(super) struct Service {
    router: Arc<Router>,
    names: Arc<Names>,
    /// Tells two lives of a router apart.
    instance: u64,
}

/// What a client wants to see.
struct View {
    prompt_ids: bool,
    /// How many alternatives, if log probabilities at all.
    prompt_logprobs: Option<u32>,
    text: bool,
    ids: bool,
    logprobs: Option<u32>,
}

impl Service {
    pub(super) fn new(router: Arc<Router>, names: Arc<Names>) -> Self {
        let instance = RandomState::new().hash_one(std::process::id()); // keyed anew in each process
        Self { router, names, instance }
    }

    async fn start(&self, request: Request<pb::GenerateRequest>) -> Result<(Call, View), Status> {
        let deadline = Deadline::of(&request);
        let caller = access::caller(&request);
        let mut request = request.into_inner();
        let name = self.names.take(caller.tenant, std::mem::take(&mut request.request_id));
        let view = View::of(request.response.as_ref()).map_err(|failure| FIELDS.name(failure))?;
        let several = several(request, &view, caller).map_err(|failure| FIELDS.name(failure))?;
        let call = Call::start(&self.router, several, deadline, name, FIELDS).await?;
        Ok((call, view))
    }
}

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStreamStream = Pin<Box<dyn Stream<Item = Result<pb::GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<pb::GenerateResponse>, Status> {
        if request.get_ref().sampling.as_ref().is_some_and(|sampling| sampling.num_sequences > 1) {
            let message =
                "sampling.num_sequences must be 1 here: a whole response has room for one, a stream for more";
            return Err(FIELDS.name(Failure::invalid("n", message)));
        }
        let (mut call, view) = self.start(request).await?;
        let (mut text, mut tokens, mut end) = (String::new(), Vec::new(), None);
        while let Some(news) = call.next().await {
            let news = news?;
            text.push_str(&news.text);
            tokens.extend(news.token);
            end = news.end.or(end);
        }
        let generated = tokens.len();
        Ok(Response::new(pb::GenerateResponse {
            prompt_info: Some(view.prompt(&call)),
            outputs: Some(view.outputs(0, text, &tokens, end, generated, call.cached_tokens(0))),
        }))
    }

    async fn generate_stream(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let (call, view) = self.start(request).await?;
        let first = pb::GenerateResponse { prompt_info: Some(view.prompt(&call)), outputs: None };
        let generated: Vec<usize> = Vec::new();
        let rest = stream::unfold((call, view, generated), |(mut call, view, mut generated)| async move {
            let response = call.next().await?.map(|News { at, text, token, end }| {
                if generated.len() <= at {
                    generated.resize(at + 1, 0);
                }
                generated[at] += usize::from(token.is_some());
                let cached = call.cached_tokens(at);
                let outputs = view.outputs(at, text, token.as_slice(), end, generated[at], cached);
                pb::GenerateResponse { prompt_info: None, outputs: Some(outputs) }
            });
            Some((response, (call, view, generated)))
        });
        Ok(Response::new(Box::pin(futures_util::StreamExt::chain(stream::iter([Ok(first)]), rest))))
    }
}

/// The request, in our terms.
fn several(request: pb::GenerateRequest, view: &View, caller: Caller) -> Result<Several, Failure> {
    refuse_others(&request)?;
    let prompt = match request.prompt {
        Some(WirePrompt::Text(text)) => Prompt::Text(text),
        Some(WirePrompt::TokenIds(tokens)) => Prompt::Tokens(tokens.ids),
        None => return Err(Failure::invalid("prompt", "prompt is missing: set text or token_ids")),
    };
    let draws = request.sampling.unwrap_or_default();
    let decoding = request.decoding.unwrap_or_default();
    let stopping = request.stopping.unwrap_or_default();
    let kv = request.kv.unwrap_or_default();
    let mut logit_bias: Vec<_> = decoding.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|(id, _)| *id);
    let sampling = Sampling {
        temperature: request.temperature.unwrap_or(0.0),
        top_k: draws.top_k.unwrap_or(0),
        top_p: draws.top_p.unwrap_or(1.0),
        min_p: draws.min_p.unwrap_or(0.0),
        repetition_penalty: or_one(decoding.repetition_penalty),
        presence_penalty: decoding.presence_penalty,
        frequency_penalty: decoding.frequency_penalty,
        logit_bias,
        seed: 0,
        logprobs: view.logprobs,
    };
    let max_tokens = if stopping.max_new_tokens == 0 { u32::MAX } else { stopping.max_new_tokens };
    let skip_special = request.response.and_then(|response| response.skip_special_tokens).unwrap_or(true);
    let options = Options {
        seed: draws.seed.map(i64::cast_unsigned),
        min_tokens: stopping.min_new_tokens,
        stop: stopping.stop_strings,
        include_stop: stopping.include_stop_strings,
        stop_token_ids: stopping.stop_token_ids,
        ignore_eos: stopping.ignore_eos,
        skip_special,
        prompt_logprobs: view.prompt_logprobs,
        grammar: decoding.structured_output.map(grammar).transpose()?.flatten(),
        truncate: Truncate::to_last(request.truncate_prompt_tokens),
        cache_salt: (!kv.bypass_prefix_cache).then(|| salt(&kv.cache_salt)),
        priority: request.priority,
        ..Options::new(sampling, MaxTokens::UpTo(max_tokens))
    };
    Ok(Several {
        model: request.model,
        prompts: vec![prompt],
        each: draws.num_sequences.max(1),
        options,
        caller,
    })
}

/// Refuses by name what would change the answer and is not done here.
fn refuse_others(request: &pb::GenerateRequest) -> Result<(), Failure> {
    let decoding = request.decoding.as_ref();
    let kv = request.kv.as_ref();
    let budget = request.stopping.as_ref().and_then(|stopping| stopping.thinking_token_budget);
    for (field, asked) in [
        ("media", !request.media.is_empty()),
        ("lora_name", !request.lora_name.is_empty()),
        ("decoding.allowed_token_ids", decoding.is_some_and(|d| !d.allowed_token_ids.is_empty())),
        ("decoding.bad_words_token_ids", decoding.is_some_and(|d| !d.bad_words_token_ids.is_empty())),
        ("stopping.thinking_token_budget", budget.is_some_and(|budget| budget != -1)),
        ("kv.kv_transfer_params", kv.is_some_and(|kv| kv.kv_transfer_params.is_some())),
        ("kv.ec_transfer_params", kv.is_some_and(|kv| kv.ec_transfer_params.is_some())),
    ] {
        if asked {
            return Err(Failure::invalid(field, format!("{field} is not supported: leave it out")));
        }
    }
    Ok(())
}

fn grammar(wanted: StructuredOutput) -> Result<Option<Grammar>, Failure> {
    Ok(Some(match wanted {
        StructuredOutput::Json(schema) => Grammar::JsonSchema(schema),
        StructuredOutput::Regex(regex) => Grammar::Regex(regex),
        StructuredOutput::Choice(choices) => Grammar::Choice(choices.choices),
        StructuredOutput::Grammar(rules) => Grammar::Lark(rules),
        StructuredOutput::JsonObject(true) => Grammar::JsonObject,
        StructuredOutput::JsonObject(false) => return Ok(None),
        StructuredOutput::StructuralTag(_) => {
            let message = "decoding.structural_tag is not supported: use json, regex, choice or grammar";
            return Err(Failure::invalid("decoding.structural_tag", message));
        }
    }))
}

/// 0 is what an unset number looks like, and 1 what it means.
pub(super) fn or_one(value: f32) -> f32 {
    if value == 0.0 { 1.0 } else { value }
}

impl View {
    fn of(response: Option<&pb::ResponseOptions>) -> Result<Self, Failure> {
        let response = response.cloned().unwrap_or_default();
        let count = |asked: bool, field, candidates: Option<pb::CandidateTokens>| {
            asked.then(|| alternatives(field, candidates)).transpose()
        };
        Ok(Self {
            prompt_ids: response.prompt_token_ids,
            prompt_logprobs: count(response.prompt_logprobs, "prompt_logprobs", response.prompt_candidates)?,
            text: response.output_text.unwrap_or(true),
            ids: response.output_token_ids,
            logprobs: count(response.output_logprobs, "logprobs", response.output_candidates)?,
        })
    }

    /// The first message of a stream, or the first half of a whole response.
    fn prompt(&self, call: &Call) -> pb::PromptInfo {
        let mut info = pb::PromptInfo { num_prompt_tokens: call.prompt_tokens(), ..Default::default() };
        let Some(answer) = call.any() else { return info };
        if self.prompt_ids {
            info.token_ids = answer.prompt().to_vec();
        }
        if let Some(top) = self.prompt_logprobs {
            let scores = answer.prompt_scores();
            info.logprobs = std::iter::once(0.0).chain(scores.iter().map(|score| score.logprob)).collect();
            info.ranks = std::iter::once(0).chain(scores.iter().map(|score| score.rank)).collect();
            let others = scores.iter().map(|score| candidates(score, top));
            info.candidate_tokens =
                std::iter::once(pb::CandidateTokenInfo::default()).chain(others).collect();
        }
        info
    }

    fn outputs(
        &self,
        at: usize,
        text: String,
        tokens: &[TokenOut],
        end: Option<End>,
        generated: usize,
        cached: u32,
    ) -> pb::SequenceOutput {
        let mut outputs = pb::SequenceOutput {
            index: at as u32,
            text: if self.text { text } else { String::new() },
            num_tokens: tokens.len() as u32,
            finish_info: end.map(|end| finish(end, generated, cached)),
            ..Default::default()
        };
        if self.ids {
            outputs.token_ids = tokens.iter().map(|token| token.id).collect();
        }
        if let Some(top) = self.logprobs {
            outputs.logprobs = tokens.iter().map(|token| token.logprob).collect();
            outputs.ranks = tokens.iter().map(|token| token.rank).collect();
            outputs.candidate_tokens = tokens.iter().map(|token| candidates(token, top)).collect();
        }
        outputs
    }
}

/// How many alternatives a selector asks for.
fn alternatives(field: &'static str, candidates: Option<pb::CandidateTokens>) -> Result<u32, Failure> {
    let asked = match candidates.and_then(|candidates| candidates.select) {
        None | Some(Select::All(false)) => 0,
        Some(Select::TopN(count)) => count,
        Some(Select::TokenIds(ids)) if ids.ids.is_empty() => 0,
        Some(Select::TokenIds(_) | Select::All(true)) => {
            return Err(Failure::invalid(
                field,
                "candidates must be top_n: chosen tokens, or all, are not shown",
            ));
        }
    };
    if asked > TOP_LOGPROBS_MAX {
        return Err(Failure::invalid(
            field,
            format!("top_n must be at most {TOP_LOGPROBS_MAX}, not {asked}"),
        ));
    }
    Ok(asked)
}

/// The `count` most likely tokens, without the one itself.
fn candidates(token: &TokenOut, count: u32) -> pb::CandidateTokenInfo {
    let top = token.top.iter().zip(1..).take(count as usize).filter(|(top, _)| top.id != token.id);
    let info = |(top, rank): (&galerne_types::TopToken, u32)| pb::candidate_token_info::TokenInfo {
        id: top.id,
        logprob: top.logprob,
        rank,
    };
    pb::CandidateTokenInfo { tokens: top.map(info).collect() }
}

fn finish(end: End, generated: usize, cached: u32) -> pb::FinishInfo {
    let (reason, stop_reason) = match end {
        End::Length => (FinishReason::Length, None),
        End::Eos(id) => (FinishReason::Stop, Some(StopReason::EosTokenId(id))),
        End::Token(id) => (FinishReason::Stop, Some(StopReason::StopTokenId(id))),
        End::Text(stop) => (FinishReason::Stop, Some(StopReason::StopString(stop))),
        End::Complete => (FinishReason::Stop, None),
        End::Aborted => (FinishReason::Aborted, None),
    };
    pb::FinishInfo {
        num_output_tokens: generated as u32,
        finish_reason: reason.into(),
        stop_reason,
        num_cached_tokens: Some(cached),
    }
}

#[tonic::async_trait]
impl Control for Service {
    async fn get_server_info(
        &self,
        _: Request<pb::GetServerInfoRequest>,
    ) -> Result<Response<pb::ServerInfo>, Status> {
        let groups = self.router.groups.list();
        let serving = || groups.iter().filter_map(|listed| listed.group.serving());
        let card = serving().map(|health| &health.model).next();
        let ranks = card.map_or(0, |card| card.shards.world_size() as u32);
        Ok(Response::new(pb::ServerInfo {
            engine_version: concat!("galerne ", env!("CARGO_PKG_VERSION")).to_owned(),
            api_version: "vllm".to_owned(),
            instance_id: format!("{:016x}", self.instance),
            parallelism: Some(pb::ParallelismInfo {
                tensor_parallel_size: ranks,
                pipeline_parallel_size: 1,
                data_parallel_size: 1,
                decode_context_parallel_size: 1,
                world_size: ranks.into(),
            }),
            max_model_len: card.map_or(0, |card| card.context_tokens_max),
            kv_block_size: KV_BLOCK_TOKENS as u32,
            total_kv_blocks: serving().map(|health| u64::from(health.kv_blocks)).sum(),
            max_running_requests: serving().map(|health| u64::from(health.sequences_max)).sum(),
            proto_version: PROTO_VERSION.to_owned(),
        }))
    }

    async fn get_model_info(
        &self,
        _: Request<pb::GetModelInfoRequest>,
    ) -> Result<Response<pb::ModelInfo>, Status> {
        let mut names = self.router.models.keys().cloned();
        let name = names.next().unwrap_or_default();
        Ok(Response::new(pb::ModelInfo {
            model_id: name.clone(),
            served_model_name: name,
            served_model_aliases: names.collect(),
            supports_text_input: true,
            supports_token_ids_input: true,
        }))
    }

    async fn abort(&self, request: Request<pb::AbortRequest>) -> Result<Response<pb::AbortResponse>, Status> {
        let tenant = access::caller(&request).tenant;
        self.names.abort(tenant, request.into_inner().request_ids);
        Ok(Response::new(pb::AbortResponse {}))
    }
}
