//! MobileNetV2 (arXiv:1801.04381), with the tensor names of transformers.

use super::*;

/// The stride of each block.
const STRIDES: [usize; 16] = [2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1];

pub(super) fn describe(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let config = of.config;
    for key in [
        // The weights have the sizes.
        "depth_multiplier",
        "depth_divisible_by",
        "min_depth",
        "expand_ratio",
        "first_layer_is_expansion",
        "finegrained_output",
        // Of segmentation.
        "semantic_loss_ignore_index",
    ] {
        config.get(key);
    }
    if let Some(stride) = config.get("output_stride").as_u64().filter(|stride| *stride != 32) {
        return Err(ConfigError(format!("output_stride {stride} is not supported; supported: 32")).into());
    }
    let zeros = if config.flag_or("tf_padding", true) { Zeros::Same } else { Zeros::Around };
    let activation = config.activation("hidden_act", "relu6")?;
    let eps = config.number_or("layer_norm_eps", 1e-3);
    let prefix = of.prefix("mobilenet_v2.", "conv_stem.first_conv.convolution.weight");
    let convolution = |name: &str, stride| {
        let name = format!("{prefix}{name}");
        let convolution = of.convolution(&format!("{name}.convolution"), stride, zeros)?;
        Ok::<_, VisionError>(convolution.norm(format!("{name}.normalization"), eps))
    };
    let mut steps = vec![convolution("conv_stem.first_conv", 2)?.activated(activation).into()];
    if of.has(&format!("{prefix}conv_stem.expand_1x1.convolution.weight")) {
        steps.push(convolution("conv_stem.expand_1x1", 1)?.activated(activation).into());
    }
    steps.push(convolution("conv_stem.conv_3x3", 1)?.activated(activation).into());
    steps.push(convolution("conv_stem.reduce_1x1", 1)?.into());
    for (i, &stride) in STRIDES.iter().enumerate() {
        let name = |part: &str| format!("layer.{i}.{part}");
        let of_part = |part: &str, at: usize| {
            let weight = format!("{prefix}{}.convolution.weight", name(part));
            of.weights.shape(&weight).and_then(|shape| shape.get(at).copied())
        };
        let branch = vec![
            convolution(&name("expand_1x1"), 1)?.activated(activation).into(),
            convolution(&name("conv_3x3"), stride)?.activated(activation).into(),
            convolution(&name("reduce_1x1"), 1)?.into(),
        ];
        match stride == 1 && of_part("expand_1x1", 1) == of_part("reduce_1x1", 0) {
            true => steps.push(Step::Residual { branch, shortcut: None, activation: None }),
            false => steps.extend(branch),
        }
    }
    steps.push(convolution("conv_1x1", 1)?.activated(activation).into());
    Ok(Network::Convnet(Convnet { steps, head: Vec::new(), out: out(of, "classifier")? }))
}
