//! From an answer to the prediction: all outputs by name, or the scores of a classifier.

use std::io::Write as _;

use super::super::classification::{self, scores};
use super::super::{NUMBER, TaskError, kinds, to_json};
use crate::model::Scores;
use crate::model::onnx::{Cell, Cells, Computed, DatumType, Graph, OnnxModel};
use crate::record::{Fault, RecordError};
use crate::settings::{self, Activation, TensorForm};

/// How a prediction is written.
pub enum Form {
    Tensors(Vec<Computed>),
    Classes { output: Computed, labels: Vec<String>, scores: Scores, top_k: usize },
}

fn wrong(message: String) -> TaskError {
    TaskError::Setting { key: "task.outputs", message }
}

/// The names of the outputs that are computed.
///
/// # Errors
/// It is not clear which of the outputs has the scores of a classifier.
pub fn chosen(graph: &Graph, task: &settings::Task) -> Result<Vec<String>, TaskError> {
    let all: Vec<String> = graph.outputs.iter().map(|output| output.name.clone()).collect();
    if !task.outputs.is_empty() {
        let unknown = task.outputs.iter().find(|name| !all.contains(name));
        return match unknown {
            Some(name) => Err(wrong(format!("the model has no output {name}; it has {}", all.join(", ")))),
            None => Ok(task.outputs.clone()),
        };
    }
    if task.form == TensorForm::Tensor {
        return Ok(all);
    }
    let zipped = graph.outputs.iter().find(|output| output.zipped.is_some());
    // The converters name them so: scikit-learn's, XGBoost's, LightGBM's.
    let named = || {
        graph.outputs.iter().find(|output| {
            ["probabilities", "output_probability", "scores", "logits"].contains(&output.name.as_str())
        })
    };
    match (zipped.or_else(named), &graph.outputs[..]) {
        (Some(output), _) | (None, [output]) => Ok(vec![output.name.clone()]),
        _ => Err(wrong(format!("set the one that has the classes' scores: {}", all.join(", ")))),
    }
}

impl Form {
    /// `classes`: those that the graph names.
    ///
    /// # Errors
    /// The model is not a classifier with labels.
    pub fn new(
        model: &OnnxModel,
        classes: Option<Vec<String>>,
        task: &settings::Task,
    ) -> Result<Self, TaskError> {
        let [output] = &model.outputs[..] else { return Ok(Self::Tensors(model.outputs.clone())) };
        if task.form == TensorForm::Tensor {
            return Ok(Self::Tensors(model.outputs.clone()));
        }
        if !matches!(output.kind, DatumType::F32 | DatumType::F64 | DatumType::F16) {
            return Err(wrong(format!(
                "{} does not have scores: they are floating-point numbers",
                output.name
            )));
        }
        let count = output.shape.as_ref().map(|shape| shape.iter().product::<usize>());
        let mut labels = match task.labels.is_empty() {
            false => task.labels.clone(),
            true => output.zipped.clone().or(classes).ok_or_else(|| {
                let of = count.map_or(String::new(), |count| format!(" of {count} classes"));
                let message =
                    format!("the model does not name its classes: set the labels{of}, in their order");
                TaskError::Setting { key: "task.labels", message }
            })?,
        };
        if let Some(count) =
            count.filter(|count| *count != labels.len() && !(*count == 1 && labels.len() == 2))
        {
            let message =
                format!("there are {} labels, and {} has {count} scores", labels.len(), output.name);
            return Err(TaskError::Setting { key: "task.labels", message });
        }
        if let Some(label) = kinds::twice(labels.iter().map(String::as_str)) {
            let message = format!("the model names the class {label:?} twice: set the labels");
            return Err(TaskError::Setting { key: "task.labels", message });
        }
        labels.shrink_to_fit();
        let scores = match task.activation {
            Activation::None => Scores::Raw,
            Activation::Softmax => Scores::Softmax,
            Activation::Sigmoid => Scores::Sigmoid,
        };
        let top_k = task.top_k.unwrap_or(usize::MAX).min(labels.len());
        Ok(Self::Classes { output: output.clone(), labels, scores, top_k })
    }

