#!/usr/bin/env python3
"""Makes the dashboards: grafana/dashboards/*.json. Uses only the standard library.

    grafana/dashboards.py          write them
    grafana/dashboards.py --check  exit with 1 if the committed files differ

Each panel is a line or two below; what all panels share (data source, units, sizes) is defined once. The result
works in Grafana 11 and 12.
"""
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Label matchers from the dashboard variables.
JOB = 'namespace=~"$namespace",job=~"$job"'
TOPIC = JOB + ',topic=~"$topic"'
RATE = "[$__rate_interval]"


class Panel(dict):
    """A panel without its position, which dashboard() adds."""


def target(expr, legend="", fmt="time_series", instant=False):
    return {
        "datasource": DATASOURCE,
        "expr": expr,
        "legendFormat": legend or "__auto",
        "format": fmt,
        "instant": instant,
        "range": not instant,
    }


def panel(kind, title, description, unit, targets, *, width=8, height=7, steps=None, options=None, custom=None, mappings=None, **more):
    """`steps`: (value, colour) pairs in ascending order; the first value is None."""
    targets = [t if isinstance(t, dict) else target(*t) if isinstance(t, tuple) else target(t) for t in targets]
    for ref, t in zip("ABCDEFGH", targets):
        t["refId"] = ref
    defaults = {
        "unit": unit,
        "thresholds": {
            "mode": "absolute",
            "steps": [{"value": value, "color": colour} for value, colour in steps or [(None, "green")]],
        },
        "mappings": mappings or [],
    }
    if custom is not None:
        defaults["custom"] = custom
    return Panel(
        type=kind,
        title=title,
        description=description,
        datasource=DATASOURCE,
        targets=targets,
        fieldConfig={"defaults": defaults, "overrides": []},
        options=options or {},
        _size=(width, height),
        **more,
    )


def stat(title, description, unit, expr, **more):
    more.setdefault("width", 4)
    more.setdefault("height", 4)
    options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "background" if "steps" in more else "value", "graphMode": "area"}
    return panel("stat", title, description, unit, [expr], options=options, **more)


def lines(title, description, unit, *targets, stack=False, **more):
    steps = more.get("steps")
    custom = {
        "drawStyle": "line",
        "fillOpacity": 25 if stack else 8,
        "lineWidth": 1,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stack else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if steps else "off"},
    }
    options = {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}, "tooltip": {"mode": "multi", "sort": "desc"}}
    return panel("timeseries", title, description, unit, targets, custom=custom, options=options, **more)


def heatmap(title, description, unit, expr, **more):
    options = {
        "calculate": False,
        "yAxis": {"unit": unit},
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
        "tooltip": {"mode": "single", "yHistogram": False},
    }
    return panel("heatmap", title, description, unit, [target(expr, "{{le}}", "heatmap")], options=options, **more)


def table(title, description, targets, **more):
    queries = [target(expr, "", "table", True) for expr, _, _ in targets]
    overrides = []
    rename = {}
    for ref, (_, name, unit) in zip("ABCDEFGH", targets):
        rename[f"Value #{ref}" if len(targets) > 1 else "Value"] = name
        overrides.append({"matcher": {"id": "byName", "options": name}, "properties": [{"id": "unit", "value": unit}]})
    result = panel(
        "table", title, description, "short", queries,
        options={"showHeader": True, "footer": {"show": False}},
        transformations=[
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": rename}},
        ],
        **more,
    )
    result["fieldConfig"]["overrides"] = overrides
    return result


def quantiles(metric, by=JOB):
    return [
        (f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{{{by}}}{RATE})))", name)
        for q, name in [(0.5, "p50"), (0.95, "p95"), (0.99, "p99")]
    ]


LATE = [(None, "green"), (300, "orange"), (600, "red")]
NONE_IS_GOOD = [(None, "green"), (0.000001, "orange"), (0.01, "red")]
ANY_IS_BAD = [(None, "green"), (1, "red")]
OPEN = [{"type": "value", "options": {"0": {"text": "outside of the schedule", "color": "blue"}, "1": {"text": "consuming", "color": "green"}}}]

