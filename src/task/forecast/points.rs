//! Reads a series: an array of numbers, or of objects with a timestamp and a value.

use std::fmt;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::codec::json::{members, missing, what_is};
use crate::record::{Fault, RecordError};

/// The most points of a record's series. Models read a few thousand, and of more the newest: whoever sends more than this
/// sends them in vain.
const MOST: usize = 100_000;

/// Where the series of a record is.
pub struct Points {
    /// `input.field`.
    pub pointer: String,
    /// How many of the newest points the model reads, for the error.
    pub context: usize,
}

impl Points {
    /// The points, oldest first; NaN for a missing one.
    ///
    /// # Errors
    /// There is no array at the pointer, an element of it is no point, timestamps do not increase, or there are more than
    /// 100,000 points.
    pub fn read(&self, found: Option<&RawValue>) -> Result<Vec<f32>, RecordError> {
        let Some(found) = found else { return Err(missing(&self.pointer)) };
        if !found.get().starts_with('[') {
            let message = format!("{:?} is {}, not an array", self.pointer, what_is(found.get()));
            return Err(RecordError::new(Fault::Field, message));
        }
        let mut series = Series { points: self, values: Vec::new(), last: None, error: None };
        let read = serde_json::Deserializer::from_str(found.get()).deserialize_seq(&mut series);
        match (series.error, read) {
            (Some(error), _) => Err(error),
            (None, Err(e)) => Err(RecordError::new(Fault::Decode, format!("{:?}: {e}", self.pointer))),
            (None, Ok(())) => Ok(series.values),
        }
    }

    fn wrong(&self, place: &str, what: String) -> RecordError {
        RecordError::new(Fault::Field, format!("\"{}/{place}\" {what}", self.pointer))
    }
}

/// What has been read of a series.
struct Series<'a> {
    points: &'a Points,
    values: Vec<f32>,
    /// The newest timestamp, if elements are objects.
    last: Option<Time>,
    error: Option<RecordError>,
}

impl<'de> Visitor<'de> for &mut Series<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a series")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        while let Some(element) = elements.next_element::<&RawValue>()? {
            if let Err(error) = self.push(element) {
                let stopped = A::Error::custom(&error.message);
                self.error = Some(error);
                return Err(stopped);
            }
        }
        Ok(())
    }
}

impl Series<'_> {
    fn push(&mut self, element: &RawValue) -> Result<(), RecordError> {
        let (index, points) = (self.values.len(), self.points);
        if index == MOST {
            let message = format!(
                "{:?} has more than {MOST} points, and the model reads the newest {}: send fewer",
                points.pointer, points.context
            );
            return Err(RecordError::new(Fault::TooLong, message));
        }
        let json = element.get();
        let is_object = json.starts_with('{');
        if index > 0 && is_object != self.last.is_some() {
            let before = if is_object {
                "is an object, and the elements before it are not"
            } else {
                "is no object, as the elements before it are"
            };
            return Err(points.wrong(&index.to_string(), before.to_owned()));
        }
        if !is_object {
            let value = number(json).map_err(|what| points.wrong(&index.to_string(), what))?;
            self.values.push(value);
            return Ok(());
        }
        let found = members(element);
        let member = |name: &str| {
            let found = found.as_ref().and_then(|members| members.get(name));
            found.ok_or_else(|| points.wrong(&format!("{index}/{name}"), "is missing".to_owned()))
        };
        let at = |name: &str, what: String| points.wrong(&format!("{index}/{name}"), what);
        let time = Time::of(member("timestamp")?.get()).map_err(|what| at("timestamp", what))?;
        match self.last.map(|last| time.is_after(last)) {
            Some(None) => {
                return Err(at("timestamp", "is of another type than the one before it".to_owned()));
            }
            Some(Some(false)) => {
                let what = "is not after the one before it: sort the series, with one value per time";
                return Err(at("timestamp", what.to_owned()));
            }
            Some(Some(true)) | None => self.last = Some(time),
        }
        self.values.push(number(member("value")?.get()).map_err(|what| at("value", what))?);
        Ok(())
    }
}

/// A point, or what is wrong with it. A missing one is null; Protobuf's readers write NaN as a text.
fn number(json: &str) -> Result<f32, String> {
    match json.as_bytes().first() {
        _ if json == "null" || json == "\"NaN\"" => Ok(f32::NAN),
        Some(b'-' | b'0'..=b'9') => match json.parse::<f32>() {
            Ok(x) if x.is_finite() => Ok(x),
            _ => Err(format!("is {}, which a 32-bit float cannot hold", shortened(json))),
        },
        _ => Err(format!("is {}, not a number or null", what_is(json))),
    }
}

/// The beginning of a long number.
fn shortened(json: &str) -> String {
    const LONGEST: usize = 40;
    if json.len() <= LONGEST { json.to_owned() } else { format!("{}…", &json[..LONGEST]) }
}

/// When a point is from.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Time {
    /// Since an epoch, in any unit.
    Number(f64),
    Moment(Timestamp),
}

