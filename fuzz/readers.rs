//! What is fuzzed: everything that reads bytes which others have produced. Each function takes any bytes and must not
//! panic; libFuzzer (`targets/`) and `tests/fuzz.rs` limit how much it allocates.

#![allow(dead_code)] // Each target uses one of them.

use std::path::Path;
use std::sync::OnceLock;

use kandle::codec::Decoder;
use kandle::kafka::headers::{self, Headers};
use kandle::record::{Raw, TraceParent};
use kandle::settings::{self, Sources};
use kandle::task::Kind;
use rdkafka::message::{Header, OwnedHeaders};
use serde_json::value::RawValue;

/// A decoder that selects a text, and fields of every kind to include.
fn decoder(format: &str, more: &[String]) -> Decoder {
    let mut set: Vec<String> = [
        "kafka.brokers=none:1",
        "input.topics=in",
        "input.group=g",
        "input.field=/text",
        "task.kind=text-classification",
        "model.source=bundled",
        "output.topic=out",
        "output.include=/id,/tags/0,/by/name,/price,/at",
        "dead_letters.topic=dead",
    ]
    .map(str::to_owned)
    .to_vec();
    set.push(format!("input.format={format}"));
    set.extend_from_slice(more);
    let settings = settings::load(&Sources { set, ..Sources::default() });
    let settings = settings.unwrap_or_else(|problems| panic!("{problems:?}")).settings;
    Kind::decoder(&settings).unwrap_or_else(|error| panic!("{error}"))
}

/// With the schema in a file, so that values have no schema id.
fn with_file(format: &str, schema: &str, more: &[String]) -> Decoder {
    // kandle's own folder, or that of the crate in fuzz/.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = if root.ends_with("fuzz") { root.to_owned() } else { root.join("fuzz") };
    let mut set = vec![format!("input.schema={}", folder.join("schemas").join(schema).display())];
    set.extend_from_slice(more);
    decoder(format, &set)
}

/// What is included is always JSON.
fn check(decoder: &Decoder, value: Raw<'_>) {
    if let Ok(input) = decoder.decode(value) {
        // The fields are members, each with a comma before it.
        if !input.include.is_empty() {
            let members = format!("{{{}}}", &input.include[1..]);
            // Numbers may be larger than any type holds.
            let read: Result<&RawValue, _> = serde_json::from_str(&members);
            assert!(read.is_ok(), "{members}");
        }
    }
}

/// Values in Avro.
pub fn avro(data: &[u8]) {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    check(DECODER.get_or_init(|| with_file("avro", "everything.avsc", &[])), data.into());
}

/// Messages of Protobuf.
pub fn protobuf(data: &[u8]) {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    let message = ["input.message=fuzz.Everything".to_owned()];
    check(DECODER.get_or_init(|| with_file("protobuf", "everything.proto", &message)), data.into());
}

/// JSON documents.
pub fn json(data: &[u8]) {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    check(DECODER.get_or_init(|| decoder("json", &[])), data.into());
}

/// JSON documents that are checked against a schema.
pub fn json_schema(data: &[u8]) {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    check(DECODER.get_or_init(|| with_file("json_schema", "everything.json", &[])), data.into());
}

/// The wire format: schema ids before the data. No schema was fetched, so that every value is refused.
pub fn frame(data: &[u8]) {
    let decoder = of_registry();
    assert!(decoder.decode(data).is_err());
}

/// The headers that kandle reads. The first byte is the length of a header's value; the rest is the record's value.
pub fn headers(data: &[u8]) {
    let (length, rest) = data.split_first().map_or((0, data), |(length, rest)| (usize::from(*length), rest));
    let (value, bytes) = rest.split_at(length.min(rest.len()));
    let headers = OwnedHeaders::new().insert(Header { key: "__value_schema_id", value: Some(value) });
    let headers = Headers::from(headers);
    assert!(of_registry().decode(Raw { bytes, headers: Some(&headers) }).is_err());
    let _ = TraceParent::read(value);
    if let Some(position) = headers::position(value) {
        assert_eq!(headers::position(position.to_string().as_bytes()), Some(position));
    }
}

fn of_registry() -> &'static Decoder {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    // Nothing listens there, and nothing is asked for.
    DECODER.get_or_init(|| decoder("protobuf", &["registry.url=http://127.0.0.1:1".to_owned()]))
}
