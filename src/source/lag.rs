//! The lag metrics and the source's part of /status, updated once a second from the client's
//! statistics and the ledger.

use std::collections::{HashMap, HashSet};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rdkafka::statistics::{Partition as PartitionStatistics, Statistics};
use serde_json::{Value, json};

use super::drain::Drain;
use super::ledger::{Ledger, PartitionState};
use super::lookup::Offsets;
use crate::record::Partition;
use crate::telemetry::Metrics;

/// Weight of the newest second in the moving average of the rate.
const NEWEST: f64 = 0.3;

#[derive(Debug)]
pub(super) struct Lag {
    /// Partitions that have lag metrics.
    shown: HashSet<Partition>,
    /// Records published since the start.
    pub published: u64,
    last: Option<(Instant, u64)>,
    /// Records per second.
    rate: f64,
    /// When a partition of which nothing is read was first seen to lag, in seconds since the epoch.
    since: HashMap<Partition, f64>,
}

impl Lag {
    pub fn new() -> Self {
        Self { shown: HashSet::new(), published: 0, last: None, rate: 0.0, since: HashMap::new() }
    }

    /// Updates the metrics. Returns the JSON for /status, and the seconds that the backlog takes at the
    /// present rate.
    pub fn update(
        &mut self,
        statistics: &Statistics,
        ledger: &Ledger,
        drain: Option<&Drain>,
        ends: &Offsets,
        metrics: &Metrics,
    ) -> (Value, f64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let mut total = 0;
        let mut prefetched = 0;
        let mut partitions = Vec::new();
        let mut seen = HashSet::new();
        for owned in ledger.iter() {
            let Partition { topic, number } = &owned.partition;
            let Some(known) = of_partition(statistics, &owned.partition) else { continue };
            prefetched += known.fetchq_size;
            let bound = drain.map(|drain| drain.end(&owned.partition));
            let end = known.hi_offset.max(ends.get(&owned.partition).copied().unwrap_or(-1));
            let (records, mut seconds) = behind(owned, known, end.min(bound.unwrap_or(i64::MAX)), now);
            if records > 0 && owned.oldest().is_none() {
                // Unread records have no known timestamp: the time since the lag was first seen is a lower bound.
                let since = *self.since.entry(owned.partition.clone()).or_insert(now);
                seconds = (now - since).max(0.0);
            } else {
                self.since.remove(&owned.partition);
            }
            let labels = [&**topic, &number.to_string()];
            metrics.lag_records.with_label_values(&labels).set(records);
            metrics.lag_seconds.with_label_values(&labels).set(seconds);
            total += records;
            seen.insert(owned.partition.clone());
            partitions.push(json!({
                "topic": &**topic, "partition": number,
                "published": owned.published.or(owned.start), "committed": owned.committed,
                "end": Some(end).filter(|&o| o >= 0),
                "lag_records": records, "lag_seconds": seconds,
                "windows_in_flight": owned.windows_in_flight(),
                // librdkafka's fetch state (`active` while it fetches) and the offset that it fetches next.
                "fetch_state": known.fetch_state, "fetch_offset": known.next_offset,
            }));
        }
        for gone in self.shown.difference(&seen) {
            forget(gone, metrics);
        }
        self.shown = seen;
        metrics.memory.with_label_values(&["prefetched"]).set(prefetched as i64);
        self.tick(Instant::now());
        let remaining = match (total, self.rate) {
            (0, _) => 0.0,
            (_, rate) if rate > 0.01 => total as f64 / rate,
            _ => f64::INFINITY,
        };
        metrics.drain_remaining.set(remaining);
        partitions.sort_by_key(|p| (p["topic"].to_string(), p["partition"].as_i64()));
        let rate = (self.rate * 10.0).round() / 10.0;
        (json!({ "assignment": partitions, "lag_records": total, "records_per_second": rate }), remaining)
    }

    /// Removes the metrics of a partition that is no longer ours: the new owner reports its lag.
    pub fn forget(&mut self, partition: &Partition, metrics: &Metrics) {
        self.shown.remove(partition);
        self.since.remove(partition);
        forget(partition, metrics);
    }

    fn tick(&mut self, now: Instant) {
        if let Some((then, before)) = self.last {
            let seconds = (now - then).as_secs_f64().max(1e-3);
            let rate = (self.published - before) as f64 / seconds;
            self.rate += NEWEST * (rate - self.rate);
        }
        self.last = Some((now, self.published));
    }
}

/// The client's statistics of a partition.
pub(super) fn of_partition<'a>(
    statistics: &'a Statistics,
    partition: &Partition,
) -> Option<&'a PartitionStatistics> {
    statistics.topics.get(&*partition.topic)?.partitions.get(&partition.number)
}

fn forget(partition: &Partition, metrics: &Metrics) {
    let labels = [&*partition.topic, &partition.number.to_string()];
    // An error means that they were never set.
    let _ = metrics.lag_records.remove_label_values(&labels);
    let _ = metrics.lag_seconds.remove_label_values(&labels);
}

/// Lag of a partition in records and seconds. `end`: its end offset, -1 if not known yet; `now`: seconds since
/// the epoch.
fn behind(owned: &PartitionState, known: &PartitionStatistics, end: i64, now: f64) -> (i64, f64) {
    if end < 0 {
        return (0, 0.0);
    }
    // Everything read is published and the fetcher is at the end: only transaction markers or compacted
    // offsets can lie between.
    if owned.is_idle() && known.next_offset >= end && known.fetchq_cnt == 0 {
        return (0, 0.0);
    }
    let next = owned.published.or(owned.start).unwrap_or_else(|| known.lo_offset.max(0));
    let records = (end - next).max(0);
    let seconds = match owned.oldest() {
        Some(timestamp) if records > 0 => (now - timestamp as f64 / 1000.0).max(0.0),
        _ => 0.0,
    };
    (records, seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(next: i64, end: i64, queued: i64) -> PartitionStatistics {
        PartitionStatistics {
            next_offset: next,
            hi_offset: end,
            fetchq_cnt: queued,
            lo_offset: 0,
            ..Default::default()
        }
    }

    #[test]
    fn an_idle_partition_is_not_behind() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        let lease = ledger.assign(p.clone(), Some(4));
        assert_eq!(
            behind(ledger.get(&p).unwrap(), &known(10, 10, 0), 10, 100.0),
            (0, 0.0),
            "markers at the end"
        );
        assert_eq!(behind(ledger.get(&p).unwrap(), &known(10, 10, 6), 10, 100.0).0, 6, "prefetched");
        assert_eq!(behind(ledger.get(&p).unwrap(), &known(10, 10, 6), 7, 100.0).0, 3, "a drain's end");
        assert_eq!(
            behind(ledger.get(&p).unwrap(), &known(-1001, -1001, 0), -1001, 100.0),
            (0, 0.0),
            "unknown"
        );
        let span = crate::window::Span {
            partition: p.clone(),
            lease,
            first: 4,
            last: 9,
            metadata: Default::default(),
        };
        for offset in 4..=9 {
            ledger.get_mut(&p).unwrap().read(offset, Some(90_000));
        }
        ledger.gathered(std::slice::from_ref(&span));
        assert_eq!(behind(ledger.get(&p).unwrap(), &known(10, 10, 0), 10, 100.0), (6, 10.0));
        ledger.published(&[span], false);
        assert_eq!(behind(ledger.get(&p).unwrap(), &known(10, 10, 0), 10, 100.0), (0, 0.0));
    }
}
