//! Memory and CPU time of an idle daemon with the bundled model.
//! benches/footprint.sh measures the release build.

#![cfg(target_os = "linux")]

mod support;

use std::time::{Duration, Instant};

use support::{Daemon, Place};

/// CPU time of a process so far, user and system, in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let fields: Vec<&str> = stat.rsplit(") ").next().expect("fields").split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().expect("utime") + fields[12].parse::<u64>().expect("stime");
    // USER_HZ is 100 on every Linux that Rust runs on.
    ticks as f64 / 100.0
}

#[test]
fn an_idle_daemon_needs_little_memory_and_cpu() {
    let place = Place::new("idle", 4);
    let started = Instant::now();
    let mut daemon = Daemon::start(&place.config(&[]));
    daemon.wait_log("model loaded");
    let loaded = cpu_seconds(daemon.pid());
    assert!(loaded < 2.0, "{loaded} s of CPU time to load the model");
    daemon.wait_log(" assigned partitions=");
    let (since, before) = (Instant::now(), cpu_seconds(daemon.pid()));
    // An interval to measure over, not a wait for something to happen.
    std::thread::sleep(Duration::from_secs(10));
    let share = (cpu_seconds(daemon.pid()) - before) / since.elapsed().as_secs_f64();
    assert!(share < 0.01, "idle at {:.2} % of a core", share * 100.0);
    let memory = daemon.anonymous_kib() / 1024;
    assert!(memory > 0, "the daemon has exited");
    assert!(memory < 64, "{memory} MiB after {:?}", started.elapsed());
    daemon.stop();
}
