//! OpenMetrics 1.0 text (<https://prometheus.io/docs/specs/om/open_metrics_spec/>), which the
//! prometheus crate does not write: counters are named without `_total` in their metadata, and the
//! exposition ends in `# EOF`.

use std::fmt::Write;

use prometheus::proto::{LabelPair, MetricFamily, MetricType};

pub(super) fn encode(families: &[MetricFamily]) -> String {
    let mut out = String::new();
    for family in families {
        let name = family.name();
        let (base, kind) = match family.get_field_type() {
            MetricType::COUNTER => (name.strip_suffix("_total").unwrap_or(name), "counter"),
            MetricType::GAUGE => (name, "gauge"),
            MetricType::HISTOGRAM => (name, "histogram"),
            _ => continue,
        };
        // Writing to a String cannot fail.
        let _ = writeln!(out, "# HELP {base} {}", escaped(family.help()));
        let _ = writeln!(out, "# TYPE {base} {kind}");
        for metric in family.get_metric() {
            let labels = metric.get_label();
            match family.get_field_type() {
                MetricType::COUNTER => {
                    sample(&mut out, &format!("{base}_total"), labels, None, metric.get_counter().get_value())
                }
                MetricType::GAUGE => sample(&mut out, name, labels, None, metric.get_gauge().get_value()),
                _ => {
                    let histogram = metric.get_histogram();
                    let mut closed = false;
                    for bucket in histogram.get_bucket() {
                        let bound = bucket.upper_bound();
                        closed |= bound.is_infinite();
                        sample(
                            &mut out,
                            &format!("{name}_bucket"),
                            labels,
                            Some(bound),
                            bucket.cumulative_count() as f64,
                        );
                    }
                    if !closed {
                        let all = histogram.get_sample_count() as f64;
                        sample(&mut out, &format!("{name}_bucket"), labels, Some(f64::INFINITY), all);
                    }
                    sample(
                        &mut out,
                        &format!("{name}_count"),
                        labels,
                        None,
                        histogram.get_sample_count() as f64,
                    );
                    sample(&mut out, &format!("{name}_sum"), labels, None, histogram.get_sample_sum());
                }
            }
        }
    }
    out.push_str("# EOF\n");
    out
}

fn sample(out: &mut String, name: &str, labels: &[LabelPair], le: Option<f64>, value: f64) {
    out.push_str(name);
    let mut pairs: Vec<String> =
        labels.iter().map(|pair| format!("{}=\"{}\"", pair.name(), escaped(pair.value()))).collect();
    if let Some(bound) = le {
        pairs.push(format!("le=\"{}\"", number(bound)));
    }
    if !pairs.is_empty() {
        let _ = write!(out, "{{{}}}", pairs.join(","));
    }
    let _ = writeln!(out, " {}", number(value));
}

fn number(value: f64) -> String {
    if value == f64::INFINITY {
        "+Inf".to_owned()
    } else if value == f64::NEG_INFINITY {
        "-Inf".to_owned()
    } else if value.is_nan() {
        "NaN".to_owned()
    } else {
        format!("{value:?}")
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\n', "\\n").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use crate::telemetry::Metrics;

    #[test]
    fn writes_openmetrics_text() {
        let metrics = Metrics::new();
        metrics.dead_letters.with_label_values(&["decode"]).inc_by(3);
        metrics.record_latency.observe(0.3);
        metrics.records.with_label_values(&["a\"b", "predicted"]).inc();
        let text = metrics.openmetrics();
        for line in [
            "# TYPE kandle_dead_letters counter",
            "kandle_dead_letters_total{error=\"decode\"} 3.0",
            "kandle_records_total{outcome=\"predicted\",topic=\"a\\\"b\"} 1.0",
            "kandle_record_latency_seconds_bucket{le=\"0.5\"} 1.0",
            "kandle_record_latency_seconds_bucket{le=\"+Inf\"} 1.0",
            "kandle_record_latency_seconds_count 1.0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
