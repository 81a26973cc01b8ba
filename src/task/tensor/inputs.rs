//! From a record to the tensors of the model's inputs. Where each comes from is checked against the graph at the start.

use std::sync::Arc;

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::scan::{Element, Elements, Scan};
use crate::codec::json::missing;
use crate::model::onnx::{Dim, Graph, Layout, Port, Tensors};
use crate::record::{Fault, RecordError};
use crate::settings::{self, TensorInput};
use crate::task::TaskError;

/// The inputs of a model, and how a record fills them.
pub struct Inputs {
    sources: Vec<Source>,
    /// The tensors of a record that leaves the axis of the rows out, if their shapes are always the same.
    usual: Option<Arc<Layout>>,
    /// Bytes of the tensors of such a record.
    usual_bytes: usize,
}

struct Source {
    port: Port,
    from: Origin,
    /// Shape of one row without the rows' axis, or of the whole input if it has no such axis; 0 for a dynamic axis.
    row: Vec<usize>,
    /// The first axis may be left out.
    has_rows: bool,
    /// Product of the fixed axes of a row.
    fixed: usize,
    /// Dynamic axes of a row.
    dynamic: usize,
    /// More elements than this are too many, in one value or in a column.
    most: usize,
    most_of_column: usize,
}

enum Origin {
    /// Columns: the values at these pointers, one after the other.
    Columns(Vec<Column>),
    /// The value at one pointer, with its shape.
    Value(Column),
    /// The same for every record: its shape and elements.
    Constant(Vec<usize>, Elements),
}

/// A pointer and its place in [`crate::codec::Input::values`].
struct Column {
    pointer: String,
    place: usize,
    missing: Option<Element>,
}

fn wrong(message: String) -> TaskError {
    TaskError::Setting { key: "task.inputs", message }
}

impl Inputs {
    /// The inputs of a graph by `task.inputs`, and the pointers that they read. Constants that are the same for all rows
    /// become part of the graph.
    ///
    /// # Errors
    /// `task.inputs` or `task.defaults` do not fit the graph.
    pub fn new(graph: &mut Graph, task: &settings::Task) -> Result<(Self, Vec<String>), TaskError> {
        let known: Vec<String> = graph.inputs.iter().map(Port::to_string).collect();
        let unknown = task.inputs.keys().find(|name| graph.inputs.iter().all(|port| port.name != **name));
        if let Some(name) = unknown {
            return Err(wrong(format!("the model has no input {name}; it has {}", known.join(", "))));
        }
        let mut pointers = Vec::new();
        let (mut sources, mut fixed) = (Vec::new(), Vec::new());
        let mut used = Vec::new();
        for port in &graph.inputs {
            let mut source = Source::new(port.clone());
            let mut column = |pointer: &str| -> Result<Column, TaskError> {
                let place = pointers.len();
                pointers.push(pointer.to_owned());
                let key = [pointer, &port.name].into_iter().find(|key| task.defaults.contains_key(*key));
                let missing = match key {
                    None => None,
                    Some(key) => {
                        used.push(key.to_owned());
                        let of = Scan::default_of(port.kind, &task.defaults[key]);
                        let message = |e| format!("{key} {e}");
                        Some(
                            of.map_err(|e| TaskError::Setting { key: "task.defaults", message: message(e) })?,
                        )
                    }
                };
                Ok(Column { pointer: pointer.to_owned(), place, missing })
            };
            source.from = match task.inputs.get(&port.name) {
                None => {
                    Origin::Value(column(&format!("/{}", port.name.replace('~', "~0").replace('/', "~1")))?)
                }
                Some(TensorInput::Pointer(pointer)) => Origin::Value(column(pointer)?),
                Some(TensorInput::Pointers(pointers)) => {
                    if source.dynamic == 0 && pointers.len() > source.fixed {
                        let message = format!(
                            "{} takes {} values of a record, and {} pointers are listed",
                            port,
                            source.fixed,
                            pointers.len()
                        );
                        return Err(wrong(message));
                    }
                    Origin::Columns(pointers.iter().map(|pointer| column(pointer)).collect::<Result<_, _>>()?)
                }
                Some(TensorInput::Value { value } | TensorInput::Constant(value)) => {
                    let (shape, elements, whole) = source.constant(value)?;
                    if whole || !matches!(port.dims.first(), Some(Dim::Dynamic(_))) {
                        fixed.push((port.name.clone(), shape, elements));
                        continue;
                    }
                    Origin::Constant(shape, elements)
                }
            };
            sources.push(source);
        }
        if let Some(key) = task.defaults.keys().find(|key| !used.contains(key)) {
            let message = format!("{key} is neither an input of the model nor a pointer in task.inputs");
            return Err(TaskError::Setting { key: "task.defaults", message });
        }
        for (name, shape, Elements { bytes, texts }) in fixed {
            graph.fix(&name, &shape, bytes, texts);
        }
        if sources.is_empty() {
            return Err(wrong(
                "the model reads nothing of a record: all of its inputs are constants".to_owned(),
            ));
        }
        let usual = sources.iter().all(|source| source.dynamic == 0).then(|| {
            Arc::new(Layout::new(
                sources.iter().map(|source| source.with_rows(source.row.clone())).collect(),
                true,
            ))
        });
        let bytes = |source: &Source| source.fixed * source.port.kind.size_of().max(1);
        let usual_bytes = sources.iter().map(bytes).sum();
        Ok((Self { sources, usual, usual_bytes }, pointers))
    }

