//! Refreshing without Kafka: versions of a small classifier, each of which gives every text the same label.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::*;
use crate::compute::{Replaceable, StageContext};
use crate::flow::{Encoded, Queued, Report};
use crate::lease::Lease;
use crate::record::{Arrival, Partition};
use crate::settings::{Sources, load};
use crate::watch::Observer;
use crate::window::{ClosedBy, Gatherer, Limits};

/// Adds a version whose classifier has this bias.
fn add(folder: &Path, name: &str, bias: [f32; 3]) -> PathBuf {
    let (from, to) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bert"), folder.join(name));
    std::fs::create_dir_all(&to).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
    let mut weights = std::fs::read(from.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let tensors: serde_json::Value = serde_json::from_slice(&weights[8..8 + header]).unwrap();
    let start = 8 + header + tensors["classifier.bias"]["data_offsets"][0].as_u64().unwrap() as usize;
    weights[start..start + 12].copy_from_slice(&bias.map(f32::to_le_bytes).concat());
    std::fs::write(to.join("model.safetensors"), weights).unwrap();
    to
}

/// Lets the link name another version.
fn point(folder: &Path, name: &str) {
    let next = folder.join("next");
    std::os::unix::fs::symlink(folder.join(name), &next).unwrap();
    std::fs::rename(next, folder.join("now")).unwrap();
}

/// A pipeline whose model can be refreshed, by hand.
struct Bench {
    folder: tempfile::TempDir,
    refresher: Refresher,
    replaceable: Arc<Replaceable>,
    gatherer: Gatherer,
    windows: Sender<Queued<Window>>,
    encoded: Receiver<Queued<Encoded>>,
    stage: std::thread::JoinHandle<Result<(), ComputeError>>,
    _reports: Receiver<Report>,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        add(folder.path(), "calm", [100.0, 0.0, 0.0]);
        add(folder.path(), "urgent", [0.0, 100.0, 0.0]);
        add(folder.path(), "nan", [f32::NAN, 0.0, 0.0]);
        point(folder.path(), "calm");
        let set = [
            "kafka.brokers=none:1",
            "input.topics=in",
            "input.group=g",
            "input.field=/text",
            "task.kind=text-classification",
            &format!("model.source={}", folder.path().join("now").display()),
            "model.refresh=1ms",
            "output.topic=out",
            "dead_letters.topic=dead",
        ];
        let set = set.iter().map(|set| (*set).to_owned()).collect();
        let settings = load(&Sources { set, ..Sources::default() }).unwrap().settings;
        let metrics = Arc::new(Metrics::new());
        let health = Arc::new(Health::new(Duration::from_secs(60)));
        let named = Named::now(&settings);
        let (replaceable, replacer) = Replaceable::new(task::load(&settings, &metrics).unwrap());
        let (windows, gathered) = bounded(1);
        let (to_publish, encoded) = unbounded();
        let (reports, told) = unbounded();
        let wires = StageContext {
            windows: gathered,
            encoded: to_publish,
            reports,
            health: Arc::clone(&health),
            observer: Observer::default(),
            stop: Arc::new(AtomicBool::new(false)),
            end: Arc::new(|_| {}),
        };
        let stage = std::thread::spawn(Arc::clone(&replaceable).stages(wires).remove(0).work);
        let refresher = Refresher {
            every: settings.model.refresh.unwrap().0,
            wants: Wants::Checkpoint,
            settings,
            replacer,
            metrics,
            health,
            named,
            failed: None,
            status: Status::default(),
        };
        let gatherer = Gatherer::new(Limits::NONE);
        Self { folder, refresher, replaceable, gatherer, windows, encoded, stage, _reports: told }
    }

    fn point(&self, name: &str) {
        point(self.folder.path(), name);
    }

    /// The label that the version that runs gives to a record, and the digest that its window names.
    fn predict(&mut self) -> (String, String) {
        let value = br#"{"text":"where is my order"}"#;
        let arrival = Arrival { value: Some(value), ..Arrival::default() };
        self.gatherer.push(&Partition::new("t", 0), &Lease::new(1), arrival, std::time::Instant::now());
        self.windows.send(Queued::new(self.gatherer.close(ClosedBy::Records).unwrap())).unwrap();
        let window = self.encoded.recv().unwrap().into_inner();
        let label = predictions(&window)[0].as_ref().unwrap()["label"].as_str().unwrap().to_owned();
        (label, window.model.digest.clone())
    }

    fn digest(&self) -> String {
        self.replaceable.about().digest.short().to_owned()
    }
}

