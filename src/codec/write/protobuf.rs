//! `protobuf`: a prediction's message, as a .proto file in proto3, and its encoding
//! (<https://protobuf.dev/programming-guides/encoding/>).

use std::fmt::Write;

use super::schema::{Field, NAMESPACE, Record, Type};
use super::transcode::{At, Encode, Mark, transcode};
use super::{insert, varint};

/// The .proto file: the prediction is its first message.
pub fn schema(record: &Record) -> String {
    let mut text = format!("syntax = \"proto3\";\n\npackage {NAMESPACE};\n\n");
    message(record, 0, &mut text);
    text
}

/// Appends the path of the message in its file, which is one zero byte for the first, and a prediction.
///
/// # Errors
/// See [`transcode`].
pub fn encode(json: &[u8], record: &Record, out: &mut Vec<u8>) -> serde_json::Result<()> {
    out.push(0);
    transcode(json, record, &mut Protobuf(out))
}

fn message(record: &Record, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{indent}message {} {{", record.name);
    for inner in record.fields.iter().filter_map(|field| inner(&field.of)) {
        message(inner, depth + 1, text);
        text.push('\n');
    }
    for list in record.fields.iter().filter_map(|field| list_in_map(&field.of)) {
        let name = list_message(list);
        let _ = writeln!(text, "{indent}  message {name} {{\n{indent}    {} items = {ITEMS};", of(list));
        let _ = writeln!(text, "{indent}  }}\n");
    }
    for field in &record.fields {
        let Field { identifier, number, doc, .. } = field;
        let label = match (&field.of, field.optional) {
            // Repeated fields are optional anyway.
            (Type::List(_) | Type::Map(_), _) | (_, false) => "",
            (_, true) => "optional ",
        };
        let of = of(&field.of);
        let json = json_name(field).map(|name| format!(" [json_name = \"{name}\"]")).unwrap_or_default();
        let _ = writeln!(text, "{indent}  // {}", doc.replace(char::is_control, " "));
        let _ = writeln!(text, "{indent}  {label}{of} {identifier} = {number}{json};");
    }
    let _ = writeln!(text, "{indent}}}");
}

/// The message that a field needs.
fn inner(of: &Type) -> Option<&Record> {
    match of {
        Type::Object(record) => Some(record),
        Type::List(of) | Type::Map(of) => inner(of),
        Type::Text
        | Type::Float
        | Type::Integer
        | Type::Boolean
        | Type::Long { .. }
        | Type::Double { .. }
        | Type::Json => None,
    }
}

/// The list that a field is a map of: a message stands for it, because Protobuf's maps hold no lists.
fn list_in_map(of: &Type) -> Option<&Type> {
    match of {
        Type::Map(of) if matches!(**of, Type::List(_)) => Some(of),
        _ => None,
    }
}

/// The name of the message for a list in a map.
fn list_message(list: &Type) -> String {
    let Type::List(of) = list else { return self::of(list) };
    let of = self::of(of);
    let (first, rest) = of.split_at(1);
    format!("{}{rest}List", first.to_ascii_uppercase())
}

fn of(of: &Type) -> String {
    match of {
        Type::Text | Type::Json => "string".to_owned(),
        Type::Float => "float".to_owned(),
        Type::Integer => "int32".to_owned(),
        Type::Boolean => "bool".to_owned(),
        Type::Long { .. } => "int64".to_owned(),
        Type::Double { .. } => "double".to_owned(),
        Type::List(of) => format!("repeated {}", self::of(of)),
        Type::Map(value) => {
            format!("map<string, {}>", list_in_map(of).map_or_else(|| self::of(value), list_message))
        }
        Type::Object(record) => record.name.clone(),
    }
}

/// The name in JSON, if Protobuf would choose another: by default it removes `_` and makes the next letter a capital.
/// As the content of a string literal.
fn json_name(field: &Field) -> Option<String> {
    let mut default = String::new();
    let mut capital = false;
    for letter in field.identifier.chars() {
        match (letter, capital) {
            ('_', _) => capital = true,
            (letter, true) => {
                default.push(letter.to_ascii_uppercase());
                capital = false;
            }
            (letter, false) => default.push(letter),
        }
    }
    // Names in brackets are those of extensions, and a zero byte is not allowed.
    let allowed = !field.name.starts_with('[') && !field.name.contains('\0');
    let name = if allowed { &field.name } else { &field.identifier };
    (*name != default).then(|| {
        let escaped = |c: char| match c {
            '"' | '\\' => format!("\\{c}"),
            c if c.is_control() => c.to_string().bytes().map(|byte| format!("\\{byte:03o}")).collect(),
            c => c.to_string(),
        };
        name.chars().map(escaped).collect()
    })
}

/// Appends a prediction's fields.
struct Protobuf<'a>(&'a mut Vec<u8>);

/// Wire types.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const LENGTH: u64 = 2;
const FIXED32: u64 = 5;

/// Numbers of a map entry's key and value.
const KEY: u32 = 1;
const VALUE: u32 = 2;
/// Number of the only field of a message for a list in a map.
const ITEMS: u32 = 1;

impl Protobuf<'_> {
    fn tag(&mut self, number: u32, wire: u64) {
        varint(u64::from(number) << 3 | wire, self.0);
    }

    fn bytes(&mut self, number: u32, bytes: &[u8]) {
        self.tag(number, LENGTH);
        varint(bytes.len() as u64, self.0);
        self.0.extend_from_slice(bytes);
    }

    /// A number of one byte or more, unless it is the default of a field that is not optional.
    fn varint(&mut self, at: At, value: u64) {
        if let Some(number) = number(at, value == 0, true) {
            self.tag(number, VARINT);
        }
        if !matches!(at, At::Field(_)) || value != 0 {
            varint(value, self.0);
        }
    }

    /// A number of 4 or 8 bytes. Negative zero is not the default.
    fn fixed(&mut self, at: At, wire: u64, bytes: &[u8]) {
        let is_default = bytes.iter().all(|byte| *byte == 0);
        if let Some(number) = number(at, is_default, true) {
            self.tag(number, wire);
        }
        if !matches!(at, At::Field(_)) || !is_default {
            self.0.extend_from_slice(bytes);
        }
    }

    /// Puts the tag and the length before what has been written since `begin`.
    fn delimit(&mut self, number: u32, begin: Mark) {
        let mut before = Vec::with_capacity(16);
        varint(u64::from(number) << 3 | LENGTH, &mut before);
        varint((self.0.len() - begin) as u64, &mut before);
        insert(self.0, begin, &before);
    }
}

