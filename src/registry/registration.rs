//! The predictions' schema in the registry: registered, or only looked up, before anything is consumed. A registry that
//! is away is waited for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{Registry, RegistryError, SchemaKind};
use crate::backoff::{Backoff, pause};
use crate::codec::SchemaFileError;
use crate::codec::write::{self, OutputEntry, Record, TypesError, Writer};
use crate::settings::Settings;
use crate::telemetry::{Health, Metrics};

/// Shortest and longest wait between two attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));

/// A schema that predictions are written with, and where the registry has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputSchema {
    pub subject: String,
    pub kind: SchemaKind,
    pub text: String,
}

/// Why predictions cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum RegistrationError {
    #[error("{0}; the schema of the predictions is what `kandle config schema --output` prints")]
    Registry(#[from] RegistryError),
    /// Only with `registry.auto_register: false`.
    #[error(
        "subject {subject} does not have the schema of the predictions, and registry.auto_register is false: register \
         what `kandle config schema --output` prints ({reason})"
    )]
    Missing { subject: String, reason: String },
    #[error("input.schema: {0}")]
    InputSchema(SchemaFileError),
}

impl From<TypesError> for RegistrationError {
    fn from(error: TypesError) -> Self {
        match error {
            TypesError::Registry(error) => Self::Registry(error),
            TypesError::File(error) => Self::InputSchema(error),
        }
    }
}

impl RegistrationError {
    /// The subject does not have this schema, and does not take it: it may have or take another one.
    fn is_about_the_schema(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Registry(RegistryError::Refused { status: 409, .. }))
    }
}

impl OutputSchema {
    /// `None` if predictions are plain JSON, without a schema.
    pub fn new(settings: &Settings, record: &Record) -> Option<Self> {
        let entry = OutputEntry::of(settings.output.format);
        Some(Self {
            subject: write::subject(settings, record),
            kind: entry.kind?,
            text: (entry.schema)(record),
        })
    }

    /// The schema's id.
    ///
    /// # Errors
    /// The registry does not have the schema and does not take it, or is away.
    pub fn id(&self, registry: &Registry, auto_register: bool) -> Result<u32, RegistrationError> {
        match self.known(registry) {
            Ok(id) => Ok(id),
            Err(RegistryError::NotFound { .. }) if auto_register => {
                Ok(registry.register(&self.subject, self.kind, &self.text)?)
            }
            Err(error @ RegistryError::NotFound { .. }) => {
                Err(RegistrationError::Missing { subject: self.subject.clone(), reason: error.to_string() })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The id, if the subject has the schema already.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] if it does not; the registry is away or refuses the login.
    pub fn known(&self, registry: &Registry) -> Result<u32, RegistryError> {
        registry.lookup(&self.subject, self.kind, &self.text)
    }

    /// What would keep the subject from taking the schema; `None` if nothing would. Changes nothing.
    ///
    /// # Errors
    /// The registry is away, or refuses to say.
    pub fn objection(&self, registry: &Registry) -> Result<Option<String>, RegistryError> {
        match registry.compatible(&self.subject, self.kind, &self.text) {
            // A subject that does not exist yet takes any schema.
            Err(RegistryError::NotFound { .. }) => Ok(None),
            answer => answer,
        }
    }
}

/// What predictions may consist of, the best first: with the types of the input's schema, if that tells any, and with
/// texts for included fields, which a subject may have from before the types were known.
///
/// # Errors
/// The registry is away, or `input.schema` cannot be used.
pub fn candidates(settings: &Settings, registry: &Registry) -> Result<Vec<Record>, TypesError> {
    let untyped = Record::of(settings);
    let typed = write::typed(settings, Some(registry))?;
    Ok(if typed == untyped { vec![untyped] } else { vec![typed, untyped] })
}

/// Chooses the first of the candidates that the subject has or takes; `None` if predictions have no schema.
fn choose(
    settings: &Settings,
    registry: &Registry,
) -> Result<Option<(Record, OutputSchema, u32)>, RegistrationError> {
    let mut first = None;
    for record in candidates(settings, registry)? {
        let Some(schema) = OutputSchema::new(settings, &record) else { return Ok(None) };
        match schema.id(registry, settings.registry.auto_register) {
            Ok(id) => {
                if let Some(error) = first {
                    let subject = &schema.subject;
                    tracing::warn!(
                        subject, %error,
                        "output.include: the subject does not take the types of the input's schema, so the fields stay texts"
                    );
                }
                return Ok(Some((record, schema, id)));
            }
            Err(error) if first.is_none() && error.is_about_the_schema() => first = Some(error),
            // Of two that the subject does not take, the first is the one to register.
            Err(error) => return Err(first.unwrap_or(error)),
        }
    }
    first.map_or(Ok(None), Err)
}

/// Gets the id of the schema that the settings ask for and gives it to the writer. False if asked to stop while the
/// registry was away.
///
/// # Errors
/// The registry does not have the schema and does not take it.
pub fn register(
    settings: &Settings,
    writer: &Writer,
    metrics: &Metrics,
    health: &Health,
    stop: &AtomicBool,
) -> Result<bool, RegistrationError> {
    // A later period writes as the first one.
    if OutputEntry::of(settings.output.format).kind.is_none() || writer.encoding().is_some() {
        return Ok(true);
    }
    let Some(registry) = Registry::new(&settings.registry)? else { return Ok(true) };
    let mut backoff = Backoff::new(BACKOFF);
    loop {
        let error = match choose(settings, &registry) {
            Ok(None) => return Ok(true),
            Ok(Some((record, schema, id))) => {
                let (subject, kind) = (&schema.subject, schema.kind.name());
                tracing::info!(subject, kind, id, "the predictions' schema is in the registry");
                writer.set_schema(record, id);
                return Ok(true);
            }
            Err(RegistrationError::Registry(error @ RegistryError::Away { .. })) => error,
            Err(error) => return Err(error),
        };
        let retry_in = humantime::format_duration(backoff.delay());
        tracing::error!(%error, %retry_in, "the schema registry is away, and the predictions' schema must be there before records are read: trying again");
        health.error(&error.to_string());
        metrics.retries.with_label_values(&["registry"]).inc();
        if !pause(backoff.take(), || !stop.load(Ordering::Relaxed)) {
            return Ok(false);
        }
    }
}
