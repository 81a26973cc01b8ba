//! Every command in the README runs, with the README's own configuration, on a real Kafka.

use crate::support;

use std::process::Command;

use support::{Daemon, Place, finish, kandle, root};

/// The README's code blocks in a language.
fn blocks(language: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let mut blocks = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if let Some(tag) = line.strip_prefix("```") {
            if !inside && tag == language {
                blocks.push(String::new());
            }
            inside = !inside && tag == language;
        } else if inside {
            let block = blocks.last_mut().expect("a block");
            block.push_str(line);
            block.push('\n');
        }
    }
    blocks
}

#[test]
fn every_command_runs() {
    let place = Place::new("readme", 2);
    let yaml = blocks("yaml").remove(0);
    let config = yaml
        .replace("localhost:9092", &place.brokers)
        .replace("[tickets]", &format!("[{}]", place.input))
        .replace("kandle-tickets", &place.group)
        .replace("tickets-predictions", &place.output)
        .replace("tickets-dead", &place.dead);
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(
        directory.path().join("kandle.yaml"),
        format!("{config}server: {{ listen: \"127.0.0.1:0\" }}\n"),
    )
    .expect("written");
    std::fs::copy(root().join("demo/tickets.jsonl"), directory.path().join("tickets.jsonl")).expect("copied");

    // A record of the day that the README replays.
    let noon = Some(1_795_521_600_000);
    place.produce([support::Sent { timestamp: noon, ..support::Sent::ticket(0, 6, "Where is my parcel?") }]);
    let mut ran = Vec::new();
    for line in blocks("sh").concat().lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] => continue,
            // A dry run: what the target does is run by the other tests, or by CI.
            ["make", target] => {
                let status =
                    Command::new("make").args(["-n", target]).current_dir(root()).output().expect("make");
                assert!(status.status.success(), "{line}");
            }
            ["cargo", "build", "--release", "--features", feature] => {
                let manifest = std::fs::read_to_string(root().join("Cargo.toml")).expect("Cargo.toml");
                assert!(manifest.contains(&format!("\n{feature} = [")), "{line}");
            }
            ["kandle", "run", ..] => {
                place.produce([support::Sent::ticket(0, 7, "I was charged twice in May.")]);
                let config = std::fs::read_to_string(directory.path().join("kandle.yaml")).expect("read");
                let mut daemon = Daemon::start(&config);
                let prediction = place.predictions(2).remove(1).json();
                assert_eq!((&prediction["label"], &prediction["id"]), (&"billing".into(), &7.into()));
                daemon.stop();
            }
            // Builds the same as `make build`: the only binary of the package.
            ["cargo", "install", "--path", "."] => {
                let metadata = ["metadata", "--no-deps", "--offline", "--format-version", "1"];
                let output =
                    Command::new("cargo").args(metadata).current_dir(root()).output().expect("cargo");
                let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
                let packages = metadata["packages"].as_array().expect("packages");
                let package = packages.iter().find(|package| package["name"] == "kandle").expect("kandle");
                let targets = package["targets"].as_array().expect("targets");
                let binaries = targets.iter().filter(|target| target["kind"][0] == "bin");
                assert_eq!(binaries.map(|target| &target["name"]).collect::<Vec<_>>(), ["kandle"]);
            }
            // Tests cannot build images; `make lint-deploy` lints the Dockerfile.
            ["docker", "build", ..] => {
                let text = std::fs::read_to_string(root().join("Dockerfile")).expect("Dockerfile");
                assert!(text.contains("ARG VARIANT=cpu\n") && text.contains(" AS build-cuda\n"));
            }
            ["kandle", rest @ ..] => {
                let topic = |word: &&str| match *word {
                    "tickets-predictions" => place.output.clone(),
                    "tickets-trial" => place.dead.clone(),
                    word => word.to_owned(),
                };
                let rest: Vec<String> = rest.iter().map(topic).collect();
                let (code, out, err) = finish(kandle().args(rest).current_dir(directory.path()), b"");
                assert_eq!(code, 0, "{line}\n{out}{err}");
            }
            _ => panic!("this test does not know how to run {line:?}"),
        }
        ran.push(words[..2].join(" "));
    }
    for command in ["make demo", "make test", "kandle check", "kandle run", "kandle predict"] {
        assert!(ran.contains(&command.to_owned()), "{command} is not in the README: {ran:?}");
    }
}

#[test]
fn linked_files_exist() {
    let text = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
        if link.starts_with("https://") {
            continue;
        }
        let (file, heading) = link.split_once('#').unwrap_or((link, ""));
        assert!(root().join(file).exists(), "{link}");
        let of_line = |line: &str| line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        let has = |text: String| text.lines().any(|line| line.starts_with('#') && of_line(line) == heading);
        assert!(
            heading.is_empty() || std::fs::read_to_string(root().join(file)).is_ok_and(has),
            "{link}: there is no such heading"
        );
    }
}
