//! The commands. Exit codes: 0 done; 1 failed while running; 2 the command line or configuration is wrong; 3 a command
//! with `--strict` ended with dead letters or failed lines, or `audit` found something.

mod audit;
mod bench;
mod check;
mod compare;
pub mod demo;
mod drain;
mod dry_run;
mod model;
mod offsets;
mod output;
mod predict;
mod progress;
mod reference;
mod refusal;
mod replay;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::cli::output::outln;
use crate::codec::write;
use crate::kafka::range::RangeError;
use crate::pipeline::PipelineError;
use crate::registry::Registry;
use crate::settings::{self, Loaded, Sources};

const FAILED: u8 = 1;
const WRONG: u8 = 2;
const FOUND: u8 = 3;

#[derive(Parser)]
#[command(name = "kandle", version, about, long_about = None, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed while running; 2 the command line or the configuration is wrong; 3 drain --strict or\nreplay --strict ended with dead letters, predict --strict had lines without a prediction, or audit found something missing or\ndoubled.
Settings: defaults < -c FILE (YAML, TOML or JSON; repeatable, later wins) < KANDLE__SECTION__KEY < --set section.key=value.
config/default.yaml lists every key; `kandle config schema` prints the JSON Schema.";

#[derive(Args, Clone)]
struct Configuration {
    /// Configuration file (YAML, TOML or JSON); later files win
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// One setting; overrides files and environment variables
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Consume, predict and publish until stopped; SIGTERM finishes the windows in flight, commits and exits with 0
    Run(Configuration),
    /// Process the backlog, up to the end offsets that the partitions have at the start, report and exit.
    /// SIGTERM commits what is published and exits with 1; run it again to resume
    Drain {
        #[command(flatten)]
        configuration: Configuration,
        #[command(flatten)]
        options: drain::Options,
    },
    /// Process the records between two points in time, or the dead letters, again, in a group of its own; run
    /// it again to resume. The live group's offsets are not touched
    Replay {
        #[command(flatten)]
        configuration: Configuration,
        #[command(flatten)]
        options: replay::Options,
    },
    /// Read predictions back: which model made them, and whether any are missing or doubled
    Audit {
        #[command(flatten)]
        configuration: Configuration,
        #[command(flatten)]
        options: audit::Options,
    },
    /// Compare the predictions in two topics about the same input: coverage, agreement, strongest disagreements
    Compare {
        #[command(flatten)]
        configuration: Configuration,
        #[command(flatten)]
        options: compare::Options,
    },
    /// Write the distributions of the predictions between two points in time to a file, which the setting drift.reference
    /// compares later ones with
    Reference {
        #[command(flatten)]
        configuration: Configuration,
        #[command(flatten)]
        options: reference::Options,
    },
    /// Try everything that `run` needs, without consuming; one line per check
    Check(Configuration),
    /// Predict without Kafka: one record per line in, one prediction per line out. Shows progress on a terminal if the
    /// predictions go elsewhere
    Predict {
        #[command(flatten)]
        configuration: Configuration,
        #[command(flatten)]
        options: predict::Options,
    },
    /// Fetch or show the model
    #[command(subcommand)]
    Model(ModelCommand),
    /// Show the configuration or its schema
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Measure throughput and latency
    #[command(subcommand)]
    Bench(bench::Command),
    /// Classify example tickets, images or customers without any set-up: an embedded broker and a bundled model
    Demo(demo::Options),
}

#[derive(Subcommand)]
enum ModelCommand {
    /// Fetch the model into the cache
    Pull(Configuration),
    /// Show architecture, parameters, precision, token limit, labels and digest
    Show(Configuration),
    /// Compare the model with model.digest; print its digest and the SHA-256 of each file
    Verify(Configuration),
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Show the effective settings and where each came from; secrets are hidden
    Show(Configuration),
    /// Print the JSON Schema of the configuration; with --output, the schema of the predictions that it leads to
    Schema {
        /// Print the schema of the predictions: in Avro, Protobuf or JSON Schema, as output.format says (json: JSON
        /// Schema)
        #[arg(long)]
        output: bool,
        #[command(flatten)]
        configuration: Configuration,
    },
}