OVERVIEW = [
    ("Is it keeping up?", [
        stat("Records predicted", "Records per second whose prediction Kafka has acknowledged.", "cps",
             f'sum(rate(kandle_records_total{{{TOPIC},outcome="predicted"}}{RATE}))'),
        stat("Late by", "Age of the oldest record that has no prediction yet: the lag that users notice. Red from ten minutes on, like the alert.", "s",
             f"max(kandle_lag_seconds{{{TOPIC}}})", steps=LATE),
        stat("Records behind", "Lag: records in Kafka after the last one published.", "short", f"sum(kandle_lag_records{{{TOPIC}}})"),
        stat("Backlog done in", "Time to process the lag at the current rate; infinite if there is lag and no progress.", "s",
             f"max(kandle_drain_remaining_seconds{{{JOB}}})"),
        stat("Dead letters", "Share of records that could not become a prediction. Red from 1 % on, like the alert.", "percentunit",
             f'sum(rate(kandle_dead_letters_total{{{JOB}}}{RATE})) / sum(rate(kandle_records_total{{{JOB}}}{RATE}))', steps=NONE_IS_GOOD),
        stat("Schedule", "Whether kandle consumes now, or pauses outside of schedule.periods.", "short", f"max(kandle_schedule_open{{{JOB}}})", mappings=OPEN),
        lines("Records a second", "Records per second by outcome. A tombstone in the input becomes a tombstone in the output.", "cps",
              (f"sum by (outcome) (rate(kandle_records_total{{{TOPIC}}}{RATE}))", "{{outcome}}"), stack=True, width=12),
        lines("Late by, partition by partition", "Age of the oldest record without a prediction. A single late partition has a hot key or a slow member.", "s",
              (f"max by (topic, partition) (kandle_lag_seconds{{{TOPIC}}})", "{{topic}}/{{partition}}"), width=12, steps=LATE),
        lines("Records behind", "Lag by partition.", "short",
              (f"sum by (topic, partition) (kandle_lag_records{{{TOPIC}}})", "{{topic}}/{{partition}}"), stack=True, width=12),
        lines("Time left for the backlog", "Time that the backlog takes at the current rate, compared with the time until schedule.finish_by.", "s",
              (f"max(kandle_drain_remaining_seconds{{{JOB}}} < Inf)", "backlog"), (f"min(kandle_deadline_seconds{{{JOB}}} < Inf)", "until finish_by"), width=12),
    ]),
    ("Latency and errors", [
        lines("From arrival to acknowledgement", "Time that a record spends in kandle: gathering, inference, publishing.", "s", *quantiles("kandle_record_latency_seconds"), width=8),
        lines("From the record's own timestamp", "Age of a record when its prediction is acknowledged, including the time it waited in Kafka.", "s", *quantiles("kandle_record_age_seconds"), width=8),
        lines("Dead letters by reason", "Dead letters per second by reason; the header kandle-error-message of each one has the details.", "cps",
              (f"sum by (error) (rate(kandle_dead_letters_total{{{JOB}}}{RATE}))", "{{error}}"), stack=True, width=8),
        lines("Records lost", "Offsets that could not be read because retention had deleted them or their batch is damaged: these records have no prediction. Also partitions of topics that were deleted and recreated; they are read from their start.", "short",
              (f"sum by (topic, cause) (increase(kandle_skipped_records_total{{{TOPIC}}}{RATE}))", "{{topic}} {{cause}}"),
              (f"sum by (topic) (increase(kandle_topic_recreated_total{{{TOPIC}}}{RATE}))", "{{topic}} recreated: partitions"), width=8, steps=ANY_IS_BAD),
        lines("Rebalances", "Changes of the assignment. Lost means that the session of the member expired.", "short",
              (f"sum by (cause) (increase(kandle_rebalances_total{{{JOB}}}{RATE}))", "{{cause}}"), width=8),
        lines("Retries", "Operations that were retried, by cause.", "short",
              (f"sum by (cause) (increase(kandle_retries_total{{{JOB}}}{RATE}))", "{{cause}}"), width=8),
    ]),
    ("What does it cost?", [
        stat("Hours per million records", "Member hours that a million records take at the current rate, including idle time. Multiply by the price of an hour to get their cost.", "h",
             f'count(kandle_build_info{{{JOB}}}) * 1000000 / 3600 / sum(rate(kandle_records_total{{{JOB}}}{RATE}))', width=6),
        stat("Device busy", "Share of time in which the device computed. The rest is paid for but unused.", "percentunit",
             f"avg(sum by (instance) (rate(kandle_device_busy_seconds_total{{{JOB}}}{RATE})))", width=6),
        stat("Waiting for records", "Share of time in which nothing was in flight. If it is high, fewer members are enough.", "percentunit",
             f"avg(rate(kandle_input_wait_seconds_total{{{JOB}}}{RATE}))", width=6),
        stat("Inputs not computed", "Inputs that equal another one's, so that they were not computed again, per record.", "percentunit",
             f"sum(rate(kandle_reused_predictions_total{{{JOB}}}{RATE})) / sum(rate(kandle_records_total{{{JOB}}}{RATE}))", width=6),
    ]),
]

