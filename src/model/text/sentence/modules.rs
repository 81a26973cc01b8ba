//! modules.json: the modules that turn a text into a vector, in their order, each with a folder of its own.

use std::fmt;

use serde_json::Value;

use super::super::model::ModelError;
use super::{pooling, refuse_others, unsupported};
use crate::model::kernels::{Activation, Pooling};
use crate::model::store::{Files, FilesError};

/// The files of a module's folder that kandle reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    Nothing,
    Config,
    ConfigAndWeights,
}

/// The modules that kandle knows, by the last part of their type, with the files of their folder.
const KNOWN: [(&str, Contents); 6] = [
    ("Transformer", Contents::Nothing),
    ("Pooling", Contents::Config),
    ("Dense", Contents::ConfigAndWeights),
    ("LayerNorm", Contents::ConfigAndWeights),
    ("Normalize", Contents::Nothing),
    // Changes nothing but training.
    ("Dropout", Contents::Nothing),
];

/// The modules of models that give no dense vector: rerankers that are language models, and sparse encoders.
const OTHERS: [(&str, Contents); 2] = [("LogitScore", Contents::Config), ("SpladePooling", Contents::Config)];

/// The names of a module's weights; the first existing file is used.
const WEIGHTS: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];

/// The activations of a Dense module, by the last part of their type in `torch.nn`.
const ACTIVATIONS: [(&str, Option<Activation>); 6] = [
    ("Identity", None),
    ("Tanh", Some(Activation::Tanh)),
    ("ReLU", Some(Activation::Relu)),
    ("GELU", Some(Activation::Gelu)),
    ("Sigmoid", Some(Activation::Sigmoid)),
    ("SiLU", Some(Activation::Silu)),
];

/// A layer that follows the pooling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layer {
    Dense {
        folder: String,
        inputs: usize,
        outputs: usize,
        bias: bool,
        activation: Option<Activation>,
    },
    LayerNorm {
        folder: String,
        width: usize,
    },
    /// Scales the vector to length 1.
    Normalize,
}

/// For `model show`.
impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dense { inputs, outputs, activation, .. } => {
                write!(f, "dense {inputs} to {outputs}")?;
                let name = ACTIVATIONS.iter().find(|(_, known)| known == activation && known.is_some());
                name.map_or(Ok(()), |(name, _)| write!(f, " {name}"))
            }
            Self::LayerNorm { .. } => f.write_str("layer norm"),
            Self::Normalize => f.write_str("normalize"),
        }
    }
}

/// What modules.json says of the way from token vectors to a text's vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Modules {
    pub poolings: Vec<Pooling>,
    pub include_prompt: bool,
    pub layers: Vec<Layer>,
}

/// A module as modules.json lists it.
struct Module<'a> {
    kind: &'a str,
    /// The last part of `kind`.
    name: &'a str,
    path: &'a str,
}

fn list(modules: &Value) -> impl Iterator<Item = Module<'_>> {
    modules.as_array().into_iter().flatten().map(|module| {
        let kind = module["type"].as_str().unwrap_or_default();
        let path = module["path"].as_str().unwrap_or_default();
        Module { kind, name: kind.rsplit('.').next().unwrap_or_default(), path }
    })
}

impl Module<'_> {
    fn contents(&self) -> Option<Contents> {
        let all = KNOWN.iter().chain(&OTHERS);
        all.into_iter().find(|(name, _)| *name == self.name).map(|(_, contents)| *contents)
    }

    /// The module's folder.
    ///
    /// # Errors
    /// It is outside of the checkpoint's folder, or is the folder itself.
    fn folder(&self) -> Result<&str, FilesError> {
        let inside = |part: &str| !part.is_empty() && part != "." && part != "..";
        match self.path.split(['/', '\\']).all(inside) {
            true => Ok(self.path),
            false => Err(FilesError::Content {
                file: "modules.json".to_owned(),
                message: format!(
                    "the path {:?} of {} is not a folder inside of the checkpoint",
                    self.path, self.name
                ),
            }),
        }
    }
}

