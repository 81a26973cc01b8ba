//! ViT with the tensor names of timm, whose config.json has only the name of the architecture: sizes are those of the
//! weights.

use super::*;
use crate::model::text::architecture::Activation;

/// Tensors of variants that are not run.
const OTHER_VITS: &[&str] = &[
    "attn_pool.latent",
    "blocks.0.attn.q_norm.weight",
    "blocks.0.attn.norm.weight",
    "blocks.0.mlp.norm.weight",
    "dist_token",
    "fc_norm.weight",
    "reg_token",
];

pub(super) fn vit(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let config = of.config;
    let unsupported = |message: String| Err(VisionError::Unsupported(message));
    if let Some(name) = OTHER_VITS.iter().find(|name| of.has(name)) {
        return unsupported(format!("a ViT of timm with the tensor {name} is not supported"));
    }
    match config.get("global_pool").as_str() {
        None | Some("token") => {}
        Some(other) => {
            return unsupported(format!("global_pool {other:?} of a ViT is not supported; supported: token"));
        }
    }
    let shape = |name: &str, of_dims: usize| match of.weights.shape(name) {
        Some(shape) if shape.len() == of_dims => Ok(shape.to_vec()),
        _ => Err(VisionError::Unsupported(format!("its weights have no {name} of {of_dims} dimensions"))),
    };
    let projection = shape("patch_embed.proj.weight", 4)?;
    let (hidden, patch) = (projection[0], projection[2]);
    let intermediate = shape("blocks.0.mlp.fc1.weight", 2)?[0];
    let name = config.get("architecture").as_str().unwrap_or_default();
    let count = match config.get("model_args")["num_heads"].as_u64() {
        Some(count) => count as usize,
        None if ["_tiny_", "_small_", "_base_", "_large_"].iter().any(|size| name.contains(size)) => {
            hidden / 64
        }
        None => {
            return unsupported(format!(
                "how many heads {name} has is not known; set model_args.num_heads in config.json"
            ));
        }
    };
    let count_layers = (0..).take_while(|i| of.has(&format!("blocks.{i}.norm1.weight"))).count();
    let layers = (0..count_layers)
        .map(|i| {
            let name = |tail: &str| format!("blocks.{i}.{tail}");
            let scales = ["ls1.gamma", "ls2.gamma"].map(name);
            Layer {
                qkv: Qkv::Fused(name("attn.qkv")),
                attention_out: name("attn.proj"),
                attention_norm: Some(name("norm1")),
                up: vec![name("mlp.fc1")],
                down: name("mlp.fc2"),
                mlp_norm: name("norm2"),
                branch_norms: None,
                scales: of.has(&scales[0]).then_some(scales),
                qk_norms: None,
                rope: None,
                mask: Mask::Full,
            }
        })
        .collect();
    let clip = of.has("norm_pre.weight");
    let activation = if name.contains("quickgelu") { Activation::QuickGelu } else { Activation::Gelu };
    Ok(Network::Tower(Box::new(Tower {
        patch,
        projection: "patch_embed.proj".to_owned(),
        projection_bias: of.has("patch_embed.proj.bias"),
        tokens: vec!["cls_token".to_owned()],
        positions: Some("pos_embed".to_owned()),
        relative_bias: None,
        norm_before: clip.then(|| "norm_pre".to_owned()),
        norm_after: None,
        final_norm: Some("norm".to_owned()),
        hidden,
        heads: heads(hidden, count)?,
        intermediate,
        norm_eps: if clip { 1e-5 } else { 1e-6 },
        feed_forward: FeedForward::Plain(activation),
        layers,
        pool: Pool::First(1),
        out: match of.output {
            Output::Embedding => None,
            Output::Logits => classifier(of, &["head"])?,
        },
    })))
}
