//! Where a text may be cut before it is tokenized, so that the tokens of its parts, one after the other, are those of
//! the whole. This depends on the kind of tokenizer; the tests compare it with the tokenizers library.
//!
//! | tokenizer | cut |
//! |---|---|
//! | WordPiece behind BERT's normalizer and pre-tokenizer | at white space, around ASCII punctuation and Chinese characters |
//! | byte-level BPE with GPT-2's pattern or Qwen's | before a single space between characters that neither combine nor are white space |
//! | Metaspace behind normalizers that keep single spaces (SentencePiece) | at the same spaces |
//!
//! A tokenizer needs hundreds of bytes of memory for each byte of a text. In parts, a text of any length needs little.

use serde::Deserialize;
use serde_json::Value;

/// The longest part in bytes. A longer text without a valid cut is cut here anyway: its tokens around the cut may
/// differ from those of the whole.
pub(super) const LONGEST: usize = 16 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cuts {
    /// WordPiece.
    Words {
        /// A word with more characters is one unknown token.
        longest_word: usize,
        chinese: bool,
    },
    /// At single spaces. The space begins the next part (`keep`, byte-level BPE), or is in neither part (Metaspace).
    Spaces { keep: bool },
    /// No valid cut is known.
    Never,
}

/// tokenizer.json without its vocabulary, which is slow to parse.
#[derive(Debug, Deserialize)]
pub(super) struct Outline {
    #[serde(default)]
    pub normalizer: Value,
    #[serde(default)]
    pub pre_tokenizer: Value,
    #[serde(default)]
    pub added_tokens: Vec<Value>,
    pub model: ModelOutline,
}

#[derive(Debug, Deserialize)]
pub(super) struct ModelOutline {
    #[serde(default, rename = "type")]
    pub kind: String,
    pub max_input_chars_per_word: Option<usize>,
    pub continuing_subword_prefix: Option<String>,
    pub unk_token: Option<String>,
}

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Part<'t> {
    pub text: &'t str,
    /// Offset in bytes from which the next part is searched.
    pub next: usize,
}

impl Cuts {
    pub fn of(tokenizer: &Outline) -> Self {
        let kind = |value: &Value| value["type"].as_str().unwrap_or_default().to_owned();
        // The members of a sequence; a single step is its only member.
        let members = |value: &Value, list: &str| match kind(value).as_str() {
            "Sequence" => value[list].as_array().cloned().unwrap_or_default(),
            "" => Vec::new(),
            _ => vec![value.clone()],
        };
        let normalizers = members(&tokenizer.normalizer, "normalizers");
        let splitters = members(&tokenizer.pre_tokenizer, "pretokenizers");
        let names = |list: &[Value]| list.iter().map(kind).collect::<Vec<_>>();
        let (normalizer, splitter) = (names(&normalizers), names(&splitters));
        let splitter: Vec<&str> = splitter.iter().map(String::as_str).collect();
        let unicode = |name: &String| {
            matches!(
                name.as_str(),
                "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "StripAccents" | "Precompiled"
            )
        };
        let cuts = match (tokenizer.model.kind.as_str(), splitter.as_slice()) {
            ("WordPiece", ["BertPreTokenizer"])
                if normalizer.last().is_some_and(|last| last == "BertNormalizer")
                    && normalizer[..normalizer.len() - 1].iter().all(|name| name == "Lowercase") =>
            {
                Self::Words {
                    longest_word: tokenizer.model.max_input_chars_per_word.unwrap_or(100),
                    chinese: normalizers
                        .last()
                        .and_then(|last| last["handle_chinese_chars"].as_bool())
                        .unwrap_or(true),
                }
            }
            ("BPE", ["ByteLevel"])
                if normalizer.iter().all(unicode) && splitters[0]["use_regex"].as_bool() != Some(false) =>
            {
                Self::Spaces { keep: true }
            }
            ("BPE", ["Split", "ByteLevel"])
                if normalizer.iter().all(unicode) && splits_like_qwen(&splitters) =>
            {
                Self::Spaces { keep: true }
            }
            ("Unigram" | "BPE", ["Metaspace"] | ["WhitespaceSplit", "Metaspace"])
                if splitters.last().is_some_and(metaspace)
                    && normalizers.iter().all(|n| unicode(&kind(n)) || keeps_single_spaces(n)) =>
            {
                Self::Spaces { keep: false }
            }
            _ => return Self::Never,
        };
        // An added token that is matched in lower-cased text cannot be found by its content.
        let hidden = |token: &Value| {
            matches!(cuts, Self::Spaces { .. })
                && token["normalized"].as_bool() == Some(true)
                && normalizer.iter().any(|name| name == "Lowercase")
        };
        match tokenizer.added_tokens.iter().all(|token| cuts.spares(token) && !hidden(token)) {
            true => cuts,
            false => Self::Never,
        }
    }

