//! `memory.limit`: resident memory stays under 1.2 × (the process with its model + the limit), whatever
//! the backlog is made of and whether or not the broker answers. It is sampled while the backlog is
//! processed. `make test` runs short forms, `make chaos` the long ones.

#![cfg(target_os = "linux")]

mod support;

use std::time::{Duration, Instant};

use support::kafka::Kafka;
use support::{Daemon, Place, Sent, until};

const LIMIT_MIB: u64 = 128;

/// Resident memory, in KiB, of the process with its model and nothing in flight.
fn base(place: &Place, config: &str) -> u64 {
    let group = format!("{}-idle", place.group);
    let idle = config.replace(&format!("group: {}", place.group), &format!("group: {group}")).replace(
        &format!("topics: [{}]", place.input),
        &format!("topics: [{}]", place.dead.replace("-dead", "-idle")),
    );
    let mut daemon = Daemon::start(&idle);
    daemon.wait_log(" assigned partitions=");
    let rss = daemon.rss_kib();
    daemon.stop();
    rss
}

fn settings(place: &Place, more: &[(&str, &str)]) -> String {
    settings_within(LIMIT_MIB, place, more)
}

fn settings_within(limit_mib: u64, place: &Place, more: &[(&str, &str)]) -> String {
    place.create(&place.dead.replace("-dead", "-idle"), 1, &[]);
    let limit = format!("{{ limit: {limit_mib}MiB }}");
    let common = [
        ("memory", limit.as_str()),
        ("input", "{ topics: [$INPUT], group: $GROUP, format: text }"),
        ("output", "{ topic: $OUTPUT }"),
    ];
    place.config(&[&common[..], more].concat())
}

/// Samples until `done`; returns the highest resident memory in KiB.
fn highest(daemon: &mut Daemon, mut done: impl FnMut(&mut Daemon) -> bool) -> u64 {
    let mut highest = 0;
    let started = Instant::now();
    while !done(daemon) {
        assert!(daemon.ended().is_none(), "{}", daemon.log());
        assert!(started.elapsed() < 10 * support::TIMEOUT, "{}", daemon.log());
        highest = highest.max(daemon.rss_kib());
        std::thread::park_timeout(Duration::from_millis(20));
    }
    highest
}

#[track_caller]
fn assert_within(limit_mib: u64, what: &str, base_kib: u64, highest_kib: u64) {
    let ceiling = (base_kib + limit_mib * 1024) * 12 / 10;
    println!(
        "memory: {what}: {} MiB at most, of {} MiB: ({} with its model + {limit_mib} limit) x 1.2",
        highest_kib / 1024,
        ceiling / 1024,
        base_kib / 1024
    );
    assert!(highest_kib <= ceiling, "{what}: {highest_kib} KiB resident, more than {ceiling}");
}