ENGINE = [
    ("Device", [
        lines("Device busy", "Share of time in which each device computed.", "percentunit",
              (f"sum by (instance, device) (rate(kandle_device_busy_seconds_total{{{JOB}}}{RATE}))", "{{instance}} {{device}}"), width=8),
        lines("Input a second", "Size of all inputs per second, reused ones included: tokens of texts, pixels of images, elements of tensors, points of series.", "cps",
              (f"sum by (instance, unit) (rate(kandle_input_units_total{{{JOB}}}{RATE}))", "{{instance}} {{unit}}"), width=8),
        lines("Input per busy second", "Speed of the device while it computes, independent of the load.", "cps",
              (f"sum by (instance, unit) (rate(kandle_input_units_total{{{JOB}}}{RATE})) / on (instance) group_left () sum by (instance) (rate(kandle_device_busy_seconds_total{{{JOB}}}{RATE}))", "{{instance}} {{unit}}"), width=8),
    ]),
    ("Windows and batches", [
        lines("Windows by what closed them", "Windows per second by the limit that closed them. wait: traffic is low. records or bytes: windows are full, and larger ones may be cheaper. work: the model is slow.", "cps",
              (f"sum by (closed_by) (rate(kandle_windows_total{{{JOB}}}{RATE}))", "{{closed_by}}"), stack=True, width=8),
        heatmap("Records in a window", "Distribution of the number of records per window.", "short", f"sum by (le) (increase(kandle_window_records_bucket{{{JOB}}}{RATE}))", width=8),
        heatmap("Work in a batch", "Distribution of the work per batch: tokens of texts, patches of images, elements of tensors.", "short", f"sum by (le) (increase(kandle_batch_tokens_bucket{{{JOB}}}{RATE}))", width=8),
        lines("Inputs in a batch", "Mean number of inputs in one forward pass.", "short",
              (f"sum(rate(kandle_batch_records_sum{{{JOB}}}{RATE})) / sum(rate(kandle_batch_records_count{{{JOB}}}{RATE}))", "records"), width=8),
        lines("Truncated records", "Records per second that were truncated because they have more tokens than the model takes.", "cps", (f"sum(rate(kandle_truncated_records_total{{{JOB}}}{RATE}))", "truncated"), width=16),
    ]),
    ("Stages", [
        heatmap("Time in stage $stage", "Distribution of the time that windows spent in the selected stages.", "s",
                f'sum by (le) (increase(kandle_stage_seconds_bucket{{{JOB},stage=~"$stage"}}{RATE}))', width=12, height=9),
        lines("Mean time by stage", "Mean time of a window per stage. wait_*: time spent waiting for that stage; it is longest before the slowest stage. decode_image: decoding and resizing of images.", "s",
              (f"sum by (stage) (rate(kandle_stage_seconds_sum{{{JOB}}}{RATE})) / sum by (stage) (rate(kandle_stage_seconds_count{{{JOB}}}{RATE}))", "{{stage}}"), width=12, height=9),
    ]),
    ("Memory", [
        lines("In flight", "Bytes in flight by kind, compared with memory.limit.", "bytes", (f"sum by (kind) (kandle_memory_bytes{{{JOB}}})", "{{kind}}"),
              (f"sum(kandle_memory_limit_bytes{{{JOB}}})", "limit"), width=8),
        lines("Resident memory", "Resident memory of the process, including the model and the cache.", "bytes", (f"process_resident_memory_bytes{{{JOB}}}", "{{instance}}"), width=8),
        lines("Batches halved", "Batches that did not fit the device's memory, and bisections in search of a record that fails.", "short",
              (f"sum(increase(kandle_oom_splits_total{{{JOB}}}{RATE}))", "out of memory"), (f"sum(increase(kandle_bisections_total{{{JOB}}}{RATE}))", "bisections"), width=8),
        lines("CPU", "CPU cores that the process uses.", "short", (f"rate(process_cpu_seconds_total{{{JOB}}}{RATE})", "{{instance}}"), width=8),
        lines("Inputs not computed", "Inputs that equal another one in the window or were in task.cache.", "cps",
              (f"sum by (from) (rate(kandle_reused_predictions_total{{{JOB}}}{RATE}))", "{{from}}"), stack=True, width=8),
        lines("Waiting for records", "Share of time in which nothing was in flight.", "percentunit",
              (f"rate(kandle_input_wait_seconds_total{{{JOB}}}{RATE})", "{{instance}}"), width=8),
    ]),
    ("Shadow", [
        lines("Records for the shadow", "Records per second that were chosen for the shadow model, by what became of them. skipped: the shadow cannot keep up; failed: the log says why.", "cps",
              (f"sum by (outcome) (rate(kandle_shadow_records_total{{{JOB}}}{RATE}))", "{{outcome}}"), stack=True, width=12),
        lines("Agreement with the shadow", "How much the shadow model agrees with the model: the mean of each measure of `kandle compare` over the last 1000 records of each member.", "short",
              (f"avg by (measure) (kandle_shadow_agreement{{{JOB}}})", "{{measure}}"), width=12),
    ]),
]

