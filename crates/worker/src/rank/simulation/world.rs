//! Machines, processes and supervisors, in virtual time. Every process has a runtime of its own, whose clock stands but when
//! the world lets it go on: for one window after the other, in turn. What a process sends arrives in a later window, so it
//! does not matter who comes first. A process is killed by dropping its runtime, and stopped by leaving it out.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use galerne_tls::Way;
use galerne_types::{GroupId, RankId};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, advance, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Router;

use super::clients::{self, Clients, RouterSeat};
use super::compute::{self, Ills, Meetings, Who};
use super::ledger::Ledger;
use super::machine::{Dice, set_clock};
use super::net::{Host, Net};
use super::{STORE, STORE_HOST, Shape, connect};
use crate::backoff::Backoff;
use crate::error::WorkerError;
use crate::rank::compute::Compute;
use crate::rank::desk::Desk;
use crate::rank::setup::Setup;
use crate::rank::{Parts, run};
use crate::supervisor::COORD_TIMEOUT;

/// How long all processes run before the network is looked at again.
pub(super) const WINDOW_MS: u64 = 5;

/// A supervisor kills a rank that has been silent for so long.
const HANG_MS: u64 = 2_200;

pub(super) struct World {
    pub(super) now: u64,
    pub(super) dice: Dice,
    pub(super) net: Net,
    pub(super) ledger: Ledger,
    pub(super) clients: Clients,
    meetings: Meetings,
    pub(super) ills: Ills,
    pub(super) processes: BTreeMap<u32, Process>,
    last_pid: u32,
    pub(super) places: Vec<Place>,
    pub(super) routers: Vec<RouterPlace>,
    /// Machines that stand still, their supervisors, too.
    pub(super) still: BTreeSet<Host>,
    /// What is to be done, and when.
    deeds: BTreeMap<(u64, u64), Deed>,
    deeds_so_far: u64,
}

pub(super) struct Process {
    pub(super) host: Host,
    pub(super) role: Role,
    runtime: Runtime,
    main: JoinHandle<Result<(), WorkerError>>,
    /// Its clock, and how fast that goes, in millionths.
    clock: Instant,
    local_us: u64,
    rate: u64,
    /// Since when it does not run.
    pub(super) stopped: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Store,
    Rank(usize),
    Router(usize),
    /// Something that is done once.
    Errand,
}

/// Where a supervisor keeps a rank alive.
pub(super) struct Place {
    pub(super) id: RankId,
    pub(super) group: GroupId,
    pub(super) host: Host,
    setup: Arc<Setup>,
    backoff: Backoff,
    pub(super) process: Option<u32>,
    began: u64,
}

pub(super) struct RouterPlace {
    pub(super) host: Host,
    pub(super) process: Option<u32>,
    asks: Option<mpsc::UnboundedSender<usize>>,
}

/// Something that is due.
#[derive(Clone, Copy, Debug)]
pub(super) enum Deed {
    Start(usize),
    StartRouter(usize),
    GoOn(u32),
    Stir(Host),
    Mend(Host, Host),
    Lighten(Host),
    Quicken(Host, Host),
}

impl World {
    pub(super) fn new(seed: u64, shape: &Shape, tells: bool) -> Self {
        let mut dice = Dice::new(seed);
        let ledger = Ledger::new(tells);
        let mut world = Self {
            now: 0,
            net: Net::new(Dice::new(dice.next())),
            clients: Clients::new(ledger.clone()),
            ledger,
            dice,
            meetings: Meetings::default(),
            ills: Ills::default(),
            processes: BTreeMap::new(),
            last_pid: 100,
            places: Vec::new(),
            routers: Vec::new(),
            still: BTreeSet::new(),
            deeds: BTreeMap::new(),
            deeds_so_far: 0,
        };
        world.start_store();
        for setup in &shape.setups {
            let options = &setup.options;
            world.places.push(Place {
                id: options.id(),
                group: options.group.clone(),
                host: options.host[1..].parse().expect("the name of a host ends in its number"),
                setup: setup.clone(),
                backoff: Backoff::new(),
                process: None,
                began: 0,
            });
            world.after(10 * world.places.len() as u64, Deed::Start(world.places.len() - 1));
        }
        for host in &shape.routers {
            world.routers.push(RouterPlace { host: *host, process: None, asks: None });
            world.after(0, Deed::StartRouter(world.routers.len() - 1));
        }
        world
    }

    pub(super) fn after(&mut self, ms: u64, deed: Deed) {
        self.deeds_so_far += 1;
        self.deeds.insert((self.now + ms, self.deeds_so_far), deed);
    }

