//! Evaluates ensembles of decision trees on a CPU.
//!
//! A tree is a list of nodes in preorder: the left child of a node follows it, and the right one is named. All tests are
//! made to be `x <= threshold`. A leaf is its own right child and its test never holds, so that rows which have arrived
//! stay there: a group of rows walks down together, step by step, without a branch that depends on the data. The walks of
//! a group do not depend on each other, which hides the latency of their loads.

/// A test of a column, or a leaf.
#[derive(Debug, Clone, Copy)]
struct Node {
    threshold: f32,
    /// The right child. A leaf's own place.
    right: u32,
    /// The column; the highest bit is set if a missing value goes left.
    column: u32,
}

const MISSING_LEFT: u32 = 1 << 31;

/// Rows that walk down a tree together.
const GROUP: usize = 16;
/// Rows whose columns and sums stay in the first cache while all trees are evaluated on them.
const TILE: usize = 64;
/// Steps after which a group looks whether all of its rows have arrived.
const STEPS: u32 = 4;

/// A comparison of a column with a threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    Lt,
    Le,
    Gt,
    Ge,
    Eq,
    Ne,
}

/// A node of a tree as a file describes it.
#[derive(Debug, Clone)]
pub enum Described {
    Split {
        test: Test,
        column: usize,
        threshold: f32,
        yes: usize,
        no: usize,
        missing_is_yes: bool,
    },
    /// Targets and what they are given.
    Leaf(Vec<(usize, f32)>),
}

/// Why a description is not a forest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForestError {
    #[error("node {0} of a tree does not exist")]
    NoSuchNode(usize),
    #[error("a tree has a cycle, or a node with two parents")]
    NotATree,
    #[error("a leaf gives to target {0}, and there are {1}")]
    NoSuchTarget(usize, usize),
    #[error("there are more than 2³¹ nodes, leaves or columns")]
    TooLarge,
}

/// How the trees' values become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aggregate {
    Sum,
    Average,
    Min,
    Max,
}

#[derive(Debug)]
struct Tree {
    root: u32,
    depth: u32,
    /// The target that each of its leaves gives one value to, if so.
    only: Option<u32>,
}

#[derive(Debug)]
pub struct Forest {
    nodes: Vec<Node>,
    trees: Vec<Tree>,
    /// Of each node of a tree with one target: the leaf's value. Otherwise the place of its gifts' range.
    leaves: Vec<Leaf>,
    gifts: Vec<(u32, f32)>,
    /// How many columns it reads: one more than the highest.
    columns: usize,
    targets: usize,
    aggregate: Aggregate,
}

#[derive(Debug, Clone, Copy, Default)]
struct Leaf {
    value: f32,
    gifts: (u32, u32),
}

