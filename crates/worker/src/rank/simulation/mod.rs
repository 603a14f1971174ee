//! The real ranks, coordination and routers in virtual time, over a network and on machines that fail as a seed says: epochs,
//! leases and watches of `coord` against its own store, leaders and followers over gRPC, routers with their probes, links and
//! replays, clients that know every token that is due to them. Simulated is what has threads or processes of its own: the
//! compute thread with the collective (`compute`, on the model of `toy`) and the supervisor (`world`). What has no token of its
//! own but its law is checked at each event (`ledger`, `clients`).
//!
//! A seed is played in a process that plays nothing else, and there it replays exactly: clocks and random bytes are the
//! simulation's (`machine`), whoever asks for them.

mod clients;
mod compute;
mod faults;
mod ledger;
mod machine;
mod net;
mod toy;
mod world;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use galerne_coord::{Coord, CoordError};
use galerne_sched::Cost;
use galerne_tls::Way;
use galerne_types::{Compute, GroupId, KvDtype};
use tonic::transport::Endpoint;

use super::setup::Setup;
use crate::options::{Device, KvSize, RankOptions};
use crate::supervisor::COORD_TIMEOUT;
use faults::{SCENARIOS, Scenario};
use machine::Dice;
use net::Host;
use world::World;

/// The machine and the address of etcd.
const STORE_HOST: Host = 0;
const STORE: &str = "10.0.0.1:2379";

/// So long things go wrong, in virtual milliseconds.
const FAULTS_MS: u64 = 9_000;
/// From then on everything must be well after so long.
const HEALED_MS: u64 = 60_000;
/// Seeds that one process plays, one after the other.
const BATCH: u64 = 16;
/// Seeds that are played where nobody asks for more.
const SEEDS: u64 = 2_000;
/// Set for a process that plays seeds: the first one, and how many.
const PLAY: &str = "GALERNE_PLAY";

/// What there is at the beginning.
struct Shape {
    /// One a rank.
    setups: Vec<Arc<Setup>>,
    routers: Vec<Host>,
    /// How many ranks each group should have.
    sizes: BTreeMap<GroupId, usize>,
    clients: u64,
    scenario: Scenario,
}

/// Rank options are checked against the same files again and again: once is enough.
type Setups = BTreeMap<(String, Host, u16, usize), Arc<Setup>>;

fn model() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/bard-1m"))
}

fn options(group: &str, host: Host, index: u16, world_size: usize) -> RankOptions {
    RankOptions {
        model: model(),
        model_name: None,
        cluster: "c".into(),
        group: GroupId(group.into()),
        world_size,
        virtual_shards: None,
        quantize: None,
        compute: Some(Compute::F32),
        fast: false,
        kv_dtype: KvDtype::F32,
        device: Device::Cpu,
        gpu_memory_utilization: 0.9,
        host: format!("h{host}"),
        index,
        bind: [127, 0, 0, 1].into(),
        etcd: vec![STORE.into()],
        etcd_access: galerne_coord::EtcdAccess::default(),
        cluster_tls: None,
        threads: 1,
        processor: crate::Processor::default(),
        kv: KvSize::Blocks(12),
        sequences_max: 4,
        step_tokens_max: 64,
        waiting_requests_max: 64,
        prefix_cache: true,
        speculation: false,
        itl_target_ms: None,
        rehearse: Some(Cost::default()),
    }
}

impl Shape {
    fn new(seed: u64, setups: &mut Setups) -> Self {
        let mut dice = Dice::new(seed ^ 0x5EED);
        let scenario = SCENARIOS[(seed % SCENARIOS.len() as u64) as usize];
        let mut shape = Self {
            setups: Vec::new(),
            routers: vec![4, 5],
            sizes: BTreeMap::new(),
            clients: 4 + dice.roll(5),
            scenario,
        };
        for group in ["g", "f"].iter().take(1 + dice.roll(2) as usize) {
            let size = if *group == "g" { [1, 2, 2, 2, 4][dice.roll(5) as usize] } else { 1 };
            let spares = dice.roll(2) as usize;
            shape.sizes.insert(GroupId((*group).to_owned()), size);
            for index in 0..size + spares {
                let host = 1 + (dice.roll(3) as Host);
                let key = ((*group).to_owned(), host, index as u16, size);
                let setup = setups.entry(key).or_insert_with(|| {
                    let options = options(group, host, index as u16, size);
                    Arc::new(Setup::open(options).expect("a rank may be set up so"))
                });
                shape.setups.push(setup.clone());
            }
        }
        shape
    }
}

fn store_endpoint() -> Endpoint {
    faults::kept(Endpoint::from_static("http://10.0.0.1:2379"))
}

/// A connection to etcd.
async fn connect(way: &Way) -> Result<Coord, CoordError> {
    Coord::over(way.connect_lazy(&store_endpoint()), "c", COORD_TIMEOUT).await
}

