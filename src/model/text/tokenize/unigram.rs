//! A tokenizer.json for checkpoints that have only a SentencePiece model. A family's normalizer and special tokens are
//! those of the tokenizer.json files that its own checkpoints have on the hub, which transformers'
//! `convert_slow_tokenizer.py` made. Characters that no piece covers are the unknown token, as in all of them, also if
//! the model has pieces for single bytes.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::added::{AddedToken, AddedTokens};
use super::sentencepiece::{Piece, SentencePiece, Type};
use super::vocabulary::{bert_template, roberta_template};
use crate::model::store::{Files, FilesError, how_to_make};

/// A family of transformers' tokenizer classes around SentencePiece.
pub struct Family {
    /// Tokenizer class, without `Fast`.
    pub class: &'static str,
    /// config.json's `model_type`, for checkpoints that name no class.
    pub model_type: &'static str,
    pub file: &'static str,
    vocabulary: Vocabulary,
    /// Special tokens by key.
    specials: &'static [(&'static str, &'static str)],
    /// Special tokens that no key names.
    others: &'static [&'static str],
    /// The mask takes the white space before it.
    mask_strips: bool,
    /// The unknown token is found in the normalized text.
    unknown_normalized: bool,
    /// Default of `do_lower_case`; `None` if the class has no such key.
    lower_case: Option<bool>,
    normalizer: fn(&Value, bool, Option<Value>) -> Vec<Value>,
    pre_tokenizer: fn(&Value) -> Vec<Value>,
    template: fn(&Value, &Value) -> Value,
}

/// A token's text and the logarithm of its probability.
type Scored<'m> = (&'m str, f64);

/// How the pieces become the vocabulary.
enum Vocabulary {
    /// As they are.
    Same,
    /// As they are, but pieces of a digit and a comma are less likely than the two apart.
    CommasApart,
    /// Other pieces in place of the first ones, and the mask after the last one.
    Fairseq { first: &'static [(&'static str, f64)], instead_of: usize },
}

