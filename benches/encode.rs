//! Time to encode one prediction: the JSON that a task writes, and what each format makes of it. `cargo bench --bench encode`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kandle::codec::write::{Record, Writer};
use kandle::settings::{self, Settings, Sources};
use serde_json::{Value, json};

fn settings(kind: &str, format: &str) -> Settings {
    let set = [
        "kafka.brokers=none:1",
        "input.topics=in",
        "input.group=g",
        "input.field=/text",
        "model.source=bundled",
        "output.topic=out",
        "registry.url=http://none:1",
        "dead_letters.topic=dead",
    ];
    let mut set: Vec<String> = set.map(str::to_owned).to_vec();
    set.extend([format!("task.kind={kind}"), format!("output.format={format}")]);
    settings::load(&Sources { set, ..Sources::default() })
        .unwrap_or_else(|faults| panic!("{faults:?}"))
        .settings
}

/// A number like a score or a value of a vector: with as many digits as an f32 has.
fn number(i: u32) -> f32 {
    ((i * 7919 + 13) % 10_007) as f32 / 10_007.0 - 0.5
}

fn encode(c: &mut Criterion) {
    let vector: Vec<f32> = (0..384).map(number).collect();
    let labels = ["billing", "delivery", "account", "returns", "technical", "praise"];
    let scores: serde_json::Map<String, Value> =
        (0..).zip(labels).map(|(i, label)| (label.to_owned(), number(i).into())).collect();
    let predictions = [
        ("text-classification", json!({ "label": "billing", "score": number(0), "scores": scores })),
        ("text-embedding", Value::Null),
    ];
    for (kind, prediction) in predictions {
        let mut group = c.benchmark_group(format!("encode {kind}"));
        group.throughput(Throughput::Elements(1));
        let write = |out: &mut Vec<u8>| match &prediction {
            // As the task does: floats in the digits of an f32.
            Value::Null => {
                out.extend_from_slice(b"{\"embedding\":");
                serde_json::to_writer(&mut *out, &vector).expect("JSON");
                out.push(b'}');
            }
            prediction => serde_json::to_writer(out, prediction).expect("JSON"),
        };
        let (mut json, mut out) = (Vec::new(), Vec::new());
        write(&mut json);
        group.bench_function("json", |b| {
            b.iter(|| {
                out.clear();
                write(&mut out);
                black_box(out.len())
            });
        });
        for format in ["json_schema", "avro", "protobuf"] {
            let writer = Writer::new(&settings(kind, format));
            writer.set_schema(Record::of(&settings(kind, format)), 7);
            let encoding = writer.encoding().expect("a schema");
            out.clear();
            encoding.write(&json, &mut out).expect("encoded");
            println!("{kind}: {} bytes in {format}, {} in json", out.len(), json.len());
            group.bench_function(format!("json, then {format}"), |b| {
                b.iter(|| {
                    json.clear();
                    write(&mut json);
                    out.clear();
                    encoding.write(&json, &mut out).expect("encoded");
                    black_box(out.len())
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, encode);
criterion_main!(benches);
