//! Ranks that are processes of their own, as in a cluster: only between these does memory have to be mapped.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

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
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for rank in &mut self.0 {
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
        let found = together(gpus, path, quick, world_size)?;
        let met = gpus.emulate || found["by_memory"] == true; // emulators of different processes have no memory in common
        report.tell(&json!({
            "part": "processes", "name": format!("{}: {world_size} processes", checkpoint.name()),
            "ok": met && found["digest"] == digest(&alone), "by_memory": found["by_memory"],
        }));
    }
    Ok(())
}

/// What rank 0 of so many tells.
fn together(gpus: &Gpus, path: &Path, quick: bool, world_size: usize) -> Outcome<Value> {
    let mut ranks = Ranks(Vec::new());
    for rank in 0..world_size {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("rank").arg(path).args(["--of", &world_size.to_string(), "--rank", &rank.to_string()]);
        command.args(gpus.emulate.then_some("--emulate")).args(quick.then_some("--quick"));
        ranks.0.push(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
    }
    let mut tells: Vec<_> =
        ranks.0.iter_mut().map(|rank| BufReader::new(rank.stdout.take().expect("piped"))).collect();
    let mut addresses = String::new();
    for tell in &mut tells {
        tell.read_line(&mut addresses)?;
    }
    for rank in &mut ranks.0 {
        rank.stdin.take().expect("piped").write_all(addresses.as_bytes())?;
    }
    let mut found = Vec::new();
    for (tell, rank) in tells.iter_mut().zip(&mut ranks.0) {
        let mut line = String::new();
        tell.read_line(&mut line)?;
        found.push(serde_json::from_str(&line)?);
        let ended = rank.wait()?;
        if !ended.success() {
            return Err(format!("a rank ended with {ended}").into());
        }
    }
    Ok(found.swap_remove(0))
}

/// One of them: says where it listens, is told where all do, and tells what it found.
pub(crate) fn rank(gpus: &Gpus, path: &Path, quick: bool, rank: usize, world_size: usize) -> Outcome<()> {
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
    Ok(model.close()?)
}