/// The families. To add one, add it here.
static FAMILIES: &[Family] = &[
    Family {
        class: "XLMRobertaTokenizer",
        model_type: "xlm-roberta",
        file: "sentencepiece.bpe.model",
        vocabulary: Vocabulary::Fairseq {
            first: &[("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)],
            instead_of: 3,
        },
        specials: ROBERTA,
        others: &[],
        mask_strips: true,
        unknown_normalized: false,
        lower_case: None,
        normalizer: |_, _, charsmap| charsmap.into_iter().collect(),
        pre_tokenizer: words,
        template: roberta_template,
    },
    Family {
        class: "CamembertTokenizer",
        model_type: "camembert",
        file: "sentencepiece.bpe.model",
        vocabulary: Vocabulary::Fairseq {
            first: &[
                ("<s>NOTUSED", 0.0),
                ("<pad>", 0.0),
                ("</s>NOTUSED", 0.0),
                ("<unk>", 0.0),
                ("<unk>NOTUSED", -100.0),
            ],
            instead_of: 1,
        },
        specials: ROBERTA,
        others: &["<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"],
        mask_strips: true,
        unknown_normalized: false,
        lower_case: None,
        normalizer: |_, _, charsmap| charsmap.into_iter().collect(),
        pre_tokenizer: words,
        template: roberta_template,
    },
    Family {
        class: "AlbertTokenizer",
        model_type: "albert",
        file: "spiece.model",
        vocabulary: Vocabulary::CommasApart,
        specials: &[
            ("bos_token", "[CLS]"),
            ("eos_token", "[SEP]"),
            ("unk_token", "<unk>"),
            ("sep_token", "[SEP]"),
            ("pad_token", "<pad>"),
            ("cls_token", "[CLS]"),
            ("mask_token", "[MASK]"),
        ],
        others: &[],
        mask_strips: true,
        unknown_normalized: false,
        lower_case: Some(true),
        normalizer: albert,
        pre_tokenizer: words,
        template: bert_template,
    },
    Family {
        class: "DebertaV2Tokenizer",
        model_type: "deberta-v2",
        file: "spm.model",
        vocabulary: Vocabulary::Same,
        specials: &[
            ("bos_token", "[CLS]"),
            ("eos_token", "[SEP]"),
            ("unk_token", "[UNK]"),
            ("sep_token", "[SEP]"),
            ("pad_token", "[PAD]"),
            ("cls_token", "[CLS]"),
            ("mask_token", "[MASK]"),
        ],
        others: &[],
        mask_strips: false,
        unknown_normalized: true,
        lower_case: Some(false),
        normalizer: deberta,
        pre_tokenizer: |config| match config["split_by_punct"].as_bool() {
            Some(true) => vec![json!({ "type": "Punctuation", "behavior": "Isolated" }), metaspace()],
            _ => vec![metaspace()],
        },
        template: bert_template,
    },
];

const ROBERTA: &[(&str, &str)] = &[
    ("bos_token", "<s>"),
    ("eos_token", "</s>"),
    ("unk_token", "<unk>"),
    ("sep_token", "</s>"),
    ("pad_token", "<pad>"),
    ("cls_token", "<s>"),
    ("mask_token", "<mask>"),
];

/// Each word alone, with "▁" before it.
fn words(_: &Value) -> Vec<Value> {
    vec![json!({ "type": "WhitespaceSplit" }), metaspace()]
}

fn metaspace() -> Value {
    json!({ "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true })
}

fn replace(what: &str, with: &str) -> Value {
    json!({ "type": "Replace", "pattern": { "String": what }, "content": with })
}

/// Quotes of TeX, accents (unless `keep_accents`), capitals.
fn albert(config: &Value, lower_case: bool, charsmap: Option<Value>) -> Vec<Value> {
    let mut steps = vec![replace("``", "\""), replace("''", "\"")];
    if config["keep_accents"].as_bool() != Some(true) {
        steps.extend([json!({ "type": "NFKD" }), json!({ "type": "StripAccents" })]);
    }
    if lower_case {
        steps.push(json!({ "type": "Lowercase" }));
    }
    steps.extend(charsmap);
    steps
}

/// Capitals, white space at both ends, and several spaces in a row.
fn deberta(_: &Value, lower_case: bool, charsmap: Option<Value>) -> Vec<Value> {
    let mut steps = Vec::new();
    if lower_case {
        steps.push(json!({ "type": "Lowercase" }));
    }
    steps.push(json!({ "type": "Strip", "strip_left": true, "strip_right": true }));
    steps.extend(charsmap);
    steps.push(json!({ "type": "Replace", "pattern": { "Regex": " {2,}" }, "content": " " }));
    steps
}

impl Family {
    /// By the tokenizer's class, or, if the checkpoint names none, by the model's type.
    pub fn of(class: Option<&str>, model_type: Option<&str>) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| match class {
            Some(class) => family.class == class,
            None => Some(family.model_type) == model_type,
        })
    }

    /// Builds a tokenizer.json; `None` if the checkpoint does not have the family's file.
    ///
    /// # Errors
    /// A file cannot be read, or it has a rule that is not reproduced: the message names both, and how to convert the
    /// tokenizer.
    pub fn tokenizer_json(&self, files: &Files, config: &Value) -> Result<Option<Vec<u8>>, FilesError> {
        let Some(bytes) = files.read(self.file)? else { return Ok(None) };
        let refused = |file: &str, message: &str| FilesError::Content {
            file: file.to_owned(),
            message: format!("{message}{}", how_to_make("tokenizer.json")),
        };
        let model = SentencePiece::read(&bytes).map_err(|message| refused(self.file, &message))?;
        self.refuse_settings(config).map_err(|message| refused("tokenizer_config.json", &message))?;
        let (pieces, unknown) = self.vocabulary.of(&model).map_err(|message| refused(self.file, &message))?;
        let control = model.pieces.iter().filter(|piece| piece.kind == Type::Control);
        let control = control.map(|piece| AddedToken::special(&piece.text));
        let others: Vec<AddedToken> = self.others.iter().map(|text| AddedToken::special(text)).collect();
        let added = AddedTokens::read(files, &self.special_tokens(), others, control)?;
        for (key, own) in self.specials {
            if added.named(key) != Some(own) {
                let message = format!(
                    "{key} is {:?}, and only {own:?} is supported with {}",
                    added.named(key).unwrap_or_default(),
                    self.class
                );
                return Err(refused("tokenizer_config.json", &message));
            }
        }
        // Of equal pieces, the library knows the last one.
        let id_of = |text: &str| pieces.iter().rposition(|(piece, _)| *piece == text);
        let entries = added
            .entries(pieces.len(), id_of)
            .map_err(|message| refused("tokenizer_config.json", &message))?;
        let special = |text: &str| {
            let entry = entries.iter().find(|entry| entry["content"] == text);
            json!([text, entry.map(|entry| &entry["id"])])
        };
        let (cls, sep) = match self.specials {
            [(_, bos), (_, eos), ..] => (special(bos), special(eos)),
            _ => (Value::Null, Value::Null),
        };
        let charsmap = (!model.charsmap.is_empty()).then(
            || json!({ "type": "Precompiled", "precompiled_charsmap": STANDARD.encode(&model.charsmap) }),
        );
        let lower_case = config["do_lower_case"].as_bool().or(self.lower_case).unwrap_or(false);
        let normalizers = (self.normalizer)(config, lower_case, charsmap);
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": entries,
            "normalizer": { "type": "Sequence", "normalizers": normalizers },
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": (self.pre_tokenizer)(config) },
            "post_processor": (self.template)(&cls, &sep),
            "decoder": null,
            "model": { "type": "Unigram", "unk_id": unknown, "byte_fallback": false, "vocab": pieces },
        });
        Ok(Some(tokenizer.to_string().into_bytes()))
    }

    /// # Errors
    /// tokenizer_config.json has a setting that the class does not know, or that is not reproduced.
    fn refuse_settings(&self, config: &Value) -> Result<(), String> {
        if config["add_prefix_space"].as_bool() == Some(false) {
            return Err("add_prefix_space: false is not supported".to_owned());
        }
        if config["do_lower_case"].as_bool() == Some(true) && self.lower_case.is_none() {
            return Err(format!("do_lower_case: true is not supported with {}", self.class));
        }
        match config["sp_model_kwargs"].as_object() {
            Some(settings) if !settings.is_empty() => {
                Err(format!("sp_model_kwargs: {} is not supported", config["sp_model_kwargs"]))
            }
            _ => Ok(()),
        }
    }

    /// The class's special tokens by key.
    fn special_tokens(&self) -> Vec<(&'static str, AddedToken)> {
        let tokens = self.specials.iter().map(|(key, text)| {
            let token = AddedToken::special(text);
            let token = match *key {
                "mask_token" => AddedToken { lstrip: self.mask_strips, ..token },
                "unk_token" => AddedToken { normalized: self.unknown_normalized, ..token },
                _ => token,
            };
            (*key, token)
        });
        tokens.collect()
    }
}

