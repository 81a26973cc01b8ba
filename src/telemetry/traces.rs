//! OpenTelemetry: one span per window, from its oldest record's arrival to its acknowledgement, with links to the spans
//! in its records' `traceparent` headers. Sent as OTLP over HTTP (protobuf).
//!
//! Predictions keep the records' headers, so that a consumer's spans continue the producer's trace.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::{
    Link, Span as _, SpanContext, SpanId, SpanKind, TraceFlags, TraceId, TraceState, Tracer as _,
    TracerProvider as _,
};
use opentelemetry::{Key, KeyValue, Value};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};

use crate::record::TraceParent;
use crate::settings::Otel;
use crate::window::Window;

/// Maximum links of a span.
const LINKS: u32 = 1024;
/// How long one request may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long sending the last spans may take at shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// Why no spans can be sent.
#[derive(Debug, thiserror::Error)]
#[error("otel.endpoint: {0}")]
pub struct TracesError(#[from] opentelemetry_otlp::ExporterBuildError);

/// Exports spans to the OTLP endpoint.
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// `None` if `otel.endpoint` is not set.
    pub fn start(otel: &Otel) -> Result<Option<Arc<Self>>, TracesError> {
        let Some(endpoint) = &otel.endpoint else { return Ok(None) };
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_http_client(Client(
                ureq::Agent::config_builder()
                    .timeout_global(Some(TIMEOUT))
                    .http_status_as_error(false)
                    .build()
                    .into(),
            ))
            .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
            .with_timeout(TIMEOUT)
            .build()?;
        let resource = Resource::builder()
            .with_service_name(otel.service_name.clone())
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource)
            .with_max_links_per_span(LINKS)
            .build();
        let tracer = provider.tracer("kandle");
        Ok(Some(Arc::new(Self { provider, tracer })))
    }

    /// Makes the span of an acknowledged window. `counts`: its predictions, dead letters and tombstones. Returns the
    /// trace's id, for the log.
    pub fn window(&self, window: &Window, counts: [u64; 3], digest: &str, now: Instant) -> String {
        let oldest = window.records.iter().map(|record| record.arrived).min().unwrap_or(now);
        let links = window.records.iter().filter_map(|record| record.trace.as_deref()).map(link).collect();
        let attribute = |key: &'static str, value: Value| KeyValue::new(Key::from_static_str(key), value);
        let topics: std::collections::BTreeSet<&str> =
            window.spans.iter().map(|span| &*span.partition.topic).collect();
        let topics = topics.into_iter().collect::<Vec<_>>().join(",");
        let number = |number: usize| Value::I64(number as i64);
        let end = SystemTime::now();
        let mut span = self
            .tracer
            .span_builder("window")
            .with_kind(SpanKind::Consumer)
            .with_start_time(end.checked_sub(now - oldest).unwrap_or(end))
            .with_links(links)
            .with_attributes([
                // OpenTelemetry's semantic conventions for messaging.
                attribute("messaging.system", "kafka".into()),
                attribute("messaging.operation.type", "process".into()),
                attribute("messaging.destination.name", topics.into()),
                attribute("messaging.batch.message_count", number(window.records.len())),
                attribute("kandle.window", Value::I64(window.id as i64)),
                attribute("kandle.partitions", number(window.spans.len())),
                attribute("kandle.closed_by", window.closed_by.name().into()),
                attribute("kandle.predicted", Value::I64(counts[0] as i64)),
                attribute("kandle.dead_lettered", Value::I64(counts[1] as i64)),
                attribute("kandle.tombstones", Value::I64(counts[2] as i64)),
                attribute("kandle.model_digest", digest.to_owned().into()),
            ])
            .start(&self.tracer);
        let trace = span.span_context().trace_id().to_string();
        span.end_with_timestamp(end);
        trace
    }

    /// Sends the remaining spans and shuts down.
    pub fn end(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(SHUTDOWN_TIMEOUT) {
            tracing::warn!(%error, "the last spans could not be sent");
        }
    }
}

fn link(parent: &TraceParent) -> Link {
    Link::with_context(SpanContext::new(
        TraceId::from_bytes(parent.trace),
        SpanId::from_bytes(parent.span),
        TraceFlags::new(parent.flags),
        true,
        TraceState::NONE,
    ))
}

/// ureq, a dependency already because of the model hub. It may block: the exporter has a thread of its own.
#[derive(Debug)]
struct Client(ureq::Agent);

#[async_trait::async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let (parts, mut body) = self.0.run(Request::from_parts(parts, body.to_vec()))?.into_parts();
        let body = body.read_to_vec()?;
        Ok(Response::from_parts(parts, body.into()))
    }
}
