//! Tokenizes texts with the model's tokenizer.json, or one that is made of its vocabulary, up to the model's limit.

mod added;
mod cuts;
mod pair;
mod prompt;
mod sentencepiece;
mod spans;
mod unigram;
pub mod vocabulary;
mod words;

use serde_json::Value;
use tokenizers::TruncationDirection;

use self::cuts::{Cuts, Outline};
pub use self::pair::{NoRoom, Part, Shorten};
pub use self::prompt::PairPrompt;
use self::spans::Spelling;
pub use self::spans::{Span, Spans};
use super::sentence::TextSettings;
use crate::model::store::{Files, FilesError};

/// A token sequence for the encoder, special tokens included.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tokens {
    pub ids: Vec<u32>,
    /// `None` if all are 0, as for single texts in most models.
    pub type_ids: Option<Vec<u32>>,
    /// The text had more tokens than the limit.
    pub truncated: bool,
    /// How many first tokens a pooling leaves out: those of a prompt, for some models.
    pub unpooled: u32,
}

/// Why a text or pair cannot be tokenized.
#[derive(Debug, thiserror::Error)]
pub enum TokenizeError {
    #[error("the text has no tokens")]
    Empty,
    #[error("{0}")]
    Library(#[from] tokenizers::Error),
    /// The post-processor does something that kandle cannot reproduce for a text that is tokenized in parts.
    #[error("the post-processor is not supported: {0}")]
    PostProcessor(&'static str),
}

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Identifies the tokenizer in the word cache.
    id: u64,
    max_tokens: usize,
    direction: TruncationDirection,
    cuts: Cuts,
    /// Contents of added tokens.
    added: Vec<String>,
    /// Searching a text for added tokens is reliable only if it is ASCII, since some are matched in normalized text.
    added_in_ascii: bool,
    special: Special,
    /// Special tokens around a pair of texts, or why kandle does not know them.
    template: Result<pair::Template, TokenizeError>,
    /// Whether the model uses token types.
    has_types: bool,
    spelling: Spelling,
}

/// Special tokens that the post-processor puts around a text.
#[derive(Debug, Default, PartialEq, Eq)]
struct Special {
    before: Vec<u32>,
    after: Vec<u32>,
    /// Token types of `before`, of the text, and of `after`.
    types: [u32; 3],
}

impl Tokenizer {
    /// `positions`, `types`: how many positions and token types the model has. The limit in `text`, or else the tokenizer's own, applies if
    /// it is lower than `positions`.
    pub fn load(
        files: &Files,
        positions: usize,
        types: usize,
        text: TextSettings,
    ) -> Result<Self, FilesError> {
        let content = |message: String| FilesError::Content { file: "tokenizer.json".to_owned(), message };
        let bytes = match files.read("tokenizer.json")? {
            Some(bytes) => bytes,
            None => match vocabulary::tokenizer_json(files)? {
                Some(bytes) => bytes.into(),
                None => files.require("tokenizer.json")?,
            },
        };
        let bytes = match text.lower_case {
            true => lower_case_first(&bytes).map_err(|e| content(e.to_string()))?.into(),
            false => bytes,
        };
        let outline: Outline = serde_json::from_slice(&bytes).map_err(|e| content(e.to_string()))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| content(e.to_string()))?;
        let config = files.json("tokenizer_config.json")?.unwrap_or_default();
        // A tokenizer without a limit has 1e30 here.
        let own = text.max_seq_length.map(|length| length as f64).or(config["model_max_length"].as_f64());
        let max_tokens = own.unwrap_or(f64::INFINITY).min(positions as f64) as usize;
        let own = inner.get_truncation();
        let direction = match config["truncation_side"].as_str() {
            Some("left") => TruncationDirection::Left,
            Some(_) => TruncationDirection::Right,
            None => own.map_or(TruncationDirection::Right, |own| own.direction),
        };
        inner.with_truncation(None).map_err(|e| content(e.to_string()))?;
        inner.with_padding(None);
        let special = Special::of(&inner).map_err(|e| content(e.to_string()))?;
        let asks_for_types = match config["model_input_names"].as_array() {
            Some(names) => names.iter().any(|name| name == "token_type_ids"),
            // The default: generic tokenizer classes have no token types (transformers 5).
            None => !matches!(
                config["tokenizer_class"].as_str(),
                Some("TokenizersBackend" | "PreTrainedTokenizerFast")
            ),
        };
        let tokens = &outline.added_tokens;
        let normalizer = !outline.normalizer.is_null();
        Ok(Self {
            cuts: Cuts::of(&outline),
            added: tokens.iter().filter_map(|token| Some(token["content"].as_str()?.to_owned())).collect(),
            added_in_ascii: normalizer && tokens.iter().any(|token| token["normalized"] == Value::Bool(true)),
            id: words::next_tokenizer(),
            max_tokens,
            direction,
            special,
            template: pair::Template::of(&inner),
            has_types: types > 1 && asks_for_types,
            spelling: Spelling::of(&inner, &outline, &config).map_err(|e| content(e.to_string()))?,
            inner,
        })
    }

