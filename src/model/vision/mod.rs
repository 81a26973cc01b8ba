//! Models of images: transformers over patches, which run on the packed trunk of the text models, and networks of
//! convolutions, which run on kandle's own kernels on a CPU and on Candle's operations elsewhere.
//!
//! ```text
//! decode       bytes of a file to RGB                 (limits from the header, before memory is taken)
//! preprocess   RGB to the pixels that a model takes   (resize, crop: bytes)
//! model        pixels to logits or a vector
//! ```

mod architecture;
mod convnet;
mod decode;
#[cfg(test)]
mod golden;
mod model;
mod positions;
mod preprocess;
mod tower;

pub use architecture::knows;
pub use decode::{DecodeMemory, Limits, Rgb, decode, format_of, from_base64};
pub use model::{Image, Output, VisionError, VisionModel};
