//! The operators of `ai.onnx.ml` for tract: those that it lacks, and those that are faster or more complete here. Each
//! file holds some of them; their meaning is that of ONNX's ml operators (onnx/docs/Operators-ml.md), and where that is
//! vague, what ONNX Runtime computes.

mod category;
mod features;
mod linear;
mod numbers;
mod scores;
mod svm;
mod trees;

use std::fmt;
use std::sync::Arc;

use tract_onnx::model::{OnnxOpRegister, ParsingContext};
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;

/// A shape whose dimensions may be symbols.
pub(super) type Shape = TVec<TDim>;

/// A pure function of tensors with the attributes of its node.
pub(super) trait Operator: fmt::Debug + Send + Sync + 'static {
    fn name(&self) -> &'static str;

    /// Types and shapes of the outputs.
    ///
    /// # Errors
    /// The operator does not take such inputs.
    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>>;

    /// # Errors
    /// The values do not fit the operator.
    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>>;

    fn output_count(&self) -> usize {
        1
    }
}

/// An operator as tract sees it.
#[derive(Debug, Clone)]
struct Node(Arc<dyn Operator>);

impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Node {}

impl Op for Node {
    fn name(&self) -> StaticName {
        self.0.name().into()
    }

    op_as_typed_op!();
}

impl EvalOp for Node {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        Ok(self.0.run(&inputs)?.into_iter().map(Tensor::into_tvalue).collect())
    }
}

impl TypedOp for Node {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let inputs: Vec<(DatumType, Shape)> =
            inputs.iter().map(|fact| (fact.datum_type, fact.shape.to_tvec())).collect();
        Ok(self.0.outputs(&inputs)?.into_iter().map(|(of, shape)| of.fact(&*shape)).collect())
    }

    as_op!();
}

impl Expansion for Node {
    fn name(&self) -> StaticName {
        self.0.name().into()
    }

    fn nboutputs(&self) -> TractResult<usize> {
        Ok(self.0.output_count())
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_output_arity(outputs, self.0.output_count())?;
        solver.given_all(inputs.iter().map(|input| &input.datum_type), move |solver, types| {
            solver.given_all(inputs.iter().map(|input| &input.shape), move |solver, shapes| {
                let known: Vec<(DatumType, Shape)> = types.iter().map(|of| plain(*of)).zip(shapes).collect();
                for (output, (of, shape)) in outputs.iter().zip(self.0.outputs(&known)?) {
                    solver.equals(&output.datum_type, of)?;
                    solver.equals(&output.shape, shape)?;
                }
                Ok(())
            })
        })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let mut plain_inputs = TVec::new();
        for (i, input) in inputs.iter().enumerate() {
            let of = model.outlet_fact(*input)?.datum_type;
            plain_inputs.push(match of == plain(of) {
                true => *input,
                false => model.wire_node(
                    format!("{prefix}.plain_{i}"),
                    tract_onnx::tract_core::ops::cast::cast(plain(of)),
                    &[*input],
                )?[0],
            });
        }
        model.wire_node(prefix, self.clone(), &plain_inputs)
    }
}

/// tract computes with dimensions where ONNX has int64.
fn plain(of: DatumType) -> DatumType {
    if of == DatumType::TDim { DatumType::I64 } else { of }
}

type Built = TractResult<(Box<dyn InferenceOp>, Vec<String>)>;

fn built(operator: impl Operator) -> Built {
    Ok((expand(Node(Arc::new(operator))), Vec::new()))
}

/// Adds all operators, instead of tract's own.
pub(super) fn register(operators: &mut OnnxOpRegister) {
    operators
        .insert("ArrayFeatureExtractor", |_: &ParsingContext, node: &NodeProto| features::extractor(node));
    operators.insert("Binarizer", |_, node| numbers::binarizer(node));
    operators.insert("CategoryMapper", |_, node| category::mapper(node));
    operators.insert("FeatureVectorizer", |_, node| features::vectorizer(node));
    operators.insert("Imputer", |_, node| numbers::imputer(node));
    operators.insert("LabelEncoder", category::label_encoder);
    operators.insert("LinearClassifier", |_, node| linear::classifier(node));
    operators.insert("LinearRegressor", |_, node| linear::regressor(node));
    operators.insert("Normalizer", |_, node| numbers::normalizer(node));
    operators.insert("OneHotEncoder", |_, node| category::one_hot(node));
    operators.insert("Scaler", |_, node| numbers::scaler(node));
    operators.insert("SVMClassifier", |_, node| svm::classifier(node));
    operators.insert("SVMRegressor", |_, node| svm::regressor(node));
    operators.insert("TreeEnsembleClassifier", trees::classifier);
    operators.insert("TreeEnsembleRegressor", trees::regressor);
}

