//! Clients that stream answers through a router, one after the other, and know what the tokens must be.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use galerne_wire::v1::galerne_client::GalerneClient;
use galerne_wire::v1::generate_request::Prompt;
use galerne_wire::v1::{GenerateRequest, Sampling, TokenIds};
use tokio::task::JoinSet;

/// Tokens of an answer.
const TOKENS: u32 = 48;

/// Clients at work.
pub(crate) struct Streams {
    router: String,
    clients: JoinSet<()>,
    whole: Arc<AtomicUsize>,
}

impl Streams {
    /// Starts `count` of them. One that gets an error, or another token than it should, panics.
    pub(crate) async fn start(router: &str, count: u32) -> Self {
        let mut streams = Self { router: router.to_owned(), clients: JoinSet::new(), whole: Arc::default() };
        for number in 0..count {
            let expected = streams.answer(number).await;
            let (router, whole) = (router.to_owned(), streams.whole.clone());
            streams.clients.spawn(async move {
                loop {
                    assert_eq!(answer(&router, number).await, expected, "the tokens of client {number}");
                    whole.fetch_add(1, SeqCst);
                }
            });
        }
        streams
    }

    /// Starts one that asks once in a while.
    pub(crate) async fn calm(router: &str, pause: Duration) -> Self {
        let mut streams = Self { router: router.to_owned(), clients: JoinSet::new(), whole: Arc::default() };
        let expected = streams.answer(0).await;
        let (router, whole) = (router.to_owned(), streams.whole.clone());
        streams.clients.spawn(async move {
            let mut due = tokio::time::interval(pause);
            loop {
                due.tick().await;
                assert_eq!(answer(&router, 0).await, expected, "the tokens of a calm client");
                whole.fetch_add(1, SeqCst);
            }
        });
        streams
    }

    async fn answer(&self, number: u32) -> Vec<u32> {
        answer(&self.router, number).await
    }

    /// Waits until `count` more answers were whole.
    pub(crate) async fn more(&mut self, count: usize) {
        let until = self.whole.load(SeqCst) + count;
        while self.whole.load(SeqCst) < until {
            let looked = tokio::time::timeout(Duration::from_millis(20), self.clients.join_next()).await;
            assert!(looked.is_err(), "a stream was lost: {looked:?}");
        }
    }
}

/// One answer, whole.
pub(crate) async fn answer(router: &str, number: u32) -> Vec<u32> {
    let mut client = GalerneClient::connect(format!("http://{router}")).await.expect("a router that answers");
    let request = GenerateRequest {
        prompt: Some(Prompt::Tokens(TokenIds { ids: (1..9).map(|id| id * (number + 3)).collect() })),
        sampling: Some(Sampling { temperature: Some(0.0), ..Sampling::default() }),
        max_tokens: Some(TOKENS),
        ignore_eos: true,
        ..GenerateRequest::default()
    };
    let mut stream = client.generate(request).await.expect("a stream that begins").into_inner();
    let mut tokens = Vec::new();
    while let Some(delta) = stream.message().await.expect("a stream that is not lost") {
        tokens.extend(delta.tokens.into_iter().map(|token| token.id));
    }
    tokens
}
