//! OpenTelemetry traces, sent to a small OTLP receiver.

use crate::support;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use support::{Daemon, Place, Sent, until};

/// Receives spans, and keeps each with the name of its service.
struct Receiver {
    address: String,
    spans: Arc<Mutex<Vec<(String, Span)>>>,
}

impl Receiver {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let spans = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&spans);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.expect("a connection");
                let kept = Arc::clone(&kept);
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream.try_clone().expect("a stream"));
                    while let Some(request) = request(&mut reader) {
                        for resource in request.resource_spans {
                            let attributes = resource.resource.unwrap_or_default().attributes;
                            let name = attributes.into_iter().find(|a| a.key == "service.name");
                            let name = name.map(|a| text(a.value)).unwrap_or_default();
                            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
                            kept.lock().expect("spans").extend(spans.map(|span| (name.clone(), span)));
                        }
                        (&stream)
                            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                            .expect("answered");
                    }
                });
            }
        });
        Self { address, spans }
    }
}

fn request(reader: &mut impl BufRead) -> Option<ExportTraceServiceRequest> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&n| n > 0)?;
    assert!(line.starts_with("POST /v1/traces HTTP/1.1"), "{line}");
    let mut length = 0;
    loop {
        line.clear();
        reader.read_line(&mut line).expect("a header");
        let header = line.trim().to_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
        if let Some(value) = header.strip_prefix("content-type:") {
            assert_eq!(value.trim(), "application/x-protobuf");
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("a body");
    Some(ExportTraceServiceRequest::decode(&*body).expect("OTLP"))
}

fn text(value: Option<opentelemetry_proto::tonic::common::v1::AnyValue>) -> String {
    match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_window_is_a_span_with_links_to_its_records() {
    let receiver = Receiver::start();
    let place = Place::new("traces", 1);
    let otel = format!("{{ endpoint: \"{}\", service_name: tickets }}", receiver.address);
    let more = [
        ("otel", &*otel),
        // All four records in one window.
        ("window", "{ max_records: 4, max_wait: 60s }"),
        ("log", "{ format: json, level: debug }"),
    ];
    let mut daemon = Daemon::start(&place.config(&more));
    let parent = |n: u8| format!("00-{:032x}-{:016x}-01", 0xabc0 + u32::from(n), 0xdef0 + u32::from(n));
    let traced = |n: u8, value: &str| Sent {
        headers: vec![("traceparent".to_owned(), parent(n))],
        ..Sent::new(0, value)
    };
    place.produce([
        traced(1, r#"{"id": 1, "text": "hello"}"#),
        traced(2, "no json"),
        Sent::ticket(0, 3, "no trace"),
        traced(4, r#"{"id": 4, "text": "bye"}"#),
    ]);
    let predictions = place.predictions(3);
    let passed: Vec<_> = predictions.iter().map(|got| got.header("traceparent")).collect();
    assert_eq!(passed, [Some(&*parent(1)), None, Some(&*parent(4))]);
    let (service, span) = until("the span", || receiver.spans.lock().expect("spans").first().cloned());
    assert_eq!((&*service, &*span.name), ("tickets", "window"));
    let links: Vec<String> =
        span.links.iter().map(|l| l.trace_id.iter().map(|b| format!("{b:02x}")).collect()).collect();
    assert_eq!(links, [1u8, 2, 4].map(|n| format!("{:032x}", 0xabc0 + u32::from(n))));
    let attribute = |key: &str| {
        let found = span.attributes.iter().find(|a| a.key == key).unwrap_or_else(|| panic!("{key}"));
        text(found.value.clone())
    };
    assert_eq!(attribute("messaging.destination.name"), place.input);
    assert_eq!(attribute("messaging.batch.message_count"), "4");
    assert_eq!((attribute("kandle.predicted"), attribute("kandle.dead_lettered")), ("3".into(), "1".into()));
    assert_eq!(attribute("kandle.closed_by"), "records");
    let digest = predictions[0].header("kandle-model-digest").expect("a digest");
    assert_eq!(attribute("kandle.model_digest"), digest);
    assert!(span.start_time_unix_nano < span.end_time_unix_nano);
    // The log line about the window has its trace id.
    let trace: String = span.trace_id.iter().map(|b| format!("{b:02x}")).collect();
    let line = daemon.wait_log("window published");
    let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(line["trace_id"], trace);
    // Spans in flight at shutdown are sent.
    place.produce([traced(5, "last")]);
    until("the lag metric", || daemon.get("/metrics").1.contains("kandle_lag_records{").then_some(()));
    until("the record to be read", || {
        let (_, status) = daemon.get("/status");
        let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
        (status["source"]["lag_records"] == 1).then_some(())
    });
    daemon.stop();
    let last = receiver.spans.lock().expect("spans").last().cloned().expect("a span").1;
    assert_eq!(last.links.len(), 1, "{last:?}");
}