impl Time {
    /// A number; or a text in one of the forms of RFC 3339, without an offset in UTC, or a date.
    fn of(json: &str) -> Result<Self, String> {
        match json.as_bytes().first() {
            Some(b'-' | b'0'..=b'9') => match json.parse::<f64>() {
                Ok(x) if x.is_finite() => Ok(Self::Number(x)),
                _ => Err(format!("is {}, which is no time", shortened(json))),
            },
            Some(b'"') => {
                let text: String = serde_json::from_str(json).map_err(|e| e.to_string())?;
                let local =
                    |text: &str| text.parse::<DateTime>()?.to_zoned(TimeZone::UTC).map(|at| at.timestamp());
                let moment = text.parse::<Timestamp>().or_else(|_| local(&text));
                moment.map(Self::Moment).map_err(|_| {
                    format!(
                        "is {:?}, not a time such as 2026-01-31T12:00:00Z",
                        text.chars().take(40).collect::<String>()
                    )
                })
            }
            _ => Err(format!("is {}, not a number or a text", what_is(json))),
        }
    }

    /// `None` if the two cannot be compared.
    fn is_after(self, other: Self) -> Option<bool> {
        match (self, other) {
            (Self::Number(a), Self::Number(b)) => Some(a > b),
            (Self::Moment(a), Self::Moment(b)) => Some(a > b),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Vec<f32>, (Fault, String)> {
        let value: &RawValue = serde_json::from_str(json).unwrap();
        let points = Points { pointer: "/y".to_owned(), context: 2048 };
        points.read(Some(value)).map_err(|error| (error.fault, error.message))
    }

    fn bits(points: &[f32]) -> Vec<u32> {
        points.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn numbers_and_missing_ones() {
        let points = read("[ 1, -2.5e1 ,null,\"NaN\", 0]").unwrap();
        assert_eq!(bits(&points), bits(&[1.0, -25.0, f32::NAN, f32::NAN, 0.0]));
        assert!(read("[]").unwrap().is_empty());
    }

    #[test]
    fn values_with_timestamps() {
        for [first, second] in [
            ["1", "2.5"],
            ["\"2026-01-31T12:00:00Z\"", "\"2026-01-31T13:00:01+01:00\""],
            ["\"2026-01-31\"", "\"2026-02-01\""],
            ["\"2026-01-31T12:00:00\"", "\"2026-01-31 12:30:00\""],
        ] {
            let json = format!(
                r#"[{{"timestamp":{first},"value":3}},{{"value":null,"x":[],"timestamp":{second}}}]"#
            );
            assert_eq!(bits(&read(&json).unwrap()), bits(&[3.0, f32::NAN]), "{json}");
        }
    }

    #[test]
    fn errors_say_what_and_where() {
        for (json, message) in [
            ("3", "\"/y\" is a number, not an array"),
            ("[1,\"2\"]", "\"/y/1\" is a string, not a number or null"),
            ("[1,1e400]", "\"/y/1\" is 1e400, which a 32-bit float cannot hold"),
            ("[1,true]", "\"/y/1\" is a boolean, not a number or null"),
            ("[1,[2]]", "\"/y/1\" is an array, not a number or null"),
            ("[1,{}]", "\"/y/1\" is an object, and the elements before it are not"),
            (r#"[{"timestamp":1,"value":1},2]"#, "\"/y/1\" is no object, as the elements before it are"),
            (r#"[{"value":1}]"#, "\"/y/0/timestamp\" is missing"),
            (r#"[{"timestamp":1}]"#, "\"/y/0/value\" is missing"),
            (r#"[{"timestamp":1,"value":"x"}]"#, "\"/y/0/value\" is a string, not a number or null"),
            (
                r#"[{"timestamp":"yesterday","value":1}]"#,
                "\"/y/0/timestamp\" is \"yesterday\", not a time such as 2026-01-31T12:00:00Z",
            ),
            (r#"[{"timestamp":true,"value":1}]"#, "\"/y/0/timestamp\" is a boolean, not a number or a text"),
            (
                r#"[{"timestamp":2,"value":1},{"timestamp":2,"value":1}]"#,
                "\"/y/1/timestamp\" is not after the one before it: sort the series, with one value per time",
            ),
            (
                r#"[{"timestamp":2,"value":1},{"timestamp":"2026-01-31","value":1}]"#,
                "\"/y/1/timestamp\" is of another type than the one before it",
            ),
        ] {
            assert_eq!(read(json), Err((Fault::Field, message.to_owned())), "{json}");
        }
    }

    #[test]
    fn more_points_than_any_model_reads_are_refused() {
        let of = |count: usize| read(&format!("[{}]", vec!["1"; count].join(",")));
        assert_eq!(of(MOST).unwrap().len(), MOST);
        let (fault, message) = of(MOST + 1).unwrap_err();
        assert_eq!(fault, Fault::TooLong);
        assert_eq!(
            message,
            "\"/y\" has more than 100000 points, and the model reads the newest 2048: send fewer"
        );
    }
}
