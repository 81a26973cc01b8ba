//! config.json of a Chronos-Bolt checkpoint: that of a T5 (arXiv:1910.10683), with `chronos_config` inside.

use serde_json::Value;

use crate::model::store::{Files, FilesError};
use crate::model::text::ModelError;
use crate::model::text::architecture::{
    Activation, Architecture, Classifier, Config, ConfigError, Embeddings, FeedForward, Gate, Heads, Layer,
    Mask, NormKind, NormPlacement, Pooling, Positions, Qkv, RelativeBias,
};

/// The only class of config.json's `architectures` that kandle runs.
const CLASS: &str = "ChronosBoltModelForForecasting";

/// Keys of a T5 that change nothing here: of its training and of text generation, or derived from other keys.
const UNUSED: &[&str] = &[
    "chronos_pipeline_class",
    "dense_act_fn",
    "dropout_rate",
    "initializer_factor",
    "is_encoder_decoder",
    "is_gated_act",
    "n_positions",
    "reg_token_id",
    "scale_decoder_outputs",
    "vocab_size",
];

/// What a checkpoint's config.json says.
#[derive(Debug, Clone)]
pub struct SeriesConfig {
    /// The encoder's layers. A token is a patch of the series, or the register token after the last patch.
    pub encoder: Architecture,
    pub decoder_layers: usize,
    /// Of the layers' feed-forward and of the blocks before and after them.
    pub activation: Activation,
    /// The most points of a series that the model reads.
    pub context: usize,
    /// Points that one pass predicts.
    pub prediction: usize,
    /// Points of a patch.
    pub patch: usize,
    /// The levels that the model predicts, between 0 and 1, increasing.
    pub quantiles: Vec<f64>,
    /// Whether a token that stands for no patch follows the patches.
    pub register: bool,
    /// Row of the embeddings that the decoder begins with.
    pub start: usize,
}

impl SeriesConfig {
    /// # Errors
    /// It is not a Chronos-Bolt model, or has settings that kandle does not support.
    pub fn read(files: &Files) -> Result<Self, ModelError> {
        let config = files.json("config.json")?;
        let config = config.ok_or_else(|| FilesError::Missing { file: "config.json".to_owned() })?;
        Ok(Self::of(&config, files.ignored_keys())?)
    }

    fn of(json: &Value, ignored: &[String]) -> Result<Self, ConfigError> {
        let class = json["architectures"][0].as_str().unwrap_or(CLASS);
        if class != CLASS || json["chronos_config"]["input_patch_size"].is_null() {
            return Err(ConfigError(format!(
                "it is no Chronos-Bolt model ({CLASS}), the only kind that forecast takes; use one such as \
                 amazon/chronos-bolt-small"
            )));
        }
        let config = Config::new(json);
        for key in UNUSED {
            config.get(key);
        }
        let (activation, gated) = activation(config.get("feed_forward_proj").as_str().unwrap_or("relu"))?;
        let chronos = Config::new(config.get("chronos_config"));
        let (context, patch) = (chronos.size("context_length")?, chronos.size("input_patch_size")?);
        let stride = chronos.size("input_patch_stride")?;
        if stride != patch {
            return Err(ConfigError(format!(
                "chronos_config.input_patch_stride {stride} is not supported; supported: input_patch_size, {patch}"
            )));
        }
        let register = chronos.flag_or("use_reg_token", false);
        let quantiles: Vec<f64> =
            chronos.get("quantiles").as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
        let within = quantiles.iter().all(|level| (0.0..=1.0).contains(level));
        if quantiles.is_empty() || !within || !quantiles.is_sorted_by(|a, b| a < b) {
            return Err(ConfigError(
                "chronos_config.quantiles are no increasing levels between 0 and 1".to_owned(),
            ));
        }
        if !quantiles.contains(&0.5) {
            return Err(ConfigError("chronos_config.quantiles have no median, 0.5".to_owned()));
        }
        let prediction = chronos.size("prediction_length")?;
        chronos.refuse_others(&[])?;
        let (hidden, queries) = (config.size("d_model")?, config.size("num_heads")?);
        let shape = Shape {
            hidden,
            // T5 has no factor of the scores: it is in the initial weights.
            heads: Heads { queries, keys: queries, width: config.size("d_kv")?, scale: 1.0 },
            intermediate: config.size("d_ff")?,
            feed_forward: match gated {
                true => FeedForward::Gated(activation, Gate::First),
                false => FeedForward::Plain(activation),
            },
            norm_eps: config.number_or("layer_norm_epsilon", 1e-6),
            layers: config.size("num_layers")?,
            vocabulary: if register { 2 } else { 1 },
            buckets: config.size_or("relative_attention_num_buckets", 32)?,
            max_distance: config.size_or("relative_attention_max_distance", 128)?,
            max_tokens: context.div_ceil(patch) + usize::from(register),
        };
        let start = config.get("decoder_start_token_id").as_u64().unwrap_or(0) as usize;
        if start >= shape.vocabulary {
            return Err(ConfigError(format!("decoder_start_token_id {start} is outside of the embeddings")));
        }
        let decoder_layers = config.size_or("num_decoder_layers", shape.layers)?;
        config.refuse_others(ignored)?;
        Ok(Self {
            encoder: shape.encoder(),
            decoder_layers,
            activation,
            context,
            prediction,
            patch,
            quantiles,
            register,
            start,
        })
    }

