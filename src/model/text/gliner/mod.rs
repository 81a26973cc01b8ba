//! GLiNER (arXiv:2311.08526): finds entities of any labels, which are part of the model's input. The prompt has a marker
//! before each label; the text follows as words. Each span of words is scored for each label.
//!
//! ```text
//! <<ENT>> person <<ENT>> e-mail address <<SEP>> Ada lives in Köln .
//!    └ label's vector                           └ words' vectors, then an LSTM, then spans of words
//! ```

mod config;
mod head;
mod words;

use std::ops::Range;

use candle_nn::VarBuilder;

pub use self::config::CONFIG;
use self::config::Config;
use self::head::{Head, Rows};
pub use self::words::{Place, Words};
use super::architecture::{Architecture, Positions};
use super::encoder::Encoder;
use super::items::{classify, key};
use super::model::{ModelError, weight_bytes};
use super::sentence::TextSettings;
use super::tokenize::{TokenizeError, Tokenizer};
use crate::engine::{self, Item, RunError};
use crate::failpoint;
use crate::model::kernels::{KeptMemory, Packed, Transfer, count_spans, spans};
use crate::model::message;
use crate::model::placement::{Placement, Queueing};
use crate::model::store::Files;
use crate::model::weights::Weights;
use crate::ragged::Ragged;

/// How much longer than `max_position_embeddings` a sequence may be if only distances between tokens count: the
/// package has no such limit, and trains with up to 384 words, which may have more tokens than that.
const LONGER: usize = 4;

/// Words of a text behind the prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptedWords {
    /// Token ids, special tokens and prompt included.
    ids: Vec<u32>,
    /// Index of each word's first token.
    firsts: Vec<u32>,
}

impl Item for PromptedWords {
    fn cost(&self) -> u32 {
        self.ids.len() as u32
    }

    fn key(&self) -> Option<u128> {
        Some(key((&self.ids, &self.firsts)))
    }
}

/// A span of words that scores above the threshold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The first and the last word, counted from the first one of the item.
    pub first: u32,
    pub last: u32,
    /// Index of the label.
    pub label: u32,
    /// Probability that the span is an entity of this label.
    pub score: f32,
}

impl Candidate {
    /// Values of a candidate in an answer.
    pub const VALUES: usize = 4;

    /// As values of an answer; floats represent indices exactly up to 2²⁴.
    fn values(self) -> [f32; Self::VALUES] {
        [self.first as f32, self.last as f32, self.label as f32, self.score]
    }

    /// The candidates of an answer, in the order of their first word, their last word and their label.
    pub fn of(answer: &[f32]) -> impl Iterator<Item = Self> {
        answer.as_chunks::<{ Self::VALUES }>().0.iter().map(|&[first, last, label, score]| Self {
            first: first as u32,
            last: last as u32,
            label: label as u32,
            score,
        })
    }
}

pub struct Gliner {
    pub files: Files,
    pub placement: Placement,
    pub parameters: usize,
    /// Words of the longest entity.
    pub max_width: usize,
    /// Words of the longest text that the model takes at once.
    pub max_words: usize,
    tokenizer: Tokenizer,
    encoder: Encoder,
    head: Head,
    /// Tokens before the words, without special ones.
    prompt: Vec<u32>,
    /// Index in a sequence of the token whose vector is that of a label, special tokens included.
    labels: Vec<u32>,
    threshold: f32,
    /// A word for samples.
    plain: Vec<u32>,
    queueing: Queueing,
    /// The last field, so that it is dropped after all others.
    _kept_memory: KeptMemory,
}

impl Gliner {
    /// Whether a checkpoint is one of GLiNER.
    pub fn is(files: &Files) -> bool {
        files.exists(CONFIG)
    }

    /// Loads a model that finds entities of these labels, with scores above the threshold.
    ///
    /// # Errors
    /// The checkpoint is incomplete or of an unsupported kind, or the labels leave no room for a text.
    pub fn load(
        files: Files,
        placement: Placement,
        labels: &[String],
        threshold: f32,
    ) -> Result<Self, ModelError> {
        let mut config = Config::read(&files)?;
        let weights = Weights::open(&files)?;
        let parameters = weights.parameters();
        let backbone = "token_rep_layer.bert_layer.model";
        // The package adds tokens to the backbone's vocabulary, which its configuration may not know.
        let table = format!("{backbone}.{}.weight", config.backbone.embeddings.word);
        match weights.shape(&table) {
            Some([rows, _]) => config.backbone.vocabulary = *rows,
            _ => {
                return Err(ModelError::Weights(format!(
                    "cannot find tensor {table}: it is not a span model of GLiNER"
                )));
            }
        }
        if let Positions::Relative { count } = &mut config.backbone.positions {
            *count *= LONGER;
        }
        if !files.exists("tokenizer.json") {
            return Err(config::without_tokenizer());
        }
        let positions = config.backbone.max_tokens();
        let mut tokenizer = Tokenizer::load(&files, positions, 0, TextSettings::default())?;
        let [marker, end] = &config.tokens;
        if tokenizer.token_id(marker).is_none() {
            tokenizer.add_special(&["[FLERT]", marker, end])?;
        }
        let root = VarBuilder::from_backend(Box::new(weights), placement.dtype, placement.device.clone());
        let failed = |e: candle_core::Error| ModelError::Weights(message(&e));
        let head = Head::load(&config, &root).map_err(failed)?;
        let encoder =
            Encoder::load(config.backbone, &root.pp(backbone), placement.precision).map_err(failed)?;
        let kept_memory = KeptMemory::on(encoder.device()).map_err(failed)?;
        let (mut prompt, mut places) = (Vec::new(), Vec::new());
        for label in labels {
            let at = tokenizer.leading() + prompt.len();
            places.push((at + usize::from(!config.label_is_marker)) as u32);
            tokenizer.word(marker, &mut prompt)?;
            let before = prompt.len();
            tokenizer.word(label, &mut prompt)?;
            if prompt.len() == before {
                return Err(ModelError::Unsupported(format!("label {label:?} has no tokens")));
            }
        }
        tokenizer.word(end, &mut prompt)?;
        let mut plain = Vec::new();
        tokenizer.word("kandle", &mut plain)?;
        Ok(Self {
            files,
            placement,
            parameters,
            max_width: config.max_width,
            max_words: config.max_words,
            tokenizer,
            encoder,
            head,
            prompt,
            labels: places,
            threshold,
            plain,
            queueing: Queueing::default(),
            _kept_memory: kept_memory,
        })
    }

