//! Records that the output topic refuses, on a real Kafka: they become dead letters, their neighbours are published,
//! and the daemon goes on.

use crate::support;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use support::ledger::Ledger;
use support::{Daemon, Got, Place, Sent, kafka, noise, until};

const DELIVERIES: [(&str, &str); 2] = [
    ("delivery", "{ commit_interval: 200ms }"),
    ("delivery", "{ guarantee: exactly_once, commit_interval: 200ms }"),
];
const EXACTLY_ONCE: (&str, &str) = DELIVERIES[1];
const TEXT: &str =
    "{ topics: [$INPUT], group: $GROUP, format: text, properties: { session.timeout.ms: 6000 } }";
const DAY: i64 = 86_400_000;

/// Topics of one test: output and dead-letter topics with a configuration of their own.
struct Case {
    place: Place,
    output: String,
    dead: String,
}

impl Case {
    fn new(name: &str, output: &[(&str, &str)], dead: &[(&str, &str)]) -> Self {
        let place = Place::new(name, 1);
        let case =
            Self { output: format!("{}-own", place.output), dead: format!("{}-own", place.dead), place };
        case.place.create(&case.output, 1, output);
        case.place.create(&case.dead, 1, dead);
        case
    }

    fn start(&self, delivery: (&str, &str)) -> Daemon {
        self.start_with(delivery, &[])
    }

    fn start_with(&self, delivery: (&str, &str), more: &[(&str, &str)]) -> Daemon {
        let (output, dead) = (format!("{{ topic: {} }}", self.output), format!("{{ topic: {} }}", self.dead));
        let sections = [
            delivery,
            ("task", "{ kind: noop }"),
            ("model", ""),
            ("input", TEXT),
            ("output", &output),
            ("dead_letters", &dead),
        ];
        Daemon::start(&self.place.config(&[&sections, more].concat()))
    }

    fn predictions(&self, count: usize) -> Vec<Got> {
        self.place.read(&self.output, &format!("{count} predictions"), |got| got.len() >= count)
    }

    fn dead_letters(&self, count: usize) -> Vec<Got> {
        self.place.read(&self.dead, &format!("{count} dead letters"), |got| got.len() >= count)
    }

    /// Waits until `records` are committed and stops the daemon, which must still run.
    fn finish(&self, mut daemon: Daemon, records: i64) {
        until("the commit", || self.place.committed(0).filter(|(offset, _)| *offset >= records));
        assert!(daemon.ended().is_none(), "{}", daemon.log());
        daemon.stop();
    }
}

fn offsets(got: &[Got]) -> Vec<i64> {
    got.iter().map(|got| got.source().1).collect()
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as i64
}

fn keyed(i: usize) -> Sent {
    let mut sent = Sent::new(0, format!("record {i}"));
    sent.key = Some(i.to_string().into_bytes());
    sent
}

#[test]
fn batches_stay_within_the_topics_max_message_bytes() {
    for delivery in DELIVERIES {
        for (limit, bytes, count) in [("500000", 2000, 5000), ("100000", 200, 5000)] {
            let case = Case::new("batch", &[("max.message.bytes", limit)], &[("max.message.bytes", limit)]);
            case.place.produce((0..count).map(|i| Sent::new(0, noise(bytes + i % 7))));
            let daemon = case.start(delivery);
            let got = case.predictions(count);
            assert_eq!(offsets(&got), (0..count as i64).collect::<Vec<_>>());
            case.finish(daemon, count as i64);
            assert!(case.place.read(&case.dead, "nothing", |_| true).is_empty());
        }
    }
}

#[test]
fn a_limit_that_is_lowered_and_raised_again_is_followed() {
    for delivery in DELIVERIES {
        let case = Case::new("limit", &[], &[]);
        let batch = |from: usize| (from..from + 500).map(|i| Sent::new(0, noise(1000 + i)));
        case.place.produce(batch(0));
        let daemon = case.start(delivery);
        case.predictions(500);
        case.place.configure(&case.output, "max.message.bytes", "20000");
        // More than one batch by the old limit, and one record above the new limit.
        case.place.produce(batch(500).chain([Sent::new(0, noise(30_000))]).chain(batch(1001)));
        let dead = case.dead_letters(1);
        assert_eq!((offsets(&dead), dead[0].header("kandle-error")), (vec![1000], Some("too_large")));
        assert_eq!(dead[0].value.as_deref().map(<[u8]>::len), Some(30_000), "{}", daemon.log());
        let want: Vec<i64> = (0..1501).filter(|offset| *offset != 1000).collect();
        assert_eq!(offsets(&case.predictions(1500)), want, "{}", daemon.log());
        case.place.configure(&case.output, "max.message.bytes", "1000000");
        // The limit is fetched again before a record is refused for it, at most every ten seconds.
        let mut tried = 0;
        until("a large record to be published", || {
            case.place.produce([Sent::new(0, noise(40_000))]);
            tried += 1;
            let settled = case.predictions(1500).len() + case.dead_letters(1).len();
            until("the record", || {
                (case.predictions(1500).len() + case.dead_letters(1).len() > settled - 1).then_some(())
            });
            (case.predictions(1500).len() > 1500).then_some(())
        });
        case.finish(daemon, 1501 + tried);
    }
}

