//! Drift of the bundled model's predictions: it shows when the mix of tickets changes, and not before.

use crate::support;

use std::sync::Arc;
use std::time::Duration;

use kandle::telemetry::{Health, Metrics};
use kandle::watch::{Drift, Reference, Shows, Tally, Watch};
use serde_json::Value;
use support::{models, root};

const SHOWS: Shows = Shows::Label { all: true };
const THRESHOLD: f64 = 0.2;
const WINDOW: usize = 1000;

/// Numbers below `below`: Knuth's linear congruential generator (MMIX).
struct Random(u64);

impl Random {
    fn below(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % below
    }
}

/// What the bundled model says about these tickets, as JSON texts.
fn predictions(tickets: &[Value]) -> Vec<String> {
    let compute = models::load("text-classification", std::path::Path::new("bundled"), &[]).expect("bundled");
    let predicted = models::predict(&*compute, tickets);
    predicted.into_iter().map(|prediction| prediction.expect("a prediction").to_string()).collect()
}

fn tally(predictions: &[&String]) -> Tally {
    let mut tally = Tally::default();
    for prediction in predictions {
        SHOWS.count(prediction.as_bytes(), &mut tally).expect("a prediction");
    }
    tally
}

fn label(prediction: &str) -> String {
    let prediction: Value = serde_json::from_str(prediction).expect("JSON");
    prediction["label"].as_str().expect("a label").to_owned()
}

#[test]
fn a_changed_mix_crosses_the_threshold_and_the_same_mix_does_not() {
    let tickets = std::fs::read_to_string(root().join("demo/tickets.jsonl")).expect("tickets");
    let tickets: Vec<Value> =
        tickets.lines().map(|line| serde_json::from_str(line).expect("a ticket")).collect();
    let usual = predictions(&tickets);
    // The same tickets with every second letter lost: the same labels may come out, with other scores.
    let damaged: Vec<Value> = tickets
        .iter()
        .map(|ticket| {
            let text: String = ticket["text"].as_str().expect("a text").chars().step_by(2).collect();
            serde_json::json!({ "text": text })
        })
        .collect();
    let damaged = predictions(&damaged);
    let common = label(&usual[0]);
    let of_common: Vec<&String> = usual.iter().filter(|prediction| label(prediction) == common).collect();
    assert!(of_common.len() < usual.len() / 2, "{common} has {} of {}", of_common.len(), usual.len());

    for seed in 0..10 {
        let mut random = Random(seed);
        let mut pick = |from: &[String]| -> Vec<String> {
            (0..64).map(|_| from[random.below(from.len())].clone()).collect()
        };
        let reference: Vec<String> = (0..40).flat_map(|_| pick(&usual)).collect();
        let reference = Reference::new(&tally(&reference.iter().collect::<Vec<_>>())).expect("labels");
        let names: Vec<&String> = reference.distributions.keys().collect();
        assert_eq!(names, ["entropy", "label", "score"]);

        let metrics = Arc::new(Metrics::new());
        let health = Arc::new(Health::new(Duration::from_secs(1)));
        let drift = Drift::new(reference, WINDOW);
        let mut watch = Watch::new(&metrics, &health, None, Some(drift), THRESHOLD);
        let psi = |of: &str| metrics.drift.with_label_values(&[of, "psi"]).get();
        let publish = |watch: &mut Watch, records: &[String]| {
            watch.published(&tally(&records.iter().collect::<Vec<_>>()));
        };
        for _ in 0..2 * WINDOW / 64 {
            let window = pick(&usual);
            publish(&mut watch, &window);
            for of in ["label", "score", "entropy"] {
                assert!(psi(of) < THRESHOLD, "seed {seed}: {of} {}", psi(of));
            }
        }
        // Half of the tickets are about one thing.
        for _ in 0..=WINDOW / 64 {
            let mut window = pick(&usual);
            for (at, prediction) in window.iter_mut().enumerate().filter(|(at, _)| at % 2 == 0) {
                *prediction = of_common[at % of_common.len()].clone();
            }
            publish(&mut watch, &window);
        }
        assert!(psi("label") > THRESHOLD, "seed {seed}: {}", psi("label"));
        for _ in 0..=2 * WINDOW / 64 {
            let window = pick(&damaged);
            publish(&mut watch, &window);
        }
        assert!(psi("score") > THRESHOLD, "seed {seed}: {}", psi("score"));
        assert!(psi("entropy") > THRESHOLD, "seed {seed}: {}", psi("entropy"));
        for _ in 0..=WINDOW / 64 {
            let window = pick(&usual);
            publish(&mut watch, &window);
        }
        assert!(psi("label") < THRESHOLD && psi("score") < THRESHOLD, "seed {seed}: back to normal");
    }
}
