//! What differs between architectures, as data: sizes, tensor names, what is pooled. Each has a file.

mod beit;
mod clip;
pub(super) mod convnet;
mod convnext;
mod dinov2;
mod efficientnet;
mod mobilenet;
mod resnet;
mod siglip;
mod timm;
mod timm_convnet;
mod vit;

use serde_json::Value;

use self::convnet::{Convnet, Convolution, Step, Zeros};
use super::{Output, VisionError};
use crate::model::text::architecture::{
    Blocks, Config, ConfigError, FeedForward, Heads, Layer, Mask, NormKind, NormPlacement, Qkv, RelativeBias,
};
use crate::model::weights::Weights;

/// The architectures of transformers, by config.json's `model_type`. To add one, add a file and a line here.
const KNOWN: &[(&str, Describe)] = &[
    ("beit", beit::describe),
    ("clip", clip::describe),
    ("clip_vision_model", clip::describe),
    ("convnext", convnext::transformers),
    ("convnextv2", convnext::transformers),
    ("deit", vit::describe),
    ("dinov2", dinov2::describe),
    ("efficientnet", efficientnet::describe),
    ("mobilenet_v2", mobilenet::describe),
    ("resnet", resnet::transformers),
    ("siglip", siglip::describe),
    ("siglip_vision_model", siglip::describe),
    ("vit", vit::describe),
];

/// Those of timm, by how config.json's `architecture` begins.
const TIMM: &[(&str, Describe)] = &[
    ("convnext", convnext::timm),
    ("deit_", timm::vit),
    ("efficientnet_b", timm_convnet::describe),
    ("efficientnet_lite", timm_convnet::describe),
    ("mobilenetv2_", timm_convnet::describe),
    ("mobilenetv3_large_", timm_convnet::describe),
    ("mobilenetv3_small_", timm_convnet::describe),
    ("mobilenetv4_conv_", timm_convnet::describe),
    ("resnet", resnet::timm),
    ("tf_efficientnet_b", timm_convnet::describe),
    ("tf_efficientnet_lite", timm_convnet::describe),
    ("tf_mobilenetv3_large_", timm_convnet::describe),
    ("tf_mobilenetv3_small_", timm_convnet::describe),
    ("vit_", timm::vit),
];

/// What to use instead of the model that users ask for most.
const SWIN: &str = ". Swin's windows of patches are not supported; use a ConvNeXt or ViT of the same size";

type Describe = fn(&Checkpoint<'_>) -> Result<Network, VisionError>;

/// What an architecture is described by.
pub struct Checkpoint<'a> {
    pub config: &'a Config<'a>,
    /// What tells how many layers there are, and which head, where config.json does not.
    pub weights: &'a Weights,
    pub output: Output,
}

impl Checkpoint<'_> {
    fn has(&self, name: &str) -> bool {
        self.weights.shape(name).is_some()
    }

    /// The one of these prefixes that the names of tensors have in this checkpoint: models without a head have none.
    fn prefix(&self, prefix: &'static str, tensor: &str) -> &'static str {
        if self.has(&format!("{prefix}{tensor}")) { prefix } else { "" }
    }

    /// Rows of a matrix, which are a layer's outputs.
    fn outputs(&self, name: &str) -> Result<usize, VisionError> {
        let shape = self.weights.shape(name).and_then(|shape| shape.first().copied());
        shape.ok_or_else(|| VisionError::Unsupported(format!("its weights have no {name}")))
    }

    /// Refuses a checkpoint without a classifier.
    fn requires_classifier(&self, name: &str) -> Result<(), VisionError> {
        match self.has(&format!("{name}.weight")) {
            true => Ok(()),
            false => Err(VisionError::Unsupported(format!(
                "it is not a classifier of images: its weights have no {name}.weight"
            ))),
        }
    }
}

/// A model's layers.
#[derive(Debug)]
pub enum Network {
    Tower(Box<Tower>),
    Convnet(Convnet),
}

