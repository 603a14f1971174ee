//! `vllm.Inference` and `vllm.Control`, asked by a client that is generated from the public description: the crate
//! `vllm-proto`.

use galerne_wire::v1::{self, FinishReason};
use tokio_stream::StreamExt;
use tonic::Code;
use vllm_proto::candidate_tokens::Select;
use vllm_proto::control_client::ControlClient;
use vllm_proto::decoding_parameters::StructuredOutput;
use vllm_proto::finish_info::{FinishReason as Ended, StopReason};
use vllm_proto::generate_request::Prompt;
use vllm_proto::inference_client::InferenceClient;
use vllm_proto::{
    AbortRequest, CandidateTokens, DecodingParameters, GenerateRequest, GenerateResponse,
    GetModelInfoRequest, GetServerInfoRequest, RandomSampling, ResponseOptions, StoppingCriteria, TokenIds,
};

use crate::leader::{Act, Leader, gate, scored, token, tokens};
use crate::stage::{Stage, ids, patiently};

fn asked() -> GenerateRequest {
    let prompt = Prompt::TokenIds(TokenIds { ids: vec![5, 6, 7] });
    GenerateRequest { request_id: "r".to_owned(), prompt: Some(prompt), ..Default::default() }
}

async fn whole(stage: &Stage, request: GenerateRequest) -> GenerateResponse {
    InferenceClient::new(stage.channel().await).generate(request).await.unwrap().into_inner()
}

async fn streamed(stage: &Stage, request: GenerateRequest) -> Vec<GenerateResponse> {
    let stream = InferenceClient::new(stage.channel().await).generate_stream(request).await.unwrap();
    stream.into_inner().collect::<Result<_, _>>().await.unwrap()
}

fn top(count: u32) -> Option<CandidateTokens> {
    Some(CandidateTokens { select: Some(Select::TopN(count)) })
}

