//! Which records a topic refuses, according to its configuration. Pure.

use std::collections::HashMap;
use std::time::Duration;

/// Milliseconds that our clock and the broker's may differ. Nearer to a bound than this, the broker decides.
const MAX_CLOCK_SKEW_MS: i64 = 5 * 60 * 1000;

/// The part of a topic's configuration that decides which records it accepts and how long it keeps them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TopicRules {
    /// `max.message.bytes`: the largest batch as it is sent, compressed or not. `None`: unknown.
    pub max_bytes: Option<u64>,
    /// `cleanup.policy` has `compact`: a record without a key is refused.
    pub compacted: bool,
    pub timestamps: Timestamps,
    /// `retention.ms`: how long records are kept after their timestamps. `None`: forever or unknown.
    pub retention: Option<Duration>,
}

/// The timestamps that a topic accepts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Timestamps {
    #[default]
    Any,
    /// Any; the broker replaces it by its own (`message.timestamp.type: LogAppendTime`).
    Replaced,
    /// Timestamps at most so many milliseconds before and after the broker's clock.
    Near { before: i64, after: i64 },
}

/// Why a topic will refuse a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the topic is compacted and the record has no key")]
    NoKey,
    #[error(
        "the record's timestamp {0} is further from now than the topic's message.timestamp.before.max.ms or after.max.ms allows; output.timestamp: now avoids this"
    )]
    Timestamp(i64),
}

impl TopicRules {
    /// Reads a topic's configuration, name to value.
    pub fn of(entries: &HashMap<String, String>) -> Self {
        let text = |name: &str| entries.get(name).map(String::as_str);
        let number = |name: &str| text(name).and_then(|value| value.parse::<i64>().ok());
        let policies: Vec<&str> =
            text("cleanup.policy").unwrap_or("delete").split(',').map(str::trim).collect();
        // Before Kafka 3.6 one setting limited both directions.
        let distance = number("message.timestamp.difference.max.ms").unwrap_or(i64::MAX);
        let retention = number("retention.ms").filter(|&ms| ms >= 0 && policies.contains(&"delete"));
        Self {
            max_bytes: number("max.message.bytes").map(|bytes| bytes.max(0) as u64),
            compacted: policies.contains(&"compact"),
            timestamps: match text("message.timestamp.type") {
                Some("LogAppendTime") => Timestamps::Replaced,
                _ => Timestamps::Near {
                    before: number("message.timestamp.before.max.ms").unwrap_or(distance),
                    after: number("message.timestamp.after.max.ms").unwrap_or(distance),
                },
            },
            retention: retention.map(|ms| Duration::from_millis(ms as u64)),
        }
    }

    /// Why the topic will refuse a record, if its key or timestamp is the reason. `timestamp` and `now`: milliseconds
    /// since the Unix epoch.
    pub fn refusal(&self, has_key: bool, timestamp: Option<i64>, now: i64) -> Option<Refusal> {
        if self.compacted && !has_key {
            return Some(Refusal::NoKey);
        }
        let (Timestamps::Near { before, after }, Some(timestamp)) = (self.timestamps, timestamp) else {
            return None;
        };
        let distance = timestamp.saturating_sub(now);
        let far = distance > after.saturating_add(MAX_CLOCK_SKEW_MS)
            || distance < -before.saturating_add(MAX_CLOCK_SKEW_MS);
        far.then_some(Refusal::Timestamp(timestamp))
    }

    /// Whether a batch of `bytes` bytes is too large for the topic; false if its limit is unknown.
    pub fn is_too_large(&self, bytes: u64) -> bool {
        self.max_bytes.is_some_and(|most| bytes > most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(entries: &[(&str, &str)]) -> TopicRules {
        TopicRules::of(&entries.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
    }

    #[test]
    fn keys_are_needed_where_a_topic_is_compacted() {
        for (policy, compacted, kept) in [
            ("delete", false, false),
            ("compact", true, true),
            ("compact,delete", true, false),
            ("delete, compact", true, false),
        ] {
            let rules = rules(&[("cleanup.policy", policy), ("retention.ms", "1000")]);
            assert_eq!(rules.refusal(false, None, 0), compacted.then_some(Refusal::NoKey), "{policy}");
            assert_eq!(rules.refusal(true, None, 0), None);
            assert_eq!(rules.retention.is_none(), kept, "{policy}");
        }
        assert_eq!(rules(&[("retention.ms", "-1")]).retention, None);
    }

    #[test]
    fn timestamps_are_near_the_brokers_clock() {
        let hour = 3_600_000;
        let now = 1_800_000_000_000;
        let new = rules(&[
            ("message.timestamp.before.max.ms", "86400000"),
            ("message.timestamp.after.max.ms", "3600000"),
        ]);
        let refused = |rules: &TopicRules, timestamp| rules.refusal(true, Some(timestamp), now).is_some();
        assert!(!refused(&new, now) && !refused(&new, now + hour) && !refused(&new, now - 24 * hour));
        assert!(!refused(&new, now + hour + MAX_CLOCK_SKEW_MS), "the broker decides");
        assert!(refused(&new, now + 2 * hour) && refused(&new, now - 25 * hour));
        assert!(refused(&new, now * 1000), "microseconds");
        assert!(!refused(&rules(&[]), now * 1000), "no limit is known");
        let old = rules(&[("message.timestamp.difference.max.ms", "3600000")]);
        assert!(refused(&old, now + 2 * hour) && refused(&old, now - 2 * hour));
        assert!(!refused(&rules(&[("message.timestamp.type", "LogAppendTime")]), 1));
        assert_eq!(new.refusal(true, None, now), None);
    }

    #[test]
    fn an_unreadable_limit_refuses_nothing() {
        assert!(rules(&[("max.message.bytes", "100")]).is_too_large(101));
        assert!(!rules(&[("max.message.bytes", "100")]).is_too_large(100));
        assert!(!rules(&[]).is_too_large(u64::MAX));
    }
}
