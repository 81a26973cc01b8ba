//! Names the permissions that are missing when a command has failed because the brokers refused it something.

use std::time::Duration;

use crate::kafka::permissions::{self, Held, Permission};
use crate::settings::Settings;

/// How long the brokers may take for each answer about permissions.
const ATTEMPT: Duration = Duration::from_secs(5);

/// Adds to an error of the brokers which of the needed permissions this user does not have.
pub(super) fn explain(error: anyhow::Error, settings: &Settings, needed: &[Permission]) -> anyhow::Error {
    if !may_be_a_refusal(&error) {
        return error;
    }
    let (input, output) = permissions::clients(settings);
    let held = permissions::probe(settings, needed, (&input, &output), ATTEMPT);
    let missing: Vec<String> = (needed.iter().zip(held))
        .filter(|(permission, held)| *held == Held::No && permission.optional.is_none())
        .map(|(permission, _)| {
            format!("{permission}; grant it: {}", permission.grant(&settings.kafka.brokers))
        })
        .collect();
    if missing.is_empty() {
        return error;
    }
    error.context(format!("a permission is missing: {}", missing.join("; ")))
}

/// librdkafka reports some refusals only as a request that times out.
fn may_be_a_refusal(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}").to_lowercase();
    ["authorization failed", "timed out", "timeout", "no record came"].iter().any(|part| text.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_of_the_brokers_are_looked_into() {
        let of = |text: &str| may_be_a_refusal(&anyhow::Error::msg(text.to_owned()).context("reading t/0"));
        assert!(of(
            "Message consumption error: TopicAuthorizationFailed (Broker: Topic authorization failed)"
        ));
        assert!(of("Local: Timed out"));
        assert!(!of("the model's first forward pass failed"));
    }
}
