//! Temporary topics for a measurement.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;

pub fn client(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    config
}

/// The settings of a job that reads and writes these topics.
pub fn job(brokers: &str, [input, output, dead]: [&str; 3], group: &str) -> Vec<String> {
    vec![
        format!("kafka.brokers={brokers}"),
        format!("input.topics={input}"),
        format!("input.group={group}"),
        format!("output.topic={output}"),
        format!("dead_letters.topic={dead}"),
    ]
}

/// Creates topics for input, predictions and dead letters, runs `measure` on them, and deletes them.
///
/// # Errors
/// The topics cannot be created, or `measure` fails.
pub fn with_topics<T>(
    brokers: &str,
    partitions: i32,
    measure: impl FnOnce(&[String; 3]) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let name = format!("kandle-bench-{}", std::process::id());
    let topics = [format!("{name}-in"), format!("{name}-out"), format!("{name}-dead")];
    let admin: AdminClient<DefaultClientContext> = client(brokers).create()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let new: Vec<NewTopic<'_>> =
        topics.iter().map(|topic| NewTopic::new(topic, partitions, TopicReplication::Fixed(-1))).collect();
    let wait = AdminOptions::new().operation_timeout(Some(Duration::from_secs(30)));
    for made in runtime.block_on(admin.create_topics(&new, &wait))? {
        made.map_err(|(topic, code)| anyhow::anyhow!("topic {topic}: {code}"))?;
    }
    let result = measure(&topics);
    let names: Vec<&str> = topics.iter().map(String::as_str).collect();
    if let Err(error) = runtime.block_on(admin.delete_topics(&names, &wait)) {
        eprintln!("kandle: the topics {name}-* could not be deleted: {error}");
    }
    result
}
