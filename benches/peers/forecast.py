#!/usr/bin/env python3
"""Compares kandle's forecasts with the chronos package, on a model with random weights in the shape of Chronos-Bolt-small.

    python3 benches/peers/forecast.py KANDLE FOLDER [--threads N] [--rounds N] [--dtypes f32,int8] [--lengths full,mixed]

FOLDER gets the model and files of series, one record a line. `full`: 2,048 points each, as many as the model reads; `short`: 128
points; `mixed`: 32 to 2,048 points, evenly spread over the logarithm. The package gets series that are parsed already, in batches
of the size, and in the order, that suit it best: sorted by length, its padding costs nothing. kandle reads JSON and writes JSON
(`kandle predict`); the time of a run with one record is subtracted, which is that of the start. The engines alternate. Prints a
table in Markdown: series a second, and the ratio within each round, their median last.
"""

import argparse
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from chronos.chronos_bolt import ChronosBoltModelForForecasting, ChronosBoltPipeline
from transformers import T5Config

TENTHS = [i / 10 for i in range(1, 10)]
COUNTS = {"full": 192, "short": 3072, "mixed": 768}


def make_model(folder):
    torch.manual_seed(7)
    config = T5Config(d_model=512, d_kv=64, d_ff=2048, num_heads=8, num_layers=6, num_decoder_layers=6,
                      feed_forward_proj="relu", decoder_start_token_id=0, pad_token_id=0, use_cache=False)
    config.chronos_config = {"context_length": 2048, "prediction_length": 64, "input_patch_size": 16,
                             "input_patch_stride": 16, "quantiles": TENTHS, "use_reg_token": True}
    config.architectures = ["ChronosBoltModelForForecasting"]
    model = ChronosBoltModelForForecasting(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name and parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def make_series(kind):
    rng = random.Random(7)
    lengths = {"full": lambda: 2048, "short": lambda: 128,
               "mixed": lambda: round(math.exp(rng.uniform(math.log(32), math.log(2048))))}
    for _ in range(COUNTS[kind]):
        level, season, points = rng.uniform(-50, 500), rng.uniform(1, 30), []
        for i in range(lengths[kind]()):
            level += rng.gauss(0, 1)
            points.append(round(level + season * math.sin(i * math.tau / 24), 2))
        yield points


def package(pipeline, series, size):
    """The predictions in the order of the series, and the seconds that they took."""
    order = sorted(range(len(series)), key=lambda i: len(series[i]))
    tensors = [torch.tensor(points) for points in series]
    found = [None] * len(series)
    started = time.perf_counter()
    for start in range(0, len(order), size):
        part = order[start:start + size]
        quantiles, _ = pipeline.predict_quantiles([tensors[i] for i in part], quantile_levels=TENTHS)
        for i, of_series in zip(part, quantiles):
            found[i] = of_series
    return found, time.perf_counter() - started


def kandle(binary, folder, file, threads, dtype):
    settings = {
        "kafka": {"brokers": "none:9092"}, "input": {"topics": ["in"], "group": "bench", "field": "/series"},
        "output": {"topic": "out"}, "dead_letters": {"topic": "dead"}, "task": {"kind": "forecast"},
        "model": {"source": str(folder / "model"), "dtype": dtype}, "batch": {"lanes": threads}, "log": {"level": "error"}}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        json.dump(settings, config)
        config.flush()
        started = time.perf_counter()
        done = subprocess.run([binary, "predict", "--strict", "-c", config.name, file], stdout=subprocess.PIPE, check=True)
        return done.stdout, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kandle")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", default="f32,int8")
    parser.add_argument("--lengths", default="full,short,mixed")
    options = parser.parse_args()
    folder, threads = options.folder, options.threads
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "config.json").exists():
        make_model(folder / "model")
    pipeline = ChronosBoltPipeline.from_pretrained(folder / "model")
    print("| series | chronos, series/s (batch) | kandle | series/s | ratios, median last | largest difference |")
    print("|---|---|---|---|---|---|")
    for kind in options.lengths.split(","):
        series = list(make_series(kind))
        file, one = folder / f"{kind}.jsonl", folder / "one.jsonl"
        lines = [json.dumps({"series": points}) + "\n" for points in series]
        file.write_text("".join(lines))
        one.write_text(lines[0])
        some = series[::4]
        size = min((8, 32, 128), key=lambda size: package(pipeline, some, size)[1])
        for dtype in options.dtypes.split(","):
            ratios, peers, own, worst = [], [], [], 0.0
            for _ in range(options.rounds):
                expected, of_package = package(pipeline, series, size)
                _, start = kandle(options.kandle, folder, one, threads, dtype)
                out, whole = kandle(options.kandle, folder, file, threads, dtype)
                of_kandle = whole - start
                peers.append(len(series) / of_package)
                own.append(len(series) / of_kandle)
                ratios.append(of_package / of_kandle)
                # In units of the spread of a series' predictions.
                for line, want in zip(out.splitlines(), expected):
                    got = torch.tensor([json.loads(line)["quantiles"][str(level)] for level in TENTHS]).T
                    worst = max(worst, ((got - want).abs().max() / (want.max() - want.min())).item())
            shown = ", ".join(f"{ratio:.2f}" for ratio in [*ratios, statistics.median(ratios)])
            print(f"| {kind} | {statistics.median(peers):.1f} ({size}) | {dtype} | {statistics.median(own):.1f} | {shown} "
                  f"| {worst:.1e} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
