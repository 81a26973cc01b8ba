//! The answers to the items of one window.

use std::ops::Range;

use crate::ragged::Ragged;

/// One answer per item of a window, stored batch by batch as the batches finish. An item that failed or is not answered
/// yet has an empty answer.
#[derive(Debug, Clone)]
pub struct Answers<V> {
    parts: Vec<Ragged<V>>,
    /// Where each item's answer is: index into `parts`, and row in that part.
    at: Vec<Option<(u32, u32)>>,
}

impl<V: Copy> Answers<V> {
    pub(super) fn new(items: usize) -> Self {
        Self { parts: Vec::new(), at: vec![None; items] }
    }

    /// Adds the answers of a batch, one row per item.
    pub(super) fn add(&mut self, items: impl Iterator<Item = u32>, answers: Ragged<V>) {
        let part = self.parts.len() as u32;
        for (row, item) in (0..).zip(items) {
            self.at[item as usize] = Some((part, row));
        }
        self.parts.push(answers);
    }

    /// Gives `item` the answer of `from`.
    pub(super) fn copy(&mut self, item: u32, from: u32) {
        self.at[item as usize] = self.at[from as usize];
    }

    /// Number of items.
    pub fn len(&self) -> usize {
        self.at.len()
    }

    pub fn is_empty(&self) -> bool {
        self.at.is_empty()
    }

    /// The answer to one item; empty if it has none.
    ///
    /// # Panics
    /// If the window has no such item.
    pub fn row(&self, item: usize) -> &[V] {
        self.at[item].map_or(&[], |(part, row)| self.parts[part as usize].row(row as usize))
    }

    /// The answers to the items of one record.
    ///
    /// # Panics
    /// Reading the rows panics if the window has no such items.
    pub fn rows(&self, items: Range<usize>) -> Rows<'_, V> {
        Rows { answers: self, items }
    }
}

impl<V: Copy> From<Ragged<V>> for Answers<V> {
    fn from(answers: Ragged<V>) -> Self {
        let mut all = Self::new(answers.len());
        all.add(0..answers.len() as u32, answers);
        all
    }
}

/// The answers to the items of one record, in the order in which it asked for them.
#[derive(Debug, Clone)]
pub struct Rows<'a, V> {
    answers: &'a Answers<V>,
    items: Range<usize>,
}

impl<'a, V: Copy> Rows<'a, V> {
    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a [V]> {
        let answers = self.answers;
        self.items.clone().map(move |item| answers.row(item))
    }

    /// The answer of a record that asked for one item.
    ///
    /// # Panics
    /// If it asked for none.
    pub fn only(&self) -> &'a [V] {
        self.answers.row(self.items.start)
    }
}
