//! Commits, on a thread of their own: a commit's outcome is known only to a call that waits for it
//! (this client posts no event for the asynchronous one), and the thread that polls must not wait.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, unbounded};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::topic_partition_list::TopicPartitionList;

use super::callbacks::{Callbacks, Event};

pub(super) struct Committer {
    /// `None` once closed.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// Since when a commit is under way.
    since: Option<Instant>,
}

enum Job {
    Commit(TopicPartitionList),
    /// The channel is sent to once the offsets are committed, and closed where they cannot be.
    CommitAndTell(TopicPartitionList, Sender<()>),
}

impl Committer {
    /// Outcomes come as [`Event::Committed`].
    pub fn start(consumer: &Arc<BaseConsumer<Callbacks>>) -> std::io::Result<Self> {
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
                        Err(error) => tracing::error!(%error, "the suspects could not be committed"),
                    },
                }
            }
        })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), since: None })
    }

    /// One commit at a time.
    pub fn is_busy(&self) -> bool {
        self.since.is_some()
    }

    /// Only when not busy.
    pub fn commit(&mut self, list: TopicPartitionList) {
        self.since = Some(Instant::now());
        self.send(Job::Commit(list));
    }

    /// `done` is told once the offsets are committed.
    pub fn commit_and_tell(&self, list: TopicPartitionList, done: Sender<()>) {
        self.send(Job::CommitAndTell(list, done));
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // The thread lives as long as this end.
            let _ = jobs.send(job);
        }
    }

    /// The outcome has come; returns how long it took.
    pub fn done(&mut self) -> Option<Duration> {
        Some(self.since.take()?.elapsed())
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.jobs = None;
        // A commit that hangs, because the coordinator is away, is not waited for.
        if !self.is_busy()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}
