//! The gRPC face.

use std::collections::BTreeMap;

use galerne_types::Fleet;
use galerne_wire::v1::{
    Chat, ChatMessage, FinishReason, FleetRequest, GenerateRequest, GenerateResponse, Grammar, ModelsRequest,
    Sampling, TokenIds, generate_request::Prompt, grammar,
};
use tokio_stream::StreamExt;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1alpha;
use tonic_types::StatusExt;

use crate::leader::{Act, Leader, gate, scored, token, tokens};
use crate::stage::{BARD, Stage, group, ids, patiently};

fn asked(prompt: Prompt) -> GenerateRequest {
    GenerateRequest { model: "bard".to_owned(), prompt: Some(prompt), ..Default::default() }
}

async fn generate(stage: &Stage, request: GenerateRequest) -> Vec<GenerateResponse> {
    let deltas = stage.client().await.generate(request).await.unwrap().into_inner();
    deltas.collect::<Result<_, _>>().await.unwrap()
}

#[tokio::test]
async fn generate_streams_text_tokens_and_usage() {
    let verse = ids("What's in a name?");
    let mut leader = Leader::start(tokens(&verse, FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let turn = ChatMessage { role: "user".to_owned(), content: "Speak".to_owned(), ..Default::default() };
    for (prompt, expected) in [
        (Prompt::Text("ROMEO".to_owned()), [vec![1], ids("ROMEO")].concat()),
        (Prompt::Tokens(TokenIds { ids: vec![5, 6] }), vec![5, 6]),
        (
            Prompt::Chat(Chat { messages: vec![turn], ..Default::default() }),
            ids("user:\nSpeak\n\nassistant:\n"),
        ),
    ] {
        let deltas = generate(&stage, asked(prompt)).await;
        assert_eq!(deltas.iter().map(|delta| delta.text.as_str()).collect::<String>(), "What's in a name?");
        let sent: Vec<_> = deltas.iter().flat_map(|delta| delta.tokens.clone()).collect();
        assert_eq!(sent, verse.iter().map(|&id| token(id)).collect::<Vec<_>>());
        let (last, before) = deltas.split_last().unwrap();
        assert_eq!(last.finish_reason(), FinishReason::Length);
        let usage = last.usage.unwrap();
        assert_eq!(
            (usage.prompt_tokens, usage.completion_tokens),
            (expected.len() as u32, verse.len() as u32)
        );
        assert!(before.iter().all(|d| d.usage.is_none() && d.finish_reason() == FinishReason::Unspecified));
        let request = patiently(leader.requests.recv()).await.unwrap();
        let sampling = request.sampling.unwrap();
        assert_eq!((request.prompt, request.stop_tokens), (expected, vec![2]));
        assert_eq!((sampling.temperature, sampling.top_p), (Some(1.0), Some(1.0)), "the public defaults");
        assert!(sampling.seed.is_some());
    }
    let stopped = GenerateRequest { stop: vec!["in a".to_owned()], ..asked(Prompt::Text("x".to_owned())) };
    let deltas = generate(&stage, stopped).await;
    assert_eq!(deltas.iter().map(|delta| delta.text.as_str()).collect::<String>(), "What's ");
    assert_eq!(deltas.last().unwrap().finish_reason(), FinishReason::Stop);
}

#[tokio::test]
async fn errors_have_the_statuses_that_the_proto_promises() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    let text = || asked(Prompt::Text("x".to_owned()));
    let hot = Some(Sampling { temperature: Some(-1.0), ..Default::default() });
    for (request, code, says) in [
        (GenerateRequest { prompt: None, ..text() }, Code::InvalidArgument, "prompt is missing"),
        (GenerateRequest { sampling: hot, ..text() }, Code::InvalidArgument, "temperature must be"),
        (
            GenerateRequest { model: "hamlet".to_owned(), ..text() },
            Code::NotFound,
            "\"hamlet\" does not exist",
        ),
    ] {
        let status = stage.client().await.generate(request).await.unwrap_err();
        assert_eq!(status.code(), code);
        assert!(status.message().contains(says), "{status}");
    }
    stage.fleet.send_replace(Fleet::default());
    let status = stage.client().await.generate(text()).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unavailable, "no group of model \"bard\" is ready: retry later")
    );
}

