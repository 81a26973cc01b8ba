//! Offsets without records at the end of a partition: transaction markers, or records removed by compaction. The
//! group's offset is moved past them, so that the lag is zero.

use std::collections::BTreeSet;

use rdkafka::statistics::{Partition as PartitionStatistics, Statistics};

use super::doubt::Cause;
use super::lag::of_partition;
use super::ledger::PartitionState;
use super::lookup::{Content, OffsetRange, Question};
use super::serve::Source;

/// Whether a content lookup is in flight.
#[derive(Debug, Default)]
pub(super) struct Idle {
    asked: bool,
}

/// The range between the last record read and the end; `None` if records may still come. `bound`: a drain's end offset.
///
/// The range has to be looked up: after a pause the statistics' position includes messages fetched and discarded.
fn beyond(owned: &PartitionState, known: &PartitionStatistics, bound: Option<i64>) -> Option<OffsetRange> {
    let from = owned.next().unwrap_or(known.lo_offset);
    // Not beyond the last stable offset: an open transaction may still commit records there.
    let to = bound.unwrap_or(known.ls_offset);
    let read = owned.is_idle() && owned.hold.is_none() && known.fetchq_cnt == 0 && known.next_offset >= to;
    (read && (0..to).contains(&from)).then(|| OffsetRange { partition: owned.partition.clone(), from, to })
}

impl Source {
    /// Looks up what lies after the last record of partitions that seem to be read to their ends.
    pub(super) fn look_at_idle(&mut self, statistics: &Statistics) {
        if self.idle.asked || self.intake.paused {
            return;
        }
        let mut ranges = Vec::new();
        for owned in self.ledger.iter() {
            if self.bounds.is_done(&owned.partition) {
                continue;
            }
            let bound = self.bounds.bound(&owned.partition);
            let known = of_partition(statistics, &owned.partition);
            ranges.extend(known.and_then(|known| beyond(owned, known, bound)));
        }
        if !ranges.is_empty() {
            self.idle.asked = true;
            self.lookup.ask(Question::Content(ranges));
        }
    }

    pub(super) fn on_content(&mut self, found: Vec<(OffsetRange, Content)>) {
        self.idle.asked = false;
        let (mut ended, mut damaged) = (BTreeSet::new(), false);
        for (OffsetRange { partition, from, to }, content) in found {
            damaged |= content == Content::Damaged;
            let Some(owned) = self.ledger.get_mut(&partition) else { continue };
            // Records may have been read since the question.
            let same = owned.is_idle() && owned.next().is_none_or(|next| next == from);
            if content != Content::Nothing || !same {
                continue;
            }
            owned.skip_deleted_to(to);
            if self.bounds.bound(&partition) == Some(to) {
                ended.insert(partition);
            }
        }
        if damaged {
            self.doubt(Cause::Damage);
        }
        self.end(&ended);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Partition;
    use crate::source::ledger::Ledger;

    #[test]
    fn the_range_ends_at_the_last_stable_offset_or_a_drains_end() {
        let p = Partition::new("t", 0);
        let mut ledger = Ledger::default();
        ledger.assign(p.clone(), Some(4));
        let known = |next_offset, ls_offset, fetchq_cnt| PartitionStatistics {
            next_offset,
            ls_offset,
            hi_offset: 20,
            lo_offset: 2,
            fetchq_cnt,
            ..Default::default()
        };
        let beyond = |ledger: &Ledger, known: &PartitionStatistics, bound| {
            super::beyond(ledger.get(&p).unwrap(), known, bound).map(|range| (range.from, range.to))
        };
        assert_eq!(beyond(&ledger, &known(9, 9, 0), None), Some((4, 9)));
        assert_eq!(beyond(&ledger, &known(9, 9, 1), None), None, "records wait");
        assert_eq!(beyond(&ledger, &known(8, 9, 0), None), None, "not read to the end");
        assert_eq!(beyond(&ledger, &known(4, 4, 0), None), None, "nothing is between");
        assert_eq!(beyond(&ledger, &known(9, 9, 0), Some(7)), Some((4, 7)), "a drain's end");
        assert_eq!(beyond(&ledger, &known(-1001, -1001, 0), None), None, "unknown");
        ledger.get_mut(&p).unwrap().read(4, None);
        assert_eq!(beyond(&ledger, &known(9, 9, 0), None), None, "a record is on its way");
        ledger.assign(p.clone(), None);
        assert_eq!(beyond(&ledger, &known(9, 9, 0), None), Some((2, 9)), "from the log's start");
    }
}
