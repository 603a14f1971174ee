//! What goes wrong, as the seed will have it.

use etcd_client::{Client, ConnectOptions};
use galerne_coord::limits::{DIAL_DEADLINE, PING_DEADLINE, PING_INTERVAL};
use galerne_tls::Way;
use galerne_types::Epoch;
use galerne_wire::v1;
use galerne_wire::v1::engine_client::EngineClient;
use galerne_wire::v1::rank_client::RankClient;
use galerne_wire::{show_epoch, show_secret};
use tonic::Request;
use tonic::transport::Endpoint;

use super::STORE_HOST;
use super::compute::Ill;
use super::net::Host;
use super::world::{Deed, Role, World};

/// A scenario: which kinds of faults there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scenario {
    /// Leaders, followers and spares are killed.
    Kills,
    /// Processes, or whole machines, stand still for a while and go on.
    Stops,
    /// Links are cut, in one direction or both, and machines lose power.
    Partitions,
    /// etcd is away, for one or for all; it forgets history, loses connections and leases.
    Store,
    /// Links are slow, etcd's to some more than to others.
    Delays,
    /// Routers are killed, and groups with them.
    Routers,
    /// Ranks hang in a step, compute something else, or are slow.
    Ills,
    /// All of these.
    Everything,
}

pub(super) const SCENARIOS: [Scenario; 8] = [
    Scenario::Kills,
    Scenario::Stops,
    Scenario::Partitions,
    Scenario::Store,
    Scenario::Delays,
    Scenario::Routers,
    Scenario::Ills,
    Scenario::Everything,
];

/// Something goes wrong.
pub(super) fn strike(world: &mut World, scenario: Scenario) {
    if world.dice.one_in(3) {
        ghost(world);
    }
    let kind = match scenario {
        Scenario::Everything => {
            let one = SCENARIOS[..7].to_vec();
            *world.dice.pick(&one).expect("there are some")
        }
        one => one,
    };
    match kind {
        Scenario::Kills => kill_rank(world),
        Scenario::Stops => stop(world),
        Scenario::Partitions => part(world),
        Scenario::Store => trouble_store(world),
        Scenario::Delays => delay(world),
        Scenario::Ills => sicken(world),
        Scenario::Routers | Scenario::Everything => {
            if world.dice.one_in(3) {
                kill_rank(world);
            } else {
                let running = pids(world, |role| matches!(role, Role::Router(_)));
                if let Some(pid) = world.dice.pick(&running).copied() {
                    world.kill(pid);
                }
            }
        }
    }
}

/// All is well again; a rank that hangs or errs must still be found. One that is slow is found by its fellows: not if it has
/// none, or if they are slow, too.
pub(super) fn heal(world: &mut World) {
    world.net.mend_all();
    world.ills.quicken();
    world.still.clear();
    for pid in pids(world, |_| true) {
        world.let_go_on(pid);
    }
}

fn pids(world: &World, role: impl Fn(Role) -> bool) -> Vec<u32> {
    world.processes.iter().filter(|(_, process)| role(process.role)).map(|(pid, _)| *pid).collect()
}

fn kill_rank(world: &mut World) {
    let ranks = pids(world, |role| matches!(role, Role::Rank(_)));
    if let Some(pid) = world.dice.pick(&ranks).copied() {
        world.kill(pid);
    }
}

fn stop(world: &mut World) {
    let ranks = pids(world, |role| matches!(role, Role::Rank(_)));
    let Some(pid) = world.dice.pick(&ranks).copied() else { return };
    let for_ms = 300 + world.dice.roll(6_000);
    if world.dice.one_in(2) {
        return world.stop(pid, for_ms);
    }
    // The whole machine: nobody there notices.
    let host = world.processes[&pid].host;
    world.still.insert(host);
    world.after(for_ms, Deed::Stir(host));
    let there: Vec<u32> =
        world.processes.iter().filter(|(_, p)| p.host == host).map(|(pid, _)| *pid).collect();
    there.into_iter().for_each(|pid| world.stop(pid, for_ms));
}

/// Machines of ranks and routers, each once.
fn machines(world: &World) -> Vec<Host> {
    let ranks = world.places.iter().map(|place| place.host);
    let mut hosts: Vec<Host> = ranks.chain(world.routers.iter().map(|router| router.host)).collect();
    hosts.sort_unstable();
    hosts.dedup();
    hosts
}

fn part(world: &mut World) {
    let hosts = machines(world);
    let pick = |world: &mut World| *world.dice.pick(&hosts).expect("there are some");
    let (one, mut other) = (pick(world), pick(world));
    let for_ms = 300 + world.dice.roll(5_000);
    match world.dice.roll(6) {
        0 => {
            // It loses power: whoever has talked with it hears nothing until it is back, without its processes.
            world.net.darken(one, true);
            let there: Vec<u32> =
                world.processes.iter().filter(|(_, p)| p.host == one).map(|(pid, _)| *pid).collect();
            there.into_iter().for_each(|pid| world.kill(pid));
            world.after(for_ms, Deed::Lighten(one));
            return;
        }
        1 => other = STORE_HOST,
        _ => {}
    }
    if one == other {
        // Alone.
        for other in hosts.into_iter().chain([STORE_HOST]).filter(|other| *other != one) {
            cut(world, one, other, for_ms);
            cut(world, other, one, for_ms);
        }
        return;
    }
    cut(world, one, other, for_ms);
    if world.dice.one_in(2) {
        cut(world, other, one, for_ms);
    }
}

