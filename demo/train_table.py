#!/usr/bin/env python3
"""Makes customers of a subscription, trains the model of `kandle demo --table` on them and writes demo/churn/.

The model says which customers leave. It is a scikit-learn pipeline (one-hot plans and contracts, scaled numbers, a random
forest), converted to ONNX. Some customers have no value for how their use changed: the pipeline fills in the median.

    pip install pandas scikit-learn skl2onnx
    python3 demo/train_table.py            # seconds

Same seed, same data.
"""

import json
import pathlib

import numpy as np
import pandas
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType, StringTensorType
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE / "churn"
SEED = 20261127
TEXTS = ["plan", "contract"]
NUMBERS = ["months", "charge", "tickets", "late_payments", "use_change"]
SHOWN = 200


def customers(rng, count):
    """Columns, and whether the customer left."""
    plan = rng.choice(["basic", "plus", "pro"], count, p=[0.5, 0.3, 0.2])
    contract = rng.choice(["monthly", "yearly"], count, p=[0.6, 0.4])
    months = rng.integers(1, 73, count)
    price = np.select([plan == "basic", plan == "plus"], [9.0, 19.0], 39.0)
    charge = np.round(price * rng.choice([1, 1, 1, 0.8, 1.2], count), 2)
    tickets = rng.poisson(0.8, count)
    late = rng.binomial(6, 0.1, count)
    use_change = np.round(rng.normal(0, 0.3, count), 2)
    score = (-1.2 + 1.3 * (contract == "monthly") - 0.035 * months + 0.02 * charge + 0.45 * tickets + 0.5 * late
             - 2.5 * use_change)
    left = rng.random(count) < 1 / (1 + np.exp(-score))
    use_change[rng.random(count) < 0.05] = np.nan
    columns = dict(plan=plan, contract=contract, months=months, charge=charge, tickets=tickets, late_payments=late,
                   use_change=use_change)
    return pandas.DataFrame(columns), np.where(left, "leaves", "stays")


def main():
    rng = np.random.default_rng(SEED)
    columns, outcome = customers(rng, 20_000)
    pipeline = make_pipeline(
        ColumnTransformer([
            ("texts", OneHotEncoder(handle_unknown="ignore"), TEXTS),
            ("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), NUMBERS),
        ]),
        RandomForestClassifier(40, max_depth=6, min_samples_leaf=40, random_state=SEED),
    )
    pipeline.fit(columns, outcome)
    held_out, truth = customers(rng, 5_000)
    of_leaving = list(pipeline.classes_).index("leaves")
    area = roc_auc_score(truth == "leaves", pipeline.predict_proba(held_out)[:, of_leaving])

    inputs = [(name, StringTensorType([None, 1])) for name in TEXTS]
    inputs += [(name, FloatTensorType([None, 1])) for name in NUMBERS]
    model = to_onnx(pipeline, initial_types=inputs, target_opset={"": 17, "ai.onnx.ml": 3}, options={"zipmap": True})
    for node in model.graph.node:
        node.doc_string = ""
    OUT.mkdir(exist_ok=True)
    (OUT / "model.onnx").write_bytes(model.SerializeToString())
    rows = []
    for i in range(SHOWN):
        row = {"id": f"customer-{i + 1}"}
        for name in TEXTS + NUMBERS:
            value = held_out[name][i]
            value = value if isinstance(value, str) else value.item()
            row[name] = None if value != value else value
        rows.append(json.dumps(row | {"outcome": str(truth[i])}))
    (HERE / "customers.jsonl").write_text("\n".join(rows) + "\n")
    (OUT / "README.md").write_text(f"""# kandle-churn

Says which customers of a subscription leave: `leaves` or `stays`.

| | |
|---|---|
| model | scikit-learn: one-hot texts, medians for missing numbers, scaled; a random forest of 40 trees; ONNX |
| data | 20000 made-up customers for training, 5000 for the test, by `demo/train_table.py` |
| area under the ROC curve, test | {area:.3f} |
| licence | as kandle |

It exists so that `kandle demo --table` has a real model to run. The customers are made up; do not use it for real ones.
""")
    print((OUT / "model.onnx").stat().st_size, "bytes, area", area)


main()
