//! Checks dashboards, alerts and documents against the code, and every query on a real Prometheus that
//! scrapes a real kandle under load.

use crate::support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kandle::telemetry::metrics::{Kind, TABLE};
use serde_json::Value;
use support::prometheus::Prometheus;
use support::{Daemon, Place, Sent, root, tool};

/// Process metrics, which the client library exports.
const PROCESS: [&str; 7] = [
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_threads",
    "process_virtual_memory_bytes",
];

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn dashboards() -> Vec<(String, Value)> {
    let folder = root().join("grafana/dashboards");
    let mut all: Vec<(String, Value)> = std::fs::read_dir(folder)
        .expect("dashboards")
        .map(|entry| {
            let path = entry.expect("an entry").path();
            let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
            (name, serde_json::from_str(&std::fs::read_to_string(path).expect("read")).expect("JSON"))
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// A panel: its dashboard, its title, its queries with their legends.
type Panel = (String, String, Vec<(String, String)>);

fn queries() -> Vec<Panel> {
    let mut all = Vec::new();
    for (name, dashboard) in dashboards() {
        for panel in dashboard["panels"].as_array().expect("panels") {
            let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
            let targets = panel["targets"].as_array().into_iter().flatten();
            let targets: Vec<_> = targets.map(|t| (text(&t["expr"]), text(&t["legendFormat"]))).collect();
            if !targets.is_empty() {
                all.push((name.clone(), text(&panel["title"]), targets));
            }
        }
    }
    all
}

/// Names of metrics in a text; `_bucket`, `_sum` and `_count` of a histogram count as the histogram.
fn names(text: &str) -> BTreeSet<String> {
    let pattern = regex::Regex::new(r"\b(kandle|process)_[a-z0-9_]+\b").expect("a pattern");
    let histograms: BTreeSet<&str> = TABLE
        .iter()
        .filter(|(_, kind, ..)| matches!(kind, Kind::Histogram(_)))
        .map(|(name, ..)| *name)
        .collect();
    pattern
        .find_iter(text)
        .map(|found| {
            let name = found.as_str();
            let part = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            part.filter(|part| histograms.contains(part)).unwrap_or(name).to_owned()
        })
        .collect()
}

#[test]
fn names_are_the_same_in_code_dashboards_alerts_and_documents() {
    let known: BTreeSet<String> =
        TABLE.iter().map(|(name, ..)| (*name).to_owned()).chain(PROCESS.map(str::to_owned)).collect();
    let mut files = vec![
        "grafana/alerts.yaml".to_owned(),
        "grafana/alerts_test.yaml".to_owned(),
        "README.md".to_owned(),
        "charts/kandle/templates/scaling.yaml".to_owned(),
        "config/default.yaml".to_owned(),
    ];
    files.extend(dashboards().into_iter().map(|(name, _)| format!("grafana/dashboards/{name}.json")));
    for entry in std::fs::read_dir(root().join("docs")).expect("docs") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|e| e == "md") {
            files.push(path.strip_prefix(root()).expect("inside").display().to_string());
        }
    }
    // docs/metrics.md lists every metric as the code describes it.
    let mut lines = String::new();
    for (name, kind, labels, help) in TABLE {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        };
        let labels = labels.iter().map(|l| format!("`{l}`")).collect::<Vec<_>>().join(", ");
        lines += &format!("| `{name}` | {kind} | {labels} | {help} |\n");
    }
    let path = "docs/metrics.md";
    let document = read(path);
    let head = document.split("| `kandle_").next().expect("a head");
    let tail = document.rsplit_once("|\n\n").map_or("", |(_, tail)| tail);
    let wanted = format!("{head}{lines}\n{tail}");
    if std::env::var_os("KANDLE_WRITE").is_some() {
        std::fs::write(root().join(path), wanted).expect("written");
    } else {
        assert!(document == wanted, "{path} is out of date: run `make generated`");
    }
    for file in &files {
        for name in names(&read(file)) {
            assert!(known.contains(&name), "{file}: there is no metric {name}");
        }
    }
}

#[test]
fn dashboards_are_up_to_date_and_every_panel_is_described() {
    let status = Command::new("python3").arg(root().join("grafana/dashboards.py")).arg("--check").status();
    assert!(status.expect("python3 runs").success());
    for (name, dashboard) in dashboards() {
        for panel in dashboard["panels"].as_array().expect("panels") {
            if panel["type"] == "row" {
                continue;
            }
            let title = &panel["title"];
            assert!(panel["description"].as_str().is_some_and(|d| d.len() > 10), "{name}: {title}");
            assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{name}: {title}");
        }
    }
}

