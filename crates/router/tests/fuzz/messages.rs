//! Messages to every method of the gRPC face, ours and the two dialects of vLLM's.

use std::time::Duration;

use galerne_wire::vllm::grpc::engine;
use galerne_wire::{v1, vllm};
use prost::Message;

use crate::engine::{Target, alone, fuzz, grpc, mutate};
use crate::stage::patiently;

/// Stands in every request and in no refusal.
const SECRET: &str = "zebrafink";

const METHODS: [&str; 14] = [
    "/galerne.v1.Galerne/Generate",
    "/galerne.v1.Galerne/Tokenize",
    "/galerne.v1.Galerne/Detokenize",
    "/galerne.v1.Galerne/Models",
    "/galerne.v1.Galerne/Fleet",
    "/vllm.Inference/Generate",
    "/vllm.Inference/GenerateStream",
    "/vllm.Control/GetModelInfo",
    "/vllm.Control/Abort",
    "/vllm.grpc.engine.VllmEngine/Generate",
    "/vllm.grpc.engine.VllmEngine/Embed",
    "/vllm.grpc.engine.VllmEngine/Abort",
    "/vllm.grpc.engine.VllmEngine/GetLoads",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
];

/// A message of each kind, after the number of its method.
fn seeds() -> Vec<Vec<u8>> {
    let with = |method: u8, message: Vec<u8>| [vec![method], message].concat();
    let name = || "bard".to_owned();
    let chat = v1::generate_request::Prompt::Chat(v1::Chat { ..Default::default() });
    let text = v1::generate_request::Prompt::Text(SECRET.to_owned());
    let ask = |prompt| v1::GenerateRequest {
        model: name(),
        prompt: Some(prompt),
        max_tokens: Some(4),
        ..Default::default()
    };
    let tokenize = Some(v1::tokenize_request::Prompt::Text(SECRET.to_owned()));
    let infer = Some(vllm::generate_request::Prompt::Text(SECRET.to_owned()));
    let infer = || {
        vllm::GenerateRequest { model: name(), prompt: infer.clone(), ..Default::default() }.encode_to_vec()
    };
    let engine = engine::generate_request::Input::Tokenized(engine::TokenizedInput {
        original_text: SECRET.to_owned(),
        input_ids: vec![1, 2, 3],
    });
    let engine = engine::GenerateRequest {
        request_id: name(),
        input: Some(engine),
        stream: true,
        ..Default::default()
    };
    vec![
        with(0, ask(text).encode_to_vec()),
        with(0, ask(chat).encode_to_vec()),
        with(
            1,
            v1::TokenizeRequest { model: name(), prompt: tokenize, pieces: true, ..Default::default() }
                .encode_to_vec(),
        ),
        with(
            2,
            v1::DetokenizeRequest { model: name(), ids: vec![1, 2, 3], ..Default::default() }.encode_to_vec(),
        ),
        with(3, Vec::new()),
        with(4, Vec::new()),
        with(5, infer()),
        with(6, infer()),
        with(7, Vec::new()),
        with(8, b"\x0a\x01x".to_vec()),
        with(9, engine.encode_to_vec()),
        with(10, b"\x0a\x01r".to_vec()),
        with(11, b"\x0a\x01r".to_vec()),
        with(12, Vec::new()),
        with(13, b"\x3a\x00".to_vec()),
    ]
}

#[test]
fn messages() {
    let alone = alone();
    let (runtime, _leader, stage) = crate::stage();
    let channel = runtime.block_on(stage.channel());
    let target = Target {
        name: "messages",
        seeds: seeds(),
        words: &[
            "bard",
            "\n\u{1}",
            "\u{12}\u{2}",
            "\u{8}\u{1}",
            "\u{1a}\u{4}",
            "\"\u{3}",
            "\u{2}\u{1}",
            "zebrafink",
        ],
        change: |seed, input, other, words| {
            let Some((method, message)) = input.split_first() else { return vec![seed.next() as u8] };
            let method = if seed.one_in(12) { seed.next() as u8 } else { *method };
            let message = mutate::bytes(seed, message, other.get(1..).unwrap_or_default(), words);
            [&[method][..], &message].concat()
        },
        runs: 2_000,
        memory_bytes: (8 << 20, 600),
        cpu: (Duration::from_secs(4), Duration::from_micros(50)),
        secret: Some(SECRET),
    };
    fuzz(&alone, &target, |input| {
        let Some((method, message)) = input.split_first() else { return Ok(()) };
        let method = METHODS[usize::from(*method) % METHODS.len()];
        runtime.block_on(patiently(grpc::call(&channel, method, message)))
    });
}
