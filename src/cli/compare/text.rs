//! The report as text.

use std::fmt::Write;

use super::report::{Disagreement, MeasureReport, Report, TopicReport};
use crate::cli::offsets::ranges;

/// Pairs of labels that are shown.
const LABELS: usize = 20;

pub(super) fn write(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_to(&mut out, report);
    out
}

fn write_to(out: &mut String, report: &Report) -> std::fmt::Result {
    for (side, topic) in [("a", &report.a), ("b", &report.b)] {
        write_topic(out, side, topic)?;
    }
    let coverage = &report.coverage;
    writeln!(
        out,
        "coverage: {} positions in both, {} only in a, {} only in b",
        coverage.both, coverage.only_a, coverage.only_b
    )?;
    for (side, offsets) in [("a", &coverage.only_a_offsets), ("b", &coverage.only_b_offsets)] {
        for (partition, list) in offsets {
            writeln!(out, "  only in {side}: {partition}: {}", ranges(list))?;
        }
    }
    let agreement = &report.agreement;
    write!(out, "agreement, {}: {} pairs compared", report.task, agreement.compared)?;
    if agreement.tombstones > 0 {
        write!(out, ", {} pairs of tombstones", agreement.tombstones)?;
    }
    for (why, pairs) in &agreement.not_compared {
        write!(out, ", {pairs} cannot be compared ({why})")?;
    }
    writeln!(out)?;
    if agreement.compared == 0 {
        return Ok(());
    }
    for measure in &agreement.measures {
        writeln!(out, "  {}", line(measure))?;
    }
    let differ: Vec<_> = agreement.labels.iter().filter(|labels| labels.a != labels.b).collect();
    if !differ.is_empty() {
        writeln!(out, "labels that differ, a and b:")?;
        for labels in differ.iter().take(LABELS) {
            writeln!(out, "  {} times {:?} and {:?}", labels.pairs, labels.a, labels.b)?;
        }
        if differ.len() > LABELS {
            writeln!(out, "  and {} more pairs of labels", differ.len() - LABELS)?;
        }
    }
    if let Some(spans) = &agreement.spans {
        let counts = |both, only_a, only_b, f1| {
            format!("F1 {f1}, {both} in both, {only_a} only in a, {only_b} only in b")
        };
        writeln!(out, "entities: {}", counts(spans.both, spans.only_a, spans.only_b, spans.f1))?;
        for of in spans.labels.iter().take(LABELS) {
            writeln!(out, "  {:?}: {}", of.label, counts(of.both, of.only_a, of.only_b, of.f1))?;
        }
        if spans.labels.len() > LABELS {
            writeln!(out, "  and {} more labels", spans.labels.len() - LABELS)?;
        }
    }
    if agreement.labels_left_out > 0 {
        writeln!(out, "  {} more with other labels", agreement.labels_left_out)?;
    }
    if !report.disagreements.is_empty() {
        writeln!(out, "strongest disagreements:")?;
    }
    for Disagreement { topic, partition, offset, measures, a, b } in &report.disagreements {
        let measures: Vec<String> = measures.iter().map(|(name, value)| format!("{name} {value}")).collect();
        writeln!(out, "  {topic}/{partition}/{offset}: {}", measures.join(", "))?;
        writeln!(out, "    a {}\n    b {}", one_line(a), one_line(b))?;
    }
    Ok(())
}

fn write_topic(out: &mut String, side: &str, topic: &TopicReport) -> std::fmt::Result {
    write!(
        out,
        "{side}: {}: {} positions, {} of them tombstones, {} published more than once",
        topic.topic, topic.positions, topic.tombstones, topic.doubled
    )?;
    if topic.others > 0 {
        write!(out, "; {} records are no predictions of the input", topic.others)?;
    }
    writeln!(out)?;
    for model in &topic.models {
        let unknown = |text: &str| if text.is_empty() { "?".to_owned() } else { text.to_owned() };
        writeln!(
            out,
            "  {} {}: {} positions",
            unknown(&model.digest),
            unknown(&one_line(&model.model)),
            model.positions
        )?;
    }
    if let Some(published) = &topic.published {
        write!(out, "  published in {} s, {} records/s", published.seconds, published.records_per_second)?;
        if let Some(cost) = published.cost_per_million_records {
            write!(out, ", {cost} per million records")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn line(measure: &MeasureReport) -> String {
    let number = |value: Option<f64>| value.map_or("?".to_owned(), |value| value.to_string());
    let mut line = format!("{}: {}", measure.name, number(measure.mean));
    if let Some(reached) = &measure.reached_by {
        line = format!(
            "{}: mean {}; half of the pairs reach {}, 90 % reach {}, 99 % reach {}, all reach {}",
            measure.name,
            number(measure.mean),
            number(reached.half),
            number(reached.ninety),
            number(reached.ninety_nine),
            number(reached.all)
        );
    }
    format!("{line} ({})", measure.means)
}

/// A text with its control characters escaped, so that it cannot write to the terminal.
fn one_line(text: &str) -> String {
    let escape = |c: char| match c.is_control() {
        true => c.escape_default().collect::<String>(),
        false => c.to_string(),
    };
    text.chars().map(escape).collect()
}