impl Forest {
    /// `trees`: the nodes of each and its root, which nodes name by their places in their own list.
    ///
    /// # Errors
    /// The nodes are not trees, or a leaf gives to a target that does not exist.
    pub fn new(
        trees: impl IntoIterator<Item = (Vec<Described>, usize)>,
        targets: usize,
        aggregate: Aggregate,
    ) -> Result<Self, ForestError> {
        let mut forest = Self {
            nodes: Vec::new(),
            trees: Vec::new(),
            leaves: Vec::new(),
            gifts: Vec::new(),
            columns: 0,
            targets,
            aggregate,
        };
        for (described, root) in trees {
            forest.add(&described, root)?;
        }
        Ok(forest)
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    pub fn targets(&self) -> usize {
        self.targets
    }

    pub fn trees(&self) -> usize {
        self.trees.len()
    }

    fn add(&mut self, described: &[Described], root: usize) -> Result<(), ForestError> {
        /// What is left to lay out: a node with its depth, and the node whose right child it is.
        struct Todo {
            node: usize,
            depth: u32,
            right_of: Option<usize>,
        }
        let first = self.nodes.len();
        let mut seen = vec![false; described.len()];
        let mut todo = vec![Todo { node: root, depth: 0, right_of: None }];
        let (mut deepest, mut one, mut only) = (0, true, None);
        while let Some(Todo { node, depth, right_of }) = todo.pop() {
            let place = self.nodes.len();
            if place >= MISSING_LEFT as usize || self.gifts.len() >= MISSING_LEFT as usize {
                return Err(ForestError::TooLarge);
            }
            if let Some(parent) = right_of {
                self.nodes[parent].right = place as u32;
            }
            let of = described.get(node).ok_or(ForestError::NoSuchNode(node))?;
            if std::mem::replace(&mut seen[node], true) {
                return Err(ForestError::NotATree);
            }
            deepest = deepest.max(depth);
            match of {
                Described::Leaf(gifts) => {
                    self.nodes.push(Node { threshold: f32::NAN, right: place as u32, column: 0 });
                    let before = self.gifts.len() as u32;
                    for &(target, value) in gifts {
                        if target >= self.targets {
                            return Err(ForestError::NoSuchTarget(target, self.targets));
                        }
                        self.gifts.push((target as u32, value));
                    }
                    let value = gifts.first().map_or(0.0, |(_, value)| *value);
                    self.leaves.push(Leaf { value, gifts: (before, self.gifts.len() as u32) });
                    match gifts[..] {
                        [(target, _)] if only.is_none_or(|only| only == target) => only = Some(target),
                        _ => one = false,
                    }
                }
                &Described::Split { test, column, threshold, yes, no, missing_is_yes } => {
                    if column >= MISSING_LEFT as usize {
                        return Err(ForestError::TooLarge);
                    }
                    self.columns = self.columns.max(column + 1);
                    self.leaves.push(Leaf::default());
                    let split = |threshold, missing_left| Node {
                        threshold,
                        right: 0,
                        column: column as u32 | if missing_left { MISSING_LEFT } else { 0 },
                    };
                    let below = threshold.next_down();
                    let (left, right, node) = match test {
                        Test::Le => (yes, no, split(threshold, missing_is_yes)),
                        Test::Lt => (yes, no, split(below, missing_is_yes)),
                        // A missing value fails the test unless the node says otherwise.
                        Test::Gt => (no, yes, split(threshold, !missing_is_yes)),
                        Test::Ge => (no, yes, split(below, !missing_is_yes)),
                        Test::Eq | Test::Ne => {
                            let (equal, other) = if test == Test::Eq { (yes, no) } else { (no, yes) };
                            self.nodes.push(split(threshold, test == Test::Eq && missing_is_yes));
                            // Whether it is less, too: then it is not equal. Both ways to `other` lead to one subtree.
                            self.leaves.push(Leaf::default());
                            self.nodes.push(split(below, false));
                            self.nodes[place].right = place as u32 + 2;
                            todo.push(Todo { node: equal, depth: depth + 2, right_of: Some(place + 1) });
                            todo.push(Todo { node: other, depth: depth + 2, right_of: None });
                            continue;
                        }
                    };
                    self.nodes.push(node);
                    todo.push(Todo { node: right, depth: depth + 1, right_of: Some(place) });
                    todo.push(Todo { node: left, depth: depth + 1, right_of: None });
                }
            }
        }
        let only = only.filter(|_| one).map(|target| target as u32);
        self.trees.push(Tree { root: first as u32, depth: deepest, only });
        Ok(())
    }

    /// The targets of each row: `rows.len() / width` times `targets` values. `width` is the number of columns of a row.
    ///
    /// # Panics
    /// If a row has fewer columns than the trees read, or `rows` is not a whole number of rows.
    pub fn evaluate(&self, rows: &[f32], width: usize) -> Vec<f32> {
        assert!(width >= self.columns.max(1) && rows.len().is_multiple_of(width), "rows of {width} columns");
        let count = rows.len() / width;
        let start = match self.aggregate {
            Aggregate::Sum | Aggregate::Average => 0.0,
            Aggregate::Min => f32::INFINITY,
            Aggregate::Max => f32::NEG_INFINITY,
        };
        let mut values = vec![start; count * self.targets];
        let tiles = rows.chunks(TILE * width).zip(values.chunks_mut((TILE * self.targets).max(1)));
        for (rows, values) in tiles {
            match rows.iter().any(|x| x.is_nan()) {
                true => self.tile::<true>(rows, width, values),
                false => self.tile::<false>(rows, width, values),
            }
        }
        match self.aggregate {
            Aggregate::Average => {
                let share = 1.0 / self.trees.len().max(1) as f32;
                values.iter_mut().for_each(|value| *value *= share);
            }
            // A target that no leaf has given to.
            Aggregate::Min | Aggregate::Max => {
                values.iter_mut().filter(|value| **value == start).for_each(|value| *value = 0.0);
            }
            Aggregate::Sum => {}
        }
        values
    }

    fn tile<const MISSING: bool>(&self, rows: &[f32], width: usize, values: &mut [f32]) {
        let count = rows.len() / width;
        // The rows of the last group, filled up with copies of its first.
        let whole = count / GROUP * GROUP;
        let mut last = Vec::new();
        if whole < count {
            last.extend_from_slice(&rows[whole * width..]);
            for _ in count - whole..GROUP {
                last.extend_from_slice(&rows[whole * width..(whole + 1) * width]);
            }
        }
        for tree in &self.trees {
            let groups = rows.chunks_exact(GROUP * width).chain(last.chunks_exact((GROUP * width).max(1)));
            for (group, rows) in groups.enumerate() {
                let at = self.walk::<MISSING>(tree, rows, width);
                let first = group * GROUP;
                for (i, &at) in at.iter().enumerate().take(count - first) {
                    let values = &mut values[(first + i) * self.targets..][..self.targets];
                    let leaf = &self.leaves[at as usize];
                    match tree.only {
                        Some(target) => self.give(&mut values[target as usize], leaf.value),
                        None => {
                            for (target, value) in &self.gifts[leaf.gifts.0 as usize..leaf.gifts.1 as usize] {
                                self.give(&mut values[*target as usize], *value);
                            }
                        }
                    }
                }
            }
        }
    }

    fn give(&self, to: &mut f32, value: f32) {
        *to = match self.aggregate {
            Aggregate::Sum | Aggregate::Average => *to + value,
            Aggregate::Min => to.min(value),
            Aggregate::Max => to.max(value),
        };
    }

    /// The leaves of a group of rows. `MISSING`: some values may be NaN.
    fn walk<const MISSING: bool>(&self, tree: &Tree, rows: &[f32], width: usize) -> [u32; GROUP] {
        assert_eq!(rows.len(), GROUP * width);
        let mut at = [tree.root; GROUP];
        let mut steps = 0;
        while steps < tree.depth {
            let now = STEPS.min(tree.depth - steps);
            let before = at;
            for _ in 0..now {
                for (i, at) in at.iter_mut().enumerate() {
                    // SAFETY: `at` is a node: it begins at a root, and each node's right child is a node, and so is the
                    // one after it unless it is a leaf, which never goes left: NaN is not less, and its column's highest
                    // bit is not set. A column is less than `columns`, which `evaluate` checks against `width`.
                    let (node, x) = unsafe {
                        let node = self.nodes.get_unchecked(*at as usize);
                        let column = (node.column & !MISSING_LEFT) as usize;
                        (*node, *rows.get_unchecked(i * width + column))
                    };
                    let mut left = x <= node.threshold;
                    if MISSING {
                        left |= x.is_nan() & (node.column & MISSING_LEFT != 0);
                    }
                    // A branch would be mispredicted every second time.
                    *at = std::hint::select_unpredictable(left, *at + 1, node.right);
                }
            }
            steps += now;
            if at == before {
                break;
            }
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the description itself.
    fn plainly(tree: &[Described], mut at: usize, row: &[f32]) -> Vec<(usize, f32)> {
        loop {
            match &tree[at] {
                Described::Leaf(gifts) => return gifts.clone(),
                Described::Split { test, column, threshold, yes, no, missing_is_yes } => {
                    let (x, t) = (row[*column], *threshold);
                    let holds = match test {
                        Test::Lt => x < t,
                        Test::Le => x <= t,
                        Test::Gt => x > t,
                        Test::Ge => x >= t,
                        Test::Eq => x == t,
                        Test::Ne => x != t,
                    };
                    at = if holds || x.is_nan() && *missing_is_yes { *yes } else { *no };
                }
            }
        }
    }

    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *state >> 33
    }

    /// A tree of random shape over three columns whose thresholds and values are small integers, so that they are often
    /// equal.
    fn tree(state: &mut u64, targets: usize) -> Vec<Described> {
        let mut nodes = vec![Described::Leaf(vec![(0, 1.0)])];
        for _ in 0..random(state) % 12 {
            let at = random(state) as usize % nodes.len();
            if matches!(nodes[at], Described::Leaf(_)) {
                let test =
                    [Test::Lt, Test::Le, Test::Gt, Test::Ge, Test::Eq, Test::Ne][random(state) as usize % 6];
                let child = nodes.len();
                nodes[at] = Described::Split {
                    test,
                    column: random(state) as usize % 3,
                    threshold: (random(state) % 5) as f32 - 2.0,
                    yes: child + 1,
                    no: child,
                    missing_is_yes: random(state).is_multiple_of(2),
                };
                for _ in 0..2 {
                    let gifts = (0..=random(state) % 2)
                        .map(|_| (random(state) as usize % targets, (random(state) % 100) as f32 - 50.0));
                    nodes.push(Described::Leaf(gifts.collect()));
                }
            }
        }
        nodes
    }

    #[test]
    fn every_test_and_missing_values_take_the_described_way() {
        let mut state = 7;
        for round in 0..200 {
            let targets = 1 + round % 3;
            let trees: Vec<_> = (0..5).map(|_| (tree(&mut state, targets), 0)).collect();
            let forest = Forest::new(trees.clone(), targets, Aggregate::Sum).unwrap();
            let count = 1 + random(&mut state) as usize % 150;
            let value = |state: &mut u64| match random(state) % 7 {
                6 => f32::NAN,
                x => x as f32 - 3.0,
            };
            let rows: Vec<f32> = (0..count * 3).map(|_| value(&mut state)).collect();
            let found = forest.evaluate(&rows, 3);
            for (row, found) in rows.chunks(3).zip(found.chunks(targets)) {
                let mut expected = vec![0.0; targets];
                for (tree, root) in &trees {
                    for (target, value) in plainly(tree, *root, row) {
                        expected[target] += value;
                    }
                }
                assert_eq!(found, expected, "{row:?}");
            }
        }
    }

    #[test]
    fn trees_are_averaged_or_the_least_or_the_largest_counts() {
        let leaf = |value| (vec![Described::Leaf(vec![(0, value)])], 0);
        let of = |aggregate| Forest::new([leaf(1.0), leaf(4.0)], 1, aggregate).unwrap().evaluate(&[0.0], 1);
        assert_eq!(of(Aggregate::Average), [2.5]);
        assert_eq!(of(Aggregate::Min), [1.0]);
        assert_eq!(of(Aggregate::Max), [4.0]);
    }

    #[test]
    fn what_is_no_tree_is_refused() {
        let split = |yes, no| Described::Split {
            test: Test::Le,
            column: 0,
            threshold: 0.0,
            yes,
            no,
            missing_is_yes: false,
        };
        let leaf = || Described::Leaf(vec![(0, 1.0)]);
        let error = |tree: Vec<Described>| Forest::new([(tree, 0)], 1, Aggregate::Sum).unwrap_err();
        assert_eq!(error(vec![split(0, 1), leaf()]), ForestError::NotATree);
        assert_eq!(error(vec![split(1, 1), leaf()]), ForestError::NotATree);
        assert_eq!(error(vec![split(1, 2), leaf()]), ForestError::NoSuchNode(2));
        assert_eq!(error(vec![Described::Leaf(vec![(1, 1.0)])]), ForestError::NoSuchTarget(1, 1));
    }
}
