//! TreeEnsembleClassifier and TreeEnsembleRegressor.

use std::collections::{BTreeMap, HashMap, HashSet};

use tract_onnx::model::ParsingContext;
use tract_onnx::pb::{NodeProto, TensorProto};
use tract_onnx::tract_hir::internal::*;

use super::scores::{Transform, largest, logistic};
use super::{Built, Classes, Operator, Shape, built, elements, floats, matrix, rows_of, tensor};
use crate::model::kernels::forest::{Aggregate, Described, Forest, Test};

/// A list of numbers that is an attribute of floats or, for doubles, a tensor.
fn numbers(context: &ParsingContext, node: &NodeProto, name: &str) -> TractResult<Vec<f32>> {
    if let Some(tensor) = node.get_attr_opt::<&TensorProto>(&format!("{name}_as_tensor"))? {
        let tensor = context.load_tensor(tensor)?;
        return Ok(elements::<f32>(&*tensor.cast_to::<f32>()?)?.to_vec());
    }
    Ok(node.get_attr_opt_vec::<f32>(name)?.unwrap_or_default())
}

/// Reads the trees. `prefix` names the leaves' attributes: `class` or `target`.
fn forest(
    context: &ParsingContext,
    node: &NodeProto,
    prefix: &str,
    targets: usize,
    aggregate: Aggregate,
) -> TractResult<Forest> {
    let of = |name: &str| -> TractResult<Vec<usize>> { node.get_attr_vec::<usize>(name) };
    let modes: Vec<&str> = node.get_attr_vec("nodes_modes")?;
    let (trees, ids) = (of("nodes_treeids")?, of("nodes_nodeids")?);
    let (yes, no) = (of("nodes_truenodeids")?, of("nodes_falsenodeids")?);
    let columns = of("nodes_featureids")?;
    let thresholds = numbers(context, node, "nodes_values")?;
    let missing = node.get_attr_opt_vec::<bool>("nodes_missing_value_tracks_true")?.unwrap_or_default();
    let count = modes.len();
    let same = [trees.len(), ids.len(), yes.len(), no.len(), columns.len(), thresholds.len()];
    if same.iter().any(|len| *len != count) || !missing.is_empty() && missing.len() != count {
        bail!("the attributes nodes_… of {} have different lengths", node.op_type);
    }
    let mut gifts: HashMap<(usize, usize), Vec<(usize, f32)>> = HashMap::new();
    let leaf = |what: &str| format!("{prefix}_{what}");
    let weights = numbers(context, node, &leaf("weights"))?;
    let (leaf_trees, leaf_nodes) = (of(&leaf("treeids"))?, of(&leaf("nodeids"))?);
    let leaf_targets = of(&leaf("ids"))?;
    if [leaf_trees.len(), leaf_nodes.len(), leaf_targets.len()].iter().any(|len| *len != weights.len()) {
        bail!("the attributes {prefix}_… of {} have different lengths", node.op_type);
    }
    for (i, weight) in weights.into_iter().enumerate() {
        gifts.entry((leaf_trees[i], leaf_nodes[i])).or_default().push((leaf_targets[i], weight));
    }
    // Nodes by tree, in the order of the trees.
    let mut by_tree: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (i, tree) in trees.iter().enumerate() {
        by_tree.entry(*tree).or_default().push(i);
    }
    let mut described = Vec::with_capacity(by_tree.len());
    for (tree, nodes) in by_tree {
        let places: HashMap<usize, usize> =
            nodes.iter().enumerate().map(|(place, &i)| (ids[i], place)).collect();
        let place =
            |id: usize| places.get(&id).copied().ok_or_else(|| format_err!("tree {tree} has no node {id}"));
        let mut children = HashSet::new();
        let mut list = Vec::with_capacity(nodes.len());
        for &i in &nodes {
            let test = match modes[i] {
                "LEAF" => {
                    list.push(Described::Leaf(gifts.remove(&(tree, ids[i])).unwrap_or_default()));
                    continue;
                }
                "BRANCH_LEQ" => Test::Le,
                "BRANCH_LT" => Test::Lt,
                "BRANCH_GTE" => Test::Ge,
                "BRANCH_GT" => Test::Gt,
                "BRANCH_EQ" => Test::Eq,
                "BRANCH_NEQ" => Test::Ne,
                other => bail!("a tree's node has the mode {other}, which is not one of ONNX's"),
            };
            let (yes, no) = (place(yes[i])?, place(no[i])?);
            children.extend([yes, no]);
            list.push(Described::Split {
                test,
                column: columns[i],
                threshold: thresholds[i],
                yes,
                no,
                missing_is_yes: missing.get(i).copied().unwrap_or(false),
            });
        }
        let root = (0..list.len()).find(|place| !children.contains(place));
        described.push((list, root.ok_or_else(|| format_err!("tree {tree} has no root"))?));
    }
    Forest::new(described, targets, aggregate).map_err(|error| format_err!("{}: {error}", node.op_type))
}

