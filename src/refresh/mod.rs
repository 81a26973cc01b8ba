//! `model.refresh`: looks at an interval whether `model.source` names another version of the model, and has it take over
//! between two windows, while the pipeline runs.
//!
//! ```text
//! look ─▶ another version? ─▶ fetch, hash ─▶ load and probe ─▶ compare ─▶ take over
//!                                            beside the version that runs; if both do not fit the memory, after it
//! ```
//!
//! A version that cannot be loaded, fails its probe or does not suit the task leaves the one that runs in place.

mod compare;
mod room;
#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use self::compare::{Comparison, OtherLength, Prediction, compare, predictions};
use self::room::Room;
use crate::compute::{About, Compute, ComputeError, Replacer};
use crate::failpoint;
use crate::flow::ModelVersion;
use crate::model::{self, Digest, Files, FilesError, Wants};
use crate::pipeline::describe;
use crate::settings::{self, Settings};
use crate::task::{self, Kind, TaskError};
use crate::telemetry::{Health, Metrics};
use crate::window::Window;

/// Time between two looks that must agree: the files of a version may be being written.
const SETTLE: Duration = Duration::from_secs(1);
/// Looks until two in a row agree.
const LOOKS: usize = 10;
/// A version that failed is tried again after 1, 2, 4, 8, 16, 16, … intervals: so many looks pass in between at most.
const MOST_SKIPPED: u32 = 15;

/// Why a version does not take over.
#[derive(Debug, thiserror::Error)]
pub enum RefreshError {
    #[error("model.source: {0}")]
    Files(#[from] FilesError),
    #[error(transparent)]
    Task(#[from] TaskError),
    #[error("loading it panicked; the log has the message")]
    Panicked,
    #[error("its files changed while they were read: they are being written to; they are read again later")]
    Changing,
    #[error("on the last window's inputs: {0}")]
    Compute(#[from] ComputeError),
    #[error(
        "it predicts none of the last window's {0} records, for which the version that runs has predictions"
    )]
    PredictsNothing(usize),
    #[error(transparent)]
    OtherLength(#[from] OtherLength),
    /// The pipeline has ended.
    #[error("the pipeline has ended")]
    Gone,
}

/// What a look led to: the label of `kandle_model_refreshes_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Unchanged,
    Replaced,
    Failed,
}

impl Outcome {
    pub const ALL: [Self; 3] = [Self::Unchanged, Self::Replaced, Self::Failed];

    pub fn name(self) -> &'static str {
        match self {
            Self::Unchanged => "unchanged",
            Self::Replaced => "replaced",
            Self::Failed => "failed",
        }
    }
}

/// The version that `model.source` names before it is loaded.
pub struct Named {
    /// `None`: not known, because its store did not say.
    version: Option<String>,
    /// Settings that name this very version.
    pinned: settings::Model,
}

impl Named {
    /// Call it before the model is loaded: a version that comes in between is found by the next look.
    pub fn now(settings: &Settings) -> Self {
        let model = &settings.model;
        let wants = Kind::of(settings.task.kind).wants();
        let named = |wants: Wants| Ok((model::version(model, wants)?, Files::find_for(model, wants)?));
        match wants.map(named) {
            Some(Ok((version, files))) => Self { version, pinned: files.pinned(model) },
            Some(Err(error)) => {
                let error: FilesError = error;
                tracing::warn!(%error, "the model's version cannot be found out: model.refresh asks again");
                Self { version: None, pinned: model.clone() }
            }
            None => Self { version: None, pinned: model.clone() },
        }
    }
}

/// The refreshes' part of /status.
#[derive(Debug, Default, Serialize)]
struct Status {
    every: String,
    /// The version that runs.
    model: String,
    digest: String,
    last_look: Option<String>,
    last_outcome: Option<&'static str>,
    last_replacement: Option<Replacement>,
    last_error: Option<LastError>,
}

#[derive(Debug, Clone, Serialize)]
struct Replacement {
    at: String,
    before: ModelVersion,
    now: ModelVersion,
    /// `None`: there were no records to compare them on.
    comparison: Option<Comparison>,
}

#[derive(Debug, Serialize)]
struct LastError {
    at: String,
    message: String,
}

/// A version that failed, and how many looks pass until it is tried again.
struct Failed {
    version: Option<String>,
    skip: u32,
    left: u32,
}

/// Looks for versions on a thread of its own.
pub struct Refresher {
    settings: Settings,
    every: Duration,
    wants: Wants,
    replacer: Replacer,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    /// The version that runs, or has the same digest as it.
    named: Named,
    failed: Option<Failed>,
    status: Status,
}

