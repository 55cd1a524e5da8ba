// SPDX-License-Identifier: Apache-2.0
//! Plots of figures that were measured: `cloister-bench --plot FOLDER RESULTS` (`make plots`).
//!
//! `ratios.svg` has every ratio to a peer, on a logarithmic scale, with a line where both are alike. `density.svg` has what
//! idle clones cost, by their number.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use plotters::coord::ranged1d::{AsRangedCoord, Ranged};
use plotters::prelude::*;
use serde::Deserialize;

/// A line of the results.
#[derive(Debug, Deserialize)]
struct Measured {
    name: String,
    value: f64,
    unit: String,
    conditions: String,
}

/// Series of `density.svg`: the name before the number of clones, and what the legend says.
const SERIES: [(&str, &str); 4] = [
    ("density.dirtied_kib.", "pages of its own, KiB per clone"),
    ("density.beyond_kib.", "process beyond those, KiB per clone"),
    ("density.host_beyond_kib.", "host beyond those, KiB per clone"),
    (
        "density.page_table_event_us.",
        "one page-table event, microseconds",
    ),
];
const BAR: RGBColor = RGBColor(46, 110, 166);
const FONT: &str = "sans-serif";
const LINE_HEIGHT: u32 = 22;

/// Draws them.
///
/// # Errors
/// A file cannot be read or written.
pub fn run(folder: &Path, results: &Path) -> io::Result<()> {
    let figures = fs::read_to_string(results)?
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<Vec<Measured>, _>>()?;
    fs::create_dir_all(folder)?;
    // The host is the first part of every figure's conditions.
    let host = figures.first().map_or("", |figure| {
        let text = figure.conditions.as_str();
        text.split(';').next().unwrap_or(text)
    });
    ratios(&figures, host, &folder.join("ratios.svg")).map_err(io::Error::other)?;
    density(&figures, host, &folder.join("density.svg")).map_err(io::Error::other)
}

type Drawn = Result<(), Box<dyn std::error::Error + Send + Sync>>;

fn ratios(figures: &[Measured], host: &str, path: &Path) -> Drawn {
    let mut ratios: Vec<&Measured> = figures
        .iter()
        .filter(|figure| figure.unit == "ratio" && figure.value > 0.0)
        .collect();
    if ratios.is_empty() {
        println!("no ratios: {} is not drawn", path.display());
        return Ok(());
    }
    // The first by name is at the top.
    ratios.sort_by(|a, b| b.name.cmp(&a.name));
    let count = u32::try_from(ratios.len())?;
    let area = SVGBackend::new(path, (960, 110 + LINE_HEIGHT * count)).into_drawing_area();
    area.fill(&WHITE)?;
    let values = || ratios.iter().map(|figure| figure.value);
    let low = values().fold(0.5, f64::min) / 1.5;
    let high = values().fold(2.0, f64::max) * 2.0;
    let mut chart = ChartBuilder::on(&area)
        .caption("Cloister over its peer; 1 is alike", (FONT, 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(300)
        .build_cartesian_2d((low..high).log_scale(), 0.0..f64::from(count))?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_desc(host)
        .draw()?;
    for (line, figure) in (0u32..).zip(&ratios) {
        let bottom = f64::from(line);
        let bar = [
            (figure.value.min(1.0), bottom + 0.15),
            (figure.value.max(1.0), bottom + 0.85),
        ];
        chart.draw_series([Rectangle::new(bar, BAR.filled())])?;
        let beside = (figure.value.max(1.0) * 1.03, bottom + 0.75);
        let text = format!("{:.2}", figure.value);
        chart.draw_series([Text::new(text, beside, (FONT, 13))])?;
        let (_, y) = chart.backend_coord(&(1.0, bottom + 0.5));
        let style = TextStyle::from((FONT, 13)).pos(plotters::style::text_anchor::Pos::new(
            plotters::style::text_anchor::HPos::Right,
            plotters::style::text_anchor::VPos::Center,
        ));
        area.draw(&Text::new(figure.name.clone(), (300, y), style))?;
    }
    chart.draw_series(LineSeries::new([(1.0, 0.0), (1.0, f64::from(count))], &BLACK))?;
    area.present()?;
    Ok(())
}

fn density(figures: &[Measured], host: &str, path: &Path) -> Drawn {
    let mut series: BTreeMap<usize, Vec<(f64, f64)>> = BTreeMap::new();
    for figure in figures {
        for (index, (prefix, _)) in SERIES.iter().enumerate() {
            let count = figure
                .name
                .strip_prefix(prefix)
                .and_then(|count| count.parse().ok());
            // A logarithmic scale has no place for "no VM".
            if let Some(count) = count.filter(|count: &f64| *count > 0.0) {
                series
                    .entry(index)
                    .or_default()
                    .push((count, figure.value.max(1.0)));
            }
        }
    }
    let points = || series.values().flatten();
    let (right, top) = points().fold((2.0, 10.0), |(right, top): (f64, f64), (x, y)| {
        (right.max(*x), top.max(*y))
    });
    if points().next().is_none() {
        println!("no density figures: {} is not drawn", path.display());
        return Ok(());
    }
    let area = SVGBackend::new(path, (960, 480)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("Idle clones in one process", (FONT, 18))
        .margin(12)
        .x_label_area_size(45)
        .y_label_area_size(70)
        .build_cartesian_2d((1.0..right * 1.1).log_scale(), (1.0..top * 3.0).log_scale())?;
    chart.configure_mesh().x_desc(format!("clones; {host}")).draw()?;
    for (index, points) in &series {
        draw_line(
            &mut chart,
            points,
            SERIES[*index].1,
            Palette99::pick(*index).to_rgba(),
        )?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    Ok(())
}

fn draw_line<X, Y>(
    chart: &mut ChartContext<'_, SVGBackend<'_>, Cartesian2d<X, Y>>,
    points: &[(f64, f64)],
    label: &str,
    color: RGBAColor,
) -> Drawn
where
    X: Ranged<ValueType = f64> + AsRangedCoord<Value = f64>,
    Y: Ranged<ValueType = f64> + AsRangedCoord<Value = f64>,
{
    chart
        .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(3))?
        .label(label)
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    Ok(())
}
