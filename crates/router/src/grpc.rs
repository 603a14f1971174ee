//! The gRPC face: `galerne.v1.Galerne`, health and reflection.

mod access;

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, stream};
use galerne_text::Chat;
use galerne_types::{Group, Sampling};
use galerne_wire::v1::galerne_server::{Galerne, GalerneServer};
use galerne_wire::v1::generate_request::Prompt as WirePrompt;
use galerne_wire::{DESCRIPTOR_SET, v1};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::{Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::answer::{Answer, Delta};
use crate::ask::{Ask, Caller, MaxTokens, Options, Prompt, random_seed};
use crate::failure::Failure;
use crate::groups::Listed;
use crate::serve::{Router, RouterError};
use crate::server::{self, Protocol};
use crate::standing;

/// Serves until `stop`, and then until the running answers have ended.
pub(crate) async fn serve(
    router: Arc<Router>,
    listener: TcpListener,
    stop: CancellationToken,
) -> Result<(), RouterError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(HEALTH_OF[1])
        .with_service_name("grpc.health.v1.Health")
        .with_service_name("grpc.reflection.v1.ServerReflection")
        .build_v1()
        .map_err(RouterError::Reflection)?;
    let galerne =
        GalerneServer::new(Service(router.clone())).max_decoding_message_size(router.limits.body_bytes_max);
    let routes = Routes::new(galerne).add_service(health).add_service(reflection).prepare();
    let routes = access::guarded(routes.into_axum_router(), &router.gate);
    let served = {
        let (places, limits) = (router.grpc_places.clone(), router.limits.clone());
        server::serve(listener, Protocol::Http2, places, limits, routes, stop.clone())
    };
    tokio::join!(served, report_health(&router, reporter, &stop));
    Ok(())
}

/// Keeps `grpc.health.v1` in step with the fleet until `stop`.
async fn report_health(router: &Router, mut reporter: HealthReporter, stop: &CancellationToken) {
    let (mut seen, mut draining) = (router.groups.watch(), router.traffic.watch());
    loop {
        let status = if router.ready().is_ok() { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in HEALTH_OF {
            reporter.set_service_status(service, status).await;
        }
        tokio::select! {
            () = router.groups.changed(&mut seen) => {}
            Ok(()) = draining.changed() => {}
            () = stop.cancelled() => break,
        }
    }
    for service in HEALTH_OF {
        reporter.clear_service_status(service).await; // ends the streams that watch it, so that the server can end
    }
}

/// Services of which health is told; the empty name is the server as a whole.
const HEALTH_OF: [&str; 2] = ["", <GalerneServer<Service> as NamedService>::NAME];

struct Service(Arc<Router>);

#[tonic::async_trait]
impl Galerne for Service {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let caller = access::caller(&request);
        let ask = Ask { caller, ..ask(request.into_inner())? };
        let answer = Answer::start(&self.0, ask).await?;
        let deltas = stream::unfold(answer, |mut answer| async move {
            let delta = answer.next().await?;
            let response = delta.map(|delta| response(delta, &answer)).map_err(Status::from);
            Some((response, answer))
        });
        Ok(Response::new(Box::pin(deltas)))
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
    } = request;
    let prompt = match prompt {
        Some(WirePrompt::Text(text)) => Prompt::Text(text),
        Some(WirePrompt::Tokens(tokens)) => Prompt::Tokens(tokens.ids),
        Some(WirePrompt::Chat(chat)) => {
            let turn = |v1::ChatMessage { role, content }| match role.as_str() {
                "system" | "user" | "assistant" => Ok(json!({ "role": role, "content": content })),
                _ => Err(Failure::invalid("chat.messages.role", "role must be system, user or assistant")),
            };
            Prompt::Chat(Chat {
                messages: chat.messages.into_iter().map(turn).collect::<Result<_, _>>()?,
                add_generation_prompt: true,
                ..Chat::default()
            })
        }
        None => return Err(Failure::invalid("prompt", "prompt is missing: set text, tokens or chat")),
    };
    let sampling = sampling.unwrap_or_default();
    let sampling = Sampling::try_from(v1::Sampling {
        temperature: sampling.temperature.or(Some(1.0)),
        seed: Some(sampling.seed.map_or_else(random_seed, Ok)?),
        ..sampling
    })?;
    let max_tokens = max_tokens.map_or(MaxTokens::UpTo(u32::MAX), MaxTokens::Exactly);
    let options =
        Options { min_tokens, stop, stop_token_ids, ignore_eos, ..Options::new(sampling, max_tokens) };
    Ok(Ask { model, prompt, options, caller: Caller::default() })
}

fn response(delta: Delta, answer: &Answer) -> v1::GenerateResponse {
    let Delta { text, token, finish } = delta;
    let usage = finish.map(|_| v1::Usage {
        prompt_tokens: answer.prompt().len() as u32,
        completion_tokens: answer.generated() as u32,
    });
    v1::GenerateResponse {
        text,
        tokens: token.into_iter().map(v1::Token::from).collect(),
        finish_reason: finish.map_or(v1::FinishReason::Unspecified, v1::FinishReason::from).into(),
        usage,
    }
}

fn group_status(listed: &Listed) -> v1::GroupStatus {
    let Listed { id, group, standing, same_weights: _, in_flight } = listed;
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

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        match failure {
            Failure::Invalid { .. } => Self::invalid_argument(message),
            Failure::NoModel { .. } => Self::not_found(message),
            Failure::Overloaded(_) | Failure::Quota(_) => Self::resource_exhausted(message),
            Failure::NoGroup { .. } | Failure::Lost { .. } | Failure::Closing => Self::unavailable(message),
            Failure::TooSlow { .. } => Self::aborted(message),
            Failure::Engine(_) => Self::internal(message),
        }
    }
}
