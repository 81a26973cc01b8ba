//! Loads the settings: defaults < files < `KANDLE__SECTION__KEY` < `--set section.key=value`. All problems are reported
//! at once, each with its key, where it was set, and what is allowed.
//!
//! The layers are merged by the config crate, which remembers where each value came from; the
//! merged tree is checked against the schema, then against the rules between keys (`rules`).

use std::collections::BTreeMap;
use std::path::PathBuf;

use config::{Map, Source, Value as Layered, ValueKind};
use serde_json::Value;

use super::file::File;
use super::problems::{Problem, check, schema_at};
use super::{Settings, rules, schema};

/// Where settings come from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// YAML, TOML or JSON files; later files win.
    pub files: Vec<PathBuf>,
    /// Assignments from `--set`: `section.key=value`.
    pub set: Vec<String>,
    /// Environment variables, name and value: the process's, or a test's.
    pub environment: Vec<(String, String)>,
}

/// The settings, and where each came from.
#[derive(Debug)]
pub struct Loaded {
    pub settings: Settings,
    /// The merged tree with defaults filled in and secrets replaced by `<hidden>`.
    pub shown: Value,
    /// `section.key` to the file, variable or flag that set it. Keys that are absent have their default.
    pub origins: BTreeMap<String, String>,
}

/// Reads, merges and checks the settings.
///
/// # Errors
/// All problems, not only the first.
pub fn load(sources: &Sources) -> Result<Loaded, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut builder = config::Config::builder();
    for path in &sources.files {
        match File::read(path) {
            Ok(file) => builder = builder.add_source(file),
            Err(message) => problems.push(Problem { key: String::new(), message, origin: None }),
        }
    }
    builder = builder.add_source(Assignments::from_environment(&sources.environment));
    match Assignments::from_flags(&sources.set) {
        Ok(flags) => builder = builder.add_source(flags),
        Err(problem) => problems.push(problem),
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let merged = builder
        .build()
        .map_err(|e| vec![Problem { key: String::new(), message: e.to_string(), origin: None }])?;

    let schema = schema();
    let mut tree = Tree {
        origins: BTreeMap::new(),
        secrets: Vec::new(),
        problems: Vec::new(),
        templates: BTreeMap::new(),
        environment: &sources.environment,
    };
    let mut value = tree.value(&merged.cache, &schema, "");
    let Tree { origins, secrets, mut problems, templates, .. } = tree;
    fill_defaults(&mut value, &schema);
    let unread: Vec<String> = problems.iter().map(|problem| problem.key.clone()).collect();
    for problem in check(&value, &schema, &origins, &secrets) {
        // The text of this key could not be read, which has been reported already.
        if !unread.iter().any(|key| covers(key, &problem.key)) {
            problems.push(problem);
        }
    }
    replace_faulty(&mut value, &schema, &problems);
    match serde_json::from_value::<Settings>(value.clone()) {
        Ok(mut settings) => {
            settings.templates = templates;
            for problem in rules::check(&settings) {
                // Report only one problem per key.
                if !problems.iter().any(|f| covers(&f.key, &problem.0)) {
                    problems.push(Problem {
                        origin: origin_of(&origins, &problem.0),
                        key: problem.0,
                        message: problem.1,
                    });
                }
            }
            if problems.is_empty() {
                hide(&mut value, &secrets);
                return Ok(Loaded { settings, shown: value, origins });
            }
        }
        Err(e) if problems.is_empty() => {
            problems.push(Problem { key: String::new(), message: e.to_string(), origin: None })
        }
        Err(_) => {}
    }
    Err(problems)
}

/// Whether `key` is `outer` or lies below it.
pub(super) fn covers(outer: &str, key: &str) -> bool {
    key == outer || key.strip_prefix(outer).is_some_and(|rest| rest.starts_with('.'))
}

pub(super) fn origin_of(origins: &BTreeMap<String, String>, key: &str) -> Option<String> {
    origins.get(key).or_else(|| origins.iter().find(|(k, _)| covers(key, k)).map(|(_, v)| v)).cloned()
}