#[test]
fn alerts_fire_when_they_should_and_link_to_runbook_and_dashboard() {
    let tests = root().join("grafana/alerts_test.yaml");
    let output =
        Command::new(tool("promtool")).args(["test", "rules"]).arg(&tests).output().expect("promtool");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let alerts: Value = serde_saphyr::from_str(&read("grafana/alerts.yaml")).expect("YAML");
    let tests = read("grafana/alerts_test.yaml");
    let runbook = read("docs/runbook.md");
    let dashboards: BTreeMap<String, Value> = dashboards().into_iter().collect();
    for rule in alerts["groups"][0]["rules"].as_array().expect("rules") {
        let name = rule["alert"].as_str().expect("a name");
        let tested = format!("alertname: {name}\n");
        assert!(tests.contains(&tested), "{name} has no test in which it fires");
        let section = rule["annotations"]["runbook_url"].as_str().expect("a runbook");
        assert_eq!(section, format!("docs/runbook.md#{}", name.to_lowercase()));
        assert!(runbook.contains(&format!("\n## {name}\n")), "docs/runbook.md has no section {name}");
        let url = rule["annotations"]["dashboard_url"].as_str().expect("a dashboard");
        let uid =
            url.strip_prefix("/d/kandle-").and_then(|rest| rest.split('?').next()).expect("a dashboard");
        let panels = dashboards[uid]["panels"].as_array().expect("panels");
        if let Some((_, id)) = url.split_once("viewPanel=") {
            let id: u64 = id.parse().expect("a number");
            let found = panels.iter().any(|panel| panel["id"] == id && panel["type"] != "row");
            assert!(found, "{name}: no panel {id}");
        }
    }
}

/// A query as Grafana sends it, with every variable set to All.
fn expand(query: &str) -> String {
    let mut query = query.replace("$__rate_interval", "10s");
    for variable in ["namespace", "job", "topic", "stage"] {
        query = query.replace(&format!("\"${variable}\""), "\".*\"");
    }
    query
}

