//! How a vector is written: `task.encoding`.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{NUMBER, TaskError, to_json};
use crate::codec::write::schema::Type;
use crate::record::RecordError;
use crate::settings::{self, Encoding};

/// The type of a vector in a prediction.
pub fn type_of(task: &settings::Task) -> Type {
    match task.encoding {
        Encoding::Float => Type::list(Type::Float),
        Encoding::Base64 => Type::Text,
        Encoding::Int8 | Encoding::Ubinary => Type::list(Type::Integer),
    }
}

/// Problems with the keys that say how a vector is written.
pub fn rules(task: &settings::Task) -> Option<(&'static str, String)> {
    let unused = task.ranges.is_some() && task.encoding != Encoding::Int8;
    unused.then(|| ("ranges", "has no effect without encoding: int8".to_owned()))
}

/// A vector's form in a prediction.
#[derive(Debug, Clone, PartialEq)]
pub enum Encoder {
    /// A JSON array of numbers.
    Float,
    /// The base64 (RFC 4648) of the values as little-endian f32: the `base64` of OpenAI's embeddings API.
    Base64,
    Int8(Ranges),
    /// A JSON array of bytes: the i-th bit, from the highest of the first byte, says whether value i is greater than 0.
    /// Equals numpy's `packbits(vector > 0)`.
    Ubinary,
}

/// Where each value's 256 steps begin, and how large one is: value x is step ⌊(x − start) / step⌋, as a number from −128
/// to 127. This is how `quantize_embeddings` of sentence-transformers computes its `int8`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranges {
    starts: Vec<f32>,
    steps: Vec<f32>,
}

/// Without `task.ranges`, values are between −4 and 4 over the square root of the vector's width. A vector of length 1
/// has a root mean square of 1 over that root, so that this is four standard deviations to each side.
const DEVIATIONS: f32 = 4.0;

impl Encoder {
    /// `width`: number of values of a vector; `normalize`: whether its length is 1.
    ///
    /// # Errors
    /// `int8` has no ranges: the model does not scale its vectors to length 1 and `task.ranges` is not set, or that file
    /// is not one of ranges.
    pub fn new(task: &settings::Task, normalize: bool, width: usize) -> Result<Self, TaskError> {
        let wrong = |message: String| TaskError::Setting { key: "task.ranges", message };
        Ok(match task.encoding {
            Encoding::Float => Self::Float,
            Encoding::Base64 => Self::Base64,
            Encoding::Ubinary => Self::Ubinary,
            Encoding::Int8 => Self::Int8(match &task.ranges {
                Some(path) => Ranges::read(path, width).map_err(wrong)?,
                None if normalize => Ranges::of_unit_vectors(width),
                None => {
                    return Err(wrong(
                        "is required for encoding: int8, since the vectors do not have length 1: \
                         a file with [[lowest value, …], [highest value, …]]"
                            .to_owned(),
                    ));
                }
            }),
        })
    }

    /// Appends the vector as a JSON value.
    pub fn write(&self, vector: &[f32], out: &mut Vec<u8>) -> Result<(), RecordError> {
        match self {
            Self::Float => return to_json(&vector, out),
            Self::Base64 => {
                out.push(b'"');
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                base64(&bytes, out);
                out.push(b'"');
            }
            Self::Int8(ranges) => integers(ranges.quantized(vector), out),
            Self::Ubinary => integers(vector.chunks(8).map(packed), out),
        }
        Ok(())
    }

    /// Maximum bytes of a vector of `width` values.
    pub fn bytes(&self, width: usize) -> usize {
        match self {
            Self::Float => width * NUMBER,
            Self::Base64 => (width * size_of::<f32>()).div_ceil(3) * 4 + 2,
            Self::Int8(_) => width * "-128,".len() + 2,
            Self::Ubinary => width.div_ceil(8) * "255,".len() + 2,
        }
    }
}

impl Ranges {
    fn of_unit_vectors(width: usize) -> Self {
        let most = DEVIATIONS / (width as f32).sqrt();
        Self::new(&vec![-most; width], &vec![most; width])
    }

    fn new(lowest: &[f32], highest: &[f32]) -> Self {
        let step = |(low, high): (&f32, &f32)| match (high - low) / 255.0 {
            0.0 => 1.0,
            step => step,
        };
        Self { starts: lowest.to_vec(), steps: lowest.iter().zip(highest).map(step).collect() }
    }

