//! tensor: any ONNX model over numbers, texts and arrays of a record. `{"outputs":{name: values, …}}`, or
//! `{"label":…,"score":…,"scores":{…}}` of a classifier (`task.as: classification`).

#[cfg(test)]
mod golden;
mod inputs;
mod outputs;
mod scan;

use std::sync::Arc;

use self::inputs::Inputs;
use self::outputs::Form;
use super::classification;
use super::kinds::{Family, Kind, Reads, labels_rule};
use super::{Task, TaskError};
use crate::codec::write::Writer;
use crate::codec::write::schema::{Field, Type};
use crate::codec::{Decoder, DecoderError, Input, Select};
use crate::compute::{About, Batched, Compute, Pace};
use crate::engine::{Calibrations, Engine, Limits, Model as _, Place, Rows};
use crate::model::onnx::{self, Cell, Graph, OnnxError, OnnxModel, Tensors};
use crate::model::{Digest, Files, Placement, Wants};
use crate::record::RecordError;
use crate::settings::{
    self, Activation, DeviceChoice, Dtype, Settings, TaskKind, TensorForm, TensorInput, check_pointer,
};
use crate::telemetry::Metrics;
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("tensor"),
    prediction: "`{\"outputs\":{name: values, …}}` of any ONNX model; with `as: classification` as text-classification",
    fields,
    shows: |task| match task.form {
        TensorForm::Tensor => Shows::Nothing,
        TensorForm::Classification => Shows::Label { all: task.top_k.is_none() },
    },
    keys: &["inputs", "outputs", "defaults", "as", "activation", "labels", "top_k", "cache"],
    pointers: &[],
    overflow: &[],
    check: rules,
    family: Family::Onnx,
    reads: Reads::Tensors,
    load,
};

fn fields(task: &settings::Task) -> Vec<Field> {
    match task.form {
        TensorForm::Classification => classification::fields(task),
        TensorForm::Tensor => {
            vec![Field::new(
                4,
                "outputs",
                Type::map(Type::Json),
                "The values of each output, as nested lists",
            )]
        }
    }
}

fn rules(task: &settings::Task) -> Vec<(&'static str, String)> {
    let mut problems = Vec::new();
    for (name, input) in &task.inputs {
        let pointers = match input {
            TensorInput::Pointer(pointer) => std::slice::from_ref(pointer),
            TensorInput::Pointers(pointers) => {
                if pointers.is_empty() {
                    problems.push(("inputs", format!("{name} has an empty list of pointers")));
                }
                pointers
            }
            TensorInput::Value { .. } | TensorInput::Constant(_) => &[],
        };
        for message in pointers.iter().filter_map(|pointer| check_pointer(pointer).err()) {
            problems.push(("inputs", format!("{name}: {message} A constant text is written {{ value: … }}")));
        }
    }
    if task.form != TensorForm::Classification {
        let needs = "has no effect without as: classification".to_owned();
        if task.activation != Activation::None {
            problems.push(("activation", needs.clone()));
        }
        if !task.labels.is_empty() {
            problems.push(("labels", needs.clone()));
        }
        if task.top_k.is_some() {
            problems.push(("top_k", needs));
        }
    } else if task.outputs.len() > 1 {
        problems.push(("outputs", "as: classification takes one output: the scores".to_owned()));
    }
    problems.extend(labels_rule(task));
    problems
}

/// What is loaded for a configuration, without the engine: for `model show` too.
pub struct Loaded {
    pub files: Files,
    pub digest: Digest,
    pub file: String,
    pub graph: Graph,
    pub bytes: u64,
}

