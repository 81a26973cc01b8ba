//! `compare`: reads the predictions of two topics back and reports how much they agree.
//!
//! ```text
//! join      reads both topics, matches their predictions by the position of the record
//! tally     what is counted of a topic, and of the pairs
//! report    the figures, ready to be written            (text, html: how they are shown; JSON is the report itself)
//! ```

mod html;
mod join;
mod report;
mod tally;
mod text;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, ValueEnum};

use super::{Cli, output, refusal};
use crate::agreement::Comparer;
use crate::kafka::consumer::{self, Role};
use crate::kafka::permissions;
use crate::kafka::range::{self, Point};
use crate::settings::{Loaded, Settings};
use crate::telemetry::logging;
use report::Report;

#[derive(Args)]
pub struct Options {
    /// Topic with the first predictions, such as those of the current model
    #[arg(long, value_name = "TOPIC")]
    a: String,
    /// Topic with the second predictions, such as those of another model
    #[arg(long, value_name = "TOPIC")]
    b: String,
    /// Start of the input: an RFC 3339 time, or offset:N in every partition
    #[arg(long, value_name = "T")]
    from: Option<Point>,
    /// End of the input, exclusive: an RFC 3339 time, or offset:N in every partition
    #[arg(long, value_name = "T")]
    to: Option<Point>,
    /// Form of the report; html is one file with its plots inside
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Write the report to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
    Html,
}

pub fn compare(loaded: Loaded, options: &Options) -> anyhow::Result<()> {
    let settings = loaded.settings;
    logging::start(&settings.log);
    if options.a == options.b {
        let message = format!("--a and --b are both {}: name two topics\n", options.a);
        Cli::command().error(ErrorKind::ArgumentConflict, message).exit();
    }
    let report = read(&settings, options).map_err(|error| {
        let bounded = options.from.is_some() || options.to.is_some();
        let needed = permissions::needed_by_compare(&settings, [&options.a, &options.b], bounded);
        refusal::explain(error, &settings, &needed)
    })?;
    let text = match options.format {
        Format::Text => text::write(&report),
        Format::Json => super::pretty(&serde_json::to_value(&report)?) + "\n",
        Format::Html => html::write(&report),
    };
    match &options.output {
        Some(path) => write(path, &text),
        None => {
            output::out!("{text}");
            Ok(())
        }
    }
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("writing the report to {}", path.display()))
}

fn read(settings: &Settings, options: &Options) -> anyhow::Result<Report> {
    let mut config = consumer::config(settings, Role::Drain, "", 1);
    // What a transaction has not committed is not published.
    config.set("isolation.level", "read_committed");
    let consumer = consumer::reader_with(&config)?;
    let input = match (options.from, options.to) {
        (None, None) => None,
        (from, to) => {
            let topics: Vec<&str> = settings.input.topics.iter().map(String::as_str).collect();
            Some(range::resolve(&consumer, &topics, from, to, true)?)
        }
    };
    let comparer = Comparer::new(&settings.task);
    let join = join::Join::new(settings, &consumer, comparer, input.as_ref())?;
    let found = join.topics([&options.a, &options.b], options.from)?;
    Ok(Report::new(settings, (options.from, options.to), found))
}
