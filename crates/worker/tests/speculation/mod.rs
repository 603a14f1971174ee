//! Answers that are run ahead, by a real group: the same tokens, and it is told how many came true.

use galerne_types::{Epoch, Sampling};
use galerne_wire::v1;
use galerne_worker::RankOptions;
use tonic::Request;

use crate::common::{Asked, Cluster, PATIENCE, client, run, start};

/// What the same requests are answered, one after the other, and the group's load report after them.
async fn answers(speculation: bool, samplings: &[Sampling]) -> (Vec<Vec<u32>>, v1::LoadReport) {
    let cluster = Cluster::start().await;
    let options = |rank| RankOptions { speculation, ..cluster.options("h", rank, 2) };
    let _ranks = [start(options(0)), start(options(1))];
    let health = cluster.serving(Epoch(0)).await;
    let engine = client(&health).await;
    let (mut answers, mut tokens) = (Vec::new(), 0);
    for sampling in samplings {
        let prompt: Vec<u32> = (0..80).map(|at| 100 + at % 20).collect();
        let Asked { run: asked, epoch, secret } = cluster.request(health.epoch, &prompt, 400);
        let asked = v1::RunRequest { sampling: Some(sampling.into()), ..asked };
        let (answer, end) = run(&engine, Asked { run: asked, epoch, secret }).await.unwrap().read().await;
        assert!(end.is_none(), "{end:?}");
        tokens += answer.len() as u64;
        answers.push(answer);
    }
    let mut ask = Request::new(v1::LoadRequest { epoch: health.epoch.0 });
    let secret = cluster.fleet.borrow().groups[&cluster.group].epoch.clone().unwrap().1.secret;
    galerne_wire::show_secret(&mut ask, &secret).unwrap();
    let mut loads = engine.clone().load(ask).await.unwrap().into_inner();
    let told = async {
        loop {
            let load = loads.message().await.unwrap().unwrap();
            // All steps are counted: each token was drawn by one, or came true in a draft.
            if load.running == 0
                && load.step_tokens - load.draft_tokens + load.draft_tokens_accepted >= tokens
            {
                return load;
            }
        }
    };
    let load = tokio::time::timeout(PATIENCE, told).await.expect("all is counted");
    (answers, load)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_run_ahead_gives_the_same_tokens() {
    let warm = |seed| Sampling { temperature: 0.7, seed, logprobs: Some(1), ..Sampling::greedy() };
    let samplings = [Sampling::greedy(), warm(1), warm(2)];
    let (ahead, load) = answers(true, &samplings).await;
    let (plain, none) = answers(false, &samplings).await;
    assert_eq!(ahead, plain);
    assert!(load.drafts > 0 && load.draft_tokens >= load.drafts, "{load:?}");
    assert!(load.draft_tokens_accepted > 0, "a greedy answer of so small a model goes in circles: {load:?}");
    assert_eq!((none.drafts, none.draft_tokens, none.draft_tokens_accepted), (0, 0, 0));
    println!("{} steps instead of {}: {load:?}", load.steps, none.steps);
}
