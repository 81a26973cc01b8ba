//! Selects a task's input from a value of any format: the text (by pointers or a template), the values at the task's
//! own pointers, and the fields that `output.include` copies.
//!
//! `output.include` copies bytes, so that numbers keep all digits and strings keep their escapes.

use std::borrow::Cow;
use std::collections::HashSet;

use minijinja::{Environment, UndefinedBehavior};
use serde_json::value::RawValue;

use super::json::{Document, Path};
use super::selected::{Selected, unescape};
use super::{FORMATS, FormatEntry, Value};
use crate::record::{Fault, RecordError};
use crate::settings::{self, Fields, Format, Settings, check_pointer};
use crate::task::{KINDS, Kind, Reads};

/// A task's input from one record.
#[derive(Debug)]
pub struct Input<'a> {
    pub text: Cow<'a, str>,
    /// The value itself, where the task reads an image and the format has no members and is no text.
    pub bytes: Option<&'a [u8]>,
    /// The values at the task's own pointers, in the order of the pointers; `None` if missing.
    pub values: Vec<Option<Cow<'a, RawValue>>>,
    /// The fields of `output.include` as JSON members, each written as `,"name":value`.
    pub include: String,
}

impl Input<'_> {
    fn into_owned(self) -> Input<'static> {
        let Input { text, bytes: _, values, include } = self;
        let owned = |value: Option<Cow<'_, RawValue>>| value.map(|value| Cow::Owned(value.into_owned()));
        let values = values.into_iter().map(owned).collect();
        Input { text: Cow::Owned(text.into_owned()), bytes: None, values, include }
    }
}

/// The selection that the settings configure.
pub struct Select {
    /// Bytes are not a text.
    image: bool,
    text: TextFrom,
    /// The task's own pointers, each with its parts.
    values: Vec<(String, Path)>,
    /// Pointers to copy, each with its name in the prediction.
    include: Vec<(String, String)>,
}

enum TextFrom {
    Fields { pointers: Vec<String>, join: String },
    Template(Box<Template>),
}

/// A template over the members of a value; a missing member is an error.
struct Template(Environment<'static>);

impl Template {
    fn new(source: &str) -> Result<Self, minijinja::Error> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.add_template_owned("input", source.to_owned())?;
        Ok(Self(environment))
    }

    /// Names that it uses of the value's members.
    fn names(&self) -> HashSet<String> {
        self.0.get_template("input").map(|template| template.undeclared_variables(false)).unwrap_or_default()
    }

    fn render(&self, value: &serde_json::Value) -> Result<String, minijinja::Error> {
        self.0.get_template("input")?.render(minijinja::value::Serde(value))
    }
}

/// The name that a pointer's value has in a prediction: the pointer's last reference token.
pub fn last_name(pointer: &str) -> String {
    unescape(pointer.rsplit('/').next().unwrap_or_default())
}

impl Select {
    /// `pointers`: the task's own, which `input.field` follows if it is a series.
    ///
    /// # Errors
    /// `input.template` is not a valid template.
    pub fn new(settings: &Settings, pointers: Vec<String>) -> Result<Self, minijinja::Error> {
        let (input, include) = (&settings.input, &settings.output.include);
        let (mut pointers, mut fields) = (pointers, input.field.0.clone());
        if Kind::of(settings.task.kind).reads == Reads::Series {
            // The field is no text, but a value.
            pointers.append(&mut fields);
        }
        let text = match &input.template {
            Some(template) => TextFrom::Template(Box::new(Template::new(template)?)),
            None => TextFrom::Fields { pointers: fields, join: input.join.clone() },
        };
        let include = include.iter().map(|pointer| (pointer.clone(), last_name(pointer))).collect();
        let values = pointers.into_iter().map(|pointer| (pointer.clone(), Path::new(&pointer))).collect();
        let image = Kind::of(settings.task.kind).reads == Reads::Image;
        Ok(Self { image, text, values, include })
    }

