//! An ONNX graph before it is loaded: its inputs and outputs, the names of its classes, and what is rewritten for tract.
//!
//! `ZipMap` makes a list of maps of a matrix, which tract has no type for: the graph is cut before it, and the names of
//! its classes are kept.

use std::collections::HashSet;
use std::fmt;

use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, type_proto};
use tract_onnx::tract_hir::internal::DatumType;

use super::unsupported::unsupported;

/// The symbol for the first axis of inputs that do not name it. No exporter uses this name.
pub(super) const ROWS: &str = "kandle_rows";

/// A dimension of an input, as the graph declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dim {
    Fixed(usize),
    /// Any size; equal names are equal sizes.
    Dynamic(String),
}

impl Dim {
    pub fn is_fixed(&self) -> bool {
        matches!(self, Self::Fixed(_))
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(size) => write!(f, "{size}"),
            Self::Dynamic(name) if name.starts_with(ROWS) => f.write_str("?"),
            Self::Dynamic(name) => f.write_str(name),
        }
    }
}

/// An input of the graph that a run needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    pub name: String,
    pub kind: DatumType,
    pub dims: Vec<Dim>,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.dims.iter().map(Dim::to_string).collect();
        write!(f, "{}: {}[{}]", self.name, type_name(self.kind), dims.join(", "))
    }
}

/// ONNX's name of an element type.
pub fn type_name(kind: DatumType) -> &'static str {
    match kind {
        DatumType::Bool => "bool",
        DatumType::U8 => "uint8",
        DatumType::U16 => "uint16",
        DatumType::U32 => "uint32",
        DatumType::U64 => "uint64",
        DatumType::I8 => "int8",
        DatumType::I16 => "int16",
        DatumType::I32 => "int32",
        DatumType::I64 | DatumType::TDim => "int64",
        DatumType::F16 => "float16",
        DatumType::F32 => "float",
        DatumType::F64 => "double",
        DatumType::String => "string",
        _ => "a type without a name",
    }
}

/// An output of the graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    pub name: String,
    /// The tensor that has it: another one if it was a `ZipMap`'s.
    pub tensor: String,
    /// The names of the classes, if this output has their scores as maps.
    pub zipped: Option<Vec<String>>,
}

/// A graph and what is known of it.
#[derive(Debug, Clone)]
pub struct Graph {
    pub(super) proto: ModelProto,
    pub inputs: Vec<Port>,
    pub outputs: Vec<Output>,
    /// The names of the classes of its last classifier.
    pub classes: Option<Vec<String>>,
}

/// Why a graph cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    #[error("is not an ONNX model: {0}")]
    NotOnnx(String),
    #[error("has no graph")]
    Empty,
    #[error("input {0} is not a tensor of a type that kandle reads")]
    Input(String),
    #[error("output {0} is neither a tensor nor made by ZipMap")]
    Output(String),
    #[error("functions of the model itself are not supported: {}", .0.join(", "))]
    Functions(Vec<String>),
}

impl Graph {
    /// # Errors
    /// The graph has inputs or outputs that are not tensors.
    pub fn new(mut proto: ModelProto) -> Result<Self, GraphError> {
        let functions: Vec<String> =
            proto.functions.iter().map(|of| of.name.clone().unwrap_or_default()).collect();
        if !functions.is_empty() {
            return Err(GraphError::Functions(functions));
        }
        let graph = proto.graph.as_mut().ok_or(GraphError::Empty)?;
        unique_names(graph, &mut HashSet::new());
        let outputs = outputs(graph)?;
        let classes = classes(graph, &outputs);
        let initializers: Vec<&str> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
        let is_input = |input: &&mut ValueInfoProto| !initializers.contains(&input.name.as_str());
        let inputs =
            graph.input.iter_mut().filter(is_input).map(port).collect::<Result<Vec<Port>, GraphError>>()?;
        Ok(Self { proto, inputs, outputs, classes })
    }

    /// The version of ONNX's own operators.
    pub fn opset(&self) -> i64 {
        let own = |domain: &str| domain.is_empty() || domain == "ai.onnx";
        self.proto
            .opset_import
            .iter()
            .filter(|set| own(&set.domain))
            .map(|set| set.version)
            .max()
            .unwrap_or(0)
    }

