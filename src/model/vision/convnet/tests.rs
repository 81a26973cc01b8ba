//! The two kinds of devices against each other, both on a CPU.

use candle_core::{DType, Device};
use candle_nn::VarBuilder;

use super::cpu::Cpu;
use super::device::Candle;
use super::{Backend, Network};
use crate::model::Files;
use crate::model::vision::Output;
use crate::model::vision::architecture::{self, Network as Spec};
use crate::model::vision::model::Image;
use crate::model::vision::preprocess::Preprocess;
use crate::model::weights::Weights;
use crate::settings;

#[test]
fn candles_operations_and_the_kernels_give_the_same_vectors() {
    let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut compared = 0;
    for entry in std::fs::read_dir(fixtures).unwrap() {
        let folder = entry.unwrap().path();
        let source = Some(folder.display().to_string());
        let settings = settings::Model { source, ..Default::default() };
        let is_of_images = folder.file_name().unwrap().to_string_lossy().starts_with("image-");
        let (true, Ok(files)) = (is_of_images, Files::find(&settings)) else { continue };
        let config = files.json("config.json").unwrap().unwrap();
        let preprocess = Preprocess::read(&files, &config).unwrap();
        let weights = Weights::open(&files).unwrap();
        let Ok(Spec::Convnet(spec)) = architecture::describe(&config, &weights, Output::Embedding, &[])
        else {
            continue;
        };
        let vb = VarBuilder::from_backend(Box::new(weights), DType::F32, Device::Cpu);
        let images: Vec<Image> = (0..3)
            .map(|i| {
                let pixels =
                    (0..preprocess.bytes()).map(|at| (at * (37 + i) % 251) as u8).collect::<Vec<u8>>();
                Image { pixels: pixels.into(), cost: 1 }
            })
            .collect();
        let images: Vec<&Image> = images.iter().collect();
        let kernels = Network::load(&spec, &vb, Cpu::default()).unwrap().0;
        let candle = Candle { device: Device::Cpu, dtype: DType::F32 };
        let candle = Network::load(&spec, &vb, candle).unwrap().0;
        let got = kernels.forward(&images, &preprocess).unwrap();
        let want = candle.forward(&images, &preprocess).unwrap();
        // Image by image, and all at once from the first step on.
        let together = kernels.backend.images(&images, &preprocess).unwrap();
        let together =
            kernels.steps.iter().try_fold(together, |x, step| super::apply(&kernels.backend, step, x));
        let together = kernels.rows(together.unwrap()).unwrap();
        let difference = |a: &candle_core::Tensor, b: &candle_core::Tensor| {
            (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
        };
        let largest = want.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap().max(1.0);
        let off = difference(&got, &want) / largest;
        assert!(off < 1e-4, "{}: {off}", folder.display());
        assert_eq!(difference(&got, &together), 0.0, "{}", folder.display());
        compared += 1;
    }
    assert!(compared >= 16, "{compared}");
}