    /// Those of a classifier.
    pub fn labels(&self) -> Option<Vec<String>> {
        match self {
            Self::Tensors(_) => None,
            Self::Classes { labels, .. } => Some(labels.clone()),
        }
    }

    /// Appends the prediction.
    ///
    /// # Errors
    /// The answer is not that of one row of a classifier.
    pub fn write(&self, answer: &[Cell], one_row: bool, out: &mut Vec<u8>) -> Result<(), RecordError> {
        let mut cells = Cells(answer);
        match self {
            Self::Tensors(outputs) => {
                out.extend_from_slice(b"{\"outputs\":{");
                for (i, output) in outputs.iter().enumerate() {
                    if i > 0 {
                        out.push(b',');
                    }
                    to_json(&output.name, out)?;
                    out.push(b':');
                    let shape = shape(output, one_row, &mut cells);
                    match &output.zipped {
                        None => nested(&shape, &mut cells, out)?,
                        Some(classes) => maps(&shape, classes, &mut cells, out)?,
                    }
                }
                out.extend_from_slice(b"}}");
                Ok(())
            }
            Self::Classes { output, labels, scores: kind, top_k } => {
                let shape = shape(output, one_row, &mut cells);
                let count: usize = shape.iter().product();
                let found: Vec<f32> = cells.take(count).iter().filter_map(|cell| cell.as_f32()).collect();
                let mut found = scores(*kind, &found);
                if let ([one], 2) = (&found[..], labels.len()) {
                    found = vec![1.0 - one, *one];
                }
                if found.len() != labels.len() {
                    let message = format!(
                        "the model gave {count} scores for {} labels: as: classification takes one row of a record",
                        labels.len()
                    );
                    return Err(RecordError::new(Fault::Infer, message));
                }
                classification::write(labels, &found, *top_k, out)
            }
        }
    }

    /// Bytes that an answer and its prediction take at most, roughly if their size depends on the record.
    pub fn bytes(&self, value: &[u8]) -> usize {
        /// A number of 64 bits in JSON, with a comma.
        const WIDE: usize = 26;
        let of = |output: &Computed| match (&output.shape, &output.zipped) {
            (Some(shape), None) => {
                shape.iter().product::<usize>() * (size_of::<Cell>() + WIDE) + output.name.len() + 8
            }
            (Some(_), Some(classes)) => {
                classification::bytes(classes, classes.len()) + classes.len() * size_of::<Cell>()
            }
            (None, _) => value.len() / 2 * (size_of::<Cell>() + NUMBER),
        };
        match self {
            Self::Tensors(outputs) => 16 + outputs.iter().map(of).sum::<usize>(),
            Self::Classes { labels, top_k, .. } => {
                labels.len() * size_of::<Cell>() + classification::bytes(labels, *top_k)
            }
        }
    }
}

/// The shape of an output in an answer.
fn shape(output: &Computed, one_row: bool, cells: &mut Cells<'_>) -> Vec<usize> {
    match &output.shape {
        Some(shape) if one_row => shape.clone(),
        _ => cells.shape(),
    }
}

/// Appends the elements as arrays within arrays.
fn nested(shape: &[usize], cells: &mut Cells<'_>, out: &mut Vec<u8>) -> Result<(), RecordError> {
    let Some((length, inner)) = shape.split_first() else { return element(cells, out) };
    out.push(b'[');
    for i in 0..*length {
        if i > 0 {
            out.push(b',');
        }
        nested(inner, cells, out)?;
    }
    out.push(b']');
    Ok(())
}

fn element(cells: &mut Cells<'_>, out: &mut Vec<u8>) -> Result<(), RecordError> {
    match cells.pop() {
        Cell::F32(x) => to_json(&x, out),
        Cell::F64(x) => to_json(&x, out),
        Cell::I64(n) => {
            out.extend_from_slice(itoa::Buffer::new().format(n).as_bytes());
            Ok(())
        }
        Cell::U64(n) => {
            out.extend_from_slice(itoa::Buffer::new().format(n).as_bytes());
            Ok(())
        }
        Cell::Bool(is) => write!(out, "{is}").map_err(|e| RecordError::new(Fault::Encode, e.to_string())),
        Cell::Text(length) => to_json(&cells.text(length), out),
        Cell::Size(_) | Cell::Piece(_) => unreachable!("an element begins with its value"),
    }
}

