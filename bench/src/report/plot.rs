//! Plots of tables, as SVG.

use std::collections::BTreeMap;

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::table::{Page, Section, Table};
use crate::record::Better;

/// Wide enough for a page, in pixels.
const WIDTH: u32 = 900;
/// Room for names beside curves, in pixels.
const LEGEND: u16 = 200;
/// Told apart by people who see colours differently (Okabe and Ito 2008).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x55, 0x55, 0x55),
    RGBColor(0xE6, 0x9F, 0x00),
    RGBColor(0x56, 0xB4, 0xE9),
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0x00, 0x72, 0xB2),
    RGBColor(0xD5, 0x5E, 0x00),
    RGBColor(0xCC, 0x79, 0xA7),
    RGBColor(0x8C, 0x6D, 0x31),
];
/// What [`percentile_of`] takes apart.
const PERCENTILES: [(&str, f64); 4] = [("p50", 1.0), ("p90", 2.0), ("p99", 3.0), ("p99.9", 4.0)];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The plots of a page by name: `<scenario>-<number>`.
pub(super) fn all(page: &Page) -> Result<BTreeMap<String, String>> {
    let mut plots = BTreeMap::new();
    for section in &page.sections {
        for (index, table) in section.tables.iter().enumerate() {
            if let Some(svg) = of(section, table)? {
                plots.insert(name(section, index), svg);
            }
        }
        for (index, svg) in latencies(section)?.into_iter().enumerate() {
            plots.insert(format!("{}-latency-{index}", section.about.scenario), svg);
        }
    }
    Ok(plots)
}

/// The name of the plot of a section's table `index`.
pub(super) fn name(section: &Section, index: usize) -> String {
    format!("{}-{index}", section.about.scenario)
}

/// Lines where cases are numbers, else bars of ratios; nothing where there is nothing to see.
fn of(section: &Section, table: &Table) -> Result<Option<String>> {
    let numbers: Option<Vec<f64>> = table
        .cases
        .iter()
        .map(|case| case.split(' ').next().and_then(|word| word.parse::<f64>().ok()))
        .collect();
    let plot = |draw: &dyn Fn(&Area<'_>) -> Result<()>, height: u32| -> Result<Option<String>> {
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
            area.fill(&WHITE).map_err(drawing)?;
            draw(&area)?;
            area.present().map_err(drawing)?;
        }
        Ok(Some(svg))
    };
    match numbers {
        Some(numbers) if section.about.kind == "density" && numbers.len() > 1 => {
            plot(&|area| lines(area, table, &numbers), 300)
        }
        _ if table.better == Better::Neither || table.metric.starts_with("latency p") => Ok(None),
        _ if table.contenders.len() > 1 && table.cells.values().any(|cell| cell.ratio.is_some()) => {
            let rows = table.cells.len() + table.cases.len();
            plot(&|area| bars(area, section, table), u32::try_from(rows)? * 20 + 90)
        }
        _ => Ok(None),
    }
}

fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow::anyhow!("cannot draw: {error}")
}

fn colour(index: usize) -> RGBColor {
    COLOURS[index % COLOURS.len()]
}

