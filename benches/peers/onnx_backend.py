#!/usr/bin/env python3
"""Turns the backend tests that the package onnx carries into folders for kandle's test `outputs_of_other_models`.

    python3 benches/peers/onnx_backend.py FOLDER

FOLDER gets one folder for each set (`light`, `simple`, `pytorch-converted`, `pytorch-operator`), with one for each test: model.onnx,
and golden.json with the inputs as a record and the expected outputs. The inputs of `light` are those of onnx's own runner. A test
that JSON cannot hold, because its values are NaN, infinite or complex, gets a golden.json without rows, which fails.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.runner import Runner

DATA = pathlib.Path(onnx.__file__).parent / "backend" / "test" / "data"


def read(path, of):
    """A value of a .pb file: a tensor, or a sequence of them."""
    content = path.read_bytes()
    if of.type.HasField("sequence_type"):
        sequence = onnx.SequenceProto()
        sequence.ParseFromString(content)
        return numpy_helper.to_list(sequence)
    if of.type.HasField("optional_type"):
        raise ValueError("an optional value")
    tensor = onnx.TensorProto()
    tensor.ParseFromString(content)
    return numpy_helper.to_array(tensor)


def plain(value):
    """As JSON has it."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    if value.dtype == object or value.dtype.kind in "SU":
        return value.astype(str).tolist()
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError("NaN or infinity")
    if value.dtype.kind == "c":
        raise ValueError("complex numbers")
    return value.tolist()


def inputs_of(model):
    known = {initializer.name for initializer in model.graph.initializer}
    return [port for port in model.graph.input if port.name not in known]


def write(folder, model_path, pairs):
    """`pairs`: of inputs and outputs, by name, each as a function that reads it."""
    folder.mkdir(parents=True)
    shutil.copy(model_path, folder / "model.onnx")
    rows, reason = [], None
    for inputs, outputs in pairs:
        try:
            record = {name: plain(value()) for name, value in inputs.items()}
            rows.append({"record": record, "outputs": {name: plain(value()) for name, value in outputs.items()}})
        except ValueError as error:
            rows, reason = [], str(error)
            break
    golden = {"task": {}, "rows": rows, "tolerance": 1e-4}
    if reason:
        golden["reason"] = reason
    (folder / "golden.json").write_text(json.dumps(golden))


def main():
    out = pathlib.Path(sys.argv[1])
    shutil.rmtree(out, ignore_errors=True)
    for name in ("simple", "pytorch-converted", "pytorch-operator"):
        for test in sorted((DATA / name).iterdir()):
            model = onnx.load(test / "model.onnx")
            pairs = []
            for data in sorted(test.glob("test_data_set_*")):
                read_all = lambda ports, kind: {
                    port.name: (lambda path=data / f"{kind}_{i}.pb", port=port: read(path, port))
                    for i, port in enumerate(ports)}
                pairs.append((read_all(inputs_of(model), "input"), read_all(model.graph.output, "output")))
            write(out / name / test.name, test / "model.onnx", pairs)
    for path in sorted((DATA / "light").glob("light_*.onnx")):
        model = onnx.load(path)
        inputs = {port.name: (lambda port=port: Runner.generate_dummy_data(port, seed=0, name=path.stem, random=False))
                  for port in inputs_of(model)}
        outputs = {port.name: (lambda file=path.with_name(f"{path.stem}_output_{i}.pb"), port=port: read(file, port))
                   for i, port in enumerate(model.graph.output)}
        write(out / "light" / path.stem, path, [(inputs, outputs)])


if __name__ == "__main__":
    main()