    /// Whether no cut goes through this added token or removes white space that it would have absorbed.
    fn spares(self, token: &Value) -> bool {
        let content = token["content"].as_str().unwrap_or_default();
        let swallows = token["rstrip"].as_bool() == Some(true);
        // A token of several white space characters is never cut, because cuts are at single spaces.
        let blank = content.chars().all(char::is_whitespace);
        let crossed = content.contains(char::is_whitespace) && !(blank && content.chars().count() > 1);
        match self {
            Self::Words { .. } => !content.contains(char::is_whitespace),
            Self::Spaces { keep } => !(crossed || keep && swallows),
            Self::Never => true,
        }
    }

    /// The part that begins at `start`, or after the white space there; `None` at the end of the text. `added` are the
    /// added tokens that the text may contain: it is not cut within or next to them.
    pub fn part<'t>(&self, text: &'t str, start: usize, added: &[String]) -> Option<Part<'t>> {
        match *self {
            Self::Words { longest_word, chinese } => {
                word(text, start, longest_word, chinese, !added.is_empty())
            }
            Self::Spaces { keep } => {
                let begin = start;
                let bytes = text.as_bytes();
                // A part has at least one character: a space at its start is no cut.
                let mut at = begin + 1;
                while at < bytes.len() && at - begin < LONGEST {
                    if bytes[at] == b' ' && is_cut(text, at, added) {
                        let next = if keep { at } else { at + 1 };
                        return Some(Part { text: &text[begin..at], next });
                    }
                    at += 1;
                }
                rest(text, begin, at)
            }
            Self::Never => rest(text, start, start + LONGEST),
        }
    }

    /// The first offset at or after `from` where a part may begin; `from` if there is none within [`LONGEST`].
    pub fn begin_near(&self, text: &str, from: usize, added: &[String]) -> usize {
        let from = text.ceil_char_boundary(from);
        let near = text.floor_char_boundary((from + LONGEST).min(text.len()));
        let spaces = text[from..near].match_indices([' ', '\t', '\n', '\r']).map(|(at, _)| from + at);
        let found = match *self {
            Self::Words { .. } | Self::Never => spaces.map(|at| at + 1).next(),
            Self::Spaces { keep } => {
                let cut = |at: &usize| text.as_bytes()[*at] == b' ' && is_cut(text, *at, added);
                spaces.filter(cut).map(|at| if keep { at } else { at + 1 }).next()
            }
        };
        found.unwrap_or(from)
    }
}

/// Whether these pre-tokenizers are those of Qwen2 and Qwen3. A space between characters that are not white space is at
/// the start of a word, or a word of its own.
fn splits_like_qwen(splitters: &[Value]) -> bool {
    const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let [split, bytes] = splitters else { return false };
    split["pattern"]["Regex"].as_str() == Some(PATTERN)
        && split["behavior"] == "Isolated"
        && split["invert"] == Value::Bool(false)
        && bytes["use_regex"] == Value::Bool(false)
        && bytes["add_prefix_space"] == Value::Bool(false)
}

