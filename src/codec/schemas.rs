//! The schemas that values were written with: each is fetched from the registry once, compiled once, and kept for ever,
//! because the schema of an id never changes.
//!
//! Before a window is decoded, [`Schemas::fetch`] gets what is missing. A registry that is away is the registry's fault,
//! not the record's: it waits. An id that the registry does not know is the record's fault once
//! `registry.unknown_id_grace` has passed.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, unbounded};

use super::frame::Framed;
use super::{DecoderError, SchemaFileError};
use crate::backoff::{Backoff, pause};
use crate::record::{Fault, Raw, RecordError};
use crate::registry::{Registry, RegistryError, Schema, SchemaId, SchemaKind};
use crate::settings::Settings;
use crate::telemetry::health::Stage;
use crate::telemetry::{Health, Metrics};

/// Why a schema cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SchemaError(pub String);

/// The process is asked to stop, so that waiting for a schema ends.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped while the schema registry was away")]
pub struct Stopped;

/// What a stage that waits for schemas heeds meanwhile.
pub struct Waiting<'a> {
    /// Set when the process is asked to stop; `None`: it waits without end.
    pub stop: Option<&'a AtomicBool>,
    /// The stage that waits: waiting for the registry is no stall.
    pub health: Option<(&'a Health, Stage)>,
    pub metrics: &'a Metrics,
}

/// Interval between two looks at `stop` while a request runs.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// First and longest delay between two requests to a registry that is away.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Delay between two requests for an id that the registry does not know.
const UNKNOWN_DELAY: Duration = Duration::from_secs(1);
/// Interval at which an id is looked up again whose grace has passed.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

impl Waiting<'_> {
    fn pass(&self) -> Result<(), Stopped> {
        if let Some((health, stage)) = self.health {
            health.busy(stage);
        }
        match self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            true => Err(Stopped),
            false => Ok(()),
        }
    }

    fn pause(&self, delay: Duration) -> Result<(), Stopped> {
        match pause(delay, || self.pass().is_ok()) {
            true => Ok(()),
            false => Err(Stopped),
        }
    }
}

/// Makes a plan for decoding from a schema: one implementation per format.
pub trait Compile: Send + Sync + 'static {
    type Plan: Send + Sync + 'static;

    /// From a schema of the registry.
    ///
    /// # Errors
    /// The schema is of another format, or not valid.
    fn compile(&self, schema: &Schema) -> Result<Self::Plan, SchemaError>;

    /// From the file `input.schema`.
    ///
    /// # Errors
    /// The file cannot be read, or the schema is not valid.
    fn compile_file(&self, path: &Path) -> Result<Self::Plan, SchemaFileError>;
}

/// Where the plans for values come from.
pub enum Plans<C: Compile> {
    /// All values have the schema of one file, and no schema id.
    File(Arc<C::Plan>),
    /// Each value has the id of its schema: before its data, or in the record's header.
    Registry(Schemas<C>),
}

/// The schema in the file `input.schema`, of a language whose schemas are one file each.
pub fn of_file(kind: SchemaKind, path: &Path) -> Result<Schema, SchemaFileError> {
    Ok(Schema::new(kind, std::fs::read_to_string(path)?))
}

/// A value without its schema id, and the plan for it.
pub struct Planned<'a, P> {
    pub plan: Arc<P>,
    /// What follows the id in the header, if the id is in the header.
    pub header: Option<&'a [u8]>,
    pub data: &'a [u8],
}

impl<C: Compile> Plans<C> {
    /// # Errors
    /// The file `input.schema` cannot be used, or a certificate cannot be read.
    pub fn new(settings: &Settings, compile: C) -> Result<Self, DecoderError> {
        match (&settings.input.schema, Registry::new(&settings.registry)?) {
            (None, Some(registry)) => {
                Ok(Self::Registry(Schemas::new(registry, compile, settings.registry.unknown_id_grace.0)))
            }
            (path, _) => {
                // The rules of the settings ask for one of them.
                let path = path.clone().unwrap_or_default();
                match compile.compile_file(&path) {
                    Ok(plan) => Ok(Self::File(Arc::new(plan))),
                    Err(error) => Err(DecoderError::SchemaFile { path, error }),
                }
            }
        }
    }

