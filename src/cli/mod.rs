//! The commands. Exit codes: 0 done; 1 failed while running; 2 the command line or configuration is
//! wrong; 3 `drain --strict` ended with dead letters, or `audit` found something.

mod audit;
mod bench;
mod check;
mod demo;
mod drain;
mod model;
mod output;
mod predict;
mod replay;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::cli::output::outln;
use crate::kafka::range::RangeError;
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
Exit codes: 0 done; 1 failed while running; 2 the command line or the configuration is wrong; 3 drain --strict or\nreplay --strict ended with dead letters, or audit found something missing or doubled.
Settings: defaults < -c FILE (YAML, TOML or JSON; repeatable, later wins) < KANDLE__SECTION__KEY < --set section.key=value.
config/default.yaml lists every key; `kandle config schema` is the same for machines.";

#[derive(Args, Clone)]
struct Configuration {
    /// Configuration file (YAML, TOML or JSON); later ones win
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// One setting, over everything else
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Consume, predict and publish for ever; SIGTERM finishes what is in flight, commits and exits 0
    Run(Configuration),
    /// Process what is there now, report and exit: up to the ends that the partitions have at the start.
    /// SIGTERM commits what is published and exits 1; started again, it goes on
    Drain {
        #[command(flatten)]
        configuration: Configuration,
        #[command(flatten)]
        options: drain::Options,
    },
    /// Drain between two points in time (or of the dead letters), in a group of its own; run again, it
    /// resumes. The live group's offsets are not touched
    Replay {
        #[command(flatten)]
        configuration: Configuration,
        #[command(flatten)]
        options: replay::Options,
    },
    /// Read predictions back: which model made which, and whether any is missing or doubled
    Audit {
        #[command(flatten)]
        configuration: Configuration,
        #[command(flatten)]
        options: audit::Options,
    },
    /// Try everything `run` needs without consuming: one line a check
    Check(Configuration),
    /// The model and codec without Kafka: one record a line in, one prediction a line out
    Predict {
        #[command(flatten)]
        configuration: Configuration,
        #[command(flatten)]
        options: predict::Options,
    },
    /// The model alone
    #[command(subcommand)]
    Model(ModelCommand),
    /// The configuration alone
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Measure
    #[command(subcommand)]
    Bench(bench::Command),
    /// No set-up at all: an embedded broker, the bundled model, example tickets classified
    Demo(demo::Options),
}

#[derive(Subcommand)]
enum ModelCommand {
    /// Fetch the model to the cache
    Pull(Configuration),
    /// Architecture, parameters, precision, token limit, labels, digest
    Show(Configuration),
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// The effective settings, with where each came from; secrets hidden
    Show(Configuration),
    /// The JSON Schema of the configuration
    Schema,
}

pub fn main() -> ExitCode {
    // clap itself exits with 2 where the command line is wrong.
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
        Command::Check(configuration) => with(&configuration, check::check),
        Command::Predict { configuration, options } => {
            with(&configuration, |loaded| predict::predict(loaded, &options))
        }
        Command::Model(ModelCommand::Pull(configuration)) => with(&configuration, model::pull),
        Command::Model(ModelCommand::Show(configuration)) => with(&configuration, model::show),
        Command::Config(ConfigCommand::Show(configuration)) => with(&configuration, show_config),
        Command::Config(ConfigCommand::Schema) => {
            outln!("{}", pretty(&settings::schema()));
            Ok(())
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
            if error.downcast_ref::<AlreadySaid>().is_none() {
                output::errorln(format_args!("kandle: {error:#}"));
            }
            ExitCode::from(
                if error.is::<drain::DeadLetters>()
                    || error.is::<audit::Findings>()
                    || error.is::<predict::FailedLines>()
                {
                    FOUND
                } else if error.is::<RangeError>() {
                    WRONG
                } else {
                    FAILED
                },
            )
        }
    }
}

/// The faults have been printed.
#[derive(Debug, thiserror::Error)]
#[error("the configuration is wrong")]
struct Misconfigured;

/// What failed has been printed.
#[derive(Debug, thiserror::Error)]
#[error("failed")]
struct AlreadySaid;

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
            output::errorln(format_args!("kandle: {} fault{plural} in the configuration:", faults.len()));
            for fault in faults {
                output::errorln(format_args!("  {fault}"));
            }
            Err(Misconfigured.into())
        }
    }
}

fn pretty(value: &serde_json::Value) -> String {
    serde_json::to_string_pretty(value).expect("a JSON value has a text")
}

/// YAML that `-c` reads again, each value with its origin behind it.
fn show_config(loaded: Loaded) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    yaml(&loaded.shown, "", 0, &mut lines);
    let width = lines.iter().map(|(line, _)| line.len()).max().unwrap_or(0).min(56);
    for (line, key) in lines {
        let Some(key) = key else {
            outln!("{line}");
            continue;
        };
        // A list has the origin of its items.
        let inside = format!("{key}.");
        let origin = loaded.origins.get(&key).or_else(|| {
            loaded.origins.iter().find(|(known, _)| known.starts_with(&inside)).map(|(_, origin)| origin)
        });
        outln!("{line:width$}  # {}", origin.map_or("default", String::as_str));
    }
    Ok(())
}

/// Lines, and the key of each that has a value. JSON's scalars and lists are YAML's too.
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
