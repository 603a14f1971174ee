//! `vllm.grpc.engine.VllmEngine`: the dialect between SMG's routers and vLLM's engines.
//!
//! It knows token ids only. A stream has a chunk for each token and then the end of each answer; otherwise there is
//! only the end, which carries everything. Unset sampling is temperature 1.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use futures_util::{Stream, stream};
use galerne_types::limits::{KV_BLOCK_TOKENS, TOP_LOGPROBS_MAX};
use galerne_types::{Grammar, Health, Sampling, TokenId, TokenOut};
use galerne_wire::vllm::grpc::engine as pb;
use galerne_wire::vllm::grpc::engine::generate_complete::MatchedStop;
use galerne_wire::vllm::grpc::engine::generate_request::Input;
use galerne_wire::vllm::grpc::engine::generate_response::Response as Piece;
use galerne_wire::vllm::grpc::engine::sampling_params::Constraint;
use galerne_wire::vllm::grpc::engine::vllm_engine_server::VllmEngine;
use tonic::{Request, Response, Status};

use super::access;
use super::call::{Call, End, Names, News};
use super::deadline::Deadline;
use super::errors::Fields;
use super::inference::or_one;
use crate::ask::{Caller, MaxTokens, Options, Prompt, Several, Truncate};
use crate::failure::Failure;
use crate::groups::Listed;
use crate::model::Model;
use crate::serve::Router;
use crate::standing::Standing;

const FIELDS: Fields = Fields(&[
    ("frequency_penalty", "sampling_params.frequency_penalty"),
    ("grammar", "sampling_params.constraint"),
    ("logit_bias", "sampling_params.logit_bias"),
    ("logprobs", "sampling_params.logprobs"),
    ("max_tokens", "sampling_params.max_tokens"),
    ("min_p", "sampling_params.min_p"),
    ("min_tokens", "sampling_params.min_tokens"),
    ("n", "sampling_params.n"),
    ("presence_penalty", "sampling_params.presence_penalty"),
    ("prompt", "input"),
    ("prompt_logprobs", "sampling_params.prompt_logprobs"),
    ("repetition_penalty", "sampling_params.repetition_penalty"),
    ("stop", "sampling_params.stop"),
    ("stop_token_ids", "sampling_params.stop_token_ids"),
    ("temperature", "sampling_params.temperature"),
    ("top_p", "sampling_params.top_p"),
]);

pub(super) struct Service {
    router: Arc<Router>,
    names: Arc<Names>,
    began: Instant,
}

/// A call and the answers that it has so far.
struct Running {
    call: Call,
    stream: bool,
    /// Alternatives to show, if log probabilities are.
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    /// Tokens so far, of each answer; in a stream only those of its last chunk.
    answers: Vec<Vec<TokenOut>>,
    /// Answers whose first chunk was sent.
    begun: Vec<bool>,
    ready: VecDeque<Piece>,
}

