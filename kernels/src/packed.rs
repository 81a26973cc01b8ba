//! A batch of sequences of any lengths, concatenated on one token axis without padding.

use std::cell::OnceCell;

use candle_core::{Device, Result, Tensor};

use super::upload;

/// Consecutive sequences of equal length on the token axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Index of the first sequence's first token on the token axis.
    pub start: usize,
    pub sequences: usize,
    pub length: usize,
}

/// A packed batch, as the kernels read it.
#[derive(Debug)]
pub struct Packed {
    /// Token ids, `[tokens]`.
    ids: Vec<u32>,
    type_ids: Option<Vec<u32>>,
    /// Length of each sequence, in the order of the token axis: the shortest first.
    lengths: Vec<usize>,
    /// `order[i]` is the input index of the i-th sequence on the token axis.
    order: Vec<usize>,
    /// How many first tokens of each sequence a pooling leaves out, in the order of the token axis; empty if none.
    skipped: Vec<usize>,
    on_device: OnceCell<Indices>,
}

/// A batch's token ids and layout, on a device.
#[derive(Debug)]
pub struct Indices {
    /// Token ids, `[tokens]`.
    pub ids: Tensor,
    pub types: Option<Tensor>,
    /// `[tokens]`: position of each token within its sequence, from 0.
    pub positions: Tensor,
    /// `[sequences + 1]`: index on the token axis where each sequence begins, then where the last one ends.
    pub starts: Tensor,
    /// `[sequences]`: how many first tokens a pooling leaves out, if any.
    pub skipped: Option<Tensor>,
}

impl Packed {
    /// Packs sequences, each given as its token ids and token types. No sequence may be empty.
    pub fn new(batch: &[(&[u32], Option<&[u32]>)]) -> Self {
        let mut order: Vec<usize> = (0..batch.len()).collect();
        order.sort_by_key(|&i| batch[i].0.len());
        let total = batch.iter().map(|(ids, _)| ids.len()).sum();
        let mut ids = Vec::with_capacity(total);
        for &i in &order {
            ids.extend_from_slice(batch[i].0);
        }
        let type_ids = batch.iter().any(|(_, types)| types.is_some()).then(|| {
            let mut all = Vec::with_capacity(total);
            for &i in &order {
                match batch[i] {
                    (_, Some(types)) => all.extend_from_slice(types),
                    (ids, None) => all.resize(all.len() + ids.len(), 0),
                }
            }
            all
        });
        let lengths = order.iter().map(|&i| batch[i].0.len()).collect();
        Self { ids, type_ids, lengths, order, skipped: Vec::new(), on_device: OnceCell::new() }
    }

    /// Makes a pooling leave out the first tokens of each sequence: `skipped[i]` of input `i`, all of a shorter one.
    pub fn skipping(mut self, skipped: &[usize]) -> Self {
        if skipped.iter().any(|&skipped| skipped > 0) {
            let of = |(&i, length): (&usize, &usize)| skipped[i].min(*length);
            self.skipped = self.order.iter().zip(&self.lengths).map(of).collect();
        }
        self
    }

    /// Whether a pooling leaves out any token.
    pub fn skips(&self) -> bool {
        !self.skipped.is_empty()
    }

    /// How many first tokens of the sequence at this place on the token axis a pooling leaves out.
    pub fn skipped(&self, place: usize) -> usize {
        self.skipped.get(place).copied().unwrap_or(0)
    }

    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub fn type_ids(&self) -> Option<&[u32]> {
        self.type_ids.as_deref()
    }

    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    pub fn order(&self) -> &[usize] {
        &self.order
    }

    pub fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.lengths.iter().copied()
    }

    /// The batch's indices on the device, copied there by the first call.
    pub fn on(&self, device: &Device) -> Result<&Indices> {
        if let Some(indices) = self.on_device.get() {
            return Ok(indices);
        }
        let tokens = self.tokens();
        let (mut positions, mut starts) = (Vec::with_capacity(tokens), vec![0]);
        for length in self.lengths() {
            positions.extend(0..length as u32);
            starts.push(positions.len() as u32);
        }
        // One copy to the device for all of them.
        let types = self.type_ids().unwrap_or_default();
        let skipped: Vec<u32> = self.skipped.iter().map(|&skipped| skipped as u32).collect();
        let all = upload(&[&self.ids, &positions, &starts, types, &skipped].concat(), device)?;
        let after = 2 * tokens + starts.len();
        let types = self.type_ids().map(|_| all.narrow(0, after, tokens));
        let skipped = self
            .skips()
            .then(|| all.narrow(0, after + self.type_ids().map_or(0, <[u32]>::len), skipped.len()));
        let indices = Indices {
            ids: all.narrow(0, 0, tokens)?,
            types: types.transpose()?,
            positions: all.narrow(0, tokens, tokens)?,
            starts: all.narrow(0, 2 * tokens, starts.len())?,
            skipped: skipped.transpose()?,
        };
        Ok(self.on_device.get_or_init(|| indices))
    }

    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        let mut start = 0;
        self.lengths.chunk_by(|a, b| a == b).map(move |run| {
            let run = Run { start, sequences: run.len(), length: run[0] };
            start += run.sequences * run.length;
            run
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_by_length_without_padding() {
        let batch: [&[u32]; 4] = [&[1, 2, 3], &[4], &[5, 6, 7], &[8]];
        let packed = Packed::new(&batch.map(|ids| (ids, None)));
        assert_eq!(packed.ids, [4, 8, 1, 2, 3, 5, 6, 7]);
        assert_eq!(packed.order, [1, 3, 0, 2]);
        assert_eq!(
            packed.runs().collect::<Vec<_>>(),
            [Run { start: 0, sequences: 2, length: 1 }, Run { start: 2, sequences: 2, length: 3 }]
        );
    }
}
