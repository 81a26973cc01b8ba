//! The agreement of the shadow with the model over the last records, for the metric.

use std::collections::VecDeque;

use crate::agreement::{Comparer, Unlike};
use crate::telemetry::Metrics;

/// Pairs of predictions that count: the last ones.
const LAST: usize = 1000;

pub(super) struct Agreement {
    comparer: Comparer,
    /// The measures' values of each pair, the last pair at the end.
    pairs: VecDeque<Vec<f64>>,
    /// Whether a pair that cannot be compared was logged.
    said: bool,
}

impl Agreement {
    pub fn new(comparer: Comparer) -> Self {
        Self { comparer, pairs: VecDeque::new(), said: false }
    }

    /// Compares the model's prediction with the shadow's.
    pub fn add(&mut self, model: &[u8], shadow: &[u8]) {
        match self.comparer.compare(model, shadow) {
            Ok(pair) => {
                if self.pairs.len() == LAST {
                    self.pairs.pop_front();
                }
                self.pairs.push_back(pair.values);
            }
            Err(why) => self.say(why),
        }
    }

    fn say(&mut self, why: Unlike) {
        if !self.said {
            self.said = true;
            tracing::warn!(
                why = why.name(),
                "a prediction of the shadow cannot be compared with the model's: kandle_shadow_agreement is without it"
            );
        }
    }

    /// Sets the metric to the means over the last pairs.
    pub fn show(&self, metrics: &Metrics) {
        for (measure, mean) in self.means() {
            metrics.shadow_agreement.with_label_values(&[measure]).set(mean);
        }
    }

    fn means(&self) -> Vec<(&'static str, f64)> {
        let count = self.pairs.len() as f64;
        let mean = |index: usize| self.pairs.iter().map(|pair| pair[index]).sum::<f64>() / count;
        let measures = self.comparer.measures().iter().enumerate();
        let all = measures.map(|(index, measure)| (measure.name, mean(index)));
        if self.pairs.is_empty() { Vec::new() } else { all.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Task;
    use crate::task::KINDS;

    #[test]
    fn only_the_last_pairs_count() {
        let kind = KINDS.iter().find(|entry| entry.kind.name() == "text-classification").unwrap().kind;
        let mut agreement = Agreement::new(Comparer::new(&Task::of(kind)));
        assert!(agreement.means().is_empty());
        let [a, b] = ["a", "b"]
            .map(|label| serde_json::json!({ "label": label, "scores": { label: 1.0 } }).to_string());
        for _ in 0..500 {
            agreement.add(a.as_bytes(), b.as_bytes());
        }
        for _ in 0..750 {
            agreement.add(a.as_bytes(), a.as_bytes());
        }
        agreement.add(b"{}", a.as_bytes());
        assert_eq!(agreement.means(), [("label_equal", 0.75), ("score_distance", 0.25)]);
    }
}
