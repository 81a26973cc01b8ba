//! Reads a SentencePiece model: its pieces, its normalizer, and whether tokenizers with both give the same tokens.
//!
//! The format is a protocol buffer (github.com/google/sentencepiece, `src/sentencepiece_model.proto`). Fields that
//! change no token are not declared here, and prost skips them.

use std::borrow::Cow;

use prost::Message;
use tokenizers::normalizers::Precompiled;
use tokenizers::{NormalizedString, Normalizer};

/// What a model says of itself.
#[derive(Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer_spec: Option<NormalizerSpec>,
}

#[derive(Message)]
struct PieceProto {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3", default = "1")]
    kind: Option<i32>,
}

#[derive(Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3", default = "1")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
    #[prost(int32, optional, tag = "40")]
    unk_id: Option<i32>,
}

#[derive(Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3", default = "true")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    escape_whitespaces: Option<bool>,
}

/// A piece's type, by its number in the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Byte,
}

/// An entry of the vocabulary. Its id is its place in the list.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    pub text: String,
    /// Logarithm of its probability.
    pub score: f64,
    pub kind: Type,
}

/// A unigram model whose tokens a tokenizer with Metaspace finds too.
#[derive(Debug)]
pub struct SentencePiece {
    pub pieces: Vec<Piece>,
    /// Id of the piece for all that no other piece covers.
    pub unknown: usize,
    /// The normalizer, as the format stores it; empty if texts are not normalized.
    pub charsmap: Vec<u8>,
}

/// What SentencePiece writes for a space.
const SPACE: char = '\u{2581}';

impl SentencePiece {
    /// # Errors
    /// The bytes are not a SentencePiece model, or it has a rule that kandle does not reproduce: the message names it.
    pub fn read(bytes: &[u8]) -> Result<Self, Cow<'static, str>> {
        let model = ModelProto::decode(bytes).map_err(|e| format!("not a SentencePiece model: {e}"))?;
        let (trainer, normalizer) =
            (model.trainer_spec.unwrap_or_default(), model.normalizer_spec.unwrap_or_default());
        match trainer.model_type() {
            1 => {}
            2 => return Err("model_type BPE is not supported, only UNIGRAM".into()),
            3 => return Err("model_type WORD is not supported, only UNIGRAM".into()),
            4 => return Err("model_type CHAR is not supported, only UNIGRAM".into()),
            other => return Err(format!("model_type {other} is not supported, only UNIGRAM").into()),
        }
        for (key, value, supported) in [
            ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix(), false),
            ("add_dummy_prefix", normalizer.add_dummy_prefix(), true),
            ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces(), true),
            ("escape_whitespaces", normalizer.escape_whitespaces(), true),
        ] {
            if value != supported {
                return Err(format!("{key}: {value} is not supported").into());
            }
        }
        let charsmap = normalizer.precompiled_charsmap.unwrap_or_default();
        let mut pieces: Vec<Piece> = model.pieces.into_iter().map(piece).collect::<Result<_, _>>()?;
        if let Some(piece) = pieces.iter().find(|piece| !is_one_word(&piece.text)) {
            return Err(
                format!("the piece {:?} spans several words, which is not supported", piece.text).into()
            );
        }
        prefer_user_defined(&mut pieces, &charsmap)?;
        let unknown = trainer.unk_id() as usize;
        match pieces.get(unknown) {
            Some(piece) if piece.kind == Type::Unknown => Ok(Self { pieces, unknown, charsmap }),
            _ => Err(format!("unk_id {} is not that of the unknown piece", trainer.unk_id()).into()),
        }
    }
}

fn piece(proto: PieceProto) -> Result<Piece, Cow<'static, str>> {
    let kind = match proto.kind() {
        1 => Type::Normal,
        2 => Type::Unknown,
        3 => Type::Control,
        4 => Type::UserDefined,
        6 => Type::Byte,
        5 => {
            return Err(
                format!("the piece {:?} is of type UNUSED, which is not supported", proto.piece()).into()
            );
        }
        other => return Err(format!("the piece {:?} is of the unknown type {other}", proto.piece()).into()),
    };
    let score = f64::from(proto.score());
    match proto.piece.filter(|text| !text.is_empty() && score.is_finite()) {
        Some(text) => Ok(Piece { text, score, kind }),
        None => Err("a piece is empty, or its score is not a number".into()),
    }
}

/// Whether Metaspace never cuts within this piece: it begins a part of a text at each "▁".
fn is_one_word(piece: &str) -> bool {
    piece.chars().skip(1).all(|c| c != SPACE) || piece.chars().all(|c| c == SPACE)
}

