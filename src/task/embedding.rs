//! text-embedding: `{"embedding":[…]}`, of length 1 where the model's modules.json says so.

use serde::Serialize;

use super::kinds::Kind;
use super::text::{TextModel, Texts};
use super::{NUMBER, Task, to_json};
use crate::codec::Input;
use crate::engine::Rows;
use crate::model::{Output, Tokens};
use crate::record::RecordError;
use crate::settings::TaskKind;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind::TextEmbedding,
    keys: &["overflow", "cache"],
    needs: None,
    fields: &["embedding"],
    output: Some(Output::Embedding),
    load: |settings, metrics| {
        TextModel::load(settings, Output::Embedding, metrics)?
            .with(settings, |texts, _| Ok(Embed::new(texts)))
    },
};

pub struct Embed {
    texts: Texts,
    normalize: bool,
}

impl Embed {
    pub fn new(texts: Texts) -> Self {
        Self { normalize: texts.model.embedding.normalize, texts }
    }
}

#[derive(Serialize)]
struct Embedding<'a> {
    embedding: &'a [f32],
}

impl Task for Embed {
    type Item = Tokens;
    type Value = f32;
    type Kept = ();

    fn prepare(&self, input: &Input<'_>, items: &mut Vec<Tokens>) -> Result<(), RecordError> {
        items.push(self.texts.tokens(&input.text)?);
        Ok(())
    }

    fn predict(&self, (): &(), answers: Rows<'_, f32>, out: &mut Vec<u8>) -> Result<(), RecordError> {
        let row = answers.only();
        if !self.normalize {
            return to_json(&Embedding { embedding: row }, out);
        }
        to_json(&Embedding { embedding: &normalized(row) }, out)
    }

    fn footprint(&self, value_bytes: usize) -> usize {
        self.texts.footprint(value_bytes) + self.texts.model.width() * NUMBER
    }
}

/// To length 1, as torch's `normalize` does it: a zero vector stays one.
pub(super) fn normalized(row: &[f32]) -> Vec<f32> {
    let length = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt().max(1e-12);
    row.iter().map(|x| (f64::from(*x) / length) as f32).collect()
}