    /// The plan for a value, and the value without its schema id.
    ///
    /// # Errors
    /// The value has no schema id, or its schema cannot be used.
    pub fn of<'a>(&self, value: Raw<'a>) -> Result<Planned<'a, C::Plan>, RecordError> {
        match self {
            Self::File(plan) => Ok(Planned { plan: Arc::clone(plan), header: None, data: value.bytes }),
            Self::Registry(schemas) => {
                let Framed { id, header, data } = Framed::read(value)?;
                Ok(Planned { plan: schemas.plan(id)?, header, data })
            }
        }
    }

    /// See [`super::Reader::fetch`].
    ///
    /// # Errors
    /// The process is asked to stop.
    pub fn fetch(
        &self,
        values: &mut dyn Iterator<Item = Raw<'_>>,
        waiting: &Waiting<'_>,
    ) -> Result<(), Stopped> {
        match self {
            Self::File(_) => Ok(()),
            Self::Registry(schemas) => schemas.fetch(values, waiting),
        }
    }
}

/// The error for a schema of another format.
pub fn expect_kind(schema: &Schema, kind: SchemaKind) -> Result<(), SchemaError> {
    if schema.kind == kind {
        return Ok(());
    }
    Err(SchemaError(format!("it is a schema of type {}, not {}", schema.kind.name(), kind.name())))
}

/// What is known of an id.
enum Known<P> {
    Plan(Arc<P>),
    /// The schema cannot be used.
    Broken(SchemaError),
    /// The registry does not know the id.
    Unknown {
        since: Instant,
        asked: Instant,
        error: RegistryError,
    },
}

pub struct Schemas<C: Compile> {
    registry: Arc<Registry>,
    compile: C,
    grace: Duration,
    known: RwLock<HashMap<SchemaId, Known<C::Plan>>>,
    away: AtomicBool,
}

impl<C: Compile> Schemas<C> {
    pub fn new(registry: Registry, compile: C, grace: Duration) -> Self {
        Self {
            registry: Arc::new(registry),
            compile,
            grace,
            known: RwLock::default(),
            away: AtomicBool::new(false),
        }
    }

    /// The plan for a value's schema.
    ///
    /// # Errors
    /// The schema cannot be used, or is unknown, which is the record's fault after [`Schemas::fetch`].
    pub fn plan(&self, id: SchemaId) -> Result<Arc<C::Plan>, RecordError> {
        let known = self.known.read().unwrap_or_else(|e| e.into_inner());
        let error = match known.get(&id) {
            Some(Known::Plan(plan)) => return Ok(Arc::clone(plan)),
            Some(Known::Broken(error)) => format!("schema {id} cannot be used: {error}"),
            Some(Known::Unknown { error, .. }) => error.to_string(),
            None => format!("schema {id} was not fetched"),
        };
        Err(RecordError::new(Fault::Decode, error))
    }

