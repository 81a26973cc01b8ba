//! One configuration file. The config crate reads it, except for the values of librdkafka properties: those keep the
//! text of the file, because `0123456` may be a password and not a number.

use std::collections::HashMap;
use std::path::Path;

use config::{FileFormat, Format, Map, Source, Value as Layered, ValueKind};
use serde_json::value::RawValue;
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use yaml_rust2::Event;
use yaml_rust2::parser::{EventReceiver, Parser};

/// The parsed content of a configuration file.
#[derive(Debug, Clone)]
pub(super) struct File(Map<String, Layered>);

impl File {
    /// # Errors
    /// The file does not exist, its extension is unknown, or its content is not valid in that format.
    pub fn read(path: &Path) -> Result<Self, String> {
        let name = path.display().to_string();
        let format = match path.extension().and_then(|e| e.to_str()) {
            Some("yaml" | "yml") => FileFormat::Yaml,
            Some("toml") => FileFormat::Toml,
            Some("json") => FileFormat::Json,
            _ => return Err(format!("{name}: a configuration file ends in .yaml, .yml, .toml or .json")),
        };
        if !path.is_file() {
            return Err(format!("{name}: no such file"));
        }
        let text = std::fs::read_to_string(path).map_err(|e| format!("{name}: {e}"))?;
        Self::parse(&name, format, text.trim_start_matches('\u{feff}')).map_err(|e| format!("{name}: {e}"))
    }

    fn parse(
        name: &str,
        format: FileFormat,
        text: &str,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let written = match format {
            FileFormat::Yaml => Written::of_yaml(text)?,
            FileFormat::Toml => Written::of_toml(text)?,
            _ => Written::of_json(text)?,
        };
        let mut root = format.parse(Some(&name.to_owned()), text)?;
        // The config crate reads such a name as a path, and the properties below it would lose their text.
        if let Some(name) = root.keys().find(|name| name.contains(['.', '['])) {
            return Err(format!("{name} is not a section: put its keys below their section").into());
        }
        for (section, value) in &mut root {
            let ValueKind::Table(section_of) = &mut value.kind else { continue };
            let Some(Layered { kind: ValueKind::Table(properties), .. }) = section_of.get_mut("properties")
            else {
                continue;
            };
            for (property, value) in properties {
                let text =
                    written.get(section).and_then(|w| w.get("properties")).and_then(|w| w.get(property));
                if let (Some(Written::Scalar(text)), false) = (text, value.kind == ValueKind::Nil) {
                    value.kind = ValueKind::String(text.clone());
                }
            }
        }
        Ok(Self(root))
    }
}

impl Source for File {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Layered>, config::ConfigError> {
        Ok(self.0.clone())
    }
}

/// The tables of a file, with the text of scalars as it is written.
#[derive(Debug, Clone)]
enum Written {
    Scalar(String),
    Table(HashMap<String, Written>),
    List,
}

impl Written {
    fn get(&self, name: &str) -> Option<&Written> {
        match self {
            Written::Table(table) => table.get(name),
            Written::Scalar(_) | Written::List => None,
        }
    }

    fn of_yaml(text: &str) -> Result<Self, yaml_rust2::ScanError> {
        let mut events = YamlEvents { open: Vec::new(), anchors: HashMap::new(), root: None };
        Parser::new_from_str(text).load(&mut events, false)?;
        Ok(events.root.unwrap_or(Written::List))
    }

    /// # Errors
    /// The text is not valid TOML. The message is the line number and the problem, because the parser's own message
    /// quotes the line, which may hold a secret.
    fn of_toml(text: &str) -> Result<Self, String> {
        fn written(value: &Spanned<DeValue<'_>>, text: &str) -> Written {
            match value.get_ref() {
                DeValue::Table(entries) => table(entries, text),
                DeValue::Array(_) => Written::List,
                DeValue::String(string) => Written::Scalar(string.to_string()),
                _ => Written::Scalar(text[value.span()].to_owned()),
            }
        }
        fn table(entries: &DeTable<'_>, text: &str) -> Written {
            let entry =
                |(name, value): (&Spanned<_>, _)| (ToString::to_string(name.get_ref()), written(value, text));
            Written::Table(entries.iter().map(entry).collect())
        }
        let parsed = DeTable::parse(text).map_err(|error| {
            let line = 1 + text[..error.span().map_or(0, |span| span.start)].matches('\n').count();
            format!("line {line}: {}", error.message())
        })?;
        Ok(table(parsed.get_ref(), text))
    }

    fn of_json(text: &str) -> Result<Self, serde_json::Error> {
        Ok(match text.trim_start().as_bytes().first() {
            Some(b'{') => {
                let raw: HashMap<String, &RawValue> = serde_json::from_str(text)?;
                let entry = |(name, value): (String, &RawValue)| Ok((name, Self::of_json(value.get())?));
                Written::Table(raw.into_iter().map(entry).collect::<Result<_, serde_json::Error>>()?)
            }
            Some(b'[') => Written::List,
            Some(b'"') => Written::Scalar(serde_json::from_str(text)?),
            _ => Written::Scalar(text.trim().to_owned()),
        })
    }
}

