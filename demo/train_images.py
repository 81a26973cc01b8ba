#!/usr/bin/env python3
"""Draws shapes, trains the model of `kandle demo --images` on them and writes demo/shapes/.

The model names the shape in an image: a small ResNet. Shapes have any place, size, angle and colours, on a background with
noise; images are JPEGs and PNGs of several sizes.

    pip install pillow safetensors torch transformers
    python3 demo/train_images.py            # about three minutes on two cores

Same seed, same images; the weights differ in the last digits between machines.
"""

import base64
import io
import json
import math
import pathlib
import random

import numpy
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from transformers import ResNetConfig, ResNetForImageClassification

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE / "shapes"
SEED = 20261127
SIDE = 48
SHAPES = ["circle", "cross", "ring", "square", "star", "triangle"]
SHOWN = 60


def polygon(rng, shape):
    """Corners around the origin, at most 1 from it."""
    turn = rng.uniform(0, 2 * math.pi)
    radii = {"square": [1] * 4, "triangle": [1] * 3, "star": [1, 0.42] * 5}.get(shape)
    if radii:
        return [(r * math.cos(turn + 2 * math.pi * i / len(radii)), r * math.sin(turn + 2 * math.pi * i / len(radii)))
                for i, r in enumerate(radii)]
    arm = 0.3
    corners = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1),
               (-arm, -1), (-arm, -arm), (-1, -arm), (-1, arm), (-arm, arm), (-arm, 1)]
    return [(0.95 * (x * math.cos(turn) - y * math.sin(turn)), 0.95 * (x * math.sin(turn) + y * math.cos(turn)))
            for x, y in corners]


def draw(rng, shape, width, height):
    ground = [rng.randrange(256) for _ in range(3)]
    ink = [rng.randrange(256) for _ in range(3)]
    while sum(abs(a - b) for a, b in zip(ground, ink)) < 180:
        ink = [rng.randrange(256) for _ in range(3)]
    scale = 4
    image = Image.new("RGB", (width * scale, height * scale), tuple(ground))
    canvas = ImageDraw.Draw(image)
    radius = scale * min(width, height) * rng.uniform(0.25, 0.45)
    x = rng.uniform(radius, width * scale - radius)
    y = rng.uniform(radius, height * scale - radius)
    box = [x - radius, y - radius, x + radius, y + radius]
    if shape == "circle":
        canvas.ellipse(box, fill=tuple(ink))
    elif shape == "ring":
        canvas.ellipse(box, outline=tuple(ink), width=int(radius * 0.3))
    else:
        canvas.polygon([(x + radius * a, y + radius * b) for a, b in polygon(rng, shape)], fill=tuple(ink))
    levels = numpy.asarray(image.resize((width, height), Image.Resampling.BOX)).astype(float)
    levels += numpy.random.default_rng(rng.randrange(1 << 32)).normal(0, rng.uniform(0, 12), levels.shape)
    return Image.fromarray(numpy.clip(levels, 0, 255).astype(numpy.uint8))


def tensor(image):
    levels = numpy.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(numpy.float32)
    return torch.from_numpy((levels / 255 - 0.5) / 0.5).permute(2, 0, 1)


def batch(rng, count):
    labels = [rng.randrange(len(SHAPES)) for _ in range(count)]
    return torch.stack([tensor(draw(rng, SHAPES[label], 56, 48)) for label in labels]), torch.tensor(labels)


def main():
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
        id2label=dict(enumerate(SHAPES)), label2id={shape: i for i, shape in enumerate(SHAPES)})
    model = ResNetForImageClassification(config)
    images, labels = batch(rng, 6_000)
    steps, size = 1_500, 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (size,))
        x = images[chosen]
        if step % 2:
            x = x.flip(3)
        if step % 3 == 0:
            x = x.transpose(2, 3)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=x).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(step, round(loss.item(), 3), flush=True)
    model.eval()
    test, truth = batch(random.Random(SEED + 1), 1_000)
    with torch.no_grad():
        accuracy = (model(pixel_values=test).logits.argmax(1) == truth).float().mean().item()

    OUT.mkdir(exist_ok=True)
    weights = {name: (value.half() if value.is_floating_point() else value).contiguous()
               for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(weights, OUT / "model.safetensors", metadata={"format": "pt"})
    described = {key: value for key, value in json.loads(config.to_json_string()).items()
                 if key in ("model_type", "embedding_size", "hidden_sizes", "depths", "layer_type", "hidden_act",
                            "downsample_in_first_stage", "downsample_in_bottleneck", "id2label", "label2id", "num_channels")}
    described["architectures"] = ["ResNetForImageClassification"]
    (OUT / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    (OUT / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIDE, "width": SIDE},
        "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, indent=2) + "\n")
    rows = []
    shown = random.Random(SEED + 2)
    for i in range(SHOWN):
        shape = SHAPES[i % len(SHAPES)]
        image = draw(shown, shape, shown.randrange(40, 100), shown.randrange(40, 80))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80) if i % 4 else image.quantize(32).save(file, "PNG", optimize=True)
        rows.append(json.dumps({"id": f"image-{i + 1}", "drawn": shape, "image": base64.b64encode(file.getvalue()).decode()}))
    (HERE / "images.jsonl").write_text("\n".join(rows) + "\n")
    count = sum(p.numel() for p in model.parameters())
    (OUT / "README.md").write_text(f"""# kandle-shapes

Names the shape in an image: {", ".join(SHAPES)}.

| | |
|---|---|
| architecture | ResNet, 3 stages of one block, 16 to 64 channels, {count} parameters, f16 safetensors |
| data | 6000 drawn images for training, 1000 for the test, by `demo/train_images.py` |
| accuracy, test | {accuracy:.1%} |
| licence | as kandle |

It exists so that `kandle demo --images` has a real model to run.
""")
    print(count, "parameters, accuracy", accuracy, (HERE / "images.jsonl").stat().st_size, "bytes of images")


main()
