//! Processes as ranks: this test binary starts itself again for each rank.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::leaf_value;
use galerne_collective::{AbortHandle, Collective, Config, CpuCollective, Peer, Solo, connect, listen};

/// `RANK HOST,HOST,…` of a rank process.
const RANK: &str = "GALERNE_COLLECTIVE_TEST_RANK";

/// The loss of a process is known within this time.
const NOTICED_MAX: Duration = Duration::from_millis(200);

struct Rank {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Rank {
    fn start(rank: usize, hosts: &[&str]) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "processes::rank_process", "--nocapture", "--test-threads=1"])
            .env(RANK, format!("{rank} {}", hosts.join(",")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        Self { process, input, output }
    }

    /// The rest of the next line that begins with `key`.
    fn hear(&mut self, key: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the rank ended without saying {key}");
            // The test harness may have begun the line.
            if let Some(at) = line.find(key) {
                return line[at + key.len()..].trim().to_owned();
            }
        }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts a group and waits until its ranks have met.
fn start(hosts: &[&str]) -> Vec<Rank> {
    let mut ranks: Vec<_> = (0..hosts.len()).map(|rank| Rank::start(rank, hosts)).collect();
    let addresses: Vec<_> = ranks.iter_mut().map(|rank| rank.hear("address=")).collect();
    for rank in &mut ranks {
        rank.say(&addresses.join(" "));
    }
    ranks
}

#[test]
fn processes_compute_the_same_sum() {
    for hosts in [["a", "a"], ["a", "b"]] {
        let mut ranks = start(&hosts);
        let sums: Vec<_> = ranks.iter_mut().map(|rank| rank.hear("sum=")).collect();
        let mut sum = vec![0.0; 1000];
        Solo::new(1).all_reduce(&partials(0), &mut sum).unwrap();
        sum.iter_mut().zip(partials(1)).for_each(|(sum, right)| *sum += right);
        let expected = digest(&sum).to_string();
        assert_eq!(sums, [expected.clone(), expected]);
    }
}

#[test]
fn a_killed_process_is_noticed_while_waited_for_and_while_idle() {
    for hosts in [["a", "a", "a"], ["a", "b", "a"]] {
        for state in ["wait", "idle"] {
            let mut ranks = start(&hosts);
            for rank in &mut ranks {
                rank.hear("sum=");
            }
            for rank in &mut ranks[..2] {
                rank.say(state);
                rank.hear("ready");
            }
            let killed = Instant::now();
            ranks[2].process.kill().unwrap();
            for rank in &mut ranks[..2] {
                assert!(rank.hear("failed=").starts_with("rank 2 is lost"));
            }
            assert!(killed.elapsed() < NOTICED_MAX, "{state}, {hosts:?}: {:?}", killed.elapsed());
        }
    }
}

/// Not a test of its own: the body of a rank process.
#[test]
fn rank_process() {
    let Ok(role) = std::env::var(RANK) else { return };
    let (rank, hosts) = role.split_once(' ').unwrap();
    let listener = listen(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    println!("address={}", listener.address());
    let addresses = read_line();
    let addresses = addresses.split(' ').map(|address| address.parse::<SocketAddr>().unwrap());
    let peers: Vec<_> = hosts
        .split(',')
        .zip(addresses)
        .enumerate()
        .map(|(rank, (host, address))| Peer { host: host.to_owned(), address, leaves: rank..rank + 1 })
        .collect();
    let config = Config {
        rank: rank.parse().unwrap(),
        leaves: peers.len(),
        peers,
        secret: [3; 32].into(),
        epoch: 1,
        threads: 1,
        meet_timeout: Duration::from_secs(20),
        timeout: Duration::from_secs(20),
    };
    let collective = connect(&config, &listener, &AbortHandle::new()).unwrap();
    work(collective);
}

fn work(mut collective: CpuCollective) {
    let mut sum = vec![0.0; 1000];
    collective.all_reduce(&partials(collective.rank()), &mut sum).unwrap();
    println!("sum={}", digest(&sum));
    match read_line().as_str() {
        "wait" => {
            println!("ready");
            println!("failed={}", collective.barrier().unwrap_err());
        }
        "idle" => {
            println!("ready");
            println!("failed={}", collective.abort_handle().wait(Duration::from_secs(20)).unwrap());
        }
        // The test is over.
        _ => {}
    }
}

/// The next line of the test that started this process; empty at the end.
fn read_line() -> String {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    line.trim().to_owned()
}

fn partials(rank: usize) -> Vec<f32> {
    (0..1000).map(|index| leaf_value(rank, index)).collect()
}

fn digest(values: &[f32]) -> u64 {
    values.iter().fold(0xcbf2_9ce4_8422_2325, |hash, value| {
        (hash ^ u64::from(value.to_bits())).wrapping_mul(0x0100_0000_01b3)
    })
}
