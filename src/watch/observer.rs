//! What the encode stage does with each prediction beside writing it: counts it, and samples it.

use std::sync::Arc;

use super::{Sampler, Shows, Tally};
use crate::codec::{DecoderError, Stopped, Waiting};
use crate::flow::{Outcome, Sample};
use crate::settings::Settings;
use crate::task::Kind;
use crate::window::Window;

/// Cheap to clone. The default does nothing, for windows that are not published.
#[derive(Clone, Default)]
pub struct Observer {
    counts: bool,
    shows: Option<Shows>,
    sampler: Option<Arc<Sampler>>,
}

impl Observer {
    /// # Errors
    /// `samples` needs schemas that cannot be read.
    pub fn new(settings: &Settings) -> Result<Self, DecoderError> {
        let shows = (Kind::of(settings.task.kind).shows)(&settings.task);
        Ok(Self {
            counts: true,
            shows: (shows != Shows::Nothing).then_some(shows),
            sampler: Sampler::new(settings)?.map(Arc::new),
        })
    }

    /// Whether predictions are counted.
    pub fn counts(&self) -> bool {
        self.counts
    }

    /// Counts a prediction as the task wrote it. One that cannot be read is not counted.
    pub fn count(&self, prediction: &[u8], tally: &mut Tally) {
        if let Some(shows) = self.shows
            && let Err(error) = shows.count(prediction, tally)
        {
            tracing::debug!(%error, "a prediction is not counted: it lacks what its task shows");
        }
    }

    /// Fetches the schemas that the samples of a window need, and waits while they cannot be fetched.
    ///
    /// # Errors
    /// The process is asked to stop.
    pub fn fetch(&self, window: &Window, waiting: &Waiting<'_>) -> Result<(), Stopped> {
        match &self.sampler {
            None => Ok(()),
            Some(sampler) => sampler.fetch(window, waiting),
        }
    }

    /// The sample of a record of a window, if it is chosen. `prediction`: as the task wrote it; `None`: the value itself.
    pub fn sample(&self, window: &Window, record: usize, prediction: Option<&[u8]>) -> Option<Sample> {
        let sampler = self.sampler.as_ref()?;
        let of = &window.records[record];
        let raw = window.raw(of).filter(|_| sampler.takes(window, of))?;
        match sampler.write(raw, prediction) {
            Ok(value) => Some(Sample { record: record as u32, value }),
            Err(error) => {
                tracing::debug!(source = %window.position(of), %error, "a sample is left out: its value cannot be read");
                None
            }
        }
    }

    /// The samples of a window whose predictions are its values.
    pub fn samples(&self, window: &Window, outcomes: &[Outcome]) -> Vec<Sample> {
        if self.sampler.is_none() {
            return Vec::new();
        }
        let unchanged =
            outcomes.iter().enumerate().filter(|(_, outcome)| matches!(outcome, Outcome::Unchanged));
        unchanged.filter_map(|(record, _)| self.sample(window, record, None)).collect()
    }
}
