//! What a greedy tenant does to another one, in virtual time: the scheduler as it is, and a machine whose steps take as
//! long as a simple law says.

mod requests;

use std::collections::{BTreeMap, VecDeque};

use galerne_sched::{Cost, Limits, Scheduler};
use galerne_types::{Epoch, Event, Input, Request, RequestId, Sampled, Step, TenantId, TokenId, TokenOut};
use requests::plain;

fn limits(machine: Machine) -> Limits {
    Limits {
        kv_blocks: 16 * 64,
        sequences_max: 16,
        step_tokens_max: machine.step_tokens_max,
        context_tokens_max: 4096,
        window_tokens: None,
        vocab: 100,
        waiting_max: 256,
        prefix_cache: false,
        speculation: true,
        itl_target: None,
    }
}

const PATIENT: TenantId = TenantId(1);
const GREEDY: [TenantId; 2] = [TenantId(2), TenantId(3)];
/// The patient tenant's requests.
const REQUESTS: usize = 500;
/// Steps for which the greedy tenants are alone before the first of them, so that they hold all and nobody remembers the
/// patient one.
const ALONE_STEPS: usize = 5000;

#[derive(Clone, Copy)]
struct Machine {
    name: &'static str,
    cost: Cost,
    step_tokens_max: u32,
}

const fn cost(step_ns: u64, token_ns: u64) -> Cost {
    Cost { step_ns, token_ns, key_ns: 0, logits_ns: 0, window_tokens: None }
}

/// A large model on a CPU, and on a GPU.
const MACHINES: [Machine; 2] = [
    Machine { name: "CPU", cost: cost(40_000_000, 10_000_000), step_tokens_max: 512 },
    Machine { name: "GPU", cost: cost(8_000_000, 60_000), step_tokens_max: 2048 },
];

/// Tokens of a prompt and its answer.
#[derive(Clone, Copy, Debug)]
struct Size {
    prompt: u32,
    answer: u32,
}

/// Numbers without pattern, the same in every run.
struct Noise(u64);

impl Noise {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

struct World {
    machine: Machine,
    scheduler: Scheduler,
    now_us: u64,
    /// Planned steps, the oldest of which runs until `done_us`.
    steps: VecDeque<Step>,
    done_us: u64,
    next_id: u64,
    /// Tenant of each open request, and when it was submitted if it has no token yet.
    open: BTreeMap<RequestId, (TenantId, Option<u64>)>,
    /// What each of the greedy tenants asks for.
    greedy: Vec<Size>,
    /// The patient tenant's times to first token.
    ttft_us: Vec<u64>,
    greedy_tokens: u64,
}

impl World {
    fn new(machine: Machine, greedy: &[Size]) -> Self {
        Self {
            machine,
            scheduler: Scheduler::new(Epoch(1), limits(machine)),
            now_us: 0,
            steps: VecDeque::new(),
            done_us: 0,
            next_id: 0,
            open: BTreeMap::new(),
            greedy: greedy.to_vec(),
            ttft_us: Vec::new(),
            greedy_tokens: 0,
        }
    }

    fn submit(&mut self, tenant: TenantId, size: Size) -> bool {
        let id = RequestId(self.next_id);
        let prompt = vec![tenant.0 as TokenId; size.prompt as usize]; // tells whose it is
        let request = Request { tenant, ..plain(id.0, prompt, size.answer) };
        let accepted = self.scheduler.submit(request).is_ok();
        if accepted {
            self.next_id += 1;
            self.open.insert(id, (tenant, Some(self.now_us)));
        }
        accepted
    }

    /// The greedy tenants ask for as much as they are given, always.
    fn ask_greedily(&mut self) {
        for (tenant, size) in GREEDY.into_iter().zip(self.greedy.clone()) {
            while self.submit(tenant, size) {}
        }
    }

    /// Plans ahead as the leader does.
    fn plan(&mut self) {
        while let Some(step) = self.scheduler.plan() {
            if self.steps.is_empty() {
                self.done_us = self.now_us + self.duration_us(&step);
            }
            self.steps.push_back(step);
        }
    }

    fn duration_us(&self, step: &Step) -> u64 {
        self.machine.cost.predict(step).as_micros() as u64
    }

    fn commit(&mut self) {
        let Some(step) = self.steps.pop_front() else { return };
        self.now_us = self.done_us;
        let token = |_| TokenOut::unreported(9);
        let tokens = step.slices.iter().map(|slice| slice.draw.as_ref().map(token)).collect();
        for event in self.scheduler.commit(&step, &Sampled { tokens, ..Sampled::default() }) {
            match event {
                Event::Token { request, .. } => {
                    let (tenant, submitted_us) = self.open.get_mut(&request).unwrap();
                    self.greedy_tokens += u64::from(*tenant != PATIENT);
                    if let (&mut PATIENT, Some(submitted_us)) = (tenant, submitted_us.take()) {
                        self.ttft_us.push(self.now_us - submitted_us);
                    }
                }
                Event::Finished { request, .. } => {
                    self.open.remove(&request);
                }
                Event::Scored { .. } => {}
            }
        }
        if let Some(next) = self.steps.front() {
            self.done_us = self.now_us + self.duration_us(next);
        }
    }

