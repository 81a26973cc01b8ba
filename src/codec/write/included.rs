//! The types of the fields of `output.include`: those of the input's schema. The schema is the file `input.schema`, or the
//! latest version of the input topics' subjects when kandle starts. A field is [`Type::Json`] whose type is not known, or
//! not a scalar, or a list or map of scalars.

use super::OutputEntry;
use super::schema::{Record, Type};
use crate::codec::{FormatEntry, SchemaEntry, SchemaFileError, tokens};
use crate::registry::{Registry, RegistryError};
use crate::settings::Settings;

/// Why the types are not known.
#[derive(Debug, thiserror::Error)]
pub enum TypesError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("input.schema: {0}")]
    File(#[from] SchemaFileError),
}

/// The record of the settings' predictions, with the types of included fields. Asks the registry only if that can change
/// something.
///
/// # Errors
/// The registry is away or refuses the login; the file `input.schema` cannot be used.
pub fn typed(settings: &Settings, registry: Option<&Registry>) -> Result<Record, TypesError> {
    let include = &settings.output.include;
    let in_registry = OutputEntry::of(settings.output.format).kind.is_some();
    let Some(entry) = FormatEntry::of(settings.input.format).schema else { return Ok(Record::of(settings)) };
    if include.is_empty() || !in_registry {
        return Ok(Record::of(settings));
    }
    let pointers: Vec<Vec<String>> = include.iter().map(|pointer| tokens(pointer)).collect();
    let types = match (&settings.input.schema, registry) {
        (Some(_), _) => (entry.types_of_file)(&settings.input, &pointers)?,
        (None, Some(registry)) => of_topics(&entry, settings, registry, &pointers)?,
        (None, None) => return Ok(Record::of(settings)),
    };
    Ok(Record::with(settings, types.into_iter().map(|of| of.unwrap_or(Type::Json))))
}

/// The types that the latest schemas of all input topics agree on.
fn of_topics(
    entry: &SchemaEntry,
    settings: &Settings,
    registry: &Registry,
    pointers: &[Vec<String>],
) -> Result<Vec<Option<Type>>, RegistryError> {
    let unknown = || vec![None; pointers.len()];
    let mut all = Vec::new();
    for topic in &settings.input.topics {
        if topic.starts_with('^') {
            return Ok(unknown());
        }
        let subject = format!("{topic}-value");
        let version = match registry.latest(&subject) {
            Err(RegistryError::NotFound { .. }) => {
                tracing::info!(subject, "no such subject: the types of included fields are not known");
                return Ok(unknown());
            }
            answer => answer?,
        };
        if version.schema.kind != entry.kind {
            // Reading the records will say so.
            return Ok(unknown());
        }
        match (entry.types)(&version.schema, pointers) {
            Ok(types) => all.push(types),
            Err(error) => {
                tracing::warn!(subject, %error, "the types of included fields are not known: its schema cannot be used");
                return Ok(unknown());
            }
        }
    }
    let of_all = |i: usize| Type::common(all.iter().map(|types| types[i].clone().unwrap_or(Type::Json)));
    Ok((0..pointers.len()).map(of_all).collect())
}
