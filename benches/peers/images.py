#!/usr/bin/env python3
"""Compares kandle on images with ONNX Runtime, decoding and preprocessing included, and its preprocessing with Pillow's.

    python3 benches/peers/images.py KANDLE FOLDER [--threads N] [--rounds N] [--images N] [--models vit,resnet]
        [--dtypes f32,int8] [--engines f32,int8,int8-static] [--output FILE]

FOLDER gets 256 JPEGs of 640 × 480 and the models (image_models.py). kandle runs the files through its stages (`kandle bench
images`), and writes predictions as JSON. The peer decodes, resizes and normalizes with Pillow and numpy and runs the graph with
ONNX Runtime; both begin with the files' bytes in the page cache, and their start is not counted. The peer takes the fastest of
three ways to use the cores, with batches of 1, 8, 16 or 32, found on the first images before the rounds:

    turns    the threads prepare a batch, then the graph runs on all cores
    ahead    the threads prepare the next batch while the graph runs on all cores
    apart    each thread prepares and runs batches of its own, on one core

The engines alternate. Prints tables in Markdown: images a second, medians; the ratio to kandle is taken within each round. The
difference is the largest one of a log-probability to kandle in f32, beside the spread (standard deviation) of the logits; `same
label` is the share of the images whose most probable label is that of kandle in f32.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np
import onnxruntime as ort

import image_models

BATCHES = [1, 8, 16, 32]


class Peer:
    """ONNX Runtime on a graph; `threads` cores."""

    def __init__(self, model, graph, threads):
        self.model, self.threads = model, threads
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)
        self.whole, self.single = self.session(graph, threads), self.session(graph, 1)
        self.best = None

    @staticmethod
    def session(graph, threads):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

    def prepared(self, paths):
        return np.stack([image_models.prepare(self.model, path) for path in paths])

    def begin(self, paths):
        """Prepares a batch in the pool; Pillow and numpy let other threads run while they compute."""
        return [self.pool.submit(image_models.prepare, self.model, path) for path in paths]

    def run(self, session, values):
        return session.run(None, {"pixels": values})[0]

    def turns(self, batches):
        return [self.run(self.whole, np.stack([f.result() for f in self.begin(batch)])) for batch in batches]

    def ahead(self, batches):
        rows, ahead = [], self.begin(batches[0])
        for following in [*batches[1:], []]:
            values = np.stack([future.result() for future in ahead])
            ahead = self.begin(following)
            rows.append(self.run(self.whole, values))
        return rows

    def apart(self, batches):
        # A session may be used by several threads: each then computes on its own.
        return list(self.pool.map(lambda batch: self.run(self.single, self.prepared(batch)), batches))

    def logits(self, paths, way, size):
        """The logits, and the seconds they took."""
        # So that no core is left without work at the end, batches are a little smaller if that evens them out.
        count = -(-len(paths) // size)
        batches = [paths[i * len(paths) // count:(i + 1) * len(paths) // count] for i in range(count)]
        started = time.perf_counter()
        rows = getattr(self, way)(batches)
        return np.concatenate(rows), time.perf_counter() - started

    def tune(self, paths):
        ways = [(way, size) for way in ("turns", "ahead", "apart") for size in BATCHES if size <= len(paths)]
        self.logits(paths[:self.threads], "apart", 1)
        self.best = min(ways, key=lambda way: self.logits(paths, *way)[1])


def kandle(options, dtype, model, files, *more):
    command = [options.kandle, "bench", "images", "--json", "--dtype", dtype, "--model", str(options.folder / model),
               "--input", str(files), "--threads", str(options.threads), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return None, done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout[done.stdout.index("{"):]), None


def log_probabilities(path):
    names = [f"LABEL_{i}" for i in range(image_models.LABELS)]
    with path.open() as lines:
        rows = [[json.loads(line)["scores"][name] for name in names] for line in lines]
    return np.log(np.maximum(np.array(rows, dtype=np.float64), 1e-30))


def log_softmax(logits):
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def compare(options, model, images, files):
    own = [("kandle", dtype) for dtype in options.dtypes.split(",")]
    peers = {("onnxruntime", kind): Peer(model, options.folder / model / f"{kind}.onnx", options.threads)
             for kind in options.engines.split(",")}
    speeds, rows, spread = {engine: [] for engine in [*own, *peers]}, {}, None
    for peer in peers.values():
        peer.tune(images[:64])
    for turn in range(options.rounds):
        for engine in own:
            out = options.folder / f"{model}.{engine[1]}.jsonl"
            result, why = kandle(options, engine[1], model, files, *(["--output", str(out)] if turn == 0 else []))
            if result is None:
                if turn == 0:
                    print(f"kandle {engine[1]}, {model}: {why}", file=sys.stderr)
                continue
            speeds[engine].append(result["images_per_second"])
            if turn == 0:
                rows[engine] = log_probabilities(out)
        for engine, peer in peers.items():
            logits, seconds = peer.logits(images, *peer.best)
            speeds[engine].append(len(images) / seconds)
            if turn == 0:
                rows[engine] = log_softmax(logits)
                if engine[1] == "f32":
                    spread = float(logits.std(1).mean())
    own = [engine for engine in own if speeds[engine]]
    if not own:
        return []
    expected = rows[own[0]]
    print(f"\n{model}, {len(images)} images, {options.threads} threads"
          + (f"; spread of the logits {spread:.2f}" if spread else "") + "\n")
    print("| engine | images/s |", *(f"kandle {dtype} ÷ it |" for _, dtype in own), "difference | same label | way, batch |")
    print("|---|---|" + "---|" * len(own) + "---|---|---|")
    results = []
    for engine in [*own, *peers]:
        ratios = [statistics.median(a / b for a, b in zip(speeds[mine], speeds[engine])) for mine in own]
        difference = float(np.abs(rows[engine] - expected).max())
        same = float((rows[engine].argmax(1) == expected.argmax(1)).mean())
        way = f"{peers[engine].best[0]}, {peers[engine].best[1]}" if engine in peers else ""
        print(f"| {' '.join(engine)} | {statistics.median(speeds[engine]):.2f} |", *(f"{ratio:.2f} |" for ratio in ratios),
              f"{difference:.1e} | {same:.0%} | {way} |", flush=True)
        results.append({"model": model, "engine": engine, "images_per_second": speeds[engine], "difference": difference,
                        "same_label": same, "way": way})
    return results


def preprocessing(options, models, images, files):
    """One core each."""
    print("\nfrom a file's bytes to a model's values, one core\n")
    print("| model | kandle, images/s | Pillow, images/s | ratios, median last |")
    print("|---|---|---|---|")
    results = []
    for model in models:
        own, peer = [], []
        for _ in range(options.rounds):
            result, why = kandle(options, "f32", model, files, "--preprocess")
            if result is None:
                sys.exit(why)
            own.append(result["images_per_second"])
            started = time.perf_counter()
            for path in images:
                image_models.prepare(model, path)
            peer.append(len(images) / (time.perf_counter() - started))
        ratios = [a / b for a, b in zip(own, peer)]
        shown = ", ".join(f"{ratio:.2f}" for ratio in [*ratios, statistics.median(ratios)])
        print(f"| {model} | {statistics.median(own):.0f} | {statistics.median(peer):.0f} | {shown} |", flush=True)
        results.append({"model": model, "preprocessing": {"kandle": own, "pillow": peer}})
    return results


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kandle")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--models", default=",".join(image_models.MODELS))
    parser.add_argument("--dtypes", default="f32,int8")
    parser.add_argument("--engines", default="f32,int8,int8-static")
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    models = options.models.split(",")
    options.folder.mkdir(parents=True, exist_ok=True)
    images = image_models.make(options.folder, models, max(options.images, 64))[:options.images]
    # Both begin with the files in the page cache, and kandle takes a directory.
    files = options.folder / f"first-{len(images)}"
    files.mkdir(exist_ok=True)
    for path in images:
        link = files / path.name
        if not link.exists():
            link.hardlink_to(path)
        path.read_bytes()
    results = preprocessing(options, models, images, files)
    for model in models:
        results += compare(options, model, images, files)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
