//! Transaction calls, on a thread of their own: librdkafka's calls block, and one of them
//! (`send_offsets_to_transaction`) is known to ignore its timeout. The publisher polls the producer while it waits for
//! the result, but waits not much longer than the transaction's timeout: a call that has not returned by then is
//! abandoned together with its producer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use rdkafka::consumer::ConsumerGroupMetadata;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaErrorCode;

use super::acks::Reports;
use crate::kafka::login::Client;

/// How long to wait for the result between two polls of the producer.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Delay before a call that failed with a retriable error is made again.
const RETRY_DELAY: Duration = Duration::from_millis(100);
/// Timeout of one `init_transactions` call.
const INIT_TIMEOUT: Duration = Duration::from_secs(10);

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

/// Errors of a call, by what to do about them.
#[derive(Debug)]
pub(super) enum CallError {
    /// Try again: the coordinator is unavailable.
    Again(String),
    /// Abort the transaction.
    Abort(String),
    /// Replace the producer: its call did not return.
    Lost(String),
    /// No retry can help: for instance, another producer uses the transactional.id, or this user may not use it.
    Fatal(String),
}

/// Handle of the thread. The thread ends when this is dropped, or when its current call returns after that.
pub(super) struct TransactionThread {
    calls: Sender<Call>,
    answers: Receiver<KafkaResult<()>>,
    /// The transaction's timeout, after which the coordinator aborts it.
    timeout: Duration,
}

impl TransactionThread {
    pub fn start(producer: Arc<Client<BaseProducer<Reports>>>, timeout: Duration) -> std::io::Result<Self> {
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

    /// Makes the call and waits for its result. Calls `serve` meanwhile, which polls the producer.
    pub fn call(&self, call: Call, mut serve: impl FnMut()) -> Result<(), CallError> {
        let name = call.name();
        let limit =
            if matches!(call, Call::Init) { 3 * INIT_TIMEOUT } else { self.timeout + 2 * RETRY_DELAY };
        let started = Instant::now();
        if self.calls.send(call).is_err() {
            return Err(CallError::Lost(format!("{name}: the transaction thread has ended")));
        }
        loop {
            match self.answers.recv_timeout(POLL_INTERVAL) {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => return Err(judge(name, &error)),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(CallError::Lost(format!("{name}: the transaction thread has ended")));
                }
                Err(RecvTimeoutError::Timeout) if started.elapsed() > limit => {
                    return Err(CallError::Lost(format!("{name}: no answer within {limit:?}")));
                }
                Err(RecvTimeoutError::Timeout) => serve(),
            }
        }
    }
}

/// Makes a call and retries it on retriable errors until the transaction's timeout.
fn make(producer: &BaseProducer<Reports>, call: &Call, timeout: Duration) -> KafkaResult<()> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let result = match call {
            // The caller logs the error and retries.
            Call::Init => return producer.init_transactions(INIT_TIMEOUT),
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
            // No transaction is open: the abort, or one before it, has succeeded although its call returned an error.
            Err(KafkaError::Transaction(error))
                if matches!(call, Call::Abort)
                    && error.code() == RDKafkaErrorCode::State
                    && error.to_string().contains("in state Ready") =>
            {
                tracing::debug!(%error, "nothing to abort");
                return Ok(());
            }
            result => return result,
        }
    }
}

fn judge(name: &str, error: &KafkaError) -> CallError {
    let message = format!("{name}: {error}");
    match error {
        KafkaError::Transaction(error) if error.is_fatal() => CallError::Fatal(message),
        KafkaError::Transaction(error) if error.txn_requires_abort() => CallError::Abort(message),
        KafkaError::Transaction(error) if error.is_retriable() => CallError::Again(message),
        // Some messages were not delivered in time.
        KafkaError::Flush(_) => CallError::Abort(message),
        _ => CallError::Fatal(message),
    }
}
