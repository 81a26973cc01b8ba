//! Forecasts on a real Kafka: series that the model cannot read, under both guarantees; and the commands.

use crate::support::{Daemon, GUARANTEES, Got, Place, Sent, file, finish, kandle, root};

use serde_json::{Value, json};

fn config(place: &Place, task: &str, delivery: &str) -> String {
    place.config(&[
        ("input", "{ topics: [$INPUT], group: $GROUP, field: /sales }"),
        ("task", task),
        ("model", &format!("{{ source: \"{}\" }}", root().join("tests/fixtures/chronos-bolt").display())),
        ("delivery", delivery),
        ("memory", "{ limit: 128MiB }"),
    ])
}

/// The prediction for `id`, which `output.include` copies.
fn of(all: &[Got], id: u64) -> Value {
    let found = all.iter().map(Got::json).find(|got| got["id"] == id);
    found.unwrap_or_else(|| panic!("nothing for {id}"))
}

#[test]
fn series_that_cannot_be_read_are_dead_letters_and_their_neighbours_are_not() {
    for delivery in GUARANTEES {
        let place = Place::new("forecast", 1);
        for topic in [&place.input, &place.dead] {
            place.configure(topic, "max.message.bytes", "20000000");
        }
        let with = |id: u64, series: &str| format!(r#"{{"id":{id},"sales":{series}}}"#);
        let good = "[3,5,4,6,5,7,null,8]";
        let million = format!("[{}]", vec!["1"; 1_000_000].join(","));
        let long = format!("[{}{}]", "9,".repeat(50_000), vec!["3"; 96].join(","));
        let values = [
            with(0, good),
            with(1, "[1,NaN]"),
            with(2, "[1,\"2\"]"),
            with(3, "[1,1e400]"),
            with(4, "[]"),
            with(5, &million),
            with(6, "[null,null]"),
            r#"{"id":7}"#.to_owned(),
            with(8, "[3,3,3,3]"),
            with(9, &long),
            with(10, good),
            with(11, r#"[{"timestamp":2,"value":1},{"timestamp":1,"value":1}]"#),
            with(12, "3"),
        ];
        let mut daemon =
            Daemon::start(&config(&place, "{ kind: forecast, horizon: 4, quantiles: [0.1, 0.9] }", delivery));
        place.produce(values.iter().map(|value| Sent::new(0, value.as_str())));
        let expected = [
            (1, "decode", "the value is not JSON"),
            (2, "field", "\"/sales/1\" is a string, not a number or null"),
            (3, "field", "\"/sales/1\" is 1e400, which a 32-bit float cannot hold"),
            (4, "field", "\"/sales\": the series is empty"),
            (
                5,
                "too_long",
                "\"/sales\" has more than 100000 points, and the model reads the newest 96: send fewer",
            ),
            (6, "prepare", "\"/sales\": all of the newest 2 points"),
            (7, "field", "\"/sales\" is missing"),
            (11, "field", "\"/sales/1/timestamp\" is not after the one before it"),
            (12, "field", "\"/sales\" is a number, not an array"),
        ];
        let dead = place.dead_letters(expected.len());
        let predictions = place.predictions(values.len() - expected.len());
        for (dead, (offset, error, what)) in dead.iter().zip(expected) {
            let (found, text) = dead.error();
            assert_eq!((dead.source().1, found), (offset, error), "{text}");
            assert!(text.contains(what), "{text}");
            assert_eq!(dead.value.as_deref(), Some(values[offset as usize].as_bytes()));
        }
        let first = of(&predictions, 0);
        let quantiles = first["quantiles"].as_object().expect("quantiles");
        assert_eq!(quantiles.keys().collect::<Vec<_>>(), ["0.1", "0.9"]);
        for points in quantiles.values().chain([&first["mean"]]) {
            assert_eq!(points.as_array().map(Vec::len), Some(4), "{first}");
        }
        let same = |mut prediction: Value| {
            prediction["id"] = json!(0);
            prediction
        };
        assert_eq!(same(of(&predictions, 10)), first);
        // Only the newest 96 points of a long series are read, and these are all equal.
        for (id, constant) in [(8, 3.0), (9, 3.0)] {
            for point in of(&predictions, id)["mean"].as_array().expect("points") {
                let point = point.as_f64().expect("a number");
                assert!((point - constant).abs() < 1e-3, "{id}: {point}");
            }
        }
        daemon.stop();
        assert_eq!(place.dead_letters(expected.len()).len() + predictions.len(), values.len());
    }
}

#[test]
fn the_commands_show_check_and_run_a_model_of_series() {
    let place = Place::new("forecast-commands", 1);
    let config = file(
        "kandle.yaml",
        &config(&place, "{ kind: forecast, horizon: 10, quantiles: [0.5] }", GUARANTEES[0]),
    );
    let run =
        |command: &[&str], input: &[u8]| finish(kandle().args(command).arg("-c").arg(&config.path), input);
    let (code, shown, error) = run(&["model", "show"], b"");
    assert_eq!(code, 0, "{error}");
    for part in ["Chronos-Bolt", "96, in patches of 8", "6 points in a pass", "0.1, 0.2"] {
        assert!(shown.contains(part), "{shown}");
    }
    let (code, checked, error) = run(&["check"], b"");
    assert_eq!(code, 0, "{checked}{error}");
    assert!(checked.contains("up to 96 points, the next 10 in 2 passes"), "{checked}");
    let (code, predicted, error) = run(&["predict"], br#"{"id":7,"sales":[0,1,2,3,4,5,6]}"#);
    assert_eq!(code, 0, "{error}");
    let predicted: Value = serde_json::from_str(&predicted).expect("JSON");
    assert_eq!(predicted["id"], 7);
    assert_eq!(predicted["mean"], predicted["quantiles"]["0.5"]);
    assert_eq!(predicted["mean"].as_array().map(Vec::len), Some(10));
}
