//! What a prediction consists of: typed fields, from which the schema of every format is made, and by which predictions
//! are encoded. The task table has the fields of each task; `output.include` adds to them.

use std::collections::HashMap;

use crate::codec::select::last_name;
use crate::settings::Settings;
use crate::task::Kind;

/// A prediction, or an object within one. The fields are in the order in which a task writes them.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Name of the type, without its namespace.
    pub name: String,
    pub fields: Vec<Field>,
}

/// A member of an object.
#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    /// Name in JSON.
    pub name: String,
    /// Name in Avro and Protobuf: see [`identifier`].
    pub identifier: String,
    /// Number in Protobuf. It must never change, and never be used for another field of the same type.
    pub number: u32,
    pub of: Type,
    /// May be missing or null. What some settings add to a prediction is optional, so that a schema with it can read
    /// predictions from before the setting was changed.
    pub optional: bool,
    /// One line about it, for readers of the schema.
    pub doc: String,
}

/// The type of a value.
#[derive(Debug, Clone, PartialEq)]
pub enum Type {
    Text,
    /// A 32-bit float.
    Float,
    /// A 32-bit signed integer. It is enough for places in a record, which Kafka limits to 2^31 - 1 bytes.
    Integer,
    Boolean,
    /// A 64-bit signed integer. Protobuf's JSON has it as a string of digits: `quoted`.
    Long {
        quoted: bool,
    },
    /// A 64-bit float. Protobuf's JSON has NaN and the infinities as strings: `quoted`; others have them as null.
    Double {
        quoted: bool,
    },
    List(Box<Type>),
    /// From texts to values.
    Map(Box<Type>),
    Object(Record),
    /// Any JSON value whose type is not known. Avro and Protobuf hold it as a text: that of a JSON string, or the JSON of
    /// any other value.
    Json,
}

impl Field {
    pub fn new(number: u32, name: &str, of: Type, doc: &str) -> Self {
        let (name, identifier) = (name.to_owned(), identifier(name));
        Self { name, identifier, number, of, optional: false, doc: doc.to_owned() }
    }

    pub fn optional(self) -> Self {
        Self { optional: true, ..self }
    }

    /// A field of `output.include`. It is optional whatever the input's schema says of it: records may lack it that were
    /// written with another version of that schema.
    fn included(pointer: &str, of: Type) -> Self {
        let name = last_name(pointer);
        let doc = format!("Copied from the input: {pointer}");
        Self::new(included_number(&name), &name, of, &doc).optional()
    }

    /// Whether it is a field of `output.include`, whose value may also be null.
    pub fn is_included(&self) -> bool {
        self.number >= FIRST_INCLUDED
    }
}

impl Type {
    pub fn list(of: Type) -> Self {
        Self::List(Box::new(of))
    }

    pub fn map(of: Type) -> Self {
        Self::Map(Box::new(of))
    }

    /// A list of objects of a type with this name.
    pub fn objects(name: &str, fields: Vec<Field>) -> Self {
        Self::list(Self::Object(Record { name: name.to_owned(), fields }))
    }

    /// A list or map (`of`) of values that are never null; [`Type::Json`] if they are not scalars.
    pub fn of_scalars(of: fn(Self) -> Self, values: Self) -> Self {
        match values {
            Self::Text | Self::Boolean | Self::Long { .. } | Self::Double { .. } => of(values),
            _ => Self::Json,
        }
    }

    /// The type of a value that may be of any of these; `None` if there are none.
    pub fn common(mut types: impl Iterator<Item = Self>) -> Option<Self> {
        let first = types.next()?;
        Some(if types.all(|other| other == first) { first } else { Self::Json })
    }
}

/// Package of the messages, and namespace of the records.
pub const NAMESPACE: &str = "kandle";

impl Record {
    /// The prediction of the settings' task. The types of included fields are not known.
    pub fn of(settings: &Settings) -> Self {
        Self::with(settings, std::iter::repeat(Type::Json))
    }

    /// The same, with the types of the fields of `output.include`, in their order.
    pub fn with(settings: &Settings, types: impl IntoIterator<Item = Type>) -> Self {
        let kind = Kind::of(settings.task.kind);
        let mut fields = (kind.fields)(&settings.task);
        let included = settings.output.include.iter().zip(types);
        fields.extend(included.map(|(pointer, of)| Field::included(pointer, of)));
        Self { name: camel_case(kind.kind.name()), fields }
    }