/// One horizontal bar a contender, grouped by case, with whiskers for the spread of the rounds; the reference's own
/// ratio, always 1, is the line.
fn bars(area: &Area<'_>, section: &Section, table: &Table) -> Result<()> {
    let largest = table
        .cells
        .values()
        .filter_map(|cell| cell.ratio.map(|ratio| ratio * (1.0 + cell.ratio_spread)))
        .fold(1.0, f64::max);
    let rows = table.cells.len() + table.cases.len();
    let bottom = f64::from(u32::try_from(rows)?);
    let caption = format!("{} – {}", table.machine, table.caption(&section.about.reference));
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 15))
        .margin(8)
        .x_label_area_size(30)
        .y_label_area_size(190)
        .build_cartesian_2d(0.0..largest * 1.12, bottom..0.0)
        .map_err(drawing)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_labels(8)
        .x_label_formatter(&|x| format!("{x:.2}"))
        .label_style(("sans-serif", 12))
        .light_line_style(WHITE)
        .draw()
        .map_err(drawing)?;
    let reference = [(1.0, 0.0), (1.0, bottom)];
    chart.draw_series([PathElement::new(reference, BLACK.stroke_width(1))]).map_err(drawing)?;
    let (mut row, mut labels) = (0.0, Vec::new());
    for case in &table.cases {
        labels.push((row + 0.5, case.clone(), true));
        row += 1.0;
        for (index, contender) in table.contenders.iter().enumerate() {
            let Some(cell) = table.cells.get(&(contender.clone(), case.clone())) else { continue };
            labels.push((row + 0.5, contender.clone(), false));
            if let Some(ratio) = cell.ratio {
                let bar = [(0.0, row + 0.12), (ratio, row + 0.88)];
                chart.draw_series([Rectangle::new(bar, colour(index).filled())]).map_err(drawing)?;
                let (low, high) = (ratio * (1.0 - cell.ratio_spread), ratio * (1.0 + cell.ratio_spread));
                let whisker = [(low.max(0.0), row + 0.5), (high, row + 0.5)];
                chart.draw_series([PathElement::new(whisker, BLACK.stroke_width(2))]).map_err(drawing)?;
                let place = (high + largest * 0.01, row + 0.15);
                let text = Text::new(format!("{ratio:.2}"), place, ("sans-serif", 12));
                chart.draw_series([text]).map_err(drawing)?;
            }
            row += 1.0;
        }
    }
    for (at, label, case) in labels {
        let (_, y) = chart.backend_coord(&(0.0, at));
        let (x, size) = if case { (12, 14) } else { (28, 12) };
        let style = TextStyle::from(("sans-serif", size).into_font()).color(&BLACK);
        area.draw_text(&label, &style, (x, y - 7)).map_err(drawing)?;
    }
    Ok(())
}

/// One line a contender over the number in the case.
fn lines(area: &Area<'_>, table: &Table, numbers: &[f64]) -> Result<()> {
    let series: Vec<(String, Vec<(f64, f64)>)> = table
        .contenders
        .iter()
        .map(|contender| {
            let points = table.cases.iter().zip(numbers).filter_map(|(case, number)| {
                let cell = table.cells.get(&(contender.clone(), case.clone()))?;
                Some((*number, cell.value))
            });
            (contender.clone(), points.collect())
        })
        .collect();
    let caption = format!("{} – {}", table.machine, table.metric);
    let unit = table.unit;
    curves(area, &caption, &series, true, &|x| format!("{x:.0}"), &|y| super::table::human(*y, unit))
}

/// Latency percentiles of a case: one curve a contender.
fn latencies(section: &Section) -> Result<Vec<String>> {
    let mut cases: Vec<(String, String)> = Vec::new();
    for table in section.tables.iter().filter(|table| percentile_of(&table.metric).is_some()) {
        for case in &table.cases {
            let key = (table.machine.clone(), case.clone());
            if !cases.contains(&key) {
                cases.push(key);
            }
        }
    }
    let mut plots = Vec::new();
    for (machine, case) in cases {
        let mut series: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
        for table in section.tables.iter().filter(|table| table.machine == machine) {
            let Some(place) = percentile_of(&table.metric) else { continue };
            for contender in &table.contenders {
                let Some(cell) = table.cells.get(&(contender.clone(), case.clone())) else { continue };
                match series.iter_mut().find(|(name, _)| name == contender) {
                    Some((_, points)) => points.push((place, cell.value)),
                    None => series.push((contender.clone(), vec![(place, cell.value)])),
                }
            }
        }
        if series.iter().all(|(_, points)| points.len() < 2) {
            continue;
        }
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, (WIDTH, 320)).into_drawing_area();
            area.fill(&WHITE).map_err(drawing)?;
            let caption = format!("{machine} – {case}: latency by percentile");
            let name = |x: &f64| {
                let nearest = PERCENTILES.iter().find(|(_, place)| (place - x).abs() < 0.01);
                nearest.map_or(String::new(), |(name, _)| (*name).to_owned())
            };
            let seconds = |y: &f64| super::table::human(*y, crate::record::Unit::Seconds);
            curves(&area, &caption, &series, false, &name, &seconds)?;
            area.present().map_err(drawing)?;
        }
        plots.push(svg);
    }
    Ok(plots)
}