    /// Id of the padding token that tokenizer_config.json or special_tokens_map.json names.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn padding(&self, files: &Files) -> Result<Option<u32>, FilesError> {
        for file in ["tokenizer_config.json", "special_tokens_map.json"] {
            let config = files.json(file)?.unwrap_or_default();
            let token = &config["pad_token"];
            if let Some(text) = token.as_str().or(token["content"].as_str()) {
                return Ok(self.inner.token_to_id(text));
            }
        }
        Ok(None)
    }

    /// The most tokens a text may have, special ones included.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Tokenizes a text and truncates it to the limit.
    ///
    /// # Errors
    /// The text has no tokens and the tokenizer adds none, or the library fails on it.
    pub fn encode(&self, text: &str) -> Result<Tokens, TokenizeError> {
        let room = self.max_tokens.saturating_sub(self.special.count());
        let mut ids = self.special.before.clone();
        let before = ids.len();
        let truncated = match self.direction {
            TruncationDirection::Right => self.first(text, before + room, &mut ids)?,
            TruncationDirection::Left => self.last(text, before + room, &mut ids)?,
        };
        let length = ids.len() - before;
        ids.extend_from_slice(&self.special.after);
        if ids.is_empty() {
            return Err(TokenizeError::Empty);
        }
        Ok(Tokens { ids, type_ids: self.special.type_ids(length), truncated, unpooled: 0 })
    }

    /// All tokens of a text, without special ones.
    ///
    /// # Errors
    /// The library fails on the text.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>, TokenizeError> {
        let mut ids = Vec::new();
        self.first(text, usize::MAX, &mut ids)?;
        Ok(ids)
    }

    /// Appends the tokens of a word that stands on its own, as the library tokenizes the words of a text that was split
    /// before. Added tokens are recognised in it, and it may have spaces.
    ///
    /// # Errors
    /// The library fails on the word.
    pub fn word(&self, word: &str, ids: &mut Vec<u32>) -> Result<(), TokenizeError> {
        words::append(self.id, word, ids, |word, ids| {
            ids.extend_from_slice(self.inner.encode_fast(word, false)?.get_ids());
            Ok(())
        })
    }

    /// Adds special tokens to the vocabulary, in this order, behind its other tokens.
    ///
    /// # Errors
    /// The library refuses them.
    pub fn add_special(&mut self, tokens: &[&str]) -> Result<(), TokenizeError> {
        let special: Vec<_> = tokens.iter().map(|&token| tokenizers::AddedToken::from(token, true)).collect();
        self.inner.add_special_tokens(special)?;
        self.added.extend(tokens.iter().map(|&token| token.to_owned()));
        Ok(())
    }

    /// How a text may be cut, and the added tokens that it may contain.
    fn cuts_of(&self, text: &str) -> (Cuts, &[String]) {
        let unseen = self.added_in_ascii && !text.is_ascii();
        if !unseen && !self.added.iter().any(|added| text.contains(added.as_str())) {
            return (self.cuts, &[]);
        }
        match self.cuts {
            Cuts::Spaces { .. } if unseen => (Cuts::Never, &[]),
            cuts => (cuts, &self.added),
        }
    }

    /// Appends a text's first tokens until `ids` has `most`. Returns whether there were more.
    fn first(&self, text: &str, most: usize, ids: &mut Vec<u32>) -> Result<bool, TokenizeError> {
        let (cuts, added) = self.cuts_of(text);
        let mut at = 0;
        while ids.len() <= most
            && let Some(part) = cuts.part(text, at, added)
        {
            words::append(self.id, part.text, ids, |part, ids| {
                ids.extend_from_slice(self.inner.encode_fast(part, false)?.get_ids());
                Ok::<_, TokenizeError>(())
            })?;
            at = part.next;
        }
        let more = ids.len() > most;
        ids.truncate(most);
        Ok(more)
    }

    /// Appends a text's last tokens until `ids` has `most`. Returns whether there were more.
    fn last(&self, text: &str, most: usize, ids: &mut Vec<u32>) -> Result<bool, TokenizeError> {
        let (cuts, added) = self.cuts_of(text);
        let kept = ids.len();
        let mut look = (most * BYTES_PER_TOKEN).max(LEAST_LOOK);
        loop {
            let start = match text.len().checked_sub(look) {
                None | Some(0) => 0,
                Some(start) => cuts.begin_near(text, start, added),
            };
            self.first(&text[start..], usize::MAX, ids)?;
            let over = ids.len().saturating_sub(most);
            if over > 0 || start == 0 {
                ids.drain(kept..kept + over);
                return Ok(over > 0);
            }
            ids.truncate(kept);
            look *= 4;
        }
    }
}

