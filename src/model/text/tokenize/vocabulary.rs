//! A tokenizer.json for checkpoints that have only their vocabulary: `vocab.txt` (WordPiece), `vocab.json` with
//! `merges.txt` (byte-level BPE), or a SentencePiece model ([`super::unigram`]). Texts get the token ids that transformers'
//! fast tokenizers give them. A checkpoint that adds tokens to `vocab.txt` or `vocab.json` is refused.

use serde_json::{Map, Value, json};

use super::unigram::Family;
use crate::model::store::{Files, FilesError, how_to_make};

/// The files that a tokenizer is made of if there is no tokenizer.json.
pub const FILES: &[&str] = &[
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "special_tokens_map.json",
    "added_tokens.json",
];

/// A family of transformers' tokenizer classes that are built alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bert,
    /// WordPiece, with RoBERTa's special tokens.
    MpNet,
    Roberta,
}

impl Kind {
    /// By the tokenizer's class, else by the model's type.
    fn of(tokenizer: &Value, model: &Value) -> Option<Self> {
        match (class(tokenizer, model), model["model_type"].as_str()) {
            (Some("BertTokenizer" | "DistilBertTokenizer" | "ElectraTokenizer"), _) => Some(Self::Bert),
            (Some("MPNetTokenizer"), _) => Some(Self::MpNet),
            (Some("RobertaTokenizer"), _) => Some(Self::Roberta),
            (Some(_), _) => None,
            (None, Some("bert" | "distilbert" | "electra" | "nomic_bert")) => Some(Self::Bert),
            (None, Some("mpnet")) => Some(Self::MpNet),
            (None, Some("roberta")) => Some(Self::Roberta),
            (None, _) => None,
        }
    }

    /// The special tokens that the class has by default.
    fn defaults(self) -> [(&'static str, &'static str); 5] {
        match self {
            Self::Bert => [
                ("cls_token", "[CLS]"),
                ("sep_token", "[SEP]"),
                ("unk_token", "[UNK]"),
                ("pad_token", "[PAD]"),
                ("mask_token", "[MASK]"),
            ],
            Self::MpNet => [
                ("cls_token", "<s>"),
                ("sep_token", "</s>"),
                ("unk_token", "[UNK]"),
                ("pad_token", "<pad>"),
                ("mask_token", "<mask>"),
            ],
            Self::Roberta => [
                ("cls_token", "<s>"),
                ("sep_token", "</s>"),
                ("unk_token", "<unk>"),
                ("pad_token", "<pad>"),
                ("mask_token", "<mask>"),
            ],
        }
    }
}

impl Kind {
    /// Key and text of the checkpoint's special tokens: special_tokens_map.json comes before tokenizer_config.json.
    fn special_tokens<'a>(self, config: &'a Value, map: &'a Value) -> [(&'static str, &'a str); 5] {
        self.defaults()
            .map(|(key, default)| (key, content(&map[key]).or(content(&config[key])).unwrap_or(default)))
    }
}

/// The tokenizer's class in tokenizer_config.json or config.json, without `Fast`.
fn class<'a>(tokenizer: &'a Value, model: &'a Value) -> Option<&'a str> {
    let class = tokenizer["tokenizer_class"].as_str().or(model["tokenizer_class"].as_str());
    class.map(|class| class.trim_end_matches("Fast"))
}

