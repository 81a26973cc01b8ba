//! ResNet (arXiv:1512.03385), with the tensor names of transformers.

use super::*;

pub(super) fn describe(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let config = of.config;
    for (key, only) in [("hidden_act", "relu"), ("layer_type", "bottleneck")] {
        let value = config.get(key).as_str().unwrap_or(only);
        if value != only && !(key == "layer_type" && value == "basic") {
            return Err(ConfigError(format!("{key} {value:?} is not supported; supported: {only}")).into());
        }
    }
    for key in ["downsample_in_bottleneck", "downsample_in_first_stage"] {
        if config.flag_or(key, false) {
            return Err(ConfigError(format!("{key}: true is not supported; supported: false")).into());
        }
    }
    for key in ["depths", "embedding_size", "hidden_sizes"] {
        // The weights have them.
        config.get(key);
    }
    let prefix = of.prefix("resnet.", "embedder.embedder.convolution.weight");
    let convolution = |start: String, stride| Convolution {
        weight: format!("{start}.convolution.weight"),
        norm: format!("{start}.normalization"),
        stride,
    };
    let block = |stage: usize, i: usize| {
        let start = format!("{prefix}encoder.stages.{stage}.layers.{i}");
        super::residual_block(
            of,
            (stage, i),
            |at, stride| convolution(format!("{start}.layer.{at}"), stride),
            |stride| convolution(format!("{start}.shortcut"), stride),
        )
    };
    let out = match of.output {
        Output::Embedding => None,
        Output::Logits => classifier(of, &["classifier.1"])?,
    };
    let stem = convolution(format!("{prefix}embedder.embedder"), 2);
    residual(of, stem, block, out)
}
