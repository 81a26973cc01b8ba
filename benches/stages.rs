//! Time of kandle's own stages, without the model: gather, plan, prepare, predict. `cargo bench --bench stages`.

use std::sync::Arc;
use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kandle::engine::{Planned, plan};
use kandle::lease::Lease;
use kandle::model::Output;
use kandle::record::{Arrival, Partition};
use kandle::settings::{self, Sources};
use kandle::task::classification::Classification;
use kandle::task::text::{TextModel, TextTask, Texts};
use kandle::telemetry::Metrics;
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
        let predict = Classification::new(&texts.model, &settings.task);
        TextTask::new(texts, predict, &settings.task)
    };
    let batched = model.batched(&settings, task).expect("a task");
    group.bench_function("predict", |b| {
        // All records are equal, so the model computes only one.
        let response = || batched.engine.answer(batched.prepare(gather(value))).expect("answers");
        b.iter_batched(response, |response| batched.predict(response), criterion::BatchSize::SmallInput);
    });
    group.bench_function("decode, tokenize and plan", |b| {
        let window = || gather(value);
        b.iter_batched(window, |window| batched.prepare(window), criterion::BatchSize::SmallInput);
    });
    group.finish();
}

criterion_group!(benches, stages);
criterion_main!(benches);
