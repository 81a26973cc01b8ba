//! Reads numbers, texts and booleans of a JSON value, in arrays of any depth, as the elements of a tensor.

use serde_json::value::RawValue;

use crate::codec::json;
use crate::model::onnx::{DatumType, type_name};
use crate::record::{Fault, RecordError};

/// The elements that were read.
#[derive(Debug, Default)]
pub struct Elements {
    /// Those of numbers and booleans, in the machine's byte order.
    pub bytes: Vec<u8>,
    pub texts: Vec<String>,
}

impl Elements {
    pub fn mark(&self) -> Mark {
        Mark { bytes: self.bytes.len(), texts: self.texts.len() }
    }

    /// How many of this type were added since.
    pub fn since(&self, mark: Mark, kind: DatumType) -> usize {
        match kind {
            DatumType::String => self.texts.len() - mark.texts,
            kind => (self.bytes.len() - mark.bytes) / kind.size_of(),
        }
    }

    /// Discards what was added since.
    fn truncate(&mut self, mark: Mark) {
        self.bytes.truncate(mark.bytes);
        self.texts.truncate(mark.texts);
    }
}

/// How much there was at some time.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    bytes: usize,
    texts: usize,
}

/// One element: what stands for a missing one.
#[derive(Debug, Clone, PartialEq)]
pub enum Element {
    Bytes(Vec<u8>),
    Text(String),
}

impl Element {
    pub fn push(&self, to: &mut Elements) {
        match self {
            Self::Bytes(bytes) => to.bytes.extend_from_slice(bytes),
            Self::Text(text) => to.texts.push(text.clone()),
        }
    }
}

/// How the elements of one input are read.
#[derive(Debug)]
pub struct Scan<'a> {
    pub kind: DatumType,
    /// Used instead of `null`.
    pub missing: Option<&'a Element>,
    /// More elements than this are an error.
    pub most: usize,
}

/// Arrays within arrays: ONNX has no tensors of more dimensions.
const DEPTH: usize = 32;

impl Scan<'_> {
    /// Appends the elements of a value and returns its shape: of a single element, `[]`. `pointer` is where the value is
    /// in the record, for errors.
    ///
    /// # Errors
    /// An element has the wrong type or does not fit it, or arrays beside each other have different lengths.
    pub fn read(
        &self,
        value: &RawValue,
        pointer: &str,
        to: &mut Elements,
    ) -> Result<Vec<usize>, RecordError> {
        let json = value.get();
        if !json.starts_with('[') {
            self.element(json, to).map_err(|wrong| wrong.at(pointer, &[]))?;
            return Ok(Vec::new());
        }
        let first = to.mark();
        let mut arrays = Arrays { scan: self, json, at: 0, shape: Vec::new(), path: Vec::new(), first };
        match arrays.value(0, to) {
            Ok(()) => Ok(arrays.shape.into_iter().map(Option::unwrap_or_default).collect()),
            Err(wrong) => {
                let error = wrong.at(pointer, &arrays.path);
                to.truncate(first);
                Err(error)
            }
        }
    }

    /// Appends one element.
    fn element(&self, json: &str, to: &mut Elements) -> Result<(), Wrong> {
        if json == "null" {
            match self.missing {
                Some(element) => element.push(to),
                None if self.kind == DatumType::F32 => to.bytes.extend(f32::NAN.to_ne_bytes()),
                None if self.kind == DatumType::F64 => to.bytes.extend(f64::NAN.to_ne_bytes()),
                None if self.kind == DatumType::F16 => to.bytes.extend(half::f16::NAN.to_ne_bytes()),
                None => return Err(Wrong::Missing(self.kind)),
            }
            return Ok(());
        }
        match self.kind {
            DatumType::F32 => float(json, |json| json.parse().ok().filter(|x: &f32| x.is_finite()))
                .map(|x| to.bytes.extend(x.to_ne_bytes())),
            DatumType::F64 => float(json, |json| json.parse().ok().filter(|x: &f64| x.is_finite()))
                .map(|x| to.bytes.extend(x.to_ne_bytes())),
            DatumType::F16 => {
                float(json, |json| json.parse().ok().map(half::f16::from_f32).filter(|x| x.is_finite()))
                    .map(|x| to.bytes.extend(x.to_ne_bytes()))
            }
            DatumType::I64 => integer(json).map(|n: i64| to.bytes.extend(n.to_ne_bytes())),
            DatumType::I32 => integer(json).map(|n: i32| to.bytes.extend(n.to_ne_bytes())),
            DatumType::I16 => integer(json).map(|n: i16| to.bytes.extend(n.to_ne_bytes())),
            DatumType::I8 => integer(json).map(|n: i8| to.bytes.extend(n.to_ne_bytes())),
            DatumType::U64 => integer(json).map(|n: u64| to.bytes.extend(n.to_ne_bytes())),
            DatumType::U32 => integer(json).map(|n: u32| to.bytes.extend(n.to_ne_bytes())),
            DatumType::U16 => integer(json).map(|n: u16| to.bytes.extend(n.to_ne_bytes())),
            DatumType::U8 => integer(json).map(|n: u8| to.bytes.extend(n.to_ne_bytes())),
            DatumType::Bool => boolean(json).map(|is| to.bytes.push(u8::from(is))),
            DatumType::String if json.starts_with('"') => match serde_json::from_str(json) {
                Ok(text) => {
                    to.texts.push(text);
                    Ok(())
                }
                Err(error) => Err(Wrong::Text(error.to_string())),
            },
            _ => Err(Wrong::Type),
        }
        .map_err(|wrong| match wrong {
            Wrong::Type => Wrong::Kind(json::what_is(json), self.kind),
            Wrong::Value => Wrong::Unfit(shortened(json), self.kind),
            other => other,
        })
    }

    /// A default of the settings as an element.
    ///
    /// # Errors
    /// It has another type; says which.
    pub fn default_of(kind: DatumType, value: &serde_json::Value) -> Result<Element, String> {
        let (json, mut to) = (value.to_string(), Elements::default());
        Scan { kind, missing: None, most: 1 }.element(&json, &mut to).map_err(|wrong| wrong.message())?;
        Ok(match to.texts.pop() {
            Some(text) => Element::Text(text),
            None => Element::Bytes(to.bytes),
        })
    }
}

