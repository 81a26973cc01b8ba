//! What timm builds of inverted residuals: EfficientNet (arXiv:1905.11946) and its Lite variants, MobileNetV2
//! (arXiv:1801.04381), V3 (arXiv:1905.02244) and V4 (arXiv:2404.10518). The weights tell the kind of a block and all sizes;
//! the name of the architecture tells strides and activations.

use super::*;
use crate::model::kernels::Activation::{self, HardSigmoid, HardSwish, Relu, Relu6, Sigmoid, Silu};

/// What the name of an architecture tells.
struct Family {
    /// How the name begins, without `tf_`.
    start: &'static str,
    /// The stride of each stage.
    strides: &'static [usize],
    activation: Activation,
    /// So many first stages have ReLU.
    with_relu: usize,
    /// Activations of squeeze-and-excitation; that of the block for the first, if it is not given.
    excite: (Option<Activation>, Activation),
}

#[rustfmt::skip]
const FAMILIES: &[Family] = &[
    Family { start: "efficientnet_b", strides: &[1, 2, 2, 2, 1, 2, 1], activation: Silu, with_relu: 0, excite: (None, Sigmoid) },
    Family { start: "efficientnet_lite", strides: &[1, 2, 2, 2, 1, 2, 1], activation: Relu6, with_relu: 0, excite: (None, Sigmoid) },
    Family { start: "mobilenetv2_", strides: &[1, 2, 2, 2, 1, 2, 1], activation: Relu6, with_relu: 0, excite: (None, Sigmoid) },
    Family { start: "mobilenetv3_large_minimal", strides: &[1, 2, 2, 2, 1, 2, 1], activation: Relu, with_relu: 0, excite: (None, Sigmoid) },
    Family { start: "mobilenetv3_small_minimal", strides: &[2, 2, 2, 1, 2, 1], activation: Relu, with_relu: 0, excite: (None, Sigmoid) },
    Family { start: "mobilenetv3_large_", strides: &[1, 2, 2, 2, 1, 2, 1], activation: HardSwish, with_relu: 3, excite: (Some(Relu), HardSigmoid) },
    Family { start: "mobilenetv3_small_", strides: &[2, 2, 2, 1, 2, 1], activation: HardSwish, with_relu: 2, excite: (Some(Relu), HardSigmoid) },
    Family { start: "mobilenetv4_conv_", strides: &[2, 2, 2, 2, 1], activation: Relu, with_relu: 0, excite: (None, Sigmoid) },
];

/// Parts of names of variants that compute something else.
const OTHERS: &[&str] = &["_aa_", "_blur_", "_g8_", "_g16_", "_gn", "_evos"];

/// How the convolutions of a network are padded, and the epsilon of its norms.
#[derive(Clone, Copy)]
struct Style {
    zeros: Zeros,
    eps: f64,
}

pub(super) fn describe(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let name = of.config.get("architecture").as_str().unwrap_or_default();
    // Those with weights of TensorFlow pad and normalise as it does.
    let (plain, style) = match name.strip_prefix("tf_") {
        Some(plain) => (plain, Style { zeros: Zeros::Same, eps: 1e-3 }),
        None => (name, Style { zeros: Zeros::Around, eps: 1e-5 }),
    };
    let family = FAMILIES.iter().find(|family| plain.starts_with(family.start));
    let family =
        family.filter(|_| !OTHERS.iter().any(|part| plain.contains(part)) && of.has("bn1.running_mean"));
    let Some(family) = family else {
        return Err(VisionError::Unsupported(format!("the variant {name} of timm is not supported")));
    };
    let normed = |name: &str, norm: &str, stride| {
        of.convolution(name, stride, style.zeros).map(|convolution| convolution.norm(norm, style.eps))
    };
    let mut steps = vec![normed("conv_stem", "bn1", 2)?.activated(family.activation).into()];
    let stages = count(of, |stage| first_tensor(of, stage, 0));
    if stages != family.strides.len() {
        let message = format!("{name} has {stages} stages, not {}", family.strides.len());
        return Err(VisionError::Unsupported(message));
    }
    for (stage, &stride) in family.strides.iter().enumerate() {
        let activation = if stage < family.with_relu { Relu } else { family.activation };
        for i in 0..count(of, |i| first_tensor(of, stage, i)) {
            let block = Block {
                of,
                start: format!("blocks.{stage}.{i}"),
                stride: if i == 0 { stride } else { 1 },
                activation,
                excite: (family.excite.0.unwrap_or(activation), family.excite.1),
                style,
            };
            steps.extend(block.steps()?);
        }
    }
    // EfficientNet pools after its last convolution; MobileNetV3 and V4 before it.
    let mut head = Vec::new();
    if of.has("bn2.weight") {
        steps.push(normed("conv_head", "bn2", 1)?.activated(family.activation).into());
    } else {
        let last = match of.has("norm_head.weight") {
            true => normed("conv_head", "norm_head", 1)?,
            false => of.convolution("conv_head", 1, style.zeros)?,
        };
        head.push(last.activated(family.activation).into());
    }
    Ok(Network::Convnet(Convnet { steps, head, out: out(of, "classifier")? }))
}

