//! Transactions, on a thread of their own: librdkafka's calls block, and one of them
//! (`send_offsets_to_transaction`) is known to ignore its timeout. The publisher waits for the
//! answer, serving the producer all the while, but no longer than the coordinator would: a call that
//! does not return is left behind with its producer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use rdkafka::consumer::ConsumerGroupMetadata;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::topic_partition_list::TopicPartitionList;

use super::acks::Reports;

/// Between two looks for the answer.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Between two tries of a call that the coordinator could not take just now.
const RETRY_DELAY: Duration = Duration::from_millis(100);
/// One try of `init_transactions`.
const INIT: Duration = Duration::from_secs(10);

pub(super) enum Call {
    Init,
    SendOffsets(TopicPartitionList, ConsumerGroupMetadata),
    Commit,
    Abort,
}

impl Call {
    fn name(&self) -> &'static str {
        match self {
            Call::Init => "init",
            Call::SendOffsets(..) => "send offsets",
            Call::Commit => "commit",
            Call::Abort => "abort",
        }
    }
}

/// What went wrong, by what is to be done about it.
#[derive(Debug)]
pub(super) enum Broken {
    /// Try again: the coordinator is away.
    Again(String),
    /// Abort the transaction.
    Abort(String),
    /// This producer is no longer of use, though nothing says that another would not be.
    Lost(String),
    /// Another producer with the same transactional.id, or no right to be one.
    Fatal(String),
}

/// The thread; it ends when this is dropped, or later, when its call returns.
pub(super) struct TransactionThread {
    calls: Sender<Call>,
    answers: Receiver<KafkaResult<()>>,
    /// After which the coordinator has given the transaction up.
    timeout: Duration,
}

impl TransactionThread {
    pub fn start(producer: Arc<BaseProducer<Reports>>, timeout: Duration) -> std::io::Result<Self> {
        let (calls, to_make) = bounded::<Call>(1);
        let (answer, answers) = bounded(1);
        std::thread::Builder::new().name("kandle-txn".to_owned()).spawn(move || {
            for call in to_make {
                if answer.send(make(&producer, &call, timeout)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { calls, answers, timeout })
    }

    /// Makes the call and waits for its end; `serve` is what the producer needs meanwhile.
    pub fn call(&self, call: Call, mut serve: impl FnMut()) -> Result<(), Broken> {
        let name = call.name();
        let limit = if matches!(call, Call::Init) { 3 * INIT } else { self.timeout + 2 * RETRY_DELAY };
        let started = Instant::now();
        if self.calls.send(call).is_err() {
            return Err(Broken::Lost(format!("{name}: the thread for transactions has ended")));
        }
        loop {
            match self.answers.recv_timeout(POLL_INTERVAL) {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => return Err(judge(name, &error)),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Broken::Lost(format!("{name}: the thread for transactions has ended")));
                }
                Err(RecvTimeoutError::Timeout) if started.elapsed() > limit => {
                    return Err(Broken::Lost(format!("{name}: no answer within {limit:?}")));
                }
                Err(RecvTimeoutError::Timeout) => serve(),
            }
        }
    }
}

/// Tries again what can be tried again, until the transaction's own time is over.
fn make(producer: &BaseProducer<Reports>, call: &Call, timeout: Duration) -> KafkaResult<()> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let result = match call {
            // The caller says that it waits, and goes on.
            Call::Init => return producer.init_transactions(INIT),
            Call::SendOffsets(offsets, group) => producer.send_offsets_to_transaction(offsets, group, left),
            Call::Commit => producer.commit_transaction(left),
            Call::Abort => producer.abort_transaction(left),
        };
        match result {
            Err(KafkaError::Transaction(error))
                if error.is_retriable() && Instant::now() + RETRY_DELAY < deadline =>
            {
                std::thread::park_timeout(RETRY_DELAY);
            }
            result => return result,
        }
    }
}

fn judge(name: &str, error: &KafkaError) -> Broken {
    let message = format!("{name}: {error}");
    match error {
        KafkaError::Transaction(error) if error.is_fatal() => Broken::Fatal(message),
        KafkaError::Transaction(error) if error.txn_requires_abort() => Broken::Abort(message),
        KafkaError::Transaction(error) if error.is_retriable() => Broken::Again(message),
        // Messages that did not get there in time.
        KafkaError::Flush(_) => Broken::Abort(message),
        _ => Broken::Fatal(message),
    }
}
