//! The items and answers of ONNX models: the tensors of one record, and the values of its outputs.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::engine::{Item, Value};
use crate::model::text::key;

/// Elements for which an item costs as much as one token of a text.
const ELEMENTS: usize = 64;

/// Where the tensors of an item are, and their shapes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The shape of each input, its rows included.
    pub shapes: Vec<Vec<usize>>,
    /// The record left the axis of the rows out.
    pub one_row: bool,
    class: u64,
    cost: u32,
}

impl Layout {
    pub fn new(shapes: Vec<Vec<usize>>, one_row: bool) -> Self {
        let mut hasher = DefaultHasher::new();
        (&shapes, one_row).hash(&mut hasher);
        let elements: usize = shapes.iter().map(|shape| shape.iter().product::<usize>()).sum();
        let cost = u32::try_from(elements.div_ceil(ELEMENTS)).unwrap_or(u32::MAX).max(1);
        Self { shapes, one_row, class: hasher.finish(), cost }
    }

    pub fn elements(&self, input: usize) -> usize {
        self.shapes[input].iter().product()
    }
}

/// The tensors of one record.
#[derive(Debug)]
pub struct Tensors {
    pub layout: Arc<Layout>,
    /// The elements of all inputs of numbers and booleans, one input after the other, in the machine's byte order.
    pub bytes: Vec<u8>,
    /// The elements of all inputs of texts.
    pub texts: Vec<String>,
}

impl Item for Tensors {
    const UNIT: &'static str = "elements";

    fn units(&self) -> u64 {
        (0..self.layout.shapes.len()).map(|input| self.layout.elements(input) as u64).sum()
    }

    fn cost(&self) -> u32 {
        self.layout.cost
    }

    fn class(&self) -> u64 {
        self.layout.class
    }

    fn key(&self) -> Option<u128> {
        Some(key((&self.layout.class, &self.bytes, &self.texts)))
    }
}

/// A piece of an answer. The answer to an item holds its outputs one after the other. An output whose shape is not known
/// beforehand begins with its number of dimensions and each of them, as [`Cell::Size`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cell {
    Size(u32),
    F32(f32),
    F64(f64),
    I64(i64),
    U64(u64),
    Bool(bool),
    /// The length of a text in bytes, which the next cells hold.
    Text(u32),
    Piece([u8; PIECE]),
}

/// Bytes of a text in one cell.
pub const PIECE: usize = 14;

impl Value for Cell {
    fn is_valid(self) -> bool {
        match self {
            Self::F32(x) => x.is_finite(),
            Self::F64(x) => x.is_finite(),
            _ => true,
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size(n) | Self::Text(n) => write!(f, "{n}"),
            Self::F32(x) => write!(f, "{x}"),
            Self::F64(x) => write!(f, "{x}"),
            Self::I64(n) => write!(f, "{n}"),
            Self::U64(n) => write!(f, "{n}"),
            Self::Bool(is) => write!(f, "{is}"),
            Self::Piece(_) => f.write_str("text"),
        }
    }
}

impl Cell {
    /// Appends a text.
    pub fn push_text(text: &str, cells: &mut Vec<Self>) {
        cells.push(Self::Text(text.len() as u32));
        for piece in text.as_bytes().chunks(PIECE) {
            let mut bytes = [0; PIECE];
            bytes[..piece.len()].copy_from_slice(piece);
            cells.push(Self::Piece(bytes));
        }
    }

    /// The number as f32; `None` for anything else.
    pub fn as_f32(self) -> Option<f32> {
        match self {
            Self::F32(x) => Some(x),
            Self::F64(x) => Some(x as f32),
            Self::I64(n) => Some(n as f32),
            Self::U64(n) => Some(n as f32),
            _ => None,
        }
    }
}

/// Reads an answer from its beginning.
#[derive(Debug, Clone)]
pub struct Cells<'a>(pub &'a [Cell]);

impl<'a> Cells<'a> {
    /// # Panics
    /// If the answer has ended.
    pub fn pop(&mut self) -> Cell {
        let (first, rest) = self.0.split_first().expect("an answer has all of its outputs");
        self.0 = rest;
        *first
    }

    pub fn take(&mut self, count: usize) -> &'a [Cell] {
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        taken
    }

    /// The shape at the beginning of an output.
    pub fn shape(&mut self) -> Vec<usize> {
        let size = |cell| match cell {
            Cell::Size(n) => n as usize,
            other => panic!("{other:?} is not a size"),
        };
        let rank = size(self.pop());
        (0..rank).map(|_| size(self.pop())).collect()
    }

    /// The text whose length was read.
    pub fn text(&mut self, length: u32) -> String {
        let pieces = self.take((length as usize).div_ceil(PIECE));
        let bytes = pieces.iter().flat_map(|piece| match piece {
            Cell::Piece(bytes) => *bytes,
            other => panic!("{other:?} is not a piece of a text"),
        });
        let bytes: Vec<u8> = bytes.take(length as usize).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_any_length_survive_in_cells() {
        for text in ["", "größe", "exactly14bytes", "a text that needs more than two cells"] {
            let mut cells = vec![];
            Cell::push_text(text, &mut cells);
            cells.push(Cell::I64(7));
            let mut read = Cells(&cells);
            let Cell::Text(length) = read.pop() else { panic!("no text") };
            assert_eq!(read.text(length), text);
            assert_eq!(read.pop(), Cell::I64(7));
        }
        assert_eq!(size_of::<Cell>(), 16);
    }

    #[test]
    fn only_items_of_one_shape_share_a_batch() {
        let class = |shapes: Vec<Vec<usize>>| Layout::new(shapes, true).class;
        assert_eq!(class(vec![vec![1, 3]]), class(vec![vec![1, 3]]));
        assert_ne!(class(vec![vec![1, 3]]), class(vec![vec![1, 4]]));
        assert_eq!(Layout::new(vec![vec![1, 20]], true).cost, 1);
        assert_eq!(Layout::new(vec![vec![1, 3, 224, 224]], true).cost, 2352);
    }
}