    /// # Errors
    /// A selected value is missing or has the wrong type.
    pub fn select<'a>(&self, value: Value<'a>) -> Result<Input<'a>, RecordError> {
        let whole = |text| Input { text, bytes: None, values: Vec::new(), include: String::new() };
        let document = match value {
            Value::Text(text) => return Ok(whole(Cow::Borrowed(text))),
            Value::Bytes(bytes) if self.image => {
                return Ok(Input { bytes: Some(bytes), ..whole(Cow::Borrowed("")) });
            }
            // For tasks that read text, invalid UTF-8 becomes replacement characters, so that no value is refused.
            Value::Bytes(bytes) => return Ok(whole(String::from_utf8_lossy(bytes))),
            Value::Tree(document) => document,
            Value::Transcoded(text) => {
                let whole: &RawValue = serde_json::from_str(&text)
                    .map_err(|e| RecordError::new(Fault::Decode, format!("the value cannot be read: {e}")))?;
                return Ok(self.select_from(&Document::new(whole))?.into_owned());
            }
        };
        self.select_from(&document)
    }

    /// Everything that is selected.
    pub fn selected(&self) -> Selected {
        Selected::new(self.pointers().iter().map(String::as_str))
    }

    /// The pointers to everything that is selected; of a template, to the members that it names.
    pub fn pointers(&self) -> Vec<String> {
        let escape = |name: String| format!("/{}", name.replace('~', "~0").replace('/', "~1"));
        let mut all: Vec<String> = match &self.text {
            TextFrom::Fields { pointers, .. } => pointers.clone(),
            TextFrom::Template(template) => template.names().into_iter().map(escape).collect(),
        };
        all.extend(self.values.iter().map(|(pointer, _)| pointer.clone()));
        all.extend(self.include.iter().map(|(pointer, _)| pointer.clone()));
        all
    }

    fn select_from<'a>(&self, document: &Document<'a>) -> Result<Input<'a>, RecordError> {
        let mut include = String::new();
        for (pointer, name) in &self.include {
            if let Some(found) = document.at(pointer) {
                include.push(',');
                include.push_str(&serde_json::Value::from(name.as_str()).to_string());
                include.push(':');
                include.push_str(found.get());
            }
        }
        let text = self.text(document)?;
        let values = self.values.iter().map(|(_, path)| document.at_path(path).map(Cow::Borrowed)).collect();
        Ok(Input { text, bytes: None, values, include })
    }

    fn text<'a>(&self, document: &Document<'a>) -> Result<Cow<'a, str>, RecordError> {
        match &self.text {
            TextFrom::Template(template) => {
                let value: serde_json::Value = serde_json::from_str(document.whole().get())
                    .map_err(|e| RecordError::new(Fault::Decode, format!("the value cannot be read: {e}")))?;
                let rendered = template.render(&value);
                Ok(rendered
                    .map_err(|e| RecordError::new(Fault::Field, format!("input.template: {e}")))?
                    .into())
            }
            TextFrom::Fields { pointers, .. } if pointers.len() == 1 => document.string_at(&pointers[0]),
            TextFrom::Fields { pointers, join } => {
                let mut text = String::new();
                for (i, pointer) in pointers.iter().enumerate() {
                    if i > 0 {
                        text.push_str(join);
                    }
                    text.push_str(&document.string_at(pointer)?);
                }
                Ok(text.into())
            }
        }
    }
}

/// The problem with a key that selects members if the format has none.
pub fn needs_members(format: &FormatEntry) -> String {
    let with: Vec<&str> =
        FORMATS.iter().filter(|format| format.has_members).map(|format| format.name).collect();
    format!("needs one of input.format: {}; not {}", with.join(", "), format.name)
}

/// Whether the value at a pointer has some of the text: it is a field of the text, or has one, or is in one.
pub fn holds_text(input: &settings::Input, pointer: &str) -> bool {
    let within =
        |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let Some(source) = &input.template else {
        return input.field.0.iter().any(|field| within(field, pointer) || within(pointer, field));
    };
    let Ok(template) = Template::new(source) else { return false };
    let first = pointer.trim_start_matches('/').split('/').next().unwrap_or_default();
    template.names().contains(&unescape(first))
}