/// A transformer over the patches of an image. Tensor names are whole.
#[derive(Debug)]
pub struct Tower {
    /// Pixels of a patch's side.
    pub patch: usize,
    /// Name of the convolution that makes tokens of patches.
    pub projection: String,
    pub projection_bias: bool,
    /// Names of the tokens that are put before the patches.
    pub tokens: Vec<String>,
    /// Name of the table of positions, of which the tokens before the patches have the first ones.
    pub positions: Option<String>,
    pub relative_bias: Option<RelativeBias>,
    /// The norm before the first layer.
    pub norm_before: Option<String>,
    pub final_norm: Option<String>,
    /// The norm of the pooled vector.
    pub norm_after: Option<String>,
    pub hidden: usize,
    pub heads: Heads,
    pub intermediate: usize,
    pub norm_eps: f64,
    pub feed_forward: FeedForward,
    pub layers: Vec<Layer>,
    pub pool: Pool,
    /// The linear layer after the pooling.
    pub out: Option<Out>,
}

/// How the tokens of an image become one vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pool {
    /// These first tokens, side by side.
    First(usize),
    /// The first token and the mean of the patches, side by side.
    FirstAndMean,
    /// The mean of the patches.
    Mean,
    /// Attention of a learned query over all tokens, and a feed-forward block: the name of SigLIP's head.
    Attention(String),
}

/// A linear layer after the pooling.
#[derive(Debug, Clone)]
pub struct Out {
    /// If there are several, each reads its part of the pooled vector, and their outputs are averaged.
    pub names: Vec<String>,
    pub bias: bool,
    pub outputs: usize,
}

impl Tower {
    /// For `tokens` tokens of an image.
    pub fn blocks(&self, tokens: usize) -> Blocks<'_> {
        Blocks {
            hidden: self.hidden,
            heads: self.heads,
            intermediate: self.intermediate,
            max_tokens: tokens,
            layers: &self.layers,
            relative_bias: self.relative_bias.as_ref(),
            norms: NormPlacement::Pre,
            norm: NormKind::Layer { bias: true },
            norm_eps: self.norm_eps,
            feed_forward: self.feed_forward,
            attention_bias: true,
            up_bias: true,
            down_bias: true,
            final_norm: self.final_norm.as_deref(),
            convolution: None,
        }
    }
}

/// The names of transformers' encoder layers for an image, which most towers share.
struct Names {
    qkv: [&'static str; 3],
    attention_out: &'static str,
    attention_norm: &'static str,
    up: &'static str,
    down: &'static str,
    mlp_norm: &'static str,
}

impl Names {
    /// The layers whose names begin with `start` and their number.
    fn layers(&self, start: &str, count: usize) -> Vec<Layer> {
        (0..count)
            .map(|i| {
                let name = |tail: &str| format!("{start}{i}.{tail}");
                Layer {
                    qkv: Qkv::Separate(self.qkv.map(name)),
                    attention_out: name(self.attention_out),
                    attention_norm: Some(name(self.attention_norm)),
                    up: vec![name(self.up)],
                    down: name(self.down),
                    mlp_norm: name(self.mlp_norm),
                    branch_norms: None,
                    scales: None,
                    qk_norms: None,
                    rope: None,
                    mask: Mask::Full,
                }
            })
            .collect()
    }
}

/// Names of ViT and what came of it, from when their checkpoints were made, which transformers still writes.
const VIT: Names = Names {
    qkv: ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
    attention_out: "attention.output.dense",
    attention_norm: "layernorm_before",
    up: "intermediate.dense",
    down: "output.dense",
    mlp_norm: "layernorm_after",
};

/// Names of CLIP and SigLIP.
const CLIP: Names = Names {
    qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    attention_out: "self_attn.out_proj",
    attention_norm: "layer_norm1",
    up: "mlp.fc1",
    down: "mlp.fc2",
    mlp_norm: "layer_norm2",
};

/// Keys of transformers' configurations of images that change no prediction here: of training, of other heads and outputs,
/// and sizes that the weights have too.
const HARMLESS: &[&str] = &[
    "apply_layernorm",
    "downsample_in_first_stage",
    "drop_path_rate",
    "encoder_stride",
    "image_size",
    "initializer_factor",
    "layerscale_value",
    "logit_scale_init_value",
    "mask_ratio",
    "num_channels",
    "out_features",
    "out_indices",
    "pooler_act",
    "pooler_output_size",
    "projection_dim",
    "reshape_hidden_states",
    "stage_names",
    "text_config",
    "text_config_dict",
    "use_mask_token",
    "vision_config_dict",
];

/// Whether a `model_type` is one of images.
pub fn knows(model_type: &str) -> bool {
    KNOWN.iter().any(|(known, _)| *known == model_type)
}

/// The names of all architectures; those of timm are how they begin.
#[cfg(test)]
pub fn names() -> impl Iterator<Item = &'static str> {
    KNOWN.iter().chain(TIMM).map(|(name, _)| *name)
}

