//! Seconds per unit of work. Windows overlap: one is prepared while another is with the model. So what a window took is the time
//! from when the one before it was answered, and that is right on average only while others are under way before and after it.

use super::quantile;

/// Windows that fill the stages at first, whose times say nothing.
const FILLING: usize = 2;
/// Windows at the end after which too little is under way.
pub(super) const EMPTYING: usize = 3;
/// Consecutive windows are put together to so many groups: a slow moment of the machine lasts for more than a window, so single
/// windows would vary together, and the mean would seem better known than it is.
const GROUPS: usize = 12;
/// Relative standard error if there are too few windows to tell.
const UNKNOWN: f64 = 0.5;

/// When windows were answered, in seconds since the first one was sent.
#[derive(Debug, Default)]
pub struct Pace {
    answered: Vec<(f64, f64)>,
}

/// The pace, as well as it is known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Known {
    /// Seconds per unit of work.
    pub seconds: f64,
    /// Half of its 95 % interval, relative to it.
    pub within: f64,
    /// Windows that count.
    pub windows: usize,
}

impl Pace {
    /// Takes the work of a window and when it was answered.
    pub fn answered(&mut self, at: f64, work: f64) {
        self.answered.push((at, work));
    }

    /// Windows that were answered.
    pub fn len(&self) -> usize {
        self.answered.len()
    }

    /// Seconds until the last window was answered, and the work of all.
    pub fn whole(&self) -> (f64, f64) {
        let at = self.answered.last().map_or(0.0, |(at, _)| *at);
        (at, self.answered.iter().map(|(_, work)| work).sum())
    }

    /// The pace by the first `until` windows at most, of a job of `all` work; `None` before the first answer.
    pub fn known(&self, until: usize, all: f64) -> Option<Known> {
        let used = &self.answered[..until.min(self.answered.len())];
        if used.len() < FILLING + 2 {
            let (at, work) = self.whole();
            let seconds = at / work;
            return (work > 0.0).then_some(Known { seconds, within: 1.96 * UNKNOWN, windows: 0 });
        }
        let windows: Vec<(f64, f64)> =
            used.windows(2).skip(FILLING - 1).map(|pair| (pair[1].0 - pair[0].0, pair[1].1)).collect();
        let each = windows.len().div_ceil(GROUPS).max(1);
        let sum = |group: &[(f64, f64)]| {
            group.iter().fold((0.0, 0.0), |(seconds, work), one| (seconds + one.0, work + one.1))
        };
        // The last group has what is left, and may be smaller: without it, if there are others of full size.
        let whole = windows.len() / each * each;
        let groups: Vec<(f64, f64)> = windows[..whole].chunks(each).map(sum).collect();
        let (seconds, work) = sum(&windows);
        let ratio = seconds / work;
        let count = groups.len() as f64;
        let squares: f64 = groups.iter().map(|(seconds, work)| (seconds - ratio * work).powi(2)).sum();
        let measured: f64 = groups.iter().map(|(_, work)| work).sum();
        let error = (squares * count / (count - 1.0)).sqrt() / (ratio * measured);
        // The job's own windows vary as those of the sample do.
        let error = error * (1.0 + work / all.max(work)).sqrt();
        Some(Known { seconds: ratio, within: quantile(groups.len() - 1) * error, windows: windows.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filling_and_emptying_do_not_count() {
        let mut pace = Pace::default();
        assert_eq!(pace.known(9, 100.0), None);
        // Two windows were late; from then on 1 s per unit of work.
        for (at, work) in [(9.0, 1.0), (10.0, 1.0), (12.0, 2.0), (13.0, 1.0), (16.0, 3.0), (16.1, 1.0)] {
            pace.answered(at, work);
        }
        let known = pace.known(5, 100.0).expect("a pace");
        assert!((known.seconds - 1.0).abs() < 1e-12 && known.within < 1e-9, "{known:?}");
        assert_eq!(known.windows, 3);
        assert!(pace.known(6, 100.0).expect("a pace").seconds < 0.9);
    }

    #[test]
    fn too_few_windows_give_a_wide_interval() {
        let mut pace = Pace::default();
        pace.answered(2.0, 4.0);
        let known = pace.known(9, 100.0).expect("a pace");
        assert_eq!((known.seconds, known.windows), (0.5, 0));
        assert!(known.within > 0.9);
    }
}
