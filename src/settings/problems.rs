//! Problems of a configuration: each with its key, its origin and what is allowed instead, or the nearest known key if
//! one was mistyped.

use std::collections::BTreeMap;
use std::fmt;

use jsonschema::error::ValidationErrorKind;
use serde_json::Value;

use super::load::{covers, join, origin_of, property, types};

/// One problem of a configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// `section.key`; empty if the problem is not about one key.
    pub key: String,
    pub message: String,
    /// The file, variable or flag that set the key.
    pub origin: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)?;
        match &self.origin {
            Some(origin) => write!(f, " (set by {origin})"),
            None => Ok(()),
        }
    }
}

/// Problems of a tree that does not match the schema. Messages never quote the values of `secrets`.
pub(super) fn check(
    value: &Value,
    schema: &Value,
    origins: &BTreeMap<String, String>,
    secrets: &[String],
) -> Vec<Problem> {
    let mut problems = Vec::new();
    let validator = jsonschema::validator_for(schema).expect("the schema made from the struct is valid");
    for error in validator.iter_errors(value) {
        let key =
            error.instance_path().to_string().trim_start_matches('/').replace("~1", "/").replace('/', ".");
        let at = schema_at(schema, &key);
        // A value in place of a whole section may hold secrets.
        let hidden = types(at) == ["object"]
            || secrets.iter().any(|secret| covers(&key, secret) || covers(secret, &key));
        let instance = if hidden { "<hidden>".to_owned() } else { error.instance().to_string() };
        let mut report = |key: String, message: String| {
            problems.push(Problem { origin: origin_of(origins, &key), key, message });
        };
        match error.kind() {
            ValidationErrorKind::AdditionalProperties { unexpected } => {
                for name in unexpected {
                    report(join(&key, name), unknown(name, &key, at, schema));
                }
            }
            ValidationErrorKind::Required { property: name } => {
                let name = name.as_str().unwrap_or_default();
                let mut missing = Vec::new();
                required_leaves(property(at, name), &join(&key, name), &mut missing);
                for (key, description) in missing {
                    report(key, format!("is required: {description}"));
                }
            }
            ValidationErrorKind::Enum { options } => {
                let given = error.instance().as_str().unwrap_or_default().to_owned();
                let options: Vec<&str> =
                    options.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                let mut message = format!("{instance} is not allowed");
                if let Some(near) = nearest(&given, options.iter().copied()) {
                    message.push_str(&format!("; did you mean {near}?"));
                }
                report(key, format!("{message}; allowed: {}", options.join(", ")));
            }
            ValidationErrorKind::Type { .. } if at["enum"].is_array() => {}
            ValidationErrorKind::Type { .. } | ValidationErrorKind::Pattern { .. } => {
                let mut wanted = types(at).join(" or ");
                if let Some(examples) = at["examples"].as_array() {
                    let examples: Vec<String> = examples
                        .iter()
                        .map(|e| e.as_str().map_or_else(|| e.to_string(), str::to_owned))
                        .collect();
                    wanted.push_str(&format!(" such as {}", examples.join(", ")));
                }
                report(key, format!("{instance} is not {wanted}"));
            }
            _ if hidden => report(key, error.masked().to_string()),
            _ => report(key, error.to_string()),
        }
    }
    problems
}

pub(super) fn schema_at<'a>(schema: &'a Value, key: &str) -> &'a Value {
    key.split('.').filter(|part| !part.is_empty()).fold(schema, |at, part| {
        if part.parse::<usize>().is_ok() && at["items"].is_object() {
            &at["items"]
        } else {
            property(at, part)
        }
    })
}

fn required_leaves(schema: &Value, key: &str, out: &mut Vec<(String, String)>) {
    match (schema["required"].as_array(), schema["properties"].as_object()) {
        (Some(required), Some(_)) => {
            for name in required.iter().filter_map(Value::as_str) {
                required_leaves(property(schema, name), &join(key, name), out);
            }
        }
        _ => {
            out.push((key.to_owned(), schema["description"].as_str().unwrap_or_default().replace('\n', " ")))
        }
    }
}

fn unknown(name: &str, section: &str, at: &Value, root: &Value) -> String {
    let key = join(section, name);
    let here: Vec<String> =
        at["properties"].as_object().into_iter().flatten().map(|(known, _)| join(section, known)).collect();
    let mut all = Vec::new();
    all_keys(root, "", &mut all);
    // The nearest key of this section, else the same name in another section, else the nearest key anywhere.
    let moved = all.iter().find(|known| known.rsplit('.').next() == Some(name)).map(String::as_str);
    let near = nearest(&key, here.iter().map(String::as_str))
        .or(moved)
        .or_else(|| nearest(&key, all.iter().map(String::as_str)));
    match near {
        Some(near) => format!("unknown key; did you mean {near}?"),
        None => format!("unknown key; known here: {}", here.join(", ")),
    }
}

fn all_keys(schema: &Value, key: &str, out: &mut Vec<String>) {
    for (name, child) in schema["properties"].as_object().into_iter().flatten() {
        let key = join(key, name);
        all_keys(child, &key, out);
        out.push(key);
    }
}

fn nearest<'a>(given: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|candidate| (strsim::damerau_levenshtein(given, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len().min(given.len()) / 5)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}