/// What is wrong with an element or an array.
#[derive(Debug)]
enum Wrong {
    /// Not of the wanted type.
    Type,
    /// Of the wanted type, and not a value of it.
    Value,
    Kind(&'static str, DatumType),
    Unfit(String, DatumType),
    Missing(DatumType),
    Text(String),
    Length {
        length: usize,
        before: usize,
    },
    Mixed,
    TooMany(usize),
    TooDeep,
}

impl Wrong {
    fn message(&self) -> String {
        match self {
            Self::Type | Self::Value => "is not what the model takes".to_owned(),
            Self::Kind(is, kind) => format!("is {is}, and the model takes {}", type_name(*kind)),
            Self::Unfit(value, kind) => format!("is {value}, which {} cannot hold", type_name(*kind)),
            Self::Missing(kind) => {
                format!("is null, and {} cannot be missing: set task.defaults", type_name(*kind))
            }
            Self::Text(error) => error.clone(),
            Self::Length { length, before } => {
                format!("has {length} elements, and the arrays before it have {before}")
            }
            Self::Mixed => "is not as deep as the arrays before it".to_owned(),
            Self::TooMany(most) => format!("is one more than the {most} elements that the model takes"),
            Self::TooDeep => format!("is in more than {DEPTH} arrays"),
        }
    }

    /// The error for an element whose place in its arrays is `path`.
    fn at(&self, pointer: &str, path: &[usize]) -> RecordError {
        let mut place = pointer.to_owned();
        for index in path {
            place.push('/');
            place.push_str(&index.to_string());
        }
        RecordError::new(Fault::Field, format!("{place:?} {}", self.message()))
    }
}

/// A cursor in nested arrays. The JSON is valid, as its reader has checked.
struct Arrays<'a> {
    scan: &'a Scan<'a>,
    json: &'a str,
    at: usize,
    /// The length of the arrays at each depth, once one has ended.
    shape: Vec<Option<usize>>,
    /// Where the cursor is.
    path: Vec<usize>,
    /// What was there before.
    first: Mark,
}

