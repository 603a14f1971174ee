//! One group over two hosts: network namespaces joined by a bridge, everything started by hand.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{self, Process};
use crate::setup::{self, Etcd};

/// Two hosts and a third for etcd and the router, on one bridge inside the third; gone when dropped.
pub(crate) struct Network {
    names: [String; 3],
}

pub(crate) const ADDRESSES: [&str; 3] = ["10.213.0.1", "10.213.0.2", "10.213.0.3"];

impl Network {
    /// `tag` tells it from those of other tests: a letter.
    pub(crate) fn new(tag: char) -> Self {
        let names = ["hub", "a", "b"].map(|name| format!("galerne-{}{tag}-{name}", std::process::id()));
        let network = Self { names };
        for name in &network.names {
            ip(&["netns", "add", name]);
            ip(&["-n", name, "link", "set", "lo", "up"]);
        }
        let [hub, hosts @ ..] = &network.names;
        ip(&["-n", hub, "link", "add", "bridge0", "type", "bridge"]);
        ip(&["-n", hub, "addr", "add", &format!("{}/24", ADDRESSES[0]), "dev", "bridge0"]);
        ip(&["-n", hub, "link", "set", "bridge0", "up"]);
        for (host, (port, address)) in hosts.iter().zip(["port-a", "port-b"].iter().zip(&ADDRESSES[1..])) {
            ip(&["-n", hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host]);
            ip(&["-n", hub, "link", "set", port, "master", "bridge0", "up"]);
            ip(&["-n", host, "addr", "add", &format!("{address}/24"), "dev", "eth0"]);
            ip(&["-n", host, "link", "set", "eth0", "up"]);
        }
        network
    }

    /// The command that runs `program` on host `place`.
    pub(crate) fn on(&self, place: usize, program: PathBuf) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[place]]).arg(program);
        command
    }

    /// Cuts host `place`, 1 or 2, off from all others, or joins it again.
    pub(crate) fn cut(&self, place: usize, off: bool) {
        let port = ["port-a", "port-b"][place - 1];
        ip(&["-n", &self.names[0], "link", "set", port, if off { "down" } else { "up" }]);
    }

    /// Runs `task` in a thread that has moved to host `place`.
    pub(crate) fn inside(&self, place: usize, task: impl FnOnce() + Send) {
        let namespace = File::open(Path::new("/run/netns").join(&self.names[place])).expect("a namespace");
        std::thread::scope(|scope| {
            let moved = scope.spawn(move || {
                // SAFETY: the descriptor is open; only this thread, and those it starts, change their network.
                let changed = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(changed, 0, "setns: {}", std::io::Error::last_os_error());
                task();
            });
            moved.join().expect("no panic inside the namespace");
        });
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            Command::new("ip").args(["netns", "delete", name]).status().ok();
        }
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().expect("ip: run `make test`, which installs it");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments:?} (this test needs root): {error}");
}

#[test]
fn two_ranks_in_two_network_namespaces_answer_the_golden_tokens_over_tcp() {
    let network = Network::new('h');
    let galerne = || PathBuf::from(setup::galerne().get_program());
    let etcd = Etcd::start_with(network.on(0, Etcd::program()), ADDRESSES[0]);
    let mut workers = Vec::new();
    for place in [1, 2] {
        let mut command = network.on(place, galerne());
        command.args([
            "worker",
            "--tp",
            "2",
            "--ranks",
            "1",
            "--bind",
            ADDRESSES[place],
            "--kv-dtype",
            "f32",
        ]);
        command.args(["--etcd", &etcd.endpoint, "--model"]);
        workers.push(Process::start(command.arg(setup::bard())));
    }
    let mut command = network.on(0, galerne());
    command.args([
        "router",
        "--http",
        "127.0.0.1:0",
        "--grpc",
        "127.0.0.1:0",
        "--etcd",
        &etcd.endpoint,
        "--model",
    ]);
    let router = Process::start(command.arg(setup::bard()));
    let line = router.line_with("gRPC on ");
    let grpc = line.rsplit(' ').next().expect("an address").to_owned();

    // The router's port is inside the hub: ask from there.
    let golden = setup::bard_golden();
    network.inside(0, || {
        let fleet = process::eventually("a group of two hosts", || {
            let fleet = setup::fleet(&grpc).ok()?;
            fleet.groups.iter().any(|group| group.state == "ready").then_some(fleet)
        });
        let ranks: Vec<&str> = fleet.groups[0].ranks.iter().map(|rank| rank.id.as_str()).collect();
        assert_eq!(ranks, [format!("{}/0", ADDRESSES[1]), format!("{}/0", ADDRESSES[2])]);
        for (prompt, expected, comparable) in &golden {
            let tokens = setup::greedy(&grpc, prompt, expected.len() as u32).expect("an answer");
            assert_eq!(tokens[..*comparable], expected[..*comparable]);
        }
    });
}