#[tonic::async_trait]
impl VllmEngine for Service {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<pb::GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let deadline = Deadline::of(&request);
        let caller = access::caller(&request);
        let mut request = request.into_inner();
        let name = self.names.take(caller.tenant, std::mem::take(&mut request.request_id));
        let stream = request.stream;
        let several = self.several(request, caller).map_err(|failure| FIELDS.name(failure))?;
        let count = several.each as usize;
        let shown = |asked: Option<u32>| asked.map(|count| count as usize);
        let logprobs = shown(several.options.sampling.logprobs);
        let prompt_logprobs = shown(several.options.prompt_logprobs);
        let call = Call::start(&self.router, several, deadline, name, FIELDS).await?; // which checks the count
        let running = Running {
            stream,
            logprobs,
            prompt_logprobs,
            answers: vec![Vec::new(); count],
            begun: vec![false; count],
            ready: VecDeque::new(),
            call,
        };
        let pieces = stream::unfold(running, |mut running| async move {
            let piece = running.next().await?;
            Some((piece.map(|piece| pb::GenerateResponse { response: Some(piece) }), running))
        });
        Ok(Response::new(Box::pin(pieces)))
    }

    async fn embed(&self, _: Request<pb::EmbedRequest>) -> Result<Response<pb::EmbedResponse>, Status> {
        Err(Status::unimplemented("the models served here generate and do not embed"))
    }

    async fn health_check(
        &self,
        _: Request<pb::HealthCheckRequest>,
    ) -> Result<Response<pb::HealthCheckResponse>, Status> {
        let missing = self.router.ready().err();
        let healthy = missing.is_none();
        let message = missing.map_or_else(|| "requests are taken".to_owned(), |missing| missing.join("; "));
        Ok(Response::new(pb::HealthCheckResponse { healthy, message }))
    }

    async fn abort(&self, request: Request<pb::AbortRequest>) -> Result<Response<pb::AbortResponse>, Status> {
        let tenant = access::caller(&request).tenant;
        self.names.abort(tenant, request.into_inner().request_ids);
        Ok(Response::new(pb::AbortResponse {}))
    }

    async fn get_model_info(
        &self,
        _: Request<pb::GetModelInfoRequest>,
    ) -> Result<Response<pb::GetModelInfoResponse>, Status> {
        let model = self.model()?;
        let served = self.router.groups.card(&model.name).map(|card| card.context_tokens_max);
        let context = served.unwrap_or(model.context_tokens_max);
        Ok(Response::new(pb::GetModelInfoResponse {
            model_path: model.name.clone(),
            is_generation: true,
            max_context_length: context,
            vocab_size: model.vocab as u32,
            supports_vision: false,
            served_model_name: model.name.clone(),
            tokenizer_path: model.name.clone(),
            model_type: "mistral".to_owned(),
            architectures: vec!["MistralForCausalLM".to_owned()],
            eos_token_ids: model.eos.iter().map(|id| id.cast_signed()).collect(),
            pad_token_id: 0,
            bos_token_id: model.bos.unwrap_or(0).cast_signed(),
            max_req_input_len: context.cast_signed(),
            default_sampling_params_json: String::new(),
        }))
    }

    async fn get_server_info(
        &self,
        _: Request<pb::GetServerInfoRequest>,
    ) -> Result<Response<pb::GetServerInfoResponse>, Status> {
        let groups = self.router.groups.list();
        let sequences = groups.iter().filter_map(|listed| listed.group.serving()).map(|h| h.sequences_max);
        Ok(Response::new(pb::GetServerInfoResponse {
            active_requests: groups.iter().map(|listed| listed.in_flight).sum(),
            is_paused: false,
            uptime_seconds: self.began.elapsed().as_secs_f64(),
            server_type: "vllm-grpc".to_owned(),
            data_parallel_size: 1,
            block_size: KV_BLOCK_TOKENS as i32,
            max_num_seqs: sequences.sum::<u32>().cast_signed(),
        }))
    }

    async fn get_loads(
        &self,
        request: Request<pb::GetLoadsRequest>,
    ) -> Result<Response<pb::GetLoadsResponse>, Status> {
        let groups = self.router.groups.list();
        let ready = groups.iter().filter(|listed| listed.standing == Standing::Ready);
        let loads = ready.filter_map(|listed| Some((listed, listed.group.serving()?))).zip(0..);
        let loads: Vec<_> = loads.map(|((listed, health), at)| load(at, listed, health)).collect();
        let only = request.into_inner().dp_rank;
        Ok(Response::new(pb::GetLoadsResponse {
            timestamp: prost_types::Timestamp::from(SystemTime::now()).to_string(),
            version: concat!("galerne ", env!("CARGO_PKG_VERSION")).to_owned(),
            dp_rank_count: loads.len() as i32,
            loads: loads.into_iter().filter(|load| only.is_none_or(|at| at == load.dp_rank)).collect(),
        }))
    }
}

impl Service {
    pub(super) fn new(router: Arc<Router>, names: Arc<Names>) -> Self {
        Self { router, names, began: Instant::now() }
    }

    /// The one that is meant by requests that cannot name any: the first by name.
    fn model(&self) -> Result<&Arc<Model>, Failure> {
        self.router.models.values().next().ok_or_else(|| Failure::Engine("it has no model".to_owned()))
    }