/// Single assignments from the environment or from flags: path, value, origin.
#[derive(Debug, Clone)]
struct Assignments(Vec<(Vec<String>, String, String)>);

impl Assignments {
    /// `KANDLE__SECTION__KEY`; a librdkafka property is written with `_` for `.`:
    /// `KANDLE__KAFKA__PROPERTIES__SASL_USERNAME`.
    fn from_environment(environment: &[(String, String)]) -> Self {
        let mut list = Vec::new();
        for (name, value) in environment {
            let Some(rest) = name.strip_prefix("KANDLE__") else { continue };
            let mut path: Vec<String> = rest.split("__").map(str::to_lowercase).collect();
            if path.len() > 2 && path[1] == "properties" {
                let property = path.split_off(2).join(".").replace('_', ".");
                path.push(property);
            }
            list.push((path, value.clone(), format!("environment variable {name}")));
        }
        list.sort();
        Self(list)
    }

    fn from_flags(set: &[String]) -> Result<Self, Problem> {
        let mut list = Vec::new();
        for assignment in set {
            let Some((key, value)) = assignment.split_once('=') else {
                let message = "--set: expected section.key=value".to_owned();
                return Err(Problem { key: String::new(), message, origin: None });
            };
            let mut path: Vec<String> = key.split('.').map(str::to_owned).collect();
            if path.len() > 2 && path[1] == "properties" {
                let property = path.split_off(2).join(".");
                path.push(property);
            }
            list.push((path, value.to_owned(), format!("--set {key}")));
        }
        Ok(Self(list))
    }
}

impl Source for Assignments {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Layered>, config::ConfigError> {
        let mut root = Map::new();
        for (path, value, origin) in &self.0 {
            insert(&mut root, path, Layered::new(Some(origin), ValueKind::String(value.clone())));
        }
        Ok(root)
    }
}

fn insert(table: &mut Map<String, Layered>, path: &[String], value: Layered) {
    let [first, rest @ ..] = path else { return };
    if rest.is_empty() {
        table.insert(first.clone(), value);
        return;
    }
    let child =
        table.entry(first.clone()).or_insert_with(|| Layered::new(None, ValueKind::Table(Map::new())));
    if !matches!(child.kind, ValueKind::Table(_)) {
        child.kind = ValueKind::Table(Map::new());
    }
    if let ValueKind::Table(inner) = &mut child.kind {
        insert(inner, rest, value);
    }
}

/// Turns the merged tree into JSON: records origins, replaces placeholders, and converts the text of variables and
/// flags to the type that the schema asks for.
struct Tree<'a> {
    origins: BTreeMap<String, String>,
    /// Keys whose values must not be shown.
    secrets: Vec<String>,
    problems: Vec<Problem>,
    /// librdkafka properties and `server.token` with placeholders, as they are written.
    templates: BTreeMap<String, String>,
    environment: &'a [(String, String)],
}

