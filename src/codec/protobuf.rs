//! `protobuf`: messages in Confluent's wire format or, with `input.schema`, plain. They become proto3's JSON with the
//! fields' names as in the schema; fields without presence are there even if they have their default.
//!
//! After the schema id, the wire format has the message's place in the schema's file: the number of indexes, then the
//! index of a message and of each message within it, as zigzag numbers; a single 0 stands for the first message.
//!
//! <https://protobuf.dev/programming-guides/json/>

use std::path::Path;

use prost_reflect::{
    DescriptorPool, DynamicMessage, FileDescriptor, Kind, MessageDescriptor, SerializeOptions,
};
use protox::Compiler as ProtoCompiler;
use protox::file::{ChainFileResolver, File, FileResolver, GoogleFileResolver, IncludeFileResolver};

use super::schemas::{Compile, Planned, Plans, expect_kind};
use super::write::schema::Type;
use super::{
    DecoderError, Reader, SchemaEntry, SchemaError, SchemaFileError, Selected, Stopped, Value, Waiting,
};
use crate::record::{Fault, Raw, RecordError};
use crate::registry::{Schema, SchemaKind};
use crate::settings::{self, Settings};

/// The name of a registry's schema among the files that it imports.
const ROOT: &str = "kandle/value.proto";
/// Messages of any type within each other that a value may have: their JSON is made by recursion.
const MAX_ANY: usize = 32;

enum Plan {
    /// The value begins with the indexes of its message in this file.
    Indexed(FileDescriptor),
    /// All values are of this message.
    Message(MessageDescriptor),
}

/// The schemas of the registry, as files.
struct Sources(Vec<(String, String)>);

impl FileResolver for Sources {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        match self.0.iter().find(|(known, _)| known == name) {
            Some((_, text)) => File::from_source(name, text),
            None => Err(protox::Error::file_not_found(name)),
        }
    }
}

struct Compiler {
    /// `input.message`.
    message: Option<String>,
}

/// Compiles a file and what it imports: from `resolver`, or Protobuf's own.
fn pool(resolver: impl FileResolver + 'static, file: &str) -> Result<DescriptorPool, SchemaError> {
    let mut chain = ChainFileResolver::new();
    chain.add(resolver);
    chain.add(GoogleFileResolver::new());
    let mut compiler = ProtoCompiler::with_file_resolver(chain);
    compiler.include_imports(true).open_file(file).map_err(|e| SchemaError(e.to_string()))?;
    Ok(compiler.descriptor_pool())
}

impl Compile for Compiler {
    type Plan = Plan;

    fn compile(&self, schema: &Schema) -> Result<Plan, SchemaError> {
        expect_kind(schema, SchemaKind::Protobuf)?;
        let references = schema.all_references();
        let mut sources: Vec<(String, String)> =
            references.into_iter().map(|(name, schema)| (name.to_owned(), schema.text.clone())).collect();
        sources.push((ROOT.to_owned(), schema.text.clone()));
        let file = pool(Sources(sources), ROOT)?.get_file_by_name(ROOT);
        Ok(Plan::Indexed(file.ok_or_else(|| SchemaError("it was not compiled".to_owned()))?))
    }

    fn compile_file(&self, path: &Path) -> Result<Plan, SchemaFileError> {
        let pool = if path.extension().is_some_and(|extension| extension == "proto") {
            let folder = path.parent().map_or_else(Default::default, Path::to_owned);
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            pool(IncludeFileResolver::new(folder), &name)?
        } else {
            let bytes = std::fs::read(path)?;
            DescriptorPool::decode(bytes.as_slice())
                .map_err(|e| SchemaError(format!("it is neither a .proto file nor a descriptor set: {e}")))?
        };
        let name = self.message.as_deref().unwrap_or_default();
        let message = pool.get_message_by_name(name);
        Ok(Plan::Message(
            message.ok_or_else(|| SchemaError(format!("it has no message {name} (input.message)")))?,
        ))
    }
}

pub(super) const SCHEMA: SchemaEntry = SchemaEntry { kind: SchemaKind::Protobuf, types, types_of_file };

fn types(schema: &Schema, pointers: &[Vec<String>]) -> Result<Vec<Option<Type>>, SchemaError> {
    Ok((Compiler { message: None }).compile(schema)?.types(pointers))
}

fn types_of_file(
    input: &settings::Input,
    pointers: &[Vec<String>],
) -> Result<Vec<Option<Type>>, SchemaFileError> {
    let path = input.schema.as_deref().unwrap_or(Path::new(""));
    Ok((Compiler { message: input.message.clone() }).compile_file(path)?.types(pointers))
}

