//! Fault injection by a seeded schedule, on a real three-broker Kafka: members are killed, stopped, frozen, added and
//! slowed down; brokers are killed under load; topics begin to refuse records; a producer is throttled; an input topic
//! is deleted and recreated. Some records are malformed, or have large headers, a text without a space, or a timestamp
//! long past or far in the future. A ledger of every input position finds losses, duplicates and records out of order.
//!
//! `make test` runs a short schedule of each guarantee, `make chaos` long ones. CHAOS_SEED repeats a
//! schedule, CHAOS_FAULTS sets its length, CHAOS_ONLY=Recreate,Kill draws only these faults.

use crate::support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;

use support::kafka::{self, Kafka};
use support::ledger::Ledger;
use support::{Daemon, Got, Place, Sent, TIMEOUT};

const PARTITIONS: i32 = 6;
/// Members that always run: those that exit are restarted.
const MEMBERS: usize = 3;
/// Records produced per second.
const RATE: u64 = 400;
/// One record in so many is malformed and becomes a dead letter.
const BROKEN: u64 = 97;
/// One record in so many has a header of 20 KB.
const LARGE_HEADER: u64 = 101;
/// One record in so many has a text of 30 KB without a space.
const NO_SPACE: u64 = 151;
/// One record in so many has a timestamp in microseconds, which the output topic refuses.
const MICROSECONDS: u64 = 211;
/// One record in so many has a timestamp of 2020.
const OLD: u64 = 223;
const YEAR_2020: i64 = 1_577_836_800_000;
/// Partitions of the topic that is recreated.
const OTHER_PARTITIONS: i32 = 2;

/// splitmix64, so that a seed gives the same schedule with every version of every library.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    /// kill -9, then a restart.
    Kill(usize),
    /// SIGTERM, then a restart.
    Stop(usize),
    /// SIGSTOP, then SIGCONT: before or after the session times out.
    Freeze(usize, Duration),
    /// One more member joins and leaves again.
    Join,
    /// kill -9 of a broker, then a restart.
    Broker(Which, Duration),
    /// A member is replaced by one whose device stalls now and then.
    Slow(usize),
    /// For a while a topic has a lower `max.message.bytes`.
    Limit(Written, u64, Duration),
    /// For a while a topic is compacted, and refuses records without a key.
    Compact(Written, Duration),
    /// For a while a topic refuses timestamps older than a day.
    Young(Written, Duration),
    /// For a while a quota limits what members publish to each broker, in bytes per second.
    Quota(u64, Duration),
    /// The other input topic is deleted and recreated with so many records, while all members are frozen.
    Recreate(u64),
}

#[derive(Debug, Clone, Copy)]
enum Written {
    Output,
    DeadLetters,
}

#[derive(Debug, Clone, Copy)]
enum Which {
    Any(usize),
    /// The leader of this input partition.
    Leader(i32),
    /// The coordinator of the group.
    Coordinator,
}

impl Fault {
    fn draw(random: &mut Random, brokers: usize) -> Self {
        let member = random.below(MEMBERS as u64) as usize;
        let written = if random.below(3) == 0 { Written::DeadLetters } else { Written::Output };
        match random.below(22) {
            0..=3 => Fault::Kill(member),
            4..=5 => Fault::Stop(member),
            6..=7 => Fault::Freeze(member, random.millis(200, 3000)),
            8 => Fault::Freeze(member, random.millis(7000, 10_000)),
            9 => Fault::Join,
            10 => Fault::Slow(member),
            14..=15 => Fault::Limit(written, 4000 + random.below(60_000), random.millis(500, 4000)),
            16..=17 => Fault::Compact(written, random.millis(500, 4000)),
            18 => Fault::Young(written, random.millis(500, 4000)),
            19 => Fault::Quota(30_000 + random.below(100_000), random.millis(1000, 5000)),
            20..=21 => Fault::Recreate(20 + random.below(300)),
            n => {
                let which = match n {
                    11 => Which::Any(random.below(brokers as u64) as usize),
                    12 => Which::Leader(random.below(PARTITIONS as u64) as i32),
                    _ => Which::Coordinator,
                };
                Fault::Broker(which, random.millis(500, 4000))
            }
        }
    }
}

