//! What a load shows while it runs, and what it leaves.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use galerne_load::Progress;
use galerne_workload::Report;
use serde_json::json;
use tokio::sync::watch;

/// Of the JSON that is written; another number when a field changes its meaning or goes.
const SCHEMA: &str = "galerne.load/1";

/// Follows a run in one line of a terminal, until it ends.
pub(super) async fn follow(mut progress: watch::Receiver<Progress>, duration: Duration, requests: usize) {
    let mut terminal = std::io::stderr();
    if !terminal.is_terminal() {
        return;
    }
    while progress.changed().await.is_ok() {
        let line = line(&progress.borrow_and_update(), duration, requests);
        write!(terminal, "\r\x1b[2K{line}").ok();
        terminal.flush().ok();
    }
    write!(terminal, "\r\x1b[2K").ok();
    terminal.flush().ok();
}

fn line(progress: &Progress, duration: Duration, requests: usize) -> String {
    let Progress { elapsed, sent, open, answered, failed, tokens_per_s, ttft_p50, ttft_p99 } = progress;
    let seconds = elapsed.as_secs_f64();
    let mut line = match duration {
        Duration::MAX => format!("{seconds:.0} s"),
        duration if *elapsed >= duration => format!("{seconds:.0} s, waiting for the last ones"),
        duration => format!("{seconds:.0}/{:.0} s", duration.as_secs_f64()),
    };
    line.push_str(&match requests {
        usize::MAX => format!("  sent {sent}"),
        requests => format!("  sent {sent}/{requests}"),
    });
    line.push_str(&format!("  open {open}  answered {answered}"));
    if *failed > 0 {
        line.push_str(&format!("  FAILED {failed}"));
    }
    line.push_str(&format!("  {tokens_per_s:.0} tokens/s"));
    if let (Some(p50), Some(p99)) = (ttft_p50, ttft_p99) {
        let ms = |time: &Duration| time.as_secs_f64() * 1e3;
        line.push_str(&format!("  TTFT p50 {:.0} ms, p99 {:.0} ms", ms(p50), ms(p99)));
    }
    line
}

/// Writes the report as JSON, with the run that it is of.
pub(super) fn write(file: &Path, heading: &str, report: &Report) -> anyhow::Result<()> {
    let document = json!({
        "schema": SCHEMA,
        "version": env!("CARGO_PKG_VERSION"),
        "run": heading.lines().collect::<Vec<_>>().join("; "),
        "arguments": arguments(),
        "report": report,
    });
    let text = serde_json::to_string_pretty(&document)? + "\n";
    if file.as_os_str() == "-" {
        return Ok(std::io::stdout().write_all(text.as_bytes())?);
    }
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// What the command line said, without the key.
fn arguments() -> Vec<String> {
    let mut hidden = false;
    let shown = std::env::args().skip(1).map(|argument| match argument {
        _ if std::mem::take(&mut hidden) => "…".to_owned(),
        key if key.starts_with("--api-key=") => "--api-key=…".to_owned(),
        argument => {
            hidden = argument == "--api-key";
            argument
        }
    });
    shown.collect()
}

/// # Errors
/// When the run is not valid, or is not good enough.
pub(super) fn check(report: &Report) -> anyhow::Result<()> {
    ensure!(report.valid, "the run is not valid: {}", report.problems.join("; "));
    match &report.goodput {
        Some(goodput) => ensure!(
            goodput.met,
            "{:.1}% of the requests kept {}: {}% must",
            100.0 * goodput.share,
            goodput.slo,
            100.0 * goodput.wanted_share
        ),
        None => ensure!(report.requests.failed == 0, "{} requests failed", report.requests.failed),
    }
    Ok(())
}