/// The name of a tensor that a block has, whatever its kind; empty if there is none.
fn first_tensor(of: &Checkpoint<'_>, stage: usize, i: usize) -> String {
    let names = ["conv_pw", "conv", "conv_exp", "pw_exp.conv"];
    let mut names = names.map(|part| format!("blocks.{stage}.{i}.{part}.weight")).into_iter();
    names.find(|name| of.has(name)).unwrap_or_default()
}

struct Block<'a> {
    of: &'a Checkpoint<'a>,
    start: String,
    stride: usize,
    activation: Activation,
    /// Of squeeze-and-excitation: between its layers, and of the factors.
    excite: (Activation, Activation),
    style: Style,
}

impl Block<'_> {
    fn has(&self, part: &str) -> bool {
        self.of.has(&format!("{}.{part}.weight", self.start))
    }

    fn convolution(&self, part: &str, norm: &str, stride: usize) -> Result<Convolution, VisionError> {
        let convolution = self.of.convolution(&format!("{}.{part}", self.start), stride, self.style.zeros)?;
        Ok(convolution.norm(format!("{}.{norm}", self.start), self.style.eps))
    }

    fn activated(&self, part: &str, norm: &str, stride: usize) -> Result<Step, VisionError> {
        Ok(self.convolution(part, norm, stride)?.activated(self.activation).into())
    }

    /// One dimension of a convolution's weight.
    fn size(&self, part: &str, dimension: usize) -> Option<usize> {
        let shape = self.of.weights.shape(&format!("{}.{part}.weight", self.start));
        shape.and_then(|shape| shape.get(dimension).copied())
    }

    fn excite(&self) -> Result<Option<Step>, VisionError> {
        if !self.has("se.conv_reduce") {
            return Ok(None);
        }
        let part = |part: &str| self.of.convolution(&format!("{}.se.{part}", self.start), 1, Zeros::Nowhere);
        Ok(Some(Step::Excite {
            reduce: part("conv_reduce")?.activated(self.excite.0),
            expand: part("conv_expand")?.activated(self.excite.1),
        }))
    }

    fn steps(&self) -> Result<Vec<Step>, VisionError> {
        let (branch, inputs, outputs): (Vec<Step>, _, _) = if self.has("conv_pwl") && self.has("conv_pw") {
            // An inverted residual.
            let mut branch = vec![self.activated("conv_pw", "bn1", 1)?];
            branch.push(self.activated("conv_dw", "bn2", self.stride)?);
            branch.extend(self.excite()?);
            branch.push(self.convolution("conv_pwl", "bn3", 1)?.into());
            (branch, self.size("conv_pw", 1), self.size("conv_pwl", 0))
        } else if self.has("conv_exp") {
            // Its expansion is a full convolution.
            let mut branch = vec![self.activated("conv_exp", "bn1", self.stride)?];
            branch.extend(self.excite()?);
            branch.push(self.convolution("conv_pwl", "bn2", 1)?.into());
            (branch, self.size("conv_exp", 1), self.size("conv_pwl", 0))
        } else if self.has("conv_pw") {
            // Depthwise, then each pixel alone.
            let mut branch = vec![self.activated("conv_dw", "bn1", self.stride)?];
            branch.extend(self.excite()?);
            branch.push(self.convolution("conv_pw", "bn2", 1)?.into());
            (branch, self.size("conv_dw", 0), self.size("conv_pw", 0))
        } else if self.has("pw_exp.conv") {
            (self.universal()?, self.size("pw_exp.conv", 1), self.size("pw_proj.conv", 0))
        } else {
            return Ok(vec![self.activated("conv", "bn1", self.stride)?]);
        };
        Ok(match self.stride == 1 && inputs == outputs {
            true => vec![Step::Residual { branch, shortcut: None, activation: None }],
            false => branch,
        })
    }

    /// MobileNetV4's inverted residual, with depthwise convolutions before or after the expansion, or both, or none. The
    /// later one has the stride.
    fn universal(&self) -> Result<Vec<Step>, VisionError> {
        if self.has("dw_end.conv") {
            let message =
                format!("{} has a depthwise convolution at its end, which is not supported", self.start);
            return Err(VisionError::Unsupported(message));
        }
        let (start, middle) = (self.has("dw_start.conv"), self.has("dw_mid.conv"));
        let mut branch = Vec::new();
        if start {
            let stride = if middle { 1 } else { self.stride };
            branch.push(self.convolution("dw_start.conv", "dw_start.bn", stride)?.into());
        }
        branch.push(self.activated("pw_exp.conv", "pw_exp.bn", 1)?);
        if middle {
            branch.push(self.activated("dw_mid.conv", "dw_mid.bn", self.stride)?);
        }
        branch.extend(self.excite()?);
        let scale = format!("{}.layer_scale.gamma", self.start);
        let scale = Some(scale).filter(|scale| self.of.has(scale));
        branch.push(Convolution { scale, ..self.convolution("pw_proj.conv", "pw_proj.bn", 1)? }.into());
        Ok(branch)
    }
}
