//! `model.refresh` on a real Kafka: a version of the model replaces another under load, a broken one does not, and kill -9
//! at moments of a replacement loses nothing and mixes nothing up. The versions answer with different labels, so that a
//! prediction tells which one made it.

use crate::support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use support::ledger::Ledger;
use support::{Daemon, GUARANTEES, Got, Place, Sent, assert_order, file, finish, kandle, until};

const SHORT_SESSION: &str =
    "{ topics: [$INPUT], group: $GROUP, field: /text, properties: { session.timeout.ms: 6000 } }";
const WINDOW: &str = "{ max_wait: 20ms, max_records: 50 }";

/// Versions of a model, and a link to the one in use.
struct Versions {
    folder: tempfile::TempDir,
}

impl Versions {
    /// The link names the version that answers `calm`.
    fn new() -> Self {
        let versions = Self { folder: tempfile::tempdir().expect("a folder") };
        versions.add("calm", |bias| bias[0] = 100.0);
        versions.add("urgent", |bias| bias[1] = 100.0);
        versions.point_to("calm");
        versions
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Adds a version with another bias of its classifier.
    fn add(&self, name: &str, change: impl FnOnce(&mut [f32; 3])) {
        support::models::copy(&support::models::fixture("bert"), &self.path(name));
        let file = self.path(name).join("model.safetensors");
        let mut bytes = std::fs::read(&file).expect("read");
        let place = tensor(&bytes, "classifier.bias");
        let mut bias = [0.0; 3];
        change(&mut bias);
        bytes[place].copy_from_slice(&bias.map(f32::to_le_bytes).concat());
        std::fs::write(file, bytes).expect("written");
    }

    /// Replaces the link at once, as a deployment does it.
    fn point_to(&self, name: &str) {
        let next = self.path("next");
        std::os::unix::fs::symlink(self.path(name), &next).expect("a link");
        std::fs::rename(next, self.path("now")).expect("renamed");
    }

    fn config(&self, place: &Place, more: &[(&str, &str)]) -> String {
        let model = format!("{{ source: {}, refresh: 100ms, dtype: f32 }}", self.path("now").display());
        place.config(&[&[("model", &*model), ("window", WINDOW), ("input", SHORT_SESSION)], more].concat())
    }
}

/// Where a tensor's bytes are in a safetensors file.
fn tensor(bytes: &[u8], name: &str) -> std::ops::Range<usize> {
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let tensors: Value = serde_json::from_slice(&bytes[8..8 + header]).expect("a header");
    let offset =
        |i: usize| tensors[name]["data_offsets"][i].as_u64().expect("an offset") as usize + 8 + header;
    offset(0)..offset(1)
}

fn produce(place: &Place, from: usize, to: usize) {
    place.produce((from..to).map(|i| Sent::ticket((i % 2) as i32, i, &format!("where is order {i}"))));
}

/// Produces records until the log has `text`; returns how many there are now.
#[track_caller]
fn produce_until(place: &Place, daemon: &mut Daemon, from: usize, text: &str) -> usize {
    let (mut made, started) = (from, Instant::now());
    while !daemon.log().contains(text) {
        assert!(started.elapsed() < support::TIMEOUT, "{text:?} is not in the log:\n{}", daemon.log());
        assert!(daemon.ended().is_none(), "kandle has ended:\n{}", daemon.log());
        produce(place, made, made + 50);
        made += 50;
        std::thread::park_timeout(Duration::from_millis(20));
    }
    made
}

/// Waits until the first records have predictions; returns how many there are.
#[track_caller]
fn begin(place: &Place, daemon: &mut Daemon) -> usize {
    daemon.wait_log(" assigned partitions=");
    produce(place, 0, 200);
    until("predictions", || (Ledger::count_of(place) >= 200).then_some(()));
    200
}

/// Waits until each of `count` records, in two partitions, has an outcome; only one if `once`.
#[track_caller]
fn settle(place: &Place, count: usize, once: bool) -> Vec<Got> {
    let mut ledger = Ledger::of(place);
    let ends = [count.div_ceil(2) as i64, (count / 2) as i64];
    let started = Instant::now();
    while !ledger.missing(&ends).is_empty() {
        assert!(started.elapsed() < support::TIMEOUT, "missing: {:?}", ledger.missing(&ends));
        ledger.read(Duration::from_millis(200));
    }
    // Duplicates, if any, come right behind.
    ledger.read(Duration::from_millis(300));
    assert!(!once || ledger.duplicates() == 0, "{:?}", ledger.doubled());
    let got = place.predictions(count);
    assert_order(&got);
    got
}

/// The digest of each label's version. Each label must have one only.
#[track_caller]
fn digests(got: &[Got]) -> BTreeMap<String, String> {
    let mut digests = BTreeMap::new();
    for prediction in got {
        let label = prediction.json()["label"].as_str().expect("a label").to_owned();
        let digest = prediction.header("kandle-model-digest").expect("a digest");
        let known = digests.entry(label).or_insert_with(|| digest.to_owned());
        assert_eq!(known, digest, "{:?} is not of the version that its digest names", prediction.source());
    }
    let values: std::collections::BTreeSet<&String> = digests.values().collect();
    assert_eq!(values.len(), digests.len(), "{digests:?}");
    digests
}

/// The first offset of a partition with a label.
fn first_of(got: &[Got], partition: i32, label: &str) -> i64 {
    let of = got.iter().filter(|p| p.source().0 == partition && p.json()["label"] == label);
    of.map(|p| p.source().1).min().expect("a prediction")
}

fn status(daemon: &mut Daemon) -> Value {
    serde_json::from_str(&daemon.get("/status").1).expect("JSON")
}

fn refreshes(daemon: &mut Daemon, outcome: &str) -> u64 {
    let (_, metrics) = daemon.get("/metrics");
    let name = format!("kandle_model_refreshes_total{{outcome=\"{outcome}\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&name)).expect("the counter");
    line.parse().expect("a number")
}

fn audit(config: &str) -> Vec<Value> {
    let config = file("kandle.yaml", config);
    let path = config.path.to_str().expect("a path");
    let (code, out, log) = finish(kandle().args(["audit", "--json", "-c", path]), b"");
    assert_eq!(code, 0, "{log}");
    serde_json::from_str(&out).expect("JSON")
}

fn replaced_under_load(delivery: &str) {
    let (place, versions) = (Place::new("refresh", 2), Versions::new());
    let once = delivery.contains("exactly_once");
    let config = versions.config(&place, &[("delivery", delivery)]);
    let mut daemon = Daemon::start(&config);
    let made = begin(&place, &mut daemon);
    let old = status(&mut daemon)["model"]["digest"].as_str().expect("a digest").to_owned();
    versions.point_to("urgent");
    let made = produce_until(&place, &mut daemon, made, "model replaced between two windows");
    produce(&place, made, made + 300);
    let made = made + 300;
    let got = settle(&place, made, once);
    let digests = digests(&got);
    assert_eq!((digests.len(), &digests["calm"]), (2, &old));
    let new = &digests["urgent"];

    // What runs, what has happened.
    let status = status(&mut daemon);
    assert_eq!(
        (status["model"]["digest"].as_str(), status["refresh"]["digest"].as_str()),
        (Some(&**new), Some(&**new))
    );
    let replacement = &status["refresh"]["last_replacement"];
    assert_eq!(
        (replacement["before"]["digest"].as_str(), replacement["now"]["digest"].as_str()),
        (Some(&*old), Some(&**new))
    );
    assert_eq!(replacement["comparison"]["agreement"], 0.0, "{replacement}");
    assert!(
        replacement["comparison"]["records"].as_u64() > Some(0) && status["refresh"]["last_error"].is_null()
    );
    let (_, metrics) = daemon.get("/metrics");
    let info: Vec<&str> = metrics.lines().filter(|line| line.starts_with("kandle_model_info{")).collect();
    assert!(info.len() == 1 && info[0].contains(&format!("digest=\"{new}\"")), "{info:?}");
    assert_eq!((refreshes(&mut daemon, "replaced"), refreshes(&mut daemon, "failed")), (1, 0));

    // Where the new version begins: in the log, in the group's commits, in an audit.
    daemon.stop();
    let audited = audit(&config);
    for partition in 0..2 {
        let first = first_of(&got, partition, "urgent");
        assert!(first > 0);
        let in_log = format!("partition={}/{partition} first={first} ", place.input);
        assert!(daemon.log().contains(&in_log), "{in_log:?}:\n{}", daemon.log());
        let (offset, metadata) = place.committed(partition).expect("committed");
        let metadata: Value = serde_json::from_str(&metadata).expect("JSON");
        assert_eq!((metadata["digest"].as_str(), metadata["since"].as_i64()), (Some(&**new), Some(first)));
        assert_eq!(offset, made as i64 / 2);
        let found = audited.iter().find(|found| found["partition"] == partition).expect("the partition");
        let models: BTreeMap<&str, &Value> = found["models"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|model| (model["digest"].as_str().expect("a digest"), &model["offsets"]))
            .collect();
        assert_eq!(*models[&*old], serde_json::json!([[0, first - 1]]));
        assert_eq!(*models[&**new], serde_json::json!([[first, offset - 1]]));
    }
}

#[test]
fn a_version_replaces_another_under_load_at_least_once() {
    replaced_under_load(GUARANTEES[0]);
}

#[test]
fn a_version_replaces_another_under_load_exactly_once() {
    replaced_under_load(GUARANTEES[1]);
}

/// Inputs that have been answered so far, those that are equal to another of their window too.
fn answered(daemon: &mut Daemon) -> f64 {
    let (_, metrics) = daemon.get("/metrics");
    let names = ["kandle_batch_records_sum ", "kandle_reused_predictions_total{from=\"window\"} "];
    let value = |name: &str| metrics.lines().find_map(|line| line.strip_prefix(name)).expect("a metric");
    names.map(|name| value(name).parse::<f64>().expect("a number")).iter().sum()
}

#[test]
fn a_transaction_has_predictions_of_one_version() {
    let (place, versions) = (Place::new("refresh-transaction", 2), Versions::new());
    let delivery = "{ guarantee: exactly_once, commit_interval: 60s }";
    let config = versions.config(&place, &[("delivery", delivery)]);
    let mut daemon = Daemon::start(&config);
    daemon.wait_log(" assigned partitions=");
    // Its first forwards count too.
    let before = answered(&mut daemon);
    produce(&place, 0, 100);
    until("all records to be answered", || (answered(&mut daemon) >= before + 100.0).then_some(()));
    versions.point_to("urgent");
    daemon.wait_log("model replaced between two windows");
    assert_eq!(Ledger::count_of(&place), 0, "the transaction is open");
    produce(&place, 100, 200);
    // The first transaction ends before the second version's first window, the second one a minute later.
    let got = place.predictions(100);
    assert_eq!((got.len(), digests(&got).into_keys().collect()), (100, vec!["calm".to_owned()]));
    let (offset, metadata) = place.committed(0).expect("committed");
    let metadata: Value = serde_json::from_str(&metadata).expect("JSON");
    assert_eq!((offset, metadata["digest"].as_str()), (50, got[0].header("kandle-model-digest")));
    daemon.stop();
    assert_eq!(digests(&settle(&place, 200, true)).len(), 2);
}

/// Waits for a failed refresh after `before`, and returns its message.
#[track_caller]
fn failure(daemon: &mut Daemon, before: u64) -> String {
    until("a failed refresh", || (refreshes(daemon, "failed") > before).then_some(()));
    let status = status(daemon);
    assert_eq!(status["refresh"]["last_outcome"], "failed");
    status["refresh"]["last_error"]["message"].as_str().expect("a message").to_owned()
}

fn truncate(weights: &Path) {
    let bytes = std::fs::read(weights).expect("read");
    std::fs::write(weights, &bytes[..bytes.len() / 2]).expect("written");
}

#[test]
fn a_broken_version_leaves_the_one_before_in_place() {
    let (place, versions) = (Place::new("refresh-broken", 2), Versions::new());
    versions.add("truncated", |bias| bias[2] = 100.0);
    truncate(&versions.path("truncated").join("model.safetensors"));
    versions.add("nan", |bias| bias[2] = f32::NAN);
    versions.add("other", |bias| bias[2] = 100.0);
    std::fs::write(versions.path("other").join("config.json"), "{\"model_type\":\"unknown\"}")
        .expect("written");
    std::fs::create_dir(versions.path("empty")).expect("a folder");
    let config = versions.config(&place, &[("delivery", GUARANTEES[1])]);
    let mut daemon = Daemon::start(&config);
    let mut made = begin(&place, &mut daemon);
    let old = status(&mut daemon)["model"]["digest"].clone();
    for (version, said) in [
        ("truncated", "model.safetensors"),
        ("nan", "first forward pass failed"),
        ("other", "unknown"),
        ("empty", "no weights"),
    ] {
        let failed = refreshes(&mut daemon, "failed");
        versions.point_to(version);
        let message = failure(&mut daemon, failed);
        assert!(message.contains(said), "{version}: {message}");
        assert_eq!(status(&mut daemon)["model"]["digest"], old);
        assert_eq!(daemon.get("/readyz").0, 200);
        produce(&place, made, made + 50);
        made += 50;
    }
    let got = settle(&place, made, true);
    assert_eq!(digests(&got).keys().collect::<Vec<_>>(), ["calm"]);
    // The next good one is used at once.
    versions.point_to("urgent");
    let made = produce_until(&place, &mut daemon, made, "model replaced between two windows");
    produce(&place, made, made + 50);
    assert_eq!(digests(&settle(&place, made + 50, true)).len(), 2);
    daemon.stop();
}

#[test]
fn the_version_before_goes_first_where_the_memory_does_not_hold_two() {
    let (place, versions) = (Place::new("refresh-room", 2), Versions::new());
    versions.add("nan", |bias| bias[2] = f32::NAN);
    let config = versions.config(&place, &[("delivery", GUARANTEES[1])]);
    let mut daemon = Daemon::start_with(&config, |command| {
        command.env("FAILPOINTS", "refresh-free=return(1000)");
    });
    let made = begin(&place, &mut daemon);
    // One that cannot be used: the one before is loaded again.
    versions.point_to("nan");
    let made = produce_until(&place, &mut daemon, made, "refreshing the model failed");
    assert!(daemon.log().contains("dropping the one that runs first"), "{}", daemon.log());
    let made = produce_until(&place, &mut daemon, made, "loading the one before again");
    produce(&place, made, made + 50);
    let got = settle(&place, made + 50, true);
    assert_eq!(digests(&got).keys().collect::<Vec<_>>(), ["calm"]);
    versions.point_to("urgent");
    let made = produce_until(&place, &mut daemon, made + 50, "model replaced between two windows");
    produce(&place, made, made + 50);
    assert_eq!(digests(&settle(&place, made + 50, true)).len(), 2);
    daemon.stop();
}

/// Kills a daemon at a moment of a replacement, starts another, and checks every record's outcome.
#[track_caller]
fn killed_at(moment: &str, delivery: &str) {
    let (place, versions) = (Place::new(&format!("refresh-{moment}"), 2), Versions::new());
    let once = delivery.contains("exactly_once");
    let config = versions.config(&place, &[("delivery", delivery)]);
    let mut first = Daemon::start_with(&config, |command| {
        command.env("FAILPOINTS", format!("{moment}=return"));
    });
    let made = begin(&place, &mut first);
    versions.point_to("urgent");
    let made = produce_until(&place, &mut first, made, &format!("failpoint {moment} reached"));
    first.kill();
    let mut second = Daemon::start(&config);
    produce(&place, made, made + 100);
    let made = made + 100;
    let got = settle(&place, made, once);
    assert_eq!(digests(&got).len(), 2, "{moment}");
    second.stop();
    for partition in 0..2 {
        let (offset, metadata) = place.committed(partition).expect("committed");
        let metadata: Value = serde_json::from_str(&metadata).expect("JSON");
        assert_eq!(
            (offset, metadata["digest"].as_str()),
            (made as i64 / 2, Some(&*digests(&got)["urgent"])),
            "{moment}"
        );
        if once {
            assert_eq!(metadata["since"].as_i64(), Some(first_of(&got, partition, "urgent")), "{moment}");
        }
    }
}

/// Before a version takes over, and while it does.
const MOMENTS: [&str; 5] =
    ["refresh-found", "refresh-loaded", "refresh-checked", "swap-finished", "swap-done"];

#[test]
fn exactly_once_killed_before_and_while_a_version_takes_over() {
    for moment in MOMENTS {
        killed_at(moment, GUARANTEES[1]);
    }
}

#[test]
fn exactly_once_killed_after_a_version_took_over() {
    for moment in [
        "swapped-publish",
        "swapped-sent",
        "swapped-acknowledged",
        "swapped-offsets",
        "swapped-txn-committed",
    ] {
        killed_at(moment, GUARANTEES[1]);
    }
}

#[test]
fn at_least_once_killed_before_and_while_a_version_takes_over() {
    for moment in MOMENTS {
        killed_at(moment, GUARANTEES[0]);
    }
}

#[test]
fn at_least_once_killed_after_a_version_took_over() {
    for moment in
        ["swapped-publish", "swapped-sent", "swapped-acknowledged", "swapped-commit", "swapped-committed"]
    {
        killed_at(moment, GUARANTEES[0]);
    }
}

/// A server for the part of the hub's protocol that a client needs. `main` names one of two commits, each a directory.
struct Hub {
    endpoint: String,
    /// Index of the commit that `main` names.
    main: Arc<AtomicUsize>,
}

impl Hub {
    fn start(commits: [PathBuf; 2]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let main = Arc::new(AtomicUsize::new(0));
        let kept = Arc::clone(&main);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (commits, main) = (commits.clone(), Arc::clone(&kept));
                std::thread::spawn(move || drop(answer(stream, &commits, &main)));
            }
        });
        Self { endpoint, main }
    }

    fn commit(index: usize) -> String {
        format!("{index:040x}")
    }
}