/// Builds a tokenizer.json from the vocabulary files; `None` if the checkpoint has no vocabulary that kandle reads.
///
/// # Errors
/// A file of the vocabulary cannot be read, lacks a special token, or has a rule that kandle does not reproduce.
pub fn tokenizer_json(files: &Files) -> Result<Option<Vec<u8>>, FilesError> {
    let config = files.json("tokenizer_config.json")?.unwrap_or_default();
    let model = files.json("config.json")?.unwrap_or_default();
    if let Some(family) = Family::of(class(&config, &model), model["model_type"].as_str()) {
        return family.tokenizer_json(files, &config);
    }
    let Some(kind) = Kind::of(&config, &model) else { return Ok(None) };
    let (file, vocabulary, merges) = match kind {
        Kind::Bert | Kind::MpNet => match files.read("vocab.txt")? {
            Some(bytes) => ("vocab.txt", word_pieces(text("vocab.txt", &bytes)?), Vec::new()),
            None => return Ok(None),
        },
        Kind::Roberta => match (files.json("vocab.json")?, files.read("merges.txt")?) {
            (Some(Value::Object(vocabulary)), Some(merges)) => {
                ("vocab.json", vocabulary, merges_of(text("merges.txt", &merges)?))
            }
            _ => return Ok(None),
        },
    };
    let map = files.json("special_tokens_map.json")?.unwrap_or_default();
    let specials = kind.special_tokens(&config, &map);
    refuse_added(&specials, &config, &map, &files.json("added_tokens.json")?.unwrap_or_default())?;
    let mut special = Map::new();
    let mut added = Vec::new();
    for (key, content) in specials {
        let Some(id) = vocabulary.get(content).and_then(Value::as_u64) else {
            if matches!(key, "mask_token" | "pad_token") {
                continue;
            }
            let message = format!("{key} {content:?} is not in the vocabulary");
            return Err(FilesError::Content { file: file.to_owned(), message });
        };
        let lstrip = key == "mask_token" && kind != Kind::Bert;
        added.push(json!({
            "id": id, "content": content, "single_word": false, "lstrip": lstrip, "rstrip": false,
            "normalized": false, "special": true,
        }));
        special.insert(key.to_owned(), json!([content, id]));
    }
    added.sort_by_key(|token| token["id"].as_u64());
    added.dedup_by_key(|token| token["id"].as_u64());
    let flag = |key: &str, default: bool| config[key].as_bool().unwrap_or(default);
    let (cls, sep) = (&special["cls_token"], &special["sep_token"]);
    let word_piece = || {
        json!({
            "type": "WordPiece", "unk_token": special["unk_token"][0], "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocabulary,
        })
    };
    let normalizer = || {
        json!({
            "type": "BertNormalizer", "clean_text": true, "lowercase": flag("do_lower_case", true),
            "handle_chinese_chars": flag("tokenize_chinese_chars", true), "strip_accents": config["strip_accents"],
        })
    };
    let (model, normalizer, pre_tokenizer, post_processor) = match kind {
        Kind::Bert => {
            (word_piece(), normalizer(), json!({ "type": "BertPreTokenizer" }), bert_template(cls, sep))
        }
        Kind::MpNet => {
            (word_piece(), normalizer(), json!({ "type": "BertPreTokenizer" }), roberta(cls, sep, false))
        }
        Kind::Roberta => {
            let prefix = flag("add_prefix_space", false);
            let model = json!({
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                "end_of_word_suffix": "", "fuse_unk": false, "vocab": vocabulary, "merges": merges,
            });
            let bytes = json!({ "type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true });
            (model, Value::Null, bytes, roberta(cls, sep, prefix))
        }
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": null, "model": model,
    });
    Ok(Some(tokenizer.to_string().into_bytes()))
}

fn text<'a>(file: &str, bytes: &'a [u8]) -> Result<&'a str, FilesError> {
    std::str::from_utf8(bytes)
        .map_err(|error| FilesError::Content { file: file.to_owned(), message: error.to_string() })
}

/// # Errors
/// The checkpoint adds tokens of its own to the vocabulary.
fn refuse_added(
    specials: &[(&str, &str)],
    config: &Value,
    map: &Value,
    added: &Value,
) -> Result<(), FilesError> {
    let lists = ["additional_special_tokens", "extra_special_tokens"];
    let listed = [config, map].into_iter().flat_map(|file| lists.map(|key| &file[key]));
    let listed = listed.flat_map(|list| list.as_array().into_iter().flatten()).filter_map(content);
    let decoder = config["added_tokens_decoder"].as_object().into_iter().flatten();
    let decoder = decoder.filter_map(|(_, token)| content(token));
    let added = added.as_object().into_iter().flatten().map(|(token, _)| token.as_str());
    match listed
        .chain(decoder)
        .chain(added)
        .find(|token| !specials.iter().any(|(_, special)| special == token))
    {
        None => Ok(()),
        Some(token) => Err(FilesError::Content {
            file: "tokenizer_config.json".to_owned(),
            message: format!(
                "the checkpoint adds the token {token:?} to its vocabulary, which kandle reads from tokenizer.json \
                 alone{}",
                how_to_make("tokenizer.json")
            ),
        }),
    }
}

/// A special token: its text, or an object with `content`.
pub fn content(value: &Value) -> Option<&str> {
    value.as_str().or(value["content"].as_str())
}

