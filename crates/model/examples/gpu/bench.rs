//! How long steps take: what memory and arithmetic allow, stands beside it in the table that `benches/gpu` makes.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use galerne_checkpoint::{Checkpoint, Config};
use galerne_collective::Solo;
use galerne_model::gpu::{Device, GpuWeights, Link, kv_bytes_per_block};
use galerne_model::{Options, Rank};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{KvDtype, Shards, Slice, Step};
use serde_json::{Value, json};

use crate::device::{Gpus, Kernels, Watched};
use crate::ranks::{blocks, load, open, options, threads};
use crate::script::{Memory, greedy, prompt, step};
use crate::sizes::{Case, Sizes};
use crate::{Outcome, Report};

/// Memory that is left to the driver and to what the layers work with, of all that is free once the weights are there.
const SPARED_BYTES: u64 = 4 << 30;
/// Tokens of a batch's contexts that are soon there.
const LIGHT_TOKENS: usize = 1 << 15;
/// How often work is done to tell what the GPU needs from what the host does.
const TIMES: [u32; 2] = [2, 4];

/// A rank that is measured.
struct Bench<'a> {
    rank: Rank,
    device: Arc<Watched>,
    sizes: &'a Sizes,
    config: Config,
    /// How sequences lie in memory for the case under way, and how far each has come.
    memory: Memory,
    filled: Vec<usize>,
    kv_blocks: usize,
    kv_bytes_per_token: usize,
    /// How weights are held, and bytes of those that a step reads.
    weights: String,
    weight_bytes: usize,
    numerics: &'static str,
}

/// Loads the model and measures everything; what does not fit into memory is left out with a sentence.
pub(crate) fn run(
    gpus: &Gpus,
    path: &Path,
    sizes: &Sizes,
    start: Instant,
    report: &mut Report,
) -> Outcome<()> {
    let checkpoint = open(path)?;
    let mut bench = Bench::load(gpus, &checkpoint, sizes, start, report)?;
    if gpus.fast {
        bench.prefills(report);
        report.attempt("kernels", "kernels", |report| bench.kernels_of_prefill(report));
        return Ok(());
    }
    let decode = |bench: &mut Bench<'_>, case: Case, report: &mut Report| {
        let name = format!("decode {} at {}", case.batch, case.context);
        report.attempt("decode", &name, |report| bench.decode(case, report));
    };
    // What takes long to fill comes last: time may run out.
    let light = |case: &&Case| case.batch * case.context <= LIGHT_TOKENS;
    for &case in sizes.decode.iter().filter(light) {
        decode(&mut bench, case, report);
    }
    bench.prefills(report);
    for &case in &sizes.attention {
        let name = format!("attention {} at {}", case.batch, case.context);
        report.attempt("attention", &name, |report| bench.attention(case, report));
    }
    report.attempt("idle", "idle", |report| bench.idle(report));
    report.attempt("kernels", "kernels", |report| bench.kernels(report));
    for &case in sizes.decode.iter().filter(|case| !light(case)) {
        decode(&mut bench, case, report);
    }
    Ok(())
}