/// Produces numbered records to all partitions in turn until `stop`. The thread returns how many.
fn produce(place: &Place, stop: Arc<AtomicBool>, made: Arc<AtomicU64>) -> std::thread::JoinHandle<u64> {
    let (brokers, topic) = (place.brokers.clone(), place.input.clone());
    std::thread::spawn(move || {
        let producer: BaseProducer = ClientConfig::new()
            .set("bootstrap.servers", &brokers)
            .set("enable.idempotence", "true")
            .set("message.timeout.ms", "0")
            .set("reconnect.backoff.max.ms", "1000")
            .set("log_level", "0")
            .create()
            .expect("a producer");
        let (header, no_space) = ("h".repeat(20_000), "x".repeat(30_000));
        let (started, mut next) = (Instant::now(), 0u64);
        while !stop.load(Ordering::Relaxed) {
            let due = (started.elapsed().as_millis() as u64 * RATE / 1000).max(next);
            while next < due {
                let every = |n: u64| next % n == n / 2;
                let text = if every(NO_SPACE) { &no_space } else { "where is my order" };
                let value = match next % BROKEN {
                    0 => format!("{{broken {next}"),
                    _ => serde_json::json!({ "id": next, "text": text }).to_string(),
                };
                let key = format!("customer {}", next % 50);
                let record = BaseRecord::<[u8], [u8]> {
                    topic: &topic,
                    partition: Some((next % PARTITIONS as u64) as i32),
                    payload: Some(value.as_bytes()),
                    key: (!next.is_multiple_of(4)).then_some(key.as_bytes()),
                    timestamp: match () {
                        () if every(MICROSECONDS) => Some(now_ms() * 1000),
                        () if every(OLD) => Some(YEAR_2020),
                        () => None,
                    },
                    headers: every(LARGE_HEADER)
                        .then(|| OwnedHeaders::new().insert(Header { key: "trace", value: Some(&header) })),
                    delivery_opaque: (),
                };
                match producer.send(record) {
                    Ok(()) => next += 1,
                    Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => break,
                    Err((error, _)) => panic!("{error}"),
                }
            }
            producer.poll(Duration::ZERO);
            std::thread::park_timeout(Duration::from_millis(10));
            made.store(next, Ordering::Relaxed);
        }
        producer.flush(TIMEOUT).expect("all acknowledged");
        next
    })
}

/// Whether the topics' configuration at the time decides between a prediction and a dead letter. Processed again after
/// a crash, such a record may get the other outcome, behind records that were published before.
fn depends_on_configuration(got: &Got) -> bool {
    got.key.is_none()
        || got.timestamp == Some(YEAR_2020)
        || got.header("trace").is_some()
        || got.header("kandle-error").is_some_and(|error| ["refused", "too_large"].contains(&error))
}

fn now_ms() -> i64 {
    std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as i64
}

/// Sends SIGTERM and waits for the exit, with any exit code because Kafka may be down. The ledger reads meanwhile.
fn terminate(member: &mut Daemon, ledger: &mut Ledger) {
    member.signal("TERM");
    let started = Instant::now();
    while member.ended().is_none() && started.elapsed() < TIMEOUT {
        ledger.read(Duration::from_millis(50));
    }
    assert!(member.ended().is_some(), "no exit after SIGTERM:\n{}", member.log());
}

/// The error that a process printed last, before it exited.
fn last_error(log: &str) -> String {
    let error = log.lines().filter_map(|line| line.strip_prefix("kandle: ")).next_back();
    error.unwrap_or("no error was printed").to_owned()
}

/// A reason without its numbers, by which reasons are counted.
fn kind_of(reason: &str) -> String {
    let parts: Vec<&str> =
        reason.split(|c: char| c.is_ascii_digit()).filter(|part| !part.is_empty()).collect();
    parts.join("#")
}

struct Chaos {
    kafka: Kafka,
    place: Place,
    config: String,
    members: Vec<Daemon>,
    ledger: Ledger,
    /// Its input topic is the one that is recreated.
    other: Place,
    /// Records produced to that topic so far, those before it was recreated included.
    others: u64,
    /// Why members exited by themselves with code 1, such as for having been fenced, and how many did.
    exits: BTreeMap<String, usize>,
}

impl Chaos {
    fn member(&self, slow: bool) -> Daemon {
        Daemon::start_with(&self.config, |command| {
            command.env("RUST_LOG", "info,kandle::source=debug");
            if slow {
                command.env("FAILPOINTS", "device=1*off->20%sleep(1500)");
            }
        })
    }

    /// Restarts members that exited, like an orchestrator.
    fn look_after(&mut self) {
        for i in 0..self.members.len() {
            if let Some(status) = self.members[i].ended() {
                assert_eq!(status.code(), Some(1), "{}", self.members[i].log());
                let reason = last_error(&self.members[i].log());
                println!("member {i} exited: {reason}");
                *self.exits.entry(kind_of(&reason)).or_default() += 1;
                self.members[i] = self.member(false);
            }
        }
    }

    /// Lets time pass while the ledger reads.
    fn pass(&mut self, time: Duration) {
        self.ledger.read(time);
        self.look_after();
    }