    /// Tokens of a series of this many points.
    pub fn tokens(&self, points: usize) -> usize {
        points.min(self.context).div_ceil(self.patch) + usize::from(self.register)
    }

    /// Number of quantiles.
    pub fn levels(&self) -> usize {
        self.quantiles.len()
    }
}

/// The activation that `feed_forward_proj` names, and whether the feed-forward is gated, as transformers reads it.
fn activation(name: &str) -> Result<(Activation, bool), ConfigError> {
    let (name, gated) = match name {
        "gated-gelu" => ("gelu_new", true),
        name => name.strip_prefix("gated-").map_or((name, false), |name| (name, true)),
    };
    let activation = match name {
        "relu" => Activation::Relu,
        "gelu" => Activation::Gelu,
        "gelu_new" => Activation::GeluTanh,
        "silu" => Activation::Silu,
        other => {
            return Err(ConfigError(format!(
                "feed_forward_proj {other:?} is not supported; supported: relu, gelu, gelu_new, silu, gated-gelu, \
                 gated-silu"
            )));
        }
    };
    Ok((activation, gated))
}

/// The sizes of a T5.
struct Shape {
    hidden: usize,
    heads: Heads,
    intermediate: usize,
    feed_forward: FeedForward,
    norm_eps: f64,
    layers: usize,
    vocabulary: usize,
    buckets: usize,
    max_distance: usize,
    max_tokens: usize,
}

