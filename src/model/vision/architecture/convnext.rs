//! ConvNeXt (arXiv:2201.03545) and its second version (arXiv:2301.00808), with the tensor names of transformers and of timm.

use super::*;
use crate::model::kernels::Activation;

/// Tensors of timm's variants that are not run.
const OTHERS: &[&str] = &[
    "head.pre_logits.fc.weight",
    "norm_pre.weight",
    "stem.2.weight",
    "stem.3.weight",
    "stages.0.blocks.0.shortcut.conv.weight",
];

/// The tensor names of the parts.
struct Names<'a> {
    /// Of the convolution of patches and the norm after it.
    stem: [String; 2],
    /// Of a stage: the norm and the convolution before its first block.
    downsample: &'a dyn Fn(usize) -> [String; 2],
    /// Of a stage, a block in it, and a part: depthwise convolution, norm, up, response norm, down, scale.
    block: &'a dyn Fn(usize, usize) -> [String; 6],
    norm: String,
    classifier: &'a str,
}

pub(super) fn transformers(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let config = of.config;
    for key in ["depths", "hidden_sizes", "patch_size", "num_stages", "layer_scale_init_value"] {
        // The weights have them.
        config.get(key);
    }
    let name = config.name();
    let start: &'static str = if name == "convnextv2" { "convnextv2." } else { "convnext." };
    let prefix = of.prefix(start, "embeddings.patch_embeddings.weight");
    let activation = config.activation("hidden_act", "gelu")?;
    let eps = config.number_or("layer_norm_eps", 1e-12);
    let stage = |stage| format!("{prefix}encoder.stages.{stage}");
    let names = Names {
        stem: ["patch_embeddings", "layernorm"].map(|part| format!("{prefix}embeddings.{part}")),
        downsample: &|at| ["0", "1"].map(|part| format!("{}.downsampling_layer.{part}", stage(at))),
        block: &|at, i| {
            ["dwconv", "layernorm", "pwconv1", "grn", "pwconv2", "layer_scale_parameter"]
                .map(|part| format!("{}.layers.{i}.{part}", stage(at)))
        },
        norm: format!("{prefix}layernorm"),
        classifier: "classifier",
    };
    describe(of, &names, activation, eps)
}

pub(super) fn timm(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let unsupported = OTHERS.iter().find(|name| of.has(name));
    let name = of.config.get("architecture").as_str().unwrap_or_default();
    // A norm without a bias is RMSNorm.
    if unsupported.is_some() || !of.has("head.norm.bias") {
        let what =
            unsupported.map_or("without head.norm.bias".to_owned(), |name| format!("with the tensor {name}"));
        return Err(VisionError::Unsupported(format!(
            "{name}, a ConvNeXt of timm {what}, is not supported; supported: convnext_atto to convnext_xlarge and \
             convnextv2_atto to convnextv2_huge"
        )));
    }
    let names = Names {
        stem: ["stem.0", "stem.1"].map(str::to_owned),
        downsample: &|stage| ["0", "1"].map(|part| format!("stages.{stage}.downsample.{part}")),
        block: &|stage, i| {
            ["conv_dw", "norm", "mlp.fc1", "mlp.grn", "mlp.fc2", "gamma"]
                .map(|part| format!("stages.{stage}.blocks.{i}.{part}"))
        },
        norm: "head.norm".to_owned(),
        classifier: "head.fc",
    };
    describe(of, &names, Activation::Gelu, 1e-6)
}

/// `eps`: of the last norm.
fn describe(
    of: &Checkpoint<'_>,
    names: &Names<'_>,
    activation: Activation,
    eps: f64,
) -> Result<Network, VisionError> {
    let normalize = |name: &str| Step::Normalize { name: name.to_owned(), eps: 1e-6 };
    // Its stride is its side.
    let patches = |name: &str| {
        let mut convolution = of.convolution(name, 1, Zeros::Nowhere)?;
        convolution.window.stride = convolution.window.size;
        Ok::<_, VisionError>(convolution)
    };
    let mut steps = vec![patches(&names.stem[0])?.into(), normalize(&names.stem[1])];
    let first = |stage, i| format!("{}.weight", (names.block)(stage, i)[0]);
    for stage in 0..count(of, |stage| first(stage, 0)) {
        let [norm, convolution] = (names.downsample)(stage);
        if of.has(&format!("{convolution}.weight")) {
            steps.extend([normalize(&norm), patches(&convolution)?.into()]);
        }
        for i in 0..count(of, |i| first(stage, i)) {
            let [depthwise, norm, up, response, down, scale] = (names.block)(stage, i);
            let mut branch = vec![
                of.convolution(&depthwise, 1, Zeros::Around)?.into(),
                normalize(&norm),
                of.convolution(&up, 1, Zeros::Nowhere)?.activated(activation).into(),
            ];
            let [weight, bias] = ["weight", "bias"].map(|part| format!("{response}.{part}"));
            if of.has(&weight) {
                branch.push(Step::Respond { weight, bias });
            }
            let down = of.convolution(&down, 1, Zeros::Nowhere)?;
            branch.push(Convolution { scale: Some(scale).filter(|scale| of.has(scale)), ..down }.into());
            steps.push(Step::Residual { branch, shortcut: None, activation: None });
        }
    }
    let head = vec![Step::Normalize { name: names.norm.clone(), eps }];
    Ok(Network::Convnet(Convnet { steps, head, out: out(of, names.classifier)? }))
}