    /// Reads `[[lowest value, …], [highest value, …]]`, each list as long as a vector.
    fn read(path: &Path, width: usize) -> Result<Self, String> {
        let failed = |message: String| format!("{}: {message}", path.display());
        let text = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
        let [lowest, highest]: [Vec<f32>; 2] = serde_json::from_slice(&text)
            .map_err(|error| failed(format!("is not [[lowest value, …], [highest value, …]]: {error}")))?;
        for list in [&lowest, &highest] {
            if list.len() != width {
                return Err(failed(format!("has {} values in a list, but a vector has {width}", list.len())));
            }
        }
        let ordered =
            |at: &usize| lowest[*at].is_finite() && highest[*at].is_finite() && lowest[*at] <= highest[*at];
        match (0..width).find(|at| !ordered(at)) {
            None => Ok(Self::new(&lowest, &highest)),
            Some(at) => Err(failed(format!(
                "value {at} of a vector is from {} to {}: the first must be the lower one",
                lowest[at], highest[at]
            ))),
        }
    }

    fn quantized(&self, vector: &[f32]) -> impl Iterator<Item = i16> {
        let ranges = self.starts.iter().zip(&self.steps);
        vector
            .iter()
            .zip(ranges)
            .map(|(x, (start, step))| ((x - start) / step).floor().clamp(0.0, 255.0) as i16 - 128)
    }
}

/// Eight values as the bits of a byte, the first as the highest one.
fn packed(values: &[f32]) -> u8 {
    values.iter().enumerate().fold(0, |byte, (at, &x)| byte | u8::from(x > 0.0) << (7 - at))
}

/// Appends a JSON array of integers.
fn integers<T: itoa::Integer>(values: impl Iterator<Item = T>, out: &mut Vec<u8>) {
    out.push(b'[');
    let mut buffer = itoa::Buffer::new();
    for (at, value) in values.enumerate() {
        if at > 0 {
            out.push(b',');
        }
        out.extend_from_slice(buffer.format(value).as_bytes());
    }
    out.push(b']');
}

/// Appends the base64 of bytes, with padding (RFC 4648, section 4).
fn base64(bytes: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + bytes.len().div_ceil(3) * 4, 0);
    STANDARD.encode_slice(bytes, &mut out[start..]).expect("there is room for all digits");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(encoder: &Encoder, vector: &[f32]) -> String {
        let mut out = Vec::new();
        encoder.write(vector, &mut out).unwrap();
        assert!(out.len() <= encoder.bytes(vector.len()), "{encoder:?}");
        String::from_utf8(out).unwrap()
    }

    /// The examples of RFC 4648, section 10.
    #[test]
    fn base64_equals_the_standard() {
        for (text, want) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            let mut out = Vec::new();
            base64(text.as_bytes(), &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), want);
        }
        assert_eq!(written(&Encoder::Base64, &[1.0, -2.5]), "\"AACAPwAAIMA=\"");
    }

    #[test]
    fn bits_begin_with_the_highest() {
        let vector = [0.1, -0.1, 0.0, 0.2, -0.3, -0.4, -0.5, 0.6, 0.7];
        assert_eq!(written(&Encoder::Ubinary, &vector), "[145,128]");
    }

    #[test]
    fn values_outside_of_their_range_are_clipped() {
        let ranges = Ranges::new(&[-1.0, 0.0, 2.0, 0.0], &[1.0, 255.0, 2.0, 1.0]);
        // As numpy in f32: 1 / (1 / 255) rounds to less than 255.
        assert_eq!(written(&Encoder::Int8(ranges.clone()), &[-1.0, 0.99, 2.5, 1.0]), "[-128,-128,-128,126]");
        assert_eq!(written(&Encoder::Int8(ranges), &[9.0, 255.0, 3.5, -9.0]), "[127,127,-127,-128]");
        let unit = Encoder::Int8(Ranges::of_unit_vectors(16));
        assert_eq!(written(&unit, &[[1.5, -1.5].as_slice(), &[0.001; 14]].concat())[..10], *"[127,-128,");
    }

    #[test]
    fn files_of_ranges_are_checked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            Ranges::read(file.path(), 2)
        };
        assert_eq!(read("[[0, -1], [255, 1]]").unwrap(), Ranges::new(&[0.0, -1.0], &[255.0, 1.0]));
        for (text, part) in [
            ("[[0], [1]]", "a vector has 2"),
            ("{}", "[[lowest value"),
            ("[[0, 2], [1, 1]]", "value 1 of a vector is from 2 to 1"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        assert!(Ranges::read(Path::new("/nowhere"), 2).unwrap_err().contains("/nowhere"));
    }
}