#[tokio::test]
async fn models_and_fleet_are_told() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    let models = stage.client().await.models(ModelsRequest {}).await.unwrap().into_inner().models;
    let [model] = &models[..] else { panic!("{models:?}") };
    assert_eq!((model.name.as_str(), model.context_tokens_max, model.vocab), ("bard", 2048, 1024));
    assert_eq!(model.digest, BARD.card.digest);

    let groups = stage.client().await.fleet(FleetRequest {}).await.unwrap().into_inner().groups;
    let [group] = &groups[..] else { panic!("{groups:?}") };
    assert_eq!((group.name.as_str(), group.state.as_str(), group.epoch), ("g0", "ready", 7));
    assert_eq!((group.model.as_str(), group.virtual_shards, group.world_size), ("bard", 4, 2));
    let ranks: Vec<_> = group.ranks.iter().map(|r| (r.id.as_str(), r.first_shard, r.shards, r.pid)).collect();
    assert_eq!(ranks, [("host/g0/0", 0, 2, 100), ("host/g0/1", 2, 2, 101)]);
    assert!(group.ranks.iter().all(|rank| rank.state == "ready" && rank.memory_bytes == 1 << 20));
}

#[tokio::test]
async fn health_follows_the_fleet() {
    let leader = Leader::start(Vec::new()).await;
    let mut stage = Stage::set(BTreeMap::new()).await;
    let mut health = HealthClient::new(stage.channel().await);
    for service in ["", "galerne.v1.Galerne"] {
        stage.fleet.send_replace(Fleet::default());
        let request = HealthCheckRequest { service: service.to_owned() };
        let mut watched = health.watch(request).await.unwrap().into_inner();
        let mut until = async |wanted: ServingStatus| {
            patiently(async { while watched.message().await.unwrap().unwrap().status() != wanted {} }).await;
        };
        until(ServingStatus::NotServing).await;
        stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g0", 7, &leader.address)]) });
        until(ServingStatus::Serving).await;
        if service.is_empty() {
            continue;
        }
        stage.shut_down();
        patiently(async { while let Ok(Some(_)) = watched.message().await {} }).await;
    }
    stage.ended().await.unwrap(); // a watch that stays open does not hold it up
}