impl Arrays<'_> {
    fn skip_space(&mut self) {
        let rest = &self.json.as_bytes()[self.at..];
        self.at += rest.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
    }

    fn peek(&mut self) -> u8 {
        self.skip_space();
        self.json.as_bytes().get(self.at).copied().unwrap_or(b']')
    }

    fn value(&mut self, depth: usize, to: &mut Elements) -> Result<(), Wrong> {
        if self.peek() != b'[' {
            if depth != self.shape.len() {
                return Err(Wrong::Mixed);
            }
            if to.since(self.first, self.scan.kind) >= self.scan.most {
                return Err(Wrong::TooMany(self.scan.most));
            }
            let end = self.end();
            let json = &self.json[self.at..end];
            self.scan.element(json, to)?;
            self.at = end;
            return Ok(());
        }
        if depth == DEPTH {
            return Err(Wrong::TooDeep);
        }
        if depth == self.shape.len() {
            // Nothing that is no array was at this depth.
            if to.since(self.first, self.scan.kind) > 0 || self.shape.iter().any(Option::is_some) {
                return Err(Wrong::Mixed);
            }
            self.shape.push(None);
        }
        self.at += 1;
        self.path.push(0);
        let mut length = 0;
        while self.peek() != b']' {
            if let Some(index) = self.path.last_mut() {
                *index = length;
            }
            self.value(depth + 1, to)?;
            length += 1;
            if self.peek() == b',' {
                self.at += 1;
            }
        }
        self.at += 1;
        self.path.pop();
        match self.shape[depth] {
            None => self.shape[depth] = Some(length),
            Some(before) if before == length => {}
            Some(before) => return Err(Wrong::Length { length, before }),
        }
        Ok(())
    }

    /// Where the element ends that begins here.
    fn end(&self) -> usize {
        let bytes = &self.json.as_bytes()[self.at..];
        let length = match bytes.first() {
            Some(b'"') => {
                let mut at = 1;
                while let Some(found) = bytes.get(at..).and_then(|rest| memchr::memchr2(b'"', b'\\', rest)) {
                    at += found + 1;
                    if bytes[at - 1] == b'"' {
                        break;
                    }
                    at += 1;
                }
                at
            }
            Some(b'{') => {
                let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<&RawValue>();
                let _ = values.next();
                values.byte_offset()
            }
            _ => {
                let ends = |byte: &u8| matches!(byte, b',' | b']') || byte.is_ascii_whitespace();
                bytes.iter().position(ends).unwrap_or(bytes.len())
            }
        };
        self.at + length.min(bytes.len())
    }
}

fn is_number(json: &str) -> bool {
    json.starts_with(|c: char| c == '-' || c.is_ascii_digit())
}

/// A number, or 1 for true and 0 for false.
fn float<T>(json: &str, parse: impl Fn(&str) -> Option<T>) -> Result<T, Wrong> {
    let json = match json {
        "true" => "1",
        "false" => "0",
        json if is_number(json) => json,
        _ => return Err(Wrong::Type),
    };
    parse(json).ok_or(Wrong::Value)
}

/// Integers also as JSON writes them with a fraction or an exponent: `3.0`, `1e3`.
fn integer<T: TryFrom<i128>>(json: &str) -> Result<T, Wrong> {
    let whole = match json {
        "true" => 1,
        "false" => 0,
        _ if is_number(json) => match json.parse::<i128>() {
            Ok(whole) => whole,
            // 2⁵³: beyond it, an f64 does not say which integer was meant.
            Err(_) => match json.parse::<f64>() {
                Ok(x) if x.fract() == 0.0 && x.abs() <= 9_007_199_254_740_992.0 => x as i128,
                _ => return Err(Wrong::Value),
            },
        },
        _ => return Err(Wrong::Type),
    };
    T::try_from(whole).map_err(|_| Wrong::Value)
}

fn boolean(json: &str) -> Result<bool, Wrong> {
    match json {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ if is_number(json) => Err(Wrong::Value),
        _ => Err(Wrong::Type),
    }
}

