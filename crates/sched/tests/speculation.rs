//! What running answers ahead is worth, in virtual time: the scheduler as it is, and a machine whose steps take as long as a
//! law says.

mod requests;

use std::collections::BTreeMap;
use std::time::Duration;

use galerne_sched::{Cost, Limits, Scheduler};
use galerne_types::{
    Draw, Epoch, Event, Grammar, Input, Request, RequestId, Sampled, Sampling, Slice, TokenId, TokenOut,
};
use requests::plain;

const fn cost(step_ns: u64, token_ns: u64) -> Cost {
    Cost { step_ns, token_ns, key_ns: 20, logits_ns: 0, window_tokens: None }
}

/// A GPU, whose steps are bound by its memory; a CPU; and one whose every token takes as long as the first.
const MACHINES: [Cost; 3] = [cost(8_000_000, 60_000), cost(6_000_000, 2_000_000), cost(0, 8_000_000)];

/// What is drawn for a request at an index.
type Text = fn(RequestId, u32) -> TokenId;

/// A text of 40 tokens, again and again.
fn repeats(id: RequestId, index: u32) -> TokenId {
    hash(id.0 * 1000 + u64::from(index) % 40) % 5000
}

/// A text that comes back to nothing.
fn never_repeats(id: RequestId, index: u32) -> TokenId {
    hash(id.0 * 100_000 + u64::from(index)) % 5000
}

/// Words of a small language: much stands before, and little follows from it.
fn babbles(id: RequestId, index: u32) -> TokenId {
    never_repeats(id, index) % 8
}

/// The one text in some hundred tokens, the other in the next.
fn changes(id: RequestId, index: u32) -> TokenId {
    if (index / 120).is_multiple_of(2) { babbles(id, index) } else { repeats(id, index) }
}

/// A number that looks random (SplitMix64: Steele, Lea, Flood, OOPSLA 2014).
fn hash(x: u64) -> TokenId {
    let x = x.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    (x ^ x >> 31) as TokenId >> 1
}

fn limits(speculation: bool) -> Limits {
    Limits {
        kv_blocks: 10_000,
        sequences_max: 64,
        step_tokens_max: 512,
        context_tokens_max: 8192,
        window_tokens: None,
        vocab: 5000,
        waiting_max: 64,
        prefix_cache: true,
        speculation,
        itl_target: None,
    }
}

fn request(id: u64, max_tokens: u32) -> Request {
    plain(id, vec![7; 4], max_tokens)
}

struct World {
    cost: Cost,
    scheduler: Scheduler,
    of_slot: BTreeMap<u32, RequestId>,
    now: Duration,
    /// When a request had its last token, and how many it has.
    told: BTreeMap<RequestId, (Duration, u32)>,
    longest_draft: usize,
}

impl World {
    fn new(cost: Cost, limits: Limits) -> Self {
        Self {
            cost,
            scheduler: Scheduler::new(Epoch(1), limits),
            of_slot: BTreeMap::new(),
            now: Duration::ZERO,
            told: BTreeMap::new(),
            longest_draft: 0,
        }
    }

    /// One step after the other, until all requests have ended.
    fn run(&mut self, text: impl Fn(RequestId, u32) -> TokenId) {
        let mut steps = std::collections::VecDeque::new();
        loop {
            steps.extend(std::iter::from_fn(|| self.scheduler.plan()));
            let Some(step) = steps.pop_front() else { return };
            let mut sampled = Sampled::default();
            for slice in &step.slices {
                self.draw(slice, &text, &mut sampled);
            }
            let took = self.cost.predict(&step);
            self.now += took;
            self.scheduler.took(&step, took);
            for event in self.scheduler.commit(&step, &sampled) {
                if let Event::Token { request, index, token } = event {
                    assert_eq!(token.id, text(request, index));
                    self.told.insert(request, (self.now, index + 1));
                }
            }
        }
    }

    fn draw(&mut self, slice: &Slice, text: &impl Fn(RequestId, u32) -> TokenId, sampled: &mut Sampled) {
        let draft = slice.draft();
        self.longest_draft = self.longest_draft.max(draft.len());
        let Some(Draw { index, .. }) = slice.draw else { return sampled.tokens.push(None) };
        if slice.input != Input::Last {
            // Requests are admitted in order, each with a prompt of one chunk.
            let id = RequestId(self.told.len().max(self.of_slot.len()) as u64);
            self.of_slot.insert(slice.slot, id);
        }
        let id = self.of_slot[&slice.slot];
        sampled.tokens.push(Some(TokenOut::unreported(text(id, index))));
        if !draft.is_empty() {
            let comes_true = (index..).zip(draft).take_while(|(index, token)| text(id, *index) == **token);
            let further = comes_true.map(|(index, _)| TokenOut::unreported(text(id, index + 1)));
            sampled.further.push(further.collect());
        }
    }
}