/// One token per line; its id is the line number. For a repeated token the last line counts.
fn word_pieces(text: &str) -> Map<String, Value> {
    text.lines().zip(0u64..).map(|(token, id)| (token.to_owned(), id.into())).collect()
}

/// One merge of two parts per line; the first line is the version.
fn merges_of(text: &str) -> Vec<String> {
    let lines = text.lines().filter(|line| !line.starts_with("#version") && !line.trim().is_empty());
    lines.map(str::to_owned).collect()
}

/// `[CLS] A [SEP]`, and `[CLS] A [SEP] B [SEP]` with token type 1 from B on.
pub fn bert_template(cls: &Value, sep: &Value) -> Value {
    template(cls, sep, json!([token(cls, 0), part("A", 0), token(sep, 0), part("B", 1), token(sep, 1)]))
}

/// `<s> A </s>`, and `<s> A </s></s> B </s>`, all of token type 0.
pub fn roberta_template(cls: &Value, sep: &Value) -> Value {
    let sep_token = token(sep, 0);
    template(cls, sep, json!([token(cls, 0), part("A", 0), sep_token, sep_token, part("B", 0), sep_token]))
}

/// `cls A sep`, and `pair`. A special token is a list of its text and id.
fn template(cls: &Value, sep: &Value, pair: Value) -> Value {
    let special = |token: &Value| json!({ "id": token[0], "ids": [token[1]], "tokens": [token[0]] });
    let name = |token: &Value| token[0].as_str().unwrap_or_default().to_owned();
    json!({
        "type": "TemplateProcessing", "single": [token(cls, 0), part("A", 0), token(sep, 0)], "pair": pair,
        "special_tokens": { name(cls): special(cls), name(sep): special(sep) },
    })
}

fn token(token: &Value, kind: u32) -> Value {
    json!({ "SpecialToken": { "id": token[0], "type_id": kind } })
}

fn part(name: &str, kind: u32) -> Value {
    json!({ "Sequence": { "id": name, "type_id": kind } })
}

/// `<s> A </s>`, and `<s> A </s></s> B </s>`, all of token type 0.
fn roberta(cls: &Value, sep: &Value, add_prefix_space: bool) -> Value {
    json!({
        "type": "RobertaProcessing", "cls": cls, "sep": sep, "trim_offsets": true,
        "add_prefix_space": add_prefix_space,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_counts_before_the_models_type() {
        let kind = |class: Value, model: &str| {
            Kind::of(&json!({ "tokenizer_class": class }), &json!({ "model_type": model }))
        };
        assert_eq!(kind("BertTokenizerFast".into(), "roberta"), Some(Kind::Bert));
        assert_eq!(kind("XLMRobertaTokenizer".into(), "bert"), None);
        assert_eq!(kind(Value::Null, "mpnet"), Some(Kind::MpNet));
        assert_eq!(kind(Value::Null, "gte"), None);
        let of_model = json!({ "model_type": "bert", "tokenizer_class": "BertJapaneseTokenizer" });
        assert_eq!(Kind::of(&Value::Null, &of_model), None);
    }

    #[test]
    fn tokens_beyond_the_vocabulary_are_refused() {
        let refused = |config: Value, map: Value, added: Value| {
            refuse_added(&Kind::Bert.special_tokens(&config, &map), &config, &map, &added)
                .map_err(|error| error.to_string())
        };
        let own = json!({ "0": { "content": "[PAD]" } });
        assert_eq!(refused(json!({ "added_tokens_decoder": own }), Value::Null, Value::Null), Ok(()));
        for (config, map, added) in [
            (json!({ "added_tokens_decoder": { "9": { "content": "[NEW]" } } }), Value::Null, Value::Null),
            (Value::Null, json!({ "additional_special_tokens": ["[NEW]"] }), Value::Null),
            (Value::Null, Value::Null, json!({ "[NEW]": 9 })),
        ] {
            let message = refused(config, map, added).unwrap_err();
            assert!(message.contains("[NEW]") && message.contains("save_pretrained"), "{message}");
        }
    }

    #[test]
    fn lines_end_as_python_reads_them() {
        let vocabulary = word_pieces("[PAD]\r\na\nb\na\n");
        assert_eq!(vocabulary.get("a"), Some(&3.into()));
        assert_eq!((vocabulary.len(), vocabulary.get("[PAD]")), (3, Some(&0.into())));
        assert_eq!(merges_of("#version: 0.2\na b\n# c\n\n"), ["a b", "# c"]);
    }
}
