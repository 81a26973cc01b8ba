//! Finds the batch budget that suits a device. `kandle bench calibrate` measures it once and stores it in a file, by
//! model and device; every later start uses it. Predictions do not change: an answer does not depend on its batch.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::model::{Model, RunError};

/// A larger budget is chosen only if it is faster than the smaller ones by this factor.
const GAIN: f64 = 1.02;
/// Cost of each measured item, in tokens: that of a short text.
const COST: u32 = 32;
const ROUNDS: usize = 5;

/// Budget of a batch, and the cost per second that one lane computes with it.
pub type Rate = (usize, f64);

/// Result of a calibration.
#[derive(Debug, Clone)]
pub struct Calibration {
    pub rates: Vec<Rate>,
    /// The budget to use; `None` if nothing was measured.
    pub chosen: Option<usize>,
}

/// Measures budgets from `least` to `most`, doubling. In each round every budget computes a cost of `most` in total;
/// the median round counts. A budget that runs out of memory is left out, and so are all larger ones.
///
/// # Errors
/// The model fails, or not even `least` fits the device's memory.
pub fn measure<M: Model>(model: &M, least: usize, most: usize) -> Result<Vec<Rate>, RunError> {
    let item = model.sample(COST);
    let mut budgets: Vec<usize> =
        std::iter::successors(Some(least), |b| Some(b * 2)).take_while(|&b| b <= most).collect();
    let mut seconds = vec![Vec::new(); budgets.len()];
    for _ in 0..ROUNDS {
        for i in 0..budgets.len() {
            let batch = vec![&item; budgets[i] / COST as usize];
            let started = Instant::now();
            for _ in 0..most / budgets[i] {
                match model.run(&batch) {
                    Ok(_) => {}
                    Err(RunError::OutOfMemory(_)) if i > 0 => {
                        budgets.truncate(i);
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
            if i >= budgets.len() {
                break;
            }
            seconds[i].push(started.elapsed().as_secs_f64());
        }
    }
    let rate = |(budget, mut seconds): (usize, Vec<f64>)| {
        seconds.sort_by(f64::total_cmp);
        (budget, (most / budget * budget) as f64 / seconds[seconds.len() / 2])
    };
    Ok(budgets.into_iter().zip(seconds).map(rate).collect())
}

/// The smallest budget whose rate is within [`GAIN`] of the best rate.
pub fn choose(rates: &[Rate]) -> Option<usize> {
    let best = rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
    rates.iter().find(|(_, rate)| rate * GAIN >= best).map(|(budget, _)| *budget)
}

/// The calibrated budgets of this machine, by model digest and device.
pub struct Calibrations {
    path: PathBuf,
}

impl Calibrations {
    /// The file in `$XDG_CACHE_HOME/kandle` or `~/.cache/kandle`; `None` if neither directory is known.
    pub fn here() -> Option<Self> {
        let cache = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache")))?;
        Some(Self::at(cache.join("kandle/calibration.json")))
    }

    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn all(&self) -> BTreeMap<String, usize> {
        // An unreadable file counts as empty: the default budget is used.
        std::fs::read(&self.path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }

    pub fn get(&self, digest: &str, device: &str) -> Option<usize> {
        self.all().get(&format!("{digest} {device}")).copied().filter(|&budget| budget > 0)
    }

    pub fn set(&self, digest: &str, device: &str, budget: usize) -> std::io::Result<()> {
        let mut all = self.all();
        all.insert(format!("{digest} {device}"), budget);
        if let Some(directory) = self.path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        // The rename is atomic: concurrent readers never see a partial file.
        let new = self.path.with_extension(format!("{}.new", std::process::id()));
        std::fs::write(&new, serde_json::to_vec_pretty(&all)?)?;
        std::fs::rename(&new, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Item;
    use crate::ragged::Ragged;

    #[test]
    fn the_smallest_budget_close_to_the_best_is_chosen() {
        assert_eq!(choose(&[(64, 50.0), (128, 90.0), (256, 99.0), (512, 100.0), (1024, 97.0)]), Some(256));
        assert_eq!(choose(&[(64, 50.0), (128, 90.0)]), Some(128));
        assert_eq!(choose(&[]), None);
    }

    #[test]
    fn budgets_are_stored_by_model_and_device() {
        let directory = tempfile::tempdir().unwrap();
        let calibrations = Calibrations::at(directory.path().join("a/b.json"));
        assert_eq!(calibrations.get("abc", "cpu"), None);
        calibrations.set("abc", "cpu", 256).unwrap();
        calibrations.set("abc", "cuda:0", 8192).unwrap();
        assert_eq!(calibrations.get("abc", "cpu"), Some(256));
        assert_eq!(calibrations.get("abc", "cuda:0"), Some(8192));
        assert_eq!(calibrations.get("abd", "cpu"), None);
        std::fs::write(calibrations.path(), "{").unwrap();
        assert_eq!(calibrations.get("abc", "cpu"), None);
    }

    struct Fake;

    struct Text;

    impl Item for Text {
        fn cost(&self) -> u32 {
            COST
        }

        fn key(&self) -> Option<u128> {
            None
        }
    }

    impl Model for Fake {
        type Item = Text;
        type Value = f32;

        fn run(&self, batch: &[&Text]) -> Result<Ragged<f32>, RunError> {
            match batch.len() * COST as usize {
                cost if cost > 256 => Err(RunError::OutOfMemory(cost.to_string())),
                _ => Ok(Ragged::of_width(vec![0.0; batch.len()], 1)),
            }
        }

        fn sample(&self, _: u32) -> Text {
            Text
        }
    }

    #[test]
    fn budgets_that_do_not_fit_are_left_out() {
        let rates = measure(&Fake, 64, 2048).unwrap();
        assert_eq!(rates.iter().map(|(budget, _)| *budget).collect::<Vec<_>>(), [64, 128, 256]);
    }
}
