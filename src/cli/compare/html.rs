//! The report as one HTML file: its plots are inside, as SVG, and it needs no scripts.

use std::fmt::Write;

use super::report::{Agreement, Coverage, MeasureReport, Report, TopicReport};

/// Labels of the confusion table; the others are summed up.
const LABELS: usize = 20;

const STYLE: &str = "\
body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c1e21}\
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}\
table{border-collapse:collapse;margin:.6rem 0}th,td{border:1px solid #d5d9de;padding:.25rem .6rem;text-align:left;vertical-align:top}\
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}\
code{font:13px/1.4 ui-monospace,monospace;overflow-wrap:anywhere}\
figure{margin:.8rem 0}figcaption{color:#5a6169;font-size:.85rem}\
svg text{font:12px system-ui,sans-serif;fill:#1c1e21}";

pub(super) fn write(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_to(&mut out, report);
    out
}

/// Text with what has a meaning in HTML replaced.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // HTML has no control characters.
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

fn write_to(out: &mut String, report: &Report) -> std::fmt::Result {
    let title = format!("{} and {}", escape(&report.a.topic), escape(&report.b.topic));
    write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<p>Task: {}",
        escape(report.task)
    )?;
    for (word, point) in [("from", &report.from), ("to", &report.to)] {
        if let Some(point) = point {
            write!(out, ", {word} {}", escape(point))?;
        }
    }
    writeln!(out, "</p>")?;
    topics(out, report)?;
    coverage(out, &report.coverage)?;
    agreement(out, &report.agreement)?;
    disagreements(out, report)?;
    writeln!(out, "</body>\n</html>")
}

fn topics(out: &mut String, report: &Report) -> std::fmt::Result {
    writeln!(
        out,
        "<h2>Topics</h2>\n<table>\n<tr><th></th><th>topic</th><th class=\"n\">positions</th>\
         <th class=\"n\">tombstones</th><th class=\"n\">doubled</th><th class=\"n\">other records</th><th>models</th>\
         <th>published</th></tr>"
    )?;
    for (side, topic) in [("a", &report.a), ("b", &report.b)] {
        let TopicReport { topic, positions, tombstones, doubled, others, models, published } = topic;
        let models: Vec<String> = (models.iter())
            .map(|of| format!("<code>{} {}</code>: {}", escape(&of.digest), escape(&of.model), of.positions))
            .collect();
        let published = published.as_ref().map_or(String::new(), |of| {
            let cost = of.cost_per_million_records;
            let cost = cost.map_or(String::new(), |cost| format!(", {cost} per million records"));
            format!("{} s, {} records/s{cost}", of.seconds, of.records_per_second)
        });
        writeln!(
            out,
            "<tr><th>{side}</th><td>{}</td><td class=\"n\">{positions}</td><td class=\"n\">{tombstones}</td>\
             <td class=\"n\">{doubled}</td><td class=\"n\">{others}</td><td>{}</td><td>{published}</td></tr>",
            escape(topic),
            models.join("<br>")
        )?;
    }
    writeln!(out, "</table>")
}

/// One bar, with a part for what both topics have and for what only one has.
fn coverage(out: &mut String, coverage: &Coverage) -> std::fmt::Result {
    const WIDTH: f64 = 640.0;
    let parts = [
        ("only in a", coverage.only_a, "#e8a33d"),
        ("in both", coverage.both, "#3b7dd8"),
        ("only in b", coverage.only_b, "#8a5cc4"),
    ];
    let all: u64 = parts.iter().map(|(_, count, _)| count).sum();
    writeln!(
        out,
        "<h2>Coverage</h2>\n<figure><svg viewBox=\"0 0 640 60\" width=\"640\" height=\"60\" role=\"img\">"
    )?;
    let mut x = 0.0;
    for (at, (name, count, colour)) in parts.into_iter().enumerate() {
        let width = if all > 0 { WIDTH * count as f64 / all as f64 } else { 0.0 };
        writeln!(
            out,
            "<rect x=\"{x:.1}\" y=\"0\" width=\"{width:.1}\" height=\"26\" fill=\"{colour}\"/>\
             <rect x=\"{}\" y=\"40\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
             <text x=\"{}\" y=\"51\">{count} {name}</text>",
            at * 210,
            at * 210 + 18
        )?;
        x += width;
    }
    writeln!(out, "</svg><figcaption>Positions of the input with a prediction</figcaption></figure>")
}