pub fn main() -> ExitCode {
    // clap itself exits with 2 if the command line is wrong.
    let result = match Cli::parse().command {
        Command::Run(configuration) => with(&configuration, run::run),
        Command::Drain { configuration, options } => {
            with(&configuration, |loaded| drain::drain(loaded, &options))
        }
        Command::Replay { configuration, options } => {
            with(&configuration, |loaded| replay::replay(loaded, &options))
        }
        Command::Audit { configuration, options } => {
            with(&configuration, |loaded| audit::audit(loaded, &options))
        }
        Command::Compare { configuration, options } => {
            with(&configuration, |loaded| compare::compare(loaded, &options))
        }
        Command::Reference { configuration, options } => {
            with(&configuration, |loaded| reference::reference(loaded, &options))
        }
        Command::Check(configuration) => with(&configuration, check::check),
        Command::Predict { configuration, options } => {
            with(&configuration, |loaded| predict::predict(loaded, &options))
        }
        Command::Model(ModelCommand::Pull(configuration)) => with(&configuration, model::pull),
        Command::Model(ModelCommand::Show(configuration)) => with(&configuration, model::show),
        Command::Model(ModelCommand::Verify(configuration)) => with(&configuration, model::verify),
        Command::Config(ConfigCommand::Show(configuration)) => with(&configuration, show_config),
        Command::Config(ConfigCommand::Schema { output: false, configuration }) => {
            if !configuration.files.is_empty() || !configuration.set.is_empty() {
                let message = "-c and --set have an effect only with --output: the configuration's own schema does not \
                               depend on a configuration\n";
                Cli::command().error(ErrorKind::ArgumentConflict, message).exit();
            }
            outln!("{}", pretty(&settings::schema()));
            Ok(())
        }
        Command::Config(ConfigCommand::Schema { output: true, configuration }) => {
            with(&configuration, show_output_schema)
        }
        Command::Bench(command) => bench::bench(command),
        Command::Demo(options) => demo::demo(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(Misconfigured) = error.downcast_ref() {
                return ExitCode::from(WRONG);
            }
            if error.downcast_ref::<AlreadyReported>().is_none() {
                output::errorln(format_args!("kandle: {}", with_causes(&error)));
            }
            ExitCode::from(
                if error.is::<drain::DeadLetters>()
                    || error.is::<audit::Findings>()
                    || error.is::<predict::FailedLines>()
                {
                    FOUND
                } else if error.downcast_ref().is_some_and(|error| !matches!(error, RangeError::Kafka(_)))
                    || matches!(error.downcast_ref(), Some(PipelineError::Reference(_)))
                {
                    WRONG
                } else {
                    FAILED
                },
            )
        }
    }
}

/// The configuration has problems, which have been printed.
#[derive(Debug, thiserror::Error)]
#[error("the configuration is wrong")]
struct Misconfigured;

/// The error with its causes, without those that it quotes already.
fn with_causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}

/// The command failed, and has printed why.
#[derive(Debug, thiserror::Error)]
#[error("failed")]
struct AlreadyReported;

fn with(
    configuration: &Configuration,
    command: impl FnOnce(Loaded) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let sources = Sources {
        files: configuration.files.clone(),
        set: configuration.set.clone(),
        environment: std::env::vars_os()
            .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
            .collect(),
    };
    match settings::load(&sources) {
        Ok(loaded) => command(loaded),
        Err(faults) => {
            let plural = if faults.len() == 1 { "" } else { "s" };
            output::errorln(format_args!("kandle: {} problem{plural} in the configuration:", faults.len()));
            for fault in faults {
                output::errorln(format_args!("  {fault}"));
            }
            Err(Misconfigured.into())
        }
    }
}

fn pretty(value: &serde_json::Value) -> String {
    serde_json::to_string_pretty(value).expect("a JSON value can be written as text")
}

/// Prints the schema of the predictions. With `output.include` and a registry, it asks for the types of the fields.
fn show_output_schema(loaded: Loaded) -> anyhow::Result<()> {
    let settings = loaded.settings;
    let registry = Registry::new(&settings.registry)?;
    let record = write::typed(&settings, registry.as_ref())?;
    if record.fields.is_empty() {
        let kind = settings.task.kind.name();
        anyhow::bail!(
            "task.kind: {kind} publishes the value unchanged: its predictions have no schema of their own"
        );
    }
    outln!("{}", write::schema_text(settings.output.format, &record).trim_end());
    Ok(())
}

/// Prints YAML that `-c` can read, each value followed by its origin as a comment.
fn show_config(loaded: Loaded) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    yaml(&loaded.shown, "", 0, &mut lines);
    let width = lines.iter().map(|(line, _)| line.len()).max().unwrap_or(0).min(56);
    for (line, key) in lines {
        let Some(key) = key else {
            outln!("{line}");
            continue;
        };
        // A list has no origin of its own: take that of an item.
        let inside = format!("{key}.");
        let origin = loaded.origins.get(&key).or_else(|| {
            loaded.origins.iter().find(|(known, _)| known.starts_with(&inside)).map(|(_, origin)| origin)
        });
        outln!("{line:width$}  # {}", origin.map_or("default", String::as_str));
    }
    Ok(())
}

/// Appends the lines, and the key of each line that has a value. JSON's scalars and lists are valid YAML.
fn yaml(value: &serde_json::Value, key: &str, depth: usize, lines: &mut Vec<(String, Option<String>)>) {
    for (name, child) in value.as_object().into_iter().flatten() {
        let indent = "  ".repeat(depth);
        let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
        match child {
            serde_json::Value::Object(object) if !object.is_empty() => {
                lines.push((format!("{indent}{name}:"), None));
                yaml(child, &key, depth + 1, lines);
            }
            leaf => {
                lines.push((format!("{indent}{name}: {}", settings::escape(&leaf.to_string())), Some(key)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kafka::range::RangeError;

    #[test]
    fn a_cause_that_the_error_quotes_is_printed_once() {
        let kafka = rdkafka::error::KafkaError::Canceled;
        let error = anyhow::Error::from(RangeError::from(kafka.clone())).context("the drain");
        assert_eq!(with_causes(&error), format!("the drain: a request to the cluster failed: {kafka}"));
    }
}
