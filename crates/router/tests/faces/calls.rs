//! Calls as no gRPC client makes them: their bytes and their pace are ours.

use std::pin::Pin;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use futures_util::{StreamExt, stream};
use galerne_wire::v1::generate_request::Prompt;
use galerne_wire::v1::{self, grammar};
use galerne_wire::vllm;
use galerne_wire::vllm::grpc::engine::sampling_params::Constraint;
use http_body::Body as _;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::TcpStream;
use tonic::{Code, Status};

use crate::malformed::{Seed, value};
use crate::stage::{Stage, patiently};

/// A connection on which calls are made.
pub(crate) type Sender = SendRequest<Body>;

/// How a call's body comes.
pub(crate) enum Manner {
    /// At once, and then its end.
    Whole,
    /// The end never comes.
    Open,
}

/// A call as it is sent.
pub(crate) struct Call {
    pub(crate) path: &'static str,
    pub(crate) headers: Vec<(&'static str, &'static str)>,
    pub(crate) body: Vec<u8>,
    pub(crate) manner: Manner,
}

pub(crate) async fn connect(stage: &Stage) -> Sender {
    let stream = TcpStream::connect(&stage.grpc).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    sender
}

/// Makes a call and tells how it ended: by HTTP's status, and by gRPC's if that came.
pub(crate) async fn make(
    sender: &mut Sender,
    call: Call,
) -> Result<(StatusCode, Option<Status>), hyper::Error> {
    let Call { path, headers, body, manner } = call;
    let first = stream::iter([Ok::<_, std::convert::Infallible>(Bytes::from(body))]);
    let body = match manner {
        Manner::Whole => Body::from_stream(first),
        Manner::Open => Body::from_stream(first.chain(stream::pending())),
    };
    let mut request = Request::post(format!("http://x{path}")).header("te", "trailers");
    if !headers.iter().any(|(name, _)| *name == "content-type") {
        request = request.header("content-type", "application/grpc");
    }
    for (name, value) in headers {
        request = request.header(name, value);
    }
    sender.ready().await?;
    let answer = patiently(sender.send_request(request.body(body).unwrap())).await?;
    let (head, mut body) = answer.into_parts();
    let mut trailers = HeaderMap::new();
    while let Some(frame) = patiently(std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))).await {
        if let Ok(last) = frame?.into_trailers() {
            trailers = last;
        }
    }
    let status = Status::from_header_map(&head.headers).or_else(|| Status::from_header_map(&trailers));
    Ok((head.status, status))
}

/// A message in gRPC's frame.
pub(crate) fn framed(message: &[u8]) -> Vec<u8> {
    [&[0][..], &(message.len() as u32).to_be_bytes(), message].concat()
}

const PATHS: [&str; 15] = [
    "/galerne.v1.Galerne/Generate",
    "/galerne.v1.Galerne/Tokenize",
    "/galerne.v1.Galerne/Detokenize",
    "/galerne.v1.Galerne/Models",
    "/galerne.v1.Galerne/Fleet",
    "/vllm.Inference/Generate",
    "/vllm.Inference/GenerateStream",
    "/vllm.Control/GetServerInfo",
    "/vllm.Control/Abort",
    "/vllm.grpc.engine.VllmEngine/Generate",
    "/vllm.grpc.engine.VllmEngine/Embed",
    "/vllm.grpc.engine.VllmEngine/Abort",
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/no.Service/Nothing",
];

/// A value as text.
fn text(seed: &mut Seed) -> String {
    String::from_utf8_lossy(&value(seed)).into_owned()
}

/// A number, small or any.
fn number(seed: &mut Seed) -> u32 {
    let any = seed.next() as u32;
    seed.of(&[0, 1, 3, any, u32::MAX])
}

/// A number of any kind.
fn real(seed: &mut Seed) -> f32 {
    let any = f32::from_bits(seed.next() as u32);
    seed.of(&[0.0, 1.0, -1.0, any, f32::NAN, f32::INFINITY])
}

/// A request that is one, with values that are wrong, most of the time.
fn ours(seed: &mut Seed) -> Vec<u8> {
    let turn = v1::ChatMessage { role: "user".to_owned(), content: text(seed), ..Default::default() };
    let tools = vec![text(seed); seed.below(2)];
    let prompt = match seed.below(3) {
        0 => Prompt::Text(text(seed)),
        1 => Prompt::Tokens(v1::TokenIds { ids: vec![number(seed); seed.below(5_000)] }),
        _ => Prompt::Chat(v1::Chat { messages: vec![turn], tools, ..Default::default() }),
    };
    let grammar = match seed.below(6) {
        0 => Some(grammar::Grammar::JsonSchema(text(seed))),
        1 => Some(grammar::Grammar::Regex(text(seed))),
        _ => None,
    };
    let sampling =
        v1::Sampling { temperature: Some(real(seed)), top_p: Some(real(seed)), ..Default::default() };
    v1::GenerateRequest {
        prompt: Some(prompt),
        sampling: Some(sampling).filter(|_| seed.below(2) == 0),
        max_tokens: Some(number(seed)).filter(|_| seed.below(2) == 0),
        stop: vec![text(seed); seed.below(3)],
        stop_token_ids: vec![number(seed); seed.below(100)],
        grammar: grammar.map(|grammar| v1::Grammar { grammar: Some(grammar) }),
        prompt_logprobs: Some(number(seed)).filter(|_| seed.below(4) == 0),
        ..Default::default()
    }
    .encode_to_vec()
}