/// Keeps a job busy, with records of every outcome.
fn load(place: &Arc<Place>, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let (place, stop) = (Arc::clone(place), Arc::clone(stop));
    std::thread::spawn(move || {
        let tickets = std::fs::read_to_string(root().join("demo/tickets.jsonl")).expect("tickets");
        let tickets: Vec<Value> =
            tickets.lines().map(|line| serde_json::from_str(line).expect("a ticket")).collect();
        let long =
            serde_json::json!({ "id": 1, "text": "please help me with this ".repeat(400) }).to_string();
        let mut next = 0usize;
        while !stop.load(Ordering::Relaxed) {
            place.produce((0..180).map(|_| {
                next += 1;
                let partition = (next % 3) as i32;
                match next % 60 {
                    7 => Sent::new(partition, "no json"),
                    11 => Sent::new(partition, r#"{"other": 1}"#),
                    13 => Sent { value: None, key: Some(b"k".to_vec()), ..Sent::new(partition, "") },
                    17 => Sent::new(partition, long.as_bytes()),
                    // Some texts repeat, most do not.
                    n if n % 10 == 0 => Sent::ticket(partition, next, "where is my order?"),
                    _ => {
                        let text = &tickets[next * 7 % tickets.len()]["text"];
                        Sent::ticket(partition, next, &format!("{text} Reference {next}."))
                    }
                }
            }));
            std::thread::park_timeout(Duration::from_millis(50));
        }
    })
}

/// A reference of the bundled model in which each label is as frequent as the others.
fn reference() -> support::File {
    let labels: Value = serde_json::from_str(&read("demo/model/config.json")).expect("JSON");
    let mut tally = kandle::watch::Tally::default();
    for label in labels["id2label"].as_object().expect("labels").values() {
        tally.add_label(label.as_str().expect("a label"));
    }
    tally.records = 1;
    let reference = kandle::watch::Reference::new(&tally).expect("labels");
    let reference = kandle::watch::Reference { task: "text-classification".to_owned(), ..reference };
    support::file("reference.json", &serde_json::to_string(&reference).expect("JSON"))
}

#[test]
fn every_query_has_data_from_a_kandle_under_load() {
    let place = Arc::new(Place::new("grafana", 3));
    let reference = reference();
    let [samples, shadow] = ["samples", "shadow"].map(|name| format!("{}-{name}", place.output));
    place.create(&samples, 1, &[]);
    place.create(&shadow, 1, &[]);
    let drift = format!("{{ reference: {}, window: 200 }}", reference.path.display());
    let samples = format!("{{ topic: {samples}, share: 0.1 }}");
    let shadow = format!("{{ topic: {shadow}, model: {{ source: bundled }}, share: 0.5 }}");
    let more = [
        ("schedule", "{ finish_by: \"06:00\" }"),
        ("task", "{ kind: text-classification, cache: 16MiB }"),
        ("drift", drift.as_str()),
        ("samples", samples.as_str()),
        ("shadow", shadow.as_str()),
    ];
    let mut daemon = Daemon::start(&place.config(&more));
    // Only a job of embeddings has lengths of vectors.
    let vectors = Arc::new(Place::new("grafana-vectors", 3));
    let model = format!("{{ source: {} }}", support::models::fixture("embed-qwen3").display());
    let mut embedder = Daemon::start(&vectors.config(&[
        ("task", "{ kind: text-embedding }"),
        ("model", &model),
        ("output", "{ topic: $OUTPUT }"),
    ]));
    let prometheus = Prometheus::start(
        &format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\n\
             rule_files: [alerts.yaml]\n\
             scrape_configs: [{{ job_name: kandle, static_configs: [{{ targets: ['{}', '{}'], labels: {{ namespace: test }} }}] }}]\n",
            daemon.address(),
            embedder.address(),
        ),
        &root().join("grafana/alerts.yaml"),
        &[],
    );
    let stop = Arc::new(AtomicBool::new(false));
    let loads = [&place, &vectors].map(|place| load(place, &stop));
    let panels = queries();
    assert!(panels.len() > 40, "{} panels", panels.len());
    let mut open: Vec<(String, String, String)> = panels
        .iter()
        .flat_map(|(dashboard, panel, targets)| {
            targets.iter().map(move |(query, _)| (dashboard.clone(), panel.clone(), expand(query)))
        })
        .collect();
    let started = Instant::now();
    while !open.is_empty() {
        open.retain(|(_, _, query)| !prometheus.has(query));
        assert!(started.elapsed() < support::TIMEOUT, "these have no data: {open:#?}");
        std::thread::park_timeout(Duration::from_millis(500));
    }
    // Alerts and annotations have no data while all is well, but the metrics in their queries do.
    let alerts: Value = serde_saphyr::from_str(&read("grafana/alerts.yaml")).expect("YAML");
    let rules = alerts["groups"][0]["rules"].as_array().expect("rules").clone();
    let mut rest: Vec<String> =
        rules.iter().map(|rule| rule["expr"].as_str().expect("an expression").to_owned()).collect();
    for (_, dashboard) in dashboards() {
        let annotations = dashboard["annotations"]["list"].as_array().expect("annotations");
        rest.extend(annotations.iter().map(|a| expand(a["expr"].as_str().expect("an expression"))));
    }
    for query in rest {
        prometheus.ask("/api/v1/query", &[("query", &query)]);
        for name in names(&query) {
            assert!(prometheus.has(&name), "{name} of {query} has no data");
        }
    }
    let loaded = prometheus.ask("/api/v1/rules", &[]).to_string();
    for rule in &rules {
        assert!(loaded.contains(rule["alert"].as_str().expect("a name")), "{rule} is not loaded");
    }
    if let Some(folder) = std::env::var_os("KANDLE_PREVIEW") {
        preview(&prometheus, Path::new(&folder));
    }
    stop.store(true, Ordering::Relaxed);
    loads.into_iter().for_each(|load| load.join().expect("the load ends"));
    daemon.stop();
    embedder.stop();
}

/// Writes the data of each panel over two minutes, for grafana/preview.py.
fn preview(prometheus: &Prometheus, folder: &Path) {
    const SECONDS: u64 = 120;
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(SECONDS) {
        std::thread::park_timeout(Duration::from_secs(1));
    }
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
    let (from, to) = ((now - SECONDS).to_string(), now.to_string());
    std::fs::create_dir_all(folder).expect("a folder");
    let mut all = BTreeMap::<String, BTreeMap<String, Value>>::new();
    for (dashboard, panel, targets) in queries() {
        let results: Vec<Value> = targets
            .iter()
            .map(|(query, legend)| {
                let form = [("query", &*expand(query)), ("start", &from), ("end", &to), ("step", "2")];
                serde_json::json!({ "legend": legend, "result": prometheus.ask("/api/v1/query_range", &form)["result"] })
            })
            .collect();
        all.entry(dashboard).or_default().insert(panel, results.into());
    }
    let text = serde_json::to_string(&all).expect("JSON");
    std::fs::write(folder.join("data.json"), text).expect("written");
}
