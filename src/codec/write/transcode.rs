//! Walks over a prediction's JSON and tells a format's encoder what is there, value by value. Nothing is kept between
//! the two: no tree of values is built.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::schema::{Field, Record, Type};
use crate::codec::json::{string, what_is};

/// Where a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The prediction itself.
    Root,
    /// A field of an object that always has a value.
    Field(u32),
    /// A field of an object that may have no value: see [`Encode::absent`].
    Optional(u32),
    /// An element of the list in the field with this number; of a list in a map, 1.
    Element(u32),
    /// A value of a map.
    Entry,
}

/// Where something began in the output.
pub type Mark = usize;

/// Encodes what [`transcode`] finds. Whatever begins, ends.
pub trait Encode {
    /// An optional field has no value.
    fn absent(&mut self);

    fn text(&mut self, at: At, text: &str);
    fn float(&mut self, at: At, number: f32);
    fn integer(&mut self, at: At, number: i32);
    fn boolean(&mut self, at: At, value: bool);
    fn long(&mut self, at: At, number: i64);
    fn double(&mut self, at: At, number: f64);

    fn begin_object(&mut self, at: At) -> Mark;
    fn end_object(&mut self, at: At, begin: Mark);

    fn begin_list(&mut self, at: At) -> Mark;
    /// `count`: number of its elements. `of`: their type.
    fn end_list(&mut self, at: At, begin: Mark, count: usize, of: &Type);

    fn begin_map(&mut self, at: At) -> Mark;
    /// Begins an entry; its value follows.
    fn key(&mut self, key: &str) -> Mark;
    /// `at`: where the map is.
    fn end_entry(&mut self, at: At, begin: Mark);
    /// `count`: number of its entries.
    fn end_map(&mut self, at: At, begin: Mark, count: usize);
}

/// Encodes the prediction that `json` holds.
///
/// # Errors
/// The prediction does not match the record: a field is missing, unknown, out of order or of another type; or an
/// included text has half of a surrogate pair, which only JSON can hold.
pub fn transcode<E: Encode>(json: &[u8], record: &Record, out: &mut E) -> serde_json::Result<()> {
    let json = std::str::from_utf8(json).map_err(serde_json::Error::custom)?;
    let mut deserializer = serde_json::Deserializer::from_str(json);
    Object { record, at: At::Root, out }.deserialize(&mut deserializer)?;
    deserializer.end()
}

struct Object<'a, E> {
    record: &'a Record,
    at: At,
    out: &'a mut E,
}

impl<'de, E: Encode> DeserializeSeed<'de> for Object<'_, E> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<E: Encode> Object<'_, E> {
    fn absent<X: Error>(&mut self, field: &Field) -> Result<(), X> {
        if !field.optional {
            return Err(X::custom(format_args!("{:?} is missing", field.name)));
        }
        self.out.absent();
        Ok(())
    }
}

impl<'de, E: Encode> Visitor<'de> for Object<'_, E> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the object {}", self.record.name)
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        let fields = &self.record.fields;
        let begin = self.out.begin_object(self.at);
        let mut next = 0;
        while let Some(found) = map.next_key_seed(Name { fields, next })? {
            for field in &fields[next..found] {
                self.absent(field)?;
            }
            let field = &fields[found];
            match field.optional {
                true => map.next_value_seed(Optional { field, out: self.out })?,
                false => {
                    map.next_value_seed(Of { of: &field.of, at: At::Field(field.number), out: self.out })?
                }
            }
            next = found + 1;
        }
        for field in &fields[next..] {
            self.absent(field)?;
        }
        self.out.end_object(self.at, begin);
        Ok(())
    }
}

/// Finds a member's name among the fields from `next` on.
struct Name<'a> {
    fields: &'a [Field],
    next: usize,
}

impl<'de> DeserializeSeed<'de> for Name<'_> {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<usize, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Name<'_> {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field's name")
    }

    fn visit_str<X: Error>(self, name: &str) -> Result<usize, X> {
        let found = self.fields[self.next..].iter().position(|field| field.name == name);
        found
            .map(|at| self.next + at)
            .ok_or_else(|| X::custom(format_args!("{name:?} is not in the schema, or not in this place")))
    }
}

/// The value of an optional field, which may be null.
struct Optional<'a, E> {
    field: &'a Field,
    out: &'a mut E,
}

impl<'de, E: Encode> DeserializeSeed<'de> for Optional<'_, E> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let at = At::Optional(self.field.number);
        match &self.field.of {
            // serde_json has a way of its own to hand on a value as it is written.
            of @ (Type::Json | Type::Boolean | Type::Long { .. } | Type::Double { .. }) => {
                copied(deserializer, of, at, self.out)
                    .map_err(|error| D::Error::custom(format_args!("{:?}: {error}", self.field.name)))
            }
            _ => deserializer.deserialize_option(self),
        }
    }
}