/// Whether Metaspace puts a "▁" before each part, so that all parts are treated alike.
fn metaspace(splitter: &Value) -> bool {
    splitter["split"].as_bool() != Some(false)
        && splitter["add_prefix_space"].as_bool() != Some(false)
        && splitter["prepend_scheme"].as_str().is_none_or(|scheme| scheme == "always")
}

/// Whether a normalizer neither removes nor adds a single space between other characters: it works on the ends of a text
/// or on several white space characters, as those of XLM-R and DeBERTa do, or on text without any, as ALBERT's.
fn keeps_single_spaces(normalizer: &Value) -> bool {
    let is_space = |c: char| c.is_whitespace() || c == '\u{2581}';
    let content = normalizer["content"].as_str().unwrap_or_default();
    match normalizer["type"].as_str() {
        Some("Strip") => true,
        Some("Replace") => {
            match (normalizer["pattern"]["Regex"].as_str(), normalizer["pattern"]["String"].as_str()) {
                (Some(" {2,}"), _) => matches!(content, " " | "\u{2581}"),
                (Some(r"\s{2,}|[\n\r\t]"), _) => content == " ",
                (None, Some(text)) => !text.contains(is_space) && !content.contains(is_space),
                _ => false,
            }
        }
        _ => false,
    }
}

/// The text from `start` to `end`, as one part.
fn rest(text: &str, start: usize, end: usize) -> Option<Part<'_>> {
    let end = text.floor_char_boundary(end.min(text.len()));
    (start < end).then(|| Part { text: &text[start..end], next: end })
}

/// Whether a text may be cut at the space at `at`: it is a single space between characters that no normalizer joins
/// with it or replaces with white space, and it is not next to an added token (the library extracts those first,
/// without the space).
fn is_cut(text: &str, at: usize, added: &[String]) -> bool {
    let (before, after) = (&text[..at], &text[at + 1..]);
    before.chars().next_back().is_some_and(is_plain)
        && after.chars().next().is_some_and(is_plain)
        && !added.iter().any(|added| before.ends_with(added) || after.starts_with(added))
}

/// Printable ASCII except the space, and letters of scripts in which letters do not combine.
fn is_plain(c: char) -> bool {
    matches!(c,
        '!'..='~'
        | '\u{c0}'..='\u{d6}' | '\u{d8}'..='\u{f6}' | '\u{f8}'..='\u{24f}'
        | '\u{386}' | '\u{388}'..='\u{3ff}'
        | '\u{400}'..='\u{481}' | '\u{48a}'..='\u{52f}'
        | '\u{5d0}'..='\u{5ea}'
        | '\u{620}'..='\u{63f}' | '\u{641}'..='\u{64a}'
        | '\u{3041}'..='\u{3096}' | '\u{30a1}'..='\u{30fa}'
        | '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7a3}')
}

/// Chinese characters as BERT's normalizer defines them.
fn is_chinese(c: char) -> bool {
    matches!(c,
        '\u{4e00}'..='\u{9fff}' | '\u{3400}'..='\u{4dbf}' | '\u{20000}'..='\u{2a6df}' | '\u{2a700}'..='\u{2b73f}'
        | '\u{2b740}'..='\u{2b81f}' | '\u{2b920}'..='\u{2ceaf}' | '\u{f900}'..='\u{faff}' | '\u{2f800}'..='\u{2fa1f}')
}