    /// The tensors of a record, from the values at the pointers.
    ///
    /// # Errors
    /// A value is missing, or does not fit its input.
    pub fn read(&self, values: &[Option<Cow<'_, RawValue>>]) -> Result<Tensors, RecordError> {
        let mut elements = Elements { bytes: Vec::with_capacity(self.usual_bytes), texts: Vec::new() };
        // Shapes are collected only once one is not the usual.
        let mut shapes: Option<Vec<Vec<usize>>> = None;
        let mut one_row = true;
        for (i, source) in self.sources.iter().enumerate() {
            let (shape, row) = source.read(values, &mut elements)?;
            one_row &= row;
            match (&mut shapes, shape) {
                (None, Shape::Usual) if self.usual.is_some() => {}
                (all, shape) => {
                    let before = || self.sources[..i].iter().map(|of| of.with_rows(of.row.clone())).collect();
                    all.get_or_insert_with(before).push(match shape {
                        Shape::Usual => source.with_rows(source.row.clone()),
                        Shape::Of(shape) => shape,
                    });
                }
            }
        }
        let layout = match (shapes, &self.usual) {
            (None, Some(usual)) => Arc::clone(usual),
            (shapes, _) => Arc::new(Layout::new(shapes.unwrap_or_default(), one_row)),
        };
        Ok(Tensors { layout, bytes: elements.bytes, texts: elements.texts })
    }

    /// Bytes that the tensors of a record take at most.
    pub fn bytes(&self, value: &[u8]) -> usize {
        // An element of an array takes two bytes of JSON at least, and eight as a double.
        let dynamic = if self.usual.is_some() { 0 } else { value.len() * 4 };
        size_of::<Tensors>() + self.usual_bytes + value.len() + dynamic
    }
}

enum Shape {
    /// One row, in the declared shape, which has no dynamic axis.
    Usual,
    Of(Vec<usize>),
}

impl Source {
    fn new(port: Port) -> Self {
        let has_rows = match port.dims.first() {
            Some(Dim::Dynamic(_) | Dim::Fixed(1)) => true,
            Some(Dim::Fixed(_)) | None => false,
        };
        let row: Vec<usize> = (port.dims.iter().skip(usize::from(has_rows)))
            .map(|dim| match dim {
                Dim::Fixed(size) => *size,
                Dim::Dynamic(_) => 0,
            })
            .collect();
        let dynamic = row.iter().filter(|size| **size == 0).count();
        let fixed = row.iter().filter(|size| **size > 0).product();
        let all_fixed = port.dims.iter().all(Dim::is_fixed);
        let most = if all_fixed { fixed } else { usize::MAX };
        let most_of_column = if dynamic == 0 { fixed } else { usize::MAX };
        let from = Origin::Constant(Vec::new(), Elements::default());
        Self { port, from, row, has_rows, fixed, dynamic, most, most_of_column }
    }

