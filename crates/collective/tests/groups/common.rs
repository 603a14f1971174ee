//! Groups on loopback.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use galerne_collective::{
    AbortHandle, CollectiveError, Config, CpuCollective, Listener, Peer, connect, listen,
};

/// A value of leaf `leaf`, such that sums in different orders differ.
pub(crate) fn leaf_value(leaf: usize, index: usize) -> f32 {
    let mixed = (leaf * 7_919 + index * 104_729 + 13) % 65_521;
    (mixed as f32 - 32_760.0) * 1.1f32.powi((mixed % 61) as i32 - 30)
}

/// Ranks on the given hosts, with S/N leaves each and a listener each.
pub(crate) fn group(hosts: &[&str], leaves: usize) -> (Vec<Config>, Vec<Arc<Listener>>) {
    let listeners: Vec<_> =
        hosts.iter().map(|_| Arc::new(listen(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap())).collect();
    let each = leaves / hosts.len();
    let peers: Vec<_> = hosts
        .iter()
        .zip(&listeners)
        .enumerate()
        .map(|(rank, (host, listener))| Peer {
            host: (*host).to_owned(),
            address: listener.address(),
            leaves: rank * each..(rank + 1) * each,
        })
        .collect();
    let configs = (0..hosts.len()).map(|rank| Config {
        rank,
        leaves,
        peers: peers.clone(),
        secret: [7; 32].into(),
        epoch: 42,
        threads: 1,
        meet_timeout: Duration::from_secs(20),
        timeout: Duration::from_secs(20),
    });
    (configs.collect(), listeners)
}

/// Runs each rank in a thread, met or not, and gives their results in rank order.
pub(crate) fn run<T: Send>(
    configs: &[Config],
    listeners: &[Arc<Listener>],
    rank: impl Fn(Result<CpuCollective, CollectiveError>) -> T + Sync,
) -> Vec<T> {
    thread::scope(|scope| {
        let ranks: Vec<_> = configs
            .iter()
            .zip(listeners)
            .map(|(config, listener)| scope.spawn(|| rank(connect(config, listener, &AbortHandle::new()))))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}