/// The next WordPiece word, punctuation mark or Chinese character; with `whole`, all text up to white space.
fn word(text: &str, start: usize, longest: usize, chinese: bool, whole: bool) -> Option<Part<'_>> {
    let bytes = text.as_bytes();
    let space = |b: u8| matches!(b, b' ' | b'\t' | b'\n' | b'\r');
    let begin = start + bytes[start..].iter().position(|&b| !space(b))?;
    let mut at = begin;
    // Whether the word has only ASCII letters and digits, so that its bytes are its characters.
    let mut simple = true;
    while at < bytes.len() {
        if !simple && at - begin >= LONGEST {
            return rest(text, begin, begin + LONGEST);
        }
        let b = bytes[at];
        if b.is_ascii_alphanumeric() {
            at += 1;
            continue;
        }
        if space(b) || (!whole && b.is_ascii_punctuation()) {
            break;
        }
        let c = text[at..].chars().next().unwrap_or_default();
        if chinese && !whole && is_chinese(c) {
            break;
        }
        simple = false;
        at += c.len_utf8();
    }
    if at == begin {
        // A punctuation mark or Chinese character is a part.
        at = text.ceil_char_boundary(begin + 1);
    }
    let end = if simple { at.min(begin + longest + 1) } else { at };
    Some(Part { text: &text[begin..end], next: at })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(cuts: Cuts, text: &str) -> Vec<&str> {
        let (mut parts, mut at) = (Vec::new(), 0);
        while let Some(part) = cuts.part(text, at, &[]) {
            assert!(part.next > at);
            at = part.next;
            parts.push(part.text);
        }
        parts
    }

    const WORDS: Cuts = Cuts::Words { longest_word: 5, chinese: true };

    #[test]
    fn words_punctuation_marks_and_chinese_characters_are_parts() {
        assert_eq!(
            parts(WORDS, " it's\t北京, née\u{301}e "),
            ["it", "'", "s", "北", "京", ",", "née\u{301}e"]
        );
        assert_eq!(parts(WORDS, "  "), [""; 0]);
        assert_eq!(parts(WORDS, "abcdefgh ij"), ["abcdef", "ij"], "one more than the longest is enough");
    }

    #[test]
    fn cuts_are_at_single_spaces_between_plain_characters() {
        let text = "a b  c d\u{301} \u{301}e \u{2581}f é g";
        assert_eq!(
            parts(Cuts::Spaces { keep: false }, text),
            ["a", "b  c", "d\u{301} \u{301}e \u{2581}f", "é", "g"]
        );
        assert_eq!(
            parts(Cuts::Spaces { keep: true }, text),
            ["a", " b  c", " d\u{301} \u{301}e \u{2581}f", " é", " g"]
        );
    }

    #[test]
    fn a_text_without_valid_cuts_is_cut_at_the_longest_part() {
        let long = "é".repeat(LONGEST);
        for cuts in [WORDS, Cuts::Spaces { keep: true }, Cuts::Never] {
            let parts = parts(cuts, &long);
            assert!(parts.iter().all(|part| part.len() <= LONGEST + 4), "{cuts:?}");
            assert_eq!(parts.concat(), long, "{cuts:?}");
        }
    }

    #[test]
    fn cuts_follow_from_the_kind_of_tokenizer() {
        let of = |path: &str| {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path).join("tokenizer.json");
            Cuts::of(&serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())
        };
        let of_json = |json: &Value| Cuts::of(&serde_json::from_value(json.clone()).unwrap());
        assert_eq!(of("demo/model"), Cuts::Words { longest_word: 100, chinese: true });
        assert_eq!(of("tests/fixtures/roberta"), Cuts::Spaces { keep: true });
        assert_eq!(of("tests/fixtures/qwen3"), Cuts::Spaces { keep: true });
        assert_eq!(of("tests/fixtures/gemma3_text"), Cuts::Never);
        assert_eq!(of("tests/fixtures/xlm-roberta"), Cuts::Spaces { keep: false });
        assert_eq!(of("tests/fixtures/deberta-v3"), Cuts::Spaces { keep: false });
        let mut unknown =
            serde_json::json!({ "model": { "type": "WordPiece" }, "pre_tokenizer": { "type": "Digits" } });
        assert_eq!(of_json(&unknown), Cuts::Never);
        unknown["pre_tokenizer"]["type"] = "BertPreTokenizer".into();
        unknown["normalizer"]["type"] = "BertNormalizer".into();
        assert_ne!(of_json(&unknown), Cuts::Never);
        unknown["added_tokens"] = serde_json::json!([{ "content": "New York" }]);
        assert_eq!(of_json(&unknown), Cuts::Never);
    }
}