    fn apply(&mut self, fault: Fault, random: &mut Random) {
        match fault {
            Fault::Kill(i) => {
                self.members[i].kill();
                // Not `pass`, which would count this member as one that exited by itself.
                self.ledger.read(random.millis(0, 1000));
                self.members[i] = self.member(false);
            }
            Fault::Stop(i) => {
                terminate(&mut self.members[i], &mut self.ledger);
                self.members[i] = self.member(false);
            }
            Fault::Freeze(i, time) => {
                self.members[i].signal("STOP");
                // Not `pass`: no member is restarted while one is frozen.
                self.ledger.read(time);
                self.members[i].signal("CONT");
            }
            Fault::Join => {
                let mut one_more = self.member(false);
                self.pass(random.millis(1000, 5000));
                terminate(&mut one_more, &mut self.ledger);
            }
            Fault::Slow(i) => {
                self.members[i].kill();
                self.members[i] = self.member(true);
            }
            Fault::Limit(written, bytes, time) => {
                self.change(written, "max.message.bytes", &bytes.to_string(), time);
            }
            Fault::Compact(written, time) => self.change(written, "cleanup.policy", "compact", time),
            Fault::Young(written, time) => {
                self.change(written, "message.timestamp.before.max.ms", "86400000", time);
            }
            Fault::Quota(bytes, time) => {
                self.quota(bytes);
                self.pass(time);
                // Raised, not deleted: a broker that does not know of the quota yet refuses to delete it.
                self.quota(1 << 40);
            }
            Fault::Recreate(records) => self.recreate(records),
            Fault::Broker(which, time) => {
                let found = match which {
                    Which::Any(i) => Some(i),
                    Which::Leader(partition) => self.kafka.leader(&self.place.input, partition),
                    Which::Coordinator => self.kafka.coordinator(&self.place.group),
                };
                let broker = found.unwrap_or(0);
                self.kafka.kill(broker);
                self.pass(time);
                self.kafka.restart(broker);
                // Only one broker may be down at a time: min.insync.replicas is 2.
                self.kafka.wait_for(self.kafka.count());
                self.kafka.wait_in_sync(&self.place.input);
            }
        }
    }
}

impl Chaos {
    /// Changes one property of a topic for a while.
    fn change(&mut self, written: Written, name: &str, value: &str, time: Duration) {
        let topic = match written {
            Written::Output => self.place.output.clone(),
            Written::DeadLetters => self.place.dead.clone(),
        };
        self.place.configure(&topic, name, value);
        self.pass(time);
        self.place.configure_anew(&topic);
    }

    /// Limits what all members together publish to each broker, by their client.id.
    fn quota(&self, bytes_per_second: u64) {
        let rate = format!("producer_byte_rate={bytes_per_second}");
        let entity = ["--entity-type", "clients", "--entity-name", "kandle"];
        let change = ["--bootstrap-server", &self.place.brokers, "--alter", "--add-config", &rate];
        kafka::tool("kafka.admin.ConfigCommand", &[&change[..], &entity[..]].concat());
    }

    /// Waits until all records ever produced to the other topic have an outcome.
    fn finish_others(&mut self) {
        let started = Instant::now();
        loop {
            let missing = self.ledger.missing_others(0..self.others);
            if missing.is_empty() {
                return;
            }
            if started.elapsed() > 2 * TIMEOUT {
                let statuses: Vec<String> = self.members.iter_mut().map(|m| m.get("/status").1).collect();
                panic!("no outcome for ids {missing:?}\n{}\n{}", statuses.join("\n"), self.logs());
            }
            self.pass(Duration::from_millis(200));
        }
    }

    /// Recreates the other topic with so many records, while all members are frozen.
    fn recreate(&mut self, records: u64) {
        self.finish_others();
        self.members.iter().for_each(|member| member.signal("STOP"));
        self.other.recreate(&self.other.input, OTHER_PARTITIONS);
        self.produce_others(records);
        self.members.iter().for_each(|member| member.signal("CONT"));
    }

    fn produce_others(&mut self, records: u64) {
        let ids = self.others..self.others + records;
        self.others = ids.end;
        let partition = |id: u64| (id % OTHER_PARTITIONS as u64) as i32;
        self.other.produce(ids.map(|id| Sent::ticket(partition(id), id as usize, "where is my order")));
    }

