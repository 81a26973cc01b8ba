//! From an image's pixels to those that a model takes: resized, cropped, and each level replaced by a value, as the
//! checkpoint's preprocessor_config.json (transformers) or pretrained_cfg (timm) says. Resizing rounds to 8 bits, as Pillow
//! does, so that the pixels of an item are bytes; their values are looked up when the model runs.

use fast_image_resize::images::Image;
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use serde_json::Value;

use super::decode::Rgb;
use crate::model::store::{Files, FilesError};

/// The file of transformers' image processors.
pub const FILE: &str = "preprocessor_config.json";

/// A problem with the settings of a checkpoint's preprocessing.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {message}")]
pub struct PreprocessError {
    file: &'static str,
    message: String,
}

/// How an image becomes an input of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocess {
    resize: Option<Resize>,
    filter: ResizeAlg,
    rounding: Rounding,
    /// Pixels of the result.
    pub height: usize,
    pub width: usize,
    /// The value of each level, by channel.
    values: [Vec<f32>; 3],
}

/// The size before the image is cropped to the result's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resize {
    Exact {
        height: u32,
        width: u32,
    },
    /// The shorter side has this many pixels; the other is by the image's ratio, rounded down.
    Shortest(u32),
}

/// Where a crop begins if its two margins differ by a pixel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rounding {
    /// The first margin is the smaller one: transformers.
    Down,
    /// The first margin is half of both, rounded half to even: torchvision, and so timm.
    HalfEven,
}

const HALF: [f64; 3] = [0.5; 3];
const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];
const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];

/// What one of transformers' image processors does where its file says nothing.
struct Defaults {
    name: &'static str,
    size: Resize,
    /// Whether a single number as size is both sides, or the shorter one.
    square: bool,
    resample: u64,
    crop: Option<u64>,
    mean: [f64; 3],
    std: [f64; 3],
    /// The result is divided by the standard deviation once more, unless `include_top` is false, and `rescale_offset`
    /// subtracts 1: EfficientNet.
    twice: bool,
    /// A size below 384 is that of the crop of a larger image (`crop_pct`).
    crop_pct: bool,
}

const fn exact(side: u32) -> Resize {
    Resize::Exact { height: side, width: side }
}

/// The image processors. To add one, add a line.
#[rustfmt::skip]
const PROCESSORS: &[Defaults] = &[
    Defaults { name: "Beit", size: exact(224), square: true, resample: 3, crop: None, mean: HALF, std: HALF, crop_pct: false, twice: false },
    Defaults { name: "Bit", size: Resize::Shortest(224), square: false, resample: 3, crop: Some(224), mean: CLIP_MEAN, std: CLIP_STD, crop_pct: false, twice: false },
    Defaults { name: "CLIP", size: Resize::Shortest(224), square: false, resample: 3, crop: Some(224), mean: CLIP_MEAN, std: CLIP_STD, crop_pct: false, twice: false },
    Defaults { name: "ConvNext", size: Resize::Shortest(384), square: false, resample: 3, crop: None, mean: HALF, std: HALF, crop_pct: true, twice: false },
    Defaults { name: "DeiT", size: exact(256), square: true, resample: 3, crop: Some(224), mean: HALF, std: HALF, crop_pct: false, twice: false },
    Defaults { name: "EfficientNet", size: exact(346), square: true, resample: 3, crop: None, mean: HALF, std: HALF, crop_pct: false, twice: true },
    Defaults { name: "MobileNetV2", size: Resize::Shortest(256), square: false, resample: 2, crop: Some(224), mean: HALF, std: HALF, crop_pct: false, twice: false },
    Defaults { name: "Siglip", size: exact(224), square: false, resample: 3, crop: None, mean: HALF, std: HALF, crop_pct: false, twice: false },
    Defaults { name: "ViT", size: exact(224), square: true, resample: 2, crop: None, mean: HALF, std: HALF, crop_pct: false, twice: false },
];