#[tokio::test]
async fn a_stream_begins_with_the_prompt_and_ends_with_the_last_token() {
    let verse = ids("What's in a name?");
    let leader = Leader::start(tokens(&verse, FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let response = ResponseOptions { prompt_token_ids: true, output_token_ids: true, ..Default::default() };
    let stopping = StoppingCriteria { max_new_tokens: verse.len() as u32, ..Default::default() };
    let request = GenerateRequest { response: Some(response), stopping: Some(stopping), ..asked() };
    let responses = streamed(&stage, request.clone()).await;
    let (first, rest) = responses.split_first().unwrap();
    let info = first.prompt_info.as_ref().unwrap();
    assert_eq!((info.num_prompt_tokens, &info.token_ids, &first.outputs), (3, &vec![5, 6, 7], &None));
    assert!(rest.iter().all(|response| response.prompt_info.is_none()));
    let outputs: Vec<_> = rest.iter().map(|response| response.outputs.as_ref().unwrap()).collect();
    assert_eq!(outputs.len(), verse.len(), "the end comes with the last token");
    assert_eq!(outputs.iter().map(|outputs| outputs.text.as_str()).collect::<String>(), "What's in a name?");
    assert_eq!(outputs.iter().flat_map(|outputs| outputs.token_ids.clone()).collect::<Vec<_>>(), verse);
    let finish = outputs.last().unwrap().finish_info.as_ref().unwrap();
    assert_eq!((finish.finish_reason(), finish.num_output_tokens), (Ended::Length, verse.len() as u32));
    assert!(outputs[..outputs.len() - 1].iter().all(|outputs| outputs.finish_info.is_none()));

    let all = whole(&stage, request).await;
    let outputs = all.outputs.unwrap();
    assert_eq!((all.prompt_info.unwrap().num_prompt_tokens, outputs.text.as_str()), (3, "What's in a name?"));
    assert_eq!((outputs.num_tokens, outputs.token_ids), (verse.len() as u32, verse));
    let shown = whole(&stage, GenerateRequest { response: None, ..asked() }).await.outputs.unwrap();
    assert!(shown.token_ids.is_empty() && shown.logprobs.is_empty() && !shown.text.is_empty());
}

#[tokio::test]
async fn requests_arrive_as_they_were_sent_and_unset_is_greedy() {
    let mut leader = Leader::start(tokens(&[40], FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let sampling = RandomSampling {
        top_k: Some(4),
        top_p: Some(0.25),
        min_p: Some(0.125),
        seed: Some(-1),
        ..Default::default()
    };
    let decoding = DecodingParameters {
        presence_penalty: 1.5,
        frequency_penalty: 0.5,
        repetition_penalty: 1.25,
        logit_bias: [(9, 2.0), (3, -2.0)].into(),
        structured_output: Some(StructuredOutput::Regex("a+".to_owned())),
        ..Default::default()
    };
    let stopping = StoppingCriteria {
        max_new_tokens: 9,
        min_new_tokens: 2,
        stop_token_ids: vec![77],
        ignore_eos: true,
        ..Default::default()
    };
    let request = GenerateRequest {
        model: "bard".to_owned(),
        temperature: Some(0.5),
        sampling: Some(sampling),
        decoding: Some(decoding),
        stopping: Some(stopping),
        truncate_prompt_tokens: 2,
        ..asked()
    };
    whole(&stage, request).await;
    let request = patiently(leader.requests.recv()).await.unwrap();
    let sampling = request.sampling.unwrap();
    assert_eq!((request.prompt, request.max_tokens, request.min_tokens), (vec![6, 7], 9, 2));
    assert_eq!(request.stop_tokens, [77]);
    assert!(
        matches!(request.grammar.unwrap().grammar, Some(v1::grammar::Grammar::Regex(regex)) if regex == "a+")
    );
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (Some(0.5), Some(0.25), 4));
    assert_eq!((sampling.min_p, sampling.frequency_penalty, sampling.presence_penalty), (0.125, 0.5, 1.5));
    assert_eq!((sampling.repetition_penalty, sampling.seed), (Some(1.25), Some(u64::MAX)));
    assert_eq!(
        sampling.logit_bias,
        [v1::LogitBias { id: 3, bias: -2.0 }, v1::LogitBias { id: 9, bias: 2.0 }]
    );

    let text = Some(Prompt::Text("ROMEO".to_owned()));
    whole(&stage, GenerateRequest { prompt: text, ..Default::default() }).await;
    let request = patiently(leader.requests.recv()).await.unwrap();
    let sampling = request.sampling.unwrap();
    assert_eq!(request.prompt, [vec![1], ids("ROMEO")].concat());
    assert_eq!((sampling.temperature, sampling.top_p), (Some(0.0), Some(1.0)));
    assert_eq!(request.max_tokens as usize, 2048 - request.prompt.len());
}

#[tokio::test]
async fn log_probabilities_ranks_and_candidates() {
    let mut script = vec![scored(1, &[6, 7])];
    script.extend(tokens(&[40, 41], FinishReason::Length));
    let leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    let response = ResponseOptions {
        prompt_logprobs: true,
        output_logprobs: true,
        output_candidates: top(2),
        ..Default::default()
    };
    let all = whole(&stage, GenerateRequest { response: Some(response), ..asked() }).await;
    let (prompt, outputs) = (all.prompt_info.unwrap(), all.outputs.unwrap());
    assert_eq!((prompt.logprobs, prompt.ranks), (vec![0.0, -0.06, -0.07], vec![0, 6, 7]));
    assert!(prompt.candidate_tokens.iter().all(|info| info.tokens.is_empty()));
    assert_eq!((outputs.logprobs, outputs.ranks), (vec![-0.4, -0.41], vec![40, 41]));
    let second: Vec<_> = outputs
        .candidate_tokens
        .iter()
        .map(|info| (info.tokens.len(), info.tokens[0].id, info.tokens[0].rank))
        .collect();
    assert_eq!(second, [(1, 301, 2), (1, 301, 2)]);
}

#[tokio::test]
async fn what_stopped_an_answer_is_told() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    let verse = ids("What's in a name?");
    let strings = |include| StoppingCriteria {
        stop_strings: vec!["xx".to_owned(), "in a".to_owned()],
        include_stop_strings: include,
        ..Default::default()
    };
    let stop = || StopReason::StopString("in a".to_owned());
    let of_token = StoppingCriteria { stop_token_ids: vec![77], ..Default::default() };
    for (script, stopping, reason, text) in [
        (tokens(&[2], FinishReason::Stop), StoppingCriteria::default(), StopReason::EosTokenId(2), ""),
        (tokens(&[77], FinishReason::Stop), of_token, StopReason::StopTokenId(77), ""),
        (tokens(&verse, FinishReason::Length), strings(false), stop(), "What's "),
        (tokens(&verse, FinishReason::Length), strings(true), stop(), "What's in a"),
    ] {
        leader.play(script);
        let request = GenerateRequest { stopping: Some(stopping), ..asked() };
        for outputs in
            [whole(&stage, request.clone()).await.outputs.unwrap(), joined(&streamed(&stage, request).await)]
        {
            let finish = outputs.finish_info.unwrap();
            assert_eq!((finish.finish_reason(), outputs.text.as_str()), (Ended::Stop, text));
            assert_eq!(finish.stop_reason, Some(reason.clone()));
        }
    }
}

/// A stream's outputs as if they had come whole.
fn joined(responses: &[GenerateResponse]) -> vllm_proto::SequenceOutput {
    let mut outputs = responses.iter().filter_map(|response| response.outputs.clone());
    let mut all = outputs.next().unwrap();
    for more in outputs {
        all.text.push_str(&more.text);
        all.finish_info = more.finish_info;
    }
    all
}

#[tokio::test]
async fn several_answers_share_a_stream() {
    let leader = Leader::start(tokens(&[40, 41], FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let sampling = RandomSampling { num_sequences: 2, ..Default::default() };
    let stopping = StoppingCriteria { max_new_tokens: 2, ..Default::default() };
    let request = GenerateRequest { sampling: Some(sampling), stopping: Some(stopping), ..asked() };
    let responses = streamed(&stage, request.clone()).await;
    for index in 0..2 {
        let outputs = responses.iter().filter_map(|response| response.outputs.as_ref());
        let tokens: Vec<_> = outputs.filter(|outputs| outputs.index == index).map(|o| o.num_tokens).collect();
        assert_eq!(tokens, [1, 1], "answer {index}");
    }
    let status = InferenceClient::new(stage.channel().await).generate(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn an_abort_ends_the_request_at_its_leader() {
    let mut leader = Leader::start(vec![Act::Token(token(40)), Act::Wait(gate())]).await;
    let stage = Stage::with(&[&leader]).await;
    let mut stream =
        InferenceClient::new(stage.channel().await).generate_stream(asked()).await.unwrap().into_inner();
    for _ in 0..2 {
        patiently(stream.message()).await.unwrap().unwrap(); // the prompt, and one token
    }
    let abort = AbortRequest { request_ids: vec!["unknown".to_owned(), "r".to_owned()] };
    ControlClient::new(stage.channel().await).abort(abort).await.unwrap();
    let last = patiently(stream.message()).await.unwrap().unwrap().outputs.unwrap();
    let finish = last.finish_info.unwrap();
    assert_eq!((finish.finish_reason(), finish.num_output_tokens, last.num_tokens), (Ended::Aborted, 1, 0));
    assert!(patiently(stream.message()).await.unwrap().is_none());
    patiently(leader.cancelled.recv()).await.unwrap();
}

#[tokio::test]
async fn the_server_tells_of_itself_and_refuses_what_it_does_not_do() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    let mut control = ControlClient::new(stage.channel().await);
    let server = control.get_server_info(GetServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((server.max_model_len, server.kv_block_size, server.total_kv_blocks), (2048, 32, 64));
    assert_eq!((server.max_running_requests, server.parallelism.unwrap().tensor_parallel_size), (8, 2));
    assert_eq!(server.proto_version, vllm_proto::VERSION, "the description that ours follows");
    let model = control.get_model_info(GetModelInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((model.served_model_name.as_str(), model.supports_token_ids_input), ("bard", true));
    let shutdown = control.shutdown(vllm_proto::ShutdownRequest {}).await.unwrap_err();
    assert_eq!(shutdown.code(), Code::Unimplemented);

    let mut inference = InferenceClient::new(stage.channel().await);
    let all = Some(CandidateTokens { select: Some(Select::All(true)) });
    let shown = ResponseOptions { output_logprobs: true, output_candidates: all, ..Default::default() };
    let only = DecodingParameters { allowed_token_ids: vec![4], ..Default::default() };
    for (request, code, says) in [
        (GenerateRequest { prompt: None, ..asked() }, Code::InvalidArgument, "prompt is missing"),
        (GenerateRequest { model: "hamlet".to_owned(), ..asked() }, Code::NotFound, "does not exist"),
        (GenerateRequest { lora_name: "x".to_owned(), ..asked() }, Code::InvalidArgument, "lora_name is not"),
        (GenerateRequest { response: Some(shown), ..asked() }, Code::InvalidArgument, "must be top_n"),
        (GenerateRequest { decoding: Some(only), ..asked() }, Code::InvalidArgument, "allowed_token_ids"),
    ] {
        let status = inference.generate(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(says), "{status}");
    }
}
