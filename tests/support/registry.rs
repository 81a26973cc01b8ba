//! A real schema registry that a test may break.

use std::process::{Child, ChildStdin, Command, Stdio};

use serde_json::{Value, json};

use super::kafka::free_ports;
use super::{root, until};

pub struct Registry {
    /// The base address of Confluent's API.
    pub url: String,
    port: u16,
    directory: tempfile::TempDir,
    running: Option<Running>,
}

struct Running {
    script: Child,
    /// The script's standard input: the registry ends when it closes.
    _input: ChildStdin,
}

fn script() -> Command {
    Command::new(root().join("tests/support/registry.sh"))
}

impl Registry {
    /// Starts a registry without any schema.
    pub fn start() -> Self {
        assert!(
            script().arg("fetch").status().expect("registry.sh runs").success(),
            "registry.sh fetch failed"
        );
        let port = free_ports();
        let mut registry = Self {
            url: format!("http://127.0.0.1:{port}/apis/ccompat/v7"),
            port,
            directory: tempfile::tempdir().expect("a directory"),
            running: None,
        };
        registry.restart();
        registry
    }

    /// Starts it again on the same port. It has forgotten all schemas, and gives ids from 1 again.
    pub fn restart(&mut self) {
        assert!(self.running.is_none(), "the registry runs");
        let _ = std::fs::remove_file(self.directory.path().join("pid"));
        let mut script = script()
            .args(["run", &self.directory.path().display().to_string(), &self.port.to_string()])
            .stdin(Stdio::piped())
            .spawn()
            .expect("registry.sh runs");
        let input = script.stdin.take().expect("piped");
        self.running = Some(Running { script, _input: input });
        until("the registry", || ureq::get(format!("{}/subjects", self.url)).call().ok().map(drop));
    }

    /// kill -9.
    pub fn kill(&mut self) {
        let pid = until("the registry's process id", || {
            let text = std::fs::read_to_string(self.directory.path().join("pid")).ok()?;
            text.trim().parse::<u32>().ok()
        });
        let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        if let Some(mut running) = self.running.take() {
            let _ = running.script.wait();
        }
    }

    /// Registers a schema; returns its id. `kind`: AVRO, PROTOBUF or JSON; `references`: name and subject of each, version
    /// 1.
    pub fn register(&self, subject: &str, kind: &str, schema: &str, references: &[(&str, &str)]) -> u32 {
        let references: Vec<Value> = references
            .iter()
            .map(|(name, subject)| json!({ "name": name, "subject": subject, "version": 1 }))
            .collect();
        let body = json!({ "schema": schema, "schemaType": kind, "references": references });
        let answer = ureq::post(format!("{}/subjects/{subject}/versions", self.url))
            .header("content-type", "application/vnd.schemaregistry.v1+json")
            .send(body.to_string())
            .expect("the schema is registered")
            .body_mut()
            .read_to_string()
            .expect("an answer");
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        answer["id"].as_u64().expect("an id") as u32
    }
}

impl Registry {
    /// The JSON that it answers to a GET.
    pub fn get(&self, path: &str) -> Value {
        let mut answer = ureq::get(format!("{}{path}", self.url)).call().expect("an answer");
        serde_json::from_str(&answer.body_mut().read_to_string().expect("a text")).expect("JSON")
    }

    /// Sets a subject's compatibility rule, such as BACKWARD. The subject must exist.
    pub fn compatibility(&self, subject: &str, rule: &str) {
        ureq::put(format!("{}/config/{subject}", self.url))
            .header("content-type", "application/vnd.schemaregistry.v1+json")
            .send(json!({ "compatibility": rule }).to_string())
            .expect("the rule is set");
    }
}

/// A value in Confluent's wire format: a zero byte, the schema's id, the data.
pub fn framed(id: u32, data: &[u8]) -> Vec<u8> {
    [&[0], &id.to_be_bytes()[..], data].concat()
}
