//! How much memory the machine or the container has, and how much of it is free.

use std::fs::read_to_string;

/// The container's limit (cgroup v2) or the machine's memory, in bytes; `None` if the system does not say.
pub fn limit() -> Option<u64> {
    let machine = meminfo(&read_to_string("/proc/meminfo").ok()?, "MemTotal:")?;
    Some(group("memory.max").and_then(|text| bytes(&text)).map_or(machine, |limit| limit.min(machine)))
}

/// Bytes that can be allocated: what is free, or can be made free, in the machine and in the container (cgroup v2); `None`
/// if the system does not say.
pub fn free() -> Option<u64> {
    let machine = meminfo(&read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    let within = || {
        let limit = bytes(&group("memory.max")?)?;
        Some(free_in_group(limit, bytes(&group("memory.current")?)?, &group("memory.stat")?))
    };
    Some(within().map_or(machine, |free| free.min(machine)))
}

fn group(name: &str) -> Option<String> {
    read_to_string(format!("/sys/fs/cgroup/{name}")).ok()
}

/// `max`, which is no limit, has no number.
fn bytes(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// A line of /proc/meminfo, in bytes.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Pages of files that were not used lately count as the container's, but are given up when memory is needed.
fn free_in_group(limit: u64, current: u64, stat: &str) -> u64 {
    let reclaimable = stat.lines().find_map(|line| bytes(line.strip_prefix("inactive_file ")?));
    limit.saturating_sub(current.saturating_sub(reclaimable.unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_linux_writes() {
        let text = "MemTotal:        8038096 kB\nMemFree:          123 kB\nMemAvailable:    4000000 kB\n";
        assert_eq!(meminfo(text, "MemTotal:"), Some(8038096 * 1024));
        assert_eq!(meminfo(text, "MemAvailable:"), Some(4_096_000_000));
        assert_eq!(meminfo(text, "SwapTotal:"), None);
        assert_eq!((bytes("max\n"), bytes("1024\n")), (None, Some(1024)));
        let stat = "anon 600\ninactive_file 100\nactive_file 50\n";
        assert_eq!(free_in_group(1000, 700, stat), 400);
        assert_eq!(free_in_group(1000, 1300, ""), 0);
    }

    #[test]
    fn no_more_is_free_than_there_is() {
        assert!(free().unwrap() <= limit().unwrap());
    }
}
