//! ONNX models on a real Kafka: records that do not fit the model, under both guarantees; and the commands.

use crate::support;

use serde_json::{Value, json};
use support::{Daemon, GUARANTEES, Got, Place, Sent, file, finish, kandle, root};

fn model(name: &str) -> String {
    format!("{{ source: \"{}\" }}", root().join("tests/fixtures").join(name).display())
}

fn config(place: &Place, name: &str, task: &str, delivery: &str) -> String {
    place.config(&[
        ("input", "{ topics: [$INPUT], group: $GROUP }"),
        ("task", task),
        ("model", &model(name)),
        ("delivery", delivery),
        ("memory", "{ limit: 128MiB }"),
    ])
}

/// The value for `id`, which `output.include` copies.
fn of(all: &[Got], id: u64) -> &Got {
    all.iter().find(|got| got.json()["id"] == id).unwrap_or_else(|| panic!("nothing for {id}"))
}

#[test]
fn records_that_do_not_fit_are_dead_letters_and_their_neighbours_are_not() {
    for delivery in GUARANTEES {
        let place = Place::new("tensor-columns", 1);
        for topic in [&place.input, &place.dead] {
            place.configure(topic, "max.message.bytes", "20000000");
        }
        let columns: Vec<String> = (0..8).map(|i| format!("/c{i}")).collect();
        let task =
            format!("{{ kind: tensor, inputs: {{ input: [{}] }}, as: classification }}", columns.join(", "));
        let good = |id: u64| json!({ "id": id, "c0": 1, "c1": 0.5, "c2": -1, "c3": 0, "c4": 2, "c5": 0, "c6": 1, "c7": 0.5 });
        let with = |id: u64, c3: &str| good(id).to_string().replace("\"c3\":0", &format!("\"c3\":{c3}"));
        let mut without = good(4);
        without.as_object_mut().expect("an object").remove("c3");
        let million = format!("[{}]", vec!["1"; 1_000_000].join(","));
        let values = vec![
            good(0).to_string(),
            with(1, "NaN"),
            with(2, "\"0\""),
            with(3, "null"),
            without.to_string(),
            with(5, "[0,0]"),
            with(6, "1e400"),
            with(7, &million),
            good(8).to_string(),
        ];
        let mut daemon = Daemon::start(&config(&place, "onnx-xgboost", &task, delivery));
        place.produce(values.iter().map(|value| Sent::new(0, value.as_str())));
        let dead = place.dead_letters(6);
        let predictions = place.predictions(3);
        let expected = [
            (1, "decode", "the value is not JSON"),
            (2, "field", "\"/c3\" is a string, and the model takes float"),
            (4, "field", "\"/c3\" is missing"),
            (5, "field", "\"/c0\" and the other columns have 9 values; input input: float[?, 8] takes 8"),
            (6, "field", "\"/c3\" is 1e400, which float cannot hold"),
            (7, "field", "\"/c3/8\" is one more than the 8 elements that the model takes"),
        ];
        for (dead, (offset, error, what)) in dead.iter().zip(expected) {
            let (found, text) = dead.error();
            assert_eq!((dead.source().1, found), (offset, error), "{text}");
            assert!(text.contains(what), "{text}");
            assert_eq!(dead.value.as_deref(), Some(values[offset as usize].as_bytes()));
        }
        let mut same = of(&predictions, 8).json();
        same["id"] = json!(0);
        assert_eq!(of(&predictions, 0).json(), same);
        assert!(
            of(&predictions, 3).json()["score"].is_number(),
            "null is NaN, which trees have a branch for"
        );
        daemon.stop();
        assert_eq!(place.dead_letters(6).len() + place.predictions(3).len(), values.len());
    }
}

#[test]
fn signals_of_any_length_are_answered_and_too_short_ones_are_dead_letters() {
    for delivery in GUARANTEES {
        let place = Place::new("tensor-signals", 1);
        for topic in [&place.input, &place.dead] {
            place.configure(topic, "max.message.bytes", "20000000");
        }
        let task = "{ kind: tensor, inputs: { signal: /signal, gain: 1.5 } }";
        let of_length =
            |id: u64, length: usize| format!(r#"{{"id":{id},"signal":[{}]}}"#, vec!["0.5"; length].join(","));
        // The kernel has five elements.
        let values =
            [of_length(0, 9), of_length(1, 3), of_length(2, 1_000_000), of_length(3, 9), of_length(4, 0)];
        let mut daemon = Daemon::start(&config(&place, "onnx-convolution", task, delivery));
        place.produce(values.iter().map(|value| Sent::new(0, value.as_str())));
        let dead = place.dead_letters(2);
        let predictions = place.predictions(3);
        assert_eq!(
            dead.iter().map(|dead| (dead.source().1, dead.error().0)).collect::<Vec<_>>(),
            [(1, "infer"), (4, "field")]
        );
        let mean = |id| of(&predictions, id).json()["outputs"]["mean"].clone();
        assert_eq!(mean(0), mean(3));
        // All windows of a constant signal are equal. The mean of a million floats, added one after another, has 0.5 % of error.
        for (long, short) in mean(2).as_array().expect("means").iter().zip(mean(0).as_array().expect("means"))
        {
            let (long, short) = (long.as_f64().expect("a number"), short.as_f64().expect("a number"));
            assert!((long - short).abs() <= 1e-2 * short.abs(), "{long} is not {short}");
        }
        daemon.stop();
    }
}

#[test]
fn the_commands_show_check_and_run_an_onnx_model() {
    let place = Place::new("tensor-commands", 1);
    let task = "{ kind: tensor, inputs: { signal: /signal, gain: 1.5 }, outputs: [place] }";
    let config = file("kandle.yaml", &config(&place, "onnx-convolution/model.onnx", task, GUARANTEES[0]));
    let run =
        |command: &[&str], input: &[u8]| finish(kandle().args(command).arg("-c").arg(&config.path), input);
    let (code, shown, error) = run(&["model", "show"], b"");
    assert_eq!(code, 0, "{error}");
    for part in ["signal: float[batch, length]; gain: float[]", "mean; place; loud", "ONNX, opset 17"] {
        assert!(shown.contains(part), "{shown}");
    }
    let (code, checked, error) = run(&["check"], b"");
    assert_eq!(code, 0, "{checked}{error}");
    assert!(checked.contains("one forward pass done on cpu"), "{checked}");
    let (code, predicted, error) = run(&["predict"], br#"{"id":7,"signal":[0,1,2,3,4,5,6]}"#);
    assert_eq!(code, 0, "{error}");
    let predicted: Value = serde_json::from_str(&predicted).expect("JSON");
    assert_eq!(predicted["id"], 7);
    assert!(
        predicted["outputs"]["place"].is_i64() && predicted["outputs"].get("mean").is_none(),
        "{predicted}"
    );
}
