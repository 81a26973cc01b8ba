//! A model: files, placement, tokenizer, encoder and head together.

use candle_nn::VarBuilder;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::architecture::{Architecture, ConfigError, End, Tower};
use super::encoder::Encoder;
use super::gliner::Gliner;
use super::head::Head;
use super::layers::Layers;
use super::question::{Question, is_language_model};
use super::sentence::{Embedding, Splade, TextSettings, cross_encoder_scores, prompts_and_limit};
use super::sparse::{LEXICAL, SparseHead};
use super::tokenize::{TokenizeError, Tokenizer, Tokens};
use crate::model::kernels::{KeptMemory, Packed, Pooling, Transfer};
use crate::model::message;
use crate::model::placement::{Placement, Queueing};
use crate::model::store::{Files, FilesError};
use crate::model::weights::{Weights, WeightsError};
use crate::ragged::Ragged;

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    #[error("weights: {0}")]
    Weights(String),
    #[error(transparent)]
    ReadWeights(#[from] WeightsError),
    #[error("{0}")]
    Unsupported(String),
}

/// The output of a model that a task needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// One logit per label.
    Logits,
    /// One logit per label of a pair of texts, as in sentence-transformers' cross-encoders.
    PairLogits,
    /// One logit per token and label.
    TokenLogits,
    /// One pooled vector per sequence.
    Embedding,
    /// One sparse vector over the vocabulary per sequence.
    Sparse,
}

/// How logits become scores, chosen by config.json's `problem_type` as in transformers' pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scores {
    Softmax,
    /// Each label is scored independently.
    Sigmoid,
    /// Regression: the logits are the scores.
    Raw,
}

impl Scores {
    pub fn name(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::Sigmoid => "sigmoid",
            Self::Raw => "raw",
        }
    }

    pub(in crate::model) fn of(config: &serde_json::Value, labels: usize) -> Result<Self, ModelError> {
        match config["problem_type"].as_str() {
            Some("regression") => Ok(Self::Raw),
            Some("multi_label_classification") => Ok(Self::Sigmoid),
            None | Some("single_label_classification") if labels == 1 => Ok(Self::Sigmoid),
            None | Some("single_label_classification") => Ok(Self::Softmax),
            Some(other) => Err(ModelError::Unsupported(format!(
                "config.json: problem_type {other:?} is not supported; supported: regression, \
                 single_label_classification, multi_label_classification"
            ))),
        }
    }
}

/// A text that is put before texts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompt {
    pub text: String,
    /// Number of its tokens, without special ones.
    pub tokens: u32,
    /// How many tokens at the start of a text with this prompt are not pooled: none, or those of the prompt and the
    /// special tokens before it if the model says `include_prompt: false`.
    pub unpooled: u32,
}

impl Prompt {
    /// Counts tokens as sentence-transformers does: those of the prompt alone, without a special token at the end.
    ///
    /// # Errors
    /// The tokenizer fails on the text.
    pub fn new(text: String, tokenizer: &Tokenizer, embedding: &Embedding) -> Result<Self, TokenizeError> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let (leading, trailing) = (tokenizer.leading() as u32, tokenizer.trailing() as u32);
        let all = tokenizer.encode(&text)?.ids.len() as u32;
        let unpooled = if embedding.include_prompt { 0 } else { all - trailing.min(1) };
        Ok(Self { text, tokens: all - leading - trailing, unpooled })
    }
}

/// Dense rows or sparse vectors.
enum AnyHead {
    Rows(Head),
    Sparse(SparseHead),
}

/// The answers to a batch, in the order of the token axis.
enum Answers {
    Rows(Transfer),
    Sparse(Vec<Vec<f32>>),
}

