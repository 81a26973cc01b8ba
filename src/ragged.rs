//! Rows of any length in one allocation.

use std::ops::Range;

/// Rows stored one after the other, and where each ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Ragged<T> {
    values: Vec<T>,
    ends: Vec<u32>,
}

impl<T> Default for Ragged<T> {
    fn default() -> Self {
        Self { values: Vec::new(), ends: Vec::new() }
    }
}

impl<T: Copy> Ragged<T> {
    pub fn with_capacity(rows: usize, values: usize) -> Self {
        Self { values: Vec::with_capacity(values), ends: Vec::with_capacity(rows) }
    }

    /// Rows of one width.
    ///
    /// # Panics
    /// If `values` is not a multiple of `width`, or has 2³² values or more.
    pub fn of_width(values: Vec<T>, width: usize) -> Self {
        assert!(
            width > 0 && values.len().is_multiple_of(width),
            "{} values in rows of {width}",
            values.len()
        );
        let ends = (1..=values.len() / width).map(|row| end(row * width)).collect();
        Self { values, ends }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// # Panics
    /// If all rows together have 2³² values or more.
    pub fn push(&mut self, row: &[T]) {
        self.values.extend_from_slice(row);
        self.ends.push(end(self.values.len()));
    }

    /// Appends the rows of `other`.
    ///
    /// # Panics
    /// If all rows together have 2³² values or more.
    pub fn append(&mut self, other: &Self) {
        let before = self.values.len();
        self.values.extend_from_slice(&other.values);
        self.ends.extend(other.ends.iter().map(|&of| end(before + of as usize)));
    }

    fn range(&self, row: usize) -> Range<usize> {
        let start = row.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        start..self.ends[row] as usize
    }

    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &[T] {
        &self.values[self.range(row)]
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[T]> {
        (0..self.len()).map(|row| self.row(row))
    }
}

fn end(values: usize) -> u32 {
    u32::try_from(values).expect("rows of less than 2³² values")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_lengths_of_their_own() {
        let mut rows = Ragged::default();
        for row in [&[1, 2][..], &[], &[3]] {
            rows.push(row);
        }
        assert_eq!(rows.len(), 3);
        assert_eq!(rows.iter().collect::<Vec<_>>(), [&[1, 2][..], &[], &[3]]);
        rows.append(&Ragged::of_width(vec![4, 5, 6, 7], 2));
        assert_eq!((rows.row(2), rows.row(3), rows.row(4)), (&[3][..], &[4, 5][..], &[6, 7][..]));
    }
}
