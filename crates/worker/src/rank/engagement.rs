//! One epoch on the compute thread: load, meet, try, then run steps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use galerne_collective::{AbortHandle, Collective, Config, Peer, Secret, Solo, connect, tree};
use galerne_failpoint::{self as failpoint, Point};
use galerne_model::gpu::{GpuWeights, Link};
use galerne_model::{Cores, ModelError, Options, Rank, Weights};
use galerne_types::{Draw, Epoch, EpochRecord, Input, Member, Sampled, Sampling, Shards, Slice, Step};
use tokio::sync::{mpsc, oneshot, watch};

use super::compute::{Done, Phase};
use super::desk::Desk;
use super::error::EpochError;
use super::execute::{Execute, Rehearsal};
use super::pulse::{Pulse, Watched};
use super::setup::{Setup, Shape};
use super::stats::Gaps;
use super::trace;

/// How long the ranks may take to meet, once all hold their weights.
const MEET_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a rank waits for its peers in one collective operation.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is looked whether the next step is there, while a device runs one.
const LOOK_INTERVAL: Duration = Duration::from_micros(20);

/// For how long that is looked.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// Values in the checked all-reduce: enough that it takes the way of a layer's sums.
const CHECKED_VALUES: usize = 1024;

/// Everything that the compute thread needs for an epoch.
pub(crate) struct Engagement {
    pub(crate) epoch: Epoch,
    pub(crate) record: EpochRecord,
    /// This rank's place in `record.members`.
    pub(crate) rank: usize,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) may_meet: Option<oneshot::Receiver<()>>,
    pub(crate) steps: mpsc::Receiver<Step>,
    pub(crate) answers: mpsc::Sender<Result<Done, EpochError>>,
    pub(crate) abort: AbortHandle,
}

/// The weights that the thread holds, kept from epoch to epoch.
pub(crate) struct Held {
    shards: Shards,
    rank: usize,
    weights: Loaded,
}

/// Where the weights are.
#[derive(Clone)]
enum Loaded {
    Here(Arc<Weights>),
    OnGpu(Arc<GpuWeights>),
}

impl Engagement {
    /// Works until the epoch is over. Its error is the last answer.
    pub(crate) fn run(mut self, setup: &Setup, desk: &Desk, pulse: &Pulse, held: &mut Option<Held>) {
        let outcome = self.work(setup, desk, pulse, held);
        self.abort.abort();
        if let Err(error) = outcome {
            // Nobody listens when the epoch was given up from outside.
            let _ = self.answers.blocking_send(Err(error));
        }
    }

    fn work(
        &mut self,
        setup: &Setup,
        desk: &Desk,
        pulse: &Pulse,
        held: &mut Option<Held>,
    ) -> Result<(), EpochError> {
        let ranks = self.record.members.len();
        let shape = setup
            .shape(ranks)
            .ok_or_else(|| record_error(format!("this rank has no room in a group of {ranks}")))?;
        let weights = match setup.options.rehearse {
            None => Some(self.load(setup, held)?),
            Some(_) => None,
        };
        self.phase.send_replace(Phase::Loaded);
        let Some(Ok(())) = self.may_meet.take().map(oneshot::Receiver::blocking_recv) else { return Ok(()) };
        self.phase.send_replace(Phase::Joining);
        failpoint::meet(Point::Meeting(self.rank));
        let (mut collective, config) = self.join(setup)?;
        self.check_sum(collective.as_mut())?;
        check_options(collective.as_mut(), setup, shape)?;
        let link = match &setup.gpu {
            Some(gpu) => gpu.link(config.as_ref(), &self.abort, collective.as_mut())?,
            None => Link::host(),
        };
        let watched = Box::new(Watched { inner: collective, pulse: pulse.clone() });
        let model = Options { cores: self.cores(setup), ..shape.model.clone() };
        let mut rank = execution(setup, &model, weights, watched, link)?;
        let ended = self.serve(desk, pulse, rank.as_mut());
        // What the other ranks' GPUs wait for must not be waited for here.
        self.abort.abort();
        if let Err(error) = rank.close() {
            tracing::error!(%error, "this process must end");
            pulse.begins(0); // and does, as this thread does not go on
            loop {
                std::thread::park();
            }
        }
        ended
    }

