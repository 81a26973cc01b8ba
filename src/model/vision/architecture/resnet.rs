//! ResNet (arXiv:1512.03385), with the tensor names of transformers and of timm.

use super::*;
use crate::model::kernels::Activation::Relu;
use crate::model::kernels::image::{Padding, Window};

/// Added to the variance by torch's BatchNorm2d.
const EPS: f64 = 1e-5;

/// The tensor names of convolutions and of the norms after them.
struct Names<'a> {
    stem: [String; 2],
    /// Of a stage, a block in it, and a convolution in that.
    block: &'a dyn Fn(usize, usize, usize) -> [String; 2],
    shortcut: &'a dyn Fn(usize, usize) -> [String; 2],
    classifier: &'a str,
}

pub(super) fn transformers(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
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
    let pair = |start: String| [format!("{start}.convolution"), format!("{start}.normalization")];
    let layer = |stage, i| format!("{prefix}encoder.stages.{stage}.layers.{i}");
    describe(
        of,
        Names {
            stem: pair(format!("{prefix}embedder.embedder")),
            block: &|stage, i, at| pair(format!("{}.layer.{at}", layer(stage, i))),
            shortcut: &|stage, i| pair(format!("{}.shortcut", layer(stage, i))),
            classifier: "classifier.1",
        },
    )
}

pub(super) fn timm(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let name = of.config.get("architecture").as_str().unwrap_or_default();
    // Other letters are of other stems and poolings, of which the weights may tell nothing: resnet50d, resnetaa50.
    let (size, _) = name.split_once(['.', '_']).unwrap_or((name, ""));
    let is_plain = size.strip_prefix("resnet").is_some_and(|layers| layers.parse::<u32>().is_ok());
    if !is_plain || of.has("layer1.0.se.fc1.weight") || !of.has("bn1.weight") || !of.has("conv1.weight") {
        let message = "a ResNet of timm with another stem or with attention is not supported; supported: resnet18 to resnet152";
        return Err(VisionError::Unsupported(message.to_owned()));
    }
    let layer = |stage, i| format!("layer{}.{i}", stage + 1);
    describe(
        of,
        Names {
            stem: ["conv1".to_owned(), "bn1".to_owned()],
            block: &|stage, i, at| ["conv", "bn"].map(|part| format!("{}.{part}{}", layer(stage, i), at + 1)),
            shortcut: &|stage, i| ["0", "1"].map(|part| format!("{}.downsample.{part}", layer(stage, i))),
            classifier: "fc",
        },
    )
}

fn describe(of: &Checkpoint<'_>, names: Names<'_>) -> Result<Network, VisionError> {
    let convolution = |[name, norm]: [String; 2], stride| {
        of.convolution(&name, stride, Zeros::Around).map(|convolution| convolution.norm(norm, EPS))
    };
    let pool = Window { size: 3, stride: 2, padding: Padding::Around(1, 1) };
    let mut steps = vec![convolution(names.stem.clone(), 2)?.activated(Relu).into(), Step::MaxPool(pool)];
    let first = |stage, i| format!("{}.weight", (names.block)(stage, i, 0)[0]);
    for stage in 0..count(of, |stage| first(stage, 0)) {
        for i in 0..count(of, |i| first(stage, i)) {
            let convolutions = count(of, |at| format!("{}.weight", (names.block)(stage, i, at)[0]));
            // The first block of each stage but the first halves the image, at its first convolution of 3 × 3 pixels.
            let halves = if stage > 0 && i == 0 { 2 } else { 1 };
            let branch = (0..convolutions).map(|at| {
                let stride = if at == convolutions / 3 { halves } else { 1 };
                let convolution = convolution((names.block)(stage, i, at), stride)?;
                Ok(if at + 1 < convolutions { convolution.activated(Relu) } else { convolution }.into())
            });
            let shortcut = (names.shortcut)(stage, i);
            let shortcut = match of.has(&format!("{}.weight", shortcut[0])) {
                true => Some(convolution(shortcut, halves)?),
                false => None,
            };
            let branch = branch.collect::<Result<_, VisionError>>()?;
            steps.push(Step::Residual { branch, shortcut, activation: Some(Relu) });
        }
    }
    if steps.len() == 2 {
        let message = "its weights have no residual blocks under the names of ResNet";
        return Err(VisionError::Unsupported(message.to_owned()));
    }
    Ok(Network::Convnet(Convnet { steps, head: Vec::new(), out: out(of, names.classifier)? }))
}