LABELS = f"rate(kandle_predictions_total{{{JOB}}}{RATE})"
RECORDS = f'sum(rate(kandle_records_total{{{JOB},outcome="predicted"}}{RATE}))'
PREDICTIONS = [
    ("What is predicted", [
        lines("Predictions by label", "Published predictions per second by label; of token classifications, entities. At most 100 labels, the rest is other.", "cps",
              (f"sum by (label) ({LABELS})", "{{label}}"), stack=True, width=12),
        lines("Share of each label", "Each label's share of the predictions. A share that jumps means that the input has changed, or the model.", "percentunit",
              (f"sum by (label) ({LABELS}) / on () group_left () sum({LABELS})", "{{label}}"), stack=True, width=12),
        heatmap("Score", "Distribution of the score of the best label or result, or of each entity.", "percentunit", f"sum by (le) (increase(kandle_prediction_score_bucket{{{JOB}}}{RATE}))", width=8),
        heatmap("Entropy", "Distribution of the entropy of each classification's scores: 0 if one label has everything, 1 if all labels have the same.", "percentunit", f"sum by (le) (increase(kandle_prediction_entropy_bucket{{{JOB}}}{RATE}))", width=8),
        lines("Records without an entity", "Share of records in which a token classification found no entity.", "percentunit",
              (f"sum(rate(kandle_records_without_entities_total{{{JOB}}}{RATE})) / {RECORDS}", "without an entity"), width=8),
    ]),
    ("Drift from the reference", [
        lines("Population stability index", "Distance of the latest predictions from drift.reference, the largest of all members. Above drift.threshold predictions have drifted, and the alert fires. Empty without drift.reference.", "short",
              (f'max by (namespace, job, of) (kandle_drift{{{JOB},measure="psi"}})', "{{job}} {{of}}"),
              (f"max by (namespace, job) (kandle_drift_threshold{{{JOB}}} < Inf)", "{{job}} threshold"), width=12),
        lines("Jensen-Shannon distance", "The same distance from 0 (equal) to 1 (nothing in common).", "short",
              (f'max by (namespace, job, of) (kandle_drift{{{JOB},measure="js"}})', "{{job}} {{of}}"), width=12),
    ]),
    ("What comes in", [
        lines("Size of a record", "Size of a record's inputs: tokens of texts, pixels of images, elements of tensors, points of series.", "short",
              (f"histogram_quantile(0.5, sum by (le, unit) (rate(kandle_record_units_bucket{{{JOB}}}{RATE})))", "{{unit}} p50"),
              (f"histogram_quantile(0.95, sum by (le, unit) (rate(kandle_record_units_bucket{{{JOB}}}{RATE})))", "{{unit}} p95"), width=8),
        lines("Unknown tokens", "Share of tokens that stand for what the model's vocabulary lacks. If it grows, the input has another language, script or encoding.", "percentunit",
              (f"sum(rate(kandle_unknown_tokens_total{{{JOB}}}{RATE})) / sum(rate(kandle_tokens_total{{{JOB}}}{RATE}))", "unknown"), width=8),
        lines("Truncated records", "Share of records of which the model has read only a part.", "percentunit",
              (f"sum(rate(kandle_truncated_records_total{{{JOB}}}{RATE})) / {RECORDS}", "truncated"), width=8),
        lines("Length of vectors", "Length of the vectors that an embedding model returned, before they are scaled to length 1.", "short", *quantiles("kandle_embedding_norm"), width=12),
        lines("Samples", "Samples for samples.topic per second by outcome. too_large and refused ones are left out.", "cps",
              (f"sum by (outcome) (rate(kandle_samples_total{{{JOB}}}{RATE}))", "{{outcome}}"), stack=True, width=12),
    ]),
]

