//! Operators that choose and join columns: ArrayFeatureExtractor, FeatureVectorizer.

use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;

use super::{Built, Operator, Shape, built, elements, floats, matrix, rows_of, tensor};

#[derive(Debug)]
struct Extractor;

pub fn extractor(_: &NodeProto) -> Built {
    built(Extractor)
}

/// Elements of the last axis at `places`, of every row.
fn chosen<T: Datum + Clone>(values: &Tensor, shape: &[usize], places: &[usize]) -> TractResult<Tensor> {
    let columns = values.shape().last().copied().unwrap_or(1);
    let all = elements::<T>(values)?;
    let rows = all.chunks(columns.max(1));
    tensor(shape, rows.flat_map(|row| places.iter().map(|&place| row[place].clone())).collect())
}

impl Operator for Extractor {
    fn name(&self) -> &'static str {
        "ArrayFeatureExtractor"
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        let [(of, values), (_, places)] = inputs else { bail!("takes two inputs, not {}", inputs.len()) };
        let places: TDim = places.iter().product();
        let mut shape = values.clone();
        match shape.len() {
            0 => bail!("takes no scalar"),
            1 => shape = tvec!(1.to_dim(), places),
            rank => shape[rank - 1] = places,
        }
        Ok(tvec!((*of, shape)))
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let (values, places) = (&inputs[0], inputs[1].cast_to::<i64>()?);
        let columns = values.shape().last().copied().unwrap_or(1);
        let places: Vec<usize> = elements::<i64>(&places)?
            .iter()
            .map(|&place| usize::try_from(place).ok().filter(|place| *place < columns))
            .collect::<Option<_>>()
            .ok_or_else(|| format_err!("a column is chosen that is not among the {columns}"))?;
        let mut shape = values.shape().to_vec();
        match shape.len() {
            1 => shape = vec![1, places.len()],
            rank => shape[rank - 1] = places.len(),
        }
        let of = values.datum_type();
        Ok(tvec!(dispatch_datum!(chosen(of)(values, &shape, &places))?))
    }
}

#[derive(Debug)]
struct Vectorizer {
    /// Columns of each input.
    columns: Vec<usize>,
}

pub fn vectorizer(node: &NodeProto) -> Built {
    built(Vectorizer { columns: node.get_attr_opt_vec("inputdimensions")?.unwrap_or_default() })
}

impl Operator for Vectorizer {
    fn name(&self) -> &'static str {
        "FeatureVectorizer"
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        if self.columns.len() != inputs.len() {
            bail!("inputdimensions has {} entries for {} inputs", self.columns.len(), inputs.len());
        }
        let all: usize = self.columns.iter().sum();
        let rows = rows_of(&inputs.first().ok_or_else(|| format_err!("has no input"))?.1)?;
        Ok(tvec!((DatumType::F32, tvec!(rows, all.to_dim()))))
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let (rows, _) = matrix(inputs[0].shape())?;
        let all: usize = self.columns.iter().sum();
        let mut joined = vec![0.0f32; rows * all];
        let mut before = 0;
        for (input, &columns) in inputs.iter().zip(&self.columns) {
            let (of_rows, has) = matrix(input.shape())?;
            if of_rows != rows {
                bail!("has inputs of {rows} and of {of_rows} rows");
            }
            let values = floats(input)?;
            // As in ONNX Runtime, missing columns are 0 and those beyond inputdimensions are left out.
            let taken = columns.min(has);
            for (row, out) in values.chunks(has.max(1)).zip(joined.chunks_mut(all.max(1))) {
                out[before..before + taken].copy_from_slice(&row[..taken]);
            }
            before += columns;
        }
        Ok(tvec!(tensor(&[rows, all], joined)?))
    }
}
