#!/usr/bin/env python3
"""Draws each dashboard as a PNG, from the results of its queries (make grafana-preview).

    preview.py DATA.json FOLDER

It does not look like Grafana: it shows whether each panel has data, and which. Needs matplotlib.
"""
import json
import pathlib
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = pathlib.Path(__file__).parent
UNIT = {"cps": "/s", "s": " s", "percentunit": "", "bytes": " B", "short": "", "h": " h"}


def label(legend, metric):
    if legend and legend != "__auto":
        return re.sub(r"\{\{(\w+)\}\}", lambda m: metric.get(m[1], ""), legend)
    return ", ".join(f"{v}" for k, v in sorted(metric.items()) if k not in ("__name__", "instance", "job", "namespace")) or "value"


def number(value, unit):
    if unit == "percentunit":
        return f"{100 * value:.1f} %"
    for size, name in [(1e9, " G"), (1e6, " M"), (1e3, " k")]:
        if abs(value) >= size:
            return f"{value / size:.1f}{name}{UNIT.get(unit, '').strip()}"
    return f"{value:.3g}{UNIT.get(unit, '')}"


def series(results):
    for result in results:
        for one in result["result"]:
            points = [(t, float(v)) for t, v in one["values"]]
            yield label(result["legend"], one["metric"]), one["metric"], points


def draw(panel, results, ax):
    unit = panel["fieldConfig"]["defaults"].get("unit", "")
    ax.set_title(panel["title"], fontsize=8, loc="left", color="#ddd")
    ax.set_facecolor("#181b1f")
    ax.tick_params(colors="#999", labelsize=6)
    for spine in ax.spines.values():
        spine.set_color("#333")
    if panel["type"] in ("stat", "table"):
        ax.set_xticks([])
        ax.set_yticks([])
        rows = []
        for result in results:
            for one in result["result"]:
                metric = {k: v for k, v in one["metric"].items() if k not in ("namespace", "job", "__name__")}
                rows.append((" ".join(metric.values()), float(one["values"][-1][1])))
        if panel["type"] == "stat" and rows:
            ax.text(0.5, 0.5, number(rows[0][1], unit), ha="center", va="center", fontsize=16, color="#73bf69", transform=ax.transAxes)
        else:
            text = "\n".join(f"{number(v, 'short'):>10}  {name}" for name, v in rows[:8])
            ax.text(0.02, 0.95, text, ha="left", va="top", fontsize=6, family="monospace", color="#ddd", transform=ax.transAxes)
        return
    if panel["type"] == "heatmap":
        buckets = sorted(series(results), key=lambda s: float(s[1]["le"].replace("+Inf", "inf")))
        times = sorted({t for _, _, points in buckets for t, _ in points})
        grid, before = [], [0.0] * len(times)
        for _, _, points in buckets:
            known = dict(points)
            now = [known.get(t, 0.0) for t in times]
            grid.append([max(a - b, 0) for a, b in zip(now, before)])
            before = now
        ax.imshow(grid, aspect="auto", origin="lower", cmap="inferno", interpolation="nearest")
        ax.set_yticks(range(0, len(buckets), 3), [buckets[i][1]["le"] for i in range(0, len(buckets), 3)])
        ax.set_xticks([])
        return
    drawn = 0
    for name, _, points in series(results):
        points = [(t, v) for t, v in points if v == v and abs(v) != float("inf")]
        if points:
            start = points[0][0]
            ax.plot([t - start for t, _ in points], [v for _, v in points], linewidth=1, label=name[:28])
            drawn += 1
    if 0 < drawn <= 12:
        ax.legend(fontsize=5, facecolor="#181b1f", edgecolor="#333", labelcolor="#ccc", loc="upper left")
    ax.yaxis.set_major_formatter(lambda v, _: number(v, unit))
    ax.grid(color="#2a2a2a", linewidth=0.5)


def main():
    data = json.loads(pathlib.Path(sys.argv[1]).read_text())
    folder = pathlib.Path(sys.argv[2])
    for name, results in data.items():
        dashboard = json.loads((HERE / "dashboards" / f"{name}.json").read_text())
        panels = [p for p in dashboard["panels"] if p["type"] != "row"]
        bottom = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in dashboard["panels"])
        figure = plt.figure(figsize=(16, bottom * 0.36), facecolor="#111217")
        for panel in panels:
            place = panel["gridPos"]
            box = [
                (place["x"] + 0.6) / 24,
                1 - (place["y"] + place["h"] - 0.9) / bottom,
                (place["w"] - 1.0) / 24,
                (place["h"] - 1.9) / bottom,
            ]
            draw(panel, results[panel["title"]], figure.add_axes(box))
        for row in (p for p in dashboard["panels"] if p["type"] == "row"):
            figure.text(0.01, 1 - (row["gridPos"]["y"] + 0.8) / bottom, row["title"], color="#fff", fontsize=11, weight="bold")
        figure.savefig(folder / f"{name}.png", dpi=80, facecolor=figure.get_facecolor())
        plt.close(figure)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
