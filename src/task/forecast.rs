//! forecast: the next points of a series, `{"mean":[…],"quantiles":{"0.1":[…],…}}`, by Chronos-Bolt.

mod points;

use std::sync::Arc;

use self::points::Points;
use super::kinds::{Family, Kind, Reads};
use super::text::{Source, not_loaded, start};
use super::{NUMBER, Task, TaskError, to_json};
use crate::codec::Input;
use crate::codec::write::Writer;
use crate::codec::write::schema::{Field, Type};
use crate::compute::{Batched, Compute, Pace};
use crate::engine::Rows;
use crate::model::series::{Series, SeriesError, SeriesModel, interpolate};
use crate::record::{Fault, RecordError};
use crate::settings::{self, Settings, TaskKind};
use crate::telemetry::Metrics;
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("forecast"),
    prediction: "`{\"mean\":[…],\"quantiles\":{\"0.1\":[…],…}}`: the next points of a series, by Chronos-Bolt",
    fields: |_| {
        let points = || Type::list(Type::Float);
        vec![
            Field::new(
                1,
                "mean",
                points(),
                "The predicted points, the next one first: the median, as Chronos-Bolt gives it",
            ),
            Field::new(2, "quantiles", Type::map(points()), "The quantiles of these points, by level"),
        ]
    },
    shows: |_| Shows::Nothing,
    keys: &["horizon", "quantiles", "cache"],
    pointers: &[],
    overflow: &[],
    check: rules,
    family: Family::Series,
    reads: Reads::Series,
    load,
};

fn rules(task: &settings::Task) -> Vec<(&'static str, String)> {
    let mut problems = Vec::new();
    for (i, level) in task.quantiles.iter().enumerate() {
        if !(*level > 0.0 && *level < 1.0) {
            problems.push(("quantiles", format!("{level} is not between 0 and 1")));
        }
        if task.quantiles[..i].contains(level) {
            problems.push(("quantiles", format!("{level} is named twice")));
        }
    }
    problems
}

/// Cost of a batch on a CPU core, in tokens: eight of the longest series of Chronos-Bolt, so that the decoder, which has one
/// token per series, reads its weights once for all of them.
const CORE_COST: usize = 1024;

/// Loads the model for a configuration: for `model show` too.
///
/// # Errors
/// It cannot be loaded.
pub fn load_model(settings: &Settings, source: Source) -> Result<SeriesModel, TaskError> {
    SeriesModel::load(source.files, source.placement, settings.task.horizon).map_err(not_loaded(settings))
}

fn load(settings: &Settings, metrics: &Arc<Metrics>) -> Result<Arc<dyn Compute>, TaskError> {
    let source = Source::find(settings)?;
    let model = Arc::new(load_model(settings, source.clone())?);
    let levels = Levels::new(&settings.task.quantiles, &model.config.quantiles)?;
    let config = &model.config;
    if model.horizon > config.prediction {
        let passes = model.horizon.div_ceil(config.prediction);
        tracing::warn!(
            horizon = model.horizon,
            in_one_pass = config.prediction,
            passes,
            "task.horizon is more than the model was trained for: further passes are less accurate"
        );
    }
    let architecture = format!(
        "Chronos-Bolt, up to {} points, the next {} in {}",
        config.context,
        model.horizon,
        match model.horizon.div_ceil(config.prediction) {
            1 => "one pass".to_owned(),
            passes => format!("{passes} passes"),
        }
    );
    let about = source.about(settings, architecture, model.weight_bytes());
    let is_cpu = model.placement.is_cpu();
    let longest = config.tokens(config.context);
    let budget = is_cpu.then_some(CORE_COST);
    let (engine, seconds_per_token) =
        start(Arc::clone(&model), &about, is_cpu, longest, budget, settings, metrics)?;
    let pace = Pace::new(seconds_per_token);
    let pointer = settings.input.field.0.first().cloned().unwrap_or_default();
    let points = Points { pointer, context: config.context };
    let task = Forecast { levels, points, model, metrics: Arc::clone(metrics) };
    let (decoder, writer) = (Kind::decoder(settings)?, Writer::new(settings));
    Ok(Arc::new(Batched { about, decoder, writer, task, engine, pace, metrics: Arc::clone(metrics) }))
}

/// The quantiles that are published, and where they come from.
struct Levels {
    /// Their names.
    names: Vec<String>,
    /// The place of the median among the model's quantiles.
    median: usize,
    origin: Origin,
}

enum Origin {
    /// Places among the model's quantiles.
    Model(Vec<usize>),
    /// Levels of which the model does not predict each: all are interpolated, as in the chronos package.
    Interpolated(Vec<f64>),
}