/// Starts to look for other versions; the thread ends with what it refreshes. Without `model.refresh` it does nothing.
///
/// # Errors
/// The system has no thread left.
pub fn start(
    settings: &Settings,
    replacer: Replacer,
    named: Named,
    metrics: &Arc<Metrics>,
    health: &Arc<Health>,
) -> std::io::Result<()> {
    let (Some(every), Some(wants)) = (settings.model.refresh, Kind::of(settings.task.kind).wants()) else {
        return Ok(());
    };
    let mut refresher = Refresher {
        settings: settings.clone(),
        every: every.0,
        wants,
        replacer,
        metrics: Arc::clone(metrics),
        health: Arc::clone(health),
        named,
        failed: None,
        status: Status { every: every.to_string(), ..Status::default() },
    };
    let thread = std::thread::Builder::new().name("kandle-refresh".to_owned());
    thread.spawn(move || refresher.serve()).map(drop)
}

impl Refresher {
    fn serve(&mut self) {
        self.show();
        while self.replacer.wait(self.every) {
            let outcome = match self.refresh() {
                Ok(outcome) => outcome,
                Err(RefreshError::Gone) => return,
                Err(error) => {
                    let message = error.to_string();
                    tracing::error!(
                        error = message,
                        "refreshing the model failed: the version that runs is kept"
                    );
                    self.health.error(&format!("model.refresh: {message}"));
                    self.status.last_error = Some(LastError { at: now(), message });
                    Outcome::Failed
                }
            };
            self.metrics.model_refreshes.with_label_values(&[outcome.name()]).inc();
            self.status.last_look = Some(now());
            self.status.last_outcome = Some(outcome.name());
            self.show();
        }
    }

    /// Shows the state in /status.
    fn show(&mut self) {
        if let Some(running) = self.replacer.current() {
            let ModelVersion { model, digest } = running.about().version();
            (self.status.model, self.status.digest) = (model, digest);
        }
        self.health.set_refresh(serde_json::to_value(&self.status).unwrap_or_default());
    }

    fn refresh(&mut self) -> Result<Outcome, RefreshError> {
        let version = self.look()?;
        if version.is_some() && version == self.named.version {
            self.failed = None;
            return Ok(Outcome::Unchanged);
        }
        if let Some(failed) =
            self.failed.as_mut().filter(|failed| failed.version == version && failed.left > 0)
        {
            failed.left -= 1;
            return Ok(Outcome::Failed);
        }
        let result = self.try_version(&version);
        match &result {
            Ok(_) => self.failed = None,
            Err(_) => {
                let again = self.failed.take().filter(|failed| failed.version == version);
                let skip = again.map_or(0, |failed| (2 * failed.skip + 1).min(MOST_SKIPPED));
                self.failed = Some(Failed { version, skip, left: skip });
            }
        }
        result
    }

    /// The version that the source names. Unless it is the one that runs, two looks in a row must agree on it.
    fn look(&self) -> Result<Option<String>, RefreshError> {
        let look = || model::version(&self.settings.model, self.wants);
        let mut last = look();
        for _ in 0..LOOKS {
            if last.as_ref().is_ok_and(|version| *version == self.named.version) {
                return Ok(last?);
            }
            if !self.replacer.wait(SETTLE.min(self.every)) {
                return Err(RefreshError::Gone);
            }
            let next = look();
            match (&last, &next) {
                (Ok(one), Ok(other)) if one == other => return Ok(next?),
                (Err(_), Err(_)) => return Ok(next?),
                // While files are replaced, one may be missing.
                _ => last = next,
            }
        }
        Err(RefreshError::Changing)
    }

    /// Has the files that the source names take over, if their digest is another one.
    fn try_version(&mut self, version: &Option<String>) -> Result<Outcome, RefreshError> {
        let files = Files::find_for(&self.settings.model, self.wants)?;
        let running = self.replacer.current().ok_or(RefreshError::Gone)?;
        let about = running.about();
        let digest = Digest::new(Some(&files), &self.settings, &about.dtype)?;
        let pinned = files.pinned(&self.settings.model);
        if digest == about.digest {
            self.named = Named { version: version.clone(), pinned };
            return Ok(Outcome::Unchanged);
        }
        tracing::info!(
            model = files.name(),
            digest = digest.short(),
            digest_before = about.digest.short(),
            "the model has another version: loading it"
        );
        failpoint::pass("refresh-found");
        let room = Room::for_second(&files, &about, self.settings.memory.limit.0, &self.metrics)?;
        let next = Next {
            version,
            digest: &digest,
            sample: self.replacer.sample().and_then(|window| Sample::of(window, &*running)),
        };
        let (next, comparison) = if room.is_enough() {
            drop(running);
            self.load_checked(next)?
        } else {
            tracing::warn!(
                needed_mib = room.needed >> 20,
                free_mib = room.free.map(|free| free >> 20),
                "the memory does not hold two versions of the model: dropping the one that runs first; records wait until \
                 the other is loaded"
            );
            drop(running);
            self.load_after(&about, next)?
        };
        failpoint::pass("refresh-checked");
        let now_runs = next.about();
        if !self.replacer.replace(next) {
            return Err(RefreshError::Gone);
        }
        describe(&now_runs, &self.metrics, &self.health);
        self.named = Named { version: version.clone(), pinned };
        self.report(&about, &now_runs, comparison);
        Ok(Outcome::Replaced)
    }