impl Preprocess {
    /// Reads how a checkpoint's images are prepared.
    ///
    /// # Errors
    /// There is no such file, or it asks for what kandle does not do.
    pub fn read(files: &Files, config: &Value) -> Result<Self, super::VisionError> {
        if let Some(timm) = config.get("pretrained_cfg") {
            return Ok(Self::timm(timm)?);
        }
        let json = files.json(FILE)?.ok_or_else(|| FilesError::Missing { file: FILE.to_owned() })?;
        Ok(Self::transformers(&json)?)
    }

    /// By preprocessor_config.json.
    fn transformers(json: &Value) -> Result<Self, PreprocessError> {
        let wrong = |message: String| PreprocessError { file: FILE, message };
        let (new, old) = (&json["image_processor_type"], &json["feature_extractor_type"]);
        let name = new.as_str().or(old.as_str()).unwrap_or_default();
        let plain = ["ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor"]
            .into_iter()
            .find_map(|ending| name.strip_suffix(ending));
        let known = PROCESSORS.iter().find(|of| Some(of.name) == plain).ok_or_else(|| {
            let names: Vec<String> =
                PROCESSORS.iter().map(|of| format!("{}ImageProcessor", of.name)).collect();
            wrong(format!("image_processor_type {name:?} is not supported; supported: {}", names.join(", ")))
        })?;
        for key in ["do_flip_channel_order", "do_pad", "do_grayscale"] {
            if json[key].as_bool() == Some(true) {
                return Err(wrong(format!("{key}: true is not supported")));
            }
        }
        let flag = |key: &str, default: bool| json[key].as_bool().unwrap_or(default);
        let mut resize = match flag("do_resize", true) {
            true => Some(size(&json["size"], known).map_err(wrong)?),
            false => None,
        };
        let mut crop = match flag("do_center_crop", known.crop.is_some()) {
            true => {
                let default = Value::from(known.crop.unwrap_or(224));
                let value = if json["crop_size"].is_null() { &default } else { &json["crop_size"] };
                Some(sides(value).ok_or_else(|| wrong(format!("crop_size is {value}")))?)
            }
            false => None,
        };
        if let (true, Some(Resize::Shortest(side))) = (known.crop_pct, resize) {
            let percent = json["crop_pct"].as_f64().unwrap_or(224.0 / 256.0);
            resize = Some(match side < 384 {
                true => Resize::Shortest((f64::from(side) / percent) as u32),
                false => exact(side),
            });
            crop = crop.or(Some((side, side)));
        }
        let (height, width) = match (crop, resize) {
            (Some(crop), _) => crop,
            (None, Some(Resize::Exact { height, width })) => (height, width),
            (None, _) => {
                let message =
                    "images would have different sizes: set size to height and width, or do_center_crop";
                return Err(wrong(message.to_owned()));
            }
        };
        let factor = match flag("do_rescale", true) {
            true => json["rescale_factor"].as_f64().unwrap_or(1.0 / 255.0),
            false => 1.0,
        };
        let (mean, std) = match flag("do_normalize", true) {
            true => (
                channels(&json["image_mean"], known.mean)
                    .ok_or_else(|| wrong("image_mean is not a number per channel".to_owned()))?,
                channels(&json["image_std"], known.std)
                    .ok_or_else(|| wrong("image_std is not a number per channel".to_owned()))?,
            ),
            false => ([0.0; 3], [1.0; 3]),
        };
        let (mean, std) = match known.twice {
            true => {
                let again = channels(&json["image_std"], known.std).filter(|_| flag("include_top", true));
                let offset = if flag("rescale_offset", false) { 1.0 } else { 0.0 };
                let again = again.unwrap_or([1.0; 3]);
                (mean.map(|mean| mean + offset), [0, 1, 2].map(|at| std[at] * again[at]))
            }
            false => (mean, std),
        };
        let resample = json["resample"].as_u64().unwrap_or(known.resample);
        // PIL.Image.Resampling.
        let filter = match resample {
            0 => ResizeAlg::Nearest,
            1 => ResizeAlg::Convolution(FilterType::Lanczos3),
            2 => ResizeAlg::Convolution(FilterType::Bilinear),
            3 => ResizeAlg::Convolution(FilterType::CatmullRom),
            4 => ResizeAlg::Convolution(FilterType::Box),
            5 => ResizeAlg::Convolution(FilterType::Hamming),
            other => return Err(wrong(format!("resample {other} is not supported; supported: 0 to 5"))),
        };
        Ok(Self {
            resize,
            filter,
            rounding: Rounding::Down,
            height: height as usize,
            width: width as usize,
            values: values(factor, mean, std),
        })
    }