fn percentile_of(metric: &str) -> Option<f64> {
    let name = metric.strip_prefix("latency ")?;
    PERCENTILES.iter().find(|(percentile, _)| *percentile == name).map(|(_, place)| *place)
}

/// Curves with a legend; values on a logarithmic scale when they span more than a decade.
fn curves(
    area: &Area<'_>,
    caption: &str,
    series: &[(String, Vec<(f64, f64)>)],
    logarithmic_x: bool,
    x_label: &dyn Fn(&f64) -> String,
    y_label: &dyn Fn(&f64) -> String,
) -> Result<()> {
    let points = || series.iter().flat_map(|(_, points)| points.iter().copied());
    let low = |values: &dyn Fn((f64, f64)) -> f64| points().map(values).fold(f64::INFINITY, f64::min);
    let high = |values: &dyn Fn((f64, f64)) -> f64| points().map(values).fold(0.0, f64::max);
    let (x_low, x_high) = (low(&|p| p.0), high(&|p| p.0));
    let (y_low, y_high) = (low(&|p| p.1), high(&|p| p.1));
    anyhow::ensure!(x_low.is_finite(), "a plot without points");
    let mut builder = ChartBuilder::on(area);
    builder.caption(caption, ("sans-serif", 15)).margin(8).margin_right(i32::from(LEGEND));
    builder.x_label_area_size(30).y_label_area_size(80);
    // The axes are drawn over positions; labels turn them back into values.
    let scale_x = move |x: f64| if logarithmic_x { x.max(1e-12).log10() } else { x };
    let steep = y_low > 0.0 && y_high / y_low > 10.0;
    let scale_y = move |y: f64| if steep { y.log10() } else { y };
    let (top, bottom) = (scale_y(y_high), if steep { scale_y(y_low) } else { 0.0 });
    let room = ((top - bottom) * 0.08).max(1e-9);
    let side = ((scale_x(x_high) - scale_x(x_low)) * 0.04).max(1e-3);
    let floor = if steep { bottom - room } else { bottom };
    let mut chart = builder
        .build_cartesian_2d(scale_x(x_low) - side..scale_x(x_high) + side, floor..top + room)
        .map_err(drawing)?;
    let back_x = |x: &f64| {
        let value = if logarithmic_x { 10_f64.powf(*x) } else { *x };
        x_label(&value)
    };
    let back_y = |y: &f64| {
        let value = if steep { 10_f64.powf(*y) } else { *y };
        y_label(&value)
    };
    chart
        .configure_mesh()
        .x_labels(if logarithmic_x { 8 } else { 5 })
        .y_labels(6)
        .x_label_formatter(&back_x)
        .y_label_formatter(&back_y)
        .label_style(("sans-serif", 12))
        .light_line_style(WHITE)
        .draw()
        .map_err(drawing)?;
    for (index, (_, points)) in series.iter().enumerate() {
        let colour = colour(index);
        let places: Vec<(f64, f64)> = points.iter().map(|(x, y)| (scale_x(*x), scale_y(*y))).collect();
        chart.draw_series(LineSeries::new(places.clone(), colour.stroke_width(2))).map_err(drawing)?;
        chart
            .draw_series(places.iter().map(|place| Circle::new(*place, 3, colour.filled())))
            .map_err(drawing)?;
    }
    // Beside the curves, where it covers none.
    let left = i32::try_from(WIDTH)? - i32::from(LEGEND) + 8;
    for (index, (name, _)) in series.iter().enumerate() {
        let y = 40 + 20 * i32::try_from(index)?;
        let line = PathElement::new([(left, y), (left + 18, y)], colour(index).stroke_width(2));
        area.draw(&line).map_err(drawing)?;
        let style = TextStyle::from(("sans-serif", 12).into_font()).color(&BLACK);
        area.draw_text(name, &style, (left + 24, y - 7)).map_err(drawing)?;
    }
    Ok(())
}
