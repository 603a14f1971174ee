//! A request that gives its slot up to another tenant goes on as if nothing had been.

use galerne_types::{Epoch, Grammar, Health, Sampling};
use galerne_wire::v1;
use galerne_wire::v1::engine_client::EngineClient;
use tonic::Request;
use tonic::transport::Channel;

use crate::common::{Asked, Cluster, case, client, run, start};

/// bard-1m's end token.
const END: u32 = 2;

/// Long enough to be under way when another one comes.
const TOKENS: u32 = 400;

/// A request of tenant 1 that looks back at its own tokens, and keeps to a grammar.
fn long(cluster: &Cluster, health: &Health, seed: u64) -> Asked {
    let prompt: Vec<u32> = (0..70).map(|at| 3 + (seed as u32 * 31 + at * 17) % 1000).collect();
    let mut request = cluster.request(health.epoch, &prompt, TOKENS);
    let sampling = Sampling { temperature: 1.0, seed, presence_penalty: 0.5, ..Sampling::greedy() };
    let asked = &mut request.run;
    asked.sampling = Some(v1::Sampling::from(&sampling));
    asked.stop_tokens = vec![END];
    asked.grammar = Some(v1::Grammar::from(&Grammar::Regex("([a-z ]{4}[A-Z]){1000}".into())));
    asked.tenant = 1;
    asked.cache_salt = Some(0);
    request
}

async fn answer(engine: &EngineClient<Channel>, request: Asked) -> Vec<u32> {
    let (tokens, error) = run(engine, request).await.unwrap().read().await;
    assert!(error.is_none(), "{error:?}");
    tokens
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_preempted_gives_the_same_tokens() {
    let cluster = Cluster::start().await;
    let options = |rank| galerne_worker::RankOptions { sequences_max: 2, ..cluster.options("h", rank, 2) };
    let _ranks = [start(options(0)), start(options(1))];
    let health = cluster.serving(Epoch(0)).await;
    let engine = client(&health).await;
    let mut alone = Vec::new();
    for seed in [1, 2] {
        alone.push(answer(&engine, long(&cluster, &health, seed)).await);
        assert_eq!(alone.last().unwrap().len(), TOKENS as usize);
    }

    let mut streams = Vec::new();
    for seed in [1, 2] {
        let mut running = run(&engine, long(&cluster, &health, seed)).await.unwrap();
        let first = running.next().await.unwrap().unwrap();
        streams.push((first, running));
    }
    let (prompt, expected) = case();
    let mut other = cluster.request(health.epoch, &prompt, expected.len() as u32);
    other.run.tenant = 2;
    assert_eq!(answer(&engine, other).await, expected);

    for ((first, mut running), alone) in streams.into_iter().zip(&alone) {
        let (mut events, mut tokens) = (vec![first], Vec::new());
        while let Some(event) = running.next().await.unwrap() {
            events.push(event);
        }
        for event in events {
            if let v1::run_event::Event::Token(token) = event {
                assert_eq!(token.index as usize, tokens.len());
                tokens.push(token.token.unwrap().id);
            }
        }
        assert_eq!(tokens, *alone);
    }
    let mut ask = Request::new(v1::LoadRequest { epoch: health.epoch.0 });
    let secret = cluster.fleet.borrow().groups[&cluster.group].epoch.clone().unwrap().1.secret;
    galerne_wire::show_secret(&mut ask, &secret).unwrap();
    let mut loads = engine.clone().load(ask).await.unwrap().into_inner();
    let told = async { while loads.message().await.unwrap().unwrap().preemptions != 1 {} };
    tokio::time::timeout(crate::common::PATIENCE, told).await.expect("one preemption is told");
}