/// The number to write before a value; `None` if it is not written: in a packed list numbers follow each other, and a
/// field that is not optional does not write its type's default.
fn number(at: At, is_default: bool, packed: bool) -> Option<u32> {
    match at {
        At::Field(number) => (!is_default).then_some(number),
        At::Optional(number) => Some(number),
        At::Element(number) => (!packed).then_some(number),
        At::Entry => Some(VALUE),
        At::Root => None,
    }
}

impl Encode for Protobuf<'_> {
    fn absent(&mut self) {}

    fn text(&mut self, at: At, text: &str) {
        if let Some(number) = number(at, text.is_empty(), false) {
            self.bytes(number, text.as_bytes());
        }
    }

    fn float(&mut self, at: At, value: f32) {
        self.fixed(at, FIXED32, &value.to_le_bytes());
    }

    fn integer(&mut self, at: At, value: i32) {
        // Negative numbers are extended to 64 bits.
        self.varint(at, i64::from(value) as u64);
    }

    fn boolean(&mut self, at: At, value: bool) {
        self.varint(at, value.into());
    }

    fn long(&mut self, at: At, value: i64) {
        self.varint(at, value as u64);
    }

    fn double(&mut self, at: At, value: f64) {
        self.fixed(at, FIXED64, &value.to_le_bytes());
    }

    fn begin_object(&mut self, _: At) -> Mark {
        self.0.len()
    }

    fn end_object(&mut self, at: At, begin: Mark) {
        if let Some(number) = number(at, false, false) {
            self.delimit(number, begin);
        }
    }

    fn begin_list(&mut self, _: At) -> Mark {
        self.0.len()
    }

    fn end_list(&mut self, at: At, begin: Mark, count: usize, of: &Type) {
        let packed = matches!(
            of,
            Type::Float | Type::Integer | Type::Boolean | Type::Long { .. } | Type::Double { .. }
        );
        let in_map = at == At::Entry;
        let number = if in_map { Some(ITEMS) } else { number(at, false, false) };
        if let (true, Some(number)) = (packed && count > 0, number) {
            self.delimit(number, begin);
        }
        if in_map {
            self.delimit(VALUE, begin);
        }
    }

    fn begin_map(&mut self, _: At) -> Mark {
        self.0.len()
    }

    fn key(&mut self, key: &str) -> Mark {
        let begin = self.0.len();
        self.bytes(KEY, key.as_bytes());
        begin
    }

    fn end_entry(&mut self, at: At, begin: Mark) {
        if let Some(number) = number(at, false, false) {
            self.delimit(number, begin);
        }
    }

    fn end_map(&mut self, _: At, _: Mark, _: usize) {}
}
