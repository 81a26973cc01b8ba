//! Samples: a share of the inputs, each with its prediction, for people who look at them or label them.
//!
//! [`Share`] chooses the records, so every process and every replay chooses the same ones.

use crate::codec::json::null_at;
use crate::codec::select::{holds_text, last_name, needs_members};
use crate::codec::{DecoderError, FormatEntry, Stopped, Waiting, WholeReader, tokens};
use crate::record::{Raw, Record, RecordError};
use crate::settings::{Settings, check_pointer};
use crate::share::Share;
use crate::window::Window;

/// Chooses records and writes their samples: `{"input": …, "prediction": …}`.
pub struct Sampler {
    share: Share,
    reader: WholeReader,
    /// Members of the input that are replaced by null, as the names from the outside in.
    redact: Vec<Vec<String>>,
    /// The same members in the prediction, where `output.include` has copied them.
    redact_included: Vec<Vec<String>>,
}

impl Sampler {
    /// `None`: `samples.topic` is not set.
    ///
    /// # Errors
    /// `input.schema` or a certificate of the registry cannot be read.
    pub fn new(settings: &Settings) -> Result<Option<Self>, DecoderError> {
        let samples = &settings.samples;
        if samples.topic.is_none() {
            return Ok(None);
        }
        let redact: Vec<Vec<String>> = samples.redact.iter().map(|pointer| tokens(pointer)).collect();
        let mut redact_included = Vec::new();
        for include in &settings.output.include {
            let (path, name) = (tokens(include), last_name(include));
            for hidden in &redact {
                if path.starts_with(hidden) {
                    redact_included.push(vec![name.clone()]);
                } else if let Some(inside) = hidden.strip_prefix(&path[..]) {
                    redact_included.push([std::slice::from_ref(&name), inside].concat());
                }
            }
        }
        let reader = WholeReader::new(settings)?;
        Ok(Some(Self { share: Share::new(samples.share), reader, redact, redact_included }))
    }

    pub fn takes(&self, window: &Window, record: &Record) -> bool {
        self.share.holds(window.key(record), window.origin(record))
    }

    /// Fetches the schemas of the chosen records, and waits while they cannot be fetched.
    ///
    /// # Errors
    /// The process is asked to stop.
    pub fn fetch(&self, window: &Window, waiting: &Waiting<'_>) -> Result<(), Stopped> {
        let chosen = window.records.iter().filter(|record| self.takes(window, record));
        self.reader.fetch(chosen.filter_map(|record| window.raw(record)), waiting)
    }

    /// Writes the sample of a record. `prediction`: as the task wrote it, in JSON; `None`: the value itself.
    ///
    /// # Errors
    /// The value cannot be read.
    pub fn write(&self, value: Raw<'_>, prediction: Option<&[u8]>) -> Result<Vec<u8>, RecordError> {
        let input = self.reader.json(value)?;
        let hidden = hide(&input, &self.redact);
        let input = hidden.as_deref().unwrap_or(&input);
        let shown;
        let prediction = match prediction {
            None => input.as_bytes(),
            Some(prediction) => {
                match std::str::from_utf8(prediction).ok().and_then(|p| hide(p, &self.redact_included)) {
                    None => prediction,
                    Some(hidden) => {
                        shown = hidden;
                        shown.as_bytes()
                    }
                }
            }
        };
        Ok([&b"{\"input\":"[..], input.as_bytes(), b",\"prediction\":", prediction, b"}"].concat())
    }

    /// Approximate bytes of the samples that a value of so many bytes leads to, on average.
    pub fn footprint(share: f64, value_bytes: usize) -> usize {
        // In base64, and the prediction beside it, whose size is not known here.
        (share * (value_bytes * 2 + 256) as f64) as usize
    }
}

/// A JSON text with null at these places; `None` if there are no places.
fn hide(json: &str, places: &[Vec<String>]) -> Option<String> {
    if places.is_empty() {
        return None;
    }
    let mut value: serde_json::Value = serde_json::from_str(json).ok()?;
    places.iter().for_each(|place| null_at(&mut value, place));
    Some(value.to_string())
}

