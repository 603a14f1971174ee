//! Against the CPU; and against itself, however the work is cut.

use std::io::{BufRead as _, Write as _};
use std::path::Path;
use std::sync::Arc;

use galerne_checkpoint::Config;
use galerne_collective::Solo;
use galerne_model::{Options, Rank, Weights};
use galerne_types::{Compute, KvDtype, Shards, Step, TokenId};
use serde_json::json;

use crate::device::Gpus;
use crate::ranks::{
    Drawn, Way, blocks, blocks_of, load_group, open, options, run, run_by, run_on, threads, virtual_shards,
};
use crate::script::{Memory, greedy, prompt, step, steps, warm};
use crate::{Outcome, Report};

/// How far a logit may be from that in f32, as a share of the spread of its row, where weights are bf16 in both, and activations,
/// keys and values are rounded to it.
pub(crate) const DISTANCE_MAX: f32 = 0.05;
/// Where that is not enough: how far it may be, of what the CPU is off that rounds to bf16 as well, but at other places.
const OF_CPU_MAX: f32 = 1.5;

/// How far rows of logits are from what they should be.
#[derive(Default)]
pub(crate) struct Near {
    /// How far they may be.
    pub(crate) bound: f32,
    pub(crate) rows: usize,
    /// The largest difference as a share of its row's spread.
    pub(crate) worst: f32,
    /// The largest root of a row's mean square difference, likewise.
    pub(crate) rms: f32,
    /// Rows whose best logit leads by so much that it must stay the best, and those in which it did.
    pub(crate) asked: usize,
    pub(crate) agree: usize,
}

impl Near {
    pub(crate) fn row(&mut self, found: &[f32], expected: &[f32]) {
        let spread = spread(expected);
        let distances = || found.iter().zip(expected).map(|(x, y)| (x - y).abs() / spread);
        let rms = (distances().map(|x| x * x).sum::<f32>() / expected.len() as f32).sqrt();
        self.rms = self.rms.max(rms);
        // What is no number is nearest to nothing.
        let lost = found.len() != expected.len() || found.iter().any(|x| !x.is_finite());
        self.worst = if lost { f32::INFINITY } else { distances().fold(self.worst, f32::max) };
        self.rows += 1;
        let (best, lead) = best(expected);
        if lead > self.gap_min(expected) {
            self.asked += 1;
            self.agree += usize::from(best == crate::check::best(found).0);
        }
    }

    /// Two logits may change places if they are no farther apart.
    pub(crate) fn gap_min(&self, row: &[f32]) -> f32 {
        2.0 * self.bound * spread(row)
    }

    pub(crate) fn ok(&self) -> bool {
        self.rows > 0 && self.worst <= self.bound && self.agree == self.asked
    }
}

fn spread(row: &[f32]) -> f32 {
    let mean = row.iter().sum::<f32>() / row.len() as f32;
    (row.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / row.len() as f32).sqrt()
}

/// The place of the largest, and by how much it leads.
fn best(row: &[f32]) -> (usize, f32) {
    let (mut at, mut first, mut second) = (0, f32::NEG_INFINITY, f32::NEG_INFINITY);
    for (index, x) in row.iter().enumerate() {
        if *x > first {
            (at, second, first) = (index, first, *x);
        } else {
            second = second.max(*x);
        }
    }
    (at, first - second)
}

/// A prompt's logits, position by position, in slot 0.
fn by_token(memory: &Memory, prompt: &[TokenId]) -> Vec<Step> {
    let slices = prompt.iter().enumerate().map(|(at, id)| memory.known(0, at, &[*id], greedy(at)));
    slices.map(|slice| step(vec![slice])).collect()
}

