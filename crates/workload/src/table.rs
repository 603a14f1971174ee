//! The report as a person reads it.

use std::fmt;

use crate::histogram::Summary;
use crate::report::{Goodput, Report};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.counts(f)?;
        if self.requests.answered > 0 {
            self.latencies(f)?;
        }
        if !self.errors.is_empty() {
            writeln!(f)?;
        }
        for (kind, errors) in &self.errors {
            writeln!(f, "{:<12}{} × {kind}: {}", "failed", errors.count, errors.example)?;
        }
        for problem in &self.problems {
            write!(f, "\nNOT VALID   {problem}")?;
        }
        if self.valid { Ok(()) } else { writeln!(f) }
    }
}

impl Report {
    fn latencies(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f)?;
        let columns = ["mean", "p50", "p90", "p95", "p99", "max"].map(|name| format!("{name:>9}"));
        writeln!(f, "{:<12}{}", "ms", columns.concat())?;
        let rows =
            [("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms), ("ITL", self.itl_ms), ("E2E", self.e2e_ms)];
        for (name, Summary { count, mean, min: _, p50, p90, p95, p99, max }) in rows {
            let shown = |ms| if count == 0 { "-".to_owned() } else { figure(ms) };
            let row = [mean, p50, p90, p95, p99, max].map(|ms| format!("{:>9}", shown(ms)));
            writeln!(f, "{name:<12}{}", row.concat())?;
        }
        Ok(())
    }

    fn counts(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let requests = &self.requests;
        write!(f, "{:<12}{} answered, {} failed", "requests", requests.answered, requests.failed)?;
        if requests.warm_up > 0 {
            write!(f, ", after {} of the warm-up", requests.warm_up)?;
        }
        if requests.unfinished > 0 {
            write!(f, ", {} given up unfinished", requests.unfinished)?;
        }
        let each = |tokens: u64| tokens as f64 / requests.answered.max(1) as f64;
        let (prompt, output) = (each(self.prompt_tokens), each(self.output_tokens));
        writeln!(f, "\n{:<12}{prompt:.1} a prompt, {output:.1} an answer", "tokens")?;
        let (answers, out, read) = (self.requests_per_s, self.output_tokens_per_s, self.prompt_tokens_per_s);
        writeln!(
            f,
            "{:<12}{} requests/s, {} tokens/s out, {} tokens/s in, over {:.1} s",
            "throughput",
            figure(answers),
            figure(out),
            figure(read),
            self.window_s
        )?;
        if let Some(Goodput { slo, requests_per_s, share, wanted_share, met }) = &self.goodput {
            let verdict = if *met { "met" } else { "MISSED" };
            writeln!(
                f,
                "{:<12}{} requests/s: {:.1}% within {slo} ({verdict}: {}% wanted)",
                "goodput",
                figure(*requests_per_s),
                100.0 * share,
                100.0 * wanted_share,
            )?;
        }
        if let Some(lag) = &self.send_lag_ms {
            let (p50, p99, max) = (figure(lag.p50), figure(lag.p99), figure(lag.max));
            writeln!(f, "{:<12}p50 {p50} ms, p99 {p99} ms, max {max} ms", "send lag")?;
        }
        let generator = &self.generator;
        writeln!(
            f,
            "{:<12}{:.2} s of processor time, {:.1} µs a token; {} requests open at most",
            "generator", generator.cpu_s, generator.cpu_us_per_token, generator.in_flight_peak
        )
    }
}

/// Three digits that say something.
fn figure(value: f64) -> String {
    let decimals = match value {
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        let shown = [0.0, 0.126, 9.996, 12.34, 99.96, 1234.5].map(figure);
        assert_eq!(shown, ["0.00", "0.13", "10.0", "12.3", "100", "1234"]);
    }
}
