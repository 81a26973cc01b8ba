//! Setting types with a notation of their own: `8MiB`, `200ms`, `cuda:1`.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::{DeviceChoice, Fields, Urls};

/// A number of bytes: `8MiB`, `64kB`, `1048576`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Scalar", into = "String")]
pub struct ByteSize(pub u64);

impl ByteSize {
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
}

impl TryFrom<Scalar> for ByteSize {
    type Error = String;

    fn try_from(scalar: Scalar) -> Result<Self, String> {
        let text = scalar.to_string();
        text.parse::<bytesize::ByteSize>()
            .map(|size| Self(size.as_u64()))
            .map_err(|e| format!("{text:?} is not a size such as 8MiB: {e}"))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        match UNITS.iter().find(|(_, unit)| self.0 >= *unit && self.0.is_multiple_of(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

impl JsonSchema for ByteSize {
    fn schema_name() -> Cow<'static, str> {
        "ByteSize".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["string", "integer"],
            "minimum": 0,
            "pattern": r"^[0-9]+(\.[0-9]+)? ?([kKMGT]i?B?|B)?$",
            "examples": ["8MiB", "64kB", 1048576]
        })
    }
}

/// A length of time: `200ms`, `1s`, `5m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Wait(pub Duration);

impl Wait {
    pub const fn millis(n: u64) -> Self {
        Self(Duration::from_millis(n))
    }
}

impl TryFrom<String> for Wait {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        humantime::parse_duration(&text)
            .map(Self)
            .map_err(|e| format!("{text:?} is not a duration such as 200ms: {e}"))
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl From<Wait> for String {
    fn from(wait: Wait) -> Self {
        wait.to_string()
    }
}

impl JsonSchema for Wait {
    fn schema_name() -> Cow<'static, str> {
        "Wait".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": r"^[0-9]+(ns|us|ms|s|m|h|d)( ?[0-9]+(ns|us|ms|s|m|h|d))*$",
            "examples": ["200ms", "1s", "5m"]
        })
    }
}

/// A value of a librdkafka property: text, number or boolean, kept as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "AnyScalar", into = "String")]
pub struct Scalar(pub String);

#[derive(Deserialize)]
#[serde(untagged)]
enum AnyScalar {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
}

impl From<AnyScalar> for Scalar {
    fn from(any: AnyScalar) -> Self {
        Self(match any {
            AnyScalar::Bool(v) => v.to_string(),
            AnyScalar::Int(v) => v.to_string(),
            AnyScalar::Float(v) => v.to_string(),
            AnyScalar::Text(v) => v,
        })
    }
}

impl From<Scalar> for String {
    fn from(scalar: Scalar) -> Self {
        scalar.0
    }
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl JsonSchema for Scalar {
    fn schema_name() -> Cow<'static, str> {
        "Scalar".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["string", "number", "boolean"] })
    }
}

/// How [`Fields`] and [`Urls`] are written: one text, a list, or nothing.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    None(()),
    One(String),
    Many(Vec<String>),
}

impl From<OneOrMany> for Vec<String> {
    fn from(value: OneOrMany) -> Self {
        match value {
            OneOrMany::None(()) => Vec::new(),
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

impl From<Vec<String>> for OneOrMany {
    fn from(mut texts: Vec<String>) -> Self {
        match texts.len() {
            0 => OneOrMany::None(()),
            1 => OneOrMany::One(texts.remove(0)),
            _ => OneOrMany::Many(texts),
        }
    }
}

macro_rules! one_or_many {
    ($name:ident) => {
        impl From<OneOrMany> for $name {
            fn from(value: OneOrMany) -> Self {
                Self(value.into())
            }
        }

        impl From<$name> for OneOrMany {
            fn from(texts: $name) -> Self {
                texts.0.into()
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": ["string", "array", "null"], "items": { "type": "string" } })
            }
        }
    };
}

one_or_many!(Fields);
one_or_many!(Urls);

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Ok(match text.as_str() {
            "auto" => Self::Auto,
            "cpu" => Self::Cpu,
            "cuda" => Self::Cuda(0),
            "metal" => Self::Metal,
            other => match other.strip_prefix("cuda:").and_then(|n| n.parse().ok()) {
                Some(n) => Self::Cuda(n),
                None => return Err(format!("{other:?} is not auto, cpu, cuda, cuda:N or metal")),
            },
        })
    }
}

impl From<DeviceChoice> for String {
    fn from(device: DeviceChoice) -> Self {
        match device {
            DeviceChoice::Auto => "auto".to_owned(),
            DeviceChoice::Cpu => "cpu".to_owned(),
            DeviceChoice::Cuda(n) => format!("cuda:{n}"),
            DeviceChoice::Metal => "metal".to_owned(),
        }
    }
}

impl JsonSchema for DeviceChoice {
    fn schema_name() -> Cow<'static, str> {
        "DeviceChoice".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^(auto|cpu|cuda|cuda:[0-9]+|metal)$", "examples": ["auto", "cpu", "cuda", "cuda:1", "metal"] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_waits_read_and_write() {
        for (text, bytes) in
            [("8MiB", 8 << 20), ("1GiB", 1 << 30), ("64kB", 64_000), ("100", 100), ("1.5KiB", 1536)]
        {
            let size = ByteSize::try_from(Scalar(text.to_owned())).unwrap();
            assert_eq!(size.0, bytes, "{text}");
            assert_eq!(ByteSize::try_from(Scalar(size.to_string())).unwrap(), size);
        }
        assert!(ByteSize::try_from(Scalar("many".to_owned())).is_err());
        assert_eq!(Wait::try_from("200ms".to_owned()).unwrap(), Wait::millis(200));
        assert_eq!(Wait::millis(1500).to_string(), "1s 500ms");
        assert!(Wait::try_from("200".to_owned()).is_err());
    }

    #[test]
    fn devices_read_and_write() {
        for text in ["auto", "cpu", "cuda:0", "cuda:3", "metal"] {
            assert_eq!(String::from(DeviceChoice::try_from(text.to_owned()).unwrap()), text);
        }
        assert!(DeviceChoice::try_from("cuda:x".to_owned()).is_err());
    }
}