fn cut(world: &mut World, from: Host, to: Host, for_ms: u64) {
    world.ledger.tell(|| format!("nothing goes from host {from} to {to} for {for_ms} ms"));
    world.net.cut(from, to);
    world.after(for_ms, Deed::Mend(from, to));
}

fn trouble_store(world: &mut World) {
    let for_ms = 300 + world.dice.roll(7_000);
    let turn = world.dice.next();
    match world.dice.roll(6) {
        0 => {
            for host in machines(world) {
                cut(world, host, STORE_HOST, for_ms);
                cut(world, STORE_HOST, host, for_ms);
            }
        }
        1 => {
            let stores = pids(world, |role| role == Role::Store);
            stores.into_iter().for_each(|pid| world.stop(pid, for_ms));
        }
        2 => {
            let one_in = 1 + world.dice.roll(3);
            world.ledger.tell(|| format!("etcd loses one connection of {one_in}"));
            world.net.reset(STORE_HOST, one_in);
        }
        3 => {
            world.ledger.tell(|| "etcd forgets its history".to_owned());
            world.errand(STORE_HOST, |way| async move { drop(compact(way).await) });
        }
        _ => {
            world.ledger.tell(|| "a lease is lost".to_owned());
            world.errand(STORE_HOST, move |way| async move { drop(revoke(way, turn).await) });
        }
    }
}

async fn operator(way: Way) -> Result<Client, etcd_client::Error> {
    let channel = way.connect_lazy(&super::store_endpoint());
    Client::from_channel(etcd_client::Channel::Tonic(channel), Some(ConnectOptions::new())).await
}

async fn compact(way: Way) -> Result<(), etcd_client::Error> {
    let mut client = operator(way).await?;
    let answer = client.get("/", None).await?;
    let revision = answer.header().map_or(0, |header| header.revision());
    client.compact(revision, None).await.map(drop)
}

async fn revoke(way: Way, turn: u64) -> Result<(), etcd_client::Error> {
    let mut client = operator(way).await?;
    let mut leases: Vec<i64> = client.leases().await?.leases().iter().map(|lease| lease.id()).collect();
    leases.sort_unstable();
    if !leases.is_empty() {
        client.lease_revoke(leases[(turn % leases.len() as u64) as usize]).await?;
    }
    Ok(())
}

fn delay(world: &mut World) {
    let mut hosts = machines(world);
    hosts.push(STORE_HOST);
    let one = *world.dice.pick(&hosts).expect("there are some");
    // Mostly etcd's links: what it tells reaches some earlier than others.
    let other = if world.dice.one_in(2) { STORE_HOST } else { *world.dice.pick(&hosts).expect("some") };
    let (ms, for_ms) = (10 + world.dice.roll(250), 1_000 + world.dice.roll(5_000));
    world.ledger.tell(|| format!("between hosts {one} and {other} it takes up to {ms} ms for {for_ms} ms"));
    world.net.slow(one, other, ms);
    world.net.slow(other, one, ms);
    world.after(for_ms, Deed::Quicken(one, other));
}

fn sicken(world: &mut World) {
    let ranks = pids(world, |role| matches!(role, Role::Rank(_)));
    let Some(pid) = world.dice.pick(&ranks).copied() else { return };
    let ill = match world.dice.roll(3) {
        0 => Ill::Hangs,
        1 => Ill::Errs,
        _ => Ill::Slow(12 + world.dice.roll(20) as u32),
    };
    world.ledger.tell(|| format!("process {pid} is ill: {ill:?}"));
    world.ills.strike(pid, ill);
}

/// Somebody out of an epoch that is over, whom nobody has told, gives orders to the processes that have begun a newer one, and
/// asks them to serve. Nobody may listen.
fn ghost(world: &mut World) {
    let epochs = world.ledger.epochs();
    let Some((new, record)) = world.dice.pick(&epochs).cloned() else { return };
    let before = epochs.iter().filter(|(epoch, old)| *epoch < new && old.group == record.group);
    let Some((old, stale)) = world.dice.pick(&before.collect::<Vec<_>>()).copied().cloned() else { return };
    world.ledger.tell(|| format!("a ghost of epoch {old} comes to those of epoch {new}"));
    for member in record.members {
        let (ledger, secret) = (world.ledger.clone(), stale.secret.clone());
        let endpoint = Endpoint::from_shared(format!("http://{}", member.address)).expect("an address");
        world.errand(STORE_HOST, move |way| async move {
            let Ok(channel) = way.connect(&endpoint).await else { return };
            if ledger.newest(member.pid).is_none_or(|newest| newest < new) {
                return;
            }
            let order = v1::Step { epoch: old, number: 1, ..v1::Step::default() };
            let mut orders = Request::new(tokio_stream::iter([order]));
            show_secret(&mut orders, &secret).expect("a secret is a header's value");
            let obeyed = RankClient::new(channel.clone()).follow(orders).await.is_ok();
            let mut asks = Request::new(tokio_stream::empty::<v1::Ask>());
            show_secret(&mut asks, &secret).expect("a secret is a header's value");
            show_epoch(&mut asks, Epoch(old));
            let served = EngineClient::new(channel).serve(asks).await.is_ok();
            if obeyed || served {
                ledger.wrong(&format!("process {} listens to epoch {old} in {new}", member.pid));
            }
        });
    }
}

/// How etcd's clients keep their connections, as `etcd-client` would.
pub(super) fn kept(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(DIAL_DEADLINE)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_DEADLINE)
        .keep_alive_while_idle(false)
}
