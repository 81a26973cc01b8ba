//! The pixels that a convolution reads for each output, as rows of a multiplication.

use std::ops::Range;

use super::{Map, Window};
use crate::matmul::Rows;
use crate::tile::{LINE, PackedA};

/// Columns that are copied at a time.
const PIECE: usize = 512;

/// Rows `rows` of the matrix with one row per output pixel and one column per pixel of the window and channel.
pub(super) struct Patches<'a> {
    pub x: &'a Map,
    pub window: Window,
    /// Zeros before the first row and column.
    pub before: (usize, usize),
    /// Output pixels of a map's row, and rows of a map.
    pub width: usize,
    pub height: usize,
    pub rows: Range<usize>,
}

impl Patches<'_> {
    /// Calls `run` for the columns `part` of a row, from the first one on: for columns that are neighbours in memory, with
    /// their values; for zeros, with their number alone. The pixels of a window's row are neighbours.
    #[inline(always)]
    fn runs(&self, row: usize, part: Range<usize>, mut run: impl FnMut(Result<&[f32], usize>)) {
        let Self { x, window, before, .. } = self;
        let (image, at) = (row / (self.width * self.height), row % (self.width * self.height));
        let top = (at / self.width * window.stride) as isize - before.0 as isize;
        let left = (at % self.width * window.stride) as isize - before.1 as isize;
        // Pixels of a window's row before the map's first one, and those up to the map's last one.
        let outside = left.min(0).unsigned_abs().min(window.size);
        let inside = (x.width as isize - left).clamp(outside as isize, window.size as isize) as usize;
        let channels = x.channels;
        let line = window.size * channels;
        let mut column = part.start;
        while column < part.end {
            let (y, start) = (top + (column / line) as isize, column % line);
            let end = line.min(start + part.end - column);
            column += end - start;
            if y < 0 || y >= x.height as isize {
                run(Err(end - start));
                continue;
            }
            // Columns of the line that are in the map.
            let first = (outside * channels).clamp(start, end);
            let last = (inside * channels).clamp(first, end);
            if start < first {
                run(Err(first - start));
            }
            if first < last {
                let of_line = (image * x.height + y as usize) * x.width * channels;
                let begin = (of_line + first) as isize + left * channels as isize;
                run(Ok(&x.values[begin as usize..][..last - first]));
            }
            if last < end {
                run(Err(end - last));
            }
        }
    }
}

impl Rows for Patches<'_> {
    #[inline(always)]
    fn pack(&self, part: Range<usize>, packed: &mut PackedA<f32>) {
        if self.x.channels.is_multiple_of(LINE) && part.start.is_multiple_of(LINE) {
            // Runs are whole lines.
            for row in self.rows.clone() {
                let mut lines = packed.lines();
                self.runs(row, part.clone(), |run| match run {
                    Ok(values) => {
                        for (values, line) in values.as_chunks::<LINE>().0.iter().zip(lines.by_ref()) {
                            *line = *values;
                        }
                    }
                    Err(count) => lines.by_ref().take(count / LINE).for_each(|line| *line = [0.0; LINE]),
                });
            }
            return;
        }
        let mut piece = [0.0; PIECE];
        for row in self.rows.clone() {
            let mut done = 0;
            self.runs(row, part.clone(), |run| match run {
                Ok(values) => {
                    piece[done..done + values.len()].copy_from_slice(values);
                    done += values.len();
                }
                Err(count) => {
                    piece[done..done + count].fill(0.0);
                    done += count;
                }
            });
            packed.push(&piece[..done]);
        }
    }
}