#[test]
fn a_dead_letter_keeps_its_value_if_that_fits_compressed() {
    for delivery in DELIVERIES {
        let case =
            Case::new("compressed", &[("max.message.bytes", "2000")], &[("max.message.bytes", "4000")]);
        // The second fits compressed, the third does not.
        case.place.produce(
            [vec![b'x'; 10], vec![b'x'; 50_000], noise(50_000), vec![b'x'; 20]].map(|v| Sent::new(0, v)),
        );
        let daemon = case.start(delivery);
        let dead = case.dead_letters(2);
        assert_eq!(offsets(&case.predictions(2)), [0, 3]);
        let lengths: Vec<Option<usize>> = dead.iter().map(|dead| dead.value.as_ref().map(Vec::len)).collect();
        assert_eq!((offsets(&dead), lengths), (vec![1, 2], vec![Some(50_000), None]), "{}", daemon.log());
        case.finish(daemon, 4);
    }
}

#[test]
fn a_compacted_topic_refuses_only_records_without_a_key() {
    for delivery in DELIVERIES {
        for compacted in [&[("cleanup.policy", "compact")][..], &[]] {
            // With a compacted dead-letter topic and without.
            let case = Case::new("compacted", &[("cleanup.policy", "compact")], compacted);
            let tombstone = Sent { value: None, ..Sent::default() };
            let keyless = Sent::new(0, "no key");
            case.place.produce((0..50).map(|i| match i {
                20 => keyless.clone(),
                30 => tombstone.clone(),
                i => keyed(i),
            }));
            let daemon = case.start(delivery);
            let dead = case.dead_letters(2);
            let want: Vec<i64> = (0..50).filter(|i| ![20, 30].contains(i)).collect();
            assert_eq!(offsets(&case.predictions(48)), want);
            assert_eq!(offsets(&dead), [20, 30]);
            for letter in &dead {
                assert_eq!(
                    (letter.header("kandle-error"), letter.header("kandle-stage")),
                    (Some("refused"), Some("publish"))
                );
                assert!(
                    letter.header("kandle-error-message").is_some_and(|m| m.contains("no key")),
                    "{letter:?}"
                );
                // A compacted dead-letter topic needs a key too: the source position.
                let own = letter.header("kandle-source").map(str::as_bytes);
                assert_eq!(letter.key.as_deref(), if compacted.is_empty() { None } else { own });
            }
            assert_eq!(dead[0].value.as_deref(), Some(&b"no key"[..]));
            case.finish(daemon, 50);
        }
    }
}

/// The topic becomes compacted while the daemon runs: its configuration is cached, so only the broker's refusals tell.
#[test]
fn a_topic_that_becomes_compacted_refuses_one_record_of_many() {
    for delivery in DELIVERIES {
        let case = Case::new("becomes", &[], &[]);
        case.place.produce((0..10).map(keyed));
        let daemon = case.start(delivery);
        case.predictions(10);
        case.place.configure(&case.output, "cleanup.policy", "compact");
        case.place.produce((10..500).map(|i| if i % 100 == 50 { Sent::new(0, "no key") } else { keyed(i) }));
        let dead = case.dead_letters(5);
        assert_eq!(offsets(&dead), [50, 150, 250, 350, 450], "{}", daemon.log());
        let want: Vec<i64> = (0..500).filter(|i| i % 100 != 50).collect();
        assert_eq!(offsets(&case.predictions(495)), want, "{}", daemon.log());
        case.finish(daemon, 500);
    }
}