fn agreement(out: &mut String, agreement: &Agreement) -> std::fmt::Result {
    write!(out, "<h2>Agreement</h2>\n<p>{} pairs compared", agreement.compared)?;
    if agreement.tombstones > 0 {
        write!(out, ", {} pairs of tombstones", agreement.tombstones)?;
    }
    for (why, pairs) in &agreement.not_compared {
        write!(out, ", {pairs} cannot be compared ({})", escape(why))?;
    }
    writeln!(
        out,
        "</p>\n<table>\n<tr><th>measure</th><th class=\"n\">mean</th><th class=\"n\">half reach</th>\
         <th class=\"n\">90 % reach</th><th class=\"n\">99 % reach</th><th class=\"n\">all reach</th><th></th></tr>"
    )?;
    for measure in &agreement.measures {
        let number = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
        let reached = measure.reached_by.as_ref();
        let cells = [
            measure.mean,
            reached.and_then(|r| r.half),
            reached.and_then(|r| r.ninety),
            reached.and_then(|r| r.ninety_nine),
            reached.and_then(|r| r.all),
        ];
        let cells = cells.map(|value| format!("<td class=\"n\">{}</td>", number(value)));
        writeln!(
            out,
            "<tr><th>{}</th>{}<td>{}</td></tr>",
            escape(measure.name),
            cells.concat(),
            escape(measure.means)
        )?;
    }
    writeln!(out, "</table>")?;
    for measure in &agreement.measures {
        histogram(out, measure)?;
    }
    if !agreement.labels.is_empty() {
        confusion(out, agreement)?;
    }
    if let Some(spans) = &agreement.spans {
        writeln!(
            out,
            "<h2>Entities</h2>\n<table>\n<tr><th>label</th><th class=\"n\">F1</th><th class=\"n\">in both</th>\
             <th class=\"n\">only in a</th><th class=\"n\">only in b</th></tr>"
        )?;
        let mut row = |label: &str, f1: f64, counts: [u64; 3]| {
            let cells = counts.map(|count| format!("<td class=\"n\">{count}</td>")).concat();
            writeln!(out, "<tr><th>{label}</th><td class=\"n\">{f1}</td>{cells}</tr>")
        };
        row("all", spans.f1, [spans.both, spans.only_a, spans.only_b])?;
        for of in &spans.labels {
            row(&format!("<code>{}</code>", escape(&of.label)), of.f1, [of.both, of.only_a, of.only_b])?;
        }
        writeln!(out, "</table>")?;
    }
    if agreement.labels_left_out > 0 {
        writeln!(out, "<p>{} more with other labels.</p>", agreement.labels_left_out)?;
    }
    Ok(())
}

/// Bars of the numbers of pairs, by their distance from the best value.
fn histogram(out: &mut String, measure: &MeasureReport) -> std::fmt::Result {
    const HEIGHT: f64 = 120.0;
    const STEP: usize = 52;
    let Some(reached) = &measure.reached_by else { return Ok(()) };
    let bars = &reached.histogram;
    let most = bars.iter().map(|bar| bar.pairs).max().unwrap_or(0).max(1);
    let width = bars.len() * STEP;
    writeln!(
        out,
        "<figure><svg viewBox=\"0 0 {width} 170\" width=\"{width}\" height=\"170\" role=\"img\">\
         <line x1=\"0\" y1=\"140\" x2=\"{width}\" y2=\"140\" stroke=\"#8a9199\"/>"
    )?;
    let mut before = None;
    for (at, bar) in bars.iter().enumerate() {
        let height = HEIGHT * bar.pairs as f64 / most as f64;
        let (left, middle, y) = (at * STEP + 4, at * STEP + STEP / 2, 140.0 - height);
        let label = match (bar.distance_up_to, before) {
            (Some(edge), None) => format!("{edge}"),
            (Some(edge), Some(_)) => format!("≤ {edge}"),
            (None, before) => format!("> {}", before.unwrap_or(0.0)),
        };
        writeln!(
            out,
            "<rect x=\"{left}\" y=\"{y:.1}\" width=\"{}\" height=\"{height:.1}\" fill=\"#3b7dd8\"/>\
             <text x=\"{middle}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text x=\"{middle}\" y=\"157\" text-anchor=\"middle\">{label}</text>",
            STEP - 8,
            y - 4.0,
            bar.pairs,
        )?;
        before = bar.distance_up_to;
    }
    writeln!(
        out,
        "</svg><figcaption>{}: pairs by their distance from {}</figcaption></figure>",
        escape(measure.name),
        measure.best
    )
}

