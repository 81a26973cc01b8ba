//! Warns if retention would soon delete what is published: a prediction has its record's timestamp, and retention goes
//! by timestamps.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use rdkafka::consumer::{BaseConsumer, ConsumerContext};
use rdkafka::error::KafkaError;

use super::cluster::Topics;
use super::range::{self, Range};
use super::topic_rules::{Timestamps, TopicRules};
use crate::record::Partition;
use crate::settings::{OutputTimestamp, Settings};

/// The oldest timestamp of the first records of these ranges: `(from, end)`, `end` exclusive.
fn oldest<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    places: &BTreeMap<Partition, (i64, i64)>,
) -> Result<Option<Timestamp>, KafkaError> {
    let mut oldest = None;
    for (partition, (from, end)) in places {
        if from < end
            && let Some(first) = range::timestamp_at(consumer, partition, *from)?
        {
            oldest = Some(oldest.map_or(first, |oldest: Timestamp| oldest.min(first)));
        }
    }
    Ok(oldest)
}

/// Warnings about the records still to be processed: those of `ranges` from the group's offsets (`committed`) on.
///
/// # Errors
/// The cluster does not answer.
pub fn warnings<C: ConsumerContext>(
    settings: &Settings,
    topics: &Topics,
    consumer: &BaseConsumer<C>,
    ranges: &BTreeMap<Partition, Range>,
    committed: &HashMap<Partition, i64>,
) -> Result<Vec<String>, KafkaError> {
    let place = |(partition, range): (&Partition, &Range)| {
        let from = committed.get(partition).map_or(range.from, |&at| at.max(range.from));
        (partition.clone(), (from, range.to))
    };
    let oldest = oldest(consumer, &ranges.iter().map(place).collect())?;
    Ok(oldest.map_or_else(Vec::new, |oldest| warnings_of(settings, topics, oldest, Timestamp::now())))
}

fn warnings_of(settings: &Settings, topics: &Topics, oldest: Timestamp, now: Timestamp) -> Vec<String> {
    if settings.output.timestamp == OutputTimestamp::Now {
        return Vec::new();
    }
    let written = [
        (&settings.output.topic, &topics.output.rules),
        (&settings.dead_letters.topic, &topics.dead_letters.rules),
    ];
    let samples = settings.samples.topic.as_ref().zip(topics.samples.as_ref().map(|topic| &topic.rules));
    written
        .into_iter()
        .chain(samples)
        .filter_map(|(topic, rules)| warning(topic, rules, oldest, now))
        .collect()
}

fn warning(topic: &str, rules: &TopicRules, oldest: Timestamp, now: Timestamp) -> Option<String> {
    let retention = rules.retention?;
    let age = now.as_millisecond().saturating_sub(oldest.as_millisecond());
    let too_old =
        rules.timestamps != Timestamps::Replaced && u128::try_from(age).ok()? > retention.as_millis();
    too_old.then(|| {
        format!(
            "topic {topic} keeps records for {}, and the oldest record to process is from {oldest}: what is \
             published for it would soon be deleted; raise retention.ms, or set output.timestamp: now",
            humantime::format_duration(retention)
        )
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn warns_of_records_older_than_the_topics_retention() {
        let rules = |retention, timestamps| TopicRules { retention, timestamps, ..TopicRules::default() };
        let days = |days: u64| Duration::from_secs(days * 86400);
        let now: Timestamp = "2026-11-26T00:00:00Z".parse().unwrap();
        let then: Timestamp = "2026-10-26T00:00:00Z".parse().unwrap();
        let week = rules(Some(days(7)), Timestamps::Any);
        let said = warning("out", &week, then, now).unwrap();
        assert!(said.contains("topic out keeps records for 7days") && said.contains("2026-10-26"), "{said}");
        assert_eq!(warning("out", &week, now, now), None);
        assert_eq!(warning("out", &rules(Some(days(40)), Timestamps::Any), then, now), None);
        assert_eq!(warning("out", &rules(None, Timestamps::Any), then, now), None);
        assert_eq!(warning("out", &rules(Some(days(7)), Timestamps::Replaced), then, now), None);
        assert_eq!(warning("out", &week, "2027-01-01T00:00:00Z".parse().unwrap(), now), None, "the future");
    }
}
