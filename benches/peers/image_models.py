"""Makes what benches/peers/images.py runs over: photo-like JPEGs, checkpoints with random weights in the shapes of
google/vit-base-patch16-224 and microsoft/resnet-50, and their ONNX graphs.

The weights are scaled so that activations keep their size from layer to layer, and batch normalization has the statistics of
the images: quantized graphs are then as far from the original as those of a trained model could be.
"""

import json
import pathlib

import numpy as np
import onnxruntime as ort
import torch
from PIL import Image

WIDTH, HEIGHT, LABELS = 640, 480, 1000
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def photos(folder, count):
    """Noise filtered at several scales, whose strength falls with the frequency as it does in photos; three channels that are
    mostly alike. At quality 90 a file has about the bytes of a photo of this size."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:04}.jpg"
        if path.exists():
            continue
        rng = np.random.default_rng(number)
        layers = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
        for cells, strength in [(3, 60), (8, 35), (24, 22), (64, 14), (160, 9), (480, 5)]:
            shape = (max(2, cells * HEIGHT // WIDTH), cells)
            grey = rng.normal(size=shape).astype(np.float32)
            for channel in range(3):
                noise = grey + 0.3 * rng.normal(size=shape).astype(np.float32)
                layer = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
                layers[..., channel] += strength * np.asarray(layer)
        pixels = np.clip(layers + 128, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=90)


def randomize(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            # Not vectors, and not the positions.
            if parameter.dim() in (2, 4):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return model


def vit(folder, images):
    from transformers import ViTConfig, ViTForImageClassification
    model = randomize(ViTForImageClassification(ViTConfig(num_labels=LABELS, attn_implementation="eager"))).eval()
    model.save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}, "resample": 2,
                 "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def resnet(folder, images):
    from transformers import ResNetConfig, ResNetForImageClassification
    model = randomize(ResNetForImageClassification(ResNetConfig(num_labels=LABELS)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # The mean over all batches.
            module.momentum = None
    model.train()
    values = torch.tensor(np.stack([prepare("resnet", path) for path in images[:32]]))
    with torch.no_grad():
        for batch in values.split(8):
            model(batch)
    model.eval().save_pretrained(folder)
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875,
                 "resample": 3, "image_mean": MEAN.tolist(), "image_std": STD.tolist()}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


MODELS = {"vit": vit, "resnet": resnet}


def prepare(model, path):
    """A file's values as the processor of the checkpoint makes them, by Pillow: `[3, 224, 224]`, f32."""
    image = Image.open(path).convert("RGB")
    if model == "vit":
        image = image.resize((224, 224), Image.Resampling.BILINEAR)
        scale, shift = np.float32([1 / 127.5] * 3), np.float32([-1] * 3)
    else:
        short = 256
        width, height = image.size
        size = (short * width // height, short) if width > height else (short, short * height // width)
        left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
        image = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
        scale, shift = 1 / (255 * STD), -MEAN / STD
    values = np.empty((3, 224, 224), dtype=np.float32)
    pixels = np.asarray(image)
    for channel in range(3):
        np.multiply(pixels[..., channel], scale[channel], out=values[channel], dtype=np.float32)
        values[channel] += shift[channel]
    return values


class Calibration:
    """Values for onnxruntime's static quantization, one image at a time."""

    def __init__(self, model, images):
        self.rest = iter(images)
        self.model = model

    def get_next(self):
        path = next(self.rest, None)
        return None if path is None else {"pixels": prepare(self.model, path)[None]}


def export(model, folder, network, images):
    """The graph in f32, and quantized: `int8` dynamically, `int8-static` with the ranges of a few images."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, pixels):
            return self.network(pixel_values=pixels).logits

    path = folder / "f32.onnx"
    torch.onnx.export(
        Logits(), (torch.zeros(2, 3, 224, 224),), str(path), input_names=["pixels"], output_names=["logits"],
        dynamic_axes={"pixels": {0: "batch"}, "logits": {0: "batch"}}, opset_version=17, dynamo=False)
    # Without VNNI, sums of 8-bit products overflow: weights get seven bits.
    seven = "vnni" not in pathlib.Path("/proc/cpuinfo").read_text()
    common = dict(per_channel=True, reduce_range=seven, weight_type=QuantType.QInt8)
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantize_dynamic(str(prepared), str(folder / "int8.onnx"), **common)
    quantize_static(str(prepared), str(folder / "int8-static.onnx"), Calibration(model, images[:16]),
                    quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, **common)
    prepared.unlink()


def make(folder, names, count):
    """Makes what is missing; returns the paths of the images."""
    photos(folder / "photos", count)
    images = sorted((folder / "photos").iterdir())
    ort.set_default_logger_severity(3)
    for name in names:
        complete = folder / name / "int8-static.onnx"
        if not complete.exists():
            (folder / name).mkdir(exist_ok=True)
            export(name, folder / name, MODELS[name](folder / name, images), images)
    return images
