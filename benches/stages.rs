//! Time of kandle's own stages, without the model: gather, plan, prepare, predict. `cargo bench --bench stages`.

use std::sync::Arc;
use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kandle::codec::Decoder;
use kandle::engine::{Planned, plan};
use kandle::lease::Lease;
use kandle::model::Output;
use kandle::record::{Arrival, Partition};
use kandle::settings::{self, Sources};
use kandle::task::Kind;
use kandle::task::classification::Classification;
use kandle::task::text::{TextModel, TextTask, Texts};
use kandle::telemetry::{Health, Metrics};
use kandle::watch::{Observer, Watch};
use kandle::window::{ClosedBy, Gatherer, Limits, Window};

const RECORDS: usize = 1024;

fn gather(value: &[u8]) -> Window {
    let (mut gatherer, now) = (Gatherer::new(Limits::NONE), Instant::now());
    let (partition, lease) = (Partition::new("in", 0), Lease::new(0));
    for offset in 0..RECORDS as i64 {
        let arrival = Arrival { offset, key: Some(b"customer-1"), value: Some(value), ..Arrival::default() };
        assert!(gatherer.push(&partition, &lease, arrival, now).is_none());
    }
    gatherer.close(ClosedBy::Stop).expect("records")
}

fn stages(c: &mut Criterion) {
    let mut group = c.benchmark_group("stage");
    group.throughput(Throughput::Elements(RECORDS as u64));
    let value =
        br#"{"id": 7, "text": "The parcel with order 4711 has not arrived; where is it now? Please look."}"#;
    group.bench_function("gather", |b| b.iter(|| gather(value)));
    group.bench_function("plan", |b| {
        let item = |i: u32| Planned { item: i, class: 0, cost: 3 + i as usize * 7919 % 225 };
        let items: Vec<Planned> = (0..RECORDS as u32).map(item).collect();
        b.iter(|| plan(items.clone(), 512, 2));
    });
    let set = [
        "kafka.brokers=none:1",
        "input.topics=in",
        "input.group=g",
        "input.field=/text",
        "task.kind=text-classification",
        "model.source=bundled",
        "output.topic=out",
        "dead_letters.topic=dead",
    ];
    let sources = Sources { set: set.map(str::to_owned).to_vec(), ..Sources::default() };
    let settings = settings::load(&sources).unwrap_or_else(|faults| panic!("{faults:?}")).settings;
    let model = TextModel::load(&settings, Output::Logits, &Arc::new(Metrics::new())).expect("bundled");
    let task = |texts: Texts, _: &_| {
        let model = &texts.model;
        let predict = Classification::new(&model.labels, model.scores, &settings.task);
        TextTask::new(texts, predict, &settings.task)
    };
    let batched = model.batched(&settings, task).expect("a task");
    group.bench_function("predict", |b| {
        // All records are equal, so the model computes only one.
        let response = || batched.engine.answer(batched.prepare(gather(value))).expect("answers");
        let alone = Observer::default();
        b.iter_batched(
            response,
            |response| batched.predict(response, &alone),
            criterion::BatchSize::SmallInput,
        );
    });
    group.bench_function("predict and count", |b| {
        let response = || batched.engine.answer(batched.prepare(gather(value))).expect("answers");
        let (observer, metrics) = (Observer::new(&settings).expect("an observer"), Arc::new(Metrics::new()));
        let health = Arc::new(Health::new(std::time::Duration::from_secs(1)));
        let mut watch = Watch::new(&metrics, &health, None, None, 0.2);
        b.iter_batched(
            response,
            |response| {
                let encoded = batched.predict(response, &observer);
                watch.published(&encoded.tally);
                encoded
            },
            criterion::BatchSize::SmallInput,
        );
    });
    group.bench_function("decode, tokenize and plan", |b| {
        let window = || gather(value);
        b.iter_batched(window, |window| batched.prepare(window), criterion::BatchSize::SmallInput);
    });
    group.finish();
}

/// Settings that decode a record with 20 fields: a text and two fields to include.
fn decoder(format: &[&str]) -> Decoder {
    let set = [
        "kafka.brokers=none:1",
        "input.topics=in",
        "input.group=g",
        "input.field=/field_10",
        "task.kind=text-classification",
        "model.source=bundled",
        "output.topic=out",
        "output.include=/field_0,/field_13",
        "dead_letters.topic=dead",
    ];
    let set = set.iter().chain(format).map(|&assignment| assignment.to_owned()).collect();
    let sources = Sources { set, ..Sources::default() };
    let settings = settings::load(&sources).unwrap_or_else(|faults| panic!("{faults:?}")).settings;
    Kind::decoder(&settings).expect("a decoder")
}

/// A record of about 1 KB with 20 fields, from JSON and from Avro.
fn formats(c: &mut Criterion) {
    let text = "The parcel has not arrived; please look. ";
    let is_text = |i: usize| i % 4 == 2;
    let words = |i: usize| text.repeat(if i == 10 { 8 } else { 3 });
    let fields: Vec<String> = (0..20)
        .map(|i| {
            if is_text(i) {
                format!("\"field_{i}\":{:?}", words(i))
            } else {
                format!("\"field_{i}\":{}", i * 12345)
            }
        })
        .collect();
    let json = format!("{{{}}}", fields.join(","));

    let zigzag = |value: usize, out: &mut Vec<u8>| {
        let mut rest = value * 2;
        while rest >= 0x80 {
            out.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        out.push(rest as u8);
    };
    let mut avro = Vec::new();
    for i in 0..20 {
        if is_text(i) {
            zigzag(words(i).len(), &mut avro);
            avro.extend_from_slice(words(i).as_bytes());
        } else {
            zigzag(i * 12345, &mut avro);
        }
    }
    let types: Vec<String> = (0..20)
        .map(|i| format!(r#"{{"name":"field_{i}","type":"{}"}}"#, if is_text(i) { "string" } else { "long" }))
        .collect();
    let folder = tempfile::tempdir().expect("a directory");
    let schema = folder.path().join("record.avsc");
    let record = format!(r#"{{"type":"record","name":"R","fields":[{}]}}"#, types.join(","));
    std::fs::write(&schema, record).expect("written");

    let json_decoder = decoder(&[]);
    let schema = format!("input.schema={}", schema.display());
    let avro_decoder = decoder(&["input.format=avro", &schema]);
    let (a, b) =
        (json_decoder.decode(json.as_bytes()).expect("JSON"), avro_decoder.decode(&avro).expect("Avro"));
    assert_eq!((&a.text, &a.include), (&b.text, &b.include));

    let mut group = c.benchmark_group("decode");
    group.bench_function(format!("json, {} bytes", json.len()), |b| {
        b.iter(|| json_decoder.decode(json.as_bytes()))
    });
    group.bench_function(format!("avro, {} bytes", avro.len()), |b| b.iter(|| avro_decoder.decode(&avro)));
    group.finish();
}

criterion_group!(benches, stages, formats);
criterion_main!(benches);