/// Predictions published so far, by the daemon's own metrics.
fn published(daemon: &mut Daemon, topic: &str) -> u64 {
    let (_, metrics) = daemon.get("/metrics");
    let name = format!("kandle_records_total{{outcome=\"predicted\",topic=\"{topic}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)?.trim().parse().ok()).unwrap_or(0)
}

/// Runs a daemon until it has published `count` records and asserts the memory limit. Returns how long that took, and
/// the metrics at the end.
#[track_caller]
fn work_off(what: &str, place: &Place, config: &str, count: usize) -> (Duration, String) {
    work_off_within(LIMIT_MIB, what, place, config, count)
}

#[track_caller]
fn work_off_within(
    limit_mib: u64,
    what: &str,
    place: &Place,
    config: &str,
    count: usize,
) -> (Duration, String) {
    let base = base(place, config);
    let mut daemon = Daemon::start(config);
    let started = Instant::now();
    let most = highest(&mut daemon, |d| published(d, &place.input) >= count as u64);
    let took = started.elapsed();
    let (_, metrics) = daemon.get("/metrics");
    daemon.stop();
    assert_within(limit_mib, what, base, most);
    (took, metrics)
}

fn small_records(count: usize) {
    for guarantee in ["at_least_once", "exactly_once"] {
        let place = Place::new("small", 8);
        place.produce((0..count).map(|i| Sent::new((i % 8) as i32, format!("ticket {i}"))));
        let delivery = format!("{{ guarantee: {guarantee} }}");
        let config = settings(&place, &[("task", "{ kind: noop }"), ("model", ""), ("delivery", &delivery)]);
        work_off(&format!("{count} small records, {guarantee}"), &place, &config, count);
    }
}

fn large_records(count: usize) {
    let place = Place::new("large-records", 4);
    let text = "where is my order ".repeat(1_000_000 / 18);
    place.produce((0..count).map(|i| Sent::new((i % 4) as i32, text.clone())));
    let config = settings(&place, &[]);
    work_off(&format!("{count} records of 1 MB"), &place, &config, count);
}

/// Records of a few kilobytes, each of which asks for 200 items.
fn many_documents(count: usize) {
    let place = Place::new("documents", 4);
    let value = |record: usize| {
        let document = |i: usize| format!("order {i} of customer {record} is late, the parcel was lost");
        let documents: Vec<String> = (0..200).map(document).collect();
        serde_json::json!({ "text": "where is my parcel", "documents": documents }).to_string()
    };
    place.produce((0..count).map(|i| Sent::new((i % 4) as i32, value(i))));
    let model = format!("{{ source: \"{}/tests/fixtures/pairs-bert\" }}", support::root().display());
    let more = [
        ("task", "{ kind: reranking, documents: /documents }"),
        ("model", model.as_str()),
        ("input", "{ topics: [$INPUT], group: $GROUP, field: /text }"),
        // No other bound closes a window before its memory does.
        ("window", "{ max_records: 1000000, max_bytes: 16MiB, max_wait: 10s, max_work: 1h }"),
    ];
    let config = settings(&place, &more);
    let (_, metrics) = work_off(&format!("{count} records of 200 documents"), &place, &config, count);
    let by_memory =
        metrics.lines().find_map(|line| line.strip_prefix("kandle_windows_total{closed_by=\"memory\"} "));
    assert!(by_memory.is_some_and(|count| count != "0"), "no window closed by memory: {metrics}");
}

/// A PNG of noise, of about 4 MB.
fn photo() -> Vec<u8> {
    let mut state = 7u64;
    let noise = std::iter::from_fn(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Some((state >> 56) as u8)
    });
    let pixels = noise.take(3 * 1180 * 1180).collect();
    let image = image::RgbImage::from_raw(1180, 1180, pixels).expect("pixels");
    let mut png = std::io::Cursor::new(Vec::new());
    image.write_to(&mut png, image::ImageFormat::Png).expect("a PNG");
    png.into_inner()
}

/// Copies of one large image, in windows of as many as a limit allows.
fn images(limit_mib: u64, count: usize) {
    let place = Place::new("photos", 4);
    for topic in [&place.input, &place.dead] {
        place.configure(topic, "max.message.bytes", "50000000");
    }
    let photo = photo();
    assert!(photo.len() > 4_000_000, "{}", photo.len());
    place.produce((0..count).map(|i| Sent::new((i % 4) as i32, photo.clone())));
    let model = format!("{{ source: \"{}/tests/fixtures/image-vit\" }}", support::root().display());
    let window =
        format!("{{ max_records: 1000000, max_bytes: {}MiB, max_wait: 10s, max_work: 1h }}", limit_mib / 8);
    let more = [
        ("task", "{ kind: image-classification }"),
        ("model", model.as_str()),
        ("input", "{ topics: [$INPUT], group: $GROUP, format: image }"),
        ("window", window.as_str()),
    ];
    let config = settings_within(limit_mib, &place, &more);
    let what = format!("{count} images of {} MB", photo.len() / 1_000_000);
    let (_, metrics) = work_off_within(limit_mib, &what, &place, &config, count);
    let windows = metrics.lines().find_map(|line| line.strip_prefix("kandle_window_records_count "));
    let windows: usize = windows.and_then(|count| count.parse().ok()).expect("windows");
    assert!(windows * 2 <= count, "{windows} windows for {count} images: {metrics}");
}

/// Small values with large headers, which count towards the limit like values.
fn large_headers(count: usize, bytes: usize) {
    let place = Place::new("headers", 4);
    let header = "h".repeat(bytes);
    place.produce((0..count).map(|i| Sent {
        headers: vec![("trace".to_owned(), header.clone())],
        ..Sent::new((i % 4) as i32, format!("ticket {i}"))
    }));
    let config = settings(&place, &[("task", "{ kind: noop }"), ("model", "")]);
    work_off(&format!("{count} records with headers of {bytes} bytes"), &place, &config, count);
}

/// Copies of one large text, most without spaces; returns how long all of them take.
fn without_spaces(what: &str, count: usize, text: &str) -> Duration {
    let place = Place::new("without-spaces", 4);
    place.produce((0..count).map(|i| Sent::new((i % 4) as i32, text)));
    let config = settings(&place, &[]);
    let (took, _) =
        work_off(&format!("{count} texts of {} KB, {what}", text.len() / 1000), &place, &config, count);
    println!("memory: {what}: {:.1} s", took.as_secs_f64());
    took
}

