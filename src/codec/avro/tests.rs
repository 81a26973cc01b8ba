use apache_avro::types::{Record, Value as Avro};
use apache_avro::writer::datum::GenericDatumWriter;
use apache_avro::{Days, Decimal, Duration, Millis, Months};
use proptest::prelude::*;

use super::decode::to_json;
use super::*;

fn plan(schema: &str, pointers: &[&str]) -> Plan {
    let selected = Selected::new(pointers.iter().copied());
    Compiler(selected).compile(&Schema::new(SchemaKind::Avro, schema)).unwrap()
}

/// The whole value as JSON, or the error.
fn whole(schema: &str, bytes: &[u8]) -> Result<String, String> {
    to_json(&plan(schema, &[""]), bytes).map_err(|error| error.to_string())
}

fn encoded(schema: &str, value: impl Into<Avro>) -> Vec<u8> {
    let schema = apache_avro::Schema::parse_str(schema).unwrap();
    GenericDatumWriter::builder(&schema).build().unwrap().write_value_to_vec(value).unwrap()
}

const TICKET: &str = r#"{"type":"record","name":"Ticket","namespace":"shop","fields":[
    {"name":"id","type":"long"},
    {"name":"text","type":["null","string"],"default":null},
    {"name":"vip","type":"boolean"},
    {"name":"ratio","type":"double"},
    {"name":"part","type":"float"},
    {"name":"raw","type":"bytes"},
    {"name":"md5","type":{"type":"fixed","name":"MD5","size":4}},
    {"name":"state","type":{"type":"enum","name":"State","symbols":["OPEN","CLOSED"]}},
    {"name":"tags","type":{"type":"array","items":"string"}},
    {"name":"counts","type":{"type":"map","values":"int"}},
    {"name":"other","type":["null",{"type":"record","name":"Person","fields":[
        {"name":"name","type":"string"},{"name":"knows","type":["null","Person"]}]}]},
    {"name":"price","type":{"type":"bytes","logicalType":"decimal","precision":9,"scale":2}},
    {"name":"day","type":{"type":"int","logicalType":"date"}},
    {"name":"at","type":{"type":"long","logicalType":"timestamp-millis"}},
    {"name":"local","type":{"type":"long","logicalType":"local-timestamp-micros"}},
    {"name":"noon","type":{"type":"int","logicalType":"time-millis"}},
    {"name":"uuid","type":{"type":"string","logicalType":"uuid"}},
    {"name":"took","type":{"type":"fixed","name":"Took","size":12,"logicalType":"duration"}}
]}"#;

fn ticket() -> Vec<u8> {
    let schema = apache_avro::Schema::parse_str(TICKET).unwrap();
    let person = |name: &str, knows| {
        Avro::Record(vec![("name".into(), Avro::String(name.into())), ("knows".into(), knows)])
    };
    let none = || Avro::Union(0, Box::new(Avro::Null));
    let some = |value| Avro::Union(1, Box::new(value));
    let mut record = Record::new(&schema).unwrap();
    record.put("id", -7i64);
    record.put("text", some(Avro::String("say \"hi\"\né".into())));
    record.put("vip", true);
    record.put("ratio", 0.1f64);
    record.put("part", 0.1f32);
    record.put("raw", Avro::Bytes(b"\0\xff".to_vec()));
    record.put("md5", Avro::Fixed(4, vec![1, 2, 3, 4]));
    record.put("state", Avro::Enum(1, "CLOSED".into()));
    record.put("tags", Avro::Array(vec![Avro::String("a".into()), Avro::String("b".into())]));
    record.put("counts", Avro::Map([("x".to_owned(), Avro::Int(3))].into()));
    record.put("other", some(person("Ada", some(person("Bob", none())))));
    record.put("price", Avro::Decimal(Decimal::from([0x04, 0xd2])));
    record.put("day", Avro::Date(20_484));
    record.put("at", Avro::TimestampMillis(1_769_860_800_123));
    record.put("local", Avro::LocalTimestampMicros(1_769_860_800_000_001));
    record.put("noon", Avro::TimeMillis(43_200_000));
    record.put("uuid", Avro::Uuid("00010203-0405-0607-0809-0a0b0c0d0e0f".parse().unwrap()));
    record.put("took", Avro::Duration(Duration::new(Months::new(1), Days::new(2), Millis::new(3))));
    GenericDatumWriter::builder(&schema).build().unwrap().write_value_to_vec(record).unwrap()
}

#[test]
fn every_type_is_the_json_that_one_would_write() {
    let json = concat!(
        r#"{"id":-7,"text":"say \"hi\"\né","vip":true,"ratio":0.1,"part":0.1,"raw":"AP8=","md5":"AQIDBA==","#,
        r#""state":"CLOSED","tags":["a","b"],"counts":{"x":3},"#,
        r#""other":{"name":"Ada","knows":{"name":"Bob","knows":null}},"price":12.34,"day":"2026-01-31","#,
        r#""at":"2026-01-31T12:00:00.123Z","local":"2026-01-31T12:00:00.000001","noon":"12:00:00","#,
        r#""uuid":"00010203-0405-0607-0809-0a0b0c0d0e0f","took":{"months":1,"days":2,"milliseconds":3}}"#
    );
    assert_eq!(whole(TICKET, &ticket()).unwrap(), json);
}