impl Shape {
    /// The encoder as the packed trunk takes it, with names below `encoder`.
    fn encoder(self) -> Architecture {
        let gated = matches!(self.feed_forward, FeedForward::Gated(..));
        let layer = |i: usize| {
            let attention = |tail: &str| format!("block.{i}.layer.0.SelfAttention.{tail}");
            let feed_forward = |tail: &str| format!("block.{i}.layer.1.DenseReluDense.{tail}");
            Layer {
                qkv: Qkv::Separate(["q", "k", "v"].map(attention)),
                attention_out: attention("o"),
                attention_norm: Some(format!("block.{i}.layer.0.layer_norm")),
                up: match gated {
                    true => vec![feed_forward("wi_0"), feed_forward("wi_1")],
                    false => vec![feed_forward("wi")],
                },
                down: feed_forward("wo"),
                mlp_norm: format!("block.{i}.layer.1.layer_norm"),
                branch_norms: None,
                scales: None,
                qk_norms: None,
                rope: None,
                mask: Mask::Full,
            }
        };
        Architecture {
            name: "chronos-bolt".to_owned(),
            prefixes: &["encoder"],
            vocabulary: self.vocabulary,
            hidden: self.hidden,
            heads: self.heads,
            intermediate: self.intermediate,
            norm_eps: self.norm_eps,
            embeddings: Embeddings {
                word: "shared",
                token_type: None,
                scale: None,
                norm: None,
                width: self.hidden,
                projection: None,
            },
            positions: Positions::Relative { count: self.max_tokens },
            layers: (0..self.layers).map(layer).collect(),
            relative_bias: Some(RelativeBias::Buckets {
                name: "block.0.layer.0.SelfAttention.relative_attention_bias",
                buckets: self.buckets,
                max_distance: self.max_distance,
            }),
            norms: NormPlacement::Pre,
            feed_forward: self.feed_forward,
            attention_bias: false,
            up_bias: false,
            down_bias: false,
            norm: NormKind::Rms,
            final_norm: Some("final_layer_norm"),
            convolution: None,
            // The trunk has no head; the one of a series model is its decoder.
            classifier: Classifier {
                pooling: Pooling::Last,
                padding: None,
                dense: None,
                dense_in_encoder: false,
                dense_bias: false,
                activation: Activation::Relu,
                norm: None,
                out: "",
                out_bias: false,
                dense_for_tokens: false,
            },
            masked_lm: None,
            tower: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// config.json of amazon/chronos-bolt-small.
    fn small() -> Value {
        json!({
            "architectures": ["ChronosBoltModelForForecasting"],
            "chronos_config": { "context_length": 2048, "input_patch_size": 16, "input_patch_stride": 16,
                "prediction_length": 64, "quantiles": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "use_reg_token": true },
            "chronos_pipeline_class": "ChronosBoltPipeline", "classifier_dropout": 0.0, "d_ff": 2048, "d_kv": 64,
            "d_model": 512, "decoder_start_token_id": 0, "dense_act_fn": "relu", "dropout_rate": 0.1,
            "eos_token_id": 1, "feed_forward_proj": "relu", "initializer_factor": 0.05, "is_encoder_decoder": true,
            "is_gated_act": false, "layer_norm_epsilon": 1e-6, "model_type": "t5", "n_positions": 512,
            "num_decoder_layers": 6, "num_heads": 8, "num_layers": 6, "pad_token_id": 0, "reg_token_id": 1,
            "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
            "torch_dtype": "float32", "transformers_version": "4.39.3", "use_cache": true, "vocab_size": 2
        })
    }

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        let mut config = small();
        change(&mut config);
        SeriesConfig::of(&config, &[]).unwrap_err().0
    }

    #[test]
    fn chronos_bolt_small() {
        let config = SeriesConfig::of(&small(), &[]).unwrap();
        assert_eq!((config.context, config.prediction, config.patch, config.levels()), (2048, 64, 16, 9));
        assert_eq!([1, 16, 17, 2048, 5000].map(|points| config.tokens(points)), [2, 2, 3, 129, 129]);
        assert_eq!((config.encoder.layers.len(), config.encoder.max_tokens()), (6, 129));
    }

    #[test]
    fn others_are_refused_with_the_reason() {
        let chronos_2 = |config: &mut Value| config["architectures"] = json!(["Chronos2Model"]);
        assert!(refused(chronos_2).contains("it is no Chronos-Bolt model"));
        // The first Chronos has tokens for values.
        let first = |config: &mut Value| {
            config["chronos_config"] = json!({ "n_tokens": 4096, "context_length": 512 })
        };
        assert!(refused(first).contains("it is no Chronos-Bolt model"));
        let overlapping = |config: &mut Value| config["chronos_config"]["input_patch_stride"] = 8.into();
        assert_eq!(
            refused(overlapping),
            "chronos_config.input_patch_stride 8 is not supported; supported: input_patch_size, 16"
        );
        assert!(
            refused(|config| config["chronos_config"]["use_arcsinh"] = true.into()).contains("use_arcsinh")
        );
        assert!(refused(|config| config["tie_everything"] = true.into()).contains("tie_everything"));
        assert!(refused(|config| config["feed_forward_proj"] = "mish".into()).contains("\"mish\""));
        assert!(
            refused(|config| config["chronos_config"]["quantiles"] = json!([0.1, 0.9])).contains("median")
        );
    }
}
