//! Drawing a token from logits: a pure function of the logits, the draw, the tokens before it and a mask.
//!
//! Two runs that come to the same logits draw the same token, on any machine: random numbers come from a
//! counter, sums are taken in `f64` in an order that this file fixes, ties go to the lower id, and every operation
//! is one that IEEE 754 defines to the last bit.

use galerne_types::{Draw, Sampling, TokenId, TokenOut, TopToken};

use allowed::Allowed;

mod allowed;
mod past;
#[cfg(test)]
mod tests;

pub use allowed::Mask;
pub use past::Past;

/// Draws a token from `logits`, one for each token of the vocabulary.
///
/// 1. The allowed tokens are the first of these sets that is not empty: those of `mask` without `draw.banned`; those
///    of `mask` (an answer that is complete may stop before `min_tokens`); all without `draw.banned`; all.
/// 2. Logit bias is added, then [`Past`] applies the penalties.
/// 3. At temperature 0 the largest logit wins. Otherwise the weight of a token is `exp(logit / temperature)`.
/// 4. Weights below `min_p` times the largest become 0, the `top_k` largest are kept (0 = all), and of these the fewest
///    of the largest that make up a share of `top_p` of their weight.
/// 5. One token is drawn in proportion to its weight.
///
/// A NaN logit counts as -∞. Where no allowed token is above -∞, the lowest allowed id is drawn.
///
/// Log probabilities are those of the raw logits, of all tokens; they are never NaN, and -∞ for a token whose logit is.
///
/// # Panics
/// If `logits` is empty.
pub fn draw(logits: &[f32], draw: &Draw, past: Option<&Past>, mask: Option<&[u32]>) -> TokenOut {
    assert!(!logits.is_empty(), "a vocabulary has tokens");
    let sampling = &draw.sampling;
    let past = past.filter(|_| sampling.looks_back());
    let allowed = Allowed::new(logits.len(), &draw.banned, mask);
    let changed = mask.is_some() || past.is_some() || !sampling.logit_bias.is_empty();
    let id = if sampling.temperature == 0.0 && !changed {
        greedy(logits, &allowed)
    } else {
        let mut scores = cleaned(logits);
        adjust(&mut scores, sampling, past);
        allowed.exclude_others(&mut scores);
        if sampling.temperature == 0.0 {
            greedy(&scores, &allowed)
        } else {
            sample(&scores, sampling, draw.index).unwrap_or_else(|| allowed.lowest())
        }
    };
    match sampling.logprobs {
        None => TokenOut::unreported(id),
        Some(count) => report(logits, id, count as usize),
    }
}

/// The log probability of token `id` under `logits`, and those of the `top` most likely ones.
///
/// # Panics
/// If `id` is not of the vocabulary.
pub fn score(logits: &[f32], id: TokenId, top: u32) -> TokenOut {
    report(logits, id, top as usize)
}

/// The largest logit's token. Nothing is allocated: most draws of most servers take this path.
fn greedy(scores: &[f32], allowed: &Allowed<'_>) -> TokenId {
    let mut best = (f32::NEG_INFINITY, None);
    for (id, &score) in (0..).zip(scores) {
        // NaN is not larger than anything. Whether it is allowed is looked up last, and so for few tokens only.
        if score > best.0 && allowed.contains(id) {
            best = (score, Some(id));
        }
    }
    best.1.unwrap_or_else(|| allowed.lowest())
}

/// Bias and penalties.
fn adjust(scores: &mut [f32], sampling: &Sampling, past: Option<&Past>) {
    for &(id, bias) in &sampling.logit_bias {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = clean(*score + bias);
        }
    }
    if let Some(past) = past {
        past.penalize(scores, sampling);
    }
}

