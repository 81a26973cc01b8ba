//! Which tasks a checkpoint is for.

use super::{KINDS, zero_shot};
use crate::model::Checkpoint;

/// Whether a checkpoint has the heads that a task needs.
type Fits = fn(&Checkpoint) -> bool;

/// What each task needs, by its name. To add a task, add a line.
const NEEDS: &[(&str, Fits)] = &[
    ("text-classification", |it| it.classifies_texts),
    ("token-classification", |it| it.classifies_tokens),
    ("zero-shot-classification", |it| {
        it.classifies_texts && it.labels.len() > 1 && zero_shot::entailment(&it.label_ids).is_some()
    }),
    ("reranking", |it| it.answers || it.classifies_texts && it.labels.len() <= 2),
    ("text-embedding", |it| it.embeds),
    ("similarity", |it| it.embeds),
    ("sparse-embedding", |it| it.embeds_sparsely),
];

/// The names of the tasks that a checkpoint is for, in the order of [`KINDS`].
pub fn suited(checkpoint: &Checkpoint) -> Vec<&'static str> {
    let names = KINDS.iter().map(|kind| kind.kind.name());
    let needs = |name: &&str| NEEDS.iter().any(|(task, fits)| task == name && fits(checkpoint));
    names.filter(needs).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Files;
    use crate::settings;
    use crate::task::Family;

    fn of(name: &str) -> Checkpoint {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let model = settings::Model { source: Some(path.display().to_string()), ..Default::default() };
        Checkpoint::read(&Files::find(&model).unwrap()).unwrap()
    }

    #[test]
    fn every_task_with_a_model_has_its_needs() {
        for kind in KINDS.iter().filter(|kind| matches!(kind.family, Family::Text(_))) {
            assert!(NEEDS.iter().any(|(task, _)| *task == kind.kind.name()), "{}", kind.kind.name());
        }
    }

    #[test]
    fn heads_and_labels_say_what_a_checkpoint_is_for() {
        for (name, tasks) in [
            ("bert", vec!["text-classification"]),
            ("tokens-deberta", vec!["token-classification"]),
            ("gliner-deberta", vec!["token-classification"]),
            ("nli-xlm-roberta", vec!["text-classification", "zero-shot-classification"]),
            ("pairs-roberta", vec!["reranking", "text-classification"]),
            ("rerank-qwen3", vec!["reranking"]),
            ("rerank-qwen3-logit-score", vec!["reranking"]),
            ("embed-qwen3", vec!["similarity", "text-embedding"]),
            ("sparse-roberta", vec!["sparse-embedding"]),
            ("sparse-bert", vec!["similarity", "sparse-embedding", "text-embedding"]),
            ("sparse-m3", vec!["similarity", "sparse-embedding", "text-embedding"]),
        ] {
            let mut found = suited(&of(name));
            found.sort();
            assert_eq!(found, tasks, "{name}");
        }
    }

    #[test]
    fn labels_without_names_are_found() {
        assert!(!of("bert").labels_are_numbers());
        assert!(of("pairs-roberta").labels_are_numbers());
    }
}
