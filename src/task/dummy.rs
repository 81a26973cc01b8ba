//! Shows what it takes to add a task: this file and its line in `mod.rs`. Compiled for the unit tests only.

use std::sync::Arc;

use super::Task;
use super::kinds::{Family, Kind, Reads};
use crate::codec::Input;
use crate::codec::write::Writer;
use crate::codec::write::schema::{Field, Type};
use crate::compute::{About, Batched, Pace};
use crate::engine::{self, Engine, Item, Limits, Place, Rows, RunError};
use crate::model::Digest;
use crate::ragged::Ragged;
use crate::record::{Fault, RecordError};
use crate::settings::TaskKind;
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("dummy"),
    prediction: "`{\"letters\":[…]}`: how often each word has the letter e",
    fields: |_| {
        vec![Field::new(1, "letters", Type::list(Type::Float), "How often each word has the letter e")]
    },
    shows: |_| Shows::Nothing,
    keys: &["top_k"],
    pointers: &[],
    overflow: &[],
    check: |task| match task.top_k {
        Some(7) => vec![("top_k", "is not a number that dummy likes".to_owned())],
        _ => Vec::new(),
    },
    family: Family::Nothing,
    reads: Reads::Text,
    load: |settings, metrics| {
        let about = About {
            kind: settings.task.kind,
            model: "letters".to_owned(),
            architecture: "none".to_owned(),
            digest: Digest::new(None, settings, "none").expect("no files"),
            device: "none".to_owned(),
            dtype: "none".to_owned(),
            host_memory: 0,
        };
        let place = Place { name: "none".to_owned(), is_cpu: true };
        let limits = Limits {
            max_cost: settings.batch.max_tokens,
            calibrated: None,
            lanes: settings.batch.lanes,
            timeout: settings.batch.timeout.0,
            cache: None,
        };
        Ok(Arc::new(Batched {
            about,
            decoder: Kind::decoder(settings)?,
            writer: Writer::new(settings),
            task: Dummy { most: settings.task.top_k.unwrap_or(usize::MAX) },
            engine: Engine::new(Arc::new(Letters), place, limits, Arc::clone(metrics)),
            pace: Pace::new(1e-6),
            metrics: Arc::clone(metrics),
        }))
    },
};

/// A record asks for one item per word; it may have no words.
struct Dummy {
    most: usize,
}

struct Word(String);

struct Letters;

impl Item for Word {
    fn cost(&self) -> u32 {
        self.0.len() as u32
    }

    fn key(&self) -> Option<u128> {
        None
    }
}

impl engine::Model for Letters {
    type Item = Word;
    type Value = f32;

    fn run(&self, batch: &[&Word]) -> Result<Ragged<f32>, RunError> {
        let mut answers = Ragged::default();
        for word in batch {
            answers.push(&[word.0.matches('e').count() as f32]);
        }
        Ok(answers)
    }

    fn sample(&self, cost: u32) -> Word {
        Word("e".repeat(cost as usize))
    }
}

impl Task for Dummy {
    type Item = Word;
    type Value = f32;
    type Kept = ();

    fn prepare(&self, input: &Input<'_>, items: &mut Vec<Word>) -> Result<(), RecordError> {
        if input.text.contains('!') {
            return Err(RecordError::new(Fault::Prepare, "do not shout"));
        }
        items.extend(input.text.split_whitespace().take(self.most).map(|word| Word(word.to_owned())));
        Ok(())
    }

    fn predict(&self, (): &(), answers: Rows<'_, f32>, out: &mut Vec<u8>) -> Result<(), RecordError> {
        let letters: Vec<f32> = answers.iter().map(|row| row[0]).collect();
        super::to_json(&serde_json::json!({ "letters": letters }), out)
    }

    fn footprint(&self, value: &[u8]) -> usize {
        value.len()
    }
}

mod tests {
    use std::time::Instant;

    use crate::flow::Outcome;
    use crate::lease::Lease;
    use crate::record::{Arrival, Fault, Partition};
    use crate::settings::{self, Loaded, Sources};
    use crate::telemetry::Metrics;
    use crate::window::{ClosedBy, Gatherer, Limits};

    fn load(set: &[&str]) -> Result<Loaded, Vec<settings::Problem>> {
        let mut all = vec![
            "kafka.brokers=none:1",
            "input.topics=in",
            "input.group=g",
            "input.format=text",
            "task.kind=dummy",
            "output.topic=out",
            "dead_letters.topic=dead",
        ];
        all.extend(set);
        settings::load(&Sources { set: all.into_iter().map(str::to_owned).collect(), ..Sources::default() })
    }

    #[test]
    fn a_file_and_a_line_are_a_task_with_settings_rules_and_predictions() {
        let settings = load(&[]).unwrap_or_else(|problems| panic!("{problems:?}")).settings;
        let compute = super::super::load(&settings, &std::sync::Arc::new(Metrics::new())).unwrap();
        let mut gatherer = Gatherer::new(Limits::NONE);
        for (offset, value) in [&b"here we see"[..], b"", b"no!", b"eee"].into_iter().enumerate() {
            let arrival = Arrival { offset: offset as i64, value: Some(value), ..Arrival::default() };
            gatherer.push(&Partition::new("in", 0), &Lease::new(0), arrival, Instant::now());
        }
        let encoded = compute.answer(gatherer.close(ClosedBy::End).unwrap()).unwrap();
        let said: Vec<String> = encoded
            .outcomes
            .iter()
            .map(|outcome| match outcome {
                Outcome::Prediction { part, bytes } => {
                    String::from_utf8_lossy(encoded.prediction(*part, bytes)).into_owned()
                }
                Outcome::Dead(error) => {
                    assert_eq!(error.fault, Fault::Prepare);
                    error.message.clone()
                }
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(
            said,
            [r#"{"letters":[2.0,1.0,2.0]}"#, r#"{"letters":[]}"#, "do not shout", r#"{"letters":[3.0]}"#]
        );
    }

    #[test]
    fn its_entry_has_the_rules() {
        let fault = |set: &str| match load(&[set]) {
            Ok(_) => panic!("{set} is allowed"),
            Err(problems) => format!("{}: {}", problems[0].key, problems[0].message),
        };
        assert_eq!(fault("task.top_k=7"), "task.top_k: is not a number that dummy likes");
        assert_eq!(fault("task.overflow=truncate"), "task.overflow: has no effect with task.kind: dummy");
        assert!(fault("task.kind=dumy").contains("did you mean dummy?"));
    }
}
