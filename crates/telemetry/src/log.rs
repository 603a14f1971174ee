//! The log on standard error, and its filter.

use std::io::IsTerminal as _;

use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::layer::{Layer, SubscriberExt as _};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::error::TelemetryError;

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Crates whose `trace` level prints bytes of connections: headers, and with them keys, or bodies. They stay at
/// `debug` whatever the filter says.
const TALKATIVE: [&str; 6] = ["h2", "hyper", "hyper_util", "rustls", "tokio_util", "tower"];

type Shared = reload::Handle<EnvFilter, Registry>;

/// Changes what a running process logs.
#[derive(Clone, Debug)]
pub struct LogHandle(Shared);

impl LogHandle {
    /// Logs what `filter` selects from now on: a level, or directives such as `warn,galerne_worker=debug`.
    ///
    /// # Errors
    /// The filter cannot be parsed; the log goes on as before.
    pub fn set(&self, filter: &str) -> Result<(), TelemetryError> {
        let parsed = parse(filter)?;
        let gone = |error: reload::Error| wrong(filter, &error);
        self.0.reload(parsed).map_err(gone)
    }

    /// What is logged now.
    pub fn filter(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }
}

/// The filter, if [`LogHandle::set`] would take it.
///
/// # Errors
/// It cannot be parsed.
pub fn filter(text: &str) -> Result<String, TelemetryError> {
    parse(text).map(|_| text.to_owned())
}

/// Installs the process's subscriber: the log, and beside it `spans`.
pub(crate) fn install(
    filter: &str,
    format: LogFormat,
    spans: Option<Box<dyn Layer<Registry> + Send + Sync>>,
) -> Result<LogHandle, TelemetryError> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && format == LogFormat::Text);
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).boxed(),
    };
    let layers = spans.into_iter().chain([lines.with_filter(filter).boxed()]).collect::<Vec<_>>();
    let subscriber = tracing_subscriber::registry().with(layers);
    subscriber.try_init().map_err(|_| TelemetryError::Twice)?;
    Ok(LogHandle(handle))
}

fn parse(text: &str) -> Result<EnvFilter, TelemetryError> {
    let mut filter = EnvFilter::try_new(text).map_err(|error| wrong(text, &error))?;
    if filter.max_level_hint() == Some(LevelFilter::TRACE) {
        for name in TALKATIVE {
            let directive = format!("{name}=debug").parse();
            filter = filter.add_directive(directive.map_err(|error| wrong(text, &error))?);
        }
    }
    Ok(filter)
}

fn wrong(filter: &str, reason: &dyn std::fmt::Display) -> TelemetryError {
    TelemetryError::Filter { filter: filter.to_owned(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_filter_is_a_level_or_directives() {
        for good in ["info", "warn,galerne_worker=debug", "off"] {
            let read = parse(good).unwrap().to_string();
            let (read, given): (BTreeSet<_>, BTreeSet<_>) =
                (read.split(',').collect(), good.split(',').collect());
            assert_eq!(read, given);
        }
        let error = parse("galerne_worker=loud").unwrap_err().to_string();
        assert!(error.starts_with(r#""galerne_worker=loud" is not a filter of logs"#), "{error}");
    }

    #[test]
    fn talkative_crates_stay_at_debug() {
        let filter = parse("trace").unwrap().to_string();
        assert!(filter.contains("h2=debug") && filter.contains("hyper=debug"), "{filter}");
    }
}
