//! Ranks that die.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::process::{self, Process};
use crate::setup::{self, Cluster};
use crate::traces::{get, post};

#[test]
fn a_rank_killed_while_serving_is_back_by_itself_and_answers_the_same_tokens() {
    let cluster = Cluster::up(&setup::bard(), &["--tp", "2"]);
    let prompt = [1, 40, 50];
    let before = cluster.greedy(&prompt, 40).expect("an answer");
    let whole = stream_in_the_background(&cluster.grpc).join().expect("no panic").expect("an answer");
    // Both a follower and the leader; each time the group forms again with a newer epoch.
    for victim in [1, 0] {
        let fleet = cluster.until_ready(1);
        let (epoch, ranks) = (fleet.groups[0].epoch, cluster.rank_pids());
        let open = stream_in_the_background(&cluster.grpc);
        process::send(ranks[victim], libc::SIGKILL);
        // An open stream goes on with the next token.
        assert_eq!(open.join().expect("no panic").expect("all of it"), whole);
        let fleet = process::eventually("a newer epoch that serves", || {
            let fleet = cluster.fleet();
            let group = &fleet.groups[0];
            (group.state == "ready" && group.epoch > epoch).then_some(fleet)
        });
        assert_ne!(fleet.groups[0].ranks[victim].pid, ranks[victim], "a new process took the rank's place");
        assert_eq!(fleet.groups[0].ranks[1 - victim].pid, ranks[1 - victim], "the survivor was kept");
        assert_eq!(cluster.greedy(&prompt, 40).expect("an answer"), before);
    }
}

/// 1800 tokens of bard-1m, as they come; returns once the first is there.
pub(crate) fn stream_in_the_background(
    grpc: &str,
) -> std::thread::JoinHandle<Result<Vec<u32>, tonic::Status>> {
    let grpc = grpc.to_owned();
    let (begun, wait) = std::sync::mpsc::channel();
    let stream = std::thread::spawn(move || {
        setup::block_on(async {
            let mut client = setup::client(&grpc).await;
            let mut stream = client.generate(setup::request(&[1, 2, 3], 1800)).await?.into_inner();
            let mut ids = Vec::new();
            while let Some(delta) = stream.message().await? {
                ids.extend(delta.tokens.iter().map(|token| token.id));
                begun.send(()).ok();
            }
            Ok(ids)
        })
    });
    wait.recv().expect("the stream begins");
    stream
}

/// Requests whose answers hang on more than tokens and seed.
fn of_all_kinds() -> Vec<Value> {
    let speech = "The fool speaks of kings. ".repeat(12);
    vec![
        json!({ "prompt": "The queen", "n": 2, "temperature": 0.5, "logprobs": 2 }),
        json!({ "prompt": speech, "echo": true, "temperature": 0, "logprobs": 1 }),
        json!({ "prompt": "The king", "temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3,
                "repetition_penalty": 1.1, "logit_bias": { "40": 2.0 }, "stop": ["Zanzibar"] }),
        json!({ "prompt": ["a", "b"], "temperature": 1.2, "min_p": 0.05, "top_k": 40 }),
        json!({ "prompt": "x", "ignore_eos": false,
                "structured_outputs": { "regex": "([a-z]{3,9} ){90,120}end" } }),
        json!({ "prompt": "x", "ignore_eos": false, "response_format": { "type": "json_schema", "json_schema": {
                "name": "acts", "schema": { "type": "array", "items": { "type": "integer" },
                "minItems": 200, "maxItems": 250 } } } }),
    ]
}

/// The whole answer, but for what is new each time.
fn answered(http: &str, request: &Value) -> Value {
    let mut body = json!({ "max_tokens": 1200, "seed": 7, "ignore_eos": true });
    body.as_object_mut().expect("an object").extend(request.as_object().expect("an object").clone());
    let answer = post(http, "/v1/completions", "", &body.to_string());
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200"), "{request}: {answer}");
    let mut answer: Value = serde_json::from_str(body).expect("JSON");
    for new in ["id", "created"] {
        assert!(!answer[new].take().is_null(), "{answer}");
    }
    answer["usage"]["prompt_tokens_details"].take(); // what was kept of a prompt went with its ranks
    answer
}

