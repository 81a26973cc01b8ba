//! image-classification: `{"label":…,"score":…,"scores":{label: score, …}}`, best first.

use super::classification::{self, Classification};
use super::images;
use super::kinds::{Family, Kind, NO_RULES, Reads};
use crate::model::vision::Output;
use crate::settings::TaskKind;
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("image-classification"),
    prediction: "`{\"label\":…,\"score\":…,\"scores\":{…}}` of an image",
    fields: classification::fields,
    shows: |task| Shows::Label { all: task.top_k.is_none() },
    keys: &["top_k", "max_pixels", "max_bytes", "cache"],
    pointers: &[],
    overflow: &[],
    check: NO_RULES,
    family: Family::Vision(Output::Logits),
    reads: Reads::Image,
    load: |settings, metrics| {
        images::load(settings, Output::Logits, metrics, |model| {
            Ok(Classification::new(&model.labels, model.scores, &settings.task))
        })
    },
};
