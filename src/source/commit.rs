//! Commits, on a thread of their own: a commit's outcome is known only to a call that waits for it
//! (this client posts no event for the asynchronous one), and the thread that polls must not wait.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::topic_partition_list::TopicPartitionList;

use super::rebalance::{Note, Notes};

pub(super) struct Committer {
    /// `None` once closed.
    offsets: Option<Sender<TopicPartitionList>>,
    thread: Option<JoinHandle<()>>,
    /// Since when a commit is under way.
    since: Option<Instant>,
}

impl Committer {
    /// Outcomes come as [`Note::Committed`].
    pub fn start(consumer: &Arc<BaseConsumer<Notes>>) -> std::io::Result<Self> {
        let (offsets, lists) = bounded::<TopicPartitionList>(1);
        let consumer = Arc::clone(consumer);
        let thread = std::thread::Builder::new().name("kandle-commit".to_owned()).spawn(move || {
            for list in lists {
                let result = consumer.commit(&list, CommitMode::Sync);
                consumer.context().leave(Note::Committed(result, list));
            }
        })?;
        Ok(Self { offsets: Some(offsets), thread: Some(thread), since: None })
    }

    /// One commit at a time.
    pub fn is_busy(&self) -> bool {
        self.since.is_some()
    }

    /// Only when not busy.
    pub fn commit(&mut self, list: TopicPartitionList) {
        self.since = Some(Instant::now());
        if let Some(offsets) = &self.offsets {
            // The thread takes one at a time and lives as long as this end.
            let _ = offsets.send(list);
        }
    }

    /// The outcome has come; returns how long it took.
    pub fn done(&mut self) -> Option<Duration> {
        Some(self.since.take()?.elapsed())
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.offsets = None;
        // A commit that hangs, because the coordinator is away, is not waited for.
        if !self.is_busy()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}