impl Plan {
    /// Of several messages, what those agree on that have the member: only the values say which one they are.
    fn types(&self, pointers: &[Vec<String>]) -> Vec<Option<Type>> {
        let types = |tokens: &Vec<String>| match self {
            Self::Message(message) => type_at(message, tokens),
            Self::Indexed(file) => {
                Type::common(file.messages().filter_map(|message| type_at(&message, tokens)))
            }
        };
        pointers.iter().map(types).collect()
    }
}

/// The type that a prediction has for a member of a message; `None` if there is no such member.
fn type_at(message: &MessageDescriptor, tokens: &[String]) -> Option<Type> {
    let [first, rest @ ..] = tokens else { return Some(of_kind(&Kind::Message(message.clone()))) };
    if message.full_name().starts_with("google.protobuf.") {
        // Its JSON is not an object of its fields.
        return Some(Type::Json);
    }
    let field = message.get_field_by_name(first)?;
    let kind = match field.kind() {
        Kind::Message(entry) if field.is_map() => entry.map_entry_value_field().kind(),
        kind => kind,
    };
    let rest = match rest {
        [] if field.is_list() => return Some(Type::of_scalars(Type::list, of_kind(&kind))),
        [] if field.is_map() => return Some(Type::of_scalars(Type::map, of_kind(&kind))),
        // An index or a key.
        [_, below @ ..] if field.is_list() || field.is_map() => below,
        all => all,
    };
    match kind {
        Kind::Message(message) => type_at(&message, rest),
        kind => rest.is_empty().then(|| of_kind(&kind)),
    }
}

/// Of integers the widest one, so that a change of the input's schema that Protobuf allows (int32 to int64) changes
/// nothing.
fn of_kind(kind: &Kind) -> Type {
    match kind {
        Kind::Bool => Type::Boolean,
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 | Kind::Uint32 | Kind::Fixed32 => {
            Type::Long { quoted: false }
        }
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Type::Long { quoted: true },
        Kind::Float | Kind::Double => Type::Double { quoted: true },
        // In proto3's JSON, 64-bit integers are strings.
        Kind::String | Kind::Bytes | Kind::Uint64 | Kind::Fixed64 => Type::Text,
        Kind::Message(message) => match message.full_name() {
            "google.protobuf.Timestamp" | "google.protobuf.Duration" | "google.protobuf.FieldMask" => {
                Type::Text
            }
            // A message may have more fields in the next version of its schema.
            _ => Type::Json,
        },
        // A number that the schema does not name is a number in JSON too.
        Kind::Enum(_) => Type::Json,
    }
}

struct Protobuf(Plans<Compiler>);

pub(super) fn reader(settings: &Settings, _: &Selected) -> Result<Box<dyn Reader>, DecoderError> {
    let compiler = Compiler { message: settings.input.message.clone() };
    Ok(Box::new(Protobuf(Plans::new(settings, compiler)?)))
}

impl Reader for Protobuf {
    fn read<'a>(&self, value: Raw<'a>) -> Result<Value<'a>, RecordError> {
        let Planned { plan, header, data } = self.0.of(value)?;
        to_json(&plan, header, data).map(Value::Transcoded)
    }

    fn fetch(&self, values: &mut dyn Iterator<Item = Raw<'_>>, waiting: &Waiting<'_>) -> Result<(), Stopped> {
        self.0.fetch(values, waiting)
    }
}

fn fault(message: impl Into<String>) -> RecordError {
    RecordError::new(Fault::Decode, message)
}

/// `header`: the message indexes, if they are not before the data but in the record's header.
fn to_json(plan: &Plan, header: Option<&[u8]>, mut data: &[u8]) -> Result<String, RecordError> {
    let message = match (plan, header) {
        (Plan::Message(message), _) => message.clone(),
        (Plan::Indexed(file), Some(mut header)) => message_of(file, &mut header)?,
        (Plan::Indexed(file), None) => message_of(file, &mut data)?,
    };
    let any = memchr::memmem::find_iter(data, b"google.protobuf.Any").take(MAX_ANY + 1).count();
    if any > MAX_ANY {
        return Err(fault(format!(
            "the value has more than {MAX_ANY} messages of google.protobuf.Any in each other"
        )));
    }
    let name = message.full_name().to_owned();
    let not = |e: &dyn std::fmt::Display| fault(format!("the value is not a message {name}: {e}"));
    let decoded = DynamicMessage::decode(message, data).map_err(|e| not(&e))?;
    let options = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false);
    let mut out = Vec::with_capacity(data.len() * 2);
    decoded
        .serialize_with_options(&mut serde_json::Serializer::new(&mut out), &options)
        .map_err(|e| not(&e))?;
    String::from_utf8(out).map_err(|e| not(&e))
}