PAIR = "namespace, job"
FLEET = [
    ("Jobs", [
        table("Jobs", "One row per job: rate, lag in time and in records, time to process it, dead letters, members.", [
            (f"sum by ({PAIR}) (rate(kandle_records_total{{{JOB}}}[5m]))", "records/s", "cps"),
            (f"max by ({PAIR}) (kandle_lag_seconds{{{JOB}}})", "late by", "s"),
            (f"sum by ({PAIR}) (kandle_lag_records{{{JOB}}})", "behind", "short"),
            (f"max by ({PAIR}) (kandle_drain_remaining_seconds{{{JOB}}})", "done in", "s"),
            (f"sum by ({PAIR}) (increase(kandle_dead_letters_total{{{JOB}}}[1h]))", "dead letters in an hour", "short"),
            (f"count by ({PAIR}) (kandle_build_info{{{JOB}}})", "members", "short"),
        ], width=24, height=8),
        table("Models", "Which model each job uses. More than one digest in a job means a running update or a mistake.", [
            (f"count by ({PAIR}, model, digest, task, device, dtype) (kandle_model_info{{{JOB}}})", "members", "short"),
        ], width=16, height=8),
        table("Versions", "Which versions of kandle each job runs, and how many members run each.", [(f"count by ({PAIR}, version) (kandle_build_info{{{JOB}}})", "members", "short")], width=8, height=8),
    ]),
    ("Side by side", [
        lines("Records a second", "Records per second by job, whatever their outcome.", "cps", (f"sum by ({PAIR}) (rate(kandle_records_total{{{JOB}}}{RATE}))", "{{namespace}} {{job}}"), stack=True, width=12),
        lines("Late by", "Age of the oldest record without a prediction, by job.", "s", (f"max by ({PAIR}) (kandle_lag_seconds{{{JOB}}})", "{{namespace}} {{job}}"), width=12, steps=LATE),
        lines("Device busy", "Share of time in which the device computed, by job: the mean over its members.", "percentunit",
              (f"avg by ({PAIR}) (sum by ({PAIR}, instance) (rate(kandle_device_busy_seconds_total{{{JOB}}}{RATE})))", "{{namespace}} {{job}}"), width=12),
        lines("Restarts", "Restarts of members; repeated ones mean that a member crashes.", "short",
              (f"sum by ({PAIR}) (changes(process_start_time_seconds{{{JOB}}}{RATE}))", "{{namespace}} {{job}}"), width=12),
    ]),
]


