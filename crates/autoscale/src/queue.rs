//! Formulas of queueing theory, each with its source.

/// The quantile of the standard normal distribution (Acklam's rational approximation, 2003; its relative error is below
/// 1.2·10⁻⁹).
///
/// # Panics
/// If `share` is not strictly between 0 and 1.
pub(crate) fn normal_quantile(share: f64) -> f64 {
    assert!(share > 0.0 && share < 1.0, "a quantile of {share}");
    const A: [f64; 6] = [
        -3.969_683_028_665_376e1,
        2.209_460_984_245_205e2,
        -2.759_285_104_469_687e2,
        1.383_577_518_672_69e2,
        -3.066_479_806_614_716e1,
        2.506_628_277_459_239,
    ];
    const B: [f64; 6] = [
        -5.447_609_879_822_406e1,
        1.615_858_368_580_409e2,
        -1.556_989_798_598_866e2,
        6.680_131_188_771_972e1,
        -1.328_068_155_288_572e1,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784_894_002_430_293e-3,
        -3.223_964_580_411_365e-1,
        -2.400_758_277_161_838,
        -2.549_732_539_343_734,
        4.374_664_141_464_968,
        2.938_163_982_698_783,
    ];
    const D: [f64; 5] = [
        7.784_695_709_041_462e-3,
        3.224_671_290_700_398e-1,
        2.445_134_137_142_996,
        3.754_408_661_907_416,
        1.0,
    ];
    const TAIL: f64 = 0.02425;
    let polynomial = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    if share > 1.0 - TAIL {
        return -normal_quantile(1.0 - share);
    }
    if share < TAIL {
        let q = (-2.0 * libm::log(share)).sqrt();
        return polynomial(&C, q) / polynomial(&D, q);
    }
    let q = share - 0.5;
    q * polynomial(&A, q * q) / polynomial(&B, q * q)
}

/// The share of those who have to wait for one of `servers` at an offered load of `load` servers: Erlang's C formula
/// (1917), by the recursion of his B formula, which neither overflows nor cancels. 1 where the load is more than there is.
pub(crate) fn erlang_c(servers: u32, load: f64) -> f64 {
    let count = f64::from(servers);
    if load >= count {
        return 1.0;
    }
    if count - load > 10.0 * (load.sqrt() + 5.0) {
        return 0.0; // ten standard deviations
    }
    let blocked = (1..=servers).fold(1.0, |b, server| load * b / (f64::from(server) + load * b));
    blocked * count / (count - load * (1.0 - blocked))
}

/// The wait that a share `share` of those who come does not exceed, where `waits` of them wait at all, and these as long as
/// an exponential law of mean `mean_s` says (exact for M/M/c; as an approximation of G/G/c: Allen, 1978; Whitt, Prod. Oper.
/// Manag. 2, 1993).
pub(crate) fn wait_quantile(waits: f64, mean_s: f64, share: f64) -> f64 {
    (mean_s * libm::log(waits / (1.0 - share))).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (share, expected) in [
            (0.5, 0.0),
            (0.9, 1.281_551_566),
            (0.975, 1.959_963_985),
            (0.99, 2.326_347_874),
            (0.01, -2.326_347_874),
        ] {
            assert!((normal_quantile(share) - expected).abs() < 1e-7, "{share}: {}", normal_quantile(share));
        }
    }

    #[test]
    fn erlang_c_is_that_of_the_tables() {
        // One server: the load itself. Two at a load of 1: 1/3. Ten at 8: 0.409 (Gross and Harris).
        assert!((erlang_c(1, 0.7) - 0.7).abs() < 1e-12);
        assert!((erlang_c(2, 1.0) - 1.0 / 3.0).abs() < 1e-12);
        assert!((erlang_c(10, 8.0) - 0.4092).abs() < 1e-4, "{}", erlang_c(10, 8.0));
        assert_eq!(erlang_c(3, 3.0), 1.0);
        assert_eq!(erlang_c(4, 0.0), 0.0);
        assert!(erlang_c(5000, 4900.0) < 0.2);
    }

    #[test]
    fn nobody_waits_for_less_than_nothing() {
        assert_eq!(wait_quantile(0.02, 3.0, 0.95), 0.0);
        assert!((wait_quantile(0.5, 3.0, 0.95) - 3.0 * 10_f64.ln()).abs() < 1e-9);
    }
}