impl<'a> Bench<'a> {
    fn load(
        gpus: &Gpus,
        checkpoint: &Checkpoint,
        sizes: &'a Sizes,
        start: Instant,
        report: &mut Report,
    ) -> Outcome<Self> {
        let config = checkpoint.config().clone();
        let shards = Shards::for_model(config.kv_heads, 1, None)?;
        let device = Arc::new(Watched::new(gpus.open()?)?);
        let opened_s = start.elapsed().as_secs_f64();
        let weights = load(gpus, checkpoint, shards, 0, &(Arc::clone(&device) as Arc<dyn Device>))?;
        device.wait()?;
        let loaded_s = start.elapsed().as_secs_f64();
        let block_bytes = kv_bytes_per_block(&config, shards, 0, KvDtype::Bf16)?;
        let wanted = sizes
            .decode
            .iter()
            .chain(&sizes.attention)
            .map(|case| case.batch * blocks(sizes.positions(*case)));
        let wanted = wanted.max().unwrap_or(1).max(blocks(sizes.prefill));
        let room = device.memory()?.free.saturating_sub(SPARED_BYTES) as usize / block_bytes;
        let kv_blocks = if gpus.emulate { wanted } else { wanted.min(room) };
        let slots = sizes.decode.iter().chain(&sizes.attention).map(|case| case.batch).max().unwrap_or(1);
        let weight_bytes = weights.bytes() - config.vocab * config.hidden * 2; // a step looks up rows of the embedding
        let options = Options {
            threads: threads().min(4),
            compute: Gpus::compute(gpus.fast),
            ..options(kv_blocks, slots, sizes.prefill)
        };
        let bytes = weights.bytes();
        let mut bench = Self {
            rank: rank(weights, &options, shards)?,
            device,
            sizes,
            config,
            memory: Memory { slots: 1, blocks_per_slot: kv_blocks },
            filled: Vec::new(),
            kv_blocks,
            kv_bytes_per_token: block_bytes / KV_BLOCK_TOKENS,
            weights: gpus.quantize.map_or_else(|| "bf16".to_owned(), |quantize| quantize.to_string()),
            weight_bytes,
            numerics: if gpus.fast { "fast" } else { "invariant" },
        };
        bench.fill(Case { batch: 1, context: sizes.short })?;
        report.tell(&json!({
            "part": "load", "name": checkpoint.name(), "weights": bench.weights, "bytes": bytes,
            "threads": threads(), "device": bench.device.name(),
            "opened_s": opened_s, "loaded_s": loaded_s, "first_token_s": start.elapsed().as_secs_f64(),
            "kv_blocks": kv_blocks, "parameters": bench.products(1.0, 1.0) / 2.0,
        }));
        Ok(bench)
    }

    /// Operations of the products for so many tokens, of which so many are drawn from.
    fn products(&self, tokens: f64, drawn: f64) -> f64 {
        let &Config { layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, .. } = &self.config;
        let attention = 2 * hidden * head_dim * (heads + kv_heads);
        let layer = attention + 3 * hidden * intermediate;
        2.0 * ((layers * layer) as f64 * tokens + (vocab * hidden) as f64 * drawn)
    }

    /// Brings the sequences of a case to its context: what they had is kept if they lie as they did.
    fn fill(&mut self, case: Case) -> Outcome<()> {
        let blocks_per_slot = blocks(self.sizes.positions(case));
        if case.batch * blocks_per_slot > self.kv_blocks {
            let needed = case.batch * blocks_per_slot;
            return Err(format!(
                "left out: {needed} KV blocks are needed, {} fit beside the weights",
                self.kv_blocks
            )
            .into());
        }
        if (self.memory.slots, self.memory.blocks_per_slot) != (case.batch, blocks_per_slot) {
            self.memory = Memory { slots: case.batch, blocks_per_slot };
            self.filled = vec![0; case.batch];
        }
        let (mut slices, mut room): (Vec<Slice>, usize) = (Vec::new(), self.sizes.prefill);
        for slot in 0..case.batch {
            let tokens = prompt(case.context, slot, self.config.vocab);
            while self.filled[slot] < case.context {
                let start = self.filled[slot];
                let end = case.context.min(start + room);
                // One slice a slot and step.
                let draw = greedy(0).filter(|_| end == case.context);
                slices.push(self.memory.known(slot, start, &tokens[start..end], draw));
                (self.filled[slot], room) = (end, room - (end - start));
                if room == 0 {
                    self.rank.step(&step(std::mem::take(&mut slices)), &mut |_| None)?;
                    room = self.sizes.prefill;
                }
            }
        }
        if !slices.is_empty() {
            self.rank.step(&step(slices), &mut |_| None)?;
        }
        Ok(())
    }