    /// The request, in our terms.
    fn several(&self, request: pb::GenerateRequest, caller: Caller) -> Result<Several, Failure> {
        refuse_others(&request)?;
        let prompt = match request.input {
            Some(Input::Tokenized(tokens)) => Prompt::Tokens(tokens.input_ids),
            Some(Input::Text(text)) => Prompt::Text(text),
            None => return Err(Failure::invalid("input", "input is missing: set tokenized or text")),
        };
        let params = request.sampling_params.unwrap_or_default();
        let count = |field, asked: Option<i32>| asked.map(|count| alternatives(field, count)).transpose();
        let sampling = Sampling {
            temperature: params.temperature.unwrap_or(1.0),
            top_k: params.top_k,
            top_p: or_one(params.top_p),
            min_p: params.min_p,
            repetition_penalty: or_one(params.repetition_penalty),
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias: logit_bias(params.logit_bias)?,
            seed: 0,
            logprobs: count("logprobs", params.logprobs)?,
        };
        let max_tokens = params.max_tokens.unwrap_or(u32::MAX);
        let options = Options {
            seed: params.seed.map(|seed| i64::from(seed).cast_unsigned()),
            min_tokens: params.min_tokens,
            stop: params.stop,
            stop_token_ids: params.stop_token_ids,
            ignore_eos: params.ignore_eos,
            prompt_logprobs: count("prompt_logprobs", params.prompt_logprobs)?,
            grammar: params.constraint.map(grammar).transpose()?.flatten(),
            truncate: truncate(params.truncate_prompt_tokens)?,
            ..Options::new(sampling, MaxTokens::UpTo(max_tokens))
        };
        let (model, each) = (self.model()?.name.clone(), params.n.max(1));
        Ok(Several { model, prompts: vec![prompt], each, options, caller })
    }
}

fn truncate(keep: Option<i32>) -> Result<Option<Truncate>, Failure> {
    let Some(keep) = keep else { return Ok(None) };
    let truncate = Truncate::of(keep.into(), false);
    truncate.map(Some).map_err(|says| Failure::invalid("sampling_params.truncate_prompt_tokens", says))
}

/// Refuses by name what would change the answer and is not done here.
fn refuse_others(request: &pb::GenerateRequest) -> Result<(), Failure> {
    for (field, asked) in [
        ("mm_inputs", request.mm_inputs.is_some()),
        ("extra_mm_inputs", !request.extra_mm_inputs.is_empty()),
        ("media_refs", request.media_refs.is_some()),
        ("kv_transfer_params", request.kv_transfer_params.is_some()),
        ("kv_transfer_params_json", request.kv_transfer_params_json.is_some()),
        ("data_parallel_rank", request.data_parallel_rank.is_some_and(|rank| rank != 0)),
    ] {
        if asked {
            return Err(Failure::invalid(field, format!("{field} is not supported: leave it out")));
        }
    }
    Ok(())
}

fn alternatives(field: &'static str, count: i32) -> Result<u32, Failure> {
    u32::try_from(count).ok().filter(|count| *count <= TOP_LOGPROBS_MAX).ok_or_else(|| {
        Failure::invalid(field, format!("{field} must be from 0 to {TOP_LOGPROBS_MAX}, not {count}"))
    })
}

fn logit_bias(biases: std::collections::HashMap<i32, f32>) -> Result<Vec<(TokenId, f32)>, Failure> {
    let mut sorted = Vec::with_capacity(biases.len());
    for (id, bias) in biases {
        let id = TokenId::try_from(id).map_err(|_| {
            Failure::invalid("logit_bias", format!("logit_bias must name token ids, and {id} is none"))
        })?;
        sorted.push((id, bias));
    }
    sorted.sort_unstable_by_key(|(id, _)| *id);
    Ok(sorted)
}

fn grammar(constraint: Constraint) -> Result<Option<Grammar>, Failure> {
    Ok(Some(match constraint {
        Constraint::JsonSchema(schema) => Grammar::JsonSchema(schema),
        Constraint::Regex(regex) => Grammar::Regex(regex),
        Constraint::Grammar(rules) => Grammar::Lark(rules),
        Constraint::Choice(choice) => Grammar::Choice(choice.choices),
        Constraint::JsonObject(true) => Grammar::JsonObject,
        Constraint::JsonObject(false) => return Ok(None),
        Constraint::StructuralTag(_) => {
            let message = "structural_tag is not supported: use json_schema, regex, choice or grammar";
            return Err(Failure::invalid("sampling_params.structural_tag", message));
        }
    }))
}