impl Vocabulary {
    /// Text and score of each token, and the unknown token's id.
    ///
    /// # Errors
    /// The first pieces are not those that the family's models have.
    fn of<'m>(&self, model: &'m SentencePiece) -> Result<(Vec<Scored<'m>>, usize), String> {
        let pieces = model.pieces.iter().map(|piece| (piece.text.as_str(), piece.score));
        match self {
            Self::Same => Ok((pieces.collect(), model.unknown)),
            Self::CommasApart => {
                let apart = |(text, score)| {
                    (text, if ends_with_digit_and_comma(text) { score - 100.0 } else { score })
                };
                Ok((pieces.map(apart).collect(), model.unknown))
            }
            Self::Fairseq { first, instead_of } => {
                let replaced = model.pieces.get(..*instead_of).unwrap_or_default();
                let special = |piece: &Piece| matches!(piece.kind, Type::Unknown | Type::Control);
                if replaced.is_empty() || !replaced.iter().all(special) {
                    return Err(format!(
                        "its first {instead_of} pieces are not the unknown and the control pieces"
                    ));
                }
                let unknown = first.iter().position(|(text, _)| *text == "<unk>").unwrap_or_default();
                let first = first.iter().copied();
                Ok((first.chain(pieces.skip(*instead_of)).chain([("<mask>", 0.0)]).collect(), unknown))
            }
        }
    }
}

/// Such as "9,": ALBERT's own tokenizer cuts them into "9" and ",".
fn ends_with_digit_and_comma(piece: &str) -> bool {
    piece.strip_suffix(',').and_then(|rest| rest.chars().next_back()).is_some_and(char::is_numeric)
}