    /// Steps of a case, each begun while the one before runs, and how long each took in ms, sorted.
    fn steps_ms(&mut self, case: Case, steps: usize) -> Outcome<Vec<f64>> {
        let mut found = Vec::new();
        let step_at = |index: usize| {
            let slices = (0..case.batch).map(|slot| self.memory.next(slot, case.context + index, index + 1));
            Step { number: index as u64, ..step(slices.collect()) }
        };
        let script: Vec<Step> = (0..self.sizes.warm_up + steps).map(step_at).collect();
        let mut start = Instant::now();
        for (index, step) in script.iter().enumerate() {
            if self.rank.begin(step)?
                && let Some(next) = script.get(index + 1)
            {
                self.rank.begin(next)?;
            }
            self.rank.step(step, &mut |_| None)?;
            let now = Instant::now();
            found.push((now - std::mem::replace(&mut start, now)).as_secs_f64() * 1e3);
        }
        found.drain(..self.sizes.warm_up);
        found.sort_by(f64::total_cmp);
        Ok(found)
    }

    fn decode(&mut self, case: Case, report: &mut Report) -> Outcome<()> {
        let steps = self.sizes.steps;
        self.fill(case)?;
        let found = self.steps_ms(case, steps)?;
        let positions = case.context + self.sizes.warm_up + steps / 2;
        report.tell(&json!({
            "part": "decode", "name": format!("decode {} at {}", case.batch, case.context),
            "batch": case.batch, "context": case.context, "steps": steps, "weights": self.weights,
            "ms": summary(&found), "histogram": histogram(&found),
            "bytes": self.weight_bytes + case.batch * positions * self.kv_bytes_per_token, "weight_bytes": self.weight_bytes,
        }));
        Ok(())
    }

    /// Prompts that run at once.
    fn prefills(&mut self, report: &mut Report) {
        for &tokens in &self.sizes.prefills {
            let name = format!("prefill of {tokens}");
            report.attempt("prefill", &name, |report| self.prefill(tokens, report));
        }
    }