fn evaluate(forest: &Forest, input: &Tensor) -> TractResult<(usize, Vec<f32>)> {
    let (rows, columns) = matrix(input.shape())?;
    if columns < forest.columns().max(1) {
        bail!("the trees read {} columns, and the input has {columns}", forest.columns());
    }
    Ok((rows, forest.evaluate(&floats(input)?, columns)))
}

#[derive(Debug)]
struct Classifier {
    forest: Forest,
    classes: Classes,
    base: Vec<f32>,
    transform: Transform,
    /// Two classes whose leaves all give to one target.
    binary: Option<Binary>,
}

#[derive(Debug, Clone, Copy)]
struct Binary {
    target: usize,
    /// The sums are probabilities: no leaf has a negative weight.
    probabilities: bool,
}

pub fn classifier(context: &ParsingContext, node: &NodeProto) -> Built {
    let classes = Classes::of(node)?;
    let targets: HashSet<usize> = node.get_attr_vec::<usize>("class_ids")?.into_iter().collect();
    let weights = numbers(context, node, "class_weights")?;
    let binary = (classes.len() == 2 && targets.len() == 1).then(|| Binary {
        target: targets.iter().copied().next().unwrap_or_default(),
        probabilities: weights.iter().all(|weight| *weight >= 0.0),
    });
    built(Classifier {
        forest: forest(context, node, "class", classes.len(), Aggregate::Sum)?,
        base: numbers(context, node, "base_values")?,
        transform: Transform::of(node)?,
        classes,
        binary,
    })
}

impl Classifier {
    /// Makes the sums of a row its scores. Returns the class that wins.
    fn finish(&self, scores: &mut [f32]) -> usize {
        let Some(Binary { target, probabilities }) = self.binary else {
            for (score, base) in scores.iter_mut().zip(&self.base) {
                *score += base;
            }
            let winner = largest(scores);
            self.transform.apply(scores);
            return winner;
        };
        let base = match self.base[..] {
            [] => 0.0,
            [base] => base,
            _ => self.base[target],
        };
        let sum = scores[target] + base;
        let pair = match (probabilities, self.transform) {
            (_, Transform::Probit) => {
                let mut one = [sum];
                self.transform.apply(&mut one);
                [1.0 - one[0], one[0]]
            }
            (true, _) => [1.0 - sum, sum],
            (false, Transform::Logistic) => [logistic(-sum), logistic(sum)],
            (false, _) => [-sum, sum],
        };
        scores.copy_from_slice(&pair);
        usize::from(sum > if probabilities { 0.5 } else { 0.0 })
    }
}

impl Operator for Classifier {
    fn name(&self) -> &'static str {
        "TreeEnsembleClassifier"
    }

    fn output_count(&self) -> usize {
        2
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        self.classes.outputs(&inputs[0].1, self.classes.len())
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let (rows, mut scores) = evaluate(&self.forest, &inputs[0])?;
        let winners: Vec<usize> =
            scores.chunks_mut(self.classes.len()).map(|scores| self.finish(scores)).collect();
        Ok(tvec!(self.classes.tensor(&winners)?, tensor(&[rows, self.classes.len()], scores)?))
    }
}

#[derive(Debug)]
struct Regressor {
    forest: Forest,
    base: Vec<f32>,
    transform: Transform,
}

pub fn regressor(context: &ParsingContext, node: &NodeProto) -> Built {
    let aggregate = match node.get_attr_opt::<&str>("aggregate_function")?.unwrap_or("SUM") {
        "SUM" => Aggregate::Sum,
        "AVERAGE" => Aggregate::Average,
        "MIN" => Aggregate::Min,
        "MAX" => Aggregate::Max,
        other => bail!("aggregate_function {other} is not one of ONNX's"),
    };
    let targets = node.get_attr_opt::<usize>("n_targets")?.unwrap_or(1);
    built(Regressor {
        forest: forest(context, node, "target", targets, aggregate)?,
        base: numbers(context, node, "base_values")?,
        transform: Transform::of(node)?,
    })
}

impl Operator for Regressor {
    fn name(&self) -> &'static str {
        "TreeEnsembleRegressor"
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        Ok(tvec!((DatumType::F32, tvec!(rows_of(&inputs[0].1)?, self.forest.targets().to_dim()))))
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let (rows, mut values) = evaluate(&self.forest, &inputs[0])?;
        for row in values.chunks_mut(self.forest.targets().max(1)) {
            for (i, value) in row.iter_mut().enumerate() {
                *value += self.base.get(i).copied().unwrap_or(0.0);
            }
            self.transform.apply(row);
        }
        Ok(tvec!(tensor(&[rows, self.forest.targets()], values)?))
    }
}
