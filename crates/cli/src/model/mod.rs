//! `galerne model`: what concerns a checkpoint before anything serves it.

mod download;
mod fetch;
mod inspect;
mod manifest;
mod preload;
mod verify;

use clap::{Args, Subcommand};

/// Fetches, describes and checks model files.
#[derive(Args)]
pub(crate) struct ModelCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    Fetch(fetch::Fetch),
    Inspect(inspect::Inspect),
    Preload(preload::Preload),
    Verify(verify::Verify),
}

impl ModelCommand {
    /// Blocks: files are read, and written, from one end to the other.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self.action {
            Action::Fetch(fetch) => fetch.run(),
            Action::Inspect(inspect) => inspect.run(),
            Action::Preload(preload) => preload.run(),
            Action::Verify(verify) => verify.run(),
        }
    }
}

/// A number of bytes for people.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = digits(value);
    if unit == 0 { format!("{count} B") } else { format!("{value:.digits$} {}", UNITS[unit]) }
}

/// Digits behind the point that make three in all.
fn digits(value: f64) -> usize {
    match value {
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_have_three_digits() {
        for (count, shown) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (94_600_000, "94.6 MB"),
            (14_500_000_000, "14.5 GB"),
            (999_999, "1.00 MB"),
        ] {
            assert_eq!(super::bytes(count), shown);
        }
    }
}
