//! Faults by a seeded schedule, on a real three-broker Kafka: members killed, stopped, frozen, added
//! and slowed down, brokers killed under load. A ledger of every input position says what was lost,
//! what came twice and what came out of order.
//!
//! `make test` runs a short schedule of each guarantee, `make chaos` long ones. CHAOS_SEED repeats a
//! schedule, CHAOS_FAULTS says how long it is.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;

use support::kafka::Kafka;
use support::ledger::Ledger;
use support::{Daemon, PATIENCE, Place};

const PARTITIONS: i32 = 6;
/// Members that the schedule keeps.
const MEMBERS: usize = 3;
/// Records a second.
const RATE: u64 = 400;
/// Every so many records one that becomes a dead letter.
const BROKEN: u64 = 97;

/// splitmix64: a schedule has to be the same in every version of every library.
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
    /// kill -9, and started again.
    Kill(usize),
    /// SIGTERM, and started again.
    Stop(usize),
    /// SIGSTOP, then SIGCONT: shorter or longer than the session.
    Freeze(usize, Duration),
    /// One more member joins, and leaves again.
    Join,
    /// kill -9 of a broker, and started again.
    Broker(Which, Duration),
    /// A member is replaced by one whose device takes long pauses.
    Slow(usize),
}

#[derive(Debug, Clone, Copy)]
enum Which {
    Any(usize),
    /// Of an input partition: its leader moves.
    Leader(i32),
    /// Of the group: its coordinator moves.
    Coordinator,
}

