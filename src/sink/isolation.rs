//! A batch was refused: which of its records is to blame, and how to find out. Pure.
//!
//! The broker refuses a batch as a whole. For what it calls an invalid record it says which ones are; the client then
//! reports the others as neighbours of an invalid record. Otherwise all of the batch fail alike: the records are sent
//! again in two halves, until one is refused alone.

use rdkafka::types::RDKafkaErrorCode;

use super::acks::{Failure, Ticket};

/// What a failed delivery says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The broker refuses the record, or one beside it in its batch.
    Refused,
    /// Another record of the batch is invalid; this one is not.
    Neighbour,
    /// No record can be published: a right or a topic is missing.
    Hopeless,
    /// It may be delivered another time: the producer has ended, or time was up.
    Passing,
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
            | InvalidTopic => Self::Hopeless,
            // The producer's, not the record's: it says the same of itself.
            OutOfOrderSequenceNumber
            | DuplicateSequenceNumber
            | UnknownProducerId
            | InvalidProducerEpoch
            | ProducerFenced
            | InvalidTransactionalState => Self::Passing,
            // librdkafka's own codes are below -100.
            code if (code as i32) < -100 => Self::Passing,
            RequestTimedOut
            | NotEnoughReplicas
            | NotEnoughReplicasAfterAppend
            | LeaderNotAvailable
            | NotLeaderForPartition
            | BrokerNotAvailable
            | NetworkException => Self::Passing,
            _ => Self::Refused,
        }
    }
}

/// What is to be done about a group of records of which some were refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// These records are to blame.
    Blame(Vec<Failure>),
    /// To be sent group by group, in this order.
    Split(Vec<Vec<Ticket>>),
}

/// `group`: what was sent and is not published, in order. `failures`: what was reported of it.
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
    // Before the first that was refused nothing is suspect; half of the suspects go into each of two groups.
    let mut cuts: Vec<usize> =
        [refused.first(), refused.get(refused.len() / 2)].into_iter().flatten().filter_map(at).collect();
    if cuts.is_empty() {
        // Only neighbours were reported so far: halves find the others.
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
    fn named_records_are_to_blame_and_nobody_else() {
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
    fn one_that_is_refused_alone_is_to_blame() {
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
    fn rights_and_topics_are_no_records_fault() {
        assert_eq!(Meaning::of(RDKafkaErrorCode::TopicAuthorizationFailed), Meaning::Hopeless);
        assert_eq!(Meaning::of(PurgeQueue), Meaning::Passing);
        assert_eq!(Meaning::of(RDKafkaErrorCode::MessageTimedOut), Meaning::Passing);
        assert_eq!(Meaning::of(RDKafkaErrorCode::Unknown), Meaning::Refused);
        assert_eq!(Meaning::of(RDKafkaErrorCode::PolicyViolation), Meaning::Refused);
    }

    /// A topic that refuses some records, in batches of at most `batch`; it may say which.
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
        /// Whatever is refused: exactly that is blamed, the rest is published, all in order.
        #[test]
        fn finds_all_that_is_bad_and_nothing_else(
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
