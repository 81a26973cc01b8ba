//! Which topics the group reads. librdkafka's regex engine differs from kandle's, so it never gets a pattern: kandle
//! looks up the topics that match, subscribes to their names, and repeats the lookup periodically.

use rdkafka::consumer::Consumer;

use super::serve::{Source, SourceError};
use crate::kafka::topics::TopicFilter;

#[derive(Debug)]
pub(super) struct Subscription {
    topics: Vec<String>,
    /// `input.topics` is a pattern, so `topics` may change.
    pattern: bool,
    said_empty: bool,
}

impl Subscription {
    /// `topics`: names, or one pattern.
    pub fn new(topics: &[String]) -> Self {
        let pattern = topics.iter().any(|topic| TopicFilter::is_pattern(topic));
        Self { topics: if pattern { Vec::new() } else { topics.to_vec() }, pattern, said_empty: false }
    }

    /// Topics of a drain, which do not change.
    pub fn fixed(topics: Vec<String>) -> Self {
        Self { topics, pattern: false, said_empty: false }
    }

    /// The topics that are subscribed to.
    pub fn topics(&self) -> &[String] {
        &self.topics
    }

    /// No topic is known to match the pattern.
    pub fn is_empty(&self) -> bool {
        self.pattern && self.topics.is_empty()
    }

    /// Sets the topics that match now; true if they have changed.
    fn change(&mut self, matching: Vec<String>) -> bool {
        if !self.pattern || self.topics == matching {
            return false;
        }
        self.topics = matching;
        true
    }
}

impl Source {
    /// Subscribes to the topics, or first asks which ones the pattern matches.
    pub(super) fn subscribe(mut self) -> Result<Self, SourceError> {
        if self.subscription.pattern {
            self.ask_for_topics();
        } else if !self.subscription.topics.is_empty() {
            self.subscribe_now()?;
        }
        Ok(self)
    }

    pub(super) fn subscribe_now(&self) -> Result<(), SourceError> {
        let topics: Vec<&str> = self.subscription.topics.iter().map(String::as_str).collect();
        self.consumer.subscribe(&topics).map_err(SourceError::Client)
    }

    pub(super) fn subscribe_to(&mut self, matching: Vec<String>) -> Result<(), SourceError> {
        if matching.is_empty() && self.subscription.is_empty() {
            // Ready: only a topic is missing.
            self.context.health.set_ready();
            if !std::mem::replace(&mut self.subscription.said_empty, true) {
                tracing::warn!("no topic matches input.topics: looking again every second");
            }
            return Ok(());
        }
        if !self.subscription.change(matching) {
            return Ok(());
        }
        tracing::info!(topics = self.subscription.topics.join(" "), "topics match input.topics");
        if self.subscription.topics.is_empty() {
            self.consumer.unsubscribe();
            return Ok(());
        }
        self.subscribe_now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_follows_the_topics_that_match() {
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let mut pattern = Subscription::new(&names(&["^t-.*"]));
        assert!(pattern.is_empty());
        assert!(pattern.change(names(&["t-1"])) && !pattern.change(names(&["t-1"])));
        assert!(pattern.change(names(&["t-1", "t-2"])) && pattern.change(Vec::new()));
        let mut fixed = Subscription::new(&names(&["a", "b"]));
        assert!(!fixed.is_empty() && !fixed.change(names(&["c"])));
        assert_eq!(fixed.topics, names(&["a", "b"]));
    }
}
