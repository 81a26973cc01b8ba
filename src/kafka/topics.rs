//! Which topics `input.topics` selects, by name or by pattern. Kandle always matches patterns itself and subscribes to
//! the names that match, never to the pattern, so that one regex engine decides everywhere.

use regex::Regex;

/// The entries of `input.topics`: names, or patterns, which start with `^`.
#[derive(Debug)]
pub struct TopicFilter {
    names: Vec<String>,
    patterns: Vec<Regex>,
}

impl TopicFilter {
    /// # Errors
    /// A pattern is not a valid regular expression.
    pub fn new<T: AsRef<str>>(topics: &[T]) -> Result<Self, regex::Error> {
        let (patterns, names): (Vec<&str>, Vec<&str>) =
            topics.iter().map(T::as_ref).partition(|topic| Self::is_pattern(topic));
        Ok(Self {
            names: names.into_iter().map(str::to_owned).collect(),
            patterns: patterns.into_iter().map(Regex::new).collect::<Result<_, _>>()?,
        })
    }

    pub fn is_pattern(topic: &str) -> bool {
        topic.starts_with('^')
    }

    /// The names, if there are no patterns.
    pub fn names(&self) -> Option<&[String]> {
        self.patterns.is_empty().then_some(&self.names[..])
    }

    pub fn holds(&self, topic: &str) -> bool {
        self.names.iter().any(|name| name == topic) || self.patterns.iter().any(|p| matches(p, topic))
    }
}

/// Kafka's internal topics, such as `__consumer_offsets`, match only patterns that start with `^__`.
fn matches(pattern: &Regex, topic: &str) -> bool {
    let internal = topic.starts_with("__") && !pattern.as_str().starts_with("^__");
    !internal && pattern.is_match(topic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_whole_and_patterns_begin_with_a_caret() {
        let names = TopicFilter::new(&["a", "b"]).unwrap();
        assert!(names.holds("b") && !names.holds("c") && !names.holds("ab"));
        assert_eq!(names.names(), Some(&["a".to_owned(), "b".to_owned()][..]));
        let pattern = TopicFilter::new(&["^tickets\\..*"]).unwrap();
        assert!(pattern.holds("tickets.de") && !pattern.holds("tickets"));
        assert_eq!(pattern.names(), None);
        assert!(TopicFilter::new(&["^("]).is_err());
        let digits = TopicFilter::new(&["^(?i)t-\\d+$"]).unwrap();
        assert!(digits.holds("T-12") && !digits.holds("t-x"));
    }

    #[test]
    fn internal_topics_match_only_patterns_that_start_with_their_prefix() {
        assert!(!TopicFilter::new(&["^.*"]).unwrap().holds("__consumer_offsets"));
        assert!(TopicFilter::new(&["^__mine.*"]).unwrap().holds("__mine-1"));
        assert!(TopicFilter::new(&["^_.*"]).unwrap().holds("_schemas"));
    }
}