    /// Tries a step, and then runs those that are planned.
    fn serve(&mut self, desk: &Desk, pulse: &Pulse, rank: &mut dyn Execute) -> Result<(), EpochError> {
        pulse.begins(1);
        rank.run(&self.warm_up(), &mut |_| None)?;
        pulse.waits_uncounted();
        self.phase.send_replace(Phase::Ready);
        let mut gaps = Gaps::default();
        let ended = self.run_steps(desk, pulse, rank, &mut gaps);
        gaps.log(self.epoch);
        ended
    }

    /// Runs step after step, as long as somebody plans them.
    fn run_steps(
        &mut self,
        desk: &Desk,
        pulse: &Pulse,
        rank: &mut dyn Execute,
        gaps: &mut Gaps,
    ) -> Result<(), EpochError> {
        let mut mask = |request| {
            pulse.waits_uncounted();
            let mask = desk.mask(request);
            pulse.computes();
            Some(mask)
        };
        let mut next = None;
        while let Some(step) = next.take().or_else(|| self.steps.blocking_recv()) {
            pulse.take_busy();
            pulse.begins(step.tokens());
            let sampled = if step.slices.is_empty() {
                rank.meet()?;
                Sampled::default()
            } else {
                gaps.begin(&step);
                let _span = trace::step(&step, self.rank);
                failpoint::meet(point(&step, self.rank));
                if rank.begin(&step)? {
                    next = begin_next(rank, &mut self.steps)?;
                }
                let sampled = rank.run(&step, &mut mask)?;
                gaps.end();
                sampled
            };
            pulse.waits_uncounted();
            if self.rank == 0 {
                desk.drawn(&step, &sampled);
            }
            if self.answers.blocking_send(Ok(Done { sampled, busy: pulse.take_busy() })).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn load(&self, setup: &Setup, held: &mut Option<Held>) -> Result<Loaded, EpochError> {
        let (shards, rank) = (self.record.shards, self.rank);
        if let Some(held) = held.as_ref().filter(|held| held.shards == shards && held.rank == rank) {
            return Ok(held.weights.clone());
        }
        *held = None; // before the new ones come: there may not be room for both
        let began = Instant::now();
        let progress = |done: u64, total: u64| {
            failpoint::meet(Point::Loading(rank));
            let percent = (done.min(total) * 100).checked_div(total).unwrap_or(100);
            let phase = Phase::Loading(u8::try_from(percent).unwrap_or(100));
            self.phase.send_if_modified(|now| std::mem::replace(now, phase) != phase);
        };
        let (checkpoint, threads) = (&setup.checkpoint, setup.options.threads);
        let cores = self.cores(setup);
        let loaded = match &setup.gpu {
            None => Weights::load(checkpoint, shards, rank, threads, cores.as_ref(), &progress)
                .map(|weights| (weights.bytes(), Loaded::Here(Arc::new(weights)))),
            Some(gpu) => {
                GpuWeights::load(checkpoint, shards, rank, gpu.quantize, &gpu.device, threads, &progress)
                    .map(|weights| (weights.bytes(), Loaded::OnGpu(Arc::new(weights))))
            }
        };
        let (bytes, weights) = loaded.map_err(EpochError::Model)?;
        tracing::info!(epoch = self.epoch.0, bytes, ms = began.elapsed().as_millis(), "weights loaded");
        *held = Some(Held { shards, rank, weights: weights.clone() });
        Ok(weights)
    }

    /// This rank's share of the cores that its group has on this host.
    fn cores(&self, setup: &Setup) -> Option<Cores> {
        let host = &self.record.members[self.rank].host;
        let on_host = |members: &[Member]| members.iter().filter(|member| &member.host == host).count();
        let (before, all) = (on_host(&self.record.members[..self.rank]), on_host(&self.record.members));
        setup.cores.as_ref().map(|cores| cores.share(before, all))
    }

    /// Meets the other ranks; tells how, if there are any.
    fn join(&self, setup: &Setup) -> Result<(Box<dyn Collective>, Option<Config>), EpochError> {
        let leaves = self.record.shards.virtual_shards();
        if self.record.members.len() == 1 {
            return Ok((Box::new(Solo::new(leaves)), None));
        }
        let peer = |member: &Member| {
            let address = member.collective.parse();
            let address = address.map_err(|_| record_error(format!("no address: {}", member.collective)))?;
            Ok(Peer { host: member.host.clone(), address, leaves: member.shards.clone() })
        };
        let config = Config {
            rank: self.rank,
            leaves,
            peers: self.record.members.iter().map(peer).collect::<Result<_, EpochError>>()?,
            secret: secret(&self.record.secret)?,
            epoch: self.epoch.0,
            threads: setup.options.threads,
            meet_timeout: MEET_TIMEOUT,
            timeout: COLLECTIVE_TIMEOUT,
        };
        let met = connect(&config, &setup.listener, &self.abort)?;
        Ok((Box::new(met), Some(config)))
    }

    /// Sums s + 1 over all virtual shards s: exact in f32, and different when one is missing, doubled or moved.
    fn check_sum(&self, collective: &mut dyn Collective) -> Result<(), EpochError> {
        let shards = self.record.shards;
        let sum = |leaves: std::ops::Range<usize>| leaves.map(|leaf| (leaf + 1) as f32).sum::<f32>();
        let pieces = tree::pieces(shards.virtual_shards(), shards.of_rank(self.rank));
        let partials: Vec<f32> =
            pieces.into_iter().flat_map(|piece| std::iter::repeat_n(sum(piece), CHECKED_VALUES)).collect();
        let mut out = vec![0.0; CHECKED_VALUES];
        collective.all_reduce(&partials, &mut out)?;
        let expected = sum(0..shards.virtual_shards());
        match out.into_iter().find(|&found| found != expected) {
            Some(found) => Err(EpochError::Checked { expected, found }),
            None => Ok(()),
        }
    }

    /// One token through the whole model, the same at all ranks. What it leaves in block 0 is overwritten
    /// before anyone reads it.
    fn warm_up(&self) -> Step {
        let draw = Draw::new(Sampling::greedy(), 0);
        let input = Input::Tokens(vec![0]);
        let slice = Slice {
            slot: 0,
            start: 0,
            input,
            first_block: 0,
            blocks: vec![0],
            draw: Some(draw),
            score: None,
        };
        Step { epoch: self.epoch, number: 0, slices: vec![slice], traces: Vec::new() }
    }
}

/// Begins the next step as soon as it is there, if that is while a device still works on the one before.
fn begin_next(rank: &mut dyn Execute, steps: &mut mpsc::Receiver<Step>) -> Result<Option<Step>, EpochError> {
    let began = Instant::now();
    // Whoever runs the step knows how long it may take.
    while began.elapsed() < LOOK_MAX && rank.is_busy()? {
        match steps.try_recv() {
            Ok(step) => {
                rank.begin(&step)?;
                return Ok(Some(step));
            }
            Err(_) => std::thread::sleep(LOOK_INTERVAL),
        }
    }
    Ok(None)
}

/// Whether a prompt is run in this step, or answers go on and nothing else.
fn point(step: &Step, rank: usize) -> Point {
    let prompt = |slice: &Slice| matches!(&slice.input, Input::Tokens(tokens) if tokens.len() > 1);
    if step.slices.iter().any(prompt) { Point::Prefill(rank) } else { Point::Decode(rank) }
}

/// What runs the steps: the model on its weights, or else a rehearsal.
fn execution(
    setup: &Setup,
    options: &Options,
    weights: Option<Loaded>,
    collective: Box<dyn Collective>,
    link: Link,
) -> Result<Box<dyn Execute>, EpochError> {
    let rank: Result<Rank, ModelError> = match weights {
        None => {
            let (cost, config) = (setup.options.rehearse.unwrap_or_default(), setup.checkpoint.config());
            return Ok(Box::new(Rehearsal::new(cost, setup.card.vocab, config.eos.clone(), collective)));
        }
        Some(Loaded::Here(weights)) => Rank::new(weights, options, collective),
        Some(Loaded::OnGpu(weights)) => Rank::on_gpu(weights, options, collective, link),
    };
    Ok(Box::new(rank.map_err(EpochError::Model)?))
}

/// The leader's limits decide what steps look like: every rank must have made room for as much.
fn check_options(collective: &mut dyn Collective, setup: &Setup, shape: &Shape) -> Result<(), EpochError> {
    let model = &shape.model;
    let rehearses = usize::from(setup.options.rehearse.is_some());
    let limits = [model.kv_blocks, model.sequences_max, model.step_tokens_max, rehearses];
    let mut bytes: Vec<u8> = limits.iter().flat_map(|&limit| (limit as u64).to_le_bytes()).collect();
    let mine = bytes.clone();
    collective.broadcast(0, &mut bytes)?;
    if bytes == mine {
        return Ok(());
    }
    let words = bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
    let leader: Vec<u64> = words.collect();
    let told = |limits: &[u64]| {
        let runs = if limits[3] == 0 { "the model" } else { "a rehearsal" };
        format!("{} KV blocks, {} sequences and {} tokens a step of {runs}", limits[0], limits[1], limits[2])
    };
    Err(EpochError::Options { leader: told(&leader), here: told(&limits.map(|limit| limit as u64)) })
}

fn secret(hex: &str) -> Result<Secret, EpochError> {
    let wrong = || record_error("its secret is not 64 hexadecimal digits".into());
    let mut bytes = [0; 32];
    if hex.len() != 64 || !hex.is_ascii() {
        return Err(wrong());
    }
    for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
    }
    Ok(Secret::from(bytes))
}

fn record_error(says: String) -> EpochError {
    EpochError::Record(says)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that is busy for so many looks, during the last of which the next step comes.
    struct Device {
        busy: std::cell::Cell<usize>,
        late: Option<(mpsc::Sender<Step>, Step)>,
        begun: Vec<u64>,
    }

    impl Execute for Device {
        fn begin(&mut self, step: &Step) -> Result<bool, EpochError> {
            self.begun.push(step.number);
            Ok(true)
        }

        fn is_busy(&self) -> Result<bool, EpochError> {
            self.busy.set(self.busy.get().saturating_sub(1));
            if let (1, Some((to, step))) = (self.busy.get(), &self.late) {
                to.try_send(step.clone()).unwrap();
            }
            Ok(self.busy.get() > 0)
        }

        fn run(&mut self, _: &Step, _: &mut galerne_model::Masks<'_>) -> Result<Sampled, EpochError> {
            unreachable!("nothing is run")
        }

        fn meet(&mut self) -> Result<(), EpochError> {
            unreachable!("nobody is met")
        }

        fn close(self: Box<Self>) -> Result<(), EpochError> {
            unreachable!("nothing is left")
        }
    }

    #[test]
    fn the_next_step_is_begun_while_the_one_before_runs() {
        let step = |number| Step { epoch: Epoch(1), number, slices: Vec::new(), traces: Vec::new() };
        let (to, mut steps) = mpsc::channel(2);
        let mut device = Device { busy: 9.into(), late: Some((to.clone(), step(4))), begun: Vec::new() };
        let next = begin_next(&mut device, &mut steps).unwrap();
        assert_eq!((next.map(|step| step.number), device.begun), (Some(4), vec![4]));

        // Once the device has nothing to do, the step before is answered first.
        to.try_send(step(5)).unwrap();
        let mut device = Device { busy: 1.into(), late: None, begun: Vec::new() };
        assert!(begin_next(&mut device, &mut steps).unwrap().is_none());
        assert_eq!((device.begun, steps.try_recv().unwrap().number), (Vec::new(), 5));
    }
}
