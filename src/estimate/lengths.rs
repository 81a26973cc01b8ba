//! What is known of all records of a job: how many have which length, from those that were read, and the work of a record of a
//! length, from some that were prepared for the model.

use super::places::Place;
use super::quantile;

/// Lengths of two strata differ by this factor at least.
const STEP: f64 = std::f64::consts::SQRT_2;

/// Stratum of a length in bytes.
fn stratum(bytes: usize) -> usize {
    (((bytes + 1) as f64).ln() / STEP.ln()) as usize
}

/// Records of a stratum that were prepared.
#[derive(Debug, Clone, Copy, Default)]
struct Stratum {
    bytes: f64,
    records: f64,
    work: f64,
}

/// The lengths of the records of one run.
#[derive(Debug)]
struct Run {
    /// Where it is in the job, compared with other runs.
    order: (usize, i64),
    /// Offsets for which the run stands.
    part: f64,
    /// Offsets that were read: more than records, if some have none.
    offsets: f64,
    bytes: Vec<usize>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Lengths {
    strata: Vec<Stratum>,
    runs: Vec<Run>,
}

impl Lengths {
    /// Takes the lengths of the records of a run, of which the first `offsets` were read.
    pub fn read(&mut self, place: &Place, offsets: i64, bytes: Vec<usize>) {
        if offsets > 0 {
            let order = (place.partition, place.offsets.start);
            let run = Run { order, part: place.part as f64, offsets: offsets as f64, bytes };
            let at = self.runs.partition_point(|other| other.order < order);
            self.runs.insert(at, run);
        }
    }

    /// Takes the work of a record of this length, in units of the model.
    pub fn prepared(&mut self, bytes: usize, work: f64) {
        let at = stratum(bytes);
        if self.strata.len() <= at {
            self.strata.resize(at + 1, Stratum::default());
        }
        let of = &mut self.strata[at];
        *of = Stratum { bytes: of.bytes + bytes as f64, records: of.records + 1.0, work: of.work + work };
    }

    /// Estimated work of a record of this length: by the work per byte of the prepared records of nearly this length. If there
    /// were none, by that of the nearest length.
    pub fn work(&self, bytes: usize) -> f64 {
        let at = stratum(bytes);
        let known = self.strata.iter().enumerate().filter(|(_, of)| of.records > 0.0);
        let Some((nearest, of)) = known.min_by_key(|(of, _)| of.abs_diff(at)) else { return 1.0 };
        match nearest == at && of.bytes > 0.0 {
            // Within a stratum the work grows with the length, at most by the factor between the strata.
            true => of.work * bytes as f64 / of.bytes,
            false => of.work / of.records,
        }
    }

    /// Records and work of a job of so many offsets; and the standard error of the work, relative to it, which is 0 if all was
    /// read. Runs are weighted by the parts for which they stand.
    pub fn whole(&self, offsets: i64) -> (f64, f64, f64) {
        let (records, work, error) = self.per_offset();
        (records * offsets as f64, work * offsets as f64, error)
    }

    fn per_offset(&self) -> (f64, f64, f64) {
        let parts: f64 = self.runs.iter().map(|run| run.part).sum();
        let per_offset = |run: &Run, sum: f64| sum / run.offsets;
        let work = |run: &Run| per_offset(run, run.bytes.iter().map(|&bytes| self.work(bytes)).sum());
        let mean = |of: &dyn Fn(&Run) -> f64| {
            self.runs.iter().map(|run| run.part * of(run)).sum::<f64>() / parts.max(1.0)
        };
        let records = mean(&|run| per_offset(run, run.bytes.len() as f64));
        let mean_work = mean(&work);
        // Runs of which nothing is left out have no error.
        let sampled: Vec<&Run> = self.runs.iter().filter(|run| run.offsets < run.part).collect();
        if sampled.is_empty() || mean_work == 0.0 {
            return (records, mean_work, 0.0);
        }
        // Each part has one run, so what parts differ by counts only as far as neighbours do.
        let differences = sampled.windows(2).map(|pair| (work(pair[0]) - work(pair[1])).powi(2) / 2.0);
        let variance = differences.sum::<f64>() / (sampled.len() - 1).max(1) as f64;
        let squares: f64 = sampled.iter().map(|run| (run.part / parts).powi(2)).sum();
        let error = match sampled.len() {
            // Nothing tells how far other places differ.
            1 => 1.0,
            _ => (squares * variance).sqrt() / mean_work,
        };
        let read: f64 = sampled.iter().map(|run| run.offsets).sum();
        let of: f64 = sampled.iter().map(|run| run.part).sum();
        // In units of a normal distribution's error, as all others.
        let error = error * (1.0 - read / of).max(0.0).sqrt() * quantile(sampled.len() - 1).min(4.0)
            / quantile(usize::MAX);
        (records, mean_work, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::Random;

    fn place(partition: usize, from: i64, part: i64) -> Place {
        Place { partition, offsets: from * part..from * part + part.min(50), part }
    }

    #[test]
    fn work_follows_the_length_until_texts_are_truncated() {
        let mut lengths = Lengths::default();
        let mut random = Random(3);
        let truth = |bytes: usize| (bytes as f64 / 4.0).min(512.0);
        for _ in 0..4000 {
            let bytes = 10 + random.below(8000) as usize;
            lengths.prepared(bytes, truth(bytes) * (0.8 + 0.4 * random.below(1000) as f64 / 1000.0));
        }
        for bytes in [50, 100, 1000, 1500, 5000, 7900] {
            let (found, want) = (lengths.work(bytes), truth(bytes));
            assert!((found / want - 1.0).abs() < 0.25, "{bytes}: {found}, not {want}");
        }
        let all: f64 = (10..8010).map(|bytes| lengths.work(bytes)).sum();
        let want: f64 = (10..8010).map(truth).sum();
        assert!((all / want - 1.0).abs() < 0.02, "{all}, not {want}");
        assert!(lengths.work(1 << 20) > 400.0, "as the longest that was seen");
        assert_eq!(Lengths::default().work(7), 1.0);
    }

    #[test]
    fn a_job_that_was_read_as_a_whole_has_no_error() {
        let mut lengths = Lengths::default();
        lengths.prepared(100, 25.0);
        lengths.read(&place(0, 0, 4), 4, vec![100; 3]);
        lengths.read(&place(1, 0, 2), 2, vec![100]);
        let (records, work, error) = lengths.per_offset();
        assert!((records - 4.0 / 6.0).abs() < 1e-12 && (work - 100.0 / 6.0).abs() < 1e-9, "{records} {work}");
        assert_eq!(error, 0.0);
    }

    /// Places with long records and places with short ones.
    #[test]
    fn the_error_is_that_of_the_places() {
        let (mut inside, mut random) = (0, Random(9));
        for _ in 0..400 {
            let mut lengths = Lengths::default();
            lengths.prepared(100, 100.0);
            lengths.prepared(400, 400.0);
            for i in 0..24 {
                let long = random.below(10) < 3;
                lengths.read(&place(0, i, 1000), 50, vec![if long { 400 } else { 100 }; 50]);
            }
            let (_, work, error) = lengths.per_offset();
            inside += u32::from((work - 190.0).abs() <= 1.96 * error * work);
        }
        assert!((370..=398).contains(&inside), "{inside} of 400");
    }
}
