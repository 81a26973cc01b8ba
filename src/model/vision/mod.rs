//! Models of images: transformers over patches, which run on the packed trunk of the text models, and residual networks of
//! convolutions, which run on Candle.
//!
//! ```text
//! decode       bytes of a file to RGB                 (limits from the header, before memory is taken)
//! preprocess   RGB to the pixels that a model takes   (resize, crop: bytes)
//! model        pixels to logits or a vector
//! ```

mod architecture;
mod decode;
#[cfg(test)]
mod golden;
mod model;
mod positions;
mod preprocess;
mod residual;
mod tower;

pub use decode::{DecodeMemory, Limits, Rgb, decode, format_of, from_base64};
pub use model::{Image, Output, VisionError, VisionModel};