#[test]
fn only_what_is_selected_is_written() {
    let of = |pointers: &[&str]| to_json(&plan(TICKET, pointers), &ticket()).unwrap();
    assert_eq!(of(&["/state"]), r#"{"state":"CLOSED"}"#);
    assert_eq!(
        of(&["/took/days", "/id", "/tags/1"]),
        r#"{"id":-7,"tags":["a","b"],"took":{"months":1,"days":2,"milliseconds":3}}"#
    );
    assert_eq!(of(&["/other/knows/name"]), r#"{"other":{"knows":{"name":"Bob"}}}"#);
    assert_eq!(of(&["/none"]), "{}");
}

#[test]
fn a_value_that_does_not_match_says_where() {
    let bytes = ticket();
    // What comes before is right, so that every cut is found.
    for end in 0..bytes.len() {
        let error = whole(TICKET, &bytes[..end]).unwrap_err();
        assert!(error.contains("ends early"), "{end}: {error}");
    }
    assert_eq!(
        whole(TICKET, &[bytes.as_slice(), &[1]].concat()).unwrap_err(),
        "1 bytes are left after the value"
    );
    let schema = r#"{"type":"record","name":"A","fields":[{"name":"b","type":{"type":"record","name":"B","fields":[
        {"name":"c","type":"boolean"}]}}]}"#;
    assert_eq!(whole(schema, &[2]).unwrap_err(), "/b/c: a boolean is 2, not 0 or 1");
    assert_eq!(
        to_json(&plan(schema, &["/x"]), &[2]).unwrap_err().to_string(),
        "/b/c: a boolean is 2, not 0 or 1"
    );
    assert_eq!(whole(r#"["null","int"]"#, &[4]).unwrap_err(), "there is no alternative 2 of 2");
    assert!(whole("\"string\"", &[4, 0xc3, 0x28]).unwrap_err().contains("UTF-8"));
    assert!(whole("\"int\"", &[0x80, 0x80, 0x80, 0x80, 0x20]).unwrap_err().contains("32 bits"));
    assert!(whole("\"long\"", &[0xff; 11]).unwrap_err().contains("64 bits"));
    assert_eq!(
        whole("\"long\"", &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]).unwrap(),
        i64::MIN.to_string()
    );
}

#[test]
fn lengths_and_counts_cannot_ask_for_more_than_the_bytes_are() {
    let most = encoded("\"long\"", i64::MAX);
    let least = encoded("\"long\"", i64::MIN);
    for schema in [
        "\"string\"",
        "\"bytes\"",
        r#"{"type":"array","items":"string"}"#,
        r#"{"type":"map","values":"int"}"#,
    ] {
        assert!(whole(schema, &most).unwrap_err().contains("ends early"), "{schema}");
        assert!(whole(schema, &least).is_err(), "{schema}");
        assert!(to_json(&plan(schema, &["/x"]), &most).is_err(), "{schema}");
    }
    // Nulls take no bytes.
    let nulls = r#"{"type":"array","items":"null"}"#;
    assert!(whole(nulls, &most).unwrap_err().contains("values without bytes"));
    let record =
        r#"{"type":"record","name":"A","fields":[{"name":"n","type":{"type":"array","items":"null"}}]}"#;
    assert!(to_json(&plan(record, &["/x"]), &most).unwrap_err().to_string().contains("values without bytes"));
    assert_eq!(whole(nulls, &[4, 0]).unwrap(), "[null,null]");
}

