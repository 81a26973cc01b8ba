//! Runs the services of compose.yaml as plain processes: the same commands, flags and mounted files. Only the
//! addresses differ.

use crate::support;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use support::kafka::Kafka;
use support::prometheus::Prometheus;
use support::{Daemon, file, finish, root, until};

/// A process that is killed when the test ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn compose() -> Value {
    let text = std::fs::read_to_string(root().join("compose.yaml")).expect("read");
    serde_saphyr::from_str(&text).expect("YAML")
}

/// The path on this machine of a path in a service's container, by the service's volumes.
fn here(service: &Value, path: &str) -> Option<String> {
    service["volumes"].as_array()?.iter().find_map(|volume| {
        let mut parts = volume.as_str()?.split(':');
        let (from, to) = (parts.next()?, parts.next()?);
        let rest = path.strip_prefix(to)?;
        Some(format!("{}{rest}", root().join(from.trim_start_matches("./")).display()))
    })
}

/// The command of a service, with the paths of its files on this machine.
fn command(service: &Value) -> Vec<String> {
    let words = service["command"].as_array().expect("a command").iter();
    words
        .map(|word| {
            let word = word.as_str().expect("a word");
            let (flag, path) = word.split_once('=').filter(|_| word.starts_with("--")).unwrap_or(("", word));
            match (path.starts_with('/').then(|| here(service, path)).flatten(), flag) {
                (None, _) => word.to_owned(),
                (Some(here), "") => here,
                (Some(here), flag) => format!("{flag}={here}"),
            }
        })
        .collect()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

#[test]
fn the_services_work_together() {
    let compose = compose();
    let services = &compose["services"];
    // Every mounted file exists.
    for (name, service) in services.as_object().expect("services") {
        for volume in service["volumes"].as_array().into_iter().flatten() {
            let from = volume.as_str().and_then(|v| v.split(':').next()).expect("a volume");
            assert!(root().join(from).exists(), "{name}: {from}");
        }
    }
    let kafka = Kafka::start_creating_topics();
    let brokers = |text: &str| text.replace("kafka:9092", &kafka.brokers);

    let producer = command(&services["producer"]);
    assert_eq!(services["producer"]["entrypoint"][0], "/opt/kafka/bin/kafka-producer-perf-test.sh");
    // The class that the entrypoint's script runs.
    let _producer = Running(
        Command::new(root().join("tests/support/kafka.sh"))
            .args(["tool", "org.apache.kafka.tools.ProducerPerformance"])
            .args(producer.iter().map(|word| brokers(word)))
            .stdout(Stdio::null())
            .spawn()
            .expect("a producer"),
    );

    let kandle = command(&services["kandle"]);
    let (run, config) = (&kandle[0], kandle.last().expect("a configuration"));
    assert_eq!(kandle[..2], ["run", "--config"], "{run}");
    // With the brokers of this test, and any free port.
    let own = brokers(&read(config)) + "server: { listen: \"127.0.0.1:0\" }\n";
    let mut daemon = Daemon::start(&own);
    let address = daemon.address();

    let prometheus = command(&services["prometheus"]);
    let flag =
        prometheus.iter().find_map(|word| word.strip_prefix("--config.file=")).expect("a configuration");
    let scrape = read(flag).replace("kandle:9464", &address);
    assert!(scrape.contains(&address), "kandle is not scraped: {scrape}");
    let alerts = here(&services["prometheus"], "/etc/prometheus/alerts.yaml").expect("alerts are mounted");
    let flags: Vec<String> =
        prometheus.iter().filter(|word| !word.starts_with("--config.file=")).cloned().collect();
    let prometheus = Prometheus::start(&scrape, Path::new(&alerts), &flags);
    // The query of Grafana's first panel has data.
    until("predictions in Prometheus", || {
        prometheus.has(r#"sum(rate(kandle_records_total{outcome="predicted"}[1m])) > 1"#).then_some(())
    });
    daemon.stop();
    // A drain fails on a missing topic, but waits for one that the broker creates on demand.
    let config = file("kandle.yaml", &own);
    let set = ["output.topic=made-on-demand", "input.group=another"];
    let mut drain = support::kandle();
    drain.args(["drain", "-c"]).arg(&config.path).args(set.iter().flat_map(|set| ["--set", *set]));
    let (code, _, log) = finish(&mut drain, b"");
    assert_eq!(code, 0, "{log}");

    // Grafana gets the dashboards, and the data source that they query.
    let provider = read(
        &here(&services["grafana"], "/etc/grafana/provisioning/dashboards/kandle.yaml").expect("mounted"),
    );
    let provider: Value = serde_saphyr::from_str(&provider).expect("YAML");
    let path = provider["providers"][0]["options"]["path"].as_str().expect("a path");
    let overview = here(&services["grafana"], &format!("{path}/overview.json")).expect("mounted");
    let overview: Value = serde_json::from_str(&read(&overview)).expect("a dashboard");
    assert_eq!(overview["uid"], "kandle-overview");
    let source = read(
        &here(&services["grafana"], "/etc/grafana/provisioning/datasources/prometheus.yaml")
            .expect("mounted"),
    );
    let source: Value = serde_saphyr::from_str(&source).expect("YAML");
    assert_eq!(source["datasources"][0]["url"], "http://prometheus:9090");
}
