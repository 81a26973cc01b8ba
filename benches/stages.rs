//! What kandle itself does to a record beside the model: gather, plan, encode. `cargo bench --bench stages`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kandle::engine::plan;
use kandle::flow::{Inferred, State};
use kandle::lease::Lease;
use kandle::pipeline::{Shared, Worker};
use kandle::record::{Arrival, Partition};
use kandle::settings::{self, Sources};
use kandle::task::Task;
use kandle::window::{ClosedBy, Gatherer, Limits, Window};

const RECORDS: usize = 1024;

fn gather(value: &[u8]) -> Window {
    let limits =
        Limits { max_records: usize::MAX, max_bytes: usize::MAX, max_wait: Duration::from_secs(3600) };
    let (mut gatherer, now) = (Gatherer::new(limits), Instant::now());
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
        let lengths: Vec<(u32, usize)> =
            (0..RECORDS as u32).map(|i| (i, 3 + i as usize * 7919 % 225)).collect();
        b.iter(|| plan(lengths.clone(), 512, 2));
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
    let shared = Shared::new(&settings);
    let task = Arc::new(Task::load(&settings, &shared.metrics).expect("the bundled model"));
    let width = task.text.as_ref().expect("a text task").model.width();
    let worker = Worker { task, shared };
    group.bench_function("encode", |b| {
        let inferred = || Inferred {
            window: gather(value),
            states: (0..RECORDS).map(|_| State::Alive).collect(),
            includes: vec![String::new(); RECORDS],
            rows: (0..RECORDS * width).map(|i| (i % 17) as f32 / 3.0).collect(),
            width,
        };
        b.iter_batched(inferred, |inferred| worker.encode(inferred), criterion::BatchSize::SmallInput);
    });
    let decoder = kandle::codec::decoder(&settings).expect("json");
    group.bench_function("decode, tokenise and plan", |b| {
        b.iter_batched(
            || gather(value),
            |window| worker.prepare(&*decoder, window),
            criterion::BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, stages);
criterion_main!(benches);