    fn prefill(&mut self, tokens: usize, report: &mut Report) -> Outcome<()> {
        let mut found = Vec::new();
        for run in 0..=self.sizes.warm_up {
            self.refill(Case { batch: 1, context: 0 });
            let start = Instant::now();
            self.fill(Case { batch: 1, context: tokens })?;
            if run > 0 {
                found.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        found.sort_by(f64::total_cmp);
        let &Config { layers, heads, head_dim, .. } = &self.config;
        report.tell(&json!({
            "part": "prefill", "name": format!("prefill of {tokens}, {}", self.numerics), "tokens": tokens,
            "weights": self.weights, "numerics": self.numerics,
            "ms": summary(&found), "operations": self.products(tokens as f64, 1.0),
            "attention_operations": (2 * layers * heads * head_dim * tokens * (tokens + 1)) as f64,
        }));
        Ok(())
    }

    /// Forgets how far sequences have come.
    fn refill(&mut self, case: Case) {
        self.memory = Memory { slots: case.batch, blocks_per_slot: 0 };
        self.filled.clear();
    }

    /// What a long context adds to a step: reading its keys and values.
    fn attention(&mut self, case: Case, report: &mut Report) -> Outcome<()> {
        let (steps, short) = (self.sizes.steps, Case { context: self.sizes.short, ..case });
        self.fill(short)?;
        let before = self.steps_ms(short, steps)?;
        self.fill(case)?;
        let found = self.steps_ms(case, steps)?;
        let added_ms = middle(&found) - middle(&before);
        report.tell(&json!({
            "part": "attention", "name": format!("attention {} at {}", case.batch, case.context),
            "batch": case.batch, "context": case.context, "short": short.context, "weights": self.weights,
            "ms": summary(&found), "short_ms": summary(&before), "added_ms": added_ms,
            "bytes": case.batch * (case.context - short.context) * self.kv_bytes_per_token,
        }));
        Ok(())
    }

    /// What of a step the GPU waits for the host: see [`Watched`].
    fn idle(&mut self, report: &mut Report) -> Outcome<()> {
        let largest = self.sizes.decode.iter().filter(|case| case.batch <= 64).max_by_key(|case| case.batch);
        let batches = [Some(1), largest.map(|case| case.batch)];
        for batch in batches.into_iter().flatten() {
            let (case, steps) = (Case { batch, context: self.sizes.short }, self.sizes.steps);
            self.fill(case)?;
            let mut at = |times| -> Outcome<f64> {
                self.device.repeat(times);
                let found = self.steps_ms(case, steps);
                self.device.repeat(1);
                Ok(middle(&found?))
            };
            let (once, [few, many]) = (at(1)?, [at(TIMES[0])?, at(TIMES[1])?]);
            let busy = (many - few) / f64::from(TIMES[1] - TIMES[0]);
            report.tell(&json!({
                "part": "idle", "name": format!("GPU idle at batch {batch}"), "batch": batch, "weights": self.weights,
                "step_ms": once, "busy_ms": busy, "idle": (once - busy) / once,
            }));
        }
        Ok(())
    }

    /// Where the time of a step goes, kernel by kernel.
    fn kernels(&mut self, report: &mut Report) -> Outcome<()> {
        let short = self.sizes.short;
        let case = Case { batch: 1, context: short };
        self.fill(case)?;
        let device = Arc::clone(&self.device);
        let kernels = device.by_kernel(|| {
            let slice = self.memory.next(0, short, 1);
            self.rank.step(&step(vec![slice]), &mut |_| None)?;
            Ok(())
        })?;
        tell_kernels("decode, batch 1", &kernels, report);
        self.kernels_of_prefill(report)
    }

    fn kernels_of_prefill(&mut self, report: &mut Report) -> Outcome<()> {
        let case = Case { batch: 1, context: self.sizes.prefill };
        self.refill(case);
        let device = Arc::clone(&self.device);
        let kernels = device.by_kernel(|| self.fill(case))?;
        tell_kernels(&format!("prefill of {}, {}", case.context, self.numerics), &kernels, report);
        Ok(())
    }
}

fn rank(weights: Arc<GpuWeights>, options: &Options, shards: Shards) -> Outcome<Rank> {
    Ok(Rank::on_gpu(weights, options, Box::new(Solo::new(shards.virtual_shards())), Link::host())?)
}

fn tell_kernels(name: &str, kernels: &Kernels, report: &mut Report) {
    let row = |(kernel, (launches, seconds)): (&std::ffi::CString, &(usize, f64))| {
        (kernel.to_string_lossy().into_owned(), json!({ "launches": launches, "ms": seconds * 1e3 }))
    };
    let kernels: serde_json::Map<String, Value> = kernels.iter().map(row).collect();
    report.tell(&json!({ "part": "kernels", "name": name, "kernels": kernels }));
}

/// Of sorted times.
fn middle(sorted: &[f64]) -> f64 {
    quantile(sorted, 0.5)
}

/// By nearest rank.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

fn summary(sorted: &[f64]) -> Value {
    json!({
        "min": quantile(sorted, 0.0), "p50": middle(sorted), "p90": quantile(sorted, 0.9), "p99": quantile(sorted, 0.99),
        "max": quantile(sorted, 1.0),
    })
}

/// Steps by how much longer than the shortest they took: `[share, steps]`, in steps of 2%.
fn histogram(sorted: &[f64]) -> Value {
    const WIDTH: f64 = 0.02;
    let least = quantile(sorted, 0.0);
    let mut bars = std::collections::BTreeMap::<u64, usize>::new();
    for x in sorted {
        *bars.entry(((x / least - 1.0) / WIDTH) as u64).or_default() += 1;
    }
    bars.into_iter().map(|(bar, steps)| json!([bar as f64 * WIDTH, steps])).collect()
}
