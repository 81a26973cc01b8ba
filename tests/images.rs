//! Models of images on a real Kafka: files of all formats and those that are no images, under both guarantees; memory; and
//! the commands.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::support::{Daemon, GUARANTEES, Place, Sent, file, finish, kandle, root};

const SVG: &[u8] = b"<svg xmlns=\"http://www.w3.org/2000/svg\"><rect width=\"9\" height=\"9\"/></svg>";

fn model(name: &str) -> String {
    format!("{{ source: \"{}\" }}", root().join("tests/fixtures").join(name).display())
}

fn image(name: &str) -> Vec<u8> {
    std::fs::read(root().join("tests/fixtures/images").join(name)).expect("an image")
}

fn config(place: &Place, name: &str, input: &str, task: &str, delivery: &str) -> String {
    place.config(&[
        ("input", &format!("{{ topics: [$INPUT], group: $GROUP, {input} }}")),
        ("task", task),
        ("model", &model(name)),
        ("delivery", delivery),
        ("memory", "{ limit: 128MiB }"),
        ("output", "{ topic: $OUTPUT }"),
    ])
}

fn crc(bytes: &[u8]) -> [u8; 4] {
    let mut crc = !0u32;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
        }
    }
    (!crc).to_be_bytes()
}

/// A PNG whose header says another size.
fn png_of(width: u32, height: u32) -> Vec<u8> {
    let mut png = image("photo.png");
    png[16..20].copy_from_slice(&width.to_be_bytes());
    png[20..24].copy_from_slice(&height.to_be_bytes());
    let sum = crc(&png[12..29]);
    png[29..33].copy_from_slice(&sum);
    png
}

/// A BMP of 24 bits a pixel, about `3 × width × height` bytes.
fn bmp(width: u32, height: u32) -> Vec<u8> {
    let size = 54 + (width * 3).next_multiple_of(4) * height;
    let mut bmp = b"BM".to_vec();
    for number in [size, 0, 54, 40, width, height, 1 | 24 << 16, 0, 0, 0, 0, 0, 0] {
        bmp.extend(number.to_le_bytes());
    }
    bmp.resize(size as usize, 200);
    bmp
}

fn place(name: &str) -> Place {
    let place = Place::new(name, 1);
    for topic in [&place.input, &place.dead] {
        place.configure(topic, "max.message.bytes", "50000000");
    }
    place
}

#[test]
fn what_is_no_image_is_a_dead_letter_and_its_neighbours_are_not() {
    for delivery in GUARANTEES {
        let place = place("images-bad");
        let jpeg = image("photo.jpg");
        let values: Vec<Vec<u8>> = vec![
            image("small-3.png"),
            jpeg[..jpeg.len() / 2].to_vec(),
            png_of(60_000, 60_000),
            // Fewer pixels than the limit, but too many to decode within the memory.
            png_of(6_000, 6_000),
            image("animated.gif"),
            SVG.to_vec(),
            Vec::new(),
            // 39 MB.
            bmp(3_600, 3_600),
            image("cmyk.jpg"),
            image("small-3.png"),
        ];
        let config = config(&place, "image-vit", "format: image", "{ kind: image-classification }", delivery);
        let mut daemon = Daemon::start(&config);
        place.produce(values.iter().map(|value| Sent::new(0, value.clone())));
        let dead = place.dead_letters(6);
        let predictions = place.predictions(4);
        let expected = [
            (1, "the value: the JPEG is cut short: it has no end marker"),
            (2, "60000 × 60000 pixels, more than task.max_pixels: 40000000"),
            (
                3,
                "decoding it takes 206 MiB, more than the quarter of memory.limit that is for decoding: 32 MiB",
            ),
            (5, "the value: it is an SVG, which has no pixels; supported: JPEG, PNG, WebP, GIF, BMP, TIFF"),
            (6, "the value: it is empty"),
            (7, "more than task.max_bytes: 33554432"),
        ];
        for (dead, (offset, what)) in dead.iter().zip(expected) {
            let (error, text) = dead.error();
            assert_eq!((dead.source().1, error), (offset, "image"), "{text}");
            assert!(text.contains(what), "{text}");
            assert_eq!(dead.value.as_deref(), Some(&values[offset as usize][..]));
            assert_eq!(dead.header("kandle-stage"), Some("decode"));
        }
        let offsets: Vec<i64> = predictions.iter().map(|got| got.source().1).collect();
        assert_eq!(offsets, [0, 4, 8, 9]);
        assert_eq!(predictions[0].json(), predictions[3].json());
        for got in &predictions {
            let scores = got.json()["scores"].clone();
            let sum: f64 = scores.as_object().expect("scores").values().filter_map(Value::as_f64).sum();
            assert!((sum - 1.0).abs() < 1e-5, "{scores}");
        }
        let (_, metrics) = daemon.get("/metrics");
        let seconds = |stage: &str| {
            let name = format!("kandle_stage_seconds_sum{{stage=\"{stage}\"}} ");
            metrics.lines().find_map(|line| line.strip_prefix(&name)?.parse::<f64>().ok())
        };
        // Decoding the images takes longer than reading the records and planning their batches.
        let of_images = seconds("decode_image").expect("a stage");
        assert!(of_images > seconds("decode").expect("a stage"), "{metrics}");
        assert!(of_images > seconds("prepare").expect("a stage"), "{metrics}");
        daemon.stop();
        assert_eq!(place.dead_letters(6).len() + place.predictions(4).len(), values.len());
    }
}

