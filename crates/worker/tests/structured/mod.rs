//! Answers under a grammar, through whole groups: every one is what its schema says, by the word of another's
//! validator, and the same however many ranks and neighbours it has.

mod schemas;

use crate::common::{Asked, Cluster, RankProcess, client, refused, run, start};
use futures_util::StreamExt as _;
use galerne_checkpoint::Checkpoint;
use galerne_text::Tokenizer;
use galerne_types::{Epoch, Grammar, Health, Sampling};
use galerne_wire::v1;
use galerne_wire::v1::engine_client::EngineClient;
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Code, Request};

/// Schemas and seeds that are tried.
const CASES: u64 = 200;

/// Enough for nearly every value of the schemas that are tried.
const TOKENS_MAX: u32 = 600;

/// bard-1m's end token.
const END: u32 = 2;

struct Group {
    cluster: Cluster,
    health: Health,
    engine: EngineClient<Channel>,
    _ranks: Vec<RankProcess>,
}

impl Group {
    async fn start(world_size: u16) -> Self {
        let cluster = Cluster::start().await;
        let ranks: Vec<_> =
            (0..world_size).map(|rank| start(cluster.options("h", rank, world_size.into()))).collect();
        let health = cluster.serving(Epoch(0)).await;
        let engine = client(&health).await;
        Self { cluster, health, engine, _ranks: ranks }
    }

    fn ask(&self, grammar: &Grammar, seed: u64) -> Asked {
        let prompt: Vec<u32> = (0..4 + seed % 13).map(|i| 3 + ((seed * 31 + i * 17) % 1000) as u32).collect();
        let mut request = self.cluster.request(self.health.epoch, &prompt, TOKENS_MAX);
        let sampling = Sampling { temperature: 1.0, seed, ..Sampling::greedy() };
        let asked = &mut request.run;
        asked.sampling = Some(v1::Sampling::from(&sampling));
        asked.stop_tokens = vec![END];
        asked.grammar = Some(v1::Grammar::from(grammar));
        request
    }

    async fn answer(&self, grammar: &Grammar, seed: u64) -> Vec<u32> {
        let (tokens, error) = run(&self.engine, self.ask(grammar, seed)).await.unwrap().read().await;
        assert!(error.is_none(), "{error:?}");
        tokens
    }

    /// The answers to all schemas, `batch` at a time.
    async fn answers(&self, cases: u64, batch: usize) -> Vec<Vec<u32>> {
        let answers = (0..cases).map(|seed| async move {
            let schema = Grammar::JsonSchema(schemas::random(seed).to_string());
            self.answer(&schema, seed).await
        });
        futures_util::stream::iter(answers).buffered(batch).collect().await
    }
}

fn tokenizer() -> Tokenizer {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/bard-1m");
    Tokenizer::load(Checkpoint::open(&path).unwrap().text()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn random_schemas_are_met_whatever_the_ranks_and_the_batch() {
    let alone = Group::start(1).await;
    let answers = alone.answers(CASES, 8).await;
    let tokenizer = tokenizer();
    let mut cut = 0;
    for (seed, answer) in answers.iter().enumerate() {
        let schema = schemas::random(seed as u64);
        // A name that the schema leaves open may go on for as long as it is let.
        let Some((&END, tokens)) = answer.split_last() else {
            assert_eq!(answer.len(), TOKENS_MAX as usize, "it ends with the end token, or where it is cut");
            cut += 1;
            continue;
        };
        let text = tokenizer.decode(tokens, false);
        let value: Value =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{seed}: {error}: {text}"));
        let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
        let errors: Vec<String> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{seed}: {text} under {schema}: {errors:?}");
    }
    assert!(cut * 10 <= CASES, "{cut} answers were cut, too many to say much");
    assert_eq!(alone.answers(CASES / 4, 1).await, answers[..CASES as usize / 4], "one at a time");
    drop(alone);
    for (world_size, batch) in [(2, 3), (4, 8)] {
        let group = Group::start(world_size).await;
        assert!(group.answers(CASES, batch).await == answers, "{world_size} ranks, {batch} at a time");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grammar_is_compiled_once_for_all_its_requests() {
    let group = Group::start(1).await;
    let grammar = Grammar::Regex("[a-z]{8}".into());
    let mut asked = Request::new(v1::LoadRequest { epoch: group.health.epoch.0 });
    let secret = group.ask(&grammar, 5).secret.unwrap();
    galerne_wire::show_secret(&mut asked, &secret).unwrap();
    let mut reports = group.engine.clone().load(asked).await.unwrap().into_inner();
    reports.message().await.unwrap().unwrap();
    let expected = group.answer(&grammar, 5).await;
    let again = [group.answer(&grammar, 5), group.answer(&grammar, 5)];
    assert_eq!(futures_util::future::join_all(again).await, [expected.clone(), expected]);
    group.answer(&Grammar::Regex("[0-9]{8}".into()), 5).await;
    loop {
        let report = reports.message().await.unwrap().unwrap();
        if report.grammar_hits + report.grammar_misses == 4 {
            break assert_eq!((report.grammar_hits, report.grammar_misses), (2, 2));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grammar_that_is_refused_leaves_the_others_alone() {
    let group = Group::start(1).await;
    let good = Grammar::Regex("[a-z]{8}".into());
    let expected = group.answer(&good, 5).await;
    let tokenizer = tokenizer();
    let text = tokenizer.decode(&expected[..expected.len() - 1], false);
    assert!(text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_lowercase()), "{text}");
    let long = Grammar::JsonSchema(
        json!({"type": "array", "items": {"type": "boolean"}, "minItems": 60}).to_string(),
    );
    let mut beside = run(&group.engine, group.ask(&long, 1)).await.unwrap();
    beside.next().await.unwrap().expect("a first token");
    let wrong = [
        (
            Grammar::JsonSchema(r#"{"properties":{"age":{"minimum":2,"maximum":1}}}"#.into()),
            "$.properties.age: ",
        ),
        (Grammar::Regex("(".into()), "regex"),
        (Grammar::Choice(vec![]), "nothing to choose from"),
        (Grammar::Lark("start: %json {\"not\": {}}".into()), "$.not: "),
    ];
    for (grammar, says) in wrong {
        let status = refused(&group.engine, group.ask(&grammar, 0)).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(says), "{status}");
    }
    let mut endless = group.ask(&good, 0);
    endless.run.stop_tokens.clear();
    let status = refused(&group.engine, endless).await;
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().contains("end tokens"), "{status}");
    assert_eq!(group.answer(&good, 5).await, expected);
    while beside.next().await.expect("the one beside it goes on to its end").is_some() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_goes_on_where_the_answer_was_lost() {
    let group = Group::start(1).await;
    let grammar = Grammar::JsonSchema(schemas::random(11).to_string());
    let answer = group.answer(&grammar, 11).await;
    for told in [1, answer.len() / 2, answer.len() - 1] {
        let mut replay = group.ask(&grammar, 11);
        replay.run.prompt.extend(&answer[..told]);
        replay.run.first_index = told as u32;
        let mut running = run(&group.engine, replay).await.unwrap();
        let mut rest = Vec::new();
        while let Some(event) = running.next().await.unwrap() {
            if let v1::run_event::Event::Token(token) = event {
                rest.push(token.token.unwrap().id);
            }
        }
        assert_eq!(rest, answer[told..], "from token {told}");
    }
}
