//! The bytes of an image file to its pixels. Sizes are read from the header and checked before memory is taken for them.

use std::borrow::Cow;
use std::io::Cursor;
use std::sync::{Condvar, Mutex};

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, RgbImage};
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// What an image may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Width times height.
    pub pixels: u64,
    /// Bytes of the file.
    pub bytes: u64,
}

/// The formats that are read, for messages.
pub const FORMATS: &str = "JPEG, PNG, WebP, GIF, BMP, TIFF";

/// An image in RGB, 8 bits a channel, row after row.
#[derive(Debug)]
pub struct Rgb {
    pub width: u32,
    pub height: u32,
    /// `3 × width × height` bytes.
    pub pixels: Vec<u8>,
}

/// The format that the first bytes of a file say.
///
/// # Errors
/// It is none of [`FORMATS`]: what it looks like instead.
pub fn format_of(bytes: &[u8]) -> Result<ImageFormat, String> {
    Ok(match bytes {
        [0xff, 0xd8, 0xff, ..] => ImageFormat::Jpeg,
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => ImageFormat::Png,
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => ImageFormat::WebP,
        [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => ImageFormat::Gif,
        [b'B', b'M', ..] => ImageFormat::Bmp,
        [b'I', b'I', b'*', 0, ..] | [b'M', b'M', 0, b'*', ..] => ImageFormat::Tiff,
        [] => return Err("it is empty".to_owned()),
        _ => return Err(format!("it is {}; supported: {FORMATS}", instead(bytes))),
    })
}

/// What bytes look like that are no image that is read.
fn instead(bytes: &[u8]) -> String {
    let start = &bytes[..bytes.len().min(1024)];
    let text = std::str::from_utf8(start).unwrap_or_else(|error| {
        // The piece may end within a character.
        std::str::from_utf8(&start[..error.valid_up_to()]).unwrap_or_default()
    });
    let text = text.trim_start_matches('\u{feff}').trim_start();
    let what = match bytes {
        [_, _, _, _, b'f', b't', b'y', b'p', b'a', b'v', b'i', ..] => "an AVIF image",
        [_, _, _, _, b'f', b't', b'y', b'p', b'h' | b'm', ..] => "a HEIF image or a video",
        [0xff, 0x0a, ..] | [0, 0, 0, 0x0c, b'J', b'X', b'L', ..] => "a JPEG XL image",
        [0, 0, 0, 0x0c, b'j', b'P', ..] => "a JPEG 2000 image",
        _ if text.starts_with("%PDF") => "a PDF document",
        _ if text.starts_with("data:") || text.starts_with("/9j/") || text.starts_with("iVBORw0KGgo") => {
            "an image in base64, which input.format: text reads, and input.field within JSON"
        }
        _ if text.starts_with('<') && text.contains("<svg") => "an SVG, which has no pixels",
        _ if text.starts_with('<') => "a text that begins with <, as HTML and XML do",
        _ if text.starts_with(['{', '[']) => {
            "a text that begins as JSON does: set input.format: json and input.field"
        }
        _ => {
            let first: Vec<String> = bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            return format!("not an image: it begins with {}", first.join(" "));
        }
    };
    what.to_owned()
}

/// The bytes of an image in base64 (RFC 4648, standard or URL-safe, with or without padding, in lines or not), or in a data
/// URL (RFC 2397).
///
/// # Errors
/// The text is something else, or it stands for more than `limit` bytes.
pub fn from_base64(text: &str, limit: u64) -> Result<Vec<u8>, String> {
    let text = text.trim();
    let digits = match text.strip_prefix("data:") {
        None => text,
        Some(url) => match url.split_once(',') {
            Some((kind, digits)) if kind.ends_with(";base64") => digits,
            _ => return Err("it is a data URL without ;base64".to_owned()),
        },
    };
    if digits.starts_with("http://") || digits.starts_with("https://") {
        return Err(
            "it is an address, which kandle does not fetch: send the image itself in base64".to_owned()
        );
    }
    if digits.is_empty() {
        return Err("it is empty".to_owned());
    }
    check_bytes(digits.len() as u64 / 4 * 3, limit)?;
    let digits = match digits.contains(|c: char| c.is_ascii_whitespace()) {
        true => Cow::Owned(digits.split_ascii_whitespace().collect::<String>()),
        false => Cow::Borrowed(digits),
    };
    let alphabet = if digits.contains(['-', '_']) { &alphabet::URL_SAFE } else { &alphabet::STANDARD };
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let decoded = GeneralPurpose::new(alphabet, config).decode(digits.as_bytes());
    decoded.map_err(|error| format!("it is not base64: {error}"))
}

fn check_bytes(bytes: u64, limit: u64) -> Result<(), String> {
    match bytes > limit {
        true => Err(format!("it has {bytes} bytes, more than task.max_bytes: {limit}")),
        false => Ok(()),
    }
}

/// Decodes an image. Of an animation it is the first frame. It is turned as its EXIF orientation says; transparency is
/// ignored, as Pillow does in `convert("RGB")`; levels of 16 bits are rounded to 8.
///
/// # Errors
/// It is no image, it is damaged or cut short, it exceeds a limit, or decoding it takes more than all of `memory`.
pub fn decode(bytes: &[u8], limits: &Limits, memory: &DecodeMemory) -> Result<Rgb, String> {
    check_bytes(bytes.len() as u64, limits.bytes)?;
    let format = format_of(bytes)?;
    match format {
        ImageFormat::Jpeg => jpeg(bytes, limits, memory),
        _ => other(bytes, format, limits, memory),
    }
}

fn check_pixels(width: u64, height: u64, limits: &Limits) -> Result<u64, String> {
    let pixels = width * height;
    match pixels {
        0 => Err(format!("its header says {width} × {height} pixels")),
        _ if pixels > limits.pixels => Err(format!(
            "its header says {width} × {height} pixels, more than task.max_pixels: {}",
            limits.pixels
        )),
        _ => Ok(pixels),
    }
}

fn jpeg(bytes: &[u8], limits: &Limits, memory: &DecodeMemory) -> Result<Rgb, String> {
    let failed = |error: zune_jpeg::errors::DecodeErrors| format!("the JPEG is damaged: {error:?}");
    if !ends(bytes) {
        return Err("the JPEG is cut short: it has no end marker".to_owned());
    }
    // The decoder's own strict mode refuses files that every other decoder reads.
    let options = DecoderOptions::default()
        .set_strict_mode(false)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = zune_jpeg::JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(failed)?;
    let (width, height) = decoder.dimensions().ok_or("the JPEG has no size")?;
    let pixels = check_pixels(width as u64, height as u64, limits)?;
    let orientation = decoder.exif().and_then(|exif| Orientation::from_exif_chunk(exif));
    // The result, and coefficients of 16 bits of a progressive one.
    let _taken = memory.take(9 * pixels)?;
    let pixels = decoder.decode().map_err(failed)?;
    turned(width as u32, height as u32, pixels, orientation.unwrap_or(Orientation::NoTransforms))
}

/// Whether a JPEG has its end marker. Within the image's data, a byte 0xff is always followed by a zero or a restart
/// marker; a thumbnail in the segments before it has an end marker of its own.
fn ends(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some([0xff, marker, rest @ ..]) = bytes.get(at..) {
        match (marker, rest) {
            // Fill bytes.
            (0xff, _) => at += 1,
            (0xda, _) => return memchr::memmem::find(&bytes[at..], &[0xff, 0xd9]).is_some(),
            (_, [high, low, ..]) => at += 2 + usize::from(u16::from_be_bytes([*high, *low])),
            _ => return false,
        }
    }
    false
}

fn other(bytes: &[u8], format: ImageFormat, limits: &Limits, memory: &DecodeMemory) -> Result<Rgb, String> {
    let name = format.extensions_str().first().copied().unwrap_or_default().to_uppercase();
    let failed = |error: image::ImageError| match error {
        image::ImageError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            format!("the {name} is cut short")
        }
        error => format!("the {name} is damaged: {error}"),
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    // Pixels are checked below; this is for what a header has beside them, such as colour profiles.
    let mut most = image::Limits::no_limits();
    most.max_alloc = Some(limits.pixels.saturating_mul(8).saturating_add(limits.bytes));
    reader.limits(most);
    let mut decoder = reader.into_decoder().map_err(failed)?;
    let (width, height) = decoder.dimensions();
    let pixels = check_pixels(width.into(), height.into(), limits)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    // As it is stored, and in RGB.
    let _taken = memory.take(decoder.total_bytes() + 3 * pixels)?;
    let image = DynamicImage::from_decoder(decoder).map_err(failed)?.into_rgb8();
    turned(image.width(), image.height(), image.into_raw(), orientation)
}

fn turned(width: u32, height: u32, pixels: Vec<u8>, orientation: Orientation) -> Result<Rgb, String> {
    if orientation == Orientation::NoTransforms {
        return Ok(Rgb { width, height, pixels });
    }
    let image =
        RgbImage::from_raw(width, height, pixels).ok_or("the image has fewer pixels than its header says")?;
    let mut image = DynamicImage::ImageRgb8(image);
    image.apply_orientation(orientation);
    let image = image.into_rgb8();
    Ok(Rgb { width: image.width(), height: image.height(), pixels: image.into_raw() })
}

/// Memory for images while they are decoded, shared by all threads. An image that finds too little of it waits for others.
#[derive(Debug)]
pub struct DecodeMemory {
    all: u64,
    free: Mutex<u64>,
    given_back: Condvar,
}

/// Memory that is taken; given back when it is dropped.
struct Taken<'a> {
    from: &'a DecodeMemory,
    bytes: u64,
}