    /// Which program wrote the file, with its version.
    pub fn producer(&self) -> String {
        format!("{} {}", self.proto.producer_name, self.proto.producer_version).trim().to_owned()
    }

    /// Operators that neither tract nor kandle has, each with some of its nodes.
    pub fn unsupported(&self) -> Vec<String> {
        unsupported(self, &super::model::framework().op_register)
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = &NodeProto> {
        self.proto.graph.iter().flat_map(|graph| &graph.node)
    }

    /// Makes an input a constant of the graph: its elements in this shape, as bytes or texts.
    ///
    /// # Panics
    /// If the graph has no such input.
    pub fn fix(&mut self, input: &str, shape: &[usize], bytes: Vec<u8>, texts: Vec<String>) {
        let place = self.inputs.iter().position(|port| port.name == input).expect("an input of the graph");
        let port = self.inputs.remove(place);
        let graph = self.proto.graph.as_mut().expect("a graph was checked to be there");
        let declared = graph.input.iter().find(|value| value.name == input);
        let kind = declared.and_then(|value| match value.r#type.as_ref()?.value.as_ref()? {
            type_proto::Value::TensorType(tensor) => Some(tensor.elem_type),
        });
        graph.initializer.push(TensorProto {
            name: port.name,
            dims: shape.iter().map(|size| *size as i64).collect(),
            data_type: kind.unwrap_or_default(),
            raw_data: bytes,
            string_data: texts.into_iter().map(String::into_bytes).collect(),
            ..TensorProto::default()
        });
    }
}

/// Gives a name of its own to each node that shares one with another, in the graph and its bodies: tract tells nodes apart
/// by their names.
fn unique_names(graph: &mut GraphProto, seen: &mut HashSet<String>) {
    for node in &mut graph.node {
        let named = if node.name.is_empty() { node.output.first() } else { Some(&node.name) };
        let name = named.cloned().unwrap_or_default();
        if !seen.insert(name.clone()) {
            node.name = format!("{name}.{}", seen.len());
            seen.insert(node.name.clone());
        }
        for attribute in &mut node.attribute {
            for body in attribute.g.iter_mut().chain(&mut attribute.graphs) {
                unique_names(body, seen);
            }
        }
    }
}

/// Reads an input and names its dynamic axes.
fn port(input: &mut ValueInfoProto) -> Result<Port, GraphError> {
    let name = input.name.clone();
    let refused = || GraphError::Input(name.clone());
    let Some(type_proto::Value::TensorType(tensor)) = input.r#type.as_mut().and_then(|of| of.value.as_mut())
    else {
        return Err(refused());
    };
    let of = tract_onnx::pb::tensor_proto::DataType::try_from(tensor.elem_type).map_err(|_| refused())?;
    let kind = DatumType::try_from(of).map_err(|_| refused())?;
    let shape = tensor.shape.get_or_insert_default();
    let mut dims = Vec::with_capacity(shape.dim.len());
    for (axis, dim) in shape.dim.iter_mut().enumerate() {
        dims.push(match &dim.value {
            Some(dimension::Value::DimValue(size)) if *size > 0 => Dim::Fixed(*size as usize),
            Some(dimension::Value::DimParam(symbol)) if is_name(symbol) => Dim::Dynamic(symbol.clone()),
            _ => {
                let symbol = match axis {
                    0 => ROWS.to_owned(),
                    // An axis of its own.
                    _ => format!("{ROWS}_{axis}_{}", symbol_of(&name)),
                };
                *dim = Dimension {
                    value: Some(dimension::Value::DimParam(symbol.clone())),
                    ..Dimension::default()
                };
                Dim::Dynamic(symbol)
            }
        });
    }
    Ok(Port { name, kind, dims })
}

/// A name, and not an expression or a placeholder for an unknown size.
fn is_name(symbol: &str) -> bool {
    let mut chars = symbol.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
        && !symbol.starts_with("unk__")
}