/// The topic's configuration is unknown: only the broker's refusals tell which records to dead-letter.
#[test]
fn a_topic_whose_configuration_cannot_be_read_refuses_some_records() {
    for delivery in DELIVERIES {
        let case = Case::new("unknown", &[("cleanup.policy", "compact")], &[]);
        let acl = |rule: &[&str]| {
            let common =
                ["--bootstrap-server", &case.place.brokers, "--add", "--force", "--topic", &case.output];
            kafka::tool("org.apache.kafka.tools.AclCommand", &[&common[..], rule].concat());
        };
        acl(&["--allow-principal", "User:*", "--operation", "All"]);
        acl(&["--deny-principal", "User:*", "--operation", "DescribeConfigs"]);
        let keyless = |i: usize| i % 100 == 50 || i == 51;
        case.place.produce((0..300).map(|i| if keyless(i) { Sent::new(0, "no key") } else { keyed(i) }));
        let daemon = case.start(delivery);
        assert_eq!(offsets(&case.dead_letters(4)), [50, 51, 150, 250], "{}", daemon.log());
        let want: Vec<i64> = (0..300).filter(|&i| !keyless(i as usize)).collect();
        assert_eq!(offsets(&case.predictions(296)), want, "{}", daemon.log());
        case.finish(daemon, 300);
    }
}

#[test]
fn a_record_whose_timestamp_the_topic_refuses_is_dead_lettered() {
    for delivery in DELIVERIES {
        for strict in [true, false] {
            let near = [
                ("message.timestamp.before.max.ms", "864000000"),
                ("message.timestamp.after.max.ms", "3600000"),
            ];
            let far = [("message.timestamp.after.max.ms", "9223372036854775807")];
            let case = Case::new("time", &near, if strict { &near } else { &far });
            case.place.configure(&case.place.input, "message.timestamp.after.max.ms", "9223372036854775807");
            // In microseconds, a month ahead, years ago.
            let odd = [now() * 1000, now() + 30 * DAY, 1_577_836_800_000];
            case.place.produce((0..60usize).map(|i| {
                let timestamp = if i % 20 == 10 { odd[i / 20] } else { now() };
                Sent { timestamp: Some(timestamp), ..keyed(i) }
            }));
            let daemon = case.start(delivery);
            let dead = case.dead_letters(3);
            let want: Vec<i64> = (0..60).filter(|i| i % 20 != 10).collect();
            assert_eq!(offsets(&case.predictions(57)), want, "{}", daemon.log());
            assert_eq!(offsets(&dead), [10, 30, 50]);
            for (letter, timestamp) in dead.iter().zip(odd) {
                assert_eq!(letter.header("kandle-error"), Some("refused"));
                assert!(
                    letter.header("kandle-error-message").is_some_and(|m| m.contains("timestamp")),
                    "{letter:?}"
                );
                // If the dead-letter topic refuses the timestamp too, a header keeps it.
                let own = timestamp.to_string();
                match strict {
                    true => assert_eq!(letter.header("kandle-timestamp"), Some(own.as_str())),
                    false => assert_eq!(
                        (letter.timestamp, letter.header("kandle-timestamp")),
                        (Some(timestamp), None)
                    ),
                }
            }
            case.finish(daemon, 60);
        }
    }
}

#[test]
fn output_timestamp_now_dates_predictions_at_the_present() {
    let case = Case::new("now", &[], &[]);
    case.place.produce([
        Sent { timestamp: Some(now() - 400 * DAY), ..keyed(0) },
        Sent { timestamp: Some(0), ..keyed(1) },
    ]);
    let output = format!("{{ topic: {}, timestamp: now }}", case.output);
    let daemon = case.start_with(DELIVERIES[0], &[("output", &output)]);
    let got = case.predictions(2);
    assert!(got.iter().all(|got| got.timestamp.is_some_and(|timestamp| timestamp > now() - DAY)), "{got:?}");
    case.finish(daemon, 2);
    // By default, the record's own timestamp is kept; 1 here, because librdkafka takes 0 for the present.
    let case = Case::new("zero", &[], &[]);
    case.place.produce([Sent { timestamp: Some(1), ..keyed(0) }]);
    let daemon = case.start(DELIVERIES[0]);
    assert_eq!(case.predictions(1)[0].timestamp, Some(1));
    case.finish(daemon, 1);
}

#[test]
fn predictions_of_predictions_have_one_source() {
    let case = Case::new("chain", &[], &[]);
    let mut sent = keyed(0);
    sent.headers = ["kandle-source", "kandle-model", "kandle-model-digest", "mine", "kandle-source"]
        .map(|name| (name.to_owned(), format!("earlier {name}")))
        .to_vec();
    case.place.produce([sent]);
    let daemon = case.start(DELIVERIES[0]);
    let got = case.predictions(1);
    let names: Vec<&str> = got[0].headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["mine", "kandle-source", "kandle-model", "kandle-model-digest"]);
    assert_eq!(got[0].source(), (0, 0));
    case.finish(daemon, 1);
}

