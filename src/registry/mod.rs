//! The client of a schema registry with Confluent's API: fetches schemas with what they refer to, and registers them.
//!
//! It does not retry: an error says by its kind whether that would help. It knows no records and no formats.
//!
//! The API: <https://docs.confluent.io/platform/current/schema-registry/develop/api.html>

mod http;
pub mod registration;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::json;

use crate::hex::hex;
use crate::settings;
use http::Http;

/// What language a schema is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchemaKind {
    Avro,
    Protobuf,
    Json,
}

impl SchemaKind {
    /// The API's `schemaType`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avro => "AVRO",
            Self::Protobuf => "PROTOBUF",
            Self::Json => "JSON",
        }
    }
}

/// The id of a schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SchemaId {
    Number(u32),
    /// Computed from the schema, so that it is the same in every registry.
    Guid([u8; 16]),
}

impl fmt::Display for SchemaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "id {number}"),
            Self::Guid(guid) => write!(f, "GUID {}", hyphenated(guid)),
        }
    }
}

/// A GUID as text (RFC 9562, section 4).
fn hyphenated(guid: &[u8; 16]) -> String {
    let mut text = hex(guid);
    for at in [20, 16, 12, 8] {
        text.insert(at, '-');
    }
    text
}

/// A schema's text and the schemas that it refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schema {
    pub kind: SchemaKind,
    pub text: String,
    /// Each under the name by which the text refers to it: a full name in Avro, a file in Protobuf, a URI in JSON Schema.
    /// A schema that several refer to is shared.
    pub references: Vec<(String, Arc<Schema>)>,
}

impl Schema {
    /// A schema that refers to no other.
    pub fn new(kind: SchemaKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into(), references: Vec::new() }
    }

    /// All schemas that this one refers to, directly or not, each name once. A schema comes after those that it refers to.
    pub fn all_references(&self) -> Vec<(&str, &Schema)> {
        fn visit<'a>(schema: &'a Schema, found: &mut Vec<(&'a str, &'a Schema)>) {
            for (name, schema) in &schema.references {
                if !found.iter().any(|(known, _)| known == name) {
                    visit(schema, found);
                    found.push((name.as_str(), &**schema));
                }
            }
        }
        let mut found = Vec::new();
        visit(self, &mut found);
        found
    }
}

/// A version of a subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// The id that the wire format has.
    pub id: u32,
    pub version: i32,
    pub schema: Schema,
}

/// Why the registry gave no schema.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// Passing: it cannot be reached, does not answer in time, or has an error of its own.
    #[error("the schema registry {url} cannot be used: {reason}")]
    Away { url: String, reason: String },
    /// The registry knows no such id, subject or version.
    #[error("the schema registry {url} has no {what}: {message}")]
    NotFound { url: String, what: String, message: String },
    /// It refuses the request: the login, or the schema (incompatible with an earlier version, or not valid).
    #[error("the schema registry {url} refuses {what} (status {status}): {message}")]
    Refused { url: String, what: String, status: u16, message: String },
    /// A setting cannot be used.
    #[error("registry.{key}: {message}")]
    Setting { key: &'static str, message: String },
}

/// References deeper than this, or more of them, are refused: no real schema has as many.
const MAX_DEPTH: usize = 32;
const MAX_REFERENCES: usize = 1000;

/// A schema as the API writes it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    schema: String,
    /// Absent for Avro.
    schema_type: Option<String>,
    #[serde(default)]
    references: Option<Vec<Reference>>,
    id: Option<u32>,
    version: Option<i32>,
}

#[derive(Deserialize)]
struct Reference {
    name: String,
    subject: String,
    version: i32,
}

#[derive(Deserialize)]
struct Registered {
    id: u32,
}

#[derive(Deserialize)]
struct Compatibility {
    is_compatible: bool,
    messages: Option<Vec<String>>,
    reason: Option<String>,
}

pub struct Registry {
    http: Http,
}

