//! Ranks that are processes of their own, as in a cluster: only between these does memory have to be mapped.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use galerne_collective::{AbortHandle, Config, Peer, connect, listen};
use galerne_model::Rank;
use galerne_model::gpu::Link;
use galerne_types::Shards;
use serde_json::{Value, json};

use crate::check::Script;
use crate::device::Gpus;
use crate::ranks::{Drawn, TIMEOUT, Way, load, load_group, open, run, run_on, virtual_shards};
use crate::{Outcome, Report};

/// Processes that end with this value.
struct Ranks(Vec<(Child, BufReader<ChildStdout>)>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for (rank, _) in &mut self.0 {
            let _ = (rank.kill(), rank.wait());
        }
    }
}

/// What was drawn, and the bits of logits.
fn digest(drawn: &Drawn) -> String {
    let mut digest = DefaultHasher::new();
    for (key, (id, row)) in drawn {
        let bits: Vec<u32> = row.iter().map(|x| x.to_bits()).collect();
        (key, id, bits).hash(&mut digest);
    }
    format!("{:016x}", digest.finish())
}

/// Two and four of them draw what one does.
pub(crate) fn check(gpus: &Gpus, path: &Path, quick: bool, report: &mut Report) -> Outcome<()> {
    let checkpoint = open(path)?;
    let script = Script::new(checkpoint.config(), quick);
    let alone = run(&load_group(gpus, &checkpoint, 1)?, &script.options, &script.alone, true)?;
    for world_size in [2, 4] {
        let found = Ranks::start(gpus, path, quick, world_size, false)?.found()?;
        let met = gpus.emulate || found["by_memory"] == true; // emulators of different processes have no memory in common
        report.tell(&json!({
            "part": "processes", "name": format!("{}: {world_size} processes", checkpoint.name()),
            "ok": met && found["digest"] == digest(&alone), "by_memory": found["by_memory"],
        }));
    }
    let (out, says) = Ranks::start(gpus, path, quick, 2, true)?.killed()?;
    report.tell(&json!({
        "part": "stopped", "name": "a process is killed", "ok": !says.is_empty() && out <= OUT_MAX, "due_ms": 0.0,
        "out_ms": out.as_secs_f64() * 1e3, "says": says, "process_must_exit": Value::Null,
    }));
    Ok(())
}

/// How long after another is killed a rank may take to be out of its step, and of the epoch.
const OUT_MAX: Duration = Duration::from_millis(500);

impl Ranks {
    /// So many, which have met; `on` has them go on for ever.
    fn start(gpus: &Gpus, path: &Path, quick: bool, world_size: usize, on: bool) -> Outcome<Self> {
        let (mut ranks, mut addresses) = (Self(Vec::new()), String::new());
        for rank in 0..world_size {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg("rank").arg(path).args([
                "--of",
                &world_size.to_string(),
                "--rank",
                &rank.to_string(),
            ]);
            let flags = [("--emulate", gpus.emulate), ("--quick", quick), ("--on", on)];
            command.args(flags.into_iter().filter(|(_, on)| *on).map(|(flag, _)| flag));
            let mut rank = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            let tells = BufReader::new(rank.stdout.take().expect("piped"));
            ranks.0.push((rank, tells));
        }
        for (_, tells) in &mut ranks.0 {
            tells.read_line(&mut addresses)?;
        }
        for (rank, _) in &mut ranks.0 {
            rank.stdin.take().expect("piped").write_all(addresses.as_bytes())?;
        }
        Ok(ranks)
    }

    fn told(&mut self, rank: usize) -> Outcome<Value> {
        let mut line = String::new();
        self.0[rank].1.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// What rank 0 tells; all of them must end well.
    fn found(mut self) -> Outcome<Value> {
        let found = (0..self.0.len()).map(|rank| self.told(rank)).collect::<Outcome<Vec<_>>>()?;
        for (rank, _) in &mut self.0 {
            let ended = rank.wait()?;
            if !ended.success() {
                return Err(format!("a rank ended with {ended}").into());
            }
        }
        Ok(found[0].clone())
    }

    /// Kills the last one in the midst of its steps: how long the first takes to be out, and what it says.
    fn killed(mut self) -> Outcome<(Duration, String)> {
        (0..self.0.len()).try_for_each(|rank| self.told(rank).map(drop))?;
        thread::sleep(GO_ON);
        let start = Instant::now();
        self.0.last_mut().ok_or("a rank")?.0.kill()?;
        let says = self.told(0)?["says"].as_str().unwrap_or_default().to_owned();
        Ok((start.elapsed(), says))
    }
}

/// How long steps go on before somebody is killed.
const GO_ON: Duration = Duration::from_millis(300);

/// One of them: says where it listens, is told where all do, and tells what it found.
pub(crate) fn rank(
    gpus: &Gpus,
    path: &Path,
    (quick, on): (bool, bool),
    (rank, world_size): (usize, usize),
) -> Outcome<()> {
    let checkpoint = open(path)?;
    let shards = Shards::new(virtual_shards(&checkpoint), world_size)?;
    let weights = load(gpus, &checkpoint, shards, rank, &gpus.open()?)?;
    let listener = listen(IpAddr::V4(Ipv4Addr::LOCALHOST))?;
    println!("{}", listener.address());
    let peer = |(rank, address): (usize, std::io::Result<String>)| -> Outcome<Peer> {
        let address: SocketAddr = address?.parse()?;
        Ok(Peer { host: "here".to_owned(), address, leaves: shards.of_rank(rank) })
    };
    let peers = (0..).zip(std::io::stdin().lines()).map(peer).collect::<Outcome<Vec<_>>>()?;
    let config = Config {
        rank,
        leaves: shards.virtual_shards(),
        peers,
        secret: [0; 32].into(),
        epoch: 1,
        threads: 1,
        meet_timeout: TIMEOUT,
        timeout: TIMEOUT,
    };
    let mut collective = connect(&config, &listener, &AbortHandle::new())?;
    let peers = Way::peers(&weights, &mut collective, TIMEOUT)?;
    let by_memory = peers.is_some();
    let script = Script::new(checkpoint.config(), quick);
    let link = Link::host().beside(peers);
    let mut model = Rank::on_gpu(Arc::clone(&weights), &script.options, Box::new(collective), link)?;
    let drawn = run_on(&mut model, &script.alone, true)?;
    // The other ranks end with this one, so nobody leaves before all are here.
    model.meet()?;
    println!("{}", json!({ "digest": digest(&drawn), "by_memory": by_memory }));
    if !on {
        return Ok(model.close()?);
    }
    let says = loop {
        if let Err(error) = run_on(&mut model, &script.alone, false) {
            break error.to_string();
        }
    };
    model.close()?;
    println!("{}", json!({ "says": says }));
    Ok(())
}