/// Compares logits with those of the CPU, which computes in f32, and keeps keys and values so; and those of the CPU in bf16, since
/// there are models in which rounding shows more than in others.
pub(crate) fn near(gpus: &Gpus, path: &Path, report: &mut Report) -> Outcome<()> {
    const TOKENS: usize = 12;
    let checkpoint = open(path)?;
    let memory = Memory { slots: 1, blocks_per_slot: blocks(TOKENS) };
    let script = by_token(&memory, &prompt(TOKENS, 5, checkpoint.config().vocab));
    let gpu = || options(memory.blocks(), 1, TOKENS);
    let shards = Shards::new(virtual_shards(&checkpoint), 1)?;
    let weights = Arc::new(Weights::load(&checkpoint, shards, 0, threads(), None, &|_, _| {})?);
    let on_cpu = |compute, kv_dtype| {
        let options = Options { threads: threads(), compute, kv_dtype, ..gpu() };
        let mut rank =
            Rank::new(Arc::clone(&weights), &options, Box::new(Solo::new(shards.virtual_shards())))?;
        run_on(&mut rank, &script, true)
    };
    let exact = on_cpu(Compute::F32, KvDtype::F32)?;
    let distance = |found: &Drawn, bound| {
        let mut near = Near { bound, ..Near::default() };
        exact.iter().for_each(|(key, (_, row))| near.row(&found[key].1, row));
        near
    };
    let cpu = distance(&on_cpu(Compute::Bf16, KvDtype::Bf16)?, 0.0);
    let found = run(&load_group(gpus, &checkpoint, 1)?, &gpu(), &script, true)?;
    let near = distance(&found, DISTANCE_MAX.max(OF_CPU_MAX * cpu.worst));
    report.tell(&json!({
        "part": "near", "name": checkpoint.name(), "ok": near.ok(), "rows": near.rows, "distance": near.worst, "rms": near.rms,
        "agree": near.agree, "asked": near.asked, "cpu_distance": cpu.worst, "cpu_rms": cpu.rms,
    }));
    Ok(())
}

/// Compares the logits behind prompts that a library multiplies with those of our own products.
pub(crate) fn fast(gpus: &Gpus, path: &Path, report: &mut Report) -> Outcome<()> {
    const SLOTS: usize = 4;
    /// Of each slot: together they are enough for the library.
    const TOKENS: usize = 150;
    let checkpoint = open(path)?;
    for world_size in [1, 2] {
        let weights = load_group(gpus, &checkpoint, world_size)?;
        let memory = Memory { slots: SLOTS, blocks_per_slot: blocks(TOKENS) };
        let vocab = checkpoint.config().vocab;
        let slice = |slot| memory.known(slot, 0, &prompt(TOKENS, slot, vocab), greedy(0));
        let script = [step((0..SLOTS).map(slice).collect())];
        let logits = |fast| {
            let compute = Gpus::compute(fast);
            let options = Options { compute, ..options(memory.blocks(), SLOTS, SLOTS * TOKENS) };
            run(&weights, &options, &script, true)
        };
        let (found, own) = (logits(true)?, logits(false)?);
        let mut near = Near { bound: DISTANCE_MAX, ..Near::default() };
        own.iter().for_each(|(key, (_, row))| near.row(&found[key].1, row));
        report.tell(&json!({
            "part": "fast", "name": format!("{}: N = {world_size}, fast", checkpoint.name()), "ok": near.ok(),
            "rows": near.rows, "distance": near.worst, "rms": near.rms,
        }));
    }
    Ok(())
}

/// Sequences, of which one is looked at, and how they run beside each other.
pub(crate) struct Script {
    pub(crate) long: Vec<TokenId>,
    pub(crate) drawn: usize,
    pub(crate) memory: Memory,
    pub(crate) options: Options,
    pub(crate) alone: Vec<Step>,
    pub(crate) batch: Vec<Step>,
}

impl Script {
    pub(crate) fn new(&Config { vocab, context_tokens_max, .. }: &Config, quick: bool) -> Self {
        let (tokens, drawn, beside) =
            if quick { (40, 3, 20) } else { (150, 8, 600.min(context_tokens_max / 2)) };
        let long = prompt(tokens, 1, vocab);
        let memory = Memory { slots: 3, blocks_per_slot: blocks(beside.max(tokens) + 64) };
        let steps_beside = tokens / 16 + drawn;
        let alone = steps(vec![memory.sequence(0, &long, tokens, drawn)]);
        let batch = steps(vec![
            memory.sequence(1, &prompt(7, 3, vocab), 7, steps_beside),
            memory.sequence(0, &long, 16, drawn),
            memory.sequence(2, &prompt(beside, 2, vocab), beside, steps_beside),
        ]);
        let options = options(memory.blocks(), memory.slots, beside + tokens);
        Self { long, drawn, memory, options, alone, batch }
    }
}

/// The bits of one sequence, alone and however else it is run, all compared with the first.
struct Bits<'a> {
    name: &'a str,
    expected: Option<Drawn>,
    report: &'a mut Report,
}

