//! A loaded ONNX model: tract's plan, and batches of the tensors of several records.
//!
//! The graph is prepared once, with its dynamic axes as symbols. If tract cannot prepare it so, it is prepared for each
//! combination of shapes that comes. Records whose tensors have equal shapes are joined along the first axis where that
//! is safe: the first axis of all inputs and outputs is the same symbol, and a trial at the start has shown that rows do
//! not influence each other.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Component, Path};
use std::sync::{Arc, Mutex};

use prost::Message as _;
use tract_onnx::Onnx;
use tract_onnx::pb::ModelProto;
use tract_onnx::prelude::{InferenceModelExt, IntoRunnable};
use tract_onnx::tract_hir::infer::InferenceModel;
use tract_onnx::tract_hir::internal::*;

use super::graph::{Dim, Graph, GraphError, Port};
use super::ml;
use super::tensors::{Cell, Layout, Tensors};
use super::unsupported::unsupported;
use crate::engine::{self, RunError};
use crate::failpoint;
use crate::guard::guarded;
use crate::model::store::{Files, FilesError};
use crate::ragged::Ragged;

type Plan = Arc<TypedRunnableModel>;

/// Plans for shapes that are kept, if the graph cannot be prepared for all shapes.
const PLANS: usize = 16;

/// Sizes of the dynamic axes in a trial, until one succeeds: a convolution needs as many elements as its kernel.
const SAMPLE_SIZES: &[usize] = &[1, 2, 8, 32, 128, 512, 2048];

/// Elements of one tensor within the graph.
const MOST_ELEMENTS: i64 = 1 << 30;

/// How far the outputs of a row alone and beside another may be apart, relative to the largest.
const TOLERANCE: f32 = 1e-3;

#[derive(Debug, thiserror::Error)]
pub enum OnnxError {
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error("{file} {error}")]
    Graph { file: String, error: GraphError },
    #[error("{file} needs operators that kandle does not have: {}", operators.join("; "))]
    Unsupported { file: String, operators: Vec<String> },
    #[error("{file}: {message}")]
    Load { file: String, message: String },
    #[error("{file} has no output {name}; it has {}", known.join(", "))]
    NoOutput { file: String, name: String, known: Vec<String> },
}

/// An output that is computed.
#[derive(Debug, Clone)]
pub struct Computed {
    pub name: String,
    pub kind: DatumType,
    /// Its shape for one row without the rows' axis, if it is always the same.
    pub shape: Option<Vec<usize>>,
    /// Its first axis is that of the rows.
    pub has_rows: bool,
    /// The names of the classes, if this output has their scores as maps.
    pub zipped: Option<Vec<String>>,
}

enum Plans {
    AnyShape(Plan),
    PerShape { model: Box<InferenceModel>, plans: Mutex<HashMap<u64, Plan>> },
}

/// A model that is ready to run.
pub struct OnnxModel {
    pub inputs: Vec<Port>,
    pub outputs: Vec<Computed>,
    plans: Plans,
    /// Some axis takes its size from the record, beside that of the rows.
    has_sizes: bool,
    /// Items may be joined along the first axis.
    joins: bool,
    /// Zeros that the model takes. `None`: no shape was found that it takes.
    sample: Option<Tensors>,
}

/// Reads the graph of a model's file.
///
/// # Errors
/// There is no such file, or it is not an ONNX graph that kandle could run.
pub fn read(files: &Files) -> Result<(String, Graph), OnnxError> {
    let file = files.onnx()?;
    let bytes = files.require(&file)?;
    let proto = ModelProto::decode(&*bytes)
        .map_err(|e| OnnxError::Graph { file: file.clone(), error: GraphError::NotOnnx(e.to_string()) })?;
    let graph = Graph::new(proto).map_err(|error| OnnxError::Graph { file: file.clone(), error })?;
    Ok((file, graph))
}

/// tract's reader of graphs, with kandle's operators.
pub(super) fn framework() -> Onnx {
    let mut framework = tract_onnx::onnx().with_ignore_output_types(true).with_ignore_value_info(true);
    ml::register(&mut framework.op_register);
    framework
}

