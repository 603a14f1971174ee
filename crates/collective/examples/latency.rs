//! How long an all-reduce takes between processes of this machine, over shared memory and over TCP on loopback.
//!
//! `cargo run --release -p galerne-collective --example latency` takes some ten seconds. Beside the measured
//! times stands the least that copying alone costs: the bytes that all ranks together must copy and add, at this
//! machine's copying speed, over the cores that can work at a time. (TCP copies into the kernel and out again;
//! what its protocol costs is not counted.) Where ranks share a core, by their number or by the scheduler's will,
//! each call costs them a sleep and an awakening, some 10 µs, instead of about 1 µs of spinning.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use galerne_collective::{AbortHandle, Collective, Config, Peer, connect, listen};

/// Message lengths.
const SIZES_BYTES: [usize; 5] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];

const CALLS_MIN: usize = 300;
const CALLS_MAX: usize = 3000;
/// A size is called as often as this volume allows, within the limits above.
const VOLUME_BYTES: usize = 256 << 20;

/// A rank's part of the whole: the first argument of a rank process.
const RANK: &str = "--rank";

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let done = match args.iter().map(String::as_str).collect::<Vec<_>>()[1..] {
        [] => measure_all(),
        [RANK, rank, hosts] => run_rank(rank, hosts),
        _ => Err("usage: latency (without arguments)".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("latency: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn measure_all() -> Result<(), Failure> {
    let cores = available_parallelism()?.get();
    let copy = copy_bytes_per_us();
    println!("all_reduce of f32, one piece a rank; {cores} cores, which copy {:.1} GB/s each", copy / 1e3);
    println!("{:>3} {:>6} {:>8} {:>10} {:>10} {:>12}", "N", "over", "KiB", "p50 µs", "p99 µs", "copying µs");
    for ranks in [2, 4] {
        for (name, hosts, copies) in
            [("shm", vec!["a"; ranks], ranks + 1), ("tcp", HOSTS[..ranks].to_vec(), 4 * ranks)]
        {
            let mut group = Group::start(&hosts)?;
            for size in SIZES_BYTES {
                let (p50, p99) = group.next_size()?;
                let floor = (size * copies * ranks) as f64 / copy / ranks.min(cores) as f64;
                println!("{ranks:>3} {name:>6} {:>8} {p50:>10.1} {p99:>10.1} {floor:>12.1}", size >> 10);
            }
        }
    }
    Ok(())
}

const HOSTS: [&str; 4] = ["a", "b", "c", "d"];

/// Copying speed of one core for messages in the second-level cache.
fn copy_bytes_per_us() -> f64 {
    let from = vec![1u8; 128 << 10];
    let mut to = vec![0u8; 128 << 10];
    let started = Instant::now();
    let mut copied = 0;
    while started.elapsed() < Duration::from_millis(100) {
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        copied += from.len();
    }
    copied as f64 / started.elapsed().as_secs_f64() / 1e6
}

/// The rank processes of one measurement.
struct Group {
    processes: Vec<Child>,
    /// To each of them.
    inputs: Vec<ChildStdin>,
    /// Rank 0 reports.
    report: BufReader<ChildStdout>,
}

impl Group {
    fn start(hosts: &[&str]) -> Result<Self, Failure> {
        let mut processes = Vec::new();
        let mut inputs = Vec::new();
        let mut outputs = Vec::new();
        for rank in 0..hosts.len() {
            let mut process = Command::new(std::env::current_exe()?)
                .args([RANK, &rank.to_string(), &hosts.join(",")])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            inputs.push(process.stdin.take().ok_or("no stdin")?);
            outputs.push(BufReader::new(process.stdout.take().ok_or("no stdout")?));
            processes.push(process);
        }
        let mut addresses = Vec::new();
        for output in &mut outputs {
            addresses.push(read_line(output)?);
        }
        for input in &mut inputs {
            writeln!(input, "{}", addresses.join(" "))?;
        }
        Ok(Self { processes, inputs, report: outputs.swap_remove(0) })
    }

    /// Median and 99th percentile of the next size, µs.
    fn next_size(&mut self) -> Result<(f64, f64), Failure> {
        let line = read_line(&mut self.report)?;
        let (p50, p99) = line.split_once(' ').ok_or_else(|| format!("rank 0 reported {line:?}"))?;
        Ok((p50.parse()?, p99.parse()?))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Without its input a rank that is through ends; one that hangs meets its timeouts.
        self.inputs.clear();
        for process in &mut self.processes {
            let _ = process.wait();
        }
    }
}

fn run_rank(rank: &str, hosts: &str) -> Result<(), Failure> {
    let listener = listen(IpAddr::V4(Ipv4Addr::LOCALHOST))?;
    println!("{}", listener.address());
    let addresses = read_line(&mut std::io::stdin().lock())?;
    let mut peers = Vec::new();
    for (rank, (host, address)) in hosts.split(',').zip(addresses.split(' ')).enumerate() {
        peers.push(Peer { host: host.to_owned(), address: address.parse()?, leaves: rank..rank + 1 });
    }
    let config = Config {
        rank: rank.parse()?,
        leaves: peers.len(),
        peers,
        secret: [0; 32].into(),
        epoch: 1,
        threads: 1,
        meet_timeout: Duration::from_secs(10),
        timeout: Duration::from_secs(10),
    };
    let mut collective = connect(&config, &listener, &AbortHandle::new())?;
    for size in SIZES_BYTES {
        let partials = vec![1.0; size / size_of::<f32>()];
        let mut out = partials.clone();
        let calls = (VOLUME_BYTES / size).clamp(CALLS_MIN, CALLS_MAX);
        let mut times_us = Vec::with_capacity(calls);
        for _ in 0..calls {
            let started = Instant::now();
            collective.all_reduce(&partials, &mut out)?;
            times_us.push(started.elapsed().as_secs_f64() * 1e6);
        }
        // The first tenth warms up.
        let measured = &mut times_us[calls / 10..];
        measured.sort_by(f64::total_cmp);
        if collective.rank() == 0 {
            println!("{} {}", measured[measured.len() / 2], measured[measured.len() * 99 / 100]);
        }
    }
    collective.barrier()?;
    Ok(())
}

fn read_line(from: &mut impl BufRead) -> Result<String, Failure> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Err("a rank ended early".into());
    }
    Ok(line.trim().to_owned())
}
