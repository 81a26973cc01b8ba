//! The ends of partitions that rest: who does not fetch is not told of them. A thread with a client of its
//! own asks, since the one that polls must not wait.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};

use super::client;
use super::range::ASK;
use super::rebalance::{Note, Notes};
use crate::record::Partition;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(2);

/// The offset after the last one, by partition.
pub(super) type Known = HashMap<Partition, i64>;

#[derive(Debug)]
pub(super) struct Ends {
    /// None once there is no thread.
    ask: Option<Sender<Vec<Partition>>>,
    asked: Option<Instant>,
    /// The last answer.
    pub known: Known,
}

impl Ends {
    /// Answers come as [`Note::Ends`]. The thread ends when this does.
    pub fn start(consumer: &Arc<BaseConsumer<Notes>>, config: &ClientConfig) -> std::io::Result<Self> {
        let (ask, asked) = bounded::<Vec<Partition>>(1);
        let (consumer, config) = (Arc::downgrade(consumer), config.clone());
        std::thread::Builder::new().name("kandle-ends".to_owned()).spawn(move || {
            let mut client = None;
            for partitions in asked {
                if client.is_none() {
                    client = client::observer(&config).ok();
                }
                let Some(client) = &client else { continue };
                let ends = partitions.into_iter().filter_map(|partition| {
                    let (_, end) = client.fetch_watermarks(&partition.topic, partition.number, ASK).ok()?;
                    Some((partition, end))
                });
                let ends = ends.collect();
                let Some(consumer) = consumer.upgrade() else { break };
                consumer.context().leave(Note::Ends(ends));
            }
        })?;
        Ok(Self { ask: Some(ask), asked: None, known: Known::new() })
    }

    /// Has the ends of partitions looked up, now and then.
    pub fn look(&mut self, partitions: impl Iterator<Item = Partition>) {
        if self.asked.is_some_and(|at| at.elapsed() < EVERY) {
            return;
        }
        self.asked = Some(Instant::now());
        if let Some(ask) = &self.ask
            && let Err(crossbeam_channel::TrySendError::Disconnected(_)) = ask.try_send(partitions.collect())
        {
            self.ask = None;
        }
    }
}