pub struct Model {
    pub files: Files,
    pub placement: Placement,
    pub tokenizer: Tokenizer,
    /// Label names by index, for a classifier.
    pub labels: Vec<String>,
    /// Index of a classifier's logit by label name: config.json's `label2id`.
    pub label_ids: BTreeMap<String, usize>,
    /// How a classifier's logits become scores.
    pub scores: Scores,
    pub embedding: Embedding,
    /// Put before every text, for embeddings.
    pub prompt: Prompt,
    /// What a reranker that is a language model is asked.
    pub question: Option<Question>,
    pub parameters: usize,
    /// Token ids of a short text, repeated to make the engine's samples.
    pub(super) plain: Vec<u32>,
    /// How many values a sparse encoder keeps of a vector, if it says so.
    pub kept: Option<usize>,
    encoder: Encoder,
    head: AnyHead,
    /// The most values that a sparse vector has had.
    most: AtomicUsize,
    width: usize,
    /// Tokens with this id at the end of a sequence have no effect.
    padding: Option<u32>,
    /// Where a tower's texts end.
    end: Option<End>,
    queueing: Queueing,
    /// The last field, so that it is dropped after all others.
    _kept_memory: KeptMemory,
}

impl Model {
    pub fn load(files: Files, placement: Placement, output: Output) -> Result<Self, ModelError> {
        let config = files.json("config.json")?;
        if config.is_none() && Gliner::is(&files) {
            let message = "it is a GLiNER model, which is for task.kind: token-classification";
            return Err(ModelError::Unsupported(message.to_owned()));
        }
        let config = config.ok_or_else(|| FilesError::Missing { file: "config.json".to_owned() })?;
        let architecture = Architecture::from_config(&config, files.ignored_keys())?;
        // The settings of sentence-transformers do not apply to a classifier of transformers.
        let text = match output {
            Output::Embedding => TextSettings::read(&files, "feature-extraction")?,
            Output::PairLogits if is_language_model(&config) => {
                TextSettings::read(&files, "text-generation")?
            }
            Output::PairLogits => TextSettings::read(&files, "sequence-classification")?,
            Output::Sparse if files.exists(LEXICAL) => TextSettings::read(&files, "feature-extraction")?,
            Output::Sparse => TextSettings::read(&files, "fill-mask")?,
            Output::Logits | Output::TokenLogits => TextSettings::default(),
        };
        refuse_another_head(&config, output)?;
        refuse_of_tower(&architecture, &files, output)?;
        let text = match architecture.tower {
            Some(Tower { end: End::Padded { .. }, .. }) => {
                TextSettings { lower_case: lower_cases(&files)?, ..text }
            }
            _ => text,
        };
        let types = architecture.embeddings.token_type.map_or(0, |(_, count)| count);
        let tokenizer = Tokenizer::load(&files, architecture.max_tokens(), types, text)?;
        let (embedding, kept) = match output {
            Output::Embedding if architecture.tower.is_some() => {
                (Embedding { poolings: vec![Pooling::Last], ..Embedding::default() }, None)
            }
            Output::Embedding => (Embedding::read(&files)?, None),
            Output::Sparse => {
                let (prompts, kept) = prompts_and_limit(&files)?;
                (Embedding { prompts, ..Embedding::default() }, kept)
            }
            _ => (Embedding::default(), None),
        };
        let question = match output == Output::PairLogits && is_language_model(&config) {
            true => Some(Question::read(&files, &architecture, &tokenizer)?),
            false => None,
        };
        let weights = Weights::open(&files)?;
        let mut parameters = match architecture.tower {
            // A checkpoint of both towers has the other one's weights too.
            Some(_) => weights.parameters_of(|name| {
                !name.starts_with("vision_model.") && !name.starts_with("visual_projection")
            }),
            None => weights.parameters(),
        };
        let root = VarBuilder::from_backend(Box::new(weights), placement.dtype, placement.device.clone());
        let word = format!("{}.weight", architecture.embeddings.word);
        let inner = architecture.prefixes.iter().map(|prefix| root.pp(prefix));
        let vb = inner.into_iter().find(|vb| vb.contains_tensor(&word)).unwrap_or_else(|| root.clone());
        let weights = |e: candle_core::Error| ModelError::Weights(message(&e));

        let labels = match &question {
            Some(_) => vec!["yes".to_owned()],
            None => labels(&config),
        };
        let per_token = output == Output::TokenLogits;
        if matches!(output, Output::Logits | Output::PairLogits | Output::TokenLogits) && question.is_none() {
            let out = format!("{}.weight", architecture.classifier.out(per_token));
            if !root.contains_tensor(&out) {
                let what = if per_token { "token" } else { "text" };
                return Err(ModelError::Unsupported(format!(
                    "it is not a {what} classifier: its weights have no {out}"
                )));
            }
        }
        let encoder = Encoder::load(architecture, &vb, placement.precision).map_err(weights)?;
        let a = encoder.architecture();
        let end = match a.tower.map(|tower| tower.end) {
            // The tokenizer knows better than config.json, whose default is that of other checkpoints.
            Some(End::Padded { id }) => Some(End::Padded { id: tokenizer.padding(&files)?.unwrap_or(id) }),
            end => end,
        };
        let (head, width) = match (output, &question) {
            (Output::Embedding, _) if a.tower.is_some() => {
                let tower = a.tower.map(|tower| (tower.projection, tower.in_encoder));
                let projection = tower.map(|(name, inner)| if inner { vb.pp(name) } else { root.pp(name) });
                let layers = Layers::projection(projection.as_ref(), a.hidden).map_err(weights)?;
                let width = layers.width;
                (AnyHead::Rows(Head::embedding(embedding.poolings.clone(), layers)), width)
            }
            (Output::Embedding, _) => {
                let width = embedding.poolings.len() * a.hidden;
                let layers = Layers::load(&embedding.layers, width, &files, &placement)?;
                parameters += layers.parameters;
                let width = layers.width;
                (AnyHead::Rows(Head::embedding(embedding.poolings.clone(), layers)), width)
            }
            (Output::Sparse, _) => {
                let head = sparse_head(&files, &config, &tokenizer, &encoder, &root, &placement)?;
                parameters += head.extra_parameters(a);
                (AnyHead::Sparse(head), a.vocabulary)
            }
            (_, Some(Question { yes, no, .. })) => {
                // Where the file does not say, the default depends on the model's type.
                let own = root.contains_tensor("lm_head.weight");
                let head = match config["tie_word_embeddings"].as_bool().unwrap_or(!own) {
                    true => Head::answer(encoder.word_table(), *yes, *no),
                    false => root
                        .pp("lm_head")
                        .get((a.vocabulary, a.hidden), "weight")
                        .and_then(|table| Head::answer(&table, *yes, *no)),
                };
                (AnyHead::Rows(head.map_err(weights)?), 1)
            }
            (_, None) => {
                let head = Head::classifier(a, labels.len(), per_token, &root, &vb);
                (AnyHead::Rows(head.map_err(weights)?), labels.len())
            }
        };
        let padding = match (output, &question) {
            (Output::Logits | Output::PairLogits, None) => a.classifier.padding,
            _ => None,
        };
        let kept_memory = KeptMemory::on(encoder.device()).map_err(weights)?;
        let scores = match output {
            Output::PairLogits => cross_encoder_scores(&files, &config, question.is_some())?,
            _ => Scores::of(&config, labels.len())?,
        };
        let plain = tokenizer.encode("kandle")?.ids;
        let prompt = Prompt::new(embedding.prompts.default.clone(), &tokenizer, &embedding)?;
        Ok(Self {
            files,
            placement,
            tokenizer,
            label_ids: label_ids(&config, &labels),
            labels,
            scores,
            embedding,
            prompt,
            question,
            parameters,
            plain,
            kept,
            encoder,
            head,
            most: AtomicUsize::new(0),
            width,
            padding,
            end,
            queueing: Queueing::default(),
            _kept_memory: kept_memory,
        })
    }

