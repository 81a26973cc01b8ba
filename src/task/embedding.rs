//! text-embedding: `{"embedding":[…]}`, scaled to length 1 if the model's modules.json says so.

use serde::Serialize;

use super::kinds::{BEGINNING, Kind, NO_RULES};
use super::text::{self, PredictText, TextTask};
use super::{NUMBER, to_json};
use crate::model::{Model, Output};
use crate::record::RecordError;
use crate::settings::TaskKind;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("text-embedding"),
    prediction: "`{\"embedding\":[…]}`, pooled and normalised as the model's own `modules.json` says",
    fields: &["embedding"],
    keys: &["overflow", "cache"],
    pointers: &[],
    overflow: BEGINNING,
    check: NO_RULES,
    output: Some(Output::Embedding),
    load: |settings, metrics| {
        text::load(settings, Output::Embedding, metrics, |texts, _| {
            let predict = Embed::new(&texts.model);
            Ok(TextTask { texts, predict })
        })
    },
};

pub struct Embed {
    normalize: bool,
    width: usize,
}

impl Embed {
    pub fn new(model: &Model) -> Self {
        Self { normalize: model.embedding.normalize, width: model.width() }
    }
}

#[derive(Serialize)]
struct Embedding<'a> {
    embedding: &'a [f32],
}

impl PredictText for Embed {
    fn write(&self, row: &[f32], out: &mut Vec<u8>) -> Result<(), RecordError> {
        if !self.normalize {
            return to_json(&Embedding { embedding: row }, out);
        }
        to_json(&Embedding { embedding: &normalized(row) }, out)
    }

    fn bytes(&self) -> usize {
        self.width * NUMBER
    }
}

/// Scales to length 1, as torch's `normalize` does: a zero vector stays zero.
pub(super) fn normalized(row: &[f32]) -> Vec<f32> {
    let length = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt().max(1e-12);
    row.iter().map(|x| (f64::from(*x) / length) as f32).collect()
}