    /// A row's shape with the axis of the rows, if the input has it.
    fn with_rows(&self, mut row: Vec<usize>) -> Vec<usize> {
        if self.has_rows {
            row.insert(0, 1);
        }
        row
    }

    /// The shape and the elements of a constant, and whether it has the axis of the rows.
    fn constant(&self, value: &serde_json::Value) -> Result<(Vec<usize>, Elements, bool), TaskError> {
        let name = &self.port.name;
        let json = serde_json::value::to_raw_value(value).map_err(|e| wrong(format!("{name}: {e}")))?;
        let mut elements = Elements::default();
        let scan = Scan { kind: self.port.kind, missing: None, most: usize::MAX };
        let found = scan.read(&json, name, &mut elements).map_err(|error| wrong(error.message))?;
        let (shape, row) = self.fit(found).map_err(|found| wrong(self.misfit(&found)))?;
        let shape = match shape {
            Shape::Usual => self.with_rows(self.row.clone()),
            Shape::Of(shape) => shape,
        };
        Ok((shape, elements, !row))
    }

    /// Appends the elements of this input. Returns its shape, and whether the record left the axis of the rows out.
    fn read(
        &self,
        values: &[Option<Cow<'_, RawValue>>],
        to: &mut Elements,
    ) -> Result<(Shape, bool), RecordError> {
        let value = |column: &Column| values.get(column.place).and_then(Option::as_deref);
        match &self.from {
            Origin::Constant(shape, elements) => {
                to.bytes.extend_from_slice(&elements.bytes);
                to.texts.extend_from_slice(&elements.texts);
                Ok((Shape::Of(shape.clone()), true))
            }
            Origin::Columns(columns) => {
                let mark = to.mark();
                for column in columns {
                    let scan = Scan {
                        kind: self.port.kind,
                        missing: column.missing.as_ref(),
                        most: self.most_of_column,
                    };
                    match (value(column), &column.missing) {
                        (Some(value), _) => {
                            scan.read(value, &column.pointer, to)?;
                        }
                        (None, Some(element)) => element.push(to),
                        (None, None) => return Err(missing(&column.pointer)),
                    }
                }
                let count = to.since(mark, self.port.kind);
                let shape = self.of_count(count).ok_or_else(|| {
                    let names = format!("{:?} and the other columns", columns[0].pointer);
                    RecordError::new(
                        Fault::Field,
                        format!("{names} have {count} values; input {} takes {}", self.port, self.fixed),
                    )
                })?;
                Ok((shape, self.has_rows))
            }
            Origin::Value(column) => {
                let scan = Scan { kind: self.port.kind, missing: column.missing.as_ref(), most: self.most };
                let is_missing = match value(column) {
                    Some(value) if value.get() != "null" || self.fixed == 1 && self.dynamic == 0 => {
                        let found = scan.read(value, &column.pointer, to)?;
                        return self.fit(found).map_err(|found| {
                            RecordError::new(
                                Fault::Field,
                                format!("{:?}: {}", column.pointer, self.misfit(&found)),
                            )
                        });
                    }
                    Some(_) => format!("{:?} is null, not an array: input {}", column.pointer, self.port),
                    None => missing(&column.pointer).message,
                };
                match &column.missing {
                    Some(element) if self.dynamic == 0 => {
                        (0..self.fixed).for_each(|_| element.push(to));
                        Ok((Shape::Usual, true))
                    }
                    _ => Err(RecordError::new(Fault::Field, is_missing)),
                }
            }
        }
    }

    /// The shape of one row of this many elements.
    fn of_count(&self, count: usize) -> Option<Shape> {
        match self.dynamic {
            0 if count == self.fixed => Some(Shape::Usual),
            1 if self.fixed > 0 && count.is_multiple_of(self.fixed) && count > 0 => {
                let size = |size: &usize| if *size == 0 { count / self.fixed } else { *size };
                Some(Shape::Of(self.with_rows(self.row.iter().map(size).collect())))
            }
            _ => None,
        }
    }

    /// The input's shape for a value of this shape, and whether the value left the axis of the rows out.
    fn fit(&self, found: Vec<usize>) -> Result<(Shape, bool), Vec<usize>> {
        let fits = |(declared, size): (&usize, &usize)| *size > 0 && (*declared == 0 || declared == size);
        let is_row = found.len() == self.row.len() && self.row.iter().zip(&found).all(fits);
        if is_row {
            return Ok(match self.dynamic {
                0 => (Shape::Usual, true),
                _ => (Shape::Of(self.with_rows(found)), true),
            });
        }
        // A single value for a row of one.
        if found.is_empty() && self.fixed == 1 {
            return Ok(match self.dynamic {
                0 => (Shape::Usual, true),
                _ => (Shape::Of(vec![1; self.port.dims.len()]), true),
            });
        }
        let fits = |(dim, size): (&Dim, &usize)| match dim {
            Dim::Fixed(declared) => declared == size,
            Dim::Dynamic(_) => *size > 0,
        };
        match found.len() == self.port.dims.len() && self.port.dims.iter().zip(&found).all(fits) {
            true => Ok((Shape::Of(found), false)),
            false => Err(found),
        }
    }

    fn misfit(&self, found: &[usize]) -> String {
        let sizes: Vec<String> = found.iter().map(ToString::to_string).collect();
        let is = match found {
            [] => "a single value".to_owned(),
            _ => format!("of the shape [{}]", sizes.join(", ")),
        };
        let without = if self.has_rows { ", whose first axis may be left out" } else { "" };
        format!("the value is {is}, and the model's input is {}{without}", self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::onnx::DatumType;

    fn source(kind: DatumType, dims: &[usize]) -> Source {
        let dim = |size: &usize| match size {
            0 => Dim::Dynamic("n".to_owned()),
            size => Dim::Fixed(*size),
        };
        Source::new(Port { name: "x".to_owned(), kind, dims: dims.iter().map(dim).collect() })
    }

    /// The shape that the input gets, and whether it is one row.
    fn fit(dims: &[usize], found: &[usize]) -> Option<(Vec<usize>, bool)> {
        let source = source(DatumType::F32, dims);
        source.fit(found.to_vec()).ok().map(|(shape, row)| match shape {
            Shape::Usual => (source.with_rows(source.row.clone()), row),
            Shape::Of(shape) => (shape, row),
        })
    }

    #[test]
    fn a_value_may_leave_the_axis_of_the_rows_out() {
        assert_eq!(fit(&[0, 3], &[3]), Some((vec![1, 3], true)));
        assert_eq!(fit(&[0, 3], &[2, 3]), Some((vec![2, 3], false)));
        assert_eq!(fit(&[1, 3, 2], &[3, 2]), Some((vec![1, 3, 2], true)));
        assert_eq!(fit(&[0, 1], &[]), Some((vec![1, 1], true)));
        assert_eq!(fit(&[0, 0], &[5]), Some((vec![1, 5], true)));
        assert_eq!(fit(&[0], &[]), Some((vec![1], true)));
        assert_eq!(fit(&[0], &[4]), Some((vec![4], false)));
        assert_eq!(fit(&[2, 0, 128], &[2, 1, 128]), Some((vec![2, 1, 128], true)));
        assert_eq!(fit(&[], &[]), Some((vec![], true)));
    }

    #[test]
    fn other_shapes_are_refused() {
        for (dims, found) in [
            (&[0, 3][..], &[4][..]),
            (&[0, 3], &[]),
            (&[0, 3], &[2, 4]),
            (&[0, 0], &[0]),
            (&[1, 3], &[2, 3]),
            (&[], &[1]),
        ] {
            assert_eq!(fit(dims, found), None, "{dims:?} {found:?}");
        }
    }

    #[test]
    fn columns_fill_a_row() {
        let shape = |dims: &[usize], count| {
            let source = source(DatumType::F32, dims);
            source.of_count(count).map(|shape| match shape {
                Shape::Usual => source.with_rows(source.row.clone()),
                Shape::Of(shape) => shape,
            })
        };
        assert_eq!(shape(&[0, 3], 3), Some(vec![1, 3]));
        assert_eq!(shape(&[0, 3], 4), None);
        assert_eq!(shape(&[0, 0, 2], 6), Some(vec![1, 3, 2]));
        assert_eq!(shape(&[0, 0, 2], 5), None);
    }
}