impl Tree<'_> {
    fn value(&mut self, layered: &Layered, schema: &Value, key: &str) -> Value {
        if let Some(origin) = layered.origin() {
            self.origins.insert(key.to_owned(), origin.to_owned());
        }
        if is_secret(key) {
            self.secrets.push(key.to_owned());
        }
        match &layered.kind {
            ValueKind::Nil => Value::Null,
            ValueKind::Boolean(v) => (*v).into(),
            ValueKind::I64(v) => (*v).into(),
            ValueKind::I128(v) => (*v as i64).into(),
            ValueKind::U64(v) => (*v).into(),
            ValueKind::U128(v) => (*v as u64).into(),
            ValueKind::Float(v) => (*v).into(),
            ValueKind::String(text) => self.text(text, layered.origin(), schema, key),
            ValueKind::Array(items) => {
                let schema = &schema["items"];
                items
                    .iter()
                    .enumerate()
                    .map(|(i, item)| self.value(item, schema, &join(key, &i.to_string())))
                    .collect()
            }
            ValueKind::Table(table) => Value::Object(
                table
                    .iter()
                    .map(|(name, child)| {
                        (name.clone(), self.value(child, property(schema, name), &join(key, name)))
                    })
                    .collect(),
            ),
        }
    }

    fn text(&mut self, text: &str, origin: Option<&str>, schema: &Value, key: &str) -> Value {
        let given = |text: &str| Problem {
            key: key.to_owned(),
            message: text.to_owned(),
            origin: origin.map(str::to_owned),
        };
        // A secret from a variable (such as a Kubernetes Secret) is taken verbatim, `$$` included.
        let verbatim = is_secret(key)
            && origin.is_some_and(|origin| origin.starts_with("environment "))
            && !text.contains("${env:")
            && !text.contains("${file:");
        if verbatim {
            return text.into();
        }
        let written = text;
        let (text, replaced) = match replace(text, self.environment) {
            Ok(done) => done,
            Err(message) => {
                self.problems.push(given(&message));
                return text.into();
            }
        };
        if replaced {
            self.secrets.push(key.to_owned());
            if key.contains(".properties.") || key == "server.token" {
                self.templates.insert(key.to_owned(), written.to_owned());
            }
        }
        let typed =
            replaced || origin.is_some_and(|o| o.starts_with("environment ") || o.starts_with("--set "));
        if !typed {
            return text.into();
        }
        coerce(&text, schema).unwrap_or_else(|message| {
            self.problems.push(given(&message));
            text.into()
        })
    }
}

/// Whether the key's name says that its value is a secret.
fn is_secret(key: &str) -> bool {
    const WORDS: [&str; 8] = [
        "password",
        "passphrase",
        "secret",
        "token",
        "credential",
        "jaas",
        "key.pem",
        "sasl.oauthbearer.config",
    ];
    match key.split_once(".properties.") {
        Some((_, property)) => {
            let property = property.to_ascii_lowercase();
            // An address, not a token.
            property != "sasl.oauthbearer.token.endpoint.url"
                && WORDS.iter().any(|word| property.contains(word))
        }
        None => {
            key == "registry.key"
                || ["password", "token", "secret"].contains(&key.rsplit('.').next().unwrap_or(key))
        }
    }
}

pub(super) fn join(key: &str, name: &str) -> String {
    if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") }
}

pub(super) fn property<'a>(schema: &'a Value, name: &str) -> &'a Value {
    let named = &schema["properties"][name];
    if named.is_null() { &schema["additionalProperties"] } else { named }
}

/// Replaces `${env:NAME}` and `${file:/path}`, and `$$` by `$`. Any other `$` is kept. Also returns whether a
/// placeholder was replaced.
///
/// # Errors
/// The variable is not set, the file cannot be read, or a placeholder has no closing `}`.
fn replace(text: &str, environment: &[(String, String)]) -> Result<(String, bool), String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut replaced = false;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if rest.starts_with("{env:") || rest.starts_with("{file:") {
            let (placeholder, after) =
                rest[1..].split_once('}').ok_or("a placeholder has no } (write $$ for a literal $)")?;
            match placeholder.split_once(':') {
                Some(("env", name)) => {
                    // The message does not quote the name: without its }, it may hold a secret.
                    if !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
                        return Err("${env:…} does not hold a valid variable name".to_owned());
                    }
                    let found = environment.iter().find(|(k, _)| k == name);
                    let (_, value) =
                        found.ok_or_else(|| format!("environment variable {name} is not set"))?;
                    out.push_str(value);
                }
                _ => {
                    let path = placeholder.trim_start_matches("file:");
                    let value = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
                    out.push_str(value.trim_end_matches(['\n', '\r']));
                }
            }
            replaced = true;
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    Ok((out, replaced))
}

/// Replaces the placeholders of a text again, with the process's environment and what the files hold now.
///
/// # Errors
/// As when the settings were loaded.
pub fn interpolate(text: &str) -> Result<String, String> {
    let environment: Vec<(String, String)> = std::env::vars().collect();
    replace(text, &environment).map(|(text, _)| text)
}

/// Escapes `$` in `text`, so that `interpolate` returns `text` itself.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        let after = &text[at + c.len_utf8()..];
        if c == '$' && ["$", "{env:", "{file:"].iter().any(|next| after.starts_with(next)) {
            out.push('$');
        }
        out.push(c);
    }
    out
}

