//! Against a plain statement of the definition: sort everything, loop over it.

use galerne_types::History;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::weights::exp;
use super::*;

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn sampling(temperature: f32, top_k: u32, top_p: f32) -> Sampling {
    Sampling { temperature, top_k, top_p, seed: 7, ..Sampling::greedy() }
}

fn draw_of(sampling: Sampling, index: u32) -> Draw {
    Draw::new(sampling, index)
}

/// A number in [0, 1).
fn uniform(seed: u64, index: u32) -> f64 {
    random(seed, index) as f64 / (1u64 << 53) as f64
}

fn score(logit: f32) -> f64 {
    if logit.is_nan() { f64::NEG_INFINITY } else { f64::from(logit) }
}

/// Everything that a draw depends on.
#[derive(Clone, Debug)]
struct Case {
    logits: Vec<f32>,
    draw: Draw,
    history: History,
    mask: Option<Vec<u32>>,
}

impl Case {
    fn plain(logits: &[f32], draw: Draw) -> Self {
        Self { logits: logits.to_vec(), draw, history: History::default(), mask: None }
    }

    fn drawn(&self) -> TokenOut {
        draw(&self.logits, &self.draw, Some(&Past::new(&self.history)), self.mask.as_deref())
    }

    /// The tokens to choose from.
    fn allowed(&self) -> Vec<TokenId> {
        let all = 0..self.logits.len() as u32;
        let in_mask = |id: &u32| match &self.mask {
            None => true,
            Some(mask) => *id < 32 * mask.len() as u32 && mask[*id as usize / 32] & (1 << (id % 32)) != 0,
        };
        let free = |id: &u32| !self.draw.banned.contains(id);
        let sets: [Vec<u32>; 4] = [
            all.clone().filter(in_mask).filter(free).collect(),
            all.clone().filter(in_mask).collect(),
            all.clone().filter(free).collect(),
            all.collect(),
        ];
        sets.into_iter().find(|set| !set.is_empty()).unwrap()
    }

    /// A token's logit after bias and penalties.
    fn adjusted(&self, id: TokenId) -> f64 {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.draw.sampling;
        let mut logit = self.logits[id as usize];
        if let Some((_, bias)) = self.draw.sampling.logit_bias.iter().find(|(biased, _)| *biased == id) {
            logit += bias;
        }
        let times = self.history.answer.iter().filter(|&&token| token == id).count();
        if times > 0 || self.history.prompt.contains(&id) {
            logit = if logit > 0.0 { logit / repetition_penalty } else { logit * repetition_penalty };
        }
        logit -= frequency_penalty * times as f32;
        logit -= if times > 0 { presence_penalty } else { 0.0 };
        score(logit)
    }

    /// The tokens that may be drawn with their probabilities, the likeliest first, as the definition says it.
    fn law(&self) -> Vec<(TokenId, f64)> {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.draw.sampling;
        let mut tokens: Vec<_> = self.allowed().into_iter().map(|id| (id, self.adjusted(id))).collect();
        tokens.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
        if temperature == 0.0 || tokens[0].1 == f64::NEG_INFINITY {
            return vec![(tokens[0].0, 1.0)];
        }
        let best = tokens[0].1;
        for token in &mut tokens {
            token.1 = ((token.1 - best) / f64::from(temperature)).exp();
        }
        tokens.retain(|token| token.1 >= f64::from(min_p));
        if top_k > 0 {
            tokens.truncate(top_k as usize);
        }
        let total: f64 = tokens.iter().map(|token| token.1).sum();
        let mut kept = Vec::new();
        let mut sum = 0.0;
        for token in tokens {
            kept.push(token);
            sum += token.1;
            if top_p < 1.0 && sum >= f64::from(top_p) * total {
                break;
            }
        }
        kept.iter().map(|&(id, weight)| (id, weight / sum)).collect()
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let best = logits.iter().map(|&logit| score(logit)).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|&logit| (score(logit) - best).exp()).sum();
    logits.iter().map(|&logit| score(logit) - best - total.ln()).collect()
}

/// Few distinct values, so that ties are common, and now and then something that is not a number.
fn some_logits() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![
        8 => (-40..40i32).prop_map(|quarter| quarter as f32 / 4.0),
        8 => -20.0..20.0f32,
        1 => Just(f32::NAN),
        1 => Just(f32::NEG_INFINITY),
        1 => Just(-0.0f32),
    ];
    proptest::collection::vec(logit, 1..400)
}