/// Builds the tree from the events of the YAML parser, which hold scalars as they are written.
struct YamlEvents {
    open: Vec<Open>,
    anchors: HashMap<usize, Written>,
    root: Option<Written>,
}

/// A mapping or sequence whose end has not been read yet.
struct Open {
    anchor: usize,
    /// Entries of the mapping; `None` for a sequence.
    table: Option<HashMap<String, Written>>,
    /// The key whose value is the next node.
    name: Option<String>,
}

impl YamlEvents {
    fn node(&mut self, anchor: usize, node: Written) {
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(parent) = self.open.last_mut() else {
            self.root.get_or_insert(node);
            return;
        };
        let Some(table) = &mut parent.table else { return };
        match (parent.name.take(), node) {
            (Some(name), node) => drop(table.insert(name, node)),
            (None, Written::Scalar(name)) => parent.name = Some(name),
            // A key that is not a scalar: the config crate refuses it.
            (None, _) => parent.name = Some(String::new()),
        }
    }
}

impl EventReceiver for YamlEvents {
    fn on_event(&mut self, event: Event) {
        let open = |anchor, table| Open { anchor, table, name: None };
        match event {
            Event::MappingStart(anchor, _) => self.open.push(open(anchor, Some(HashMap::new()))),
            Event::SequenceStart(anchor, _) => self.open.push(open(anchor, None)),
            Event::MappingEnd | Event::SequenceEnd => {
                if let Some(Open { anchor, table, .. }) = self.open.pop() {
                    self.node(anchor, table.map_or(Written::List, Written::Table));
                }
            }
            Event::Scalar(text, _, anchor, _) => self.node(anchor, Written::Scalar(text)),
            Event::Alias(anchor) => {
                let node = self.anchors.get(&anchor).cloned().unwrap_or(Written::List);
                self.node(0, node);
            }
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart
            | Event::DocumentEnd => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn property(format: FileFormat, text: &str) -> ValueKind {
        let file = File::parse("a file", format, text).expect("parses");
        let kafka = file.0["kafka"].clone().into_table().expect("a table");
        kafka["properties"].clone().into_table().expect("a table")["p"].kind.clone()
    }

    #[test]
    fn a_property_keeps_the_text_of_the_file() {
        for text in
            ["0123456", "007", "1e5", "0x10", "1.10", "True", "no", "12345678901234567890123", "2026-01-02"]
        {
            let kept = ValueKind::String(text.to_owned());
            assert_eq!(
                property(FileFormat::Yaml, &format!("kafka: {{ properties: {{ p: {text} }} }}")),
                kept
            );
            let anchored = format!("x: {{ properties: &all {{ p: &one {text} }} }}\n");
            let alias = format!("{anchored}kafka:\n  properties:\n    p: *one\n");
            assert_eq!(property(FileFormat::Yaml, &alias), kept, "{alias}");
            let alias = format!("{anchored}kafka:\n  properties: *all\n");
            assert_eq!(property(FileFormat::Yaml, &alias), kept, "{alias}");
        }
        for text in ["1e5", "0x10", "1.10", "true", "2026-01-02", "+7", "1_000"] {
            let kept = ValueKind::String(text.to_owned());
            assert_eq!(property(FileFormat::Toml, &format!("kafka.properties.p = {text}")), kept);
            assert_eq!(property(FileFormat::Toml, &format!("[kafka.properties]\np = {text} # x")), kept);
        }
        for text in ["1e5", "1.10", "true", "12345678901234567890123"] {
            let json = format!("{{\"kafka\": {{\"properties\": {{\"p\": {text} }}}}}}");
            assert_eq!(property(FileFormat::Json, &json), ValueKind::String(text.to_owned()));
        }
        for (format, text) in [
            (FileFormat::Yaml, "kafka: { properties: { p: \"a\\tb\" } }"),
            (FileFormat::Toml, "kafka.properties.p = \"a\\tb\""),
            (FileFormat::Json, "{\"kafka\": {\"properties\": {\"p\": \"a\\tb\"}}}"),
        ] {
            assert_eq!(property(format, text), ValueKind::String("a\tb".to_owned()));
        }
        assert_eq!(property(FileFormat::Yaml, "kafka: { properties: { p: ~ } }"), ValueKind::Nil);
        assert_eq!(
            property(FileFormat::Json, "{\"kafka\": {\"properties\": {\"p\": null}}}"),
            ValueKind::Nil
        );
    }

    #[test]
    fn all_other_values_have_their_types() {
        let file = File::parse("a file", FileFormat::Yaml, "window: { max_records: 010, max_wait: 1s }")
            .expect("parses");
        let window = file.0["window"].clone().into_table().expect("a table");
        assert_eq!(window["max_records"].kind, ValueKind::I64(10));
        assert_eq!(window["max_records"].origin(), Some("a file"));
    }
}