impl Fault {
    fn draw(random: &mut Random, brokers: usize) -> Self {
        let member = random.below(MEMBERS as u64) as usize;
        match random.below(14) {
            0..=3 => Fault::Kill(member),
            4..=5 => Fault::Stop(member),
            6..=7 => Fault::Freeze(member, random.millis(200, 3000)),
            8 => Fault::Freeze(member, random.millis(7000, 10_000)),
            9 => Fault::Join,
            10 => Fault::Slow(member),
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

/// Numbered records to all partitions in turn, until told to stop; returns how many each has.
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
        let (started, mut next) = (Instant::now(), 0u64);
        while !stop.load(Ordering::Relaxed) {
            let due = (started.elapsed().as_millis() as u64 * RATE / 1000).max(next);
            while next < due {
                let value = match next % BROKEN {
                    0 => format!("{{broken {next}"),
                    _ => serde_json::json!({ "id": next, "text": "where is my order" }).to_string(),
                };
                let record = BaseRecord::<[u8], [u8]>::to(&topic)
                    .partition((next % PARTITIONS as u64) as i32)
                    .payload(value.as_bytes());
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
        producer.flush(PATIENCE).expect("all acknowledged");
        next
    })
}

/// SIGTERM, and the end, with whatever exit code: Kafka may be away. The ledger reads meanwhile.
fn terminate(member: &mut Daemon, ledger: &mut Ledger) {
    member.signal("TERM");
    let started = Instant::now();
    while member.ended().is_none() && started.elapsed() < PATIENCE {
        ledger.read(Duration::from_millis(50));
    }
    assert!(member.ended().is_some(), "SIGTERM is not heard:\n{}", member.log());
}

struct Chaos {
    kafka: Kafka,
    place: Place,
    config: String,
    members: Vec<Daemon>,
    ledger: Ledger,
    /// Members that ended by themselves, by exit code 1: fenced, or out of the group for good.
    gave_up: usize,
}

impl Chaos {
    fn member(&self, slow: bool) -> Daemon {
        Daemon::start_with(&self.config, |command| {
            if slow {
                command.env("FAILPOINTS", "device=1*off->20%sleep(1500)");
            }
        })
    }

    /// An orchestrator: what ended is started again.
    fn look_after(&mut self) {
        for i in 0..self.members.len() {
            if let Some(status) = self.members[i].ended() {
                assert_eq!(status.code(), Some(1), "{}", self.members[i].log());
                self.gave_up += 1;
                self.members[i] = self.member(false);
            }
        }
    }

    /// Time passes; the ledger reads.
    fn pass(&mut self, time: Duration) {
        self.ledger.read(time);
        self.look_after();
    }

    fn apply(&mut self, fault: Fault, random: &mut Random) {
        match fault {
            Fault::Kill(i) => {
                self.members[i].kill();
                // Not `pass`: it has not ended by itself.
                self.ledger.read(random.millis(0, 1000));
                self.members[i] = self.member(false);
            }
            Fault::Stop(i) => {
                terminate(&mut self.members[i], &mut self.ledger);
                self.members[i] = self.member(false);
            }
            Fault::Freeze(i, time) => {
                self.members[i].signal("STOP");
                // Not `pass`: a frozen member has not ended.
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
                // One at a time: two of three are needed.
                self.kafka.wait_for(self.kafka.count());
                self.kafka.wait_in_sync(&self.place.input);
            }
        }
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn chaos(guarantee: &str, faults: u64) {
    // Three brokers at a time are enough for two cores.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let seed = number("CHAOS_SEED", std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_nanos() as u64);
    let faults = number("CHAOS_FAULTS", faults);
    println!("chaos: {guarantee}, {faults} faults; again with CHAOS_SEED={seed}");
    let mut random = Random(seed);
    let kafka = Kafka::start(3);
    let place = Place::on(&kafka.brokers, "chaos", PARTITIONS);
    let protocol = if random.below(2) == 0 { "classic" } else { "consumer" };
    let session =
        if protocol == "classic" { ", session.timeout.ms: 6000, heartbeat.interval.ms: 1000" } else { "" };
    let config = place.config(&[
        ("kafka", "{ brokers: $BROKERS, properties: { reconnect.backoff.max.ms: 1000 } }"),
        (
            "input",
            &format!("{{ topics: [$INPUT], group: $GROUP, field: /text, properties: {{ group.protocol: {protocol}{session} }} }}"),
        ),
        ("output", "{ topic: $OUTPUT, partition: source, properties: { transaction.timeout.ms: 10000 } }"),
        ("delivery", &format!("{{ guarantee: {guarantee}, commit_interval: 300ms, revoke_timeout: 5s }}")),
        ("window", "{ max_wait: 50ms, max_records: 100, max_bytes: 1MiB }"),
    ]);
    let config = config.replace("$BROKERS", &format!("\"{}\"", kafka.brokers));
    let ledger = Ledger::of(&place);
    let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let producer = produce(&place, Arc::clone(&stop), Arc::clone(&made));
    let mut chaos = Chaos { kafka, place, config, members: Vec::new(), ledger, gave_up: 0 };
    chaos.members = (0..MEMBERS).map(|_| chaos.member(false)).collect();
    let started = Instant::now();
    for i in 0..faults {
        let fault = Fault::draw(&mut random, chaos.kafka.count());
        println!(
            "{:6.1} s  fault {i}: {fault:?}; {} of {} records have their outcome",
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
        let logs: String = chaos.members.iter().map(Daemon::log).collect::<Vec<_>>().join("\n---\n");
        assert!(
            end.elapsed() < 2 * PATIENCE,
            "{} positions have no outcome, the first {:?}; CHAOS_SEED={seed}\n{logs}",
            missing.len(),
            &missing[..missing.len().min(10)]
        );
        chaos.pass(Duration::from_millis(500));
    }
    for member in &mut chaos.members {
        member.stop();
    }
    chaos.ledger.read(Duration::from_secs(2));
    println!(
        "chaos: {guarantee}, {protocol} protocol, seed {seed}: {faults} faults, {total} records, {} duplicates, {} out of order, {} members gave up and were started again, {:.0} s",
        chaos.ledger.duplicates(),
        chaos.ledger.out_of_order.len(),
        chaos.gave_up,
        started.elapsed().as_secs_f64()
    );
    if guarantee == "exactly_once" {
        assert_eq!(chaos.ledger.duplicates(), 0, "CHAOS_SEED={seed}");
        assert_eq!(chaos.ledger.out_of_order, Vec::<String>::new(), "CHAOS_SEED={seed}");
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