/// Names of the files beside an ONNX file that hold its tensors.
///
/// # Errors
/// The file is not an ONNX model, or it names a file outside of its folder: a model file must not choose what is read.
pub fn external_files(file: &str, bytes: &[u8]) -> Result<Vec<String>, String> {
    let proto = ModelProto::decode(bytes).map_err(|e| GraphError::NotOnnx(e.to_string()).to_string())?;
    let folder = file.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
    let mut names = Vec::new();
    if let Some(graph) = &proto.graph {
        let attributes = graph.node.iter().flat_map(|node| &node.attribute);
        let tensors = graph.initializer.iter().chain(attributes.filter_map(|attribute| attribute.t.as_ref()));
        for entry in tensors.flat_map(|tensor| &tensor.external_data).filter(|entry| entry.key == "location")
        {
            let is_inside = Path::new(&entry.value)
                .components()
                .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
            if !is_inside {
                return Err(format!("names the file {:?}, which is not in the model's folder", entry.value));
            }
            names.push(format!("{folder}{}", entry.value));
        }
    }
    names.sort();
    names.dedup();
    Ok(names)
}

impl OnnxModel {
    /// Prepares the graph to compute these outputs.
    ///
    /// # Errors
    /// The graph has no such output, or cannot be prepared.
    pub fn new(
        graph: Graph,
        file: &str,
        directory: Option<&Path>,
        outputs: &[String],
    ) -> Result<Self, OnnxError> {
        let failed = |error: TractError| OnnxError::Load { file: file.to_owned(), message: chain(&error) };
        let framework = framework();
        let operators = unsupported(&graph, &framework.op_register);
        if !operators.is_empty() {
            return Err(OnnxError::Unsupported { file: file.to_owned(), operators });
        }
        let mut computed = Vec::new();
        for name in outputs {
            let found = graph.outputs.iter().find(|output| output.name == *name);
            computed.push(found.cloned().ok_or_else(|| OnnxError::NoOutput {
                file: file.to_owned(),
                name: name.clone(),
                known: graph.outputs.iter().map(|output| output.name.clone()).collect(),
            })?);
        }
        let directory = directory.and_then(Path::to_str);
        let parsed = guarded("the model", || framework.parse(&graph.proto, directory))
            .unwrap_or_else(|message| Err(format_err!("{message}")))
            .map_err(failed)?;
        if !parsed.unresolved_inputs.is_empty() {
            let message = format!("nothing makes the tensors {}", parsed.unresolved_inputs.join(", "));
            return Err(OnnxError::Load { file: file.to_owned(), message });
        }
        let mut model = parsed.model;
        let outlet = |name: &str| {
            let of = parsed.outlets_by_name.get(name).copied();
            of.ok_or_else(|| OnnxError::Load {
                file: file.to_owned(),
                message: format!("nothing makes {name}"),
            })
        };
        let inputs: Vec<OutletId> =
            graph.inputs.iter().map(|port| outlet(&port.name)).collect::<Result<_, _>>()?;
        let wanted: Vec<OutletId> = computed.iter().map(|of| outlet(&of.tensor)).collect::<Result<_, _>>()?;
        model.set_input_outlets(&inputs).map_err(failed)?;
        model.select_output_outlets(&wanted).map_err(failed)?;
        drop(graph.proto);

        let prepare = || -> TractResult<(TVec<TypedFact>, Plan)> {
            let typed = model.clone().into_typed()?;
            let facts: TVec<TypedFact> =
                (0..wanted.len()).map(|i| typed.output_fact(i).cloned()).collect::<TractResult<_>>()?;
            Ok((facts, typed.into_optimized()?.into_runnable()?))
        };
        let prepared = guarded("the model", prepare).unwrap_or_else(|message| Err(format_err!("{message}")));
        let (plans, facts) = match prepared {
            Ok((facts, plan)) => (Plans::AnyShape(plan), Some(facts)),
            Err(error) => {
                tracing::debug!(
                    error = chain(&error),
                    "the graph cannot be prepared for all shapes: preparing it for each as it comes"
                );
                (Plans::PerShape { model: Box::new(model), plans: Mutex::default() }, None)
            }
        };
        let has_sizes = graph.inputs.iter().any(|port| port.dims.iter().skip(1).any(|dim| !dim.is_fixed()));
        let mut model =
            Self { inputs: graph.inputs, outputs: Vec::new(), plans, has_sizes, joins: false, sample: None };
        let rows = rows_of(&model.inputs);
        let mut made = None;
        let trials = SAMPLE_SIZES.iter().flat_map(|size| [(*size, 1), (*size, *size)]);
        for (size, inner) in trials {
            let sample = sample(&model.inputs, size, inner);
            let run = ml::leniently(|| model.evaluate(&[&sample]));
            match run {
                Ok(outputs) => {
                    made = Some(outputs);
                    model.sample = Some(sample);
                    break;
                }
                Err(error) if model.inputs.iter().all(|port| port.dims.iter().skip(1).all(Dim::is_fixed)) => {
                    return Err(failed(error));
                }
                Err(error) => tracing::debug!(
                    size,
                    error = chain(&error),
                    "a trial with dynamic axes of this size failed"
                ),
            }
        }
        let outputs: Vec<Computed> = match (facts, made) {
            (Some(facts), _) => computed
                .into_iter()
                .zip(facts)
                .map(|(of, fact)| described(of, &fact, rows.as_ref()))
                .collect(),
            // Their types show in a run.
            (None, Some(made)) => {
                let described = |(of, value): (super::graph::Output, TValue)| Computed {
                    name: of.name,
                    kind: plain(value.datum_type()),
                    shape: None,
                    has_rows: rows.is_some() && value.shape().first() == Some(&1),
                    zipped: of.zipped,
                };
                computed.into_iter().zip(made).map(described).collect()
            }
            (None, None) => {
                let message = "no trial with zeros in any shape has succeeded".to_owned();
                return Err(OnnxError::Load { file: file.to_owned(), message });
            }
        };
        let joins = outputs.iter().all(|output| output.has_rows)
            && matches!(rows, Some(Rows::Symbol(_)))
            && matches!(model.plans, Plans::AnyShape(_));
        model.outputs = outputs;
        if joins && let Some(sample) = &model.sample {
            let other = varied(sample, &model.inputs);
            model.joins = ml::leniently(|| model.rows_are_independent(sample, &other)).map_err(failed)?;
        }
        Ok(model)
    }