fn answer(stream: TcpStream, commits: &[PathBuf; 2], main: &AtomicUsize) -> std::io::Result<()> {
    let mut out = stream.try_clone()?;
    let mut lines = BufReader::new(stream).lines();
    while let Some(request) = lines.next() {
        let request = request?;
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut range = None;
        for line in lines.by_ref() {
            let line = line?.to_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some((from, to)) =
                line.strip_prefix("range: bytes=").and_then(|range| range.split_once('-'))
            {
                range = Some((from.parse().unwrap_or(0), to.parse().unwrap_or(usize::MAX)));
            }
        }
        let mut reply = |status: &str, headers: &str, body: &[u8]| -> std::io::Result<()> {
            write!(out, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n", body.len())?;
            out.write_all(if request.starts_with("HEAD") { b"" } else { body })?;
            out.flush()
        };
        let file = path.strip_prefix("/org/tiny/resolve/").and_then(|rest| rest.split_once('/'));
        if path.starts_with("/api/models/org/tiny") {
            let main = main.load(Ordering::Relaxed);
            let files = std::fs::read_dir(&commits[main])?.flatten();
            let siblings: Vec<Value> = files
                .map(|file| serde_json::json!({ "rfilename": file.file_name().to_string_lossy() }))
                .collect();
            let info = serde_json::json!({ "sha": Hub::commit(main), "siblings": siblings }).to_string();
            reply("200 OK", "Content-Type: application/json\r\n", info.as_bytes())?;
        } else if let Some((commit, name)) = file
            && let Some(index) = (0..2).find(|&index| Hub::commit(index) == commit)
            && let Ok(bytes) = std::fs::read(commits[index].join(name))
        {
            // An ETag names a content.
            let common =
                format!("ETag: \"{index}-{name}\"\r\nX-Repo-Commit: {commit}\r\nAccept-Ranges: bytes\r\n");
            let (from, to) = range.unwrap_or((0, usize::MAX));
            let to = to.min(bytes.len() - 1);
            let headers = format!("{common}Content-Range: bytes {from}-{to}/{}\r\n", bytes.len());
            match range {
                Some(_) => reply("206 Partial Content", &headers, &bytes[from..=to])?,
                None => reply("200 OK", &common, &bytes)?,
            }
        } else {
            reply("404 Not Found", "", b"")?;
        }
    }
    Ok(())
}

#[test]
fn a_new_commit_of_a_hubs_branch_replaces_the_one_before() {
    let (place, versions) = (Place::new("refresh-hub", 2), Versions::new());
    let hub = Hub::start([versions.path("calm"), versions.path("urgent")]);
    let cache = tempfile::tempdir().expect("a folder");
    let model = "{ source: org/tiny, refresh: 100ms, dtype: f32 }";
    let config = versions.config(&place, &[("model", model), ("delivery", GUARANTEES[0])]);
    let mut daemon = Daemon::start_with(&config, |command| {
        command.env("HF_HOME", cache.path()).env("HF_ENDPOINT", &hub.endpoint).env_remove("HF_HUB_OFFLINE");
    });
    let made = begin(&place, &mut daemon);
    hub.main.store(1, Ordering::Relaxed);
    let made = produce_until(&place, &mut daemon, made, "model replaced between two windows");
    produce(&place, made, made + 50);
    let got = settle(&place, made + 50, false);
    assert_eq!(digests(&got).len(), 2);
    for prediction in &got {
        let commit = usize::from(prediction.json()["label"] == "urgent");
        let model = format!("org/tiny@{}", Hub::commit(commit));
        assert_eq!(prediction.header("kandle-model"), Some(&*model));
    }
    daemon.stop();
}