/// The beginning of a long number.
fn shortened(json: &str) -> String {
    const LONGEST: usize = 40;
    if json.len() <= LONGEST { json.to_owned() } else { format!("{}…", &json[..LONGEST]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(kind: DatumType, json: &str) -> Result<(Vec<usize>, Elements), String> {
        let value: &RawValue = serde_json::from_str(json).unwrap();
        let (scan, mut to) = (Scan { kind, missing: None, most: 8 }, Elements::default());
        let shape = scan.read(value, "/x", &mut to).map_err(|error| error.message)?;
        Ok((shape, to))
    }

    fn floats(json: &str) -> (Vec<usize>, Vec<f32>) {
        let (shape, to) = read(DatumType::F32, json).unwrap();
        let of = |bytes: &[u8; 4]| f32::from_ne_bytes(*bytes);
        (shape, to.bytes.as_chunks().0.iter().map(of).collect())
    }

    #[test]
    fn numbers_booleans_and_arrays() {
        assert_eq!(floats("1.5"), (vec![], vec![1.5]));
        assert_eq!(floats(" [ 1 , -2e1,true ] "), (vec![3], vec![1.0, -20.0, 1.0]));
        assert_eq!(floats("[[1,2],[3,4],[5,6]]"), (vec![3, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        assert_eq!(floats("[]"), (vec![0], vec![]));
        assert_eq!(floats("[[],[]]"), (vec![2, 0], vec![]));
        assert!(floats("null").1[0].is_nan());
    }

    #[test]
    fn texts_keep_their_escapes_and_brackets() {
        let (shape, to) = read(DatumType::String, r#"["a]", "\"\\", "\u00fc,"]"#).unwrap();
        assert_eq!((shape, to.texts), (vec![3], ["a]", "\"\\", "ü,"].map(str::to_owned).into()));
    }

    #[test]
    fn integers_are_exact() {
        let one = |json: &str| {
            read(DatumType::I64, json).map(|(_, to)| i64::from_ne_bytes(to.bytes.try_into().unwrap()))
        };
        assert_eq!(one("9223372036854775807"), Ok(i64::MAX));
        assert_eq!(one("-9007199254740993"), Ok(-9_007_199_254_740_993));
        assert_eq!(one("3.0"), Ok(3));
        assert_eq!(one("1e3"), Ok(1000));
        assert_eq!(
            one("9223372036854775808").unwrap_err(),
            "\"/x\" is 9223372036854775808, which int64 cannot hold"
        );
        assert_eq!(one("2.5").unwrap_err(), "\"/x\" is 2.5, which int64 cannot hold");
    }

    #[test]
    fn errors_say_what_and_where() {
        let error = |kind, json: &str| read(kind, json).unwrap_err();
        for (kind, json, message) in [
            (DatumType::F32, "\"3\"", "\"/x\" is a string, and the model takes float"),
            (DatumType::F32, "[1,[2]]", "\"/x/1\" is not as deep as the arrays before it"),
            (DatumType::F32, "[[1],2]", "\"/x/1\" is not as deep as the arrays before it"),
            (DatumType::F32, "[[1,2],[3]]", "\"/x/1\" has 1 elements, and the arrays before it have 2"),
            (DatumType::F32, "[1,{\"a\":[1]},2]", "\"/x/1\" is an object, and the model takes float"),
            (DatumType::F32, "[1,1e400]", "\"/x/1\" is 1e400, which float cannot hold"),
            (DatumType::F64, "1e400", "\"/x\" is 1e400, which double cannot hold"),
            (DatumType::F32, "1e39", "\"/x\" is 1e39, which float cannot hold"),
            (DatumType::F16, "70000", "\"/x\" is 70000, which float16 cannot hold"),
            (DatumType::U8, "-1", "\"/x\" is -1, which uint8 cannot hold"),
            (DatumType::Bool, "2", "\"/x\" is 2, which bool cannot hold"),
            (DatumType::String, "3", "\"/x\" is a number, and the model takes string"),
            (DatumType::I64, "[1,null]", "\"/x/1\" is null, and int64 cannot be missing: set task.defaults"),
            (
                DatumType::F32,
                "[0,0,0,0,0,0,0,0,0]",
                "\"/x/8\" is one more than the 8 elements that the model takes",
            ),
        ] {
            assert_eq!(error(kind, json), message, "{json}");
        }
    }

    #[test]
    fn a_failed_value_leaves_nothing_behind() {
        let value: &RawValue = serde_json::from_str("[1,2,\"x\"]").unwrap();
        let mut to = Elements { bytes: vec![7; 4], texts: vec![] };
        assert!(Scan { kind: DatumType::F32, missing: None, most: 9 }.read(value, "/x", &mut to).is_err());
        assert_eq!(to.bytes, [7; 4]);
    }
}