pub(super) fn types(schema: &Value) -> Vec<&str> {
    match &schema["type"] {
        Value::String(one) => vec![one],
        Value::Array(many) => many.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

/// Converts the text of a variable or flag to the type that the schema asks for.
///
/// # Errors
/// The text starts with `[` and is not a JSON list, or the key is a whole section.
fn coerce(text: &str, schema: &Value) -> Result<Value, String> {
    let types = types(schema);
    if text == "null" && types.contains(&"null") {
        return Ok(Value::Null);
    }
    if types == ["object"] {
        let message =
            "is a section: set its keys one by one, KANDLE__SECTION__KEY or --set section.key=value";
        return Err(message.to_owned());
    }
    let parsed = || serde_json::from_str::<Value>(text).ok();
    if types.contains(&"array") {
        if text.trim_start().starts_with('[') {
            return parsed().ok_or_else(|| "is not a JSON list: write a,b or [\"a\",\"b\"]".to_owned());
        }
        if !types.contains(&"string") {
            let items = text.split(',').map(|item| coerce(item.trim(), &schema["items"]));
            return items.collect::<Result<Vec<Value>, String>>().map(Value::Array);
        }
    }
    if types.contains(&"string") || types.is_empty() {
        return Ok(text.into());
    }
    Ok(parsed().unwrap_or_else(|| text.into()))
}

fn fill_defaults(value: &mut Value, schema: &Value) {
    let (Value::Object(object), Some(properties)) = (value, schema["properties"].as_object()) else { return };
    for (name, property) in properties {
        match object.get_mut(name) {
            Some(child) if child.is_object() => fill_defaults(child, property),
            // `section:` with nothing under it.
            Some(child) if child.is_null() && types(property) == ["object"] => {
                *child = Value::Object(Default::default());
                fill_defaults(child, property);
            }
            Some(_) => {}
            None => {
                if let Some(default) = property.get("default") {
                    object.insert(name.clone(), default.clone());
                }
            }
        }
    }
}

/// Replaces the value of each key that has a problem by a valid one, so that the other rules can still be checked.
fn replace_faulty(value: &mut Value, schema: &Value, problems: &[Problem]) {
    for problem in problems {
        let parts = parts(&problem.key);
        let Some((name, section)) = parts.split_last() else { continue };
        let property = problem.key.contains(".properties.").then(|| "-".into());
        let stand_in = example_value(schema_at(schema, &problem.key)).or(property);
        let mut at = &mut *value;
        for &part in section {
            if let Value::Array(items) = at {
                // The problem is in an item of a list: empty the whole list.
                items.clear();
                break;
            }
            if !at[part].is_object() && !at[part].is_array() {
                at[part] = Value::Object(Default::default());
            }
            at = &mut at[part];
        }
        match (at, stand_in) {
            (Value::Object(object), Some(stand_in)) => drop(object.insert((*name).to_owned(), stand_in)),
            (Value::Object(object), None) => drop(object.remove(*name)),
            (Value::Array(items), _) => items.clear(),
            _ => {}
        }
    }
    fill_defaults(value, schema);
}

fn example_value(schema: &Value) -> Option<Value> {
    schema.get("default").cloned().or_else(|| schema["examples"].get(0).cloned())
}

/// Splits a key into its names. The name of a librdkafka property contains dots and is not split.
fn parts(key: &str) -> Vec<&str> {
    match key.split_once(".properties.") {
        Some((section, name)) => vec![section, "properties", name],
        None => key.split('.').filter(|part| !part.is_empty()).collect(),
    }
}

fn hide(value: &mut Value, secrets: &[String]) {
    for key in secrets {
        let pointer: String =
            parts(key).iter().map(|p| format!("/{}", p.replace('~', "~0").replace('/', "~1"))).collect();
        if let Some(found) = value.pointer_mut(&pointer).filter(|v| !v.is_null()) {
            *found = "<hidden>".into();
        }
    }
}
