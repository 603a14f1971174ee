use galerne_types::KvDtype;

use super::*;
use crate::kv::KvMemory;

const HEAD_DIM: usize = 48;
const HEADS: usize = 3;
const TOKENS: usize = 75;
/// Where the three blocks of the sequence lie.
const BLOCKS: [BlockId; 3] = [2, 0, 3];

/// A sequence's queries `[token][head][dim]`, keys and values `[token][dim]`.
struct Sequence {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Sequence {
    fn random() -> Self {
        let mut state = 1u64;
        let mut number = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut numbers = |count: usize| (0..count).map(&mut number).collect::<Vec<_>>();
        let mut queries = numbers(TOKENS * HEADS * HEAD_DIM);
        queries.iter_mut().for_each(|x| *x *= 0.3);
        Self { queries, keys: numbers(TOKENS * HEAD_DIM), values: numbers(TOKENS * HEAD_DIM) }
    }

    /// What all tokens attend to, `batch` tokens at a time, in the layout of the queries.
    fn attended(&self, isa: Isa, dtype: KvDtype, batch: usize, window: Option<usize>) -> Vec<f32> {
        let mut memory = KvMemory::new(1, 1, 4, Tile::new(HEAD_DIM, Kept::of(dtype).unwrap()));
        let layer = memory.layer(0);
        let before = [f32::NAN; HEAD_DIM];
        for position in 0..BLOCKS.len() * KV_BLOCK_TOKENS {
            let rows = [&self.keys, &self.values].map(|rows| rows.chunks_exact(HEAD_DIM).nth(position));
            // SAFETY: nobody else knows of the memory.
            unsafe {
                layer.store(0, &BLOCKS, position, &before, &before);
                if let [Some(key), Some(value)] = rows {
                    layer.store(0, &BLOCKS, position, key, value);
                }
            }
        }
        let mut out = vec![f32::NAN; self.queries.len()];
        let stride = HEADS * HEAD_DIM;
        for first in (0..TOKENS).step_by(batch) {
            let attend = Attend {
                queries: Strided { start: self.queries[first * stride..].as_ptr(), stride },
                tokens: batch.min(TOKENS - first),
                heads: HEADS,
                tiles: layer.head(0),
                stride: layer.stride,
                tile: layer.tile,
                blocks: &BLOCKS,
                position: first,
                window,
                out: Strided { start: out[first * stride..].as_mut_ptr(), stride },
            };
            // SAFETY: the rows are as long as the strides say, and all positions are stored.
            unsafe { attend.run_on(isa) };
        }
        out
    }
}

#[test]
fn every_isa_and_batch_gives_the_same_bits_in_every_format() {
    let sequence = Sequence::random();
    for (dtype, window) in KvDtype::CPU.into_iter().flat_map(|dtype| [(dtype, None), (dtype, Some(40))]) {
        let bits = |isa: Isa, batch: usize| {
            let out = sequence.attended(isa, dtype, batch, window);
            out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let expected = bits(Isa::available()[0], 1);
        assert!(expected.iter().all(|bits| f32::from_bits(*bits).is_finite()), "{dtype}");
        for isa in Isa::available() {
            for batch in [1, 2, 5, TOKENS_TOGETHER] {
                assert!(bits(isa, batch) == expected, "{dtype} on {}, batches of {batch}", isa.name());
            }
        }
    }
}

/// Most that a number of a key or value is off when it is stored.
fn rounding(dtype: KvDtype, x: f32, of: &[f32]) -> f64 {
    let max = of.iter().fold(0f32, |max, x| max.max(x.abs()));
    match dtype {
        KvDtype::F32 | KvDtype::Fp8 => 0.0, // as it is, or not at all
        KvDtype::Bf16 => f64::from(x.abs()) / 256.0,
        KvDtype::Int8 => f64::from(max) / 254.0 * (1.0 + 1e-5),
    }
}

/// If scores are off by e at most, each weight p is by (exp(2e) - 1)·p: so the output, Σ p·v, is by no more than
/// (exp(2e) - 1)·Σ p·|v|, and by what v itself is off.
#[test]
fn the_error_is_within_what_the_format_rounds() {
    let Sequence { queries, keys, values } = &Sequence::random();
    let [keys, values] = [keys, values].map(|rows| rows.chunks_exact(HEAD_DIM).collect::<Vec<_>>());
    for dtype in KvDtype::CPU {
        let found = Sequence::random().attended(Isa::best(), dtype, TOKENS_TOGETHER, None);
        for (row, (query, found)) in
            queries.chunks_exact(HEAD_DIM).zip(found.chunks_exact(HEAD_DIM)).enumerate()
        {
            let seen = row / HEADS + 1;
            let dot = |term: &dyn Fn(usize) -> f64| (0..HEAD_DIM).map(term).sum::<f64>();
            let score = |key: &&[f32]| dot(&|d| f64::from(query[d]) * f64::from(key[d]));
            let off = |key: &&[f32]| dot(&|d| f64::from(query[d].abs()) * rounding(dtype, key[d], key));
            let weights: Vec<f64> = keys[..seen].iter().map(|key| score(key).exp()).collect();
            let (total, error) =
                (weights.iter().sum::<f64>(), keys[..seen].iter().map(off).fold(0.0, f64::max));
            for (d, found) in found.iter().enumerate() {
                let sum = |value: &dyn Fn(f32) -> f32| {
                    let terms = weights.iter().zip(&values[..seen]);
                    terms.map(|(weight, row)| weight / total * f64::from(value(row[d]))).sum::<f64>()
                };
                let own = values[..seen].iter().map(|row| rounding(dtype, row[d], row)).fold(0.0, f64::max);
                let bound = ((2.0 * error).exp() - 1.0) * sum(&f32::abs) + own + 1e-5;
                let off = (f64::from(*found) - sum(&|x| x)).abs();
                assert!(off <= bound, "{dtype}: row {row}, dimension {d}: off by {off}, not {bound}");
            }
        }
    }
}