    /// Whether records are joined along the first axis.
    pub fn joins(&self) -> bool {
        self.joins
    }

    fn is_sample(&self, item: &Tensors) -> bool {
        match &self.sample {
            Some(sample) => Arc::ptr_eq(&sample.layout, &item.layout),
            None => item.layout.shapes.len() != self.inputs.len(),
        }
    }

    fn plan(&self, layout: &Layout, class: u64) -> TractResult<Plan> {
        match &self.plans {
            Plans::AnyShape(plan) => Ok(Arc::clone(plan)),
            Plans::PerShape { model, plans } => {
                if let Some(plan) = plans.lock().unwrap_or_else(|e| e.into_inner()).get(&class) {
                    return Ok(Arc::clone(plan));
                }
                let mut model = (**model).clone();
                for (i, (port, shape)) in self.inputs.iter().zip(&layout.shapes).enumerate() {
                    model.set_input_fact(i, InferenceFact::dt_shape(port.kind, shape.iter().copied()))?;
                }
                let plan = model.into_optimized()?.into_runnable()?;
                let mut plans = plans.lock().unwrap_or_else(|e| e.into_inner());
                if plans.len() >= PLANS {
                    plans.clear();
                }
                plans.insert(class, Arc::clone(&plan));
                Ok(plan)
            }
        }
    }

    /// Runs items of one class, joined along the first axis if there are several.
    fn evaluate(&self, items: &[&Tensors]) -> TractResult<TVec<TValue>> {
        guarded("the model", || self.evaluate_unguarded(items))
            .unwrap_or_else(|message| Err(format_err!("{message}")))
    }

