//! Queries to the cluster. A thread with clients of its own makes them, because the thread that polls must not wait, or
//! the group would lose the member. Answers arrive as events.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, select_biased, unbounded};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::callbacks::{Callbacks, Event};
use super::damage::{self, Damage};
use super::drain::committed_offsets_of;
use super::start::{Begin, StartOf, start_of};
use crate::flow::ModelVersion;
use crate::kafka::cluster::committed;
use crate::kafka::consumer::{self, Reader};
use crate::kafka::login::Client;
use crate::kafka::metadata::{MadeBy, Metadata, add_offset};
use crate::kafka::native::{self, First, Identity};
use crate::kafka::range::{self, Edge, REQUEST_TIMEOUT, RangeError};
use crate::kafka::topics::TopicFilter;
use crate::record::{Partition, topics_of};
use crate::settings::Start;

/// Delay before the same question is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// Attempts to read at an offset that gives an error.
const ATTEMPTS: usize = 4;
/// Repeated failures are logged at most this often.
const REPEAT: Duration = Duration::from_secs(10);

/// Offsets `from..to` of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OffsetRange {
    pub partition: Partition,
    pub from: i64,
    pub to: i64,
}

/// Result of a check for damaged batches.
#[derive(Debug)]
pub(super) struct DamageReport {
    pub partition: Partition,
    /// The offset as it was asked for; `None`: the log's start.
    pub at: Option<i64>,
    /// Where the check began: at `at`, or at the log's start if that is later.
    pub from: i64,
    pub damage: Damage,
}

/// What an [`OffsetRange`] holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    Records,
    /// No records: only transaction markers, or offsets whose records are deleted.
    Nothing,
    Damaged,
    /// No answer in time.
    Unknown,
}

/// Offsets by partition.
pub(super) type Offsets = HashMap<Partition, i64>;

#[derive(Debug)]
pub(super) enum Question {
    /// Where to begin in assigned partitions. `id`: the assignment; `compare_all`: also return the group's offsets of
    /// all partitions.
    Start { id: u64, partitions: TopicPartitionList, compare_all: bool },
    /// End offsets of the logs.
    Ends(Vec<Partition>),
    /// End offsets of partitions whose position does not move.
    Quiet(Vec<Partition>),
    /// The group's committed offsets.
    Progress(Vec<Partition>),
    /// What the ranges hold.
    Content(Vec<OffsetRange>),
    /// Which topics `input.topics` matches now, and the ids of the named topics.
    Topics(Vec<String>),
    /// Whether the batches at these offsets, or at the starts of the logs, can be read.
    Damage(Vec<(Partition, Option<i64>)>),
    /// Seeks the member to these offsets, or to the starts of the logs. `id`: the seek.
    Seek { id: u64, to: Vec<(Partition, Option<i64>)> },
}

/// Questions that the loop asks periodically, whether or not the last one is answered.
#[derive(Debug, Clone, Copy)]
enum Repeated {
    Ends,
    Quiet,
    Progress,
}

