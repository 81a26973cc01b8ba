//! image-embedding: `{"embedding":[…]}` of an image.

use super::embedding::Embed;
use super::kinds::{Family, Kind, Reads};
use super::{encoding, images};
use crate::codec::write::schema::Field;
use crate::model::vision::Output;
use crate::settings::TaskKind;
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("image-embedding"),
    prediction: "`{\"embedding\":[…]}` of an image: of CLIP and SigLIP, the vector that they compare with those of texts",
    fields: |task| {
        let doc = "The vector of the image, as task.encoding says";
        vec![Field::new(1, "embedding", encoding::type_of(task), doc)]
    },
    shows: |_| Shows::Nothing,
    keys: &["normalize", "dimensions", "encoding", "ranges", "max_pixels", "max_bytes", "cache"],
    pointers: &[],
    overflow: &[],
    check: |task| encoding::rules(task).into_iter().collect(),
    family: Family::Vision(Output::Embedding),
    reads: Reads::Image,
    load: |settings, metrics| {
        images::load(settings, Output::Embedding, metrics, |model| {
            Embed::new(model.width(), settings.task.normalize, &settings.task)
        })
    },
};