    pub fn architecture(&self) -> &Architecture {
        self.encoder.architecture()
    }

    /// Tokenizes a text. For embeddings, [`Model::prompt`] is put before it.
    pub fn tokens(&self, text: &str) -> Result<Tokens, TokenizeError> {
        self.prompted(&self.prompt, text)
    }

    /// Tokenizes a text with a prompt before it.
    pub fn prompted(&self, prompt: &Prompt, text: &str) -> Result<Tokens, TokenizeError> {
        if prompt.text.is_empty() {
            return self.tokenizer.encode(text).map(|tokens| self.ended(tokens));
        }
        let tokens = self.tokenizer.encode(&format!("{}{text}", prompt.text))?;
        Ok(self.ended(Tokens { unpooled: prompt.unpooled, ..tokens }))
    }

    /// A tower's text up to its end.
    fn ended(&self, mut tokens: Tokens) -> Tokens {
        if let Some(end) = self.end {
            end.apply(&mut tokens.ids, self.tokenizer.max_tokens());
            // Towers have no token types.
            tokens.type_ids = None;
        }
        tokens
    }

    /// How many tokens of a text fit in one sequence beside [`Model::prompt`] and the special tokens.
    pub fn room(&self) -> usize {
        self.tokenizer.room().saturating_sub(self.prompt.tokens as usize)
    }