/// The same for `vllm.Inference`.
fn inference(seed: &mut Seed) -> Vec<u8> {
    let sampling =
        vllm::RandomSampling { num_sequences: number(seed), top_p: Some(real(seed)), ..Default::default() };
    let decoding = vllm::DecodingParameters { presence_penalty: real(seed), ..Default::default() };
    let stopping = vllm::StoppingCriteria {
        max_new_tokens: number(seed),
        min_new_tokens: number(seed),
        stop_strings: vec![text(seed)],
        ..Default::default()
    };
    vllm::GenerateRequest {
        prompt: Some(vllm::generate_request::Prompt::Text(text(seed))),
        temperature: Some(real(seed)),
        sampling: Some(sampling),
        decoding: Some(decoding).filter(|_| seed.below(2) == 0),
        stopping: Some(stopping).filter(|_| seed.below(2) == 0),
        truncate_prompt_tokens: number(seed),
        ..Default::default()
    }
    .encode_to_vec()
}

/// The same for `vllm.grpc.engine.VllmEngine`.
fn engine(seed: &mut Seed) -> Vec<u8> {
    let params = vllm::grpc::engine::SamplingParams {
        temperature: Some(real(seed)),
        max_tokens: Some(number(seed)),
        n: number(seed),
        logprobs: Some(number(seed).cast_signed()).filter(|_| seed.below(2) == 0),
        constraint: Some(Constraint::JsonSchema(text(seed))).filter(|_| seed.below(2) == 0),
        truncate_prompt_tokens: Some(number(seed).cast_signed()).filter(|_| seed.below(2) == 0),
        ..Default::default()
    };
    vllm::grpc::engine::GenerateRequest {
        input: Some(vllm::grpc::engine::generate_request::Input::Text(text(seed))),
        sampling_params: Some(params),
        stream: seed.below(2) == 0,
        ..Default::default()
    }
    .encode_to_vec()
}

/// Fields of any number and type, with any content.
fn fields(seed: &mut Seed) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..1 + seed.below(6) {
        prost::encoding::encode_varint((seed.below(16) << 3 | seed.below(8)) as u64, &mut out);
        match seed.below(4) {
            0 => prost::encoding::encode_varint(seed.next(), &mut out),
            1 => out.extend([0xff; 10]), // a length that nothing has
            2 => {
                let size = seed.below(60);
                prost::encoding::encode_varint(size as u64, &mut out);
                out.extend(seed.bytes(size)); // where text is due, it is not UTF-8
            }
            _ => out.extend(seed.next().to_le_bytes()),
        }
    }
    out
}

/// Messages within messages, each the third field of the one around it.
fn nested(levels: usize) -> Vec<u8> {
    (0..levels).fold(Vec::new(), |inner, _| {
        let mut out = vec![0x1a];
        prost::encoding::encode_varint(inner.len() as u64, &mut out);
        [out, inner].concat()
    })
}

/// A call that is wrong somewhere, most of the time.
pub(crate) fn broken(seed: &mut Seed) -> Call {
    let size = seed.below(200);
    let (path, mut message) = match seed.below(10) {
        0 => (seed.of(&PATHS), seed.bytes(size)),
        1 | 2 => (seed.of(&PATHS), fields(seed)),
        3 => (seed.of(&PATHS), nested(1 + size)),
        4 => (seed.of(&PATHS), Vec::new()),
        5..=7 => ("/galerne.v1.Galerne/Generate", ours(seed)),
        8 => (seed.of(&["/vllm.Inference/Generate", "/vllm.Inference/GenerateStream"]), inference(seed)),
        _ => ("/vllm.grpc.engine.VllmEngine/Generate", engine(seed)),
    };
    if seed.below(5) == 0 && !message.is_empty() {
        let at = seed.below(message.len());
        message[at] ^= seed.next() as u8;
    }
    let mut body = framed(&message);
    let (mut headers, mut manner) = (Vec::new(), Manner::Whole);
    match seed.below(24) {
        0 => body[0] = 1, // compressed, nobody says how
        1 => body[0] = seed.next() as u8,
        2 => body[1..5].copy_from_slice(&u32::MAX.to_be_bytes()),
        3 => body.truncate(seed.below(body.len())), // cut
        4 => body.extend_from_within(..),           // two messages where one is due
        5 => manner = Manner::Open,
        6 => (body, manner) = (body[..body.len() / 2].to_vec(), Manner::Open), // slow
        7 => headers.push(("grpc-encoding", "gzip")),
        8 => headers.push(("content-type", "text/plain")),
        9 => headers.push(("grpc-timeout", "99999999999S")),
        10 => headers.push(("traceparent", "00-zz-zz-zz")),
        11 => body.clear(),
        _ => {}
    }
    Call { path, headers, body, manner }
}

/// Makes it; it must not be called the server's fault.
pub(crate) async fn make_broken(sender: &mut Sender, number: u64) {
    let call = broken(&mut Seed::new(number));
    let path = call.path;
    let (http, status) =
        make(sender, call).await.unwrap_or_else(|error| panic!("seed {number}: {path}: {error:?}"));
    assert!(!http.is_server_error(), "seed {number}: {path}: {http}");
    if let Some(status) = status {
        let fault =
            [Code::Unknown, Code::Internal, Code::Unavailable, Code::DataLoss, Code::DeadlineExceeded];
        assert!(!fault.contains(&status.code()), "seed {number}: {path}: {status}");
    }
}