    /// By timm's `pretrained_cfg`, as its `create_transform` does for evaluation.
    fn timm(json: &Value) -> Result<Self, PreprocessError> {
        let wrong = |message: String| PreprocessError { file: "config.json: pretrained_cfg", message };
        let sides: Vec<u32> = match json["input_size"].as_array() {
            Some(list) => list.iter().filter_map(Value::as_u64).map(|side| side as u32).collect(),
            None => vec![3, 224, 224],
        };
        let &[3, height, width] = sides.as_slice() else {
            return Err(wrong(format!(
                "input_size is {}; supported: [3, height, width]",
                json["input_size"]
            )));
        };
        let percent = json["crop_pct"].as_f64().unwrap_or(0.875);
        let scaled = |side: u32| (f64::from(side) / percent).floor() as u32;
        let resize = match json["crop_mode"].as_str().unwrap_or("center") {
            "center" if height == width => Resize::Shortest(scaled(height)),
            "squash" => Resize::Exact { height: scaled(height), width: scaled(width) },
            other => {
                return Err(wrong(format!(
                    "crop_mode {other} of {height} × {width} pixels is not supported; supported: center of a square, squash"
                )));
            }
        };
        let filter = match json["interpolation"].as_str().unwrap_or("bilinear") {
            "nearest" => ResizeAlg::Nearest,
            "lanczos" => ResizeAlg::Convolution(FilterType::Lanczos3),
            "bilinear" => ResizeAlg::Convolution(FilterType::Bilinear),
            "bicubic" => ResizeAlg::Convolution(FilterType::CatmullRom),
            "box" => ResizeAlg::Convolution(FilterType::Box),
            "hamming" => ResizeAlg::Convolution(FilterType::Hamming),
            other => return Err(wrong(format!("interpolation {other:?} is not supported"))),
        };
        let of = |key: &str, default| {
            channels(&json[key], default).ok_or_else(|| wrong(format!("{key} is not a number per channel")))
        };
        Ok(Self {
            resize: Some(resize),
            filter,
            rounding: Rounding::HalfEven,
            height: height as usize,
            width: width as usize,
            values: values(1.0 / 255.0, of("mean", IMAGENET_MEAN)?, of("std", IMAGENET_STD)?),
        })
    }

    /// The value of a level of a channel: rescaled, minus the mean, over the standard deviation.
    #[inline]
    pub fn values(&self, channel: usize) -> &[f32] {
        &self.values[channel]
    }

    /// Bytes of a result.
    pub fn bytes(&self) -> usize {
        3 * self.height * self.width
    }

    /// The pixels that the model takes, in RGB, row after row.
    ///
    /// # Errors
    /// The image is too thin: a side would have no pixel.
    pub fn apply(&self, image: Rgb) -> Result<Vec<u8>, String> {
        let (width, height) = (image.width, image.height);
        let (to_height, to_width) = match self.resize {
            None => (height, width),
            Some(Resize::Exact { height, width }) => (height, width),
            Some(Resize::Shortest(side)) => {
                let long = |long: u32, short: u32| {
                    u32::try_from(u64::from(side) * u64::from(long) / u64::from(short)).unwrap_or(u32::MAX)
                };
                if width <= height { (long(height, width), side) } else { (side, long(width, height)) }
            }
        };
        // A thin image would become very long: what is cropped of it is small.
        if u64::from(to_height) * u64::from(to_width) > MAX_RESIZED {
            return Err(format!(
                "{width} × {height} pixels would be resized to {to_width} × {to_height}: it is too thin for this model"
            ));
        }
        let failed =
            |error: String| format!("it cannot be resized to {to_width} × {to_height} pixels: {error}");
        let resized = if (to_height, to_width) == (height, width) {
            image.pixels
        } else {
            let from = Image::from_vec_u8(width, height, image.pixels, PixelType::U8x3)
                .map_err(|error| failed(error.to_string()))?;
            let mut to = Image::new(to_width, to_height, PixelType::U8x3);
            Resizer::new()
                .resize(&from, &mut to, &ResizeOptions::new().resize_alg(self.filter))
                .map_err(|error| failed(error.to_string()))?;
            to.into_vec()
        };
        Ok(self.cropped(resized, to_height as usize, to_width as usize))
    }

