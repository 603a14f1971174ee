//! `galerne.v1.Galerne`.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, stream};
use galerne_text::Chat;
use galerne_types::{Grammar, Group, Sampling};
use galerne_wire::v1;
use galerne_wire::v1::galerne_server::Galerne;
use galerne_wire::v1::generate_request::Prompt as WirePrompt;
use galerne_wire::v1::tokenize_request::Prompt as WireText;
use prost::Message as _;
use serde_json::{Map, Value, json};
use tonic::{Request, Response, Status};

use super::access;
use super::deadline::Deadline;
use crate::answer::{Answer, Delta};
use crate::ask::{Ask, Caller, MaxTokens, Options, Prompt, Resume, salt};
use crate::failure::Failure;
use crate::groups::Listed;
use crate::serve::Router;
use crate::{standing, tokens};

pub(super) struct Service(pub(super) Arc<Router>);

#[tonic::async_trait]
impl Galerne for Service {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let mut deadline = Deadline::of(&request);
        let (caller, request) = (access::caller(&request), request.into_inner());
        caller.says(|| {
            v1::GenerateRequest { resume: None, numerics: String::new(), ..request.clone() }.encode_to_vec()
        });
        let ask = Ask { caller, ..ask(request)? };
        let answer = deadline.limit(Answer::start(&self.0, ask)).await??;
        let deltas = stream::unfold(Some((answer, deadline)), |running| async move {
            let (mut answer, mut deadline) = running?;
            let first = answer.generated() == answer.resumed();
            match deadline.limit(answer.next()).await {
                Ok(delta) => {
                    let response = delta?.map(|delta| response(delta, &answer, first)).map_err(Status::from);
                    Some((response, Some((answer, deadline))))
                }
                Err(exceeded) => Some((Err(exceeded), None)), // the answer is dropped, and its leader told
            }
        });
        Ok(Response::new(Box::pin(deltas)))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let mut deadline = Deadline::of(&request);
        let caller = access::caller(&request);
        let v1::TokenizeRequest { model, prompt, add_special_tokens: special, pieces } = request.into_inner();
        let (prompt, again) = match prompt {
            Some(WireText::Text(text)) if special == Some(false) => (Prompt::Bare(text), false),
            Some(WireText::Text(text)) => (Prompt::Text(text), false),
            Some(WireText::Chat(chat)) => (Prompt::Chat(conversation(chat)?), special == Some(true)),
            None => return Err(Failure::invalid("prompt", "prompt is missing: set text or chat").into()),
        };
        let tokens = deadline.limit(tokens::tokenize(&self.0, &caller, &model, prompt, again)).await??;
        let piece = |bytes: &[u8]| v1::Piece {
            text: String::from_utf8_lossy(bytes).into_owned(),
            bytes: bytes.to_vec(),
        };
        Ok(Response::new(v1::TokenizeResponse {
            pieces: if pieces { tokens.pieces().map(piece).collect() } else { Vec::new() },
            count: tokens.ids.len() as u32,
            context_tokens_max: tokens.context_tokens_max,
            ids: tokens.ids,
        }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let mut deadline = Deadline::of(&request);
        let caller = access::caller(&request);
        let v1::DetokenizeRequest { model, ids, skip_special_tokens } = request.into_inner();
        let text = tokens::detokenize(&self.0, &caller, &model, ids, skip_special_tokens);
        Ok(Response::new(v1::DetokenizeResponse { text: deadline.limit(text).await?? }))
    }

    async fn models(&self, _: Request<v1::ModelsRequest>) -> Result<Response<v1::ModelsResponse>, Status> {
        let cards = self.0.models.keys().filter_map(|name| self.0.groups.card(name));
        let models = cards.map(|card| v1::Model {
            name: card.name,
            digest: card.digest,
            context_tokens_max: card.context_tokens_max,
            vocab: card.vocab,
        });
        Ok(Response::new(v1::ModelsResponse { models: models.collect() }))
    }

    async fn fleet(&self, _: Request<v1::FleetRequest>) -> Result<Response<v1::FleetResponse>, Status> {
        let groups = self.0.groups.list().iter().map(group_status).collect();
        Ok(Response::new(v1::FleetResponse { groups }))
    }
}

fn ask(request: v1::GenerateRequest) -> Result<Ask, Failure> {
    let v1::GenerateRequest {
        model,
        prompt,
        sampling,
        max_tokens,
        min_tokens,
        stop,
        stop_token_ids,
        ignore_eos,
        grammar,
        prompt_logprobs,
        skip_special_tokens,
        include_stop,
        cache_salt,
        priority,
        resume,
        numerics,
    } = request;
    let prompt = match prompt {
        Some(WirePrompt::Text(text)) => Prompt::Text(text),
        Some(WirePrompt::Tokens(tokens)) => Prompt::Tokens(tokens.ids),
        Some(WirePrompt::Chat(chat)) => Prompt::Chat(conversation(chat)?),
        None => return Err(Failure::invalid("prompt", "prompt is missing: set text, tokens or chat")),
    };
    let sampling = sampling.unwrap_or_default();
    let seed = sampling.seed;
    let sampling = Sampling::try_from(v1::Sampling {
        temperature: sampling.temperature.or(Some(1.0)),
        seed: Some(0), // decided later
        ..sampling
    })?;
    let max_tokens = max_tokens.map_or(MaxTokens::UpTo(u32::MAX), MaxTokens::Exactly);
    let options = Options {
        min_tokens,
        stop,
        stop_token_ids,
        ignore_eos,
        grammar: grammar.map(Grammar::try_from).transpose()?,
        prompt_logprobs,
        skip_special: skip_special_tokens.unwrap_or(true),
        include_stop,
        cache_salt: Some(salt(&cache_salt)),
        priority,
        seed,
        ..Options::new(sampling, max_tokens)
    };
    let numerics = Some(numerics).filter(|numerics| !numerics.is_empty());
    let resume = Resume { tokens: resume.unwrap_or_default().ids, numerics };
    Ok(Ask { model, prompt, options, caller: Caller::default(), resume })
}

fn conversation(chat: v1::Chat) -> Result<Chat, Failure> {
    let v1::Chat { messages, tools, continue_final_message } = chat;
    Ok(Chat {
        messages: messages.into_iter().map(turn).collect::<Result<_, _>>()?,
        tools: objects("chat.tools", &tools)?,
        continue_final: continue_final_message,
        add_generation_prompt: !continue_final_message,
        extra: Map::new(),
    })
}

/// A message as in OpenAI's API.
fn turn(message: v1::ChatMessage) -> Result<Value, Failure> {
    let v1::ChatMessage { role, content, tool_calls, tool_call_id } = message;
    if !matches!(role.as_str(), "system" | "developer" | "user" | "assistant" | "tool") {
        let says = "role must be system, developer, user, assistant or tool";
        return Err(Failure::invalid("chat.messages.role", says));
    }
    let mut turn = json!({ "role": role, "content": content });
    if !tool_calls.is_empty() {
        turn["tool_calls"] = objects("chat.messages.tool_calls", &tool_calls)?.into();
    }
    if !tool_call_id.is_empty() {
        turn["tool_call_id"] = tool_call_id.into();
    }
    Ok(turn)
}

fn objects(field: &'static str, texts: &[String]) -> Result<Vec<Value>, Failure> {
    let object = |text: &String| match serde_json::from_str(text) {
        Ok(object @ Value::Object(_)) => Ok(object),
        _ => Err(Failure::invalid(field, format!("{field} must each be a JSON object"))),
    };
    texts.iter().map(object).collect()
}

fn response(delta: Delta, answer: &Answer, first: bool) -> v1::GenerateResponse {
    let Delta { text, token, finish, stopped: _ } = delta;
    let usage = finish.map(|_| v1::Usage {
        prompt_tokens: answer.prompt().len() as u32,
        completion_tokens: answer.generated() as u32,
        cached_tokens: answer.cached_tokens() as u32,
    });
    let scores = if first { answer.prompt_scores() } else { &[] };
    v1::GenerateResponse {
        text: text.into(),
        tokens: token.into_iter().map(v1::Token::from).collect(),
        finish_reason: finish.map_or(v1::FinishReason::Unspecified, v1::FinishReason::from).into(),
        usage,
        prompt: scores.iter().cloned().map(v1::Token::from).collect(),
        numerics: if first { answer.card().numerics() } else { String::new() },
    }
}

fn group_status(listed: &Listed) -> v1::GroupStatus {
    let Listed { id, group, standing, same_weights: _, in_flight, breaker: _ } = listed;
    let served = group.health.as_ref().map(|health| &health.model);
    let model = served.or_else(|| group.ranks.values().next().map(|rank| &rank.model));
    v1::GroupStatus {
        name: id.0.clone(),
        state: standing.name().to_owned(),
        epoch: group.epoch.as_ref().map_or(0, |(epoch, _)| epoch.0),
        model: model.map_or(String::new(), |card| card.name.clone()),
        virtual_shards: model.map_or(0, |card| card.shards.virtual_shards() as u32),
        world_size: model.map_or(0, |card| card.shards.world_size() as u32),
        requests: *in_flight,
        ranks: rank_statuses(group),
        past: group.epoch.iter().flat_map(|(_, record)| &record.past).map(past_epoch).collect(),
    }
}

fn past_epoch(past: &galerne_types::Past) -> v1::PastEpoch {
    v1::PastEpoch {
        epoch: past.epoch.0,
        ranks: past.ranks.into(),
        began_ms: past.began_ms,
        ended_ms: past.ended_ms,
        reason: past.loss.kind.name().to_owned(),
        rank: past.loss.rank.as_ref().map_or(String::new(), |rank| rank.0.clone()),
    }
}

fn rank_statuses(group: &Group) -> Vec<v1::RankStatus> {
    let status = |rank: &galerne_types::RankRecord| {
        let shards = standing::member(group, rank).map_or(0..0, |member| member.shards.clone());
        v1::RankStatus {
            id: rank.id.0.clone(),
            address: rank.address.clone(),
            pid: rank.pid,
            device: rank.device.clone(),
            state: standing::rank_state(rank.state),
            first_shard: shards.start as u32,
            shards: shards.len() as u32,
            memory_bytes: rank.memory_bytes,
        }
    };
    standing::in_rank_order(group).into_iter().map(status).collect()
}