/// tokenizer.json with a normalizer that lower-cases texts before all others, as sentence-transformers adds it for
/// `do_lower_case`.
fn lower_case_first(tokenizer: &[u8]) -> serde_json::Result<Vec<u8>> {
    let mut tokenizer: Value = serde_json::from_slice(tokenizer)?;
    let lower = serde_json::json!({ "type": "Lowercase" });
    let then = match tokenizer["normalizer"].take() {
        Value::Null => Vec::new(),
        mut sequence if sequence["type"] == "Sequence" => {
            sequence["normalizers"].as_array_mut().map(std::mem::take).unwrap_or_default()
        }
        one => vec![one],
    };
    let all: Vec<Value> = std::iter::once(lower).chain(then).collect();
    tokenizer["normalizer"] = serde_json::json!({ "type": "Sequence", "normalizers": all });
    serde_json::to_vec(&tokenizer)
}

/// Left truncation first tokenizes so many bytes of the text's end per token that is kept, but at least
/// [`LEAST_LOOK`]; then four times as many while they have too few tokens.
const BYTES_PER_TOKEN: usize = 16;
const LEAST_LOOK: usize = 4096;

impl Special {
    /// Derived from what the post-processor does to two sample texts.
    fn of(inner: &tokenizers::Tokenizer) -> Result<Self, TokenizeError> {
        let of_text = |text: &str| {
            let plain = inner.encode_fast(text, false)?;
            let (ids, length) = (plain.get_ids().to_vec(), plain.len());
            let all = inner.post_process(plain, None, true)?;
            let unknown = || TokenizeError::PostProcessor("it does more than add tokens around a text");
            let places = 0..=all.len().checked_sub(length).ok_or_else(unknown)?;
            let mut places = places.filter(|&at| all.get_ids()[at..at + length] == ids);
            let at = places.next().ok_or_else(unknown)?;
            let (types, end) = (all.get_type_ids(), at + length);
            let one = |types: &[u32]| match types {
                [] => Ok(0),
                [first, rest @ ..] if rest.iter().all(|t| t == first) => Ok(*first),
                _ => Err(unknown()),
            };
            Ok::<_, TokenizeError>(Self {
                before: all.get_ids()[..at].to_vec(),
                after: all.get_ids()[end..].to_vec(),
                types: [one(&types[..at])?, one(&types[at..end])?, one(&types[end..])?],
            })
        };
        let special = of_text("a")?;
        match special == of_text("a b, c")? {
            true => Ok(special),
            false => Err(TokenizeError::PostProcessor("the tokens that it adds depend on the text")),
        }
    }

    fn count(&self) -> usize {
        self.before.len() + self.after.len()
    }