    /// Tokenizes a text of any length into as many sequences as it needs, each with [`Model::prompt`] before it. Each
    /// comes with its number of tokens of the text, `overlap` of which it shares with its neighbour. The order is that
    /// of [`Tokenizer::chunks`].
    ///
    /// # Errors
    /// The text has no tokens and the tokenizer adds none, or the library fails on it.
    ///
    /// # Panics
    /// If the overlap is not less than the room.
    pub fn chunks(&self, text: &str, overlap: usize) -> Result<Vec<(Tokens, u32)>, TokenizeError> {
        let prompted = match self.prompt.text.is_empty() {
            true => Cow::Borrowed(text),
            false => Cow::Owned(format!("{}{text}", self.prompt.text)),
        };
        let all = self.tokenizer.ids(&prompted)?;
        let (prompt, ids) = all.split_at((self.prompt.tokens as usize).min(all.len()));
        let chunk = |part: Range<usize>| {
            let length = part.len() as u32;
            let tokens = self.tokenizer.whole(&[prompt, &ids[part]].concat());
            (self.ended(Tokens { unpooled: self.prompt.unpooled, ..tokens }), length)
        };
        let chunks: Vec<_> =
            self.tokenizer.chunks(self.room(), ids.len(), overlap).into_iter().map(chunk).collect();
        match chunks.iter().any(|(tokens, _)| tokens.ids.is_empty()) {
            true => Err(TokenizeError::Empty),
            false => Ok(chunks),
        }
    }

    /// Bytes that the weights take on their device.
    pub fn weight_bytes(&self) -> u64 {
        // The output layer of a sparse encoder is a copy of the embeddings.
        let copied = match self.head {
            AnyHead::Sparse(SparseHead::Vocabulary(_)) => self.architecture().vocabulary_weights(),
            _ => 0,
        };
        weight_bytes(self.architecture(), self.parameters, copied, &self.placement)
    }

    /// Number of values per sequence, or per token if the head's output is per token; of a sparse vector, zeros included.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of values in the answer for a sequence of `tokens` tokens; of a sparse vector, the most so far.
    pub fn values(&self, tokens: usize) -> usize {
        match &self.head {
            AnyHead::Rows(head) if head.is_per_token() => tokens * self.width,
            AnyHead::Rows(_) => self.width,
            AnyHead::Sparse(_) => self.most.load(Ordering::Relaxed),
        }
    }

    /// Whether the sparse vector of a long text may be made of those of its chunks.
    pub fn takes_sparse_chunks(&self) -> bool {
        matches!(&self.head, AnyHead::Sparse(head) if head.is_maximum())
    }

