#!/usr/bin/env python3
"""Holds kandle's task tensor to ONNX Runtime on ONNX models that packages carry.

    python3 benches/real/onnx_models.py KANDLE PACKAGES REPOSITORY

PACKAGES has the wheels of magika and silero-vad, as benches/real-models.sh fetches them. magika reads the beginnings and the ends of
files of this repository; silero-vad, voice activity, reads tones and noise. Prints a table in Markdown: the largest difference,
relative to the largest value of an output. Exits with 1 if one is more than 1e-4 or a model that ran before does not run.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import onnxruntime

MOST = 1e-4
# If with branches of different ranks, which tract does not type.
DOES_NOT_RUN = {"silero_vad", "silero_vad_16k_op15", "silero_vad_half"}


def magika(folder, repository):
    """One record for each kind of file in the repository, as magika's own code extracts it."""
    config = json.loads((folder / "magika/models/standard_v3_3/config.min.json").read_text())
    pad, begin, end = config["padding_token"], config["beg_size"], config["end_size"]
    by_suffix = {}
    for path in sorted(repository.rglob("*")):
        hidden = any(part.startswith(".") or part == "target" for part in path.relative_to(repository).parts)
        if path.is_file() and not hidden and path.stat().st_size > 1024:
            by_suffix.setdefault(path.suffix, path)
    for path in by_suffix.values():
        content = path.read_bytes()
        first = list(content[:config["block_size"]].lstrip()[:begin])
        last = list(content[-config["block_size"]:].rstrip()[-end:])
        yield {"bytes": first + [pad] * (begin - len(first)) + [pad] * (end - len(last)) + last}


def sounds(samples):
    rng = np.random.default_rng(7)
    time = np.arange(samples) / 16000
    for i in range(16):
        tone = sum(np.sin(2 * np.pi * rng.uniform(80, 3000) * time) * rng.uniform(0, 0.3) for _ in range(i % 4))
        yield (tone + rng.normal(0, 0.02 * (1 + i % 3), samples)).astype(np.float32).tolist()


def silero(name):
    state = np.random.default_rng(8).normal(0, 0.3, (2, 1, 128)).astype(np.float32).tolist()
    if name == "silero_vad_16k_sequence":
        windows = list(sounds(576))
        for length in (1, 5, 16):
            yield {"input": windows[:length], "h": [state[0]], "c": [state[1]]}
        return
    for sound in sounds(576):
        record = {"input": [sound], "state": state}
        if name in ("silero_vad", "silero_vad_16k_op15", "silero_vad_op18_ifless"):
            record["sr"] = 16000
        yield record


def expected(session, record):
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
    feed = {}
    for port in session.get_inputs():
        value = np.array(record[port.name], dtype=kinds[port.type])
        feed[port.name] = value if value.ndim == len(port.shape) else value[None]
    return dict(zip((output.name for output in session.get_outputs()), session.run(None, feed)))


def predicted(binary, model, records):
    settings = {
        "kafka": {"brokers": "none:9092"}, "input": {"topics": ["in"], "group": "real"}, "output": {"topic": "out"},
        "dead_letters": {"topic": "dead"}, "task": {"kind": "tensor"}, "model": {"source": str(model)}, "log": {"level": "error"}}
    with tempfile.TemporaryDirectory() as folder:
        config, lines = pathlib.Path(folder) / "kandle.json", pathlib.Path(folder) / "records.jsonl"
        config.write_text(json.dumps(settings))
        lines.write_text("".join(json.dumps(record) + "\n" for record in records))
        done = subprocess.run([binary, "predict", "--strict", "-c", config, lines], capture_output=True, text=True)
    if done.returncode != 0:
        return None, done.stderr.strip().splitlines()[-1]
    return [json.loads(line)["outputs"] for line in done.stdout.splitlines()], None


def main():
    binary, packages, repository = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    print("| model | records | largest difference from ONNX Runtime |")
    print("|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for wheel in [*packages.glob("magika-*.whl"), *packages.glob("silero_vad-*.whl")]:
            zipfile.ZipFile(wheel).extractall(folder)
        for model in [*folder.glob("magika/models/*/model.onnx"), *sorted(folder.glob("silero_vad/data/*.onnx"))]:
            is_magika = model.name == "model.onnx"
            name = f"magika {model.parent.name}" if is_magika else model.stem
            records = list(magika(folder, repository) if is_magika else silero(model.stem))
            session = onnxruntime.InferenceSession(model)
            found, error = predicted(binary, model, records)
            if error:
                failed |= name not in DOES_NOT_RUN
                print(f"| {name} | {len(records)} | does not run: {error[:200]} |")
                continue
            worst = 0.0
            for one, record in zip(found, records):
                for output, want in expected(session, record).items():
                    got = np.array(one[output], dtype=want.dtype).reshape(want.shape)
                    worst = max(worst, float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-9)))
            failed |= worst > MOST
            print(f"| {name} | {len(records)} | {worst:.1e} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