    /// The middle of an image; black where the image is smaller.
    fn cropped(&self, pixels: Vec<u8>, height: usize, width: usize) -> Vec<u8> {
        if (height, width) == (self.height, self.width) {
            return pixels;
        }
        let mut out = vec![0; self.bytes()];
        let (rows, top, out_top) = self.middle(height, self.height);
        let (columns, left, out_left) = self.middle(width, self.width);
        for row in 0..rows {
            let from = ((top + row) * width + left) * 3;
            let to = ((out_top + row) * self.width + out_left) * 3;
            out[to..to + columns * 3].copy_from_slice(&pixels[from..from + columns * 3]);
        }
        out
    }

    /// How many pixels are kept of a side, and where they begin in the image and in the result.
    fn middle(&self, has: usize, wanted: usize) -> (usize, usize, usize) {
        if has < wanted {
            return (has, 0, (wanted - has) / 2);
        }
        let both = has - wanted;
        let first = match self.rounding {
            Rounding::HalfEven if both % 4 == 3 => both / 2 + 1,
            Rounding::HalfEven | Rounding::Down => both / 2,
        };
        (wanted, first, 0)
    }
}

/// Pixels that an image may have after it is resized.
const MAX_RESIZED: u64 = 16 << 20;

/// `size`: a number, `{height, width}` or `{shortest_edge}`.
fn size(json: &Value, known: &Defaults) -> Result<Resize, String> {
    let side = |key: &str| json[key].as_u64().filter(|&side| side > 0).map(|side| side as u32);
    match json {
        Value::Null => Ok(known.size),
        Value::Number(number) => match (number.as_u64(), known.square) {
            (Some(side @ 1..), true) => Ok(exact(side as u32)),
            (Some(side @ 1..), false) => Ok(Resize::Shortest(side as u32)),
            _ => Err(format!("size is {number}")),
        },
        _ => match (side("height"), side("width"), side("shortest_edge"), &json["longest_edge"]) {
            (Some(height), Some(width), None, Value::Null) => Ok(Resize::Exact { height, width }),
            (None, None, Some(side), Value::Null) => Ok(Resize::Shortest(side)),
            _ => Err(format!("size {json} is not supported; supported: height and width, or shortest_edge")),
        },
    }
}

/// Height and width of `crop_size`: a number, or `{height, width}`.
fn sides(json: &Value) -> Option<(u32, u32)> {
    let side = |value: &Value| value.as_u64().filter(|&side| side > 0).map(|side| side as u32);
    match side(json) {
        Some(side) => Some((side, side)),
        None => Some((side(&json["height"])?, side(&json["width"])?)),
    }
}

/// A number per channel, or one for all.
fn channels(json: &Value, default: [f64; 3]) -> Option<[f64; 3]> {
    match json {
        Value::Null => Some(default),
        Value::Number(number) => number.as_f64().map(|number| [number; 3]),
        _ => {
            let list: Vec<f64> = json.as_array()?.iter().filter_map(Value::as_f64).collect();
            list.try_into().ok()
        }
    }
}

