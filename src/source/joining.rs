//! Warns while the member waits to join the group, which can take as long as another member's session timeout.

use std::time::{Duration, Instant};

use super::serve::Context;
use crate::settings::Settings;

/// Waits shorter than this are normal and not logged.
const QUIET: Duration = Duration::from_secs(4);
/// Interval of the warnings.
const EVERY: Duration = Duration::from_secs(5);
/// librdkafka's default `session.timeout.ms`.
const SESSION_MS: &str = "45000";

#[derive(Debug)]
pub(super) struct Joining {
    group: String,
    session: Duration,
    is_static: bool,
    since: Option<Instant>,
    said: Option<Instant>,
}

impl Joining {
    pub fn new(settings: &Settings) -> Self {
        let session = settings.property("session.timeout.ms").unwrap_or(SESSION_MS);
        Self {
            group: settings.input.group.clone(),
            session: Duration::from_millis(session.parse().unwrap_or(0)),
            is_static: settings.property("group.instance.id").is_some(),
            since: Some(Instant::now()),
            said: None,
        }
    }

    /// `state`: the client's `join_state`.
    pub fn look(&mut self, state: &str, context: &Context) {
        let Some(waited) = self.waits(state, Instant::now()) else { return };
        let message = format!("waiting for group {} for {} s", self.group, waited.as_secs());
        context.health.error(&message);
        let hint = match self.is_static {
            true => "another member has not rejoined the group yet",
            false => {
                "a member that died without leaving the group stays in it until its session times out; \
                 set group.instance.id in input.properties to avoid this wait"
            }
        };
        tracing::warn!(
            group = self.group,
            waited_seconds = waited.as_secs(),
            session_timeout_seconds = self.session.as_secs(),
            hint,
            "waiting for the group's other members"
        );
    }

    /// How long the member has waited, if a warning is due.
    fn waits(&mut self, state: &str, now: Instant) -> Option<Duration> {
        if state == "steady" || state.is_empty() {
            (self.since, self.said) = (None, None);
            return None;
        }
        // In these states the client waits for other members; in the rest for this process, or only briefly.
        if !["wait-join", "wait-sync", "init"].contains(&state) {
            return None;
        }
        let waited = now.saturating_duration_since(*self.since.get_or_insert(now));
        let again = self.said.is_some_and(|at| now.saturating_duration_since(at) < EVERY);
        if waited < QUIET || again {
            return None;
        }
        self.said = Some(now);
        Some(waited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_wait_is_logged_every_few_seconds() {
        let start = Instant::now();
        let mut joining = Joining {
            group: "g".to_owned(),
            session: Duration::from_secs(45),
            is_static: false,
            since: None,
            said: None,
        };
        let mut said = Vec::new();
        for second in 0..20 {
            let state = if second < 16 { "wait-join" } else { "steady" };
            if joining.waits(state, start + Duration::from_secs(second)).is_some() {
                said.push(second);
            }
        }
        assert_eq!(said, [4, 9, 14]);
        assert_eq!(joining.waits("wait-join", start + Duration::from_secs(30)), None, "a new wait");
    }
}
