//! What k groups make of a demand: percentiles of the time to the first token and between tokens.
//!
//! With k groups at `λ = rate / k` requests a second each, prompts of p and answers of o tokens, a step that costs `step_s` and
//! `d = token_s + key_s · (p + o/2)` for each answer under way, and a prompt's computation `f = token_s · p + key_s · p²/2`:
//!
//! - **Steps.** A request brings `w = f + o · d` seconds of work whichever steps it falls into, so in a step of length τ
//!   the group takes up `λ τ` requests' work: `τ = step_s + λ w τ`, hence `τ = step_s / (1 − ρ)` with `ρ = λ w`. (The cycle
//!   of a gated queue with vacations: Takagi, Queueing Analysis 1, 1991.) That is the mean time between two tokens; by
//!   Little's law `λ o τ` answers are under way.
//! - **Between tokens, at a percentile.** An answer meets the load of the while that it lives, `T = o τ`, not the mean one.
//!   Two things make the difference, each as a part of τ; the percentile is that of a lognormal law with the sum of both
//!   variances. How many answers are under way: Poisson around its mean (M/G/∞), slower to come back to it the more of a
//!   step they are, `θ = step_s / (step_s + λ o τ d)`, hence a variance of `λ o τ / θ`, of which an average over T leaves
//!   `2 (θ − 1 + e^−θ) / θ²`. How much of prompts comes in: a compound Poisson sum, `λ E[f²] / T` of which the group
//!   computes `1 / (1 − λ f)` times as much, the more irregular the shorter an answer lives: times `E[1/o] E[o]`, which is
//!   `1 + cv²(o)` for lognormal lengths.
//! - **To the first token.** The step under way ends, and the one that was planned as it began; then come the chunks of the
//!   prompt, each in a step of its own, with what others bring. Before that a wait for a slot, M/G/n with all slots of the
//!   fleet (Erlang C, with servers and load divided by the peakedness `1 / θ (1 − λ f)`, as Hayward does: Fredericks, Bell
//!   Syst. Tech. J. 59, 1980; the mean wait with Allen and Cunneen's factor `(ca² + cs²) / 2`), and a wait behind other
//!   prompts, M/G/1 with a step's room for prompts as the server (Pollaczek and Khinchine; Kingman, 1961).
//! - **The router** sends to the least loaded group, so of what is random in the arrivals each of k groups gets a k-th:
//!   `ca² = 1/k` at a group. What is random in lengths is not shared out.
//!
//! So a large fleet needs relatively fewer groups than a small one: what is known as square-root staffing (Halfin and
//! Whitt, Oper. Res. 29, 1981). `tests/traces/likeness.rs` holds all of this against simulated groups, and these against
//! the real scheduler.

use std::time::Duration;

use crate::cost::StepCost;
use crate::lengths::Lengths;
use crate::queue::{erlang_c, normal_quantile, wait_quantile};
use crate::sla::{Room, Sla, Target};

/// At which percentile what is not promised is told.
const PERCENT_UNPROMISED: u8 = 95;

/// Where what is promised is out of reach, so many times what a request gets that is alone is aimed at.
const REACHABLE: f64 = 1.25;

/// What is asked of the fleet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// Requests a second.
    pub rate_per_s: f64,
    /// Variance of their number over its mean: 1 for Poisson arrivals, more where they come in bursts.
    pub dispersion: f64,
    /// Tokens of prompts that have to be computed.
    pub prompts: Lengths,
    /// Tokens of answers.
    pub answers: Lengths,
}

/// How a group turns work into time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Law {
    /// What its steps cost.
    pub cost: StepCost,
    /// What it takes up at once. Its sequences may be fewer than the scheduler's limit if KV memory holds fewer.
    pub room: Room,
}

/// What a number of groups would make of a demand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// How many groups.
    pub groups: u32,
    /// Time to the first token in seconds, at the percentile that is promised (95 if none is); infinite where the queue
    /// only grows.
    pub ttft_s: f64,
    /// Time between two tokens in seconds, likewise.
    pub tpot_s: f64,
    /// The greater of both as a share of what is promised: the service level is held up to 1.
    pub share: f64,
}

impl Prediction {
    /// Whether what is promised would be kept.
    pub fn holds(&self) -> bool {
        self.share <= 1.0
    }
}

