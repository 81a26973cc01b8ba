//! Operators on matrices of numbers: Scaler, Imputer, Normalizer, Binarizer.

use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;

use super::{Built, Operator, Shape, built, elements, floats, tensor};

/// The size of the last axis; 1 for a scalar.
fn columns(shape: &[usize]) -> usize {
    shape.last().copied().unwrap_or(1).max(1)
}

/// One value for all columns, or one for each.
fn each(values: &[f32], column: usize) -> f32 {
    if values.len() == 1 { values[0] } else { values[column] }
}

fn check(name: &str, values: usize, columns: usize) -> TractResult<()> {
    if values != 1 && values != columns {
        bail!("{name} has {values} values for {columns} columns");
    }
    Ok(())
}

#[derive(Debug)]
struct Scaler {
    offset: Vec<f32>,
    scale: Vec<f32>,
}

pub fn scaler(node: &NodeProto) -> Built {
    let values = |name, unset| -> TractResult<Vec<f32>> {
        Ok(node.get_attr_opt_vec::<f32>(name)?.filter(|all| !all.is_empty()).unwrap_or_else(|| vec![unset]))
    };
    built(Scaler { offset: values("offset", 0.0)?, scale: values("scale", 1.0)? })
}

impl Operator for Scaler {
    fn name(&self) -> &'static str {
        "Scaler"
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        Ok(tvec!((DatumType::F32, inputs[0].1.clone())))
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let columns = columns(inputs[0].shape());
        check("offset", self.offset.len(), columns)?;
        check("scale", self.scale.len(), columns)?;
        let scaled = floats(&inputs[0])?
            .chunks(columns)
            .flat_map(|row| row.iter().enumerate())
            .map(|(i, x)| (x - each(&self.offset, i)) * each(&self.scale, i))
            .collect();
        Ok(tvec!(tensor(inputs[0].shape(), scaled)?))
    }
}

#[derive(Debug)]
enum Imputer {
    Floats { replaced: f32, by: Vec<f32> },
    Integers { replaced: i64, by: Vec<i64> },
}

pub fn imputer(node: &NodeProto) -> Built {
    let floats = node.get_attr_opt_vec::<f32>("imputed_value_floats")?.unwrap_or_default();
    let integers = node.get_attr_opt_vec::<i64>("imputed_value_int64s")?.unwrap_or_default();
    built(match (floats.is_empty(), integers.is_empty()) {
        (false, true) => Imputer::Floats {
            replaced: node.get_attr_opt("replaced_value_float")?.unwrap_or(0.0),
            by: floats,
        },
        (true, false) => Imputer::Integers {
            replaced: node.get_attr_opt("replaced_value_int64")?.unwrap_or(0),
            by: integers,
        },
        _ => bail!("Imputer needs either imputed_value_floats or imputed_value_int64s"),
    })
}

impl Operator for Imputer {
    fn name(&self) -> &'static str {
        "Imputer"
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        let of = match self {
            Self::Floats { .. } => DatumType::F32,
            Self::Integers { .. } => DatumType::I64,
        };
        Ok(tvec!((of, inputs[0].1.clone())))
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let shape = inputs[0].shape();
        let columns = columns(shape);
        Ok(tvec!(match self {
            Self::Floats { replaced, by } => {
                check("imputed_value_floats", by.len(), columns)?;
                let mut values = floats(&inputs[0])?.into_owned();
                for row in values.chunks_mut(columns) {
                    for (i, x) in row.iter_mut().enumerate() {
                        if *x == *replaced || x.is_nan() && replaced.is_nan() {
                            *x = each(by, i);
                        }
                    }
                }
                tensor(shape, values)?
            }
            Self::Integers { replaced, by } => {
                check("imputed_value_int64s", by.len(), columns)?;
                let mut values = elements::<i64>(&*inputs[0].cast_to::<i64>()?)?.to_vec();
                for row in values.chunks_mut(columns) {
                    for (i, x) in row.iter_mut().enumerate().filter(|(_, x)| **x == *replaced) {
                        *x = if by.len() == 1 { by[0] } else { by[i] };
                    }
                }
                tensor(shape, values)?
            }
        }))
    }
}

#[derive(Debug, Clone, Copy)]
enum Norm {
    Max,
    L1,
    L2,
}

#[derive(Debug)]
struct Normalizer(Norm);

pub fn normalizer(node: &NodeProto) -> Built {
    built(Normalizer(match node.get_attr_opt::<&str>("norm")?.unwrap_or("MAX") {
        "MAX" => Norm::Max,
        "L1" => Norm::L1,
        "L2" => Norm::L2,
        other => bail!("norm {other} is not one of ONNX's"),
    }))
}

impl Operator for Normalizer {
    fn name(&self) -> &'static str {
        "Normalizer"
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        Ok(tvec!((DatumType::F32, inputs[0].1.clone())))
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let mut values = floats(&inputs[0])?.into_owned();
        for row in values.chunks_mut(columns(inputs[0].shape())) {
            let norm = match self.0 {
                Norm::Max => row.iter().copied().fold(f32::NEG_INFINITY, f32::max),
                Norm::L1 => row.iter().map(|x| x.abs()).sum(),
                Norm::L2 => row.iter().map(|x| x * x).sum::<f32>().sqrt(),
            };
            if norm != 0.0 {
                row.iter_mut().for_each(|x| *x /= norm);
            }
        }
        Ok(tvec!(tensor(inputs[0].shape(), values)?))
    }
}

#[derive(Debug)]
struct Binarizer {
    threshold: f32,
}

pub fn binarizer(node: &NodeProto) -> Built {
    built(Binarizer { threshold: node.get_attr_opt("threshold")?.unwrap_or(0.0) })
}

impl Operator for Binarizer {
    fn name(&self) -> &'static str {
        "Binarizer"
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        Ok(tvec!((DatumType::F32, inputs[0].1.clone())))
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let over = |x: &f32| if *x > self.threshold { 1.0f32 } else { 0.0 };
        Ok(tvec!(tensor(inputs[0].shape(), floats(&inputs[0])?.iter().map(over).collect())?))
    }
}