def query_variable(name, label, query, multi=True):
    return {
        "name": name, "label": label, "type": "query", "datasource": DATASOURCE, "definition": query,
        "query": {"query": query, "refId": name}, "refresh": 2, "sort": 1, "multi": multi, "includeAll": True, "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def variables(stage):
    result = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}},
        query_variable("namespace", "Namespace", "label_values(kandle_build_info, namespace)"),
        query_variable("job", "Job", 'label_values(kandle_build_info{namespace=~"$namespace"}, job)'),
        query_variable("topic", "Topic", f"label_values(kandle_records_total{{{JOB}}}, topic)"),
    ]
    if stage:
        result.append(query_variable("stage", "Stage", f"label_values(kandle_stage_seconds_count{{{JOB}}}, stage)"))
    return result


def annotation(name, colour, expr, title):
    return {
        "name": name, "datasource": DATASOURCE, "enable": True, "iconColor": colour, "expr": expr, "step": "60s",
        "titleFormat": title, "textFormat": "{{namespace}} {{job}} {{digest}}",
    }


ANNOTATIONS = [
    annotation("Rebalances", "orange", f'sum by ({PAIR}) (increase(kandle_rebalances_total{{{JOB},cause!="assigned"}}[1m])) > 0', "partitions moved"),
    annotation("Model changes", "purple", f"count by ({PAIR}, digest) (kandle_model_info{{{JOB}}}) unless count by ({PAIR}, digest) (kandle_model_info{{{JOB}}} offset 1m)", "new model digest"),
]


def dashboard(uid, title, rows, stage=False):
    panels, y, number = [], 0, 1
    for name, content in rows:
        panels.append({"id": number, "type": "row", "title": name, "collapsed": False, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}, "panels": []})
        number, y, x, line = number + 1, y + 1, 0, 0
        for one in content:
            one = dict(one)
            width, height = one.pop("_size")
            if x + width > 24:
                x, y, line = 0, y + line, 0
            panels.append({"id": number, **one, "gridPos": {"x": x, "y": y, "w": width, "h": height}})
            number, x, line = number + 1, x + width, max(line, height)
        y += line
    return {
        "uid": uid,
        "title": f"kandle / {title}",
        "tags": ["kandle"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": variables(stage)},
        "annotations": {"list": ANNOTATIONS},
        "links": [
            {"type": "dashboards", "title": "kandle", "tags": ["kandle"], "asDropdown": False, "includeVars": True, "keepTime": True},
        ],
        "panels": panels,
    }


ALL = {
    "overview": dashboard("kandle-overview", "overview", OVERVIEW),
    "engine": dashboard("kandle-engine", "engine", ENGINE, stage=True),
    "predictions": dashboard("kandle-predictions", "predictions", PREDICTIONS),
    "fleet": dashboard("kandle-fleet", "fleet", FLEET),
}

if __name__ == "__main__":
    stale = False
    for name, content in ALL.items():
        path = HERE / "dashboards" / f"{name}.json"
        text = json.dumps(content, indent=1) + "\n"
        if "--check" in sys.argv:
            stale |= not path.exists() or path.read_text() != text
        else:
            path.write_text(text)
    if stale:
        sys.exit("grafana/dashboards is out of date: run grafana/dashboards.py")
