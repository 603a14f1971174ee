//! The weights of tokens.

/// What weights are counted in. As integers they add up to the same in any order, and a GPU's threads need not agree on one.
#[derive(Clone, Copy)]
pub(crate) struct Unit {
    /// The largest weight, a power of two.
    one: f64,
}

impl Unit {
    /// Small enough to lose nothing that matters, a 2^50th of the largest weight or, for more than 8,192 tokens, the least
    /// with which so many of the largest stay below 2^63.
    pub(crate) fn of(tokens: usize) -> Self {
        let bits = (63 - tokens.next_power_of_two().ilog2()).min(50);
        Self { one: (1u64 << bits) as f64 }
    }

    /// The largest weight in units.
    pub(crate) fn one(self) -> f64 {
        self.one
    }

    /// So many units, where the largest weight is 1.
    pub(super) fn share(self, units: u64) -> f64 {
        units as f64 / self.one
    }

    /// `exp((score - max) * scale)` of each score, to the nearest unit: that of `max` is 1, and what is less than `min` is 0.
    pub(super) fn weights(self, scores: &[f32], max: f32, scale: f64, min: f32) -> Vec<u64> {
        /// A number of less than 2^52 that is added to it stands in its lowest bits, rounded.
        const ROUND: f64 = (1u64 << 52) as f64;
        let (max, min) = (f64::from(max), f64::from(min));
        // Without a branch, so that the compiler computes several at once.
        let weight = |&score: &f32| {
            let weight = exp((f64::from(score) - max) * scale);
            let units = (weight * self.one + ROUND).to_bits() & ((1 << 52) - 1);
            if weight < min { 0 } else { units }
        };
        scores.iter().map(weight).collect()
    }
}

/// `exp(x)` for x ≤ 0 to about an ulp; 0 where the result would be below the normal numbers.
///
/// exp(x) = 2^k · exp(r) with x = k·ln 2 + r and |r| ≤ ln 2 / 2, the latter by its Taylor polynomial of degree 12. No
/// branch, call or fused operation: the compiler runs several at once, and all machines agree on every bit.
pub(super) fn exp(x: f64) -> f64 {
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