/// How long so many requests take together, with and without.
fn compare(cost: Cost, requests: u64, text: Text) -> (f64, usize) {
    let run = |speculation| {
        let mut world = World::new(cost, limits(speculation));
        (0..requests).for_each(|id| world.scheduler.submit(request(id, 1500)).unwrap());
        world.run(text);
        assert!(world.told.values().all(|&(_, tokens)| tokens == 1500));
        world
    };
    let (with, without) = (run(true), run(false));
    (without.now.as_secs_f64() / with.now.as_secs_f64(), with.longest_draft)
}

#[test]
fn text_that_repeats_itself_comes_sooner_where_a_step_has_room() {
    let [gpu, cpu, _] = MACHINES;
    for (machine, requests, least) in [(gpu, 1, 6.0), (gpu, 8, 4.0), (cpu, 1, 2.0), (cpu, 2, 1.5)] {
        let (gain, _) = compare(machine, requests, repeats);
        println!("{machine}: {requests} repeating: {gain:.2}");
        assert!(gain > least, "{machine}: {requests} repeating gain {gain:.2}");
    }
}

#[test]
fn no_text_comes_more_than_three_percent_later() {
    let texts: [(&str, Text); 4] =
        [("never", never_repeats), ("babbles", babbles), ("changes", changes), ("repeats", repeats)];
    for machine in MACHINES {
        for (name, text) in texts {
            for requests in [1, 3, 16, 20] {
                let (gain, longest) = compare(machine, requests, text);
                println!("{machine}: {requests} {name}: {gain:.3}, drafts of up to {longest}");
                assert!(gain > 0.97, "{machine}: {requests} {name}: {gain:.3}");
            }
        }
    }
}

#[test]
fn who_repeats_nothing_is_not_held_up_much_by_who_does() {
    let text = |id: RequestId, index| if id.0 == 0 { repeats(id, index) } else { never_repeats(id, index) };
    for machine in MACHINES {
        let ends = [true, false].map(|speculation| {
            let mut world = World::new(machine, limits(speculation));
            (0..4).for_each(|id| world.scheduler.submit(request(id, 1500)).unwrap());
            world.run(text);
            world.told[&RequestId(3)].0.as_secs_f64()
        });
        assert!(ends[0] < 1.35 * ends[1], "{machine}: {ends:?}");
    }
}

#[test]
fn what_depends_on_the_tokens_before_is_not_run_ahead() {
    let penalized = Sampling { presence_penalty: 0.5, ..Sampling::greedy() };
    let grammar = Some(Grammar::Regex("a*".into()));
    for (what, excluded) in [
        ("penalties", Request { sampling: penalized, ..request(0, 300) }),
        ("a grammar", Request { grammar, ..request(0, 300) }),
        (
            "stop tokens that may not be drawn",
            Request { min_tokens: 300, stop_tokens: vec![1], ..request(0, 300) },
        ),
    ] {
        let mut world = World::new(MACHINES[0], limits(true));
        world.scheduler.submit(excluded).unwrap();
        world.run(repeats);
        assert_eq!((world.longest_draft, world.told[&RequestId(0)].1), (0, 300), "{what}");
    }
    let mut world = World::new(MACHINES[0], limits(true));
    world.scheduler.submit(request(0, 300)).unwrap();
    world.run(repeats);
    assert_eq!(world.longest_draft, 15);
}

#[test]
fn drafts_stay_within_a_step_a_target_and_the_answer() {
    let target = Some(Duration::from_millis(9));
    for (limits, longest) in [
        (Limits { step_tokens_max: 5, ..limits(true) }, 4),
        (Limits { itl_target: target, ..limits(true) }, 15),
        (Limits { itl_target: Some(Duration::from_millis(1)), ..limits(true) }, 0),
    ] {
        let mut world = World::new(MACHINES[0], limits);
        world.scheduler.submit(request(0, 300)).unwrap();
        world.run(repeats);
        assert_eq!(world.longest_draft, longest);
    }
    let mut world = World::new(MACHINES[0], limits(true));
    (0..3).for_each(|id| world.scheduler.submit(request(id, 2)).unwrap());
    world.run(repeats);
    assert_eq!(world.longest_draft, 0, "behind a draft there is a token to draw");
}
