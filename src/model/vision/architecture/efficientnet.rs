//! EfficientNet (arXiv:1905.11946), with the tensor names of transformers.

use super::*;
use crate::model::kernels::Activation::Sigmoid;
use crate::model::kernels::image::Padding;

pub(super) fn describe(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let config = of.config;
    for key in [
        // The weights have the sizes.
        "in_channels",
        "out_channels",
        "expand_ratios",
        "kernel_sizes",
        "width_coefficient",
        "depth_divisor",
        "squeeze_expansion_ratio",
        "hidden_dim",
        "num_hidden_layers",
        // Of training.
        "batch_norm_momentum",
        "drop_connect_rate",
        "dropout_rate",
    ] {
        config.get(key);
    }
    if let Some(other) = config.get("pooling_type").as_str().filter(|kind| *kind != "mean") {
        return Err(ConfigError(format!("pooling_type {other:?} is not supported; supported: mean")).into());
    }
    let list = |key: &str, default: &[u64]| {
        let list = config.get(key).as_array();
        list.map_or(default.to_vec(), |list| list.iter().filter_map(Value::as_u64).collect())
    };
    let strides = list("strides", &[1, 2, 2, 2, 1, 2, 1]);
    let repeats = list("num_block_repeats", &[1, 2, 2, 3, 3, 4, 1]);
    let square = list("depthwise_padding", &[]);
    let depth = config.number_or("depth_coefficient", 3.1);
    let activation = config.activation("hidden_act", "swish")?;
    let eps = config.number_or("batch_norm_eps", 1e-3);
    let prefix = of.prefix("efficientnet.", "embeddings.convolution.weight");
    let tensor = |name: &str| format!("{prefix}{name}");
    let convolution = |name: &str, norm: &str, stride| {
        of.convolution(&tensor(name), stride, Zeros::Around).map(|it| it.norm(tensor(norm), eps))
    };
    let mut stem = convolution("embeddings.convolution", "embeddings.batchnorm", 2)?.activated(activation);
    stem.window.padding = Padding::Around(0, 1);
    let mut steps = vec![stem.into()];
    let mut at = 0;
    for (stride, repeats) in strides.iter().zip(&repeats) {
        for i in 0..(depth * *repeats as f64).ceil() as usize {
            let name = |tail: &str| format!("encoder.blocks.{at}.{tail}");
            let mut branch = Vec::new();
            if of.has(&tensor(&name("expansion.expand_conv.weight"))) {
                let expand = convolution(&name("expansion.expand_conv"), &name("expansion.expand_bn"), 1)?;
                branch.push(expand.activated(activation).into());
            }
            let stride = if i == 0 { *stride as usize } else { 1 };
            let (depthwise, norm) = ("depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm");
            let mut depthwise = convolution(&name(depthwise), &name(norm), stride)?.activated(activation);
            if stride == 2 {
                let half = depthwise.window.size / 2;
                let first = if square.contains(&(at as u64)) { half } else { half.saturating_sub(1) };
                depthwise.window.padding = Padding::Around(first, half);
            }
            branch.push(depthwise.into());
            let squeeze = |part: &str| {
                of.convolution(&tensor(&name(&format!("squeeze_excite.{part}"))), 1, Zeros::Nowhere)
            };
            branch.push(Step::Excite {
                reduce: squeeze("reduce")?.activated(activation),
                expand: squeeze("expand")?.activated(Sigmoid),
            });
            branch.push(
                convolution(&name("projection.project_conv"), &name("projection.project_bn"), 1)?.into(),
            );
            // The first block of a stage has no residual, even where it could.
            match stride == 1 && i > 0 {
                true => steps.push(Step::Residual { branch, shortcut: None, activation: None }),
                false => steps.extend(branch),
            }
            at += 1;
        }
    }
    if of.has(&tensor(&format!("encoder.blocks.{at}.depthwise_conv.depthwise_conv.weight"))) {
        return Err(ConfigError(format!("says that there are {at} blocks, but the weights have more")).into());
    }
    steps.push(convolution("encoder.top_conv", "encoder.top_bn", 1)?.activated(activation).into());
    Ok(Network::Convnet(Convnet { steps, head: Vec::new(), out: out(of, "classifier")? }))
}