impl Bits<'_> {
    /// Without logits ids alone are compared.
    fn compare(&mut self, what: &str, mut found: Drawn, logits: bool) {
        found.retain(|(slot, _), _| *slot == 0);
        let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let same = |(key, (id, row)): (&(u32, u32), &(TokenId, Vec<f32>)), expected: &Drawn| {
            expected.get(key).is_some_and(|(to, other)| id == to && (!logits || bits(row) == bits(other)))
        };
        let expected = self.expected.get_or_insert_with(|| found.clone());
        let ok = found.len() == expected.len() && found.iter().all(|token| same(token, expected));
        self.report.tell(&json!({ "part": "same", "name": format!("{}: {what}", self.name), "ok": ok }));
    }
}

/// Runs one sequence in all the ways that must not show.
pub(crate) fn same(gpus: &Gpus, path: &Path, quick: bool, report: &mut Report) -> Outcome<()> {
    let checkpoint = open(path)?;
    let name = checkpoint.name();
    let script = Script::new(checkpoint.config(), quick);
    let mut bits = Bits { name, expected: None, report };
    for world_size in [1, 2, 4] {
        let weights = load_group(gpus, &checkpoint, world_size)?;
        let mut check = |what: &str, steps: &[Step], logits: bool| -> Outcome<Drawn> {
            let found = run(&weights, &script.options, steps, logits)?;
            bits.compare(&format!("N = {world_size}, {what}"), found.clone(), logits);
            Ok(found)
        };
        let found = check("alone", &script.alone, true)?;
        check("in a batch", &script.batch, true)?;
        if world_size > 1 {
            continue;
        }
        check("once more", &script.alone, true)?;
        check("without a trace", &script.alone, false)?;
        check("in a batch, without a trace", &script.batch, false)?;
        let Script { long, drawn, memory, .. } = &script;
        for chunk in if quick { vec![13] } else { vec![1, 13, 32, 64, 100] } {
            let chunks = steps(vec![memory.sequence(0, long, chunk, *drawn)]);
            check(&format!("chunks of {chunk}"), &chunks, true)?;
        }
        let answer: Vec<TokenId> = found.values().map(|(id, _)| *id).collect();
        for ahead in [2, 5] {
            let drafted = steps(vec![memory.drafted(0, long, &answer, ahead)]);
            check(&format!("drafts of {ahead}"), &drafted, true)?;
        }
    }
    let Script { options, alone, .. } = &script;
    let (weights, warm) = (load_group(gpus, &checkpoint, 1)?, warm(alone));
    let mut bits = Bits { name, expected: None, report };
    bits.compare("drawn by threads", run(&weights, options, &warm, true)?, false);
    bits.compare("drawn on the GPU", run(&weights, options, &warm, false)?, false);
    Ok(())
}

/// The same of ranks whose sums travel from GPU to GPU.
pub(crate) fn met(way: Way, gpus: &Gpus, path: &Path, quick: bool, report: &mut Report) -> Outcome<()> {
    let checkpoint = open(path)?;
    let name = checkpoint.name();
    let script = Script::new(checkpoint.config(), quick);
    let mut bits = Bits { name, expected: None, report };
    let alone = run(&load_group(gpus, &checkpoint, 1)?, &script.options, &script.alone, true)?;
    bits.compare("N = 1", alone, true);
    for world_size in [2, 4] {
        let weights = load_group(gpus, &checkpoint, world_size)?;
        for (what, steps, logits) in [
            ("alone", &script.alone, true),
            ("in a batch", &script.batch, true),
            ("by graphs", &script.alone, false),
        ] {
            let found = run_by(way, &weights, &script.options, steps, logits)?;
            bits.compare(&format!("N = {world_size} by {way:?}, {what}"), found, logits);
        }
    }
    Ok(())
}

/// The logits of every position of the prompts that come in, to be compared with another engine's.
pub(crate) fn logits(gpus: &Gpus, path: &Path) -> Outcome<()> {
    let checkpoint = open(path)?;
    let weights = load_group(gpus, &checkpoint, 1)?;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let prompt = line?.split_whitespace().map(str::parse).collect::<Result<Vec<TokenId>, _>>()?;
        let memory = Memory { slots: 1, blocks_per_slot: blocks(prompt.len()) };
        let script = by_token(&memory, &prompt);
        let drawn = run(&weights, &options(blocks_of(&script), 1, 1), &script, true)?;
        for (_, row) in drawn.values() {
            out.write_all(&row.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())?;
        }
    }
    Ok(out.flush()?)
}
