//! After a batch was refused: decides which records are to blame, or how to split the batch to find out. Pure.
//!
//! The broker refuses a batch as a whole. It names invalid records (`InvalidRecord`, `InvalidTimestamp`); librdkafka
//! reports the rest of the batch as neighbours (`InvalidDifferentRecord`). With other errors all records of the batch
//! fail alike: they are sent again in two halves, until one is refused alone.

use rdkafka::types::RDKafkaErrorCode;

use super::acks::{Failure, Ticket};

/// What a failed delivery says about its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The broker refused this record or another one of its batch.
    Refused,
    /// Another record of the batch is invalid; this one is not.
    Neighbour,
    /// No record can be published: a permission or a topic is missing.
    Unpublishable,
    /// The record is not to blame and may be delivered later: the producer has failed, or a request timed out.
    Transient,
}

impl Meaning {
    pub fn of(code: RDKafkaErrorCode) -> Self {
        use RDKafkaErrorCode::*;
        match code {
            InvalidDifferentRecord => Self::Neighbour,
            TopicAuthorizationFailed
            | ClusterAuthorizationFailed
            | TransactionalIdAuthorizationFailed
            | UnknownTopic
            | UnknownTopicOrPartition
            | UnknownPartition
            | InvalidTopic => Self::Unpublishable,
            // Errors of the producer, not of the record; the producer reports them itself as well.
            OutOfOrderSequenceNumber
            | DuplicateSequenceNumber
            | UnknownProducerId
            | InvalidProducerEpoch
            | ProducerFenced
            | InvalidTransactionalState => Self::Transient,
            // librdkafka's own codes are below -100.
            code if (code as i32) < -100 => Self::Transient,
            RequestTimedOut
            | NotEnoughReplicas
            | NotEnoughReplicasAfterAppend
            | LeaderNotAvailable
            | NotLeaderForPartition
            | BrokerNotAvailable
            | NetworkException => Self::Transient,
            _ => Self::Refused,
        }
    }
}

/// What to do about a group of records of which some were refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// These records are to blame.
    Blame(Vec<Failure>),
    /// Send these groups one by one, in this order.
    Split(Vec<Vec<Ticket>>),
}

