//! Clusters that are well: real clients, real etcd, several ranks and replicas.

use std::io::{Read, Write};
use std::time::Duration;

use galerne_wire::v1::galerne_client::GalerneClient;
use galerne_wire::v1::{GenerateRequest, Sampling, Token};

use crate::process::{self, Process};
use crate::setup::{self, Cluster, Etcd};

/// What a rank may take beside its share of the weights.
const REST_BYTES_MAX: u64 = 64 << 20;

#[test]
fn three_ranks_and_a_real_etcd_answer_the_openai_client() {
    let etcd = Etcd::start();
    let mut cluster =
        Cluster::up(&setup::demo_model(), &["--tp", "3", "--etcd", &etcd.endpoint, "--prompt", "Say hello."]);
    assert!(cluster.process.output().contains("cut into S = 3 virtual shards over N = 3 ranks"));
    let fleet = cluster.fleet();
    let shards: Vec<_> = fleet.groups[0].ranks.iter().map(|rank| (rank.first_shard, rank.shards)).collect();
    assert_eq!(shards, [(0, 1), (1, 1), (2, 1)]);
    let share = std::fs::metadata(setup::demo_model()).expect("the demo model").len() / 3;
    for pid in cluster.rank_pids() {
        let peak = process::peak_memory_bytes(pid);
        assert!(peak <= share + REST_BYTES_MAX, "rank {pid} took {peak} bytes for a share of {share}");
    }

    for script in ["openai_client.py", "openai_shapes.py"] {
        let told = [&cluster.http, "SmolLM2-135M-Instruct.Q4_1", &cluster.admin];
        let mut client = Process::start(setup::python(script).args(told));
        let status = client.exit_within(process::PATIENCE);
        assert!(status.success(), "{script}: {}", client.output());
    }

    let ranks = cluster.rank_pids();
    assert_eq!(ranks.len(), 3);
    cluster.process.signal(libc::SIGINT);
    let status = cluster.process.exit_within(Duration::from_secs(20));
    assert!(status.success(), "{}", cluster.process.output());
    for pid in ranks {
        assert!(!process::alive(pid), "rank process {pid} outlives `galerne up`");
    }
}

#[test]
fn the_same_tokens_and_log_probabilities_for_every_number_of_ranks() {
    let golden = setup::bard_golden();
    assert_eq!(golden.len(), 3);
    let prompt = [1, 93, 980, 253, 655, 339];
    for (model, how, kv_dtype, virtual_shards, sizes) in [
        (setup::bard(), "f32", "f32", "4", &["1", "2", "4"][..]),
        (setup::demo_model(), "f32", "f32", "3", &["1", "3"]),
        (setup::demo_model(), "f32", "bf16", "4", &["1", "2", "4"]),
        (setup::demo_model(), "int8", "int8", "3", &["1", "3"]),
    ] {
        let mut first = None;
        for tp in sizes {
            let numerics = ["--virtual-shards", virtual_shards, "--compute", how, "--kv-dtype", kv_dtype];
            let cluster = Cluster::up(&model, &[&["--tp", tp][..], &numerics].concat());
            let drawn = [0.0, 1.0].map(|temperature| exactly(&cluster, &prompt, temperature));
            assert_eq!(
                *first.get_or_insert(drawn.clone()),
                drawn,
                "{} in {how}, keys and values in {kv_dtype}, with tp {tp}",
                model.display()
            );
            if model == setup::bard() {
                for (prompt, expected, comparable) in &golden {
                    let tokens = cluster.greedy(prompt, expected.len() as u32).expect("an answer");
                    assert_eq!(tokens[..*comparable], expected[..*comparable], "tp {tp}");
                }
            }
        }
    }
}

