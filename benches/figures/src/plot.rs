//! Time against memory, as an SVG: the frontier that a cache moves.

use std::fmt::Write;

use crate::document::Document;
use crate::tables::title;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 60.0;

/// A mode in the plane.
#[derive(Clone, Debug, PartialEq)]
struct Point {
    name: String,
    /// Memory over the Parquet's bytes.
    memory: f64,
    /// Time over the memory table's, or over Parquet's where there is none.
    time: f64,
    ours: bool,
}

/// The modes of a document, each with both figures.
fn points(document: &Document) -> Vec<Point> {
    let with_memtable = document
        .summary
        .values()
        .any(|found| found.geomean_vs_memtable.is_some());
    let modes = document.modes.iter().filter_map(|mode| {
        let found = document.summary.get(mode)?;
        let time = match with_memtable {
            true => found.geomean_vs_memtable?,
            false => found.geomean_vs_parquet?,
        };
        let point = Point {
            name: mode.clone(),
            memory: found.bytes_vs_parquet,
            time,
            ours: mode.starts_with("stoa"),
        };
        (point.memory > 0.0 && point.time > 0.0).then_some(point)
    });
    modes.collect()
}

/// The points than which none other has both less memory and less time, by memory.
fn frontier(points: &[Point]) -> Vec<&Point> {
    let mut sorted: Vec<&Point> = points.iter().collect();
    let order = |a: &&Point, b: &&Point| {
        let by_memory = a.memory.total_cmp(&b.memory);
        by_memory.then(a.time.total_cmp(&b.time))
    };
    sorted.sort_by(order);
    let mut best = f64::INFINITY;
    sorted.retain(|point| {
        let better = point.time < best;
        best = best.min(point.time);
        better
    });
    sorted
}

/// A logarithmic axis from one end of the drawing to the other.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn around(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Axis {
        let (low, high) = values.fold((f64::INFINITY, 0.0_f64), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        Axis {
            low: low * 0.7,
            high: high * 1.4,
            from,
            to,
        }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value / self.low).ln() / (self.high / self.low).ln();
        self.from + share * (self.to - self.from)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        let steps = (-3..6).flat_map(|decade| [1.0, 2.0, 5.0].map(|s| s * 10_f64.powi(decade)));
        steps.filter(|value| (self.low..=self.high).contains(value))
    }
}

/// The plot; `None` where no mode has both memory and time.
pub fn svg(document: &Document) -> Option<String> {
    let points = points(document);
    if points.is_empty() {
        return None;
    }
    let x = Axis::around(points.iter().map(|p| p.memory), LEFT, WIDTH - RIGHT);
    let y = Axis::around(points.iter().map(|p| p.time), HEIGHT - BOTTOM, TOP);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"28\" font-size=\"16\">{}: time against memory</text>\n",
        escape(&title(document))
    );
    grid(&mut svg, &x, &y);
    let base = match document
        .summary
        .values()
        .any(|s| s.geomean_vs_memtable.is_some())
    {
        true => "MemTable",
        false => "Parquet",
    };
    let _ = writeln!(
        svg,
        "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\">memory ÷ bytes of the Parquet files</text>\n\
         <text transform=\"translate(22 {:.0}) rotate(-90)\" text-anchor=\"middle\">time ÷ {base} (geometric mean)</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 16.0,
        (TOP + HEIGHT - BOTTOM) / 2.0,
    );
    let others: Vec<Point> = points.iter().filter(|point| !point.ours).cloned().collect();
    line(&mut svg, &frontier(&others), &x, &y, "#999999", "5 4");
    line(&mut svg, &frontier(&points), &x, &y, "#1b6ca8", "none");
    for point in &points {
        let (at_x, at_y) = (x.at(point.memory), y.at(point.time));
        let colour = if point.ours { "#1b6ca8" } else { "#777777" };
        let right = at_x > WIDTH * 0.72;
        let (dx, anchor) = if right { (-8.0, "end") } else { (8.0, "start") };
        let _ = writeln!(
            svg,
            "<circle cx=\"{at_x:.1}\" cy=\"{at_y:.1}\" r=\"5\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{}</text>",
            at_x + dx,
            at_y - 7.0,
            escape(&point.name),
        );
    }
    svg += "</svg>\n";
    Some(svg)
}

fn grid(svg: &mut String, x: &Axis, y: &Axis) {
    let bottom = HEIGHT - BOTTOM;
    for tick in x.ticks() {
        let at = x.at(tick);
        let _ = writeln!(
            svg,
            "<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#eeeeee\"/>\
             <text x=\"{at:.1}\" y=\"{:.0}\" text-anchor=\"middle\" fill=\"#555555\">{tick}</text>",
            bottom + 18.0,
        );
    }
    for tick in y.ticks() {
        let at = y.at(tick);
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {at:.1}H{}\" stroke=\"#eeeeee\"/>\
             <text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#555555\">{tick}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            at + 4.0,
        );
    }
    let _ = writeln!(
        svg,
        "<path d=\"M{LEFT} {TOP}V{bottom}H{}\" fill=\"none\" stroke=\"#555555\"/>",
        WIDTH - RIGHT,
    );
}

fn line(svg: &mut String, points: &[&Point], x: &Axis, y: &Axis, colour: &str, dashes: &str) {
    if points.len() < 2 {
        return;
    }
    let places: Vec<String> = points
        .iter()
        .map(|point| format!("{:.1},{:.1}", x.at(point.memory), y.at(point.time)))
        .collect();
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" \
         stroke-dasharray=\"{dashes}\"/>",
        places.join(" "),
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::document::Summary;

    fn document(modes: &[(&str, f64, f64)]) -> Document {
        let summary: BTreeMap<String, Summary> = modes
            .iter()
            .map(|(mode, memory, time)| {
                let summary = Summary {
                    bytes_vs_parquet: *memory,
                    geomean_vs_memtable: Some(*time),
                    ..Summary::default()
                };
                (mode.to_string(), summary)
            })
            .collect();
        Document {
            suite: "tpch".into(),
            scale: 1.0,
            modes: modes.iter().map(|mode| mode.0.to_owned()).collect(),
            summary,
            ..Document::default()
        }
    }

    #[test]
    fn the_frontier_is_what_nothing_beats_in_both() {
        let points = points(&document(&[
            ("parquet", 1.0, 2.0),
            ("memtable", 5.0, 1.0),
            ("stoa-packed", 0.8, 1.0),
            ("stoa-arrow", 4.0, 0.8),
        ]));
        let names: Vec<&str> = frontier(&points).iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["stoa-packed", "stoa-arrow"]);
    }

    #[test]
    fn every_mode_is_drawn_inside() {
        let svg = svg(&document(&[
            ("parquet", 1.0, 2.0),
            ("stoa-auto@0.5", 0.5, 1.2),
        ]))
        .unwrap();
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains(">stoa-auto@0.5</text>"));
        for part in svg.split("cx=\"").skip(1) {
            let at: f64 = part.split('"').next().unwrap().parse().unwrap();
            assert!((LEFT..=WIDTH - RIGHT).contains(&at), "{at}");
        }
        assert_eq!(super::svg(&document(&[])), None);
    }
}
