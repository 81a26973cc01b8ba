//! `model pull`, `model show` and `model verify`.

use anyhow::{Context, bail};

use crate::cli::output::outln;
use crate::hex::hex;
use crate::model::text::architecture::Architecture;
use crate::model::{Checkpoint, Digest, Files, Gliner, Model, Output, Placement, vision};
use crate::settings::{Loaded, Settings};
use crate::task::gliner::load_model;
use crate::task::text::Source;
use crate::task::{Family, Kind, forecast, images, suited, tensor};

fn files(loaded: &Loaded) -> anyhow::Result<Files> {
    let kind = Kind::of(loaded.settings.task.kind);
    let Some(wants) = kind.wants() else {
        bail!("task.kind {} has no model", kind.kind.name());
    };
    Files::find_for(&loaded.settings.model, wants)
        .with_context(|| format!("model {}", loaded.settings.model.source.as_deref().unwrap_or_default()))
}

pub fn pull(loaded: Loaded) -> anyhow::Result<()> {
    crate::telemetry::logging::start(&loaded.settings.log);
    let files = files(&loaded)?;
    outln!("{}", files.name());
    for name in files.names()? {
        outln!("  {name}");
    }
    Ok(())
}

pub fn verify(loaded: Loaded) -> anyhow::Result<()> {
    crate::telemetry::logging::start(&loaded.settings.log);
    let settings = &loaded.settings;
    let files = files(&loaded)?;
    let dtype = match Kind::of(settings.task.kind).family {
        Family::Onnx => tensor::DTYPE,
        _ => Placement::choose(settings.model.device, settings.model.dtype)?.dtype_name(),
    };
    let hashes = files.hashes()?;
    let digest = Digest::of(&hashes, settings, dtype)?;
    outln!("{}", files.name());
    for (name, hash) in &hashes {
        outln!("  {}  {name}", hex(hash));
    }
    outln!("digest of these files and of the settings that change a prediction:\n  {}", digest.full());
    digest.check(settings)?;
    match &settings.model.digest {
        Some(_) => outln!("it is the one in model.digest"),
        None => outln!("model.digest is not set: any model is accepted"),
    }
    Ok(())
}

pub fn show(loaded: Loaded) -> anyhow::Result<()> {
    crate::telemetry::logging::start(&loaded.settings.log);
    let settings = &loaded.settings;
    let output = match Kind::of(settings.task.kind).family {
        Family::Onnx => return show_onnx(settings),
        Family::Series => return show_series(settings),
        Family::Vision(output) => return show_vision(settings, output),
        Family::Text(Output::TokenLogits) if Gliner::is(&files(&loaded)?) => return show_gliner(settings),
        Family::Text(output) => output,
        Family::Nothing => bail!("task.kind {} has no model", settings.task.kind.name()),
    };
    let files = files(&loaded)?;
    let name = files.name();
    let placement = Placement::choose(settings.model.device, settings.model.dtype)?;
    let digest = Digest::of(&files.hashes()?, settings, placement.dtype_name())?;
    let tasks = suited(&Checkpoint::read(&files).with_context(|| format!("model {name}"))?).join(", ");
    let model = Model::load(files, placement, output)
        .with_context(|| format!("model {name}, whose heads are for {tasks}"))?;
    let a = model.architecture();
    let mut rows = vec![
        ("model", name),
        ("digest", digest.full().to_owned()),
        ("architecture", a.name.clone()),
        ("tasks", tasks),
        ("layers", layers(a)),
        ("parameters", model.parameters.to_string()),
        ("dtype", model.placement.dtype_name().to_owned()),
        ("device", model.placement.name.clone()),
        ("max tokens", model.tokenizer.max_tokens().to_string()),
    ];
    match output {
        Output::Logits | Output::PairLogits => {
            rows.push(("labels", model.labels.join(", ")));
            rows.push(("scores", model.scores.name().to_owned()));
        }
        Output::TokenLogits => rows.push(("labels", model.labels.join(", "))),
        Output::Embedding => {
            let named: Vec<String> = model.embedding.poolings.iter().map(|of| format!("{of:?}")).collect();
            rows.push(("embedding", model.width().to_string()));
            rows.push(("pooling", named.join(", ").to_lowercase()));
            let layers: Vec<String> = model.embedding.layers.iter().map(ToString::to_string).collect();
            if !layers.is_empty() {
                rows.push(("then", layers.join(", ")));
            }
            rows.push(("normalized", model.embedding.normalize.to_string()));
        }
        Output::Sparse => rows.push(("vocabulary", model.width().to_string())),
    }
    print(rows);
    Ok(())
}