/// A token in proportion to its weight; `None` where all scores are -∞.
fn sample(scores: &[f32], sampling: &Sampling, index: u32) -> Option<TokenId> {
    let &Sampling { temperature, top_k, top_p, min_p, seed, .. } = sampling;
    let max = largest(scores);
    if max == f32::NEG_INFINITY {
        return None;
    }
    let scale = 1.0 / f64::from(temperature);
    let weights = |scores: &[f32]| {
        let mut weights = weights(scores, max, scale);
        if min_p > 0.0 {
            // The largest weight is 1.
            weights.iter_mut().filter(|weight| **weight < f64::from(min_p)).for_each(|weight| *weight = 0.0);
        }
        weights
    };

    let (ids, sums) = if top_k > 0 && (top_k as usize) < scores.len() {
        let ids: Vec<TokenId> = BestFirst::new(scores).take(top_k as usize).collect();
        let weights = weights(&ids.iter().map(|&id| scores[id as usize]).collect::<Vec<_>>());
        until(f64::from(top_p) * total(&weights), ids.into_iter().zip(weights))
    } else {
        let weights = weights(scores);
        if top_p >= 1.0 {
            // Every token is kept, so any fixed order is right: that of the ids needs no sorting.
            return Some(place(uniform(seed, index), &running_sums(weights)) as TokenId);
        }
        let best = BestFirst::new(scores).map(|id| (id, weights[id as usize]));
        until(f64::from(top_p) * total(&weights), best)
    };
    Some(ids[place(uniform(seed, index), &sums)])
}

/// `exp((score - max) * scale)` of each score: the largest is 1, and -∞ gives 0.
fn weights(scores: &[f32], max: f32, scale: f64) -> Vec<f64> {
    // Apart from the sum, which has to keep its order, so that the compiler computes several at once.
    scores.iter().map(|&score| exp((f64::from(score) - f64::from(max)) * scale)).collect()
}

fn total(weights: &[f64]) -> f64 {
    weights.iter().sum()
}

/// The first of `best` whose weights together reach `mass`, at least one, and the running sums of their weights.
fn until(mass: f64, best: impl Iterator<Item = (TokenId, f64)>) -> (Vec<TokenId>, Vec<f64>) {
    let (mut ids, mut sums, mut sum) = (Vec::new(), Vec::new(), 0.0);
    for (id, weight) in best {
        sum += weight;
        ids.push(id);
        sums.push(sum);
        if sum >= mass {
            break;
        }
    }
    (ids, sums)
}

fn running_sums(mut weights: Vec<f64>) -> Vec<f64> {
    let mut sum = 0.0;
    for weight in &mut weights {
        sum += *weight;
        *weight = sum;
    }
    weights
}

/// Where `uniform`, from 0 to below 1, falls among weights with these running sums. The largest weight is 1, so the
/// last sum is at least that, and `uniform` times it is below it after rounding too; a weight of 0 is never met.
fn place(uniform: f64, sums: &[f64]) -> usize {
    let target = uniform * sums[sums.len() - 1];
    sums.partition_point(|&sum| sum <= target)
}

/// A token's log probability and rank, and the `count` most likely tokens with theirs.
fn report(logits: &[f32], id: TokenId, count: usize) -> TokenOut {
    let scores = cleaned(logits);
    let max = largest(&scores);
    // Where nothing is above -∞ there is no distribution, and -∞ less 0 says so.
    let none = max == f32::NEG_INFINITY;
    let log_total = if none { 0.0 } else { f64::from(max) + libm::log(total(&weights(&scores, max, 1.0))) };
    let logprob = |id: TokenId| (f64::from(scores[id as usize]) - log_total) as f32;
    let top = BestFirst::new(&scores).take(count).map(|id| TopToken { id, logprob: logprob(id) }).collect();
    let own = scores[id as usize];
    let before = (0..).zip(&scores).filter(|&(other, &score)| score > own || score == own && other < id);
    TokenOut { id, logprob: logprob(id), rank: before.count() as u32 + 1, top }
}

/// Logits that are numbers or -∞, with one zero.
fn cleaned(logits: &[f32]) -> Vec<f32> {
    logits.iter().map(|&logit| clean(logit)).collect()
}

fn clean(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) + 0.0 }
}