/// Tokens of which some stand there several times.
fn some_tokens() -> impl Strategy<Value = Vec<TokenId>> {
    proptest::collection::vec(prop_oneof![0..20u32, 0..400u32], 0..60)
}

fn some_sampling() -> impl Strategy<Value = Sampling> {
    let temperature = prop_oneof![Just(0.0f32), Just(1.0), 0.05..3.0f32];
    let top_k = prop_oneof![Just(0u32), 1..500u32];
    let top_p = prop_oneof![Just(1.0f32), 0.01..1.0f32];
    let min_p = prop_oneof![2 => Just(0.0f32), 1 => Just(1.0), 2 => 0.0..0.5f32];
    let repetition = prop_oneof![Just(1.0f32), 0.3..3.0f32];
    let presence = prop_oneof![Just(0.0f32), -2.0..=2.0f32];
    let frequency = prop_oneof![Just(0.0f32), -2.0..=2.0f32];
    let bias = prop_oneof![-5.0..5.0f32, Just(-100.0f32), Just(100.0f32)];
    let bias = proptest::collection::btree_map(0..400u32, bias, 0..6);
    (temperature, top_k, top_p, min_p, (repetition, presence, frequency), bias, any::<u64>()).prop_map(
        |(temperature, top_k, top_p, min_p, (repetition, presence, frequency), bias, seed)| Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty: repetition,
            presence_penalty: presence,
            frequency_penalty: frequency,
            logit_bias: bias.into_iter().collect(),
            seed,
            logprobs: None,
        },
    )
}

fn some_case() -> impl Strategy<Value = Case> {
    let banned = proptest::collection::vec(0..500u32, 0..6);
    let words = prop_oneof![Just(0u32), Just(u32::MAX), any::<u32>(), (0..32u32).prop_map(|bit| 1 << bit)];
    let mask = proptest::option::of(proptest::collection::vec(words, 0..14));
    (some_logits(), some_sampling(), any::<u32>(), banned, mask, some_tokens(), some_tokens()).prop_map(
        |(logits, sampling, index, banned, mask, prompt, answer)| {
            let draw = Draw { banned, ..Draw::new(sampling, index) };
            Case { logits, draw, history: History { prompt, answer }, mask }
        },
    )
}

proptest! {
    #![proptest_config(config(4000))]

    #[test]
    fn draws_what_the_definition_draws(case in some_case()) {
        let (drawn, law) = (case.drawn(), case.law());
        prop_assert!(law.iter().any(|&(id, p)| id == drawn.id && p > 0.0), "{} is not in {law:?}", drawn.id);

        // The token whose share of [0, 1) holds the random number, in the order that the definition leaves.
        let Sampling { top_k, top_p, seed, .. } = case.draw.sampling;
        let mut ordered = law;
        if (top_k == 0 || top_k as usize >= case.logits.len()) && top_p >= 1.0 {
            ordered.sort_by_key(|&(id, _)| id);
        }
        let uniform = uniform(seed, case.draw.index);
        let mut below = 0.0;
        for (id, p) in ordered {
            let (start, end) = (below, below + p);
            below = end;
            if id == drawn.id {
                prop_assert!(start - 1e-12 <= uniform && uniform <= end + 1e-12);
            }
        }
    }

    #[test]
    fn a_history_told_token_by_token_is_the_same_history(case in some_case()) {
        let History { prompt, answer } = case.history.clone();
        let mut past = Past::new(&History { prompt, answer: Vec::new() });
        answer.iter().for_each(|&token| past.push(token));
        prop_assert_eq!(draw(&case.logits, &case.draw, Some(&past), case.mask.as_deref()), case.drawn());
    }

    #[test]
    fn logprobs_are_those_of_the_raw_logits(mut case in some_case(), count in 0..20u32) {
        prop_assume!(case.logits.iter().any(|&logit| score(logit) > f64::NEG_INFINITY));
        let plain = case.drawn();
        prop_assert_eq!((plain.logprob, plain.rank, plain.top.len()), (0.0, 0, 0));
        case.draw.sampling.logprobs = Some(count);
        let told = case.drawn();
        prop_assert_eq!(told.id, plain.id);
        prop_assert_eq!(&super::score(&case.logits, told.id, count), &told);

        let expected = log_softmax(&case.logits);
        let near = |told: f32, id: u32| {
            let expected = expected[id as usize];
            f64::from(told) == expected || (f64::from(told) - expected).abs() < 1e-5
        };
        prop_assert!(near(told.logprob, told.id));
        let mut best: Vec<u32> = (0..case.logits.len() as u32).collect();
        best.sort_by(|&a, &b| expected[b as usize].partial_cmp(&expected[a as usize]).unwrap().then(a.cmp(&b)));
        let place = best.iter().position(|&id| id == told.id).unwrap();
        prop_assert_eq!(told.rank as usize, place + 1);
        best.truncate(count as usize);
        prop_assert_eq!(told.top.iter().map(|top| top.id).collect::<Vec<_>>(), best);
        prop_assert!(told.top.iter().all(|top| near(top.logprob, top.id)));
    }

    #[test]
    fn exp_is_exact_to_an_ulp_or_so(x in prop_oneof![-708.0..=0.0f64, -1.0..=0.0f64, -30.0..=0.0f64]) {
        prop_assert!((exp(x) / libm::exp(x) - 1.0).abs() < 1e-15, "exp({})", x);
    }
}