fn symbol_of(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

/// The outputs, after the graph was cut before each `ZipMap`.
fn outputs(graph: &mut GraphProto) -> Result<Vec<Output>, GraphError> {
    let mut outputs = Vec::with_capacity(graph.output.len());
    for output in &mut graph.output {
        let name = output.name.clone();
        let made = graph.node.iter().find(|node| node.op_type == "ZipMap" && node.output.contains(&name));
        let Some(zip) = made else {
            if output.r#type.as_ref().is_some_and(|of| of.value.is_none()) {
                return Err(GraphError::Output(name));
            }
            outputs.push(Output { tensor: name.clone(), name, zipped: None });
            continue;
        };
        let tensor = zip.input.first().cloned().ok_or_else(|| GraphError::Output(name.clone()))?;
        let zipped = labels(zip).ok_or_else(|| GraphError::Output(name.clone()))?;
        *output = ValueInfoProto { name: tensor.clone(), ..ValueInfoProto::default() };
        outputs.push(Output { name, tensor, zipped: Some(zipped) });
    }
    graph.node.retain(|node| node.op_type != "ZipMap");
    Ok(outputs)
}

/// The classes that a node names.
fn labels(node: &NodeProto) -> Option<Vec<String>> {
    node.attribute.iter().find_map(|attribute| match attribute.name.as_str() {
        "classlabels_strings" if !attribute.strings.is_empty() => {
            Some(attribute.strings.iter().map(|label| String::from_utf8_lossy(label).into_owned()).collect())
        }
        "classlabels_int64s" | "classlabels_ints" if !attribute.ints.is_empty() => {
            Some(attribute.ints.iter().map(ToString::to_string).collect())
        }
        _ => None,
    })
}

fn classes(graph: &GraphProto, outputs: &[Output]) -> Option<Vec<String>> {
    let zipped = outputs.iter().find_map(|output| output.zipped.clone());
    zipped.or_else(|| graph.node.iter().rev().find_map(labels))
}

#[cfg(test)]
mod tests {
    use tract_onnx::pb::tensor_proto::DataType;
    use tract_onnx::pb::{AttributeProto, TensorShapeProto, TypeProto};

    use super::*;

    fn value(name: &str, dims: &[Option<dimension::Value>]) -> ValueInfoProto {
        let dim =
            dims.iter().map(|value| Dimension { value: value.clone(), ..Dimension::default() }).collect();
        let tensor =
            type_proto::Tensor { elem_type: DataType::Float as i32, shape: Some(TensorShapeProto { dim }) };
        ValueInfoProto {
            name: name.to_owned(),
            r#type: Some(TypeProto {
                value: Some(type_proto::Value::TensorType(tensor)),
                ..TypeProto::default()
            }),
            ..ValueInfoProto::default()
        }
    }

    #[test]
    fn zip_maps_are_cut_and_dynamic_axes_get_names() {
        let zip = NodeProto {
            op_type: "ZipMap".to_owned(),
            input: vec!["scores".to_owned()],
            output: vec!["maps".to_owned()],
            attribute: vec![AttributeProto {
                name: "classlabels_int64s".to_owned(),
                ints: vec![0, 7],
                ..AttributeProto::default()
            }],
            ..NodeProto::default()
        };
        let of = |size| Some(dimension::Value::DimValue(size));
        let named = |name: &str| Some(dimension::Value::DimParam(name.to_owned()));
        let graph = GraphProto {
            node: vec![zip],
            input: vec![value("a", &[None, of(3)]), value("b/c", &[named("batch"), named("x + 1")])],
            output: vec![ValueInfoProto { name: "maps".to_owned(), ..ValueInfoProto::default() }],
            ..GraphProto::default()
        };
        let graph = Graph::new(ModelProto { graph: Some(graph), ..ModelProto::default() }).unwrap();
        let shown: Vec<String> = graph.inputs.iter().map(Port::to_string).collect();
        assert_eq!(shown, ["a: float[?, 3]", "b/c: float[batch, ?]"]);
        assert_eq!(graph.inputs[0].dims[0], Dim::Dynamic(ROWS.to_owned()));
        assert_ne!(graph.inputs[1].dims[1], graph.inputs[0].dims[0]);
        assert_eq!(graph.outputs[0].zipped, Some(vec!["0".to_owned(), "7".to_owned()]));
        assert_eq!((graph.outputs[0].name.as_str(), graph.outputs[0].tensor.as_str()), ("maps", "scores"));
        assert_eq!(graph.nodes().count(), 0);
    }
}
