//! Commits offsets, on a thread of its own: only a synchronous commit returns its outcome (this client posts no event
//! for an asynchronous one), and the thread that polls must not wait.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, unbounded};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::topic_partition_list::TopicPartitionList;

use super::callbacks::{Callbacks, Event};
use crate::kafka::login::Client;

pub(super) struct Committer {
    /// Jobs for the thread; `None` once closed.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// When the commit in flight started.
    since: Option<Instant>,
}

enum Job {
    Commit(TopicPartitionList),
    /// Signals the channel once the offsets are committed, or closes it if the commit fails.
    CommitAndTell(TopicPartitionList, Sender<()>),
}

impl Committer {
    /// Starts the thread. Outcomes arrive as [`Event::Committed`].
    pub fn start(consumer: &Arc<Client<BaseConsumer<Callbacks>>>) -> std::io::Result<Self> {
        let (jobs, todo) = unbounded();
        let consumer = Arc::clone(consumer);
        let thread = std::thread::Builder::new().name("kandle-commit".to_owned()).spawn(move || {
            for job in todo {
                match job {
                    Job::Commit(list) => {
                        let result = consumer.commit(&list, CommitMode::Sync);
                        consumer.context().queue(Event::Committed(result, list));
                    }
                    Job::CommitAndTell(list, done) => match consumer.commit(&list, CommitMode::Sync) {
                        Ok(()) => drop(done.send(())),
                        Err(error) => tracing::error!(
                            %error,
                            "records on which inference timed out could not be saved in the commit metadata: \
                             the next start will not run them alone"
                        ),
                    },
                }
            }
        })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), since: None })
    }

    /// A commit is in flight; only one is at a time.
    pub fn is_busy(&self) -> bool {
        self.since.is_some()
    }

    /// Starts a commit. Call it only when not busy.
    pub fn commit(&mut self, list: TopicPartitionList) {
        self.since = Some(Instant::now());
        self.send(Job::Commit(list));
    }

    /// Starts a commit and signals `done` once it succeeds.
    pub fn commit_and_tell(&self, list: TopicPartitionList, done: Sender<()>) {
        self.send(Job::CommitAndTell(list, done));
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // Cannot fail: the thread lives as long as this sender.
            let _ = jobs.send(job);
        }
    }

    /// Marks the commit in flight as finished, and returns how long it took.
    pub fn done(&mut self) -> Option<Duration> {
        Some(self.since.take()?.elapsed())
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.jobs = None;
        // A commit in flight may hang because the coordinator is unreachable: do not wait for it.
        if !self.is_busy()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}