#[test]
fn a_version_is_used_once_it_is_named_and_good() {
    let mut bench = Bench::new();
    let calm = bench.digest();
    assert_eq!(bench.refresher.refresh().unwrap(), Outcome::Unchanged);
    assert_eq!(bench.predict(), ("calm".to_owned(), calm.clone()));
    // The same files in another place: another version by name, the same digest.
    add(bench.folder.path(), "copy", [100.0, 0.0, 0.0]);
    bench.point("copy");
    assert_eq!(bench.refresher.refresh().unwrap(), Outcome::Unchanged);
    assert_eq!(bench.digest(), calm);

    bench.point("urgent");
    assert_eq!(bench.refresher.refresh().unwrap(), Outcome::Replaced);
    let urgent = bench.digest();
    assert_ne!(urgent, calm);
    assert_eq!(bench.predict(), ("urgent".to_owned(), urgent.clone()));
    let comparison = bench.refresher.status.last_replacement.take().unwrap().comparison.unwrap();
    assert_eq!((comparison.records, comparison.agreement), (1, Some(0.0)));

    bench.point("nan");
    let failed = |bench: &mut Bench| bench.refresher.refresh().unwrap_err().to_string();
    let error = failed(&mut bench);
    assert!(error.contains("first forward pass failed"), "{error}");
    let weights = bench.folder.path().join("nan/model.safetensors");
    std::fs::write(&weights, &std::fs::read(&weights).unwrap()[..50_000]).unwrap();
    let error = failed(&mut bench);
    assert!(error.contains("model.safetensors"), "{error}");
    // The same one again: tried at once, then after one more look, then after three more.
    let looks: Vec<bool> = (0..7).map(|_| bench.refresher.refresh().is_err()).collect();
    assert_eq!(looks, [true, false, true, false, false, false, true]);
    std::fs::remove_file(&weights).unwrap();
    let error = failed(&mut bench);
    assert!(error.contains("no weights"), "{error}");
    assert_eq!((bench.digest(), bench.predict()), (urgent.clone(), ("urgent".to_owned(), urgent.clone())));

    // Named again, the version that runs is nothing new.
    bench.point("urgent");
    assert_eq!(bench.refresher.refresh().unwrap(), Outcome::Unchanged);
    drop(bench.windows);
    bench.stage.join().unwrap().unwrap();
}

#[test]
fn the_one_before_is_loaded_again_if_the_other_cannot_be_used() {
    let mut bench = Bench::new();
    let calm = bench.digest();
    let about = bench.replaceable.about();
    let after = |bench: &Bench, digest: Option<&str>| {
        let settings = &bench.refresher.settings;
        let files = Files::find(&settings.model).unwrap();
        let version = model::version(&settings.model, Wants::Checkpoint).unwrap();
        let found = Digest::new(Some(&files), settings, &about.dtype).unwrap();
        let next = Next {
            version: &version,
            digest: if digest.is_some() { &about.digest } else { &found },
            sample: None,
        };
        bench.refresher.load_after(&about, next)
    };
    bench.point("nan");
    let error = after(&bench, None).err().unwrap().to_string();
    assert!(error.contains("first forward pass failed"), "{error}");
    assert_eq!((bench.digest(), bench.predict()), (calm.clone(), ("calm".to_owned(), calm.clone())));
    // Files with another digest than the one that was read before are in the middle of a change.
    bench.point("urgent");
    assert!(matches!(after(&bench, Some("another")), Err(RefreshError::Changing)));
    assert_eq!(bench.digest(), calm);
    let (urgent, comparison) = after(&bench, None).unwrap();
    assert!(comparison.is_none() && bench.refresher.replacer.replace(urgent));
    assert_eq!(bench.predict().0, "urgent");

    // Neither of them can be loaded: the pipeline ends.
    bench.point("nan");
    std::fs::remove_dir_all(bench.folder.path().join("calm")).unwrap();
    let about = bench.replaceable.about();
    let files = Files::find(&bench.refresher.settings.model).unwrap();
    let digest = Digest::new(Some(&files), &bench.refresher.settings, &about.dtype).unwrap();
    let next = Next { version: &None, digest: &digest, sample: None };
    assert!(matches!(bench.refresher.load_after(&about, next), Err(RefreshError::Gone)));
    let error = bench.stage.join().unwrap().unwrap_err().to_string();
    assert!(
        error.contains("the new version cannot be used") && error.contains("cannot be loaded again"),
        "{error}"
    );
}
