//! `bench`: measures the engine alone, or the pipeline on a broker.

mod calibrate;
mod engine;
mod images;
mod latency;
mod pipeline;
mod topics;

use clap::{Args, Subcommand};

use crate::settings::{self, Settings, Sources};

#[derive(Subcommand)]
pub enum Command {
    /// Find the best number of tokens per batch for this model and device, and store it for later starts
    Calibrate(super::Configuration),
    /// Measure a model over a file of texts, including tokenising, without Kafka
    Engine(engine::Options),
    /// Measure a model over image files, including decoding and preprocessing, without Kafka. For vectors in place of
    /// classes: --set task.kind=image-embedding
    Images(images::Options),
    /// Measure latency at low load, from a record's produce call to its prediction, on a broker
    Latency(latency::Options),
    /// Compare the pipeline without a model with a bare consume, produce, commit loop on the same broker
    Pipeline(pipeline::Options),
}

pub fn bench(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Calibrate(configuration) => super::with(&configuration, calibrate::bench),
        Command::Engine(options) => engine::bench(&options),
        Command::Images(options) => images::bench(&options),
        Command::Latency(options) => latency::bench(&options),
        Command::Pipeline(options) => pipeline::bench(options),
    }
}

/// What a measurement of a model without Kafka needs.
#[derive(Args)]
struct ModelOptions {
    /// As `model.source`: a directory, a hub id, or a bundled model
    #[arg(long)]
    model: String,
    /// Cores to use (default: all that the process may use)
    #[arg(long)]
    threads: Option<usize>,
    /// auto, cpu, cuda, cuda:N or metal
    #[arg(long, default_value = "auto")]
    device: String,
    /// auto, f32, bf16, f16 or int8
    #[arg(long, default_value = "auto")]
    dtype: String,
    /// One more setting, as for `run`
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

impl ModelOptions {
    /// The settings of a job with this model. With `threads`, limits the pool of threads of the process to them.
    ///
    /// # Errors
    /// A setting is wrong, or the pool exists already.
    fn settings(&self, format: &str, kind: &str) -> anyhow::Result<Settings> {
        let mut set = vec![
            // Required settings that the measurement does not use.
            "kafka.brokers=none:1".to_owned(),
            "input.topics=none".to_owned(),
            "input.group=none".to_owned(),
            format!("input.format={format}"),
            "output.topic=predictions".to_owned(),
            "dead_letters.topic=dead".to_owned(),
            format!("task.kind={kind}"),
            format!("model.source={}", self.model),
            format!("model.device={}", self.device),
            format!("model.dtype={}", self.dtype),
        ];
        if let Some(threads) = self.threads {
            set.push(format!("batch.lanes={threads}"));
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
        }
        set.extend(self.set.iter().cloned());
        settings(set)
    }
}

fn settings(set: Vec<String>) -> anyhow::Result<Settings> {
    let loaded = settings::load(&Sources { set, ..Sources::default() });
    loaded.map(|loaded| loaded.settings).map_err(|faults| {
        anyhow::anyhow!("{}", faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    })
}