/// Plays a seed; says what was wrong, and in a word each what has happened: a digest of it, and when all was well.
fn play(seed: u64, setups: &mut Setups, tells: bool) -> (Vec<String>, String) {
    let shape = Shape::new(seed, setups);
    let mut world = World::new(seed, &shape, tells);
    let mut arrivals: Vec<u64> = (0..shape.clients).map(|_| world.dice.roll(FAULTS_MS)).collect();
    let mut strikes: Vec<u64> =
        (0..2 + world.dice.roll(10)).map(|_| 1_000 + world.dice.roll(FAULTS_MS - 1_000)).collect();
    let mut healed = false;
    loop {
        world.step();
        let now = world.now;
        arrivals.retain(|due| {
            if *due <= now {
                world.clients.add(&mut world.dice);
            }
            *due > now
        });
        let due = strikes.iter().filter(|due| **due <= now).count();
        strikes.retain(|due| *due > now);
        (0..due).for_each(|_| faults::strike(&mut world, shape.scenario));
        if now >= FAULTS_MS && !healed {
            faults::heal(&mut world);
            healed = true;
        }
        if !world.ledger.wrongs().is_empty() {
            break;
        }
        if healed && world.clients.all_ended() && world.ledger.is_whole(&shape.sizes) {
            break;
        }
        if now > FAULTS_MS + HEALED_MS {
            world.ledger.wrong(&format!(
                "after {HEALED_MS} ms without a fault: whole is {}, open are {:?}",
                world.ledger.is_whole(&shape.sizes),
                world.clients.open()
            ));
            break;
        }
    }
    for panic in std::mem::take(&mut *PANICS.lock().unwrap_or_else(PoisonError::into_inner)) {
        world.ledger.wrong(&panic);
    }
    let (ledger, scenario, ended) = (world.ledger.clone(), shape.scenario, world.now);
    drop(world);
    let outcome = (ledger.wrongs(), format!("{:016x} {ended}", ledger.digest()));
    if tells {
        ledger.story().iter().for_each(|line| println!("{line}"));
        println!("seed {seed}: {scenario:?}, {outcome:?}");
    }
    outcome
}

static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// What a process that was started by [`groups_and_streams_outlive_what_fails`] does: it plays seeds in order. Run by hand, it
/// tells the story of one.
#[test]
fn play_seeds() {
    let Ok(asked) = std::env::var(PLAY) else { return };
    let mut numbers = asked.split(',').map(|number| number.parse::<u64>().expect("FIRST,COUNT[,SEED]"));
    let (first, count) = (numbers.next().expect("the first seed"), numbers.next().expect("how many"));
    let told = numbers.next();
    std::panic::set_hook(Box::new(|info| {
        eprintln!("{info}");
        PANICS.lock().unwrap_or_else(PoisonError::into_inner).push(info.to_string());
    }));
    if told.is_some() {
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_ansi(false)
            .with_writer(std::io::stderr)
            .init();
    }
    println!(); // behind what the harness has written
    machine::begin(first);
    let (mut setups, began) = (Setups::new(), machine::real_now());
    for seed in first..first + count {
        let (wrongs, happened) = play(seed, &mut setups, told == Some(seed));
        println!("seed {seed} {happened} {}", wrongs.join("; "));
    }
    println!("{count} seeds in {:?}", machine::real_now() - began);
}

/// Plays `count` seeds from `first` on in a process of their own; a line for each.
fn batch(first: u64, count: u64) -> Vec<String> {
    let program = std::env::current_exe().expect("this test's own file");
    let played = Command::new(program)
        .args(["rank::simulation::play_seeds", "--exact", "--nocapture", "--test-threads=1"])
        .env(PLAY, format!("{first},{count}"))
        .output()
        .expect("a process that plays seeds");
    let out = String::from_utf8_lossy(&played.stdout).into_owned();
    let lines: Vec<String> =
        out.lines().filter(|line| line.starts_with("seed ")).map(str::to_owned).collect();
    let says = String::from_utf8_lossy(&played.stderr).into_owned();
    assert!(played.status.success() && lines.len() as u64 == count, "{}: {out} {says}", played.status);
    lines
}

#[test]
fn groups_and_streams_outlive_what_fails() {
    let seeds = std::env::var("GALERNE_SEEDS").map_or(SEEDS, |seeds| seeds.parse().expect("a number"));
    let next = std::sync::atomic::AtomicU64::new(0);
    let wrong = Mutex::new(Vec::new());
    let work = || loop {
        let first = next.fetch_add(BATCH, std::sync::atomic::Ordering::Relaxed);
        if first >= seeds {
            return;
        }
        for line in batch(first, BATCH.min(seeds - first)) {
            let mut words = line.splitn(5, ' ');
            let (seed, says) = (words.nth(1).unwrap_or_default(), words.nth(2).unwrap_or_default());
            if !says.is_empty() {
                let told = format!("{PLAY}={first},{BATCH},{seed} tells its story: {says}");
                wrong.lock().unwrap_or_else(PoisonError::into_inner).push(told);
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    let wrong = wrong.into_inner().unwrap_or_else(PoisonError::into_inner);
    assert!(wrong.is_empty(), "{} seeds went wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_seed_replays_exactly() {
    assert_eq!(batch(0, SCENARIOS.len() as u64), batch(0, SCENARIOS.len() as u64));
}
