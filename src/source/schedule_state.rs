//! The schedule: pauses partitions or leaves the group outside of its periods, and warns if the backlog
//! will miss `schedule.finish_by`.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::serve::Source;
use crate::clock;
use crate::schedule::{Phase, Schedule};
use crate::settings::Outside;

/// Interval of clock checks.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How long the rate is measured before a warning is based on it.
const WATCH: Duration = Duration::from_secs(5);
/// Interval of warnings.
const REPEAT: Duration = Duration::from_secs(300);

/// State of the schedule.
#[derive(Debug)]
pub(super) struct ScheduleState {
    looked: Option<Instant>,
    /// Outside of all periods: partitions are paused.
    pub resting: bool,
    /// Since when records are consumed.
    since: Instant,
    /// Deadline of a drain, fixed at its start; `None` without a drain.
    deadline: Option<Timestamp>,
    warned: Option<Instant>,
}

impl ScheduleState {
    pub fn new(schedule: &Schedule, drain: bool) -> Self {
        Self {
            looked: None,
            resting: false,
            since: Instant::now(),
            deadline: if drain { schedule.deadline(clock::now()) } else { None },
            warned: None,
        }
    }
}

impl Source {
    /// Pauses and resumes partitions by the schedule. True once the group is to be left.
    pub(super) fn is_period_over(&mut self) -> bool {
        // A drain ignores periods: it runs when it is started.
        if self.bounds.drain.is_some() || !self.context.schedule.has_periods() {
            return false;
        }
        if self.bounds.schedule.looked.is_some_and(|at| at.elapsed() < POLL_INTERVAL) {
            return false;
        }
        self.bounds.schedule.looked = Some(Instant::now());
        match self.context.schedule.at(clock::now()) {
            Phase::Open { until } => {
                if std::mem::take(&mut self.bounds.schedule.resting) {
                    self.bounds.schedule.since = Instant::now();
                    tracing::info!(until = until.map(|t| t.to_string()), "schedule period began: resuming");
                    self.context.metrics.schedule_open.set(1.0);
                    self.resume_if_possible();
                }
                false
            }
            Phase::Closed { until } if self.context.schedule.outside == Outside::Leave => {
                tracing::info!(%until, "schedule period ended: leaving the group");
                true
            }
            Phase::Closed { until } => {
                if !std::mem::replace(&mut self.bounds.schedule.resting, true) {
                    tracing::info!(%until, "outside of the schedule: partitions paused");
                    self.context.metrics.schedule_open.set(0.0);
                    self.context.metrics.deadline.set(f64::INFINITY);
                    self.pause();
                }
                false
            }
        }
    }

    /// Warns while there is still time that the backlog will miss `schedule.finish_by`. `remaining`: seconds
    /// that the backlog takes at the present rate.
    pub(super) fn warn_if_late(&mut self, remaining: f64) {
        let now = clock::now();
        let Some(deadline) = self.bounds.schedule.deadline.or_else(|| self.context.schedule.deadline(now))
        else {
            return;
        };
        if self.bounds.schedule.resting {
            return;
        }
        let left = deadline.duration_since(now).as_secs_f64();
        self.context.metrics.deadline.set(left);
        let early = self.bounds.schedule.since.elapsed() < WATCH && left > 0.0;
        let again = self.bounds.schedule.warned.is_some_and(|at| at.elapsed() < REPEAT);
        if remaining <= left.max(0.0) || early || again {
            return;
        }
        self.bounds.schedule.warned = Some(Instant::now());
        let whole = |seconds: f64| seconds.ceil();
        let message = format!(
            "the backlog will miss schedule.finish_by ({deadline}): it takes {} s more at the present rate, \
             and {} s are left",
            whole(remaining),
            whole(left),
        );
        self.context.health.error(&message);
        tracing::warn!(
            %deadline,
            remaining_seconds = whole(remaining),
            left_seconds = whole(left),
            "the backlog will miss schedule.finish_by at the present rate"
        );
    }
}