impl Repeated {
    fn of(question: &Question) -> Option<Self> {
        match question {
            Question::Ends(_) => Some(Self::Ends),
            Question::Quiet(_) => Some(Self::Quiet),
            Question::Progress(_) => Some(Self::Progress),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub(super) enum Answer {
    Start(Box<Started>),
    Ends(Offsets),
    Quiet(Offsets),
    Progress(Offsets),
    Content(Vec<(OffsetRange, Content)>),
    /// `None`: the cluster did not answer.
    Topics(Option<Topics>),
    Damage(Vec<DamageReport>),
    /// `failed`: the partitions whose seek failed.
    SeekDone {
        id: u64,
        failed: Vec<Partition>,
    },
}

#[derive(Debug)]
pub(super) struct Started {
    pub id: u64,
    /// The partitions of the assignment, with the offsets to read from.
    pub list: TopicPartitionList,
    pub partitions: Vec<StartOf>,
    /// The group's offsets of all partitions, if they were needed.
    pub all: Option<TopicPartitionList>,
}

#[derive(Debug)]
pub(super) struct Topics {
    /// The topics that the pattern matches now; `None` if `input.topics` is not a pattern.
    pub matching: Option<Vec<String>>,
    pub identities: BTreeMap<String, Identity>,
}

/// Handle of the lookup thread, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Lookup {
    /// Questions that reading waits for: answered first.
    urgent: Sender<Question>,
    questions: Sender<Question>,
    /// Id of the latest assignment; lookups for earlier ones are abandoned.
    assignment: Arc<AtomicU64>,
    closed: Arc<AtomicBool>,
    /// Indexed by [`Repeated`]: a question of that kind is not answered yet.
    open: Arc<[AtomicBool; 3]>,
}

/// Settings of the lookup thread.
pub(super) struct Setup {
    pub config: ClientConfig,
    /// `input.topics`: names, or one pattern.
    pub topics: Vec<String>,
    pub start: Start,
    /// The model's version at the start.
    pub version: ModelVersion,
}

impl Lookup {
    pub fn start(member: &Arc<Client<BaseConsumer<Callbacks>>>, setup: Setup) -> std::io::Result<Self> {
        let (urgent, first) = unbounded();
        let (questions, asked) = unbounded();
        let (assignment, closed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let open = Arc::<[AtomicBool; 3]>::default();
        let thread = Thread {
            open: Arc::clone(&open),
            member: Arc::downgrade(member),
            setup,
            assignment: Arc::clone(&assignment),
            closed: Arc::clone(&closed),
            prober: None,
            offset_reader: None,
            last_warning: None,
        };
        std::thread::Builder::new()
            .name("kandle-lookup".to_owned())
            .spawn(move || thread.serve(&first, &asked))?;
        Ok(Self { urgent, questions, assignment, closed, open })
    }

    /// Queues a question. A [`Repeated`] one is dropped while another of its kind is not answered.
    pub fn ask(&self, question: Question) {
        if let Some(kind) = Repeated::of(&question)
            && self.open[kind as usize].swap(true, Ordering::Relaxed)
        {
            return;
        }
        if let Question::Start { id, .. } = &question {
            self.assignment.store(*id, Ordering::Relaxed);
        }
        let queue = match &question {
            Question::Start { .. } | Question::Topics(_) | Question::Seek { .. } => &self.urgent,
            Question::Ends(_)
            | Question::Quiet(_)
            | Question::Progress(_)
            | Question::Content(_)
            | Question::Damage(_) => &self.questions,
        };
        // Fails only if the thread has ended because the consumer is gone.
        let _ = queue.send(question);
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

struct Thread {
    member: Weak<Client<BaseConsumer<Callbacks>>>,
    setup: Setup,
    assignment: Arc<AtomicU64>,
    closed: Arc<AtomicBool>,
    open: Arc<[AtomicBool; 3]>,
    prober: Option<Reader>,
    offset_reader: Option<Reader>,
    /// The last failure that was logged, and when.
    last_warning: Option<(String, Instant)>,
}

impl Thread {
    fn serve(mut self, urgent: &Receiver<Question>, questions: &Receiver<Question>) {
        loop {
            let question = select_biased! {
                recv(urgent) -> question => question,
                recv(questions) -> question => question,
            };
            let Ok(question) = question else { return };
            if self.closed.load(Ordering::Relaxed) {
                return;
            }
            let kind = Repeated::of(&question);
            let answer = self.answer(question);
            if let Some(kind) = kind {
                self.open[kind as usize].store(false, Ordering::Relaxed);
            }
            let Some(answer) = answer else { continue };
            let Some(member) = self.member.upgrade() else { return };
            member.context().queue(Event::Answer(answer));
        }
    }

    fn answer(&mut self, question: Question) -> Option<Answer> {
        Some(match question {
            Question::Start { id, partitions, compare_all } => {
                Answer::Start(Box::new(self.begin(id, &partitions, compare_all)?))
            }
            Question::Ends(partitions) => Answer::Ends(self.edges(&partitions, Edge::End)),
            Question::Quiet(partitions) => Answer::Quiet(self.edges(&partitions, Edge::End)),
            Question::Progress(partitions) => match self.progress(&partitions) {
                Ok(offsets) => Answer::Progress(offsets),
                Err(error) => {
                    self.warn_once("committed offsets of the group", &error);
                    Answer::Progress(Offsets::new())
                }
            },
            Question::Content(ranges) => Answer::Content(self.contents(ranges)),
            Question::Topics(owned) => match self.topics(&owned) {
                Ok(topics) => Answer::Topics(Some(topics)),
                Err(error) => {
                    self.warn_once("topics", &error);
                    Answer::Topics(None)
                }
            },
            Question::Damage(places) => {
                let find = |(partition, at): (Partition, Option<i64>)| self.damage(partition, at);
                Answer::Damage(places.into_iter().map(find).collect())
            }
            Question::Seek { id, to } => Answer::SeekDone { id, failed: self.seek(to) },
        })
    }

    fn warn_once(&mut self, what: &str, error: &dyn std::fmt::Display) {
        let message = format!("{what}: {error}");
        let again =
            self.last_warning.as_ref().is_some_and(|(last, at)| *last == message && at.elapsed() < REPEAT);
        if !again {
            tracing::warn!(what, %error, "a query to the cluster failed: retrying");
            self.last_warning = Some((message, Instant::now()));
        }
    }

    fn prober(&mut self) -> Result<&Reader, KafkaError> {
        match &mut self.prober {
            Some(prober) => Ok(prober),
            none => Ok(none.insert(consumer::prober(&self.setup.config)?)),
        }
    }

    fn offset_reader(&mut self) -> Result<&Reader, KafkaError> {
        match &mut self.offset_reader {
            Some(offset_reader) => Ok(offset_reader),
            none => Ok(none.insert(consumer::offset_reader(&self.setup.config)?)),
        }
    }

    /// `None` if a newer assignment has replaced this one.
    fn begin(&mut self, id: u64, partitions: &TopicPartitionList, compare_all: bool) -> Option<Started> {
        loop {
            match self.try_begin(id, partitions, compare_all) {
                Ok(Some(started)) => return Some(started),
                Ok(None) => {}
                Err(error) => self.warn_once("start offsets of an assignment", &error),
            }
            let void = self.assignment.load(Ordering::Relaxed) != id || self.closed.load(Ordering::Relaxed);
            if void || self.member.strong_count() == 0 {
                return None;
            }
            std::thread::park_timeout(RETRY);
        }
    }

    /// `None` if another member still has to commit where the group begins.
    fn try_begin(
        &mut self,
        id: u64,
        partitions: &TopicPartitionList,
        compare_all: bool,
    ) -> Result<Option<Started>, RangeError> {
        let list = committed(self.prober()?, partitions, REQUEST_TIMEOUT)?;
        let mut names: Vec<String> = list.elements().iter().map(|e| e.topic().to_owned()).collect();
        names.sort();
        names.dedup();
        let identities = native::identities(self.prober()?, &names, REQUEST_TIMEOUT)?;
        let lacks = list.elements().iter().any(|element| !matches!(element.offset(), Offset::Offset(_)));
        let latest = lacks && self.setup.start == Start::Latest;
        let mut all = None;
        let mut first_start = None;
        if compare_all || latest {
            let found = self.partitions()?;
            let known = committed(self.prober()?, &range::list_of(&found), REQUEST_TIMEOUT)?;
            if latest {
                let none = !known.elements().iter().any(|e| matches!(e.offset(), Offset::Offset(_)));
                // One member, the owner of the first partition, commits where the group begins in all partitions, so
                // that no member skips records that another one is to read.
                let ours = found
                    .first()
                    .is_some_and(|first| list.find_partition(&first.topic, first.number).is_some());
                match (none, ours) {
                    (true, true) => first_start = Some(self.commit_ends(&found)?),
                    (true, false) => return Ok(None),
                    (false, _) => {}
                }
            }
            all = Some(known);
        }
        let partitions: Vec<StartOf> = list
            .elements()
            .iter()
            .map(|element| {
                let since = || all.as_ref()?.find_partition(element.topic(), element.partition());
                let offset = match element.offset() {
                    Offset::Offset(offset) => Some(offset),
                    _ => match (&first_start, since().map(|element| element.offset())) {
                        (Some(ends), _) => {
                            ends.get(&Partition::new(element.topic(), element.partition())).copied()
                        }
                        // Another member has committed it since `list` was read.
                        (None, Some(Offset::Offset(offset))) => Some(offset),
                        (None, _) => None,
                    },
                };
                start_of(element, offset, &identities)
            })
            .collect();
        // As numbers: the client may have cached where the log of an earlier topic began.
        let new = partitions.iter().filter(|start| !matches!(start.begin, Begin::At(_)));
        let log_starts = self.log_starts(new.map(|start| &start.partition))?;
        for start in &partitions {
            let element = list.find_partition(&start.partition.topic, start.partition.number);
            if let Some(mut element) = element {
                let offset = match start.begin {
                    Begin::At(offset) => offset,
                    Begin::LogStart | Begin::Recreated { .. } => log_starts[&start.partition],
                };
                element.set_offset(Offset::Offset(offset))?;
            }
        }
        Ok(Some(Started { id, list, partitions, all }))
    }

    /// Commits the end offsets of all partitions, at which the group begins.
    fn commit_ends(&mut self, partitions: &[Partition]) -> Result<Offsets, RangeError> {
        let names = topics_of(partitions.iter());
        let identities = native::identities(self.prober()?, &names, REQUEST_TIMEOUT)?;
        let mut ends = Offsets::new();
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for (partition, end) in range::all_edges(self.prober()?, partitions, Edge::End)? {
            let id = identities.get(&*partition.topic).and_then(Identity::id).cloned();
            let made_by = MadeBy { version: self.setup.version.clone(), since: None };
            let metadata = Metadata::new(made_by, id, &Default::default());
            add_offset(&mut list, &partition, end, &metadata.text())?;
            ends.insert(partition, end);
        }
        if let Some(member) = self.member.upgrade() {
            member.commit(&list, CommitMode::Sync)?;
            tracing::info!(
                partitions = partitions.len(),
                "the group has no offsets: starting at the end of all partitions (input.start: latest)"
            );
        }
        Ok(ends)
    }

    /// All partitions of the input topics.
    fn partitions(&mut self) -> Result<Vec<Partition>, RangeError> {
        let topics = self.setup.topics.clone();
        let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
        range::partitions(self.prober()?, &topics)
    }

    /// Start or end offsets of the logs, without the partitions whose query failed.
    fn edges<'a>(&mut self, partitions: impl IntoIterator<Item = &'a Partition>, edge: Edge) -> Offsets {
        let answer = self.prober().and_then(|prober| range::edges(prober, partitions, edge));
        let (offsets, failed) = match answer {
            Ok(answer) => answer,
            Err(error) => (Offsets::new(), Some(error)),
        };
        if let Some(error) = failed {
            self.warn_once("start or end offsets of logs", &error);
        }
        offsets
    }

    /// Start offsets of the logs, of all these partitions or none.
    fn log_starts<'a>(
        &mut self,
        partitions: impl IntoIterator<Item = &'a Partition>,
    ) -> Result<Offsets, KafkaError> {
        range::all_edges(self.prober()?, partitions, Edge::Start)
    }

    /// Start and end offset of a log. Not retried, because other questions wait.
    fn watermarks(&mut self, partition: &Partition) -> Result<(i64, i64), KafkaError> {
        self.prober()?.fetch_watermarks(&partition.topic, partition.number, REQUEST_TIMEOUT)
    }

    fn progress(&mut self, partitions: &[Partition]) -> Result<Offsets, KafkaError> {
        committed_offsets_of(self.offset_reader()?, partitions.iter())
    }

    /// What a fetch at an offset finds first.
    fn first(&mut self, partition: &Partition, from: i64) -> First {
        let mut first = self.look(partition, from);
        for _ in 1..ATTEMPTS {
            // The error may belong to the read before: after a failed checksum librdkafka reports errors late.
            if !matches!(first, First::Error(_)) {
                break;
            }
            first = self.look(partition, from);
        }
        tracing::debug!(%partition, from, ?first, "looked up the content of a partition");
        first
    }

    fn look(&mut self, partition: &Partition, from: i64) -> First {
        let mut list = TopicPartitionList::new();
        let first = self.prober().and_then(|prober| {
            list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(from))?;
            prober.assign(&list)?;
            let first = native::first(prober, REQUEST_TIMEOUT);
            prober.unassign()?;
            Ok(first)
        });
        first.unwrap_or_else(|error| {
            self.warn_once(&format!("content of {partition}"), &error);
            First::TimedOut
        })
    }

    fn contents(&mut self, ranges: Vec<OffsetRange>) -> Vec<(OffsetRange, Content)> {
        let starts = self.edges(ranges.iter().map(|range| &range.partition), Edge::Start);
        let content = |range: OffsetRange| {
            let start = starts.get(&range.partition);
            let content = start.map_or(Content::Unknown, |&start| self.content(&range, start));
            (range, content)
        };
        ranges.into_iter().map(content).collect()
    }

    /// `start`: the log's start offset.
    fn content(&mut self, range: &OffsetRange, start: i64) -> Content {
        // Retention has deleted the whole range.
        if start >= range.to {
            return Content::Nothing;
        }
        match self.first(&range.partition, range.from.max(start)) {
            First::Record(offset) if offset < range.to => Content::Records,
            First::Record(_) | First::End => Content::Nothing,
            First::Damaged(_) => Content::Damaged,
            First::TimedOut | First::Error(_) => Content::Unknown,
        }
    }

    fn topics(&mut self, owned: &[String]) -> Result<Topics, RangeError> {
        let filter = TopicFilter::new(&self.setup.topics)?;
        let matching = match filter.names() {
            Some(_) => None,
            None => {
                let metadata = self.prober()?.fetch_metadata(None, REQUEST_TIMEOUT)?;
                let found = metadata.topics().iter().filter(|topic| filter.holds(topic.name()));
                let mut names: Vec<String> = found.map(|topic| topic.name().to_owned()).collect();
                names.sort();
                Some(names)
            }
        };
        let identities = native::identities(self.prober()?, owned, REQUEST_TIMEOUT)?;
        Ok(Topics { matching, identities })
    }

    fn damage(&mut self, partition: Partition, at: Option<i64>) -> DamageReport {
        match self.watermarks(&partition) {
            Ok((low, end)) => {
                let from = at.unwrap_or(low).max(low);
                let damage = damage::extent(from, end, |offset| self.first(&partition, offset));
                DamageReport { partition, at, from, damage }
            }
            Err(error) => {
                self.warn_once(&format!("start and end offset of {partition}"), &error);
                DamageReport { partition, at, from: at.unwrap_or(0), damage: Damage::Unknown }
            }
        }
    }

    fn seek(&mut self, to: Vec<(Partition, Option<i64>)>) -> Vec<Partition> {
        let all = || to.iter().map(|(partition, _)| partition.clone()).collect();
        let mut list = TopicPartitionList::with_capacity(to.len());
        // As numbers: the client may have cached where the log of an earlier topic began.
        let new = to.iter().filter(|(_, offset)| offset.is_none());
        let starts = match self.log_starts(new.map(|(partition, _)| partition)) {
            Ok(starts) => starts,
            Err(error) => {
                self.warn_once("start offsets of logs", &error);
                return all();
            }
        };
        for (partition, offset) in &to {
            let offset = offset.unwrap_or_else(|| starts[partition]);
            if list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(offset)).is_err()
            {
                return all();
            }
        }
        let Some(member) = self.member.upgrade() else { return Vec::new() };
        match member.seek_partitions(list, REQUEST_TIMEOUT) {
            Ok(list) => {
                let failed = list.elements().into_iter().filter(|element| element.error().is_err());
                failed.map(|element| Partition::new(element.topic(), element.partition())).collect()
            }
            Err(error) => {
                drop(member);
                self.warn_once("seek", &error);
                all()
            }
        }
    }
}