/// Decides what to do about a refused group. `group`: the records that were sent and are not published, in order;
/// `failures`: the failed deliveries reported for them.
pub(super) fn judge(group: &[Ticket], failures: &[Failure]) -> Verdict {
    let of = |meaning: Meaning| failures.iter().filter(move |failure| Meaning::of(failure.code) == meaning);
    let mut refused: Vec<&Failure> = of(Meaning::Refused).collect();
    let named = |failure: &&Failure| {
        matches!(failure.code, RDKafkaErrorCode::InvalidRecord | RDKafkaErrorCode::InvalidTimestamp)
    };
    if of(Meaning::Neighbour).next().is_some() && refused.iter().any(named) {
        return Verdict::Blame(refused.into_iter().filter(named).cloned().collect());
    }
    if let [one] = refused[..] {
        return Verdict::Blame(vec![one.clone()]);
    }
    refused.sort_by_key(|failure| failure.ticket);
    let at = |failure: &&Failure| group.iter().position(|ticket| *ticket == failure.ticket);
    // Records before the first refused one are not suspect. The suspects are split into two halves.
    let mut cuts: Vec<usize> =
        [refused.first(), refused.get(refused.len() / 2)].into_iter().flatten().filter_map(at).collect();
    if cuts.is_empty() {
        // No refused record was reported: split the whole group into halves.
        cuts.push(group.len() / 2);
    }
    let mut groups = Vec::new();
    let mut start = 0;
    for cut in cuts.into_iter().chain([group.len()]) {
        if start < cut {
            groups.push(group[start..cut].to_vec());
        }
        start = cut;
    }
    Verdict::Split(groups)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tickets(places: impl IntoIterator<Item = usize>) -> Vec<Ticket> {
        places.into_iter().map(|place| Ticket::new(1, place)).collect()
    }

    fn failure(place: usize, code: RDKafkaErrorCode) -> Failure {
        Failure { ticket: Ticket::new(1, place), code, reason: String::new() }
    }

    use RDKafkaErrorCode::{
        InvalidDifferentRecord, InvalidRecord, InvalidTimestamp, MessageSizeTooLarge, PurgeQueue,
    };

    #[test]
    fn only_the_records_that_the_broker_names_are_to_blame() {
        let failures = [
            failure(3, InvalidDifferentRecord),
            failure(4, InvalidTimestamp),
            failure(5, InvalidDifferentRecord),
            failure(8, MessageSizeTooLarge),
            failure(9, PurgeQueue),
        ];
        let verdict = judge(&tickets(0..10), &failures);
        assert_eq!(verdict, Verdict::Blame(vec![failure(4, InvalidTimestamp)]));
    }

    #[test]
    fn a_record_refused_alone_is_to_blame() {
        let failures = [failure(4, MessageSizeTooLarge), failure(5, PurgeQueue)];
        assert_eq!(judge(&tickets(0..10), &failures), Verdict::Blame(vec![failures[0].clone()]));
    }

    #[test]
    fn suspects_are_halved_and_the_order_kept() {
        let failures: Vec<Failure> = (4..8).map(|place| failure(place, MessageSizeTooLarge)).collect();
        let groups = [tickets(0..4), tickets(4..6), tickets(6..10)];
        assert_eq!(judge(&tickets(0..10), &failures), Verdict::Split(groups.to_vec()));
    }

    #[test]
    fn missing_permissions_and_topics_are_not_a_records_fault() {
        assert_eq!(Meaning::of(RDKafkaErrorCode::TopicAuthorizationFailed), Meaning::Unpublishable);
        assert_eq!(Meaning::of(PurgeQueue), Meaning::Transient);
        assert_eq!(Meaning::of(RDKafkaErrorCode::MessageTimedOut), Meaning::Transient);
        assert_eq!(Meaning::of(RDKafkaErrorCode::Unknown), Meaning::Refused);
        assert_eq!(Meaning::of(RDKafkaErrorCode::PolicyViolation), Meaning::Refused);
    }

    /// Simulates a topic that refuses the records `bad`, in batches of at most `batch`; `says`: it names them.
    fn publish(group: &[Ticket], bad: &[usize], batch: usize, says: bool) -> Result<usize, Vec<Failure>> {
        let mut done = 0;
        for batch in group.chunks(batch) {
            let is_bad = |ticket: &Ticket| bad.contains(&ticket.place());
            if batch.iter().any(is_bad) {
                let code = |ticket: &Ticket| match (says, is_bad(ticket)) {
                    (true, true) => InvalidRecord,
                    (true, false) => InvalidDifferentRecord,
                    (false, _) => MessageSizeTooLarge,
                };
                return Err(batch.iter().map(|ticket| failure(ticket.place(), code(ticket))).collect());
            }
            done += batch.len();
        }
        Ok(done)
    }

    proptest! {
        /// Whatever is refused: exactly the bad records are blamed, and the rest is published in order.
        #[test]
        fn blames_every_bad_record_and_no_other(
            count in 1usize..60, bad in proptest::collection::btree_set(0usize..60, 0..8), batch in 1usize..20,
            says: bool, keeps: bool,
        ) {
            let bad: Vec<usize> = bad.into_iter().filter(|&place| place < count).collect();
            let (mut blamed, mut published) = (Vec::new(), Vec::new());
            let mut groups = vec![tickets(0..count)];
            while let Some(group) = groups.pop() {
                let open: Vec<usize> = bad.iter().copied().filter(|place| !blamed.contains(place)).collect();
                match publish(&group, &open, batch, says) {
                    Ok(_) => published.extend(group.iter().map(|ticket| ticket.place())),
                    Err(failures) => {
                        // at_least_once keeps what was acknowledged, exactly_once aborts it.
                        let done = group.iter().position(|t| *t == failures[0].ticket).unwrap();
                        let done = if keeps { done } else { 0 };
                        published.extend(group[..done].iter().map(|ticket| ticket.place()));
                        let group = &group[done..];
                        match judge(group, &failures) {
                            Verdict::Blame(list) => {
                                prop_assert!(!list.is_empty());
                                blamed.extend(list.iter().map(|failure| failure.ticket.place()));
                                groups.push(group.to_vec());
                            }
                            Verdict::Split(parts) => {
                                prop_assert!(parts.len() > 1 || done > 0 || group.len() == parts[0].len());
                                groups.extend(parts.into_iter().rev());
                            }
                        }
                    }
                }
            }
            blamed.sort_unstable();
            prop_assert_eq!(blamed, bad);
            prop_assert_eq!(published, (0..count).collect::<Vec<_>>());
        }
    }
}
