//! Whole groups: real ranks, collective, gRPC and model, within one process.

#[path = "../../tls/tests/tls/authority.rs"]
mod authority;
mod common;
mod preemption;
mod prefixes;
mod speculation;
mod structured;

use authority::Authority;
use common::{Asked, Cluster, PATIENCE, case, client, refused, run, start, state};
use galerne_tls::{CLUSTER_NAME, ClusterFiles, cluster};
use galerne_types::{Epoch, Fleet, RankState};
use galerne_wire::show_secret;
use galerne_wire::v1;
use galerne_wire::v1::engine_client::EngineClient;
use galerne_wire::v1::rank_client::RankClient;
use galerne_wire::v1::run_event::Event;
use galerne_worker::{EXIT_CONFIG, KvSize};
use tonic::transport::Endpoint;
use tonic::{Code, Request};

/// Tokens of prompt and answer together that the model takes.
const CONTEXT_TOKENS: u32 = 2048;

async fn gives_the_golden_tokens(hosts: [&str; 2]) {
    let cluster = Cluster::start().await;
    let ranks = [start(cluster.options(hosts[0], 0, 2)), start(cluster.options(hosts[1], 1, 2))];
    let health = cluster.serving(Epoch(0)).await;
    let (prompt, expected) = case();
    let engine = client(&health).await;
    let (tokens, error) =
        run(&engine, cluster.request(health.epoch, &prompt, 32)).await.unwrap().read().await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(tokens, expected);
    for rank in &ranks {
        let ready = |fleet: &Fleet| state(fleet, &cluster.group, &rank.id) == Some(RankState::Ready);
        cluster.until("both ranks say that they are ready", ready).await;
    }
    for rank in ranks {
        rank.stop().await.unwrap();
    }
    let empty = |fleet: &Fleet| fleet.groups.get(&cluster.group).is_none_or(|group| group.ranks.is_empty());
    cluster.until("the ranks have given up their registrations", empty).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_ranks_of_one_host_give_the_golden_tokens() {
    gives_the_golden_tokens(["h", "h"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_ranks_of_two_hosts_give_the_golden_tokens() {
    gives_the_golden_tokens(["g", "h"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_that_comes_by_another_router_takes_the_place_of_the_one_under_way() {
    let cluster = Cluster::start().await;
    let rank = start(cluster.options("h", 0, 1));
    let health = cluster.serving(Epoch(0)).await;
    let engine = client(&health).await;
    let named = |key: u8, accepted| {
        let asked = cluster.request(health.epoch, &[5, 6, 7], 1500);
        Asked { run: v1::RunRequest { repeat_key: vec![key; 32], accepted, ..asked.run }, ..asked }
    };
    let mut running = Vec::new();
    for (key, accepted) in [(1, false), (2, false), (1, true), (2, false)] {
        let mut one = run(&engine, named(key, accepted)).await.unwrap();
        one.next().await.unwrap();
        running.push(one);
    }
    running.push(run(&engine, named(3, false)).await.unwrap());
    running[4].next().await.unwrap();
    for nobodys in [&[3; 31][..], &[4; 32]] {
        running[0].supersede(nobodys);
    }
    running[0].supersede(&[3; 32]);
    let mut ended = Vec::new();
    for one in &mut running {
        ended.push(loop {
            match one.next().await {
                Ok(Some(_)) => {}
                Ok(None) => break Code::Ok,
                Err(status) => break status.code(),
            }
        });
    }
    let ends = [Code::Ok, Code::Cancelled, Code::Ok, Code::Ok, Code::Cancelled];
    assert_eq!(ended, ends, "a replay ends nobody, and a name is one request's");
    let wrong =
        Asked { run: v1::RunRequest { repeat_key: vec![1; 31], ..named(1, false).run }, ..named(1, false) };
    assert_eq!(refused(&engine, wrong).await.code(), Code::InvalidArgument);
    rank.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_and_latecomers_are_refused() {
    let cluster = Cluster::start().await;
    let _ranks = [start(cluster.options("h", 0, 2)), start(cluster.options("h", 1, 2))];
    let health = cluster.serving(Epoch(0)).await;
    let mut engine = client(&health).await;
    let stale = refused(&engine, cluster.request(Epoch(health.epoch.0 - 1), &[1], 1)).await;
    assert_eq!(stale.code(), Code::FailedPrecondition, "{stale}");
    let unknown = Asked { secret: None, ..cluster.request(health.epoch, &[1], 1) };
    let unknown = refused(&engine, unknown).await;
    assert_eq!(unknown.code(), Code::Unauthenticated, "{unknown}");
    let long = vec![1; CONTEXT_TOKENS as usize];
    let long = refused(&engine, cluster.request(health.epoch, &long, 1)).await;
    assert_eq!(long.code(), Code::InvalidArgument, "{long}");
    let empty = refused(&engine, cluster.request(health.epoch, &[], 1)).await;
    assert_eq!(empty.code(), Code::InvalidArgument, "{empty}");

    let record = cluster.fleet.borrow().groups[&cluster.group].epoch.clone().unwrap().1;
    let mut ask = Request::new(v1::LoadRequest { epoch: health.epoch.0 });
    assert_eq!(engine.load(v1::LoadRequest { epoch: 1 }).await.unwrap_err().code(), Code::FailedPrecondition);
    let unknown = engine.load(v1::LoadRequest { epoch: health.epoch.0 }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::Unauthenticated);
    show_secret(&mut ask, &record.secret).unwrap();
    let load = engine.load(ask).await.unwrap().into_inner().message().await.unwrap().unwrap();
    assert_eq!((load.running, load.waiting, load.kv_blocks), (0, 0, health.kv_blocks));
    let follower = &record.members[1];
    let at_follower =
        client(&galerne_types::Health { leader: follower.address.clone(), ..health.clone() }).await;
    let elsewhere = refused(&at_follower, cluster.request(health.epoch, &[1], 1)).await;
    assert_eq!(elsewhere.code(), Code::FailedPrecondition, "{elsewhere}");

    let mut rank = RankClient::connect(format!("http://{}", follower.address)).await.unwrap();
    let mut follow = async |secret: Option<&str>| {
        let mut visit = Request::new(futures_util::stream::pending());
        if let Some(secret) = secret {
            show_secret(&mut visit, secret).unwrap();
        }
        rank.follow(visit).await.unwrap_err().code()
    };
    assert_eq!(follow(None).await, Code::Unauthenticated);
    assert_eq!(follow(Some(&"0".repeat(64))).await, Code::Unauthenticated);
    assert_eq!(follow(Some(&record.secret)).await, Code::FailedPrecondition, "the epoch has its leader");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_scored_before_the_first_token_which_tells_where_the_time_went() {
    let cluster = Cluster::start().await;
    let _ranks = [start(cluster.options("h", 0, 2)), start(cluster.options("h", 1, 2))];
    let health = cluster.serving(Epoch(0)).await;
    // Longer than a step of 64 tokens: it is scored in two parts.
    let prompt: Vec<u32> = (0..100).map(|at| at * 37 % 1000).collect();
    let mut request = cluster.request(health.epoch, &prompt, 3);
    request.run.prompt_logprobs = Some(2);
    let sampling = request.run.sampling.as_mut().unwrap();
    (sampling.presence_penalty, sampling.repetition_penalty) = (0.5, Some(1.2));
    let engine = client(&health).await;
    let mut running = run(&engine, request).await.unwrap();
    let (mut scored, mut tokens) = (vec![prompt[0]], 0);
    while let Some(event) = running.next().await.unwrap() {
        match event {
            Event::Scored(v1::Scored { position, scores }) => {
                assert_eq!((position as usize, tokens), (scored.len(), 0));
                assert!(scores.iter().all(|score| score.top.len() == 2 && score.logprob < 0.0));
                scored.extend(scores.iter().map(|score| score.id));
            }
            Event::Token(token) => {
                assert_eq!(token.timing.is_some(), tokens == 0);
                tokens += 1;
            }
            Event::Begun(_) | Event::Finished(_) | Event::Failed(_) => {}
        }
    }
    assert_eq!((scored, tokens), (prompt, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_makes_room_for_the_next() {
    let cluster = Cluster::start().await;
    let mut options = cluster.options("h", 0, 1);
    options.kv = KvSize::Blocks(5); // what a long one holds at once: a window of 64 tokens and a chunk of as many
    let _rank = start(options);
    let health = cluster.serving(Epoch(0)).await;
    let (prompt, expected) = case();
    let engine = client(&health).await;
    let all = cluster.request(health.epoch, &prompt, CONTEXT_TOKENS - prompt.len() as u32);
    let mut greedy = run(&engine, all).await.unwrap();
    greedy.next().await.unwrap().expect("a first token");
    let next = run(&engine, cluster.request(health.epoch, &prompt, 32)).await.unwrap();
    drop(greedy);
    assert_eq!(next.read().await.0, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_follower_ends_the_streams_and_the_group_forms_again() {
    let cluster = Cluster::start().await;
    let _leader = start(cluster.options("h", 0, 2));
    let follower = start(cluster.options("h", 1, 2));
    let health = cluster.serving(Epoch(0)).await;
    let (prompt, expected) = case();
    let engine = client(&health).await;
    let long = cluster.request(health.epoch, &prompt, CONTEXT_TOKENS - prompt.len() as u32);
    let mut running = run(&engine, long).await.unwrap();
    running.next().await.unwrap().expect("a first token");
    cluster.kill(follower).await;
    let status = loop {
        match running.next().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without a word"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let unhealthy = |fleet: &Fleet| fleet.groups[&cluster.group].serving().is_none();
    cluster.until("its health is withdrawn", unhealthy).await;

    let _restarted = start(cluster.options("h", 1, 2));
    let again = cluster.serving(health.epoch).await;
    assert_eq!(again.leader, health.leader);
    let (tokens, _) = run(&engine, cluster.request(again.epoch, &prompt, 32)).await.unwrap().read().await;
    assert_eq!(tokens, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_told_something_else_than_the_leader_ends() {
    let cluster = Cluster::start().await;
    let _leader = start(cluster.options("h", 0, 2));
    let mut options = cluster.options("h", 1, 2);
    options.kv = KvSize::Blocks(100);
    let error = start(options).outcome().await.unwrap_err();
    assert_eq!(error.exit_code(), EXIT_CONFIG);
    assert!(error.to_string().contains("and this rank with 100 KV blocks, 8 sequences"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_not_there_ends_the_rank_at_once() {
    let cluster = Cluster::start().await;
    let mut options = cluster.options("h", 0, 1);
    options.model = "/nowhere/model".into();
    let error = start(options).outcome().await.unwrap_err();
    assert_eq!(error.exit_code(), EXIT_CONFIG);
    assert!(error.to_string().contains("/nowhere/model"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_and_callers_of_one_authority_work_together_and_others_are_refused() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let files = |authority: &Authority| {
        let (cert, key) = authority.issue(&[CLUSTER_NAME]);
        ClusterFiles { ca: authority.ca(), cert, key }
    };
    let store = Cluster::start().await;
    let member = files(&ours);
    let mut ranks = Vec::new();
    for index in 0..2 {
        let mut options = store.options("h", index, 2);
        options.cluster_tls = Some(member.clone());
        ranks.push(start(options));
    }
    let health = store.serving(Epoch(0)).await;
    let endpoint = || Endpoint::from_shared(format!("http://{}", health.leader)).unwrap();
    let (prompt, expected) = case();

    let (_, client) = cluster(&member).unwrap();
    let engine = EngineClient::new(endpoint().connect_with_connector(client.dialer()).await.unwrap());
    let (tokens, _) = run(&engine, store.request(health.epoch, &prompt, 32)).await.unwrap().read().await;
    assert_eq!(tokens, expected);

    let (_, stranger) = cluster(&files(&theirs)).unwrap();
    assert!(endpoint().connect_with_connector(stranger.dialer()).await.is_err());
    // Who speaks in the open is not understood.
    let open = endpoint().timeout(PATIENCE).connect().await;
    let not_understood = match open {
        Ok(channel) => {
            run(&EngineClient::new(channel), store.request(health.epoch, &prompt, 1)).await.is_err()
        }
        Err(_) => true,
    };
    assert!(not_understood);
}