    /// Fetches the schemas of these values that are not known yet.
    ///
    /// # Errors
    /// The process is asked to stop.
    pub fn fetch(
        &self,
        values: &mut dyn Iterator<Item = Raw<'_>>,
        waiting: &Waiting<'_>,
    ) -> Result<(), Stopped> {
        let mut missing = {
            let known = self.known.read().unwrap_or_else(|e| e.into_inner());
            let ids = values.filter_map(|value| Framed::read(value).ok()).map(|framed| framed.id);
            ids.filter(|id| known.get(id).is_none_or(|known| self.is_due(known)))
                .collect::<BTreeSet<SchemaId>>()
        };
        let mut backoff = Backoff::new(BACKOFF);
        while !missing.is_empty() {
            let answers = self.ask(missing.iter().copied().collect());
            let mut away = None;
            loop {
                match answers.recv_timeout(POLL_INTERVAL) {
                    Ok((id, Ok(schema))) => {
                        missing.remove(&id);
                        self.learn(
                            id,
                            match self.compile.compile(&schema) {
                                Ok(plan) => Known::Plan(Arc::new(plan)),
                                Err(error) => Known::Broken(error),
                            },
                        );
                    }
                    Ok((id, Err(error @ RegistryError::NotFound { .. }))) => {
                        if self.is_unknown(id, error) {
                            missing.remove(&id);
                        }
                    }
                    Ok((_, Err(error))) => away = Some(error),
                    Err(RecvTimeoutError::Timeout) => waiting.pass()?,
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            let left = !missing.is_empty();
            match away {
                Some(error) => {
                    self.say_away(&error, waiting);
                    waiting.pause(backoff.take())?;
                }
                None => {
                    self.say_back();
                    backoff.reset();
                    if left {
                        waiting.pause(UNKNOWN_DELAY.min(self.grace))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether an id is to be looked up.
    fn is_due(&self, known: &Known<C::Plan>) -> bool {
        match known {
            Known::Plan(_) | Known::Broken(_) => false,
            Known::Unknown { since, asked, .. } => {
                since.elapsed() < self.grace || asked.elapsed() >= LOOK_AGAIN
            }
        }
    }

    fn learn(&self, id: SchemaId, what: Known<C::Plan>) {
        self.known.write().unwrap_or_else(|e| e.into_inner()).insert(id, what);
    }

    /// Remembers that the registry does not know an id. True once its grace has passed.
    fn is_unknown(&self, id: SchemaId, error: RegistryError) -> bool {
        let mut known = self.known.write().unwrap_or_else(|e| e.into_inner());
        let now = Instant::now();
        let since = match known.get(&id) {
            Some(Known::Unknown { since, .. }) => *since,
            _ => {
                let grace = humantime::format_duration(self.grace).to_string();
                tracing::warn!(
                    %id, error = %error, grace,
                    "a record's schema id is unknown to the schema registry; waiting for registry.unknown_id_grace \
                     before records with this id become dead letters"
                );
                now
            }
        };
        known.insert(id, Known::Unknown { since, asked: now, error });
        now.duration_since(since) >= self.grace
    }

    /// Asks the registry on a thread of its own, because a request may take longer than a stop may wait. After the first
    /// failure the others are not asked for.
    fn ask(&self, ids: Vec<SchemaId>) -> Receiver<(SchemaId, Result<Schema, RegistryError>)> {
        let (answer, answers) = unbounded();
        let registry = Arc::clone(&self.registry);
        let work = move || {
            for id in ids {
                let schema = registry.schema(id);
                let goes_on = matches!(schema, Ok(_) | Err(RegistryError::NotFound { .. }));
                if answer.send((id, schema)).is_err() || !goes_on {
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("kandle-registry".to_owned()).spawn(work) {
            tracing::warn!(%error, "no thread can be started to ask the schema registry: retrying");
        }
        answers
    }

    fn say_away(&self, error: &RegistryError, waiting: &Waiting<'_>) {
        waiting.metrics.retries.with_label_values(&["registry"]).inc();
        if !self.away.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                error = %error,
                "the schema registry gives no schemas: retrying, and consumption pauses until it does"
            );
            if let Some((health, _)) = waiting.health {
                health.error(&error.to_string());
            }
        }
    }

    fn say_back(&self) {
        if self.away.swap(false, Ordering::Relaxed) {
            tracing::info!(registry = self.registry.name(), "the schema registry gives schemas again");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    use rdkafka::message::{Header, OwnedHeaders};

    use super::*;
    use crate::kafka::headers::Headers;
    use crate::settings::{self, Urls};

    /// The plan is the schema's text.
    struct Text;

    impl Compile for Text {
        type Plan = String;

        fn compile(&self, schema: &Schema) -> Result<String, SchemaError> {
            Ok(schema.text.clone())
        }

        fn compile_file(&self, path: &Path) -> Result<String, SchemaFileError> {
            Ok(std::fs::read_to_string(path)?)
        }
    }

    /// A registry that answers to `path` alone; otherwise as Confluent's does to a path that it does not have. Returns its
    /// address and the paths that it was asked for.
    fn serve(path: &'static str, schema: &'static str) -> (String, Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (asked, paths) = unbounded();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut head = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let request = head.next().unwrap_or_default();
                head.take_while(|line| !line.is_empty()).for_each(drop);
                let found = request.split(' ').nth(1).unwrap_or_default().to_owned();
                let (status, body) = match found == path {
                    true => ("200 OK", serde_json::json!({ "schema": schema }).to_string()),
                    false => {
                        ("404 Not Found", r#"{"error_code":404,"message":"HTTP 404 Not Found"}"#.to_owned())
                    }
                };
                let _ = asked.send(found);
                let length = body.len();
                let _ = write!(
                    stream,
                    "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
                );
            }
        });
        (url, paths)
    }

    fn schemas(url: String) -> Schemas<Text> {
        let settings = settings::Registry { url: Urls(vec![url]), ..settings::Registry::default() };
        Schemas::new(Registry::new(&settings).unwrap().unwrap(), Text, Duration::ZERO)
    }

    const GUID: [u8; 16] =
        [0x89, 0x79, 0x17, 0x62, 0x23, 0x36, 0x41, 0x86, 0x96, 0x74, 0x29, 0x9b, 0x90, 0xa8, 0x02, 0xe2];

    #[test]
    fn the_schema_of_a_header_is_fetched_by_its_guid_once() {
        let (url, paths) = serve("/schemas/guids/89791762-2336-4186-9674-299b90a802e2", "\"int\"");
        let plans = Plans::Registry(schemas(url));
        let value = [&[1], &GUID[..]].concat();
        let headers = Headers::from(
            OwnedHeaders::new().insert(Header { key: "__value_schema_id", value: Some(&value) }),
        );
        let raw = Raw { bytes: b"\x02", headers: Some(&headers) };
        let metrics = Metrics::new();
        let waiting = Waiting { stop: None, health: None, metrics: &metrics };
        for _ in 0..2 {
            plans.fetch(&mut [raw, raw].into_iter(), &waiting).unwrap();
        }
        let planned = plans.of(raw).unwrap();
        assert_eq!(
            (planned.plan.as_str(), planned.header, planned.data),
            ("\"int\"", Some(&[][..]), &b"\x02"[..])
        );
        assert_eq!(paths.try_iter().count(), 1, "a schema is kept");
    }

    /// An old registry is no fault of the record: it waits, and says what is the matter.
    #[test]
    fn a_registry_without_guids_is_waited_for() {
        let (url, _paths) = serve("/none", "");
        let schemas = schemas(url);
        let value = [&[1], &GUID[..]].concat();
        let metrics = Metrics::new();
        let stop = AtomicBool::new(true);
        let health = Health::new(Duration::from_secs(1));
        let waiting =
            Waiting { stop: Some(&stop), health: Some((&health, Stage::Prepare)), metrics: &metrics };
        let raw = Raw::from(&value);
        assert_eq!(schemas.fetch(&mut std::iter::once(raw), &waiting), Err(Stopped));
        let error = schemas.registry.schema(SchemaId::Guid(GUID)).unwrap_err();
        assert!(
            matches!(&error, RegistryError::Away { reason, .. } if reason.contains("version 8")),
            "{error}"
        );
        assert!(schemas.plan(SchemaId::Guid(GUID)).unwrap_err().message.contains("was not fetched"));
    }
}