impl<'de, E: Encode> Visitor<'de> for Optional<'_, E> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a value of {:?}, or null", self.field.name)
    }

    fn visit_none<X: Error>(self) -> Result<(), X> {
        self.out.absent();
        Ok(())
    }

    fn visit_unit<X: Error>(self) -> Result<(), X> {
        self.visit_none()
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let at = At::Optional(self.field.number);
        Of { of: &self.field.of, at, out: self.out }.deserialize(deserializer)
    }
}

/// A value of a type.
struct Of<'a, E> {
    of: &'a Type,
    at: At,
    out: &'a mut E,
}

impl<'de, E: Encode> DeserializeSeed<'de> for Of<'_, E> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let Self { of, at, out } = self;
        match of {
            Type::Text => deserializer.deserialize_str(Text(|text: &str| out.text(at, text))),
            Type::Float => {
                out.float(at, f32::deserialize(deserializer)?);
                Ok(())
            }
            Type::Integer => {
                out.integer(at, i32::deserialize(deserializer)?);
                Ok(())
            }
            Type::List(of) => deserializer.deserialize_seq(List { of, at, out }),
            Type::Map(of) => deserializer.deserialize_map(Entries { of, at, out }),
            Type::Object(record) => Object { record, at, out }.deserialize(deserializer),
            Type::Json | Type::Boolean | Type::Long { .. } | Type::Double { .. } => {
                copied(deserializer, of, at, out)
            }
        }
    }
}

/// Hands on a string.
struct Text<F>(F);

impl<'de, T, F: FnOnce(&str) -> T> DeserializeSeed<'de> for Text<F> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<T, F: FnOnce(&str) -> T> Visitor<'_> for Text<F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<X: Error>(self, text: &str) -> Result<T, X> {
        Ok((self.0)(text))
    }
}

/// A value that is copied from the input, as it is written there. Null is no value.
fn copied<'de, D: Deserializer<'de>, E: Encode>(
    deserializer: D,
    of: &Type,
    at: At,
    out: &mut E,
) -> Result<(), D::Error> {
    let value = <&RawValue>::deserialize(deserializer)?.get();
    if value == "null" && matches!(at, At::Optional(_)) {
        out.absent();
        return Ok(());
    }
    let other = |of: &str| {
        let what = what_is(value);
        D::Error::custom(format_args!("is {what}, not {of} as in the input's schema when kandle started"))
    };
    match of {
        Type::Boolean => match value {
            "true" => out.boolean(at, true),
            "false" => out.boolean(at, false),
            _ => return Err(other("a boolean")),
        },
        Type::Long { .. } => out.long(at, long(value).ok_or_else(|| other("a 64-bit integer"))?),
        Type::Double { .. } => out.double(at, double(value).ok_or_else(|| other("a number"))?),
        _ => {
            let text = match string(value) {
                None => Cow::Borrowed(value),
                Some(text) => text.map_err(D::Error::custom)?,
            };
            out.text(at, &text);
        }
    }
    Ok(())
}

/// A JSON number, or a string of digits, as an integer. JSON Schema calls `1.0` an integer too.
fn long(json: &str) -> Option<i64> {
    let digits = json.trim_matches('"');
    digits.parse().ok().or_else(|| {
        let number: f64 = json.parse().ok()?;
        // Up to here, every integer is a float.
        (number.fract() == 0.0 && number.abs() <= 2f64.powi(53)).then_some(number as i64)
    })
}

/// A JSON number, or one of the strings that Protobuf's JSON has for what is not finite; null is NaN.
fn double(json: &str) -> Option<f64> {
    match json {
        "null" | "\"NaN\"" => Some(f64::NAN),
        "\"Infinity\"" => Some(f64::INFINITY),
        "\"-Infinity\"" => Some(f64::NEG_INFINITY),
        number => number.parse().ok(),
    }
}

struct List<'a, E> {
    of: &'a Type,
    at: At,
    out: &'a mut E,
}

impl<'de, E: Encode> Visitor<'de> for List<'_, E> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Self { of, at, out } = self;
        let element = match at {
            At::Field(number) | At::Optional(number) => At::Element(number),
            At::Entry => At::Element(1),
            At::Root | At::Element(_) => return Err(A::Error::custom("a list must be a field, or in a map")),
        };
        let begin = out.begin_list(at);
        let mut count = 0;
        match of {
            // Vectors are long.
            Type::Float => {
                while let Some(number) = list.next_element()? {
                    out.float(element, number);
                    count += 1;
                }
            }
            of => {
                while list.next_element_seed(Of { of, at: element, out: &mut *out })?.is_some() {
                    count += 1;
                }
            }
        }
        out.end_list(at, begin, count, of);
        Ok(())
    }
}

struct Entries<'a, E> {
    of: &'a Type,
    at: At,
    out: &'a mut E,
}

impl<'de, E: Encode> Visitor<'de> for Entries<'_, E> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { of, at, out } = self;
        let begin = out.begin_map(at);
        let mut count = 0;
        while let Some(entry) = map.next_key_seed(Text(|key: &str| out.key(key)))? {
            map.next_value_seed(Of { of, at: At::Entry, out: &mut *out })?;
            out.end_entry(at, entry);
            count += 1;
        }
        out.end_map(at, begin, count);
        Ok(())
    }
}
