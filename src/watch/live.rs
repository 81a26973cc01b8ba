//! Counts published predictions in metrics, and shows how far they are from the reference.

use std::collections::HashMap;
use std::sync::Arc;

use prometheus::IntCounter;

use super::{Drift, Measured, Reference, ReferenceError, Tally};
use crate::compute::Compute;
use crate::settings::Settings;
use crate::telemetry::{Health, Metrics};

/// Labels that `kandle_predictions_total` has; the rest is `other`.
const MOST_LABELS: usize = 100;
const OTHER: &str = "other";

/// Owned by the publisher, which passes it what each published window shows.
pub struct Watch {
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    labels: HashMap<Box<str>, IntCounter>,
    drift: Option<Drift>,
    /// The population stability index from which on predictions have drifted.
    threshold: f64,
    /// The distributions that have drifted, by the last measurement.
    drifted: Vec<String>,
}

impl Watch {
    /// Of the settings and the model.
    ///
    /// # Errors
    /// `drift.reference` cannot be read, or does not fit the model.
    pub fn start(
        settings: &Settings,
        compute: &dyn Compute,
        metrics: &Arc<Metrics>,
        health: &Arc<Health>,
    ) -> Result<Self, ReferenceError> {
        let labels = compute.labels();
        let found = Reference::of(settings, &compute.about(), labels.as_deref())?;
        let drift = found.map(|(reference, warnings)| {
            for warning in warnings {
                tracing::warn!(warning, "drift.reference may not fit the model");
            }
            Drift::new(reference, settings.drift.window)
        });
        Ok(Self::new(metrics, health, labels.as_deref(), drift, settings.drift.threshold))
    }

    pub fn new(
        metrics: &Arc<Metrics>,
        health: &Arc<Health>,
        labels: Option<&[String]>,
        drift: Option<Drift>,
        threshold: f64,
    ) -> Self {
        let mut watch = Self {
            metrics: Arc::clone(metrics),
            health: Arc::clone(health),
            labels: HashMap::new(),
            drift,
            threshold,
            drifted: Vec::new(),
        };
        // From zero, so that the rate of a counter includes its first increment.
        for label in labels.into_iter().flatten().take(MOST_LABELS) {
            watch.counter(label);
        }
        if watch.drift.is_some() {
            watch.metrics.drift_threshold.set(threshold);
            watch.show(&[]);
        }
        watch
    }

    fn counter(&mut self, label: &str) -> &IntCounter {
        let label =
            if self.labels.contains_key(label) || self.labels.len() < MOST_LABELS { label } else { OTHER };
        self.labels
            .entry(label.into())
            .or_insert_with(|| self.metrics.predictions.with_label_values(&[label]))
    }

    /// Counts the predictions of a window that is published.
    pub fn published(&mut self, tally: &Tally) {
        if tally.is_empty() {
            return;
        }
        for (label, count) in tally.labels() {
            self.counter(label).inc_by(count);
        }
        let metrics = &self.metrics;
        for (histogram, values) in [
            (&metrics.prediction_score, &tally.scores),
            (&metrics.prediction_entropy, &tally.entropies),
            (&metrics.embedding_norm, &tally.norms),
        ] {
            if !values.is_empty() {
                let local = histogram.local();
                values.iter().for_each(|value| local.observe(f64::from(*value)));
                local.flush();
            }
        }
        let without = tally.entities.iter().filter(|count| **count == 0.0).count();
        metrics.without_entities.inc_by(without as u64);
        if tally.records > 0
            && let Some(drift) = &mut self.drift
        {
            drift.add(tally);
            let measured = drift.measure();
            self.show(&measured);
        }
    }

    /// Exports the distances, shows them in /status, and logs which distributions have drifted since.
    fn show(&mut self, measured: &[Measured]) {
        let Some(drift) = &self.drift else { return };
        for Measured { of, psi, js } in measured {
            self.metrics.drift.with_label_values(&[of, "psi"]).set(*psi);
            self.metrics.drift.with_label_values(&[of, "js"]).set(*js);
            let was = self.drifted.contains(of);
            if *psi > self.threshold && !was {
                tracing::warn!(
                    of,
                    psi,
                    js,
                    threshold = self.threshold,
                    "predictions have drifted from drift.reference"
                );
                self.drifted.push(of.clone());
            } else if *psi <= self.threshold && was {
                tracing::info!(of, psi, js, "predictions are near drift.reference again");
                self.drifted.retain(|name| name != of);
            }
        }
        let distances: serde_json::Map<String, serde_json::Value> = measured
            .iter()
            .map(|Measured { of, psi, js }| (of.clone(), serde_json::json!({ "psi": psi, "js": js })))
            .collect();
        self.health.set_drift(serde_json::json!({
            "reference_digest": drift.reference().digest,
            "records": drift.records(),
            "threshold": self.threshold,
            "distances": distances,
            "drifted": self.drifted,
        }));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn tally(labels: &[String]) -> Tally {
        let mut tally = Tally { records: labels.len() as u64, ..Tally::default() };
        labels.iter().for_each(|label| tally.add_label(label));
        tally
    }

    #[test]
    fn labels_are_capped() {
        let metrics = Arc::new(Metrics::new());
        let health = Arc::new(Health::new(Duration::from_secs(1)));
        let mut watch = Watch::new(&metrics, &health, None, None, 0.2);
        let labels: Vec<String> = (0..150).map(|i| format!("l{i:03}")).collect();
        watch.published(&tally(&labels));
        watch.published(&tally(&labels[..1]));
        let count = |label: &str| metrics.predictions.with_label_values(&[label]).get();
        assert_eq!((count("l000"), count("l099"), count("other")), (2, 1, 50));
        let series = metrics.text().lines().filter(|l| l.starts_with("kandle_predictions_total{")).count();
        assert_eq!(series, 101);
    }

    #[test]
    fn the_gauge_and_the_status_show_drift() {
        let metrics = Arc::new(Metrics::new());
        let health = Arc::new(Health::new(Duration::from_secs(1)));
        let even: Vec<String> = (0..400).map(|i| format!("l{}", i % 2)).collect();
        let drift = Drift::new(Reference::new(&tally(&even)).unwrap(), 200);
        let mut watch = Watch::new(&metrics, &health, None, Some(drift), 0.2);
        assert_eq!(health.status()["drift"]["records"], 0);
        assert!(!metrics.text().contains("kandle_drift{"), "nothing is measured yet");
        watch.published(&tally(&even));
        assert!(metrics.drift.with_label_values(&["label", "psi"]).get() < 0.01);
        assert_eq!(health.status()["drift"]["drifted"], serde_json::json!([]));
        watch.published(&tally(&vec!["l0".to_owned(); 1000]));
        assert!(metrics.drift.with_label_values(&["label", "psi"]).get() > 0.2);
        assert_eq!(health.status()["drift"]["drifted"], serde_json::json!(["label"]));
        watch.published(&tally(&even));
        watch.published(&tally(&even));
        assert_eq!(health.status()["drift"]["drifted"], serde_json::json!([]));
    }
}