/// The rows of an ONNX model: what `task.inputs` and `task.outputs` can name.
fn show_onnx(settings: &Settings) -> anyhow::Result<()> {
    let tensor::Loaded { files, digest, file, graph, bytes } = tensor::Loaded::find(settings)?;
    let inputs: Vec<String> = graph.inputs.iter().map(ToString::to_string).collect();
    let outputs: Vec<String> = graph.outputs.iter().map(|output| output.name.clone()).collect();
    let operators = graph.unsupported();
    let mut rows = vec![
        ("model", files.name()),
        ("digest", digest.full().to_owned()),
        ("architecture", format!("ONNX, opset {}", graph.opset())),
        ("file", file),
        ("made by", graph.producer()),
        ("bytes", bytes.to_string()),
        ("inputs", inputs.join("; ")),
        ("outputs", outputs.join("; ")),
    ];
    if let Some(classes) = &graph.classes {
        rows.push(("labels", classes.join(", ")));
    }
    if !operators.is_empty() {
        rows.push(("not supported", operators.join("; ")));
    }
    print(rows);
    Ok(())
}

/// The rows of a model of series.
fn show_series(settings: &Settings) -> anyhow::Result<()> {
    let source = Source::find(settings)?;
    let digest = source.digest().full().to_owned();
    let model = forecast::load_model(settings, source)?;
    let config = &model.config;
    let levels: Vec<String> = config.quantiles.iter().map(f64::to_string).collect();
    print(vec![
        ("model", model.files.name()),
        ("digest", digest),
        ("architecture", "Chronos-Bolt".to_owned()),
        ("layers", format!("{}; {} of the decoder", layers(&config.encoder), config.decoder_layers)),
        ("parameters", model.parameters.to_string()),
        ("dtype", model.placement.dtype_name().to_owned()),
        ("device", model.placement.name.clone()),
        ("points read", format!("{}, in patches of {}", config.context, config.patch)),
        ("predicted", format!("{} points in a pass", config.prediction)),
        ("quantiles", levels.join(", ")),
    ]);
    Ok(())
}

/// The rows of a model of images.
fn show_vision(settings: &Settings, output: vision::Output) -> anyhow::Result<()> {
    let source = Source::find(settings)?;
    let digest = source.digest().full().to_owned();
    let model = images::load_model(settings, &source, output)?;
    let mut rows = vec![
        ("model", model.files.name()),
        ("digest", digest),
        ("architecture", model.architecture.clone()),
        ("parameters", model.parameters.to_string()),
        ("dtype", model.placement.dtype_name().to_owned()),
        ("device", model.placement.name.clone()),
        ("pixels", format!("{} × {}", model.preprocess.width, model.preprocess.height)),
    ];
    match output {
        vision::Output::Logits => {
            rows.push(("labels", model.labels.join(", ")));
            rows.push(("scores", model.scores.name().to_owned()));
        }
        vision::Output::Embedding => rows.push(("embedding", model.width().to_string())),
    }
    print(rows);
    Ok(())
}

/// The rows of a checkpoint of GLiNER, whose labels are those of the settings.
fn show_gliner(settings: &Settings) -> anyhow::Result<()> {
    let source = Source::find(settings)?;
    let digest = source.digest().full().to_owned();
    let tasks = suited(&Checkpoint::read(&source.files)?).join(", ");
    let model = load_model(settings, source)?;
    let a = model.architecture();
    print(vec![
        ("model", model.files.name()),
        ("digest", digest),
        ("architecture", format!("GLiNER on {}", a.name)),
        ("tasks", tasks),
        ("layers", layers(a)),
        ("parameters", model.parameters.to_string()),
        ("dtype", model.placement.dtype_name().to_owned()),
        ("device", model.placement.name.clone()),
        ("max tokens", format!("{}, {} of which the labels take", model.max_tokens(), model.prompt_tokens())),
        ("max words", format!("{}, of an entity {}", model.max_words, model.max_width)),
        ("labels", settings.task.labels.join(", ")),
    ]);
    Ok(())
}

fn layers(a: &Architecture) -> String {
    let heads = match (a.heads.queries, a.heads.keys) {
        (queries, keys) if queries == keys => format!("{queries} heads"),
        (queries, keys) => format!("{queries} heads of queries, {keys} of keys"),
    };
    format!("{}, {} wide, {heads}", a.layers.len(), a.hidden)
}

fn print(rows: Vec<(&str, String)>) {
    for (name, value) in rows {
        outln!("{name:14}{value}");
    }
}