    /// Token types for a text of `length` tokens; `None` if all are 0.
    fn type_ids(&self, length: usize) -> Option<Vec<u32>> {
        if self.types == [0; 3] {
            return None;
        }
        let counts = [self.before.len(), length, self.after.len()];
        Some(self.types.iter().zip(counts).flat_map(|(&t, count)| std::iter::repeat_n(t, count)).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Texts with characters that tokenizers treat differently.
    pub(super) fn texts() -> impl Strategy<Value = String> {
        let pieces = prop_oneof![
            5 => "[a-z]{1,8}",
            2 => "[A-Z0-9]{1,4}",
            3 => Just(" ".to_owned()),
            1 => "[ \t\n\r\u{b}\u{c}\u{0}\u{a0}\u{3000}\u{2028}]{1,3}",
            2 => "[!-/:-@\\[-`{-~]{1,3}",
            1 => "[\u{4e00}-\u{4e20}\u{f900}\u{3042}\u{30a2}\u{ac00}]{1,3}",
            1 => "[éüßñ\u{301}\u{338}\u{308}\u{345}İſKﬁ½٣ـ]{1,3}",
            1 => "[а-яёא-תء-ي\u{915}\u{93f}\u{94d}\u{600}\u{200d}\u{fe0f}\u{2581}\u{fffd}]{1,4}",
            1 => prop::sample::select(vec!["[MASK]", "<mask>", "[SEP]", "</s>", "it's", "'ll", "😀", "👩\u{200d}🔬"])
                .prop_map(str::to_owned),
            1 => "[a-z]{90,130}",
        ];
        proptest::collection::vec(pieces, 0..40).prop_map(|pieces| pieces.concat())
    }

    pub(super) fn tokenizer(path: &str, text: TextSettings) -> Tokenizer {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        let model =
            crate::settings::Model { source: Some(directory.display().to_string()), ..Default::default() };
        Tokenizer::load(&Files::find(&model).unwrap(), 1_000_000, 2, text).unwrap()
    }

    pub(super) const KINDS: [&str; 8] = [
        "demo/model",
        "tests/fixtures/roberta",
        "tests/fixtures/modernbert",
        "tests/fixtures/qwen3",
        "tests/fixtures/xlm-roberta",
        "tests/fixtures/deberta-v3",
        "tests/fixtures/spm-xlm-roberta",
        "tests/fixtures/spm-albert",
    ];

    /// Compares with the library, which tokenizes the whole text at once.
    #[track_caller]
    fn same(tokenizer: &Tokenizer, text: &str) {
        let plain = tokenizer.inner.encode_fast(text, false).unwrap().get_ids().to_vec();
        let room = tokenizer.max_tokens - tokenizer.special.count();
        let kept = match tokenizer.direction {
            _ if plain.len() <= room => &plain[..],
            TruncationDirection::Right => &plain[..room],
            TruncationDirection::Left => &plain[plain.len() - room..],
        };
        let got = tokenizer.encode(text).unwrap();
        assert_eq!(got.ids, [&tokenizer.special.before, kept, &tokenizer.special.after].concat(), "{text:?}");
        assert_eq!(got.truncated, plain.len() > room, "{text:?}");
        if !got.truncated {
            let want = tokenizer.inner.encode_fast(text, true).unwrap();
            assert_eq!(got.ids, want.get_ids(), "{text:?}");
            assert_eq!(got.type_ids.unwrap_or(vec![0; want.len()]), want.get_type_ids(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn tokens_of_parts_equal_those_of_the_whole_text(texts in proptest::collection::vec(texts(), 8), lower: bool) {
            for kind in KINDS {
                let mut tokenizer = tokenizer(kind, TextSettings { lower_case: lower, ..TextSettings::default() });
                prop_assert_ne!(tokenizer.cuts, Cuts::Never);
                for (i, text) in texts.iter().enumerate() {
                    tokenizer.max_tokens = if i % 2 == 0 { 1_000_000 } else { 12 };
                    tokenizer.direction =
                        if i % 4 == 3 { TruncationDirection::Left } else { TruncationDirection::Right };
                    same(&tokenizer, text);
                }
            }
        }
    }

    /// A megabyte without spaces, of each kind of text that tokenizers split differently. Its first part alone has more
    /// tokens than are kept.
    #[test]
    fn large_texts_without_spaces() {
        let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let base64 = (0..1usize << 20).map(|i| digits[i * i % 8191 % 64] as char).collect::<String>();
        for kind in KINDS {
            let mut tokenizer = tokenizer(kind, TextSettings::default());
            tokenizer.max_tokens = 512;
            for text in [".".repeat(1 << 20), "北京市".repeat(1 << 17), base64.clone()] {
                let head = &text[..text.floor_char_boundary(1 << 14)];
                same(&tokenizer, head);
                let got = tokenizer.encode(&text).unwrap();
                assert_eq!(got, tokenizer.encode(head).unwrap(), "{kind}: {}…", &text[..6]);
                assert!(got.truncated);
            }
        }
    }
}
