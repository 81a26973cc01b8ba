#!/usr/bin/env python3
"""Compares kandle with other ways to embed a file of texts: in turns, medians, ratios within each turn.

    python3 benches/peers/compare.py KANDLE FOLDER [--rounds N] [--threads N] [--models a,b] [--texts a,b]
        [--engines "onnxruntime f32,…"] [--dtypes f32,…] [--output FILE]

KANDLE is the binary, FOLDER the output of make.py. Every peer runs at the batch size that was the fastest of
several in its first turn. Prints a table in Markdown; --output keeps every run as JSON, --plot draws it.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
PEERS = [("torch", "f32"), ("torch", "bf16"), ("onnxruntime", "f32"), ("onnxruntime", "int8"), ("openvino", "f32"),
         ("openvino", "bf16")] + ([("tei", "f32")] if "TEI" in os.environ else [])
# bfloat16 only if the processor has it: otherwise it is emulated, ten times slower, or computed as f32.
HAS_BF16 = any(name in pathlib.Path("/proc/cpuinfo").read_text() for name in ("avx512_bf16", "amx_bf16"))
# Share of the texts: a forward in the shape of BERT-base costs eight times as much, and fewer texts give the same result.
BASE_SHARE = 0.1


def command(args, engine, dtype, model, texts, batch, output):
    common = ["--model", str(args.folder / model), "--input", str(texts), "--threads", str(args.threads)]
    if output:
        common += ["--output", str(output)]
    if engine == "kandle":
        return [args.kandle, "bench", "engine", "--json", "--dtype", dtype, *common]
    return [sys.executable, str(HERE / "peer.py"), engine, dtype, *common, *(["--batch", str(batch)] if batch else [])]


def run(args, engine, dtype, model, texts, batch=None, output=None):
    done = subprocess.run(command(args, engine, dtype, model, texts, batch, output), capture_output=True, text=True)
    if done.returncode != 0:
        return None, done.stderr.strip().splitlines()[-1]
    text = done.stdout
    return json.loads(text[text.index("{"):]), None


def cosine(a, b):
    import numpy as np
    x, y = (np.array([json.loads(line)["embedding"] for line in path.open()]) for path in (a, b))
    return float(((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean())


PEAK = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[2]))
types = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
n, multiply = 2048, torch._int_mm if sys.argv[1] == "int8" else torch.matmul
a, b = ((torch.rand(n, n) * 100 - 50).to(types[sys.argv[1]]) for _ in "ab")
times = []
for _ in range(30):
    started = time.perf_counter()
    multiply(a, b)
    times.append(time.perf_counter() - started)
print(2 * n ** 3 / min(times))
"""