#[test]
fn recursion_is_bounded() {
    let list = r#"{"type":"record","name":"L","fields":[{"name":"next","type":["null","L"]}]}"#;
    let of = |depth: usize| [vec![2; depth - 1], vec![0]].concat();
    assert_eq!(whole(list, &of(2)).unwrap(), r#"{"next":{"next":null}}"#);
    assert!(whole(list, &of(100)).is_ok());
    assert!(whole(list, &of(101)).unwrap_err().contains("nested deeper than 100 levels"));
    assert!(to_json(&plan(list, &["/x"]), &of(1_000_000)).is_err());
    // A record within itself has no finite value.
    let endless = r#"{"type":"record","name":"E","fields":[{"name":"e","type":"E"}]}"#;
    assert!(whole(endless, &[]).unwrap_err().contains("nested deeper"));
}

#[test]
fn blocks_with_their_length_in_bytes_are_read_and_skipped() {
    // Two blocks: -2 items in 4 bytes, 1 item, the end.
    let bytes = [3, 8, 2, b'a', 2, b'b', 2, 2, b'c', 0];
    let array = r#"{"type":"array","items":"string"}"#;
    assert_eq!(whole(array, &bytes).unwrap(), r#"["a","b","c"]"#);
    let record = format!(r#"{{"type":"record","name":"A","fields":[{{"name":"a","type":{array}}}]}}"#);
    assert_eq!(to_json(&plan(&record, &["/x"]), &bytes).unwrap(), "{}");
}

#[test]
fn numbers_that_json_lacks_are_null() {
    assert_eq!(whole("\"double\"", &f64::NAN.to_le_bytes()).unwrap(), "null");
    assert_eq!(whole("\"float\"", &f32::NEG_INFINITY.to_le_bytes()).unwrap(), "null");
}

#[test]
fn references_are_resolved_across_schemas() {
    let address = Schema::new(
        SchemaKind::Avro,
        r#"{"type":"record","name":"Address","namespace":"shop","fields":[{"name":"city","type":"string"}]}"#,
    );
    let customer = Schema {
        references: vec![("shop.Address".to_owned(), address.into())],
        ..Schema::new(
            SchemaKind::Avro,
            r#"{"type":"record","name":"Customer","namespace":"shop","fields":[{"name":"home","type":"Address"}]}"#,
        )
    };
    let order = Schema {
        references: vec![("shop.Customer".to_owned(), customer.into())],
        ..Schema::new(
            SchemaKind::Avro,
            r#"{"type":"record","name":"Order","fields":[{"name":"by","type":"shop.Customer"},
                {"name":"to","type":["null","shop.Address"]}]}"#,
        )
    };
    let plan = Compiler(Selected::Whole).compile(&order).unwrap();
    let json = to_json(&plan, &[8, b'K', b'i', b'e', b'l', 2, 4, b'H', b'H']).unwrap();
    assert_eq!(json, r#"{"by":{"home":{"city":"Kiel"}},"to":{"city":"HH"}}"#);
    let of_protobuf = Compiler(Selected::Whole).compile(&Schema::new(SchemaKind::Protobuf, "")).unwrap_err();
    assert!(of_protobuf.to_string().contains("PROTOBUF"));
    let broken = Compiler(Selected::Whole).compile(&Schema::new(SchemaKind::Avro, r#"{"type":"recor"}"#));
    assert!(broken.is_err());
}

#[test]
fn included_fields_have_types() {
    use crate::codec::write::schema::Type;
    let schema = Schema::new(
        SchemaKind::Avro,
        r#"{"type":"record","name":"R","fields":[
            {"name":"i","type":"int"}, {"name":"l","type":["null","long"]}, {"name":"f","type":"float"},
            {"name":"b","type":"boolean"}, {"name":"s","type":{"type":"enum","name":"E","symbols":["A"]}},
            {"name":"at","type":{"type":"long","logicalType":"timestamp-millis"}},
            {"name":"price","type":{"type":"bytes","logicalType":"decimal","precision":9,"scale":2}},
            {"name":"two","type":["int","string"]}, {"name":"il","type":["null","int","long"]},
            {"name":"ls","type":{"type":"array","items":"int"}}, {"name":"ln","type":{"type":"array","items":["null","int"]}},
            {"name":"m","type":{"type":"map","values":"string"}}, {"name":"r","type":["null","R"]}
        ]}"#,
    );
    let long = Type::Long { quoted: false };
    for (pointer, want) in [
        ("/i", Some(long.clone())),
        ("/l", Some(long.clone())),
        ("/f", Some(Type::Double { quoted: false })),
        ("/b", Some(Type::Boolean)),
        ("/s", Some(Type::Text)),
        ("/at", Some(Type::Text)),
        ("/price", Some(Type::Json)),
        ("/two", Some(Type::Json)),
        ("/il", Some(long.clone())),
        ("/ls", Some(Type::list(long.clone()))),
        ("/ls/0", Some(long.clone())),
        ("/ls/x", None),
        ("/ln", Some(Type::Json)),
        ("/m", Some(Type::map(Type::Text))),
        ("/m/any", Some(Type::Text)),
        ("/r", Some(Type::Json)),
        ("/r/r/i", Some(long)),
        ("/r/none", None),
        ("/i/none", None),
    ] {
        assert_eq!(super::types(&schema, &[crate::codec::tokens(pointer)]).unwrap(), [want], "{pointer}");
    }
}

proptest! {
    /// Whatever the bytes: no panic, and what is written is JSON.
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        for pointers in [&[""][..], &["/tags", "/other/name"]] {
            if let Ok(json) = to_json(&plan(TICKET, pointers), &bytes) {
                prop_assert!(serde_json::from_str::<serde_json::Value>(&json).is_ok(), "{json}");
            }
        }
    }

    /// A value with a few changed bytes.
    #[test]
    fn damaged_values(at in 0usize..200, byte in any::<u8>()) {
        let mut bytes = ticket();
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Ok(json) = whole(TICKET, &bytes) {
            prop_assert!(serde_json::from_str::<serde_json::Value>(&json).is_ok(), "{json}");
        }
    }
}
