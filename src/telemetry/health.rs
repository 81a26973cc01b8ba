//! The health and state of the process, for /livez, /readyz and /status.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

/// Stages that must make progress while they have a window.
#[derive(Debug, Clone, Copy)]
pub enum Stage {
    Source,
    Prepare,
    Infer,
    Encode,
    /// Waiting for Kafka counts as progress, not as a stall.
    Publish,
}

const STAGES: [&str; 5] = ["source", "prepare", "infer", "encode", "publish"];
/// Number of latest errors that /status shows.
const ERRORS: usize = 10;

pub struct Health {
    started: Instant,
    stall_after: Duration,
    /// When each stage last made progress, in milliseconds after `started`, plus 1; 0 if it is idle.
    busy_since: [AtomicU64; STAGES.len()],
    ready: AtomicBool,
    /// The source's part of /status: assignment and lag.
    source: Mutex<Value>,
    about: Mutex<Value>,
    /// The part of `model.refresh`: what was looked for and what came of it.
    refresh: Mutex<Value>,
    /// How far predictions are from the reference.
    drift: Mutex<Value>,
    errors: Mutex<VecDeque<Value>>,
}

impl Health {
    pub fn new(stall_after: Duration) -> Self {
        Self {
            started: Instant::now(),
            stall_after,
            busy_since: Default::default(),
            ready: AtomicBool::new(false),
            source: Mutex::new(Value::Null),
            about: Mutex::new(Value::Null),
            refresh: Mutex::new(Value::Null),
            drift: Mutex::new(Value::Null),
            errors: Mutex::default(),
        }
    }

    /// A stage takes a window, or makes progress on it.
    pub fn busy(&self, stage: Stage) {
        let now = self.started.elapsed().as_millis() as u64 + 1;
        self.busy_since[stage as usize].store(now, Ordering::Relaxed);
    }

    /// A stage waits for work.
    pub fn idle(&self, stage: Stage) {
        self.busy_since[stage as usize].store(0, Ordering::Relaxed);
    }

    /// A stage that has made no progress for longer than `stall_after`, if there is one.
    pub fn stalled(&self) -> Option<&'static str> {
        let now = self.started.elapsed().as_millis() as u64 + 1;
        let limit = self.stall_after.as_millis() as u64;
        let stuck = |since: u64| since != 0 && now.saturating_sub(since) > limit;
        (0..STAGES.len()).find(|&i| stuck(self.busy_since[i].load(Ordering::Relaxed))).map(|i| STAGES[i])
    }

    /// The process is in the group, with or without partitions, or waits for a period or a topic. It stays ready while
    /// Kafka is unreachable.
    pub fn set_ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
    }

    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Model, digest and task.
    pub fn set_about(&self, about: Value) {
        *self.about.lock().unwrap_or_else(|e| e.into_inner()) = about;
    }

    pub fn set_refresh(&self, refresh: Value) {
        *self.refresh.lock().unwrap_or_else(|e| e.into_inner()) = refresh;
    }

    pub fn set_drift(&self, drift: Value) {
        *self.drift.lock().unwrap_or_else(|e| e.into_inner()) = drift;
    }

    pub fn set_source(&self, source: Value) {
        *self.source.lock().unwrap_or_else(|e| e.into_inner()) = source;
    }

    pub fn error(&self, message: &str) {
        let mut errors = self.errors.lock().unwrap_or_else(|e| e.into_inner());
        if errors.len() == ERRORS {
            errors.pop_front();
        }
        let at = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        errors.push_back(json!({ "at": at, "message": message }));
    }

    pub fn status(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_seconds": self.started.elapsed().as_secs(),
            "live": self.stalled().is_none(),
            "stalled": self.stalled(),
            "ready": self.is_ready(),
            "model": *self.about.lock().unwrap_or_else(|e| e.into_inner()),
            "refresh": *self.refresh.lock().unwrap_or_else(|e| e.into_inner()),
            "source": *self.source.lock().unwrap_or_else(|e| e.into_inner()),
            "drift": *self.drift.lock().unwrap_or_else(|e| e.into_inner()),
            "errors": *self.errors.lock().unwrap_or_else(|e| e.into_inner()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_without_progress_is_stalled() {
        let health = Health::new(Duration::ZERO);
        assert_eq!(health.stalled(), None);
        health.busy(Stage::Infer);
        let begun = Instant::now();
        while health.stalled().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(5));
            std::thread::yield_now();
        }
        assert_eq!(health.stalled(), Some("infer"));
        health.idle(Stage::Infer);
        assert_eq!(health.stalled(), None);
    }

    #[test]
    fn remembers_the_last_errors() {
        let health = Health::new(Duration::from_secs(1));
        for i in 0..12 {
            health.error(&format!("e{i}"));
        }
        let status = health.status();
        assert_eq!(status["errors"].as_array().unwrap().len(), ERRORS);
        assert_eq!(status["errors"][0]["message"], "e2");
    }
}
