//! The whole of it in virtual time: a server with one place that stalls, asked at a constant rate.

use std::time::Duration;

use galerne_workload::{
    Answer, Arrivals, ErrorKind, Failure, Generator, Law, Length, Outcome, Pace, Report, Rules, Source,
    Tally, Workload,
};

/// 100 requests a second, for 4 seconds; the server takes 5 ms for each, but answers nothing between 1 and 2 s.
const RATE_PER_S: f64 = 100.0;
const REQUESTS: usize = 400;
const SERVICE: Duration = Duration::from_millis(5);
const STALL: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(2));

fn workload() -> Workload {
    let pace = Some(Pace { arrivals: Arrivals::Constant, rate_per_s: RATE_PER_S });
    let law = Law { pace, prompt: Length::Fixed(8), output: Length::Fixed(1), prefixes: None };
    Workload::new(1, Source::Law(law))
}

/// Asks one after the other and counts what comes of it. A `patient` generator sends nothing while it waits for an answer,
/// as a closed loop would: its schedule then slips.
fn run(patient: bool, slo: Option<&str>) -> Report {
    let mut tally = Tally::new(Rules {
        warm_up: Duration::ZERO,
        slo: slo.map(|slo| slo.parse().unwrap()),
        slo_share: 0.8,
        lag_max: Some(Duration::from_millis(20)),
    });
    let mut free = Duration::ZERO; // from when on the server has its place free
    for planned in workload().take(REQUESTS) {
        let sent = if patient { planned.due.max(free) } else { planned.due };
        let mut end = sent.max(free) + SERVICE;
        if end > STALL.0 && end <= STALL.1 + SERVICE {
            end = STALL.1 + SERVICE;
        }
        free = end;
        let answer =
            Answer { first: end, last: end, gaps_ns: vec![], prompt_tokens: Some(8), output_tokens: 1 };
        tally.record(&Outcome { due: planned.due, sent, end, result: Ok(answer) });
    }
    tally.report(0, Generator { in_flight_max: 1000, ..Generator::default() })
}

#[test]
fn a_stall_shows_in_every_request_that_was_due_meanwhile() {
    let report = run(false, Some("ttft=100ms"));
    assert!(report.valid, "{:?}", report.problems);
    // Request k is due at 10 ms · k, k from 1 on. The one due at 1.00 s is done at 2.005 s, and then one every 5 ms:
    // request 100 + i waits 1005 − 5 i ms, until at i = 200 nobody waits any longer.
    let expected: Vec<f64> = (1..=400)
        .map(|k: u32| if (100..300).contains(&k) { 1005.0 - 5.0 * f64::from(k - 100) } else { 5.0 })
        .collect();
    let mean = expected.iter().sum::<f64>() / 400.0;
    assert!((report.e2e_ms.mean - mean).abs() < 0.01, "{} for {mean}", report.e2e_ms.mean);
    // Sorted: 200 of 5 ms, then 10, 15, … 1005. The 360th is 10 + 5 · 159, the 396th 10 + 5 · 195.
    for (found, exact) in [(report.e2e_ms.p50, 5.0), (report.e2e_ms.p90, 805.0), (report.e2e_ms.p99, 985.0)] {
        assert!((exact..=exact * 1.001).contains(&found), "{found} for {exact}");
    }
    assert_eq!((report.e2e_ms.max, report.requests.counted), (1005.0, 400));
    // Those above 100 ms are i = 0…180, so that 219 of 400 are good.
    let goodput = report.goodput.unwrap();
    assert_eq!((goodput.share, goodput.met), (219.0 / 400.0, false));
}

#[test]
fn a_generator_that_waits_for_answers_hides_nothing_and_says_that_it_was_late() {
    let (kept, slipped) = (run(false, None), run(true, None));
    assert_eq!(kept.e2e_ms, slipped.e2e_ms, "latencies count from when requests were due");
    assert_eq!(kept.send_lag_ms.unwrap().max, 0.0);
    assert!(slipped.send_lag_ms.unwrap().max > 900.0 && !slipped.valid);
    assert!(slipped.problems[0].contains("the schedule was not kept"), "{:?}", slipped.problems);
}

#[test]
fn figures_are_those_of_a_count_by_hand() {
    let ms = Duration::from_millis;
    let answer = |first, last, gaps_ns, output_tokens| Answer {
        first: ms(first),
        last: ms(last),
        gaps_ns,
        prompt_tokens: Some(10),
        output_tokens,
    };
    let outcome = |due, end, result| Outcome { due: ms(due), sent: ms(due), end: ms(end), result };
    let failed = |kind, message: &str| Err(Failure { kind, message: message.to_owned() });
    let mut tally = Tally::new(Rules {
        warm_up: ms(100),
        slo: "ttft=60ms,tpot=10ms".parse().ok(),
        slo_share: 0.5,
        lag_max: None,
    });
    for outcome in [
        outcome(99, 5000, Ok(answer(4000, 4500, vec![], 9))), // of the warm-up
        outcome(100, 190, Ok(answer(150, 180, vec![10_000_000; 3], 4))),
        outcome(200, 320, Ok(answer(300, 300, vec![], 1))),
        outcome(300, 1100, Ok(answer(350, 1090, vec![700_000_000, 40_000_000], 3))),
        outcome(400, 401, failed(ErrorKind::Refused, "slow down")),
        outcome(500, 501, failed(ErrorKind::Refused, "still")),
        outcome(600, 601, failed(ErrorKind::Http(503), "no group")),
    ] {
        tally.record(&outcome);
    }
    let report = tally.report(2, Generator::default());
    assert_eq!(report.window_s, 1.0, "from 100 to 1100 ms");
    assert_eq!((report.requests.warm_up, report.requests.counted, report.requests.unfinished), (1, 6, 2));
    assert_eq!(
        (report.requests_per_s, report.output_tokens_per_s, report.prompt_tokens_per_s),
        (3.0, 8.0, 30.0)
    );
    assert_eq!((report.ttft_ms.count, report.ttft_ms.mean, report.ttft_ms.max), (3, 200.0 / 3.0, 100.0));
    assert_eq!((report.tpot_ms.count, report.tpot_ms.min, report.tpot_ms.max), (2, 10.0, 370.0));
    assert_eq!((report.itl_ms.count, report.itl_ms.mean, report.itl_ms.max), (5, 154.0, 700.0));
    assert_eq!((report.e2e_ms.min, report.e2e_ms.max), (90.0, 800.0));
    let errors: Vec<_> =
        report.errors.iter().map(|(kind, errors)| (kind.as_str(), errors.count, &*errors.example)).collect();
    assert_eq!(errors, [("429", 2, "slow down"), ("http 503", 1, "no group")]);
    let goodput = report.goodput.as_ref().unwrap();
    assert_eq!((goodput.requests_per_s, goodput.share, goodput.met), (1.0, 1.0 / 6.0, false));
    let shown = report.to_string();
    for line in [
        "requests    3 answered, 3 failed, after 1 of the warm-up, 2 given up unfinished\n",
        "throughput  3.00 requests/s, 8.00 tokens/s out, 30.0 tokens/s in, over 1.0 s\n",
        "goodput     1.00 requests/s: 16.7% within ttft=60ms,tpot=10ms (MISSED: 50% wanted)\n",
        "failed      2 × 429: slow down\n",
    ] {
        assert!(shown.contains(line), "{line} in\n{shown}");
    }
}