/// How often a has one label and b another: the labels with the most pairs, and the sum of the others.
fn confusion(out: &mut String, agreement: &Agreement) -> std::fmt::Result {
    let mut totals: Vec<(&str, u64)> = Vec::new();
    for of in &agreement.labels {
        for label in [&of.a, &of.b] {
            match totals.iter_mut().find(|(known, _)| known == label) {
                Some((_, total)) => *total += of.pairs,
                None => totals.push((label, of.pairs)),
            }
        }
    }
    totals.sort_by(|(a, x), (b, y)| y.cmp(x).then(a.cmp(b)));
    let mut shown: Vec<&str> = totals.iter().take(LABELS).map(|(label, _)| *label).collect();
    shown.sort_unstable();
    let others = totals.len() > LABELS;
    let size = shown.len() + usize::from(others);
    let place = |label: &str| shown.binary_search(&label).unwrap_or(shown.len());
    let mut cells = vec![0u64; size * size];
    for of in &agreement.labels {
        cells[place(&of.a) * size + place(&of.b)] += of.pairs;
    }
    let names: Vec<String> = (shown.iter().map(|label| format!("<code>{}</code>", escape(label))))
        .chain(others.then(|| "others".to_owned()))
        .collect();
    writeln!(out, "<h2>Labels</h2>\n<p>Rows: label of a. Columns: label of b.</p>\n<table>\n<tr><th></th>")?;
    for name in &names {
        write!(out, "<th>{name}</th>")?;
    }
    writeln!(out, "</tr>")?;
    for (row, name) in names.iter().enumerate() {
        write!(out, "<tr><th>{name}</th>")?;
        let of_row = &cells[row * size..][..size];
        let sum = of_row.iter().sum::<u64>().max(1);
        for (column, pairs) in of_row.iter().enumerate() {
            let colour = if row == column { "59,125,216" } else { "200,60,60" };
            let share = *pairs as f64 / sum as f64;
            write!(
                out,
                "<td class=\"n\" style=\"background:rgba({colour},{:.2})\">{pairs}</td>",
                share * 0.6
            )?;
        }
        writeln!(out, "</tr>")?;
    }
    writeln!(out, "</table>")
}

fn disagreements(out: &mut String, report: &Report) -> std::fmt::Result {
    if report.disagreements.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "<h2>Strongest disagreements</h2>\n<table>\n<tr><th>position</th><th>measures</th><th>predictions</th></tr>"
    )?;
    for of in &report.disagreements {
        let measures: Vec<String> =
            of.measures.iter().map(|(name, value)| format!("{name} {value}")).collect();
        writeln!(
            out,
            "<tr><td>{}/{}/{}</td><td>{}</td><td>a <code>{}</code><br>b <code>{}</code></td></tr>",
            escape(&of.topic),
            of.partition,
            of.offset,
            measures.join("<br>"),
            escape(&of.a),
            escape(&of.b)
        )?;
    }
    writeln!(out, "</table>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_cannot_become_elements() {
        assert_eq!(escape("<b a=\"x\" b='y'>&\u{7}"), "&lt;b a=&quot;x&quot; b=&#39;y&#39;&gt;&amp;\u{fffd}");
    }
}