/// Within transaction.timeout.ms the broker accepts less than what is queued.
#[test]
fn transactions_shrink_to_what_a_throttled_broker_accepts() {
    let case = Case::new("throttled", &[], &[]);
    let client = support::unique("throttled");
    kafka::tool(
        "kafka.admin.ConfigCommand",
        &[
            "--bootstrap-server",
            &case.place.brokers,
            "--alter",
            "--add-config",
            "producer_byte_rate=300000",
            "--entity-type",
            "clients",
            "--entity-name",
            &client,
        ],
    );
    let count = 1500;
    case.place.produce((0..count).map(|i| Sent::new(0, noise(6000 + i % 9))));
    let output = format!(
        "{{ topic: {}, properties: {{ client.id: {client}, transaction.timeout.ms: 12000 }} }}",
        case.output
    );
    let delivery = ("delivery", "{ guarantee: exactly_once, commit_interval: 1s }");
    let daemon =
        case.start_with(delivery, &[("output", &output), ("window", "{ max_wait: 50ms, max_bytes: 2MiB }")]);
    let mut ledger =
        Ledger::of(&Place { output: case.output.clone(), dead: case.dead.clone(), ..place_of(&case.place) });
    let started = std::time::Instant::now();
    while ledger.count() < count {
        ledger.read(Duration::from_millis(500));
        assert!(started.elapsed() < 3 * support::TIMEOUT, "{} of {count}:\n{}", ledger.count(), daemon.log());
    }
    assert_eq!((ledger.duplicates(), ledger.out_of_order.len()), (0, 0));
    assert!(!daemon.log().contains("newer producer"), "{}", daemon.log());
    case.finish(daemon, count as i64);
}

fn place_of(place: &Place) -> Place {
    Place {
        brokers: place.brokers.clone(),
        input: place.input.clone(),
        output: place.output.clone(),
        dead: place.dead.clone(),
        group: place.group.clone(),
    }
}

/// Predictions are forty times as large as their inputs, so a window's bytes do not tell a transaction's bytes.
#[test]
fn a_transaction_is_bounded_even_within_a_window() {
    let place = Place::new("middle", 1);
    let client = support::unique("middle");
    let alter =
        ["--bootstrap-server", &place.brokers, "--alter", "--add-config", "producer_byte_rate=400000"];
    let entity = ["--entity-type", "clients", "--entity-name", &client];
    kafka::tool("kafka.admin.ConfigCommand", &[&alter[..], &entity[..]].concat());
    let count = 2000;
    place.produce((0..count).map(|i| Sent::ticket(0, i, &format!("where is order {i}"))));
    let output =
        format!("{{ topic: $OUTPUT, properties: {{ client.id: {client}, transaction.timeout.ms: 12000 }} }}");
    let mut daemon = Daemon::start(&place.config(&[
        EXACTLY_ONCE,
        ("task", "{ kind: text-embedding }"),
        ("output", &output),
        ("window", "{ max_wait: 50ms, max_records: 2000 }"),
    ]));
    let mut ledger = Ledger::of(&place);
    let started = std::time::Instant::now();
    while ledger.count() < count {
        ledger.read(Duration::from_millis(500));
        assert!(started.elapsed() < 3 * support::TIMEOUT, "{} of {count}:\n{}", ledger.count(), daemon.log());
    }
    assert_eq!((ledger.duplicates(), ledger.out_of_order.len()), (0, 0));
    until("the commit", || place.committed(0).filter(|(offset, _)| *offset >= count as i64));
    assert!(daemon.ended().is_none(), "{}", daemon.log());
    daemon.stop();
}

#[test]
fn a_process_that_fails_leaves_the_group_first() {
    for delivery in DELIVERIES {
        let case = Case::new("leaves", &[], &[]);
        let slow =
            "{ topics: [$INPUT], group: $GROUP, format: text, properties: { session.timeout.ms: 60000 } }";
        case.place.produce((0..10).map(keyed));
        let mut daemon = case.start_with(delivery, &[("input", slow)]);
        case.predictions(10);
        let acl = |what: &str| {
            let server = ["--bootstrap-server", &case.place.brokers, what, "--force"];
            let rule =
                ["--deny-principal", "User:ANONYMOUS", "--operation", "Write", "--topic", &case.output];
            kafka::tool("org.apache.kafka.tools.AclCommand", &[&server[..], &rule[..]].concat());
        };
        acl("--add");
        case.place.produce((10..20).map(keyed));
        assert_eq!(daemon.wait().code(), Some(1), "{}", daemon.log());
        acl("--remove");
        let started = std::time::Instant::now();
        let again = case.start_with(delivery, &[("input", slow)]);
        case.predictions(20);
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "waited for the session of the failed member to time out"
        );
        case.finish(again, 20);
    }
}