/// Pearson's chi-square statistic of `draws` draws against the law.
fn chi_square(logits: &[f32], sampling: &Sampling, draws: u32) -> (f64, usize) {
    let law = Case::plain(logits, draw_of(sampling.clone(), 0)).law();
    let mut counts = vec![0u32; logits.len()];
    for index in 0..draws {
        counts[draw(logits, &draw_of(sampling.clone(), index), None, None).id as usize] += 1;
    }
    let inside: u32 = law.iter().map(|&(id, _)| counts[id as usize]).sum();
    assert_eq!(inside, draws, "a token was drawn that the filters exclude");
    let term = |&(id, p): &(u32, f64)| {
        let expected = p * f64::from(draws);
        (f64::from(counts[id as usize]) - expected).powi(2) / expected
    };
    (law.iter().map(term).sum(), law.len() - 1)
}

#[test]
fn draws_follow_the_law() {
    let logits: Vec<f32> = (0..40u16).map(|id| f32::from(id * 7 % 40) / 10.0).collect();
    for (temperature, top_k, top_p, kept) in
        [(1.0, 0, 1.0, 40), (0.7, 0, 1.0, 40), (1.5, 12, 1.0, 12), (1.0, 0, 0.8, 16), (1.0, 20, 0.9, 16)]
    {
        let (statistic, freedom) = chi_square(&logits, &sampling(temperature, top_k, top_p), 40_000);
        assert_eq!(freedom + 1, kept, "tokens kept by top_k {top_k}, top_p {top_p}");
        // Mean f and variance 2f: within four standard deviations.
        let freedom = freedom as f64;
        assert!(
            (statistic - freedom).abs() < 4.0 * (2.0 * freedom).sqrt(),
            "chi-square {statistic} of {freedom}"
        );
    }
}

#[test]
fn a_draw_depends_on_seed_and_index_alone() {
    let logits: Vec<f32> = (0..100u16).map(|id| f32::from(id % 10) / 5.0).collect();
    let id = |seed, index| {
        let sampling = Sampling { seed, ..sampling(1.0, 0, 0.95) };
        draw(&logits, &draw_of(sampling, index), None, None).id
    };
    let forwards: Vec<_> = (0..200).map(|index| id(7, index)).collect();
    let mut backwards: Vec<_> = (0..200).rev().map(|index| id(7, index)).collect();
    backwards.reverse();
    assert_eq!(forwards, backwards);
    let other_seeds: Vec<_> =
        [8, 7 | 1 << 32].map(|seed| (0..200).map(|index| id(seed, index)).collect()).into();
    assert!(!other_seeds.contains(&forwards));
}

#[test]
fn ties_bans_and_nonsense() {
    let greedy = |logits: &[f32], banned: &[u32]| {
        draw(logits, &Draw { banned: banned.to_vec(), ..Draw::new(Sampling::greedy(), 0) }, None, None).id
    };
    assert_eq!(greedy(&[1.0, 3.0, 3.0, 2.0], &[]), 1);
    assert_eq!(greedy(&[1.0, 3.0, 3.0, 2.0], &[1]), 2);
    assert_eq!(greedy(&[1.0, 3.0, 3.0, 2.0], &[1, 2, 99]), 3);
    assert_eq!(greedy(&[-0.0, 0.0], &[]), 0);
    assert_eq!(greedy(&[f32::NAN, -5.0, f32::NAN], &[]), 1);

    let hopeless = [f32::NAN, f32::NEG_INFINITY, f32::NEG_INFINITY];
    for temperature in [0.0, 1.0] {
        let mut draw = draw_of(Sampling { logprobs: Some(1), ..sampling(temperature, 2, 0.5) }, 0);
        draw.banned = vec![0];
        let token = super::draw(&hopeless, &draw, None, None);
        assert_eq!(
            (token.id, token.logprob, token.top[0].logprob),
            (1, f32::NEG_INFINITY, f32::NEG_INFINITY)
        );
    }
    let infinite = [0.0, f32::INFINITY, 1.0];
    assert_eq!(draw(&infinite, &draw_of(sampling(1.0, 0, 1.0), 3), None, None).id, 1);
}