/// Dots, Chinese, base64 and words, each of a million bytes.
fn texts_of_a_megabyte() -> [(&'static str, String); 4] {
    let base64: String = (0u64..)
        .flat_map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes())
        .map(|byte| {
            char::from(
                b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"[usize::from(byte % 64)],
            )
        })
        .take(1_000_000)
        .collect();
    let chinese: String =
        (0u32..).filter_map(|i| char::from_u32(0x4e00 + i * 7919 % 20_000)).take(333_333).collect();
    [
        ("dots", ".".repeat(1_000_000)),
        ("Chinese", chinese),
        ("base64", base64),
        ("words", "where is my order ".repeat(1_000_000 / 18)),
    ]
}

#[test]
fn records_with_headers_of_twenty_kilobytes() {
    large_headers(15_000, 20_000);
}

#[test]
#[ignore = "make chaos"]
fn many_records_with_large_headers() {
    large_headers(60_000, 20_000);
    large_headers(100_000, 10_000);
}

#[test]
fn records_of_two_hundred_documents() {
    many_documents(2000);
}

#[test]
#[ignore = "make chaos"]
fn many_records_of_two_hundred_documents() {
    many_documents(20_000);
}

#[test]
fn texts_of_a_megabyte_without_spaces() {
    for (what, text) in &texts_of_a_megabyte()[..3] {
        without_spaces(what, 40, text);
    }
}

#[test]
#[ignore = "make chaos"]
fn hundreds_of_texts_of_a_megabyte_without_spaces() {
    let took = texts_of_a_megabyte().map(|(what, text)| (what, without_spaces(what, 400, &text)));
    let words = took[3].1;
    for (what, took) in took {
        // Tokenizing is linear in the text's length, whatever the script.
        assert!(took < 4 * words, "{what}: {took:?}, and words {words:?}");
    }
}

#[test]
fn a_backlog_of_small_records() {
    small_records(300_000);
}

#[test]
#[ignore = "make chaos"]
fn a_backlog_of_five_million_small_records() {
    small_records(5_000_000);
}

#[test]
fn images_of_four_megabytes() {
    images(LIMIT_MIB, 60);
}

#[test]
#[ignore = "make chaos"]
fn a_thousand_images_of_four_megabytes() {
    images(512, 1024);
}

#[test]
fn records_of_a_megabyte() {
    large_records(150);
}

#[test]
#[ignore = "make chaos"]
fn two_thousand_records_of_a_megabyte() {
    large_records(2000);
}

#[test]
fn a_frozen_broker_is_no_stall_and_memory_stays_within_the_limit() {
    // A broker of its own, because the test freezes it.
    let kafka = Kafka::start(1);
    let count = 400_000i32;
    let records = (0..count).map(|i| Sent::new(i % 4, "where is my order now ".repeat(8)));
    frozen(&kafka, "a broker that does not acknowledge", records);
    let count = 15_000i32;
    let headers = vec![("trace".to_owned(), "h".repeat(20_000))];
    let records =
        (0..count).map(|i| Sent { headers: headers.clone(), ..Sent::new(i % 4, "where is my order") });
    frozen(&kafka, "a broker that does not acknowledge large headers", records);
}

fn frozen(kafka: &Kafka, what: &str, records: impl ExactSizeIterator<Item = Sent>) {
    let place = Place::on(&kafka.brokers, "frozen", 4);
    let count = records.len() as u64;
    place.produce(records);
    let config = settings(
        &place,
        &[
            ("task", "{ kind: noop }"),
            ("model", ""),
            ("server", "{ listen: \"127.0.0.1:0\", stall_after: 3s }"),
            ("batch", "{ timeout: 1s }"),
        ],
    );
    let base = base(&place, &config);
    let mut daemon = Daemon::start(&config);
    until("the first prediction", || (published(&mut daemon, &place.input) > 0).then_some(()));
    kafka.freeze(0);
    // Longer than stall_after, so that a stall would show.
    let frozen = Instant::now();
    let most = highest(&mut daemon, |d| {
        assert_eq!(d.get("/livez").0, 200, "{}", d.get("/livez").1);
        assert_eq!(d.get("/readyz").0, 200);
        frozen.elapsed() > Duration::from_secs(8)
    });
    kafka.thaw(0);
    let most = most.max(highest(&mut daemon, |d| published(d, &place.input) >= count));
    daemon.stop();
    assert_within(LIMIT_MIB, what, base, most);
}
