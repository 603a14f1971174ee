//! What a process is told about its telemetry, and the start and end of it.

use std::path::PathBuf;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, SpanLimits};
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::Layer;
use tracing_subscriber::registry::Registry;

use crate::error::TelemetryError;
use crate::log::{self, LogFormat, LogHandle};
use crate::{SPANS, export, trace};

/// Time that the collector has to take the last spans when the process ends.
const FAREWELL: Duration = Duration::from_secs(1);

/// Attributes, and links, of one span.
const SPAN_ATTRIBUTES_MAX: u32 = 32;

/// What a process is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// What to log: a level, or directives such as `warn,galerne_worker=debug`.
    pub filter: String,
    /// How a line of the log looks.
    pub format: LogFormat,
    /// Where spans go; `None` makes none.
    pub export: Option<Export>,
    /// `service.name` of the spans.
    pub service: &'static str,
    /// `service.instance.id` of the spans: which of its kind this process is.
    pub instance: String,
}

/// Where spans go, and of how many requests.
#[derive(Clone, Debug)]
pub struct Export {
    /// A collector's gRPC endpoint (OTLP), `http://HOST:4317`, or `https://HOST:4317`.
    pub endpoint: String,
    /// Authority of the collector's certificate (PEM); without it, those that the system trusts.
    pub ca: Option<PathBuf>,
    /// Certificate to show to the collector, and its key (PEM).
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Share of requests that are followed though their clients do not say; from 0 to 1. A client's `traceparent`
    /// decides for itself.
    pub ratio: f64,
}

/// The process's telemetry, to be kept until its end.
#[derive(Debug)]
pub struct Telemetry {
    log: LogHandle,
    spans: Option<SdkTracerProvider>,
}

/// Starts logging, and exporting spans if `options` say so. Within a tokio runtime, which drives the connection to the
/// collector; a collector that is away never holds up anything.
///
/// # Errors
/// A value of `options` is wrong, or the process has started its telemetry already.
pub fn start(options: Options) -> Result<Telemetry, TelemetryError> {
    let Options { filter, format, export, service, instance } = options;
    let Some(export) = export else {
        return Ok(Telemetry { log: log::install(&filter, format, None)?, spans: None });
    };
    let ratio = export.ratio;
    if !(0.0..=1.0).contains(&ratio) {
        return Err(TelemetryError::Ratio(ratio.to_string()));
    }
    let limits = SpanLimits {
        max_attributes_per_span: SPAN_ATTRIBUTES_MAX,
        max_links_per_span: SPAN_ATTRIBUTES_MAX,
        ..SpanLimits::default()
    };
    let provider = SdkTracerProvider::builder()
        .with_span_processor(export::processor(&export)?)
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
        .with_span_limits(limits)
        .with_resource(resource(service, instance))
        .build();
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("galerne"))
        .with_context_activation(false)
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_level(false)
        .with_target(false)
        .with_filter(filter_fn(|metadata| metadata.target() == SPANS).with_max_level_hint(LevelFilter::INFO));
    let spans: Box<dyn Layer<Registry> + Send + Sync> = Box::new(spans);
    let log = log::install(&filter, format, Some(spans))?;
    trace::export(ratio);
    Ok(Telemetry { log, spans: Some(provider) })
}

/// What all spans of this process have in common; `OTEL_RESOURCE_ATTRIBUTES` may add to it.
fn resource(service: &'static str, instance: String) -> Resource {
    let attributes = [
        KeyValue::new("service.instance.id", instance),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("process.pid", i64::from(std::process::id())),
    ];
    Resource::builder().with_service_name(service).with_attributes(attributes).build()
}

impl Telemetry {
    /// Changes what is logged.
    pub fn log(&self) -> &LogHandle {
        &self.log
    }

    /// Sends the last spans, if the collector takes them within a second.
    pub fn end(self) {
        if let Some(spans) = self.spans
            && let Err(error) = spans.shutdown_with_timeout(FAREWELL)
        {
            tracing::info!(%error, "the last spans were not taken");
        }
    }
}
