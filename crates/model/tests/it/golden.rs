//! Against transformers' own numbers, with and without a sliding window.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use galerne_checkpoint::Checkpoint;
use galerne_model::{Options, Rank, Trace, WindowChoice};
use galerne_types::{Epoch, Step, TokenId};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::support::assert_close;
use crate::support::group::{Drawn, options, run, solo};
use crate::support::script::{greedy, known, sequence, steps};

/// Below this gap between the two best logits another token is no error.
const GAP_MIN: f32 = 1e-2;

/// One model's golden values.
pub(crate) struct Golden {
    pub(crate) name: &'static str,
    json: Value,
    tensors: Vec<u8>,
}

/// One prompt and what follows it.
pub(crate) struct Case {
    pub(crate) key: String,
    pub(crate) window: WindowChoice,
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) greedy: Vec<TokenId>,
    pub(crate) gaps: Vec<f32>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

impl Golden {
    pub(crate) fn load(name: &'static str) -> Self {
        let read = |ending: &str| fs::read(folder().join(format!("{name}.{ending}"))).expect("a golden file");
        Self { name, json: serde_json::from_slice(&read("json")).unwrap(), tensors: read("safetensors") }
    }

    /// The model, where it lies beside its values.
    pub(crate) fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(&folder().join(self.name)).unwrap()
    }

    pub(crate) fn cases(&self) -> Vec<Case> {
        let ids = |value: &Value| -> Vec<TokenId> {
            value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as TokenId).collect()
        };
        let case = |case: &Value| Case {
            key: case["key"].as_str().unwrap().to_owned(),
            window: match case["sliding_window"].as_u64() {
                Some(tokens) => WindowChoice::Tokens(tokens as usize),
                None => WindowChoice::Full,
            },
            prompt: ids(&case["prompt_ids"]),
            greedy: ids(&case["greedy_ids"]),
            gaps: case["top1_minus_top2"]
                .as_array()
                .unwrap()
                .iter()
                .map(|x| x.as_f64().unwrap() as f32)
                .collect(),
        };
        self.json["cases"].as_array().unwrap().iter().map(case).collect()
    }

    /// Rows of a tensor, if the golden has it.
    fn rows(&self, name: &str) -> Option<Vec<Vec<f32>>> {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let tensor = tensors.tensor(name).ok()?;
        let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
        Some(values.chunks_exact(tensor.shape()[1]).map(<[f32]>::to_vec).collect())
    }

    /// The prompt's logits (as many of its last positions as the golden has) and the greedy continuation.
    pub(crate) fn check(&self, rank: &mut Rank, case: &Case) {
        let what = |part: &str| format!("{} {} {part}", self.name, case.key);
        let expected = self.rows(&format!("{}.logits", case.key)).expect("every case has logits");
        // Token by token, so that every position's logits show.
        let slices =
            case.prompt.iter().enumerate().map(|(at, id)| known(0, at, &[*id], greedy(at))).collect();
        let by_token = run(rank, &steps(vec![slices]));
        let first = case.prompt.len() - expected.len();
        for (at, expected) in expected.iter().enumerate() {
            let (_, row) = &by_token[&(0, (first + at) as u32)];
            assert_close(row, expected, &what(&format!("logits of position {}", first + at)));
        }
        let drawn = run(rank, &steps(vec![sequence(1, &case.prompt, case.prompt.len(), case.greedy.len())]));
        let last = &by_token[&(0, case.prompt.len() as u32 - 1)];
        assert!(drawn[&(1, 0)] == *last, "{}", what("at once and token by token differ"));
        self.check_greedy(case, &drawn);
    }

    fn check_greedy(&self, case: &Case, drawn: &Drawn) {
        let step_logits = self.rows(&format!("{}.step_logits", case.key));
        for (index, ((id, row), expected)) in drawn.values().zip(&case.greedy).enumerate() {
            let what = format!("{} {}: greedy token {index}", self.name, case.key);
            if let Some(step_logits) = &step_logits {
                assert_close(row, &step_logits[index], &what);
            }
            if id != expected {
                assert!(case.gaps[index] < GAP_MIN, "{what} is {id}, expected {expected}");
                return;
            }
        }
    }

    fn check_hidden(&self, rank: &mut Rank, case: &Case) {
        let slice = known(2, 0, &case.prompt, None);
        let step = Step { epoch: Epoch(1), number: 1, slices: vec![slice], traces: Vec::new() };
        let mut layers: BTreeMap<usize, Vec<f32>> = BTreeMap::new();
        rank.step_traced(&step, &mut |_| None, &mut |trace| {
            if let Trace::Hidden { layer, rows } = trace {
                layers.entry(layer).or_default().extend_from_slice(rows);
            }
        })
        .unwrap();
        for (layer, found) in layers {
            let expected =
                self.rows(&format!("{}.hidden.{layer}", case.key)).expect("hidden states of every layer");
            let what = format!("{} {}: hidden states of layer {layer}", self.name, case.key);
            assert_close(&found, &expected.concat(), &what);
        }
    }
}

fn each_case(name: &'static str, check: impl Fn(&Golden, &mut Rank, &Case)) {
    let golden = Golden::load(name);
    let checkpoint = golden.checkpoint();
    for case in golden.cases() {
        let mut rank = solo(&checkpoint, &Options { window: case.window, ..options() });
        check(&golden, &mut rank, &case);
    }
}

#[test]
fn tiny_mistral_has_the_reference_logits_and_tokens() {
    each_case("tiny-mistral", Golden::check);
}

#[test]
fn tiny_mistral_has_the_reference_hidden_states_in_every_layer() {
    each_case("tiny-mistral", Golden::check_hidden);
}

#[test]
fn bard_writes_what_the_reference_writes() {
    each_case("bard-1m", Golden::check);
}
