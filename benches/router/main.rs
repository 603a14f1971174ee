//! What a request costs a router, in processor time of its process, against a rehearsal group: a real leader that runs no
//! model. Beside it, any other router that is given a command line.
//!
//! ```sh
//! make dist && cargo run --profile dist --example router -- MODEL [--only PART OF A NAME] [--times MORE REQUESTS] [--peer 'COMMAND {worker} {port}']
//! ```
//!
//! The router under test is the process of `galerne up`: it also holds the small store for coordination and watches the
//! rank. A peer stands in front of it and gets the same requests; its own time alone is counted.

mod client;
mod leader;
mod process;

use std::time::{Duration, Instant};

use client::Load;
use leader::Leader;
use process::Running;

/// Requests of a scenario before the counted ones.
const WARM_UP: usize = 200;

struct Scenario {
    name: &'static str,
    load: Load,
    requests: usize,
}

const USAGE: &str =
    "usage: router MODEL [--only PART OF A NAME] [--times MORE REQUESTS] [--peer 'COMMAND {worker} {port}']";

fn main() {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().expect(USAGE);
    let (mut only, mut times, mut peer) = (String::new(), 1, None);
    while let Some(flag) = arguments.next() {
        let value = arguments.next().expect(USAGE);
        match flag.as_str() {
            "--only" => only = value,
            "--times" => times = value.parse().expect(USAGE),
            "--peer" => peer = Some(value),
            _ => panic!("{USAGE}"),
        }
    }
    process::allow_many_files();
    println!(
        "{:<44} {:>9} {:>11} {:>11} {:>11} {:>11}",
        "", "requests", "CPU/request", "wall/request", "first p50", "last p50"
    );
    for (law, pace) in [("step_ns=0", "tokens at once"), ("step_ns=5000000", "a token each 5 ms")] {
        let galerne = Running::up(&model, law, &[]);
        let peer = peer.as_ref().map(|command| Running::peer(command, &galerne.http));
        for Scenario { name, load, requests } in scenarios() {
            for (who, router) in [("galerne", Some(&galerne)), ("peer", peer.as_ref())] {
                let name = format!("{who}, {name}, {pace}");
                if let Some(router) = router.filter(|_| name.contains(&only)) {
                    measure(&name, router.pid(), &router.http, &load, times * requests);
                }
            }
        }
    }
    for (name, run) in [("last token", last_token as fn(&str)), ("open streams", open_streams)] {
        if name.contains(&only) {
            run(&model);
        }
    }
}

fn scenarios() -> [Scenario; 3] {
    let load = |tokens, stream| Load { connections: 32, tokens, stream };
    [
        Scenario { name: "unary, 1 token", load: load(1, false), requests: 5000 },
        Scenario { name: "unary, 128 tokens", load: load(128, false), requests: 1000 },
        Scenario { name: "stream of 128 tokens", load: load(128, true), requests: 1000 },
    ]
}

fn measure(name: &str, pid: u32, http: &str, load: &Load, requests: usize) {
    load.run(http, WARM_UP);
    let (before, started) = (process::cpu(pid), Instant::now());
    let times = load.run(http, requests);
    let (cpu, wall) = (process::cpu(pid) - before, started.elapsed());
    let median = |mut of: Vec<Duration>| {
        of.sort_unstable();
        of[of.len() / 2]
    };
    let (first, last): (Vec<_>, Vec<_>) = times.into_iter().unzip();
    let each = |time: Duration| format!("{:.0} us", time.as_secs_f64() * 1e6 / requests as f64);
    let millis = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1e3);
    println!(
        "{name:<44} {requests:>9} {:>11} {:>11} {:>11} {:>11}",
        each(cpu),
        each(wall),
        millis(median(first)),
        millis(median(last))
    );
}

/// How long a stream's last token is under way, from the leader's hands to the client's, and how much of that has passed
/// when it arrives at the router; one request at a time.
fn last_token(model: &str) {
    const REQUESTS: u64 = 500;
    const WARM_UP: u64 = 20;
    const TOKENS: u32 = 16;
    let leader = Leader::start(model, Duration::from_millis(3));
    let router = Running::router(model, &leader.store);
    let load = Load { connections: 1, tokens: TOKENS, stream: true };
    let through = client::block_on(async {
        let mut client = client::Connection::open(&router.http).await;
        let mut times = Vec::new();
        for seed in 0..REQUESTS + WARM_UP {
            client.ask(&load.body(seed as usize)).await;
            times.push(leader.sent(seed).elapsed());
        }
        times
    });
    let seeds = 1000..1000 + REQUESTS + WARM_UP;
    let arrived = client::block_on(leader.ask(seeds, TOKENS));
    for (name, times) in [("the client", through), ("the router", arrived)] {
        let mut times = times[WARM_UP as usize..].to_vec();
        times.sort_unstable();
        let at = |share: f64| times[(share * (times.len() - 1) as f64) as usize].as_secs_f64() * 1e6;
        let [p50, p90, p99] = [0.5, 0.9, 0.99].map(at);
        println!("last token, from leader to {name}: p50 {p50:.0} us, p90 {p90:.0} us, p99 {p99:.0} us");
    }
}

/// 10,000 streams that run at once, and what the router's process holds for them.
fn open_streams(model: &str) {
    const STREAMS: usize = 10_000;
    let room =
        ["--replicas", "3", "--sequences-max", "4096", "--step-tokens-max", "8192", "--kv-blocks", "200000"];
    let galerne = Running::up(model, "step_ns=1000000000", &room);
    let before = process::memory_bytes(galerne.pid());
    let (streams, after) = client::block_on(async {
        let streams = client::open(&galerne.http, STREAMS).await;
        (streams.len(), process::memory_bytes(galerne.pid()))
    });
    println!(
        "{} open streams: {:.0} MB, of which {:.0} MB before the first; {:.1} kB a stream",
        streams,
        after as f64 / 1e6,
        before as f64 / 1e6,
        (after - before) as f64 / 1e3 / streams as f64
    );
}
