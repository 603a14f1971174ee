//! A prompt that begins as another one did: what was kept of that gives the same tokens, and is told of.

use galerne_types::{Epoch, Sampling};
use galerne_wire::v1;
use galerne_wire::v1::run_event::Event;
use galerne_worker::RankOptions;
use tonic::Request;

use crate::common::{Asked, Cluster, client, run, start};

/// What a request was answered, and how many tokens of its prompt were found.
type Answer = (Vec<u32>, u32);

async fn answers(
    prefix_cache: bool,
    requests: &[(&[u32], u64, Option<u64>)],
) -> (Vec<Answer>, v1::LoadReport) {
    let cluster = Cluster::start().await;
    let options = |rank| RankOptions { prefix_cache, ..cluster.options("h", rank, 2) };
    let _ranks = [start(options(0)), start(options(1))];
    let health = cluster.serving(Epoch(0)).await;
    let engine = client(&health).await;
    let mut answers = Vec::new();
    for &(prompt, tenant, cache_salt) in requests {
        let Asked { run: asked, epoch, secret } = cluster.request(health.epoch, prompt, 40);
        let sampling = Sampling { temperature: 1.0, seed: 7, presence_penalty: 0.5, ..Sampling::greedy() };
        let sampling = Some(v1::Sampling::from(&sampling));
        let asked = Asked { run: v1::RunRequest { tenant, cache_salt, sampling, ..asked }, epoch, secret };
        let (mut running, mut answer) = (run(&engine, asked).await.unwrap(), Answer::default());
        while let Some(event) = running.next().await.unwrap() {
            if let Event::Token(v1::RunToken { token, timing, .. }) = event {
                answer.0.push(token.unwrap().id);
                answer.1 += timing.map_or(0, |timing| timing.cached_tokens);
            }
        }
        answers.push(answer);
    }
    let mut ask = Request::new(v1::LoadRequest { epoch: health.epoch.0 });
    let secret = cluster.fleet.borrow().groups[&cluster.group].epoch.clone().unwrap().1.secret;
    galerne_wire::show_secret(&mut ask, &secret).unwrap();
    let mut loads = engine.clone().load(ask).await.unwrap().into_inner();
    let (looked_up, hits) = (
        requests
            .iter()
            .filter(|(.., salt)| prefix_cache && salt.is_some())
            .map(|(prompt, ..)| prompt.len())
            .sum::<usize>(),
        answers.iter().map(|(_, cached)| cached).sum::<u32>(),
    );
    let told = async {
        loop {
            let load = loads.message().await.unwrap().unwrap();
            if (load.prefix_cache_queries, load.prefix_cache_hits) == (looked_up as u64, hits.into()) {
                return load;
            }
        }
    };
    let load = tokio::time::timeout(crate::common::PATIENCE, told).await.expect("all is counted");
    (answers, load)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_kept_gives_the_same_tokens() {
    let long: Vec<u32> = (0..130).map(|at| 3 + at * 17 % 1000).collect();
    let mut other = long.clone();
    other[100] = 5;
    let requests: [(&[u32], _, _); 6] = [
        (&long, 1, Some(0)),
        (&long, 1, Some(0)),
        (&other, 1, Some(0)),
        (&long[..96], 1, Some(0)),
        (&long, 2, Some(0)),
        (&long, 1, None),
    ];
    let ((with, load), (without, none)) = (answers(true, &requests).await, answers(false, &requests).await);
    assert!(load.prefix_cache && !none.prefix_cache);
    assert_eq!(with.iter().map(|(_, cached)| *cached).collect::<Vec<_>>(), [0, 128, 96, 64, 0, 0]);
    for (request, ((with, _), (without, cached))) in with.iter().zip(&without).enumerate() {
        assert_eq!((with, *cached), (without, 0), "request {request}");
    }
}