    /// A sequence without the padding at its end, which a causal classifier does not pool, as in transformers. (Of a
    /// sequence of padding, the first token is pooled.)
    fn pooled<'t>(&self, ids: &'t [u32]) -> &'t [u32] {
        let Some(padding) = self.padding else { return ids };
        &ids[..ids.iter().rposition(|&id| id != padding).unwrap_or(0) + 1]
    }

    /// One answer per sequence, in the order of the batch: [`Model::width`] values, or that many for each of its
    /// tokens. Of a sparse vector, it has token ids and values in turn, by increasing id.
    pub fn forward(&self, batch: &[&Tokens]) -> candle_core::Result<Ragged<f32>> {
        let sequences: Vec<_> =
            batch.iter().map(|tokens| (self.pooled(&tokens.ids), tokens.type_ids.as_deref())).collect();
        let unpooled: Vec<usize> = batch.iter().map(|tokens| tokens.unpooled as usize).collect();
        let packed = Packed::new(&sequences).skipping(&unpooled);
        let turn = self.queueing.turn(self.encoder.device());
        let answers = self.encoder.forward(&packed, |hidden, workspace| match &self.head {
            AnyHead::Rows(head) => {
                Transfer::start(&head.forward(hidden, &packed, workspace)?).map(Answers::Rows)
            }
            AnyHead::Sparse(head) => head.forward(hidden, &packed, workspace).map(Answers::Sparse),
        })?;
        drop(turn);
        match answers {
            Answers::Rows(rows) => Ok(self.in_order(&rows.finish()?, &packed)),
            Answers::Sparse(vectors) => {
                let most = vectors.iter().map(Vec::len).max().unwrap_or(0);
                self.most.fetch_max(most, Ordering::Relaxed);
                let mut places = vec![0; batch.len()];
                for (place, &i) in packed.order().iter().enumerate() {
                    places[i] = place;
                }
                let mut answers = Ragged::with_capacity(batch.len(), vectors.iter().map(Vec::len).sum());
                for place in places {
                    answers.push(&vectors[place]);
                }
                Ok(answers)
            }
        }
    }

    /// The answers in a batch's values, sequence after sequence on the token axis, by the order of its input.
    fn in_order(&self, rows: &[f32], packed: &Packed) -> Ragged<f32> {
        let (mut places, mut end) = (vec![0..0; packed.order().len()], 0);
        for (&i, length) in packed.order().iter().zip(packed.lengths()) {
            let start = end;
            end += self.values(length);
            places[i] = start..end;
        }
        let mut answers = Ragged::with_capacity(places.len(), rows.len());
        for place in places {
            answers.push(&rows[place]);
        }
        answers
    }
}

/// Bytes that a model's weights take on their device. `copied`: weights of which the head has a copy in another layout.
pub(super) fn weight_bytes(a: &Architecture, parameters: usize, copied: usize, placement: &Placement) -> u64 {
    // Only the matrices of the layers, and before them, are quantized.
    let of_layer = a.layer_weights();
    let projection = a.embeddings.projection.map_or(0, |_| a.embeddings.width * a.hidden);
    let convolution = a.convolution.as_ref().map_or(0, |c| c.size * a.hidden * a.hidden);
    let layers = a.distinct_layers().count();
    let quantizable = (layers * of_layer + projection + convolution).min(parameters);
    let (tables, elements) = a.position_tables();
    let derived = layers * tables * elements;
    placement.weight_bytes(quantizable + copied, parameters - quantizable + derived)
}

/// The head of a sparse encoder: that of lexical weights, where a file has it, or else that for masked language modelling.
fn sparse_head(
    files: &Files,
    config: &serde_json::Value,
    tokenizer: &Tokenizer,
    encoder: &Encoder,
    root: &VarBuilder<'_>,
    placement: &Placement,
) -> Result<SparseHead, ModelError> {
    let a = encoder.architecture();
    if files.exists(LEXICAL) {
        return SparseHead::lexical(a, files, tokenizer, root);
    }
    let splade = Splade::read(files)?;
    let Some(head) = &a.masked_lm else {
        return Err(ModelError::Unsupported(format!(
            "kandle does not know the head for masked language modelling of model_type {:?}, which sparse-embedding \
             needs; docs/models.md lists the architectures of each task",
            a.name
        )));
    };
    let dense = format!("{}.weight", head.dense);
    if !root.contains_tensor(&dense) {
        return Err(ModelError::Unsupported(format!(
            "it has no head for masked language modelling: its weights have no {dense}, and there is no {LEXICAL}; \
             sparse-embedding needs a SPLADE model or BGE-M3"
        )));
    }
    let tied = config["tie_word_embeddings"].as_bool().unwrap_or(true);
    let words = (encoder.word_table(), tied);
    SparseHead::vocabulary(a, head, splade, root, words, placement.precision)
        .map_err(|e| ModelError::Weights(message(&e)))
}