    fn logs(&self) -> String {
        self.members.iter().map(Daemon::log).collect::<Vec<_>>().join("\n---\n")
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn chaos(guarantee: &str, faults: u64) {
    // One schedule at a time: its three brokers are enough for two cores.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let seed = number("CHAOS_SEED", std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_nanos() as u64);
    let faults = number("CHAOS_FAULTS", faults);
    let only = std::env::var("CHAOS_ONLY").unwrap_or_default();
    let only: Vec<&str> = only.split(',').filter(|name| !name.is_empty()).collect();
    println!("chaos: {guarantee}, {faults} faults; repeat with CHAOS_SEED={seed}");
    let mut random = Random(seed);
    let kafka = Kafka::start(3);
    let place = Place::on(&kafka.brokers, "chaos", PARTITIONS);
    // The input topic accepts timestamps of the far future; the output topics refuse them.
    place.configure(&place.input, "message.timestamp.after.max.ms", &i64::MAX.to_string());
    let other = Place::on(&kafka.brokers, "chaos-other", OTHER_PARTITIONS);
    let protocol = if random.below(2) == 0 { "classic" } else { "consumer" };
    let session =
        if protocol == "classic" { ", session.timeout.ms: 6000, heartbeat.interval.ms: 1000" } else { "" };
    let config = place.config(&[
        ("kafka", "{ brokers: $BROKERS, properties: { reconnect.backoff.max.ms: 1000 } }"),
        (
            "input",
            &format!("{{ topics: [$INPUT, {}], group: $GROUP, field: /text, properties: {{ group.protocol: {protocol}{session} }} }}", other.input),
        ),
        ("output", "{ topic: $OUTPUT, include: [/id], partition: source, properties: { transaction.timeout.ms: 10000 } }"),
        ("delivery", &format!("{{ guarantee: {guarantee}, commit_interval: 300ms, revoke_timeout: 5s }}")),
        ("window", "{ max_wait: 50ms, max_records: 100, max_bytes: 1MiB }"),
    ]);
    let config = config.replace("$BROKERS", &format!("\"{}\"", kafka.brokers));
    let mut ledger = Ledger::of(&place);
    if guarantee == "at_least_once" {
        ledger = ledger.with_unordered(depends_on_configuration);
    }
    let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let producer = produce(&place, Arc::clone(&stop), Arc::clone(&made));
    let mut chaos =
        Chaos { kafka, place, config, members: Vec::new(), ledger, other, others: 0, exits: BTreeMap::new() };
    chaos.produce_others(50);
    chaos.members = (0..MEMBERS).map(|_| chaos.member(false)).collect();
    let started = Instant::now();
    for i in 0..faults {
        let fault = loop {
            let fault = Fault::draw(&mut random, chaos.kafka.count());
            if only.is_empty() || only.iter().any(|name| format!("{fault:?}").starts_with(name)) {
                break fault;
            }
        };
        println!(
            "{:6.1} s  fault {i}: {fault:?}; {} of {} records have an outcome",
            started.elapsed().as_secs_f64(),
            chaos.ledger.count(),
            made.load(Ordering::Relaxed)
        );
        chaos.apply(fault, &mut random);
        let pause = random.millis(200, 2500);
        chaos.pass(pause);
    }
    stop.store(true, Ordering::Relaxed);
    let total = producer.join().expect("the producer");
    let ends: Vec<i64> =
        (0..PARTITIONS as u64).map(|p| (total / 6 + u64::from(total % 6 > p)) as i64).collect();
    let end = Instant::now();
    while !chaos.ledger.missing(&ends).is_empty() {
        let missing = chaos.ledger.missing(&ends);
        assert!(
            end.elapsed() < 2 * TIMEOUT,
            "{} positions have no outcome, the first {:?}; CHAOS_SEED={seed}\n{}",
            missing.len(),
            &missing[..missing.len().min(10)],
            chaos.logs()
        );
        chaos.pass(Duration::from_millis(500));
    }
    chaos.finish_others();
    for member in &mut chaos.members {
        member.stop();
    }
    chaos.ledger.read(Duration::from_secs(2));
    println!(
        "chaos: {guarantee}, {protocol} protocol, seed {seed}: {faults} faults, {total} records and {} of a topic that is recreated, {} duplicates, {} out of order, {} members exited and were restarted, {:.0} s",
        chaos.others,
        chaos.ledger.duplicates(),
        chaos.ledger.out_of_order.len(),
        chaos.exits.values().sum::<usize>(),
        started.elapsed().as_secs_f64()
    );
    for (reason, count) in &chaos.exits {
        println!("chaos: {count} exited with: {reason}");
    }
    assert_eq!(chaos.ledger.out_of_order, Vec::<String>::new(), "CHAOS_SEED={seed}");
    if guarantee == "exactly_once" {
        assert_eq!(chaos.ledger.doubled(), Vec::<String>::new(), "CHAOS_SEED={seed}");
    }
}

#[test]
fn exactly_once_survives_a_short_schedule() {
    chaos("exactly_once", 6);
}

#[test]
fn at_least_once_survives_a_short_schedule() {
    chaos("at_least_once", 6);
}

#[test]
#[ignore = "make chaos"]
fn exactly_once_survives_a_long_schedule() {
    chaos("exactly_once", 200);
}

#[test]
#[ignore = "make chaos"]
fn at_least_once_survives_a_long_schedule() {
    chaos("at_least_once", 200);
}