impl Running {
    async fn next(&mut self) -> Option<Result<Piece, Status>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Some(Ok(piece));
            }
            match self.call.next().await? {
                Ok(news) => self.take_in(news),
                Err(status) => return Some(Err(status)),
            }
        }
    }

    fn take_in(&mut self, News { at, text: _, token, end }: News) {
        if self.stream {
            self.answers[at].clear();
        }
        let drawn = token.is_some();
        self.answers[at].extend(token);
        if self.stream && drawn {
            let first = !std::mem::replace(&mut self.begun[at], true);
            self.ready.push_back(Piece::Chunk(self.chunk(at, first)));
        }
        if let Some(end) = end {
            self.ready.push_back(Piece::Complete(self.complete(at, end)));
        }
    }

    fn chunk(&self, at: usize, first: bool) -> pb::GenerateStreamChunk {
        let tokens = &self.answers[at];
        pb::GenerateStreamChunk {
            token_ids: tokens.iter().map(|token| token.id).collect(),
            prompt_tokens: self.call.prompt_tokens(),
            completion_tokens: tokens.len() as u32,
            cached_tokens: self.call.cached_tokens(at),
            output_logprobs: self.output_logprobs(at),
            input_logprobs: if first { self.input_logprobs() } else { None },
            index: at as u32,
        }
    }

    fn complete(&self, at: usize, end: End) -> pb::GenerateComplete {
        let (reason, matched_stop) = match end {
            End::Length => ("length", None),
            End::Eos(_) | End::Complete => ("stop", None),
            End::Token(id) => ("stop", Some(MatchedStop::MatchedTokenId(id))),
            End::Text(stop) => ("stop", Some(MatchedStop::MatchedStopStr(stop))),
            End::Aborted => ("abort", None),
        };
        let tokens = &self.answers[at];
        pb::GenerateComplete {
            output_ids: tokens.iter().map(|token| token.id).collect(),
            finish_reason: reason.to_owned(),
            prompt_tokens: self.call.prompt_tokens(),
            completion_tokens: tokens.len() as u32,
            cached_tokens: self.call.cached_tokens(at),
            output_logprobs: self.output_logprobs(at),
            input_logprobs: if self.stream { None } else { self.input_logprobs() },
            index: at as u32,
            matched_stop,
        }
    }

    fn output_logprobs(&self, at: usize) -> Option<pb::OutputLogProbs> {
        let count = self.logprobs?;
        let tokens = &self.answers[at];
        Some(pb::OutputLogProbs {
            token_logprobs: tokens.iter().map(|token| token.logprob).collect(),
            token_ids: tokens.iter().map(|token| token.id).collect(),
            top_logprobs: if count == 0 {
                Vec::new()
            } else {
                tokens.iter().map(|t| top(t, count)).collect()
            },
        })
    }

    fn input_logprobs(&self) -> Option<pb::InputLogProbs> {
        let (count, answer) = (self.prompt_logprobs?, self.call.any()?);
        let scores = answer.prompt_scores();
        let none = std::iter::once(pb::InputTokenLogProb { value: None });
        let values = scores.iter().map(|score| pb::InputTokenLogProb { value: Some(score.logprob) });
        let tops = std::iter::once(pb::TopLogProbs::default()).chain(scores.iter().map(|s| top(s, count)));
        Some(pb::InputLogProbs {
            token_logprobs: none.chain(values).collect(),
            token_ids: answer.prompt().to_vec(),
            top_logprobs: if count == 0 { Vec::new() } else { tops.collect() },
        })
    }
}

/// The token itself, and then the most likely others: `count` entries.
fn top(token: &TokenOut, count: usize) -> pb::TopLogProbs {
    let others = token.top.iter().filter(|top| top.id != token.id).map(|top| (top.id, top.logprob));
    let entries = std::iter::once((token.id, token.logprob)).chain(others).take(count);
    let (token_ids, values) = entries.unzip();
    pb::TopLogProbs { values, token_ids }
}

fn load(at: i32, listed: &Listed, health: &Health) -> pb::SchedulerLoad {
    let (running, most) = (listed.in_flight.cast_signed(), health.sequences_max.cast_signed());
    pb::SchedulerLoad {
        dp_rank: at,
        num_running_reqs: running,
        num_total_reqs: running,
        max_total_num_tokens: (u64::from(health.kv_blocks) * KV_BLOCK_TOKENS as u64) as i32,
        utilization: (f64::from(running) / f64::from(most.max(1))).min(1.0),
        max_running_requests: most,
    }
}
