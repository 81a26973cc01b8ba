//! A real Prometheus.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::{http, tool, until};

pub struct Prometheus {
    child: Child,
    address: String,
    _folder: tempfile::TempDir,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Prometheus {
    /// Starts with a configuration, a copy of `alerts` beside it as alerts.yaml, and more flags.
    pub fn start(config: &str, alerts: &Path, flags: &[String]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("prometheus.yml");
        std::fs::write(&file, config).expect("written");
        std::fs::copy(alerts, folder.path().join("alerts.yaml")).expect("copied");
        let port =
            std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
        let address = format!("127.0.0.1:{port}");
        let child = Command::new(tool("prometheus"))
            .args(flags)
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("prometheus starts");
        let prometheus = Self { child, address, _folder: folder };
        until("Prometheus", || {
            http(&prometheus.address, "/-/ready").filter(|answer| answer.contains(" 200 "))
        });
        prometheus
    }

    /// The `data` of a response of the HTTP API.
    pub fn ask(&self, path: &str, query: &[(&str, &str)]) -> Value {
        let encode = |text: &str| -> String {
            let one = |b: u8| {
                if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02X}") }
            };
            text.bytes().map(one).collect()
        };
        let query: Vec<String> =
            query.iter().map(|(name, value)| format!("{name}={}", encode(value))).collect();
        let answer = http(&self.address, &format!("{path}?{}", query.join("&"))).expect("Prometheus answers");
        let body = answer.split_once("\r\n\r\n").expect("a body").1;
        let value: Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {body}"));
        assert_eq!(value["status"], "success", "{query:?}: {value}");
        value["data"].clone()
    }

    /// Whether a query returns any number but NaN now.
    pub fn has(&self, query: &str) -> bool {
        let data = self.ask("/api/v1/query", &[("query", query)]);
        let numbers = data["result"].as_array().into_iter().flatten().map(|series| &series["value"][1]);
        numbers.into_iter().any(|value| value != "NaN")
    }
}