    fn evaluate_unguarded(&self, items: &[&Tensors]) -> TractResult<TVec<TValue>> {
        let layout = &items[0].layout;
        let plan = self.plan(layout, engine::Item::class(items[0]))?;
        if self.has_sizes {
            self.check_sizes(&plan, layout)?;
        }
        let mut inputs = TVec::new();
        let (mut byte, mut text) = (0, 0);
        for (i, port) in self.inputs.iter().enumerate() {
            let mut shape = layout.shapes[i].clone();
            let elements = layout.elements(i);
            if items.len() > 1 {
                shape[0] *= items.len();
            }
            let tensor = if port.kind == DatumType::String {
                let texts =
                    items.iter().flat_map(|item| &item.texts[text..text + elements]).cloned().collect();
                text += elements;
                tract_ndarray::ArrayD::from_shape_vec(&*shape, texts)
                    .map_err(|error| format_err!("{error}"))?
                    .into_tensor()
            } else {
                let bytes = elements * port.kind.size_of();
                let mut tensor = Tensor::zero_dt(port.kind, &shape)?;
                if bytes > 0 {
                    let parts = tensor.as_bytes_mut().chunks_exact_mut(bytes);
                    parts
                        .zip(items)
                        .for_each(|(part, item)| part.copy_from_slice(&item.bytes[byte..byte + bytes]));
                }
                byte += bytes;
                tensor
            };
            inputs.push(tensor.into_tvalue());
        }
        plan.run(inputs)
    }

    /// Computes the sizes of all tensors of the graph for these inputs.
    ///
    /// # Errors
    /// One is 0 or less, because an axis is shorter than a kernel, or too large to be in memory: tract would panic, or
    /// allocate it.
    fn check_sizes(&self, plan: &Plan, layout: &Layout) -> TractResult<()> {
        let model = plan.model();
        let mut values = SymbolValues::default();
        for (i, shape) in layout.shapes.iter().enumerate() {
            for (dim, size) in model.input_fact(i)?.shape.iter().zip(shape) {
                if let TDim::Sym(symbol) = dim {
                    values.set(symbol, *size as i64);
                }
            }
        }
        for node in model.nodes() {
            for output in &node.outputs {
                let mut elements = 1i64;
                for dim in output.fact.shape.iter() {
                    // Sizes that only a run can tell are left out.
                    let Ok(size) = dim.eval(&values).to_i64() else { continue };
                    // Nothing is left of an axis. An empty constant is none of these.
                    if size <= 0 && dim.to_i64().is_err() {
                        bail!("an axis is too short for {} ({})", node.name, node.op.name());
                    }
                    elements = elements.saturating_mul(size);
                }
                if elements > MOST_ELEMENTS {
                    bail!("{} ({}) would have {elements} elements", node.name, node.op.name());
                }
            }
        }
        Ok(())
    }