thread_local! {
    static LENIENT: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs something with unknown categories taken for none of the known, in encoders that otherwise refuse them: for
/// trials with made-up values.
pub(super) fn leniently<R>(run: impl FnOnce() -> R) -> R {
    LENIENT.set(true);
    let result = run();
    LENIENT.set(false);
    result
}

/// The elements of a tensor of this type.
fn elements<T: Datum>(tensor: &Tensor) -> TractResult<&[T]> {
    tensor.try_as_plain_ram()?.as_slice::<T>()
}

/// The elements of a tensor of numbers as f32.
fn floats(tensor: &Tensor) -> TractResult<std::borrow::Cow<'_, [f32]>> {
    use std::borrow::Cow;
    Ok(match tensor.datum_type() {
        DatumType::F32 => Cow::Borrowed(elements::<f32>(tensor)?),
        _ => Cow::Owned(elements::<f32>(&*tensor.cast_to::<f32>()?)?.to_vec()),
    })
}

/// A tensor of elements in this shape.
fn tensor<T: Datum + Clone>(shape: &[usize], elements: Vec<T>) -> TractResult<Tensor> {
    tract_ndarray::ArrayD::from_shape_vec(shape, elements)
        .map(IntoTensor::into_tensor)
        .map_err(|error| format_err!("{error}"))
}

/// Rows and columns of a matrix; a vector is one row.
fn matrix(shape: &[usize]) -> TractResult<(usize, usize)> {
    match shape {
        [columns] => Ok((1, *columns)),
        [rows, columns] => Ok((*rows, *columns)),
        other => bail!("takes a matrix, not a tensor of {} dimensions", other.len()),
    }
}

/// The first dimension of a matrix's shape; a vector is one row.
fn rows_of(shape: &[TDim]) -> TractResult<TDim> {
    match shape {
        [_] => Ok(1.to_dim()),
        [rows, _] => Ok(rows.clone()),
        other => bail!("takes a matrix, not a tensor of {} dimensions", other.len()),
    }
}

/// The names of the classes of a classifier: texts or integers.
#[derive(Debug, Clone)]
enum Classes {
    Texts(Vec<String>),
    Integers(Vec<i64>),
}

impl Classes {
    /// # Errors
    /// The node names no classes.
    fn of(node: &NodeProto) -> TractResult<Self> {
        if let Some(texts) =
            node.get_attr_opt_vec::<String>("classlabels_strings")?.filter(|all| !all.is_empty())
        {
            return Ok(Self::Texts(texts));
        }
        let integers = match node.get_attr_opt_vec::<i64>("classlabels_int64s")? {
            Some(integers) => Some(integers),
            // The name in LinearClassifier and SVMClassifier.
            None => node.get_attr_opt_vec::<i64>("classlabels_ints")?,
        };
        match integers.filter(|all| !all.is_empty()) {
            Some(integers) => Ok(Self::Integers(integers)),
            None => bail!("{} names no classes", node.op_type),
        }
    }

    /// Types and shapes of a classifier's outputs: the class of each row, and its scores, so many of them.
    fn outputs(&self, input: &Shape, scores: usize) -> TractResult<TVec<(DatumType, Shape)>> {
        let rows = rows_of(input)?;
        let scores = tvec!(rows.clone(), scores.to_dim());
        Ok(tvec!((self.datum_type(), tvec!(rows)), (DatumType::F32, scores)))
    }

    fn len(&self) -> usize {
        match self {
            Self::Texts(all) => all.len(),
            Self::Integers(all) => all.len(),
        }
    }

    fn datum_type(&self) -> DatumType {
        match self {
            Self::Texts(_) => DatumType::String,
            Self::Integers(_) => DatumType::I64,
        }
    }

    /// The labels of these classes.
    fn tensor(&self, winners: &[usize]) -> TractResult<Tensor> {
        match self {
            Self::Texts(all) => tensor(&[winners.len()], winners.iter().map(|&i| all[i].clone()).collect()),
            Self::Integers(all) => tensor(&[winners.len()], winners.iter().map(|&i| all[i]).collect()),
        }
    }
}
