//! Two revisions against each other: which of their differences are not chance.

use std::collections::BTreeMap;

use crate::record::{Better, Line, Unit};
use crate::report::markdown;
use crate::stats::{median, rank_test};

/// The older revision's name as a contender.
pub const A: &str = "a";
/// The newer one's.
pub const B: &str = "b";
/// Chance of a false alarm in a whole comparison, shared by its metrics (Bonferroni).
const ALARM: f64 = 0.05;

/// One metric of both.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Scenario, case and metric.
    pub what: String,
    /// Medians.
    pub a: f64,
    /// Medians.
    pub b: f64,
    /// How much worse `b` is: 0.1 is a tenth more time or a tenth less speed; below 0 it is better.
    pub worse: f64,
    /// Probability of such a difference by chance.
    pub p: f64,
    /// What that comes to.
    pub verdict: Verdict,
}

/// What a difference comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Worse, by more than the threshold and not by chance.
    Regression,
    /// Better, by more than the threshold and not by chance.
    Improvement,
    /// Nothing that these rounds could tell from chance.
    Same,
}

/// Compares all metrics of `a` and `b`. A difference counts when its median is above `threshold` (0.05: a twentieth).
pub fn compare(lines: &[Line], threshold: f64) -> Vec<Difference> {
    let mut values: BTreeMap<String, (Better, Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for line in lines {
        let Line::Sample(sample) = line else { continue };
        if sample.better == Better::Neither || sample.unit == Unit::Ratio {
            continue;
        }
        let what = format!("{}, {}: {}", sample.place.scenario, sample.place.case, sample.metric);
        let entry = values.entry(what).or_insert((sample.better, Vec::new(), Vec::new()));
        match sample.contender.as_str() {
            A => entry.1.push(sample.value),
            B => entry.2.push(sample.value),
            _ => {}
        }
    }
    values.retain(|_, (_, a, b)| !a.is_empty() && !b.is_empty());
    let level = ALARM / f64::from(u32::try_from(values.len().max(1)).unwrap_or(u32::MAX));
    let judge = |(what, (better, a, b)): (String, (Better, Vec<f64>, Vec<f64>))| {
        // What is the same in every round was counted, not measured: there is no chance in it.
        let counted = constant(&a) && constant(&b) && a.len() > 1 && b.len() > 1;
        let p = if counted && a[0] != b[0] { 0.0 } else { rank_test(&a, &b) };
        let (a, b) = (median(&a), median(&b));
        let (more, less) = if better == Better::Higher { (a, b) } else { (b, a) };
        let worse = if less == more { 0.0 } else { more / less - 1.0 };
        let verdict = match () {
            () if p > level => Verdict::Same,
            () if worse > threshold => Verdict::Regression,
            () if worse < -threshold => Verdict::Improvement,
            () => Verdict::Same,
        };
        Difference { what, a, b, worse, p, verdict }
    };
    values.into_iter().map(judge).collect()
}

fn constant(values: &[f64]) -> bool {
    values.windows(2).all(|pair| pair[0] == pair[1])
}

/// The differences as a table.
pub fn table(differences: &[Difference]) -> String {
    let header = ["", "a", "b", "b is worse by", "by chance", ""].map(str::to_owned).to_vec();
    let row = |difference: &Difference| {
        let verdict = match difference.verdict {
            Verdict::Regression => "REGRESSION",
            Verdict::Improvement => "improvement",
            Verdict::Same => "",
        };
        vec![
            difference.what.clone(),
            format!("{:.4}", difference.a),
            format!("{:.4}", difference.b),
            format!("{:+.1} %", difference.worse * 100.0),
            format!("{:.4}", difference.p),
            verdict.to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(differences.iter().map(row)).collect();
    markdown(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Place, Sample};

    fn lines(a: &[f64], b: &[f64], better: Better) -> Vec<Line> {
        let sample = |contender: &str, round: usize, value: f64| {
            let place = Place { scenario: "s".into(), machine: "m".into(), case: "c".into() };
            let (contender, metric, unit) = (contender.to_owned(), "x".to_owned(), Unit::Seconds);
            Line::Sample(Sample {
                place,
                contender,
                round: u32::try_from(round).unwrap(),
                metric,
                unit,
                better,
                value,
            })
        };
        let all = a.iter().enumerate().map(|(round, value)| sample(A, round, *value));
        all.chain(b.iter().enumerate().map(|(round, value)| sample(B, round, *value))).collect()
    }

    #[test]
    fn a_slowdown_is_a_regression_and_noise_is_not() {
        let a = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02, 0.98];
        let slow: Vec<f64> = a.iter().map(|value| value * 1.5).collect();
        let verdict = |b: &[f64], better| compare(&lines(&a, b, better), 0.05)[0].verdict;
        assert_eq!(verdict(&slow, Better::Lower), Verdict::Regression);
        assert_eq!(verdict(&slow, Better::Higher), Verdict::Improvement);
        let mut other = a;
        other.reverse();
        assert_eq!(verdict(&other, Better::Lower), Verdict::Same);
        // Certain, and too small to matter.
        let (even, slightly) = ([1.0; 7], [1.01; 7]);
        assert_eq!(compare(&lines(&even, &slightly, Better::Lower), 0.05)[0].verdict, Verdict::Same);
        // Counted, not measured.
        assert_eq!(
            compare(&lines(&[100.0; 2], &[200.0; 2], Better::Lower), 0.05)[0].verdict,
            Verdict::Regression
        );
        // Large, and seen too rarely to be told from chance.
        assert_eq!(compare(&lines(&a[..2], &slow[..2], Better::Lower), 0.05)[0].verdict, Verdict::Same);
    }
}