def peak(dtype, threads):
    """Peak operations per second of torch (oneDNN) in a large square matrix multiplication on this machine."""
    done = subprocess.run([sys.executable, "-c", PEAK, dtype, str(threads)], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else float("nan")


def operations(config, lengths):
    """Operations of all matrix multiplications that BERT needs in this shape over texts of these lengths: by weights, and in
    attention (QKᵀ and PV)."""
    hidden, layers, inner = (config[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    return sum(layers * (2 * n * (4 * hidden ** 2 + 2 * hidden * inner) + 4 * n * n * hidden) for n in lengths)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kandle")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default="minilm,base")
    parser.add_argument("--texts", default="short,long,mixed")
    parser.add_argument("--engines", default=",".join(map(" ".join, PEERS)))
    parser.add_argument("--dtypes", default="f32,bf16,int8")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    results = []
    dtypes = dict.fromkeys([*args.dtypes.split(","), *(engine.split()[1] for engine in args.engines.split(","))])
    peaks = {dtype: peak(dtype, args.threads) for dtype in dtypes if HAS_BF16 or dtype != "bf16"}
    print("peak rate of a matrix multiplication by torch:", ", ".join(f"{d} {p / 1e9:,.0f} GFLOP/s" for d, p in peaks.items()))
    from tokenizers import Tokenizer
    for model in args.models.split(","):
        for name in args.texts.split(","):
            lines = (args.folder / f"{name}.jsonl").read_text().splitlines(keepends=True)
            config = json.loads((args.folder / model / "config.json").read_text())
            lines = lines[:max(20, int(len(lines) * (BASE_SHARE if config["hidden_size"] > 384 else 1)))]
            texts = args.folder / f"run.{name}.jsonl"
            texts.write_text("".join(lines))
            tokenizer = Tokenizer.from_file(str(args.folder / model / "tokenizer.json"))
            tokenizer.no_padding()
            texts_read = [json.loads(line)["text"] for line in lines]
            work = operations(config, [len(e.ids) for e in tokenizer.encode_batch(texts_read)])
            engines = [("kandle", dtype) for dtype in args.dtypes.split(",")]
            engines += [tuple(engine.split()) for engine in args.engines.split(",")]
            engines = [(engine, dtype) for engine, dtype in engines if HAS_BF16 or dtype != "bf16"]
            rounds, batches, cosines = {e: [] for e in engines}, {}, {}
            for turn in range(args.rounds):
                for engine in engines:
                    if rounds[engine] is None:
                        continue
                    output = args.folder / f"out.{'.'.join(engine)}" if turn == 0 else None
                    result, why = run(args, *engine, model, texts, batches.get(engine), output)
                    if result is None:
                        print(f"{' '.join(engine)}: {why}", file=sys.stderr)
                        rounds[engine] = None
                        continue
                    batches[engine] = result.get("batch")
                    rounds[engine].append(result)
                    if output:
                        cosines[engine] = cosine(args.folder / "out.kandle.f32", output)
            print(f"\n{model}, {name}: {len(lines)} texts, {rounds[('kandle', 'f32')][0]['tokens']} tokens, {args.threads} threads\n")
            own = [dtype for engine, dtype in engines if engine == "kandle"]
            print("| engine | tokens/s |", *(f"kandle {dtype} ÷ it |" for dtype in own),
                  "of the peak | cosine to kandle f32 | memory, MiB | batch |")
            print("|---|---|" + "---|" * len(own) + "---|---|---|---|")
            for engine in engines:
                if rounds[engine] is None:
                    continue
                speeds = [r["tokens_per_second"] for r in rounds[engine]]

                def ratio(dtype):
                    ours = [r["tokens_per_second"] for r in rounds[("kandle", dtype)]]
                    return statistics.median(a / b for a, b in zip(ours, speeds))
                memory = max(r["peak_rss_bytes"] for r in rounds[engine]) >> 20
                print(f"| {' '.join(engine)} | {statistics.median(speeds):,.0f} |", *(f"{ratio(dtype):.2f} |" for dtype in own),
                      f"{work / statistics.median(r['seconds'] for r in rounds[engine]) / peaks[engine[1]]:.0%} | {cosines[engine]:.6f} | {memory} | {batches[engine] or ''} |", flush=True)
                results.append({"model": model, "texts": name, "engine": engine[0], "dtype": engine[1], "batch": batches[engine],
                                "cosine": cosines[engine], "runs": rounds[engine]})
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))
    if args.plot:
        plot(results, args.plot)


def plot(results, path):
    import matplotlib
    matplotlib.use("svg")
    from matplotlib import pyplot
    places = list(dict.fromkeys((r["model"], r["texts"]) for r in results))
    names = list(dict.fromkeys(f"{r['engine']} {r['dtype']}" for r in results))
    figure, axes = pyplot.subplots(1, len(places), figsize=(3.2 * len(places), 3.2), layout="constrained")
    for place, axis in zip(places, axes if len(places) > 1 else [axes]):
        speed = {f"{r['engine']} {r['dtype']}": statistics.median(x["tokens_per_second"] for x in r["runs"])
                 for r in results if (r["model"], r["texts"]) == place}
        axis.barh(names[::-1], [speed.get(n, 0) for n in names[::-1]],
                  color=["#c0392b" if n.startswith("kandle") else "#7f8c8d" for n in names[::-1]])
        axis.set_title(", ".join(place))
        axis.set_xlabel("tokens/s")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
