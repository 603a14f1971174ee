//! What is drawn on a GPU is what the CPU's sampler draws from the same logits, bit for bit, whatever the settings of the rows
//! beside it.

use std::sync::Arc;

use galerne_emulator::Emulator;
use galerne_model::gpu::{Ask, Buffer, Device, Sampler};
use galerne_model::sampler::{self, Past};
use galerne_types::{Draw, History, Sampling, TokenId, TokenOut};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use crate::support::group::GPU_BYTES;

/// Ids of two digits, and of one.
const VOCABS: [usize; 4] = [1, 7, 256, 391];
const ROWS: usize = 6;

/// Everything that a row depends on.
#[derive(Clone, Debug)]
struct Row {
    logits: Vec<f32>,
    draw: Draw,
    ahead: u32,
    history: Option<History>,
    score: Option<(TokenId, u32)>,
}

impl Row {
    fn expected(&self) -> TokenOut {
        let past = self.history.as_ref().map(Past::new);
        match self.score {
            Some((id, top)) => sampler::score(&self.logits, id, top),
            None => {
                let draw = Draw { index: self.draw.index.saturating_add(self.ahead), ..self.draw.clone() };
                sampler::draw(&self.logits, &draw, past.as_ref(), None)
            }
        }
    }
}

/// Ties are common, and now and then something is no number.
fn logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => (-40..40i32).prop_map(|quarter| quarter as f32 / 4.0),
        8 => -20.0..20.0f32,
        1 => prop_oneof![Just(f32::NAN), Just(f32::NEG_INFINITY), Just(-0.0f32), Just(f32::INFINITY), Just(f32::MAX)],
    ]
}

fn sampling(vocab: usize) -> impl Strategy<Value = Sampling> {
    let temperature = prop_oneof![1 => Just(0.0f32), 1 => Just(1.0), 4 => 0.05..3.0f32, 1 => Just(1e-30f32)];
    let top_k = prop_oneof![Just(0u32), 1..500u32, Just(1)];
    let top_p = prop_oneof![Just(1.0f32), 0.01..1.0f32, Just(1e-20f32)];
    let min_p = prop_oneof![2 => Just(0.0f32), 1 => Just(1.0), 2 => 0.0..0.5f32];
    let penalties = prop_oneof![Just((1.0f32, 0.0f32, 0.0f32)), (0.3..3.0f32, -2.0..=2.0f32, -2.0..=2.0f32)];
    let bias = prop_oneof![-5.0..5.0f32, Just(-100.0f32), Just(100.0f32)];
    let bias = btree_map(0..vocab as u32 + 1, bias, 0..6);
    let logprobs = proptest::option::of(0..=20u32);
    (temperature, top_k, top_p, min_p, penalties, bias, any::<u64>(), logprobs).prop_map(
        |(temperature, top_k, top_p, min_p, penalties, bias, seed, logprobs)| Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty: penalties.0,
            presence_penalty: penalties.1,
            frequency_penalty: penalties.2,
            logit_bias: bias.into_iter().collect(),
            seed,
            logprobs,
        },
    )
}

fn row(vocab: usize) -> impl Strategy<Value = Row> {
    let id = 0..vocab as u32;
    let logits = prop_oneof![
        9 => vec(logit(), vocab),
        1 => Just(vec![f32::NEG_INFINITY; vocab]),
        1 => Just(vec![f32::NAN; vocab]),
    ];
    let banned = prop_oneof![4 => vec(0..vocab as u32 + 2, 0..6), 1 => Just((0..vocab as u32).collect())];
    let history = proptest::option::of((vec(id.clone(), 0..60), vec(id.clone(), 0..60)));
    let score = prop_oneof![6 => Just(None), 1 => (id, 0..=20u32).prop_map(Some)];
    (logits, sampling(vocab), any::<u32>(), 0..3u32, banned, history, score).prop_map(
        |(logits, sampling, index, ahead, banned, history, score)| Row {
            logits,
            draw: Draw { banned, ..Draw::new(sampling, index) },
            ahead,
            history: history.map(|(prompt, answer)| History { prompt, answer }),
            score,
        },
    )
}

fn rows() -> impl Strategy<Value = Vec<Row>> {
    (0..VOCABS.len()).prop_flat_map(|at| vec(row(VOCABS[at]), 1..=ROWS))
}

fn bits(token: &TokenOut) -> (u32, u32, u32, Vec<(u32, u32)>) {
    let top = token.top.iter().map(|top| (top.id, top.logprob.to_bits())).collect();
    (token.id, token.logprob.to_bits(), token.rank, top)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_gpu_draws_what_the_cpu_draws(rows in rows()) {
        let vocab = rows[0].logits.len();
        let device: Arc<dyn Device> = Arc::new(Emulator::new(GPU_BYTES));
        let logits = Buffer::zeroed(&device, rows.len() * vocab * size_of::<f32>()).unwrap();
        let bytes: Vec<u8> = rows.iter().flat_map(|row| row.logits.iter().flat_map(|x| x.to_le_bytes())).collect();
        logits.upload(0, &bytes).unwrap();
        let pasts: Vec<_> = rows.iter().map(|row| row.history.as_ref().map(Past::new)).collect();
        let asks: Vec<_> = rows.iter().zip(&pasts).map(|(row, past)| Some(match row.score {
            Some((id, top)) => Ask::Score(id, top),
            None => Ask::Draw(&row.draw, row.ahead, past.as_ref()),
        })).collect();
        let found = Sampler::new(&device, ROWS, 1, vocab).unwrap().read(&logits, &asks).unwrap();
        for (row, found) in rows.iter().zip(found) {
            let (found, expected) = (found.unwrap(), row.expected());
            prop_assert_eq!(bits(&found), bits(&expected), "{:?}", row);
        }
    }
}