    pub fn architecture(&self) -> &Architecture {
        self.encoder.architecture()
    }

    /// Tokens of the longest sequence, prompt and special tokens included.
    pub fn max_tokens(&self) -> usize {
        self.tokenizer.max_tokens()
    }

    /// Number of tokens that the labels take of each sequence.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt.len()
    }

    /// How many tokens of a text fit in one sequence.
    pub fn room(&self) -> usize {
        self.tokenizer.room().saturating_sub(self.prompt.len())
    }

    /// Bytes that the weights take on their device.
    pub fn weight_bytes(&self) -> u64 {
        weight_bytes(self.architecture(), self.parameters, 0, &self.placement)
    }

    /// Splits a text into words and tokenizes each.
    ///
    /// # Errors
    /// The library fails on a word.
    pub fn words(&self, text: &str) -> Result<Words, TokenizeError> {
        let mut words = Words::default();
        words::split(text, |word, place| words.push(place, |ids| self.tokenizer.word(word, ids)))?;
        Ok(words)
    }

    /// Cuts a text's words into as many parts as it needs, with an overlap of about `stride` tokens and at least the
    /// widest entity. Empty for a text without words.
    pub fn chunks(&self, words: &Words, stride: usize) -> Vec<Range<usize>> {
        words.chunks(self.room(), self.max_words, self.max_width, stride)
    }

    /// The input for a part of a text. A single word that is longer than the model takes is cut: the model reads a
    /// word's first token in any case.
    pub fn item(&self, words: &Words, part: Range<usize>) -> PromptedWords {
        let (mut ids, mut firsts) = (self.prompt.clone(), Vec::with_capacity(part.len()));
        for word in part {
            firsts.push((self.tokenizer.leading() + ids.len()) as u32);
            ids.extend_from_slice(words.tokens(word));
        }
        ids.truncate(self.tokenizer.room());
        PromptedWords { ids: self.tokenizer.whole(&ids).ids, firsts }
    }

    /// The candidates of each item, in the order of the batch. A score that is not a number is part of the answer.
    fn forward(&self, batch: &[&PromptedWords]) -> candle_core::Result<Ragged<f32>> {
        let sequences: Vec<_> = batch.iter().map(|item| (&item.ids[..], None)).collect();
        let packed = Packed::new(&sequences);
        let (mut rows, mut start) = (Rows::default(), 0);
        for (&i, length) in packed.order().iter().zip(packed.lengths()) {
            let firsts = &batch[i].firsts;
            rows.words.extend(firsts.iter().map(|&first| start + first));
            rows.labels.extend(self.labels.iter().map(|&label| start + label));
            rows.counts.push(firsts.len());
            start += length as u32;
        }
        let turn = self.queueing.turn(self.encoder.device());
        let logits = self.encoder.forward(&packed, |hidden, workspace| {
            Transfer::start(&self.head.forward(hidden, &rows, workspace)?)
        })?;
        drop(turn);
        let logits = logits.finish()?;
        let mut answers = vec![Vec::new(); batch.len()];
        let mut rest = &logits[..];
        for (&i, &words) in packed.order().iter().zip(&rows.counts) {
            let of_item;
            (of_item, rest) = rest.split_at(count_spans(words, self.max_width) * self.labels.len());
            let of_spans = spans(words, self.max_width).zip(of_item.chunks_exact(self.labels.len()));
            for ((first, last), logits) in of_spans {
                for (label, logit) in (0..).zip(logits) {
                    let score = 1.0 / (1.0 + (-logit).exp());
                    if score > self.threshold || score.is_nan() {
                        let (first, last) = (first as u32, last as u32);
                        answers[i].extend(Candidate { first, last, label, score }.values());
                    }
                }
            }
        }
        let mut all = Ragged::with_capacity(batch.len(), answers.iter().map(Vec::len).sum());
        answers.iter().for_each(|answer| all.push(answer));
        Ok(all)
    }
}

impl engine::Model for Gliner {
    type Item = PromptedWords;
    type Value = f32;

    fn run(&self, batch: &[&PromptedWords]) -> Result<Ragged<f32>, RunError> {
        failpoint::pass("device");
        self.forward(batch).map_err(|e| classify(&e.to_string()))
    }

    fn sample(&self, cost: u32) -> PromptedWords {
        let others = self.tokenizer.leading() + self.tokenizer.trailing() + self.prompt.len();
        let tokens = (cost as usize).saturating_sub(others).clamp(1, self.room());
        let mut words = Words::default();
        let place = Place { start: 0, end: 6 };
        for start in (0..tokens).step_by(self.plain.len()) {
            let some = &self.plain[..self.plain.len().min(tokens - start)];
            let push = |ids: &mut Vec<u32>| {
                ids.extend_from_slice(some);
                Ok::<(), std::convert::Infallible>(())
            };
            let Ok(()) = words.push(place, push);
        }
        self.item(&words, 0..words.len().min(self.max_words))
    }
}