impl Levels {
    /// # Errors
    /// The model's quantiles do not give one of these.
    fn new(wanted: &[f64], known: &[f64]) -> Result<Self, TaskError> {
        let wanted = if wanted.is_empty() { known } else { wanted };
        let place = |level: &f64| known.iter().position(|known| known == level);
        let list = || known.iter().map(f64::to_string).collect::<Vec<_>>().join(", ");
        let refused = |message: String| TaskError::Setting { key: "task.quantiles", message };
        let origin = match wanted.iter().map(place).collect::<Option<Vec<usize>>>() {
            Some(places) => Origin::Model(places),
            None => {
                let outside = |level: &&f64| **level < known[0] || **level > known[known.len() - 1];
                if let Some(level) = wanted.iter().find(outside) {
                    return Err(refused(format!(
                        "{level} is outside of the quantiles that the model was trained for: {}",
                        list()
                    )));
                }
                let even = (1..).zip(known).all(|(i, known_level)| {
                    (known_level - f64::from(i) / (known.len() + 1) as f64).abs() < 1e-6
                });
                if !even {
                    return Err(refused(format!(
                        "kandle cannot interpolate between the model's quantiles, which are not evenly spread: {}",
                        list()
                    )));
                }
                Origin::Interpolated(wanted.to_vec())
            }
        };
        let median =
            place(&0.5).ok_or_else(|| refused("the model does not predict the median".to_owned()))?;
        Ok(Self { names: wanted.iter().map(f64::to_string).collect(), median, origin })
    }

    /// The published quantiles of each point, from the model's, `[levels, points]`.
    fn rows(&self, answer: &[f32], horizon: usize) -> Vec<Vec<f32>> {
        let row = |level: usize| answer[level * horizon..][..horizon].to_vec();
        match &self.origin {
            Origin::Model(places) => places.iter().map(|&place| row(place)).collect(),
            Origin::Interpolated(levels) => {
                let mut rows = vec![Vec::with_capacity(horizon); levels.len()];
                for point in 0..horizon {
                    let of_point = || answer[point..].iter().step_by(horizon).copied();
                    for (row, level) in rows.iter_mut().zip(levels) {
                        row.push(interpolate(&mut of_point().collect(), *level));
                    }
                }
                rows
            }
        }
    }
}

struct Forecast {
    model: Arc<SeriesModel>,
    points: Points,
    levels: Levels,
    metrics: Arc<Metrics>,
}

impl Task for Forecast {
    type Item = Series;
    type Value = f32;
    type Kept = ();

    fn prepare(&self, input: &Input<'_>, items: &mut Vec<Series>) -> Result<(), RecordError> {
        let points = self.points.read(input.values.first().and_then(Option::as_deref))?;
        let series = self.model.series(&points).map_err(|error| {
            let message = format!("{:?}: {error}", self.points.pointer);
            RecordError::new(if error == SeriesError::Empty { Fault::Field } else { Fault::Prepare }, message)
        })?;
        if points.len() > self.model.config.context {
            self.metrics.truncated.inc();
        }
        items.push(series);
        Ok(())
    }

    fn predict(&self, (): &(), answers: Rows<'_, f32>, out: &mut Vec<u8>) -> Result<(), RecordError> {
        let (answer, horizon) = (answers.only(), self.model.horizon);
        out.extend_from_slice(b"{\"mean\":");
        to_json(&&answer[self.levels.median * horizon..][..horizon], out)?;
        out.extend_from_slice(b",\"quantiles\":{");
        for (i, (name, row)) in self.levels.names.iter().zip(self.levels.rows(answer, horizon)).enumerate() {
            if i > 0 {
                out.push(b',');
            }
            to_json(name, out)?;
            out.push(b':');
            to_json(&row, out)?;
        }
        out.extend_from_slice(b"}}");
        Ok(())
    }

    fn footprint(&self, value: &[u8]) -> usize {
        // A point is two bytes of JSON at least.
        let points = (value.len() / 2).min(self.model.config.context);
        let published = (self.levels.names.len() + 1) * self.model.horizon * NUMBER;
        size_of::<Series>() + (points + self.model.width()) * size_of::<f32>() + published
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TENTHS: [f64; 9] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];

    fn rows(wanted: &[f64], horizon: usize) -> Vec<Vec<f32>> {
        let answer: Vec<f32> = (0..9 * horizon).map(|i| (i / horizon * 10 + i % horizon) as f32).collect();
        Levels::new(wanted, &TENTHS).unwrap().rows(&answer, horizon)
    }

    #[test]
    fn quantiles_are_the_models_or_between_them() {
        assert_eq!(rows(&[0.9, 0.1], 2), [[80.0, 81.0], [0.0, 1.0]]);
        assert_eq!(rows(&[], 1).len(), 9);
        let found = rows(&[0.25, 0.5], 2);
        for (row, want) in found.iter().zip([[15.0, 16.0], [40.0, 41.0]]) {
            for (x, want) in row.iter().zip(want) {
                assert!((x - want).abs() < 1e-5, "{found:?}");
            }
        }
    }

    #[test]
    fn other_levels_are_refused() {
        let refused = |wanted: &[f64], known: &[f64]| Levels::new(wanted, known).err().unwrap().to_string();
        assert!(refused(&[0.05], &TENTHS).contains("0.05 is outside of the quantiles"));
        assert!(refused(&[0.3], &[0.1, 0.5, 0.9]).contains("not evenly spread: 0.1, 0.5, 0.9"));
    }

    #[test]
    fn levels_are_between_0_and_1_and_named_once() {
        let of = |quantiles: &[f64]| {
            let task = settings::Task { quantiles: quantiles.to_vec(), ..settings::Task::of(KIND.kind) };
            rules(&task).into_iter().map(|(_, message)| message).collect::<Vec<_>>()
        };
        assert_eq!(of(&[0.1, 0.5]), Vec::<String>::new());
        assert_eq!(of(&[0.0, 0.5, 0.5]), ["0 is not between 0 and 1", "0.5 is named twice"]);
        assert_eq!(of(&[f64::NAN]), ["NaN is not between 0 and 1"]);
    }
}
