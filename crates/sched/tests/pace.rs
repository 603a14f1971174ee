//! What long prompts do to the answers under way, in virtual time: the scheduler as it is, and a machine whose steps take as
//! long as a law says.

mod requests;

use std::collections::VecDeque;
use std::time::Duration;

use galerne_sched::{Cost, Limits, Scheduler};
use galerne_types::{Epoch, Event, Input, RequestId, Sampled, Step, TokenOut};
use requests::plain;

const STREAMS: u64 = 15;
const LONG_TOKENS: usize = 2000;

#[derive(Clone, Copy)]
struct Machine {
    cost: Cost,
    step_tokens_max: u32,
    target: Duration,
}

const fn cost(step_ns: u64, token_ns: u64, key_ns: u64) -> Cost {
    Cost { step_ns, token_ns, key_ns, logits_ns: 0, window_tokens: None }
}

/// A small model on a CPU, a large one on a CPU, and one on a GPU.
const MACHINES: [Machine; 3] = [
    Machine { cost: cost(4_000_000, 600_000, 50), step_tokens_max: 256, target: Duration::from_millis(25) },
    Machine { cost: cost(300_000_000, 9_000_000, 900), step_tokens_max: 512, target: Duration::from_secs(1) },
    Machine { cost: cost(8_000_000, 60_000, 2), step_tokens_max: 2048, target: Duration::from_millis(16) },
];

struct World {
    machine: Machine,
    scheduler: Scheduler,
    in_flight: VecDeque<Step>,
    next_id: u64,
}

impl World {
    fn new(machine: Machine, itl_target: Option<Duration>) -> Self {
        let limits = Limits {
            kv_blocks: 10_000,
            sequences_max: 64,
            step_tokens_max: machine.step_tokens_max,
            context_tokens_max: 8192,
            window_tokens: None,
            vocab: 100,
            waiting_max: 64,
            prefix_cache: false,
            speculation: false,
            itl_target,
        };
        let mut world = Self {
            machine,
            scheduler: Scheduler::new(Epoch(1), limits),
            in_flight: VecDeque::new(),
            next_id: 0,
        };
        (0..STREAMS).for_each(|_| world.submit(30, 4000));
        world
    }

    fn submit(&mut self, prompt: usize, max_tokens: u32) {
        self.scheduler.submit(plain(self.next_id, vec![7; prompt], max_tokens)).unwrap();
        self.next_id += 1;
    }

    /// One step more; how long it took if it held answers, how many tokens of prompts, and the requests that have ended.
    fn step(&mut self) -> (Option<Duration>, usize, usize) {
        self.in_flight.extend(std::iter::from_fn(|| self.scheduler.plan()));
        let step = self.in_flight.pop_front().unwrap();
        let took = self.machine.cost.predict(&step);
        self.scheduler.took(&step, took);
        let token = |_| TokenOut::unreported(9);
        let tokens = step.slices.iter().map(|slice| slice.draw.as_ref().map(token)).collect();
        let events = self.scheduler.commit(&step, &Sampled { tokens, ..Sampled::default() });
        let ended = events.iter().filter(|event| matches!(event, Event::Finished { .. })).count();
        let answers = step.slices.iter().any(|slice| slice.input == Input::Last);
        let prompts = step.slices.iter().filter(|slice| slice.input != Input::Last);
        (answers.then_some(took), prompts.map(|slice| slice.input.len()).sum(), ended)
    }

    /// Times between two tokens while there is always a long prompt under way, sorted, and tokens of prompts a step.
    fn beside_prompts(&mut self) -> (Vec<Duration>, usize) {
        for _ in 0..50 {
            self.step();
        }
        let (mut times, mut prompt_tokens) = (Vec::new(), 0);
        self.submit(LONG_TOKENS, 1);
        for _ in 0..3000 {
            let (took, tokens, ended) = self.step();
            times.extend(took);
            prompt_tokens += tokens;
            (0..ended).for_each(|_| self.submit(LONG_TOKENS, 1));
        }
        times.sort_unstable();
        (times, prompt_tokens / 3000)
    }
}

fn p99(times: &[Duration]) -> Duration {
    times[times.len() * 99 / 100]
}

#[test]
fn answers_keep_their_pace_while_long_prompts_come_in() {
    for machine in MACHINES {
        let (times, tokens) = World::new(machine, Some(machine.target)).beside_prompts();
        let (free_times, free_tokens) = World::new(machine, None).beside_prompts();
        println!(
            "target {:?}: p50 {:?}, p99 {:?}, {tokens} tokens of prompts a step; without: p50 {:?}, p99 {:?}, {free_tokens}",
            machine.target,
            times[times.len() / 2],
            p99(&times),
            free_times[free_times.len() / 2],
            p99(&free_times),
        );
        assert!(
            p99(&times) <= machine.target.mul_f64(1.05),
            "{:?} instead of {:?}",
            p99(&times),
            machine.target
        );
        assert!(times[times.len() / 2] >= machine.target.mul_f64(0.8), "the room that there is, is used");
        assert!(
            p99(&free_times) > 2 * machine.target && free_tokens > tokens,
            "without a target steps are full"
        );
    }
}

#[test]
fn where_the_target_leaves_no_room_prompts_go_on_all_the_same() {
    let machine = Machine { target: Duration::from_millis(1), ..MACHINES[0] };
    let (_, tokens) = World::new(machine, Some(machine.target)).beside_prompts();
    assert!((7..=8).contains(&tokens), "{tokens} a step");
}

#[test]
fn a_prompt_alone_takes_whole_steps() {
    let mut world = World::new(MACHINES[0], Some(Duration::from_millis(1)));
    (0..STREAMS).for_each(|id| world.scheduler.cancel(RequestId(id)));
    world.submit(LONG_TOKENS, 1);
    assert_eq!(world.step().1, 256);
}
