#!/usr/bin/env python3
"""Holds kandle to sentence-transformers over real checkpoints and texts.

    python3 benches/real/check.py KANDLE FOLDER [MODEL…]

FOLDER is the output of make.py. A model without modules.json is a sparse encoder. f32 is compared with sentence-transformers, every other dtype with kandle's f32:
`mean` and `least` are cosines, `neighbours` is the share of each text's ten nearest that are the same. Prints a table in
Markdown. Exits with 1 if an f32 value is more than 1e-5 off, or another dtype misses its goal.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder

THREADS = len(os.sched_getaffinity(0))
# The least mean cosine, cosine, and share of equal neighbours.
GOALS = {"int8": (0.9995, 0.995, 0.97), "bf16": (0.9995, 0.9995, 0.97)}
F32 = 1e-5


def is_sparse(model):
    return not (model / "modules.json").exists()


def texts_of(model):
    return "zh" if "-zh" in model.name else "mixed" if model.name.startswith("multilingual") else "en"


def kandle(binary, model, texts, dtype):
    """The embeddings, `[texts, width]`."""
    kind = "sparse-embedding" if is_sparse(model) else "text-embedding"
    settings = {
        "kafka": {"brokers": "none:9092"}, "input": {"topics": ["in"], "group": "real", "field": "/text"},
        "output": {"topic": "out"}, "dead_letters": {"topic": "dead"}, "task": {"kind": kind},
        "model": {"source": str(model), "dtype": dtype}, "batch": {"lanes": THREADS}, "log": {"level": "error"}}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)
        file.flush()
        command = [binary, "predict", "--strict", "-c", file.name, texts]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    predictions = [json.loads(line) for line in done.stdout.splitlines()]
    if not is_sparse(model):
        return np.array([one["embedding"] for one in predictions], dtype=np.float64)
    rows = np.zeros((len(predictions), json.loads((model / "config.json").read_text())["vocab_size"]))
    for row, one in zip(rows, predictions):
        row[one["indices"]] = one["values"]
    return rows


def reference(model, texts):
    torch.set_num_threads(THREADS)
    # In f32, whatever the checkpoint's own type is.
    kind = SparseEncoder if is_sparse(model) else SentenceTransformer
    encoder = kind(str(model), device="cpu", model_kwargs={"dtype": torch.float32})
    lines = [json.loads(line)["text"] for line in texts.open()]
    if is_sparse(model):
        return encoder.encode(lines, batch_size=16, show_progress_bar=False).to_dense().numpy().astype(np.float64)
    return encoder.encode(lines, batch_size=16, show_progress_bar=False).astype(np.float64)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def neighbours(rows):
    scores = unit(rows) @ unit(rows).T
    np.fill_diagonal(scores, -2)
    return np.argsort(-scores, axis=1, kind="stable")[:, :10]


def same(a, b):
    return np.mean([len(set(x) & set(y)) / 10 for x, y in zip(neighbours(a), neighbours(b))])


def main():
    binary, folder, names = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:]
    models = sorted(path.parent for path in folder.glob("*/config.json") if not names or path.parent.name in names)
    missed = []
    print("| model | texts | dtype | compared with | largest difference | mean | least | neighbours |")
    print("|---|---|---|---|---|---|---|---|")
    for model in models:
        texts = folder / f"{texts_of(model)}.jsonl"
        exact = kandle(binary, model, texts, "f32")
        for dtype in ("f32", *GOALS):
            other, rows = ("sentence-transformers", reference(model, texts)) if dtype == "f32" else ("kandle f32", exact)
            mine = exact if dtype == "f32" else kandle(binary, model, texts, dtype)
            cosines = (unit(mine) * unit(rows)).sum(1)
            found = (cosines.mean(), cosines.min(), same(mine, rows))
            # Relative to the vectors' length: not every model normalises.
            difference = np.abs(mine - rows).max() / np.linalg.norm(rows, axis=1).mean()
            print(f"| {model.name} | {len(rows)} {texts.stem} | {dtype} | {other} | {difference:.1e} | {found[0]:.5f} | "
                  f"{found[1]:.5f} | {found[2]:.1%} |", flush=True)
            good = difference <= F32 if dtype == "f32" else all(x >= goal for x, goal in zip(found, GOALS[dtype]))
            if not good:
                missed.append(f"{model.name} {dtype}")
    if missed:
        sys.exit("missed: " + ", ".join(missed))


if __name__ == "__main__":
    main()
