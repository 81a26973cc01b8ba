//! What the predictions of one window show, before it is counted in metrics.

use std::collections::BTreeMap;

/// Counts and values of several predictions. Values are in the order of the records.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Number of predictions.
    pub records: u64,
    pub(super) labels: BTreeMap<Box<str>, u64>,
    /// Of the best label or result of each record, or of every entity.
    pub scores: Vec<f32>,
    /// Entropy of each record's scores, from 0 to 1.
    pub entropies: Vec<f32>,
    /// Number of entities of each record.
    pub entities: Vec<f32>,
    /// Length of each vector that the model returned, before it is scaled to length 1.
    pub norms: Vec<f32>,
}

impl Tally {
    /// Counts a label once.
    pub fn add_label(&mut self, label: &str) {
        match self.labels.get_mut(label) {
            Some(count) => *count += 1,
            None => drop(self.labels.insert(label.into(), 1)),
        }
    }

    /// Labels with their counts, sorted by label.
    pub fn labels(&self) -> impl Iterator<Item = (&str, u64)> {
        self.labels.iter().map(|(label, count)| (&**label, *count))
    }

    /// Adds the counts and values of the records that follow.
    pub fn append(&mut self, other: Self) {
        self.records += other.records;
        for (label, count) in other.labels {
            *self.labels.entry(label).or_default() += count;
        }
        self.scores.extend(other.scores);
        self.entropies.extend(other.entropies);
        self.entities.extend(other.entities);
        self.norms.extend(other.norms);
    }

    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.records == 0 && self.norms.is_empty()
    }
}