impl DecodeMemory {
    /// `bytes` for all images together.
    pub fn new(bytes: u64) -> Self {
        Self { all: bytes, free: Mutex::new(bytes), given_back: Condvar::new() }
    }

    /// # Errors
    /// It is more than there is in all.
    fn take(&self, bytes: u64) -> Result<Taken<'_>, String> {
        if bytes > self.all {
            let mib = |bytes: u64| bytes.div_ceil(1 << 20);
            return Err(format!(
                "decoding it takes {} MiB, more than the quarter of memory.limit that is for decoding: {} MiB",
                mib(bytes),
                self.all >> 20
            ));
        }
        let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
        while *free < bytes {
            free = self.given_back.wait(free).unwrap_or_else(|e| e.into_inner());
        }
        *free -= bytes;
        Ok(Taken { from: self, bytes })
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *self.from.free.lock().unwrap_or_else(|e| e.into_inner()) += self.bytes;
        self.from.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { pixels: 1 << 20, bytes: 1 << 20 };

    fn error(bytes: &[u8]) -> String {
        decode(bytes, &LIMITS, &DecodeMemory::new(1 << 24)).unwrap_err()
    }

    fn fixture(name: &str) -> Vec<u8> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images");
        std::fs::read(folder.join(name)).unwrap()
    }

    #[test]
    fn what_is_no_image_is_named() {
        for (bytes, part) in [
            (&b""[..], "it is empty"),
            (
                b"<?xml version=\"1.0\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\"/>",
                "an SVG, which has no pixels",
            ),
            (b"<html>", "HTML"),
            (b"%PDF-1.7", "a PDF document"),
            (b"\0\0\0\x20ftypavif", "an AVIF image"),
            (b"\0\0\0\x20ftypheic", "a HEIF image"),
            (b"{\"image\":1}", "set input.format: json"),
            (b"/9j/4AAQ", "base64"),
            (b"\x01\x02\x03", "it begins with 01 02 03; supported: JPEG, PNG"),
        ] {
            let error = error(bytes);
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn images_that_are_cut_short_are_refused() {
        for name in ["photo.jpg", "progressive.jpg", "photo.png", "photo.webp", "photo.bmp", "photo.tiff"] {
            let whole = fixture(name);
            let rgb = decode(&whole, &LIMITS, &DecodeMemory::new(1 << 24)).unwrap();
            assert_eq!(rgb.pixels.len(), 3 * (rgb.width * rgb.height) as usize, "{name}");
            for part in [2, 3] {
                let cut = &whole[..whole.len() * (part - 1) / part];
                let error = decode(cut, &LIMITS, &DecodeMemory::new(1 << 24)).err().unwrap_or_default();
                assert!(error.contains("cut short") || error.contains("damaged"), "{name}: {error:?}");
            }
        }
    }

    #[test]
    fn sizes_are_checked_in_the_header() {
        // 60,000 × 60,000 pixels, and no data.
        let mut bomb = fixture("photo.png");
        bomb[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
        let mut crc = !0u32;
        for &byte in &bomb[12..29] {
            crc ^= u32::from(byte);
            for _ in 0..8 {
                crc = crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
            }
        }
        bomb[29..33].copy_from_slice(&(!crc).to_be_bytes());
        assert_eq!(error(&bomb), "its header says 60000 × 60000 pixels, more than task.max_pixels: 1048576");
        assert!(error(&[0xff; (1 << 20) + 1]).contains("more than task.max_bytes: 1048576"));
        let photo = fixture("photo.jpg");
        let error = decode(&photo, &LIMITS, &DecodeMemory::new(1000)).unwrap_err();
        assert!(error.contains("memory.limit"), "{error}");
    }

    #[test]
    fn base64_in_all_its_forms() {
        let read = |text: &str| from_base64(text, 9);
        for text in ["+/+/AQ==", "-_-_AQ", " +/+/\r\n AQ== ", "data:image/png;base64,+/+/AQ=="] {
            assert_eq!(read(text).unwrap(), [0xfb, 0xff, 0xbf, 1], "{text}");
        }
        for (text, part) in [
            ("", "it is empty"),
            ("data:image/png;base64,", "it is empty"),
            ("data:image/png,abc", "without ;base64"),
            ("https://example.org/a.png", "does not fetch"),
            ("AQ*=", "it is not base64"),
            ("AAAAAAAAAAAAAAAA", "more than task.max_bytes: 9"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn memory_is_waited_for() {
        let memory = DecodeMemory::new(10);
        let first = memory.take(7).unwrap();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| memory.take(4).map(|taken| taken.bytes));
            drop(first);
            assert_eq!(second.join().unwrap(), Ok(4));
        });
        assert_eq!(*memory.free.lock().unwrap(), 10);
    }
}