/// The problems of the settings of samples: keys and messages.
pub fn problems(settings: &Settings) -> Vec<(&'static str, String)> {
    let (samples, mut problems) = (&settings.samples, Vec::new());
    if samples.topic.is_none() {
        if *samples != Default::default() {
            problems
                .push(("samples.topic", "is required for samples: the topic to publish them to".to_owned()));
        }
        return problems;
    }
    if !(samples.share > 0.0 && samples.share <= 1.0) {
        let message =
            format!("{} is not a share: set more than 0 and at most 1, such as 0.001", samples.share);
        problems.push(("samples.share", message));
    }
    let format = FormatEntry::of(settings.input.format);
    if !samples.redact.is_empty() && !format.has_members {
        problems.push(("samples.redact", needs_members(format)));
    }
    for message in samples.redact.iter().filter_map(|pointer| check_pointer(pointer).err()) {
        problems.push(("samples.redact", message));
    }
    let hides_text = samples.redact.iter().any(|pointer| holds_text(&settings.input, pointer));
    let finds_entities = settings.task.kind.name() == "token-classification";
    if finds_entities && settings.task.redact && !hides_text {
        let message = "must have the pointer to the text, which task.redact must not publish".to_owned();
        problems.push(("samples.redact", message));
    } else if finds_entities && !settings.task.redact && hides_text {
        let message = "has the text, parts of which are in the entities: set task.redact too".to_owned();
        problems.push(("samples.redact", message));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(more: &[&str]) -> Result<Settings, Vec<crate::settings::Problem>> {
        let set = ["kafka.brokers=b:1", "input.topics=i", "input.group=g", "output.topic=o"];
        let set = set.iter().chain(&["dead_letters.topic=d", "samples.topic=s"]).chain(more);
        let sources =
            crate::settings::Sources { set: set.map(|s| s.to_string()).collect(), ..Default::default() };
        crate::settings::load(&sources).map(|loaded| loaded.settings)
    }

    fn sample(more: &[&str], value: &[u8], prediction: Option<&str>) -> String {
        let sampler = Sampler::new(&settings(more).unwrap()).unwrap().unwrap();
        String::from_utf8(sampler.write(Raw::from(value), prediction.map(str::as_bytes)).unwrap()).unwrap()
    }

    const TEXT: [&str; 3] = ["input.field=/text", "task.kind=text-classification", "model.source=bundled"];

    #[test]
    fn a_sample_has_the_input_as_it_was_written() {
        let value = br#" {"text":"hi","n":1.10,"id":18446744073709551616} "#;
        assert_eq!(
            sample(&TEXT, value, Some(r#"{"label":"a"}"#)),
            r#"{"input":{"text":"hi","n":1.10,"id":18446744073709551616},"prediction":{"label":"a"}}"#
        );
    }

    #[test]
    fn redacted_members_are_null_in_the_input_and_in_what_includes_it() {
        let more = ["samples.redact=/who/mail,/text", "output.include=/who,/text"];
        let value = br#"{"text":"hi","who":{"mail":"a@b","mail":"c@d","id":7},"k":1}"#;
        let prediction = r#"{"label":"a","who":{"mail":"c@d","id":7},"text":"hi"}"#;
        assert_eq!(
            sample(&[&TEXT[..], &more].concat(), value, Some(prediction)),
            r#"{"input":{"text":null,"who":{"mail":null,"id":7},"k":1},"prediction":{"label":"a","who":{"mail":null,"id":7},"text":null}}"#
        );
    }

    #[test]
    fn values_that_are_no_json_become_strings() {
        let text = ["input.format=text", "task.kind=noop"];
        assert_eq!(sample(&text, b"a\"b", None), r#"{"input":"a\"b","prediction":"a\"b"}"#);
        let image = ["input.format=image", "task.kind=image-classification", "model.source=bundled:shapes"];
        assert_eq!(sample(&image, &[0xff, 0xd8, 0xff], Some("{}")), r#"{"input":"/9j/","prediction":{}}"#);
    }

    /// The task reads one field, the sample has all.
    #[test]
    fn a_sample_of_a_binary_format_is_json() {
        let folder = tempfile::tempdir().unwrap();
        let schema = folder.path().join("r.avsc");
        let fields = r#"[{"name":"text","type":"string"},{"name":"id","type":"long"},{"name":"mail","type":"string"}]"#;
        std::fs::write(&schema, format!(r#"{{"type":"record","name":"R","fields":{fields}}}"#)).unwrap();
        let schema = format!("input.schema={}", schema.display());
        let more = ["input.format=avro", &schema, "samples.redact=/mail"];
        let sample = sample(&[&TEXT[..], &more].concat(), b"\x04hi\x0e\x06a@b", Some("{}"));
        assert_eq!(sample, r#"{"input":{"text":"hi","id":7,"mail":null},"prediction":{}}"#);
    }

    #[test]
    fn problems_are_found() {
        let problem = |more: &[&str]| match settings(&[&TEXT[..], more].concat()) {
            Ok(_) => String::new(),
            Err(problems) => problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"),
        };
        assert_eq!(problem(&["samples.share=1"]), "");
        for (key, wrong) in [
            ("samples.share", "samples.share=0"),
            ("samples.share", "samples.share=1.5"),
            ("samples.topic", "samples.topic=o"),
            ("samples.topic", "samples.topic=d"),
            ("samples.topic", "samples.topic=i"),
            ("samples.redact", "samples.redact=text"),
        ] {
            assert!(problem(&[wrong]).contains(key), "{wrong}: {}", problem(&[wrong]));
        }
        let entities = ["task.kind=token-classification", "task.labels=person", "task.redact=true"];
        assert!(problem(&entities).contains("samples.redact"), "the text would be published");
        assert_eq!(problem(&[&entities[..], &["samples.redact=/text"]].concat()), "");
    }
}
