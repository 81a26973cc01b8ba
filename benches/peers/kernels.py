#!/usr/bin/env python3
"""Prints GPU time by kernel, from the output of `ncu --csv --metrics gpu__time_duration.sum`.

    python3 benches/peers/kernels.py FILE
"""

import collections
import csv
import re
import sys


def main(path):
    lines = open(path).read().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    unit = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3}
    microseconds, launches, grids = collections.Counter(), collections.Counter(), {}
    for row in csv.DictReader(lines[start:]):
        if row["Metric Name"] != "gpu__time_duration.sum":
            continue
        name = re.sub(r"<.*|\(.*", "", row["Kernel Name"])[:80]
        microseconds[name] += float(row["Metric Value"].replace(",", "")) * unit[row["Metric Unit"]]
        launches[name] += 1
        grids[name] = f'{row["Grid Size"]} × {row["Block Size"]}'
    total = sum(microseconds.values())
    for name, spent in microseconds.most_common(25):
        print(f"{spent / total:6.1%} {spent / launches[name]:9.1f} us × {launches[name]:4} {name} {grids[name]}")


if __name__ == "__main__":
    main(sys.argv[1])