/// The name of a checkpoint's architecture.
///
/// # Errors
/// It is not one of images that kandle runs.
pub fn name(json: &Value) -> Result<String, VisionError> {
    find(json).map(|(name, _)| name)
}

fn find(json: &Value) -> Result<(String, Describe), VisionError> {
    let (key, known, is): (_, _, fn(&str, &str) -> bool) = match json["model_type"].as_str() {
        Some(_) => ("model_type", KNOWN, |name, known| name == known),
        None => ("architecture", TIMM, |name, known| name.starts_with(known)),
    };
    let name = json[key].as_str().unwrap_or_default();
    match known.iter().find(|(known, _)| is(name, known)) {
        Some((_, describe)) => Ok((name.to_owned(), *describe)),
        None => {
            let all =
                |of: &[(&str, Describe)]| of.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
            Err(ConfigError(format!(
                "{key} {name:?} is not a model of images that kandle runs; supported: {}; of timm, an architecture that begins \
                 with {}{}",
                all(KNOWN),
                all(TIMM),
                if name.starts_with("swin") { SWIN } else { "" }
            ))
            .into())
        }
    }
}

/// Reads what a checkpoint's layers are.
///
/// # Errors
/// The architecture is not known, a key of config.json has a value that kandle does not support, or a tensor is missing.
pub fn describe(
    json: &Value,
    weights: &Weights,
    output: Output,
    ignored: &[String],
) -> Result<Network, VisionError> {
    let (_, describe) = find(json)?;
    // CLIP and SigLIP have two models.
    let two = json["vision_config"].is_object();
    let config = Config::new(if two { &json["vision_config"] } else { json });
    let network = describe(&Checkpoint { config: &config, weights, output })?;
    if json["model_type"].is_string() {
        for key in HARMLESS {
            config.get(key);
        }
        config.refuse_others(ignored)?;
    }
    Ok(network)
}

/// The heads of a tower, whose number has to divide the width.
fn heads(hidden: usize, count: usize) -> Result<Heads, VisionError> {
    if count == 0 || !hidden.is_multiple_of(count) {
        return Err(ConfigError(format!("{count} heads do not divide the width {hidden}")).into());
    }
    let width = hidden / count;
    Ok(Heads { queries: count, keys: count, width, scale: (width as f64).powf(-0.5) })
}

/// The side of a square that config.json gives as one number or two equal ones.
fn side(config: &Config<'_>, key: &str, default: usize) -> Result<usize, VisionError> {
    let value = config.get(key);
    let side = match value.as_array().map(Vec::as_slice) {
        Some([height, width]) if height == width => height.as_u64(),
        Some(_) => None,
        None if value.is_null() => Some(default as u64),
        None => value.as_u64(),
    };
    match side {
        Some(side @ 1..) => Ok(side as usize),
        _ => {
            Err(ConfigError(format!("{key} {value} is not supported; supported: the side of a square"))
                .into())
        }
    }
}

/// A classifier's output layer.
fn classifier(checkpoint: &Checkpoint<'_>, names: &[&str]) -> Result<Option<Out>, VisionError> {
    checkpoint.requires_classifier(names[0])?;
    let outputs = checkpoint.outputs(&format!("{}.weight", names[0]))?;
    Ok(Some(Out { names: names.iter().map(|name| (*name).to_owned()).collect(), bias: true, outputs }))
}

/// The vector after the pooling, or the classifier `name` after it.
fn out(of: &Checkpoint<'_>, name: &str) -> Result<Option<Out>, VisionError> {
    match of.output {
        Output::Embedding => Ok(None),
        Output::Logits => classifier(of, &[name]),
    }
}

/// How many there are of what has the tensor `name(0)`, `name(1)` and so on.
fn count(of: &Checkpoint<'_>, name: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|&at| of.has(&name(at))).count()
}