/// Gives user-defined pieces the score with which SentencePiece prefers them to all other pieces of the same text
/// (`unigram_model.cc`, "User defined symbol receives extra bonus").
///
/// # Errors
/// The normalizer changes such a piece, from which SentencePiece protects it.
fn prefer_user_defined(pieces: &mut [Piece], charsmap: &[u8]) -> Result<(), Cow<'static, str>> {
    let normal = pieces.iter().filter(|piece| piece.kind == Type::Normal);
    let best = normal.map(|piece| piece.score).fold(f64::NEG_INFINITY, f64::max);
    let user_defined = pieces.iter_mut().filter(|piece| piece.kind == Type::UserDefined);
    let mut user_defined = user_defined.peekable();
    if user_defined.peek().is_none() || !best.is_finite() {
        return Ok(());
    }
    let normalizer = match charsmap {
        [] => None,
        charsmap => Some(Precompiled::from(charsmap).map_err(|e| format!("precompiled_charsmap: {e}"))?),
    };
    for piece in user_defined {
        let mut normalized = NormalizedString::from(piece.text.as_str());
        if let Some(normalizer) = &normalizer {
            normalizer.normalize(&mut normalized).map_err(|e| format!("precompiled_charsmap: {e}"))?;
        }
        if normalized.get() != piece.text {
            return Err(format!(
                "the normalizer changes the user-defined piece {:?}, which is not supported",
                piece.text
            )
            .into());
        }
        piece.score = piece.text.len() as f64 * best - 0.1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model of three pieces that is supported.
    fn model() -> ModelProto {
        let piece = |text: &str, score: f32, kind: i32| PieceProto {
            piece: Some(text.to_owned()),
            score: Some(score),
            kind: Some(kind),
        };
        ModelProto {
            pieces: vec![piece("<unk>", 0.0, 2), piece("\u{2581}a", -1.5, 1), piece("<s>", 0.0, 3)],
            trainer_spec: None,
            normalizer_spec: None,
        }
    }

    fn read(model: &ModelProto) -> Result<SentencePiece, String> {
        SentencePiece::read(&model.encode_to_vec()).map_err(Cow::into_owned)
    }

    #[test]
    fn what_is_not_in_the_file_has_the_formats_default() {
        let read = read(&model()).unwrap();
        assert_eq!((read.unknown, read.charsmap.len()), (0, 0));
        assert_eq!(read.pieces[1], Piece { text: "\u{2581}a".to_owned(), score: -1.5, kind: Type::Normal });
    }

    #[test]
    fn a_user_defined_piece_wins_against_others() {
        let mut proto = model();
        proto.pieces.push(PieceProto { piece: Some("()".to_owned()), score: Some(0.0), kind: Some(4) });
        let score = read(&proto).unwrap().pieces[3].score;
        assert!((score - (2.0 * -1.5 - 0.1)).abs() < 1e-12, "{score}");
    }

    #[test]
    fn rules_that_are_not_reproduced_are_named() {
        let said = |change: fn(&mut ModelProto)| {
            let mut proto = model();
            change(&mut proto);
            read(&proto).unwrap_err()
        };
        type Change = fn(&mut ModelProto);
        let cases: [(Change, &str); 10] = [
            (|m| m.trainer_spec.get_or_insert_default().model_type = Some(2), "model_type BPE"),
            (|m| m.trainer_spec.get_or_insert_default().model_type = Some(4), "model_type CHAR"),
            (
                |m| m.trainer_spec.get_or_insert_default().treat_whitespace_as_suffix = Some(true),
                "treat_whitespace_as_suffix: true",
            ),
            (|m| m.trainer_spec.get_or_insert_default().unk_id = Some(1), "unk_id 1"),
            (
                |m| m.normalizer_spec.get_or_insert_default().add_dummy_prefix = Some(false),
                "add_dummy_prefix: false",
            ),
            (
                |m| m.normalizer_spec.get_or_insert_default().remove_extra_whitespaces = Some(false),
                "remove_extra_whitespaces: false",
            ),
            (
                |m| m.normalizer_spec.get_or_insert_default().escape_whitespaces = Some(false),
                "escape_whitespaces: false",
            ),
            (|m| m.pieces[1].kind = Some(5), "UNUSED"),
            (|m| m.pieces[1].piece = Some("a\u{2581}b".to_owned()), "several words"),
            (|m| m.pieces[1].score = Some(f32::NAN), "not a number"),
        ];
        for (change, says) in cases {
            let message = said(change);
            assert!(message.contains(says), "{message}");
        }
        assert!(SentencePiece::read(b"<html>").unwrap_err().contains("not a SentencePiece model"));
    }
}