#[tokio::test]
async fn reflection_names_the_services() {
    let stage = Stage::set(BTreeMap::new()).await;
    let mut reflection = ServerReflectionClient::new(stage.channel().await);
    let request = |message_request| ServerReflectionRequest {
        host: String::new(),
        message_request: Some(message_request),
    };
    let requests = [
        request(MessageRequest::ListServices(String::new())),
        request(MessageRequest::FileContainingSymbol("galerne.v1.Galerne".to_owned())),
    ];
    let answers = reflection.server_reflection_info(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let answers: Vec<_> = answers.map(|answer| answer.unwrap().message_response.unwrap()).collect().await;
    let [MessageResponse::ListServicesResponse(list), MessageResponse::FileDescriptorResponse(files)] =
        &answers[..]
    else {
        panic!("{answers:?}")
    };
    let mut names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    names.sort_unstable();
    let expected = [
        "galerne.v1.Galerne",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "vllm.Control",
        "vllm.Inference",
        "vllm.grpc.engine.VllmEngine",
    ];
    assert_eq!(names, expected);
    assert!(!files.file_descriptor_proto.is_empty());

    // The reflection of older clients, Python's among them.
    let mut older = v1alpha::server_reflection_client::ServerReflectionClient::new(stage.channel().await);
    let asked = v1alpha::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = v1alpha::ServerReflectionRequest { host: String::new(), message_request: Some(asked) };
    let mut answers = older.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
    let answer = patiently(answers.message()).await.unwrap().unwrap().message_response.unwrap();
    let v1alpha::server_reflection_response::MessageResponse::ListServicesResponse(list) = answer else {
        panic!("{answer:?}")
    };
    assert!(list.service.iter().any(|service| service.name == "galerne.v1.Galerne"), "{list:?}");
}

#[tokio::test]
async fn grammars_scores_and_stop_strings_travel_both_ways() {
    let verse = ids("What's in a name?");
    let mut script = vec![scored(1, &[6, 7])];
    script.extend(tokens(&verse, FinishReason::Length));
    let mut leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    let grammar = Grammar { grammar: Some(grammar::Grammar::Regex(".*".to_owned())) };
    let request = GenerateRequest {
        grammar: Some(grammar.clone()),
        prompt_logprobs: Some(2),
        stop: vec!["in a".to_owned()],
        include_stop: true,
        ..asked(Prompt::Tokens(TokenIds { ids: vec![5, 6, 7] }))
    };
    let deltas = generate(&stage, request).await;
    assert_eq!(deltas[0].prompt, [token(6), token(7)]);
    assert!(deltas[1..].iter().all(|delta| delta.prompt.is_empty()));
    assert_eq!(deltas.iter().map(|delta| delta.text.as_str()).collect::<String>(), "What's in a");
    let request = patiently(leader.requests.recv()).await.unwrap();
    assert_eq!((request.grammar, request.prompt_logprobs), (Some(grammar), Some(2)));

    leader.play(tokens(&[1, 40], FinishReason::Length));
    let shown = GenerateRequest {
        skip_special_tokens: Some(false),
        ..asked(Prompt::Tokens(TokenIds { ids: vec![5] }))
    };
    let deltas = generate(&stage, shown).await;
    assert!(deltas.iter().map(|delta| delta.text.as_str()).collect::<String>().starts_with("<s>"));
}

#[tokio::test]
async fn errors_say_the_same_to_programs() {
    let leader =
        Leader::start(vec![Act::Fail(Status::resource_exhausted("1024 requests are waiting").into())]).await;
    let stage = Stage::with(&[&leader]).await;
    let text = || asked(Prompt::Text("x".to_owned()));
    let hot = Some(Sampling { temperature: Some(-1.0), ..Default::default() });
    for (request, reason, field, retry) in [
        (GenerateRequest { sampling: hot, ..text() }, "INVALID_REQUEST", Some("temperature"), false),
        (GenerateRequest { model: "hamlet".to_owned(), ..text() }, "MODEL_NOT_FOUND", None, false),
        (text(), "OVERLOADED", None, true),
    ] {
        let status = stage.client().await.generate(request).await.unwrap_err();
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason, "galerne"));
        let violations = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
        let violations: Vec<_> =
            violations.iter().map(|v| (v.field.as_str(), v.description.as_str())).collect();
        assert_eq!(violations, field.map(|field| (field, status.message())).into_iter().collect::<Vec<_>>());
        assert_eq!(details.retry_info().is_some_and(|retry| retry.retry_delay.is_some()), retry);
    }
}

#[tokio::test]
async fn a_deadline_ends_the_request_at_its_leader() {
    for script in [vec![Act::Token(token(40)), Act::Wait(gate())], vec![Act::Wait(gate())]] {
        let begun = script.len() == 2;
        let mut leader = Leader::start(script).await;
        let stage = Stage::with(&[&leader]).await;
        let mut request = tonic::Request::new(asked(Prompt::Text("x".to_owned())));
        request.metadata_mut().insert("grpc-timeout", "500m".parse().unwrap());
        let mut client = stage.client().await;
        let status = match client.generate(request).await {
            Ok(stream) => {
                let mut stream = stream.into_inner(); // which no client watches over
                patiently(stream.message()).await.unwrap().unwrap();
                patiently(stream.message()).await.unwrap_err()
            }
            Err(status) => status,
        };
        patiently(leader.cancelled.recv()).await.unwrap();
        if begun {
            assert_eq!(status.code(), Code::DeadlineExceeded);
            assert!(status.message().contains("deadline of 500 ms has passed"), "{status}");
            assert_eq!(status.get_error_details().error_info().unwrap().reason, "DEADLINE_EXCEEDED");
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_request_at_its_leader() {
    let mut leader = Leader::start(vec![Act::Token(token(40)), Act::Wait(gate())]).await;
    let stage = Stage::with(&[&leader]).await;
    let mut client = stage.client().await;
    let mut stream = client.generate(asked(Prompt::Text("x".to_owned()))).await.unwrap().into_inner();
    patiently(stream.message()).await.unwrap().unwrap();
    drop(stream);
    patiently(leader.cancelled.recv()).await.unwrap();
}