/// The load of one group.
struct Load {
    /// Requests a second.
    rate: f64,
    /// Cost of a token of an answer, and of a prompt, in seconds.
    decode_s: f64,
    prefill_s: f64,
    /// Mean length of a step.
    step_s: f64,
    /// Answers under way.
    running: f64,
}

impl Law {
    /// What `groups` groups would make of `demand`.
    pub fn predict(&self, sla: &Sla, demand: &Demand, groups: u32) -> Prediction {
        let at = |target: Option<Target>| {
            let percent = target.map_or(PERCENT_UNPROMISED, |target| target.percent.clamp(1, 99));
            f64::from(percent) / 100.0
        };
        let (ttft_s, tpot_s) = if demand.rate_per_s <= 0.0 {
            (0.0, 0.0)
        } else if groups == 0 {
            (f64::INFINITY, f64::INFINITY)
        } else {
            (self.ttft_s(demand, groups, at(sla.ttft)), self.tpot_s(demand, groups, at(sla.tpot)))
        };
        let share = |seconds: f64, target: Option<Target>| {
            target.map_or(0.0, |target| seconds / target.within.as_secs_f64().max(1e-9))
        };
        Prediction { groups, ttft_s, tpot_s, share: share(ttft_s, sla.ttft).max(share(tpot_s, sla.tpot)) }
    }

    /// The fewest groups that hold the service level, up to `groups_max`; `None` if these do not.
    pub fn fewest(&self, sla: &Sla, demand: &Demand, groups_max: u32) -> Option<Prediction> {
        // More groups are never slower, so halving finds it.
        let (mut few, mut enough) = (0, self.predict(sla, demand, groups_max));
        if !enough.holds() {
            return None;
        }
        while few < enough.groups {
            let middle = self.predict(sla, demand, few.midpoint(enough.groups));
            if middle.holds() {
                enough = middle;
            } else {
                few = middle.groups + 1;
            }
        }
        Some(enough)
    }

    /// `sla`, but for what a request does not even get that has a group to itself: of that, something more.
    pub(crate) fn reachable(&self, sla: &Sla, demand: &Demand) -> Sla {
        let alone = Demand { rate_per_s: 1e-6, ..*demand };
        let best = self.predict(sla, &alone, 1);
        let reach = |target: Option<Target>, best_s: f64| {
            let target = target?;
            let least = Duration::try_from_secs_f64(best_s * REACHABLE).unwrap_or(Duration::MAX);
            Some(Target { within: target.within.max(least), ..target })
        };
        let reached = Sla { ttft: reach(sla.ttft, best.ttft_s), tpot: reach(sla.tpot, best.tpot_s) };
        if best.holds() { *sla } else { reached }
    }

    /// Requests a second that `groups` groups finish while all of their slots are taken, however slowly.
    pub(crate) fn throughput(&self, demand: &Demand, groups: u32) -> f64 {
        let (decode_s, prefill_s) = self.work(demand);
        let slots = f64::from(self.room.sequences_max);
        let each_s = prefill_s + demand.answers.mean * (self.cost.step_s / slots + decode_s);
        f64::from(groups) / each_s.max(1e-9)
    }

    /// Seconds of a token of an answer, and of a prompt.
    fn work(&self, demand: &Demand) -> (f64, f64) {
        let StepCost { step_s: _, token_s, key_s } = self.cost;
        let Demand { prompts, answers, .. } = demand;
        let decode_s = token_s + key_s * (prompts.mean + answers.mean / 2.0);
        (decode_s, token_s * prompts.mean + key_s * prompts.squares / 2.0)
    }

    fn load(&self, demand: &Demand, groups: u32) -> Load {
        let (decode_s, prefill_s) = self.work(demand);
        let rate = demand.rate_per_s / f64::from(groups);
        let busy = rate * (prefill_s + demand.answers.mean * decode_s);
        let step_s = self.step_s(busy);
        Load { rate, decode_s, prefill_s, step_s, running: rate * demand.answers.mean * step_s }
    }

    /// How long a step is where so much of the time is work.
    fn step_s(&self, busy: f64) -> f64 {
        if busy < 1.0 { self.cost.step_s / (1.0 - busy) } else { f64::INFINITY }
    }

