//! Whether a second version of a model fits the memory beside the one that runs.

use crate::compute::About;
use crate::failpoint;
use crate::host_memory;
use crate::model::{Files, FilesError, free_device_memory};
use crate::telemetry::Metrics;

/// Memory that loading takes beside the weights, as a share of them.
const MARGIN: f64 = 0.1;

/// The memory that a second version needs, and what there is of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes for its weights, and on the host for what windows in flight may still take of `memory.limit`.
    pub needed: u64,
    /// Free bytes; `None`: not known.
    pub free: Option<u64>,
}

impl Room {
    /// `files`: of the new version; `running`: the version that runs; `limit`: `memory.limit`.
    ///
    /// # Errors
    /// The files cannot be read.
    pub fn for_second(
        files: &Files,
        running: &About,
        limit: u64,
        metrics: &Metrics,
    ) -> Result<Self, FilesError> {
        let weights = weights(files.bytes()?, running);
        let (needed, free) = match free_device_memory(&running.device) {
            Some(free) => (weights, Some(free)),
            None => {
                let held = |kind| metrics.memory.with_label_values(&[kind]).get().max(0) as u64;
                let held: u64 = ["prefetched", "windows", "predictions"].into_iter().map(held).sum();
                (weights + limit.saturating_sub(held), host_memory::free())
            }
        };
        // A test may say how much is free.
        let said = failpoint::argument("refresh-free").and_then(|free| free.parse().ok());
        Ok(Self { needed, free: said.or(free) })
    }

    /// What is not known is taken to be enough, as at the start.
    pub fn is_enough(self) -> bool {
        self.free.is_none_or(|free| self.needed <= free)
    }
}

/// Bytes for the weights in files of so many bytes. The checkpoint's numbers may have half the size of those in memory,
/// as the present version's may have.
fn weights(file_bytes: u64, running: &About) -> u64 {
    let on_gpu = running.host_memory == 0;
    let least = if on_gpu && running.dtype == "f32" { 2 * file_bytes } else { file_bytes };
    let weights = least.max(running.host_memory);
    weights + (weights as f64 * MARGIN) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Digest;
    use crate::settings::TaskKind;
    use crate::settings::{Settings, Sources, load};

    fn settings() -> Settings {
        let set = [
            "kafka.brokers=none:1",
            "input.topics=in",
            "input.group=g",
            "input.field=/text",
            "task.kind=text-classification",
            "model.source=bundled",
            "output.topic=out",
            "dead_letters.topic=dead",
        ];
        let set = set.iter().map(|set| (*set).to_owned()).collect();
        load(&Sources { set, ..Sources::default() }).unwrap().settings
    }

    fn about(host_memory: u64, dtype: &str) -> About {
        About {
            kind: TaskKind("dummy"),
            model: "m".to_owned(),
            architecture: "bert".to_owned(),
            digest: Digest::of(&[], &settings(), dtype).unwrap(),
            device: "cpu".to_owned(),
            dtype: dtype.to_owned(),
            host_memory,
        }
    }

    #[test]
    fn weights_may_be_larger_in_memory_than_in_files() {
        assert_eq!(weights(1000, &about(1000, "f32")), 1100);
        assert_eq!(weights(1000, &about(2000, "f32")), 2200, "a checkpoint in 16 bits, as the present one");
        assert_eq!(weights(1000, &about(0, "bf16")), 1100);
        assert_eq!(weights(1000, &about(0, "f32")), 2200);
    }

    #[test]
    fn windows_that_may_come_need_memory_too() {
        let (settings, metrics) = (settings(), Metrics::new());
        let files = Files::find(&settings.model).unwrap();
        let room = |held: i64| {
            metrics.memory.with_label_values(&["windows"]).set(held);
            Room::for_second(&files, &about(0, "bf16"), 1 << 30, &metrics).unwrap()
        };
        let (empty, half) = (room(0), room(1 << 29));
        assert_eq!(empty.needed - half.needed, 1 << 29);
        assert!(half.needed > 1 << 29 && empty.free.is_some());
        assert!(Room { needed: 5, free: Some(5) }.is_enough() && Room { needed: 5, free: None }.is_enough());
        assert!(!Room { needed: 6, free: Some(5) }.is_enough());
    }
}
