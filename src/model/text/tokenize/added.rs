//! The tokens that a checkpoint adds to its vocabulary, special ones among them: from tokenizer_config.json,
//! special_tokens_map.json and added_tokens.json, in the order in which transformers adds them.

use serde_json::{Value, json};

use super::vocabulary::content;
use crate::model::store::{Files, FilesError};

/// Special tokens by the key that names them, in the order in which transformers adds them.
pub const KEYS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Lists of further special tokens.
const LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// A token that is found in a text before it is tokenized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedToken {
    pub content: String,
    /// Takes the white space before it.
    pub lstrip: bool,
    pub rstrip: bool,
    /// Found only between other characters than letters and digits.
    pub single_word: bool,
    /// Found in the normalized text.
    pub normalized: bool,
    pub special: bool,
}

impl AddedToken {
    pub fn special(content: &str) -> Self {
        Self::plain(content, true)
    }

    fn plain(content: &str, special: bool) -> Self {
        let normalized = !special;
        Self {
            content: content.to_owned(),
            lstrip: false,
            rstrip: false,
            single_word: false,
            normalized,
            special,
        }
    }

    /// A token in one of the files: its text, or an object with `content`.
    fn read(value: &Value, special: bool) -> Option<Self> {
        let special = value["special"].as_bool().unwrap_or(special);
        let plain = Self::plain(content(value)?, special);
        let flag = |key: &str, default: bool| value[key].as_bool().unwrap_or(default);
        Some(Self {
            lstrip: flag("lstrip", false),
            rstrip: flag("rstrip", false),
            single_word: flag("single_word", false),
            normalized: flag("normalized", plain.normalized),
            ..plain
        })
    }

    /// Its entry in tokenizer.json.
    fn with_id(&self, id: u64) -> Value {
        json!({
            "id": id, "content": self.content, "single_word": self.single_word, "lstrip": self.lstrip,
            "rstrip": self.rstrip, "normalized": self.normalized, "special": self.special,
        })
    }
}

/// Added tokens in the order of their addition, each at most once.
#[derive(Debug, Default)]
pub struct AddedTokens {
    tokens: Vec<AddedToken>,
    /// Content and id of those whose id a file says.
    stated: Vec<(String, u64)>,
    /// Content of the special tokens by the place of their key in [`KEYS`].
    named: [Option<String>; KEYS.len()],
}

impl AddedTokens {
    /// `defaults`: the special tokens of the tokenizer's class by key, for keys that no file has. `others`: those that no key
    /// names, unless a file lists such tokens. `control`: pieces of the vocabulary that never stand for text.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn read(
        files: &Files,
        defaults: &[(&str, AddedToken)],
        others: Vec<AddedToken>,
        control: impl Iterator<Item = AddedToken>,
    ) -> Result<Self, FilesError> {
        let config = files.json("tokenizer_config.json")?.unwrap_or_default();
        let map = files.json("special_tokens_map.json")?.unwrap_or_default();
        let old = files.json("added_tokens.json")?.unwrap_or_default();
        // With this key, transformers ignores the two other files.
        let all_in_config = config["added_tokens_decoder"].is_object();
        let files_in_order = if all_in_config { vec![&config] } else { vec![&map, &config] };
        let of_key = |key: &str| {
            let value = files_in_order.iter().map(|file| &file[key]).find(|value| content(value).is_some());
            let default = defaults.iter().find(|(known, _)| *known == key).map(|(_, token)| token.clone());
            // A bare text has the flags of the class if it is the class's own token.
            match value {
                Some(Value::String(text)) if default.as_ref().is_some_and(|own| own.content == *text) => {
                    default
                }
                Some(value) => AddedToken::read(value, true),
                None => default,
            }
        };
        let lists = files_in_order.iter().flat_map(|file| LISTS.map(|key| &file[key]));
        let listed = lists.flat_map(|list| list.as_array().into_iter().flatten());
        let listed: Vec<AddedToken> = listed.filter_map(|token| AddedToken::read(token, true)).collect();
        let listed = if listed.is_empty() { others } else { listed };
        let named = KEYS.map(of_key);
        let mut all = Self::default();
        control.for_each(|token| all.replace(token));
        match config["added_tokens_decoder"].as_object() {
            Some(decoder) => {
                let tokens = decoder
                    .iter()
                    .filter_map(|(id, token)| Some((id.parse().ok()?, AddedToken::read(token, false)?)));
                all.state(tokens.collect());
            }
            None => {
                let is_special =
                    |text: &str| named.iter().flatten().chain(&listed).any(|token| token.content == text);
                let old = old.as_object().into_iter().flatten();
                let tokens = old
                    .filter_map(|(text, id)| Some((id.as_u64()?, AddedToken::plain(text, is_special(text)))));
                all.state(tokens.collect());
            }
        }
        all.named = named.clone().map(|token| token.map(|token| token.content));
        named.into_iter().flatten().chain(listed).for_each(|token| all.add(token));
        Ok(all)
    }

    /// Adds tokens whose ids are stated, by id.
    fn state(&mut self, mut tokens: Vec<(u64, AddedToken)>) {
        tokens.sort_by_key(|(id, _)| *id);
        for (id, token) in tokens {
            self.stated.push((token.content.clone(), id));
            self.replace(token);
        }
    }

    fn add(&mut self, token: AddedToken) {
        if !self.tokens.iter().any(|known| known.content == token.content) {
            self.tokens.push(token);
        }
    }

    fn replace(&mut self, token: AddedToken) {
        match self.tokens.iter_mut().find(|known| known.content == token.content) {
            Some(known) => *known = token,
            None => self.tokens.push(token),
        }
    }

    /// Content of the special token that a key names.
    pub fn named(&self, key: &str) -> Option<&str> {
        let at = KEYS.iter().position(|known| *known == key)?;
        self.named[at].as_deref()
    }

    /// The entries in tokenizer.json, by id. A token outside of the vocabulary of `count` pieces has the next free id
    /// after it.
    ///
    /// # Errors
    /// A file says another id: the message names the token and both ids.
    pub fn entries(&self, count: usize, id_of: impl Fn(&str) -> Option<usize>) -> Result<Vec<Value>, String> {
        let mut next = count as u64;
        let mut entries = Vec::new();
        for token in &self.tokens {
            let id = id_of(&token.content).map_or_else(
                || {
                    next += 1;
                    next - 1
                },
                |id| id as u64,
            );
            if let Some((_, stated)) =
                self.stated.iter().find(|(text, stated)| *text == token.content && *stated != id)
            {
                return Err(format!(
                    "the added token {:?} has the id {stated}, but the vocabulary gives it {id}",
                    token.content
                ));
            }
            entries.push((id, token.with_id(id)));
        }
        entries.sort_by_key(|(id, _)| *id);
        Ok(entries.into_iter().map(|(_, entry)| entry).collect())
    }
}