    fn tpot_s(&self, demand: &Demand, groups: u32, share: f64) -> f64 {
        let load = self.load(demand, groups);
        if load.step_s.is_infinite() {
            return f64::INFINITY;
        }
        let Demand { prompts, answers, .. } = demand;
        let life_s = answers.mean * load.step_s;
        let arrivals = regularity(demand, groups);
        // How many answers are under way.
        let answers_s = load.running * load.decode_s;
        let returns = self.cost.step_s / (self.cost.step_s + answers_s);
        let averaged = 2.0 * (returns - 1.0 + libm::exp(-returns)) / (returns * returns);
        let running = arrivals * load.running / returns * averaged;
        let by_running = load.decode_s / (self.cost.step_s + answers_s);
        // How much of prompts comes in.
        let prompts2 = load.prefill_s * load.prefill_s * (arrivals + prompts.cv2());
        let prefill = load.rate * prompts2 * (1.0 + answers.cv2()) / life_s;
        let by_prefill = 1.0 / (1.0 - load.rate * load.prefill_s);
        let variance = running * by_running * by_running + prefill * by_prefill * by_prefill;
        load.step_s * libm::exp(normal_quantile(share) * variance.sqrt())
    }

    fn ttft_s(&self, demand: &Demand, groups: u32, share: f64) -> f64 {
        let load = self.load(demand, groups);
        let room = f64::from(self.room.step_tokens_max) - load.running;
        if load.step_s.is_infinite() || room < 1.0 {
            return f64::INFINITY;
        }
        let prompts = demand.prompts;
        let arrivals = regularity(demand, groups);
        // A step that is full of prompts, and which part of such steps' room is used.
        let full_s = self.cost.step_s + load.running * load.decode_s + room * load.prefill_s / prompts.mean;
        let chunk_s = prompts.mean / room * full_s;
        let used = load.rate * chunk_s;
        let slots = self.room.sequences_max.saturating_mul(groups);
        let life_s = demand.answers.mean * load.step_s;
        let taken = demand.rate_per_s * (life_s + load.step_s);
        if used >= 1.0 || taken >= f64::from(slots) {
            return f64::INFINITY;
        }
        let behind_s = (arrivals + prompts.cv2()) / 2.0 * chunk_s / (1.0 - used);
        // Answers slow each other down, so that more of them are under way at times than if they did not.
        let peaked =
            (1.0 + load.running * load.decode_s / self.cost.step_s) / (1.0 - load.rate * load.prefill_s);
        let waits = erlang_c((f64::from(slots) / peaked).round() as u32, taken / peaked);
        let slot_s = (demand.dispersion + demand.answers.cv2()) / 2.0 * life_s / (f64::from(slots) - taken);
        let slot = wait_quantile(waits, slot_s, share);
        wait_quantile(used, behind_s, share) + slot + self.unqueued_s(demand, &load, full_s / room, share)
    }

    /// To the first token of a request that need not queue: the rest of the step under way, the one that is planned
    /// already, and those of its prompt.
    fn unqueued_s(&self, demand: &Demand, load: &Load, token_s: f64, share: f64) -> f64 {
        let prompts = demand.prompts;
        let others = load.rate * load.step_s;
        let prompt2 = load.prefill_s * load.prefill_s * (1.0 + prompts.cv2());
        let own_s = self.cost.step_s + load.running * load.decode_s + others * load.prefill_s;
        let mean = 1.5 * load.step_s + own_s;
        let variance = load.step_s * load.step_s / 12.0 + others * prompt2;
        // Lognormal: the length that so many prompts do not exceed.
        let z = normal_quantile(share);
        let log_variance = libm::log1p(prompts.cv2());
        let length = prompts.mean * libm::exp(z * log_variance.sqrt() - log_variance / 2.0);
        let room = f64::from(self.room.step_tokens_max) - load.running;
        let own = load.prefill_s * length.min(room) / prompts.mean + (length - room).max(0.0) * token_s;
        let spread = own - load.prefill_s;
        mean + load.prefill_s + (z * z * variance + spread * spread).sqrt()
    }
}

/// The squared coefficient of variation of the times between requests at one of `groups` groups. The router sends to the least
/// loaded, so what is random in the arrivals at all of them is shared out evenly.
fn regularity(demand: &Demand, groups: u32) -> f64 {
    demand.dispersion / f64::from(groups)
}