/// The files in the modules' folders that belong to the model, according to modules.json. A file of weights that no
/// module can do without is listed even if it does not exist.
///
/// # Errors
/// A folder is outside of the checkpoint's folder, or is the folder itself.
pub fn module_files(
    modules: Option<&Value>,
    exists: impl Fn(&str) -> bool,
) -> Result<Vec<String>, FilesError> {
    let mut files = Vec::new();
    for module in modules.into_iter().flat_map(list) {
        let contents = module.contents().unwrap_or(Contents::Nothing);
        if contents != Contents::Nothing {
            files.push(format!("{}/config.json", module.folder()?));
        }
        if contents == Contents::ConfigAndWeights {
            files.push(weights_of(module.folder()?, &exists));
        }
    }
    Ok(files)
}

/// The path of a module's config.json; `None` if modules.json does not list the module.
///
/// # Errors
/// As [`module_files`].
pub(super) fn config_file(modules: &Value, name: &str) -> Result<Option<String>, FilesError> {
    let module = list(modules).find(|module| module.name == name && module.kind != name);
    module.map(|module| Ok(format!("{}/config.json", module.folder()?))).transpose()
}

/// Refuses modules other than the model itself, whose files are beside modules.json, and then `name`.
pub(super) fn transformer_then(name: &str, task: &str, modules: &Value) -> Result<(), ModelError> {
    for (at, module) in list(modules).enumerate() {
        // The older name is that of sparse encoders.
        let is_model = matches!(module.name, "Transformer" | "MLMTransformer") && module.path.is_empty();
        if !(at == 0 && is_model || at == 1 && module.name == name) {
            let what = format!("{} at place {at} in the folder {:?}", module.kind, module.path);
            let supported =
                format!("for {task}, a Transformer whose files are beside modules.json, then {name}");
            return Err(unsupported("modules.json", &what, &supported));
        }
    }
    Ok(())
}

/// The file with a module's weights.
pub(in crate::model::text) fn weights_of(folder: &str, exists: impl Fn(&str) -> bool) -> String {
    let names = WEIGHTS.map(|name| format!("{folder}/{name}"));
    let found = names.iter().find(|name| exists(name)).cloned();
    found.unwrap_or_else(|| format!("{folder}/{}", WEIGHTS[0]))
}

impl Modules {
    /// # Errors
    /// A module, its place or a setting of it is unknown, or a file cannot be read.
    pub fn read(files: &Files, modules: &Value) -> Result<Self, ModelError> {
        let (mut pooled, mut layers) = (None, Vec::new());
        for module in modules.as_array().into_iter().flatten() {
            refuse_others("modules.json", module, &["idx", "name", "path", "type"])?;
        }
        for (at, module) in list(modules).enumerate() {
            let config = |known: &[&str]| {
                let file = format!("{}/config.json", module.folder()?);
                let config = files.json(&file)?.unwrap_or_default();
                refuse_others(&file, &config, known)?;
                Ok::<_, ModelError>((file, config))
            };
            let misplaced = |supported: &str| {
                let what = format!("{} at place {at}", module.name);
                Err(unsupported("modules.json", &what, supported))
            };
            match module.name {
                "Transformer" if at > 0 => return misplaced("a Transformer at place 0"),
                "Transformer" if module.path.is_empty() => {}
                "Transformer" => {
                    let what = format!("a Transformer in the folder {:?}", module.path);
                    let supported = "one whose files are beside modules.json";
                    return Err(unsupported("modules.json", &what, supported));
                }
                "Pooling" if pooled.is_none() && layers.is_empty() => {
                    let file = format!("{}/config.json", module.folder()?);
                    pooled = Some(pooling::read(&file, &files.json(&file)?.unwrap_or_default())?);
                }
                "Pooling" => return misplaced("one Pooling, right after the Transformer"),
                "Dense" | "LayerNorm" if pooled.is_none() => return misplaced("one after a Pooling"),
                "Dense" => {
                    let (file, config) = config(&[
                        "in_features",
                        "out_features",
                        "bias",
                        "activation_function",
                        "module_input_name",
                        "module_output_name",
                    ])?;
                    layers.push(dense(module.folder()?, &file, &config)?);
                }
                "LayerNorm" => {
                    let (file, config) = config(&["dimension"])?;
                    let width = size(&file, &config, "dimension")?;
                    layers.push(Layer::LayerNorm { folder: module.folder()?.to_owned(), width });
                }
                "Normalize" => layers.push(Layer::Normalize),
                "Dropout" => {}
                _ => {
                    let known: Vec<&str> = KNOWN.iter().map(|(name, _)| *name).collect();
                    return Err(unsupported("modules.json", module.kind, &known.join(", ")));
                }
            }
        }
        let (poolings, include_prompt) = pooled.unwrap_or((vec![Pooling::Mean], true));
        Ok(Self { poolings, include_prompt, layers })
    }
}