#[test]
fn answers_of_all_kinds_are_the_same_although_ranks_die() {
    let cluster = Cluster::up(&setup::bard(), &["--tp", "2", "--spares", "1"]);
    let whole: Vec<Value> = of_all_kinds().iter().map(|body| answered(&cluster.http, body)).collect();
    let asked = of_all_kinds().into_iter().map(|body| {
        let http = cluster.http.clone();
        std::thread::spawn(move || answered(&http, &body))
    });
    let asked: Vec<_> = asked.collect();
    process::eventually("most of their answers under way", || {
        let state = get(&cluster.admin, "/debug/state");
        let state: Value = serde_json::from_str(state.split_once("\r\n\r\n")?.1).ok()?;
        (state["requests"]["running"].as_u64()? >= asked.len() as u64).then_some(())
    });
    for victim in [1, 0] {
        let open = stream_in_the_background(&cluster.grpc);
        process::send(cluster.rank_pids()[victim], libc::SIGKILL);
        open.join().expect("no panic").expect("all of it");
    }
    for (asked, whole) in asked.into_iter().zip(whole) {
        assert_eq!(asked.join().expect("an answer"), whole);
    }
    let page = get(&cluster.admin, "/metrics");
    let moved = page.lines().filter(|line| line.starts_with("galerne_router_stream_migrations_total"));
    let moved: u64 = moved.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok()).sum();
    assert!(moved > of_all_kinds().len() as u64, "{moved} answers were under way when a rank died");
}

#[test]
fn a_group_that_never_gets_its_ranks_is_a_clear_failure() {
    let etcd = setup::Etcd::start();
    let mut worker = Process::start(
        setup::galerne()
            .args([
                "worker",
                "--tp",
                "2",
                "--ranks",
                "1",
                "--start-timeout-s",
                "3",
                "--etcd",
                &etcd.endpoint,
                "--model",
            ])
            .arg(setup::bard()),
    );
    let status = worker.exit_within(Duration::from_secs(30));
    assert!(!status.success());
    let output = worker.output();
    assert!(output.contains("1 of 2"), "it says how many ranks are there:\n{output}");
}

#[test]
fn a_worker_whose_place_is_taken_yields_with_a_sentence() {
    let etcd = setup::Etcd::start();
    let worker = |first_index: &str| {
        let mut command = setup::galerne();
        command.args(["worker", "--tp", "2", "--ranks", "1", "--first-index", first_index]);
        Process::start(
            command.args(["--etcd", &etcd.endpoint, "--log", "info", "--model"]).arg(setup::bard()),
        )
    };
    let mut first = worker("0");
    first.line_with("rank registered");
    let second = worker("0");
    assert!(!first.exit_within(process::PATIENCE).success());
    assert!(first.output().contains("taken over by another process"), "{}", first.output());
    let _third = worker("1");
    second.line_with("group serves");
}

#[test]
fn a_rank_that_is_killed_again_and_again_at_start_is_a_clear_failure() {
    let mut command = setup::galerne();
    command.args([
        "up",
        "--tp",
        "2",
        "--http",
        "127.0.0.1:0",
        "--grpc",
        "127.0.0.1:0",
        "--start-timeout-s",
        "5",
    ]);
    let mut up = Process::start(command.arg("--model").arg(setup::bard()));
    // Kill every rank as soon as it is seen: the group can never form.
    let parent = up.pid();
    let killer = std::thread::spawn(move || {
        while process::alive(parent) {
            children(parent).into_iter().for_each(|rank| process::send(rank, libc::SIGKILL));
            std::thread::park_timeout(Duration::from_millis(5));
        }
    });
    let status = up.exit_within(Duration::from_secs(40));
    killer.join().expect("no panic");
    assert!(!status.success());
    let output = up.output();
    assert!(output.contains("error: ") && output.contains("rank"), "{output}");
}

fn children(parent: u32) -> Vec<u32> {
    let of_thread = |task: std::io::Result<std::fs::DirEntry>| {
        let list = std::fs::read_to_string(task.ok()?.path().join("children")).ok()?;
        Some(list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>())
    };
    let tasks = std::fs::read_dir(Path::new("/proc").join(parent.to_string()).join("task"));
    tasks.into_iter().flatten().filter_map(of_thread).flatten().collect()
}
