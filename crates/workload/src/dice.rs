//! Random numbers from a seed, the same on every machine.

/// Who draws: each has numbers of its own for every request, so that none changes what another one draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Purpose {
    Arrival,
    Length,
    Prefix,
    /// Tokens of one request alone.
    Own,
    /// Tokens of a prefix that requests share.
    Shared,
    /// Tokens of a block that a trace names.
    Block,
}

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), with the distributions that a load needs.
pub(crate) struct Dice(u64);

impl Dice {
    /// For the `number`th request, prefix or block.
    pub(crate) fn new(seed: u64, purpose: Purpose, number: u64) -> Self {
        // Three rounds, so that neighbours in any of the three have nothing to do with each other.
        let mut dice = Self(seed);
        dice.0 = dice.next() ^ (purpose as u64 + 1);
        dice.0 = dice.next() ^ number;
        dice.0 = dice.next();
        dice
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Uniform in (0, 1], in steps of 2⁻⁵³.
    pub(crate) fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// Uniform in 0…`bound` − 1, with a bias below `bound` / 2⁶⁴.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// Mean 1.
    pub(crate) fn exponential(&mut self) -> f64 {
        -libm::log(self.unit())
    }

    /// Mean 0, variance 1 (Box and Muller, 1958).
    pub(crate) fn normal(&mut self) -> f64 {
        let radius = libm::sqrt(2.0 * self.exponential());
        radius * libm::cos(std::f64::consts::TAU * self.unit())
    }

    /// Mean and variance `shape` (Marsaglia and Tsang, ACM TOMS 26, 2000).
    pub(crate) fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let power = libm::pow(self.unit(), 1.0 / shape);
            return self.gamma(shape + 1.0) * power;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / libm::sqrt(9.0 * d);
        loop {
            let x = self.normal();
            let t = 1.0 + c * x;
            let v = t * t * t;
            if v > 0.0 && libm::log(self.unit()) < 0.5 * x * x + d * (1.0 - v + libm::log(v)) {
                return d * v;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean and variance of many draws.
    fn moments(mut draw: impl FnMut(&mut Dice) -> f64) -> (f64, f64) {
        let count = 200_000;
        let draws: Vec<f64> =
            (0..count).map(|number| draw(&mut Dice::new(7, Purpose::Length, number))).collect();
        let mean = draws.iter().sum::<f64>() / count as f64;
        (mean, draws.iter().map(|draw| (draw - mean).powi(2)).sum::<f64>() / count as f64)
    }

    fn close((mean, variance): (f64, f64), expected: (f64, f64)) {
        assert!((mean - expected.0).abs() < 0.02, "mean {mean}, not {}", expected.0);
        assert!((variance - expected.1).abs() < 0.05, "variance {variance}, not {}", expected.1);
    }

    #[test]
    fn distributions_have_their_moments() {
        close(moments(Dice::unit), (0.5, 1.0 / 12.0));
        close(moments(|dice| dice.below(7) as f64), (3.0, 4.0));
        close(moments(Dice::exponential), (1.0, 1.0));
        close(moments(Dice::normal), (0.0, 1.0));
        for shape in [0.25, 1.0, 3.0] {
            close(moments(|dice| dice.gamma(shape)), (shape, shape));
        }
    }

    #[test]
    fn the_numbers_are_those_of_the_paper() {
        // The first outputs of SplitMix64 for the seed 1234567, as in its authors' tests.
        let mut dice = Dice(1_234_567);
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!(expected, [dice.next(), dice.next(), dice.next()]);
    }

    #[test]
    fn who_draws_and_for_what_changes_the_numbers() {
        let first = |seed, purpose, number| Dice::new(seed, purpose, number).next();
        let base = first(1, Purpose::Own, 0);
        assert_eq!(base, first(1, Purpose::Own, 0));
        for other in [first(2, Purpose::Own, 0), first(1, Purpose::Shared, 0), first(1, Purpose::Own, 1)] {
            assert_ne!(base, other);
        }
    }
}
