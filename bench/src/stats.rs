//! Medians, spreads, and the rank test.

/// The middle value; the mean of the two middle ones when their number is even. 0 when there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.as_slice() {
        [] => 0.0,
        sorted if sorted.len() % 2 == 1 => sorted[middle],
        sorted => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// Half the distance from the smallest to the largest value, relative to the median: 0.02 says that all rounds lie
/// within a band of ±2 % (of the band's own middle). 0 for one value.
pub fn spread(values: &[f64]) -> f64 {
    let smallest = values.iter().copied().fold(f64::INFINITY, f64::min);
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let middle = median(values).abs();
    if values.len() < 2 || middle == 0.0 { 0.0 } else { (largest - smallest) / 2.0 / middle }
}

/// The probability that two samples of one population differ as much as these or more: the two-sided rank-sum test
/// of Mann and Whitney, exact, with the middle rank for equal values. 1 when a sample is empty.
pub fn rank_test(a: &[f64], b: &[f64]) -> f64 {
    if a.is_empty() || b.is_empty() {
        return 1.0;
    }
    let mut all: Vec<(f64, bool)> =
        a.iter().map(|v| (*v, true)).chain(b.iter().map(|v| (*v, false))).collect();
    all.sort_by(|x, y| x.0.total_cmp(&y.0));
    // Doubled ranks are whole numbers, middle ranks included.
    let mut ranks = vec![0_usize; all.len()];
    let mut from = 0;
    while from < all.len() {
        let to = from + all[from..].iter().take_while(|entry| entry.0 == all[from].0).count();
        ranks[from..to].fill(from + to + 1);
        from = to;
    }
    let total: usize = ranks.iter().sum();
    // ways[k][s]: choices of k of the ranks seen so far with the sum s.
    let mut ways = vec![vec![0.0_f64; total + 1]; a.len() + 1];
    ways[0][0] = 1.0;
    for rank in &ranks {
        for k in (1..=a.len()).rev() {
            for sum in (*rank..=total).rev() {
                ways[k][sum] += ways[k - 1][sum - rank];
            }
        }
    }
    let observed: usize = ranks.iter().zip(&all).filter(|(_, entry)| entry.1).map(|(rank, _)| rank).sum();
    // Twice the expected doubled rank sum of `a`: n1 (n1 + n2 + 1) times 2.
    let centre = 2 * a.len() * (all.len() + 1);
    let distance = (2 * observed).abs_diff(centre);
    let (mut extreme, mut every) = (0.0, 0.0);
    for (sum, count) in ways[a.len()].iter().enumerate() {
        every += count;
        if (2 * sum).abs_diff(centre) >= distance {
            extreme += count;
        }
    }
    extreme / every
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn medians_and_spreads() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(spread(&[95.0, 100.0, 105.0]), 0.05);
        assert_eq!(spread(&[7.0]), 0.0);
    }

    #[test]
    fn the_rank_test_agrees_with_tables() {
        // Complete separation of 3 and 3: 2 of the 20 choices.
        assert!((rank_test(&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0]) - 0.1).abs() < 1e-12);
        // 5 and 5: 2 of 252; 8 and 8: 2 of 12870.
        let (low, high): (Vec<f64>, Vec<f64>) =
            ((0..8).map(f64::from).collect(), (8..16).map(f64::from).collect());
        assert!((rank_test(&low[..5], &high[..5]) - 2.0 / 252.0).abs() < 1e-12);
        assert!((rank_test(&low, &high) - 2.0 / 12870.0).abs() < 1e-12);
        // U = 2 for 4 and 4: 8 of 70 (published tables: 0.114).
        assert!((rank_test(&[1.0, 2.0, 3.0, 6.0], &[4.0, 5.0, 7.0, 8.0]) - 8.0 / 70.0).abs() < 1e-12);
        assert_eq!(rank_test(&[1.0, 1.0], &[1.0, 1.0]), 1.0);
    }

    proptest! {
        #[test]
        fn it_is_a_probability_and_symmetric(
            a in prop::collection::vec(0_u8..20, 1..8),
            b in prop::collection::vec(0_u8..20, 1..8),
        ) {
            let a: Vec<f64> = a.into_iter().map(f64::from).collect();
            let b: Vec<f64> = b.into_iter().map(f64::from).collect();
            let p = rank_test(&a, &b);
            prop_assert!(p > 0.0 && p <= 1.0 + 1e-12);
            prop_assert!((p - rank_test(&b, &a)).abs() < 1e-9);
        }
    }
}