/// Appends the scores of each row as an object; of one row only that object.
fn maps(
    shape: &[usize],
    classes: &[String],
    cells: &mut Cells<'_>,
    out: &mut Vec<u8>,
) -> Result<(), RecordError> {
    let map = |cells: &mut Cells<'_>, out: &mut Vec<u8>| {
        out.push(b'{');
        for (i, class) in classes.iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            to_json(class, out)?;
            out.push(b':');
            element(cells, out)?;
        }
        out.push(b'}');
        Ok(())
    };
    match shape {
        [count] if *count == classes.len() => map(cells, out),
        [rows, count] if *count == classes.len() => {
            out.push(b'[');
            for row in 0..*rows {
                if row > 0 {
                    out.push(b',');
                }
                map(cells, out)?;
            }
            out.push(b']');
            Ok(())
        }
        other => {
            let message =
                format!("the model gave scores of the shape {other:?} for {} classes", classes.len());
            Err(RecordError::new(Fault::Infer, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(name: &str, shape: Option<&[usize]>, zipped: Option<&[&str]>) -> Computed {
        Computed {
            name: name.to_owned(),
            kind: DatumType::F32,
            shape: shape.map(<[usize]>::to_vec),
            has_rows: true,
            zipped: zipped.map(|classes| classes.iter().map(|class| (*class).to_owned()).collect()),
        }
    }

    fn written(form: &Form, answer: &[Cell], one_row: bool) -> String {
        let mut out = Vec::new();
        form.write(answer, one_row, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn outputs_keep_their_shapes_and_types() {
        let outputs = vec![
            output("a", Some(&[2]), None),
            output("b", None, None),
            output("c", Some(&[]), None),
            output("d", Some(&[2]), Some(&["no", "yes"])),
        ];
        let size = Cell::Size;
        let mut answer = vec![Cell::F32(0.1), Cell::F32(2.0), size(2), size(1), size(2)];
        answer.extend([Cell::I64(i64::MAX), Cell::Bool(true)]);
        Cell::push_text("a \"label\" of some length", &mut answer);
        answer.extend([Cell::F32(0.25), Cell::F32(0.75)]);
        assert_eq!(
            written(&Form::Tensors(outputs), &answer, true),
            r#"{"outputs":{"a":[0.1,2.0],"b":[[9223372036854775807,true]],"c":"a \"label\" of some length","d":{"no":0.25,"yes":0.75}}}"#
        );
    }

    #[test]
    fn several_rows_have_several_maps() {
        let form = Form::Tensors(vec![output("d", Some(&[2]), Some(&["no", "yes"]))]);
        let mut answer = vec![Cell::Size(2), Cell::Size(2), Cell::Size(2)];
        answer.extend([0.5, 0.5, 1.0, 0.0].map(Cell::F32));
        assert_eq!(
            written(&form, &answer, false),
            r#"{"outputs":{"d":[{"no":0.5,"yes":0.5},{"no":1.0,"yes":0.0}]}}"#
        );
    }

    #[test]
    fn one_score_is_that_of_the_second_of_two_labels() {
        let labels = vec!["no".to_owned(), "yes".to_owned()];
        let form = |scores| Form::Classes {
            output: output("p", Some(&[1]), None),
            labels: labels.clone(),
            scores,
            top_k: 2,
        };
        assert_eq!(
            written(&form(Scores::Raw), &[Cell::F32(0.75)], true),
            r#"{"label":"yes","score":0.75,"scores":{"yes":0.75,"no":0.25}}"#
        );
        assert_eq!(
            written(&form(Scores::Sigmoid), &[Cell::F32(0.0)], true),
            r#"{"label":"no","score":0.5,"scores":{"no":0.5,"yes":0.5}}"#
        );
    }
}
