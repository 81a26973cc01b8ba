#!/usr/bin/env python3
"""Makes what benches/table.sh needs: a classifier of 300 trees over 20 columns, and rows.

    python3 benches/peers/table.py FOLDER ROWS

The trees are complete, six levels deep as in XGBoost's default, with random columns and thresholds: more work than trained trees of
that depth, which are rarely complete. The rows are JSON, one a line, with an id and the columns c0 to c19.
"""

import json
import pathlib
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper

TREES, DEPTH, COLUMNS = 300, 6, 20


def model():
    rng = np.random.default_rng(7)
    inner, leaves = 2**DEPTH - 1, 2**DEPTH
    ids = np.arange(inner + leaves)
    is_inner = ids < inner
    trees = TREES * len(ids)
    node = helper.make_node(
        "TreeEnsembleClassifier", ["x"], ["label", "probabilities"], domain="ai.onnx.ml", post_transform="LOGISTIC",
        nodes_treeids=np.repeat(np.arange(TREES), len(ids)), nodes_nodeids=np.tile(ids, TREES),
        nodes_featureids=rng.integers(0, COLUMNS, trees),
        nodes_values=np.where(np.tile(is_inner, TREES), rng.normal(size=trees), 0.0).astype(np.float32),
        nodes_modes=np.tile(np.where(is_inner, "BRANCH_LT", "LEAF"), TREES).tolist(),
        nodes_truenodeids=np.tile(np.where(is_inner, 2 * ids + 1, 0), TREES),
        nodes_falsenodeids=np.tile(np.where(is_inner, 2 * ids + 2, 0), TREES),
        nodes_missing_value_tracks_true=np.ones(trees, dtype=int),
        class_treeids=np.repeat(np.arange(TREES), leaves), class_nodeids=np.tile(ids[inner:], TREES),
        class_ids=np.zeros(TREES * leaves, dtype=int),
        class_weights=rng.normal(0, 0.05, TREES * leaves).astype(np.float32), classlabels_int64s=[0, 1])
    graph = helper.make_graph(
        [node], "table", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", COLUMNS])],
        [helper.make_tensor_value_info("label", TensorProto.INT64, ["rows"]),
         helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", 2])])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def main():
    folder, rows = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    onnx.save(model(), folder / "model.onnx")
    rng = np.random.default_rng(8)
    with open(folder / "rows.jsonl", "w") as file:
        for start in range(0, rows, 10_000):
            for i, row in enumerate(rng.normal(size=(min(10_000, rows - start), COLUMNS)).round(3).tolist(), start):
                columns = {f"c{column}": value for column, value in enumerate(row)}
                file.write(json.dumps({"id": f"{i}", **columns}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