    /// Loads the version that the source names, and compares it with the one that runs.
    fn load_checked(&self, next: Next<'_>) -> Result<(Arc<dyn Compute>, Option<Comparison>), RefreshError> {
        let Next { version, digest, sample } = next;
        let loaded = self.load(self.settings.model.clone())?;
        failpoint::pass("refresh-loaded");
        let now = model::version(&self.settings.model, self.wants)?;
        if now != *version || loaded.about().digest != *digest {
            return Err(RefreshError::Changing);
        }
        let comparison = sample.map(|sample| sample.compare(&*loaded)).transpose()?;
        Ok((loaded, comparison))
    }

    /// The same without the version that runs, which it drops before. If the other cannot be used, it loads that one
    /// again. `about`: of the version that runs.
    fn load_after(
        &self,
        about: &About,
        next: Next<'_>,
    ) -> Result<(Arc<dyn Compute>, Option<Comparison>), RefreshError> {
        if !self.replacer.unload() {
            return Err(RefreshError::Gone);
        }
        let error = match self.load_checked(next) {
            Ok(loaded) => return Ok(loaded),
            Err(error) => error,
        };
        tracing::warn!(%error, "the other version cannot be used: loading the one before again");
        match self.load(self.named.pinned.clone()) {
            Ok(before) if before.about().digest == about.digest => {
                if self.replacer.replace(before) {
                    Err(error)
                } else {
                    Err(RefreshError::Gone)
                }
            }
            other => {
                let reason =
                    other.err().map_or_else(|| "its files have changed".to_owned(), |e| e.to_string());
                self.replacer.give_up(format!(
                    "model.refresh: the new version cannot be used: {error}; the version before, which was dropped to \
                     make room for it, cannot be loaded again: {reason}"
                ));
                Err(RefreshError::Gone)
            }
        }
    }

    fn load(&self, model: settings::Model) -> Result<Arc<dyn Compute>, RefreshError> {
        let settings = Settings { model, ..self.settings.clone() };
        // A malformed file must not end the thread.
        let loaded = catch_unwind(AssertUnwindSafe(|| task::load(&settings, &self.metrics)));
        Ok(loaded.map_err(|_| RefreshError::Panicked)??)
    }

    fn report(&mut self, before: &About, now_runs: &About, comparison: Option<Comparison>) {
        let (before, now_runs) = (before.version(), now_runs.version());
        let of = comparison.as_ref();
        tracing::info!(
            model = now_runs.model,
            digest = now_runs.digest,
            model_before = before.model,
            digest_before = before.digest,
            compared_records = of.map(|of| of.records),
            agreement = of.and_then(|of| of.agreement),
            cosine = of.and_then(|of| of.cosine),
            "model replaced between two windows"
        );
        self.status.last_replacement = Some(Replacement { at: now(), before, now: now_runs, comparison });
    }
}

/// A version that is about to be loaded.
struct Next<'a> {
    version: &'a Option<String>,
    digest: &'a Digest,
    sample: Option<Sample>,
}

/// Inputs of the last window, and the predictions of the version that runs for them.
struct Sample {
    window: Window,
    before: Vec<Prediction>,
}

impl Sample {
    /// `None` if the version that runs cannot predict them now.
    fn of(window: Window, running: &dyn Compute) -> Option<Self> {
        match running.answer_in_json(window) {
            Ok(encoded) => Some(Self { before: predictions(&encoded), window: encoded.window }),
            Err(error) => {
                tracing::warn!(%error, "the version that runs did not predict the sample: the new one is not compared with it");
                None
            }
        }
    }

    /// Predicts the inputs with another version too.
    fn compare(self, next: &dyn Compute) -> Result<Comparison, RefreshError> {
        let now = predictions(&next.answer_in_json(self.window)?);
        let predicted = self.before.iter().flatten().count();
        if predicted > 0 && now.iter().all(Option::is_none) {
            return Err(RefreshError::PredictsNothing(predicted));
        }
        Ok(compare(&self.before, &now)?)
    }
}

/// The time, as RFC 3339.
fn now() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}