impl Loaded {
    /// # Errors
    /// The settings ask for what ONNX models cannot do, or the file cannot be read.
    pub fn find(settings: &Settings) -> Result<Self, TaskError> {
        let model = settings.model.source.clone().unwrap_or_default();
        let failed = |error| TaskError::Files { model: model.clone(), error };
        if !matches!(settings.model.device, DeviceChoice::Auto | DeviceChoice::Cpu) {
            let message = "an ONNX model runs on the CPU: set auto or cpu".to_owned();
            return Err(TaskError::Setting { key: "model.device", message });
        }
        if !matches!(settings.model.dtype, Dtype::Auto | Dtype::F32) {
            let message = "an ONNX model has its own precision: set auto".to_owned();
            return Err(TaskError::Setting { key: "model.dtype", message });
        }
        let files = Files::find_for(&settings.model, Wants::Onnx).map_err(failed)?;
        let digest = Digest::new(Some(&files), settings, DTYPE).map_err(failed)?;
        let (file, graph) =
            onnx::read(&files).map_err(|error| TaskError::Onnx { model: model.clone(), error })?;
        let bytes = (files.names().map_err(failed)?.iter())
            .filter_map(|name| files.open(name).ok()?.len().ok())
            .sum();
        Ok(Self { files, digest, file, graph, bytes })
    }
}

/// The precision of an ONNX model is its own.
pub const DTYPE: &str = "onnx";

/// Cost of a batch on a CPU core, in the unit of [`Tensors`]: a thousand records of a table, or one image.
const CORE_COST: usize = 1024;

fn load(settings: &Settings, metrics: &Arc<Metrics>) -> Result<Arc<dyn Compute>, TaskError> {
    let placement = Placement::choose(DeviceChoice::Cpu, Dtype::F32)?;
    let Loaded { files, digest, file, mut graph, bytes } = Loaded::find(settings)?;
    let task = &settings.task;
    let model = files.source.clone();
    let failed = |error: OnnxError| TaskError::Onnx { model: model.clone(), error };
    let (inputs, pointers) = Inputs::new(&mut graph, task)?;
    let chosen = outputs::chosen(&graph, task)?;
    let (opset, classes) = (graph.opset(), graph.classes.clone());
    let onnx = OnnxModel::new(graph, &file, files.directory(), &chosen).map_err(failed)?;
    let form = Form::new(&onnx, classes, task)?;
    let about = About {
        kind: task.kind,
        model: files.name(),
        architecture: format!("ONNX, opset {opset}"),
        digest,
        device: placement.name.clone(),
        dtype: DTYPE.to_owned(),
        host_memory: bytes,
    };
    let limits = Limits {
        max_cost: settings.batch.max_tokens,
        calibrated: Calibrations::here()
            .and_then(|c| c.get(about.digest.short(), &about.device))
            .or(Some(CORE_COST)),
        lanes: settings.batch.lanes,
        timeout: settings.batch.timeout.0,
        cache: task.cache.map(|bytes| bytes.0),
    };
    let place = Place { name: about.device.clone(), is_cpu: true };
    let engine = Engine::new(Arc::new(onnx), place, limits, Arc::clone(metrics));
    let first = engine.run(vec![engine.model().sample(1)]).map_err(|e| TaskError::Forward(e.to_string()))?;
    if let Some((_, message)) = first.failed.into_iter().next() {
        return Err(TaskError::Forward(message));
    }
    Ok(Arc::new(Batched {
        about,
        decoder: Decoder::new(settings, Select::new(settings, pointers).map_err(DecoderError::from)?)?,
        writer: Writer::new(settings),
        task: Tensor { inputs, form },
        pace: Pace::new(first.busy.as_secs_f64()),
        engine,
        metrics: Arc::clone(metrics),
    }))
}

struct Tensor {
    inputs: Inputs,
    form: Form,
}

impl Task for Tensor {
    type Item = Tensors;
    type Value = Cell;
    /// Whether the record left the axis of the rows out.
    type Kept = bool;

    fn prepare(&self, input: &Input<'_>, items: &mut Vec<Tensors>) -> Result<bool, RecordError> {
        let item = self.inputs.read(&input.values)?;
        let one_row = item.layout.one_row;
        items.push(item);
        Ok(one_row)
    }

    fn predict(&self, one_row: &bool, answers: Rows<'_, Cell>, out: &mut Vec<u8>) -> Result<(), RecordError> {
        self.form.write(answers.only(), *one_row, out)
    }

    fn labels(&self) -> Option<Vec<String>> {
        self.form.labels()
    }

    fn footprint(&self, value: &[u8]) -> usize {
        self.inputs.bytes(value) + self.form.bytes(value)
    }
}