/// Each option by numbers that one can follow by hand; ids are 0, 1, 2, 3.
#[test]
fn options_by_example() {
    let logits = [4.0, 2.0, -1.0, 3.5];
    let history = History { prompt: vec![0], answer: vec![3, 3] };
    let greedy = |change: fn(&mut Case)| {
        let mut case =
            Case { history: history.clone(), ..Case::plain(&logits, draw_of(Sampling::greedy(), 0)) };
        change(&mut case);
        case.drawn().id
    };
    assert_eq!(greedy(|_| ()), 0);
    assert_eq!(greedy(|case| case.draw.sampling.logit_bias = vec![(2, 5.5)]), 2, "-1 + 5.5 = 4.5");
    let repetition = |case: &mut Case| case.draw.sampling.repetition_penalty = 2.5;
    assert_eq!(greedy(repetition), 1, "4 / 2.5 = 1.6 and 3.5 / 2.5 = 1.4 are below 2");
    let frequency = |case: &mut Case| {
        case.draw.sampling.frequency_penalty = -0.3;
        case.draw.sampling.presence_penalty = 0.05;
    };
    assert_eq!(greedy(frequency), 3, "3.5 + 2 * 0.3 - 0.05 = 4.05");
    assert_eq!(greedy(|case| case.mask = Some(vec![0b1110])), 3);
    assert_eq!(greedy(|case| case.mask = Some(vec![])), 0, "a mask that allows nothing is none");
    let complete = |case: &mut Case| {
        case.mask = Some(vec![0b0100]);
        case.draw.banned = vec![2, 3];
    };
    assert_eq!(greedy(complete), 2, "an answer that is complete may stop before min_tokens");

    // exp(-0.5) = 0.607 and exp(-2) = 0.135: min_p 0.5 leaves two tokens, 0.61 one.
    for (min_p, kept) in [(0.5, vec![0, 3]), (0.61, vec![0])] {
        let law = Case::plain(&logits, draw_of(Sampling { min_p, ..sampling(1.0, 0, 1.0) }, 0)).law();
        assert_eq!(law.iter().map(|(id, _)| *id).collect::<Vec<_>>(), kept);
    }
}

#[test]
fn a_filter_that_keeps_everything_is_no_filter() {
    let logits: Vec<f32> = (0..300u16).map(|id| f32::from(id * 17 % 300) / 60.0).collect();
    for index in 0..500 {
        let [none, all, more] = [0, 300, 9999]
            .map(|top_k| draw(&logits, &draw_of(sampling(1.0, top_k, 1.0), index), None, None).id);
        assert_eq!((none, none), (all, more));
    }
}

/// Known answers that come with the authors' Random123 library.
#[test]
fn philox_gives_its_known_answers() {
    assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
    let key = [0xa409_3822, 0x299f_31d0];
    assert_eq!(philox(counter, key), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
}

/// The stream of a seed is a promise to clients: the same request gives the same answer in a later version too.
#[test]
fn the_numbers_of_a_seed_stay() {
    let first: Vec<u64> = (0..3).map(|index| random(42, index)).collect();
    assert_eq!(first, [5_521_051_785_035_433, 8_896_578_696_410_957, 7_438_747_070_435_563]);
    assert!((0..10_000).all(|index| (0.0..1.0).contains(&uniform(u64::MAX, index))));
}

#[test]
fn exp_ends_at_nought() {
    assert_eq!([exp(0.0), exp(-0.0), exp(-708.1), exp(f64::NEG_INFINITY)], [1.0, 1.0, 0.0, 0.0]);
}

#[test]
fn best_first_is_a_full_sort_when_all_are_asked_for() {
    let scores: Vec<f32> = (0..5000u32).map(|id| ((id * 7919) % 641) as f32 - 320.0).collect();
    let mut sorted: Vec<u32> = (0..5000).collect();
    sorted.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    assert_eq!(BestFirst::new(&scores).collect::<Vec<_>>(), sorted);
}
