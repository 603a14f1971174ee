//! The way to the collector. It is allowed to fail: spans are dropped then, and the log says so once.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig, Identity};
use opentelemetry_otlp::{WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanExporter};

use crate::error::TelemetryError;
use crate::start::Export;

/// Spans that wait for the collector, at most; more are dropped.
const QUEUE_SPANS_MAX: usize = 8192;

/// Spans in one message to the collector.
const BATCH_SPANS_MAX: usize = 512;

/// Time between two messages, if the spans do not fill one before.
const BATCH_DELAY: Duration = Duration::from_millis(500);

/// Time that the collector has to take a message.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(3);

/// Starts the thread that sends spans to a collector. To be called within a tokio runtime, which drives the connection.
/// Headers for the collector, which may hold a key, come from `OTEL_EXPORTER_OTLP_HEADERS`: the exporter reads them.
pub(crate) fn processor(export: &Export) -> Result<BatchSpanProcessor, TelemetryError> {
    let endpoint = &export.endpoint;
    let mut exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic();
    if !endpoint.starts_with("http://") {
        exporter = exporter.with_tls_config(tls(export)?);
    }
    let exporter = exporter.with_endpoint(endpoint).with_timeout(EXPORT_TIMEOUT).build();
    let exporter = exporter.map_err(|error| TelemetryError::Endpoint {
        endpoint: endpoint.to_owned(),
        reason: error.to_string(),
    })?;
    let config = BatchConfigBuilder::default()
        .with_max_queue_size(QUEUE_SPANS_MAX)
        .with_max_export_batch_size(BATCH_SPANS_MAX)
        .with_scheduled_delay(BATCH_DELAY)
        .build();
    let told = Told { exporter, endpoint: endpoint.to_owned(), away: AtomicBool::new(false) };
    Ok(BatchSpanProcessor::builder(told).with_batch_config(config).build())
}

/// The authority that is named is trusted, or else those that the system trusts.
fn tls(Export { ca, identity, .. }: &Export) -> Result<ClientTlsConfig, TelemetryError> {
    let tls = match ca {
        None => ClientTlsConfig::new().with_enabled_roots(),
        Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?)),
    };
    let Some((cert, key)) = identity else { return Ok(tls) };
    Ok(tls.identity(Identity::from_pem(read(cert)?, read(key)?)))
}

fn read(file: &Path) -> Result<Vec<u8>, TelemetryError> {
    let told = |error: std::io::Error| TelemetryError::File {
        file: file.display().to_string(),
        reason: error.to_string(),
    };
    std::fs::read(file).map_err(told)
}

/// An exporter whose failures are logged, once until it succeeds again.
#[derive(Debug)]
struct Told {
    exporter: opentelemetry_otlp::SpanExporter,
    endpoint: String,
    away: AtomicBool,
}

impl SpanExporter for Told {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let sent = self.exporter.export(batch).await;
        let was_away = self.away.swap(sent.is_err(), Ordering::Relaxed);
        let endpoint = &self.endpoint;
        match &sent {
            Err(error) if !was_away => {
                tracing::warn!(endpoint, %error, "the collector takes no spans: they are dropped until it does");
            }
            Ok(()) if was_away => tracing::warn!(endpoint, "the collector takes spans again"),
            _ => {}
        }
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
