//! Drawing a token from logits: a pure function of the logits, the draw, the tokens before it and a mask.
//!
//! Two runs that come to the same logits draw the same token, on any machine: random numbers come from a
//! counter, weights are integers, whose sums are exact in any order ([`Unit`]), ties go to the lower id, and every other
//! operation is one that IEEE 754 defines to the last bit. A GPU draws the same (`cuda/sampler.cu`).

use galerne_types::{Draw, Sampling, TokenId, TokenOut, TopToken};

mod allowed;
mod past;
#[cfg(test)]
mod tests;
mod weights;

pub(crate) use allowed::Allowed;
pub use allowed::Mask;
pub use past::Past;
pub(crate) use weights::Unit;

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
/// A NaN logit counts as -∞, and ∞ as the largest number. Where no allowed token is above -∞, the lowest allowed id is
/// drawn. A weight of less than 2^-40 of the largest may count as 0 (see [`Unit`]).
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
        // NaN is not larger than anything, nothing is larger than the largest number. Whether it is allowed is looked up last,
        // and so for few tokens only.
        if score > best.0 && best.0 < f32::MAX && allowed.contains(id) {
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
    let (scale, unit) = (1.0 / f64::from(temperature), Unit::of(scores.len()));
    let random = random(seed, index);
    let (ids, sums) = if top_k > 0 && (top_k as usize) < scores.len() {
        let ids: Vec<TokenId> = BestFirst::new(scores).take(top_k as usize).collect();
        let best: Vec<f32> = ids.iter().map(|&id| scores[id as usize]).collect();
        let weights = unit.weights(&best, max, scale, min_p);
        until(mass(top_p, weights.iter().sum()), ids.into_iter().zip(weights))
    } else {
        let weights = unit.weights(scores, max, scale, min_p);
        if top_p >= 1.0 {
            // Every token is kept, so any fixed order is right: that of the ids needs no sorting.
            return Some(place(random, &running_sums(weights)) as TokenId);
        }
        let best = BestFirst::new(scores).map(|id| (id, weights[id as usize]));
        until(mass(top_p, weights.iter().sum()), best)
    };
    Some(ids[place(random, &sums)])
}

/// The share `top_p` of so much weight.
fn mass(top_p: f32, total: u64) -> u64 {
    ((f64::from(top_p) * total as f64) as u64).clamp(1, total)
}

/// The first of `best` whose weights together reach `mass`, and the running sums of their weights.
fn until(mass: u64, best: impl Iterator<Item = (TokenId, u64)>) -> (Vec<TokenId>, Vec<u64>) {
    let (mut ids, mut sums, mut sum) = (Vec::new(), Vec::new(), 0);
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

fn running_sums(mut weights: Vec<u64>) -> Vec<u64> {
    let mut sum = 0;
    for weight in &mut weights {
        sum += *weight;
        *weight = sum;
    }
    weights
}

/// Where `random`, of 53 bits, falls among weights with these running sums: a weight of 0 is never met.
fn place(random: u64, sums: &[u64]) -> usize {
    let target = ((u128::from(random) * u128::from(sums[sums.len() - 1])) >> 53) as u64;
    sums.partition_point(|&sum| sum <= target)
}

/// A token's log probability and rank, and the `count` most likely tokens with theirs.
fn report(logits: &[f32], id: TokenId, count: usize) -> TokenOut {
    let scores = cleaned(logits);
    let (max, own) = (largest(&scores), scores[id as usize]);
    let before = (0..).zip(&scores).filter(|&(other, &score)| score > own || score == own && other < id);
    let told = Told {
        id,
        own,
        rank: before.count() as u32 + 1,
        max,
        total: Unit::of(scores.len()).weights(&scores, max, 1.0, 0.0).iter().sum(),
        top: BestFirst::new(&scores).take(count).map(|id| (id, scores[id as usize])).collect(),
    };
    told.report(scores.len())
}

/// What a report follows from.
pub(crate) struct Told {
    pub(crate) id: TokenId,
    /// Its logit.
    pub(crate) own: f32,
    /// From 1 on.
    pub(crate) rank: u32,
    /// The largest logit, and the weights of all: of nothing if that is -∞.
    pub(crate) max: f32,
    pub(crate) total: u64,
    /// The likeliest tokens with their logits, the best first.
    pub(crate) top: Vec<(TokenId, f32)>,
}

impl Told {
    pub(crate) fn report(self, vocab: usize) -> TokenOut {
        let Self { id, own, rank, max, total, top } = self;
        // Where nothing is above -∞ there is no distribution, and -∞ less 0 says so.
        let none = max == f32::NEG_INFINITY;
        let log_total = if none { 0.0 } else { f64::from(max) + libm::log(Unit::of(vocab).share(total)) };
        let logprob = |score: f32| (f64::from(score) - log_total) as f32;
        let top = top.into_iter().map(|(id, score)| TopToken { id, logprob: logprob(score) }).collect();
        TokenOut { id, logprob: logprob(own), rank, top }
    }
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

/// 53 random bits for a token's `index` in the stream of `seed`. The counter's other words are 0.
pub(crate) fn random(seed: u64, index: u32) -> u64 {
    let [high, low, ..] = philox([index, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    (u64::from(high) << 32 | u64::from(low)) >> 11
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
