//! `bench`: measures the engine alone, or the pipeline on a broker.

mod calibrate;
mod engine;
mod images;
mod latency;
mod pipeline;
mod topics;

use clap::Subcommand;

use crate::settings::{self, Settings, Sources};

#[derive(Subcommand)]
pub enum Command {
    /// Find the best number of tokens per batch for this model and device, and store it for later starts
    Calibrate(super::Configuration),
    /// Measure a model over a file of texts, including tokenising, without Kafka
    Engine(engine::Options),
    /// Measure a model over image files, including decoding and preprocessing, without Kafka
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

fn settings(set: Vec<String>) -> anyhow::Result<Settings> {
    let loaded = settings::load(&Sources { set, ..Sources::default() });
    loaded.map(|loaded| loaded.settings).map_err(|faults| {
        anyhow::anyhow!("{}", faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    })
}