/// A Dense module: `activation(x Wᵀ + b)`.
fn dense(folder: &str, file: &str, config: &Value) -> Result<Layer, ModelError> {
    for key in ["module_input_name", "module_output_name"] {
        if let Some(other) = config[key].as_str().filter(|name| *name != "sentence_embedding") {
            return Err(unsupported(file, &format!("{key} {other:?}"), "sentence_embedding"));
        }
    }
    // Without a name, sentence-transformers takes Tanh.
    let named = config["activation_function"].as_str().unwrap_or("torch.nn.modules.activation.Tanh");
    let of_torch = named.strip_prefix("torch.nn.").and_then(|name| name.rsplit('.').next());
    let Some((_, activation)) = ACTIVATIONS.iter().find(|(name, _)| Some(*name) == of_torch) else {
        let known: Vec<&str> = ACTIVATIONS.iter().map(|(name, _)| *name).collect();
        let supported = format!("{} of torch.nn", known.join(", "));
        return Err(unsupported(file, &format!("activation_function {named:?}"), &supported));
    };
    Ok(Layer::Dense {
        folder: folder.to_owned(),
        inputs: size(file, config, "in_features")?,
        outputs: size(file, config, "out_features")?,
        bias: config["bias"].as_bool() != Some(false),
        activation: *activation,
    })
}

fn size(file: &str, config: &Value, key: &str) -> Result<usize, ModelError> {
    match config[key].as_u64() {
        Some(size @ 1..) => Ok(size as usize),
        _ => Err(unsupported(file, &format!("{key} {}", config[key]), "a number of values")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn files_of_modules_stay_inside_of_the_checkpoint() {
        let files = |kind: &str, path: &str| {
            module_files(Some(&json!([{ "type": kind, "path": path }])), |name| name.ends_with(".bin"))
        };
        assert_eq!(files("a.Pooling", "1_Pooling").unwrap(), ["1_Pooling/config.json"]);
        assert_eq!(files("a.Dense", "2").unwrap(), ["2/config.json", "2/pytorch_model.bin"]);
        assert!(files("a.Normalize", "../x").unwrap().is_empty());
        for path in ["..", "", "a/../..", "/etc", "a//b", ".", "..\\x"] {
            assert!(files("a.Pooling", path).is_err(), "{path:?}");
            assert!(files("a.Dense", path).is_err(), "{path:?}");
        }
        assert!(module_files(Some(&json!([])), |_| true).unwrap().is_empty());
        assert!(module_files(None, |_| true).unwrap().is_empty());
    }

    #[test]
    fn dense_layers_are_read_and_unknown_ones_refused() {
        let of = |config: Value| dense("2_Dense", "2_Dense/config.json", &config).map_err(|e| e.to_string());
        let config = |activation: Value| json!({ "in_features": 4, "out_features": 2, "activation_function": activation });
        let layer = |activation| Layer::Dense {
            folder: "2_Dense".to_owned(),
            inputs: 4,
            outputs: 2,
            bias: true,
            activation,
        };
        assert_eq!(of(config(json!("torch.nn.modules.linear.Identity"))), Ok(layer(None)));
        assert_eq!(of(config(Value::Null)), Ok(layer(Some(Activation::Tanh))));
        let message = of(config(json!("torch.nn.modules.activation.Mish"))).unwrap_err();
        assert!(message.contains("Mish") && message.contains("Identity, Tanh, ReLU, GELU"), "{message}");
        assert!(of(config(json!("my.own.Tanh"))).is_err());
        assert!(of(json!({ "in_features": 4 })).unwrap_err().contains("out_features"));
        let mut of_tokens = config(Value::Null);
        of_tokens["module_input_name"] = "token_embeddings".into();
        assert!(of(of_tokens).unwrap_err().contains("module_input_name"));
    }
}
