//! What a grammar costs a step: decode with and without one, in turns, through a whole rank with its leader.
//!
//! `cargo run --release -p galerne-worker --example structured -- MODEL [THREADS [ROUNDS]]`

#[path = "../tests/common/mod.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod common;

use std::time::{Duration, Instant};

use common::{Cluster, client, run, start};
use futures_util::future::join_all;
use galerne_types::{Epoch, Grammar, Health, Sampling};
use galerne_wire::v1;

/// Tokens of one answer.
const TOKENS: u32 = 65;

/// An answer that goes on for as long as it is let, with every kind of mask: names, strings, numbers, choices.
const SCHEMA: &str = r#"{"type": "array", "minItems": 1000, "items": {"type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["friend", "family", "colleague"]}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "age", "kind", "tags"], "additionalProperties": false}}"#;

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let model = args.next().expect("a model's path");
    let threads = args.next().map_or(1, |arg| arg.parse().expect("a number of threads"));
    let rounds: u64 = args.next().map_or(15, |arg| arg.parse().expect("a number of rounds"));
    let cluster = Cluster::start().await;
    let mut options = cluster.options("h", 0, 1);
    (options.model, options.threads) = (model.into(), threads);
    let _rank = start(options);
    let health = cluster.serving(Epoch(0)).await;
    let grammar = Grammar::JsonSchema(SCHEMA.into());
    step(&cluster, &health, Some(&grammar), 1, 0).await; // reads the tokenizer
    for batch in [1, 8] {
        let (mut free, mut bound) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            free.push(step(&cluster, &health, None, batch, round).await);
            bound.push(step(&cluster, &health, Some(&grammar), batch, round).await);
        }
        let mut ratios: Vec<f64> =
            free.iter().zip(&bound).map(|(free, bound)| bound.as_secs_f64() / free.as_secs_f64()).collect();
        ratios.sort_by(f64::total_cmp);
        free.sort();
        bound.sort();
        let ms = |sorted: &[Duration], index: usize| sorted[index].as_secs_f64() * 1e3;
        let middle = free.len() / 2;
        println!(
            "batch {batch}: {:.2} ms a step without, {:.2} ms with (fastest {:.2}, {:.2}); with/without {:.3}",
            ms(&free, middle),
            ms(&bound, middle),
            ms(&free, 0),
            ms(&bound, 0),
            ratios[middle],
        );
    }
}

/// Mean time of a step while `batch` answers are under way.
async fn step(
    cluster: &Cluster,
    health: &Health,
    grammar: Option<&Grammar>,
    batch: u64,
    round: u64,
) -> Duration {
    let answer = |index| async move {
        let sampling = Sampling { temperature: 1.0, seed: round * 100 + index, ..Sampling::greedy() };
        let prompt: Vec<u32> = (0..16).map(|i| (100 + index * 50 + i * 7) as u32).collect();
        let mut request = cluster.request(health.epoch, &prompt, TOKENS);
        request.run.sampling = Some(v1::Sampling::from(&sampling));
        request.run.grammar = grammar.map(v1::Grammar::from);
        request.run.stop_tokens = if grammar.is_some() { vec![0, 2] } else { Vec::new() };
        let mut running = run(&client(health).await, request).await.expect("an answer");
        let mut times = Vec::new();
        while let Some(event) = running.next().await.expect("a token") {
            if let v1::run_event::Event::Token(_) = event {
                times.push(Instant::now());
            }
        }
        assert_eq!(times.len(), TOKENS as usize, "the answer is as long as it may be");
        times
    };
    let answers = join_all((0..batch).map(answer)).await;
    // While all are under way.
    let begun = answers.iter().map(|times| times[0]).max().expect("an answer");
    let ended = answers.iter().map(|times| times[times.len() - 1]).min().expect("an answer");
    let steps = answers[0].iter().filter(|time| **time > begun && **time <= ended).count();
    ended.duration_since(begun) / u32::try_from(steps).unwrap_or(u32::MAX)
}