impl Registry {
    /// `None` if the settings name no registry. Nothing is sent.
    ///
    /// # Errors
    /// A certificate or key cannot be read.
    pub fn new(settings: &settings::Registry) -> Result<Option<Self>, RegistryError> {
        if settings.url.0.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self { http: Http::new(settings)? }))
    }

    /// The addresses, for messages.
    pub fn name(&self) -> String {
        self.http.name()
    }

    /// The schema of an id, with its references.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub fn schema(&self, id: SchemaId) -> Result<Schema, RegistryError> {
        let what = format!("schema {id}");
        let answer = match id {
            SchemaId::Number(number) => self.http.get(&format!("/schemas/ids/{number}"), &what),
            SchemaId::Guid(guid) => {
                self.http.get(&format!("/schemas/guids/{}", hyphenated(&guid)), &what).map_err(without_guids)
            }
        };
        self.with_references(answer?, &what)
    }

    /// The latest version of a subject.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub fn latest(&self, subject: &str) -> Result<Version, RegistryError> {
        self.version_at(subject, "latest")
    }

    /// One version of a subject.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub fn version(&self, subject: &str, version: i32) -> Result<Version, RegistryError> {
        self.version_at(subject, &version.to_string())
    }

    fn version_at(&self, subject: &str, version: &str) -> Result<Version, RegistryError> {
        let what = format!("version {version} of subject {subject}");
        let answer: Answer = self.http.get(&version_path(subject, version), &what)?;
        let (Some(id), Some(number)) = (answer.id, answer.version) else {
            return Err(self.http.unusable("the answer has no id or no version"));
        };
        Ok(Version { id, version: number, schema: self.with_references(answer, &what)? })
    }

    /// Registers a schema without references under a subject, and returns its id. If the subject has it already, it keeps
    /// its id.
    ///
    /// # Errors
    /// See [`RegistryError`]. `Refused` if the subject's compatibility rule forbids it.
    pub fn register(&self, subject: &str, kind: SchemaKind, text: &str) -> Result<u32, RegistryError> {
        let path = format!("/subjects/{}/versions", http::encode(subject));
        let registered: Registered =
            self.http.post(&path, &body(kind, text), &format!("subject {subject}"))?;
        Ok(registered.id)
    }

    /// The id of a schema that a subject has, also if the two differ only in what the registry normalizes, such as white
    /// space.
    ///
    /// # Errors
    /// See [`RegistryError`]. `NotFound` if the subject does not have this schema.
    pub fn lookup(&self, subject: &str, kind: SchemaKind, text: &str) -> Result<u32, RegistryError> {
        let path = format!("/subjects/{}?normalize=true", http::encode(subject));
        let what = format!("such schema of subject {subject}");
        let registered: Registered = self.http.post(&path, &body(kind, text), &what)?;
        Ok(registered.id)
    }

    /// Why a subject's compatibility rule forbids a schema; `None` if it allows it. Changes nothing.
    ///
    /// # Errors
    /// See [`RegistryError`]. `NotFound` if there is no such subject.
    pub fn compatible(
        &self,
        subject: &str,
        kind: SchemaKind,
        text: &str,
    ) -> Result<Option<String>, RegistryError> {
        let path = format!("/compatibility/subjects/{}/versions/latest?verbose=true", http::encode(subject));
        let what = format!("schema to compare for subject {subject}");
        let answer: Compatibility = self.http.post(&path, &body(kind, text), &what)?;
        // Confluent's registry gives a list of messages, Apicurio one reason.
        let reasons =
            answer.messages.into_iter().flatten().chain(answer.reason).collect::<Vec<_>>().join("; ");
        Ok((!answer.is_compatible).then_some(reasons))
    }

    fn with_references(&self, answer: Answer, what: &str) -> Result<Schema, RegistryError> {
        self.resolve(answer, what, 0, &mut HashMap::new())
    }

    /// `fetched`: what was fetched for the same schema already, by subject and version.
    fn resolve(
        &self,
        answer: Answer,
        what: &str,
        depth: usize,
        fetched: &mut HashMap<(String, i32), Arc<Schema>>,
    ) -> Result<Schema, RegistryError> {
        let kind = match answer.schema_type.as_deref() {
            None | Some("AVRO") => SchemaKind::Avro,
            Some("PROTOBUF") => SchemaKind::Protobuf,
            Some("JSON") => SchemaKind::Json,
            Some(other) => {
                return Err(self.http.unusable(&format!("{what} has the unknown schemaType {other}")));
            }
        };
        let mut references = Vec::new();
        for Reference { name, subject, version } in answer.references.unwrap_or_default() {
            let key = (subject, version);
            let schema = match fetched.get(&key) {
                Some(schema) => Arc::clone(schema),
                None => {
                    if depth == MAX_DEPTH || fetched.len() == MAX_REFERENCES {
                        return Err(self.http.unusable(&format!("{what} has too many references")));
                    }
                    let what = format!("version {version} of subject {}", key.0);
                    let answer = self.http.get(&version_path(&key.0, &version.to_string()), &what)?;
                    let schema = Arc::new(self.resolve(answer, &what, depth + 1, fetched)?);
                    fetched.insert(key, Arc::clone(&schema));
                    schema
                }
            };
            references.push((name, schema));
        }
        Ok(Schema { kind, text: answer.schema, references })
    }
}

/// A registry that has no path for GUIDs answers as a wrong address does.
fn without_guids(error: RegistryError) -> RegistryError {
    match error {
        RegistryError::Away { url, reason } if reason == http::NO_SUCH_PATH => {
            let reason =
                "it cannot look up a schema by its GUID, which the records' header __value_schema_id has: \
                          Confluent's registry can from version 8 on"
                    .to_owned();
            RegistryError::Away { url, reason }
        }
        other => other,
    }
}

fn version_path(subject: &str, version: &str) -> String {
    format!("/subjects/{}/versions/{version}", http::encode(subject))
}

fn body(kind: SchemaKind, text: &str) -> serde_json::Value {
    match kind {
        SchemaKind::Avro => json!({ "schema": text }),
        kind => json!({ "schema": text, "schemaType": kind.name() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_written_as_registries_write_them() {
        let guid = SchemaId::Guid(std::array::from_fn(|i| i as u8 * 0x11));
        assert_eq!(guid.to_string(), "GUID 00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(SchemaId::Number(7).to_string(), "id 7");
    }

    #[test]
    fn references_come_before_what_refers_to_them() {
        let leaf = Arc::new(Schema::new(SchemaKind::Avro, "leaf"));
        let to_leaf = |text: &str| Schema {
            references: vec![("leaf".to_owned(), Arc::clone(&leaf))],
            ..Schema::new(SchemaKind::Avro, text)
        };
        let (a, b) = (Arc::new(to_leaf("a")), Arc::new(to_leaf("b")));
        let root = Schema {
            references: vec![("a".to_owned(), a), ("b".to_owned(), b)],
            ..Schema::new(SchemaKind::Avro, "root")
        };
        let names: Vec<&str> = root.all_references().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["leaf", "a", "b"]);
    }
}