/// Refuses a checkpoint that says in config.json's `architectures` that it was trained for another task.
fn refuse_another_head(config: &serde_json::Value, output: Output) -> Result<(), ModelError> {
    let instead = match (output, trained_for(config)) {
        (Output::Logits | Output::PairLogits, Some(true)) => "task.kind: token-classification",
        (Output::TokenLogits, Some(false)) => "task.kind: text-classification",
        _ => return Ok(()),
    };
    let name = config["architectures"][0].as_str().unwrap_or_default();
    Err(ModelError::Unsupported(format!("config.json says {name}: it is a model for {instead}")))
}

/// Refuses what the tower of texts of a model of images and texts is not for.
fn refuse_of_tower(architecture: &Architecture, files: &Files, output: Output) -> Result<(), ModelError> {
    let name = &architecture.name;
    match (architecture.tower, output) {
        (None, _) => Ok(()),
        (Some(_), Output::Embedding) if files.exists("modules.json") => {
            Err(ModelError::Unsupported(format!(
                "modules.json with model_type {name:?} is not supported; use the checkpoint of transformers"
            )))
        }
        (Some(_), Output::Embedding) => Ok(()),
        (Some(_), _) => Err(ModelError::Unsupported(format!(
            "model_type {name:?} embeds texts and images alike; supported: task.kind text-embedding, similarity, \
             image-embedding"
        ))),
    }
}

/// tokenizer_config.json's `do_lower_case`: SigLIP's towers were trained with lower-cased texts, which not all of their
/// tokenizer.json files say (CLIP's do).
fn lower_cases(files: &Files) -> Result<bool, FilesError> {
    let config = files.json("tokenizer_config.json")?.unwrap_or_default();
    Ok(config["do_lower_case"].as_bool() == Some(true))
}

/// Whether config.json's `architectures` says that the checkpoint was trained to classify tokens (true) or texts
/// (false).
pub(super) fn trained_for(config: &serde_json::Value) -> Option<bool> {
    let name = config["architectures"][0].as_str()?;
    let (tokens, texts) =
        (name.ends_with("ForTokenClassification"), name.ends_with("ForSequenceClassification"));
    (tokens || texts).then_some(tokens)
}

/// config.json's `label2id`, or the reverse of `id2label` if there is none.
pub(super) fn label_ids(config: &serde_json::Value, labels: &[String]) -> BTreeMap<String, usize> {
    let id = |value: &serde_json::Value| Some(value.as_u64()? as usize).filter(|&id| id < labels.len());
    match config["label2id"].as_object().filter(|map| !map.is_empty()) {
        Some(map) => map.iter().filter_map(|(label, value)| Some((label.clone(), id(value)?))).collect(),
        None => labels.iter().cloned().zip(0..).collect(),
    }
}

/// config.json's `id2label` in the order of the ids; `LABEL_n` for missing labels, as in transformers.
pub(in crate::model) fn labels(config: &serde_json::Value) -> Vec<String> {
    match config["id2label"].as_object() {
        Some(map) => (0..map.len())
            .map(|i| {
                map.get(&i.to_string())
                    .and_then(|v| v.as_str())
                    .map_or_else(|| format!("LABEL_{i}"), str::to_owned)
            })
            .collect(),
        None => (0..config["num_labels"].as_u64().unwrap_or(2)).map(|i| format!("LABEL_{i}")).collect(),
    }
}
