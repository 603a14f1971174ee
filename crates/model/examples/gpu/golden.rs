//! Against transformers' own numbers, in f32.

use std::fs;
use std::path::Path;

use galerne_model::{Options, WindowChoice};
use galerne_types::TokenId;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::check::{DISTANCE_MAX, Near};
use crate::device::Gpus;
use crate::ranks::{Drawn, blocks, load_group, open, options, run};
use crate::script::{Memory, greedy, step, steps};
use crate::{Outcome, Report};

/// Models that lie beside their values, and how far logits may be from these: the weights of the first are f32 and drawn by lot, so
/// that rounding them to bf16 shows by itself.
pub(crate) const MODELS: [(&str, f32); 2] = [("tiny-mistral", 0.25), ("bard-1m", DISTANCE_MAX)];
/// Cases with longer prompts are left out where time is short, and answers are cut to as many tokens.
const QUICK_TOKENS: usize = 5;

struct Case {
    key: String,
    window: WindowChoice,
    prompt: Vec<TokenId>,
    answer: Vec<TokenId>,
    /// What the best logit had before the second.
    gaps: Vec<f32>,
}

impl Case {
    fn read(case: &Value) -> Outcome<Self> {
        let numbers = |name: &str| case[name].as_array().ok_or(format!("a case without {name}"));
        let ids = |name: &str| -> Outcome<Vec<TokenId>> {
            Ok(numbers(name)?.iter().filter_map(|id| TokenId::try_from(id.as_u64()?).ok()).collect())
        };
        let window = case["sliding_window"].as_u64();
        Ok(Self {
            key: case["key"].as_str().ok_or("a case without a key")?.to_owned(),
            window: window.map_or(WindowChoice::Full, |tokens| WindowChoice::Tokens(tokens as usize)),
            prompt: ids("prompt_ids")?,
            answer: ids("greedy_ids")?,
            gaps: numbers("top1_minus_top2")?.iter().filter_map(|gap| Some(gap.as_f64()? as f32)).collect(),
        })
    }
}

/// Compares the logits of every prompt and the greedy answers behind them.
pub(crate) fn check(
    gpus: &Gpus,
    folder: &Path,
    (name, bound): (&str, f32),
    quick: bool,
    report: &mut Report,
) -> Outcome<()> {
    let values: Value = serde_json::from_slice(&fs::read(folder.join(format!("{name}.json")))?)?;
    let tensors = fs::read(folder.join(format!("{name}.safetensors")))?;
    let tensors = SafeTensors::deserialize(&tensors)?;
    let weights = load_group(gpus, &open(&folder.join(name))?, 1)?;
    for case in values["cases"].as_array().ok_or("goldens without cases")? {
        let mut case = Case::read(case)?;
        if quick {
            if case.prompt.len() > QUICK_TOKENS {
                continue;
            }
            case.answer.truncate(QUICK_TOKENS);
        }
        let length = case.prompt.len();
        let memory = Memory { slots: 2, blocks_per_slot: blocks(length + case.answer.len()) };
        let options = Options { window: case.window, ..options(memory.blocks(), memory.slots, length) };
        // Token by token, so that every position's logits show; then at once, with the answer behind it.
        let by_token = case.prompt.iter().enumerate().map(|(at, id)| memory.known(0, at, &[*id], greedy(at)));
        let mut script: Vec<_> = by_token.map(|slice| step(vec![slice])).collect();
        script.extend(steps(vec![memory.sequence(1, &case.prompt, length, case.answer.len())]));
        let drawn = run(&weights, &options, &script, true)?;

        let tensor = tensors.tensor(&format!("{}.logits", case.key))?;
        let logits: Vec<f32> = tensor.data().as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
        let expected: Vec<&[f32]> = logits.chunks_exact(tensor.shape()[1]).collect();
        let mut near = Near { bound, ..Near::default() };
        for (at, expected) in (length - expected.len()..).zip(expected) {
            near.row(&drawn[&(0, at as u32)].1, expected);
        }
        let same = drawn[&(0, length as u32 - 1)] == drawn[&(1, 0)];
        let (followed, fair) = follow(&case, &drawn, &near);
        report.tell(&json!({
            "part": "golden", "name": format!("{name} {}", case.key), "ok": near.ok() && same && fair,
            "rows": near.rows, "distance": near.worst, "rms": near.rms, "agree": near.agree, "asked": near.asked,
            "at_once_and_by_token": same, "answer": case.answer.len(), "followed": followed,
        }));
    }
    Ok(())
}

/// How many tokens of the answer came; and whether, where the first other one came, rounding can have done it.
fn follow(case: &Case, drawn: &Drawn, near: &Near) -> (usize, bool) {
    for (index, expected) in case.answer.iter().enumerate() {
        let (id, row) = &drawn[&(1, index as u32)];
        if id != expected {
            return (index, case.gaps[index] <= near.gap_min(row));
        }
    }
    (case.answer.len(), true)
}
