//! A Pooling module's config.json.

use serde_json::Value;

use super::super::model::ModelError;
use super::{refuse_others, unsupported};
use crate::model::kernels::Pooling;

/// Each pooling with its name in `pooling_mode` and its flag in the older form. The older form concatenates in this
/// order.
const MODES: [(&str, &str, Pooling); 6] = [
    ("cls", "pooling_mode_cls_token", Pooling::First),
    ("max", "pooling_mode_max_tokens", Pooling::Max),
    ("mean", "pooling_mode_mean_tokens", Pooling::Mean),
    ("mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens", Pooling::MeanSqrtLen),
    ("weightedmean", "pooling_mode_weightedmean_tokens", Pooling::WeightedMean),
    ("lasttoken", "pooling_mode_lasttoken", Pooling::Last),
];

/// Reads `pooling_mode: "mean"` or a list of such names, or the older form with one flag per mode; `mean` if neither is
/// there. Also returns `include_prompt`.
pub(super) fn read(file: &str, config: &Value) -> Result<(Vec<Pooling>, bool), ModelError> {
    let known = ["word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt"];
    let flags = config.as_object().into_iter().flatten();
    let flags: Vec<&str> =
        flags.map(|(key, _)| key.as_str()).filter(|key| key.starts_with("pooling_mode_")).collect();
    refuse_others(file, config, &[&known[..], &flags].concat())?;
    let include_prompt = config["include_prompt"].as_bool() != Some(false);
    let poolings = match &config["pooling_mode"] {
        Value::Null => by_flags(file, config, &flags)?,
        Value::Array(names) if !names.is_empty() => {
            names.iter().map(|name| by_name(file, name)).collect::<Result<_, _>>()?
        }
        name => vec![by_name(file, name)?],
    };
    Ok((poolings, include_prompt))
}

fn by_name(file: &str, name: &Value) -> Result<Pooling, ModelError> {
    let found = MODES.iter().find(|(mode, ..)| name.as_str() == Some(mode));
    let (.., pooling) = found.ok_or_else(|| unsupported(file, &format!("pooling_mode {name}"), &names()))?;
    Ok(*pooling)
}

fn by_flags(file: &str, config: &Value, flags: &[&str]) -> Result<Vec<Pooling>, ModelError> {
    let is_set = |flag: &str| config[flag].as_bool() == Some(true);
    let unknown = |flag: &&&str| is_set(flag) && MODES.iter().all(|(_, known, _)| *known != **flag);
    if let Some(flag) = flags.iter().find(unknown) {
        return Err(unsupported(file, flag, &names()));
    }
    let set: Vec<Pooling> =
        MODES.iter().filter(|(_, flag, _)| is_set(flag)).map(|(.., pooling)| *pooling).collect();
    Ok(if set.is_empty() { vec![Pooling::Mean] } else { set })
}

fn names() -> String {
    MODES.map(|(name, ..)| name).join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn poolings_are_read_in_both_forms() {
        let of = |config: Value| read("p", &config).map_err(|e| e.to_string());
        let all = |poolings: &[Pooling]| Ok((poolings.to_vec(), true));
        assert_eq!(of(json!({ "pooling_mode": "cls" })), all(&[Pooling::First]));
        assert_eq!(of(json!({ "pooling_mode_max_tokens": true })), all(&[Pooling::Max]));
        assert_eq!(of(json!({ "pooling_mode": ["cls"] })), all(&[Pooling::First]));
        let old = json!({ "word_embedding_dimension": 4, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true });
        assert_eq!(of(old), all(&[Pooling::Mean]));
        assert_eq!(of(json!({})), all(&[Pooling::Mean]));
        assert_eq!(of(json!({ "pooling_mode": ["mean", "cls"] })), all(&[Pooling::Mean, Pooling::First]));
        let several = json!({ "pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true });
        assert_eq!(of(several), all(&[Pooling::First, Pooling::Mean]));
        let without = json!({ "pooling_mode": "mean", "include_prompt": false });
        assert_eq!(of(without), Ok((vec![Pooling::Mean], false)));
        for wrong in [
            json!({ "pooling_mode": "median" }),
            json!({ "pooling_mode": ["mean", "median"] }),
            json!({ "pooling_mode": 3 }),
            json!({ "pooling_mode_median_tokens": true }),
            json!({ "pooling_mode": "cls", "temperature": 2 }),
        ] {
            assert!(of(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