/// Takes the indexes, and returns the message that they name.
fn message_of(file: &FileDescriptor, data: &mut &[u8]) -> Result<MessageDescriptor, RecordError> {
    let count = zigzag(data)?;
    if count < 0 {
        return Err(fault("the value's number of message indexes is negative"));
    }
    let mut message: Option<MessageDescriptor> = None;
    // Without indexes, it is the first message.
    for _ in 0..count.max(1) {
        let index = if count == 0 { 0 } else { zigzag(data)? };
        let at = usize::try_from(index).unwrap_or(usize::MAX);
        let found = match &message {
            None => file.messages().nth(at),
            Some(outer) => outer.child_messages().nth(at),
        };
        let inside = message.map_or_else(String::new, |outer| format!(" in {}", outer.full_name()));
        message =
            Some(found.ok_or_else(|| fault(format!("the value's schema has no message {index}{inside}")))?);
    }
    message.ok_or_else(|| fault("the value names no message"))
}

/// Takes a zigzag number.
fn zigzag(data: &mut &[u8]) -> Result<i64, RecordError> {
    let value = prost::encoding::decode_varint(data)
        .map_err(|e| fault(format!("the value ends within its message indexes: {e}")))?;
    Ok((value >> 1) as i64 ^ -((value & 1) as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICKET: &str = r#"
        syntax = "proto3";
        package shop;
        import "google/protobuf/timestamp.proto";
        import "google/protobuf/any.proto";
        import "common/person.proto";
        message First { string unused = 1; }
        message Ticket {
            message Line { int32 amount = 1; }
            string first_text = 1;
            int64 id = 2;
            repeated string tags = 3;
            google.protobuf.Timestamp at = 4;
            State state = 5;
            bytes raw = 6;
            common.Person by = 7;
            double ratio = 8;
            oneof either { string note = 9; }
            google.protobuf.Any any = 10;
        }
        enum State { OPEN = 0; CLOSED = 1; }
    "#;

    fn plan() -> Plan {
        let person = Schema::new(
            SchemaKind::Protobuf,
            "syntax = \"proto3\"; package common; message Person { string name = 1; Person knows = 2; }",
        );
        let schema = Schema {
            references: vec![("common/person.proto".to_owned(), person.into())],
            ..Schema::new(SchemaKind::Protobuf, TICKET)
        };
        Compiler { message: None }.compile(&schema).unwrap()
    }

    fn json(data: &[u8]) -> Result<serde_json::Value, String> {
        let json = to_json(&plan(), None, data).map_err(|error| error.message)?;
        Ok(serde_json::from_str(&json).unwrap())
    }

    /// Fields of one length-delimited value each, written by hand after the specification of the encoding.
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
    }

    #[test]
    fn a_message_becomes_proto3_json_with_the_names_of_the_schema() {
        let person = [field(1, b"Ada"), field(2, &field(1, b"Bob"))].concat();
        let data = [
            // Indexes: one, of the second message.
            vec![2, 2],
            field(1, "é\"".as_bytes()),
            vec![2 << 3, 7],
            field(3, b"a"),
            field(3, b"b"),
            field(4, &[8, 1]),
            vec![5 << 3, 1],
            field(6, b"\0\xff"),
            field(7, &person),
        ]
        .concat();
        let want = serde_json::json!({
            "first_text": "é\"", "id": "7", "tags": ["a", "b"], "at": "1970-01-01T00:00:01Z", "state": "CLOSED",
            "raw": "AP8=", "by": { "name": "Ada", "knows": { "name": "Bob" } }, "ratio": 0.0
        });
        assert_eq!(json(&data).unwrap(), want);
    }

    #[test]
    fn the_indexes_name_the_message() {
        assert_eq!(
            json(&[&[0][..], &field(1, b"x")].concat()).unwrap(),
            serde_json::json!({ "unused": "x" })
        );
        // Ticket.Line.
        assert_eq!(json(&[4, 2, 0, 8, 5]).unwrap(), serde_json::json!({ "amount": 5 }));
        assert_eq!(json(&[2, 8]).unwrap_err(), "the value's schema has no message 4");
        assert_eq!(json(&[4, 2, 2]).unwrap_err(), "the value's schema has no message 1 in shop.Ticket");
        assert!(json(&[]).unwrap_err().contains("message indexes"));
        assert!(json(&[2]).unwrap_err().contains("message indexes"));
        assert!(json(&[1]).is_err(), "a negative number of indexes");
        // A number of indexes that nothing backs.
        assert!(json(&[0xfe, 0xff, 0xff, 0xff, 0x0f, 2]).is_err());
    }

    #[test]
    fn the_indexes_may_be_in_the_header() {
        let of = |header: &[u8], data: &[u8]| {
            let json = to_json(&plan(), Some(header), data).map_err(|error| error.message)?;
            Ok::<serde_json::Value, String>(serde_json::from_str(&json).unwrap())
        };
        // What follows the indexes is not the data.
        assert_eq!(of(&[4, 2, 0, 8, 6], &[8, 5]).unwrap(), serde_json::json!({ "amount": 5 }));
        assert_eq!(of(&[0], &field(1, b"x")).unwrap(), serde_json::json!({ "unused": "x" }));
        assert!(of(&[], &[0, 8, 5]).unwrap_err().contains("message indexes"));
    }

    #[test]
    fn a_damaged_message_is_the_records_fault() {
        let error = json(&[0, 1 << 3 | 2, 9, b'x']).unwrap_err();
        assert!(error.starts_with("the value is not a message shop.First: "), "{error}");
        // Messages within messages: prost stops at 100.
        let deep = (0..200).fold(Vec::new(), |inner, _| {
            let mut out = vec![2 << 3 | 2];
            prost::encoding::encode_varint(inner.len() as u64, &mut out);
            out.extend(inner);
            out
        });
        let mut value = vec![2, 2, 7 << 3 | 2];
        prost::encoding::encode_varint(deep.len() as u64, &mut value);
        value.extend(deep);
        assert!(json(&value).unwrap_err().contains("recursion"));
        let any = b"type.googleapis.com/google.protobuf.Any".repeat(40);
        let mut value = vec![2, 2, 1 << 3 | 2];
        prost::encoding::encode_varint(any.len() as u64, &mut value);
        value.extend(any);
        assert!(json(&value).unwrap_err().contains("google.protobuf.Any"));
    }

    #[test]
    fn members_are_looked_up_in_the_schema() {
        let schema = Schema::new(
            SchemaKind::Protobuf,
            "syntax = \"proto3\"; message A { B b = 1; repeated B bs = 2; map<string, B> m = 3; string s = 4; } \
             message B { string x = 1; }",
        );
        for (pointer, there) in [
            ("/b/x", true),
            ("/bs/0/x", true),
            ("/m/key/x", true),
            ("/s", true),
            ("/x", true),
            ("/b/y", false),
            ("/s/x", false),
            ("/none", false),
        ] {
            let found = types(&schema, &[crate::codec::tokens(pointer)]).unwrap();
            assert_eq!(found[0].is_some(), there, "{pointer}");
        }
    }

    #[test]
    fn included_fields_have_types() {
        let schema = Schema::new(
            SchemaKind::Protobuf,
            "syntax = \"proto3\"; import \"google/protobuf/timestamp.proto\"; \
             message A { int32 i = 1; int64 l = 2; uint64 u = 3; float f = 4; bool b = 5; bytes r = 6; E e = 7; \
             A a = 8; repeated double ds = 9; map<int32, string> m = 10; repeated A as = 11; \
             google.protobuf.Timestamp at = 12; string both = 13; } enum E { X = 0; } message B { bool both = 1; }",
        );
        let long = |quoted| Type::Long { quoted };
        for (pointer, want) in [
            ("/i", long(false)),
            ("/l", long(true)),
            ("/u", Type::Text),
            ("/f", Type::Double { quoted: true }),
            ("/b", Type::Boolean),
            ("/r", Type::Text),
            ("/e", Type::Json),
            ("/a", Type::Json),
            ("/a/a/l", long(true)),
            ("/ds", Type::list(Type::Double { quoted: true })),
            ("/ds/0", Type::Double { quoted: true }),
            ("/m", Type::map(Type::Text)),
            ("/as", Type::Json),
            ("/as/0/l", long(true)),
            ("/at", Type::Text),
            ("/both", Type::Json),
        ] {
            assert_eq!(types(&schema, &[crate::codec::tokens(pointer)]).unwrap(), [Some(want)], "{pointer}");
        }
    }

    #[test]
    fn a_file_or_a_descriptor_set_and_the_name_of_a_message() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(
            folder.path().join("b.proto"),
            "syntax = \"proto3\"; package b; message B { string x = 1; }",
        )
        .unwrap();
        let text = "syntax = \"proto3\"; package a; import \"b.proto\"; message A { b.B b = 1; }";
        let (proto, set) = (folder.path().join("a.proto"), folder.path().join("a.bin"));
        std::fs::write(&proto, text).unwrap();
        let compiled = protox::compile(["a.proto"], [folder.path()]).unwrap();
        std::fs::write(&set, prost::Message::encode_to_vec(&compiled)).unwrap();
        for path in [proto.as_path(), set.as_path()] {
            let plan = Compiler { message: Some("a.A".to_owned()) }.compile_file(path).unwrap();
            assert_eq!(to_json(&plan, None, &field(1, &field(1, b"x"))).unwrap(), r#"{"b":{"x":"x"}}"#);
            let error = Compiler { message: Some("a.C".to_owned()) }.compile_file(path).err().unwrap();
            assert!(error.to_string().contains("no message a.C"), "{error}");
        }
        assert!(Compiler { message: None }.compile_file(Path::new("/none.proto")).is_err());
    }
}