    /// The name with its namespace, such as `kandle.TextClassification`.
    pub fn full_name(&self) -> String {
        format!("{NAMESPACE}.{}", self.name)
    }

    /// Two fields with one name or number in Avro and Protobuf: the JSON names of both.
    pub fn clash(&self) -> Option<(&str, &str)> {
        let (mut names, mut numbers) = (HashMap::new(), HashMap::new());
        self.fields.iter().find_map(|field| {
            let by_name = names.insert(field.identifier.as_str(), field);
            let by_number = numbers.insert(field.number, field);
            by_name.or(by_number).map(|other| (other.name.as_str(), field.name.as_str()))
        })
    }
}

/// `text-classification` as `TextClassification`.
fn camel_case(name: &str) -> String {
    let word = |word: &str| {
        let mut letters = word.chars();
        letters.next().map(|first| first.to_ascii_uppercase()).into_iter().chain(letters).collect::<String>()
    };
    name.split('-').map(word).collect()
}

/// A name as Avro and Protobuf allow it: letters, digits and `_`, not beginning with a digit. Any other character becomes
/// `_`; a name that would begin with a digit, or be empty, gets `_` before it.
pub fn identifier(name: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let kept: String = name.chars().map(allowed).collect();
    match kept.starts_with(|c: char| c.is_ascii_digit()) || kept.is_empty() {
        true => format!("_{kept}"),
        false => kept,
    }
}

/// Numbers of included fields are above those of the tasks' fields and of Protobuf's reserved range.
const FIRST_INCLUDED: u32 = 1 << 20;
/// Protobuf's largest field number.
const LAST_NUMBER: u32 = (1 << 29) - 1;

/// The Protobuf number of an included field. It depends only on the name, so that a changed `output.include` never gives
/// a number to another field: the 32-bit FNV-1a hash of the name, modulo the numbers from 2^20 to 2^29 - 1.
fn included_number(name: &str) -> u32 {
    let hash =
        name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    FIRST_INCLUDED + hash % (LAST_NUMBER - FIRST_INCLUDED + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Task;
    use crate::task::KINDS;

    #[test]
    fn names_that_avro_and_protobuf_refuse_are_changed() {
        for (name, want) in
            [("id", "id"), ("na/me", "na_me"), ("0", "_0"), ("", "_"), ("größe", "gr__e"), ("a-b", "a_b")]
        {
            assert_eq!(identifier(name), want);
        }
        assert_eq!(camel_case("zero-shot-classification"), "ZeroShotClassification");
    }

    /// Numbers in published schemas: a change of the function would break their readers.
    #[test]
    fn numbers_of_included_fields_never_change() {
        // FNV-1a of "a" is 0xe40c292c (the reference implementation's test vectors).
        let first = FIRST_INCLUDED + 0xe40c_292c_u32 % (LAST_NUMBER - FIRST_INCLUDED + 1);
        assert_eq!(included_number("a"), first);
        assert!((FIRST_INCLUDED..=LAST_NUMBER).contains(&included_number("id")));
    }

    #[test]
    fn fields_that_clash_are_found() {
        let field = |pointer: &str| Field::included(pointer, Type::Json);
        let record = |fields| Record { name: "X".to_owned(), fields };
        assert_eq!(record(vec![field("/a-b"), field("/x"), field("/y/a.b")]).clash(), Some(("a-b", "a.b")));
        assert_eq!(record(vec![field("/a"), field("/b")]).clash(), None);
    }

    /// Names and numbers of each task's fields, those of inner objects included.
    #[test]
    fn no_two_fields_of_a_task_clash() {
        fn check(record: &Record, task: &str) {
            assert_eq!(record.clash(), None, "{task}");
            for field in &record.fields {
                assert_eq!(field.name, field.identifier, "{task}");
                assert!((1..19_000).contains(&field.number), "{task}: {}", field.name);
                let mut of = &field.of;
                while let Type::List(inner) | Type::Map(inner) = of {
                    of = inner;
                }
                if let Type::Object(inner) = of {
                    check(inner, task);
                }
            }
        }
        for kind in KINDS {
            let name = kind.kind.name();
            for (redact, tokens) in [(false, false), (true, true)] {
                let task = Task { redact, tokens, ..Task::of(kind.kind) };
                check(&Record { name: String::new(), fields: (kind.fields)(&task) }, name);
            }
        }
    }
}