/// 24 tokens, each with its five best alternatives: ids and the bits of their log probabilities.
fn exactly(cluster: &Cluster, prompt: &[u32], temperature: f32) -> Vec<Vec<(u32, u32)>> {
    let sampling =
        Sampling { temperature: Some(temperature), seed: Some(11), logprobs: Some(5), ..Sampling::default() };
    let request = GenerateRequest { sampling: Some(sampling), ..setup::request(prompt, 24) };
    let tokens =
        setup::block_on(async { setup::collect(&mut setup::client(&cluster.grpc).await, request).await });
    let bits = |token: Token| {
        let top = token.top.iter().map(|top| (top.id, top.logprob.to_bits()));
        std::iter::once((token.id, token.logprob.to_bits())).chain(top).collect()
    };
    let drawn: Vec<Vec<_>> = tokens.expect("an answer").into_iter().map(bits).collect();
    assert!(drawn.len() == 24 && drawn.iter().all(|token| token.len() == 6));
    drawn
}

#[test]
fn a_rehearsal_needs_no_model_and_gives_the_same_tokens_for_every_number_of_ranks() {
    let drawn = ["1", "2"].map(|tp| {
        let law = "step_ns=1000000,token_ns=1000";
        let cluster = Cluster::up(&setup::bard(), &["--tp", tp, "--rehearse", law]);
        assert!(cluster.fleet().groups[0].ranks.iter().all(|rank| rank.device == "rehearsal"));
        cluster.greedy(&[1, 40, 50], 100).expect("an answer")
    });
    assert_eq!(drawn[0].len(), 100);
    assert_eq!(drawn[0], drawn[1]);
}

#[test]
fn replicas_share_the_load() {
    const STREAMS: u32 = 8;
    let cluster = Cluster::up(&setup::bard(), &["--replicas", "2", "--threads", "1"]);
    let fleet = cluster.until_ready(2);
    assert_eq!(fleet.groups.len(), 2);
    let alone = cluster.greedy(&[1, 40, 50], 400).expect("an answer");
    setup::block_on(async {
        // Streams that have begun but are not read stay in flight, so the counts below are exact.
        let client = setup::client(&cluster.grpc).await;
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            let mut stream = GalerneClient::clone(&client);
            let mut stream =
                stream.generate(setup::request(&[1, 40, 50], 400)).await.expect("accepted").into_inner();
            let first = stream.message().await.expect("a token").expect("a token");
            streams.push((first, stream));
        }
        let fleet =
            client.clone().fleet(galerne_wire::v1::FleetRequest {}).await.expect("a fleet").into_inner();
        let running: Vec<u32> = fleet.groups.iter().map(|group| group.requests).collect();
        assert!(running.iter().all(|count| *count <= STREAMS / 2), "shared unevenly: {running:?}");
        for (first, mut stream) in streams {
            let mut ids: Vec<u32> = first.tokens.iter().map(|token| token.id).collect();
            while let Some(delta) = stream.message().await.expect("the rest") {
                ids.extend(delta.tokens.iter().map(|token| token.id));
            }
            assert_eq!(ids, alone, "a stream in a batch, on either replica, gives the tokens it gives alone");
        }
    });
}

#[test]
fn chat_and_status_show_a_running_cluster() {
    let mut cluster = Cluster::up(&setup::demo_model(), &["--model-name", "smol"]);
    let run = |arguments: &[&str]| {
        let output =
            setup::galerne().args(arguments).args(["--grpc", &cluster.grpc]).output().expect("it runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let status = run(&["status"]);
    assert!(status.contains("g0") && status.contains("ready") && status.contains("cpu x"), "{status}");
    let chat = ["chat", "--model", "smol", "--max-tokens", "12", "What is the capital of France?"];
    assert!(run(&chat).contains("Paris"));
    assert_eq!(run(&chat), run(&chat), "greedy answers repeat");

    // Drained without a request under way, it ends at once, and well.
    let mut operator =
        std::net::TcpStream::connect(cluster.admin.trim_start_matches("http://")).expect("admin");
    operator.write_all(b"POST /drain HTTP/1.1\r\nhost: x\r\n\r\n").expect("sent");
    let mut answer = String::new();
    operator.read_to_string(&mut answer).expect("an answer");
    assert!(answer.contains("\"draining\":true"), "{answer}");
    let status = cluster.process.exit_within(Duration::from_secs(20));
    assert!(status.success(), "{}", cluster.process.output());
}