fn largest(scores: &[f32]) -> f32 {
    scores.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// All tokens, the largest score first, ties by id; sorted only as far as they are asked for.
struct BestFirst {
    /// Score and id in one integer: the smaller, the better.
    keys: Vec<u64>,
    sorted: usize,
    next: usize,
}

impl BestFirst {
    /// Tokens sorted at the first need; four times as many at each further one.
    const SORTED_FIRST: usize = 64;

    fn new(scores: &[f32]) -> Self {
        let keys = (0..)
            .zip(scores)
            .map(|(id, &score)| u64::from(descending(score)) << 32 | u64::from(id as TokenId));
        Self { keys: keys.collect(), sorted: 0, next: 0 }
    }

    fn sort_more(&mut self) {
        let more = (3 * self.sorted).max(Self::SORTED_FIRST);
        let rest = &mut self.keys[self.sorted..];
        let more = more.min(rest.len());
        if more < rest.len() {
            rest.select_nth_unstable(more);
        }
        rest[..more].sort_unstable();
        self.sorted += more;
    }
}

impl Iterator for BestFirst {
    type Item = TokenId;

    fn next(&mut self) -> Option<TokenId> {
        if self.next == self.sorted {
            self.sort_more();
        }
        let key = *self.keys[..self.sorted].get(self.next)?;
        self.next += 1;
        Some(key as TokenId)
    }
}

/// The bits of a float that is not NaN, as an integer that falls as the float rises.
fn descending(score: f32) -> u32 {
    let bits = score.to_bits();
    if score.is_sign_negative() { bits } else { !bits & (u32::MAX >> 1) }
}

/// `exp(x)` for x ≤ 0 to about an ulp; 0 where the result would be below the normal numbers.
///
/// exp(x) = 2^k · exp(r) with x = k·ln 2 + r and |r| ≤ ln 2 / 2, the latter by its Taylor polynomial of degree 12. No
/// branch, call or fused operation: the compiler runs several at once, and all machines agree on every bit.
fn exp(x: f64) -> f64 {
    /// 1 / n! for n = 12 … 0.
    const COEFFICIENTS: [f64; 13] = [
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    /// A number near 2^52 has no bits for a fraction: adding 1.5 · 2^52 rounds to an integer, and leaves it, here with
    /// the bias of an exponent added, in the lowest bits.
    const ROUND: f64 = 6_755_399_441_055_744.0 + 1023.0;
    /// ln 2 in two parts; the first has few enough bits that k times it is exact.
    const LN_2: [f64; 2] = [f64::from_bits(0x3fe6_2e42_fee0_0000), f64::from_bits(0x3dea_39ef_3579_3c76)];
    const X_MIN: f64 = -708.0;

    let clamped = x.max(X_MIN);
    let biased = clamped * std::f64::consts::LOG2_E + ROUND;
    let k = biased - ROUND;
    let r = (clamped - k * LN_2[0]) - k * LN_2[1];
    let polynomial = COEFFICIENTS.iter().fold(0.0, |sum, coefficient| sum * r + coefficient);
    let power = f64::from_bits(biased.to_bits() << 52);
    if x < X_MIN { 0.0 } else { polynomial * power }
}

/// A number in [0, 1) with 53 random bits, for a token's `index` in the stream of `seed`. The counter's other words
/// are 0.
fn uniform(seed: u64, index: u32) -> f64 {
    let [high, low, ..] = philox([index, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Philox4x32-10: 128 random bits for each counter and key (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As
/// Easy as 1, 2, 3", SC 2011).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const ROUNDS: usize = 10;
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for _ in 0..ROUNDS {
        let [c0, c1, c2, c3] = counter;
        let (low_0, high_0) = c0.carrying_mul(MULTIPLIERS[0], 0);
        let (low_1, high_1) = c2.carrying_mul(MULTIPLIERS[1], 0);
        counter = [high_1 ^ c1 ^ key[0], low_1, high_0 ^ c3 ^ key[1], low_0];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}