#[test]
fn images_in_base64_and_data_urls_are_read_from_a_field() {
    for delivery in GUARANTEES {
        let place = place("images-json");
        let base64 = |name: &str| STANDARD.encode(image(name));
        let values: Vec<Value> = vec![
            json!({ "photo": { "data": base64("small-4.png") } }),
            json!({ "photo": { "data": format!("data:image/png;base64,{}", base64("small-4.png")) } }),
            json!({ "photo": { "data": "https://example.org/cat.jpg" } }),
            json!({ "photo": { "data": base64("small-4.png").replace('A', "*") } }),
            json!({ "photo": { "data": 7 } }),
            json!({ "photo": {} }),
            json!({ "photo": { "data": base64("turned-6.jpg") } }),
        ];
        let task = "{ kind: image-embedding, normalize: true, dimensions: 5 }";
        let config = config(&place, "image-clip", "field: /photo/data", task, delivery);
        let mut daemon = Daemon::start(&config);
        place.produce(values.iter().map(|value| Sent::new(0, value.to_string())));
        let dead = place.dead_letters(4);
        let expected = [
            (2, "image", "\"/photo/data\": it is an address, which kandle does not fetch"),
            (3, "image", "\"/photo/data\": it is not base64: Invalid symbol 42"),
            (4, "field", "\"/photo/data\" is a number, not a string"),
            (5, "field", "\"/photo/data\" is missing"),
        ];
        for (dead, (offset, error, what)) in dead.iter().zip(expected) {
            let (found, text) = dead.error();
            assert_eq!((dead.source().1, found), (offset, error), "{text}");
            assert!(text.contains(what), "{text}");
        }
        let predictions = place.predictions(3);
        assert_eq!(predictions[0].json(), predictions[1].json());
        for got in &predictions {
            let vector = got.json()["embedding"].clone();
            let values: Vec<f64> =
                vector.as_array().expect("a vector").iter().filter_map(Value::as_f64).collect();
            let length: f64 = values.iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!(values.len() == 5 && (length - 1.0).abs() < 1e-5, "{vector}");
        }
        daemon.stop();
    }
}

#[test]
fn the_commands_show_check_and_run_models_of_images() {
    let place = place("images-commands");
    let settings = config(
        &place,
        "image-vit-timm",
        "format: image",
        "{ kind: image-classification, top_k: 2 }",
        GUARANTEES[0],
    );
    let config = file("kandle.yaml", &settings);
    let run =
        |command: &[&str], input: &[u8]| finish(kandle().args(command).arg("-c").arg(&config.path), input);
    let (code, shown, error) = run(&["model", "show"], b"");
    assert_eq!(code, 0, "{error}");
    for part in ["vit_tiny_patch8_32", "32 × 32", "cat, dog, fish", "softmax"] {
        assert!(shown.contains(part), "{shown}");
    }
    let (code, checked, error) = run(&["check"], b"");
    assert_eq!(code, 0, "{checked}{error}");
    assert!(checked.contains("one forward pass done on cpu"), "{checked}");
    // Files are records of their own, whatever bytes they have.
    let folder = root().join("tests/fixtures/images");
    let files =
        ["photo.png", "photo.webp", "photo.bmp", "photo.tiff", "golden.json"].map(|name| folder.join(name));
    let files: Vec<&str> = files.iter().map(|path| path.to_str().expect("UTF-8")).collect();
    let (code, predicted, error) = run(&[&["predict"], &files[..]].concat(), b"");
    assert_eq!(code, 0, "{error}");
    let lines: Vec<Value> = predicted.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 5, "{predicted}");
    // The formats without loss have the same pixels.
    assert!(lines[..4].iter().all(|line| *line == lines[0]), "{predicted}");
    assert_eq!(lines[0]["scores"].as_object().expect("scores").len(), 2);
    assert_eq!(lines[4]["error"], "image");
    let (code, predicted, error) = run(&["predict"], &image("photo.png"));
    assert_eq!((code, serde_json::from_str(&predicted).ok().as_ref()), (0, Some(&lines[0])), "{error}");
}