    /// One window.
    pub(super) fn step(&mut self) {
        self.now += WINDOW_MS;
        self.ledger.set_clock(self.now);
        set_clock(self.now);
        while let Some(entry) = self.deeds.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let deed = entry.remove();
            self.act(deed);
        }
        self.net.carry(self.now);
        self.meetings.carry(&self.net);
        let mut ended = Vec::new();
        for (pid, process) in &mut self.processes {
            if process.stopped.is_none() {
                process.go_on(WINDOW_MS);
                if process.main.is_finished() {
                    ended.push(*pid);
                }
            }
        }
        set_clock(self.now);
        ended.into_iter().for_each(|pid| self.ended(pid));
        self.kill_hung();
        self.ask();
    }

    fn act(&mut self, deed: Deed) {
        match deed {
            Deed::Start(place) => self.start_rank(place),
            Deed::StartRouter(router) => self.start_router(router),
            Deed::GoOn(pid) => self.let_go_on(pid),
            Deed::Stir(host) => drop(self.still.remove(&host)),
            Deed::Mend(from, to) => self.net.mend(from, to),
            Deed::Lighten(host) => self.net.darken(host, false),
            Deed::Quicken(one, other) => {
                self.net.slow(one, other, 0);
                self.net.slow(other, one, 0);
            }
        }
        self.ledger.tell(|| format!("{deed:?}"));
    }

    /// A process that does `main`.
    fn spawn<F>(&mut self, host: Host, role: Role, main: impl FnOnce(u32) -> F) -> u32
    where
        F: Future<Output = Result<(), WorkerError>> + Send + 'static,
    {
        self.last_pid += 1;
        let pid = self.last_pid;
        let mut builder = Builder::new_current_thread();
        builder.enable_time().start_paused(true);
        if matches!(role, Role::Router(_)) {
            builder.enable_io(); // for two listeners that nobody calls
        }
        let runtime = builder.build().expect("a runtime");
        // Clocks go up to a hundredth too fast or too slow.
        let rate = 990_000 + self.dice.roll(20_001);
        let clock = runtime.block_on(async { Instant::now() });
        let main = runtime.spawn(main(pid));
        let local_us = self.now * 1_000;
        let process = Process { host, role, runtime, main, clock, local_us, rate, stopped: None };
        self.processes.insert(pid, process);
        self.ledger.tell(|| format!("process {pid} is {role:?} on host {host}"));
        pid
    }

    fn start_store(&mut self) {
        let net = self.net.clone();
        self.spawn(STORE_HOST, Role::Store, |pid| {
            let connections = net.listen(pid, STORE);
            async move {
                let served = galerne_coord::embedded::serve_connections(connections, std::future::pending());
                Ok(served.await?)
            }
        });
    }

    fn start_rank(&mut self, number: usize) {
        let Place { id, host, setup, .. } = &self.places[number];
        let (id, host, setup) = (id.clone(), *host, setup.clone());
        let (net, ledger) = (self.net.clone(), self.ledger.clone());
        let (meetings, ills) = (self.meetings.clone(), self.ills.clone());
        let pid = self.spawn(host, Role::Rank(number), |pid| {
            let address = format!("10.0.{host}.{number}:{}", 1000 + pid);
            let incoming = net.listen(pid, &address);
            let mut record = setup.record(address);
            (record.pid, record.collective, record.memory_bytes) =
                (pid, format!("10.0.{host}.{number}:1"), 1);
            let way = Way::By(net.dial(host));
            async move {
                let coord = connect(&way).await?;
                let (compute, queue) = Compute::new();
                let who = Who { process: pid, host, ledger, meetings, ills };
                tokio::spawn(compute::compute(who, compute.pulse(), queue));
                let parts = Parts { setup, record, coord, way, compute, desk: Desk::start()?, memory: || 1 };
                let serve = |router: Router, stop: CancellationToken| {
                    router.serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
                };
                run(parts, serve, CancellationToken::new()).await
            }
        });
        let place = &mut self.places[number];
        (place.process, place.began) = (Some(pid), self.now);
        self.ledger.tell(|| format!("rank {id} is process {pid}"));
    }

    fn start_router(&mut self, number: usize) {
        let host = self.routers[number].host;
        let (asks, asked) = mpsc::unbounded_channel();
        let (net, ledger, clients) = (self.net.clone(), self.ledger.clone(), self.clients.clone());
        let pid = self.spawn(host, Role::Router(number), |process| {
            let way = Way::By(net.dial(host));
            let seat = RouterSeat { process, way, ledger, clients, asks: asked };
            async move {
                clients::run(seat).await;
                Ok(())
            }
        });
        let router = &mut self.routers[number];
        (router.process, router.asks) = (Some(pid), Some(asks));
    }

    /// Something that is done once, by a process of its own.
    pub(super) fn errand<F>(&mut self, host: Host, errand: impl FnOnce(Way) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let way = Way::By(self.net.dial(host));
        let errand = errand(way);
        self.spawn(host, Role::Errand, |_| async move {
            let _ = tokio::time::timeout(COORD_TIMEOUT, errand).await;
            Ok(())
        });
    }

    /// Clients that ask nobody ask a router that runs.
    fn ask(&mut self) {
        let running: Vec<usize> =
            (0..self.routers.len()).filter(|n| self.routers[*n].asks.is_some()).collect();
        for client in self.clients.idle() {
            let Some(number) = self.dice.pick(&running).copied() else { return };
            let RouterPlace { process: Some(pid), asks: Some(asks), .. } = &self.routers[number] else {
                continue;
            };
            self.clients.asks(client, *pid);
            let _ = asks.send(client);
        }
    }

    /// Ends a process at once: nothing that it does reaches anybody any more, but what it has sent does.
    pub(super) fn kill(&mut self, pid: u32) {
        let Some(process) = self.processes.remove(&pid) else { return };
        self.ledger.tell(|| format!("process {pid} is killed: {:?}", process.role));
        self.bury(pid, process);
    }

    fn ended(&mut self, pid: u32) {
        let Some(mut process) = self.processes.remove(&pid) else { return };
        let outcome = process.runtime.block_on(&mut process.main);
        let says = match &outcome {
            Ok(Ok(())) => "ends".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(panic) => panic.to_string(),
        };
        self.ledger.tell(|| format!("process {pid}, {:?}: {says}", process.role));
        let is_wrong = match (&outcome, process.role) {
            (Err(_), _) | (_, Role::Store) => true,
            (Ok(Err(error)), _) => matches!(error, WorkerError::Panicked(_) | WorkerError::Hung(_)),
            (Ok(Ok(())), role) => role != Role::Errand,
        };
        if is_wrong {
            self.ledger.wrong(&format!("process {pid}, {:?}: {says}", process.role));
        }
        self.bury(pid, process);
    }

    /// What is left of a process, and what its supervisor does.
    fn bury(&mut self, pid: u32, process: Process) {
        self.meetings.died(pid);
        self.ledger.died(pid);
        self.net.forget(pid);
        let (host, role) = (process.host, process.role);
        set_clock(process.local_us / 1_000);
        drop(process);
        set_clock(self.now);
        match role {
            Role::Store | Role::Errand => {}
            Role::Router(number) => {
                self.clients.freed(pid);
                (self.routers[number].process, self.routers[number].asks) = (None, None);
                let pause = 200 + self.dice.roll(2_000);
                self.after(pause, Deed::StartRouter(number));
            }
            Role::Rank(number) => {
                let place = &mut self.places[number];
                place.process = None;
                let wait = place.backoff.after(Duration::from_millis(self.now - place.began));
                let (group, id) = (place.group.clone(), place.id.clone());
                self.after(u64::try_from(wait.as_millis()).unwrap_or_default(), Deed::Start(number));
                self.errand(host, move |way| async move {
                    if let Ok(coord) = connect(&way).await {
                        let _ = coord.evict(&group, &id, pid).await;
                    }
                });
            }
        }
    }

    /// What a supervisor does about processes that say nothing, unless it stands still itself.
    fn kill_hung(&mut self) {
        let hung = |process: &Process| {
            let is_kept = matches!(process.role, Role::Rank(_)) && !self.still.contains(&process.host);
            let since = process.stopped.filter(|_| is_kept);
            since.is_some_and(|since| self.now - since >= HANG_MS)
        };
        let hung: Vec<u32> = self.processes.iter().filter(|(_, p)| hung(p)).map(|(pid, _)| *pid).collect();
        for pid in hung {
            self.kill(pid);
        }
    }

    pub(super) fn stop(&mut self, pid: u32, for_ms: u64) {
        if let Some(process) = self.processes.get_mut(&pid).filter(|process| process.stopped.is_none()) {
            process.stopped = Some(self.now);
            self.ledger.tell(|| format!("process {pid} is stopped"));
            self.after(for_ms, Deed::GoOn(pid));
        }
    }

    pub(super) fn let_go_on(&mut self, pid: u32) {
        let now = self.now;
        if let Some(process) = self.processes.get_mut(&pid)
            && let Some(since) = process.stopped.take()
        {
            process.jump(now - since);
        }
    }
}

impl Process {
    fn go_on(&mut self, by_ms: u64) {
        set_clock(self.local_us / 1_000);
        let by_us = by_ms * self.rate / 1_000;
        self.local_us += by_us;
        self.clock += Duration::from_micros(by_us);
        let until = self.clock;
        self.runtime.block_on(async move { sleep_until(until).await });
    }

    /// Time has passed in which it did not run.
    fn jump(&mut self, by_ms: u64) {
        self.local_us += by_ms * 1_000;
        self.clock += Duration::from_millis(by_ms);
        self.runtime.block_on(async move { advance(Duration::from_millis(by_ms)).await });
    }
}