    /// Compares the outputs of two rows together with those of each alone.
    fn rows_are_independent(&self, one: &Tensors, other: &Tensors) -> TractResult<bool> {
        let alone = [self.evaluate(&[one])?, self.evaluate(&[other])?];
        let together = self.evaluate(&[one, other])?;
        for (i, both) in together.iter().enumerate() {
            for (row, alone) in alone.iter().enumerate() {
                if both.shape().first() != Some(&2) {
                    return Ok(false);
                }
                let (part, alone) = (both.slice(0, row, row + 1)?, &alone[i]);
                if part.shape() != alone.shape() {
                    return Ok(false);
                }
                if part.datum_type() != DatumType::F32 {
                    continue;
                }
                let (part, alone) = (part.try_as_plain_ram()?, alone.try_as_plain_ram()?);
                let (part, alone) = (part.as_slice::<f32>()?, alone.as_slice::<f32>()?);
                let most = alone.iter().fold(1e-6f32, |most, x| most.max(x.abs()));
                if part.iter().zip(alone).any(|(a, b)| (a - b).abs() > TOLERANCE * most) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// The answers of items that were evaluated together.
    fn answers(&self, items: &[&Tensors], made: &[TValue], answers: &mut Ragged<Cell>) -> TractResult<()> {
        // Of each output and item: the first of its elements and their number.
        let plain_made: Vec<std::borrow::Cow<'_, Tensor>> = made
            .iter()
            .map(|tensor| match tensor.datum_type() {
                of if of != plain(of) => tensor.cast_to_dt(plain(of)),
                _ => Ok(std::borrow::Cow::Borrowed(&**tensor)),
            })
            .collect::<TractResult<_>>()?;
        let mut cells = Vec::new();
        for (i, item) in items.iter().enumerate() {
            cells.clear();
            for (output, tensor) in self.outputs.iter().zip(&plain_made) {
                let elements = tensor.len() / items.len();
                let one_row = item.layout.one_row && output.has_rows;
                if !(one_row && output.shape.is_some()) {
                    let mut shape = tensor.shape().to_vec();
                    if output.has_rows && !shape.is_empty() {
                        shape[0] /= items.len();
                        if one_row {
                            shape.remove(0);
                        }
                    }
                    cells.push(Cell::Size(shape.len() as u32));
                    cells.extend(shape.iter().map(|size| Cell::Size(*size as u32)));
                }
                push(tensor, i * elements..(i + 1) * elements, &mut cells)?;
            }
            answers.push(&cells);
        }
        Ok(())
    }
}

/// Appends the elements of a tensor.
fn push(tensor: &Tensor, range: std::ops::Range<usize>, cells: &mut Vec<Cell>) -> TractResult<()> {
    let view = tensor.try_as_plain_ram()?;
    macro_rules! each {
        ($of:ty, $cell:expr) => {
            cells.extend(view.as_slice::<$of>()?[range].iter().map($cell))
        };
    }
    match tensor.datum_type() {
        DatumType::F32 => each!(f32, |x| Cell::F32(*x)),
        DatumType::F64 => each!(f64, |x| Cell::F64(*x)),
        DatumType::F16 => each!(f16, |x| Cell::F32(x.to_f32())),
        DatumType::I64 => each!(i64, |n| Cell::I64(*n)),
        DatumType::I32 => each!(i32, |n| Cell::I64(i64::from(*n))),
        DatumType::I16 => each!(i16, |n| Cell::I64(i64::from(*n))),
        DatumType::I8 => each!(i8, |n| Cell::I64(i64::from(*n))),
        DatumType::U64 => each!(u64, |n| Cell::U64(*n)),
        DatumType::U32 => each!(u32, |n| Cell::I64(i64::from(*n))),
        DatumType::U16 => each!(u16, |n| Cell::I64(i64::from(*n))),
        DatumType::U8 => each!(u8, |n| Cell::I64(i64::from(*n))),
        DatumType::Bool => each!(bool, |is| Cell::Bool(*is)),
        DatumType::String => {
            view.as_slice::<String>()?[range].iter().for_each(|text| Cell::push_text(text, cells));
        }
        other => bail!("the model has an output of type {other:?}"),
    }
    Ok(())
}

/// The type that an output is read as.
fn plain(of: DatumType) -> DatumType {
    match of {
        DatumType::TDim => DatumType::I64,
        of if of.is_quantized() => of.unquantized(),
        of => of,
    }
}

/// What the first axis of the inputs is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Rows {
    /// The same symbol for all inputs.
    Symbol(String),
    /// Always 1.
    One,
}

fn rows_of(inputs: &[Port]) -> Option<Rows> {
    let of = |port: &Port| match port.dims.first()? {
        Dim::Dynamic(name) => Some(Rows::Symbol(name.clone())),
        Dim::Fixed(1) => Some(Rows::One),
        Dim::Fixed(_) => None,
    };
    let first = of(inputs.first()?)?;
    inputs.iter().all(|port| of(port).as_ref() == Some(&first)).then_some(first)
}

fn described(of: super::graph::Output, fact: &TypedFact, rows: Option<&Rows>) -> Computed {
    let dims = fact.shape.to_tvec();
    let has_rows = match (rows, dims.first()) {
        (Some(Rows::Symbol(name)), Some(first)) => first.to_string() == *name,
        (Some(Rows::One), Some(first)) => first.is_one(),
        _ => false,
    };
    let shape = dims.iter().skip(1).map(|dim| dim.to_usize().ok()).collect::<Option<Vec<usize>>>();
    Computed {
        name: of.name,
        kind: plain(fact.datum_type),
        shape: shape.filter(|_| has_rows),
        has_rows,
        zipped: of.zipped,
    }
}

/// Zeros and empty texts in the declared shapes. Dynamic axes that are last have this size, and others `inner`; that of the
/// rows is always 1.
fn sample(inputs: &[Port], size: usize, inner: usize) -> Tensors {
    let is_rows = |name: &String| {
        inputs.iter().any(|port| matches!(port.dims.first(), Some(Dim::Dynamic(first)) if first == name))
    };
    let shape = |port: &Port| {
        let last = port.dims.len().saturating_sub(1);
        let size = |(axis, dim): (usize, &Dim)| match dim {
            Dim::Fixed(fixed) => *fixed,
            Dim::Dynamic(name) if is_rows(name) => 1,
            Dim::Dynamic(_) if axis == last => size,
            Dim::Dynamic(_) => inner,
        };
        port.dims.iter().enumerate().map(size).collect()
    };
    let shapes: Vec<Vec<usize>> = inputs.iter().map(shape).collect();
    let layout = Layout::new(shapes, true);
    let (mut bytes, mut texts) = (Vec::new(), Vec::new());
    for (i, port) in inputs.iter().enumerate() {
        match port.kind {
            DatumType::String => texts.resize(texts.len() + layout.elements(i), String::new()),
            kind => bytes.resize(bytes.len() + layout.elements(i) * kind.size_of(), 0),
        }
    }
    Tensors { layout: Arc::new(layout), bytes, texts }
}

/// The same shapes with other numbers.
fn varied(sample: &Tensors, inputs: &[Port]) -> Tensors {
    let mut bytes = Vec::with_capacity(sample.bytes.len());
    for (i, port) in inputs.iter().enumerate() {
        for n in 0..sample.layout.elements(i) {
            let x = ((n * 37 + i * 11) % 17) as f32 / 8.0 - 1.0;
            match port.kind {
                DatumType::F32 => bytes.extend(x.to_ne_bytes()),
                DatumType::F64 => bytes.extend(f64::from(x).to_ne_bytes()),
                DatumType::String => {}
                kind => bytes.resize(bytes.len() + kind.size_of(), 0),
            }
        }
    }
    Tensors { layout: Arc::clone(&sample.layout), bytes, texts: sample.texts.clone() }
}

/// An error with its causes, in one line.
fn chain(error: &TractError) -> String {
    let mut all = String::new();
    for (i, cause) in error.chain().enumerate() {
        let cause = cause.to_string();
        let first = cause.lines().next().unwrap_or_default();
        let _ = write!(all, "{}{first}", if i > 0 { ": " } else { "" });
    }
    all
}

impl engine::Model for OnnxModel {
    type Item = Tensors;
    type Value = Cell;

    fn run(&self, batch: &[&Tensors]) -> Result<Ragged<Cell>, RunError> {
        failpoint::pass("device");
        let mut answers = Ragged::with_capacity(batch.len(), 0);
        if let [item] = batch
            && self.is_sample(item)
        {
            // The empty texts and zeros of a probe need not be categories that the model knows.
            if self.sample.is_some() {
                ml::leniently(|| self.evaluate(batch)).map_err(|error| RunError::Batch(chain(&error)))?;
            }
            answers.push(&[]);
            return Ok(answers);
        }
        let most = if self.joins { batch.len() } else { 1 };
        for items in batch.chunks(most.max(1)) {
            let made = self.evaluate(items).and_then(|made| self.answers(items, &made, &mut answers));
            made.map_err(|error| RunError::Batch(chain(&error)))?;
        }
        Ok(answers)
    }

    fn sample(&self, _: u32) -> Tensors {
        match &self.sample {
            Some(Tensors { layout, bytes, texts }) => {
                Tensors { layout: Arc::clone(layout), bytes: bytes.clone(), texts: texts.clone() }
            }
            None => Tensors {
                layout: Arc::new(Layout::new(Vec::new(), true)),
                bytes: Vec::new(),
                texts: Vec::new(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tract_onnx::pb::{GraphProto, StringStringEntryProto, TensorProto};

    #[test]
    fn a_model_does_not_choose_files_outside_of_its_folder() {
        let of = |location: &str| {
            let location = StringStringEntryProto { key: "location".to_owned(), value: location.to_owned() };
            let tensor = TensorProto { external_data: vec![location], ..TensorProto::default() };
            let graph = GraphProto { initializer: vec![tensor], ..GraphProto::default() };
            let proto = ModelProto { graph: Some(graph), ..ModelProto::default() };
            external_files("onnx/model.onnx", &proto.encode_to_vec())
        };
        assert_eq!(of("model.onnx_data"), Ok(vec!["onnx/model.onnx_data".to_owned()]));
        assert_eq!(of("parts/1"), Ok(vec!["onnx/parts/1".to_owned()]));
        for outside in ["/etc/passwd", "../../secret", "parts/../../secret"] {
            assert!(
                of(outside).is_err_and(|message| message.contains("not in the model's folder")),
                "{outside}"
            );
        }
    }
}