/// The problems of the settings that select values: keys and messages.
pub fn problems(settings: &Settings, task: &Kind) -> Vec<(&'static str, String)> {
    let (input, include) = (&settings.input, &settings.output.include);
    let mut problems = Vec::new();
    let mut problem = |key, message: String| problems.push((key, message));
    let format = FormatEntry::of(input.format);
    if input.format == Format::Image && task.reads != Reads::Image {
        let images = KINDS.iter().filter(|kind| kind.reads == Reads::Image).map(|kind| kind.kind.name());
        let images: Vec<&str> = images.collect();
        problem("input.format", format!("image is for task.kind: {}", images.join(" and ")));
    }
    if task.reads == Reads::Image && format.has_members {
        let name = task.kind.name();
        if input.field.0.len() > 1 {
            problem("input.field", format!("{name} reads one image: set one pointer"));
        }
        if input.template.is_some() {
            problem("input.template", format!("has no effect with task.kind: {name}; set input.field"));
        }
    }
    if task.reads == Reads::Tensors {
        let name = task.kind.name();
        if !input.field.0.is_empty() {
            problem("input.field", format!("has no effect with task.kind: {name}; set task.inputs"));
        }
        if input.template.is_some() {
            problem("input.template", format!("has no effect with task.kind: {name}; set task.inputs"));
        }
        if !format.has_members {
            problem("input.format", format!("{name} {}", needs_members(format)));
        }
    } else if task.reads == Reads::Series {
        let name = task.kind.name();
        if !format.has_members {
            problem("input.format", format!("{name} {}", needs_members(format)));
        } else if input.field.0.len() != 1 {
            let message = format!("{name} needs one field: set the pointer to the series, such as /values");
            problem("input.field", message);
        }
        for message in input.field.0.iter().filter_map(|field| check_pointer(field).err()) {
            problem("input.field", message);
        }
        if input.template.is_some() {
            problem("input.template", format!("has no effect with task.kind: {name}; set input.field"));
        }
    } else if !format.has_members {
        if !input.field.0.is_empty() {
            problem("input.field", format!("has no effect with input.format: {}", format.name));
        }
        if input.template.is_some() {
            problem("input.template", format!("has no effect with input.format: {}", format.name));
        }
        if !include.is_empty() {
            problem("output.include", needs_members(format));
        }
    } else {
        match (&input.field, &input.template) {
            (Fields(fields), None) if fields.is_empty() => {
                problem(
                    "input.field",
                    format!(
                        "{} needs a field or a template: set the pointer to {}",
                        format.name,
                        if task.reads == Reads::Image {
                            "the image in base64, such as /image"
                        } else {
                            "the text, such as /text"
                        }
                    ),
                );
            }
            (Fields(fields), Some(_)) if !fields.is_empty() => {
                problem("input.template", "is used instead of input.field: set only one of them".to_owned());
            }
            (Fields(fields), None) => {
                for message in fields.iter().filter_map(|field| check_pointer(field).err()) {
                    problem("input.field", message);
                }
            }
            (_, Some(template)) => {
                if let Err(e) = Template::new(template) {
                    problem("input.template", format!("is not a valid template: {e}"));
                }
            }
        }
    }
    let mut names: Vec<String> = (task.fields)(&settings.task).into_iter().map(|field| field.name).collect();
    if settings.task.redact {
        for pointer in include.iter().filter(|pointer| holds_text(input, pointer)) {
            problem("output.include", format!("{pointer} has the text, which task.redact must not publish"));
        }
    }
    for pointer in include {
        match check_pointer(pointer) {
            Ok(()) if pointer.is_empty() => {
                problem("output.include", "\"\" selects the whole input: list single fields".to_owned());
            }
            Ok(()) => {
                let name = last_name(pointer);
                if names.contains(&name) {
                    let message = format!("{pointer}: a prediction already has a field {name:?}");
                    problem("output.include", message);
                }
                names.push(name);
            }
            Err(message) => problem("output.include", message),
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::bytes::Bytes;
    use crate::codec::json::Json;
    use crate::codec::text::Text;
    use crate::codec::{Decoder, Reader};

    fn decoder(reader: Box<dyn Reader>, text: TextFrom, include: &[&str]) -> Decoder {
        let include = include.iter().map(|p| (p.to_string(), last_name(p))).collect();
        Decoder { reader, select: Select { image: false, text, values: Vec::new(), include } }
    }

    fn whole(reader: Box<dyn Reader>) -> Decoder {
        decoder(reader, TextFrom::Fields { pointers: Vec::new(), join: String::new() }, &[])
    }

    fn json(fields: &[&str], template: Option<&str>, include: &[&str]) -> Decoder {
        let text = match template {
            Some(t) => TextFrom::Template(Box::new(Template::new(t).unwrap())),
            None => TextFrom::Fields {
                pointers: fields.iter().map(|f| f.to_string()).collect(),
                join: " | ".to_owned(),
            },
        };
        decoder(Box::new(Json), text, include)
    }

    fn fault(decoder: &Decoder, value: &[u8]) -> (Fault, String) {
        let error = decoder.decode(value).unwrap_err();
        (error.fault, error.message)
    }

    #[test]
    fn one_field() {
        let decoder = json(&["/a/b"], None, &[]);
        assert_eq!(decoder.decode(br#"{"a":{"b":"hi"}}"#).unwrap().text, "hi");
        assert_eq!(decoder.decode(br#"{"a":{"b":""}}"#).unwrap().text, "");
        assert_eq!(fault(&decoder, br#"{"a":{}}"#), (Fault::Field, "\"/a/b\" is missing".to_owned()));
        assert_eq!(fault(&decoder, br#"{"a":{"b":3}}"#).1, "\"/a/b\" is a number, not a string");
        assert_eq!(fault(&decoder, br#"{"a":{"b":null}}"#).0, Fault::Field);
        assert_eq!(fault(&decoder, b"{").0, Fault::Decode);
        assert_eq!(fault(&decoder, b"").0, Fault::Decode);
        assert_eq!(fault(&decoder, b"\"\xff\"").0, Fault::Decode);
    }

    #[test]
    fn the_whole_value() {
        assert_eq!(json(&[""], None, &[]).decode(br#""hi""#).unwrap().text, "hi");
    }

    #[test]
    fn several_fields_and_included_fields() {
        let decoder = json(&["/title", "/body"], None, &["/id", "/who/na~1me", "/none"]);
        let input = decoder.decode(br#"{"title":"a","body":"b","id":7,"who":{"na/me":"x\"y"}}"#).unwrap();
        assert_eq!(input.text, "a | b");
        assert_eq!(input.include, r#","id":7,"na/me":"x\"y""#);
        assert_eq!(fault(&decoder, br#"{"title":"a"}"#).0, Fault::Field);
    }

    #[test]
    fn included_fields_are_copied_byte_for_byte() {
        let decoder = json(&["/t"], None, &["/n", "/o", "/s"]);
        for number in
            ["18446744073709551616", "123456789.123456789123", "1.10", "1e400", "-0", "1E+2", "0.1e-7"]
        {
            let value = format!(r#"{{"t":"x","n":{number},"o":{{ "a" : [1.0,  2] }},"s":"\u00e9\/"}}"#);
            let include = decoder.decode(value.as_bytes()).unwrap().include;
            assert_eq!(include, format!(r#","n":{number},"o":{{ "a" : [1.0,  2] }},"s":"\u00e9\/""#));
        }
    }

    #[test]
    fn pointers_through_arrays_escapes_and_repeated_names() {
        let value = br#"{"a":[{"b":"x"},{"b":"\u00fc"}],"c":"1","c":"2","d\u00e9":"3"}"#;
        let text =
            |pointer: &str| json(&[pointer], None, &[]).decode(value).map(|input| input.text.into_owned());
        assert_eq!(text("/a/1/b").unwrap(), "ü");
        assert_eq!(text("/c").unwrap(), "2");
        assert_eq!(text("/dé").unwrap(), "3");
        for missing in ["/a/2/b", "/a/01/b", "/a/-/b", "/x/y", "/c/0"] {
            assert_eq!(text(missing).unwrap_err().message, format!("{missing:?} is missing"));
        }
        assert_eq!(json(&["/0"], None, &[]).decode(br#"["x"]"#).unwrap().text, "x");
    }

    #[test]
    fn byte_order_marks_are_skipped_and_other_encodings_are_named() {
        let decoder = json(&["/t"], None, &[]);
        assert_eq!(decoder.decode(b"\xef\xbb\xbf{\"t\":\"x\"}").unwrap().text, "x");
        let utf16: Vec<u8> = "{\"t\":\"x\"}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let marked = [&[0xff, 0xfe][..], &utf16].concat();
        for value in [utf16, marked] {
            assert!(fault(&decoder, &value).1.contains("UTF-16"), "{:?}", fault(&decoder, &value));
        }
        assert!(fault(&decoder, b"\0\0\0\0\x07{\"t\":\"x\"}").1.contains("schema registry"));
        assert!(fault(&decoder, b"\0\0\0\0\x07\x06abc").1.contains("Avro"));
    }

    #[test]
    fn template() {
        let decoder = json(&[], Some("{{ title }}: {{ tags | join(', ') }}"), &[]);
        let input = decoder.decode(br#"{"title":"<a>","tags":["x","y"]}"#).unwrap();
        assert_eq!(input.text, "<a>: x, y");
        assert_eq!(fault(&decoder, br#"{"tags":[]}"#).0, Fault::Field);
        assert!(Template::new("{{ open").is_err());
    }

    #[test]
    fn text_refuses_invalid_utf_8_and_bytes_does_not() {
        assert_eq!(whole(Box::new(Text)).decode("größe".as_bytes()).unwrap().text, "größe");
        assert_eq!(fault(&whole(Box::new(Text)), b"a\xff").0, Fault::Decode);
        assert_eq!(whole(Box::new(Bytes)).decode(b"a\xff").unwrap().text, "a\u{fffd}");
    }
}