fn values(factor: f64, mean: [f64; 3], std: [f64; 3]) -> [Vec<f32>; 3] {
    let of = |channel: usize| {
        (0..256).map(|level| ((f64::from(level) * factor - mean[channel]) / std[channel]) as f32).collect()
    };
    [of(0), of(1), of(2)]
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::super::decode::{DecodeMemory, Limits, decode};
    use super::*;

    /// The images of the fixtures as transformers and timm prepare them (tests/fixtures/images.py): within one level of
    /// 255 for all formats without loss, and what decoders of JPEG differ by beside it.
    #[test]
    fn pixels_are_those_of_pillow() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images");
        let golden: Value =
            serde_json::from_slice(&std::fs::read(folder.join("golden.json")).unwrap()).unwrap();
        let limits = Limits { pixels: 1 << 20, bytes: 1 << 20 };
        let mut compared = 0;
        for case in golden.as_array().unwrap() {
            let (name, config) = (case["image"].as_str().unwrap(), &case["config"]);
            let preprocess = match config.get("input_size") {
                Some(_) => Preprocess::timm(config).unwrap(),
                None => Preprocess::transformers(config).unwrap(),
            };
            let bytes = std::fs::read(folder.join(name)).unwrap();
            let rgb = decode(&bytes, &limits, &DecodeMemory::new(1 << 24)).unwrap();
            let pixels = preprocess.apply(rgb).unwrap();
            // Rows of the result, by the offset of their first byte.
            let allowed = case["levels"].as_u64().unwrap() as i32;
            for row in case["rows"].as_array().unwrap() {
                let at = row["at"].as_u64().unwrap() as usize;
                let want: Vec<i32> =
                    row["pixels"].as_array().unwrap().iter().map(|x| x.as_i64().unwrap() as i32).collect();
                for (i, want) in want.iter().enumerate() {
                    let got = i32::from(pixels[at + i]);
                    assert!(
                        (got - want).abs() <= allowed,
                        "{name} by {config}: byte {} is {got}, not {want}",
                        at + i
                    );
                    compared += 1;
                }
            }
            let value = case["value"].as_f64().unwrap() as f32;
            assert!((preprocess.values(1)[100] - value).abs() < 1e-5, "{name} by {config}");
        }
        assert!(compared > 10_000, "{compared}");
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        let of = |json: Value| Preprocess::transformers(&json).map_err(|error| error.to_string());
        for (json, part) in [
            (json!({}), "image_processor_type \"\" is not supported; supported: BeitImageProcessor"),
            (json!({ "image_processor_type": "Pix2StructImageProcessor" }), "Pix2StructImageProcessor"),
            (
                json!({ "image_processor_type": "ViTImageProcessor", "size": { "longest_edge": 9 } }),
                "size {\"longest_edge\":9}",
            ),
            (json!({ "image_processor_type": "ViTImageProcessor", "do_pad": true }), "do_pad"),
            (json!({ "image_processor_type": "ViTImageProcessor", "resample": 7 }), "resample 7"),
            (json!({ "image_processor_type": "ViTImageProcessor", "image_std": [1] }), "image_std"),
            (
                json!({ "image_processor_type": "CLIPImageProcessor", "do_center_crop": false }),
                "images would have different sizes",
            ),
        ] {
            let error = of(json).unwrap_err();
            assert!(error.contains(part) && error.starts_with(FILE), "{error}");
        }
        let error = Preprocess::timm(&json!({ "crop_mode": "border" })).unwrap_err().to_string();
        assert!(error.contains("crop_mode border"), "{error}");
    }

    #[test]
    fn thin_images_are_refused_before_memory_is_taken() {
        let clip =
            Preprocess::transformers(&json!({ "image_processor_type": "CLIPImageProcessor" })).unwrap();
        let error = clip.apply(Rgb { width: 1, height: 100_000, pixels: vec![0; 300_000] }).unwrap_err();
        assert!(error.contains("too thin"), "{error}");
        assert_eq!(
            clip.apply(Rgb { width: 3, height: 5, pixels: vec![9; 45] }).unwrap(),
            vec![9; clip.bytes()]
        );
    }
}