    /// Lets the patient tenant's requests come at their times; returns when all have their first token.
    fn run(&mut self, arrivals: &[(u64, Size)]) {
        self.ask_greedily();
        self.plan();
        (0..ALONE_STEPS).for_each(|_| self.turn());
        let began_us = self.now_us;
        for &(at_us, size) in arrivals {
            let at_us = began_us + at_us;
            while !self.steps.is_empty() && self.done_us <= at_us {
                self.turn();
            }
            self.now_us = at_us;
            assert!(self.submit(PATIENT, size), "the patient tenant is never refused");
            self.ask_greedily();
            self.plan();
        }
        while self.ttft_us.len() < arrivals.len() {
            self.turn();
        }
    }

    /// The greedy tenants go, and take their requests back.
    fn leave(&mut self) {
        self.greedy.clear();
        let theirs = self.open.iter().filter(|(_, (tenant, _))| *tenant != PATIENT);
        let theirs: Vec<RequestId> = theirs.map(|(&id, _)| id).collect();
        for id in theirs {
            self.open.remove(&id);
            self.scheduler.cancel(id);
        }
    }

    fn turn(&mut self) {
        self.commit();
        self.ask_greedily();
        self.plan();
    }
}

/// Requests of many sizes at irregular times that take `percent` of the machine.
fn arrivals(machine: Machine, percent: u64, seed: u64) -> Vec<(u64, Size)> {
    let mut noise = Noise(seed);
    let mut at_us = 0;
    let mut next = || {
        let size = Size { prompt: 50 + noise.below(400) as u32, answer: 16 + noise.below(100) as u32 };
        // Its prompt in a step of its own, and its answer with three others beside it.
        let tokens = u64::from(size.prompt + size.answer);
        let steps = 1 + u64::from(size.answer) / 4;
        let work_us = (machine.cost.token_ns * tokens + machine.cost.step_ns * steps) / 1000;
        at_us += noise.below(2 * work_us * 100 / percent); // uniform, so with this mean
        (at_us, size)
    };
    (0..REQUESTS).map(|_| next()).collect()
}

fn percentile(times: &[u64], percent: usize) -> u64 {
    let mut times = times.to_vec();
    times.sort_unstable();
    times[(times.len() * percent).div_ceil(100) - 1]
}

/// The patient tenant's p99 beside greedy ones, as a multiple of what it is alone.
fn ratio(machine: Machine, percent: u64, greedy: &[Size]) -> f64 {
    let arrivals = arrivals(machine, percent, percent);
    let [mut alone, mut beside] = [&[], greedy].map(|greedy| World::new(machine, greedy));
    alone.run(&arrivals);
    beside.run(&arrivals);
    let ms = |world: &World, percent| percentile(&world.ttft_us, percent) / 1000;
    let ratio = ms(&beside, 99) as f64 / ms(&alone, 99) as f64;
    println!(
        "{} at {percent}%, beside {greedy:?}: p50 {} -> {} ms, p99 {} -> {} ms, {ratio:.2} times, worst {} -> {} ms; greedy {} tokens/s",
        machine.name,
        ms(&alone, 50),
        ms(&beside, 50),
        ms(&alone, 99),
        ms(&beside, 99),
        ms(&alone, 100),
        ms(&beside, 100),
        beside.greedy_tokens * 1_000_000 / beside.now_us,
    );
    ratio
}

#[test]
fn a_greedy_tenant_does_not_double_anothers_time_to_first_token() {
    let kinds = [(1500, 500), (2000, 4), (8, 2000), (300, 64)];
    for machine in MACHINES {
        for percent in [10, 20, 40] {
            for (prompt, answer) in kinds {
                let size = Size { prompt, answer };
                assert!(ratio(machine, percent, &[size]) < 2.0, "{} at {percent}%, {size:?}", machine.name);
            }
        }
    }
}

#[test]
fn nor_do_two() {
    let greedy = [Size { prompt: 1500, answer: 500 }, Size { prompt: 300, answer: 64 }];
    for machine in MACHINES {
        assert!(ratio(machine, 20, &greedy) < 2.0, "{}", machine.name);
    }
}

#[test]
fn nor_does_one_that_has_left() {
    for machine in MACHINES {
        let arrivals = arrivals(machine, 20, 20);
        let [mut alone, mut after] =
            [&[][..], &[Size { prompt: 8, answer: 2000 }]].map(|greedy| World::new(machine, greedy));
        alone.run(&arrivals);
        after.run(&arrivals[..50]);
        after.leave();
        after.ttft_us.clear();
        after.run(&arrivals);
        let [alone, after] = [alone, after].map(|world| percentile(&world.ttft_us, 99));
        assert!(after * 10 < alone * 12, "{}: {after} us instead of {alone} us", machine.name);
    }
}

/// Two tenants who always ask, and can be given more, are served alike whatever the sizes of their requests.
#[test]
fn greedy_tenants_share_alike() {
    let sizes = [Size { prompt: 1500, answer: 50 }, Size { prompt: 300, answer: 4 }];
    for machine in MACHINES {
        let mut world = World::new(machine, &sizes);
        world.ask_greedily();
        world.plan();
        let (mut service, mut owners) = ([0; 2], BTreeMap::new());
        for _ in 0..20_000 {
            for slice in &world.steps.front().unwrap().slices {
                let weight = match &slice.input {
                    Input::Last => 2,
                    Input::Tokens(tokens) => {
                        owners.insert(slice.slot, usize::from(u64::from(tokens[0]) == GREEDY[1].0));
                        tokens.len()
                    }
                };
                service[owners[&slice.slot]] += weight;
            }
            world.turn();
        }
        let [one, other] = service.map(|service| service as f64);
        assert!((one / other - 1.0).abs() < 0.05, "{}: {service:?}", machine.name);
    }
}
